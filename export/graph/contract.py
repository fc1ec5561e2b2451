"""What happens to a photo before and after the network, read from what really runs when the model is tested.

That is the built ``data_preprocessor`` (its own units, channel order and padding), every step of the test loader's
pipeline, and ``test_cfg``. A step that a file cannot repeat is refused by name; nothing is guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinymim.errors import ConfigError
from tinymim.models.vit import IMAGENET_MEAN, IMAGENET_STD

LOADERS = ("LoadPhoto", "LoadImageFromFile", "LoadImageFromNDArray")  # all give BGR
NO_PIXELS = ("LoadLabel", "LoadAnnotations", "GenerateEdge", "PackSegInputs")  # leave the photo as it is
PACK = {"type": "PackSegInputs"}


@dataclass
class Preparation:
    """What the pipeline and the preprocessor do to the pixels of a photo.

    Attributes:
        mean: Subtracted from the three channels, in the units of the pixels (0 to 255), in the order of ``order``.
        std: Divides them afterwards.
        order: Order of the channels the network sees, "RGB" or "BGR".
        resize: ``scale`` (width, height, or None), ``keep_ratio``; where the pipeline has them ``multiple`` (resized
            once more, to multiples of these sides), ``float`` (resized as float32, not rounded to 8 bits), ``pad``.
        notes: What the file does not do exactly as the model.
    """

    mean: np.ndarray = field(default_factory=lambda: np.zeros(3))
    std: np.ndarray = field(default_factory=lambda: np.ones(3))
    order: str = "BGR"
    resize: dict[str, Any] = field(default_factory=lambda: {"scale": None, "keep_ratio": False})
    notes: list[str] = field(default_factory=list)

    def swap(self) -> None:
        """Reverse the channels."""
        self.mean, self.std = self.mean[::-1], self.std[::-1]
        self.order = self.order[::-1]

    def normalise(self, mean: Any, std: Any) -> None:
        """Subtract and divide, after what is done already."""
        self.mean, self.std = self.mean + _three(mean, "mean") * self.std, self.std * _three(std, "std")


def prepared(cfg: Any, preprocessor: Any) -> Preparation:
    """What is done to a photo when the model of a config is tested.

    Args:
        cfg: The MMSegmentation config.
        preprocessor: The built ``data_preprocessor`` of the model.

    Raises:
        ConfigError: a step or a preprocessor that a file cannot repeat, by name.
    """
    found, floats = Preparation(), False
    steps = test_steps(cfg)
    if steps is None:
        found.notes.append("the config names no test pipeline: photos run at their own size")
    for step in steps or ():
        kind = step_name(step)
        if kind in LOADERS:
            _check_loader(kind, step, found)
            floats = bool(step.get("to_float32"))
        elif kind in ("Resize", "ResizeToMultiple", "ResizeShortestEdge"):
            _resize(kind, step, found.resize)
            if floats:
                found.resize["float"] = True
        elif kind == "Normalize":
            if step.get("to_rgb", True):
                found.swap()
            found.normalise(step["mean"], step["std"])
            floats = True
        elif not (kind in NO_PIXELS or (kind == "RandomFlip" and step.get("prob") == 0)):
            raise cannot_repeat(kind, "a file has no such step")
    _preprocess(preprocessor, found)
    return found


def test_steps(cfg: Any) -> list[Any] | None:
    """The pipeline that testing runs: the test loader's, else the validation loader's, else ``test_pipeline``."""
    for name in ("test_dataloader", "val_dataloader"):
        pipeline = _pipeline((cfg.get(name) or {}).get("dataset"))
        if pipeline is not None:
            return pipeline
    pipeline = cfg.get("test_pipeline")
    return None if pipeline is None else list(pipeline)


def _pipeline(dataset: Any) -> list[Any] | None:
    """The pipeline of a dataset, or of the first one inside a wrapper (ConcatDataset, RepeatDataset, ...)."""
    if not isinstance(dataset, dict):
        return None
    if dataset.get("pipeline"):
        return list(dataset["pipeline"])
    inner = dataset.get("dataset") or next(iter(dataset.get("datasets") or ()), None)
    return _pipeline(inner)


def step_name(step: Any) -> str:
    """A transform's class name, without scope or module."""
    kind = step.get("type")
    return kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def cannot_repeat(step: str, why: str) -> ConfigError:
    """The error for a step that no file can repeat."""
    return ConfigError(
        f"the test pipeline's {step} cannot be put into a file",
        f"{why}; without it the file would see other pixels than the model and give other masks",
        "take it out of test_dataloader.dataset.pipeline (and test the model so), then give that config: --config FILE",
    )


def _check_loader(kind: str, step: Any, found: Preparation) -> None:
    colour, decoder = step.get("color_type", "color"), step.get("imdecode_backend", "cv2")
    if colour == "color_ignore_orientation":
        found.notes.append("the model was tested on photos as stored; the file turns them upright by their EXIF")
    elif colour != "color":
        raise cannot_repeat(f"{kind}(color_type={colour!r})", "files take photos of three colours")
    if decoder not in ("cv2", "pillow", "turbojpeg"):
        raise cannot_repeat(f"{kind}(imdecode_backend={decoder!r})", "it gives channels in another order")


