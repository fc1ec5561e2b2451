"""``tinymim-export``: a checkpoint as a verified .onnx file."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tinymim.cli import run_command
from tinymim.errors import ConfigError

HELP = "export a checkpoint to ONNX and verify it against PyTorch"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--checkpoint", required=True, help="segmentor.pth, student.pth or any ViT checkpoint")
    parser.add_argument("--onnx", default=None, metavar="FILE", help="file to write")
    parser.add_argument("--config", default=None, help="mmseg_configs/...; segmentor.pth holds its own")
    parser.add_argument("--part", choices=["backbone", "segmentor"], default=None, help="default: what the file holds")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), default=None,
                        help="fix height and width in pixels; default: the configuration's crop")  # fmt: skip
    parser.add_argument("--dynamic", action="store_true", help="leave height and width free")
    parser.add_argument("--output", choices=["logits", "mask"], default="logits", help="what a segmentor gives")
    parser.add_argument("--photos", default=None, metavar="FOLDER", help="real photos to verify on, too")
    parser.add_argument("--num-heads", type=int, default=None, help="heads a block, for files that do not store it")
    parser.add_argument("--opset", type=int, default=20, help="ONNX operator set, 18 to 23")
    parser.add_argument("--seed", type=int, default=0, help="of the random verification inputs")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--markdown", default=None, metavar="FILE", help="write the result as Markdown")
    parser.add_argument("--verify-only", default=None, metavar="FILE",
                        help="export nothing: verify this .onnx against --checkpoint again")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Export or verify."""
    if args.verify_only is not None:
        from tinymim_export.parity import verify

        result = verify(
            args.verify_only, args.checkpoint, args.config, num_heads=args.num_heads, photos=args.photos, seed=args.seed
        )
        result.print()
        print(f"{args.verify_only}: verified")
        _write(args, result)
        print(f"next: tinymim bench {args.verify_only}")
        return 0
    if args.onnx is None:
        raise ConfigError("--onnx is missing", "it names the file to write", "add --onnx out.onnx")
    if not 18 <= args.opset <= 23:
        raise ConfigError(
            f"--opset {args.opset} is not possible", "PyTorch's exporter writes 18 to 23", "leave it out (20)"
        )
    from tinymim_export.convert import export

    made = export(
        args.checkpoint,
        args.onnx,
        config=args.config,
        part=args.part,
        size=None if args.size is None else tuple(args.size),
        dynamic=args.dynamic,
        output=args.output,
        photos=args.photos,
        num_heads=args.num_heads,
        opset=args.opset,
        seed=args.seed,
    )
    made.print()
    _write(args, made)
    print(f"next: tinymim bench {args.onnx}{' --split' if made.part == 'segmentor' else ''}")
    return 0


def _write(args: argparse.Namespace, result: object) -> None:
    """The result's files."""
    if args.json:
        result.to_json(args.json)  # type: ignore[attr-defined]
    if args.markdown:
        Path(args.markdown).write_text(result.to_markdown())  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``tinymim-export``."""
    return run_command("tinymim-export", HELP, add_arguments, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
