"""Distilled or from scratch on real photos: teacher, student and segmentor for several seeds, one table.

One small MAE teacher is pre-trained on the photos. For each seed a tiny student is distilled from it (TinyMIM) and a
light UperNet trained on that; then the same segmentor is trained from scratch with the same steps and rates. Every
stage's result is written when it ends, and the stage is not run again; an interrupted stage is resumed. The table is
written from the results alone.
"""

import argparse
import json
import platform
import resource
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinymim.cli import run_command
from tinymim.files import environment, sha256_file, write_json

WIDTH, DEPTH, HEADS = 128, 8, 4  # the student
TEACHER = dict(embed_dim=256, depth=8, num_heads=4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options; the defaults are the committed study."""
    parser.add_argument("--photos", default="../shared/data/imagenette224/train", help="unlabelled photos")
    parser.add_argument("--labels", default="../shared/data/camvid", help="labelled photos, ADE20K layout")
    parser.add_argument("--out", type=Path, default=Path("runs/study_camvid"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher-epochs", type=float, default=10)
    parser.add_argument("--distill-epochs", type=float, default=5)
    parser.add_argument("--seg-steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--stages", nargs="+", default=["teacher", "student", "distilled", "scratch"], help="in order")


def cpu_minutes() -> float:
    """CPU time of this process and its finished children, minutes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used) / 60


