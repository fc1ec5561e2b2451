"""What long work says: one live line (step, ETA, rate, data wait, losses), and messages of the logger "tinymim".

Both go to standard output. ``logging.getLogger("tinymim").setLevel("WARNING")`` leaves warnings only; a handler of your
own takes the messages elsewhere.
"""

import logging
import sys
import time
from typing import Any, TextIO

LOG = logging.getLogger("tinymim")


class _StandardOutput(logging.StreamHandler[Any]):
    """Writes to what standard output is now; a closed pipe is the caller's to handle, as with ``print``."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """Standard output."""
        return sys.stdout

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise what went wrong."""
        raise


if not LOG.handlers:
    LOG.addHandler(_StandardOutput())
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


def say(text: object) -> None:
    """Log a message, which may be several lines; one that starts with "warning" is a warning.

    Names of files that are no UTF-8 are written out.
    """
    words = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    LOG.log(logging.WARNING if words.lstrip().startswith("warning") else logging.INFO, "%s", words)


class Progress:
    """A progress line ``title 120/936  ETA 1m05s  310 images/s  data wait 3%  loss 0.123``.

    Args:
        title: Name of the work.
        total: Steps in all; 0: nobody knows.
        start: Steps already done (resume).
        plain_every: Seconds between lines if the stream is not a terminal.
        stream: Where to write; None: standard output.
    """

    def __init__(
        self, title: str, total: int, *, start: int = 0, plain_every: float = 15.0, stream: TextIO | None = None
    ) -> None:
        self.title, self.total, self.first = title, total, start
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.every = 0.2 if self.live else plain_every
        self.began = time.monotonic()
        self.shown = -1e9 if self.live else self.began - plain_every + 3.0  # the first plain line after 3 s
        self.images, self.waited, self.width = 0, 0.0, 0

    def update(self, step: int, *, images: int = 0, waited: float = 0.0, **values: float) -> None:
        """Count one step.

        Args:
            step: Steps done so far, ``start`` included.
            images: Photos seen in this step.
            waited: Seconds this step waited for data.
            values: Numbers to show, e.g. losses.
        """
        self.images += images
        self.waited += waited
        now = time.monotonic()
        if now - self.shown < self.every and not 0 < self.total <= step:
            return
        self.shown = now
        spent = max(now - self.began, 1e-9)
        parts = [f"{self.title} {step}" + (f"/{self.total}" if self.total else "")]
        if step > self.first and self.total:
            parts.append(f"ETA {clock(spent / (step - self.first) * (self.total - step))}")
        if self.images:
            parts.append(f"{self.images / spent:.{0 if self.images >= 10 * spent else 1}f} images/s")
            parts.append(f"data wait {100 * self.waited / spent:.0f}%")
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        self._write("  ".join(parts))

    def close(self, message: str = "") -> None:
        """End the line; ``message`` replaces it."""
        spent = clock(time.monotonic() - self.began)
        if message or self.live:
            self._write(f"{self.title}: {message} ({spent})" if message else f"{self.title}: {spent}")
        self.pause()

    def pause(self) -> None:
        """End the live line, so that a message can follow; the next step starts another."""
        if self.live and LOG.isEnabledFor(logging.INFO):
            self.stream.write("\n")
            self.stream.flush()

    def _write(self, text: str) -> None:
        if not LOG.isEnabledFor(logging.INFO):
            return
        if self.live:
            self.stream.write("\r" + text.ljust(self.width))
            self.width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()


def clock(seconds: float) -> str:
    """Seconds as ``42s``, ``3m07s`` or ``2h05m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
