"""Seeded damage to every artefact, read by every command that claims to read it: own errors, never a traceback.

``TINYMIM_FUZZ=1000 pytest -m slow -n 0 tests/attack/test_fuzz.py`` tries more (default: 150 inputs);
``TINYMIM_FUZZ_SEED`` moves on. A failure prints the number of its input: ``TINYMIM_FUZZ_ONE=17`` runs that one alone,
``TINYMIM_FUZZ_MADE`` names a folder of artefacts made before.
"""

import json
import os
import random
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import onnx
import pytest

from tests.attack.artefacts import COMMANDS, SEG, SEGMENT, make
from tests.attack.forked import Outcome, run, warm_up
from tests.attack.mutate import SCRIPT, damage
from tinymim.cli import main
from tinymim.files import sha256_file
from tinymim_export.report.chain_page import chain_report
from tinymim_export.report.page import POLICY, run_report
from tinymim_export.report.study_page import write_study

COUNT, SEED = int(os.environ.get("TINYMIM_FUZZ", "150")), int(os.environ.get("TINYMIM_FUZZ_SEED", "0"))
ONE = os.environ.get("TINYMIM_FUZZ_ONE")
RUN = ("config.py", "env.json", "metrics.jsonl", "student.pth", "result.json", "segmentor.pth")


class Target(NamedTuple):
    """Files that are damaged (patterns), what is copied for it, and the commands that read them."""

    files: tuple[str, ...]
    copied: tuple[str, ...]
    commands: tuple[str, ...]


def again(name: str, more: str) -> str:
    """The command that made an artefact, with another option before its --cfg-options."""
    head, cfg, tail = COMMANDS[name].partition(" --cfg-options")
    return f"{head} {more}{cfg}{tail}"


