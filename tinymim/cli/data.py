"""``tinymim data``: look at a folder before training, split or convert it, or pack its photos into .tar shards."""

import argparse
import os
import re
import shlex
from pathlib import Path

from tinymim.cli import spelled

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SHOWN = 30  # classes of the printed table
FORMATS = ("cityscapes", "coco", "labelme", "rgb-masks", "voc", "yolo-seg")  # of tinymim.data.formats
ONLY = {  # option -> the options that it needs one of
    "seed": ("split", "format"),
    "copy": ("split", "format"),
    "unlabelled": ("format",),
    "max_size": ("pack",),
    "img_size": ("pack",),
    "quality": ("pack",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="photos, with labels or without: what is in it")
    parser.add_argument("--page", metavar="FILE", default=None, help="where the page goes; default data.html")
    parser.add_argument(
        "--ignore-label",
        type=int,
        nargs="+",
        metavar="ID",
        help="ids to ignore besides 255, for folders without dataset.json",
    )
    parser.add_argument(
        "--reduce-zero-label",
        action=argparse.BooleanOptionalAction,
        help="id 0 means no class, for folders without dataset.json",
    )
    parser.add_argument("--out", metavar="NEW", help="new folder for what --split, --from or --pack writes")
    new = parser.add_argument_group("into the layout that training reads")
    new.add_argument(
        "--split",
        type=float,
        metavar="SHARE",
        help="of validation photos: photos and labels of the same names, e.g. 0.2",
    )
    new.add_argument("--from", dest="format", choices=FORMATS, help="data of another format")
    new.add_argument("--seed", type=int, default=None, help="of the choice of validation photos; default 0")
    new.add_argument("--copy", action="store_true", help="copy photos; default hard links where the disk has them")
    new.add_argument(
        "--unlabelled",
        choices=("background", "ignore"),
        default=None,
        help="pixels of no object are a class, or do not count; default background",
    )
    shards = parser.add_argument_group("into shards")
    shards.add_argument(
        "--pack", metavar="FOLDER", help="write the photos of FOLDER, searched recursively, as .tar shards"
    )
    shards.add_argument("--max-size", default=None, metavar="SIZE", help="most bytes of a shard; default 512MB")
    shards.add_argument(
        "--img-size",
        type=int,
        default=None,
        metavar="PIXELS",
        help="make photos with a longer side smaller, as JPEGs; default: every file as it is",
    )
    shards.add_argument("--quality", type=int, default=None, help="of these JPEGs, 1 to 100; default 90")


def run(args: argparse.Namespace) -> int:
    """Do what the options say, and print what to type next."""
    from tinymim.errors import ConfigError

    for name, needs in ONLY.items():
        if getattr(args, name) not in (None, False) and all(getattr(args, need) is None for need in needs):
            words = " or ".join("--from" if need == "format" else f"--{need}" for need in needs)
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"{option} without {words}", "it says how that is done", f"add {words}, or leave {option} out"
            )
    if args.pack is not None and (given := [args.folder, args.split, args.format]) != [None] * len(given):
        raise ConfigError("--pack and other work", "it is done alone", "tinymim data --pack FOLDER --out SHARDS")
    if args.pack is None and args.folder is None:
        raise ConfigError(
            "nothing to do",
            "FOLDER or --pack is missing",
            "tinymim data FOLDER, or tinymim data --pack FOLDER --out SHARDS",
        )
    writes = next((f"--{name}" for name in ("pack", "split") if getattr(args, name) is not None), None)
    writes = "--from" if args.format else writes
    if (writes is None) != (args.out is None):
        missing = "--split, --from or --pack" if writes is None else "--out"
        raise ConfigError("nothing to do", f"{missing} is missing", f"add {missing}")
    options = ["page", "reduce_zero_label", *(["ignore_label"] if writes != "--split" else [])]
    if writes and (other := spelled(args, *options)):
        raise ConfigError(
            f"{writes} and{other}", "the new folder is looked at by the next command", f"leave{other} out"
        )
    if args.pack is not None:
        return _pack(args)
    return _look(args) if writes is None else _convert(args)


