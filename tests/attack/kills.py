"""Kill a command at its renames and syncs, resume it, and compare what it leaves with a run that was never killed.

One process imports everything, and is forked for every try:
    python -m tests.attack.kills FOLDER [--verbs distill segment] [--tries 5 | --all] [--seed 0]
"""

import argparse
import functools
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from tests.attack.forked import command, fork

VERBS = ("pretrain", "distill", "finetune", "segment", "chain", "study", "tune", "pack", "label", "demo")
TINY = ["student_args.embed_dim=24", "student_args.depth=4", "student_args.num_heads=2"]
RUN = ["--img-size", "32", "--batch-size", "4", "--max-steps", "4", "--save-every", "2", "--workers", "0"]
RUN += ["--device", "cpu"]
SEGMENT = {
    "train_cfg.max_iters": 4,
    "train_cfg.val_interval": 4,
    "default_hooks.checkpoint.interval": 2,
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 0,
    "val_dataloader.num_workers": 0,
    "train_dataloader.dataset.pipeline.3.crop_size": "(64,64)",
    "model.data_preprocessor.size": "(64,64)",
    "model.backbone.img_size": "(64,64)",
    "model.backbone.embed_dim": 24,
    "model.backbone.num_heads": 2,
    "model.decode_head.in_channels": "[24,24,24,24]",
    "model.decode_head.channels": 8,
    "model.auxiliary_head.in_channels": 24,
    "model.auxiliary_head.channels": 8,
}
STUDY = '''"""A study."""
title = "A study"
stages = {
    "teacher": dict(verb="pretrain", data="{photos}", seed="{seed}"),
    "tune": dict(verb="finetune", student="{teacher.student}", data="{photos}", val_data="{val_photos}", seed="{seed}"),
}
score = "tune.top1"
paper = dict(table=7, metric="top-1")
cells = [dict(name="A", paper=83.0), dict(name="B", paper=84.0, set={"tune.epochs": 2})]
seeds = [0]
'''
STAGE = """
import json, pathlib, sys
options, run = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
run.mkdir(parents=True, exist_ok=True)
(run / "config.py").touch()
(run / "student.pth").write_text(json.dumps(options))
(run / "result.json").write_text(json.dumps({"top1": 0.5 + options.get("epochs", 0) / 10}))
"""
VOLATILE = re.compile(
    r"second|time|data_wait|ms$|_mib$|environment|machine|date|report|out|candidates|verdict|speed|onnx|splits|rows|files"
)


class Case:
    """A command: its words, the folder it writes, and what it reads.

    Args:
        words: The command line; the folder is ``out``.
        resume: Words that continue it.
        out: What it writes.
    """

    def __init__(self, words: list[str], out: Path, resume: tuple[str, ...] = ("--resume",)) -> None:
        self.words, self.out, self.resume = words, out, list(resume)

    def clear(self) -> None:
        """Remove what it writes."""
        for path in self.out.parent.glob(f"{self.out.stem}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_data(folder: Path) -> None:
    """Twelve photos of three classes, and six labelled scenes."""
    import numpy as np
    from PIL import Image

    from tinymim.demo.scenes import write_scenes

    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for i in range(count):
            path = folder / "photos" / split / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)).resize((40, 40)).save(path)
    write_scenes(folder / "labelled", train=4, val=2, size=(96, 80), seed=3)


