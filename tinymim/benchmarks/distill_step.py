"""How fast is a distillation step? Ours beside the published one in turns: images/s, memory, waiting, utilisation.

Every configuration is a row: the published step and ours in each precision, in processes of their own that take turns
(``turns.py``), so their ratio holds on a busy machine, too. Rows are added to the result file as they are measured; a
row of the same configuration is replaced.
"""

import argparse
import os
import re
import shlex
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinymim.benchmarks.distill_tables import PAIRS, PUBLISHED, key, machine, read_results, stamp, summary, write
from tinymim.cli import run_command
from tinymim.errors import ConfigError

INT8 = "ours {}, int8 teacher"
SIZES = [128, 224, 512]
DISTINCT = 16  # photos that are drawn; more names are links to these


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options."""
    parser.add_argument("--pair", nargs="+", choices=PAIRS, default=["T<-B"], help="student<-teacher")
    parser.add_argument("--size", nargs="+", type=int, default=[224], help="side of the crops, pixels")
    parser.add_argument("--batch", type=int, help="images per step; default by size and device")
    parser.add_argument("--all", action="store_true", help=f"every pair at {', '.join(map(str, SIZES))} pixels")
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16", "fp16"], help="of our step; default what the machine has"
    )
    parser.add_argument(
        "--photos",
        nargs="+",
        metavar="WxH",
        default=[],
        help="also with JPEGs of these sizes read while it trains, e.g. 500x375 1920x1080",
    )
    parser.add_argument("--loss", action="store_true", help="also the relation losses alone: memory and time")
    parser.add_argument("--workers", type=int, default=2, help="data-loading processes of each step")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each")
    parser.add_argument("--seconds", type=float, default=1.0, help="what a turn takes at least")
    parser.add_argument("--device", help="cpu or cuda; default a GPU if there is one")
    parser.add_argument("--memory", type=float, metavar="GIB", help="most memory of a process on the CPU")
    parser.add_argument(
        "--whole-teacher", action="store_true", help="the published step also runs the teacher's later blocks"
    )
    parser.add_argument("--profile", action="store_true", help="time by kind of operation, of both steps")
    parser.add_argument("--out", help="result without its ending; default docs/bench_distill_MACHINE")
    parser.add_argument("--check", action="store_true", help="two short rounds at 32 pixels: does everything run?")


def run(args: argparse.Namespace) -> int:
    """Measure the chosen configurations, write JSON and Markdown, print the table."""
    from tinymim.compat import use_device
    from tinymim.engine.model import pick_precision

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own messages
    device = use_device(args.device)
    if args.check:
        args.pair, args.size, args.batch, args.rounds, args.seconds = ["T<-S"], [32], 2, 2, 0.0
    if args.all:
        args.pair, args.size = PAIRS, SIZES
    check(args)
    auto, scaled = pick_precision("auto", device)
    best = "fp16" if scaled else "fp32" if auto is None else "bf16"
    precisions = args.precision or list(dict.fromkeys([*(["fp32"] if device == "cpu" else []), best]))
    out = args.out or f"docs/bench_distill_{machine(device)}"
    results = read_results(Path(f"{out}.json"))
    with tempfile.TemporaryDirectory() as folder:
        rates = Rates(device, args)
        try:
            for setup, photos in setups(args, device, Path(folder)):
                for row in measured(setup, photos, precisions, rates, args):
                    results["rows"] = [*(old for old in results["rows"] if key(old) != key(row)), row]
                    write(out, results)
                    print("\n".join(summary(row)), flush=True)
        finally:
            rates.close()
    print(f"{out}.json, {out}.md")
    print(f"next: {next_command(args)}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse options that cannot be measured.

    Raises:
        ConfigError: a size that is no multiple of the patch, or no number of rounds, images or workers.
    """
    for size in args.size:
        if size < 32 or size % 16:
            raise ConfigError(
                f"--size {size}", "the models have patches of 16 pixels", "use a multiple of 16, e.g. 224"
            )
    for name, least in (("rounds", 1), ("batch", 1), ("workers", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}", f"it must be at least {least}", f"use --{name} {max(least, 2)}")
    for text in args.photos:
        if not re.fullmatch(r"\d{2,5}x\d{2,5}", text):
            raise ConfigError(f"--photos {text}", "sizes are width x height in pixels", "e.g. --photos 500x375")
        if not args.workers:
            raise ConfigError(
                "--photos with --workers 0", "nothing would be read in advance", "use --workers 1 or more"
            )


def default_batch(pair: str, size: int, device: str) -> int:
    """Images per step: 128 as published on a GPU or up to 128 pixels, else 16; fewer at more pixels and for a ViT-B."""
    batch = 128 if device == "cuda" or size <= 128 else 16
    return max(batch // (1 if size <= 256 else 8) // (1 if device == "cuda" or pair != "B<-L" else 4), 1)


def setups(args: argparse.Namespace, device: str, folder: Path) -> Iterator[tuple[Any, str | None]]:
    """Each configuration, and the size of the photos that are read while it trains (None: none are)."""
    from tinymim.benchmarks.contenders import Setup

    for pair in args.pair:
        for size in args.size:
            for photos in (None, *args.photos):
                batch = args.batch or default_batch(pair, size, device)
                drawn = draw_photos(folder, photos or "500x375", max(64, 4 * batch) if photos else batch)
                student, teacher = pair.split("<-")
                yield (
                    Setup(
                        student=student,
                        teacher=teacher,
                        size=size,
                        batch=batch,
                        precision="fp32",
                        device=device,
                        photos=str(drawn),
                        loading=photos is not None,
                        workers=args.workers,
                        whole_teacher=args.whole_teacher,
                    ),
                    photos,
                )


def draw_photos(folder: Path, size: str, count: int) -> Path:
    """A folder of ``count`` JPEGs of drawn scenes; beyond :data:`DISTINCT` they are links."""
    import numpy as np
    from PIL import Image

    from tinymim.demo.scenes import draw_scene

    drawn = folder / f"{size}_{count}"
    if drawn.is_dir():
        return drawn
    drawn.mkdir()
    width, height = map(int, size.split("x"))
    for i in range(count):
        path = drawn / f"{i:05d}.jpg"
        if i < DISTINCT:
            Image.fromarray(draw_scene(width, height, np.random.default_rng(i))[0]).save(path, quality=92)
        else:
            path.hardlink_to(drawn / f"{i % DISTINCT:05d}.jpg")
    return drawn


class Rates:
    """The machine's rate of matrix products in each precision, measured in the same rounds as the steps."""

    def __init__(self, device: str, args: argparse.Namespace) -> None:
        self.device, self.args = device, args
        self.known: dict[str, Any] = {}

    def contender(self, precision: str) -> Any:
        """A process that multiplies in this precision; started once."""
        from tinymim.benchmarks.contenders import Setup, products
        from tinymim.benchmarks.turns import Contender

        if precision not in self.known:
            setup = Setup("T", "S", 32, 1, precision, self.device, "")
            self.known[precision] = Contender(f"products {precision}", products, setup, self.args.memory)
        self.known[precision].forget()
        return self.known[precision]

    def close(self) -> None:
        for each in self.known.values():
            each.close()


def measured(
    setup: Any, photos: str | None, precisions: Sequence[str], rates: Rates, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The row of a configuration's steps and, if asked for, that of its losses alone."""
    from dataclasses import replace

    from tinymim.benchmarks import contenders as bodies
    from tinymim.benchmarks.turns import Contender, measure
    from tinymim.distill.int8_frozen import can_int8

    half = "fp16" if setup.device == "cuda" else "fp32"  # as published
    warm = 2 * setup.workers + 1 if setup.loading else 0  # what the workers have read in advance does not count
    row = {
        "pair": f"{setup.student}<-{setup.teacher}",
        "size": setup.size,
        "batch": setup.batch,
        "photos": photos,
        "workers": setup.workers if setup.loading else 0,
        "whole_teacher": setup.whole_teacher,
        "gflop_per_image": bodies.matrix_flop(setup) / 1e9,
        "rounds": args.rounds,
        "seed": setup.seed,
        **stamp(setup.device),
    }

    def turns(named: dict[str, tuple[Any, Any]], extra: Sequence[Any], warm: int) -> list[Contender]:
        started: list[Contender] = []
        try:
            for name, (body, spec) in named.items():
                started.append(Contender(name, body, spec, args.memory))
            measure([*started, *extra], rounds=args.rounds, seconds=args.seconds, warm=warm)
        finally:
            for each in started:
                each.close()
        return started

    kinds = {PUBLISHED: half, **{f"ours {precision}": precision for precision in precisions}}
    if setup.device == "cpu" and can_int8():
        kinds[INT8.format(precisions[-1])] = precisions[-1]

    def spec(name: str) -> Any:
        return replace(setup, precision=kinds[name], int8_teacher=name == INT8.format(kinds[name]))

    products = {precision: rates.contender(precision) for precision in dict.fromkeys(kinds.values())}
    steps = turns(
        {name: (bodies.published if name == PUBLISHED else bodies.ours, spec(name)) for name in kinds},
        [*products.values()],
        warm,
    )
    rate = {
        precision: 2 * bodies.SIDE[setup.device] ** 3 / statistics.median(each.seconds)
        for precision, each in products.items()
        if each.seconds
    }
    columns = [figures(each, kinds[each.name], setup.batch, steps[0], rate, row["gflop_per_image"]) for each in steps]
    yield {"what": "step", **row, "steps": columns}
    if args.profile and not setup.loading:
        yield {"what": "profile", **row, "steps": [profiled(spec(name), name, args) for name in kinds]}
    if args.loss and not setup.loading:
        named = {
            f"{form} {precision}": (bodies.loss_alone, (replace(setup, precision=precision), form))
            for form, precision in [("plain", "fp32"), *(("ours", precision) for precision in precisions)]
        }
        losses = turns(named, [], 0)
        for each in losses if setup.device == "cpu" else []:
            alone = Contender(each.name, bodies.memory_of_loss, named[each.name][1], args.memory)
            alone.turn(1, 1)
            alone.close()
            each.peak_mib = alone.peak_mib
        columns = [figures(each, each.name.split()[1], setup.batch, losses[0]) for each in losses]
        yield {"what": "loss", **row, "steps": columns}


def profiled(setup: Any, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds per step by kind of operation; a profiled step takes longer than one that is not."""
    from dataclasses import replace

    from tinymim.benchmarks import contenders as bodies
    from tinymim.benchmarks.turns import Contender

    spec = replace(setup, profiled=True)
    contender = Contender(name, bodies.published if name == PUBLISHED else bodies.ours, spec, args.memory)
    try:
        result = contender.turn(1, 2)
    finally:
        contender.close()
    kinds = None if result is None else result["kinds"]
    return {"name": name, "precision": setup.precision, "failed": contender.failed, "kinds": kinds}


def figures(
    contender: Any,
    precision: str,
    batch: int,
    first: Any,
    rate: dict[str, float] | None = None,
    gflop: float | None = None,
) -> dict[str, Any]:
    """The figures of one contender.

    Args:
        contender: After its turns.
        precision: Of its products.
        batch: Images per step.
        first: The contender it is compared with.
        rate: Precision -> FLOP/s of matrix products.
        gflop: Of the matrix products per image, GFLOP.
    """
    from tinymim_export.bench.stats import bootstrap_median, pairwise_ratio

    value: dict[str, Any] = {"name": contender.name, "precision": precision, "failed": contender.failed}
    if contender.failed is not None or not contender.seconds:
        return {**value, "failed": contender.failed or "no turn"}
    low, high = bootstrap_median(contender.seconds)
    images = batch / statistics.median(contender.seconds)
    value |= {
        "images_per_s": images,
        "interval": [batch / high, batch / low],
        "peak_mib": contender.peak_mib,
        "waiting": statistics.median(contender.waited),
        "seconds": contender.seconds,
    }
    if first.seconds and first is not contender:
        value["times_as_fast"] = list(pairwise_ratio(first.seconds, contender.seconds))
    if gflop is not None and rate and precision in rate:
        value |= {"rate_gflops": rate[precision] / 1e9, "utilisation": gflop * 1e9 * images / rate[precision]}
    return value


def next_command(args: argparse.Namespace) -> str:
    """A command to go on with."""
    if args.check:
        return "python tools/bench_distill.py --pair 'T<-B' --size 224 --loss"
    chosen = f"--pair {shlex.join(args.pair)} --size {' '.join(map(str, args.size))}"
    return (
        f"python tools/bench_distill.py {chosen} --photos 500x375 1920x1080"
        if not args.photos
        else (f"python tools/bench_distill.py {chosen} --profile")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("bench_distill", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
