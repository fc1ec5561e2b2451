"""The house rules that a reader of the tree relies on: who may import whom, what is packaged, how long files are."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinymim.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"tinymim": "tinymim", "export": "tinymim_export", "mmseg_configs": "tinymim_mmseg_configs", "tools": "tools"}
FILES = sorted(p for folder in ROOMS for p in (ROOT / folder).rglob("*.py"))
EVERYONE = {
    "tinymim",
    "tinymim.errors",
    "tinymim.files",
    "tinymim.cores",
    "tinymim.folders",
    "tinymim.lazy",
    "tinymim.literals",
    "tinymim.progress",
    "tinymim.compat",
    "tinymim.confusion",
    "tinymim.hub",
    "tinymim.schema",
    "tinymim.records",
}
DATA = {
    f"tinymim.data.{name}"
    for name in ("examine", "folders", "label_files", "photo_files", "pixels", "pseudo_labels", "shards")
}  # of tinymim.data: numpy and Pillow only
# room -> rooms it may import; a name stands for itself and everything below it
ARROWS: dict[str, set[str]] = {
    "tinymim.errors": set(),
    "tinymim.files": set(),
    "tinymim.cores": set(),
    "tinymim.folders": set(),
    "tinymim.lazy": set(),
    "tinymim.literals": set(),
    "tinymim.progress": set(),
    "tinymim.compat": set(),
    "tinymim.hub": set(),
    "tinymim.confusion": {"tinymim.errors"},
    "tinymim.schema": {"tinymim.errors"},
    "tinymim.records": {"tinymim.schema"},
    "tinymim.models": set(),
    "tinymim.data": set(),
    "tinymim.recipes": set(),
    "tinymim.store": set(),  # numpy and fsspec only
    "tinymim.store.caching": {"tinymim.store"},  # with torch: these three
    "tinymim.store.checking": {"tinymim.store"},
    "tinymim.store.job": {"tinymim.data", "tinymim.models", "tinymim.store"},
    "tinymim.distill": {"tinymim.models", "tinymim.store"},
    "tinymim.analysis": {"tinymim.models", "tinymim.distill", "tinymim.data"},
    "tinymim.engine": {
        "tinymim.analysis",
        "tinymim.distill",
        "tinymim.data",
        "tinymim.models",
        "tinymim.recipes",
    },
    "tinymim.seg": {"tinymim.models", "tinymim.engine", "tinymim.distill.recipe_keys", *DATA},
    "tinymim.det": {
        "tinymim.data",
        "tinymim.distill.method",
        "tinymim.distill.recipe_keys",
        "tinymim.engine",
        "tinymim.models",
    },
    "tinymim.track": {
        "tinymim.data",
        "tinymim.distill.method",
        "tinymim.distill.recipe_keys",
        "tinymim.engine",
        "tinymim.models",
    },
    "tinymim.study": {"tinymim.engine", "tinymim.seg", "tinymim.data", "tinymim.models", "tinymim.recipes"},
    "tinymim.contract": {"tinymim.distill", "tinymim.engine", "tinymim.models", "tinymim.seg"},
    "tinymim_mmseg_configs": set(),
    "tinymim_export.comparison": {"tinymim_export.tables"},
    "tinymim_export.tables": set(),
    "tinymim_export.runtime": {"tinymim_export.tables", *DATA},
    "tinymim_export.bench": {"tinymim_export.runtime", "tinymim_export.tables", *DATA},
    "tinymim_export.formats": {
        "tinymim_export.comparison",
        "tinymim_export.graph.lower",
        "tinymim_export.precision",
        "tinymim_export.runtime",
        "tinymim_export.tables",
    },
    "tinymim_export.graph": {
        "tinymim.models",
        "tinymim.seg",
        "tinymim.track",
        "tinymim_export.comparison",
        "tinymim_export.runtime",
        "tinymim_export.tables",
    },
    "tinymim_export.precision": {"tinymim_export.comparison", "tinymim_export.runtime", "tinymim_export.tables", *DATA},
    "tinymim_export.report": {
        "tinymim_export.bench",
        "tinymim_export.precision.base",
        "tinymim_export.runtime",
        "tinymim_export.tables",
        *DATA,
    },
    "tinymim_export.tune": {
        "tinymim_export.bench",
        "tinymim_export.graph",
        "tinymim_export.precision",
        "tinymim_export.report",
        "tinymim_export.runtime",
        "tinymim_export.tables",
        *DATA,
    },
    "tinymim_export.web": {"tinymim_export.report", "tinymim_export.runtime"},
    # names of 0.1
    "tinymim_export.masks": {"tinymim_export.runtime"},
    "tinymim_export.originals": {"tinymim_export.graph"},
    "tinymim_export.photos": {"tinymim_export.runtime"},
    "tinymim_export.predict": {"tinymim_export.runtime"},
    "tinymim_export.quantize": {"tinymim_export.precision"},
    "tinymim_export.sensitivity": {"tinymim_export.precision"},
}
# commands and comparisons of whole models: may import everything
FREE = ("tinymim.benchmarks", "tinymim.cli", "tinymim.demo", "tinymim.__main__", "tinymim_export.cli", "tools")
TORCH = {"torch", "torchvision", "timm", "mmengine", "mmcv", "mmseg"}
ONNX = {"onnx", "onnxscript"}
# room -> what heavy packages it may import when it is itself imported; all other rooms of tinymim_export may not
HEAVY_ROOMS = {
    "tinymim_export.graph": TORCH | ONNX,
    "tinymim_export.originals": TORCH | ONNX,
    "tinymim_export.runtime.engines.executorch": {"torch"},  # its binding takes tensors
}
LIMIT, ALGORITHM_LIMIT = 450, 290  # lines; a judgement, not a reason to split into worse names


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

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def inside(name: str, room: str) -> bool:
    """Whether a module is a room or lies below it."""
    return name == room or name.startswith(room + ".")


def wrong_arrows(path: Path) -> list[str]:
    """Imports of a file that the plan of the house does not allow."""
    own = module_name(path)
    if any(inside(own, room) for room in FREE) or own == "tinymim":
        return []
    if own == "tinymim_export":
        return []
    room = max((r for r in ARROWS if inside(own, r)), key=len, default=None)
    if room is None:
        return [f"{path.relative_to(ROOT)}: this room is not in the plan; add it to ARROWS"]
    allowed = ARROWS[room]
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
    assert {"tinymim", "tinymim.models.vit", "tinymim_export.report.page", "tinymim.demo.run"} <= names


def test_the_rule_finds_a_wrong_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    for file, text, wrong in (
        ("tinymim/models/a.py", "from tinymim import engine", True),
        ("tinymim/models/b.py", "def f():\n    import tinymim_export", True),
        ("tinymim/models/c.py", "from tinymim.errors import DataError\nfrom . import a", False),
        ("tinymim/distill/a.py", "from ..engine import run", True),
        ("tinymim/seg/a.py", "from tinymim.data.photos import Photos", True),
        ("tinymim/seg/b.py", "from tinymim.data.folders import read_layout", False),
        ("export/bench/latency.py", "from tinymim.models import ViT", True),
        ("export/runtime/miou.py", "from tinymim_export.bench import stats", True),
        ("export/graph/trace.py", "from tinymim.models import ViT", False),
        ("export/attic.py", "import math", True),
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


def circles() -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm; functions' own imports count, too."""
    names = {module_name(path) for path in FILES}
    arrows = {
        module_name(path): {
            found
            for name, _ in imports(path)
            for found in [name if name in names else name.rpartition(".")[0]]
            if found in names and found != module_name(path)
        }
        for path in FILES
    }
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            at = stack.index(name)
            found.append(stack[at:])
            del stack[at:]

    for name in sorted(arrows):
        if name not in order:
            visit(name)
    return [sorted(group) for group in found if len(group) > 1]


