"""Our segmentor and common alternatives: same data, same steps, one table of size, speed and mIoU.

Every model is trained with its own configuration (losses, optimizer, learning rate) on the same photos, crops, batch
and number of steps, exported at the same size, scored as an .onnx file and timed with the others in one process. Each
stage's result is written when it ends, and the stage is not run again; an interrupted training is resumed.
"""

import argparse
import copy
import json
import os
import shlex
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinymim.cli import run_command
from tinymim.errors import ConfigError
from tinymim.files import environment, sha256_file, write_json, write_text

MODELS = ["upernet_tinymim_t_64_camvid", "segformer_b0_camvid", "pidnet_s_camvid", "deeplabv3plus_r18_camvid"]
STAGES = ["train", "export", "score", "measure"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options; the defaults are the committed comparison."""
    parser.add_argument("--data-root", default="../shared/data/camvid", help="labelled folder, ADE20K layout")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--models", nargs="+", default=MODELS, help="configs by name or path")
    parser.add_argument("--student", default=None, help="weights of our backbone; the others start from scratch")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of every model")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        default=[512, 512],
        help="photos are stretched to this size; exported at it",
    )
    parser.add_argument(
        "--crop", type=int, nargs=2, metavar=("H", "W"), default=[256, 256], help="size of the training crops"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--amp", action="store_true", help="train in bfloat16")
    parser.add_argument("--workers", type=int, default=1, help="data-loading processes of each training")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each file's latency")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the timing; default every core")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)


def configuration(name: str, args: argparse.Namespace, seed: int) -> Any:
    """A model's configuration with the shared data, crops, steps and seed."""
    from tinymim.seg.config import find_config, merge_options

    cfg = find_config(name)
    (height, width), crop = args.size, tuple(args.crop)
    stretch = dict(type="Resize", scale=(width, height), keep_ratio=False)
    shared = {
        "RandomResize": dict(scale=(width, height), ratio_range=(0.75, 1.5), keep_ratio=False),
        "RandomCrop": dict(crop_size=crop),
    }
    for step in cfg.train_dataloader.dataset.pipeline:
        step.update(shared.get(step.type, {}))
    for holder, key in ((cfg.val_dataloader.dataset, "pipeline"), (cfg, "test_pipeline")):
        load, *rest = (step for step in holder[key] if step.type != "Resize")
        holder[key] = [load, copy.deepcopy(stretch), *rest]
    cfg.test_dataloader = copy.deepcopy(cfg.val_dataloader)
    cfg.crop_size = (height, width)
    cfg.model.data_preprocessor.size = crop
    cfg.model.test_cfg = dict(mode="whole")
    if "img_size" in cfg.model.backbone:
        cfg.model.backbone.img_size = crop
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
        },
    )
    return cfg


def onnx_of(folder: Path) -> Path:
    """The exported file, named after the model."""
    return folder / f"{folder.parent.name}.onnx"


