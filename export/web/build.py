"""A web page that segments a dropped photo in the browser: model, contract and onnxruntime-web in one folder.

The page needs any file server and nothing else: all it loads is in its folder, and its Content-Security-Policy lets
the browser load nothing from elsewhere. onnxruntime-web comes from npm when the page is built, or from a folder.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tinymim.errors import ConfigError, DataError, TinyMIMError
from tinymim.files import write_json
from tinymim.progress import say
from tinymim_export.report.style import STYLE
from tinymim_export.runtime.engines import Engine, open_engine
from tinymim_export.runtime.metadata import check_verified, precision_name
from tinymim_export.runtime.pictures import palette_for
from tinymim_export.runtime.predictor import THRESHOLD, Predictor

ORT_WEB = "1.30.0"  # the version the page was tested with
ORT_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")  # all that CPU runs need
PAGE_FILES = ("index.html", "page.css", "page.mjs", "worker.mjs", "segment.mjs", "png.mjs")
NPM_SECONDS = 300
MASK_TYPES = ("uint8", "int32", "int64")


@dataclass
class WebResult:
    """A page that was written.

    Attributes:
        folder: The page; serve it and open it.
        onnx: The file it runs.
        sha256: Of that file.
        output: "logits" or "mask".
        size: Height and width of the network, None where free.
        classes: How many.
        ort_web: Version of onnxruntime-web.
        files: Name -> bytes.
        seconds: It took.
    """

    folder: str
    onnx: str
    sha256: str
    output: str
    size: tuple[int | None, int | None]
    classes: int
    ort_web: str
    files: dict[str, int]
    seconds: float

    @property
    def next(self) -> str:
        """What to type to see the page."""
        return f"python -m http.server -d {shlex.quote(self.folder)} 8000    # then open http://localhost:8000"

    def print(self) -> None:
        """Print the summary."""
        print(self.summary())

    def summary(self) -> str:
        """One line."""
        size = "any size" if None in self.size else "x".join(map(str, self.size))
        mib = sum(self.files.values()) / 2**20
        return (
            f"{self.folder}: {Path(self.onnx).name} ({self.output}, {size}, {self.classes} classes) "
            f"with onnxruntime-web {self.ort_web}, {len(self.files)} files, {mib:.1f} MiB, {self.seconds:.1f} s"
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; written to ``path`` if given."""
        value = {"kind": "tinymim.web"} | asdict(self)
        if path is not None:
            write_json(path, value)
        return json.dumps(value, indent=1)

    def to_markdown(self) -> str:
        """The summary and a table of the files."""
        rows = [f"| {name} | {size:,} |" for name, size in self.files.items()]
        return "\n".join([self.summary(), "", "| file | bytes |", "|---|---:|", *rows]) + "\n"


def build_web(onnx: str | Path, folder: str | Path, *, ort_web: str | Path | None = None) -> WebResult:
    """Write the page.

    Args:
        onnx: A segmentor written by tinymim-export: fixed or free size, logits or mask.
        folder: New or empty, or an earlier page, which is replaced when the new one is complete.
        ort_web: onnxruntime-web offline: an unpacked package, its ``dist`` folder or its .tgz; None fetches it by npm.

    Raises:
        ConfigError: no segmentor, a folder with other things in it, no npm or no network.
        DataError: a missing or damaged .onnx, or no onnxruntime-web in ``ort_web``.
    """
    began = time.monotonic()
    onnx, folder = Path(onnx), Path(folder)
    _check_folder(folder)
    engine = open_engine(onnx, threads=1)
    contract = web_contract(engine)
    with _aside(folder) as part:
        version = _copy_ort(part, ort_web)
        for name in PAGE_FILES:
            source = resources.files("tinymim_export.web") / "page" / name
            (part / name).write_bytes(source.read_bytes())
        (part / "style.css").write_text(STYLE, "utf-8")
        shutil.copyfile(onnx, part / "model.onnx")
        contract["about"].append(f"onnxruntime-web {version}")
        write_json(part / "contract.json", contract)
        files = {path.name: path.stat().st_size for path in sorted(part.iterdir())}
    return WebResult(
        folder=str(folder),
        onnx=str(onnx),
        sha256=engine.sha256,
        output=contract["output"],
        size=engine.size,  # type: ignore[arg-type]
        classes=len(contract["classes"]),
        ort_web=version,
        files=files,
        seconds=time.monotonic() - began,
    )


