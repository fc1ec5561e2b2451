"""The result files of ``tools/bench_distill.py``: rows with their machine, read, replaced, and shown as tables."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tinymim.cores import cores
from tinymim.errors import ConfigError
from tinymim.files import environment, write_json, write_text

PAIRS = ["T<-S", "T<-B", "T<-L", "S<-B", "B<-L"]
KIND = "tinymim.bench_distill"
PUBLISHED = "published"


def stamp(device: str) -> dict[str, Any]:
    """Machine, versions, threads, commit."""
    import torch

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else environment()["cpu"],
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "commit": commit,
        "environment": environment(),
    }


def machine(device: str) -> str:
    """A name of this machine for a file, e.g. "amd_epyc" or "nvidia_h100_80gb_hbm3"."""
    return re.sub(r"[^a-z0-9]+", "_", stamp(device)["device"].lower()).strip("_")


def read_results(path: Path) -> dict[str, Any]:
    """Earlier rows, or none.

    Raises:
        ConfigError: the file is something else.
    """
    if not path.is_file():
        return {"kind": KIND, "rows": []}
    try:
        results = json.loads(path.read_text("utf-8-sig"))
    except ValueError:
        results = None
    if not isinstance(results, dict) or results.get("kind") != KIND:
        raise ConfigError(f"{path} is no result of this benchmark", f"its kind is not {KIND}", "choose another --out")
    return results


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is about; a later row of the same replaces it."""
    return tuple(row[name] for name in ("what", "pair", "size", "batch", "photos", "whole_teacher", "device"))


def write(out: str, results: dict[str, Any]) -> None:
    """JSON and Markdown, rows in the order of the pairs."""
    results["rows"].sort(
        key=lambda row: (
            ["step", "loss", "profile"].index(row["what"]),
            PAIRS.index(row["pair"]),
            *map(str, key(row)[2:]),
        )
    )
    write_json(f"{out}.json", results)
    write_text(f"{out}.md", table(results))


def lines_of(row: dict[str, Any]) -> list[list[str]]:
    """One line of the table per contender."""
    lines = []
    for step in row["steps"]:
        name = step["name"] + ", whole teacher" * (row["whole_teacher"] and step["name"] == PUBLISHED)
        head = [row["pair"], str(row["size"]), str(row["batch"]), row["photos"] or "-", name, step["precision"]]
        if step["failed"]:
            lines.append([*head, step["failed"], *["-"] * 4])
            continue
        speed = f"{step['images_per_s']:.2f} ({step['interval'][0]:.2f} to {step['interval'][1]:.2f})"
        times = step.get("times_as_fast")
        ratio = "1" if times is None else f"{times[0]:.2f} ({times[1]:.2f} to {times[2]:.2f})"
        used = f"{100 * step['utilisation']:.0f} %" if "utilisation" in step else "-"
        waiting = f"{100 * step['waiting']:.0f} %" if row["photos"] else "-"
        lines.append([*head, speed, ratio, f"{step['peak_mib']:.0f}", waiting, used])
    return lines


HEAD = [
    "pair",
    "pixels",
    "batch",
    "photos",
    "step",
    "precision",
    "images/s (95 %)",
    "times as fast (95 %)",
    "peak MiB",
    "waiting",
    "of the matrix rate",
]


def summary(row: dict[str, Any]) -> list[str]:
    """A row for the terminal."""
    from tinymim_export.tables import text_table

    return [text_table(profile_lines(row) if row["what"] == "profile" else [HEAD, *lines_of(row)])]


def profile_lines(row: dict[str, Any]) -> list[list[str]]:
    """Heading and a line per kind of operation: ms per step and share, of each step."""
    steps = [step for step in row["steps"] if step["kinds"]]
    lines = [[f"{row['pair']}, {row['size']} pixels, batch {row['batch']}", *(step["name"] for step in steps)]]
    for kind in steps[0]["kinds"] if steps else ():
        cells = [
            f"{step['kinds'][kind]:.1f} ms, {100 * step['kinds'][kind] / sum(step['kinds'].values()):.0f} %"
            for step in steps
        ]
        lines.append([kind, *cells])
    return lines


def table(results: dict[str, Any]) -> str:
    """The Markdown page of all rows."""
    from tinymim_export.tables import markdown_table

    text = "# A distillation step, ours and the published one\n"
    for what, title, about in (
        ("step", "The step", STEP),
        ("loss", "The relation losses alone, with their gradient", LOSS),
    ):
        rows = [row for row in results["rows"] if row["what"] == what]
        if rows:
            text += f"\n## {title}\n\n{about}\n\n"
            text += markdown_table([HEAD, *(line for row in rows for line in lines_of(row))])
    for row in results["rows"]:
        if row["what"] == "profile":
            text += f"\n## A step by kind of operation\n\n{markdown_table(profile_lines(row))}"
    machines: dict[str, list[str]] = {}
    for row in results["rows"]:
        versions = row["environment"]["versions"]
        where = (
            f"{row['device']}, {row['threads']} threads, torch {versions['torch']}, commit {row['commit']}, "
            f"{row['rounds']} rounds"
        )
        machines.setdefault(where, []).append(f"{row['pair']} {row['size']}")
    rates = {
        step["precision"]: step["rate_gflops"]
        for row in results["rows"]
        for step in row["steps"]
        if "rate_gflops" in step
    }
    text += "\n" + "".join(f"- {where}: {', '.join(dict.fromkeys(rows))}\n" for where, rows in machines.items())
    text += "".join(f"- matrix rate, {name}: {rate:,.0f} GFLOP/s\n" for name, rate in rates.items())
    return text + "\n```bash\npython tools/bench_distill.py --all\n```\n"


STEP = """\
Forward, backward and update, in turns with the published step as `tinymim/benchmarks/published_step.py` re-creates it
(its costs are named there; float32 on a CPU, float16 on a GPU, as published). "Times as fast": against the published
step, round by round. "Photos": JPEGs of that size read while it trains; else one batch is held in memory. "Of the
matrix rate": the matrix products that the images need, over what products of large matrices reach here in the same
precision and rounds. Peak memory: of the process on a CPU, of PyTorch's tensors on a GPU."""
LOSS = """\
"Plain" stores logits and their logarithms; memory is what is in use on top of q, k, v. "Images/s" and "times as
fast" are of the losses alone."""
