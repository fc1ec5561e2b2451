"""The house rules that a reader of the tree relies on: who may import whom, what is packaged, how long files are."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"tinymim": "tinymim", "export": "tinymim_export", "mmseg_configs": "tinymim_mmseg_configs", "tools": "tools"}
FILES = sorted(p for folder in ROOMS for p in (ROOT / folder).rglob("*.py"))
EVERYONE = {"tinymim", "tinymim.errors", "tinymim.files", "tinymim.progress", "tinymim.compat"}
# room -> rooms it may import; a name stands for itself and everything below it
ARROWS = {
    "tinymim.errors": set(),
    "tinymim.files": set(),
    "tinymim.progress": set(),
    "tinymim.compat": set(),
    "tinymim.models": set(),
    "tinymim.distill": {"tinymim.models"},
    "tinymim.data": set(),
    "tinymim.engine": {"tinymim.analysis", "tinymim.distill", "tinymim.data", "tinymim.models", "tinymim.recipes"},
    "tinymim.analysis": {"tinymim.models", "tinymim.distill"},
    "tinymim.seg": {"tinymim.models", "tinymim.engine", "tinymim.data.folders", "tinymim.data.pixels"},
    "tinymim.recipes": set(),
    "tinymim_mmseg_configs": set(),
    "tinymim_export": {"tinymim.data.folders", "tinymim.data.pixels"},
}
FREE = ("tinymim.cli", "tinymim.__main__", "tinymim_export.cli", "tools")  # commands: may import everything
# modules of tinymim_export that turn a PyTorch model into a graph or compare with one
WITH_PYTORCH = ("convert", "cost", "graph", "originals", "parity", "wrappers")
ON_THE_TARGET = (  # numpy, Pillow, onnxruntime
    "latency", "sessions", "runtime", "stats", "resize", "photos", "miou", "predict", "masks", "pictures", "lineage",
    "line", "sources", "weights", "pages", "evidence", "shots", "versus", "report", "plots", "figures", "style",
    "bench_compare", "verdict", "explain", "tables", "metadata", "web", "chain_page", "watching",
)  # fmt: skip
HEAVY = {"torch", "torchvision", "timm", "mmengine", "mmcv", "mmseg", "onnx", "onnxscript"}
LIMIT, ALGORITHM_LIMIT = 400, 250  # lines


def module_name(path: Path) -> str:
    """The import name of a file of ours."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([ROOMS[folder], *(part for part in rest if part != "__init__")])


def imports(path: Path, *, at_import_time_only: bool = False) -> Iterator[tuple[str, int]]:
    """(module, line) of every import; those under ``if TYPE_CHECKING`` do not count.

    ``from a.b import c`` gives ``a.b.c``: c may be a module.
    """

    def walk(node: ast.AST) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if at_import_time_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = module_name(path).split(".")
                    package = package if path.stem == "__init__" else package[:-1]
                    base = ".".join([*package[: len(package) - child.level + 1], *filter(None, [base])])
                yield from ((f"{base}.{alias.name}", child.lineno) for alias in child.names)
            yield from walk(child)

    yield from walk(ast.parse(path.read_text()))


def inside(name: str, room: str) -> bool:
    """Whether a module is a room or lies below it."""
    return name == room or name.startswith(room + ".")


def wrong_arrows(path: Path) -> list[str]:
    """Imports of a file that the plan of the house does not allow."""
    own = module_name(path)
    if any(inside(own, room) for room in FREE) or own == "tinymim":
        return []
    room = max((r for r in ARROWS if inside(own, r)), key=len, default=None)
    if room is None:
        return [f"{path.relative_to(ROOT)}: this room is not in the plan; add it to house.md and to ARROWS"]
    allowed = ARROWS[room]
    if room == "tinymim_export" and own.rpartition(".")[2] in WITH_PYTORCH:
        allowed = {"tinymim.models", "tinymim.seg", "tinymim.data.folders"}
    wrong = []
    for name, line in imports(path):
        if name.split(".")[0] not in ("tinymim", "tinymim_export", "tinymim_mmseg_configs", "tools", "tests"):
            continue
        plain = any(name == e or name.rpartition(".")[0] == e for e in EVERYONE) and not any(
            inside(name, r) for r in (*ARROWS, *FREE) if r not in EVERYONE
        )
        if not (inside(name, room) or plain or any(inside(name, a) for a in allowed)):
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


