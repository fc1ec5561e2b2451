"""``tinymim cache``: what students need of a teacher, of every photo in every epoch, on disk, to distil from.

A classifier's most probable classes; or, with ``--recipe``, the relations and features of a TinyMIM recipe's teacher.
"""

import argparse
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from tinymim.cli import spelled
from tinymim.cli._cfg_options import add_cfg_options

VIEWS = ("img_size", "scale", "flip", "rand_augment", "erasing", "mixup", "cutmix")  # of tinymim.data.replay.Replay
LOGITS_RECIPE, RELATIONS_RECIPE = "tinyvit_5m_from_store", "tinymim_tiny_small_data"
DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "scale": (0.08, 1.0),
    "flip": 0.5,
    "rand_augment": "m9-n2-mstd0.5-inc1",
    "erasing": 0.25,
    "mixup": 0.0,
    "cutmix": 0.0,
}  # of a classifier's views; those of a recipe are the recipe's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("--out", required=True, metavar="STORE", help="the store: a folder, or s3://... and the like")
    parser.add_argument("--data", metavar="FOLDER", help="photos, searched recursively, or shards")
    parser.add_argument("--teacher", metavar="NAME", help="timm/NAME with a classifier, or a classifier file")
    parser.add_argument(
        "--recipe", help="keep the relations that this recipe's student learns, e.g. tinymim_tiny_small_data"
    )
    parser.add_argument("--teacher-weights", metavar="FILE", help="weights of a timm teacher; default: downloaded")
    parser.add_argument("--topk", type=int, help="probabilities kept of a view; default 100, or all of fewer classes")
    parser.add_argument("--epochs", type=int, help="views of each photo; default 300 or the recipe's; more are added")
    parser.add_argument("--seed", type=int, default=0, help="fixes every view")
    parser.add_argument("--plan", "--dry-run", action="store_true", help="GB and hours, measured; nothing is written")
    parser.add_argument("--check", action="store_true", help="replay a sample through the teacher and compare")
    views = parser.add_argument_group("views")
    views.add_argument("--img-size", type=int, help="side in pixels; default 224 or the recipe's")
    views.add_argument(
        "--scale", type=float, nargs=2, metavar=("LEAST", "MOST"), help="crop's area; default 0.08 1 or the recipe's"
    )
    views.add_argument("--flip", type=float, help="probability of a horizontal flip; default 0.5")
    views.add_argument("--rand-augment", help="timm's words, or none; default m9-n2-mstd0.5-inc1")
    views.add_argument("--erasing", type=float, help="probability of a rectangle of noise; default 0.25")
    views.add_argument("--mixup", type=float, help="alpha of mixup with another photo; default 0: none")
    views.add_argument("--cutmix", type=float, help="alpha of cutmix; default 0: none")
    of = parser.add_argument_group("--recipe")
    of.add_argument("--targets", nargs="+", metavar="WORD", help="what is kept: qk+vv@BLOCK, output@BLOCK, ...")
    of.add_argument("--teacher-heads", type=int, help="heads per block, for a teacher file that does not store it")
    of.add_argument(
        "--form",
        help="components x bits of each head, 4x8+12x4+8x2 (default), or fp16, int8, int4: see docs/store_relations.md",
    )
    add_cfg_options(of, "any recipe key")
    work = parser.add_argument_group("work")
    work.add_argument("--batch-size", type=int, default=64)
    work.add_argument("--workers", type=int, help="data-loading processes; default a core each but one")
    work.add_argument("--device", help="cpu, cuda or cuda:N; default a GPU if there is one")
    work.add_argument("--amp", choices=("bf16", "fp16"), help="precision of the teacher; default float32")
    work.add_argument(
        "--chunk",
        type=int,
        metavar="RECORDS",
        help="of a file, which is what a kill loses; default 4096, more for millions of photos",
    )
    work.add_argument(
        "--part", metavar="I/N", help="only the I-th of N parts; in a Slurm array its task is the default"
    )
    check = parser.add_argument_group("--check")
    check.add_argument("--sample", type=int, default=256, help="records")
    check.add_argument("--max-dp", type=float, default=0.01, help="largest difference of a probability")
    check.add_argument(
        "--max-differing",
        type=float,
        default=0.05,
        help="largest share of other classes; of relations how much further away than new ones they may be",
    )
    other = parser.add_argument_group("TinyViT's published format (logits_topK_epochE/rankR-keys.txt, -values.bin)")
    other.add_argument("--from-official", metavar="FOLDER", help="make a store of such files")
    other.add_argument("--to-official", metavar="FOLDER", help="write the store as such files")
    other.add_argument("--classes", type=int, help="with --from-official: classes of the teacher")
    other.add_argument("--keep-first", action="store_true", help="of a key on two ranks (a padded sampler) the first")


