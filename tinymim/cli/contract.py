"""``tinymim contract``: shrink a model step by step to limits of parameters, multiply-adds and milliseconds."""

import argparse
import contextlib
import io
import math
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinymim.cli import _contract_segmentor as segmentors
from tinymim.cli._cfg_options import add_cfg_options

PRECISIONS = ("fp32", "bf16", "int8")
TRAINING = (  # options that are settings of the job that scores
    "data",
    "val_data",
    "probe_data",
    "teacher",
    "teacher_weights",
    "targets",
    "store",
    "batch_size",
    "lr",
    "workers",
    "seed",
    "device",
    "cfg_options",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    from tinymim_export.runtime.engines import RUNTIMES

    parser.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="a name (tinymim_vit_small, tiny_vit_21m_224) or the file of a student: what is made smaller",
    )
    parser.add_argument(
        "--segmentor",
        metavar="CONFIG",
        help="in place of --from: a config of tinymim segment, or a segmentor.pth: its head is made smaller, too",
    )
    parser.add_argument("--data-root", metavar="FOLDER", help="with --segmentor: labelled folder in ADE20K layout")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="with --segmentor: height and width of the photo that is counted and timed; default as exported",
    )
    parser.add_argument("--amp", action="store_true", help="with --segmentor: bfloat16 in the short training")
    parser.add_argument("--weights", metavar="FILE", help="weights for a --from or --segmentor that is a name")
    parser.add_argument("--num-heads", type=int, metavar="N", help="heads per block, for a file that does not store it")
    parser.add_argument("--params", metavar="N", help="largest number of parameters, without a classifier: 5.4M")
    parser.add_argument("--macs", metavar="N", help="largest number of multiply-adds of one image: 1.3G")
    parser.add_argument("--latency", metavar="MS", help="longest time of one image, measured on this machine: 15ms")
    parser.add_argument("--runtime", choices=list(RUNTIMES), default="onnxruntime", help="of --latency")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of --latency; bf16: openvino, int8: ranges by --data",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of --latency; default every core of this process")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement of --latency")
    parser.add_argument("--img-size", type=int, metavar="S", help="side of the image that is counted and trained on")
    parser.add_argument("--recipe", metavar="NAME", help="short training that scores; default by model, store, teacher")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="training steps of each candidate")
    parser.add_argument("--data", metavar="FOLDER", help="photos to train on")
    parser.add_argument("--val-data", metavar="FOLDER", help="held-out photos: their loss, or accuracy, is the score")
    parser.add_argument("--probe-data", metavar="FOLDER", help="one sub-folder per class: k-NN accuracy is the score")
    parser.add_argument("--teacher", nargs="+", metavar="TEACHER", help="timm/NAME or a checkpoint file")
    parser.add_argument("--teacher-weights", nargs="+", metavar="FILE", help="weights for a timm teacher")
    parser.add_argument("--targets", nargs="+", metavar="WORD", help="what is compared (see tinymim distill)")
    parser.add_argument("--store", metavar="STORE", help="stored targets in place of a teacher (tinymim cache)")
    parser.add_argument("--batch-size", type=int, help="default the recipe's")
    parser.add_argument("--lr", type=float, help="default the recipe's")
    parser.add_argument("--workers", type=int, metavar="N", help="data-loading processes")
    parser.add_argument("--seed", type=int, default=0, help="fixes order, crops and random weights")
    parser.add_argument("--device", help="cpu or cuda; default a GPU if there is one")
    parser.add_argument("--shrink", type=float, default=0.2, help="share that a step takes off what is over its limit")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="candidates trained at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/contract"), help="folder; a stopped search goes on")
    parser.add_argument("--dry-run", action="store_true", help="number of candidates and minutes of scoring, no files")
    add_cfg_options(parser, "any recipe key of the short training")


