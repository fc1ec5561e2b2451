"""A photo in, its mask out, by the contract in the .onnx file. numpy, Pillow and onnxruntime only.

The order is MMSegmentation's: resize the photo (OpenCV's bilinear), normalise, pad, run whole or in windows, cut the
padding off, bring the logits to the photo's own size, and only then decide.

Legend: H, W = the photo's sides, h, w = sides of what the network sees, C = classes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.cores import free_memory
from tinymim.data.pixels import open_photo
from tinymim.errors import CheckFailed, ConfigError
from tinymim_export.runtime.engines import Engine, open_engine
from tinymim_export.runtime.metadata import verified_note
from tinymim_export.runtime.photos import as_pixels, to_input
from tinymim_export.runtime.resize import (
    bands,
    largest,
    probability,
    rescale_size,
    resize_bilinear,
    resize_float,
    resize_nearest,
    resized_planes,
)

MODES = ("whole", "slide")
STRIP = 1 << 26  # float32 values of logits held at once while windows are averaged (256 MiB)
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
        if file is None and engine is None:
            raise ConfigError("no file", "neither a file nor an engine was given", "name a .onnx file")
        engine = engine or open_engine(file or "", **options)
        self.engine, self.name = engine, engine.path.name
        meta = engine.meta
        if meta.get("part", "segmentor") != "segmentor":
            raise ConfigError(
                f"{self.name} is a {meta['part']}",
                "it gives features, not classes" if meta["part"] == "backbone" else "it gives no class for each pixel",
                "use the file of a segmentor (tinymim-export --checkpoint segmentor.pth)",
            )
        self.classes: list[str] | None = meta.get("classes")
        self.palette: list[Sequence[int]] | None = meta.get("palette")
        self.rule: dict[str, Any] = meta.get("resize") or {}
        self.contract = dict(meta) | ({"input": {"range": "pixels"}} if engine.dtype == np.uint8 else {})
        self._set_normalisation(mean, std)
        self.notes: list[str] = []
        if doubt := verified_note(engine.path, meta, engine.verified):
            self._note(doubt)
        if unrecorded := self.rule.get("untold"):
            self._note(
                f"the model's own test pipeline has {unrecorded}, which the file does not record: "
                "photos run at their own size"
            )
        self.channels: int | None = None
        self.stretch = resize_to_file and None not in self.engine.size
        if resize_to_file and not self.stretch:
            self._note(f"--resize-to-file: {self.name} takes any size, so nothing is stretched")
        self.mode = mode or ("whole" if self.stretch else self.rule.get("mode", "whole"))
        if self.mode not in MODES:
            raise ConfigError(f"mode {self.mode!r} is unknown", f"the modes are {', '.join(MODES)}", "choose one")
        self.align_corners = bool(self.rule.get("align_corners", False))
        if self.stretch:
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
        return self._decided(as_pixels(photo), confidence=False)[0]

    def mask_and_confidence(self, photo: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Class ids of a photo, and the probability (softmax, or sigmoid where there is one channel) of each.

        Returns:
            uint8 (H, W) and float32 (H, W), at the photo's own size; the second is None where the file gives masks.

        Raises:
            ConfigError, CheckFailed: see :meth:`mask`.
        """
        return self._decided(as_pixels(photo), confidence=True)

    def _decided(self, pixels_HW3: np.ndarray, *, confidence: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """The mask of a photo; its confidence if asked for."""
        size, every = pixels_HW3.shape[:2], slice(None)
        if self.mode == "slide" and self._resized(size) == size:  # decided window by window: logits need no resize
            parts = self._slide(pixels_HW3)
        else:
            result = self._network(pixels_HW3)
            if result.ndim == 2:
                if result.shape != size:
                    self._note(
                        "the file decides before the resize: its mask is resized to the photo's size by nearest "
                        "neighbour, pixels along borders between classes differ from logits that are resized first"
                    )
                return resize_nearest(result, size), None
            at_once = not confidence and len(result) > 1 and not self.align_corners
            if at_once and (planes := resized_planes(result, size)) is not None:
                return largest(planes), None
            parts = ((rows, every, logits) for rows, logits in bands(result, size, self.align_corners))
        mask = np.empty(size, np.uint8)
        sure = np.empty(size, np.float32) if confidence else None
        for rows, columns, logits in parts:
            mask[rows, columns] = ids = self._decide(logits)
            if sure is not None:
                sure[rows, columns] = probability(logits, ids)
        return mask, sure

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

    def network_input(self, photo: Any) -> np.ndarray:
        """What the network sees of a photo, whole: (3, h, w), resized, normalised (float32) or not (uint8), padded."""
        resized = self._resize(as_pixels(photo))
        return self._part(resized, *(slice(0, side) for side in self._padded(resized.shape[:2])))

    def _network(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """Logits float32 (C, h, w) or ids uint8 (h, w) at the size the photo was resized to."""
        resized = self._resize(pixels_HW3)
        sides = resized.shape[:2]
        if self.mode != "slide":
            return self._whole(resized)[..., : sides[0], : sides[1]]
        total: np.ndarray | None = None
        for rows, columns, logits in self._slide(resized):
            if total is None:
                total = np.empty((len(logits), *sides), np.float32)
            total[:, rows, columns] = logits
        assert total is not None
        return total

    def _resize(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """The photo at the size the contract brings it to, uint8 (float32 where the contract resizes floats)."""
        for size in self._sizes(pixels_HW3.shape[:2]):
            if size != pixels_HW3.shape[:2]:
                exact = pixels_HW3.astype(np.float32) if self.rule.get("float") else pixels_HW3
                pixels_HW3 = resize_bilinear(exact, size)
        return pixels_HW3

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size a photo is brought to."""
        return self._sizes(size)[-1]

    def _sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """The sizes that the contract's resizing steps bring a photo to, one after the other."""
        scale, multiple = self.rule.get("scale"), self.rule.get("multiple")
        if self.stretch:
            height, width = self.engine.size
            assert height is not None
            assert width is not None
            return [(height, width)]
        if scale is not None:
            size = rescale_size(size, scale) if self.rule.get("keep_ratio") else (int(scale[1]), int(scale[0]))
        if multiple is None:
            return [size]
        return [size, (-(-size[0] // multiple[0]) * multiple[0], -(-size[1] // multiple[1]) * multiple[1])]

    def _padded(self, sides: tuple[int, int]) -> tuple[int, int]:
        """Sides after MMSegmentation's padding at test time, where the contract has one."""
        pad = self.rule.get("pad")
        if not pad or self.stretch:
            return sides
        divisor = pad.get("size_divisor")
        wanted = [-(-side // divisor) * divisor for side in sides] if divisor else pad["size"]
        return max(wanted[0], sides[0]), max(wanted[1], sides[1])

    def _part(self, resized_hw3: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """A part of the network's input (3, h, w), normalised here: a large photo is never held as floats."""
        inside = to_input(resized_hw3[rows, columns], self.contract)
        sides = rows.stop - rows.start, columns.stop - columns.start
        if inside.shape[1:] == sides:
            return inside
        value: Any = np.full(3, self.rule["pad"].get("value", 0), np.float32)
        if inside.dtype == np.uint8:
            value = np.clip(
                np.rint(np.float32(self.contract["mean"]) + value * np.float32(self.contract["std"])), 0, 255
            )
        out = np.empty((3, *sides), inside.dtype)
        out[:] = value[:, None, None].astype(inside.dtype)
        out[:, : inside.shape[1], : inside.shape[2]] = inside
        return out

    def _whole(self, resized_hw3: np.ndarray) -> np.ndarray:
        sides = self._padded(resized_hw3.shape[:2])
        self._check_fits(sides)
        self._check_memory(sides)
        return self._run(self._part(resized_hw3, slice(0, sides[0]), slice(0, sides[1])))

    def _slide(self, resized_hw3: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Mean of overlapping windows, placed as MMSegmentation's ``slide_inference`` places them.

        Yields:
            (rows, columns, logits (C, rows, columns)) as soon as no later window covers them, without the padding. What
            is held at once is bounded, as wide photos are done in strips (windows at their seams run twice).
        """
        sides = self._padded(resized_hw3.shape[:2])
        places_y, places_x = (window_places(sides[i], self.crop[i], self.stride[i]) for i in (0, 1))
        strip = max(STRIP // (self._channels(256) * self.crop[0]), 2 * self.crop[1])
        for left in range(0, sides[1], strip):
            right = min(left + strip, sides[1])
            held = [place for place in places_x if place[0] < right and place[1] > left]
            yield from self._strip(resized_hw3, places_y, held, left, right)

    def _channels(self, unknown: int) -> int:
        """Channels of the logits, ``unknown`` where the file does not say or gives masks."""
        shape = self.engine.outputs[0].shape
        return shape[1] if len(shape) == 4 and isinstance(shape[1], int) else unknown

    def _strip(
        self,
        resized_hw3: np.ndarray,
        places_y: Sequence[tuple[int, int]],
        places_x: Sequence[tuple[int, int]],
        left: int,
        right: int,
    ) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """The columns ``left`` to ``right`` of the mean; see :meth:`_slide`."""
        height, width = resized_hw3.shape[:2]
        count_y, count_x = np.zeros(places_y[-1][1], np.float32), np.zeros(right, np.float32)
        for y1, y2 in places_y:
            count_y[y1:y2] += 1
        for x1, x2 in places_x:
            count_x[x1:x2] += 1
        total = np.zeros((0, 0, 0), np.float32)  # sums from the first row of the current windows on
        for (y1, y2), (after, _) in zip(places_y, [*places_y[1:], (places_y[-1][1], 0)], strict=True):
            for x1, x2 in places_x:
                self._check_fits((y2 - y1, x2 - x1))
                logits = self._run(self._part(resized_hw3, slice(y1, y2), slice(x1, x2)))
                if logits.ndim == 2:
                    raise ConfigError(
                        f"{self.name} cannot run in windows",
                        "windows average logits where they overlap, and this file gives masks",
                        "export with --output logits, or add --mode whole",
                    )
                if total.shape[1] < y2 - y1:
                    earlier, total = total, np.zeros((len(logits), y2 - y1, right - left), np.float32)
                    total[: len(earlier), : earlier.shape[1]] = earlier if earlier.size else 0
                a, b = max(x1, left), min(x2, right)
                total[:, :, a - left : b - left] += logits[:, :, a - x1 : b - x1]
            rows, columns = slice(y1, min(after, height)), slice(left, min(right, width))
            if rows.start < rows.stop and columns.start < columns.stop:
                count = count_y[rows, None] * count_x[None, columns]
                yield rows, columns, total[:, : rows.stop - y1, : columns.stop - left] / count
            total = total[:, after - y1 :]

    def _run(self, image_3hw: np.ndarray) -> np.ndarray:
        """One image through the file: logits (C, h, w) or ids (h, w) at the input's size."""
        sides = image_3hw.shape[1:]
        out = self._outputs(image_3hw)
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

    def _outputs(self, image_3hw: np.ndarray) -> np.ndarray:
        """What the file gives for one image."""
        return self.engine.run(image_3hw[None])

    def _decide(self, logits_CHW: np.ndarray) -> np.ndarray:
        """Ids uint8: the largest logit, or the threshold where there is one channel, as MMSegmentation decides."""
        if len(logits_CHW) > 1:
            return largest(logits_CHW)
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

    def _check_memory(self, sides: tuple[int, int]) -> None:
        """Refuse a photo that is too large to run whole: its input and logits alone would fill the memory."""
        values = sides[0] * sides[1] * (3 + self._channels(1))
        have = free_memory()
        if 8 * values > have:
            raise ConfigError(
                f"a photo of {sides[0]}x{sides[1]} is too large to run whole",
                f"its input and logits alone take {4 * values / 2**30:.1f} GiB, {have / 2**30:.1f} GiB are free",
                "add --mode slide, or make the photo smaller",
            )

    def _check_stretch(self) -> None:
        if self.mode == "slide":
            raise ConfigError(
                "--resize-to-file does not fit here", "windows are not stretched", "leave --mode slide out"
            )
        height, width = self.engine.size
        self._note(f"--resize-to-file: every photo is stretched to {height}x{width}, whatever the file's contract says")

    def _windows(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sides and strides of the windows: the contract's, or the file's fixed size with strides in proportion."""
        wanted, strides = self.rule.get("crop"), self.rule.get("slide_stride")
        traced = (self.engine.meta.get("cost") or {}).get("size") or (None, None)
        sides = [fixed or (wanted[i] if wanted else traced[i]) for i, fixed in enumerate(self.engine.size)]
        if any(side is None for side in sides):
            raise ConfigError(
                f"{self.name} says nothing about windows", "its contract tests whole photos", "leave --mode slide out"
            )
        crop = (int(sides[0] or 0), int(sides[1] or 0))
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


def read_photo(path: str | Path) -> np.ndarray:
    """A photo as uint8 (H, W, 3) RGB, turned upright as its EXIF says.

    Raises:
        DataError: missing or damaged.
    """
    return np.asarray(open_photo(path))
