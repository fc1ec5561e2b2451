"""The table of a study as plain values: means, standard deviations, and the paper's order of the cells against ours."""

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from tinymim.errors import DataError
from tinymim.files import sha256_file
from tinymim.study.definition import Cell, Study, read_result, result_file
from tinymim.study.stages import Folder, settings

LEVEL = 0.05  # significance level, two-sided
APART = "a shared stage trained apart, no statement"


def study_table(
    study: Study,
    seeds: Collection[int],
    out: Path,
    data: Mapping[str, Folder] | None = None,
    failed: Collection[Path] = (),
) -> dict[str, Any]:
    """Gather the result files of a study. Trials that were not run are missing; nothing is filled in.

    Args:
        study: The study.
        seeds: Columns of the table.
        out: Folder of all studies.
        data: Only results of this data; None: of any data.
        failed: Result files of trials that failed in this run.

    Returns:
        Plain values for JSON. Our scores are fractions, as the verbs wrote them, the paper's are percent, as printed.

    Raises:
        DataError: results of several datasets.
    """
    results = {
        (cell.name, seed): value
        for cell in study.cells
        for seed in seeds
        if (value := read_result(study, cell, seed, out, data))
    }
    contents = {
        word: {
            item["data"][word]["list_sha256"]: item["data"][word] for item in results.values() if word in item["data"]
        }
        for word in ("photos", "val_photos", "segments")
    }
    if mixed := [word for word, found in contents.items() if len(found) > 1]:
        raise DataError(
            f"the results in {out / study.name} are from several datasets ({', '.join(mixed)})",
            "they cannot be compared",
            "add --data FOLDER to choose one, or give each its own --out",
        )
    machines = [item["machine"] for item in results.values()]
    files = [
        result_file(study, cell, seed, out) for cell in study.cells for seed in seeds if (cell.name, seed) in results
    ]
    return {
        "study": study.name,
        "title": study.title,
        "paper": study.paper,
        "scores": study.scores,
        "seeds": sorted(seeds),
        "rows": [_row(study, cell, seeds, results, out, failed) for cell in study.cells],
        "pairs": [pair for score in study.scores for pair in holm([*_pairs(study, score, results)])],
        "level": LEVEL,
        "data": {word: item for word, found in contents.items() for item in found.values()},
        "machines": [machine for i, machine in enumerate(machines) if machine not in machines[:i]],
        "settings": {
            cell.name: next((item["settings"] for (name, _), item in results.items() if name == cell.name), None)
            for cell in study.cells
        },
        "apart": trained_apart(results.values()),
        "files": {str(path.relative_to(out / study.name)): sha256_file(path) for path in files},
    }


