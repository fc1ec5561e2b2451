"""Sequential distillation: each student is the next teacher, read with the heads of the relations it learned."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tinymim.compat import is_first_process
from tinymim.distill.targets import parse_target
from tinymim.engine.build import student_outline
from tinymim.engine.pretraining import RunResult, distill
from tinymim.engine.recipe import load_recipe
from tinymim.errors import ConfigError
from tinymim.files import write_json
from tinymim.folders import OpenRun, open_run
from tinymim.models import create_model, save_student
from tinymim.models.registry import model_names
from tinymim.progress import say
from tinymim.records import Chain
from tinymim.schema import read_json

TEACHERS = {
    "mae_base": "timm/vit_base_patch16_224.mae",
    "mae_large": "timm/vit_large_patch16_224.mae",
    "mae_huge": "timm/vit_huge_patch14_224.mae",
}


@dataclass
class ChainResult:
    """Result of a chain: its folder, the file of the last student, and the result of every hop."""

    out: Path
    student: Path
    hops: list[RunResult] = field(default_factory=list)


def parse_chain(text: str) -> tuple[str, list[str]]:
    """``mae_large:base:small:tiny`` -> the first teacher, and the students' registry names.

    Args:
        text: The first word is one of :data:`TEACHERS`, ``timm/NAME`` or a checkpoint file; the others are registry
            names, with or without ``tinymim_vit_``.

    Raises:
        ConfigError: no student, or an unknown one.
    """
    teacher, *students = text.split(":")
    names = [word if word in model_names() else f"tinymim_vit_{word}" for word in students]
    wrong = [word for word, name in zip(students, names, strict=True) if name not in model_names()]
    if not teacher or not students or wrong:
        short = ", ".join(name.removeprefix("tinymim_vit_") for name in model_names())
        raise ConfigError(
            f"the chain {text!r} " + (f"has the unknown student {wrong[0]!r}" if wrong else "has no student"),
            f"a chain is TEACHER:STUDENT:STUDENT..., students are {short}",
            "e.g. --chain mae_large:base:small:tiny",
        )
    return TEACHERS.get(teacher, teacher), names


def distill_chain(
    chain: str | None = None,
    recipe: str = "tinymim_chain",
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    teacher_weights: str | None = None,
    cfg_options: dict[str, Any] | None = None,
    **options: Any,
) -> ChainResult:
    """Distil hop by hop; every hop is a run folder ``out/1_base``, ``out/2_small``, ... and starts from random weights.

    The relations that a student learns at its last block are grouped into the heads of the chain's first teacher, not
    into its own; as a teacher it is read in that grouping, which its file stores. The published code uses the student's
    own number of heads there (12 instead of 16 for the base model), or cannot pair the maps at all.

    Args:
        chain: e.g. ``mae_large:base:small:tiny``; None: the recipe's ``chain``.
        recipe: Settings of every hop; its ``hops`` (a dict of overrides for each) change single ones.
        out: Folder of the chain; None: ``runs/<recipe>``.
        resume: Continue where the chain stopped, within a hop or between two.
        overwrite: Replace the contents of ``out``.
        dry_run: One step of every hop, memory and time, no files.
        teacher_weights: File for a timm teacher (of the first hop).
        cfg_options: Dotted recipe keys, for every hop; ``target_block`` and ``teacher_heads`` apply to the first
            teacher only (students are read where they learned their relations, unless a hop's overrides change it).
        options: Other fields of :class:`~tinymim.engine.settings.DistillSettings`, for every hop.

    Raises:
        TinyMIMError: a chain that does not fit together, or an error of a hop.
    """
    named = {"chain": chain, **(cfg_options or {})}
    config = load_recipe(recipe, named, "distill")
    if not config.chain:
        raise ConfigError(f"{recipe} names no chain", "chain is empty", "add --chain mae_large:base:small:tiny")
    teacher, students = parse_chain(config.chain)
    hops = [dict(hop) for hop in config.hops] or [{} for _ in students]
    if len(hops) != len(students):
        raise ConfigError(
            f"{recipe} has {len(hops)} hops for {len(students)} students",
            "each student has a dict of overrides",
            "give one dict per student, {} for none",
        )
    common = {k: v for k, v in (cfg_options or {}).items() if k not in ("chain", "hops")}
    if load_recipe(recipe).target_block:
        raise ConfigError(
            f"{recipe} has a target_block",
            "it would apply to every student as teacher, too",
            "write it into the first of its hops: hops=[dict(target_block=18), {}, ...]",
        )
    first = {
        "target_block": common.pop("target_block", None),
        "teacher_weights": teacher_weights,
        "teacher_heads": options.pop("teacher_heads", None),
    }
    overrides = [{**common, **(first if i == 0 else {}), **hop} for i, hop in enumerate(hops)]
    _check_hops(recipe, students, overrides, options)
    folder = Path(out or f"runs/{Path(recipe).stem}")
    if resume and not folder.is_dir():
        raise ConfigError(f"{folder} holds no chain to resume", "the folder is missing", "leave --resume out")
    with ExitStack() as held:
        scratch = Path(held.enter_context(TemporaryDirectory())) if dry_run else folder
        if not dry_run and is_first_process():
            opened = held.enter_context(open_run(folder, resume=resume, overwrite=overwrite))
            held.callback(_leave, opened)
            _begin(opened, config.chain)
        earlier = _read(folder)["hops"] if resume else []
        result = ChainResult(folder, Path())
        done_hops: list[dict[str, Any]] = []
        for number, (student, hop) in enumerate(zip(students, overrides, strict=True), 1):
            name = f"{number}_{student.removeprefix('tinymim_vit_')}"
            started = (folder / name / "config.py").is_file()
            if is_first_process():
                source = teacher if number == 1 else done_hops[-1]["run"]
                say(f"hop {number} of {len(students)}: {student} from {source}")
            run = distill(
                recipe,
                teacher=teacher,
                student=student,
                out=folder / name,
                resume=resume and started,
                overwrite=not started,
                dry_run=dry_run,
                title=f"hop {number}/{len(students)}",
                cfg_options=hop,
                **options,
            )
            result.hops.append(run)
            entry = {
                "run": name,
                "student": student,
                "teacher": teacher,
                "relations": run.relations,
                "steps": run.steps,
                "seconds": round(run.seconds, 1),
            }
            done_hops.append(earlier[number - 1] if number <= len(earlier) else entry)
            if not dry_run and is_first_process():
                write_json(folder / "chain.json", {"chain": config.chain, "hops": done_hops})
            result.student = folder / name / "student.pth"
            teacher = str(result.student)
            if dry_run:  # an untrained student as the teacher of the next hop
                teacher = str(scratch / f"{name}.pth")
                save_student(_untrained(recipe, student, hop, options), teacher, {"relations": run.relations})
        return result


def _untrained(recipe: str, student: str, overrides: dict[str, Any], options: dict[str, Any]) -> Any:
    """The student of a hop with random weights, the teacher of the next hop of a dry run."""
    config = load_recipe(recipe, {"student": student, "img_size": options.get("img_size"), **overrides})
    return create_model(config.student, img_size=config.img_size, **config.student_args)


def _check_hops(recipe: str, students: list[str], overrides: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Check the options of all hops before the first one starts.

    Raises:
        ConfigError: other teachers, an unknown key, or a block that a student does not have.
    """
    depth = 0  # of the first teacher: not yet known
    for student, hop in zip(students, overrides, strict=True):
        own = {key: value for key, value in {**options, "student": student}.items() if key in ("student", "targets")}
        config = load_recipe(recipe, {**own, **hop}, "distill")
        if config.teachers:
            raise ConfigError(
                "teachers in addition to a chain",
                "each student is the only teacher of the next one",
                "leave teachers out",
            )
        deep = student_outline(config).depth
        for word in config.targets if depth else ():
            parse_target(word, depth, deep, config.target_block)
        depth = deep


def _read(folder: Path) -> dict[str, Any]:
    """chain.json of a folder; without one, an empty chain."""
    file = folder / "chain.json"
    fix = "start the chain again with --overwrite"
    return read_json(file, Chain, fix=fix) if file.is_file() else {"chain": None, "hops": []}


def _begin(opened: OpenRun, chain: str) -> None:
    """Begin the chain, or go on with it.

    Raises:
        ConfigError: the folder holds something else, or a different chain.
    """
    if opened.fresh:
        opened.begin()
        write_json(opened.path / "chain.json", {"chain": chain, "hops": []})
        return
    before = _read(opened.path)["chain"]
    if before != chain:
        raise ConfigError(
            f"{opened.path} holds " + (f"the chain {before}" if before else "no chain to resume"),
            f"the requested chain is {chain}",
            "resume with the same chain, or choose another --out",
        )


def _leave(opened: OpenRun) -> None:
    """A chain whose first hop could not be built has not begun: nothing of it stays."""
    opened.begun = any(opened.path.glob("*/config.py"))
