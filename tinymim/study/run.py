"""Run a study: stages as child processes, dependencies first, several at a time, resumable at any point."""

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from tinymim.engine.run_folder import stop_signals
from tinymim.files import cores, environment, sha256_file, write_json
from tinymim.progress import Progress
from tinymim.schema import read_json, read_lines
from tinymim.study.definition import Study, Trial
from tinymim.study.stages import AGAIN, Folder, Stage, data_words, settings
from tinymim.study.verbs import check_stage

POLL = 0.5  # seconds between checks of the children
MODELS = ("classifier.pth", "segmentor.pth", "student.pth")  # files that a stage may write


@dataclass
class Child:
    """A running stage. Its process holds the lock, too, so the lock survives if the study is killed."""

    stage: Stage
    process: subprocess.Popen[bytes]
    lock: IO[str]
    began: float
    slot: int  # number among the stages that run at once; chooses the GPU if there are several


def command(stage: Stage) -> list[str]:
    """The command line of a stage.

    Raises:
        ConfigError: an option that the verb does not have, or a value that it cannot be given.
    """
    check_stage(stage.verb, stage.options)
    options = dict(stage.options)
    words = [sys.executable, "-m", "tinymim", stage.verb]
    if stage.verb == "segment":
        words += [str(options.pop("config")), "--work-dir", str(stage.run)]
    else:
        words += ["--out", str(stage.run)]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, dict):
            words += [option, *(f"{key}={_option_text(item)}" for key, item in value.items())]
        elif isinstance(value, bool):
            words += [option] if value else []
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return words


def _option_text(value: Any) -> str:
    """A value in the syntax of ``--cfg-options``."""
    return f"[{','.join(map(_option_text, value))}]" if isinstance(value, list) else str(value)


def open_stages(trials: Sequence[Trial]) -> list[Stage]:
    """The stages that the trials still need, each once, dependencies first."""
    stages = {stage.folder: stage for trial in trials for stage in trial.stages.values()}
    return [stage for stage in stages.values() if not stage.done]


def run_trials(
    study: Study,
    trials: Sequence[Trial],
    data: Mapping[str, Folder],
    *,
    parallel: int = 1,
    minutes: float | None = None,
    on_result: Callable[[], object] = lambda: None,
) -> dict[Path, str]:
    """Run the stages of some trials, and write the result file of each trial as soon as its last stage has ended.

    Args:
        study: The study of the trials.
        trials: Trials without a result.
        data: The data folders of the trials.
        parallel: Stages at a time; each gets its share of the cores, and with several GPUs one of them in turn.
        minutes: Start no stage after this time.
        on_result: Called after every result file.

    Returns:
        Result file -> why it is missing, for trials that failed (not for those that only ran out of time).

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the children have saved their state and stopped.
    """
    for stage in open_stages(trials):
        command(stage)  # a wrong option is an error before the first stage starts
    waiting, children, open_trials = open_stages(trials), list[Child](), list(trials)
    failed, failures = dict[Path, str](), dict[Path, str]()  # stage folders, result files
    threads = max(cores() // parallel, 1)
    stop_at = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    line = Progress(study.name, len(trials))
    # "timeout" sends two signals at once: they count as one
    with stop_signals("", grace=1.0) as stop_requested, _stopped_at_the_end(children, threads):
        while open_trials or children:
            for child in [c for c in children if c.process.poll() is not None]:
                if why := _finish(child, threads):
                    failed[child.stage.folder] = why
                children.remove(child)
            for stage in list(waiting):
                if stage.done:  # by another study
                    waiting.remove(stage)
                elif blocked := next((need.folder for need in stage.needs if need.folder in failed), None):
                    failed[stage.folder] = failed[blocked]
                    waiting.remove(stage)
                else:
                    free = len(children) < parallel and time.monotonic() < stop_at
                    ready = free and all(need.done for need in stage.needs)
                    slot = next(i for i in range(parallel + 1) if all(c.slot != i for c in children))
                    if ready and (started := _start(stage, threads, slot)):
                        children.append(started)
                        waiting.remove(stage)
            for trial in list(open_trials):
                stages = trial.stages.values()
                why = next((failed[stage.folder] for stage in stages if stage.folder in failed), "")
                if why or all(stage.done for stage in stages):
                    open_trials.remove(trial)
                    if why := why or _write_result(study, trial, data):
                        failures[trial.file] = why
                    else:
                        on_result()
            if open_trials:
                line.update(len(trials) - len(open_trials), running=len(children))
            if stop_requested:
                raise KeyboardInterrupt
            if not children and time.monotonic() >= stop_at:
                break
            time.sleep(POLL)
    line.close(
        f"{len(trials) - len(open_trials) - len(failures)} of {len(trials)} done, {len(failures)} failed, "
        f"{len(open_trials)} not run"
    )
    return failures


def _gpu(slot: int) -> dict[str, str]:
    """The environment variable that gives a slot one of several GPUs in turn; empty with one GPU or none."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())] if shown is None else shown.split(",")
    return {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if len(names) > 1 else {}


def _start(stage: Stage, threads: int, slot: int) -> Child | None:
    """Start or resume a stage; None if another study is running it or has just finished it."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    lock = open(stage.folder / "lock", "a", encoding="utf-8")  # noqa: SIM115  (held until the stage has ended)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    if stage.done:
        lock.close()
        return None
    reads, noted = stage.reads(), stage.folder / "reads.json"
    same = (read_json(noted, dict[str, str | None], fix=AGAIN) if noted.is_file() else {}) == reads
    again = ["--resume"] if same and (stage.run / "config.py").is_file() else ["--overwrite"] * stage.run.exists()
    if not same:  # start over: an input has changed
        for name in ("done.json", "seconds.txt"):
            (stage.folder / name).unlink(missing_ok=True)
    write_json(noted, reads)
    with open(stage.folder / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command(stage), *again],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **_gpu(slot)},
            pass_fds=[lock.fileno()],
            start_new_session=True,  # the terminal's Ctrl-C goes to the study only, which stops its stages
        )
    return Child(stage, process, lock, time.monotonic(), slot)


