"""``tinymim distill``: distil a small student from a masked-image-modelling teacher (TinyMIM)."""

import argparse

from tinymim.cli._run import add_run_arguments, run_verb


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_run_arguments(parser, "distill")
    parser.add_argument(
        "--chain",
        metavar="TEACHER:STUDENT:STUDENT",
        help="e.g. mae_large:base:small:tiny; each student is the next teacher",
    )


def run(args: argparse.Namespace) -> int:
    """Distil, once or in a chain."""
    from tinymim.engine import distill, load_recipe

    given = (args.cfg_options or {}).get("chain") or load_recipe(args.recipe).get("chain")
    return _run_chain(args) if args.chain or given else run_verb(args, "distill", distill)


def _run_chain(args: argparse.Namespace) -> int:
    """Run every hop, then write one report for the chain."""
    from tinymim.engine import distill_chain
    from tinymim.engine.settings import DistillSettings
    from tinymim.errors import ConfigError
    from tinymim_export.report.chain_page import chain_report

    for name in ("teacher", "student", "init_from"):
        if getattr(args, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} does not go with a chain",
                "the chain names the first teacher and every student",
                "write it into --chain TEACHER:STUDENT:STUDENT, or leave --chain out",
            )
        delattr(args, name)
    if args.recipe == DistillSettings.default_recipe:
        args.recipe = "tinymim_chain"
    return run_verb(args, "distill", distill_chain, report=chain_report)
