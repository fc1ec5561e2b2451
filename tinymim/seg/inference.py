"""From photos to masks: many windows in one forward pass, and no logits at a photo's size for all classes at once.

MMSegmentation runs one window of one photo at a time, up-samples its logits for every class, adds them up at the size
of the resized photo, up-samples the sum to the photo's own size and takes the largest. Here the windows of several
photos share a forward pass, and everything after it is done for a few classes at a time, in the same order of
operations: from the same logits the same mask, bit for bit.

Legend: C = classes, K = some of them, h, w = logits of a window, H, W = the photo as the network sees it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.model import is_model_wrapper
from mmengine.runner import ValLoop, autocast
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder, SegDataPreProcessor
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import LOOPS
from torch import Tensor

from tinymim.engine.parallel import gathered

PHOTOS = 8  # that validation reads and predicts together
PIXELS = {"cpu": 1 << 19}  # of the windows in one forward pass
PIXELS_ELSEWHERE = 1 << 22
VALUES = {"cpu": 1 << 21}  # of the logits at a photo's size
VALUES_ELSEWHERE = 1 << 26


class Window(NamedTuple):
    """Where a window lies in which photo."""

    photo: int
    top: int
    left: int
    height: int
    width: int


def predict(model: Any, batch: dict[str, Any], *, confidence: bool = False) -> list[Any]:
    """Predict the masks of photos of any sizes.

    Args:
        model: A segmentor in evaluation mode.
        batch: What a data loader of MMSegmentation gives: ``inputs``, uint8 (3, H, W) each, and ``data_samples``.
        confidence: Also give ``confidence`` (1, height, width): the probability of the id in ``pred_sem_seg``, softmax
            of the logits, or sigmoid where there is one channel.

    Returns:
        The samples with ``pred_sem_seg`` (1, height, width) at their ``ori_shape``: uint8, from an ``EncoderDecoder``
        of up to 256 classes whose head works as MMSegmentation's base class does, without ``seg_logits``; of any other
        model, what its ``test_step`` gives.
    """
    model = model.module if is_model_wrapper(model) else model
    samples = batch["data_samples"]
    if not _is_plain(model) or any(sample.metainfo.get("flip") for sample in samples):
        ones = zip(batch["inputs"], samples, strict=True)
        found = [model.test_step({"inputs": [photo], "data_samples": [sample]})[0] for photo, sample in ones]
        for sample in found if confidence else ():
            logits_CHW, ids = sample.seg_logits.data.float(), sample.pred_sem_seg.data  # sigmoid of a single channel
            best = torch.where(ids > 0, logits_CHW, 1 - logits_CHW) if len(logits_CHW) == 1 else logits_CHW.softmax(0)
            sample.set_data({"confidence": PixelData(data=best.amax(0, keepdim=True))})
        return found
    ready = [
        model.data_preprocessor({"inputs": [photo], "data_samples": [sample]}, False)
        for photo, sample in zip(batch["inputs"], samples, strict=True)
    ]
    photos, samples = [each["inputs"] for each in ready], [each["data_samples"][0] for each in ready]
    parts = _logits(model, photos)
    for number, (photo, sample) in enumerate(zip(photos, samples, strict=True)):
        own = [(window, logits) for window, logits in parts if window.photo == number]
        mask, sure = _mask(model, own, tuple(photo.shape[2:]), tuple(sample.metainfo["ori_shape"][:2]), confidence)
        sample.set_data({"pred_sem_seg": PixelData(data=mask[None])})
        if sure is not None:
            sample.set_data({"confidence": PixelData(data=sure[None])})
    return samples


def _is_plain(model: Any) -> bool:
    """Whether the model predicts as MMSegmentation's base classes do, which is what this file does."""
    kind: Any = type(model)
    head: Any = type(getattr(model, "decode_head", None))
    return (
        isinstance(model, EncoderDecoder)
        and all(
            getattr(kind, name) is getattr(EncoderDecoder, name)
            for name in ("predict", "inference", "slide_inference", "whole_inference", "encode_decode", "_forward")
        )
        and kind.postprocess_result is EncoderDecoder.postprocess_result
        and issubclass(head, BaseDecodeHead)
        and head.predict is BaseDecodeHead.predict
        and head.predict_by_feat is BaseDecodeHead.predict_by_feat
        and type(model.data_preprocessor) is SegDataPreProcessor
        and not model.data_preprocessor.test_cfg  # no padding to cut off
        and model.out_channels <= 256
    )


