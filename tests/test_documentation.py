"""The documentation site, its tutorial, the configuration it shows, and shell completion."""

import argparse
import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tinymim.cli import VERBS, main
from tinymim.cli.completion import SHELLS, whole_parser

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site():
    """docs/site.py, which MkDocs imports."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("documentation_site", ROOT / "docs/site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_every_command_is_on_its_page(site, verb):
    page = site.command_page(f"tinymim {verb}", VERBS[verb])
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"tinymim.cli.{verb}").add_arguments(parser)
    options = {word for action in parser._actions for word in action.option_strings if action.help}
    assert {word for word in options if f"`{word}" not in page and f", {word}" not in page} == set()


def test_marks_of_sphinx_become_code(site):
    shown = site.on_page_content("see :func:<code>~tinymim.cka</code> and :class: <code>ViT</code>")
    assert shown == "see <code>tinymim.cka</code> and <code>ViT</code>"


def test_the_config_for_mmsegmentation(tmp_path):
    """It loads over MMSegmentation's own bases, and its model is built."""
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from tinymim.seg.config import model_outline, plain_batch_norm

    init_default_scope("mmseg")
    text = re.search(r"```python\n(.*?)```", (ROOT / "docs/start/mmsegmentation.md").read_text("utf-8"), re.DOTALL)[1]
    assert len(text.splitlines()) <= 20
    (tmp_path / "own.py").write_text(text, "utf-8")
    cfg = Config.fromfile(tmp_path / "own.py")
    plain_batch_norm(cfg)
    model = model_outline(cfg)
    assert [model.decode_head.num_classes, model.backbone.config["embed_dim"]] == [150, 192]
    assert cfg.optim_wrapper.optimizer.type == "AdamW"


def test_the_tutorial_is_stored_without_results():
    cells = json.loads((ROOT / "examples/tutorial.ipynb").read_text("utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.read(ROOT / "examples/tutorial.ipynb", 4)
    nbclient.NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "image/png" in book.cells[-3].outputs[-1]["data"]
    assert (tmp_path / "tutorial/segmentor/report.html").is_file()


@pytest.mark.parametrize("shell", SHELLS)
def test_completion(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--teacher-segmentor" in script
    assert "doctor" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_completion_knows_paths():
    commands = next(a for a in whole_parser("path")._actions if isinstance(a, argparse._SubParsersAction)).choices
    found = {word for a in commands["distill"]._actions if hasattr(a, "complete") for word in a.option_strings}
    assert {"--data", "--teacher", "--out"} <= found
    assert "--lr" not in found


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("material")
    words = ["mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    subprocess.run(words, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert (tmp_path / "site/start/tutorial/index.html").is_file()


def test_the_table_of_expectations():
    """31 rows, a verdict in each, footnotes and sources that exist, and commands whose verbs and options do."""
    text = (ROOT / "docs/expectations.md").read_text("utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row[0]) for row in rows] == [*range(1, 32)]
    assert {len(row) for row in rows} == {8}
    assert all(re.match(r" (yes|part|no)\b", row[3]) for row in rows)
    assert all(re.match(r" (yes|part|no|\?|-)", cell) for row in rows for cell in row[4:])
    assert all(re.search(rf"\b{name}\b", text.split("Sources,")[1]) for name in re.findall(r"\b[ulmt]\d\b", text))
    commands = re.findall(r"`((?:tinymim|torchrun)[^`]*)`", "\n".join(map("|".join, rows)))
    commands += re.findall(r"```bash\n(.*)\n```", text)
    assert len(commands) >= 20
    known = whole_parser(file={})._subparsers._group_actions[0].choices
    for command in commands:
        verb, *words = command.split("tinymim ", 1)[-1].split()
        if not command.startswith("tinymim-export"):
            assert verb in VERBS, command
            options = {o for a in known[verb]._actions for o in a.option_strings}
            assert {word for word in words if word.startswith("--")} <= options, command