def _resize(kind: str, step: Any, rule: dict[str, Any]) -> None:
    """Add a resizing step to the rule."""
    how = step.get("interpolation") or "bilinear"
    if how != "bilinear" or step.get("backend", "cv2") not in (None, "cv2"):
        named = how if how != "bilinear" else step["backend"]
        raise cannot_repeat(f"{kind} ({named})", "files resize photos by OpenCV's bilinear interpolation")
    if "multiple" in rule or (kind != "ResizeToMultiple" and rule["scale"]):
        raise cannot_repeat(kind, "photos are resized before it already")
    if kind == "ResizeToMultiple":
        divisor = step.get("size_divisor", 32)
        width, height = (divisor, divisor) if isinstance(divisor, int) else divisor
        rule["multiple"] = [int(height), int(width)]
        return
    scale = step.get("scale")
    if scale is None or not np.all(np.asarray(scale) > 0):
        raise cannot_repeat(f"{kind}(scale={scale}, scale_factor={step.get('scale_factor')})", "it names no scale")
    if kind == "ResizeShortestEdge":
        shortest = scale if isinstance(scale, int) else min(scale)
        rule |= {"scale": [max(int(step["max_size"]), int(shortest)), int(shortest)], "keep_ratio": True}
        if step["max_size"] < shortest:
            raise cannot_repeat(kind, f"its max_size {step['max_size']} is below its scale {shortest}")
        return
    sides = [scale, scale] if isinstance(scale, int) else scale
    rule |= {"scale": [int(side) for side in sides], "keep_ratio": bool(step.get("keep_ratio", False))}


def _preprocess(preprocessor: Any, found: Preparation) -> None:
    """What the built preprocessor adds: channel order, normalisation, padding."""
    from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
    from mmseg.models import SegDataPreProcessor

    kind, name = type(preprocessor), type(preprocessor).__name__
    if kind.forward is SegDataPreProcessor.forward:
        swaps, pad = preprocessor.channel_conversion, preprocessor.test_cfg
    elif kind.forward is ImgDataPreprocessor.forward:
        swaps, pad = preprocessor._channel_conversion, None
        if preprocessor.pad_size_divisor != 1:
            raise cannot_repeat(f"{name}(pad_size_divisor)", "MMSegmentation stretches the padded result to the photo")
    elif kind.forward is BaseDataPreprocessor.forward:
        return
    else:
        raise ConfigError(
            f"what {name} does to photos is not known",
            "a file must repeat the model's data_preprocessor, and this one has code of its own",
            "use SegDataPreProcessor",
        )
    if swaps:
        found.swap()
    if preprocessor._enable_normalize:
        found.normalise(_plain(preprocessor.mean), _plain(preprocessor.std))
    if pad:  # normalised photos are padded at the bottom and right before the network
        sides = {key: list(value) if isinstance(value, Sequence) else value for key, value in dict(pad).items()}
        found.resize["pad"] = {"value": preprocessor.pad_val} | sides


def _plain(values: Any) -> list[float]:
    """A float32 tensor as the decimal numbers it was made from."""
    return [float(str(np.float32(value))) for value in values.flatten().tolist()]


def _three(values: Any, name: str) -> np.ndarray:
    """One value for each channel.

    Raises:
        ConfigError: the model takes another number of channels than three.
    """
    array = np.asarray(values, np.float64).reshape(-1)
    if len(array) not in (1, 3):
        raise ConfigError(
            f"the model takes photos of {len(array)} channels",
            f"its {name} is {array.tolist()}; files of tinymim-export take the three colours of a photo",
            "only models of RGB or BGR photos can be exported",
        )
    return np.broadcast_to(array, 3)


def contract(
    found: Preparation | None, stride: int, test_cfg: Any = None, head: Any = None, meta: dict[str, Any] | None = None
) -> dict[str, Any]:
    """``tinymim.*`` metadata of a file: mean and std in 0-255 units of RGB, whatever the source used.

    Args:
        found: What the config does to a photo; None for a bare backbone, whose mean and std (0 to 1) are in ``meta``.
        stride: Of the coarsest level, in pixels.
        test_cfg: The model's ``test_cfg``.
        head: The model's decode head.
        meta: Of the checkpoint.
    """
    values: dict[str, Any] = {"classes": None, "palette": None}
    if found is None:
        of = meta or {}
        pair = [np.multiply(of.get("mean", IMAGENET_MEAN), 255), np.multiply(of.get("std", IMAGENET_STD), 255)]
    else:
        pair = [found.mean, found.std] if found.order == "RGB" else [found.mean[::-1], found.std[::-1]]
    values |= {
        name: [round(float(v), 6) for v in channels] for name, channels in zip(("mean", "std"), pair, strict=True)
    }
    rule = None if found is None else found.resize | test_rule(test_cfg, head)
    return values | {"channel_order": "RGB", "stride": stride, "resize": rule}


def test_rule(test_cfg: Any, head: Any) -> dict[str, Any]:
    """How the network is applied and its logits become a mask: whole or in windows, up-sampling, threshold."""
    test = test_cfg or {}
    rule: dict[str, Any] = {"interpolation": "bilinear", "mode": test.get("mode", "whole")}
    if rule["mode"] == "slide":
        rule |= {"crop": list(test["crop_size"]), "slide_stride": list(test["stride"])}
    one = getattr(head, "out_channels", None) == 1
    return rule | {
        "align_corners": bool(getattr(head, "align_corners", False)),
        "threshold": float(head.threshold) if one else None,
    }


def fixed_input(rule: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width that every photo comes to before the network; None where they depend on the photo."""
    scale, pad = rule.get("scale"), rule.get("pad") or {}
    if not scale:
        return None
    if not rule.get("keep_ratio"):
        sides = (scale[1], scale[0])
    elif pad.get("size") and min(pad["size"]) >= max(scale):
        sides = (pad["size"][0], pad["size"][1])
    else:
        return None
    sides = tuple(-(-side // m) * m for side, m in zip(sides, rule.get("multiple") or (1, 1), strict=True))
    if pad.get("size_divisor"):
        sides = tuple(-(-side // pad["size_divisor"]) * pad["size_divisor"] for side in sides)
    elif pad.get("size"):
        sides = tuple(map(max, sides, pad["size"]))
    return int(sides[0]), int(sides[1])
