"""``tinymim detect``: train a detector (Mask R-CNN) on a student, or score one, on data in COCO's format."""

import argparse
import shlex

from tinymim.cli._run import add_run_arguments, show_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_run_arguments(parser, "detect")
    parser.add_argument("--test", metavar="FILE", help="score this detector.pth on --data and --annotations")
    parser.add_argument("--json", metavar="FILE", help="with --test: write the scores")


def run(args: argparse.Namespace) -> int:
    """Train or score, print what to type next."""
    from tinymim.errors import ConfigError

    if args.test is None:
        if args.json:
            raise ConfigError("--json without --test", "a training writes result.json itself", "leave --json out")
        return _train(args)
    from tinymim.det.job import score_detector

    if args.data is None or args.annotations is None:
        raise ConfigError("nothing to score on", "photos are missing", "add --data FOLDER --annotations FILE.json")
    scores = score_detector(args.test, args.data, args.annotations, args.device)
    scores.print()
    if args.json:
        scores.to_json(args.json)
        print("next: tinymim detect --recipe mask_rcnn_tiny --data PHOTOS --annotations FILE.json --print-config")
    else:
        print(f"next: {_test_line(args.test, args.data, args.annotations)} --json ap.json")
    return 0


def _test_line(file: object, data: object, annotations: object) -> str:
    words = ["--test", str(file), "--data", str(data), "--annotations", str(annotations)]
    return f"tinymim detect {shlex.join(words)}"


def _train(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from tinymim.compat import is_first_process
    from tinymim.det.job import detect
    from tinymim.engine.settings import DetectSettings
    from tinymim.errors import ConfigError

    values = {each.name: getattr(args, each.name) for each in fields(DetectSettings)}
    if args.print_config:
        return show_recipe(args.recipe, DetectSettings(**values).overrides(), "detect")
    if args.data is None:
        raise ConfigError("no photos", "--data is missing", "add --data FOLDER --annotations FILE.json")
    result = detect(args.recipe, **values)
    if args.dry_run or not is_first_process():
        return 0
    if result.scores is not None:
        result.scores.print()
    line = _test_line(result.detector, args.val_data or args.data, args.val_annotations or args.annotations)
    print(f"detector: {result.detector}")
    print(f"next: {line}")
    return 0