def _logits(model: Any, photos: Sequence[Tensor]) -> list[tuple[Window, Tensor]]:
    """Every window of every photo with its logits (C, h, w); windows of one shape share forward passes."""
    shapes: dict[tuple[int, int], list[Window]] = {}
    for number, photo in enumerate(photos):
        for window in _windows(model.test_cfg, number, *photo.shape[2:]):
            shapes.setdefault((window.height, window.width), []).append(window)
    found = []
    for (height, width), windows in shapes.items():
        most = max(PIXELS.get(photos[0].device.type, PIXELS_ELSEWHERE) // (height * width), 1)
        for at in range(0, len(windows), most):
            some = windows[at : at + most]
            crops = [photos[n][:, :, y : y + height, x : x + width] for n, y, x, _, _ in some]
            found += list(zip(some, model(torch.cat(crops), mode="tensor"), strict=True))
    return found


def _windows(test_cfg: Any, photo: int, height: int, width: int) -> Iterator[Window]:
    """The windows of a photo in MMSegmentation's order: the last of a row or column is moved back inside."""
    if test_cfg.get("mode", "whole") == "whole":
        yield Window(photo, 0, 0, height, width)
        return
    (down, right), (tall, wide) = test_cfg["stride"], test_cfg["crop_size"]
    for row in range(max(height - tall + down - 1, 0) // down + 1):
        for column in range(max(width - wide + right - 1, 0) // right + 1):
            bottom, end = min(row * down + tall, height), min(column * right + wide, width)
            top, left = max(bottom - tall, 0), max(end - wide, 0)
            yield Window(photo, top, left, bottom - top, end - left)


def _mask(
    model: Any, parts: Sequence[tuple[Window, Tensor]], seen: tuple[int, ...], size: tuple[int, ...], confidence: bool
) -> tuple[Tensor, Tensor | None]:
    """The mask of a photo, uint8 ``size``, from the logits of its windows in a photo of ``seen`` pixels; and float32
    ``size``, the probabilities of its ids, if asked for."""
    first = parts[0][1]
    classes, kind = first.shape[0], first.device.type

    def resize(logits_KHW: Tensor, shape: tuple[int, ...]) -> Tensor:
        if logits_KHW.shape[1:] == shape:
            return logits_KHW
        return F.interpolate(logits_KHW[None], shape, mode="bilinear", align_corners=model.align_corners)[0]

    count_HW = first.new_zeros(seen)
    for window, _ in parts:
        count_HW[window.top : window.top + window.height, window.left : window.left + window.width] += 1
    best, mask = None, torch.zeros(size, dtype=torch.uint8, device=first.device)
    total_HW = torch.ones(size, device=first.device) if confidence else None  # of exp(logit - best)
    pixels = max(seen[0] * seen[1], size[0] * size[1])
    some = max(VALUES.get(kind, VALUES_ELSEWHERE) // pixels, 1)
    for at in range(0, classes, some):
        if len(parts) == 1:
            sum_KHW = resize(first[at : at + some], seen)
        else:
            sum_KHW = first.new_zeros((min(some, classes - at), *seen), dtype=torch.float32)  # as the photo, not half
            for (_, top, left, height, width), logits in parts:
                sum_KHW[:, top : top + height, left : left + width] += resize(logits[at : at + some], (height, width))
            sum_KHW /= count_HW
        logits_KHW = resize(sum_KHW, size)
        if classes == 1:
            share_HW = logits_KHW[0].sigmoid()
            chosen = share_HW > model.decode_head.threshold
            return chosen.to(torch.uint8), torch.where(chosen, share_HW, 1 - share_HW) if confidence else None
        for number, logits_HW in enumerate(logits_KHW, at):
            if best is None:
                best = logits_HW.clone()
                continue
            mask.masked_fill_(logits_HW > best, number)  # the first of equal ones stays, as in argmax
            if total_HW is not None:
                smaller = (logits_HW - best).abs().neg_().exp_()
                total_HW = torch.where(logits_HW > best, total_HW * smaller + 1, total_HW + smaller)
            torch.maximum(best, logits_HW, out=best)
    return mask, None if total_HW is None else total_HW.reciprocal()


def batched(loader_cfg: Any) -> Any:
    """A data loader's config with the photos that :func:`predict` takes at once; MMSegmentation's is one."""
    return {**loader_cfg, "batch_size": max(loader_cfg["batch_size"], PHOTOS)}


@LOOPS.register_module()
class BatchedValLoop(ValLoop):
    """MMEngine's ``ValLoop`` with :func:`predict`: a batch may hold photos of any sizes."""

    def run(self) -> dict[Any, Any]:
        """Validate; sharded weights are whole meanwhile, as processes take different numbers of passes."""
        with gathered(self.runner.model):
            return super().run()

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Predict and count a batch."""
        self.runner.call_hook("before_val_iter", batch_idx=idx, data_batch=data_batch)
        with autocast(enabled=self.fp16):
            outputs = predict(self.runner.model, data_batch)
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook("after_val_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)
