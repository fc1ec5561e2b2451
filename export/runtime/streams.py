"""Cameras and network streams, frame by frame: PyAV reads them, and only the newest frame waits for a slow model."""

import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tinymim.errors import ConfigError, DataError
from tinymim_export.runtime.pictures import import_av

URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
TIMEOUT = 10.0  # seconds without an answer, or without a packet
SECRET = re.compile(r"(?<=://)[^/@\s]*@")


def is_stream(source: str | os.PathLike[str]) -> bool:
    """Whether it is a camera's number or a URL; a file or folder that is called like a number is none."""
    text = str(source)
    return bool(URL.match(text)) or (text.isascii() and text.isdecimal() and not Path(text).exists())


def shown(text: object) -> str:
    """A URL, or a message with one in it, without user and password."""
    return SECRET.sub("", str(text))


class Stream:
    """Frames of a camera or a URL, upright as they come.

    A live source (it says no length) goes on while the model computes: :meth:`__iter__` gives its newest frame and
    counts those that were left out. A file behind a URL gives all of its frames.

    Args:
        source: ``0`` for the first camera, or ``rtsp://...``, ``http://...``, ``udp://...`` and what else FFmpeg knows.

    Attributes:
        live: Whether frames are left out where the model is slower.
        rate: Frames per second that it says it has.
        frames: 0: it does not say how many.
        dropped: Frames that were left out.

    Raises:
        ConfigError: PyAV is missing, or there are no cameras by number on this system.
        DataError: no such camera, no answer, or no video in it.
    """

    frames = 0

    def __init__(self, source: str) -> None:
        av = import_av()
        self.name, self.dropped, camera = shown(source), 0, source.isdecimal()
        self._error = av.FFmpegError
        target, form = _camera(int(source)) if camera else (source, None)
        options = {"rtsp_transport": "tcp"} if source.lower().startswith("rtsp") else {}
        try:
            self.container = av.open(target, format=form, options=options, timeout=TIMEOUT)
            self.stream = self.container.streams.video[0]
        except (OSError, ValueError, IndexError, av.FFmpegError) as error:
            raise self._broken(error) from None
        self.live = camera or not self.container.duration
        self.rate = Fraction(self.stream.average_rate or 25)
        self._newest: Any = None
        self._why: Exception | None = None
        self._ended, self._changed = False, threading.Condition()

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            if not self.live:
                yield from (frame.to_ndarray(format="rgb24") for frame in self.container.decode(self.stream))
                return
            threading.Thread(target=self._read, daemon=True).start()
            while (frame := self._take()) is not None:
                yield frame.to_ndarray(format="rgb24")
            if self._why is not None:
                raise self._broken(self._why) from None
        except (OSError, ValueError, self._error) as error:
            raise self._broken(error) from None
        finally:
            with self._changed:
                done, self._ended = self._ended, True
            if done or not self.live:  # else the reading thread is in FFmpeg, which the timeout ends
                self.container.close()

    def _take(self) -> Any:
        """The newest frame, once it is there; None: no more will come."""
        with self._changed:
            while self._newest is None and not self._ended:
                self._changed.wait(0.5)  # Ctrl-C gets through
            frame, self._newest = self._newest, None
        return frame

    def _read(self) -> None:
        why: Exception | None = None
        try:
            for frame in self.container.decode(self.stream):
                with self._changed:
                    if self._ended:
                        break
                    self.dropped += self._newest is not None
                    self._newest = frame
                    self._changed.notify()
        except Exception as error:  # handed to the reader
            why = error
        with self._changed:
            self._why, self._ended = why, True
            self._changed.notify()

    def _broken(self, error: object) -> DataError:
        lines = shown(error).strip().splitlines() or [type(error).__name__]
        return DataError(f"cannot read {self.name}", lines[0][:200], "check that it is on, and that a player shows it")


def _camera(number: int) -> tuple[str, str]:
    """What FFmpeg calls a camera, and the format it is read by.

    Raises:
        ConfigError: this system has no cameras by number.
        DataError: there is none of this number.
    """
    if sys.platform == "darwin":
        return str(number), "avfoundation"
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"camera {number} on {sys.platform}", "cameras have names here", "give the stream's URL")
    path = Path(f"/dev/video{number}")
    if not path.exists():
        others = sorted(str(found) for found in path.parent.glob("video[0-9]*"))
        why = f"{path} does not exist; " + (f"there are {', '.join(others)}" if others else "no camera is connected")
        raise DataError(f"no camera {number}", why, "connect it, or give a video or a stream's URL")
    return str(path), "v4l2"


class Pace:
    """Frames per second of the last two seconds, all work counted."""

    def __init__(self) -> None:
        self.times: deque[float] = deque()

    def tick(self) -> float:
        """Count a frame; the rate, 0.0 at the first."""
        now = time.perf_counter()
        self.times.append(now)
        while len(self.times) > 2 and now - self.times[0] > 2:
            self.times.popleft()
        return (len(self.times) - 1) / max(now - self.times[0], 1e-9) if len(self.times) > 1 else 0.0


def write_rate(picture_HW3: np.ndarray, rate: float) -> np.ndarray:
    """A picture with "12.3 fps" in its corner."""
    image = Image.fromarray(picture_HW3)
    font = ImageFont.load_default(max(11, min(image.size) // 20))
    draw, text = ImageDraw.Draw(image), f"{rate:.1f} fps"
    left, top, right, bottom = draw.textbbox((8, 6), text, font=font)
    draw.rectangle((left - 4, top - 3, right + 4, bottom + 3), fill="black")
    draw.text((8, 6), text, fill="white", font=font)
    return np.asarray(image)


class Window:
    """A window of OpenCV, which MMCV brings along.

    Raises:
        ConfigError: there is no OpenCV with windows, or no screen.
    """

    title = "tinymim predict (q or Esc ends)"

    def __init__(self) -> None:
        fix = "leave --show out, and look at the files of --out"
        if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise ConfigError("--show has no screen", "neither DISPLAY nor WAYLAND_DISPLAY is set", fix)
        try:
            import cv2

            cv2.namedWindow(self.title, cv2.WINDOW_NORMAL)
        except Exception as error:  # absent, or built without windows (cv2.error)
            raise ConfigError("--show needs an OpenCV with windows", str(error).splitlines()[0][:160], fix) from error
        self.cv2: Any = cv2

    def show(self, picture_HW3: np.ndarray) -> bool:
        """Show a picture; False: the user closed the window, or pressed q or Esc."""
        self.cv2.imshow(self.title, picture_HW3[..., ::-1])
        key = self.cv2.waitKey(1) & 0xFF
        return key not in (27, ord("q")) and self.cv2.getWindowProperty(self.title, self.cv2.WND_PROP_VISIBLE) > 0

    def close(self) -> None:
        """Remove it."""
        self.cv2.destroyWindow(self.title)
