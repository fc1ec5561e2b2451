"""``--teacher-segmentor``: a frozen segmentor teaches its logits to the one in training, beside the labels.

Two losses, each with a weight in the config (``teacher.kl``, ``teacher.channel``):

- :func:`pixel_kl`: at every position, the student's distribution over classes follows the teacher's.
- :func:`channel_kl`: for every class, the student's map, as a distribution over positions, follows the teacher's.

Both are taken on the coarser of the two grids of logits, the finer one averaged over the areas of its cells. Logits are
interpolated between the points of a grid, so nothing more is known there: at the crop's size a loss would cost the
square of the stride (256 for a linear head on patches of 16) and say no more. As prediction does, both grids are taken
to cover the whole crop, whatever the stride.

Every real pixel counts, also one whose label is ignored: the teacher knows it. Padding of crops does not count.

Legend: B = photos, C = classes, H, W = pixels of a crop, h, w = a grid of logits.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor

from tinymim.data.folders import Layout
from tinymim.distill.recipe_keys import Table
from tinymim.errors import CheckpointError, ConfigError
from tinymim.hub import is_hub
from tinymim.models.weight_files import weights_file
from tinymim.seg.config import say
from tinymim.seg.known import TEACHER
from tinymim.seg.segmentor import class_names, load_segmentor

# heads that give several outputs -> the one that they predict with; of others it is the first
PREDICTING = {"PIDHead": 1, "IterativeDecodeHead": -1}


def pixel_kl(student_BChw: Tensor, teacher_BChw: Tensor, share_Bhw: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * mean over photos and positions of KL(p || q), p and q the softmax over classes of the logits / T.

    p is the teacher's, q the student's.

    Source: Hinton et al. 2015 (arXiv 1503.02531), at every pixel as in Liu et al., CVPR 2019 (arXiv 1903.04197).

    Args:
        student_BChw: Logits, float32 or float64.
        teacher_BChw: Logits of the same shape.
        share_Bhw: Weight of each position in its photo's mean: its share of real pixels.
        temperature: T, above 0.

    Returns:
        The loss, (), in nats.
    """
    log_q, log_p = ((logits / temperature).log_softmax(1) for logits in (student_BChw, teacher_BChw))
    kl_Bhw = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    return temperature**2 * ((share_Bhw * kl_Bhw).sum((1, 2)) / share_Bhw.sum((1, 2))).mean()


