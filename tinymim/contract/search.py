"""Progressive contraction (TinyViT, arXiv 2207.10666): a model becomes smaller step by step, each time in the way that
costs least.

Every step makes one candidate for each factor of :mod:`tinymim.contract.factors`: that number is made smaller until the
step's share of the way to the limits is done (so that candidates of a step cost about the same and their scores can be
compared: NetAdapt's rule, arXiv 1804.03230; the paper tells neither its steps nor its schedule). Counts are checked
first, then latency is measured, then the candidate, with weights cut from its parent, is scored; the best is the next
parent. Everything is determined by the arguments, but for measured times.
"""

import contextlib
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from tinymim.contract.factors import Config, Factor
from tinymim.contract.limits import Limits, in_words
from tinymim.contract.records import Row, Search
from tinymim.contract.weights import Kind, Students
from tinymim.engine.model import NonFiniteLoss
from tinymim.errors import CheckFailed, CheckpointError, ConfigError
from tinymim.files import environment, sha256_file, write_json, write_text
from tinymim.folders import hold
from tinymim.models import read_checkpoint
from tinymim.progress import Progress, say
from tinymim.schema import parse, read_json

LOG, SETTINGS, RESULT = "candidates.jsonl", "search.json", "result.json"
KEPT = ("teacher", "teacher_sha256", "relations", "trained_depth")  # of what a scored student's file says of itself
CHOICE = 3  # candidates of a step, at least, if there are as many factors that bring it nearer to the limits
LEAST = 1e-3  # share of a step, in logarithms, below which no factor is worth a step


@dataclass(frozen=True)
class Candidate:
    """A model to measure and score.

    Attributes:
        step: Of the search, from 1; 0: the start.
        factor: Name of the factor that is smaller than in its parent.
        change: e.g. ``D3 384 -> 320``.
        config: Arguments of :func:`tinymim.models.backbone.from_config`; of a segmentor, see
            :mod:`tinymim.contract.segmentor`.
        params: Parameters.
        macs: Multiply-adds of one image.
        folder: Its own folder.
        file: Name of the file in it that holds its weights: those of its parent, cut, until a score that trains
            replaces the file with the trained ones.
    """

    step: int
    factor: str
    change: str
    config: Config
    params: int
    macs: int
    folder: Path
    file: str = Students.file

    @property
    def student(self) -> Path:
        """The file of its weights."""
        return self.folder / self.file


class Score(Protocol):
    """Candidate -> a number, higher is better; called in its own process with ``parallel``."""

    def __call__(self, candidate: Candidate, /) -> float: ...


@dataclass
class ContractResult:
    """Result of a search.

    Attributes:
        out: Its folder.
        student: The smallest model's weights.
        chosen: The start and the best candidate of every step.
        rows: Every candidate.
    """

    out: Path
    student: Path
    chosen: list[Row]
    rows: list[Row]


