"""``dataset.json``: the names, colours and ignored ids of a labelled folder. Standard library only."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tinymim.errors import DataError

Palette = tuple[tuple[int, int, int], ...]
LARGEST_ID = 65535  # of a 16-bit label
MOST_CLASSES = 254  # ids of 8-bit labels, without 255
_BYTES = 1 << 20  # of the file: 254 names and colours are a few thousand
_EXAMPLE = '{"classes": ["road", "car"], "palette": [[128, 64, 128], [64, 0, 128]], "ignore": [11]}'


class Meaning(NamedTuple):
    """What the ids of a folder's labels mean.

    Attributes:
        classes: Names, in the order of the ids.
        palette: RGB of each class, 0 to 255; None: not given.
        ignore: Ids that do not count.
        zero_is_ignored: Whether the classes start at id 1.
        ignore_palette: RGB of the pixels of label files in colours that do not count.
    """

    classes: tuple[str, ...]
    palette: Palette | None
    ignore: tuple[int, ...]
    zero_is_ignored: bool
    ignore_palette: Palette = ()

    @property
    def colour_ids(self) -> tuple[tuple[tuple[int, int, int], int], ...]:
        """(RGB, id) of label files in colours; 255 is what does not count. None without a palette."""
        first, void = int(self.zero_is_ignored), ((colour, 255) for colour in self.ignore_palette)
        return (*((colour, i) for i, colour in enumerate(self.palette, first)), *void) if self.palette else ()


def read_meaning(path: str | Path) -> Meaning:
    """Read and check a ``dataset.json`` (UTF-8, with or without a byte order mark).

    Raises:
        DataError: it is no JSON, or any entry is unknown, given twice, of the wrong type or out of range.
    """
    path = Path(path)
    try:
        return _meaning(path)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot use {path}", str(error), f"write it like {_EXAMPLE}") from error


def _meaning(path: Path) -> Meaning:
    if path.stat().st_size > _BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes, a dataset.json a few thousand")
    try:
        found: Any = json.loads(path.read_text("utf-8-sig"), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError('it has no list of "classes"')
    known = {"classes": list, "palette": list, "ignore": list, "zero_is_ignored": bool, "ignore_palette": list}
    known |= {"name": str, "description": str}
    if unknown := sorted(set(found) - set(known)):
        raise ValueError(f"unknown entries: {', '.join(unknown)}")
    for key, kind in known.items():
        if not isinstance(found.get(key, kind()), kind) and not (key == "palette" and found[key] is None):
            words = {list: "a list", bool: "true or false", str: "a text"}
            raise ValueError(f'"{key}" is {json.dumps(found[key])[:60]}, not {words[kind]}')
    classes, ignore = found.get("classes", []), found.get("ignore", [])
    _check_classes(classes)
    if wrong := [v for v in ignore if not _is_number(v, LARGEST_ID)]:
        raise ValueError(f'"ignore" is a list of ids from 0 to {LARGEST_ID}, not {json.dumps(wrong[0])[:60]}')
    palette, zero = found.get("palette"), found.get("zero_is_ignored", False)
    if palette is not None and not (len(palette) == len(classes) and all(map(_is_colour, palette))):
        raise ValueError(f'"palette" needs one [red, green, blue] of 0 to 255 for each of the {len(classes)} classes')
    void = found.get("ignore_palette", [])
    if not all(map(_is_colour, void)):
        raise ValueError('"ignore_palette" is a list of [red, green, blue] of 0 to 255')
    if both := [colour for colour in void if colour in (palette or [])]:
        raise ValueError(f'the colour {both[0]} stands in "palette" and in "ignore_palette"')
    if {*range(zero, len(classes) + zero)} <= {*ignore}:
        raise ValueError('"ignore" lists the id of every class, so no pixel would count')
    if len(classes) == 1:
        raise ValueError(f"its only class is {classes[0]!r}; name the background, too, e.g. as class 0")
    colours = None if palette is None else _colours(palette)
    return Meaning(tuple(classes), colours, tuple(ignore), zero, _colours(void))


def _colours(found: list[Any]) -> Palette:
    return tuple((c[0], c[1], c[2]) for c in found)


def _check_classes(classes: list[Any]) -> None:
    """Refuse names that cannot head the rows of a table, or too few or too many of them."""
    if not classes:
        raise ValueError('it has no list of "classes"')
    for i, name in enumerate(classes):
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ValueError(f'"classes": number {i} is {json.dumps(name)[:60]}, which is no name')
    if twice := [name for name in classes if classes.count(name) > 1]:
        raise ValueError(f'"classes" has {twice[0]!r} twice; results have one row for each name')
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"{len(classes)} classes do not fit 8-bit labels ({MOST_CLASSES} at most)")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys occur once."""
    keys = [key for key, _ in pairs]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f'it has "{twice[0]}" twice')
    return dict(pairs)


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_number(v, 255) for v in value)


def _is_number(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest
