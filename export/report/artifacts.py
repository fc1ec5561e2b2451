"""Where the facts about a lineage come from: run folders, .pth and .onnx files, result files. No torch."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tinymim import records
from tinymim.errors import DataError
from tinymim.files import sha256_file
from tinymim.records import read_env
from tinymim.schema import check, read_json
from tinymim_export.bench.stats import bootstrap_miou
from tinymim_export.report.lineage import PYTORCH, TUNED, Counts, Detected, File, Lineage, Score, Time, data_key
from tinymim_export.report.page import hide_paths, read_config, read_metrics
from tinymim_export.report.plots import thin
from tinymim_export.report.run_config import flat_settings, noted_command
from tinymim_export.report.tensor_shapes import read_weights
from tinymim_export.runtime.engines.base import DEFAULT, engine_label, packages, provider_word
from tinymim_export.runtime.metadata import check_verified, not_onnx, read_metadata
from tinymim_export.runtime.sessions import PROVIDERS

NAMED = {"Classifier": "classifier", "Tracker": "tracker", "Detector": "detector"}  # by what a file says it holds
WEIGHTS = ("segmentor.pth", *(f"{role}.pth" for role in NAMED.values()), "student.pth", "student.safetensors")
SHAPES: dict[str, Any] = {
    "export": records.Export,
    "eval": records.Eval,
    "accuracy": records.Accuracy,
    "bench": records.Bench,
    "tune": records.Tune,
    "sensitivity": records.Sensitivity,
    "compare": records.Compare,
    "lineage": Lineage,
    "demo": records.Demo,
}
KINDS = tuple(SHAPES)[:-1]
STAMP = ("cpu", "cores", "platform", "machine", "cpu_features", "gpu")  # times compare only where these are equal
CURVES = ("loss", "val_loss", "mIoU")


def weights_file(path: Path) -> File:
    """Weights of any kind by their file."""
    shapes, meta = read_weights(path)
    segmentor = any(name.startswith("decode_head.") for name in shapes)
    counted = [
        math.prod(shape)
        for name, shape in shapes.items()
        if not re.search(r"^auxiliary_head\.|running_(mean|var)$|num_batches_tracked$", name)
    ]
    config = meta.get("config")
    named = "segmentor" if segmentor else NAMED.get(str(meta.get("name")))
    # a run of ours without a teacher: pre-trained, to be one
    pretrained = "method" in meta and not meta.get("teacher_sha256")
    return File(
        sha256_file(path),
        f"{path.resolve().parent.name}/{path.name}",
        named or ("teacher" if pretrained else "student"),
        parents={
            name: sha
            for relation in ("teacher", "student")
            for name, sha in _numbered(relation, str(meta.get(f"{relation}_sha256") or "").split(" + ")).items()
        },
        mib=path.stat().st_size / 2**20,
        parameters=sum(counted) or None,
        precision="fp32",
        config_sha256=hashlib.sha256(config.encode()).hexdigest() if segmentor and isinstance(config, str) else None,
        path=str(path),
    )


def run_folder(folder: Path) -> Lineage:
    """What a run folder records about the weights it made."""
    path = next(folder / name for name in WEIGHTS if (folder / name).is_file())
    file, lineage = weights_file(path), Lineage()
    env = read_env(folder)
    inputs, lineage.files = env.get("inputs", {}), [file]
    for relation in ("teacher", "student"):
        about = inputs.get(relation) or []
        given = {item.get("sha256"): item for item in (about if isinstance(about, list) else [about])}
        for name, sha in _numbered(relation, given).items():
            file.parents.setdefault(name, sha)
            lineage.files.append(File(sha, given[sha].get("file") or "not given", relation, given=False))
    file.data, file.recipe_sha256 = inputs.get("data"), inputs.get("recipe_sha256")
    file.config_sha256 = file.config_sha256 or inputs.get("config_sha256")
    file.environment = {key: env[key] for key in ("cpu", "cores", "platform", "gpu", "versions") if key in env} or None
    recorded = env.get("outputs", {}).get(path.name)
    if recorded not in (None, file.sha256):
        file.notes.append("this file was changed after its run wrote it")
    if env.get("earlier"):
        file.notes.append(f"the run was resumed with another machine or input {len(env['earlier'])} time(s)")
    if text := read_config(folder):
        file.settings = flat_settings(text)
        words = noted_command(text)
        file.command = hide_paths(words) if words else None
        if words and words.startswith("tinymim distill ") and file.role == "teacher":
            file.role = "student"  # of a method without a teacher
    if (folder / "metrics.jsonl").is_file():
        metrics = read_metrics(folder / "metrics.jsonl")
        file.curves = {name: [list(p) for p in thin(metrics[name], 120)] for name in CURVES if name in metrics}
    if (folder / "result.json").is_file():
        if path.name == "segmentor.pth":
            scored = read_json(folder / "result.json", records.Score)
            with _fitting(folder / "result.json"):
                lineage.scores.append(_score(scored, file.sha256, PYTORCH, f"{folder.name}/result.json"))
        elif path.name == "classifier.pth":
            found = read_json(folder / "result.json", records.TopScore)
            if found.get("top1") is not None:
                file.notes.append(_accuracy_note("its held-out photos", found))
        elif path.name == "detector.pth":
            scores = read_json(folder / "result.json", Detected).get("scores")
            if scores:
                ap = ", ".join(f"{what} AP {100 * scores[f'{what}_ap']:.1f} %" for what in ("box", "mask"))
                file.notes.append(f"on {scores['photos']} held-out photos: {ap}")
    return lineage


def _numbered(relation: str, hashes: Iterable[str | None]) -> dict[str, str]:
    """Hashes of files of one relation by name: "teacher", "teacher 2", ..."""
    found = list(dict.fromkeys(sha for sha in hashes if sha))
    return {f"{relation} {i}" if i > 1 else relation: sha for i, sha in enumerate(found, 1)}


def onnx_file(path: Path) -> File:
    """An .onnx by its metadata, read by onnxruntime without optimising the graph.

    Raises:
        DataError: missing or damaged.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=[PROVIDERS["cpu"].title])
    except Exception as error:  # onnxruntime raises several kinds
        raise not_onnx(path, error) from error
    notes: list[str] = []
    meta = read_metadata(session, path.name, notes)
    if not meta and not notes:
        notes.append("carries no tinymim metadata: made by another tool, so its origin is unknown")
    precision, cost = meta.get("precision") or {}, meta.get("cost") or {}
    parts = cost.get("parts", {}).values()
    parents = {"checkpoint": meta.get("checkpoint_sha256"), "fp32 file": precision.get("parent_sha256")}
    return File(
        sha256_file(path),
        path.name,
        "onnx",
        parents={relation: sha for relation, sha in parents.items() if sha},
        mib=path.stat().st_size / 2**20,
        parameters=sum(part["params"] for part in parts) or None,
        macs=sum(part["macs"] for part in parts) or None,
        size=cost.get("size"),
        output=session.get_outputs()[0].name,
        precision=precision.get("name") or ("fp32" if meta else None),
        graph=list(meta.get("graph") or []),
        pixels=(meta.get("input") or {}).get("range") == "pixels",
        excluded=list(precision.get("excluded") or []),
        calibration=precision.get("calibration"),
        verified=check_verified(path, meta),
        parity=meta.get("parity"),
        palette=meta.get("palette"),
        config_sha256=meta.get("config_sha256"),
        environment={"versions": meta["versions"]} if meta.get("versions") else None,
        notes=notes,
        path=str(path),
    )