def web_contract(engine: Engine) -> dict[str, Any]:
    """What the page must know of a file: how to prepare a photo for it and how to show its output.

    Raises:
        ConfigError: the file is not a segmentor, or does not say how photos are normalised.
    """
    predictor, name, meta = Predictor(engine=engine), engine.path.name, engine.meta
    output = engine.outputs[0]
    is_logits = output.dtype == "float32" and len(output.shape) == 4
    is_mask = output.dtype in MASK_TYPES and len(output.shape) in (3, 4)
    if not (is_logits or is_mask):
        raise ConfigError(
            f"{name} is not a segmentor",
            f"its output is {output}; the page draws logits (N, C, H, W) or masks",
            "export one: tinymim-export --checkpoint segmentor.pth --onnx segmentor.onnx",
        )
    classes, palette = list(predictor.classes or ()), list(predictor.palette or ())
    channels = output.shape[1] if is_logits and isinstance(output.shape[1], int) else 0
    count = max(len(classes), channels, 2) if is_logits or classes else 256
    if count > 256:
        raise ConfigError(f"{name} has {count} classes", "masks hold 256 at most", "use a segmentor with fewer")
    windows = predictor.mode == "slide" and is_logits  # a mask cannot be averaged: the photo goes through whole
    rule = predictor.rule
    if rule.get("multiple") or rule.get("float"):
        raise ConfigError(
            f"the page cannot prepare photos for {name}",
            "its contract resizes them to multiples of some pixels, or as floats; the page knows one 8-bit resize",
            "use tinymim predict, or test the model with one plain Resize",
        )
    pad = rule.get("pad")
    notes = list(predictor.notes)
    if predictor.mode == "slide" and not windows:
        notes = ["This file gives masks, which cannot be averaged: photos go through it whole, not in windows."]
    precision = precision_name(meta)
    size = "any size" if None in engine.size else "x".join(map(str, engine.size))
    verified = "verified against its original" if check_verified(engine.path, meta) else "not verified"
    return {
        "name": name,
        "sha256": engine.sha256,
        "input": engine.input,
        "range": (predictor.contract.get("input") or {}).get("range", "normalised"),
        "mean": predictor.contract.get("mean"),
        "std": predictor.contract.get("std"),
        "scale": rule.get("scale"),
        "keep_ratio": bool(rule.get("keep_ratio")),
        "pad": pad and pad | {"value": np.full(3, pad.get("value", 0)).tolist()},
        "size": list(engine.size),
        "mode": "slide" if windows else "whole",
        "crop": list(predictor.crop) if windows else None,
        "stride": list(predictor.stride) if windows else None,
        "output": output.name,
        "align_corners": predictor.align_corners,
        "threshold": THRESHOLD if rule.get("threshold") is None else rule["threshold"],
        "classes": classes + [f"class {i}" for i in range(len(classes), count)],
        "palette": [list(colour) for colour in palette + palette_for(count)[len(palette) :]],
        "notes": notes,
        "about": [f"{name}: {precision}, {size}, {verified}", f"sha256 {engine.sha256[:16]}"],
    }


