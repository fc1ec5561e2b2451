"""Options and last words the verbs ``pretrain``, ``distill`` and ``finetune`` share."""

import argparse
import inspect
import shlex
from typing import Any

from mmengine.config import DictAction


def add_run_arguments(parser: argparse.ArgumentParser, recipe: str, verb: str) -> None:
    """The common options; their names are the keywords of the function the verb stands for."""
    from tinymim.engine.recipe import recipe_names

    names = ", ".join(recipe_names(verb))
    labelled = verb == "finetune"
    parser.add_argument("--recipe", default=recipe, help=f"one of {names}, or a .py file of the same keys")
    data, val = "photos, searched recursively", "held-out photos for val_loss"
    if labelled:
        data, val = "photos, one sub-folder a class", "held-out photos to score, the same sub-folders"
    parser.add_argument("--data", metavar="FOLDER", help=data)
    parser.add_argument("--val-data", metavar="FOLDER", help=val)
    parser.add_argument("--out", metavar="FOLDER", help="run folder; default runs/<recipe>")
    parser.add_argument("--student" if verb == "distill" else "--model", help="registry name, e.g. tinymim_vit_tiny")
    parser.add_argument("--img-size", type=int, help="side of the crops in pixels")
    parser.add_argument("--epochs", type=float, help="passes over the photos")
    parser.add_argument("--batch-size", type=int, help="global batch; split over processes and micro-batches")
    parser.add_argument("--lr", type=float, help="peak rate; default base_lr * batch / 256")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints; default an epoch")
    parser.add_argument("--workers", type=int, help="data-loading processes")
    parser.add_argument("--seed", type=int, help="fixes order, crops, masks and start values")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default a GPU if there is one")
    if not labelled:
        parser.add_argument("--init-from", metavar="FILE", help="checkpoint to start from (a new run)")
        parser.add_argument(
            "--probe-data",
            metavar="FOLDER",
            help="a sub-folder a class (or train/ and val/ of such): k-NN and linear probe while it learns",
        )
    parser.add_argument("--resume", action="store_true", help="go on exactly where the run in --out stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--dry-run", action="store_true", help="one step: memory and time, no files")
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="any recipe key")


def run_verb(args: argparse.Namespace, job: Any, next_lines: list[str]) -> int:
    """Call the job with the parsed options, write the report, print what to type next."""
    from tinymim.compat import is_first_process
    from tinymim.distill.teachers import named_teachers
    from tinymim.engine.chain import distill_chain
    from tinymim.engine.finetuning import finetune
    from tinymim.engine.recipe import load_recipe
    from tinymim.engine.run import run
    from tinymim.errors import ConfigError

    keywords = {*inspect.signature(finetune if job is finetune else run).parameters}
    if job is distill_chain:
        keywords = keywords - {"student", "model", "teacher", "init_from", "title"} | {"chain"}
    values = {k: v for k, v in vars(args).items() if k in keywords}
    if args.print_config:
        if {"teacher", "teacher_weights"} <= set(values):
            values |= named_teachers(values["teacher"], values["teacher_weights"])
        overrides = {k: v for k, v in values.items() if k in load_recipe(args.recipe)}
        overrides["student"] = values.get("model") or (None if job is finetune else values.get("student"))
        config = load_recipe(args.recipe, {**overrides, **(args.cfg_options or {})})
        print("\n".join(f"{k} = {v!r}" for k, v in config.to_dict().items()))
        return 0
    if args.data is None:
        raise ConfigError("no photos", "--data is missing", "add --data FOLDER (photos, searched recursively)")
    result = job(**values)
    if args.dry_run:
        return 0
    if is_first_process():
        from tinymim_export.report.chain_page import chain_report
        from tinymim_export.report.page import run_report

        report = (chain_report if job is distill_chain else run_report)(result.out)
        file = getattr(result, "student", None) or result.classifier
        if getattr(result, "top1", None) is not None:
            print(f"top-1:   {100 * result.top1:.2f} %  (top-5 {100 * result.top5:.2f} %, {result.photos} photos)")
        print(f"student: {file}\nreport:  {report}")
        words = {"student": file, "data": args.data, "val": args.val_data or "VAL"}
        words = {name: shlex.quote(str(word)) for name, word in words.items()}
        print("\n".join(f"next:    {line.format(**words)}" for line in next_lines))
    return 0
