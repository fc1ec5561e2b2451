"""Running a study: stages as child processes, dependencies first, several at a time, resumable at any moment."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import torch

import tinymim
from tinymim.engine import JOBS
from tinymim.engine.recipe import load_recipe
from tinymim.errors import ConfigError
from tinymim.files import cores, environment, sha256_file, write_json
from tinymim.progress import Progress
from tinymim.study.definition import Study, Trial
from tinymim.study.stages import Folder, Stage, settings, unknown

POLL = 0.5  # seconds between looks at the children
MODELS = ("classifier.pth", "segmentor.pth", "student.pth")  # what a stage may leave


@dataclass
class Child:
    """A running stage. Its lock is held by the process too, so it outlives a study that is killed."""

    stage: Stage
    process: subprocess.Popen[bytes]
    lock: IO[str]
    began: float
    slot: int  # place among those that run at once; with several GPUs its own one


def command(stage: Stage) -> list[str]:
    """What is typed for a stage; segmentation is a tool, the others are verbs.

    Raises:
        ConfigError: an option or recipe key that the verb does not have, or the tool is not there (an installed package
            without the repository).
    """
    options = dict(stage.options)
    if stage.verb == "segment":
        tool = Path(tinymim.__file__).parents[1] / "tools" / "train_seg.py"
        if not tool.is_file():
            raise ConfigError(
                f"there is no {tool}",
                "segmentation is trained by a tool of the repository, which an installed package lacks",
                "clone the repository, pip install -e . there, and run the study again",
            )
        words = [sys.executable, str(tool), str(options.pop("config")), "--work-dir", str(stage.run)]
    else:
        _check_options(stage)
        words = [sys.executable, "-m", "tinymim", stage.verb, "--out", str(stage.run)]
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, dict):
            words += [option, *(f"{key}={_typed(item)}" for key, item in value.items())]
        elif isinstance(value, bool):
            words += [option] if value else []
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return words


def _check_options(stage: Stage) -> None:
    """Refuse what the verb would refuse, before anything has run."""
    job = JOBS[stage.verb]
    known = {"recipe", *(each.name for each in fields(job.settings_type))}
    known -= {"title", "out", "resume", "overwrite", "dry_run"}
    for name in stage.options:
        if name not in known:
            raise unknown(f"option of {stage.verb}:", name, sorted(known))
    load_recipe(stage.options.get("recipe", job.recipe_name), stage.options.get("cfg_options"), stage.verb)


def _typed(value: Any) -> str:
    """A value as ``--cfg-options`` reads it."""
    return f"[{','.join(map(_typed, value))}]" if isinstance(value, list) else str(value)


def open_stages(trials: Sequence[Trial]) -> list[Stage]:
    """What these trials still need, each stage once, those that others need first."""
    stages = {stage.folder: stage for trial in trials for stage in trial.stages.values()}
    return [stage for stage in stages.values() if not stage.done]


def run_trials(
    study: Study,
    trials: Sequence[Trial],
    data: Mapping[str, Folder],
    *,
    parallel: int = 1,
    minutes: float | None = None,
    ended: Callable[[], object] = lambda: None,
) -> dict[Path, str]:
    """Run what some trials need and write the result file of each as soon as its last stage has ended.

    Args:
        study: Theirs.
        trials: Those without a result.
        data: The data folders they were made with.
        parallel: Stages at a time; each gets its share of the cores, and with several GPUs one of them, in turn.
        minutes: Start no stage after so long.
        ended: Called after every result file.

    Returns:
        Result file -> why it is not there, for those that failed; what only ran out of time is not among them.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the children have saved their state and ended.
    """
    for stage in open_stages(trials):
        command(stage)  # what cannot be typed is said before the first stage starts
    waiting, children, left = open_stages(trials), list[Child](), list(trials)
    failed, lost = dict[Path, str](), dict[Path, str]()  # stage folders, result files
    threads = max(cores() // parallel, 1)
    stop_at = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    line = Progress(study.name, len(trials))
    with _stop_signal() as asked, _stopped_at_the_end(children, threads):
        while left or children:
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
            for trial in list(left):
                stages = trial.stages.values()
                why = next((failed[stage.folder] for stage in stages if stage.folder in failed), "")
                if why or all(stage.done for stage in stages):
                    left.remove(trial)
                    if why := why or _write_result(study, trial, data):
                        lost[trial.file] = why
                    else:
                        ended()
            if left:
                line.update(len(trials) - len(left), running=len(children))
            if asked:
                raise KeyboardInterrupt
            if not children and time.monotonic() >= stop_at:
                break
            time.sleep(POLL)
    line.close(f"{len(trials) - len(left) - len(lost)} of {len(trials)} done, {len(lost)} failed, {len(left)} not run")
    return lost


def _gpu(slot: int) -> dict[str, str]:
    """The environment that gives a slot one of several GPUs, in turn; nothing where there is one or none."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(i) for i in range(torch.cuda.device_count())] if shown is None else shown.split(",")
    return {"CUDA_VISIBLE_DEVICES": names[slot % len(names)]} if len(names) > 1 else {}