def run(args: argparse.Namespace) -> int:
    """Search, or print what it would cost."""
    from tinymim.contract.limits import Limits, amount
    from tinymim.contract.search import Contraction
    from tinymim.errors import ConfigError

    limits = Limits(
        None if args.params is None else amount(args.params, "--params"),
        None if args.macs is None else amount(args.macs, "--macs"),
        None if args.latency is None else amount(args.latency, "--latency", time=True),
    )
    _check(args)
    if args.segmentor is not None:
        start, score, settings = segmentors.prepare(args)
        classes = None
    else:
        start, classes, source = _open_start(args)
        score = _scorer(args, getattr(start, "backbone", start))
        settings = {"start": source, "score": score.described()}
    timed = {"runtime": args.runtime, "precision": args.precision, "threads": args.threads, "seconds": args.seconds}
    search = Contraction(
        start,
        limits,
        out=args.out,
        score=score,
        latency=None if limits.latency_ms is None else _latency(args),
        shrink=args.shrink,
        parallel=args.parallel,
        classes=classes,
        settings={**settings, **({} if limits.latency_ms is None else timed)},
    )
    if args.dry_run:
        return _dry_run(args, search, score)
    if _photos(args) is None:
        option = "--data" if args.segmentor is None else "--data-root"
        raise ConfigError("no photos", "candidates are scored by a short training", f"add {option} FOLDER")
    try:
        result = search.run()
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on with it", file=sys.stderr)
        return 130
    from tinymim.files import environment
    from tinymim_export.report.contract_page import write_contract

    if args.segmentor is None:
        _write_recipe(args, score, result)
        lines = _next_lines(args, score, result)
    else:
        lines = segmentors.write(args, start, result)
    counted = f"Counted: {search.kind.about}."
    letters = {factor.name: factor.about for factor in search.kind.factors(search.config)}
    page = write_contract(
        result.out, score.name, limits, result.chosen, result.rows, lines, environment(), counted, letters
    )
    print(f"{result.student.stem}: {result.student}\nreport:  {page}")
    print("\n".join(f"next:    {line}" for _, line in lines))
    return 0


def _photos(args: argparse.Namespace) -> str | None:
    """The folder that candidates are trained on."""
    return args.data if args.segmentor is None else args.data_root  # type: ignore[no-any-return]


def _check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    from tinymim.errors import ConfigError

    segmentors.check(args)
    if args.start is None and args.segmentor is None:
        raise ConfigError("no model", "--from is missing", "e.g. --from tiny_vit_21m_224, or --from runs/t/student.pth")
    if args.steps < 1:
        raise ConfigError(f"--steps {args.steps}", "candidates are trained for so many steps", "e.g. --steps 100")
    if args.precision == "bf16" and args.runtime != "openvino":
        raise ConfigError(
            f"--precision bf16 on {args.runtime}", "only OpenVINO computes in bfloat16", "add --runtime openvino"
        )
    if args.precision == "int8" and _photos(args) is None:
        option = "--data" if args.segmentor is None else "--data-root"
        raise ConfigError("--precision int8 without photos", "its ranges are measured on them", f"add {option} FOLDER")
    if args.store is not None and args.teacher is not None:
        raise ConfigError("--store and --teacher", "the store is the teacher", "leave one out")


