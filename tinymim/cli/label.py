"""``tinymim label``: pseudo-labels of unlabelled photos by a ``segmentor.pth``, or an .onnx file without PyTorch."""

import argparse
import shlex

from tinymim.cli import spelled
from tinymim.cli.eval import ENGINE, add_engine_arguments, engine_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("photos", metavar="PHOTOS", help="a photo, a folder (searched recursively), a pattern, shards")
    parser.add_argument(
        "--with", dest="file", required=True, metavar="FILE", help="segmentor.pth, or a segmentor .onnx"
    )
    parser.add_argument(
        "--out", required=True, metavar="LAYOUT", help="new labelled folder, for tinymim segment --pseudo"
    )
    parser.add_argument(
        "--min-confidence",
        type=float,
        default=0.0,
        metavar="P",
        help="pixels whose class is less probable are ignored (255); 0 keeps all, and what others keep is printed",
    )
    checkpoint = parser.add_argument_group("with a segmentor.pth")
    checkpoint.add_argument("--config", metavar="FILE", help="for files that do not store theirs")
    checkpoint.add_argument("--device", help="cpu, cuda or cuda:N; default a GPU if there is one")
    add_engine_arguments(parser.add_argument_group("with an .onnx file"))


def run(args: argparse.Namespace) -> int:
    """Label, print the shares and what to type next."""
    from tinymim.errors import ConfigError

    onnx = args.file.endswith(".onnx")
    if others := spelled(args, *(("config", "device") if onnx else ENGINE)).strip():
        kind = "an .onnx file" if onnx else "a .pth"
        raise ConfigError(f"{kind} and {others}", "they are for the other kind of segmentor", "leave them out")
    if onnx:
        from tinymim_export.runtime.label import label_photos as by_file

        result = by_file(args.photos, args.file, args.out, min_confidence=args.min_confidence, **engine_options(args))
    else:
        from tinymim.seg import label_photos

        result = label_photos(
            args.photos,
            args.file,
            args.out,
            min_confidence=args.min_confidence,
            config=args.config,
            device=args.device,
        )
    result.print()
    out = shlex.quote(args.out)
    config = "linear_tinymim_t_small_data"
    print(f"next:    tinymim segment {config} --data-root FOLDER --pseudo {out} --work-dir runs/pseudo")
    return 0
