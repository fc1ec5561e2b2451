"""``tinymim demo``: from nothing to a deployed, measured segmentor in minutes, and its HTML report.

Draw scenes (or shrink your labelled photos), pre-train a small teacher, distil a student from it, train UperNet on the
student with MMSegmentation, export to ONNX and verify, measure, report. Every step calls the same function as the other
commands, at a small scale.
"""

import json
import os
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tinymim.cli._next import segment_line
from tinymim.data.folders import read_layout
from tinymim.data.photo_files import list_photos
from tinymim.demo.record import DemoFile
from tinymim.errors import CheckFailed, ConfigError
from tinymim.files import environment, write_json
from tinymim.folders import open_run
from tinymim.progress import clock
from tinymim.schema import read_json

CONFIG = "upernet_tinymim_demo"  # in mmseg_configs; it also gives the student's shape
SIZE = (160, 128)  # width and height of the demo's photos, pixels
PHOTOS = {"train": 480, "val": 80}
CROP = 128  # pixels, pre-training
BATCH = 32  # pre-training
STEPS = {"teacher": 180, "student": 120, "segmentor": 380}  # for MINUTES, twelve classes
MINUTES = 6.0
TEACHER = {"depth": 6, "embed_dim": 256, "num_heads": 4}  # ViT keywords
TIMES_CONSTANT = 3.0  # the mIoU must be at least this many times that of the best constant prediction
STAGES = {
    "data": "labelled photos",
    "teacher": "pre-train a teacher (MAE)",
    "student": "distil a student from it (TinyMIM: Q-K and V-V relations)",
    "segmentor": "train a segmentor on the student (UperNet, MMSegmentation)",
    "export": "export to ONNX and compare with PyTorch",
    "measure": "score and time the ONNX file",
}


@dataclass
class DemoResult:
    """Result of the demo; everything else is in ``demo.json`` and ``report.html`` in ``out``.

    Attributes:
        miou: mIoU of the segmentor in PyTorch, 0 to 1.
        constant_miou: mIoU of the best constant prediction on the same validation labels.
        onnx_miou: mIoU of the ONNX file on the same photos, scored without PyTorch.
        distill_val: Held-out distillation loss, (step, loss).
        p50_ms: Median time for one photo in ONNX Runtime, milliseconds.
        seconds: Time of all stages (and all sessions, if the demo was resumed).
        peak_mib: Peak memory of this process, MiB.
        checks: Sentence -> whether it holds.
    """

    out: str
    report: str
    miou: float
    constant_miou: float
    onnx_miou: float
    distill_val: list[tuple[int, float]]
    p50_ms: float
    seconds: float
    peak_mib: float
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(self.checks.values())

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``."""
        if path is not None:
            write_json(path, asdict(self))
        return json.dumps(asdict(self), indent=1)

    def to_markdown(self) -> str:
        """A short list of the checks and costs."""
        lines = [f"- {'ok' if good else 'FAILED'}: {text}" for text, good in self.checks.items()]
        lines.append(
            f"- {self.p50_ms:.1f} ms per photo, {clock(self.seconds)} in all, peak memory {self.peak_mib:.0f} MiB"
        )
        return "\n".join(lines) + "\n"

    def print(self) -> None:
        """Print the list."""
        print("\n" + self.to_markdown(), end="", flush=True)


class DemoRecord:
    """``demo.json``: settings and the result of each finished stage; a stage that is in it is not run again."""

    def __init__(self, out: Path, settings: dict[str, Any], *, resume: bool) -> None:
        self.out, self.path = out, out / "demo.json"
        self.value: dict[str, Any] = {"settings": settings, "environment": environment(), "stages": {}}
        if resume:
            if not self.path.is_file():
                raise ConfigError(
                    f"{out} holds no demo to resume", "demo.json is missing", "choose another --out, without --resume"
                )
            before = read_json(self.path, DemoFile, fix="start again with --overwrite")
            changed = [key for key, value in settings.items() if before["settings"].get(key) != value]
            if changed:
                raise ConfigError(
                    f"{out} was started with another {' and '.join(changed)}",
                    "a demo can only be resumed with the options it was started with",
                    "repeat the first command with --resume, or start again with --overwrite",
                )
            self.value["stages"] = before["stages"]

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage, or return its earlier result; record time and peak memory."""
        stages = self.value["stages"]
        print(f"\n[{list(STAGES).index(name) + 1}/{len(STAGES)}] {STAGES[name]}", flush=True)
        if name in stages:
            print(f"done before ({clock(stages[name]['seconds'])})")
            return stages[name]
        began, cpu = time.monotonic(), time.process_time()
        value = work()
        value |= {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu, "peak_mib": peak_mib()}
        stages[name] = json.loads(json.dumps(value, default=str))
        self.save()
        return stages[name]

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, self.value)


