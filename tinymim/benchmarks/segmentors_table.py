"""The table of ``tools/compare_segmentors.py``: scores over seeds, paired differences, and each row's best file."""

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from tinymim.errors import DataError
from tinymim.files import environment, write_json, write_text
from tinymim.schema import read_json

FILE_STAGES = ("export", "score", "tune")  # of the first seed only
STAGES = ("train", *FILE_STAGES, "measure", "pictures")


class Comparison(TypedDict):
    """What is read of a compare.json: row -> seed -> stage -> its numbers."""

    kind: Literal["tinymim.compare"]
    models: dict[str, dict[str, dict[str, dict[str, Any]]]]


def write(out: Path, reference: str | None = None) -> str:
    """Write compare.json and compare.md from the results so far; return the table."""
    results = collect(out) | {"reference": reference}
    write_json(out / "compare.json", results)
    text = table(results)
    write_text(out / "compare.md", text)
    return text


def collect(out: Path) -> dict[str, Any]:
    """All results so far: row -> seed -> stage -> numbers, and the timings by sha256 of the file."""
    models: dict[str, Any] = {}
    for path in sorted(out.glob("*/seed*/*.json")):
        if path.stem in STAGES:
            seeds = models.setdefault(path.parent.parent.name, {})
            seeds.setdefault(path.parent.name.removeprefix("seed"), {})[path.stem] = without_folders(path)
    timing = without_folders(out / "measure.json") if (out / "measure.json").is_file() else None
    return {"kind": "tinymim.compare", "models": models, "measure": timing, "environment": environment()}


def unpack(path: Path, out: Path) -> None:
    """Lay the stages of a compare.json where :func:`collect` finds them; what is in ``out`` already stays.

    Raises:
        DataError: no such file, or not the results of a comparison.
    """
    models = read_json(path, Comparison)["models"]
    wrong = [name for name in models if not re.fullmatch(r"\w[\w.-]*", name)]
    wrong += [seed for seeds in models.values() for seed in seeds if not re.fullmatch("[0-9]{1,10}", seed)]
    if wrong:
        raise DataError(
            f"{path} names a row or seed {wrong[0][:80]!r}",
            "rows are plain names, seeds whole numbers: they become folders",
            "give a compare.json of tools/compare_segmentors.py",
        )
    for name, seeds in models.items():
        for seed, stages in seeds.items():
            for stage in STAGES:
                target = out / name / f"seed{int(seed)}" / f"{stage}.json"
                if stage in stages and not target.is_file():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_json(target, stages[stage])


def without_folders(path: Path) -> dict[str, Any]:
    """A stage's numbers, not those of each photo; file names without their folder."""
    numbers = json.loads(path.read_text("utf-8-sig"))
    numbers.pop("photos", None)
    for row in (numbers, *numbers.get("rows", [])):
        if "file" in row:
            row["file"] = Path(row["file"]).name
    return numbers