def _start(stage: Stage, threads: int, slot: int) -> Child | None:
    """Start a stage, or go on with it; None if another study is at it or has just ended it."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    lock = open(stage.folder / "lock", "a")  # noqa: SIM115  (held until the stage has ended)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    if stage.done:
        lock.close()
        return None
    reads, noted = stage.reads(), stage.folder / "reads.json"
    same = (json.loads(noted.read_text()) if noted.is_file() else {}) == reads
    again = ["--resume"] if same and (stage.run / "config.py").is_file() else ["--overwrite"] * stage.run.exists()
    if not same:  # begun anew: what it was made from was made again
        for name in ("done.json", "seconds.txt"):
            (stage.folder / name).unlink(missing_ok=True)
    write_json(noted, reads)
    with open(stage.folder / "log.txt", "a") as log:
        process = subprocess.Popen(
            [*command(stage), *again],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **_gpu(slot)},
            pass_fds=[lock.fileno()],
            start_new_session=True,  # the terminal's Ctrl-C is for the study, which ends its stages one by one
        )
    return Child(stage, process, lock, time.monotonic(), slot)


def _finish(child: Child, threads: int) -> str:
    """Write what a child that ended has left, and give its lock back; why it failed, or nothing."""
    stage, code = child.stage, child.process.returncode
    times = stage.folder / "seconds.txt"
    with open(times, "a") as file:
        file.write(f"{time.monotonic() - child.began:.1f}\n")
    why = ""
    if code == 0:
        models = [path for name in MODELS if (path := stage.run / name).is_file()]
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        write_json(
            stage.folder / "done.json",
            {
                "command": command(stage),
                "reads": json.loads((stage.folder / "reads.json").read_text()),
                "seconds": [float(text) for text in times.read_text().split()],  # one a session
                "machine": {**environment(), "threads": threads, "gpu": gpu},
                "student_sha256": sha256_file(models[0]) if models else None,
                "result": _result(stage.run),
            },
        )
    else:
        log = (stage.folder / "log.txt").read_text(errors="replace").splitlines()
        why = "\n".join(
            [
                f"{stage.folder.name} ended with {code}; {stage.folder / 'log.txt'} ends with",
                *(f"  {text}" for text in log[-8:]),
            ]
        )
    child.lock.close()
    return why


def _result(run: Path) -> dict[str, float]:
    """The numbers a run has left: result.json, or else the last value of each in metrics.jsonl."""
    found: dict[str, Any] = {}
    if (run / "result.json").is_file():
        found = json.loads((run / "result.json").read_text())
    elif (run / "metrics.jsonl").is_file():
        for text in (run / "metrics.jsonl").read_text().splitlines():
            found |= json.loads(text)
    return {key: value for key, value in found.items() if type(value) in (int, float)}


def _write_result(study: Study, trial: Trial, data: Mapping[str, Folder]) -> str:
    """Write a trial's result file; why it cannot be, or nothing."""
    done = {name: json.loads((stage.folder / "done.json").read_text()) for name, stage in trial.stages.items()}
    scores = {}
    for score in study.scores:
        stage, _, key = score.partition(".")
        if key not in (found := done[stage]["result"]):
            there = ", ".join(found) or "no number at all"
            return (
                f"{trial.stages[stage].folder} holds no {key!r}, but {there}; correct the study's score, or delete "
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
            "data": {word: folder.content for word, folder in data.items() if f'"{{{word}}}"' in json.dumps(own)},
            "stages": {name: stage.folder.name for name, stage in trial.stages.items()},
            "student_sha256": {name: item["student_sha256"] for name, item in done.items()},
            "machine": done[study.wanted[0]]["machine"],
        },
    )
    return ""


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[float]]:
    """When Ctrl-C or SIGTERM came first, once one has; another one a second later raises KeyboardInterrupt at once."""
    asked: list[float] = []  # no threading.Event: two signals at once, as "timeout" sends them, would lock it for good

    def ask(number: int, frame: Any) -> None:
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > 1:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _stopped_at_the_end(children: list[Child], threads: int) -> Iterator[None]:
    """Ask children that still run to save and end when the block is left, and wait; a second Ctrl-C kills them."""
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
