"""Made-up photographs with the colours and smoothness of real ones, and a labelled folder of them."""

import json

import numpy as np
from PIL import Image


def photograph(seed, size=(60, 90)):
    """Soft random colours with a little grain, Pillow RGB."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
    grain = random.normal(0, 6, (*size, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))


def write_photos(folder, count, first=0):
    """``count`` photographs as 0.png, 1.png, ..."""
    for i in range(count):
        photograph(first + i).save(folder / f"{i}.png")
    return folder


def write_labelled(folder, classes, mask, train=8, val=4):
    """A labelled folder whose labels are what ``mask(photo)`` gives, so that this segmentor scores 100 %."""
    for part, count, first in (("training", train, 0), ("validation", val, 100)):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
        write_photos(folder / "images" / part, count, first)
        for path in (folder / "images" / part).iterdir():
            Image.fromarray(mask(Image.open(path).convert("RGB"))).save(folder / "annotations" / part / path.name)
    (folder / "dataset.json").write_text(json.dumps({"classes": classes}))
    return folder
