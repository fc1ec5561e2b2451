"""``tinymim study``: a grid of overrides x seeds, each stage run once, and a table next to the paper's numbers."""

import argparse
import shlex
import sys
from collections.abc import Collection
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("study", help="a shipped study (tinymim list studies), or a .py file of the same keys")
    parser.add_argument(
        "--data", metavar="FOLDER", help="class folders in train/ and val/; with --val-data, the training photos"
    )
    parser.add_argument("--val-data", metavar="FOLDER", help="class folders to score on")
    parser.add_argument(
        "--seg-data", metavar="FOLDER", help="labelled folder in ADE20K layout, for studies that segment"
    )
    parser.add_argument(
        "--teacher-weights", metavar="FILE", help="weights of the teacher, for studies with a timm teacher of a file"
    )
    parser.add_argument("--store", metavar="FOLDER", help="what tinymim cache wrote, for studies of stored targets")
    parser.add_argument("--out", type=Path, default=Path("runs/studies"), help="folder of all studies")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="only these cells")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: the study's")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="stages at a time; each gets its share of the cores and, if there are several GPUs, one of them",
    )
    parser.add_argument("--time-limit", type=float, metavar="MINUTES", help="start no stage after this time")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that would be run")
    parser.add_argument("--table", action="store_true", help="only write the table of existing results")
    parser.add_argument(
        "--rename-stages",
        action="store_true",
        help="give results and stages from before 2026-12 their current names; contents stay unchanged",
    )


def run(args: argparse.Namespace) -> int:
    """Run what is missing; write the table after every result."""
    from tinymim.errors import ConfigError
    from tinymim.folders import remove_dead_parts
    from tinymim.study.definition import choose_cells, load_study, make_trials, read_result
    from tinymim.study.renaming import find_former, rename
    from tinymim.study.run import command, open_stages, run_trials
    from tinymim.study.stages import DATA, find_data
    from tinymim.study.table import study_table
    from tinymim_export.report.study_page import write_study

    if args.parallel < 1:
        raise ConfigError(f"--parallel {args.parallel}", "at least one stage must run at a time", "use --parallel 1")
    study = load_study(args.study)
    cells = choose_cells(study, args.only)
    seeds = list(dict.fromkeys(args.seeds or study.seeds))
    if min(seeds) < 0:
        raise ConfigError(f"the seed {min(seeds)}", "seeds are numbers from 0", "use e.g. --seeds 0 1 2")
    data = find_data(args.data, args.val_data, args.seg_data, args.teacher_weights, args.store)
    remove_dead_parts(args.out, deep=True)

    def write_tables(failed: Collection[Path] = ()) -> list[Path]:
        values = study_table(study, seeds, args.out, data, failed)
        given = dict.fromkeys(option for word in values["data"] for option in DATA[word])
        words = ["tinymim study", shlex.quote(Path(args.study).name), *given]
        words += ["--seeds", *map(str, seeds)] if args.seeds else []
        return write_study(values, args.out / study.name, " ".join(words))

    former = find_former(study, seeds, data, args.out)
    if args.rename_stages:
        there = (args.out / "stages").is_dir() or any((args.out / study.name).glob("cells/*/*.json"))
        if not (there or former or former.left):
            raise ConfigError(
                f"nothing of {study.name} is in {args.out}",
                "--rename-stages renames the results and stages of an earlier run",
                "give the --out of that run",
            )
        print("\n".join(rename(former, study, args.out)) or "nothing to rename")
        for path, why in former.left.items():
            print(f"unchanged: {path}: {why}", file=sys.stderr)
        print("\n".join(map(str, write_tables())))
        return 1 if former.left else 0
    if former:
        raise ConfigError(
            f"{len(former.results)} results and {len(former.folders)} stages in {args.out} are from before 2026-12",
            "stages have new names now: these would not be found, and would be run again",
            "run the same command with --rename-stages first (contents stay unchanged), or choose another --out",
        )
    if args.table:
        print("\n".join(map(str, write_tables())))
        return 0
    trials = [
        t
        for t in make_trials(study, cells, seeds, data, args.out)
        if read_result(study, t.cell, t.seed, args.out, data) is None
    ]
    stages = open_stages(trials)
    total = len(cells) * len(seeds)
    print(
        f"{study.name}: {len(cells)} cells x {len(seeds)} seeds, {total - len(trials)} of {total} done; "
        f"{len(stages)} stages to run"
    )
    if args.dry_run:
        print("\n".join(shlex.join(command(stage)) for stage in stages))
        return 0
    try:
        failures = run_trials(
            study, trials, data, parallel=args.parallel, minutes=args.time_limit, on_result=write_tables
        )
    except KeyboardInterrupt:
        print("\nstopped; running stages were saved: the same command continues them", file=sys.stderr)
        return 130
    files = write_tables(failures)
    for path, why in failures.items():
        print(f"failed: {path.parent.name}, {path.stem}: {why}", file=sys.stderr)
    print("\n".join(map(str, files)))
    return 1 if failures else 0
