"""Shared by the verbs ``pretrain``, ``distill`` and ``finetune``: options, and the output at the end."""

import argparse
import shlex
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from mmengine.config import DictAction

from tinymim.errors import ConfigError


class CfgOptions(DictAction):  # type: ignore[misc]
    """``--cfg-options KEY=VALUE ...``, as MMEngine reads it; given twice, the keys of both hold.

    Raises:
        ConfigError: a word that is no KEY=VALUE, brackets that do not match, or a key with two values.
    """

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = dict(getattr(namespace, self.dest) or {})
        for word in values:
            given = argparse.Namespace(**{self.dest: None})
            try:
                super().__call__(parser, given, [word], option_string)
            except (ValueError, AssertionError, RecursionError, IndexError) as error:
                raise ConfigError(
                    f"{option_string} {word} cannot be read",
                    "a word is KEY=VALUE: a number, True, None, text, or a list of these in brackets",
                    "e.g. --cfg-options drop_path=0.1 betas=[0.9,0.95]; nested values go into a recipe file",
                ) from error
            for key, value in getattr(given, self.dest).items():
                if found.setdefault(key, value) != value:
                    raise ConfigError(
                        f"{option_string}: {key} is {found[key]!r} and {value!r}", "it is given twice", "give it once"
                    )
        setattr(namespace, self.dest, found)


def add_run_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the options of a job; their names are the fields of its settings."""
    from tinymim.engine import JOBS, recipe_names
    from tinymim.engine.settings import add_options

    job = JOBS[verb]
    names = ", ".join(recipe_names(verb))
    parser.add_argument("--recipe", default=job.recipe_name, help=f"one of {names}, or a .py file of the same keys")
    add_options(parser, job.settings_type)
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--cfg-options", nargs="+", action=CfgOptions, metavar="KEY=VALUE", help="any recipe key")


def run_verb(
    args: argparse.Namespace,
    verb: str,
    job: Callable[..., Any],
    next_lines: list[str],
    *,
    report: Callable[..., Any] | None = None,
) -> int:
    """Call the job with the parsed options, write the report, print what to type next.

    Args:
        args: The parsed options.
        verb: The command.
        job: Its Python function.
        next_lines: Commands to paste; {student}, {data} and {val} are filled in.
        report: Writes the page of the run folder; None: :func:`tinymim_export.report.page.run_report`.
    """
    from tinymim.compat import is_first_process
    from tinymim.engine import JOBS, load_recipe

    known = {each.name for each in fields(JOBS[verb].settings_type)} | {"recipe", "chain"}
    values = {name: value for name, value in vars(args).items() if name in known}
    if args.print_config:
        settings = JOBS[verb].settings_type(**{k: v for k, v in values.items() if k not in ("recipe", "chain")})
        config = load_recipe(args.recipe, {"chain": values.get("chain"), **settings.overrides()}, verb)
        print("\n".join(f"{k} = {v!r}" for k, v in config.to_dict().items()))
        return 0
    if args.data is None:
        raise ConfigError("no photos", "--data is missing", "add --data FOLDER (photos, searched recursively)")
    result = job(**{name: value for name, value in values.items() if name != "chain" or value is not None})
    if args.dry_run:
        return 0
    if is_first_process():
        from tinymim_export.report.page import run_report

        page = (report or run_report)(result.out)
        file = getattr(result, "student", None) or result.classifier
        if getattr(result, "top1", None) is not None:
            print(f"top-1:   {100 * result.top1:.2f} %  (top-5 {100 * result.top5:.2f} %, {result.photos} photos)")
        print(f"student: {file}\nreport:  {page}")
        words = {"student": file, "data": args.data, "val": args.val_data or "VAL"}
        words = {name: shlex.quote(str(word)) for name, word in words.items()}
        print("\n".join(f"next:    {line.format(**words)}" for line in next_lines))
    return 0
