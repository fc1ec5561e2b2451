"""One of each artefact, as the real commands write it, in the smallest form."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.attack.forked import run

SHAPE = "student_args.embed_dim=24 student_args.depth=2 student_args.num_heads=2"
SEG = (
    "--cfg-options model.backbone.embed_dim=24 model.backbone.depth=4 model.backbone.num_heads=2 "
    "model.decode_head.in_channels=[24,24,24,24] model.decode_head.channels=16 model.auxiliary_head.in_channels=24 "
    "model.auxiliary_head.channels=8 train_cfg.max_iters=2 train_cfg.val_interval=2 train_dataloader.batch_size=2 "
    "train_dataloader.num_workers=0 val_dataloader.num_workers=0 default_hooks.checkpoint.interval=1"
)
PLAIN = f"--img-size 32 --batch-size 4 --workers 0 --device cpu --cfg-options {SHAPE}"
DISTIL = f"--data photos --max-steps 2 --save-every 1 {PLAIN}"
SEGMENT = "tinymim segment upernet_tinymim_demo --data-root labelled --work-dir segmentor"
TUNE = "--runtimes onnxruntime --seconds 0.05 --limit 2 --max-miou-drop 100 --min-speedup 0.01 --calibration-count 4"
STUDY = """
title = "A study"
stages = dict(
    teacher=dict(verb="pretrain", recipe="mae_tiny", data="{photos}", seed="{seed}", img_size=32, batch_size=4,
                 workers=0, max_steps=1, device="cpu",
                 cfg_options=dict(student_args=dict(embed_dim=24, depth=2, num_heads=2))),
)
score = "teacher.loss"
seeds = [0]
cells = [dict(name="A")]
"""
# what is made, with what; later ones read earlier ones
COMMANDS = {
    "teacher": f"tinymim pretrain --data photos --out teacher --model tinymim_vit_tiny --max-steps 2 {PLAIN}",
    "student": f"tinymim distill --teacher teacher/student.pth --student tinymim_vit_tiny --out student {DISTIL}",
    "chain": f"tinymim distill --chain teacher/student.pth:tiny --out chain {DISTIL}",
    "segmentor": f"{SEGMENT} {SEG}",
    "fp32.onnx": "tinymim-export --checkpoint segmentor/segmentor.pth --onnx fp32.onnx --size 64 64 --json fp32.json",
    "int8.onnx": "tinymim-export --from fp32.onnx --precision int8 --calibration photos --calibration-count 2 "
    "--onnx int8.onnx --json int8.json",
    "eval.json": "tinymim eval fp32.onnx --data labelled --resize-to-file --json eval.json",
    "bench.json": "tinymim bench fp32.onnx int8.onnx --runs 10 --threads 1 --json bench.json",
    "sensitivity.json": "tinymim-export --from fp32.onnx --sensitivity --data labelled --limit 1 --calibration-count 4 "
    "--precision int8 --resize-to-file --json sensitivity.json",
    "best.tune": f"tinymim-export --from fp32.onnx --tune --data labelled --onnx best.onnx --resize-to-file {TUNE}",
    "study": "tinymim study study.py --data split --out study",
    "line.html": "tinymim report teacher student segmentor fp32.onnx int8.onnx bench.json eval.json sensitivity.json "
    "best.tune --out line.html",
}


def photo(random: np.random.Generator, side: int = 64) -> Image.Image:
    """Coloured blobs."""
    small = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def write_photos(root: Path) -> None:
    """photos, split/train, split/val, labelled (ADE20K layout with dataset.json), list.txt."""
    random = np.random.default_rng(0)
    for name in ("photos", "split/train", "split/val"):
        (root / name).mkdir(parents=True)
        for i in range(8):
            photo(random).save(root / name / f"p{i}.jpg")
    for split, count in (("training", 4), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / "labelled" / kind / split).mkdir(parents=True)
        for i in range(count):
            image = photo(random)
            image.save(root / "labelled" / "images" / split / f"{i}.png")
            label = (np.asarray(image.convert("L")) // 86).astype(np.uint8)
            Image.fromarray(label).save(root / "labelled" / "annotations" / split / f"{i}.png")
    (root / "labelled" / "dataset.json").write_text('{"classes": ["sky", "road", "tree"]}', "utf-8")
    (root / "study.py").write_text(STUDY, "utf-8")


def make(root: Path) -> dict[str, float]:
    """Make everything; seconds by artefact."""
    write_photos(root)
    took = {}
    for name, command in COMMANDS.items():
        outcome = run(command.split(), root, seconds=400)
        assert outcome.word == "worked", f"{name}: {outcome.word}\n{outcome.text[-3000:]}"
        took[name] = outcome.seconds
    return took