def demo(
    *,
    data: str | Path | None = None,
    out: str | Path = "runs/demo",
    seed: int = 0,
    minutes: float = MINUTES,
    resume: bool = False,
    overwrite: bool = False,
) -> DemoResult:
    """Run the whole pipeline at a small scale and write ``report.html``.

    Args:
        data: Labelled folder in ADE20K layout; None draws scenes.
        out: Folder; every stage has its own sub-folder.
        seed: Fixes scenes, initial weights and order.
        minutes: Target duration on two cores; scales the numbers of training steps.
        resume: Continue where the demo in ``out`` stopped; finished stages are not run again.
        overwrite: Replace the demo in ``out``.

    Raises:
        CheckFailed: a check did not pass (the report is still written).
        TinyMIMError: anything the user can fix.
    """
    # OpenMP's threads spin while they wait. Measured on two cores: briefly, a distillation step is 1.6 times as fast
    # beside two busy processes (ten times, a tiny one), and a quarter slower on idle cores or beside data workers; so
    # only the demo, which must end in minutes on any machine, does it. OpenMP reads this when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not 1 <= minutes <= 600:
        raise ConfigError(f"{minutes:g} minutes are not possible", "the demo takes at least one", "try --minutes 6")
    if data is not None:
        read_layout(data)  # an error here leaves no folder behind
    with open_run(out, resume=resume, overwrite=overwrite) as opened:
        settings = {"data": None if data is None else str(data), "seed": seed, "minutes": minutes}
        record = DemoRecord(opened.path, settings, resume=not opened.fresh)
        opened.begin()
        record.save()
        return _run(opened.path, record, data, seed, minutes)


def _run(out: Path, record: DemoRecord, data: str | Path | None, seed: int, minutes: float) -> DemoResult:
    """Run the stages that are not in the record."""
    known = record.stage("data", lambda: _data(data, out / "data", seed))
    # the cost of head and loss grows with the number of classes: with many classes, fewer steps
    share = (minutes - 1) / (MINUTES - 1) if minutes > 2 else 0.2 * minutes / 2
    steps = {name: max(round(count * share), 10) for name, count in STEPS.items()}
    steps["segmentor"] = max(round(steps["segmentor"] / (1 + max(len(known["classes"]) - 12, 0) / 40)), 10)
    record.stage("teacher", lambda: _teacher(out, seed, steps["teacher"]))
    record.stage("student", lambda: _student(out, seed, steps["student"]))
    record.stage("segmentor", lambda: _segmentor(out, seed, steps["segmentor"]))
    record.stage("export", lambda: _export(out))
    record.stage("measure", lambda: _measure(out))
    return _finish(out, record)


def _data(data: str | Path | None, root: Path, seed: int) -> dict[str, Any]:
    """Draw scenes, or shrink the user's photos to the same size."""
    width, height = SIZE
    if data is None:
        from tinymim.demo.scenes import write_scenes

        print(f"drawing {PHOTOS['train']} + {PHOTOS['val']} scenes of {width}x{height} pixels -> {root}", flush=True)
        write_scenes(root, **PHOTOS, size=SIZE, seed=seed)
        source = "scenes drawn by tinymim"
    else:
        from tinymim.demo.shrink import shrink_layout

        layout = read_layout(data)
        print(
            f"{layout}\nat most {PHOTOS['train']} + {PHOTOS['val']} of them, cropped and shrunk to {width}x{height}"
            f" pixels -> {root}",
            flush=True,
        )
        shrink_layout(layout, root, **PHOTOS, size=SIZE, seed=seed)
        source = f"photos of {layout.root.resolve().name}"
    small = read_layout(root)
    return {
        "source": source,
        "train": len(small.train),
        "val": len(small.val),
        "size": SIZE,
        "classes": small.classes,
        "palette": small.palette,
    }


def _student_shape() -> dict[str, Any]:
    """Arguments of the student, from the backbone of the demo's MMSegmentation config."""
    from tinymim.models.vit import SHAPE
    from tinymim.seg.config import find_config

    backbone = find_config(CONFIG).model.backbone
    return {key: backbone[key] for key in SHAPE if key in backbone}


def _teacher(out: Path, seed: int, steps: int) -> dict[str, Any]:
    from tinymim.engine import pretrain

    return _pretraining(pretrain, "mae_tiny", out, "teacher", steps, seed, TEACHER, lr=1.2e-3)


def _student(out: Path, seed: int, steps: int) -> dict[str, Any]:
    from tinymim.engine import distill

    return _pretraining(
        distill,
        "tinymim_tiny_from_mae_base",
        out,
        "student",
        steps,
        seed,
        _student_shape(),
        lr=1.2e-3,
        teacher=str(out / "teacher" / "student.pth"),
    )