def run_stage(stage: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One stage of one seed; returns its numbers."""
    folder = args.out / "teacher" if stage == "teacher" else args.out / f"seed{seed}" / stage
    teacher, student = args.out / "teacher/student.pth", args.out / f"seed{seed}/student/student.pth"
    resume = (folder / "config.py").is_file()
    common: dict[str, Any] = dict(
        data=args.photos,
        out=folder,
        resume=resume,
        img_size=96,
        batch_size=64,
        lr=1e-3,
        seed=seed,
        workers=args.workers,
        device="cpu",
    )
    recipe = {"warmup_epochs": 0.5, "crop_scale": (0.25, 1.0)}
    if stage == "teacher":
        from tinymim.engine import pretrain

        extra: dict[str, Any] = {"student_args": TEACHER, "decoder": dict(dim=128, depth=2, heads=4)}
        run = pretrain("mae_tiny", epochs=args.teacher_epochs, title="teacher", **common, cfg_options=recipe | extra)
        return {"loss": run.losses["loss"], "steps": run.steps, "sha256": sha256_file(run.student)}
    if stage == "student":
        from tinymim.engine import distill

        extra = {"drop_path": 0.0, "student_args": dict(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)}
        run = distill(
            "tinymim_tiny_from_mae_base",
            teacher=str(teacher),
            epochs=args.distill_epochs,
            title=f"seed {seed}: student",
            **common,
            cfg_options=recipe | extra,
        )
        return {"loss": run.losses["loss"], "steps": run.steps, "sha256": sha256_file(run.student)}
    from tinymim.seg import train_segmentor

    steps = args.seg_steps
    result = train_segmentor(
        "upernet_tinymim_t_light_camvid",
        work_dir=folder,
        data_root=args.labels,
        student=student if stage == "distilled" else None,
        resume=resume,
        device="cpu",
        cfg_options={
            "model.backbone.embed_dim": WIDTH,
            "model.backbone.depth": DEPTH,
            "model.backbone.num_heads": HEADS,
            "model.backbone.out_indices": (1, 3, 5, 7),
            "model.backbone.drop_path_rate": 0.0,
            "model.decode_head.in_channels": [WIDTH] * 4,
            "model.decode_head.channels": 64,
            "model.auxiliary_head.in_channels": WIDTH,
            "model.auxiliary_head.channels": 64,
            "optim_wrapper.paramwise_cfg.layer_decay": 1.0,
            "optim_wrapper.optimizer.lr": 5e-4,
            "param_scheduler.0.end": steps // 20 + 1,
            "param_scheduler.1.end": steps + 1,
            "train_cfg.max_iters": steps,
            "train_cfg.val_interval": steps,
            "default_hooks.checkpoint.interval": steps,
            "train_dataloader.batch_size": 4,
            "train_dataloader.num_workers": args.workers,
            "val_dataloader.num_workers": args.workers,
            "randomness.seed": seed,
        },
    )
    return {
        "miou": result.miou,
        "macc": result.macc,
        "aacc": result.aacc,
        "class_iou": list(result.class_iou),
        "classes": list(result.classes),
        "constant_miou": result.constant_miou,
        "steps": steps,
        "sha256": sha256_file(folder / "segmentor.pth"),
    }


def table(results: dict[str, Any]) -> str:
    """The Markdown table of the results so far."""
    env, settings = results["environment"], results["settings"]
    lines = [
        "# Distilled against scratch, CamVid",
        "",
        f"Student {WIDTH} wide, {DEPTH} blocks, {HEADS} heads; teacher {TEACHER['embed_dim']} wide, {TEACHER['depth']} "
        f"blocks, MAE on Imagenette ({settings['teacher_epochs']:g} epochs, 96 pixels), TinyMIM "
        f"({settings['distill_epochs']:g} epochs); UperNet 64 wide, {settings['seg_steps']} steps of 4 crops 240x320.",
        "",
        f"{env['cpu']}, {env['cores']} cores, {platform.system()}; "
        + ", ".join(f"{k} {v}" for k, v in env["versions"].items()),
        "",
        f"Teacher: held by all seeds, {results['teacher']['cpu_minutes']:.1f} CPU minutes, sha256 "
        f"{results['teacher']['sha256'][:12]}."
        if "teacher" in results
        else "",
        "",
        "| seed | distilled mIoU | scratch mIoU | difference | CPU minutes | sha256: distilled, scratch |",
        "|---|---|---|---|---|---|",
    ]
    pairs = []
    for seed, stages in sorted(results["seeds"].items()):
        if {"distilled", "scratch"} <= set(stages):
            a, b = stages["distilled"], stages["scratch"]
            pairs.append((100 * a["miou"], 100 * b["miou"]))
            minutes = sum(stage["cpu_minutes"] for stage in stages.values())
            x, y = pairs[-1]
            files = f"{a['sha256'][:12]}, {b['sha256'][:12]}"
            lines.append(f"| {seed} | {x:.2f} | {y:.2f} | {x - y:+.2f} | {minutes:.1f} | {files} |")
    if len(pairs) > 1:
        cells = [
            f"{statistics.mean(x):.2f} +- {statistics.stdev(x):.2f}"
            for x in ([a for a, _ in pairs], [b for _, b in pairs], [a - b for a, b in pairs])
        ]
        lines.append(f"| mean +- sd | {cells[0]} | {cells[1]} | {cells[2]} | | |")
    if pairs:
        constant = 100 * next(s["scratch"]["constant_miou"] for s in results["seeds"].values() if "scratch" in s)
        lines += ["", f"Best constant prediction: {constant:.2f} mIoU. Validation: 101 photos at 480x360, whole image."]
    return "\n".join(lines) + "\n"


def collect(out: Path) -> dict[str, Any]:
    """Everything measured so far: one small file per stage."""
    results: dict[str, Any] = {"seeds": {}}
    for path in sorted(out.glob("**/result.json")):
        if path.parent.name == "teacher":
            results["teacher"] = json.loads(path.read_text("utf-8-sig"))
        else:
            seed = results["seeds"].setdefault(path.parent.parent.name.removeprefix("seed"), {})
            seed[path.parent.name] = json.loads(path.read_text("utf-8-sig"))
    return results


def run(args: argparse.Namespace) -> int:
    """Run what is missing; rewrite results.json and results.md after every stage."""
    settings = {k: getattr(args, k) for k in ("teacher_epochs", "distill_epochs", "seg_steps")}
    for seed in args.seeds:
        for stage in args.stages:
            folder = args.out / "teacher" if stage == "teacher" else args.out / f"seed{seed}" / stage
            if not (folder / "result.json").is_file():
                before = cpu_minutes()
                numbers = run_stage(stage, seed, args)
                write_json(folder / "result.json", numbers | {"cpu_minutes": cpu_minutes() - before})
            results = collect(args.out) | {"settings": settings, "environment": environment()}
            write_json(args.out / "results.json", results)
            (args.out / "results.md").write_text(table(results), "utf-8")
    print(table(results))
    out = shlex.quote(str(args.out))
    print(f"next: python tools/study_camvid.py --seeds 3 4 5 --out {out}   # more seeds; the table: {out}/results.md")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    return run_command("study_camvid", (__doc__ or "").splitlines()[0], add_arguments, run, argv)
