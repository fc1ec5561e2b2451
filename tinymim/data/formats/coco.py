"""COCO's instances (arXiv 1405.0312): polygons, run lengths and crowds, in one JSON file or one for each split."""

import functools
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np

from tinymim.data.formats.base import FIX, Sample, Source, class_ids, paint, register_format, split_of
from tinymim.errors import DataError
from tinymim.schema import WHOLE, Limits, check, read_large_json

LARGEST = 2 << 30  # bytes of a JSON file; COCO's train2017 has 0.45 GiB
Id = Annotated[int, Limits(-WHOLE, WHOLE)]
Side = Annotated[int, Limits(1, 1 << 16)]


class Category(TypedDict):
    """A class."""

    id: Id
    name: str


class Photo(TypedDict):
    """A photo; height and width in pixels."""

    id: Id
    file_name: str
    height: Side
    width: Side


class Thing(TypedDict):
    """An object; its shape is checked when it is painted."""

    image_id: Id
    category_id: Id
    segmentation: NotRequired[Any]


def json_files(source: Path) -> list[Path]:
    """Files that may be COCO's: the source itself, or those of a folder, its ``annotations`` and its splits."""
    if source.is_file():
        return [source]
    found = [
        p for pattern in ("*.json", "annotations/*.json", "*/_annotations.coco.json") for p in source.glob(pattern)
    ]
    instances = [path for path in found if path.name.startswith("instances_")]
    return sorted(instances or (path for path in found if path.name != "dataset.json"))


def is_coco(folder: Path) -> bool:
    """Whether a folder holds a JSON file with COCO's keys near its start, or of COCO's name."""
    for path in json_files(folder):
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            head = file.read(4096)
        if path.name.startswith("instances_") or path.name == "_annotations.coco.json" or '"file_name"' in head:
            return True
    return False


@register_format("coco", "instances_*.json with its photos: polygons, run lengths, crowds", is_coco)
def read(source: Path, ignore_unlabelled: bool) -> Source:
    """Read every file; crowds are painted as their class."""
    files = [path for path in json_files(source) if _split(path) != "test"]
    if not files:
        raise DataError(
            f"no COCO annotations at {source}",
            "neither it, nor annotations/ in it, holds a .json file",
            "give the .json file, or the folder that holds it and the photos",
        )
    contents = [(path, _load(path)) for path in files]
    categories = contents[0][1]["categories"]
    for path, content in contents[1:]:
        if {c["id"]: c["name"] for c in content["categories"]} != {c["id"]: c["name"] for c in categories}:
            raise DataError(f"{path} has other categories than {files[0]}", "one segmentor learns from both", FIX)
    names = [c["name"] for c in sorted(categories, key=lambda c: c["id"])]
    classes, fill, ids = class_ids(names, files[0], ignore_unlabelled)
    number = {c["id"]: ids[c["name"]] for c in categories}
    samples: list[Sample] = []
    empty = 0
    for path, content in contents:
        split = _split(path) if len(files) > 1 else None
        objects: dict[int, list[Any]] = {photo["id"]: [] for photo in content["images"]}
        for i, thing in enumerate(content["annotations"]):
            if thing["image_id"] not in objects or thing["category_id"] not in number:
                which = "image_id" if thing["image_id"] not in objects else "category_id"
                raise DataError(
                    f"annotations[{i}] of {path}", f"there is nothing with its {which}, {thing[which]}", FIX
                )
            if not (shape := thing.get("segmentation")):
                raise DataError(
                    f"annotations[{i}] of {path} has no mask",
                    "it is a box only, and a box does not say which of its pixels are the object",
                    "export instance segmentation; boxes train a detector: tinymim detect --annotations FILE",
                )
            if not isinstance(shape, dict) and not (
                isinstance(shape, list) and all(isinstance(p, list) for p in shape)
            ):
                raise DataError(f"annotations[{i}].segmentation of {path}", "neither polygons nor run lengths", FIX)
            objects[thing["image_id"]].append((number[thing["category_id"]], shape))
        folder = _photo_folder(path, source, content["images"])
        for photo in content["images"]:
            size, found = (photo["height"], photo["width"]), objects[photo["id"]]
            if not found and ignore_unlabelled:
                empty += 1
                continue
            ids_of = functools.partial(_ids, size, fill, found, f"{path}, {photo['file_name']}")
            name = PurePosixPath(photo["file_name"]).with_suffix("").as_posix()
            samples.append(Sample(folder / photo["file_name"], name, split, ids_of))
    notes = ["where objects overlap, the smaller one is on top; crowds are painted as their class"]
    notes += [f"{empty} photos without objects are left out"] * bool(empty)
    return Source(samples, classes, None, notes)


def _split(file: Path) -> str | None:
    """By the name of a file, or (Roboflow) of its folder."""
    return split_of(file.parent.name if file.name == "_annotations.coco.json" else file.stem)


def _ids(size: tuple[int, int], fill: int, objects: list[Any], where: str) -> np.ndarray:
    try:
        return paint(size, fill, objects, where)
    except (TypeError, ValueError) as error:  # points that are no numbers
        raise DataError(f"an object of {where}", f"neither polygons nor run lengths ({error})", FIX) from None


def _load(path: Path) -> dict[str, Any]:
    content = read_large_json(path, LARGEST, fix=FIX)
    lists = {"images": Photo, "annotations": Thing, "categories": Category}
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise DataError(
            f"{path} is not in COCO's format", "it is no object with images, annotations and categories", "give another"
        )
    if any(isinstance(each, dict) and "segments_info" in each for each in content["annotations"][:1]):
        raise DataError(
            f"{path} is COCO's panoptic format",
            "its masks are the colours of PNG files",
            "give the instances file of the same photos (instances_*.json), or convert it with panopticapi first",
        )
    for key, shape in lists.items():
        for i, each in enumerate(content[key]):
            check(each, shape, f"{path}, {key}[{i}]", fix=FIX)
        ids = [each["id"] for each in content[key]] if key != "annotations" else []
        if len(set(ids)) < len(ids):
            raise DataError(f"{key} of {path}", "each needs an id of its own", FIX)
    if not content["images"]:
        raise DataError(f"{path} has no images", "its list is empty", "give a file with photos")
    return content


def _photo_folder(path: Path, source: Path, photos: list[Photo]) -> Path:
    """The folder that the names of a file are relative to.

    Raises:
        DataError: a name leads out of it, or photos are missing.
    """
    if wrong := [
        p["file_name"] for p in photos if {"..", "/"} & {*PurePosixPath(p["file_name"]).parts} or not p["file_name"]
    ]:
        raise DataError(f"a photo of {path}", f"{wrong[0]!r} is no name below a folder", FIX)
    root = source if source.is_dir() else path.parent
    words = path.stem.removeprefix("instances_")
    below = ("", words, "images", f"images/{words}", "photos", "JPEGImages", "data")
    places = [top / each for top in (path.parent, root, root.parent) for each in below]
    missing = {
        at: [p["file_name"] for p in photos if not (at / p["file_name"]).is_file()] for at in dict.fromkeys(places)
    }
    best = min(missing, key=lambda at: len(missing[at]))
    if missing[best]:
        raise DataError(
            f"{len(missing[best])} of {len(photos)} photos of {path} are not found",
            f"e.g. {missing[best][0]}; looked in {path.parent}, images/, {words}/ and the like",
            "put the photos into images/ beside the file",
        )
    return best
