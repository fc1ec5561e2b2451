"""The measurements of ``--tune``: candidates timed in turn with the original, scored, judged, and kept in a folder.

The folder holds ``tune.json``, ``report.html``, the candidates' files, and ``scores/`` (per photo, as written by
``tinymim eval``).
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tinymim.errors import CheckFailed, ConfigError, DataError
from tinymim.files import sha256_file
from tinymim.progress import say
from tinymim.records import Eval, Tune
from tinymim.schema import read_json
from tinymim_export.bench.compare import machine_differences
from tinymim_export.bench.explain import facts, machine
from tinymim_export.bench.stats import bootstrap_median, bootstrap_miou, bootstrap_miou_drop, pairwise_ratio, unsteady
from tinymim_export.bench.timing import interleave
from tinymim_export.runtime.engines import Engine
from tinymim_export.runtime.metadata import graph_sha256, load_proto, save_proto, write_metadata
from tinymim_export.tune.result import TuneResult
from tinymim_export.tune.targets import Target
from tinymim_export.tune.verdict import BASELINE, PROMOTED, Budget, Candidate, choose, contenders, decide

AT_ONCE = 3  # sessions in memory in addition to the original's


@dataclass(frozen=True, eq=False)
class Wanted:
    """A candidate to measure."""

    target: Target
    name: str
    graph: list[str]
    precision: str  # of the file
    path: Path


class Score:
    """mIoU with its counts per photo, from the JSON of ``tinymim eval``."""

    def __init__(self, value: dict[str, Any]) -> None:
        self.miou: float = value["mIoU"]
        self.class_iou: dict[str, float | None] = value["class_IoU"]
        self.images, self.mode, self.data = value["images"], value["mode"], Path(value["data"]).name
        photos = value["photos"]
        self.names: list[str] = photos["names"]
        self.right_IC, self.labelled_IC, self.predicted_IC = (
            np.asarray(photos[key], np.int64) for key in ("right", "labelled", "predicted")
        )


class Run:
    """The measurements so far.

    Args:
        folder: Folder of the results; created if missing.
        settings: Settings that decide the measurements; an earlier run is resumed only if they are equal.
        budget: Budget that decides the verdicts; may change between runs.
        score: Returns the EvalResult of an open file.

    Attributes:
        candidates: Measured candidates, in order; the first is the original, with which all others are compared.
        left_out: (what, why) of candidates that are not possible here.
        resumed: Whether an earlier run is resumed.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], budget: Budget, score: Callable[[Engine], Any]) -> None:
        self.folder, self.settings, self.budget, self.score = folder, settings, budget, score
        self.environment = machine()
        self.threads: int = settings["threads"]
        self.candidates: list[Candidate] = []
        self.left_out: list[tuple[str, str]] = []
        self.baseline: Wanted | None = None
        self._made: set[Path] = set()
        self._scores: dict[tuple[str, str], Score] = {}
        known = self._stored()
        self.resumed = known is not None
        self._known = known or {}
        if not self.resumed:
            shutil.rmtree(folder / "scores", ignore_errors=True)
            if (folder / "tune.json").is_file():  # files of other settings, which a resumed run would take for its own
                for path in folder.glob("*.onnx"):
                    path.unlink()
            self._result().to_json(folder / "tune.json")

    def leave_out(self, what: str, why: str) -> None:
        """Record and print a candidate that is not possible here."""
        self.left_out.append((what, why))
        say(f"left out: {what}: {why}")

    def make(self, name: str, build: Callable[[Path], object]) -> Path | None:
        """The file of a candidate, built once; None (and recorded) if that is not possible."""
        path = self.folder / f"{name.replace(' + ', '_').replace(' ', '-')}.onnx"
        if path in self._made or (self.resumed and path.is_file()):
            return path
        if name not in dict(self.left_out):
            try:
                build(path)
                self._made.add(path)
                return path
            except (ConfigError, CheckFailed) as error:
                self.leave_out(name, f"{error.what}: {error.why}")
        return None

    def measure(self, wanted: Sequence[Wanted], *, together: bool = False) -> None:
        """Time, score and judge candidates that are not yet measured; ``together``: all in one round, or none."""
        if self.baseline is None:
            self.baseline = wanted[0]
        known = [self._known.get((sha256_file(one.path), one.target.engine)) for one in wanted]
        if together and not all(known):
            return self._round(wanted)
        for row in filter(None, known):
            self._add(row)
        todo = [one for one, row in zip(wanted, known, strict=True) if row is None]
        for at in range(0, len(todo), AT_ONCE):
            self._round(todo[at : at + AT_ONCE])

    def _round(self, wanted: Sequence[Wanted]) -> None:
        """Measure some candidates in turn with the original."""
        assert self.baseline is not None
        base = self.baseline.target.open(self.baseline.path, self.threads)
        shape, seed = base.shape(), self.settings["seed"]
        reference = self._scored(base)  # first: wrong data fail before the work
        opened: list[tuple[Wanted, Engine, Callable[[], float]]] = []
        for one in wanted:
            try:
                engine = base if one is self.baseline else one.target.open(one.path, self.threads)
                once = engine.timer(shape, seed)
                engine.placement()  # refuses a fall-back
                opened.append((one, engine, once))
            except (ConfigError, CheckFailed) as error:
                self.leave_out(f"{one.name} on {one.target.engine}", f"{error.what}: {error.why}")
        if not opened:
            return
        rest = [entry for entry in opened if entry[1] is not base]
        timers = [base.timer(shape, seed), *(once for *_, once in rest)]
        series = interleave(timers, runs=None, seconds=self.settings["seconds"])
        times = dict(zip([self.baseline, *(one for one, *_ in rest)], series, strict=True))
        plain = {one.target.engine: times[one] for one, *_ in opened if one.path == self.baseline.path}
        for one, engine, _ in opened:
            row = self._row(one, engine, shape, times[one], times[self.baseline], self._scored(engine), reference)
            if one.graph and one.target.engine in plain:
                row.gain = pairwise_ratio(plain[one.target.engine], times[one], self.settings["seed"])
            self._add(row)

    def _row(
        self,
        one: Wanted,
        engine: Engine,
        shape: tuple[int, ...],
        ms: Sequence[float],
        base_ms: Sequence[float],
        score: Score,
        reference: Score,
    ) -> Candidate:
        seed = self.settings["seed"]
        return Candidate(
            name=one.name,
            precision=one.precision,
            graph=list(one.graph),
            runtime=one.target.runtime,
            provider=one.target.provider,
            arithmetic=one.target.compute_type,
            engine=engine.label,
            file=one.path.name,
            sha256=engine.sha256,
            file_mib=one.path.stat().st_size / 2**20,
            shape=shape,
            gpu=None if engine.place.device == "cpu" else self.environment["gpus"],
            threads=self.threads,
            runs=len(ms),
            p50_ms=float(np.median(ms)),
            p50_interval=bootstrap_median(ms, seed),
            p90_ms=float(np.percentile(ms, 90)),
            original_ms=float(np.median(base_ms)),
            speed_up=pairwise_ratio(base_ms, ms, seed),
            steady=not unsteady(ms, seed),
            mIoU=score.miou,
            mIoU_interval=bootstrap_miou(score, seed),
            drop=reference.miou - score.miou,
            drop_interval=bootstrap_miou_drop(reference, score, seed),
            class_IoU=score.class_iou,
            images=score.images,
            mode=score.mode,
            data=score.data,
            facts=facts(engine, shape) | {"excluded": (engine.meta.get("precision") or {}).get("excluded") or []},
            verdict=BASELINE if one is self.baseline else "",
        )

    def _scored(self, engine: Engine) -> Score:
        """The score of an open file, cached in ``scores/``."""
        key = (engine.sha256, engine.label)
        if key not in self._scores:
            path = self.folder / "scores" / f"{engine.path.stem} {engine.label}.json".replace(" ", "_")
            try:
                value = read_json(path, Eval) if path.is_file() else {}
            except DataError:  # damaged: scored again
                value = {}
            if (value.get("sha256"), value.get("engine")) != key:
                value = json.loads(self.score(engine).to_json(path))
            if value["mIoU"] is None:
                raise DataError("there is no mIoU", "the labels have no pixel of any class", "give labelled photos")
            self._scores[key] = Score(value)
        return self._scores[key]

    def _add(self, row: Candidate) -> None:
        """Judge, print and store a measured candidate."""
        if row.verdict != BASELINE:
            row.verdict, row.reasons, row.remarks = decide(row, self.budget)
        self.candidates.append(row)
        say(f"  {len(self.candidates)}. {row}")
        self._known.pop(row.key, None)
        result = self._result()
        result.candidates = [*self.candidates, *self._known.values()]  # keep earlier results that are still to come
        result.to_json(self.folder / "tune.json")

    def _result(self) -> TuneResult:
        return TuneResult(
            None, str(self.folder), None, self.candidates, self.left_out, self.budget, self.settings, self.environment
        )

    def _stored(self) -> dict[tuple[str, str], Candidate] | None:
        """Candidates of an earlier run with the same settings on the same machine; None if there is none."""
        path = self.folder / "tune.json"
        if not path.is_file():
            return None
        try:
            old = read_json(path, Tune)
            names = {item.name for item in fields(Candidate)}
            rows = [Candidate(**{k: v for k, v in row.items() if k in names}) for row in old["candidates"]]
            differing = machine_differences(old["environment"], self.environment)
            earlier = old["settings"]
            differing += [f"{k}: {earlier.get(k)} against {v}" for k, v in self.settings.items() if earlier.get(k) != v]
        except (DataError, KeyError, TypeError):
            differing = [f"{path} cannot be read"]
        if differing:
            say(f"note: everything is measured again, not resumed ({'; '.join(differing)})")
            return None
        if rows:
            say(f"note: resuming after {len(rows)} measured candidates ({path})")
        return {row.key: row for row in rows}

    def finish(self, onnx: Path, seconds: float) -> TuneResult:
        """Choose the winner, write it with its measurements, write report and result.

        Raises:
            CheckFailed: nothing was promoted.
        """
        result = self._result()
        result.seconds = seconds
        finalists = contenders(self.candidates)
        if not finalists:
            result.write()
            result.print()
            best = min(self.candidates[1:], key=lambda c: len(c.reasons), default=None)
            near = f"nearest: {best.name} on {best.engine}: {best.reasons[0]}" if best else "there was no candidate"
            raise CheckFailed(
                f"none of {len(self.candidates) - 1} candidates keeps the budget ({self.budget})",
                near,
                f"read {self.folder / 'report.html'}; then a larger --max-miou-drop, a smaller --min-speedup or a "
                "lighter head (measurements are kept)",
            )
        times: list[list[float]] = [[c.p50_ms] for c in finalists]
        if len(finalists) > 1:
            say(f"final: {len(finalists)} candidates in turn")
            engines = [self._target(c).open(self.folder / c.file, self.threads) for c in finalists]
            timers = [
                engine.timer(c.shape, self.settings["seed"]) for engine, c in zip(engines, finalists, strict=True)
            ]
            times = interleave(timers, runs=None, seconds=self.settings["seconds"])
        winner, why = choose(finalists, times)
        result.winner, result.why, result.onnx = winner, why, str(onnx)
        result.onnx_sha256 = self._write_winner(winner, onnx, why)
        result.write()
        return result

    def _target(self, row: Candidate) -> Target:
        return Target(row.runtime, row.provider, row.arithmetic, ())

    def _write_winner(self, winner: Candidate, onnx: Path, why: str) -> str:
        """Copy the winner, with its measurements in the metadata ``tune``; return the sha256 of the copy."""
        proto = load_proto(self.folder / winner.file)
        measured = graph_sha256(proto)
        card = {
            "verdict": PROMOTED,
            "why": why,
            "runtime": winner.runtime,
            "provider": winner.provider,
            "precision": winner.arithmetic,
            "p50_ms": winner.p50_ms,
            "p50_interval": winner.p50_interval,
            "speed_up": winner.speed_up,
            "mIoU": winner.mIoU,
            "mIoU_drop": winner.drop,
            "mIoU_drop_interval": winner.drop_interval,
            "images": winner.images,
            "mode": winner.mode,
            "data": winner.data,
            "threads": winner.threads,
            "budget": vars(self.budget),
            "measured_sha256": winner.sha256,
            "original_sha256": self.candidates[0].sha256,
            "cpu": self.environment["cpu"],
            "cores": self.environment["cores"],
        }
        write_metadata(proto, {"tune": card})
        save_proto(proto, onnx)
        if graph_sha256(load_proto(onnx)) != measured:
            raise CheckFailed(f"{onnx} is not the measured file", "its graph changed in the copy", "run it again")
        return sha256_file(onnx)
