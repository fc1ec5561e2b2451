"""Details of a lineage: verdicts, sensitivity, parity, calibration, origin, machines. No torch."""

import shlex
from pathlib import Path
from typing import Any

from tinymim_export.report.figures import MISSING, bars, percent, short, with_interval
from tinymim_export.report.lineage import File, Lineage
from tinymim_export.report.markup import Html, html, join
from tinymim_export.report.page import here, table


def candidates(lineage: Lineage) -> list[Html]:
    """PROMOTED and REJECTED of the tuner, with its reasons."""
    blocks = []
    for verdict in lineage.verdicts:
        rows = []
        for item in verdict["candidates"]:
            if item.get("copy_of"):
                continue
            word = str(item.get("verdict", ""))
            tone = "ok" if word == "PROMOTED" else "fail" if word == "REJECTED" else ""
            why = join(html("<li>{}</li>", text) for text in item.get("reasons", []))
            why += join(html('<li class="missing">{}</li>', text) for text in item.get("remarks", []))
            rows.append(
                (
                    with_interval(html("<b>{}</b>", item["name"]), item["engine"]),
                    html('<span class="{}">{}</span>', tone, word),
                    html("<ul>{}</ul>", why) if why else "",
                )
            )
        rows += [(what, "left out", why) for what, why in verdict.get("left_out", [])]
        blocks.append(table(("candidate", "verdict", "why"), rows, "why"))
    return blocks


def sensitivity(lineage: Lineage) -> list[Html]:
    """Bars of mIoU lost with one block in the other precision, and the classes that lose most."""
    figures = []
    for value in lineage.sensitivity:
        rows = []
        for item in value["rows"]:
            worst = [f"{name} {-100 * lost:+.1f}" for name, lost in item["class_drop"].items() if lost > 0.0005][:2]
            notes = [f"{-100 * item['drop']:+.2f}", f"{100 * item['equal_pixels']:.2f} % equal pixels", *worst]
            label = "all of them" if item["block"] == "all" else str(item["block"])
            rows.append((label, 100 * float(item["drop"]), ", ".join(notes)))
        file = lineage.file(value["sha256"])
        name = file.name if file and file.given else Path(str(value["file"])).name
        figures.append(bars(f"{name}, {value['precision']}, {value['images']} photos", rows, least=0.5))
    return figures


def parity(lineage: Lineage, onnx: list[File]) -> list[Html]:
    """What the files say of their own check, then every comparison of the exports that were given."""
    rows = []
    for file in onnx:
        measured = file.parity or {}
        word = html('<span class="ok">yes</span>') if file.verified else html('<span class="fail">no</span>')
        if file.verified is None:
            word = MISSING
        rows.append(
            (
                html("<b>{}</b>", file.name),
                word,
                _scientific(measured.get("relative_error")),
                "\u2013" if measured.get("cosine") is None else f"{measured['cosine']:.7f}",
                percent(measured.get("equal_pixels"), 3),
                "\u2013" if not (own := measured.get("test_step")) else f"{int(own['equal'])} of {int(own['pixels'])}",
            )
        )
    columns = ("file", "checked", "largest error, relative", "cosine", "equal pixels", "pixels as the model's own test")
    blocks = [table(columns, rows)]
    for value in lineage.exports:
        parity = value.get("parity") or {}
        detail = [
            (
                ("\u2713 " if r["passed"] else "\u2717 ") + r["name"],
                "x".join(map(str, r["shape"])),
                r["source"],
                _scientific(r.get("max_error")),
                _scientific(r.get("relative_error")),
                percent(r.get("equal_pixels"), 3),
                r.get("remark", ""),
            )
            for r in parity.get("rows", [])
        ]
        head = ("output", "input", "on", "largest error", "relative", "equal pixels", "remark")
        body = table(head, detail)
        name = Path(str(value.get("onnx") or value.get("file") or parity.get("file", ""))).name
        if body:
            blocks.append(html("<details><summary>every comparison of {}</summary>{}</details>", name, body))
    return blocks if rows else []


def _scientific(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.1e}"