def _open_start(args: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """The model to shrink, at ``--img-size``, a classifier if its file is one; the names of its classes; and what names
    it in the search's settings.
    """
    import torch

    from tinymim import create_model, load_weights
    from tinymim.contract.factors import kind_of
    from tinymim.contract.weights import with_heads
    from tinymim.errors import ConfigError
    from tinymim.files import describe_file
    from tinymim.models import model_from_checkpoint, read_checkpoint
    from tinymim.models.backbone import backbone_names, from_config

    size = {} if args.img_size is None else {"img_size": args.img_size}
    if args.start in backbone_names():
        kind_of({"name": args.start})
        torch.manual_seed(args.seed)
        model = create_model(args.start, checkpoint=args.weights, **size)
        if args.weights is None:
            print(f"note: {args.start} has random weights (--weights FILE loads some): nothing learned is inherited")
        file = None if args.weights is None else read_checkpoint(args.weights)
        model, classes = (with_heads(model, file), file.meta.get("classes")) if file else (model, None)
        return model.eval(), classes, {"name": args.start, "weights": args.weights and describe_file(args.weights)}
    if args.weights is not None:
        raise ConfigError(f"--weights with --from {args.start}", "a file has its own weights", "leave --weights out")
    model, checkpoint = model_from_checkpoint(args.start, num_heads=args.num_heads)
    kind_of(model.config)
    if size and model.img_size != (args.img_size, args.img_size):
        model = from_config(model.config, **size)
        load_weights(model, checkpoint, say=False)
    if len(set(model.img_size)) > 1:
        raise ConfigError(
            f"{args.start} is for images of {model.img_size[0]}x{model.img_size[1]}",
            "candidates are trained on square crops",
            "add --img-size S",
        )
    return with_heads(model, checkpoint).eval(), checkpoint.meta.get("classes"), describe_file(args.start)


def _scorer(args: argparse.Namespace, start: Any) -> Any:
    """The recipe that scores, with its settings."""
    from tinymim.contract.factors import kind_of
    from tinymim.contract.score import RecipeScore

    taught = args.store or args.teacher
    recipe = args.recipe or (
        "tinymim_tiny_from_mae_base"
        if kind_of(start.config) == "vit" and not args.store
        else "tinyvit_5m_from_store"
        if taught
        else "tinyvit_5m_1k"
    )
    given = {name: getattr(args, name) for name in TRAINING if getattr(args, name) is not None}
    score = RecipeScore(recipe, {"data": "", **given, "max_steps": args.steps})
    score.check()
    return score


def _latency(args: argparse.Namespace) -> Callable[[Path], float]:
    """File of a student -> median milliseconds of its exported file."""

    def measure(student: Path) -> float:
        from tinymim.data.photo_files import list_photos
        from tinymim_export.bench.latency import bench
        from tinymim_export.graph.convert import export
        from tinymim_export.precision.quantize import quantize

        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            file = Path(folder) / "model.onnx"
            if args.segmentor is None:
                export(student, file, part="backbone")
            else:
                export(student, file, part="segmentor", size=args.size)
            if args.precision == "int8":
                file = file.with_name("int8.onnx")
                photos = str(_photos(args))
                count = min(64, -(-len(list_photos(photos)) // 2))  # the others compare the files
                quantize(file.with_name("model.onnx"), file, precision="int8", calibration=photos, count=count)
            compute_type = "bf16" if args.precision == "bf16" else None
            found = bench(
                file, runtime=args.runtime, compute_type=compute_type, threads=args.threads, seconds=args.seconds
            )
        return found.rows[0].p50_ms

    return measure


def _dry_run(args: argparse.Namespace, search: Any, score: Any) -> int:
    """Print what a search would do and take."""
    from tinymim.contract.limits import in_words

    params, macs = search.kind.count(search.config)
    least = search.kind.count(search.kind.smallest(search.config))
    over = search.limits.over(params, macs)
    found = search.neighbours(search.first(), None, 1) if over else []
    steps = math.ceil(sum(over.values()) / (-math.log(1 - args.shrink) * max(len(over), 1)))
    print(
        f"start: {in_words(params)} parameters, {in_words(macs)} multiply-adds; limits: {search.limits}; "
        f"the smallest of its kind: {in_words(least[0])}, {in_words(least[1])}"
    )
    for candidate in found:
        counts = f"{in_words(candidate.params):>10} parameters {in_words(candidate.macs):>10} multiply-adds"
        print(f"  {candidate.change:<18} {counts}")
    if search.limits.latency_ms is not None:
        print("a limit of latency is not in this plan: it may take more steps, and half a minute for each candidate")
    if _photos(args) is None:
        print(f"about {steps} step(s), {len(found)} candidates in the first; add a folder of photos for the minutes")
        return 0
    with contextlib.redirect_stdout(io.StringIO()):
        minutes = score.minutes(search.config if args.segmentor is None else search.kind.cfg)
    print(
        f"about {steps} step(s) of up to {len(found)} candidates, each trained for {args.steps} steps: at most "
        f"{minutes:.1f} minutes a candidate, {minutes * (1 + steps * len(found)) / args.parallel:.0f} minutes in all, "
        "on a machine like this"
    )
    return 0


def _write_recipe(args: argparse.Namespace, score: Any, result: Any) -> None:
    """``recipe.py``: the recipe that scored, with the found model as its student."""
    from tinymim.engine import load_recipe
    from tinymim.engine.jobs import JOBS
    from tinymim.files import write_text

    job = JOBS[score.verb].settings_type(**score.job_settings(result.chosen[-1]["config"]))
    recipe = load_recipe(score.recipe, job.overrides(), score.verb).to_dict()
    head = f'"""Trains the model that tinymim contract found: {score.recipe} with another student."""\n\n'
    write_text(result.out / "recipe.py", head + "".join(f"{key} = {value!r}\n" for key, value in recipe.items()))


def _next_lines(args: argparse.Namespace, score: Any, result: Any) -> list[tuple[str, str]]:
    """(What it does, what to type now)."""
    from tinymim.cli._next import segment_line

    out, data = shlex.quote(str(result.out)), shlex.quote(str(args.data))
    train = f"tinymim {score.verb} --recipe {out}/recipe.py --data {data}"
    if args.val_data:
        train += f" --val-data {shlex.quote(str(args.val_data))}"
    train += f" --{'student' if score.verb == 'finetune' else 'init-from'} {out}/student.pth --out {out}/trained"
    export = f"tinymim-export --onnx {out}/backbone.onnx --checkpoint {out}/student.pth --part backbone"
    segment = segment_line(result.student)
    return [("Train it", train), ("Train a segmentor on it", segment), ("Export it", export)]
