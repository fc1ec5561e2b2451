"""Generated photos in COCO's format: circles and squares on noise, with masks; deterministic by seed."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def write_coco(
    folder: Path, count: int, *, seed: int = 0, size: tuple[int, int] = (96, 128), runs: bool = False
) -> Path:
    """Write ``photos/`` and ``objects.json`` into a folder; category ids are not consecutive."""
    rng = np.random.default_rng(seed)
    height, width = size
    (folder / "photos").mkdir(parents=True)
    images, notes = [], []
    for i in range(count):
        pixels = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
        photo = Image.fromarray(pixels)
        draw = ImageDraw.Draw(photo)
        for _ in range(int(rng.integers(1, 4))):
            kind, side = int(rng.integers(2)), int(rng.integers(20, 44))
            left, top = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            colour = (230, 40, 40) if kind else (40, 60, 230)
            box = (left, top, left + side - 1, top + side - 1)
            (draw.rectangle if kind else draw.ellipse)(box, fill=colour)
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            if kind:
                polygon = [left, top, left + side, top, left + side, top + side, left, top + side]
            else:
                x, y = left + side / 2 * (1 + np.cos(angles)), top + side / 2 * (1 + np.sin(angles))
                polygon = np.stack([x, y], 1).round(2).ravel().tolist()
            notes.append(
                dict(
                    id=len(notes) + 1,
                    image_id=10 * i,
                    category_id=(3, 7)[kind],
                    bbox=[left, top, side, side],
                    area=side * side,
                    iscrowd=0,
                    segmentation=[polygon],
                )
            )
        photo.save(folder / "photos" / f"{i:03d}.png")
        images.append(dict(id=10 * i, file_name=f"{i:03d}.png", height=height, width=width))
    categories = [dict(id=7, name="square"), dict(id=3, name="circle")]
    content = dict(images=images, annotations=notes, categories=categories)
    (folder / "objects.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "objects.json"