def run(args: argparse.Namespace) -> int:
    """Plan, write, check or convert; print what to type next."""
    from tinymim.errors import ConfigError

    given = [name for name in ("plan", "check", "from_official", "to_official") if getattr(args, name)]
    if len(given) > 1:
        words = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(words, "each is work of its own", "give one of them")
    if args.from_official or args.to_official:
        return _convert(args)
    if args.check:
        return _check(args)
    if args.teacher is None and args.data is None and args.recipe is None:
        return _summary(args)
    for name in ("teacher", "data"):
        if getattr(args, name) is None and (name == "data" or args.recipe is None):
            fix = "tinymim cache --teacher timm/NAME --data FOLDER --out STORE"
            raise ConfigError("nothing to cache", f"--{name} is missing", fix)
    return _write(args)


def _write(args: argparse.Namespace) -> int:
    from tinymim.errors import ConfigError
    from tinymim.store.caching import cache_targets, make_plan

    part = _part(args.part)
    for name, number, least in (
        ("--epochs", args.epochs, 1),
        ("--chunk", args.chunk, 2),
        ("--workers", args.workers, 0),
    ):
        if number is not None and number < least:
            raise ConfigError(f"{name} {number}", f"it must be at least {least}", f"e.g. {name} {max(least, 2)}")
    job, epochs = _relations_job(args) if args.recipe else _logits_job(args)
    if args.plan:
        plan = make_plan(job, args.out, args.data, epochs=epochs, chunk=args.chunk, timed=True)
        plan.print()
        plan.check_room(args.out)
        print(f"next:    {_again(args)}")
        return 0
    left = cache_targets(args.out, job, args.data, epochs=epochs, chunk=args.chunk, part=part)
    if left:
        print(f"store:   {args.out}: {left:,} chunks are left to other processes, or to the same command again")
        print(f"next:    {_again(args)}")
        return 0
    _summary(args)
    print(f"next:    {_again(args)} --check")
    return 0


