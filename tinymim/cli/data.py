"""``tinymim data``: photos packed into .tar shards, which every ``--data`` of photos reads."""

import argparse
import re
import shlex

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "--pack", metavar="FOLDER", help="write the photos of FOLDER, searched recursively, as .tar shards"
    )
    parser.add_argument("--out", metavar="SHARDS", help="new folder for the shards")
    parser.add_argument("--max-size", default="512MB", metavar="SIZE", help="most bytes of a shard")
    parser.add_argument(
        "--img-size",
        type=int,
        default=None,
        metavar="PIXELS",
        help="make photos with a longer side smaller, as JPEGs; default: every file as it is",
    )
    parser.add_argument("--quality", type=int, default=None, help="of these JPEGs, 1 to 100; default 90")


def run(args: argparse.Namespace) -> int:
    """Pack, and print what to type next."""
    from tinymim.data.pack import QUALITY, pack
    from tinymim.errors import ConfigError

    if args.pack is None or args.out is None:
        missing = "--pack" if args.pack is None else "--out"
        raise ConfigError("nothing to do", f"{missing} is missing", "tinymim data --pack FOLDER --out SHARDS")
    if args.quality is not None and args.img_size is None:
        raise ConfigError(
            "--quality without --img-size", "files are packed as they are", "add --img-size, or leave --quality out"
        )
    done = pack(
        args.pack,
        args.out,
        max_size=_bytes(args.max_size),
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
