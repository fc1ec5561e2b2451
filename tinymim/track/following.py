"""Follow a target from its first box: the tracker, a template matcher, a box that stays. numpy and Pillow only."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from tinymim.cores import cores
from tinymim.errors import ConfigError, DataError
from tinymim.files import atomic_folder, environment, write_json
from tinymim.progress import Progress
from tinymim.track.boxes import centres, inside, square_around

COLOUR = (255, 64, 32)


class Network(Protocol):
    """A trained network, of a ``tracker.pth`` or an exported file: see :class:`~tinymim.track.stored.TorchNetwork`."""

    name: str
    sizes: tuple[int, int]
    factors: tuple[float, float]

    def locate(self, template: np.ndarray, search: np.ndarray) -> tuple[np.ndarray, float]:
        """Crops uint8 (Z, Z, 3), (S, S, 3) -> centre x, y, width, height as fractions of the second; confidence."""


class Follower(Protocol):
    """What follows a target from frame to frame."""

    name: str

    def start(self, frame: Image.Image, box: np.ndarray) -> None:
        """The first frame, and the target's box x, y, width, height in it."""

    def step(self, frame: Image.Image) -> tuple[np.ndarray, float]:
        """The target's box in the next frame, and how sure that is, 0 to 1."""


class OneStream:
    """A network with the loop of OSTrack: the search crop lies around the last box; the template is never changed.

    Args:
        network: The network. It takes both crops each time, so the template's part is computed for every frame.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.name = network, network.name

    def start(self, frame: Image.Image, box: np.ndarray) -> None:
        """Cut the template."""
        self.box = box
        self.template = np.asarray(square_around(box, self.network.factors[0]).cut(frame, self.network.sizes[0]))

    def step(self, frame: Image.Image) -> tuple[np.ndarray, float]:
        """Find the target near its last box."""
        square = square_around(self.box, self.network.factors[1])
        search = np.asarray(square.cut(frame, self.network.sizes[1]))
        found, confidence = self.network.locate(self.template, search)
        self.box = inside(square.to_frame(found), frame.size)
        return self.box, confidence


class TemplateMatcher:
    """A baseline: the first box's pixels by normalised cross-correlation (OpenCV), at their size, near the last box.

    Raises:
        ConfigError: OpenCV is not installed.
    """

    name = "template matcher"

    def __init__(self, factor: float = 4.0) -> None:
        try:
            import cv2
        except Exception as error:  # not installed, or broken in one of many ways
            raise ConfigError("the template matcher needs OpenCV", str(error), "pip install opencv-python") from None
        self.cv2, self.factor = cv2, factor

    def start(self, frame: Image.Image, box: np.ndarray) -> None:
        """Keep the box's pixels."""
        self.box = inside(box, frame.size)
        left, top, right, bottom = _pixels(self.box, frame.size)
        self.template = np.asarray(frame)[top:bottom, left:right]

    def step(self, frame: Image.Image) -> tuple[np.ndarray, float]:
        """The best match in a square around the last box."""
        square = square_around(self.box, self.factor)
        around = np.array([square.left, square.top, square.side, square.side])
        left, top, right, bottom = _pixels(around, frame.size)
        tall, wide = self.template.shape[:2]
        if bottom - top < tall or right - left < wide:
            return self.box, 0.0
        part = np.ascontiguousarray(np.asarray(frame)[top:bottom, left:right])
        scores = self.cv2.matchTemplate(part, np.ascontiguousarray(self.template), self.cv2.TM_CCOEFF_NORMED)
        scores = np.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)  # of a plain patch
        row, column = np.unravel_index(int(scores.argmax()), scores.shape)
        shift = np.array([left + column, top + row], np.float64)
        self.box = np.concatenate([shift, self.box[2:]])
        return self.box, float(np.clip(scores.max(), 0, 1))


