"""Segmentors on the same photos with the same steps: ours from several starts, their teacher, and common alternatives.

A row is an MMSegmentation config with its own losses, optimizer and rates, and what it starts from; every row sees the
same photos, crops, batch and number of steps. The first seed of every row is exported, scored as a file, tuned
(``tinymim-export --tune``) and timed with the others in one process. Each stage's result is written when it ends, and
the stage is not run again; an interrupted training is resumed.
"""

import argparse
import copy
import json
import os
import random
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinymim.benchmarks.segmentors_table import FILE_STAGES, STAGES, unpack, write
from tinymim.cli import run_command
from tinymim.errors import CheckFailed, ConfigError, did_you_mean
from tinymim.files import environment, sha256_file, write_json

MODELS = ["upernet_tinymim_t_64_camvid", "segformer_b0_camvid", "pidnet_s_camvid", "deeplabv3plus_r18_camvid"]
ROW = {"config": str, "student": str, "options": dict, "teacher_segmentor": str, "pseudo": str, "min_confidence": float}
BUDGET = ("steps", "batch_size", "size", "crop", "amp", "labels")  # what all rows of a table must share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options; the defaults are the first committed comparison."""
    parser.add_argument("--data-root", default="../shared/data/camvid", help="labelled folder, ADE20K layout")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument(
        "--rows", default=None, help="file of rows, e.g. camvid_segmentors; --models names some of them"
    )
    parser.add_argument("--models", nargs="+", default=None, help="rows of --rows (default all), or configs")
    parser.add_argument("--student", default=None, help="without --rows: weights of our backbone; others from scratch")
    parser.add_argument(
        "--students", nargs="+", default=[], metavar="WORD=FILE", help="the files behind the words of --rows"
    )
    parser.add_argument("--steps", type=int, default=2000, help="training steps of every model")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--labels", type=int, default=None, metavar="N", help="keep N labels, drawn by the seed")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        default=[512, 512],
        help="photos are stretched to this size (0 0: photos as they are); exported at it",
    )
    parser.add_argument(
        "--crop", type=int, nargs=2, metavar=("H", "W"), default=[256, 256], help="size of the training crops"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--amp", action="store_true", help="train in bfloat16")
    parser.add_argument("--workers", type=int, default=1, help="data-loading processes of each training")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each file's latency")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the timing; default every core")
    parser.add_argument(
        "--results", type=Path, default=None, metavar="FILE", help="compare.json of another machine: goes on from it"
    )
    parser.add_argument("--reference", default=None, metavar="ROW", help="the row of the differences; default the best")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[s for s in STAGES if s != "tune"])


