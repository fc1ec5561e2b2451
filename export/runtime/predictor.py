"""A photo in, its mask out, by the contract in the .onnx file. numpy, Pillow and onnxruntime only.

The order is MMSegmentation's: resize the photo (OpenCV's bilinear), normalise, pad, run whole or in windows, cut the
padding off, bring the logits to the photo's own size, and only then decide.

Legend: H, W = the photo's sides, h, w = sides of what the network sees, C = classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.data.pixels import open_photo
from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim_export.runtime.engines import Engine, open_engine
from tinymim_export.runtime.photos import to_input
from tinymim_export.runtime.resize import bands, rescale_size, resize_bilinear, resize_float, resize_nearest

MODES = ("whole", "slide")
THRESHOLD = 0.3  # MMSegmentation's, where a head of one channel names none
IMAGENET = "--mean 123.675 116.28 103.53 --std 58.395 57.12 57.375"


class Predictor:
    """A segmentor file with its contract, ready for photos of any size its contract allows.

    Args:
        file: The .onnx file; None where ``engine`` is given.
        mode: "whole" or "slide"; None takes the contract's.
        resize_to_file: Stretch every photo to the fixed size of the file, whatever its contract says.
        mean: Three values of RGB (0-255 units, or 0-1 as torchvision writes them), for files without metadata.
        std: The same.
        engine: An opened file to use.
        options: runtime, provider, compute_type, threads of :func:`tinymim_export.runtime.engines.open_engine`.

    Attributes:
        engine: The opened file.
        classes: Names, None where the file has none.
        palette: RGB colours of the classes, None where the file has none.
        mode: "whole" or "slide".
        notes: What differs from the contract, in sentences; complete after the first photo.
        channels: Channels of the logits; None before the first photo, and where the file decides by itself.

    Raises:
        ConfigError: the file is not a segmentor, or says too little and the options do not fill it in.
    """

    def __init__(
        self,
        file: str | Path | None = None,
        *,
        mode: str | None = None,
        resize_to_file: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        engine: Engine | None = None,
        **options: Any,
    ) -> None:
        if engine is None:
            if file is None:
                raise ConfigError("no file", "neither a file nor an engine was given", "name a .onnx file")
            engine = open_engine(file, **options)
        self.engine, self.name = engine, engine.path.name
        meta = engine.meta
        if meta.get("part", "segmentor") != "segmentor":
            raise ConfigError(
                f"{self.name} is a {meta['part']}",
                "it gives features, not classes",
                "use the file of a segmentor (tinymim-export --checkpoint segmentor.pth)",
            )
        self.classes: list[str] | None = meta.get("classes")
        self.palette: list[Sequence[int]] | None = meta.get("palette")
        self.rule: dict[str, Any] = meta.get("resize") or {}
        self.contract = dict(meta) | ({"input": {"range": "pixels"}} if engine.dtype == np.uint8 else {})
        self._set_normalisation(mean, std)
        self.notes: list[str] = []
        if unrecorded := self.rule.get("untold"):
            self._note(
                f"the model's own test pipeline has {unrecorded}, which the file does not record: "
                "photos run at their own size"
            )
        self.channels: int | None = None
        self.stretch = resize_to_file
        self.mode = mode or ("whole" if resize_to_file else self.rule.get("mode", "whole"))
        if self.mode not in MODES:
            raise ConfigError(f"mode {self.mode!r} is unknown", f"the modes are {', '.join(MODES)}", "choose one")
        self.align_corners = bool(self.rule.get("align_corners", False))
        if resize_to_file:
            self._check_stretch()
        elif self.mode == "slide":
            self.crop, self.stride = self._windows()

    def mask(self, photo: Any) -> np.ndarray:
        """Class ids of a photo.

        Args:
            photo: Pillow RGB image, or uint8 (H, W, 3) RGB, upright.

        Returns:
            uint8 (H, W), at the photo's own size.

        Raises:
            ConfigError: the file cannot take a photo of this size.
            CheckFailed: the file gives values that are not numbers.
        """
        pixels = as_pixels(photo)
        size = pixels.shape[:2]
        result = self._network(pixels)
        if result.ndim == 2:
            if result.shape != size:
                self._note(
                    "the file decides before the resize: its mask is resized to the photo's size by nearest neighbour, "
                    "pixels along borders between classes differ from logits that are resized first"
                )
            return resize_nearest(result, size)
        mask = np.empty(size, np.uint8)
        for rows, logits in bands(result, size, self.align_corners):
            mask[rows] = self._decide(logits)
        return mask

    def logits(self, photo: Any) -> np.ndarray:
        """Logits of a photo, float32 (C, H, W), at its own size.

        Raises:
            ConfigError: the file gives a mask, or cannot take a photo of this size.
        """
        pixels = as_pixels(photo)
        result = self._network(pixels)
        if result.ndim == 2:
            raise ConfigError(
                f"{self.name} gives masks, no logits", "the decision is inside the file", "export with --output logits"
            )
        return resize_float(result, pixels.shape[:2], self.align_corners)

    def _network(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """Logits float32 (C, h, w) or ids uint8 (h, w) at the size the photo was resized to."""
        size = self._resized(pixels_HW3.shape[:2])
        image = to_input(resize_bilinear(pixels_HW3, size), self.contract)
        image = self._pad(image)
        result = self._slide(image) if self.mode == "slide" else self._whole(image)
        return result[..., : size[0], : size[1]]

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """The contract's resize rule."""
        scale = self.rule.get("scale")
        if self.stretch:
            height, width = self.engine.size
            assert height is not None
            assert width is not None
            return height, width
        if scale is None:
            return size
        return rescale_size(size, scale) if self.rule.get("keep_ratio") else (int(scale[1]), int(scale[0]))

    def _pad(self, image_3hw: np.ndarray) -> np.ndarray:
        """MMSegmentation's padding at test time, bottom and right, where the contract has one."""
        pad = self.rule.get("pad")
        if not pad or self.stretch:
            return image_3hw
        sides, divisor = image_3hw.shape[1:], pad.get("size_divisor")
        wanted = [-(-side // divisor) * divisor for side in sides] if divisor else list(pad["size"])
        more = [max(want - side, 0) for want, side in zip(wanted, sides, strict=True)]
        if not any(more):
            return image_3hw
        value: Any = np.full(3, pad.get("value", 0), np.float32)
        if image_3hw.dtype == np.uint8:
            value = np.clip(
                np.rint(np.float32(self.contract["mean"]) + value * np.float32(self.contract["std"])), 0, 255
            )
        out = np.empty((3, sides[0] + more[0], sides[1] + more[1]), image_3hw.dtype)
        out[:] = value[:, None, None].astype(image_3hw.dtype)
        out[:, : sides[0], : sides[1]] = image_3hw
        return out

    def _whole(self, image_3hw: np.ndarray) -> np.ndarray:
        self._check_fits(image_3hw.shape[1:])
        return self._run(image_3hw)

    def _slide(self, image_3hw: np.ndarray) -> np.ndarray:
        """Mean of overlapping windows, placed as MMSegmentation's ``slide_inference`` places them."""
        sides = image_3hw.shape[1:]
        total, count = None, np.zeros(sides, np.float32)
        for y1, y2 in window_places(sides[0], self.crop[0], self.stride[0]):
            for x1, x2 in window_places(sides[1], self.crop[1], self.stride[1]):
                self._check_fits((y2 - y1, x2 - x1))
                logits = self._run(image_3hw[:, y1:y2, x1:x2])
                if logits.ndim == 2:
                    raise ConfigError(
                        f"{self.name} cannot run in windows",
                        "windows average logits where they overlap, and this file gives masks",
                        "export with --output logits, or add --mode whole",
                    )
                if total is None:
                    total = np.zeros((len(logits), *sides), np.float32)
                total[:, y1:y2, x1:x2] += logits
                count[y1:y2, x1:x2] += 1
        assert total is not None
        return total / count

    def _run(self, image_3hw: np.ndarray) -> np.ndarray:
        """One image through the file: logits (C, h, w) or ids (h, w) at the input's size."""
        sides = image_3hw.shape[1:]
        out = self.engine.run(image_3hw[None])
        if np.issubdtype(out.dtype, np.floating) and out.ndim == 4:
            logits = np.asarray(out[0], np.float32)
            self.channels = len(logits)
            if self.channels > 256:
                raise ConfigError(f"{self.name} has {self.channels} classes", "masks hold 256 at most", "use fewer")
            if not np.isfinite(logits).all():
                raise CheckFailed(
                    f"{self.name} gives values that are not numbers",
                    f"infinite or NaN logits under {self.engine.label} (an overflow of fp16, or damaged weights)",
                    "use the FP32 file, or another --runtime or --precision",
                )
            return logits if logits.shape[1:] == sides else resize_float(logits, sides, self.align_corners)
        ids = out[0, 0] if out.ndim == 4 and out.shape[1] == 1 else out[0]
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() > 255:
            raise ConfigError(
                f"{self.name} gives neither logits nor a mask",
                f"its first output {self.engine.output!r} is {out.dtype} {'x'.join(map(str, out.shape))}",
                "use a segmentor whose first output is logits (N, C, H, W) or class ids (N, H, W)",
            )
        return resize_nearest(ids.astype(np.uint8), sides)

    def _decide(self, logits_CHW: np.ndarray) -> np.ndarray:
        """Ids uint8: the largest logit, or the threshold where there is one channel, as MMSegmentation decides."""
        if len(logits_CHW) > 1:
            return logits_CHW.argmax(0).astype(np.uint8)
        threshold = self.rule.get("threshold")
        with np.errstate(over="ignore"):
            share = 1 / (1 + np.exp(-logits_CHW[0]))
        return (share > (THRESHOLD if threshold is None else threshold)).astype(np.uint8)

    def _check_fits(self, sides: tuple[int, ...]) -> None:
        """Refuse a size the file was not made for, naming the ways out."""
        if all(fixed in (None, side) for fixed, side in zip(self.engine.size, sides, strict=True)):
            return
        fixed = "x".join("any" if side is None else str(side) for side in self.engine.size)
        what = "a window" if self.mode == "slide" else "the photo"
        windows = "leave --mode whole out, " if self.mode == "whole" and self.rule.get("mode") == "slide" else ""
        raise ConfigError(
            f"{self.name} takes {fixed} only, {what} comes to {sides[0]}x{sides[1]}",
            "its size was fixed at export" + ("" if self.rule else ", and it carries no resize rule"),
            f"{windows}add --resize-to-file to stretch photos to its size (other pixels than its contract's), "
            "or export again with --dynamic",
        )

    def _check_stretch(self) -> None:
        if None in self.engine.size or self.mode == "slide":
            raise ConfigError(
                "--resize-to-file does not fit here",
                f"{self.name} takes any size" if None in self.engine.size else "windows are not stretched",
                "leave it out" if None in self.engine.size else "leave --mode slide out",
            )
        height, width = self.engine.size
        self._note(f"--resize-to-file: every photo is stretched to {height}x{width}, whatever the file's contract says")

    def _windows(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sides and strides of the windows: the contract's, or the file's fixed size with strides in proportion."""
        wanted, strides = self.rule.get("crop"), self.rule.get("slide_stride")
        sides = [fixed or wanted[i] if wanted else fixed for i, fixed in enumerate(self.engine.size)]
        if any(side is None for side in sides):
            raise ConfigError(
                f"{self.name} says nothing about windows", "its contract tests whole photos", "leave --mode slide out"
            )
        crop = (int(sides[0]), int(sides[1]))
        if wanted and strides and list(wanted) == list(crop):
            return crop, (int(strides[0]), int(strides[1]))
        parts = [s / t for s, t in zip(strides, wanted, strict=True)] if wanted and strides else [2 / 3, 2 / 3]
        stride = (max(1, round(crop[0] * parts[0])), max(1, round(crop[1] * parts[1])))
        why = f"not {wanted[0]}x{wanted[1]} as its contract says" if wanted else "its contract tests whole photos"
        self._note(f"windows of {crop[0]}x{crop[1]} every {stride[0]}x{stride[1]} pixels, the size of the file; {why}")
        return crop, stride

    def _set_normalisation(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        has = self.contract.get("mean") is not None and self.contract.get("std") is not None
        inside = self.contract.get("input", {}).get("range") == "pixels"
        if mean is None and std is None:
            if not has and not inside:
                raise ConfigError(
                    f"{self.name} does not say how photos are normalised",
                    "it has no tinymim.mean and tinymim.std (it was not written by tinymim-export)",
                    f"add what it was trained with, e.g. ImageNet's {IMAGENET}",
                )
            return
        if mean is None or std is None or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError(
                "--mean and --std belong together",
                "three values each, of red, green, blue; std above 0",
                f"e.g. {IMAGENET}",
            )
        if (max(mean) < 2) != (max(std) < 2) and list(std) != [1, 1, 1] and any(mean):
            raise ConfigError(
                "--mean and --std are in different units",
                f"mean {list(mean)} and std {list(std)}: one of 0 to 1, the other of 0 to 255",
                f"give both in one unit, e.g. {IMAGENET}",
            )
        if has or inside:
            raise ConfigError(
                f"{self.name} says itself how photos are normalised",
                "its graph normalises" if inside else f"mean {self.contract['mean']}, std {self.contract['std']}",
                "leave --mean and --std out",
            )
        unit = 255.0 if max(std) < 2 and max(mean) < 2 and list(std) != [1, 1, 1] else 1.0
        self.contract |= {"mean": [v * unit for v in mean], "std": [v * unit for v in std]}

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def window_places(side: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Start and end of the windows along one side; the last one ends at the border, none is smaller than it must be."""
    count = max(side - crop + stride - 1, 0) // stride + 1
    ends = [min(i * stride + crop, side) for i in range(count)]
    return [(max(end - crop, 0), end) for end in ends]


def as_pixels(photo: Any) -> np.ndarray:
    """A Pillow image or an array as uint8 (H, W, 3)."""
    pixels = np.asarray(photo)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DataError(
            f"a photo of {pixels.dtype} {pixels.shape} cannot be used",
            "the file takes three channels of 8 bits",
            "read it with tinymim.data.pixels.open_photo(path)",
        )
    return pixels


def read_photo(path: str | Path) -> np.ndarray:
    """A photo as uint8 (H, W, 3) RGB, turned upright as its EXIF says.

    Raises:
        DataError: missing or damaged.
    """
    return np.asarray(open_photo(path))