def train(name: str, folder: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one model with one seed; resume an interrupted training."""
    from tinymim.seg import train_segmentor

    cfg = configuration(name, args, seed)
    student = args.student if cfg.model.backbone.type == "TinyMIMBackbone" else None
    began, before = time.monotonic(), os.times()
    result = train_segmentor(
        cfg,
        work_dir=folder,
        data_root=args.data_root,
        student=student,
        amp=args.amp,
        resume=(folder / "config.py").is_file(),
        device="cpu",
    )
    used = os.times()
    optimizer = cfg.optim_wrapper.optimizer
    return {
        "miou": result.miou,
        "class_iou": dict(zip(result.classes, result.class_iou, strict=True)),
        "constant_miou": result.constant_miou,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "seed": seed,
        "optimizer": optimizer.type,
        "lr": optimizer.lr,
        "amp": args.amp,
        "crop": list(args.crop),
        "size": list(args.size),
        "head": cfg.model.decode_head.type,
        "student_sha256": None if student is None else sha256_file(student),
        "config_sha256": json.loads((folder / "env.json").read_text("utf-8-sig"))["inputs"]["config_sha256"],
        "sha256": sha256_file(folder / "segmentor.pth"),
        "last_call_minutes": (time.monotonic() - began) / 60,
        "last_call_cpu_minutes": sum(used[:4]) / 60 - sum(before[:4]) / 60,
        "environment": environment(),
    }


def require_same(path: Path, args: argparse.Namespace) -> None:
    """Refuse a finished training with other options.

    Raises:
        ConfigError: steps, batch size, size, crop or precision differ.
    """
    before = json.loads(path.read_text("utf-8-sig")) if path.is_file() else {}
    wanted = {key: getattr(args, key) for key in ("steps", "batch_size", "size", "crop", "amp")}
    differ = [key for key in wanted if before and before[key] != wanted[key]]
    if differ:
        raise ConfigError(
            f"{path.parent} was trained with {', '.join(f'{key}={before[key]}' for key in differ)}",
            "all models in a table need the same training budget",
            f"use the same options, or another --out than {args.out}",
        )


def export(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Export one trained model; the file is verified or not written."""
    from tinymim_export import export

    made = export(folder / "segmentor.pth", onnx_of(folder), size=(args.size[0], args.size[1]))
    made.print()
    return {
        "sha256": made.sha256,
        "mib": made.mib,
        "params": made.cost["params"],
        "macs": made.cost["macs"],
        "parts": made.cost["parts"],
        "parity": made.parity.summary(),
    }


def score(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """mIoU of the file."""
    from tinymim_export import evaluate

    result = evaluate(onnx_of(folder), args.data_root)
    result.print()
    return {key: value for key, value in result.to_dict().items() if key not in ("confusion", "kind")}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time the first seed's file of every model, in turn."""
    from tinymim_export import bench

    files = sorted(args.out.glob(f"*/seed{args.seeds[0]}/*.onnx"))
    if not files:
        raise ConfigError(
            f"no exported model in {args.out}",
            "nothing was trained and exported there yet",
            "run the stages train and export first",
        )
    result = bench(files, threads=args.threads, seconds=args.seconds)
    result.print()
    return json.loads(result.to_json())


def collect(out: Path) -> dict[str, Any]:
    """All results so far: model -> seed -> stage -> numbers, and the timings by sha256 of the file."""
    models: dict[str, Any] = {}
    for path in sorted(out.glob("*/seed*/*.json")):
        if path.stem in STAGES:
            seeds = models.setdefault(path.parent.parent.name, {})
            seeds.setdefault(path.parent.name.removeprefix("seed"), {})[path.stem] = without_folders(path)
    timing = without_folders(out / "measure.json") if (out / "measure.json").is_file() else None
    return {"kind": "tinymim.compare", "models": models, "measure": timing, "environment": environment()}


def without_folders(path: Path) -> dict[str, Any]:
    """A stage's numbers; file names without their folder."""
    numbers = json.loads(path.read_text("utf-8-sig"))
    for row in (numbers, *numbers.get("rows", [])):
        if "file" in row:
            row["file"] = Path(row["file"]).name
    return numbers


def table(results: dict[str, Any]) -> str:
    """The Markdown table of the results so far, fastest first."""
    from tinymim_export.tables import markdown_table

    timing = results["measure"] or {"rows": []}
    ms = {row["sha256"]: row for row in timing["rows"]}
    rows = []
    for name, seeds in results["models"].items():
        first = next(iter(seeds.values()))
        trained, made = first.get("train", {}), first.get("export", {})
        time_row = ms.get(made.get("sha256"), {})
        start = "distilled student" if trained.get("student_sha256") else "scratch"
        rows.append(
            (
                time_row.get("p50_ms", float("inf")),
                [
                    name,
                    start,
                    f"{made['params'] / 1e6:.2f} M" if made else "",
                    f"{made['macs'] / 1e9:.2f} G" if made else "",
                    f"{made['mib']:.1f}" if made else "",
                    f"{time_row['p50_ms']:.1f}" if time_row else "",
                    f"{time_row['p90_ms']:.1f}" if time_row else "",
                    percent([stages["score"]["mIoU"] for stages in seeds.values() if "score" in stages]),
                    percent([stages["train"]["miou"] for stages in seeds.values() if "train" in stages]),
                    str(trained.get("steps", "")),
                    f"{trained['optimizer']} {trained['lr']:g}" if trained else "",
                    made.get("sha256", "")[:12],
                ],
            )
        )
    head = [
        "model",
        "backbone from",
        "parameters",
        "multiply-adds",
        "file MiB",
        "p50 ms",
        "p90 ms",
        "mIoU % of the file",
        "mIoU % in PyTorch",
        "steps",
        "optimizer, rate",
        "sha256",
    ]
    lines = markdown_table([head, *(row for _, row in sorted(rows))])
    trained = next(
        (stages["train"] for seeds in results["models"].values() for stages in seeds.values() if "train" in stages),
        None,
    )
    about = timing.get("environment", results["environment"])
    text = ["# Segmentors on the same data with the same steps", "", lines]
    if trained:
        sizes = ["x".join(map(str, trained[key])) for key in ("size", "crop")]
        text.append(
            f"Photos stretched to {sizes[0]}, {trained['batch_size']} crops of {sizes[1]} a step; best "
            f"constant prediction {100 * trained['constant_miou']:.2f} % mIoU."
        )
    if timing["rows"]:
        threads = timing["rows"][0]["threads"]
        text.append(f"Timed in turns in one process: one image, {timing['rows'][0]['engine']}, {threads} threads.")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join([*text, f"{about['cpu']}, {about['cores']} cores; {versions}."]) + "\n"


def percent(scores: list[float]) -> str:
    """Mean in percent and, for several seeds, standard deviation."""
    if not scores:
        return ""
    spread = f" +- {100 * statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{100 * statistics.mean(scores):.2f}{spread}"


def run(args: argparse.Namespace) -> int:
    """Run what is missing; rewrite compare.json and compare.md after every stage."""
    for seed in args.seeds:
        for name in args.models:
            folder = args.out / Path(name).name.removesuffix(".py") / f"seed{seed}"
            for stage in STAGES[:-1]:
                if stage == "train":
                    require_same(folder / "train.json", args)
                if stage in args.stages and not (folder / f"{stage}.json").is_file():
                    print(f"--- {folder.parent.name}, seed {seed}: {stage}", flush=True)
                    numbers = run_stage(stage, name, folder, args, seed)
                    write_json(folder / f"{stage}.json", numbers)
                    write(args.out)
    if "measure" in args.stages:
        write_json(args.out / "measure.json", measure(args))
    print(write(args.out))
    print(f"next: tinymim bench {shlex.quote(str(args.out))}/*/seed{args.seeds[0]}/*.onnx --split")
    return 0


def run_stage(stage: str, name: str, folder: Path, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The numbers of one stage of one model."""
    if stage == "train":
        return train(name, folder, args, seed)
    return export(folder, args) if stage == "export" else score(folder, args)


def write(out: Path) -> str:
    """Write compare.json and compare.md from the results so far; return the table."""
    results = collect(out)
    write_json(out / "compare.json", results)
    text = table(results)
    write_text(out / "compare.md", text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("compare_segmentors.py", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