def calibration(onnx: list[File]) -> list[Html]:
    blocks = []
    for file in onnx:
        about = file.calibration
        if not about:
            continue
        names = "\n".join(f"{sha}  {name}" for name, sha in about.get("files", []))
        text = (
            f"{file.name}: {about.get('count')} photos of {about.get('folder')}, seed {about.get('seed')}, "
            f"{about.get('method')}, list sha256 {str(about.get('list_sha256'))[:12]}"
        )
        blocks.append(html("<details><summary>{}</summary><pre>{}</pre></details>", text, names))
    return blocks


def provenance(lineage: Lineage) -> Html:
    rows = []
    for file in lineage.files:
        parents = []
        for relation, sha in file.parents.items():
            parent = lineage.file(sha)
            parents.append(html("{}: {} {}", relation, parent.name if parent else "", short(sha)))
        expects = {"student": "teacher", "teacher": None, "onnx": "checkpoint"}.get(file.role, "student")
        if file.given and expects and not parents:
            parents.append(html("{}: {}", expects, MISSING))
        data, recipe = file.data, file.recipe_sha256 or file.config_sha256
        data_cell = "" if file.role == "onnx" else MISSING
        if data:
            data_cell = with_interval(f"{data['folder']}, {data['files']:,} files", short(data["list_sha256"]))
        rows.append(
            (
                with_interval(html("<b>{}</b>", file.name), file.role),
                html("<code>{}</code>", file.sha256),
                join(parents, html("<br>")) or ("" if file.given else MISSING),
                data_cell,
                short(recipe) if recipe else MISSING,
                _stamp(file.environment) if file.environment else MISSING,
            )
        )
    return table(("file", "sha256", "made from", "data", "recipe", "made on"), rows, "provenance")


def _stamp(env: dict[str, Any]) -> str:
    """A machine and the versions that matter, in one line."""
    versions = env.get("versions", {})
    packages = [f"{name} {versions[name]}" for name in ("tinymim", "torch", "onnxruntime") if name in versions]
    machine = [f"{env[key]}{word}" for key, word in (("cpu", ""), ("cores", " cores")) if key in env]
    return ", ".join(machine + packages)


def machines(lineage: Lineage) -> Html:
    """Every version of every environment in which weights were made."""
    stamps = {repr(file.environment): file for file in lineage.files if file.environment and "cpu" in file.environment}
    rows = [
        (
            file.environment["cpu"],
            file.environment.get("cores", ""),
            file.environment.get("platform", ""),  # type: ignore[index]
            ", ".join(f"{k} {v}" for k, v in sorted((file.environment or {}).get("versions", {}).items())),
        )
        for file in stamps.values()
    ]
    made = table(("weights were made on", "cores", "platform", "versions"), rows, "provenance")
    timed = join(html("<li>{}</li>", place) for place in lineage.places())
    return made + (html('<p class="note">Times were taken on:</p><ul class="note">{}</ul>', timed) if timed else "")


def missing(lineage: Lineage, out: Path) -> list[tuple[str, str]]:
    """Commands that would fill the gaps, and those that made what there is."""
    todo = []
    near = [
        (file, here(file.path, out.parent))
        for file in lineage.files
        if file.role == "onnx" and file.path and file.output != "box"  # a tracker's is not of one photo
    ]
    for file, path in near:
        if not any(score.sha256 == file.sha256 for score in lineage.scores):
            todo.append(
                (f"mIoU of {file.name}", f"tinymim eval {path} --data FOLDER --json {shlex.quote(file.name)}.eval.json")
            )
    untimed = [path for file, path in near if not any(time.sha256 == file.sha256 for time in lineage.times)]
    if untimed:
        todo.append(("Latency of what was not timed", f"tinymim bench {' '.join(untimed)} --json bench.json"))
    lost = [file for file in lineage.files if not file.given]
    if lost:
        names = ", ".join(f"{file.role} {file.sha256[:10]}" for file in lost)
        todo.append(
            (
                f"Missing here: {names}. Add the run folders or files that hold them",
                "tinymim report RUN_FOLDERS FILES --out report.html",
            )
        )
    made = [(f"{file.name} was made with", file.command) for file in lineage.files if file.command]
    return todo + made


def notes(lineage: Lineage) -> Html:
    texts = [*lineage.notes, *(f"{file.name}: {note}" for file in lineage.files for note in file.notes)]
    return html('<ul class="note">{}</ul>', join(html("<li>{}</li>", text) for text in texts)) if texts else html("")
