"""Every check of the project that needs a GPU, in at most 8 minutes on a bare machine; one JSON and one Markdown file.

Each part (``gpu_parts.py``) is a process of its own with its own time limit and survives the failure of the others; the
files are written again after each. A bare machine needs Python, PyTorch, timm and a checkout; what else our packages
import travels as wheels, which --prepare collects. Only the standard library here.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tinymim.benchmarks.gpu_parts import PARTS
from tinymim.cli import run_command
from tinymim.errors import CheckFailed, ConfigError
from tinymim.files import environment, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
KIND = "tinymim.gpu_check"
WHEELS = [  # of any Python 3; what images with PyTorch, timm, OpenCV and ONNX Runtime lack
    "mmengine",
    "mmsegmentation",
    "mmcv-lite",
    "addict",
    "termcolor",
    "yapf",
    "platformdirs",
    "prettytable",
    "ftfy",
    "wcwidth",
]
PACKAGES = {"tinymim": "tinymim", "tinymim_export": "export", "tinymim_mmseg_configs": "mmseg_configs"}
MOST = 64 << 20  # bytes that may travel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument(
        "--prepare", metavar="FOLDER", help="collect the wheels there, print the command, check nothing"
    )
    parser.add_argument("--wheels", metavar="FOLDER", help="install what --prepare collected, for this run only")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="parts that would begin later are left out")
    parser.add_argument("--device", help="cpu or cuda; default a GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="smallest sizes")
    parser.add_argument("--out", metavar="FOLDER", default="docs", help="for gpu_check_GPU.json and .md")


def run(args: argparse.Namespace) -> int:
    """Run the parts, one process each; 1 if one failed."""
    if args.prepare:
        return prepare(Path(args.prepare))
    began, out = time.monotonic(), Path(args.out).absolute()  # parts run elsewhere
    with tempfile.TemporaryDirectory() as folder:
        path = search_path(Path(folder), args.wheels)
        sys.path += path.split(os.pathsep)  # of this process, too: the page is made by tinymim_export
        about = machine(args.device, path)
        stem = out / f"gpu_check_{re.sub(r'[^a-z0-9]+', '_', about['name'].lower()).strip('_')}"
        parts: dict[str, Any] = {}
        for name in args.parts:
            left = 60 * args.minutes - (time.monotonic() - began)
            parts[name] = run_part(name, about["device"], args.quick, out, path, left)
            results = {"kind": KIND, "quick": args.quick, "machine": about, "parts": parts}
            results["seconds"] = time.monotonic() - began
            write_json(f"{stem}.json", results)
            write_text(f"{stem}.md", table(results))
            print(
                f"{name}: {parts[name]['verdict']} ({parts[name]['seconds']:.0f} s)  {parts[name].get('why', '')}",
                flush=True,
            )
    print(f"{stem}.json, {stem}.md")
    failed = [name for name, part in parts.items() if part["verdict"] == "failed"]
    again = f"python tools/gpu_check.py --parts {shlex.join(failed)}"
    print(f"next: {again if failed else f'git add {stem}.json {stem}.md'}")
    return 1 if failed else 0


def search_path(folder: Path, wheels: str | None) -> str:
    """A PYTHONPATH for the parts: carried wheels, and the checkout's packages under their names.

    Raises:
        ConfigError: no wheels there, or pip cannot install them.
    """
    for name, place in PACKAGES.items():
        (folder / name).symlink_to(ROOT / place)
    places = [str(folder), str(ROOT)]
    if wheels:
        files = [str(path) for path in sorted(Path(wheels).glob("*.whl"))]
        if not files:
            raise ConfigError(f"no wheels in {wheels}", "--prepare was not run there", f"--prepare {wheels}")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run(
            [*pip, "--no-cache-dir", "--target", str(folder / "site"), *files], capture_output=True, text=True
        )
        if done.returncode:
            raise ConfigError("the wheels cannot be installed", done.stderr.strip()[-500:], "prepare them again")
        places.append(str(folder / "site"))
    return os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])


def machine(device: str | None, path: str) -> dict[str, Any]:
    """Device, its name, versions and commit; PyTorch is asked in a process of its own."""
    code = (
        "import json, torch; there = torch.cuda.is_available(); print(json.dumps([there, torch.version.cuda, "
        "torch.cuda.get_device_name() if there else '', torch.cuda.mem_get_info()[1] if there else 0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=surroundings(path))
    if done.returncode:
        raise CheckFailed("PyTorch cannot be imported", done.stderr.strip()[-500:], "install it")
    there, cuda, name, memory = json.loads(done.stdout.splitlines()[-1])
    kind = device or ("cuda" if there else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not there):
        raise ConfigError(f"--device {kind}", "PyTorch sees no such device", "leave it out, or use --device cpu")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    about = environment()
    return {
        "device": kind,
        "name": name if kind == "cuda" else about["cpu"],
        "gib": memory / 2**30 if kind == "cuda" else None,
        "cuda": cuda,
        "commit": commit,
        **about,
    }


def surroundings(path: str) -> dict[str, str]:
    """Environment of a part."""
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def run_part(name: str, device: str, quick: bool, out: Path, path: str, left: float) -> dict[str, Any]:
    """The verdict of one part: ok, failed, not possible, or left out when less than 15 of ``left`` seconds remain."""
    if left < 15:
        return {"verdict": "left out", "why": "no time is left", "seconds": 0.0}
    limit, began = min(PARTS[name][1], left), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        with open(log, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tinymim.benchmarks.gpu_parts",
                    name,
                    device,
                    str(int(quick)),
                    str(out),
                    str(result),
                ],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=surroundings(path),
                start_new_session=True,
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)  # its own children, too
                process.wait()
        said = log.read_text("utf-8", "replace").strip().splitlines()[-25:]
        if result.is_file():
            value = json.loads(result.read_text("utf-8-sig"))
        else:
            ended = f"stopped after {limit:.0f} s" if process.returncode == -9 else f"ended with {process.returncode}"
            value = {"verdict": "failed", "why": ended}
    log_lines = {"log": said} if value["verdict"] == "failed" else {}
    return {**value, **log_lines, "seconds": time.monotonic() - began}


def table(results: Mapping[str, Any]) -> str:
    """The Markdown page."""
    from tinymim_export.tables import markdown_table

    about = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [["part", "verdict", "seconds", ""]]
    figures = ""
    for name, part in results["parts"].items():
        what = (PARTS[name][0].__doc__ or "").splitlines()[0]
        lines.append([name, part["verdict"], f"{part['seconds']:.0f}", part.get("why", what)])
        if part.get("figures"):
            figures += f"\n## {name}\n\n{what}\n\n" + shown(part["figures"])
    memory = f", {about['gib']:.0f} GiB" if about["gib"] else ""
    return (
        f"# GPU check: {about['name']}{memory}\n\n{about['platform']}, CUDA {about['cuda']}; {versions}; commit "
        f"{about['commit']}; {results['seconds']:.0f} s{', smallest sizes' if results['quick'] else ''}.\n\n"
        f"{markdown_table(lines)}{figures}\n```bash\npython tools/gpu_check.py --prepare .gpu\n```\n"
    )


def shown(figures: Mapping[str, Any]) -> str:
    """Figures as Markdown: tables stay, the rest is a list."""
    text = ""
    for name, value in figures.items():
        if isinstance(value, str) and value.startswith("|"):
            text += f"\n{value}\n"
        elif isinstance(value, dict):
            inner = ", ".join(f"{key} {_number(item)}" for key, item in value.items())
            text += f"- {name}: {inner}\n"
        else:
            text += f"- {name}: {_number(value)}\n"
    return text


def _number(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_number, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def prepare(folder: Path) -> int:
    """Collect the wheels in ``folder`` and print the command for the other machine.

    Raises:
        ConfigError: a package that is not installed here, one for this Python only, or too many bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in WHEELS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ConfigError(f"{name} is not installed here", "its version is carried", "pip install -e .") from None
        if list(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
            continue
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), f"{name}=={version}"]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"no wheel of {name} {version}", done.stderr.strip()[-500:], "see pip's message")
    wheels = sorted(folder.glob("*.whl"))
    if wrong := [path.name for path in wheels if not re.search(r"-none-any$|-abi3-manylinux.*x86_64$", path.stem)]:
        raise ConfigError(f"{wrong[0]} is for one Python only", "the other machine may have another", "remove it")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True).stdout
    tracked = sum(path.stat().st_size for name in listed.split("\0") if name and (path := ROOT / name).is_file())
    carried = sum(path.stat().st_size for path in wheels)
    print(f"{len(wheels)} wheels, {carried / 2**20:.1f} MiB, beside {tracked / 2**20:.1f} MiB of the checkout")
    if carried + tracked > MOST:
        raise ConfigError(
            f"{(carried + tracked) / 2**20:.0f} MiB", f"at most {MOST >> 20} MiB may travel", "remove some"
        )
    print(f"there, in the checkout and with {folder} carried:")
    print(f"next: python3 tools/gpu_check.py --wheels {shlex.quote(str(folder))} --out ${{OUT:-docs}}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("gpu_check", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