def trained_apart(results: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Stages with the same settings but different weights, because they were trained again elsewhere.

    Args:
        results: Contents of result files.

    Returns:
        "name (folder)" of such a stage -> sha256 of each model it wrote.
    """
    files: dict[str, list[str]] = {}
    for item in results:
        for stage, folder in item["stages"].items():
            found, file = files.setdefault(f"{stage} ({folder})", []), str(item["student_sha256"][stage])
            found += [file] * (file not in found)
    return {stage: found for stage, found in files.items() if len(found) > 1}


def _row(
    study: Study,
    cell: Cell,
    seeds: Collection[int],
    results: Mapping[tuple[str, int], Any],
    out: Path,
    failed: Collection[Path],
) -> dict[str, Any]:
    own = {seed: results[cell.name, seed] for seed in sorted(seeds) if (cell.name, seed) in results}
    scores = {}
    for score in study.scores:
        values = {seed: item["scores"][score] for seed, item in own.items()}
        scores[score] = {
            "paper": cell.paper.get(score),
            "values": {str(seed): value for seed, value in values.items()},
            "mean": statistics.fmean(values.values()) if values else None,
            "sd": statistics.stdev(values.values()) if len(values) > 1 else None,
        }
    by_seed = [settings(cell.stages, study.wanted, seed) for seed in (0, 1)]
    seconds = {stage: statistics.fmean(item["seconds"][stage] for item in own.values()) for stage in by_seed[0] if own}
    return {
        "cell": cell.name,
        "group": cell.group,
        "n": len(own),
        "scores": scores,
        "seconds": {stage: spent for stage, spent in seconds.items() if by_seed[0][stage] != by_seed[1][stage]},
        "shared_seconds": {stage: spent for stage, spent in seconds.items() if by_seed[0][stage] == by_seed[1][stage]},
        "failed": [seed for seed in sorted(seeds) if result_file(study, cell, seed, out) in failed],
    }


def _pairs(study: Study, score: str, results: Mapping[tuple[str, int], Any]) -> Iterator[dict[str, Any]]:
    """Every pair of cells that the paper orders; neighbours in that order are marked."""
    for group in dict.fromkeys(cell.group for cell in study.cells):
        members = [cell for cell in study.cells if cell.group == group and score in cell.paper]
        order = sorted(members, key=lambda cell: -cell.paper[score])
        neighbours = list(pairwise(order))
        for better, worse in combinations(order, 2):
            if better.paper[score] > worse.paper[score]:
                own = [
                    {seed: item for (name, seed), item in results.items() if name == cell.name}
                    for cell in (better, worse)
                ]
                found = compare(*({seed: item["scores"][score] for seed, item in items.items()} for items in own))
                if trained_apart(item for items in own for item in items.values()):
                    found = dict.fromkeys(found) | {"difference": found["difference"], "verdict": APART}
                yield {
                    "score": score,
                    "group": group,
                    "better": better.name,
                    "worse": worse.name,
                    "neighbours": (better, worse) in neighbours,
                    "paper": round(better.paper[score] - worse.paper[score], 4),
                    **found,
                }


def holm(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs with ``p_holm``: their p values corrected for the number of tests (Holm 1979); None without p."""
    known = sorted((pair for pair in pairs if pair["p"] is not None), key=lambda pair: pair["p"])
    corrected, least = {}, 0.0
    for i, pair in enumerate(known):
        least = max(least, min((len(known) - i) * pair["p"], 1.0))
        corrected[id(pair)] = least
    return [{**pair, "p_holm": corrected.get(id(pair))} for pair in pairs]


def compare(better: Mapping[int, float], worse: Mapping[int, float]) -> dict[str, Any]:
    """Test whether the scores of one cell exceed those of another.

    A t-test of the difference of the means: paired by seed if both have the same seeds, else Welch's. The verdict is
    "reproduced" or "reversed" if p is below :data:`LEVEL`, else "within noise". Each pair is tested on its own;
    :func:`holm` corrects for their number.

    Args:
        better: Seed -> score of the cell that is better in the paper.
        worse: Seed -> score of the other.

    Returns:
        ``difference`` of the means and its ``standard_error``, ``test``, ``t``, ``df``, ``p`` and ``verdict``; all but
        the last are None if they cannot be computed.
    """
    from scipy import stats

    values: dict[str, Any] = dict.fromkeys(("difference", "standard_error", "test", "t", "df", "p"))
    if not better or not worse:
        return values | {"verdict": "not run"}
    values["difference"] = difference = statistics.fmean(better.values()) - statistics.fmean(worse.values())
    if min(len(better), len(worse)) < 2:
        return values | {"verdict": "one seed, no statement"}
    if better.keys() == worse.keys():
        apart = [better[seed] - worse[seed] for seed in better]
        error, df = statistics.stdev(apart) / math.sqrt(len(apart)), len(apart) - 1.0
        test = "paired"
    else:
        parts = [statistics.variance(cell.values()) / len(cell) for cell in (better, worse)]
        error, test = math.sqrt(sum(parts)), "Welch"
        df = sum(parts) ** 2 / max(
            sum(v**2 / (len(c) - 1) for v, c in zip(parts, (better, worse), strict=True)), 1e-300
        )
    if error < 1e-9:  # the same difference every time, up to rounding: the noise is unknown
        return values | {"standard_error": 0.0, "test": test, "verdict": "no spread, no statement"}
    t = difference / error
    p = float(2 * stats.t.sf(abs(t), df))
    verdict = "within noise" if p >= LEVEL else "reproduced" if t > 0 else "reversed"
    return values | {"standard_error": error, "test": test, "t": t, "df": df, "p": p, "verdict": verdict}
