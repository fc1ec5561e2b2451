"""``tinymim <verb>``: one file per verb, each with ``add_arguments(parser)`` and ``run(args) -> int``.

Exit codes: 0 done, 1 a check failed, 2 user error, 130 interrupted.
"""

import argparse
import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tinymim.compat import leave_processes
from tinymim.errors import TinyMIMError, did_you_mean
from tinymim.files import file_error

UNSEEN = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]"
VERBS = {
    "demo": "photos to a deployed, measured segmentor in minutes (start here)",
    "pretrain": "pre-train a masked autoencoder (MAE) as a teacher",
    "cache": "run a teacher once over every view and keep its predictions, to distil from",
    "distill": "distil a small student from a masked-image-modelling teacher",
    "finetune": "train a classifier on a student, with mixing, layer decay or a teacher",
    "segment": "train a segmentor on a student, or score one with --test",
    "detect": "train a detector (Mask R-CNN) on a student, or score one with --test",
    "track": "train a tracker on a student, score one with --test, follow a target in a video",
    "data": "look at a folder before training, split or convert it, or pack photos into shards",
    "contract": "shrink a model step by step to limits of parameters, multiply-adds, milliseconds",
    "study": "a table of distillation variants x seeds, next to the paper's",
    "bench": "measure .onnx files: latency, memory, where the milliseconds go",
    "eval": "score a segmentor .onnx in mIoU, or a classifier on ImageNet-1k, -A, -R, -C",
    "label": "pseudo-labels of unlabelled photos by a segmentor, to train a student on",
    "predict": "segment a photo, a folder or a video with an .onnx file",
    "analyse": "similarity of blocks, attention and effective rank of one model or two",
    "report": "one HTML page for teacher, student, segmentor and .onnx files",
    "card": "a run as a folder for the Hugging Face hub: model card, safetensors, .onnx files",
    "doctor": "replay the golden numbers and print versions and providers",
    "list": "list models, teachers, recipes, studies and segmentation configs",
    "completion": "print the script that completes commands and options in bash, zsh or tcsh",
}


def run_command(
    prog: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse, run, and turn our own errors into a message and an exit code; used by every command and tool.

    Args:
        prog: Name of the command, for its messages.
        description: Text of ``--help``.
        add_arguments: Adds the options to a parser.
        run: Parsed options -> exit code.
        argv: Arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    code = _exit_code(prog, parser, add_arguments, run, argv)
    leave_processes(code)
    return code


def _exit_code(
    prog: str,
    parser: argparse.ArgumentParser,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    for stream in (sys.stdout, sys.stderr):  # names that the locale, or UTF-8, cannot write never stop a command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        add_arguments(parser)
        return run(parser.parse_args(argv))
    except ModuleNotFoundError as error:
        if (error.name or "tinymim").split(".")[0] in ("tinymim", "tinymim_export"):
            raise
        why = "this command needs more than numpy, Pillow and onnxruntime"
        fix = "pip install tinymim with its dependencies (without --no-deps)"
        print(f"{prog}: error: {error.name} is not installed\n  why: {why}\n  fix: {fix}", file=sys.stderr)
        return 2
    except TinyMIMError as error:
        # values of a file may stand in it: a control character would steer the terminal
        print(f"{prog}: error: {re.sub(UNSEEN, '?', str(error))}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # e.g. the output is piped into "head", which has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a disk or a folder that fails where no check has foreseen it
        problem = file_error(f"cannot use {error.filename}" if error.filename else "the disk or network failed", error)
        print(f"{prog}: error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print(
            f"\n{prog}: interrupted; a run folder that was being written can be continued with --resume",
            file=sys.stderr,
        )
        return 130


YES_OR_NO = ("reduce_zero_label", "squash")  # options for which False is another answer than None


def spelled(args: argparse.Namespace, *names: str) -> str:
    """The given options as text for a command to paste: " --mode slide --limit 10"."""
    usual = {"runtime": "onnxruntime", "provider": "cpu", "split": "val", "batch_size": 64, "workers": 2}
    words: list[str] = []
    for name in names:
        value, option = getattr(args, name, None), "--" + name.replace("_", "-")
        if value is None or value == usual.get(name) or (value is False and name not in YES_OR_NO):
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [
                option,
                *map(str, [value] if isinstance(value, str) or not isinstance(value, Sequence) else value),
            ]
    return "".join(f" {shlex.quote(word)}" for word in words)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``tinymim`` command."""
    args = [*(sys.argv[1:] if argv is None else argv)]  # not list(): that name is a verb of this package
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        print("usage: tinymim <command> [options]\n")
        print("\n".join(f"  {verb.ljust(width)}  {text}" for verb, text in VERBS.items()))
        print("\ntinymim <command> --help lists the options. First command to try: tinymim demo")
        return 0
    if args[0] in ("-V", "--version"):
        from tinymim import __version__

        print(__version__)
        return 0
    if args[0] not in VERBS:
        hint = did_you_mean(args[0], VERBS, "tinymim --help lists the commands", "'tinymim {}'".format)
        print(f"tinymim: error: unknown command {args[0]!r}; {hint}", file=sys.stderr)
        return 2

    def verb() -> Any:
        return importlib.import_module(f"tinymim.cli.{args[0]}")

    return run_command(
        f"tinymim {args[0]}", VERBS[args[0]], lambda p: verb().add_arguments(p), lambda a: verb().run(a), args[1:]
    )
