"""Small copies of labelled folders, so that a first run on any dataset takes minutes. NumPy and Pillow only."""

from pathlib import Path

import numpy as np
from PIL import Image

from tinymim.data.folders import Layout
from tinymim.data.pixels import UnreadablePhoto, open_photo
from tinymim.errors import DataError
from tinymim.files import write_json


def shrink_layout(
    layout: Layout, root: str | Path, *, train: int, val: int, size: tuple[int, int], seed: int = 0
) -> dict[str, int]:
    """Write a copy of a labelled folder with few, small photos, in ADE20K layout with ``dataset.json``.

    Photos are cropped around their centre to the aspect ratio of ``size`` and scaled (Lanczos); labels are scaled by
    nearest neighbour and hold training ids (0 .. classes - 1, 255 ignored). Unreadable photos are left out and printed.

    Args:
        layout: The folder.
        root: Folder to fill.
        train: Most photos for training, drawn at random without repetition.
        val: Most photos for validation.
        size: Width and height in pixels.
        seed: Seed of the draw.

    Returns:
        Photos written: ``{"train": ..., "val": ...}``.

    Raises:
        DataError: a split without readable photos, or labels that cannot be read.
    """
    root, written = Path(root), {}
    rng = np.random.default_rng(seed)
    for split, folder, most in (("train", "training", train), ("val", "validation", val)):
        pairs = layout.need(split)
        chosen = sorted(rng.permutation(len(pairs))[:most].tolist())
        for kind in ("images", "annotations"):
            (root / kind / folder).mkdir(parents=True, exist_ok=True)
        done = 0
        for i in chosen:
            photo_path, label_path = pairs[i]
            try:
                photo = open_photo(photo_path, at_least=(2 * size[0], 2 * size[1]))
            except UnreadablePhoto as error:
                print(f"warning: left out {photo_path} ({error.why})")
                continue
            small = _cover(photo, size, Image.Resampling.LANCZOS)
            label = _cover(Image.fromarray(layout.read_label(label_path)), size, Image.Resampling.NEAREST)
            small.save(root / "images" / folder / f"{i:06d}.jpg", quality=92)
            label.save(root / "annotations" / folder / f"{i:06d}.png")
            done += 1
        if not done:
            raise DataError(
                f"no photo of {layout.root / 'images' / folder} can be read",
                f"all {len(chosen)} that were tried are damaged",
                "check the folder",
            )
        written[split] = done
    meta = {"classes": layout.classes, "palette": layout.palette, "ignore": [], "zero_is_ignored": False}
    write_json(root / "dataset.json", meta)
    return written


def _cover(image: Image.Image, size: tuple[int, int], how: Image.Resampling) -> Image.Image:
    """The central part of ``image`` with the aspect ratio of ``size``, scaled to ``size`` (width, height)."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.resize(size, how, box=(left, top, left + width, top + height))
