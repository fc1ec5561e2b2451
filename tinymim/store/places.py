"""Where a store lies: a folder, or a URL of fsspec (s3://, gs://, memory://). Files are complete or absent on both.

A process claims a piece of work before it does it. In a folder a claim is the kernel's lock of a file, which ends with
its process, however that ends. In object storage it is a file that is created only if it is absent, with the time in
it; who holds it renews it, and an old one is taken over.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from tinymim.errors import ConfigError, DataError, TinyMIMError
from tinymim.files import HOST, atomic_path
from tinymim.folders import NoLocks, let_go, remove_dead_parts, try_hold
from tinymim.schema import parse

STALE = 900.0  # seconds after which a claim in object storage that was not renewed is taken over
RENEW = 60.0  # seconds between renewals
CACHE_BYTES = 64 << 30  # most that copies of one remote store take on the local disk


class _Note(TypedDict):
    """What a claim in object storage holds."""

    pid: int
    host: str
    time: float


class Claim:
    """A piece of work that is this process's until :meth:`release`.

    Args:
        release: Gives it up.
        renew: Says that the process is alive; called often, it does something once a minute.
    """

    def __init__(self, release: Callable[[], None], renew: Callable[[], None] = lambda: None) -> None:
        self.release, self._renew, self._renewed = release, renew, time.monotonic()

    def renew(self) -> None:
        """Keep it from being taken over."""
        if time.monotonic() - self._renewed > RENEW:
            self._renew()
            self._renewed = time.monotonic()


class LocalPlace:
    """A store in a folder."""

    remote, copies = False, None

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.url = str(folder)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / name).is_file()

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; none if there is no such folder."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return sorted(name for name in os.listdir(self.folder / folder) if name[0] != ".")
        return []

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read {self.folder / name}", error.strerror or str(error), "check the path"
            ) from None

    def write(self, name: str, content: bytes) -> None:
        """Write a file: after a kill it is whole or absent.

        Raises:
            TinyMIMError: the disk is full or the folder cannot be written.
        """
        with atomic_path(self.folder / name) as part:
            part.write_bytes(content)

    def claim(self, name: str) -> Claim | None:
        """Claim a piece of work; None: a living process has it.

        Raises:
            ConfigError: the folder cannot be written.
            NoLocks: its file system has no locks.
        """
        path = self.folder / "claims" / name
        lock = try_hold(path, "--out")
        return None if lock is None else Claim(lambda: let_go(path, lock))

    def local(self, name: str) -> Path:
        """The file, for mapping into memory."""
        return self.folder / name

    def forget(self, name: str) -> bool:
        """Drop the local copy of a damaged file; here there is none: False."""
        return False

    def free(self) -> int | None:
        """Bytes that the disk has left; None: unknown."""
        above = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return shutil.disk_usage(above).free

    def clean(self) -> None:
        """Remove what killed processes left, and the folder of claims if nobody has any."""
        remove_dead_parts(self.folder, deep=True)
        with suppress(OSError):
            (self.folder / "claims").rmdir()


class RemotePlace:
    """A store at a URL; files that are mapped are first copied to a local folder.

    Args:
        url: For fsspec.
        copies: The local folder; None: one below the user's cache folder.

    Raises:
        ConfigError: fsspec does not know the protocol, or its package is missing.
    """

    remote = True

    def __init__(self, url: str, copies: str | Path | None = None) -> None:
        import fsspec

        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"cannot open {url}",
                str(error).splitlines()[0],
                "check the protocol, or install fsspec's package for it",
            ) from None
        self.url, self.root = url, self.root.rstrip("/")
        given = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        own = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.copies = Path(copies) if copies is not None else Path(given) / "tinymim" / "stores" / own
        self.fetched = 0

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _told(self, what: str, error: Exception) -> TinyMIMError:
        return DataError(
            f"cannot {what}",
            f"{type(error).__name__}: {error}"[:300],
            "check the URL and the rights, then run it again",
        )

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        self.fs.invalidate_cache()
        return bool(self.fs.isfile(self._at(name)))

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; none if there is no such folder."""
        self.fs.invalidate_cache()
        try:
            return sorted(path.rsplit("/", 1)[-1] for path in self.fs.ls(self._at(folder), detail=False))
        except FileNotFoundError:
            return []
        except Exception as error:  # every service has its own
            raise self._told(f"list {self.url}/{folder}", error) from error

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return bytes(self.fs.cat_file(self._at(name)))
        except Exception as error:
            raise self._told(f"read {self.url}/{name}", error) from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file; object storage shows it when it is whole.

        Raises:
            DataError: it cannot be written.
        """
        try:
            self.fs.makedirs(os.path.dirname(self._at(name)), exist_ok=True)
            self.fs.pipe_file(self._at(name), content)
        except Exception as error:
            raise self._told(f"write {self.url}/{name}", error) from error

    def claim(self, name: str) -> Claim | None:
        """Claim a piece of work; None: a process that renews its claim has it.

        Raises:
            DataError: it cannot be written.
            NoLocks: the service cannot create a file only if it is absent.
        """
        path = self._at(f"claims/{name}")

        def note() -> bytes:
            return json.dumps({"pid": os.getpid(), "host": HOST, "time": time.time()}).encode()

        def release() -> None:
            with suppress(Exception):
                self.fs.rm_file(path)

        for _ in range(2):
            try:
                self.fs.makedirs(os.path.dirname(path), exist_ok=True)
                self.fs.pipe_file(path, note(), mode="create")
                return Claim(release, lambda: self.fs.pipe_file(path, note()))
            except FileExistsError:
                if self._alive(path):
                    return None
                release()
            except (NotImplementedError, TypeError, ValueError) as error:
                raise NoLocks(
                    f"{self.url} does not say whether a file is new",
                    f"{type(error).__name__}: {error}"[:300],
                    "give each process its part: --part 1/4",
                ) from error
            except Exception as error:
                raise self._told(f"claim work at {self.url}", error) from error
        return None

    def _alive(self, path: str) -> bool:
        """Whether the process of a claim lives, as far as is known."""
        try:
            note = parse(self.fs.cat_file(path).decode("utf-8", "replace"), _Note, path)
        except FileNotFoundError:
            return False
        except DataError:
            return True
        if note["host"] == HOST and note["pid"] != os.getpid():
            try:
                os.kill(note["pid"], 0)
            except (ProcessLookupError, OverflowError):
                return False
            except OSError:
                pass
        return time.time() - note["time"] < STALE

    def local(self, name: str) -> Path:
        """A local copy of a file, for mapping into memory.

        Raises:
            TinyMIMError: it cannot be read, or the disk is full.
        """
        path = self.copies / name
        if not path.is_file():
            content = self.read(name)
            if self.fetched % 64 == 0:
                self._make_room()
            self.fetched += 1
            with atomic_path(path) as part:
                part.write_bytes(content)
        return path

    def _make_room(self) -> None:
        """Remove the oldest copies beyond :data:`CACHE_BYTES`; who has one mapped keeps it."""
        found = []
        for path in self.copies.glob("chunks/*/*"):
            with suppress(OSError):
                found.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= CACHE_BYTES:
                break
            path.unlink(missing_ok=True)
            total -= size

    def forget(self, name: str) -> bool:
        """Drop the local copy of a damaged file; whether there was one."""
        try:
            (self.copies / name).unlink()
        except OSError:
            return False
        return True

    def free(self) -> int | None:
        """Unknown."""
        return None

    def clean(self) -> None:
        """Nothing to do: a claim that nobody renews is taken over."""


Place = LocalPlace | RemotePlace


def open_place(url: str | os.PathLike[str], copies: str | Path | None = None) -> Place:
    """A folder, ``file://`` and a path alike, or what fsspec knows.

    Raises:
        ConfigError: an unknown protocol.
    """
    text = os.fspath(url)
    if text.startswith("file://"):
        return LocalPlace(text.removeprefix("file://"))
    return RemotePlace(text, copies) if "://" in text else LocalPlace(text)