def _check(args: argparse.Namespace) -> int:
    from tinymim.errors import ConfigError
    from tinymim.store.checking import check_targets
    from tinymim.store.job import open_job, sparse_logits
    from tinymim.store.places import open_place
    from tinymim.store.targets import read_header

    if args.data is None:
        raise ConfigError(
            "--check without photos", "it looks at them again", "add the --data that the store was made of"
        )
    header = read_header(open_place(args.out))
    views = header.get("augmentation", {})
    if {*views} != {*VIEWS}:
        raise ConfigError(
            f"{args.out} cannot be replayed",
            f"its views were made by {views.get('kind', 'another augmentation')}, which is not ours",
            "it can still be read and converted (--to-official)",
        )
    needed = {"logits": "topk", "relations": "relations"}.get(header["kind"], "a known kind")
    missing = {needed, *([] if args.teacher else ["teacher"])} - {*header}
    if missing:
        raise ConfigError(
            f"{args.out} cannot be replayed",
            f"its targets are {header['kind']!r}, and its header has no {' and no '.join(sorted(missing))}",
            "check the store that tinymim cache wrote",
        )
    if args.sample < 2:
        raise ConfigError(f"--sample {args.sample}", "two records are the least", "e.g. --sample 256")
    name = args.teacher or header["teacher"]["name"]
    if header["kind"] == "relations":
        from tinymim.distill.relation_targets import stored_targets

        relations, of = header["relations"], _recipe(args) if args.recipe else args

        def asked() -> Any:
            return stored_targets(
                relations,
                name,
                weights=of.teacher_weights,
                img_size=views["img_size"],
                teacher_heads=of.teacher_heads,
            )
    else:

        def asked() -> Any:
            return sparse_logits(name, weights=args.teacher_weights, topk=header["topk"])

    work = _work(args) | {"augmentation": views}
    if args.amp is None:
        work["precision"] = header.get("precision", "fp32")
    job = open_job(asked, **work)
    check_targets(args.out, job, sample=args.sample, max_dp=args.max_dp, max_differing=args.max_differing)
    print(f"next:    {_distill(args, header)}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from tinymim.store.official import read_official, write_official

    if args.to_official:
        folders = write_official(args.out, args.to_official)
        print(f"written: {len(folders)} epochs in {args.to_official}, {folders[0].name} the first")
        print(f"next:    tinymim cache --from-official {shlex.quote(args.to_official)} --out STORE")
        return 0
    read_official(
        args.from_official,
        args.out,
        topk=args.topk,
        classes=args.classes,
        teacher=args.teacher,
        keys=_keys(args.data),
        keep_first=args.keep_first,
    )
    _summary(args)
    print(f"next:    tinymim cache --out {shlex.quote(args.out)}")
    return 0


def _keys(data: str | None) -> list[str] | None:
    """Keys of the photos in a folder."""
    if data is None:
        return None
    from tinymim.data.photo_files import list_photos, photo_names

    return [*photo_names(data, list_photos(data)).values()]


def _summary(args: argparse.Namespace) -> int:
    """``tinymim cache --out STORE``: what is in a store."""
    from tinymim.store.targets import TargetStore

    store = TargetStore.open(args.out, partial=True)
    header, layout, missing = store.header, store.layout, store.missing()
    there = len(store) - sum(len(chunk.rows) for chunk in missing)
    teacher = header.get("teacher", {"name": "unknown", "sha256": None})
    size = there * layout.record_bytes / 2**20
    print(f"store:   {args.out}: {layout.photos:,} photos x {layout.epochs} epochs, {layout.record_bytes} bytes a view")
    print(f"teacher: {teacher['name']}, sha256 {str(teacher['sha256'])[:12]}, {header['kind']}", end="")
    relations = header.get("relations")
    kept = relations and f" {', '.join(relations['targets'])} in {relations['heads']} heads, {relations['form']}"
    print(f", K {header['topk']} of {header.get('classes', 0):,} classes" if header.get("topk") else kept or "")
    print(f"records: {there:,} of {len(store):,} ({size:,.1f} MiB), {len(missing):,} chunks missing", flush=True)
    if missing:
        print("note: the command that wrote it goes on where it stopped")
    elif (
        args.teacher is None
        and args.recipe is None
        and not args.from_official
        and "img_size" in header.get("augmentation", {})
    ):
        print(f"next:    {_distill(args, header)}")
    return 0


def _logits_job(args: argparse.Namespace) -> tuple[Any, int]:
    """The job of a classifier, and the epochs."""
    from tinymim.errors import ConfigError
    from tinymim.store.job import open_job, sparse_logits

    for name in ("targets", "form", "cfg_options", "teacher_heads"):
        if getattr(args, name) is not None:
            what = f"--{name.replace('_', '-')}"
            raise ConfigError(what, "it is for relations", "add --recipe tinymim_tiny_small_data, or leave it out")
    views = {name: DEFAULTS[name] if getattr(args, name) is None else getattr(args, name) for name in VIEWS}
    views["rand_augment"] = None if views["rand_augment"] in ("none", "") else views["rand_augment"]
    given = dict(weights=args.teacher_weights, topk=args.topk, pretrained=not args.plan)
    job = open_job(lambda: sparse_logits(args.teacher, **given), augmentation=views, **_work(args))
    return job, 300 if args.epochs is None else args.epochs


def _relations_job(args: argparse.Namespace) -> tuple[Any, int]:
    """The job of a recipe's teacher, and the epochs: those of the recipe if none are given."""
    from tinymim.distill.compact import DEFAULT
    from tinymim.distill.relation_targets import relation_targets
    from tinymim.engine.build import build_method
    from tinymim.errors import ConfigError
    from tinymim.store.job import open_job

    for name in ("topk", "rand_augment", "erasing", "mixup", "cutmix"):
        if getattr(args, name) is not None:
            what = f"--{name.replace('_', '-')} and --recipe"
            raise ConfigError(what, "a recipe's teacher sees crops and flips, and has no classes", "leave it out")
    config = _recipe(args)
    if config.get("store"):
        raise ConfigError("a recipe with a store", "a store is made of a live teacher", "leave store out")

    def asked() -> Any:
        method, _ = build_method(config, pretrained=not args.plan)
        return relation_targets(method, config.img_size, args.form or DEFAULT)

    views = {"img_size": config.img_size, "scale": config.crop_scale, **_given({"flip": args.flip})}
    return open_job(asked, augmentation=views, **_work(args)), int(config.epochs)


def _recipe(args: argparse.Namespace) -> Any:
    """The recipe that the options name, changed by the others."""
    from tinymim.engine import load_recipe

    names = ("teacher", "teacher_weights", "teacher_heads", "targets", "img_size", "epochs")
    changes = {name: getattr(args, name) for name in names} | {"crop_scale": args.scale and [*args.scale]}
    return load_recipe(args.recipe, {**(args.cfg_options or {}), **_given(changes)}, "distill")


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _work(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of :func:`tinymim.store.job.open_job` that every job has."""
    names = ("data", "seed", "batch_size", "workers", "device")
    return {**{name: getattr(args, name) for name in names}, "precision": args.amp or "fp32"}


def _part(text: str | None) -> tuple[int, int] | None:
    """ "2/8" -> (1, 8); without it the task of a Slurm array.

    Raises:
        ConfigError: no such part.
    """
    from tinymim.errors import ConfigError

    if text is None:
        task, tasks = (os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "COUNT"))
        if not (task.isdecimal() and tasks.isdecimal()):
            return None
        first = os.environ.get("SLURM_ARRAY_TASK_MIN", "0")
        text = f"{int(task) - int(first) + 1}/{tasks}"
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--part {text}", "it is I/N, with I from 1 to N", "e.g. --part 2/8: the second of eight")
    return int(found[1]) - 1, int(found[2])


def _again(args: argparse.Namespace) -> str:
    """The command line that goes on with, or checks, the store."""
    names = ["recipe", "teacher", "teacher_weights", "data", "topk", "epochs", "targets", "form", "teacher_heads"]
    default = argparse.ArgumentParser()
    add_arguments(default)
    changed = (*VIEWS, "seed", "batch_size", "workers", "device", "amp", "chunk")
    names += [name for name in changed if getattr(args, name) != default.get_default(name)]
    words = [shlex.quote(f"{key}={str(value).replace(' ', '')}") for key, value in (args.cfg_options or {}).items()]
    options = f" --cfg-options {' '.join(words)}" if words else ""
    return f"tinymim cache{spelled(args, *names)} --out {shlex.quote(args.out)}{options}"


def _distill(args: argparse.Namespace, header: Mapping[str, Any]) -> str:
    """The command that trains from a store."""
    data, views = shlex.quote(args.data or "photos/"), header["augmentation"]
    line = f"tinymim distill --recipe {{}} --store {shlex.quote(args.out)} --data {data}"
    if header["kind"] != "relations":
        size = "" if views["img_size"] == 224 else f" --img-size {views['img_size']}"  # the recipe's
        return line.format(LOGITS_RECIPE) + size
    from tinymim.distill.stored_relations import options_of
    from tinymim.engine import load_recipe

    return line.format(RELATIONS_RECIPE) + options_of(header, load_recipe(RELATIONS_RECIPE))
