"""Segment one photo with a .onnx file of tinymim-export. Needs numpy, Pillow and onnxruntime, nothing else.

    python segment_photo.py model.onnx photo.jpg     ->  photo_mask.png (class ids), photo_overlay.png

The file's metadata define resizing, normalisation and classes. Whole photos only, no sliding windows.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps


def steps(have, want, at, clamp):
    """For one side: two source indices and two weights for every target pixel, whose source position is ``at``."""
    first = np.floor(at).astype(int)
    part = at - first.astype(np.float32)
    part[(first < 0) | (first >= have - 1)] *= not clamp
    return np.clip(first, 0, have - 1), np.clip(first + 1, 0, have - 1), np.float32(1) - part, part


def resize_photo(photo, height, width):
    """OpenCV's bilinear resize, bit for bit: 11-bit weights, two roundings."""
    H, W = photo.shape[:2]
    if photo.shape[:2] == (2 * height, 2 * width):
        return ((photo.reshape(height, 2, width, 2, 3).sum((1, 3), dtype=int) + 2) >> 2).astype(np.uint8)
    at = [((np.arange(n) + 0.5) * (1 / (n / m)) - 0.5).astype(np.float32) for n, m in ((height, H), (width, W))]
    top, bottom, *down = steps(H, height, at[0], clamp=False)
    left, right, *across = steps(W, width, at[1], clamp=True)
    down, across = ([np.rint(w * 2048).astype(int) for w in weights] for weights in (down, across))
    rows = (photo[:, left] * across[0][:, None] + photo[:, right] * across[1][:, None]) >> 4
    upper, lower = (rows[i] * w[:, None, None] >> 16 for i, w in zip((top, bottom), down, strict=True))
    return ((upper + lower + 2) >> 2).astype(np.uint8)


def resize_logits(logits, height, width, align_corners):
    """PyTorch's bilinear interpolation."""
    for axis, want in ((2, width), (1, height)):
        have, i = logits.shape[axis], np.arange(want, dtype=np.float32)
        scale = np.float32((have - 1) / max(want - 1, 1) if align_corners else have / want)
        at = i * scale if align_corners else np.maximum((i + np.float32(0.5)) * scale - np.float32(0.5), 0)
        a, b, of_a, of_b = steps(have, want, at, clamp=True)
        shape = (-1, 1) if axis == 1 else (-1,)
        logits = logits.take(a, axis) * of_a.reshape(shape) + logits.take(b, axis) * of_b.reshape(shape)
    return logits


def main(file, path):
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    metadata = {key[8:]: json.loads(value) for key, value in metadata.items() if key.startswith("tinymim.")}
    rule, given = metadata.get("resize") or {}, session.get_inputs()[0]
    if metadata.get("part") != "segmentor" or any(rule.get(word) for word in ("pad", "multiple", "float")):
        sys.exit("the file prepares photos in more steps, or is no segmentor of tinymim-export: use tinymim predict")
    photo = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    size, scale = photo.shape[:2], rule.get("scale")
    wanted = scale[::-1] if scale else size
    if scale and rule["keep_ratio"]:
        factor = min(max(scale) / max(size), min(scale) / min(size))
        wanted = (int(side * factor + 0.5) for side in size)
    sides = [side if isinstance(side, int) else free for side, free in zip(given.shape[2:], wanted, strict=True)]
    image = resize_photo(photo, *sides)  # a file with a fixed size: the photo is stretched to it
    if given.type != "tensor(uint8)":
        image = (image.astype(np.float32) - np.float32(metadata["mean"])) / np.float32(metadata["std"])
    result = session.run(None, {given.name: np.ascontiguousarray(image.transpose(2, 0, 1)[None])})[0][0]
    if result.ndim == 2:  # the file returns a mask
        ys, xs = (np.arange(want) * have // want for have, want in zip(result.shape, size, strict=True))
        mask = result[ys[:, None], xs]
    else:
        logits = resize_logits(result, *size, rule.get("align_corners", False))
        mask = logits.argmax(0) if len(logits) > 1 else 1 / (1 + np.exp(-logits[0])) > (rule.get("threshold") or 0.3)
    out = Path(path).with_suffix("")
    picture = Image.fromarray(mask.astype(np.uint8))
    picture.putpalette(np.uint8(metadata["palette"]).tobytes())
    picture.save(f"{out}_mask.png")
    Image.blend(Image.fromarray(photo), picture.convert("RGB"), 0.5).save(f"{out}_overlay.png")
    for name, count in zip(metadata["classes"], np.bincount(np.ravel(picture), minlength=256), strict=False):
        print(f"{100 * count / mask.size:5.1f} %  {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
