"""What was transferred from a teacher to its students: one page of similarity, attention, health and k-NN.

For every student: CKA of its blocks with the teacher's, attention distance and entropy by head beside the teacher's,
KL of its relations by head, outliers that INT8 would feel, and k-NN after every block; from the run folders, k-NN over
the epochs. Writes OUT/transferred.json, OUT/transferred.md and its pictures (SVG), all at the end.
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinymim.cli import run_command
from tinymim.cli._next import segment_line
from tinymim.errors import ConfigError, DataError
from tinymim.files import environment, sha256_file

LONGEST = 32  # letters of a student's name: it stands in legends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    add = parser.add_argument
    add("--teacher", required=True, metavar="NAME", help="timm/NAME or a checkpoint file")
    add("--teacher-weights", metavar="FILE", help="weights of a timm teacher")
    add("--teacher-heads", type=int, metavar="N", help="heads per block, for files that do not tell")
    add("--target-block", type=int, metavar="N", help="the teacher's block, from 1; default: 18 of 24, else the last")
    add(
        "--students",
        required=True,
        nargs="+",
        metavar="NAME=FILE",
        help="student.pth or another checkpoint; NAME=tinymim_vit_tiny: random weights",
    )
    add("--student-heads", type=int, metavar="N", help="heads per block, for files that do not tell")
    add("--runs", nargs="+", default=[], metavar="NAME=FOLDER", help="run folders: k-NN of their metrics.jsonl")
    add("--photos", required=True, metavar="PATTERN", help="photos, a folder or a quoted pattern")
    add("--limit", type=int, default=200, metavar="N", help="use this many of the photos, evenly spread")
    add("--labelled-classes", metavar="FOLDER", help="folder of classes, or of train/ and val/ with such, for k-NN")
    add("--labelled-limit", type=int, default=500, metavar="N", help="most reference photos, and query photos")
    add("--img-size", type=int, default=224, metavar="S", help="side of the students' photos, pixels")
    add("--batch-size", type=int, default=32, metavar="B", help="photos of a mini-batch of CKA")
    add("--out", type=Path, default=Path("docs/transferred"), metavar="FOLDER")


def named(words: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE words.

    Raises:
        ConfigError: one has no name or no value, or two names would share their pictures.
    """
    from tinymim.benchmarks.transferred_page import slug

    found: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not (name.isprintable() and 1 <= len(name) <= LONGEST and re.search(r"[A-Za-z0-9]", name) and value):
            why = f"a name has 1 to {LONGEST} characters, a letter or digit among them"
            raise ConfigError(f"{option} {word}", why, f"write e.g. {option} scratch=runs/scratch/student.pth")
        if slug(name) in map(slug, found):
            raise ConfigError(f"two of {option} are called {name}", "files are named after them", "rename one")
        found[name] = value
    return found


def knn_of_run(folder: str) -> list[tuple[float, float]]:
    """(epoch, top-1) of a run's ``metrics.jsonl``.

    Raises:
        DataError: there is no k-NN in it, or its folder does not tell how many steps an epoch has.
    """
    from tinymim.literals import read_literals
    from tinymim.records import read_env
    from tinymim_export.report.page import read_metrics

    points = read_metrics(Path(folder) / "metrics.jsonl").get("knn_top1")
    if not points:
        fix = "leave it out of --runs, or train with --probe-data FOLDER"
        raise DataError(f"{folder} has no k-NN", "no line of its metrics.jsonl has knn_top1", fix)
    config, data = Path(folder) / "config.py", read_env(folder).get("inputs", {}).get("data")
    batch = read_literals(config.read_text("utf-8-sig"), config).get("batch_size") if config.is_file() else None
    if not data or not isinstance(batch, int) or not 0 < batch <= data["files"]:
        why = "its env.json and config.py do not tell photos and batch size"
        raise DataError(f"{folder} does not tell the steps of an epoch", why, "name the folder of a whole run")
    return [(step / (data["files"] // batch), value) for step, value in points]


def run(args: argparse.Namespace) -> int:
    """Check everything, measure, write the page."""
    students, runs = named(args.students, "--students"), named(args.runs, "--runs")
    for option, least in (("limit", 4), ("labelled_limit", 10), ("img_size", 16), ("batch_size", 4)):
        if getattr(args, option) < least:
            word = f"--{option.replace('_', '-')}"
            raise ConfigError(f"{word} {getattr(args, option)}", "too few to measure", f"{word} {least} or more")
    if strange := next((name for name in runs if name not in students), None):
        raise ConfigError(f"--runs {strange}", "no student has this name", f"one of {', '.join(students)}")

    from tinymim.analysis.sides import batches_of, choose_photos, read_crops
    from tinymim.benchmarks import transferred_measure as tool
    from tinymim.benchmarks.transferred_page import write_page
    from tinymim.folders import hold
    from tinymim_export.report.page import hide_paths

    epochs = {name: knn_of_run(folder) for name, folder in runs.items()}
    teacher, sides = tool.open_sides(
        args.teacher, args.teacher_weights, args.teacher_heads, students, args.student_heads, args.img_size
    )
    target = tool.choose_target(teacher, args.target_block)
    with hold(args.out):
        files, photos = choose_photos(args.photos, args.limit)
        pixels, _ = read_crops(files, args.img_size, "photos")
        labelled = None
        if args.labelled_classes:
            labelled = tool.read_labelled(args.labelled_classes, args.labelled_limit, args.img_size, args.batch_size)
        batches = batches_of(pixels, args.batch_size)
        results: dict[str, Any] = {
            "kind": "tinymim.transferred",
            "target_block": target,
            "img_size": args.img_size,
            "teacher_size": teacher.side,
            "batches": [len(batch) for batch in batches],
            "photos": {**photos, "pattern": hide_paths(photos["pattern"])},
            "labelled": labelled.record if labelled else None,
            **tool.measure(teacher, sides, target, batches, labelled),
            "knn_epochs": epochs,
            "metrics": {name: sha256_file(Path(folder) / "metrics.jsonl") for name, folder in runs.items()},
            "command": command(args),
            "environment": environment(),
        }
        page = write_page(results, args.out)
    print(f"page: {page}")
    print(f"next: {next_command(args, students, results)}")
    return 0


def command(args: argparse.Namespace) -> str:
    """The command line; absolute paths by their last names."""
    from tinymim_export.report.page import hide_paths

    words = ["python", "tools/what_was_transferred.py"]
    for key, value in vars(args).items():
        if value not in (None, []):
            words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return hide_paths(shlex.join(words))


def next_command(args: argparse.Namespace, students: dict[str, str], results: dict[str, Any]) -> str:
    """A segmentor on the student whose k-NN, or else similarity to the target block, is best."""

    def score(name: str) -> float:
        found = results["students"][name]
        knn = found["knn"].get("class token") or found["knn"].get("patches")
        return max(knn or (row[results["target_block"] - 1] or 0 for row in found["cka"]))

    files = [name for name, source in students.items() if Path(source).is_file()]
    if not files:
        weights = ["--teacher-weights", args.teacher_weights] if args.teacher_weights else []
        return f"{shlex.join(['tinymim', 'distill', '--teacher', args.teacher, *weights])} --data PHOTOS"
    return segment_line(students[max(files, key=score)])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("what_was_transferred.py", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