def test_no_circles() -> None:
    assert not circles()


def test_a_circle_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tinymim" / "models"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from tinymim.models.b import f")
    (folder / "b.py").write_text("def f():\n    from tinymim.models import c")
    (folder / "c.py").write_text("import tinymim.models.a")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "FILES", sorted(folder.glob("*.py")))
    assert circles() == [["tinymim.models.a", "tinymim.models.b", "tinymim.models.c"]]


def test_only_seg_and_its_users_import_mmseg() -> None:
    may = ["tinymim.seg", "tinymim.compat", "tinymim.cli", "tinymim.benchmarks", "tools", "tinymim_export.graph"]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in FILES
        if not any(inside(module_name(path), room) for room in may)
        for name, line in imports(path)
        if inside(name, "mmseg")
    ]
    assert not wrong


def test_what_may_import_torch_and_onnx_follows_from_the_folder() -> None:
    """torch in graph alone, anywhere in a file; onnx at import time in graph alone (the registries are light)."""
    wrong = []
    for path in FILES:
        own = module_name(path)
        if not inside(own, "tinymim_export") or own == "tinymim_export.cli":
            continue
        heavy = next((allowed for room, allowed in HEAVY_ROOMS.items() if inside(own, room)), set())
        wrong += [f"{own}:{line} {name}" for name, line in imports(path) if name.split(".")[0] in TORCH - heavy]
        wrong += [
            f"{own}:{line} {name}"
            for name, line in imports(path, at_import_time_only=True)
            if name.split(".")[0] in ONNX - heavy or (not heavy and inside(name, "tinymim_export.graph"))
        ]
    assert not wrong