def result_kind(value: Any) -> str | None:
    """What a JSON value is: one of KINDS, "demo", or None."""
    if not isinstance(value, dict):
        return None
    kind = str(value.get("kind", "")).removeprefix("tinymim.")
    if kind in KINDS and (kind != "compare" or "models" in value):  # a comparison of two benches has that name, too
        return kind
    if {"onnx", "cost", "parity"} <= value.keys():
        return "export"  # of an FP32 file, which names no kind
    return "demo" if {"settings", "environment", "stages"} <= value.keys() else None


def result_file(path: Path, value: dict[str, Any]) -> Lineage:
    """What a result file says.

    Raises:
        DataError: it lacks what its kind promises.
    """
    readers: dict[str, Callable[[dict[str, Any], str], Lineage]] = {
        "export": lambda v, s: Lineage(exports=[v | {"source": s}]),
        "eval": _eval,
        "accuracy": _accuracy,
        "bench": _bench,
        "tune": lambda v, s: _tune(v, path),
        "sensitivity": lambda v, s: Lineage(sensitivity=[v | {"source": s}]),
        "compare": _compare,
        "demo": _demo,
        "lineage": lambda v, s: Lineage.from_dict(v),
    }
    kind = result_kind(value) or ""
    check(value, SHAPES[kind], str(path))
    with _fitting(path):
        return readers[kind](value, path.name)


