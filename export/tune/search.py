"""``tinymim-export --tune``: precisions x graph variants x runtimes, each timed and scored itself; one winner, or none.

1. The FP32 original on every runtime that is here, plain and with each graph variant that changes rounding only.
2. Every precision that makes sense on a runtime, with the variants that paid there.
3. INT8 that loses too much mIoU once more, with blocks left in float until the budget holds.
4. The promoted candidates that may be the fastest, timed in turns; the winner is copied to ``onnx`` with its card.

Every candidate is timed in turns with the original in this one process and scored by the same session that was timed.
Finished candidates are kept in ``<stem>.tune/tune.json``: an interrupted run continues, and a changed budget is judged
again without measuring. Needs onnx, and PyTorch where a checkpoint has to be exported.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tinymim.data.folders import read_layout
from tinymim.errors import CheckFailed, ConfigError, DataError, TinyMIMError
from tinymim.files import cores, describe_files, sha256_file
from tinymim.folders import hold
from tinymim.progress import say
from tinymim_export.precision.base import PRECISIONS, by_block
from tinymim_export.precision.calibrate import choose_photos
from tinymim_export.precision.variants import APPROXIMATE, VARIANTS
from tinymim_export.runtime.engines import Engine
from tinymim_export.runtime.metadata import (
    check_verified,
    load_proto,
    precision_name,
    proto_metadata,
    save_proto,
    verified_note,
)
from tinymim_export.runtime.miou import evaluate
from tinymim_export.tune.measure import Run, Wanted
from tinymim_export.tune.result import TuneResult
from tinymim_export.tune.targets import Target, targets
from tinymim_export.tune.verdict import Budget, loses_too_much, variants_that_pay

EXACT_VARIANTS = tuple(name for name in VARIANTS if name not in APPROXIMATE)


Function = TypeVar("Function", bound=Callable[..., TuneResult])


def _alone(search: Function) -> Function:
    """Only one process at a time may fill ``<stem>.tune``."""

    @functools.wraps(search)
    def held(checkpoint: str | Path, onnx: str | Path, **options: Any) -> TuneResult:
        with hold(Path(onnx).with_name(f"{Path(onnx).stem}.tune"), "--onnx"):
            return search(checkpoint, onnx, **options)

    return held  # type: ignore[return-value]


@_alone
def tune(
    checkpoint: str | Path,
    onnx: str | Path,
    *,
    data: str | Path,
    config: str | Path | None = None,
    size: tuple[int, int] | None = None,
    output: str = "logits",
    calibration: str | Path | None = None,
    count: int = 64,
    max_miou_drop: float = 0.5,
    min_speedup: float = 1.2,
    latency_budget: float | None = None,
    runtimes: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    variants: Sequence[str] = EXACT_VARIANTS,
    limit: int | None = None,
    mode: str | None = None,
    resize_to_file: bool = False,
    ignore_label: int | Sequence[int] | None = None,
    reduce_zero_label: bool | None = None,
    seconds: float = 5.0,
    threads: int | None = None,
    seed: int = 0,
) -> TuneResult:
    """Find the fastest file that keeps the budget.

    Args:
        checkpoint: A segmentor's checkpoint, or an FP32 .onnx of one.
        onnx: The winner is written here; all candidates are in ``<stem>.tune/`` next to it.
        data: Labelled photos (ADE20K layout); the validation split is scored.
        config: MMSegmentation configuration; None takes the checkpoint's.
        size: Height and width of the export.
        output: "logits" or "mask" of the export.
        calibration: Photos for INT8; None takes the training photos of ``data``.
        count: How many of them.
        max_miou_drop: Points of mIoU that may be lost against the FP32 original.
        min_speedup: Times as fast as the FP32 original on the first runtime.
        latency_budget: Largest median, ms.
        runtimes: Of :func:`tinymim_export.tune.targets.targets`; None takes those that are here and lists the others.
        precisions: Of :data:`tinymim_export.precision.PRECISIONS`; None tries all that make sense.
        variants: Graph variants to try; "early-argmax" (other pixels along borders) only where named.
        limit: Score this many photos.
        mode: "whole" or "slide"; None takes the file's contract.
        resize_to_file: Stretch photos to the fixed size of the file.
        ignore_label: Id or ids to ignore, for folders without ``dataset.json``.
        reduce_zero_label: Whether id 0 is "no class", for folders without ``dataset.json``.
        seconds: Time to measure each candidate.
        threads: CPU threads; None takes every core this process may use.
        seed: Of calibration photos, inputs and bootstrap draws.

    Raises:
        CheckFailed: nothing keeps the budget; nothing is written to ``onnx``, the folder with all results stays.
        CheckpointError, ConfigError, DataError: files or options that do not fit.
    """
    began = time.monotonic()
    budget = Budget(max_miou_drop, min_speedup, latency_budget)
    onnx, checkpoint = Path(onnx), Path(checkpoint)
    _check(budget, onnx, checkpoint, runtimes, precisions, variants, seconds)
    folder = onnx.with_name(f"{onnx.stem}.tune")
    photos = calibration or data
    scoring: dict[str, Any] = {
        "mode": mode,
        "resize_to_file": resize_to_file,
        "ignore_label": ignore_label,
        "reduce_zero_label": reduce_zero_label,
    }
    pairs = read_layout(data, ignore_label=ignore_label, reduce_zero_label=reduce_zero_label).need("val")
    settings: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": sha256_file(checkpoint),
        "config": config and str(config),
        "size": size and list(size),
        "output": output,
        "data": str(Path(data).resolve()),
        "calibration": str(Path(photos).resolve()),
        "count": count,
        "limit": limit,
        **scoring,
        "seconds": seconds,
        "threads": threads or cores(),
        "seed": seed,
        "baseline": (runtimes or tuple(targets()))[0],
    }

    def score(engine: Engine) -> Any:
        return evaluate(None, data, engine=engine, limit=limit, quiet=not sys.stdout.isatty(), **scoring)

    settings["data_sha256"] = describe_files(data, (path for pair in pairs for path in pair))["list_sha256"]
    if any(PRECISIONS[name].needs_calibration for name in precisions or PRECISIONS):  # useless photos: refused early
        settings["calibration_sha256"] = choose_photos(photos, count, seed).about("percentile")["list_sha256"]
    run = Run(folder, settings, budget, score)
    original = folder / "fp32.onnx"
    if not (run.resumed and original.is_file()):
        _write_original(checkpoint, original, config, size, output)
    try:
        places = _targets_here(run, original, runtimes)
    except TinyMIMError:
        if not run.resumed:
            for written in (folder / "tune.json", original):
                written.unlink(missing_ok=True)
        raise
    say(f"tuning within the budget: {budget}")
    opened: dict[tuple[str, ...], Any] = {}

    def made(precision: str, graph: Sequence[str], within: bool = False) -> Path | None:
        """The file of a candidate; activations are calibrated once for each set of graph variants."""
        if precision == "fp32" and not graph:
            return original
        from tinymim_export.precision.float_file import FloatFile
        from tinymim_export.precision.quantize import quantize

        def build(out: Path) -> object:
            ranges: dict[str, Any] = {"calibration": photos, "count": count, "seed": seed}
            if within:
                from tinymim_export.precision.sensitivity import quantize_within

                ranges |= {"max_miou_drop": max_miou_drop / 100, "limit": limit, "scoring": scoring}
                return quantize_within(original, out, precision=precision, data=data, graph=graph, **ranges)
            if tuple(graph) not in opened:
                opened[tuple(graph)] = FloatFile(original, graph)
            source = opened[tuple(graph)]
            if not PRECISIONS[precision].needs_calibration:  # with calibration: compared on photos it left over
                ranges = {"photos": Path(data) / "images" / "validation"}
            return quantize(original, out, precision=precision, source=source, **ranges)

        return run.make(_name(_within(precision) if within else precision, graph), build)

    single = [([name], path) for name in variants for path in [made("fp32", [name])] if path is not None]
    for target in places:
        plain = Wanted(target, "fp32", [], "fp32", original)
        others = [Wanted(target, _name("fp32", graph), graph, "fp32", path) for graph, path in single]
        run.measure([plain, *others], together=True)

    second, graphs = [], {}
    for target in places:
        graph = [name for name in variants if name in variants_that_pay(run.candidates, target.engine)]
        graphs[target.engine] = graph
        for precision in ("fp32", *target.precisions):
            if precision == "fp32" and len(graph) < 2:
                continue  # measured above
            if precisions is None or precision in ("fp32", *precisions):
                suits = _suiting(precision, graph)
                path = made(precision, suits)
                if path is not None:
                    second.append(Wanted(target, _name(precision, suits), suits, precision, path))
    run.measure(second)

    third = []
    for target in places:
        for precision in target.precisions:
            graph = _suiting(precision, graphs[target.engine])
            static = PRECISIONS[precision].needs_calibration and by_block(precision)
            if not static or (precisions is not None and precision not in precisions):
                continue
            tried = next((c for c in run.candidates if (c.engine, c.precision) == (target.engine, precision)), None)
            if tried is None or loses_too_much(tried, budget):
                path = made(precision, graph, within=True)
                if path is not None:
                    third.append(Wanted(target, _name(_within(precision), graph), graph, precision, path))
    run.measure(third)
    return run.finish(onnx, time.monotonic() - began)


def _suiting(precision: str, graph: Sequence[str]) -> list[str]:
    """The graph variants that leave a precision what it converts."""
    return [name for name in graph if name not in PRECISIONS[precision].without]


def _within(precision: str) -> str:
    """The name of a candidate with some blocks left in float."""
    return f"{precision} within the budget"


def _name(precision: str, graph: Sequence[str]) -> str:
    return " + ".join([precision, *graph])


def _write_original(checkpoint: Path, out: Path, config: Any, size: tuple[int, int] | None, output: str) -> None:
    """The verified FP32 file: exported, or the given one.

    Raises:
        ConfigError: a file that is not plain FP32, or no segmentor.
    """
    if checkpoint.suffix != ".onnx":
        from tinymim_export.graph.convert import export

        made = export(checkpoint, out, config=config, size=size, output=output, part="segmentor")
        made.print()
        return
    proto = load_proto(checkpoint)
    meta = proto_metadata(proto)
    if doubt := verified_note(checkpoint, meta, check_verified(checkpoint, meta)):
        say(f"note: {doubt}")
    precision = precision_name(meta)
    if precision != "fp32" or meta.get("graph"):
        raise ConfigError(
            f"{checkpoint.name} is not a plain FP32 file",
            f"its metadata say {' + '.join([precision, *(meta.get('graph') or [])])}",
            "give the checkpoint, or the file tinymim-export wrote without --precision",
        )
    if config is not None or size is not None:
        raise ConfigError(
            "--config and --size belong to an export", f"{checkpoint.name} is exported already", "leave them out"
        )
    save_proto(proto, out)


def _targets_here(run: Run, original: Path, runtimes: Sequence[str] | None) -> list[Target]:
    """Targets that can open the original; the others are recorded, or refused if they were requested by name.

    Raises:
        CheckFailed, ConfigError: a requested runtime is not available.
    """
    here, known = [], targets()
    for name in known if runtimes is None else dict.fromkeys(runtimes):
        found = []
        for target in known[name]:
            try:
                target.open(original, run.threads)
                found.append(target)
            except (ConfigError, CheckFailed) as error:
                if runtimes is not None and target is known[name][0]:
                    raise
                run.leave_out(target.engine, f"not here: {error.what}")
        here += found
    return here


def _check(
    budget: Budget,
    onnx: Path,
    checkpoint: Path,
    runtimes: Sequence[str] | None,
    precisions: Sequence[str] | None,
    variants: Sequence[str],
    seconds: float,
) -> None:
    """Refuse options that cannot work before any work is done."""
    if onnx.suffix != ".onnx":
        what = f"{onnx} is not a name for the winner"
        raise ConfigError(what, "it is an .onnx file", f"e.g. --onnx {onnx}.onnx")
    if not checkpoint.is_file():
        raise DataError(f"no file at {checkpoint}", "it does not exist", "check the path")
    if checkpoint.resolve() == onnx.resolve():
        raise ConfigError(
            "--checkpoint and --onnx are one file", "the winner would replace it", "choose another --onnx"
        )
    for option, given, known in (
        ("runtimes", runtimes, tuple(targets())),
        ("precisions", precisions, PRECISIONS),
        ("variants", variants, VARIANTS),
    ):
        for name in given or ():
            if name not in known:
                raise ConfigError(f"--{option} {name} is unknown", f"known: {', '.join(known)}", "choose from them")
    for option, value in (
        ("max-miou-drop", budget.max_miou_drop),
        ("min-speedup", budget.min_speedup),
        ("latency-budget", budget.latency_budget),
        ("seconds", seconds),
    ):
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"--{option} {value} is not possible", "it is a number from 0", "give a finite one")