def _finish(child: Child, threads: int) -> str:
    """Record the results of a finished child and release its lock; the reason if it failed, else an empty string."""
    stage, code = child.stage, child.process.returncode
    times = stage.folder / "seconds.txt"
    with open(times, "a", encoding="utf-8") as file:
        file.write(f"{time.monotonic() - child.began:.1f}\n")
    why = ""
    if code == 0:
        models = [path for name in MODELS if (path := stage.run / name).is_file()]
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        write_json(
            stage.folder / "done.json",
            {
                "command": command(stage),
                "reads": read_json(stage.folder / "reads.json", dict[str, str | None], fix=AGAIN),
                "seconds": [float(text) for text in times.read_text("utf-8-sig").split()],  # one per session
                "machine": {**environment(), "threads": threads, "gpu": gpu},
                "student_sha256": sha256_file(models[0]) if models else None,
                "result": _result(stage.run),
            },
        )
    else:
        log = (stage.folder / "log.txt").read_text("utf-8-sig", errors="replace").splitlines()
        why = "\n".join(
            [
                f"{stage.folder.name} ended with {code}; {stage.folder / 'log.txt'} ends with",
                *(f"  {text}" for text in log[-8:]),
            ]
        )
    child.lock.close()
    return why


def _result(run: Path) -> dict[str, float]:
    """The numbers of a run: result.json, or else the last value of each in metrics.jsonl."""
    found: dict[str, Any] = {}
    if (run / "result.json").is_file():
        found = read_json(run / "result.json", dict[str, Any])
    elif (run / "metrics.jsonl").is_file():
        for record in read_lines(run / "metrics.jsonl"):
            found |= record
    return {key: value for key, value in found.items() if type(value) in (int, float)}


def _write_result(study: Study, trial: Trial, data: Mapping[str, Folder]) -> str:
    """Write a trial's result file; the reason if it cannot be written, else an empty string."""
    done = {name: stage.outcome() or {} for name, stage in trial.stages.items()}
    scores = {}
    for score in study.scores:
        stage, _, key = score.partition(".")
        if key not in (found := done[stage]["result"]):
            there = ", ".join(found) or "no numbers"
            return (
                f"{trial.stages[stage].folder} has no {key!r}, only {there}; correct the study's score, or delete "
                "this folder to run the stage again"
            )
        scores[score] = found[key]
    own = settings(trial.cell.stages, study.wanted, trial.seed)
    write_json(
        trial.file,
        {
            "study": study.name,
            "cell": trial.cell.name,
            "seed": trial.seed,
            "scores": scores,
            "seconds": {name: round(sum(item["seconds"]), 1) for name, item in done.items()},
            "settings": own,
            "data": {word: data[word].content for word in data_words(own)},
            "stages": {name: stage.folder.name for name, stage in trial.stages.items()},
            "student_sha256": {name: item["student_sha256"] for name, item in done.items()},
            "machine": done[study.wanted[0]]["machine"],
        },
    )
    return ""


@contextlib.contextmanager
def _stopped_at_the_end(children: list[Child], threads: int) -> Iterator[None]:
    """On leaving the block, make running children save and stop, and wait; a second Ctrl-C kills them."""
    try:
        yield
    finally:
        try:
            for child in children:
                child.process.terminate()
            for child in children:
                child.process.wait()
                _finish(child, threads)
        except KeyboardInterrupt:
            for child in children:
                child.process.kill()
            raise
