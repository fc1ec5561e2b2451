"""The cost model of several GPUs against what can be measured without one: gloo on this machine; docs/scaling.md.

Each process has one thread. First all-reduces of several sizes are timed: a latency and a rate. Then training steps, in
turns: without communication, with ddp, with fsdp. Predicted is the step without communication plus the bytes of
:func:`tinymim.engine.scaling.sent_bytes` at that rate; nothing overlaps here, as gloo computes on the same cores.
"""

import argparse
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinymim.cli import run_command
from tinymim.errors import ConfigError

PAPER = {"B <- L": ("tinymim_vit_base", "large"), "S <- B": ("tinymim_vit_small", "tinymim_vit_base")}
PAPER |= {"T <- S": ("tinymim_vit_tiny", "tinymim_vit_small")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--out", default="docs/scaling.md", metavar="FILE", help="page; a .json is written beside it")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="numbers of processes")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each kind; the median counts")


def run(args: argparse.Namespace) -> int:
    """Measure, write the page."""
    if min(args.processes) < 2 or args.repeats < 1:
        raise ConfigError("nothing to compare", "two processes and one step are the least", "use --processes 2")
    import torch

    from tinymim.benchmarks.scaling_steps import IMAGES, PIXELS, measure_processes
    from tinymim.files import environment, write_json, write_text

    page = Path(args.out)
    found: dict[str, Any] = {"environment": environment(), "images": IMAGES, "pixels": PIXELS, "runs": []}
    for count in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure_processes, args=(count, args.repeats, Path(folder)), nprocs=count)
            found["runs"].append(torch.load(Path(folder) / "found", weights_only=True))
    write_json(page.with_suffix(".json"), found)
    write_text(page, describe(found))
    print(f"{page}\n{page.with_suffix('.json')}")
    return 0


def fit(reduced: Sequence[Sequence[float]], count: int) -> tuple[float, float]:
    """Latency in seconds and rate in bytes/s of all-reduces: from the smallest and the largest one."""
    (_, latency), (size, seconds) = reduced[0], reduced[-1]
    return latency, 2 * (count - 1) / count * size / (seconds - latency)


def describe(found: dict[str, Any]) -> str:
    """The page."""
    from tinymim.benchmarks.scaling_steps import paper

    env = found["environment"]
    lines = [
        "# Several GPUs, on paper",
        "",
        "`distill --dry-run` prints such a table for its run. The model, its sources and what it assumes of",
        "overlap are in `tinymim/engine/scaling.py`; no GPU was at hand for these numbers.",
        "",
    ]
    for name, (student, teacher) in PAPER.items():
        lines += [f"{name} at 224 pixels, 300 epochs of ImageNet-1k, global batch 4,096:", "", "```"]
        lines += [paper(student, teacher), "```", ""]
    lines += [
        "## Held against what can be measured",
        "",
        f"{platform.system()}, {env['cpu']}, {env['cores']} cores, torch {env['versions']['torch']}; gloo, one thread",
        f"a process, {found['images']} images of {found['pixels']} pixels on each, float32; medians, kinds of step in",
        "turns. Predicted: the step without communication (of as many processes at once), plus six latencies and the",
        "bytes at gloo's rate. fsdp sends as many bytes; on processors it takes longer than they explain.",
        "",
    ]
    for each in found["runs"]:
        count = each["processes"]
        latency, rate = fit(each["all_reduce"], count)
        sizes = ", ".join(f"{size / 1e6:.3g} MB {1000 * took:.3g} ms" for size, took in each["all_reduce"])
        lines += [
            f"{count} processes. All-reduce: {sizes}: {1e6 * latency:.0f} us and {rate / 1e9:.2f} GB/s.",
            "",
            "| student <- teacher | MB sent | step alone, ms | predicted, ms | ddp, ms | fsdp, ms | ddp : predicted |",
            "|---|---|---|---|---|---|---|",
        ]
        for step in each["steps"]:
            predicted = step["alone"] + step["sent"] / rate + 6 * latency
            cells = [step["sent"] / 1e6, *(1000 * s for s in (step["alone"], predicted, step["ddp"], step["fsdp"]))]
            ratio = step["ddp"] / predicted
            lines += [f"| {step['name']} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {ratio:.2f} |"]
        lines += [""]
    return "\n".join([*lines, "Written by `tools/scaling.py`.", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("scaling", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