def channel_kl(student_BChw: Tensor, teacher_BChw: Tensor, share_Bhw: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 * mean over photos and classes of KL(p || q), p and q the softmax over positions of the logits / T.

    p is the teacher's, q the student's.

    Source: Shu et al., ICCV 2021 (arXiv 2011.13256), which has T = 4, and weight 3 for logits.

    Args:
        student_BChw: Logits, float32 or float64.
        teacher_BChw: Logits of the same shape.
        share_Bhw: Weight of each position in the softmax, 0 to 1: its share of real pixels.
        temperature: T, above 0.

    Returns:
        The loss, (), in nats.
    """
    log_share_B1n = share_Bhw.flatten(1)[:, None].log()  # minus infinity where nothing is real
    log_q, log_p = (
        (logits.flatten(2) / temperature + log_share_B1n).log_softmax(2) for logits in (student_BChw, teacher_BChw)
    )
    difference_BCn = (log_p - log_q).masked_fill(log_share_B1n.isneginf(), 0)
    return temperature**2 * (log_p.exp() * difference_BCn).sum(2).mean()


class SegTeacher:
    """A frozen segmentor that teaches.

    It is no module of the student: no checkpoint, optimizer or wrapper for several processes sees it; every process has
    a whole one.

    Args:
        model: The segmentor, on its device.
        settings: Weights and temperatures: the config's ``teacher``.
        order: (C,): for every class of the student the teacher's number of it; None: the same.
    """

    def __init__(self, model: Any, settings: Any, order: Tensor | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.settings, self.order = settings, order
        model.data_preprocessor.test_cfg = None  # crops are padded here

    @torch.no_grad()
    def logits(self, photos: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """The teacher's logits (B, C, h, w) of crops, as it normalises them, classes in the student's order.

        Args:
            photos: As a data loader gives them, uint8 (3, height, width) each.
            size: Height and width that they are padded to at the bottom and right, by zeros after normalisation.
        """
        padded = []
        for photo in photos:
            crop = self.model.data_preprocessor({"inputs": [photo]}, False)["inputs"]
            padded.append(F.pad(crop, (0, size[1] - crop.shape[3], 0, size[0] - crop.shape[2])))
        head = self.model.decode_head
        logits_BChw = _logits(head, head(self.model.extract_feat(torch.cat(padded))))
        return logits_BChw if self.order is None else logits_BChw[:, self.order]

    def teach(self, model: Any) -> None:
        """Let a segmentor's training losses hold this teacher's, ``decode.loss_teacher_kl`` and ``..._channel``.

        Args:
            model: An ``EncoderDecoder`` that is not wrapped, changed in place. Its auxiliary heads are not taught.

        Raises:
            ConfigError: it has several decode heads, or one that is not trained on logits.
        """
        _check_head(model, "the model of the config")
        head, own = model.decode_head, model.decode_head.loss_by_feat

        def attend(preprocessor: Any, given: tuple[Any, ...], ready: dict[str, Any]) -> None:
            """Give every sample of a training batch the teacher's logits, as it has its label."""
            if preprocessor.training:
                logits_BChw = self.logits(given[0]["inputs"], ready["inputs"].shape[2:])
                for sample, logits_Chw in zip(ready["data_samples"], logits_BChw, strict=True):
                    sample.teacher_logits = PixelData(data=logits_Chw)

        def loss_by_feat(outputs: Any, samples: list[Any]) -> dict[str, Tensor]:
            return {**own(outputs, samples), **self.losses(_logits(head, outputs), samples)}

        model.data_preprocessor.register_forward_hook(attend)
        head.loss_by_feat = loss_by_feat

    def losses(self, student_BChw: Tensor, samples: Sequence[Any]) -> dict[str, Tensor]:
        """The weighted losses, by name; in float32, those of weight 0 left out.

        Args:
            student_BChw: The student's logits.
            samples: Their samples, with ``teacher_logits``.
        """
        settings = self.settings
        teacher_BChw = torch.stack([sample.teacher_logits.data for sample in samples])
        grid = [min(sides) for sides in zip(student_BChw.shape[2:], teacher_BChw.shape[2:], strict=True)]
        with torch.autocast(student_BChw.device.type, enabled=False):
            student, teacher = (_averaged(each.float(), grid) for each in (student_BChw, teacher_BChw))
            share_Bhw = _averaged(_real(samples, student.device), grid)
            found = {}
            if settings.kl:
                found["loss_teacher_kl"] = settings.kl * pixel_kl(student, teacher, share_Bhw, settings.temperature)
            if settings.channel:
                loss = channel_kl(student, teacher, share_Bhw, settings.channel_temperature)
                found["loss_teacher_channel"] = settings.channel * loss
        return found


def teacher_settings(given: Any) -> dict[str, Any]:
    """The config's ``teacher``, checked, with the defaults of :data:`~tinymim.seg.known.TEACHER`.

    Raises:
        ConfigError: an unknown key or a wrong value, or all weights are 0.
    """
    Table(keys=TEACHER).check("teacher", given)
    settings = {key: rule.default if given.get(key) is None else given[key] for key, rule in TEACHER.items()}
    if not (settings["kl"] or settings["channel"]):
        raise ConfigError(
            "the teacher would teach nothing",
            "teacher.kl and teacher.channel are both 0",
            "leave --teacher-segmentor out, or give one of them a weight: --cfg-options teacher.kl=1",
        )
    return settings


def set_teacher(cfg: Config, checkpoint: str | Path | None) -> None:
    """Complete the config's ``teacher``, if there is to be one.

    Args:
        cfg: The config, changed in place.
        checkpoint: The teacher's file; None: the config's, if it names one.

    Raises:
        ConfigError: see :func:`teacher_settings`.
    """
    if checkpoint is not None and (is_hub(checkpoint) or Path(checkpoint).is_dir()):
        checkpoint = weights_file(checkpoint)
    if checkpoint is not None or cfg.get("teacher") is not None:
        cfg.teacher = teacher_settings(cfg.get("teacher") or {})
        cfg.teacher.checkpoint = cfg.teacher.checkpoint if checkpoint is None else str(checkpoint)


def load_teacher(cfg: Config, layout: Layout, device: str) -> SegTeacher | None:
    """The teacher of a config, tried on one crop; None if it has none.

    Args:
        cfg: The config after :func:`set_teacher`.
        layout: The data that the student is trained on.
        device: Where both run.

    Raises:
        CheckpointError: no such file, or no segmentor.
        ConfigError: only weights of its losses are given, or it cannot teach this student.
        DataError: it knows other classes than the data have.
    """
    settings = cfg.get("teacher")
    if not settings:
        return None
    path = settings.checkpoint
    if path is None:
        raise ConfigError(
            "the config has a teacher without a file",
            "its keys teacher.kl, teacher.channel, ... weight what a segmentor's file teaches",
            "add --teacher-segmentor FILE",
        )
    if not Path(path).is_file():
        raise CheckpointError(
            f"no teacher at {path}", "the file does not exist", "give the segmentor.pth again: --teacher-segmentor FILE"
        )
    model, _ = load_segmentor(path)
    _check_head(model, f"the teacher {path}")
    table, remark = layout.match(str(path), class_names(model))
    order = None if table is None else torch.from_numpy(table[: len(layout.classes)].astype("int64")).argsort()
    teacher = SegTeacher(model.to(device), settings, None if order is None else order.to(device))
    if size := cfg.model.data_preprocessor.get("size"):
        try:
            teacher.logits([torch.zeros(3, *size, dtype=torch.uint8)], size)
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            raise ConfigError(
                f"the teacher {path} cannot read crops of {size[0]} x {size[1]} pixels",
                f"{type(error).__name__}: {str(error)[:200]}",
                "give a teacher that takes any size, or crops of its size",
            ) from error
    say(f"teacher: {path}" + (f"\nnote: {path}: {remark}" if remark else ""))
    return teacher


def _check_head(model: Any, name: str) -> None:
    """Refuse a segmentor without a decode head that gives the logits of all classes at once.

    Raises:
        ConfigError: it is one.
    """
    kind, head = type(model), getattr(model, "decode_head", None)
    if (
        not isinstance(model, EncoderDecoder)
        or kind._forward is not EncoderDecoder._forward
        or not isinstance(head, BaseDecodeHead)
        or type(head).loss is not BaseDecodeHead.loss
    ):
        raise ConfigError(
            f"{name} is a {kind.__name__} with a {type(head).__name__}",
            "logits are taught from one decode head that scores every class at every position to another",
            "use an EncoderDecoder with one such head (UPerHead, FCNHead, SegformerHead, PIDHead, ...), or leave "
            "--teacher-segmentor out",
        )


def _logits(head: Any, outputs: Any) -> Tensor:
    """What a head predicts with, of all its outputs; one score for two classes, s, as their logits (0, s).

    Raises:
        ConfigError: these are no logits of its classes.
    """
    if not isinstance(outputs, Tensor):
        outputs = outputs[PREDICTING.get(type(head).__name__, 0)]
    if outputs.ndim != 4 or outputs.shape[1] != head.out_channels:
        raise ConfigError(
            f"a {type(head).__name__} gives {tuple(outputs.shape)}",
            f"its logits would be (photos, {head.out_channels}, height, width)",
            "leave --teacher-segmentor out",
        )
    return torch.cat([torch.zeros_like(outputs), outputs], 1) if outputs.shape[1] == 1 else outputs


def _real(samples: Sequence[Any], device: torch.device) -> Tensor:
    """(B, H, W): 1 for pixels of photos, 0 for padding."""
    real_BHW = torch.zeros(len(samples), *samples[0].gt_sem_seg.shape[-2:], device=device)
    for real_HW, sample in zip(real_BHW, samples, strict=True):
        height, width = sample.img_shape[:2]
        real_HW[:height, :width] = 1
    return real_BHW


def _averaged(values: Tensor, grid: Sequence[int]) -> Tensor:
    """Values (..., height, width) averaged over the area of every cell of a grid (..., h, w) that is no finer."""
    if [*values.shape[-2:]] == [*grid]:
        return values
    rows, columns = (
        _areas(few, many, values.dtype, values.device) for few, many in zip(grid, values.shape[-2:], strict=True)
    )
    return rows @ values @ columns.T


@functools.lru_cache(maxsize=32)
def _areas(few: int, many: int, kind: torch.dtype, device: torch.device) -> Tensor:
    """(few, many): what share of each of ``few`` equal intervals each of ``many`` covers; rows have the sum 1."""
    i, j = torch.arange(few)[:, None], torch.arange(many)
    overlap = torch.minimum((i + 1) * many, (j + 1) * few) - torch.maximum(i * many, j * few)
    return (overlap.clamp(min=0) / many).to(device, kind)