FILES = ("fp32.onnx", "int8.onnx", "labelled", "photos")
TARGETS = (
    Target(
        tuple(f"{folder}/{name}" for folder in ("teacher", "student", "segmentor") for name in RUN),
        ("teacher", "student", "segmentor"),
        (
            "tinymim report teacher student segmentor --out r.html",
            "tinymim report student --out r.html",
            "tinymim report teacher student --out r.html",
        ),
    ),
    Target(
        ("teacher/student.pth",),
        ("photos", "teacher"),
        (again("student", "--dry-run"), "tinymim-export --checkpoint teacher/student.pth --onnx x.onnx"),
    ),
    Target(
        ("student/student.pth",),
        ("labelled", "student"),
        (f"{SEGMENT} --student student/student.pth --dry-run {SEG}",),
    ),
    Target(
        ("student/config.py", "student/env.json", "student/metrics.jsonl", "student/checkpoints/*.pth"),
        ("photos", "teacher", "student"),
        (again("student", "--resume"),),
    ),
    Target(
        ("segmentor/config.py", "segmentor/env.json", "segmentor/metrics.jsonl", "segmentor/checkpoints/*.pth"),
        ("labelled", "segmentor"),
        (again("segmentor", "--resume"),),
    ),
    Target(("segmentor/segmentor.pth",), ("segmentor",), (COMMANDS["fp32.onnx"],)),
    Target(("chain/chain.json", "chain/*/env.json"), ("photos", "teacher", "chain"), (again("chain", "--resume"),)),
    Target(
        ("fp32.onnx", "int8.onnx"),
        FILES,
        (
            "tinymim report fp32.onnx int8.onnx --line --out r.html",
            "tinymim report fp32.onnx int8.onnx --out r.html",
            "tinymim predict fp32.onnx photos --out masks --overlay --resize-to-file",
            "tinymim eval int8.onnx --data labelled --resize-to-file",
            "tinymim eval fp32.onnx --data labelled --mode slide",
            "tinymim bench fp32.onnx --runs 10 --threads 1 --split",
            "tinymim-export --from fp32.onnx --precision fp16 --onnx x.onnx",
            "tinymim-export --verify-only int8.onnx --from fp32.onnx",
            "tinymim-export --from fp32.onnx --web page --ort-web photos",
        ),
    ),
    Target(
        ("*.json", "best.tune/*.json", "best.tune/scores/*.json"),
        ("fp32.onnx", "int8.onnx", "*.json", "best.tune", "best.onnx"),
        (
            "tinymim report fp32.onnx int8.onnx --line --out r.html",
            "tinymim report best.tune --out r.html",
            "tinymim report bench.json eval.json fp32.json int8.json sensitivity.json",
            "tinymim report lineage.json --out r.html",
            "tinymim report lineage.json eval.json best.tune --out r.html",
            "tinymim bench --compare bench.json bench.json",
        ),
    ),
    Target(
        ("study/a-study/cells/*/*.json", "study/*/cells/*/*.json", "study/stages/*/*.json"),
        ("study", "study.py", "split"),
        (again("study", "--table"), COMMANDS["study"], again("study", "--rename-stages")),
    ),
    Target(
        ("labelled/dataset.json", "labelled/images/validation/*", "labelled/annotations/validation/*"),
        ("labelled", "fp32.onnx"),
        (
            "tinymim eval fp32.onnx --data labelled --resize-to-file",
            "tinymim predict fp32.onnx labelled/images/validation --out masks --resize-to-file",
            f"{SEGMENT} --dry-run {SEG}",
        ),
    ),
    Target(("photos/*",), ("photos",), (again("teacher", "--overwrite"),)),
)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with one of each artefact."""
    warm_up()
    if before := os.environ.get("TINYMIM_FUZZ_MADE"):
        return Path(before)
    root = tmp_path_factory.mktemp("artefacts") / "made"
    root.mkdir()
    print({name: round(seconds, 1) for name, seconds in make(root).items()})
    return root


def attack(number: int, made: Path, folder: Path) -> tuple[str, Outcome]:
    """Damage one file and run one command on it; everything follows from the number."""
    rng = random.Random(f"{SEED}-{number}")
    target = TARGETS[number % len(TARGETS)]
    for pattern in target.copied:
        for source in made.glob(pattern):
            copy = shutil.copytree if source.is_dir() else shutil.copyfile
            copy(source, folder / source.name)
    path = rng.choice(sorted({path for pattern in target.files for path in folder.glob(pattern)}))
    damage(path, rng)
    command = rng.choice(target.commands)
    outcome = run(command.split(), folder)
    return f"input {number}: {path.relative_to(folder)} -> {' '.join(command.split()[:2])} ...", outcome


@pytest.mark.slow
def test_damaged_artefacts_give_own_errors(made, tmp_path, capsys):
    numbers = range(COUNT) if ONE is None else [int(ONE)]
    outcomes: Counter[str] = Counter()
    bad = []
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        what, outcome = attack(number, made, folder)
        outcomes[outcome.word] += 1
        left = [path.name for path in folder.rglob("*.part")]
        if outcome.word not in ("worked", "error", "exit 1") or left:
            bad.append(f"{what}\n{outcome.word} {left}\n{outcome.text[-1500:]}")
        if ONE is None:
            shutil.rmtree(folder)
        else:
            print(what, outcome)
    with capsys.disabled():
        print(f"\n{len(numbers)} damaged inputs: {dict(outcomes)}")
    assert outcomes["error"] or ONE, "nothing was noticed"
    assert not bad, "\n\n".join(bad)


NAME = "<b onclick=alert(1)>\"'&| \u20ac"  # of a file or folder
KEPT = re.compile(
    r"[0-9a-f]{10,64}|tinymim\.\w+|teacher|student|segmentor|onnx|whole|fp32|int8|[\w-]+\.(json|onnx)|1_tiny"
)
FREE = {"class_IoU", "class_iou", "class_drop", "versions", "nodes", "settings", "curves", "parents"}


def plant(value, free=False):
    """A script in every text and in every key that a file chooses; names that join files stay."""
    if isinstance(value, dict):
        return {key + SCRIPT * free: plant(item, key in FREE) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plant(item) for item in value]
    return value + SCRIPT if isinstance(value, str) and not KEPT.fullmatch(value) else value


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.seen = [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.seen += [value for _, value in attrs if value]

    def handle_data(self, data):
        self.seen.append(data)


@pytest.fixture(scope="module")
def hostile(made, tmp_path_factory):
    """All artefacts with a script wherever a file may say something."""
    root = tmp_path_factory.mktemp("hostile") / NAME
    shutil.copytree(made, root)
    renamed = {}
    for path in [*root.rglob("*.html"), *root.rglob("*.md"), *root.rglob("*.svg")]:
        path.unlink()
    for path in root.glob("*.onnx"):
        proto, old = onnx.load(path), sha256_file(path)
        for prop in proto.metadata_props:
            if prop.key not in ("tinymim.part", "tinymim.input", "tinymim.resize"):
                prop.value = json.dumps(plant(json.loads(prop.value)))
        onnx.save(proto, path)
        renamed[old] = sha256_file(path)
    for path in root.rglob("*.json"):
        text = path.read_text("utf-8")
        for old, new in renamed.items():
            text = text.replace(old, new)
        path.write_text(json.dumps(plant(json.loads(text))), "utf-8")
    for path in root.rglob("metrics.jsonl"):
        rows = [plant(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        rows = [row | {f"val_{SCRIPT}_acc": 0.5, f"{SCRIPT}lr": row["step"], "step": row["step"]} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for path in root.rglob("config.py"):
        path.write_text(
            f'"""Resolved recipe of this run ({SCRIPT!r})."""\nx = {SCRIPT!r}\n{path.read_text("utf-8")}', "utf-8"
        )
    (root / "fp32.onnx").rename(root / f"{NAME}.onnx")
    (root / "student").rename(root / f"{NAME} student")
    return root


@pytest.mark.slow
def test_no_page_takes_markup_from_a_file(hostile, capsys):
    everything = [str(path) for path in sorted(hostile.iterdir()) if path.suffix in ("", ".onnx", ".json")]
    everything = [
        path for path in everything if Path(path).name not in ("study", "labelled", "photos", "split", "chain")
    ]
    line, difference = (str(hostile / f"{NAME} {word}.html") for word in ("line", "difference"))
    assert main(["report", *everything, "--line", "--out", line]) == 0
    assert main(["report", str(hostile / f"{NAME}.onnx"), str(hostile / "int8.onnx"), "--out", difference]) == 0
    for folder in ("teacher", f"{NAME} student", "segmentor"):
        run_report(hostile / folder)
    chain_report(hostile / "chain")
    table = next(hostile.glob("study/*/table.json"))
    values = json.loads(table.read_text("utf-8"))
    values["scores"] = [score.removesuffix(SCRIPT) for score in values["scores"]]  # keys of its rows, and file names
    write_study(values, table.parent, SCRIPT)
    pages = [path for path in hostile.rglob("*") if path.suffix in (".html", ".svg")]
    assert len(pages) >= 8
    for path in pages:
        page = Page(path)
        names = {tag for tag, _ in page.tags}
        assert not names & {"script", "img" if path.suffix == ".svg" else "iframe", "object", "base", "form"}, path
        assert not [(tag, attrs) for tag, attrs in page.tags if any(key.startswith("on") for key in attrs)], path
        assert not [a for tag, a in page.tags if tag == "b" and a], path
        assert any("alert(1)" in text for text in page.seen), path
        if path.suffix == ".html":
            assert ("meta", {"http-equiv": "Content-Security-Policy", "content": POLICY}) in page.tags, path
    said = capsys.readouterr().out
    assert "\x1b" not in said
    for path in hostile.rglob("*.md"):
        assert "<script" not in re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL), path
