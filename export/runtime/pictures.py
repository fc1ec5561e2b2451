"""Masks as palette PNGs, photos with their classes laid over them, video frames. numpy and Pillow; PyAV for video."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinymim.errors import ConfigError, DataError
from tinymim.files import atomic_path

JPEG_SIDE = 65_000  # pixels; 65,500 with the legend
BLOCK = 1 << 22  # pixels of a large photo that are worked on at once
TICK = Fraction(1, 1000)  # seconds
VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".avi", ".webm")
Palette = Sequence[Sequence[int]]


def palette_for(count: int) -> list[tuple[int, int, int]]:
    """Distinct colours for files that carry none: the bits of the id, spread over the channels (PASCAL VOC's)."""
    ids = np.arange(count)
    bits = [sum((ids >> (3 * i + channel) & 1) << (7 - i) for i in range(3)) for channel in range(3)]
    return [(int(r), int(g), int(b)) for r, g, b in zip(*bits, strict=True)]


def colour_table(palette: Palette) -> np.ndarray:
    """uint8 (256, 3): the palette, black beyond it."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = np.array(palette, np.uint8)[:256]
    return table


def row_blocks(size: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a picture (height, width), some at a time, so that what is computed of a large one stays small."""
    step = max(1, BLOCK // max(size[1], 1))
    return (slice(start, min(start + step, size[0])) for start in range(0, size[0], step))


def count_ids(mask_HW: np.ndarray) -> np.ndarray:
    """int64 (256,): pixels of every id."""
    counts = np.zeros(256, np.int64)
    for rows in row_blocks(mask_HW.shape):
        counts += np.bincount(mask_HW[rows].ravel(), minlength=256)
    return counts


def blend(photo_HW3: np.ndarray, mask_HW: np.ndarray, palette: Palette, alpha: float) -> np.ndarray:
    """The photo with ``alpha`` parts of its classes' colours, uint8 (H, W, 3)."""
    colours = colour_table(palette)[mask_HW]
    return np.rint((1 - alpha) * photo_HW3 + alpha * colours).astype(np.uint8)


def overlaid(
    photo_HW3: np.ndarray,
    mask_HW: np.ndarray,
    palette: Palette,
    alpha: float,
    entries: Sequence[tuple[str, Sequence[int]]],
) -> Image.Image:
    """:func:`blend` with a strip below it that names colours, as many lines as it takes.

    Raises:
        DataError: larger than a JPEG can be.
    """
    height, width = mask_HW.shape
    if max(height, width) > JPEG_SIDE:
        raise DataError(
            f"no overlay of {height}x{width} pixels can be written",
            f"it is a JPEG, whose sides are {JPEG_SIDE} pixels at most",
            "leave --overlay out, or make the photo smaller",
        )
    strip = _legend(width, max(11, min(height, width) // 40), entries)
    canvas = Image.new("RGB", (width, height + strip.height))
    for rows in row_blocks(mask_HW.shape):
        canvas.paste(Image.fromarray(blend(photo_HW3[rows], mask_HW[rows], palette, alpha)), (0, rows.start))
    canvas.paste(strip, (0, height))
    return canvas


def _legend(width: int, size: int, entries: Sequence[tuple[str, Sequence[int]]]) -> Image.Image:
    """Names next to their colours, in letters of ``size`` pixels."""
    font = ImageFont.load_default(size)
    texts = [(name.encode("latin-1", "replace").decode("latin-1"), colour) for name, colour in entries]
    places, x, y = [], size // 2, size // 2
    for text, _ in texts:
        wide = int(font.getlength(text)) + 3 * size
        if x > size // 2 and x + wide > width:
            x, y = size // 2, y + 2 * size
        places.append((x, y))
        x += wide
    strip = Image.new("RGB", (width, y + 2 * size), "white")
    draw = ImageDraw.Draw(strip)
    for (text, colour), (left, top) in zip(texts, places, strict=True):
        draw.rectangle((left, top, left + size, top + size), fill=tuple(colour), outline="black")
        draw.text((left + size * 3 // 2, top + size // 2), text, fill="black", font=font, anchor="lm")
    return strip


def save_picture(picture: np.ndarray | Image.Image, path: str | Path) -> None:
    """Write a picture, uint8 (H, W, 3) or Pillow's, as JPEG or PNG, by the suffix. Atomic."""
    with atomic_path(path) as part:
        image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        if Path(path).suffix.lower() == ".png":
            image.save(part, "PNG")
        else:
            image.save(part, "JPEG", quality=92)


def import_av() -> Any:
    """PyAV.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "video needs PyAV", f"it cannot be imported ({error})", 'pip install "tinymim[video]"'
        ) from error
    return av


class Video:
    """Frames of a video file, upright.

    Args:
        path: The file.

    Attributes:
        rate: Frames per second.
        frames: How many the file says it has; 0 where it does not say.

    Raises:
        ConfigError: PyAV is missing.
        DataError: no such file, or no video in it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, av = Path(path), import_av()
        try:
            self.container = av.open(str(path))
            self.stream = self.container.streams.video[0]
        except (OSError, ValueError, IndexError) as error:  # PyAV's errors are these
            raise self._damaged(error) from error
        self.rate = Fraction(self.stream.average_rate or 25)
        self.frames = int(self.stream.frames)

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            for frame in self.container.decode(self.stream):
                turns = round(getattr(frame, "rotation", 0) / 90)  # degrees, counter-clockwise
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        finally:
            self.container.close()

    def count_frames(self) -> int:
        """Frames that are in the file, read to its end without decoding them; the video cannot be used afterwards.

        Raises:
            DataError: it holds none, or fewer than it says.
        """
        try:
            found = sum(packet.size > 0 for packet in self.container.demux(self.stream))
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        finally:
            self.container.close()
        if not found or found < self.frames:
            raise DataError(
                f"the video {self.path} ends early",
                f"{found} of {self.frames or 'its'} frames are in the file",
                "copy the file again",
            )
        return found

    def _damaged(self, error: object) -> DataError:
        return DataError(f"cannot read the video {self.path}", str(error), "copy the file again, or convert it to .mp4")


class VideoWriter:
    """H.264 in an .mp4, frame by frame; odd sides lose their last row or column, as the format wants even ones."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.container = import_av().open(str(path), "w", format="mp4")
        self.rate, self.last = rate, -1
        self.stream: Any = None

    def add(self, picture_HW3: np.ndarray, seconds: float | None = None) -> None:
        """Append a frame: the next one at the video's rate, or one at ``seconds`` from the beginning, ever later."""
        import av

        even = picture_HW3[: picture_HW3.shape[0] // 2 * 2, : picture_HW3.shape[1] // 2 * 2]
        if self.stream is None:
            self.stream = self.container.add_stream("libx264", rate=self.rate, options={"crf": "20"})
            self.stream.height, self.stream.width, self.stream.pix_fmt = *even.shape[:2], "yuv420p"
            if seconds is not None:
                self.stream.codec_context.time_base = TICK
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        if seconds is not None:
            self.last = max(int(seconds / TICK), self.last + 1)
            frame.pts, frame.time_base = self.last, TICK
        self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        """Write what is left and close the file."""
        if self.stream is not None:
            self.container.mux(self.stream.encode())
        self.container.close()
