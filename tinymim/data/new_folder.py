"""A new folder that appears, by a rename, when all that belongs in it is written. Standard library only."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tinymim.errors import ConfigError
from tinymim.files import file_error
from tinymim.folders import hold


def check_new(out: Path, source: Path | None, what: str) -> None:
    """Refuse an ``--out`` before work starts.

    Args:
        out: The folder.
        source: A folder that it must not lie in.
        what: What will be in it, for the error: "shards are".

    Raises:
        ConfigError: it is there already, and no empty folder; it lies in ``source``.
    """
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        free = next(name for i in range(2, 10_000) if not (name := out.with_name(f"{out.name}-{i}")).exists())
        raise ConfigError(f"{out} is there already", f"{what} written to a new folder", f"use --out {free}")
    if source is not None and out.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{out} is inside {source}", "it would lie among the photos", "choose a folder next to it")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, of this process alone, that the block makes; it is renamed to ``out`` if that succeeds.

    If not, it is removed, as is what a killed process left.

    Raises:
        ConfigError: another process writes it.
        TinyMIMError: the disk is full, or ``out`` cannot be written.
    """
    part = out.with_name(f".{out.name}.part")
    made = part / "new"
    try:
        with hold(part):
            shutil.rmtree(made, ignore_errors=True)
            try:
                yield made
                os.rename(made, out)
            except OSError as error:
                raise file_error(f"cannot write {out}", error) from error
            finally:
                shutil.rmtree(made, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):  # held by another process
            part.rmdir()