def test_light_modules_import_no_torch_at_import_time() -> None:
    light = (
        "tinymim",
        "tinymim.errors",
        "tinymim.files",
        "tinymim.folders",
        "tinymim.progress",
        "tinymim.confusion",
        "tinymim.schema",
        "tinymim.records",
        "tinymim.cli",
        "tinymim.demo.run",
        "tinymim.cli.bench",
        "tinymim.contract.limits",
        "tinymim.demo.scenes",
        "tinymim.demo.canvas",
        "tinymim.data.convert",
        "tinymim.data.examine",
        "tinymim.data.flat",
        "tinymim.data.folders",
        "tinymim.data.formats",
        "tinymim.data.dataset_json",
        "tinymim.data.label_files",
        "tinymim.data.photo_files",
        "tinymim.data.pixels",
        "tinymim.data.pseudo_labels",
        "tinymim.store",
        "tinymim.store.layout",
        "tinymim.store.official",
        "tinymim.store.places",
        "tinymim.store.targets",
        "tinymim.store.writer",
        "tinymim.track",
        "tinymim.track.boxes",
        "tinymim.track.evaluate",
        "tinymim.track.following",
        "tinymim.track.generate",
        "tinymim.track.metrics",
        "tinymim.track.sequences",
    )
    wrong = [
        f"{module_name(path)}:{line} {name}"
        for path in FILES
        if module_name(path) in light
        for name, line in imports(path, at_import_time_only=True)
        if name.split(".")[0] in TORCH | ONNX
    ]
    assert not wrong


def test_help_and_list_import_nothing_heavy() -> None:
    """Options are parsed, and names listed, without PyTorch and (the verbs) numpy: every command answers at once."""
    heavy = sorted(TORCH | ONNX | {"onnxruntime", "openvino", "scipy", "PIL"})
    code = (
        "import contextlib, runpy, sys\n"
        "from tinymim.cli import VERBS, main\n"
        f"tools = {sorted(map(str, (ROOT / 'tools').glob('*.py')))!r}\n"
        "def check(heavy, run, *words):\n"
        "    sys.argv = list(words)\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        run()\n"
        "    found = sorted(sys.modules.keys() & heavy)\n"
        "    assert not found, (words, found)\n"
        f"heavy = {{*{heavy!r}}}\n"
        "check(heavy | {'numpy'}, main, 'tinymim', '--help')\n"
        "check(heavy | {'numpy'}, main, 'tinymim', 'list')\n"
        "for verb in VERBS:\n"
        "    check(heavy | {'numpy'}, main, 'tinymim', verb, '--help')\n"
        "from tinymim_export.cli import main\n"
        "check(heavy, main, 'tinymim-export', '--help')\n"
        "for file in tools:\n"
        "    check(heavy, lambda: runpy.run_path(file, run_name='__main__'), file, '--help')\n"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.count("usage: ") == 2 + len(VERBS) + len([*(ROOT / "tools").glob("*.py")])


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
    text = path.read_text(encoding="utf-8")
    algorithm = inside(module_name(path), "tinymim.distill") or module_name(path) == "tinymim.models.mae"
    assert len(text.splitlines()) <= (ALGORITHM_LIMIT if algorithm else LIMIT)
    assert text.isascii(), [line for line in text.splitlines() if not line.isascii()][:3]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) or (
        text.startswith("#") and inside(module_name(path), "tinymim_mmseg_configs")
    )
    assert said or not text.strip(), "the file begins with neither a docstring nor (configs) a comment"


VIT_ARGUMENTS = {
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "rel_pos_bias",
    "init_values",
    "last_dim",
}