@contextlib.contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Parts that are right one by one may not fit together: counts of other photos, a missing twin.

    Raises:
        DataError: they do not.
    """
    try:
        yield
    except (KeyError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise DataError(
            f"cannot use {path}",
            f"its parts do not fit together ({type(error).__name__}: {error})",
            "write it again with this version of tinymim",
        ) from error


def _eval(value: dict[str, Any], source: str) -> Lineage:
    return Lineage(scores=[_score(value, value["sha256"], value["engine"], source)])


def _accuracy(value: dict[str, Any], source: str) -> Lineage:
    """Scores of a classifier, as notes: a lineage compares mIoU."""
    sets = {name: found for name, found in value["scores"].items() if "top1" in found}
    notes = [_accuracy_note(f"{name} ({source})", found) for name, found in sets.items()]
    file = value["file"]
    return Lineage([File(file["sha256"], file["file"], "classifier", given=False, notes=notes)])


def _accuracy_note(of: str, found: dict[str, Any]) -> str:
    return f"top-1 {100 * found['top1']:.2f} %, top-5 {100 * found['top5']:.2f} % of {found['photos']} photos of {of}"


def _bench(value: dict[str, Any], source: str) -> Lineage:
    rows = value["rows"]
    return Lineage(times=[_time(row, value["environment"], source, rows[0]) for row in rows])


def _tune(value: dict[str, Any], path: Path) -> Lineage:
    """The tuner's candidates. Their full scores are in the folder "scores" next to it; the written winner shares its
    original's."""
    lineage = Lineage(verdicts=[value | {"source": path.name}])
    full = [
        score
        for near in _by_age((path.parent / "scores").glob("*.json"))
        if (stored := read_json(near)) and result_kind(stored) == "eval"
        for score in result_file(near, stored).scores
    ]
    lineage.scores += full
    for row in value["candidates"]:
        lineage.times.append(_time(row, value["environment"], path.name, value["candidates"][0]))
        own = [s for s in full if (s.sha256, s.engine) == (row.get("copy_of", row["sha256"]), _engine(row))]
        if own:
            lineage.scores += [replace(score, sha256=row["sha256"]) for score in own]
            continue
        score = _score(row, row["sha256"], _engine(row), path.name)
        score.data = " ".join(map(str, [TUNED, path.name, score.folder, score.images, score.mode]))
        if row["verdict"] != "BASELINE":
            score.loss, score.loss_interval = float(row["drop"]), list(row["drop_interval"])
        lineage.scores.append(score)
    return lineage


def _compare(value: dict[str, Any], source: str) -> Lineage:
    """What tools/compare_segmentors.py scored and timed."""
    lineage = _bench(value["measure"], source) if value.get("measure") else Lineage()
    for seeds in value["models"].values():
        scores = [stages["score"] for stages in seeds.values() if "score" in stages]
        lineage.scores += [_score(score, score["sha256"], score["engine"], source) for score in scores]
    return lineage


def _demo(value: dict[str, Any], source: str) -> Lineage:
    """The demo's record: latency and mIoU of its file; its score names no photos, so it is compared with nothing."""
    lineage, measured = Lineage(), value["stages"].get("measure", {})
    for row in measured.get("rows", []):
        lineage.times.append(_time(row, measured.get("environment", value["environment"]), source, row))
    if lineage.times and "onnx" in measured:
        lineage.scores.append(_score(measured["onnx"], lineage.times[0].sha256, lineage.times[0].engine, source))
    return lineage


def _engine(row: dict[str, Any]) -> str:
    """Label of the engine a row was taken on."""
    if row.get("engine"):
        return str(row["engine"])
    return engine_label(row.get("runtime") or DEFAULT, provider_word(row["provider"]), row.get("precision"))


def _score(value: dict[str, Any], sha: str, engine: str, source: str) -> Score:
    """A score as SegResult, EvalResult and the tuner write it."""
    if value["mIoU"] is None:
        raise ValueError("it has no mIoU: no labelled pixel of any class was scored")
    iou, photos = value.get("class_IoU") or {}, value.get("photos")
    counts = Counts(*(photos[key] for key in ("names", "right", "labelled", "predicted"))) if photos else None
    if counts and value.get("images") not in (None, len(counts.names)):
        raise ValueError(f"{value['images']} images, counts of {len(counts.names)}")
    labelled = [
        sum(row) for row in value.get("confusion") or ([*zip(*photos["labelled"], strict=True)] if photos else [])
    ]
    interval = value.get("mIoU_interval") or (list(bootstrap_miou(counts)) if counts else None)
    return Score(
        sha,
        engine,
        float(value["mIoU"]),
        source,
        macc=value.get("mAcc"),
        aacc=value.get("aAcc"),
        constant_miou=value.get("constant_mIoU"),
        images=value.get("images"),
        mode=value.get("mode"),
        folder=Path(str(value["data"])).name if value.get("data") else None,
        data=data_key(iou, value["images"], labelled) if labelled else None,
        interval=interval,
        class_iou=iou,
        counts=counts,
    )