def _look(args: argparse.Namespace) -> int:
    """Print what is in a folder and write the page; 1 if training would refuse it."""
    from tinymim.data.examine import examine
    from tinymim.data.folders import SPLITS
    from tinymim.errors import ConfigError
    from tinymim.files import writable
    from tinymim_export.report.data_page import data_page

    page = Path(args.page or "data.html")
    if page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--page {page}", "it is a page in HTML", f"e.g. --page {page.with_suffix('.html')}")
    if page.is_dir():
        raise ConfigError(f"{page} is a folder", "the page would be a file there", "choose another --page")
    above = next(folder for folder in page.absolute().parents if folder.exists())
    if not os.access(above, os.W_OK):
        raise ConfigError(f"cannot write {page}", f"{above} may not be written to", "choose another --page")
    found = examine(args.folder, ignore_label=args.ignore_label, reduce_zero_label=args.reduce_zero_label)
    print(writable(found.summary))
    splits = [*found.pairs]
    if found.classes:
        heads = [SPLITS.get(split, "labelled") for split in splits]
        width = max(map(len, ["class", *(row.name for row in found.classes)]))
        print("  ".join([f"{'class':{width}}", *(f"{head + ' %':>12}  {'photos':>7}" for head in heads)]))
        for row in found.classes[:SHOWN]:
            cells = (f"{100 * row.shares[split]:12.2f}  {row.photos[split]:7d}" for split in splits)
            print("  ".join([f"{row.name:{width}}", *cells]))
        if len(found.classes) > SHOWN:
            print(f"and {len(found.classes) - SHOWN} more classes, on the page")
        print(
            "ignored: "
            + ", ".join(f"{100 * found.ignored[s]:.1f} % of {head}" for s, head in zip(splits, heads, strict=True))
        )
    sizes = [f"{w} x {h} ({count})" for (w, h), count in found.sizes.most_common(5)]
    print("sizes:   " + ", ".join(sizes) + (f" and {len(found.sizes) - 5} more" if len(found.sizes) > 5 else ""))
    if found.kinds:
        print("labels:  " + ", ".join(f"{count} {kind}" for kind, count in found.kinds.most_common()))
    for note in found.notes:
        print(f"note:    {writable(note)}")
    for error in found.problems:
        print(f"refused: {writable(str(error))}")
    lines = found.next_lines(spelled(args, "ignore_label", "reduce_zero_label"))
    print(f"page:    {data_page(found, page, lines)}")
    for line in lines:
        print(f"next:    {writable(line)}")
    return 1 if found.problems else 0


def _convert(args: argparse.Namespace) -> int:
    """Write a new folder, and print what is in it."""
    from tinymim.data.convert import convert, split_folder
    from tinymim.files import writable

    seed = args.seed or 0
    if args.format is None:
        done = split_folder(
            args.folder, args.out, share=args.split, seed=seed, ignore=args.ignore_label or (), copy=args.copy
        )
    else:
        done = convert(
            args.folder,
            args.format,
            args.out,
            share=args.split,
            seed=seed,
            ignore_unlabelled=args.unlabelled == "ignore",
            copy=args.copy,
        )
    for note in done.notes:
        print(f"note: {writable(note)}")
    photos = len(done.layout.train) + len(done.layout.val)
    print(f"written: {writable(str(done.layout))}")
    print(f"photos:  {done.linked} hard links, {photos - done.linked} copies")
    print(f"next:    tinymim data {shlex.quote(args.out)}")
    return 0


def _pack(args: argparse.Namespace) -> int:
    """Pack, and print what to type next."""
    from tinymim.data.pack import QUALITY, pack
    from tinymim.errors import ConfigError

    if args.quality is not None and args.img_size is None:
        raise ConfigError(
            "--quality without --img-size", "files are packed as they are", "add --img-size, or leave --quality out"
        )
    done = pack(
        args.pack,
        args.out,
        max_size=_bytes(args.max_size or "512MB"),
        img_size=args.img_size,
        quality=QUALITY if args.quality is None else args.quality,
    )
    for path in done.left_out[:5]:
        print(f"warning: left out {path}, which cannot be read")
    if len(done.left_out) > 5:
        print(f"warning: {len(done.left_out) - 5} more left out")
    megabytes = f"{done.read / 1e6:.1f} MB of photos, {done.written / 1e6:.1f} MB of shards"
    print(f"packed:  {done.out}: {done.photos} photos in {done.shards} shard(s), {megabytes}, read back and equal")
    shards = shlex.quote(str(done.out))
    print(f"next:    tinymim distill --recipe tinymim_tiny_from_mae_base --data {shards} --out runs/packed")
    return 0


def _bytes(text: str) -> int:
    """Bytes of a size like "512MB"."""
    from tinymim.errors import ConfigError

    match = re.fullmatch(r"(\d{1,12})\s*([KMG]?B?)", text.strip().upper())
    if match is None or (unit := match[2] if match[2].endswith("B") or not match[2] else match[2] + "B") not in UNITS:
        raise ConfigError(f"--max-size {text}", "it is a number of bytes", "e.g. --max-size 512MB")
    return int(match[1]) * UNITS[unit]