def vit_by_name(path: Path) -> list[str]:
    """Places of a file that ask whether a model is our plain ViT, build one, or list its arguments (five or more)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str | None] = []
        if isinstance(node, ast.ImportFrom) and any(alias.name == "ViT" for alias in node.names):
            found.append(f"{path}:{node.lineno} imports ViT")
        if isinstance(node, ast.Attribute) and node.attr == "ViT":
            found.append(f"{path}:{node.lineno} names ViT")
        if isinstance(node, ast.Call):
            names = [keyword.arg for keyword in node.keywords]
        elif isinstance(node, ast.arguments):
            names = [argument.arg for argument in (*node.args, *node.kwonlyargs)]
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            names = [e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)]
        elif isinstance(node, ast.Dict):
            names = [e.value for e in node.keys if isinstance(e, ast.Constant) and isinstance(e.value, str)]
        if len(VIT_ARGUMENTS & set(names)) >= 5:
            found.append(f"{path}:{getattr(node, 'lineno', 0)} lists {', '.join(sorted(VIT_ARGUMENTS & set(names)))}")
    return found


def test_backbones_are_known_by_their_contract() -> None:
    """Outside ``tinymim.models`` nobody asks what kind a backbone is, or repeats the plain ViT's arguments."""
    data = ("tinymim.recipes", "tinymim.cli._golden_numbers", "tinymim_mmseg_configs")
    places = {
        module_name(path): vit_by_name(path)
        for path in FILES
        if not any(inside(module_name(path), room) for room in ("tinymim.models", *data))
    }
    assert not [place for found in places.values() for place in found]


def test_the_rule_finds_a_vit_by_name(tmp_path: Path) -> None:
    for text, wrong in (
        ("from tinymim.models import ViT", True),
        ("import tinymim\nisinstance(x, tinymim.models.ViT)", True),
        ("KEYS = ('patch_size', 'embed_dim', 'depth', 'num_heads', 'init_values')", True),
        ("build(patch_size=16, embed_dim=8, depth=1, num_heads=2, mlp_ratio=4)", True),
        ("def f(patch_size, embed_dim, depth, *, num_heads, mlp_ratio): ...", True),
        ("from tinymim.models import Backbone\nshape = dict(embed_dim=8, depth=2)", False),
    ):
        (tmp_path / "a.py").write_text(text)
        assert bool(vit_by_name(tmp_path / "a.py")) is wrong, text


def loose_markup(path: Path) -> list[str]:
    """Calls that make HTML of anything but a literal, and JSON that is not read through tinymim.schema."""
    own, wrong = module_name(path), []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name.split(".")[-1] in ("html", "Html") and own != "tinymim_export.report.markup" and node.args:
            literal = isinstance(node.args[0], ast.Constant)
            wrong += [] if literal else [f"{own}:{node.lineno} {name}() of a value; templates are literals"]
        if name in ("json.load", "json.loads") and own != "tinymim.schema":
            ours = node.args and ast.unparse(getattr(node.args[0], "func", node)).endswith((".to_json", "json.dumps"))
            wrong += [] if ours else [f"{own}:{node.lineno} {name}(); use tinymim.schema"]
    return wrong


# modules that read back what the same process, or an argument, gave them
OWN_JSON = {
    "tinymim.study.verbs",
    "tinymim.study.renaming",
    "tinymim.study.definition",
    "tinymim_export.runtime.sessions",
    "tinymim_export.bench.latency",
    "tinymim.benchmarks",
    "tinymim.engine.health",
    "tinymim.engine.run_folder",
    "tinymim.data.dataset_json",
    "tinymim.files",
    "tinymim.data.folders",
}


def test_what_comes_from_a_file_is_checked_and_escaped() -> None:
    found = [(path, text) for path in FILES for text in loose_markup(path)]
    assert not [
        text
        for path, text in found
        if "json.load" not in text or not any(inside(module_name(path), name) for name in OWN_JSON)
    ]


def test_the_rule_finds_loose_markup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "export").mkdir()
    for text, wrong in (
        ('html(f"<b>{name}</b>")', True),
        ('html("<b>" + name)', True),
        ("markup.Html(name)", True),
        ('html("<b>{}</b>", name)', False),
        ("json.loads(path.read_text())", True),
        ("json.loads(made.to_json())", False),
        ("json.loads(json.dumps(x, default=str))", False),
    ):
        (tmp_path / "export" / "a.py").write_text(text)
        assert bool(loose_markup(tmp_path / "export" / "a.py")) is wrong, text


def test_public_names_of_export_need_one_import() -> None:
    """The functions that the README names, from ``import tinymim_export`` alone, before and after their floors load."""
    code = (
        "import tinymim_export as e\n"
        "for _ in range(2):\n"
        "    names = [e.export, e.verify, e.bench, e.evaluate, e.build_report, e.build_web, e.masks.predict]\n"
        "    names += [e.quantize.quantize, e.sensitivity.sensitivity, e.tune.tune, e.Predictor]\n"
        "    assert all(map(callable, [*names, e.runtime.open_engine]))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
