"""Shared by the verbs ``pretrain``, ``distill`` and ``finetune``: options, and the output at the end."""

import argparse
import shlex
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from tinymim.cli._cfg_options import add_cfg_options
from tinymim.engine.settings import SETTINGS, add_options
from tinymim.errors import ConfigError


def add_run_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the options of a job; their names are the fields of its settings."""
    settings = SETTINGS[verb]
    about = "a name (tinymim list recipes) or a .py file of the same keys"
    parser.add_argument("--recipe", default=settings.default_recipe, help=about)
    add_options(parser, settings)
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    add_cfg_options(parser, "any recipe key; +KEY=VALUE adds one that is not known")


def show_recipe(recipe: str, overrides: dict[str, Any], verb: str) -> int:
    """``--print-config``: print a recipe as a run with these overrides would resolve it."""
    from tinymim.engine import load_recipe

    config = load_recipe(recipe, overrides, verb)
    print("\n".join(f"{k} = {v!r}" for k, v in config.to_dict().items()))
    return 0


def run_verb(
    args: argparse.Namespace,
    verb: str,
    job: Callable[..., Any],
    next_lines: list[str] | None = None,
    *,
    report: Callable[..., Any] | None = None,
) -> int:
    """Call the job with the parsed options, write the report, print what to type next.

    Args:
        args: The parsed options.
        verb: The command.
        job: Its Python function.
        next_lines: Commands to paste; {student}, {val} and {segment} are filled in. None: those of
            :func:`tinymim.cli._next.after`.
        report: Writes the page of the run folder; None: :func:`tinymim_export.report.page.run_report`.
    """
    from tinymim.cli._next import after, segment_line
    from tinymim.compat import is_first_process

    known = {each.name for each in fields(SETTINGS[verb])} | {"recipe", "chain"}
    values = {name: value for name, value in vars(args).items() if name in known}
    if args.print_config:
        settings = SETTINGS[verb](**{k: v for k, v in values.items() if k not in ("recipe", "chain")})
        return show_recipe(args.recipe, {"chain": values.get("chain"), **settings.overrides()}, verb)
    if args.data is None:
        raise ConfigError("no photos", "--data is missing", "add --data FOLDER (photos, searched recursively)")
    result = job(**{name: value for name, value in values.items() if name != "chain" or value is not None})
    if args.dry_run:
        return 0
    if is_first_process():
        from tinymim_export.report.page import run_report

        page = (report or run_report)(result.out, segment=segment_line)
        file = getattr(result, "student", None) or result.classifier
        if getattr(result, "top1", None) is not None:
            print(f"top-1:   {100 * result.top1:.2f} %  (top-5 {100 * result.top5:.2f} %, {result.photos} photos)")
        print(f"student: {file}\nreport:  {page}")
        if next_lines is None:
            lines = after(verb, file, args.data)
        else:
            words = {"student": shlex.quote(str(file)), "val": shlex.quote(str(args.val_data or "VAL"))}
            lines = [line.format(**words, segment=segment_line(file)) for line in next_lines]
        print("\n".join(f"next:    {line}" for line in lines))
    return 0