def make_cases(folder: Path, names: list[str]) -> dict[str, Case]:
    """The commands, each in a tiny form, after what they read has been made."""
    write_data(folder)
    photos, labelled, teacher = folder / "photos", folder / "labelled", folder / "teacher"
    common = [*RUN, "--data", str(photos / "train")]
    out = {name: folder / f"out_{name}" for name in VERBS}
    decoder = ["decoder.dim=16", "decoder.depth=1", "decoder.heads=2"]
    pretrain = ["pretrain", *common, "--val-data", str(photos / "val"), "--cfg-options", *TINY, *decoder, "--out"]
    options = [f"{key}={value}" for key, value in SEGMENT.items()]
    segment = ["segment", "upernet_tinymim_demo", "--data-root", str(labelled), "--cfg-options", *options, "--work-dir"]
    fork(lambda: command([*pretrain, str(teacher)]), folder / "log.txt")
    student = str(teacher / "student.pth")
    distill = ["distill", *common, "--cfg-options", *TINY, "--teacher"]
    cases = {
        "pretrain": Case([*pretrain, str(out["pretrain"])], out["pretrain"]),
        "distill": Case([*distill, student, "--out", str(out["distill"])], out["distill"]),
        "finetune": Case(
            [
                *("finetune", *common, "--val-data", str(photos / "val"), "--student", student),
                *("--out", str(out["finetune"]), "--cfg-options", *TINY, "ema=0.9", "drop_path=0.1"),
            ],
            out["finetune"],
        ),
        "segment": Case([*segment, str(out["segment"]), "--student", student], out["segment"]),
        "chain": Case(
            [
                "distill",
                *common,
                "--chain",
                f"{student}:small:tiny",
                "--cfg-options",
                *TINY,
                "--out",
                str(out["chain"]),
            ],
            out["chain"],
        ),
        "demo": Case(["demo", "--minutes", "1", "--out", str(out["demo"])], out["demo"]),
    }
    if "pack" in names:
        words = ["data", "--pack", str(photos / "train"), "--max-size", "1KB", "--out", str(out["pack"])]
        cases["pack"] = Case(words, out["pack"], ())
    if "label" in names:
        from tests.export.tiny import write_labelled, write_segmentor

        write_labelled(folder / "label_data")
        words = ["label", str(folder / "label_data"), "--with", str(write_segmentor(folder / "labeller.onnx"))]
        cases["label"] = Case([*words, "--out", str(out["label"])], out["label"], ())
    if "study" in names:
        (folder / "mine.py").write_text(STUDY, encoding="utf-8")
        words = ["study", str(folder / "mine.py"), "--data", str(photos), "--out", str(out["study"])]
        cases["study"] = Case(words, out["study"], ())
    if "tune" in names:
        from tests.export.tiny import write_labelled, write_segmentor

        write_labelled(folder / "tune_data")
        words = ["tinymim-export", "--from", str(write_segmentor(folder / "tiny.onnx")), "--tune", "--data"]
        words += [str(folder / "tune_data"), "--limit", "2", "--runtimes", "onnxruntime", "--graph", "pixels"]
        words += ["--calibration-count", "2", "--seconds", "0.01", "--max-miou-drop", "100", "--min-speedup", "0"]
        words += ["--onnx", str(out["tune"] / "best.onnx")]
        cases["tune"] = Case(words, out["tune"], ())
    return {name: cases[name] for name in names}


def make_small(folder: Path) -> None:
    """Shorten what no option shortens: the demo's photos and steps, the stages and pauses of a study."""
    from tinymim.demo import run as demo
    from tinymim.study import run as study

    demo.PHOTOS, demo.STEPS, demo.BATCH = {"train": 8, "val": 4}, dict.fromkeys(demo.STEPS, 2), 4
    export = importlib.import_module("tinymim_export")
    bench = export.bench
    export.bench = functools.wraps(bench)(lambda *words, **options: bench(*words, **options | {"seconds": 0.05}))
    (folder / "stage.py").write_text(STAGE, encoding="utf-8")
    study.POLL = 0.01
    study.command = lambda stage: [
        sys.executable,
        str(folder / "stage.py"),
        json.dumps(stage.options),
        str(stage.run),
    ]


def counted(words: list[str], note: Path, at: int | None) -> int:
    """Run a command; kill the process at its ``at``-th point: before a sync, before or after a rename."""
    replace, sync = os.replace, os.fsync
    points: list[str] = []

    def point(name: str) -> None:
        if len(points) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        points.append(name)

    def replaced(source: Any, target: Any, **rest: Any) -> None:
        point(f"before {Path(target).name} has its name")
        replace(source, target, **rest)
        point(f"after {Path(target).name} has its name")

    def synced(number: int) -> None:
        point("before a sync")
        sync(number)

    os.replace, os.fsync = replaced, synced  # type: ignore[assignment]
    code = command(words)
    note.write_text(json.dumps(points), encoding="utf-8")
    return code


def plain(value: Any) -> Any:
    """JSON without measured values."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not VOLATILE.search(key)}
    return [plain(item) for item in value] if isinstance(value, list) else value


def logged(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without the waits for data, in which no two runs are alike."""
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key != "data_wait"} for line in lines]


