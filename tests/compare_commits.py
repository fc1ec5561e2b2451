"""Is a refactoring free of side effects? Ten fixed-seed steps of every job, at another commit and here, bit for bit.

The other commit's run folders are then resumed, loaded, exported and reported by the code that is here.
    python tests/compare_commits.py 62dec1e
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, HALF = 10, 5
SMALL = {"student_args": dict(depth=3, embed_dim=24, num_heads=2)}
DECODER = dict(dim=16, depth=1, heads=2)
COMMON = dict(img_size=32, batch_size=8, epochs=4, workers=0, device="cpu", save_every=HALF, max_steps=STEPS, seed=3)
JOBS = ("mae", "relations", "features", "masked", "several", "finetune", "deit", "segment")
RESUMED = ("mae", "relations", "features", "finetune", "deit", "segment")
HEADS = {f"model.{head}.channels": 16 for head in ("decode_head", "auxiliary_head")}
SEGMENT = {
    "train_cfg.max_iters": STEPS,
    "train_cfg.val_interval": STEPS,
    "default_hooks.checkpoint.interval": HALF,
    "default_hooks.checkpoint.log_interval": 1,
    "train_dataloader.batch_size": 2,
    "train_dataloader.num_workers": 0,
    "val_dataloader.num_workers": 0,
    "train_dataloader.dataset.pipeline.3.crop_size": (64, 64),
    "model.data_preprocessor.size": (64, 64),
    "model.backbone.img_size": (64, 64),
    "model.backbone.embed_dim": 24,
    "model.backbone.num_heads": 2,
    "model.backbone.depth": 4,
    "model.backbone.drop_path_rate": 0.2,
    "model.decode_head.in_channels": [24] * 4,
    "model.auxiliary_head.in_channels": 24,
    **HEADS,
}


def make_data(folder: Path) -> None:
    """24 photos in three classes, and 8 + 4 labelled ones in ADE20K layout, of seeded noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)

    def photo(path: Path, size: tuple[int, int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 255, (6, 7, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(path)

    for i in range(24):
        photo(folder / "photos" / "abc"[i % 3] / f"{i:02d}.png", (70, 60))
    for split, count in (("training", 8), ("validation", 4)):
        for i in range(count):
            photo(folder / "labelled" / "images" / split / f"{i}.png", (96, 80))
            label = folder / "labelled" / "annotations" / split / f"{i}.png"
            label.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 3, (4, 5), dtype=np.uint8)).resize((96, 80), 0).save(label)
    meta = {"classes": ["a", "b", "c"], "palette": [[0, 0, 0], [255, 0, 0], [0, 0, 255]], "ignore": [255]}
    (folder / "labelled" / "dataset.json").write_text(json.dumps({**meta, "zero_is_ignored": False}))


def run_job(name: str, data: Path, out: Path, *, resume: bool = False) -> None:
    """One job into its run folder."""
    from tinymim.engine import distill, finetune, pretrain
    from tinymim.engine.recipe import RUN_KEYS

    photos, teacher = data / "photos", str(out.parent / "mae" / "student.pth")
    common = dict(COMMON, data=photos, out=out, resume=resume)
    pixels = {"decode": "whole"} if "decode" in RUN_KEYS else {}  # those of the commits before this key
    small = SMALL | pixels
    tiny = {"student_args": dict(depth=2, embed_dim=24, num_heads=2), **pixels}
    if name == "mae":
        pretrain(
            "mae_tiny",
            **common,
            val_data=photos,
            cfg_options={"student_args": dict(depth=3, embed_dim=48, num_heads=4), "decoder": DECODER, **pixels},
        )
    elif name == "relations":
        distill(**common, teacher=teacher, val_data=photos, cfg_options=small)
    elif name == "features":
        distill(**common, teacher=teacher, targets=["output", "class_token@2:2=0.5", "qk+kk@1:1"], cfg_options=small)
    elif name == "masked":
        distill(
            **common,
            teacher=teacher,
            cfg_options={**small, "mask": "both", "reconstruct": 0.5, "decoder": DECODER, "teacher_drop_path": 0.1},
        )
    elif name == "several":
        distill(**common, teacher=[teacher, f"{teacher}=0.5"], cfg_options=tiny)
    elif name == "finetune":
        finetune(
            **common,
            val_data=photos,
            student=str(out.parent / "relations" / "student.pth"),
            cfg_options={"ema": 0.9, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0},
        )
    elif name == "deit":
        master = str(out.parent / "finetune" / "classifier.pth")
        finetune(
            **common,
            val_data=photos,
            model="tinymim_vit_star_tiny",
            teacher=master,
            cfg_options={"student_args": dict(depth=2, embed_dim=24, num_heads=2, last_dim=32)},
        )
    else:
        from tinymim.seg import train_segmentor

        train_segmentor(
            "upernet_tinymim_demo",
            work_dir=out,
            data_root=data / "labelled",
            device="cpu",
            resume=resume,
            cfg_options=SEGMENT,
        )


def record(out: Path) -> None:
    """Every job once; and its resume from half way, which must give the same."""
    make_data(out / "data")
    for name in JOBS:
        run_job(name, out / "data", out / name)
    from tinymim_export import export

    export(str(out / "segment" / "segmentor.pth"), str(out / "segment" / "segmentor.onnx"), size=(64, 64))


def cut(folder: Path) -> None:
    """A run folder as a kill just before the last checkpoint leaves it."""
    for last in folder.glob(f"checkpoints/*{STEPS}.pth"):
        last.unlink()


def losses(folder: Path) -> list[dict[str, str]]:
    """Every number of metrics.jsonl, as its exact bits."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {k: float(v).hex() for k, v in line.items() if isinstance(v, int | float) and k != "data_wait"}
        for line in lines
    ]


def tensors(folder: Path) -> dict[str, str]:
    """sha256 of every tensor of the products of a run."""
    import hashlib

    import torch

    found = {}
    for file in ("student.pth", "classifier.pth", "segmentor.pth"):
        if (folder / file).is_file():
            content = torch.load(folder / file, weights_only=True)
            for key, value in (content.get("model") or content["state_dict"]).items():
                found[f"{file}:{key}"] = hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    return found


def python(tree: Path, *words: str) -> None:
    """This script with the packages of a tree, whatever is installed."""
    with tempfile.TemporaryDirectory() as packages:
        for name, folder in (
            ("tinymim", "tinymim"),
            ("tinymim_export", "export"),
            ("tinymim_mmseg_configs", "mmseg_configs"),
        ):
            (Path(packages) / name).symlink_to(tree / folder)
        env = {**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *words], env=env, cwd=tree, check=True)


def main() -> int:
    """Entry point; exit code 1 where a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="what to compare with")
    parser.add_argument("--record", metavar="FOLDER", help="only record the tree that is imported")
    parser.add_argument("--resume", metavar="FOLDER", help="only resume what --record left there")
    parser.add_argument("--keep", metavar="FOLDER", help="where to leave the run folders")
    args = parser.parse_args()
    if args.record:
        record(Path(args.record))
        return 0
    if args.resume:
        for name in RESUMED:
            cut(Path(args.resume) / name)
            run_job(name, Path(args.resume) / "data", Path(args.resume) / name, resume=True)
        return 0
    if not args.commit:
        parser.error("name a commit")
    work, wrong, me = Path(args.keep or tempfile.mkdtemp()).resolve(), [], str(Path(__file__).resolve())
    before, after, resumed = work / "before", work / "after", work / "resumed"
    if not before.is_dir():
        tree = work / "tree"
        subprocess.run(["git", "worktree", "add", "--force", "--detach", str(tree), args.commit], cwd=ROOT, check=True)
        python(tree, me, "--record", str(before))
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    for folder in (after, resumed):
        shutil.rmtree(folder, ignore_errors=True)
    python(ROOT, me, "--record", str(after))
    shutil.copytree(before, resumed)
    python(ROOT, me, "--resume", str(resumed))
    for name in JOBS:
        for place in (after, resumed):
            same = losses(before / name) == losses(place / name) and tensors(before / name) == tensors(place / name)
            print(f"{name:10} {place.name:8} {'bit-identical' if same else 'DIFFERS'}")
            wrong += [] if same else [f"{name} {place.name}"]
    for words in (
        ["-m", "tinymim", "report", str(before / "relations"), "--out", str(work / "run.html")],
        [
            "-m",
            "tinymim",
            "report",
            str(before / "segment"),
            str(before / "segment" / "segmentor.onnx"),
            "--out",
            str(work / "report.html"),
        ],
        [
            "-m",
            "tinymim_export.cli",
            "--onnx",
            str(work / "old.onnx"),
            "--checkpoint",
            str(before / "segment" / "segmentor.pth"),
            "--size",
            "64",
            "64",
        ],
        [
            "-m",
            "tinymim",
            "eval",
            str(before / "segment" / "segmentor.onnx"),
            "--data",
            str(before / "data" / "labelled"),
            "--resize-to-file",
        ],
    ):
        print("$", *words)
        python(ROOT, *words)
    print(f"{len(wrong)} of {2 * len(JOBS)} comparisons differ; the run folders are in {work}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