def _time(row: dict[str, Any], env: dict[str, Any], source: str, first: dict[str, Any]) -> Time:
    """A time, and its ratio to the ``first`` row of its result.

    Its place carries a short hash of everything that decides the speed: see STAMP, and the runtimes' packages.
    """
    stamp = [env.get(key) for key in STAMP] + [env.get("versions", {}).get(name) for name in packages()]
    tag = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:4]
    machine = f"{row.get('gpu') or env.get('gpu') or env['cpu']}, {env['cores']} cores [{tag}]"
    size = "x".join(map(str, row["shape"]))
    return Time(
        row["sha256"],
        _engine(row),
        f"{machine}, {row['threads']} threads, input {size}",
        float(row["p50_ms"]),
        source,
        p90_ms=row.get("p90_ms"),
        interval=row.get("p50_interval"),
        peak_mib=row.get("peak_mib"),
        speed_up=row.get("speed_up"),
        against=f"{first['sha256']} {_engine(first)}",
    )


def read_paths(paths: list[Path]) -> Lineage:
    """Everything that files and folders say, joined.

    Args:
        paths: Run folders, .pth, .onnx and result files, or folders searched for these.

    Raises:
        DataError: a path that is missing or not one of ours, or a folder without anything.
    """
    lineage = Lineage()
    for path in paths:
        for part in _read(path):
            lineage.add(part)
    lineage.join()
    return lineage


def _read(path: Path) -> Iterator[Lineage]:
    """The facts of one path, oldest result first."""
    if path.is_dir():
        yield from _search(path)
    elif path.suffix == ".onnx" and path.is_file():
        file = onnx_file(path)
        yield Lineage([file])
        beside = [*path.parent.glob("*.json"), *path.parent.glob(f"{path.stem}.tune/tune.json")]
        for near in _by_age(beside):
            for found in _result_or_note(near, KINDS[:-1]):
                yield Lineage(
                    scores=[s for s in found.scores if s.sha256 == file.sha256],
                    times=[t for t in found.times if t.sha256 == file.sha256],
                    sensitivity=[s for s in found.sensitivity if s.get("sha256") == file.sha256],
                    exports=[e for e in found.exports if e.get("sha256") == file.sha256],
                    notes=found.notes,
                )
    elif path.suffix in (".pth", ".safetensors") and path.is_file():
        yield run_folder(path.parent) if path.name in WEIGHTS else Lineage([weights_file(path)])
    elif path.name == "result.json" and any((path.parent / name).is_file() for name in WEIGHTS):
        yield run_folder(path.parent)
    elif path.suffix == ".json" and path.is_file():
        value = read_json(path)
        if result_kind(value) is None:
            raise DataError(
                f"{path} is not a result of tinymim",
                f'its "kind" is {value.get("kind")!r:.80}' if isinstance(value, dict) else "it is not a JSON object",
                "give a file that tinymim bench, eval or tinymim-export wrote with --json",
            )
        yield result_file(path, value)
    else:
        raise DataError(
            f"a report cannot be made from {path}" if path.exists() else f"nothing at {path}",
            "it takes run folders, .onnx, .pth and result .json files, and folders that hold them",
            "check the path",
        )


def _search(folder: Path) -> Iterator[Lineage]:
    """All files of tinymim below a folder; files that cannot be read become a note."""
    found: list[Lineage] = []
    results: list[Path] = []
    for place, inside, names in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith(".") and name != "checkpoints")
        here = Path(place)
        if any(name in names for name in WEIGHTS):
            found += _or_note(here, run_folder)
            names = [name for name in names if name != "result.json"]  # read with its run
        for path in sorted(here / name for name in names if name.endswith(".onnx") and not name.startswith(".")):
            found += _or_note(path, lambda p: Lineage([onnx_file(p)]))
        results += [here / name for name in names if name.endswith(".json") and not name.startswith(".")]
    for path in _by_age(results):
        found += _result_or_note(path, (*KINDS[:-1], "demo"))
    if not any(part.files or part.scores or part.times or part.exports or part.sensitivity for part in found):
        why = next((note for part in found for note in part.notes), "no run folder, .onnx or result .json lies in it")
        raise DataError(
            f"{folder} holds nothing to report on", why, "give the folder of a run, or of the exported files"
        )
    yield from found


def _or_note(path: Path, read: Callable[[Path], Lineage]) -> list[Lineage]:
    """What a path says; a damaged one becomes a note on the page."""
    try:
        return [read(path)]
    except DataError as error:
        return [Lineage(notes=[f"left out: {path.name}: {error.why}"])]


def _result_or_note(path: Path, kinds: Sequence[str]) -> list[Lineage]:
    """What a file found beside others says, if it is a result of ours; a damaged one becomes a note."""
    try:
        value = read_json(path)
    except DataError as error:
        return [Lineage(notes=[f"left out: {path.name}: {error.why}"])]
    return _or_note(path, lambda p: result_file(p, value)) if result_kind(value) in kinds else []


def _by_age(paths: Iterable[Path]) -> list[Path]:
    """Files, the oldest first; dangling links and the like are left out."""
    return sorted((p for p in paths if p.is_file()), key=lambda path: (path.stat().st_mtime_ns, path.name))