def _check_folder(folder: Path) -> None:
    """Refuse to write over anything but an earlier page."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file", "--web writes a folder", "choose another --web")
    if not folder.is_dir():
        return
    ours = {*PAGE_FILES, *ORT_FILES, "style.css", "model.onnx", "contract.json"}
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if others:
        raise ConfigError(
            f"{folder} holds other things",
            f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''} would be lost: the page replaces it",
            f"choose a new folder, e.g. --web {folder / 'page'}",
        )


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A temporary folder next to ``folder`` that replaces it if the block succeeds, and is removed if it does not."""
    folder = Path(os.path.abspath(folder))
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        part.mkdir(parents=True)
        yield part
        if folder.is_dir():
            folder.rename(old)
        part.rename(folder)
    except OSError as error:
        with suppress(OSError):
            old.rename(folder)
        raise TinyMIMError(
            f"cannot write {folder}",
            f"{error.strerror or error} (nothing was left behind)",
            "free some space or choose another --web, then run the command again",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _copy_ort(folder: Path, ort_web: str | Path | None) -> str:
    """Bring onnxruntime-web's files into ``folder``; return its version."""
    if ort_web is not None:
        return _take_ort(Path(ort_web), folder)
    with tempfile.TemporaryDirectory() as temporary:
        return _take_ort(_npm_pack(Path(temporary)), folder)


def _npm_pack(folder: Path) -> Path:
    """Fetch the package with npm (which checks its hash); nothing of it is run or installed."""
    offline = (
        f"on a machine with npm and network: npm pack onnxruntime-web@{ORT_WEB}, then add "
        f"--ort-web onnxruntime-web-{ORT_WEB}.tgz here"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError("npm is not installed", "the page's runtime, onnxruntime-web, comes from npm", offline)
    command = [npm, "pack", f"onnxruntime-web@{ORT_WEB}", "--pack-destination", str(folder), "--fetch-retries=1"]
    say(f"fetching onnxruntime-web {ORT_WEB} with npm")
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_SECONDS)
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
    except subprocess.TimeoutExpired:
        said = [f"no answer in {NPM_SECONDS} seconds"]
    packed = sorted(folder.glob("*.tgz"))
    if not packed:
        why = said[0][:200] if said else "no reason given"
        raise ConfigError("npm could not fetch onnxruntime-web", why, offline)
    return packed[0]


def _take_ort(source: Path, folder: Path) -> str:
    """Copy the three files out of a package, its ``dist`` folder or its .tgz; return the version they state."""
    reader = _tarball(source) if source.is_file() else _unpacked(source)
    for name in ORT_FILES:
        (folder / name).write_bytes(reader(name))
    head = (folder / ORT_FILES[0]).read_bytes()[:500].decode("ascii", "replace")
    version = re.search(r"ONNX Runtime Web v(\S+)", head)
    if version is None:
        raise _no_ort(source, f"{ORT_FILES[0]} does not begin as onnxruntime-web's does")
    return version[1]


def _unpacked(source: Path) -> Callable[[str], bytes]:
    if not source.is_dir():
        raise _no_ort(source, "it does not exist")
    places = [source, source / "dist", source / "package/dist", source / "node_modules/onnxruntime-web/dist"]
    missing = {place: [name for name in ORT_FILES if not (place / name).is_file()] for place in places}
    best = min(places, key=lambda place: len(missing[place]))
    if missing[best]:
        raise _no_ort(source, f"no {missing[best][0]} in it, in its dist or in its node_modules")
    return lambda name: (best / name).read_bytes()


def _tarball(source: Path) -> Callable[[str], bytes]:
    """The three files by name; nothing else of the archive is looked at, no path of it is used."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if member.isfile() and path.parts[-2:-1] == ("dist",) and path.name in ORT_FILES:
                    found[path.name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _no_ort(source, f"it is not a readable archive ({error})") from error
    missing = [name for name in ORT_FILES if name not in found]
    if missing:
        raise _no_ort(source, f"no dist/{missing[0]} in it")
    return found.__getitem__


def _no_ort(source: Path, why: str) -> DataError:
    return DataError(
        f"{source} is not onnxruntime-web",
        why,
        f"npm pack onnxruntime-web@{ORT_WEB}, then --ort-web with the .tgz or the folder it unpacks to",
    )