def test_files_are_found() -> None:
    names = {module_name(p) for p in FILES}
    assert {"tinymim", "tinymim.models.vit", "tinymim_export.report", "tinymim.cli.demo"} <= names


def test_the_rule_finds_a_wrong_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for file, text, wrong in (
        ("tinymim/models/a.py", "from tinymim import engine", True),
        ("tinymim/models/b.py", "def f():\n    import tinymim_export", True),
        ("tinymim/models/c.py", "from tinymim.errors import DataError\nfrom . import a", False),
        ("tinymim/distill/a.py", "from ..engine import run", True),
        ("tinymim/seg/a.py", "from tinymim.data.photos import Photos", True),
        ("tinymim/seg/b.py", "from tinymim.data.folders import read_layout", False),
        ("export/latency.py", "from tinymim.models import ViT", True),
        ("export/graph.py", "from tinymim.models import ViT", False),
        ("tinymim/cli/a.py", "import tinymim_export", False),
        ("tinymim/attic/a.py", "import math", True),
    ):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        assert bool(wrong_arrows(path)) is wrong, file


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    assert not wrong_arrows(path)


def test_only_seg_and_its_users_import_mmseg() -> None:
    may = ["tinymim.seg", "tinymim.compat", "tinymim.cli", "tools", *(f"tinymim_export.{m}" for m in WITH_PYTORCH)]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES
        if not any(inside(module_name(path), room) for room in may)
        for name, line in imports(path)
        if inside(name, "mmseg")
    ]
    assert not wrong


def test_what_runs_on_the_target_needs_no_torch() -> None:
    wrong = []
    for path in FILES:
        own = module_name(path)
        if own == "tinymim_export" or (inside(own, "tinymim_export") and own.rpartition(".")[2] in ON_THE_TARGET):
            wrong += [f"{own}:{line} {name}" for name, line in imports(path) if name.split(".")[0] in HEAVY - {"onnx"}]
            wrong += [
                f"{own}:{line} {name}"
                for name, line in imports(path, at_import_time_only=True)
                if inside(name, "onnx") or any(inside(name, f"tinymim_export.{m}") for m in WITH_PYTORCH)
            ]
    assert not wrong


def test_light_modules_import_no_torch_at_import_time() -> None:
    light = ("tinymim", "tinymim.errors", "tinymim.files", "tinymim.progress", "tinymim.cli", "tinymim.cli.demo",
             "tinymim.cli.bench", "tinymim.data.scenes", "tinymim.data.canvas", "tinymim.data.folders")  # fmt: skip
    wrong = [
        f"{module_name(path)}:{line} {name}"
        for path in FILES
        if module_name(path) in light
        for name, line in imports(path, at_import_time_only=True)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong


def test_packages_in_pyproject_are_the_folders() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = {name: folder for folder, name in ROOMS.items()}
    found = {
        module_name(path)
        for folder in ("tinymim", "export", "mmseg_configs")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setup["packages"]) == found
    assert setup["package-dir"] == {name: places[name] for name in ("tinymim_export", "tinymim_mmseg_configs")}
    without = {p.parent for p in FILES if p.is_relative_to(ROOT / "tinymim") or p.is_relative_to(ROOT / "export")}
    assert not [folder for folder in without if not (folder / "__init__.py").is_file()]


def test_checks_are_configured() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tool["ruff"]["line-length"] == 120
    assert tool["ruff"]["lint"]["select"]
    assert "mypy" in tool


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short_and_ascii(path: Path) -> None:
    text = path.read_text()
    algorithm = inside(module_name(path), "tinymim.distill") or module_name(path) == "tinymim.models.mae"
    assert len(text.splitlines()) <= (ALGORITHM_LIMIT if algorithm else LIMIT)
    assert text.isascii(), [line for line in text.splitlines() if not line.isascii()][:3]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    said = ast.get_docstring(ast.parse(text)) or (
        text.startswith("#") and inside(module_name(path), "tinymim_mmseg_configs")
    )
    assert said or not text.strip(), "the file begins with neither a docstring nor (configs) a comment"
