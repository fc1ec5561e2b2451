"""``tinymim report``: one page for a lineage of files, or two of them side by side; needs no PyTorch."""

import argparse
import shlex
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="run folders, .onnx, .pth and result .json files, or folders to search for these. Two paths of one kind "
        "(run folders of the same job, .onnx files, folders, lineage.json) are compared; anything else is one lineage",
    )
    parser.add_argument("--out", metavar="FILE.html", help="page to write; default: report.html, or compare.html")
    parser.add_argument(
        "--line", action="store_true", help="put two paths of one kind into one lineage: do not compare them"
    )
    parser.add_argument("--data", metavar="FOLDER", help="labelled folder, or photos: show where files differ most")
    parser.add_argument("--ignore-label", type=int, nargs="+", metavar="ID", help="label ids to ignore")
    parser.add_argument(
        "--reduce-zero-label",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="id 0 is no class and the classes start at 1",
    )


def run(args: argparse.Namespace) -> int:
    """Join or compare, print, write."""
    from tinymim.errors import ConfigError
    from tinymim_export.report.compare import kind_of
    from tinymim_export.report.lineage_report import build_report, checked_out, compare_reports

    paths = [Path(path) for path in args.paths]
    kinds = [kind_of(path) for path in paths]
    if len(paths) == 2 and kinds[0] is not None and kinds[0] == kinds[1] and not args.line:
        if args.data:
            raise ConfigError(
                "--data does not work with a comparison",
                "two paths of one kind are compared",
                "add --line, or leave --data out",
            )
        difference = compare_reports(*paths, checked_out(args.out or "compare.html"))
        difference.print()
        print(f"next: tinymim report {shlex.join(args.paths)} --line --out report.html   # both in one lineage")
        return 0
    reading = {"ignore_label": args.ignore_label, "reduce_zero_label": args.reduce_zero_label} if args.data else {}
    result = build_report(paths, args.out or "report.html", data=args.data, **reading)
    result.print()
    loose = [file.path for file in result.lineage.files if file.role == "onnx" and file.path]
    unscored = [
        p
        for p in loose
        if not any(s.sha256 == f.sha256 for f in result.lineage.files if f.path == p for s in result.lineage.scores)
    ]
    data = shlex.quote(args.data or "FOLDER")
    weights = {file.role: file.path for file in result.lineage.files if file.path}
    made = {role: shlex.quote(path) for role, path in weights.items()}
    if any(file.output == "box" for file in result.lineage.files if file.path in loose):
        print(f"next: tinymim track --test {shlex.quote(loose[0])} --data SEQUENCES --baseline")
    elif unscored:
        out = shlex.quote(str(Path(unscored[0]).with_suffix(".eval.json")))
        print(f"next: tinymim eval {shlex.quote(unscored[0])} --data {data} --json {out}")
    elif len(loose) > 1:
        print(f"next: tinymim report {shlex.join(loose[:2])}   # two of them side by side")
    elif loose:
        print(f"next: tinymim bench {shlex.join(loose)} --json bench.json   # then report again")
    elif "tracker" in made:
        print(f"next: tinymim-export --onnx tracker.onnx --checkpoint {made['tracker']}   # then report again")
    elif "detector" in made:
        print(f"next: tinymim detect --test {made['detector']} --data OBJECTS --annotations OBJECTS.json")
    elif "segmentor" in made:
        print(f"next: tinymim-export --onnx seg.onnx --checkpoint {made['segmentor']}   # then report again")
    elif "student" in weights:
        from tinymim.cli._next import segment_line

        line = segment_line(weights["student"])
        print(f"next: {line.replace('FOLDER', data, 1)}")
    return 0