def table(results: Mapping[str, Any]) -> str:
    """The Markdown page of the results so far, best mean first."""
    from tinymim_export.tables import markdown_table

    timing = results["measure"] or {"rows": []}
    ms = {row["sha256"]: row for row in timing["rows"]}
    scores = {
        name: {int(seed): 100 * stages["train"]["miou"] for seed, stages in seeds.items() if "train" in stages}
        for name, seeds in results["models"].items()
    }
    order = sorted(scores, key=lambda name: -statistics.fmean(scores[name].values() or [0.0]))
    trained = [
        stages["train"] for seeds in results["models"].values() for stages in seeds.values() if "train" in stages
    ]
    text = ["# Segmentors on the same photos with the same steps", ""]
    if trained:
        text += [*about_training(trained[0]), ""]
    text += [markdown_table([HEAD, *(line(name, results["models"][name], scores[name]) for name in order)])]
    text += [*files(results["models"], order, ms)]
    if timing["rows"]:
        first = timing["rows"][0]
        text += [f"Timed in turns in one process: one image, {first['engine']}, {first['threads']} threads.", ""]
    text += differences(scores, sorted(order, key=lambda name: name != results.get("reference")))
    machine = timing.get("environment", results["environment"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return "\n".join([*text, f"{machine['cpu']}, {machine['cores']} cores; {versions}."]) + "\n"


HEAD = ["row", "starts from", "parameters", "multiply-adds", "mIoU %", "seeds", "optimizer, rate", "minutes"]


def line(name: str, seeds: Mapping[str, Any], scores: Mapping[int, float]) -> list[str]:
    """One row: what it is, and its scores in PyTorch."""
    trained = next((stages["train"] for stages in seeds.values() if "train" in stages), None)
    made = next((stages["export"] for stages in seeds.values() if "export" in stages), None)
    minutes = [stages["train"]["last_call_minutes"] for stages in seeds.values() if "train" in stages]
    return [
        name,
        "" if trained is None else f"file {trained['student_sha256'][:12]}" if trained["student_sha256"] else "scratch",
        f"{made['params'] / 1e6:.2f} M" if made else "",
        f"{made['macs'] / 1e9:.2f} G" if made else "",
        mean(list(scores.values())),
        " / ".join(f"{score:.2f}" for _, score in sorted(scores.items())),
        f"{trained['optimizer']} {trained['lr']:g}" if trained else "",
        f"{statistics.fmean(minutes):.1f}" if minutes else "",
    ]


def files(models: Mapping[str, Any], order: list[str], ms: Mapping[str, Any]) -> list[str]:
    """The files of each row's first seed: float32 as exported, and the best that ``--tune`` found."""
    from tinymim_export.tables import markdown_table

    lines = []
    for name in order:
        stages: dict[str, Any] = next((s for s in models[name].values() if "export" in s), {})
        if not stages:
            continue
        made, scored = stages["export"], stages.get("score", {})
        tuned = stages.get("tune", {})
        won = tuned.get("winner") or {}
        lines.append(
            [
                name,
                time_of(ms, made["sha256"]),
                f"{made['mib']:.1f}",
                f"{100 * scored['mIoU']:.2f}" if scored else "",
                won.get("name", "float32" if tuned else ""),
                time_of(ms, tuned.get("sha256")),
                f"{won['file_mib']:.1f}" if won else "",
                f"{100 * won['mIoU']:.2f}" if won else "",
                tuned.get("sha256", made["sha256"])[:12],
            ]
        )
    if not lines:
        return []
    head = ["file", "float32: ms", "MiB", "mIoU %", "best of `--tune`", "ms", "MiB", "mIoU %", "sha256"]
    return [markdown_table([head, *lines])]


def time_of(ms: Mapping[str, Any], sha256: str | None) -> str:
    """Median latency of a file; empty where it was not timed."""
    return f"{ms[sha256]['p50_ms']:.1f}" if sha256 is not None and sha256 in ms else ""


def differences(scores: Mapping[str, Mapping[int, float]], order: list[str]) -> list[str]:
    """The first row's lead over each other, paired by seed."""
    from tinymim.study.table import compare
    from tinymim_export.tables import markdown_table

    lines = []
    for name in order[1:]:
        found = compare(scores[order[0]], scores[name])
        if found["p"] is not None:
            lines.append(
                [
                    f"{order[0]} - {name}",
                    f"{found['difference']:+.2f}",
                    f"{found['standard_error']:.2f}",
                    f"{found['p']:.4f}" if found["p"] >= 1e-4 else "< 0.0001",
                ]
            )
    if not lines:
        return []
    return [markdown_table([["difference (by seed)", "points", "standard error", "p of Student's t"], *lines]), ""]


def about_training(trained: Mapping[str, Any]) -> list[str]:
    """What all rows share."""
    size = "at their own size" if not trained["size"][0] else "stretched to {}x{}".format(*trained["size"])
    labels = "" if trained.get("labels") is None else f"; {trained['labels']} of the labels, drawn by the seed"
    crops = f"{trained['batch_size']} crops of {'x'.join(map(str, trained['crop']))}" + ", bfloat16" * trained["amp"]
    return [
        f"Photos {size}; {trained['steps']} steps of {crops}{labels}; best constant prediction "
        f"{100 * trained['constant_miou']:.2f} % mIoU. mIoU is the PyTorch model's on the whole validation split.",
    ]


def mean(scores: list[float]) -> str:
    """Mean and, for several seeds, standard deviation."""
    if not scores:
        return ""
    return f"{statistics.fmean(scores):.2f}" + (f" +- {statistics.stdev(scores):.2f}" if len(scores) > 1 else "")
