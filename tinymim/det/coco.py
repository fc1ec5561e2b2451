"""Labelled objects in COCO's format (arXiv 1405.0312): one JSON file and a folder of photos.

Legend: M = objects of a photo, H, W = height and width in pixels, S = side of a training crop.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import masks_to_boxes

from tinymim.data.photos import open_near, read_photo, to_tensor
from tinymim.errors import DataError, TinyMIMError
from tinymim.schema import read_large_json

LARGEST = 2 << 30  # bytes of a JSON file; COCO's train2017 has 0.45 GiB
FIX = "write it again with the tool that made it, or correct it"
FLIP = 0.5


@dataclass(frozen=True)
class Item:
    """A photo with its objects.

    Attributes:
        id: Of the JSON file.
        path: File.
        size: Height and width that the JSON file tells.
        boxes: Left, top, right, bottom in pixels.
        labels: Class ids from 1.
        shapes: Polygons or run lengths of the masks, None where an object has none.
        crowd: Whether an object is a crowd: left out of training.
    """

    id: int
    path: Path
    size: tuple[int, int]
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]
    shapes: tuple[Any, ...]
    crowd: tuple[bool, ...]


@dataclass
class Coco:
    """A checked JSON file.

    Attributes:
        file: The JSON file.
        classes: Names, in the order of their category ids; label i + 1 is class i.
        items: Photos, those without objects among them.
        categories: Category id -> label.
        content: What the file holds, for pycocotools.
        notes: What was left out.
    """

    file: Path
    classes: list[str]
    items: list[Item]
    categories: dict[int, int]
    content: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def with_masks(self) -> bool:
        """Whether every object has a mask."""
        return all(shape is not None for item in self.items for shape in item.shapes)

    def __str__(self) -> str:
        objects = sum(len(item.labels) for item in self.items)
        text = f"{self.file}: {len(self.items)} photos, {objects} objects of {len(self.classes)} classes"
        return "\n".join([text, *(f"note: {note}" for note in self.notes)])


def read_coco(
    file: str | Path, photos: str | Path, *, classes: Sequence[str] | None = None, option: str = "--annotations"
) -> Coco:
    """Read and check a JSON file.

    Args:
        file: The JSON file.
        photos: Folder of its photos.
        classes: The classes that it must have, e.g. those of training.
        option: The option that named the file, for errors.

    Raises:
        DataError: no such file, not in COCO's format, no photo, photos that are not in the folder, an object of an
            unknown photo or category, or other classes.
    """
    file, photos = Path(file), Path(photos)
    content = _load(file, option)
    categories = _table(content, "categories", file)
    names = [str(category.get("name", "")) for _, category in sorted(categories.items())]
    labels = {number: i for i, number in enumerate(sorted(categories), 1)}
    if not names or not all(names) or len(set(names)) < len(names):
        raise DataError(f"the categories of {file}", "each needs a name of its own", FIX)
    if classes is not None and names != [*classes]:
        raise DataError(
            f"{file} has the classes {', '.join(names[:6])}",
            f"the detector knows {', '.join([*classes][:6])}",
            "use a file with the same categories in the same order",
        )
    images = _table(content, "images", file)
    if not images:
        raise DataError(f"{file} has no images", "its list is empty", f"give a file with photos: {option} FILE.json")
    paths = {number: _photo(photos, image, file) for number, image in images.items()}
    missing = [path for path in paths.values() if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} photos of {file} are not in {photos}",
            f"e.g. {missing[0].relative_to(photos)}",
            "name the folder that the file's names are relative to",
        )
    found: dict[int, list[Any]] = {number: [] for number in images}
    left_out = 0
    for number, note in enumerate(_list(content, "annotations", file)):
        image, category = note.get("image_id"), note.get("category_id")
        if image not in images or category not in labels:
            which, value = ("image", image) if image not in images else ("category", category)
            raise DataError(f"annotations[{number}] of {file}", f"there is no {which} with the id {value!r}", FIX)
        box = note.get("bbox")
        if not isinstance(box, list) or not _is_box(box):
            raise DataError(
                f"annotations[{number}].bbox of {file}", f"{str(box)[:60]} is not left, top, width, height", FIX
            )
        if box[2] < 1 or box[3] < 1:
            left_out += 1
            continue
        corners = float(box[0]), float(box[1]), float(box[0] + box[2]), float(box[1] + box[3])
        shape = _shape(note.get("segmentation"), f"annotations[{number}].segmentation of {file}")
        found[image].append((corners, labels[category], shape, bool(note.get("iscrowd", 0))))
    items = []
    for number, objects in found.items():
        size = int(images[number]["height"]), int(images[number]["width"])
        boxes, labels_of, shapes, crowd = zip(*objects, strict=True) if objects else ((), (), (), ())
        items.append(Item(number, paths[number], size, boxes, labels_of, shapes, crowd))
    notes = [f"{left_out} objects narrower than a pixel are left out"] * bool(left_out)
    return Coco(file, names, items, labels, content, notes)


def _load(file: Path, option: str) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(f"no annotations at {file}", "there is no such file", f"{option} FILE.json in COCO's format")
    content = read_large_json(file, LARGEST, fix=FIX)
    if not isinstance(content, dict):
        raise DataError(f"{file} is not in COCO's format", "it is no object", FIX)
    return content


def _list(content: Mapping[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    rows = content.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{file} is not in COCO's format",
            f"{key!r} is no list of objects",
            "it has images, annotations and categories",
        )
    return rows


def _table(content: Mapping[str, Any], key: str, file: Path) -> dict[int, dict[str, Any]]:
    rows = _list(content, key, file)
    found = {row.get("id"): row for row in rows}
    if len(found) < len(rows) or not all(type(number) is int for number in found):
        raise DataError(f"{key} of {file}", "each needs a whole number of its own as id", FIX)
    return found  # type: ignore[return-value]


def _photo(folder: Path, image: Mapping[str, Any], file: Path) -> Path:
    name, sides = image.get("file_name"), [image.get(side) for side in ("height", "width")]
    inside = isinstance(name, str) and name and not {"..", "/"} & {*PurePosixPath(name).parts}
    if not inside or not all(type(x) is int and 0 < x < 1 << 16 for x in sides):
        raise DataError(
            f"image {image.get('id')} of {file}",
            f"file_name={str(name)[:60]!r}, height and width {sides}",
            "a name below the folder of photos, and whole numbers of pixels, are needed",
        )
    return folder / str(name)


def _is_box(box: list[Any]) -> bool:
    numbers = len(box) == 4 and all(type(x) in (int, float) for x in box)
    return numbers and bool(np.isfinite(box).all()) and max(abs(x) for x in box) < 1 << 16


def _shape(value: Any, place: str) -> Any:
    """Polygons, or run lengths; None where there are none."""
    if value is None or value == []:
        return None
    polygons = isinstance(value, list) and all(
        isinstance(row, list) and len(row) >= 6 and not len(row) % 2 and np.isfinite(row).all() for row in value
    )
    runs = isinstance(value, dict) and isinstance(value.get("counts"), list | str) and len(value.get("size") or ()) == 2
    if not polygons and not runs:
        raise DataError(place, "neither polygons of three points or more nor run lengths", FIX)
    return value


def tools() -> Any:
    """pycocotools' ``mask`` module.

    Raises:
        TinyMIMError: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise TinyMIMError(
            "detection needs pycocotools", "it is not installed", 'pip install pycocotools, or pip install -e ".[det]"'
        ) from None
    return mask