def _pixels(box: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole pixels (left, top, right, bottom) of a box inside a frame; at least one."""
    low = [min(max(round(float(v)), 0), most - 1) for v, most in zip(box[:2], size, strict=True)]
    high = [
        min(max(round(float(v)), first + 1), most) for v, first, most in zip(box[:2] + box[2:], low, size, strict=True)
    ]
    return low[0], low[1], high[0], high[1]


class FirstBox:
    """The plainest baseline: the target stays where it was."""

    name = "first box"

    def start(self, frame: Image.Image, box: np.ndarray) -> None:
        """Keep the box."""
        self.box = box

    def step(self, frame: Image.Image) -> tuple[np.ndarray, float]:
        """The first box."""
        return self.box, 1.0


@dataclass
class FollowResult:
    """A followed target; ``boxes`` has x, y, width, height in pixels for each frame, ``fps`` none of reading frames."""

    tracker: str
    source: str
    out: Path
    boxes: list[list[float]]
    confidence: list[float]
    fps: float
    pictures: bool
    environment: dict[str, Any] = field(repr=False, default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what ``boxes.json`` holds."""
        return {"kind": "tinymim.track"} | asdict(self) | {"out": str(self.out)}

    def print(self) -> None:
        """Frames, speed, files."""
        print(f"{self.tracker}: {len(self.boxes)} frames, {spelled_fps(self.fps)}")
        print(f"boxes:   {self.out / 'boxes.txt'} (x,y,w,h a line), {self.out / 'boxes.json'}")
        if self.pictures:
            print(f"drawn:   {self.out / 'pictures'}")


def spelled_fps(fps: float) -> str:
    """A speed in words."""
    return f"{fps:.1f} frames per second on {cores()} core(s), without reading frames"


def follow(
    follower: Follower,
    frames: Iterable[Image.Image],
    box: Iterable[float],
    out: str | Path,
    *,
    source: str,
    total: int = 0,
    pictures: bool = False,
    overwrite: bool = False,
) -> FollowResult:
    """Follow a target through a video; the folder appears when all frames are done.

    Args:
        follower: A :class:`OneStream` of a network, or a baseline.
        frames: Upright RGB frames of one size.
        box: x, y, width, height in the first frame, pixels.
        out: Folder for ``boxes.txt`` (a line ``x,y,w,h`` per frame, as LaSOT's results), ``boxes.json`` and, with
            ``pictures``, ``pictures/00000001.jpg``.
        source: Name of the video, for the result.
        total: How many frames there should be; 0: unknown.
        pictures: Draw the boxes.
        overwrite: Replace the folder.

    Raises:
        ConfigError: the folder exists, or the box is not in the first frame.
        DataError: no frames, fewer than ``total``, or of different sizes.
    """
    first, boxes, sure, seconds = np.array([*box], np.float64), list[np.ndarray](), list[float](), list[float]()
    with atomic_folder(out, replace=overwrite) as part:
        line = Progress("track", total) if total else None
        size = (0, 0)
        for number, frame in enumerate(frames, 1):
            if number == 1:
                size = frame.size
                check_box(first, size)
            elif frame.size != size:
                raise DataError(
                    f"the frames of {source} have different sizes",
                    f"the first is {size[0]}x{size[1]}, number {number} is {frame.size[0]}x{frame.size[1]}",
                    "bring all frames to one size",
                )
            began = time.perf_counter()
            if number == 1:
                follower.start(frame, first)
                found, confidence = first, 1.0
            else:
                found, confidence = follower.step(frame)
            seconds.append(time.perf_counter() - began)
            boxes.append(found)
            sure.append(confidence)
            if pictures:
                _draw(frame, found, confidence, part / "pictures" / f"{number:08d}.jpg")
            if line is not None:
                line.update(number, images=1)
        if not boxes or len(boxes) < total:
            raise DataError(
                f"{source} ends early",
                f"{len(boxes)} of {total or 'its'} frames could be read",
                "copy the video again",
            )
        if line is not None:
            line.close()
        (part / "boxes.txt").write_text(
            "".join(",".join(f"{value:.2f}" for value in each) + "\n" for each in boxes), "utf-8"
        )
        fps = 1 / max(statistics.median(seconds[1:] or seconds), 1e-9)
        rows = [[round(float(value), 2) for value in each] for each in boxes]
        result = FollowResult(
            follower.name, source, Path(out), rows, [round(c, 4) for c in sure], fps, pictures, environment()
        )
        write_json(part / "boxes.json", result.to_dict())
    return result


def check_box(box: np.ndarray, size: tuple[int, int]) -> None:
    """Refuse a first box that is none, or has its centre outside the frame.

    Args:
        box: (4,).
        size: Width and height of the frame.

    Raises:
        ConfigError: see above.
    """
    good = box.shape == (4,) and bool(np.isfinite(box).all()) and bool((box[2:] >= 1).all())
    if good and all(0 <= c <= side for c, side in zip(centres(box), size, strict=True)):
        return
    raise ConfigError(
        f"--box {' '.join(f'{value:g}' for value in box)}",
        f"it must be a box x y w h in pixels with its centre in the first frame, which is {size[0]}x{size[1]}",
        "give the left and top edge, width and height of the target",
    )


def _draw(frame: Image.Image, box: np.ndarray, confidence: float, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    picture, width = frame.copy(), max(min(frame.size) // 120, 1)
    left, top, right, bottom = _pixels(box, frame.size)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, right - 1, bottom - 1), outline=COLOUR, width=width)
    draw.text((left + 2 * width, top + 2 * width), f"{confidence:.2f}", fill=COLOUR)
    picture.save(path, quality=92)