class Contraction:
    """A search.

    Args:
        start: The model to shrink, with its weights, or a classifier on it; its ``img_size`` is counted at. Or any
            other :class:`~tinymim.contract.weights.Kind`.
        limits: What it must come down to.
        out: Folder of the search; one that was stopped goes on.
        score: Candidate -> a number, higher is better.
        latency: File of a student -> milliseconds; needed for a limit of latency.
        shrink: Share that a step takes off every quantity whose limit does not hold yet, on average.
        parallel: Candidates scored at a time, in processes.
        settings: Whatever else the scores depend on, as JSON values: a folder with others is refused.
        classes: Names of a classifier's classes.

    Raises:
        ConfigError: no limits, or limits that the start keeps already or that no model of its kind can keep.
    """

    def __init__(
        self,
        start: Any,
        limits: Limits,
        *,
        out: str | Path,
        score: Score,
        latency: Callable[[Path], float] | None = None,
        shrink: float = 0.2,
        parallel: int = 1,
        settings: dict[str, Any] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if not 0 < shrink < 1:
            raise ConfigError(f"--shrink {shrink}", "it is the share that a step takes off", "e.g. --shrink 0.2")
        if parallel < 1:
            raise ConfigError(f"--parallel {parallel}", "at least one candidate is scored at a time", "--parallel 1")
        self.kind: Kind = Students(start, classes) if isinstance(start, torch.nn.Module) else start
        self.limits, self.out, self.config = limits, Path(out), self.kind.config
        self.score, self.latency, self.shrink, self.parallel = score, latency, shrink, parallel
        self.settings = {"limits": asdict(limits), "shrink": shrink, "config": self.config, **(settings or {})}
        self._check_limits()

    def _check_limits(self) -> None:
        if not any(asdict(self.limits).values()):
            raise ConfigError(
                "no limits", "nothing says how small the model must become", "e.g. --params 5.4M --macs 1.3G"
            )
        if self.limits.latency_ms is None and not self.limits.over(*self.kind.count(self.config)):
            raise self._nothing_to_do(*self.kind.count(self.config), None)
        least = self.kind.count(self.kind.smallest(self.config))
        if self.limits.over(*least):
            raise ConfigError(
                f"no model of this kind keeps {self.limits}",
                f"the smallest one has {in_words(least[0])} parameters and {in_words(least[1])} multiply-adds",
                "raise the limits, or start from another kind of model",
            )

    def _nothing_to_do(self, params: int, macs: int, ms: float | None) -> ConfigError:
        took = "" if ms is None else f", {ms:.4g} ms"
        return ConfigError(
            f"the start keeps {self.limits}",
            f"it has {in_words(params)} parameters, {in_words(macs)} multiply-adds{took} ({self.kind.about})",
            "nothing to do: lower a limit, or start from a larger model",
        )

    # candidates ------------------------------------------------------------------------------------------------------

    def neighbours(self, parent: Row | Candidate, ms: float | None, step: int) -> list[Candidate]:
        """One candidate for each factor that alone does the step's share of the way to the limits.

        Where fewer than :data:`CHOICE` do, the share is halved, for more to choose from. A latency is estimated
        from multiply-adds until it is measured.

        Args:
            parent: The model to shrink.
            ms: Its latency.
            step: Number of the step.

        Raises:
            CheckFailed: no factor brings it nearer to the limits.
        """
        about: Any = parent if isinstance(parent, dict) else asdict(parent)
        over = self.limits.over(about["params"], about["macs"], ms)
        share = -math.log(1 - self.shrink) * len(over)
        most: list[Candidate] = []
        while share > LEAST and len(most) < CHOICE:
            aim = max(0.0, sum(over.values()) - share)
            tried = (self._shrunk(about, ms, factor, aim, step) for factor in self.kind.factors(about["config"]))
            found = [candidate for candidate in tried if candidate is not None]
            most = found if len(found) > len(most) else most
            share = min(share, sum(over.values())) / 2
        if most:
            return most
        raise CheckFailed(
            f"step {step}: no factor brings the model nearer to {self.limits}",
            "each is at its smallest, or changes only what keeps its limit",
            "raise the limits; the candidates so far are in " + str(self.out / LOG),
        )

    def _shrunk(self, about: Any, ms: float | None, factor: Factor, aim: float, step: int) -> Candidate | None:
        config: Config | None = about["config"]
        while config is not None and (config := factor.shrink(config)) is not None:
            params, macs = self.kind.count(config)
            guess = None if ms is None else ms * macs / about["macs"]
            if sum(self.limits.over(params, macs, guess).values()) <= aim + 1e-9:
                change = f"{factor.name} {factor.value(about['config']):g} -> {factor.value(config):g}"
                folder = self.out / "candidates" / f"{step:02d}-{factor.name}"
                return Candidate(step, factor.name, change, config, params, macs, folder, self.kind.file)
        return None

    def first(self) -> Candidate:
        """The start as a candidate."""
        folder = self.out / "candidates/00-start"
        return Candidate(0, "start", "start", self.config, *self.kind.count(self.config), folder, self.kind.file)

    # the search ------------------------------------------------------------------------------------------------------

    def run(self) -> ContractResult:
        """Search, or go on with it.

        Raises:
            ConfigError: the folder holds another search, or no model can be as fast as the limit.
            CheckFailed: no candidate of a step can be scored, or is faster than its parent.
        """
        with hold(self.out):
            self.rows = self._read_log()
            if self.latency is not None and not self.rows:
                self._measure_smallest()
            (start,) = self._evaluate([self.first()], None)
            chosen = [start]
            while self._over(chosen[-1]):
                parent, step = chosen[-1], len(chosen)
                rows = self._evaluate(self.neighbours(parent, parent["latency_ms"], step), parent)
                best = self._best(rows)
                chosen.append(best)
                for row in rows:
                    if row is not best:
                        shutil.rmtree(self._folder(row), ignore_errors=True)
                self._say(rows, best)
            return self._finish(chosen)

    def _over(self, row: Row) -> dict[str, float]:
        return self.limits.over(row["params"], row["macs"], row["latency_ms"])

    def _folder(self, row: Row) -> Path:
        return self.out / "candidates" / f"{row['step']:02d}-{row['factor']}"

    def _best(self, rows: Sequence[Row]) -> Row:
        """The row with the highest score; of equal ones the one nearest to the limits, then the first."""
        scored = [row for row in rows if row["score"] is not None]
        if not scored:
            raise CheckFailed(
                f"step {rows[0]['step']}: none of {len(rows)} candidates could be chosen",
                "; ".join(dict.fromkeys(f"{row['change']}: {row['why']}" for row in rows))[:600],
                "choose another recipe or other limits, and another --out",
            )
        return max(scored, key=lambda row: (row["score"], -sum(self._over(row).values())))

    def _evaluate(self, candidates: Sequence[Candidate], parent: Row | None) -> list[Row]:
        """Measure and score candidates that the log does not have yet; the rows of all."""
        known = {(row["step"], row["factor"]): row for row in self.rows}
        missing = [c for c in candidates if (c.step, c.factor) not in known]
        if missing:
            network = self.kind.start if parent is None else self._weights(parent)
            progress = Progress(
                f"step {missing[0].step}: candidate", len(candidates), start=len(candidates) - len(missing)
            )
            ready = ((c, self._prepare(c, network, parent)) for c in missing)
            for done, row in enumerate(self._scored(ready), len(candidates) - len(missing) + 1):
                known[row["step"], row["factor"]] = row
                self._append(row)
                progress.update(done, score=math.nan if row["score"] is None else row["score"])
            progress.close()
        return [known[c.step, c.factor] for c in candidates]

    def _weights(self, row: Row) -> Any:
        """The model of a chosen row."""
        file = self._folder(row) / self.kind.file
        if not file.is_file() or sha256_file(file) != row["sha256"]:
            raise CheckpointError(
                f"{file} is not the file that was scored",
                "it was removed or changed since: the next step takes its weights from it",
                f"restore it, or remove {self.out} and search again",
            )
        return self.kind.open(file)

    def _prepare(self, candidate: Candidate, network: Any, parent: Row | None) -> tuple[float | None, str | None]:
        """Write a candidate's first weights, measure it; its latency, and why it is not worth a score."""
        before = self.config if parent is None else parent["config"]
        model = self.kind.inherit(candidate.config, network, before)
        self.kind.save(model, candidate.student, {"contracted": candidate.change})
        if self.latency is None:
            return None, None
        try:
            ms = self.latency(candidate.student)
        except (CheckFailed, ConfigError) as error:  # of this candidate: the start was measured the same way
            if parent is None:
                raise
            return None, f"{error.what}: {error.why}"
        over = self.limits.over(candidate.params, candidate.macs, ms)
        if parent is None and not over:
            raise self._nothing_to_do(candidate.params, candidate.macs, ms)
        if parent is not None and sum(over.values()) >= sum(self._over(parent).values()):
            return ms, f"measured at {ms:.4g} ms: no nearer to the limits than its parent"
        return ms, None

    def _measure_smallest(self) -> None:
        """Refuse a latency that no model of this kind can have."""
        assert self.latency is not None
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "smallest.pth"
            least = self.kind.smallest(self.config)
            self.kind.save(self.kind.inherit(least, self.kind.start, self.config), file)
            try:
                ms = self.latency(file)
            except (CheckFailed, ConfigError):  # too small for INT8, say; if it is not that, the start says so next
                return
        if self.limits.latency_ms is not None and ms > self.limits.latency_ms:
            raise ConfigError(
                f"no model of this kind takes {self.limits.latency_ms:.4g} ms",
                f"the smallest one was measured at {ms:.4g} ms",
                "raise the limit, or choose a faster --runtime or --precision",
            )

    def _scored(self, ready: Iterator[tuple[Candidate, tuple[float | None, str | None]]]) -> Iterator[Row]:
        if self.parallel == 1:
            for candidate, (ms, why) in ready:
                yield _row(candidate, ms, why, *((None, why, 0.0) if why else evaluate(self.score, candidate)))
            return
        found = list(ready)  # latencies are measured while nothing else runs
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // self.parallel)
        with ProcessPoolExecutor(self.parallel, context, _start_worker, (threads,)) as pool:
            try:
                futures = [None if why else pool.submit(evaluate, self.score, c) for c, (_, why) in found]
                for (candidate, (ms, why)), future in zip(found, futures, strict=True):
                    yield _row(candidate, ms, why, *((None, why, 0.0) if future is None else future.result()))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # those that have begun are stopped by the same Ctrl-C, or end
                raise

    # the folder ------------------------------------------------------------------------------------------------------

    def _read_log(self) -> list[Row]:
        if not (self.out / SETTINGS).is_file():
            if (self.out / LOG).exists():
                raise ConfigError(f"{self.out} has no {SETTINGS}", "it is not a search of ours", "choose another --out")
            return []
        before = read_json(self.out / SETTINGS, Search)["settings"]
        now = json.loads(json.dumps(self.settings))
        if differ := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
            key = differ[0]
            raise ConfigError(
                f"{self.out} holds another search",
                f"{key} is {json.dumps(before.get(key))[:200]} there, {json.dumps(now.get(key))[:200]} here",
                "choose another --out, or repeat its command to go on with it",
            )
        if not (self.out / LOG).is_file():
            return []
        lines = (self.out / LOG).read_text("utf-8").splitlines()
        return [parse(line, Row, f"line {i} of {self.out / LOG}") for i, line in enumerate(lines, 1)]

    def _append(self, row: Row) -> None:
        """Add a row to the log, which is written anew: it is whole at every moment."""
        if not self.rows:
            write_json(self.out / SETTINGS, {"settings": self.settings})
        self.rows.append(row)
        write_text(self.out / LOG, "".join(json.dumps(each) + "\n" for each in self.rows))

    def _say(self, rows: Sequence[Row], best: Row) -> None:
        took = "" if best["latency_ms"] is None else f", {best['latency_ms']:.4g} ms"
        say(
            f"step {best['step']}: {best['change']} is the best of {len(rows)}: "
            f"{in_words(best['params'])} parameters, {in_words(best['macs'])} multiply-adds{took}, "
            f"score {best['score']:.4g}",
        )

    def _finish(self, chosen: list[Row]) -> ContractResult:
        file = self.out / self.kind.file
        meta = read_checkpoint(self._folder(chosen[-1]) / self.kind.file).meta
        kept = {key: meta[key] for key in KEPT if key in meta}
        kept["contracted"] = [row["change"] for row in chosen[1:]]
        self.kind.save(self._weights(chosen[-1]), file, kept)
        write_json(
            self.out / RESULT,
            {
                "kind": "tinymim.contract",
                "settings": self.settings,
                "chosen": chosen,
                "candidates": len(self.rows),
                "student_sha256": sha256_file(file),
                "machine": environment(),
            },
        )
        return ContractResult(self.out, file, chosen, self.rows)


def _start_worker(threads: int) -> None:
    """Of a process that scores: its threads; it ends with the search, which else would find its run folder in use."""
    torch.set_num_threads(threads)
    search = multiprocessing.parent_process()
    assert search is not None

    def follow() -> None:
        search.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def evaluate(score: Score, candidate: Candidate) -> tuple[float | None, str | None, float]:
    """Score a candidate; what it prints goes into its folder.

    Returns:
        Score, or None; why there is none; seconds.

    Raises:
        ConfigError: the start cannot be scored.
    """
    began = time.monotonic()
    try:
        with open(candidate.folder / "log.txt", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            value = float(score(candidate))
        why = None if math.isfinite(value) else f"its score is {value}"
    except (ConfigError, NonFiniteLoss) as error:  # of this candidate: the start was scored the same way
        if candidate.step == 0:
            raise
        value, why = math.nan, f"{error.what}: {error.why}"
    return (None if why else value), why, time.monotonic() - began


def _row(
    candidate: Candidate, ms: float | None, slow: str | None, score: float | None, why: str | None, seconds: float
) -> Row:
    return {
        "step": candidate.step,
        "factor": candidate.factor,
        "change": candidate.change,
        "config": candidate.config,
        "params": candidate.params,
        "macs": candidate.macs,
        "latency_ms": ms,
        "score": score,
        "why": slow or why,
        "seconds": seconds,
        "sha256": None if score is None else sha256_file(candidate.student),
    }