def find_rows(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The rows to run, in order: name -> config, student and what else :data:`ROW` names, files filled in.

    Raises:
        ConfigError: an unknown row, key or word, a missing file, or a row that learns from a row after it.
    """
    if args.rows is None:
        student = {"student": args.student} if args.student else {}
        return {
            Path(name).name.removesuffix(".py"): {"config": name} | (student if is_ours(name) else {})
            for name in args.models or MODELS
        }
    from tinymim.engine.python_file import load_python

    named = Path(__file__).parent / f"{args.rows}.py"
    rows = load_python(named if named.is_file() else args.rows).to_dict().get("rows") or {}
    students = dict(word.partition("=")[::2] for word in args.students)
    chosen: dict[str, dict[str, Any]] = {}
    for name in args.models or rows:
        if name not in rows:
            raise ConfigError(f"no row {name!r} in {args.rows}", f"it has {', '.join(rows)}", did_you_mean(name, rows))
        row = dict(rows[name])
        for key, value in row.items():
            if key not in ROW or not isinstance(value, ROW[key]):
                raise ConfigError(
                    f"row {name!r}: {key}={value!r}", f"the keys are {', '.join(ROW)}", "correct the file"
                )
        if "student" in row:
            row["student"] = students.get(row["student"], "")
            if not Path(row["student"]).is_file():
                raise ConfigError(
                    f"no student for the row {name!r}",
                    f"it starts from {rows[name]['student']!r}, and --students names no such file",
                    f"add --students {rows[name]['student']}=student.pth, or name other rows with --models",
                )
        for key in ("teacher_segmentor", "pseudo"):
            for seed in args.seeds if key in row and row[key] not in chosen else ():
                if not (run_folder(args, row[key], seed) / "segmentor.pth").is_file():
                    raise ConfigError(
                        f"the row {name!r} learns from {row[key]!r}, which is not trained",
                        f"there is no {run_folder(args, row[key], seed) / 'segmentor.pth'}",
                        f"add it to --models before {name}",
                    )
        chosen[name] = row
    return chosen


def is_ours(config: str) -> bool:
    """Whether a config's backbone takes our students."""
    from tinymim.seg.config import find_config

    return bool(find_config(config).model.backbone.type == "TinyMIMBackbone")


def run_folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a row of one seed is trained."""
    return Path(args.out) / name / f"seed{seed}"


def few_labels(args: argparse.Namespace, seed: int) -> tuple[Path, Path | None]:
    """The labelled folder of a seed, and the folder of its other training photos, whose labels nobody sees.

    With ``--labels N`` both are copied below ``--out``, drawn by the seed; without it, the first is ``--data-root``.
    """
    from tinymim.data.folders import read_layout

    root = Path(args.data_root)
    if args.labels is None:
        return root, None
    made = Path(args.out) / "data" / f"labels{args.labels}_seed{seed}"
    labelled, rest = made / "labelled", made / "unlabelled"
    if (made / "done").is_file():
        return labelled, rest
    shutil.rmtree(made, ignore_errors=True)
    layout = read_layout(root)
    if not 0 < args.labels < len(layout.train):
        raise ConfigError(
            f"--labels {args.labels}",
            f"{root} has {len(layout.train)} labelled training photos",
            "keep fewer, or leave it out",
        )
    kept = {*random.Random(seed).sample(layout.train, args.labels), *layout.val}
    for photo, label in [*layout.train, *layout.val]:
        if (photo, label) in kept:
            _copy(photo, labelled / photo.relative_to(root))
            _copy(label, labelled / label.relative_to(root))
        else:
            _copy(photo, rest / photo.relative_to(root / "images" / "training"))
    if (root / "dataset.json").is_file():
        _copy(root / "dataset.json", labelled / "dataset.json")
    (made / "done").touch()
    return labelled, rest


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def configuration(row: dict[str, Any], args: argparse.Namespace, seed: int) -> Any:
    """A row's configuration with the shared data, crops, steps and seed."""
    from tinymim.seg.config import find_config, merge_options

    cfg = find_config(row["config"])
    (height, width), crop = args.size, tuple(args.crop)
    stretch = dict(type="Resize", scale=(width, height), keep_ratio=False)
    shared: dict[str, dict[str, Any]] = {"RandomCrop": dict(crop_size=crop)}
    if height:
        shared["RandomResize"] = dict(scale=(width, height), ratio_range=(0.75, 1.5), keep_ratio=False)
    for step in cfg.train_dataloader.dataset.pipeline:
        step.update(shared.get(step.type, {}))
    for holder, key in ((cfg.val_dataloader.dataset, "pipeline"), (cfg, "test_pipeline")) if height else ():
        load, *rest = (step for step in holder[key] if step.type != "Resize")
        holder[key] = [load, copy.deepcopy(stretch), *rest]
    cfg.test_dataloader = copy.deepcopy(cfg.val_dataloader)
    cfg.crop_size = (height, width) if height else crop
    cfg.model.data_preprocessor.size = crop
    cfg.model.test_cfg = dict(mode="whole")
    if "img_size" in cfg.model.backbone and cfg.model.backbone.get("patch_size", 16) == 16:
        cfg.model.backbone.img_size = crop  # a teacher's positions stay as they are stored
    merge_options(
        cfg,
        {
            "train_cfg.max_iters": args.steps,
            "train_cfg.val_interval": args.steps,
            "default_hooks.checkpoint.interval": min(250, args.steps),
            "train_dataloader.batch_size": args.batch_size,
            "train_dataloader.num_workers": args.workers,
            "val_dataloader.num_workers": args.workers,
            "randomness.seed": seed,
        }
        | row.get("options", {}),
    )
    return cfg


def onnx_of(folder: Path) -> Path:
    """The exported file, named after the row."""
    return folder / f"{folder.parent.name}.onnx"


def best_of(folder: Path) -> Path:
    """The file that ``--tune`` chose; the exported one where nothing was better."""
    tuned = onnx_of(folder).with_stem(f"{folder.parent.name}_best")
    return tuned if tuned.is_file() else onnx_of(folder)


def train(row: dict[str, Any], folder: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one row with one seed; resume an interrupted training."""
    from tinymim.seg import train_segmentor

    cfg = configuration(row, args, seed)
    labelled, rest = few_labels(args, seed)
    more: dict[str, Any] = {}
    if "teacher_segmentor" in row:
        more["teacher_segmentor"] = run_folder(args, row["teacher_segmentor"], seed) / "segmentor.pth"
    if "pseudo" in row:
        more["pseudo"] = pseudo_labels(row, rest, args, seed)
    began, before = time.monotonic(), os.times()
    result = train_segmentor(
        cfg,
        work_dir=folder,
        data_root=labelled,
        student=row.get("student"),
        amp=args.amp,
        resume=(folder / "config.py").is_file(),
        device="cpu",
        **more,
    )
    used = os.times()
    optimizer = cfg.optim_wrapper.optimizer
    return {
        "miou": result.miou,
        "class_iou": dict(zip(result.classes, result.class_iou, strict=True)),
        "constant_miou": result.constant_miou,
        **{key: getattr(args, key) for key in BUDGET},
        "seed": seed,
        "optimizer": optimizer.type,
        "lr": optimizer.lr,
        "head": cfg.model.decode_head.type,
        "row": {key: value for key, value in row.items() if key != "student"},
        "student_sha256": sha256_file(row["student"]) if "student" in row else None,
        "config_sha256": json.loads((folder / "env.json").read_text("utf-8-sig"))["inputs"]["config_sha256"],
        "sha256": sha256_file(folder / "segmentor.pth"),
        "last_call_minutes": (time.monotonic() - began) / 60,
        "last_call_cpu_minutes": sum(used[:4]) / 60 - sum(before[:4]) / 60,
        "environment": environment(),
    }


def pseudo_labels(row: dict[str, Any], photos: Path | None, args: argparse.Namespace, seed: int) -> Path:
    """Labels of the photos that have none, by another row's segmentor of the same seed; made once.

    Raises:
        ConfigError: every photo has its label.
    """
    from tinymim.seg import label_photos

    if photos is None:
        raise ConfigError("pseudo-labels with all labels", "no photo is without a label", "add --labels N")
    teacher = run_folder(args, row["pseudo"], seed)
    least = row.get("min_confidence", 0.0)
    made = teacher / f"pseudo_{least:g}"
    if not (made / "dataset.json").is_file():
        label_photos(photos, teacher / "segmentor.pth", made, min_confidence=least)
    return made


def require_same(path: Path, args: argparse.Namespace) -> None:
    """Refuse a finished training with other options.

    Raises:
        ConfigError: :data:`BUDGET` differs.
    """
    before = json.loads(path.read_text("utf-8-sig")) if path.is_file() else {}
    differ = [key for key in BUDGET if before and before.get(key) != getattr(args, key)]
    if differ:
        raise ConfigError(
            f"{path.parent} was trained with {', '.join(f'{key}={before.get(key)}' for key in differ)}",
            "all models in a table need the same training budget",
            f"use the same options, or another --out than {args.out}",
        )


def export(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Export one trained model; the file is verified or not written."""
    from tinymim_export import export

    made = export(folder / "segmentor.pth", onnx_of(folder), size=photo_size(args))
    made.print()
    return {
        "sha256": made.sha256,
        "mib": made.mib,
        "params": made.cost["params"],
        "macs": made.cost["macs"],
        "parts": made.cost["parts"],
        "parity": made.parity.summary(),
    }


def photo_size(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width of the files: ``--size``, or that of the first validation photo."""
    from tinymim.data import pixels
    from tinymim.data.folders import read_layout

    if args.size[0]:
        return (args.size[0], args.size[1])
    width, height = pixels.photo_size(read_layout(args.data_root).val[0][0])
    return (height, width)


def score(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """mIoU of the file."""
    from tinymim_export import evaluate

    result = evaluate(onnx_of(folder), args.data_root)
    result.print()
    return {key: value for key, value in result.to_dict().items() if key not in ("confusion", "kind")}


def tune(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The fastest file on ONNX Runtime's CPU provider that loses at most half a point of mIoU."""
    from tinymim.data.folders import read_layout
    from tinymim_export.tune.search import tune

    best = onnx_of(folder).with_stem(f"{folder.parent.name}_best")
    try:
        found = tune(
            onnx_of(folder),
            best,
            data=args.data_root,
            count=min(64, len(read_layout(args.data_root).train)),
            runtimes=["onnxruntime"],
            min_speedup=1.0,
            seconds=args.seconds / 2,
            threads=args.threads,
        )
    except CheckFailed as error:
        print(error)
        return {"winner": None, "sha256": sha256_file(onnx_of(folder)), "why": str(error)}
    won = found.winner
    assert won is not None
    names = ("name", "precision", "engine", "file_mib", "speed_up", "mIoU", "drop", "drop_interval", "class_IoU")
    return {"winner": {name: getattr(won, name) for name in names}, "sha256": found.onnx_sha256, "why": found.why}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time the first seed's files of every row, in turn."""
    from tinymim_export import bench

    folders = sorted(path.parent for path in args.out.glob(f"*/seed{args.seeds[0]}/export.json"))
    files = list(dict.fromkeys(file for folder in folders for file in (onnx_of(folder), best_of(folder))))
    if not files:
        raise ConfigError(
            f"no exported model in {args.out}",
            "nothing was trained and exported there yet",
            "run the stages train and export first",
        )
    result = bench(files, threads=args.threads, seconds=args.seconds)
    result.print()
    return json.loads(result.to_json())


def pictures(args: argparse.Namespace) -> Path:
    """Ten validation photos through the best file of every row that has one."""
    from tinymim.benchmarks.segmentors_pictures import save_pictures

    folders = sorted(path.parent for path in args.out.glob(f"*/seed{args.seeds[0]}/export.json"))
    save_pictures(
        {folder.parent.name: best_of(folder) for folder in folders}, args.data_root, args.out / "pictures.png"
    )
    return Path(args.out) / "pictures.png"


def run(args: argparse.Namespace) -> int:
    """Run what is missing; rewrite compare.json and compare.md after every stage."""
    rows = find_rows(args)
    if args.results is not None:
        unpack(args.results, args.out)
    known = sorted({*rows, *(path.parent.parent.name for path in args.out.glob("*/seed*/train.json"))})
    if args.reference not in (None, *known):
        raise ConfigError(
            f"--reference {args.reference}", f"the rows are {', '.join(known)}", did_you_mean(args.reference, known)
        )
    for seed in args.seeds:
        for name, row in rows.items():
            folder = run_folder(args, name, seed)
            for stage in ("train", *FILE_STAGES):
                if stage == "train":
                    require_same(folder / "train.json", args)
                once = stage in FILE_STAGES and seed != args.seeds[0]
                if stage in args.stages and not once and not (folder / f"{stage}.json").is_file():
                    print(f"--- {name}, seed {seed}: {stage}", flush=True)
                    numbers = run_stage(stage, row, folder, args, seed)
                    write_json(folder / f"{stage}.json", numbers)
                    write(args.out, args.reference)
    if "measure" in args.stages:
        write_json(args.out / "measure.json", measure(args))
    print(write(args.out, args.reference))
    if "pictures" in args.stages:
        print(f"pictures: {pictures(args)}   # photos of the data set: mind its licence")
    print(f"next: tinymim bench {shlex.quote(str(args.out))}/*/seed{args.seeds[0]}/*.onnx --split")
    return 0


def run_stage(stage: str, row: dict[str, Any], folder: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The numbers of one stage of one row."""
    if stage == "train":
        return train(row, folder, args, seed)
    return {"export": export, "score": score, "tune": tune}[stage](folder, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("compare_segmentors.py", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
