"""``tinymim eval``: mIoU of a segmentor .onnx file (needs no PyTorch), or the accuracy of a ``classifier.pth``."""

import argparse
import shlex
from pathlib import Path

from tinymim.cli import spelled
from tinymim.hub import is_hub

SETS = ("imagenet_a", "imagenet_r", "imagenet_c")
CLASSIFIER = (*SETS, "img_size", "squash", "num_heads", "batch_size", "workers", "device")
ENGINE = ("mode", "resize_to_file", "mean", "std", "runtime", "provider", "precision", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("file", metavar="FILE", help="a segmentor .onnx; or a classifier .pth, or hf-hub:OWNER/NAME")
    parser.add_argument(
        "--data", metavar="FOLDER", help="labelled photos: ADE20K layout, or for a classifier one sub-folder per class"
    )
    parser.add_argument("--split", choices=["val", "train"], default="val", help="photos to score")
    parser.add_argument("--limit", type=int, metavar="N", help="score N photos, evenly spread over the split")
    parser.add_argument("--ignore-label", type=int, nargs="+", metavar="ID", help="label ids to ignore")
    parser.add_argument(
        "--reduce-zero-label", action=argparse.BooleanOptionalAction, default=None, help="label 0 means no class"
    )
    parser.add_argument("--masks", metavar="FOLDER", help="write every predicted mask into this folder")
    add_engine_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--markdown", metavar="FILE", help="write the result as Markdown")
    classifier = parser.add_argument_group("for a classifier")
    for name, text in (
        ("a", "scored among its 200 classes"),
        ("r", "scored among its 200 classes"),
        ("c", "mCE, normalised by AlexNet"),
    ):
        classifier.add_argument(f"--imagenet-{name}", metavar="FOLDER", help=f"ImageNet-{name.upper()}: {text}")
    classifier.add_argument("--img-size", type=int, help="side in pixels; default: the size it was fine-tuned at")
    classifier.add_argument(
        "--squash",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="resize whole photos to a square, no crop; default: as it was fine-tuned (TinyViT at 384 and 512: yes)",
    )
    classifier.add_argument("--num-heads", type=int, help="heads per block, for a file that does not store them")
    classifier.add_argument("--batch-size", type=int, default=64, help="photos per forward pass")
    classifier.add_argument("--workers", type=int, default=2, help="data-loading processes")
    classifier.add_argument("--device", help="cpu, cuda or cuda:N; default a GPU if there is one")


def add_engine_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options for loading a file and preparing its input; shared with ``tinymim predict``."""
    from tinymim_export.runtime.engines import RUNTIMES, compute_types, provider_names

    parser.add_argument(
        "--mode", choices=["whole", "slide"], help="whole photos or windows; default: the file's contract"
    )
    parser.add_argument(
        "--resize-to-file",
        action="store_true",
        help="stretch photos to the fixed size of the file, whatever its contract says",
    )
    parser.add_argument(
        "--mean",
        type=float,
        nargs=3,
        metavar=("R", "G", "B"),
        help="mean per channel, for files without metadata: in 0-255 units, or in 0-1 units as in torchvision",
    )
    parser.add_argument(
        "--std", type=float, nargs=3, metavar=("R", "G", "B"), help="standard deviation per channel, in the same units"
    )
    parser.add_argument("--runtime", choices=list(RUNTIMES), default="onnxruntime", help="runtime of the file")
    parser.add_argument(
        "--provider",
        choices=provider_names(),
        default="cpu",
        help="provider of the runtime; one that is not available is an error, never replaced",
    )
    parser.add_argument(
        "--precision", choices=compute_types(), help="compute type of OpenVINO (not the precision of the file)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: every core of this process")


def engine_options(args: argparse.Namespace) -> dict[str, object]:
    """The keywords that the options of :func:`add_engine_arguments` set."""
    return {"compute_type" if name == "precision" else name: getattr(args, name) for name in ENGINE}


def run(args: argparse.Namespace) -> int:
    """Score, print, write."""
    if args.file.endswith((".pth", ".pt", ".safetensors")) or is_hub(args.file) or Path(args.file).is_dir():
        return _run_classifier(args)
    from tinymim.errors import ConfigError
    from tinymim_export.runtime.miou import evaluate

    if args.data is None:
        raise ConfigError("no photos to score on", "--data is missing", "add --data FOLDER (labelled, ADE20K layout)")

    result = evaluate(
        args.file,
        args.data,
        split=args.split,
        limit=args.limit,
        ignore_label=args.ignore_label,
        reduce_zero_label=args.reduce_zero_label,
        masks=args.masks,
        **engine_options(args),  # type: ignore[arg-type]
    )
    result.print()
    if args.json:
        result.to_json(args.json)
    if args.markdown:
        result.to_markdown(args.markdown)
    file, data = shlex.quote(args.file), shlex.quote(args.data)
    if args.json:
        print(f"next: tinymim predict {file} {data}/images --out masks --overlay{spelled(args, *ENGINE)}")
    else:
        same = spelled(args, "split", "limit", "ignore_label", "reduce_zero_label", *ENGINE)
        print(f"next: tinymim eval {file} --data {data}{same} --json eval.json --masks masks")
    return 0


def _run_classifier(args: argparse.Namespace) -> int:
    from tinymim.cli._next import segment_line
    from tinymim.engine import evaluate_classifier
    from tinymim.errors import ConfigError

    if others := spelled(args, "split", "ignore_label", "reduce_zero_label", "masks", *ENGINE).strip():
        raise ConfigError(f"a classifier and {others}", "these are for a segmentor's .onnx file", "leave them out")
    given = (*CLASSIFIER, "data", "limit")
    result = evaluate_classifier(args.file, **{name: getattr(args, name) for name in given})
    result.print()
    if args.json:
        result.to_json(args.json)
    if args.markdown:
        result.to_markdown(args.markdown)
    file = shlex.quote(args.file)
    if not args.json:
        print(f"next: tinymim eval {file}{spelled(args, 'data', 'limit', *CLASSIFIER)} --json scores.json")
    else:
        print(f"next: {segment_line(args.file)}")
    return 0