def left(out: Path) -> dict[str, Any]:
    """What a command left: products to the byte, records without measured values, and what should not be there."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() or p.is_symlink()):
        name = str(path.relative_to(out))
        if path.suffix == ".part" or path.name == ".tinymim.lock":
            found[name] = "left behind"
        elif path.suffix == ".pth" and "checkpoints" not in path.parts:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".pth":
            found[name] = "checkpoint"
        elif path.name == "metrics.jsonl":
            found[name] = logged(path)
        elif path.suffix == ".json":
            found[name] = plain(json.loads(path.read_text(encoding="utf-8")))
            if path.name == "tune.json":  # times decide the rest
                rows = json.loads(path.read_text(encoding="utf-8"))["candidates"]
                found[name] = sorted((row["name"], row["engine"], row["mIoU"]) for row in rows)
            if path.name == "env.json":
                for product, noted in json.loads(path.read_text(encoding="utf-8"))["outputs"].items():
                    same = hashlib.sha256((path.parent / product).read_bytes()).hexdigest() == noted
                    found[f"{name}: {product}"] = "noted" if same else "accused"
                found[name] = sorted(found[name])
        elif path.suffix == ".tar" or {"images", "annotations"} & {*path.parts}:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix in (".html", ".onnx"):
            found[name] = "there"
    return found


def attack(case: Case, folder: Path, tries: int | None, rng: random.Random) -> tuple[int, int, int, list[str]]:
    """Kill a command at some of its points (None: at all), those around the last product and checkpoint first.

    Returns:
        Kills survived, tried, points, and what went wrong.
    """
    log, note, wrong = folder / "log.txt", folder / "points.txt", []
    case.clear()
    usual = fork(lambda: counted(case.words, note, None), log)
    if usual not in (0, 1):
        raise SystemExit(f"the command itself failed ({usual}):\n{log.read_text(encoding='utf-8', errors='replace')}")
    points, expected = json.loads(note.read_text(encoding="utf-8")), left(case.out)
    last_save = [at for at, name in enumerate(points) if name.endswith(".pth has its name")][-4:]
    chosen = [
        *last_save,
        *rng.sample([at for at in range(len(points)) if at not in last_save], len(points) - len(last_save)),
    ]
    chosen = sorted(chosen[:tries])
    for at in chosen:
        case.clear()
        code = fork(functools.partial(counted, case.words, note, at), log)
        assert code == -signal.SIGKILL, f"not killed at point {at}: {code}"
        code = fork(lambda: command([*case.words, *case.resume]), log)
        said = log.read_text(encoding="utf-8", errors="replace")
        if code == 2 and re.search("holds no (run|chain) to resume", said):  # killed before it had written anything
            code = fork(lambda: command(case.words), log)
            said = log.read_text(encoding="utf-8", errors="replace")
        now = left(case.out)
        differ = [key for key in sorted({*expected, *now}) if expected.get(key) != now.get(key)]
        if code != usual or differ or "Traceback" in said:
            wrong.append(f"point {at}, {points[at]}: exit {code}, other {', '.join(differ[:6])}; {said[-300:]}")
    case.clear()
    return len(chosen) - len(wrong), len(chosen), len(points), wrong


def main() -> int:
    """Entry point; exit code 1 where a kill was not survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=[*VERBS])
    parser.add_argument("--tries", type=int, default=4, help="kills of each command")
    parser.add_argument("--all", action="store_true", help="a kill at every point")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    import torch

    torch.set_num_threads(1)
    for name in (
        "tinymim.engine",
        "tinymim.seg",
        "tinymim.cli.demo",
        "tinymim_export.report.page",
        "tinymim_export.cli",
    ):
        importlib.import_module(name)
    make_small(folder)
    total = [0, 0]
    for name, case in make_cases(folder, args.verbs).items():
        rng = random.Random(f"{args.seed} {name}")
        survived, tried, points, wrong = attack(case, folder, None if args.all else args.tries, rng)
        total = [total[0] + survived, total[1] + tried]
        print(f"{name}: {survived} of {tried} kills survived ({points} points)", *wrong, sep="\n  ", flush=True)
    print(f"{total[0]} of {total[1]} kills survived")
    return 0 if total[0] == total[1] else 1


if __name__ == "__main__":
    sys.exit(main())
