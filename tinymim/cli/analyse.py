"""``tinymim analyse``: similarity of blocks, attention and effective rank of one model or two, on one page."""

import argparse
import shlex
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="one or two: timm/NAME, a student.pth or another checkpoint; a name of tinymim list: random weights",
    )
    add("--photos", required=True, metavar="PHOTOS", help="a folder, a quoted pattern, shards")
    add("--weights", nargs="+", default=[], metavar="FILE", help='of timm/NAME, one for each model, "-" for none')
    add("--heads", nargs="+", type=int, default=[], metavar="N", help="per block, for files that do not tell; 0: none")
    add("--img-size", type=int, default=224, metavar="S", help="side of the first model's photos, pixels")
    add("--limit", type=int, default=200, metavar="N", help="use this many of the photos, evenly spread")
    add("--batch-size", type=int, default=32, metavar="B", help="photos of a mini-batch of CKA")
    add("--out", default="analysis.html", metavar="FILE.html", help="page to write")
    add("--json", metavar="FILE", help="write the numbers")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write the page."""
    from tinymim.analysis import analyse
    from tinymim.errors import ConfigError
    from tinymim_export.report.analysis_page import write_analysis
    from tinymim_export.report.lineage_report import checked_out

    if len(args.models) > 2:
        raise ConfigError(
            f"{len(args.models)} models",
            "a page shows one or two",
            "name two; for one teacher and several students: python tools/what_was_transferred.py",
        )
    for option, given in (("--weights", args.weights), ("--heads", args.heads)):
        if len(given) > len(args.models):
            raise ConfigError(f"{option} names {len(given)}", f"there are {len(args.models)} models", "one for each")
    page = checked_out(args.out)
    result = analyse(
        *args.models,
        photos=args.photos,
        weights=tuple(None if file == "-" else file for file in args.weights),
        heads=tuple(number or None for number in args.heads),
        img_size=args.img_size,
        limit=args.limit,
        batch_size=args.batch_size,
    )
    result.print()
    if args.json:
        result.to_json(args.json)
    line = _next(args)
    print(f"page: {write_analysis(result.to_dict(), page, line)}")
    print(f"next: {line}")
    return 0


def _next(args: argparse.Namespace) -> str:
    """One model: beside the usual teacher; two: a segmentor on the first that is a file."""
    from tinymim.cli._next import segment_line

    file = next((word for word in args.models if Path(word).is_file()), None)
    if len(args.models) == 2 and file:
        return segment_line(file)
    first = shlex.quote(args.models[0])
    return f"tinymim analyse {first} tinymim_vit_tiny --photos {shlex.quote(args.photos)} --out compared.html"