def _pretraining(
    job: Callable[..., Any],
    recipe: str,
    out: Path,
    name: str,
    steps: int,
    seed: int,
    shape: dict[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """Run one job of the engine; resume it if it was interrupted."""
    from tinymim.models import read_checkpoint

    folder, photos = out / name, out / "data" / "images"
    resume = any((folder / "checkpoints").glob("*.pth"))
    count = len(list_photos(photos / "training"))
    per_epoch = max(count // BATCH, 1)
    result = job(
        recipe,
        data=photos / "training",
        val_data=photos / "validation",
        out=folder,
        img_size=CROP,
        batch_size=BATCH,
        epochs=steps / per_epoch,
        workers=1,
        seed=seed,
        resume=resume,
        overwrite=not resume,
        save_every=max(steps // 3, 1),
        cfg_options={
            "student_args": shape,
            "warmup_epochs": 0.1 * steps / per_epoch,
            "drop_path": 0.0,
            "crop_scale": (0.35, 1.0),
            "val_every": -(-steps // 4),
            "watch_every": -(-steps // 4),
        },
        **options,
    )
    parameters = sum(tensor.numel() for tensor in read_checkpoint(result.student).state.values())
    return {"steps": result.steps, "val": result.val, "losses": result.losses, "shape": shape, "parameters": parameters}


def _segmentor(out: Path, seed: int, steps: int) -> dict[str, Any]:
    from tinymim.seg import train_segmentor

    folder = out / "segmentor"
    resume = any((folder / "checkpoints").glob("*.pth"))
    result = train_segmentor(
        CONFIG,
        work_dir=folder,
        data_root=out / "data",
        student=out / "student" / "student.pth",
        resume=resume,
        overwrite=not resume,
        cfg_options={
            "train_cfg.max_iters": steps,
            "train_cfg.val_interval": steps,
            "randomness.seed": seed,
            "default_hooks.checkpoint.interval": max(steps // 2, 1),
            "train_dataloader.batch_size": 8,
            "optim_wrapper.optimizer.lr": 2e-3,
        },
    )
    result.print()
    return {key: value for key, value in result.to_dict().items() if key not in ("confusion", "files")} | {
        "steps": steps
    }


def _export(out: Path) -> dict[str, Any]:
    from tinymim_export import export

    width, height = SIZE
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mm(seg|engine|cv)\.")
        made = export(
            out / "segmentor" / "segmentor.pth",
            out / "segmentor.onnx",
            size=(height, width),
            photos=out / "data" / "images" / "validation",
        )
    made.print()
    return json.loads(made.to_json()) | {"onnx": "segmentor.onnx"}


def _measure(out: Path) -> dict[str, Any]:
    """Score the ONNX file on the validation photos, write its predictions, then measure its latency by part."""
    from tinymim.demo.report import score_onnx
    from tinymim_export import bench

    score = score_onnx(out)
    print(f"mIoU of the ONNX file on {score['images']} photos: {100 * score['mIoU']:.2f} %", flush=True)
    timed = bench(out / "segmentor.onnx", split=True, seconds=4.0)
    timed.print()
    figures = json.loads(timed.to_json())
    return {"onnx": score, "rows": figures["rows"], "splits": figures["splits"], "environment": figures["environment"]}


def _finish(out: Path, record: DemoRecord) -> DemoResult:
    """Checks and the report."""
    from tinymim.demo.report import write_demo_report
    from tinymim_export.report.page import run_report

    stages = record.value["stages"]
    seg, held_out = stages["segmentor"], [(step, loss) for step, loss in stages["student"]["val"]]
    miou, constant, onnx_miou = seg["mIoU"], seg["constant_mIoU"], stages["measure"]["onnx"]["mIoU"]
    checks = {
        f"the mIoU of {100 * miou:.1f} % is {miou / constant:.1f} times that of the best constant prediction "
        f"({100 * constant:.1f} %; at least {TIMES_CONSTANT:g} times)": miou >= TIMES_CONSTANT * constant,
        f"the distillation loss on held-out photos fell from {held_out[0][1]:.3f} to {held_out[-1][1]:.3f}": (
            held_out[-1][1] < held_out[0][1]
        ),
        f"the ONNX file predicts the same pixels as PyTorch, with mIoU {100 * onnx_miou:.1f} %": (
            stages["export"]["parity"]["passed"] and abs(onnx_miou - miou) < 0.005
        ),
    }
    record.value["seconds"] = sum(stage["seconds"] for stage in stages.values())
    record.value["peak_mib"] = max(stage["peak_mib"] for stage in stages.values())
    record.value["checks"] = checks
    record.save()
    for name in ("teacher", "student", "segmentor"):
        run_report(out / name, segment=segment_line)
    report = write_demo_report(out, record.value)
    result = DemoResult(
        out=str(out),
        report=str(report),
        miou=miou,
        constant_miou=constant,
        onnx_miou=onnx_miou,
        distill_val=held_out,
        p50_ms=stages["measure"]["rows"][0]["p50_ms"],
        seconds=record.value["seconds"],
        peak_mib=record.value["peak_mib"],
        checks=checks,
    )
    result.print()
    print(f"report: {report}")
    if not result.passed:
        raise CheckFailed(
            "the demo did not pass: " + "; ".join(text for text, good in checks.items() if not good),
            "too few steps for these photos, or something is broken ('tinymim doctor' checks)",
            f"open {report}; more time: tinymim demo --minutes {2 * record.value['settings']['minutes']:g} --out NEW",
        )
    return result


def peak_mib() -> float:
    """Peak memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
