"""One picture of the same photos through the files of several segmentors: a column a photo, a row a file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tinymim.data.folders import read_layout
from tinymim_export.runtime.pictures import colour_table, save_picture
from tinymim_export.runtime.predictor import Predictor, read_photo

THUMB = (160, 120)  # pixels, width and height
SIDE = 170  # pixels, the column of names
COUNT = 10


def save_pictures(files: Mapping[str, Path], data_root: str | Path, path: Path, count: int = COUNT) -> None:
    """Write the picture: photos, their labels, and the masks of every file.

    Args:
        files: Name -> .onnx file, from the top.
        data_root: Labelled folder; photos are taken at equal distances from its validation split.
        path: A PNG.
        count: Number of photos.
    """
    layout = read_layout(data_root)
    pairs = [layout.val[len(layout.val) * i // count] for i in range(min(count, len(layout.val)))]
    photos = [read_photo(photo) for photo, _ in pairs]
    colours = colour_table(layout.palette)
    rows = {"photo": photos, "label": [colours[layout.read_label(label)] for _, label in pairs]}
    for name, file in files.items():
        predictor = Predictor(file)
        rows[name] = [colours[predictor.mask(photo)] for photo in photos]
    sheet = Image.new("RGB", (SIDE + THUMB[0] * len(pairs), THUMB[1] * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (name, pictures) in enumerate(rows.items()):
        draw.text((6, THUMB[1] * y + THUMB[1] // 2), name, fill="black", font_size=14)
        for x, picture in enumerate(pictures):
            small = Image.fromarray(np.ascontiguousarray(picture)).resize(
                THUMB, Image.Resampling.BICUBIC if name == "photo" else Image.Resampling.NEAREST
            )
            sheet.paste(small, (SIDE + THUMB[0] * x, THUMB[1] * y))
    save_picture(sheet, path)
