"""What all training jobs share: clean stops, and the files of the run folder.

Pre-training, distillation, fine-tuning and segmentation write the same folder: ``metrics.jsonl`` with a line per logged
step, ``checkpoints/`` with the two newest, and the batch that gave a loss that is not finite. All are written here.
"""

import errno
import json
import os
import re
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.model import is_model_wrapper

from tinymim.errors import CheckpointError, TinyMIMError
from tinymim.files import atomic_path, file_error, sha256_file
from tinymim.models.checkpoints import save_torch
from tinymim.progress import say
from tinymim.records import read_env

CHECKPOINTS = {"step": "step_{:08d}.pth", "iter": "iter_{}.pth"}  # our format, and MMEngine's
Value = TypeVar("Value")


@dataclass
class StopRequest:
    """True once Ctrl-C or SIGTERM has requested a stop.

    Attributes:
        since: ``time.monotonic()`` at the first signal, or None.
    """

    since: float | None = None

    def __bool__(self) -> bool:
        return self.since is not None


@contextmanager
def stop_signals(
    message: str = "stopping after this step; press Ctrl-C again to stop at once", *, grace: float = 0.0
) -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; the second one raises KeyboardInterrupt at once.

    Outside the main thread no signal is caught. The previous handlers are restored at the end.

    Args:
        message: Printed by the first process when the first signal comes; "" prints nothing.
        grace: Seconds after the first signal in which further ones are ignored (``timeout`` sends two).
    """
    request = StopRequest()
    owner = os.getpid()

    def handle(number: int, frame: Any) -> None:
        now = time.monotonic()
        if os.getpid() != owner:  # a data worker, which inherits this handler
            raise KeyboardInterrupt
        if request.since is None:
            request.since = now
            if message and is_main_process():
                with suppress(OSError):  # not print(): the signal may have interrupted one
                    os.write(1, f"\n{message}\n".encode())
        elif now - request.since >= grace:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save_and_stop(runner: Any, step: int) -> None:
    """Call ``save_now(runner, step)`` of every hook that has it, then raise KeyboardInterrupt."""
    for hook in runner.hooks:
        if hasattr(hook, "save_now"):
            hook.save_now(runner, step)
    raise KeyboardInterrupt


def stop_workers(batches: Any) -> None:
    """Stop the data workers of a loader's iterator: they ignore SIGTERM, and after an error Python would wait."""
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


def bare(model: Any) -> Any:
    """The model without its wrapper for several processes."""
    return model.module if is_model_wrapper(model) else model


def on_first_process(action: Callable[[], Value]) -> Value:
    """Call ``action`` on the first process and give every process its result, or raise its error on all of them.

    Raises:
        TinyMIMError: what ``action`` raised, of the same class.
    """
    answer: list[Any] = [None, None]
    if is_main_process():
        try:
            answer[0] = action()
        except TinyMIMError as error:
            answer[1] = (type(error), error.what, error.why, error.fix)  # the error itself does not pickle
    broadcast_object_list(answer)
    if answer[1] is not None:
        kind, *parts = answer[1]
        raise kind(*parts)
    return answer[0]


class DamagedPhotos(dict[str, int]):
    """Damaged photos that training skipped: path -> how often."""

    def note(self, paths: Iterable[str]) -> None:
        """Count the damaged photos of a batch; each is printed once."""
        for path in paths:
            self[path] = self.get(path, 0) + 1
            if self[path] == 1:
                say(f"\nwarning: skipped damaged photo {path} (another one is used; {len(self)} so far)")

    def summary(self) -> str:
        """The line for the end of the run; "" if no photo was damaged."""
        times = sum(self.values())
        return f"warning: {len(self)} damaged photo(s) skipped, {times} times in all" if self else ""