def run_lengths(shape: Any, size: tuple[int, int]) -> dict[str, Any]:
    """A mask as pycocotools' compressed run lengths.

    Raises:
        DataError: run lengths of another size.
    """
    mask = tools()
    if isinstance(shape, list):
        return mask.merge(mask.frPyObjects(shape, *size))
    if tuple(shape["size"]) != size:
        raise DataError(f"run lengths of {shape['size']}", f"the photo has {[*size]}", FIX)
    return mask.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape


def open_labelled(item: Item) -> Image.Image | None:
    """A photo as its labels see it, RGB: a turn that the file asks for (EXIF) is left out where they do; None: damaged.

    Raises:
        DataError: it has other proportions than the JSON file says.
    """
    photo = read_photo(item.path)
    height, width = item.size
    if photo is not None and height != width and photo.size == (height, width):
        with Image.open(item.path) as raw:
            photo = raw.convert("RGB")
    if photo is not None and abs(photo.width * height - photo.height * width) > max(height, width, *photo.size):
        raise DataError(
            f"{item.path} has {photo.width} x {photo.height} pixels",
            f"its annotations say {width} x {height}",
            "annotate the photos as they are",
        )
    return photo


class CocoPhotos(Dataset[dict[str, Any]]):
    """Training crops with their objects: scaled, cropped or padded to a square, mirrored.

    Large-scale jitter (arXiv 2012.07177): the longer side becomes S times a factor; what is larger than S x S is
    cropped at random, what is smaller is padded with black at the right and the bottom.

    Args:
        items: Photos; those without objects but crowds are left out.
        size: S.
        scale: Smallest and largest factor.
        masks: Whether masks are read.
        seed: Fixes, with epoch and index, all random numbers.

    The key of an item is ``(epoch, index)``; the item is ``image`` (3, S, S) from 0 to 1, ``target`` with ``boxes``
    (M, 4), ``labels`` (M,) and ``masks`` (M, S, S) uint8, and ``skipped``, the damaged photos that it stands for.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        size: int,
        scale: tuple[float, float] = (0.1, 2.0),
        masks: bool = True,
        seed: int = 0,
    ) -> None:
        self.items = [item for item in items if not all(item.crowd)]
        self.paths = [item.path for item in self.items]
        self.item_at = {item.path: item for item in self.items}
        self.size, self.scale, self.masks, self.seed = size, scale, masks, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        epoch, index = key
        photo, at, skipped = open_near(self.paths, index, lambda path: open_labelled(self.item_at[path]))
        item, rng = self.items[at], random.Random(f"{self.seed}/{epoch}/{index}")
        S, (width, height) = self.size, photo.size
        factor = S / max(width, height) * rng.uniform(*self.scale)
        w, h = max(round(width * factor), 1), max(round(height * factor), 1)
        left, top = rng.randint(0, max(w - S, 0)), rng.randint(0, max(h - S, 0))
        flip = rng.random() < FLIP
        scaled = photo.resize((w, h), Image.Resampling.BILINEAR)
        image = to_tensor(self._place(scaled, left, top, flip)).float() / 255
        kept = [i for i, crowd in enumerate(item.crowd) if not crowd]
        scale = torch.tensor([w / item.size[1], h / item.size[0]] * 2)
        boxes = torch.tensor([item.boxes[i] for i in kept]).view(-1, 4) * scale
        boxes = (boxes - torch.tensor([left, top] * 2)).clamp(0, S)
        if flip:
            boxes = torch.stack([S - boxes[:, 2], boxes[:, 1], S - boxes[:, 0], boxes[:, 3]], dim=1)
        target: dict[str, Tensor] = {"boxes": boxes, "labels": torch.tensor([item.labels[i] for i in kept])}
        if self.masks:
            masks = [self._mask(item, i, (w, h), left, top, flip) for i in kept]
            target["masks"] = torch.stack(masks)
            seen = torch.tensor([bool(mask.any()) for mask in masks])
            target = {name: x[seen] for name, x in target.items()}
            if seen.any():  # what a crop leaves of an object is seldom as wide as what it leaves of its box
                target["boxes"] = masks_to_boxes(target["masks"]) + torch.tensor([0, 0, 1, 1])
        wide = (target["boxes"][:, 2:] - target["boxes"][:, :2] >= 1).all(dim=1)
        return {"image": image, "target": {name: x[wide] for name, x in target.items()}, "skipped": skipped}

    def _place(self, image: Image.Image, left: int, top: int, flip: bool) -> Image.Image:
        """The square; what lies outside the image is black."""
        out = image.crop((left, top, left + self.size, top + self.size))
        return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else out

    def _mask(self, item: Item, i: int, scaled: tuple[int, int], left: int, top: int, flip: bool) -> Tensor:
        mask = Image.fromarray(tools().decode(run_lengths(item.shapes[i], item.size)))
        return torch.from_numpy(np.array(self._place(mask.resize(scaled, Image.Resampling.NEAREST), left, top, flip)))

    @staticmethod
    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Photos stacked, objects as a list of dicts, lists of damaged photos joined."""
        return {
            "image": torch.stack([sample["image"] for sample in samples]),
            "target": [sample["target"] for sample in samples],
            "skipped": [path for sample in samples for path in sample["skipped"]],
        }
