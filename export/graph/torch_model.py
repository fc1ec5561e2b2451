"""The PyTorch side of an export: load a checkpoint as the model that was trained, unchanged, with its contract."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinymim.compat import use_cores
from tinymim.errors import CheckpointError, ConfigError
from tinymim.files import sha256_file
from tinymim.models import Backbone, model_from_checkpoint, read_checkpoint
from tinymim.models.checkpoints import describe
from tinymim.models.classifier import load_classifier
from tinymim.models.weight_files import weights_file
from tinymim_export.graph.contract import Preparation, contract, fixed_input, prepared
from tinymim_export.graph.wrappers import as_list
from tinymim_export.runtime.metadata import first_line

PARTS = ("segmentor", "backbone", "classifier")


@dataclass
class TorchModel:
    """A PyTorch model as trained, and the metadata of a file made from it.

    Args:
        model: A bare backbone, TinyMIMBackbone, EncoderDecoder or Classifier in evaluation mode; never modified.
        part: "segmentor", "backbone" or "classifier".
        outputs: Output names of the reference forward: ("logits",), ("features",), ("level0", ..) or
            ("class_logits",).
        reference: Images (N, 3, H, W), normalised -> tuple of tensors, one per output, by the model's own code.
        size: Height and width (pixels) that the configuration trains or tests at.
        contract: mean, std (0-255 scale, RGB), classes, palette, resize, ... for the metadata.
        multiple: Sides must be multiples of this many pixels; None: the model accepts ``size`` only.
        bgr: Whether the model was trained on BGR; the file takes RGB all the same, and swaps the channels itself.
        cfg: Config of a segmentor.
        notes: Remarks for the user.
    """

    model: nn.Module
    part: str
    outputs: tuple[str, ...]
    reference: Callable[[Tensor], tuple[Tensor, ...]]
    size: tuple[int, int]
    contract: dict[str, Any]
    multiple: int | None = 1
    bgr: bool = False
    cfg: Any = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.bgr:
            own = self.reference
            self.reference = lambda images: own(images.flip(1))

    @property
    def free(self) -> bool:
        """Whether whole photos of different sizes reach the network at different sizes."""
        rule = self.contract["resize"] or {}
        whole = self.part == "segmentor" and rule.get("mode") == "whole"
        return whole and self.multiple is not None and fixed_input(rule) is None

    def require_size(self, size: tuple[int, int], *, dynamic: bool) -> None:
        """Raise :class:`ConfigError` for a size (height, width, in pixels) that the model cannot process."""
        name = type(getattr(self.model, "backbone", self.model)).__name__
        if self.multiple is None and (dynamic or size != self.size):
            raise ConfigError(
                f"{name} accepts {self.size[0]}x{self.size[1]} only",
                "it fails at other sizes in PyTorch, too",
                f"--size {self.size[0]} {self.size[1]} without --dynamic",
            )
        if self.multiple is not None and any(side % self.multiple for side in size):
            near = [max(round(side / self.multiple), 1) * self.multiple for side in size]
            raise ConfigError(
                f"{name} cannot process {size[0]}x{size[1]}",
                f"its branches fit together only if both sides are multiples of {self.multiple}",
                f"--size {near[0]} {near[1]}",
            )


def load_torch_model(
    checkpoint: str | Path, *, config: str | Path | None = None, part: str | None = None, num_heads: int | None = None
) -> TorchModel:
    """Load the model of ``--checkpoint`` (and ``--config``).

    Args:
        checkpoint: ``student.pth``, ``segmentor.pth``, an MMEngine ``iter_N.pth`` or any ViT file that we can read.
        config: MMSegmentation configuration; None: the one stored in ``segmentor.pth``.
        part: "segmentor", "backbone" or "classifier"; None: a segmentor if the file is one, else the backbone.
        num_heads: Heads per block for foreign ViT files, which do not store them.

    Raises:
        CheckpointError: no such file, damaged, or without the requested part.
        ConfigError: a configuration that cannot be read or does not fit.
    """
    use_cores()
    checkpoint = weights_file(checkpoint)
    found = read_checkpoint(checkpoint)
    is_segmentor = any(name.startswith("decode_head.") for name in found.dropped)
    if part is None:
        part = "segmentor" if is_segmentor else "backbone"
    if part not in PARTS:
        raise ConfigError(f"part={part!r} is unknown", f"the parts are {', '.join(PARTS)}", "choose one of them")
    if part == "segmentor" and not is_segmentor:
        raise CheckpointError(
            f"{checkpoint} is not a segmentor",
            f"it has no decode head; the file looks like {describe(found.state, found.config)}",
            "add --part backbone to export it as a backbone, or train a segmentor first: "
            f"tinymim segment upernet_tinymim_t --student {checkpoint}",
        )
    sha: dict[str, Any] = {"checkpoint_sha256": sha256_file(checkpoint), "config_sha256": None}
    if part == "classifier":
        return _classifier(checkpoint, config, num_heads, sha)
    cfg = None if config is None else _read_config(config)
    if cfg is not None:
        sha["config_sha256"] = sha256_file(cfg.filename)
    if is_segmentor:
        return _from_segmentor(checkpoint, cfg, part, found.meta, sha)
    if cfg is not None:
        return _backbone_of_config(checkpoint, cfg, sha)
    return _plain(checkpoint, num_heads, found.meta, sha)


def _plain(checkpoint: Path, num_heads: int | None, meta: dict[str, Any], sha: dict[str, Any]) -> TorchModel:
    """A bare backbone; its output ``features`` is the final feature map."""
    model, _ = model_from_checkpoint(checkpoint, num_heads=num_heads)

    def reference(images: Tensor) -> tuple[Tensor, ...]:
        return (model.forward_map(images),)

    about = contract(None, model.stage_info[-1].stride, meta=meta) | sha
    told = "mean" in meta and "std" in meta
    notes = (
        [] if told else ["the checkpoint does not say how photos are normalised: ImageNet's mean and std are written"]
    )
    return TorchModel(model, "backbone", ("features",), reference, model.img_size, about, notes=notes)


def _classifier(checkpoint: Path, config: str | Path | None, num_heads: int | None, sha: dict[str, Any]) -> TorchModel:
    """A whole classifier; its output ``class_logits`` is (N, K)."""
    if config is not None:
        raise ConfigError(
            "--config with --part classifier", "a classifier is described by its own file", "leave --config out"
        )
    model, found = load_classifier(checkpoint, num_heads=num_heads)
    about = contract(None, model.backbone.stage_info[-1].stride, meta=found.meta) | sha
    about["classes"] = found.meta.get("classes")
    scored = {None: "", True: "resized to a square", False: "cropped in the middle"}[found.meta.get("eval_squash")]
    notes = [f"when the classifier was scored, photos were {scored}"] if scored else []
    size = model.backbone.img_size
    return TorchModel(model, "classifier", ("class_logits",), lambda x: (model(x),), size, about, notes=notes)


def _backbone_of_config(checkpoint: Path, cfg: Any, sha: dict[str, Any]) -> TorchModel:
    """A student in the backbone of a segmentation configuration: four levels, with an untrained pyramid."""
    import tinymim.seg  # noqa: F401  (registers the backbone; must come before mmseg.models)

    from mmengine.model import revert_sync_batchnorm  # isort: skip
    from mmengine.registry import init_default_scope  # isort: skip
    from mmseg.registry import MODELS  # isort: skip

    if cfg.model.backbone.type != "TinyMIMBackbone":
        raise CheckpointError(
            f"{checkpoint} has no decode head",
            f"a {cfg.model.backbone.type} is exported from its whole segmentor: only our students have their own files",
            "give the segmentor.pth or iter_N.pth of a training run",
        )
    init_default_scope("mmseg")
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(checkpoint))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same initial values of the pyramid at export and at verification
        backbone = revert_sync_batchnorm(MODELS.build(cfg.model.backbone))
        backbone.init_weights()
    backbone.eval()
    found = prepared(cfg, MODELS.build(cfg.model.get("data_preprocessor") or dict(type="BaseDataPreprocessor")))
    about = contract(found, backbone.stage_info[-1].stride, cfg.model.get("test_cfg")) | sha
    loaded = _levels(backbone, lambda images: tuple(backbone(images)), _size(cfg, about["resize"]), about, found)
    if backbone.fpn_names:
        loaded.notes.append(
            "the pyramid (fpn1 to fpn4) is untrained: the checkpoint holds a student only; "
            "fine for latency, not for use"
        )
    return loaded


def _from_segmentor(checkpoint: Path, config: Any, part: str, meta: dict[str, Any], sha: dict[str, Any]) -> TorchModel:
    """A trained segmentor, or its backbone with the pyramid."""
    from tinymim.seg import load_segmentor

    model: Any
    model, cfg = load_segmentor(checkpoint, config)
    _require_plain(model)
    if config is None and isinstance(meta.get("config"), str):
        sha["config_sha256"] = hashlib.sha256(meta["config"].encode()).hexdigest()
    found = prepared(cfg, model.data_preprocessor)
    about = contract(found, 0, model.test_cfg, model.decode_head) | sha
    size = _size(cfg, about["resize"])
    ours = isinstance(model.backbone, Backbone)  # takes every size
    about["stride"], multiple = (model.backbone.stage_info[-1].stride, 1) if ours else _probe(model, size)
    if multiple not in (1, None):  # PyTorch fails on other photos; tinymim eval and predict pad them
        about["resize"].setdefault("pad", {"value": 0, "size_divisor": multiple})
    if part == "backbone":
        return _levels(model, lambda images: tuple(as_list(model.extract_feat(images))), size, about, found, multiple)
    about |= {key: model.dataset_meta.get(key) for key in ("classes", "palette")}

    def reference(images: Tensor) -> tuple[Tensor, ...]:
        shapes = dict(img_shape=images.shape[-2:], pad_shape=images.shape[-2:], ori_shape=images.shape[-2:])
        return (model.encode_decode(images, [shapes] * images.shape[0]),)

    bgr = found.order == "BGR"
    return TorchModel(model, "segmentor", ("logits",), reference, size, about, multiple, bgr, cfg, found.notes)


def _require_plain(model: Any) -> None:
    """Refuse models that are not backbone, neck and one head whose scores are up-sampled to the image.

    Raises:
        ConfigError: a cascade, or a head with its own inference (queries, points).
    """
    from mmseg.models import EncoderDecoder
    from mmseg.models.decode_heads import DAHead, EncHead
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    head = model.decode_head
    cascade = isinstance(head, nn.ModuleList) or type(model).encode_decode is not EncoderDecoder.encode_decode
    plain = {BaseDecodeHead.predict, DAHead.predict, EncHead.predict}
    if cascade or type(head).predict not in plain or type(head).predict_by_feat is not BaseDecodeHead.predict_by_feat:
        several = isinstance(head, nn.ModuleList)
        what = f"{type(model).__name__} with {len(head)} heads" if several else type(head).__name__
        raise ConfigError(
            f"{what} cannot be exported",
            "a cascade or a head with its own inference (masks from queries, refined points) is not a single graph "
            "of backbone, neck, head and up-sampling",
            "choose an EncoderDecoder with one head that predicts scores for every pixel",
        )


def _probe(model: Any, size: tuple[int, int]) -> tuple[int, int | None]:
    """Coarsest stride of a backbone and the number of pixels its sides must be multiples of, found by trying.

    Returns:
        (stride, multiple); multiple is None if only the given size runs.
    """
    shadow = copy.deepcopy(model).to("meta")

    def levels(height: int, width: int) -> list[Tensor]:
        with torch.no_grad():
            features = shadow.extract_feat(torch.zeros(1, 3, height, width, device="meta"))
            shadow.decode_head(features)
        return as_list(features)

    try:
        stride = max(round(size[0] / level.shape[-2]) for level in levels(*size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"the model does not run on a photo of three channels and {size[0]}x{size[1]} pixels",
            first_line(error),
            "only models of RGB or BGR photos can be exported; a size that it takes is given by --size",
        ) from error
    for multiple in (1, 2, 4, 8, 16, 32, 64):
        odd = [(side // multiple // 2 * 2 + 1) * multiple for side in size]
        try:
            levels(*odd)
            levels(*(2 * side + multiple for side in odd))
        except (RuntimeError, AssertionError, ValueError):
            continue
        return stride, multiple
    return stride, None


def _levels(
    model: nn.Module,
    reference: Callable[[Tensor], tuple[Tensor, ...]],
    size: tuple[int, int],
    about: dict[str, Any],
    found: Preparation,
    multiple: int | None = 1,
) -> TorchModel:
    with torch.no_grad():
        count = len(reference(torch.zeros(1, 3, *size)))
    names = tuple(f"level{i}" for i in range(count))
    bgr = found.order == "BGR"
    return TorchModel(model, "backbone", names, reference, size, about, multiple, bgr, notes=found.notes)


def _read_config(config: str | Path) -> Any:
    """An MMSegmentation configuration by path or name."""
    from tinymim.seg.config import find_config

    cfg = find_config(config)
    if "model" not in cfg or "backbone" not in cfg.model:
        raise ConfigError(
            f"{config} describes no segmentation model", "it has no model.backbone", "choose a file of mmseg_configs/"
        )
    return cfg


def _size(cfg: Any, rule: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the network's input: its windows, what every photo comes to, else training crops."""
    model = cfg.model
    candidates = [
        rule.get("crop"),
        fixed_input(rule),
        (model.get("test_cfg") or {}).get("crop_size"),
        (model.get("data_preprocessor") or {}).get("size"),
        cfg.get("crop_size"),
        model.backbone.get("img_size"),
        512,
    ]
    size = next(value for value in candidates if value is not None)
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