@dataclass(frozen=True)
class RunFolder:
    """The files that both trainers write; each is complete or absent.

    All methods act on the first process only; :meth:`newest` is for the first process to call.

    Args:
        path: The folder.
        kind: "step" for ``step_00000012.pth``, "iter" for MMEngine's ``iter_12.pth``.
        keep: Number of checkpoints to keep.
    """

    path: Path
    kind: str = "step"
    keep: int = 2

    @property
    def metrics(self) -> Path:
        """``metrics.jsonl``."""
        return self.path / "metrics.jsonl"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after ``step`` steps."""
        return self.path / "checkpoints" / CHECKPOINTS[self.kind].format(step)

    def checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first."""
        found = {int(match[1]): path for path in (self.path / "checkpoints").glob("*") if (match := self._match(path))}
        return [found[step] for step in sorted(found)]

    def newest(self) -> Path | None:
        """The checkpoint to resume from; None, with a note, if the run was stopped before the first one.

        Damaged ones are said, and removed if an older one is whole.

        Raises:
            CheckpointError: every checkpoint is damaged.
            TinyMIMError: one cannot be read.
        """
        damaged: dict[Path, str] = {}
        for path in reversed(self.checkpoints()):
            if why := _damage(path):
                damaged[path] = why
                say(f"warning: the checkpoint {path} is damaged ({why})")
                continue
            for other in damaged:
                other.unlink()
            match = self._match(path)
            say(f"resuming at step {int(match[1]) if match else 0}")
            return path
        if damaged:
            raise CheckpointError(
                f"{self.path} cannot be resumed",
                "every checkpoint is damaged: " + "; ".join(f"{path.name}: {why}" for path, why in damaged.items()),
                "restore one from a backup, or start the run again with --overwrite",
            )
        say(f"note: {self.path} was stopped before its first checkpoint; it starts again at step 0")
        return None

    def check_here(self) -> None:
        """Before a save: it must not make a folder that was removed meanwhile again, with one file in it.

        Raises:
            TinyMIMError: the folder is gone.
        """
        if is_main_process() and not self.path.is_dir():
            raise TinyMIMError(
                f"the run folder {self.path} is gone",
                "it was removed or renamed while the run was writing to it",
                "run the command again without --resume, or put the folder back and add --resume",
            )

    def rotate(self, written: Path) -> None:
        """Remove all but the ``keep`` newest checkpoints; the one just written is never removed."""
        if is_main_process():
            found = self.checkpoints()
            for old in [path for path in found if path != written][: max(len(found) - self.keep, 0)]:
                with suppress(OSError):  # what cannot be removed cannot be written, either: the next save says so
                    old.unlink()

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``.

        Raises:
            TinyMIMError: the disk is full or the file cannot be written.
        """
        if not is_main_process():
            return
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self.check_here()
            known = file_error(f"cannot write {self.metrics}", error)
            raise TinyMIMError(known.what, known.why, f"{known.fix}; --resume continues it") from error

    def log_until(self, step: int) -> list[dict[str, Any]]:
        """Truncate ``metrics.jsonl`` after ``step`` (to nothing at 0), and return the lines kept.

        A killed run may have written lines after its last checkpoint, the last of them incomplete.
        """
        if not is_main_process():
            return []
        kept_any = step > 0 and self.metrics.is_file()
        texts = self.metrics.read_text("utf-8-sig", errors="replace").splitlines() if kept_any else []
        kept = [text for text in texts if _step_of(text) <= step]
        with atomic_path(self.metrics) as part:
            part.write_text("".join(f"{text}\n" for text in kept), "utf-8")
        return [json.loads(text) for text in kept]

    def _match(self, path: Path) -> re.Match[str] | None:
        return re.fullmatch(rf"{self.kind}_(\d+)\.pth", path.name)


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint, which is a zip archive with checksums; "" if it is whole.

    Raises:
        TinyMIMError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        return f"{wrong} has a wrong checksum" if wrong else ""
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset that cannot be
            return "its table of contents is wrong"
        raise file_error(f"cannot read {path}", error) from error
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib and struct raise many kinds on damaged archives
        return str(error) or type(error).__name__


def is_product(path: Path, **meta: Any) -> bool:
    """Whether a file that a run wrote is there as its ``env.json`` notes it, and of these values in its ``meta``."""
    try:
        noted = read_env(path.parent)["outputs"][path.name]
        stored = torch.load(path, map_location="cpu", weights_only=True)["meta"]
        return bool(all(stored[key] == value for key, value in meta.items()) and noted == sha256_file(path))
    except Exception:  # missing, damaged, another's: torch raises many kinds
        return False


def dump_bad_batch(path: Path, step: int, **content: Any) -> Path:
    """Write the batch that gave a loss that is not finite, for inspection; return ``path``.

    Args:
        path: File to write; it loads with ``weights_only=True``.
        step: Step of the batch.
        content: Tensors and plain values, also nested in lists and dicts; tensors are moved to the CPU.
    """
    save_torch({"step": step, **_on_cpu(content)}, path)
    return path


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value


def _step_of(text: str) -> float:
    try:
        return float(json.loads(text)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):  # incomplete: the run was killed
        return float("inf")
