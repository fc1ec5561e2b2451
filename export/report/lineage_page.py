"""The page of a lineage: one HTML file that an engineer reads in a minute, with the details further down. No torch."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinymim_export.report import details
from tinymim_export.report.figures import (
    INTERVAL_NOTE,
    class_losses,
    interval_text,
    percent,
    points,
    short,
    with_interval,
)
from tinymim_export.report.lineage import BASE, File, Lineage, Row, Score, Time
from tinymim_export.report.markup import Html, html, join
from tinymim_export.report.page import Section, cards, commands, flow, table, verdict, where_to_run, write_report
from tinymim_export.report.plots import ScatterPoint, scatter

BUDGET = 0.005  # mIoU that the "fastest file" may lose, as a fraction


def write_lineage_page(lineage: Lineage, out: Path, *, title: str, photos: str = "", photos_note: str = "") -> Path:
    """Write the page.

    Args:
        lineage: Joined.
        out: The .html file.
        title: Heading.
        photos: HTML of the photo rows.
        photos_note: Sentence above them.
    """
    rows = lineage.rows()
    onnx = [file for file in lineage.files if file.role == "onnx"]
    files = _count(onnx, "deployable file") if onnx else _count(lineage.files, "file")
    lead = (
        f"{files} with everything known about where they come from, what they lose and how "
        "fast they are. Files are identified by sha256; what was not recorded is shown as not given."
    )
    return write_report(
        out,
        title,
        lead,
        Section("In short", [_headline(lineage, rows), _verdicts(lineage, rows)]),
        Section("The lineage", [_chain(lineage, file) for file in _ends(lineage)]),
        Section("Files", [_files(lineage, rows), _legend(lineage)], INTERVAL_NOTE),
        Section(
            "Speed against quality",
            _pareto(lineage, rows),
            "Up and to the left is better; ringed: the tuner's choice, "
            f"else the fastest within {100 * BUDGET:g} points of FP32. One machine, thread count and input size per "
            "plot; scores of the same photos. Whiskers: 95 % of the median, and of the change against FP32.",
        ),
        Section("Verdicts on the candidates", details.candidates(lineage)),
        Section("What the masks look like", [photos], photos_note),
        Section(
            "What each precision costs, class by class",
            _classes(lineage),
            "Change of the IoU against the FP32 file "
            "on the same photos, in points. Red loses, green gains; absent: the class does not occur.",
        ),
        Section(
            "Which blocks suffer",
            details.sensitivity(lineage),
            "One block at a time is quantised, the rest stays in float: points of mIoU lost.",
        ),
        Section("Does each file match its original?", details.parity(lineage, onnx)),
        Section("Photos used for calibration", details.calibration(onnx)),
        Section(
            "Where each file comes from",
            [details.provenance(lineage)],
            "Data: the folder's name, number of files, "
            "hash of their names and sizes. Recipe: hash of the settings without paths.",
        ),
        Section("Machines", [details.machines(lineage)]),
        Section("To fill what is missing", [commands(details.missing(lineage, out))], where_to_run(out.parent)),
        Section("Notes", [details.notes(lineage)]),
        footer="Written by tinymim report. lineage.json beside this page holds the same facts for machines.",
    )


def _count(items: Sequence[Any], word: str) -> str:
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"


def main_place(lineage: Lineage) -> str | None:
    """Where most times were taken."""
    return next(iter(lineage.places()), None)


def baseline(lineage: Lineage, rows: Iterable[Row], place: str | None) -> Row | None:
    """The FP32 original in plain ONNX Runtime that most files are compared with, timed at ``place``."""
    wanted = [
        row
        for row in rows
        if row.file.precision == "fp32" and not row.file.graph and row.engine == BASE and row.file.given
    ]
    children = [reference.sha256 for file in lineage.files if (reference := lineage.reference(file)) is not None]
    return max(
        wanted,
        key=lambda row: (place in row.times, row.score is not None, children.count(row.file.sha256)),
        default=None,
    )


def fastest(rows: Iterable[Row], base: Row, place: str, budget: float = BUDGET) -> Row | None:
    """The fastest row within ``budget`` of the original on the same photos, timed in one session with it if any was."""
    good = [
        row
        for row in rows
        if place in row.times
        and row.score is not None
        and (row.score is base.score or (row.score.loss is not None and row.score.loss <= budget))
    ]
    session = base.times[place].source if place in base.times else None
    together = [row for row in good if row.times[place].source == session]
    good = together if len(together) > 1 else good
    if session is None:
        return min(good, key=lambda row: row.times[place].p50_ms, default=None)
    return max(good, key=lambda row: row.times[place].than(base.times[place])[0], default=None)


def chosen(lineage: Lineage, rows: Iterable[Row], base: Row, place: str) -> Row | None:
    """The tuner's winner where there is one timed at ``place``, else the fastest good row."""
    winners = {(w["sha256"], w["engine"]) for value in lineage.verdicts if (w := value.get("winner"))}
    found = [row for row in rows if (row.file.sha256, row.engine) in winners and place in row.times and row.score]
    return found[0] if found else fastest(rows, base, place)


def _headline(lineage: Lineage, rows: list[Row]) -> Html:
    place = main_place(lineage)
    base = baseline(lineage, rows, place)
    if base is None:
        scores = [row for row in rows if row.score is not None]
        return cards(
            [(row.file.name, percent(row.score.miou), f"mIoU, {row.engine}", "") for row in scores[:4] if row.score]
        )
    items = []
    if base.score:
        of = f"{base.score.images} photos" if base.score.images else base.score.source
        items.append(("mIoU of the FP32 file", percent(base.score.miou), of, ""))
    if place is None or place not in base.times:
        return cards([*items, ("size", f"{base.file.mib or 0:.1f} MiB", base.file.name, "")])
    own = base.times[place].p50_ms
    items.append(("FP32 in ONNX Runtime", f"{own:.1f} ms", "median of one photo", ""))
    best = chosen(lineage, rows, base, place)
    if best is not None and best.score is not None and best.score is not base.score:
        mib = best.file.mib
        ratio, sure = best.times[place].than(base.times[place])
        how = "times as fast" if "session" in sure else "times as fast, run in turns"
        what = "the tuner's choice" if lineage.verdicts else f"fastest within {100 * BUDGET:g} points"
        items += [
            (what, f"{best.times[place].p50_ms:.1f} ms", label(best), "good" if ratio > 1 else ""),
            (how, f"{ratio:.2f}", sure, "good" if ratio > 1 and "not" not in sure else ""),
            ("and its mIoU changes by, points", points(best.score.loss or 0), _loss_words(best.score), ""),
        ]
        if mib:
            items.append(("in a file of", f"{mib:.1f} MiB", f"FP32: {base.file.mib or 0:.1f} MiB", ""))
    return cards(items)


def _loss_words(score: Score) -> str:
    if score.loss_interval:
        low, high = (-100 * v for v in reversed(score.loss_interval))
        return f"95 % interval {low:+.2f} to {high:+.2f}, {score.images} photos"
    return f"{score.images} photos"


def label(row: Row) -> str:
    """A row in words: what is special about the file and the engine."""
    words = [row.file.kind or row.file.name]
    if row.engine not in (None, BASE):
        words.append(str(row.engine).removesuffix(" f32"))
    return " / ".join(words)


def _verdicts(lineage: Lineage, rows: list[Row]) -> Html:
    """The tuner's verdict, else the plain fact on the fastest good file."""
    if lineage.verdicts:
        return join(_tuned(value) for value in lineage.verdicts)
    place = main_place(lineage)
    base = baseline(lineage, rows, place)
    if base is None or base.score is None or place is None or place not in base.times:
        return html("")
    best = fastest(rows, base, place)
    if best is None or best.score is None or best.score is base.score:
        return verdict(f"no file measured here is faster than FP32 and within {100 * BUDGET:g} points of it", False)
    ratio, sure = best.times[place].than(base.times[place])
    return verdict(
        f"the file {best.file.name} on {best.engine} is {ratio:.2f} times as fast as {base.file.name}"
        f"{f' ({sure})' if sure else ''} and changes its mIoU by {points(best.score.loss or 0)} points",
        ratio > 1 and "not" not in sure,
    )


def _tuned(value: dict[str, Any]) -> Html:
    """What the tuner decided."""
    winner, budget = value.get("winner"), value.get("budget") or {}
    limits = f"at most {budget.get('max_miou_drop')} points lost, {budget.get('min_speedup')} times as fast"
    if not winner:
        return verdict(f"tuning promoted nothing ({limits})", False)
    return verdict(
        f"tuning chose {winner['name']} on {winner['engine']} ({limits}): {winner['p50_ms']:.1f} ms, "
        f"{points(winner['drop'])} points of mIoU; {value.get('why', '')}",
        True,
    )


def _ends(lineage: Lineage) -> list[File]:
    """Checkpoints that .onnx files were exported from, and weights nothing else was made from; at most six."""
    origins = [lineage.file(lineage.checkpoint(file)) for file in lineage.files if file.role == "onnx"]
    used = {sha for file in lineage.files for sha in file.parents.values()}
    loose = [file for file in lineage.files if file.role != "onnx" and file.sha256 not in used]
    loose += [
        file
        for file in lineage.files
        if file.role == "onnx" and lineage.checkpoint(file) is None and lineage.reference(file) in (None, file)
    ]
    return list({id(file): file for file in [*origins, *loose] if file is not None}.values())[:6]


def _chain(lineage: Lineage, end: File) -> Html:
    """Teacher -> student -> segmentor -> files as boxes."""
    steps = [(f"{file.role.capitalize()}", _box(lineage, file)) for file in [*lineage.ancestors(end), end]]
    first = [*lineage.ancestors(end), end][0]
    if first.role in ("student", "segmentor") and first.given:
        steps.insert(0, ("Teacher" if first.role == "student" else "Student", ["not given"]))
    files = [file for file in lineage.files if file.role == "onnx" and lineage.checkpoint(file) == end.sha256]
    if files:
        kinds = list(dict.fromkeys(file.precision or "unknown precision" for file in files))
        sizes = [file.mib for file in files if file.mib]
        spread = (
            f"{min(sizes):.1f} to {max(sizes):.1f} MiB" if len(sizes) > 1 else "".join(f"{s:.1f} MiB" for s in sizes)
        )
        steps.append((_count(files, "file"), [", ".join(kinds), spread]))
    return flow(steps)


def _box(lineage: Lineage, file: File) -> list[str]:
    if not file.given:
        return [file.name, f"sha256 {file.sha256[:10]}", "the file itself was not given"]
    lines = [file.name, f"sha256 {file.sha256[:10]}"]
    if file.parameters:
        lines.append(f"{file.parameters / 1e6:.2f} M parameters")
    if file.data:
        lines.append(f"{file.data['files']:,} files of {file.data['folder']}")
    score = next((s for s in lineage.scores if s.sha256 == file.sha256), None)
    return [*lines, f"mIoU {100 * score.miou:.1f} %"] if score else lines


def _files(lineage: Lineage, rows: list[Row]) -> Html:
    """One row per file and engine: size, mIoU and latency side by side."""
    places, sets = lineage.places(), lineage.data_sets()
    head = ["file", "mIoU", "against FP32"]
    head += ["p50 ms" if len(places) == 1 else f"p50 ms ({letter(i)})" for i in range(len(places))]
    head += ["engine", "MiB", "parameters"]
    base = {place: baseline(lineage, rows, place) for place in places}
    body, seen = [], set()
    for row in rows:
        file, score, fresh = row.file, row.score, row.file.sha256 not in seen
        seen.add(file.sha256)
        cells = [_name(file) if fresh else html('<span class="missing">{}, again</span>', file.name)]
        if score is None:
            cells += [html('<span class="missing">not scored</span>') if file.role == "onnx" else "", ""]
        else:
            of = f" ({1 + sets.index(score.data)})" if len(sets) > 1 else ""
            cells.append(with_interval(percent(score.miou) + of, interval_text(score.interval, 100)))
            low_high = [-v for v in reversed(score.loss_interval)] if score.loss_interval else None
            tone = "fail" if (score.loss or 0) > BUDGET else "ok"
            change = html('<span class="{}">{}</span>', tone, points(score.loss)) if score.loss is not None else ""
            cells.append(with_interval(change, interval_text(low_high, 100, 2)))
        cells += [_time_cell(row.times.get(place), base[place], place) for place in places]
        cells.append(with_interval(row.engine or "", (score.mode or "") if score else ""))
        cells.append(f"{file.mib:.1f}" if file.mib and fresh else "")
        macs = f"{file.macs / 1e9:.2f} G multiply-adds" if file.macs else ""
        macs += f" at {'x'.join(map(str, file.size))}" if macs and file.size else ""
        cells.append(with_interval(f"{file.parameters / 1e6:.2f} M", macs) if file.parameters and fresh else "")
        body.append(cells)
    return table(head, body, "files")


def _name(file: File) -> Html:
    """Name, mark, and in small print what it is."""
    mark = {
        True: html(' <span class="ok" title="checked against its original">&#10003;</span>'),
        False: html(' <span class="fail" title="not checked, or failed">&#10007;</span>'),
    }
    what = [file.role if file.role != "onnx" else file.kind or "unknown precision"]
    what += ["uint8 pixels in"] * file.pixels + ([f"gives {file.output}"] if file.output else [])
    checked = mark.get(file.verified, "") if file.verified is not None else ""
    return with_interval(html("<b>{}</b>{}", file.name, checked), html("{} {}", ", ".join(what), short(file.sha256)))


def _time_cell(time: Time | None, base: Row | None, place: str) -> Html:
    if time is None:
        return html("")
    small = html("{}", interval_text(time.interval, 1))
    if base is not None and place in base.times and base.times[place] is not time:
        ratio, sure = time.than(base.times[place])
        small += html("<br>{:.2f} x FP32{}", ratio, f" ({sure})" if sure else "")
    return with_interval(f"{time.p50_ms:.1f}", small)


def letter(index: int) -> str:
    """A, B, ... for the columns of times."""
    return chr(ord("A") + index % 26)


def _legend(lineage: Lineage) -> Html:
    """Which machine and which photos the columns mean."""
    places, sets = lineage.places(), lineage.data_sets()
    said = [f"p50 ms: {places[0]}" if len(places) == 1 else f"({letter(i)}) {place}" for i, place in enumerate(places)]
    if len(places) > 1:
        said.append("times of different columns are of different machines, threads or inputs: do not compare them")
    for i, data in enumerate(sets):
        found = [s for s in lineage.scores if s.data == data]
        folder = next((s.folder for s in found if s.folder), "a folder that was not recorded")
        where = f"{found[0].images or 'some'} photos of {folder}"
        said.append(
            f"mIoU{f' ({i + 1})' if len(sets) > 1 else ''}: {where}" + ("" if data else ", labels not recorded")
        )
    if len(sets) > 1:
        said.append("scores of different photos do not compare")
    return html('<p class="note legendnote">{}</p>', join(said, html("<br>"))) if said else html("")


def _pareto(lineage: Lineage, rows: list[Row]) -> list[Html]:
    plots = []
    for place in lineage.places():
        for data in lineage.data_sets():
            here_ = [row for row in rows if place in row.times and row.score is not None and row.score.data == data]
            base = baseline(lineage, here_, place)
            best = chosen(lineage, here_, base, place) if base else None
            spots = [_spot(row, row.score, row.times[place], row is best) for row in here_ if row.score is not None]
            spots = list({(spot.name, spot.x, spot.y): spot for spot in spots}.values())  # the winner has a copy
            sessions = {row.times[place].source for row in here_}
            note = f" (times of {len(sessions)} sessions)" if len(sessions) > 1 else ""
            if len(spots) > 1:
                plots.append(scatter(f"{place}{note}", spots, "p50 ms", "mIoU %"))
    return plots


def _spot(row: Row, score: Score, time: Time, best: bool) -> ScatterPoint:
    """A row as a point; its whiskers are the interval of the median, and of the change against FP32 (paired)."""
    lost = score.loss_interval
    span = (
        (100 * (score.miou + (score.loss or 0) - lost[1]), 100 * (score.miou + (score.loss or 0) - lost[0]))
        if lost
        else None
    )
    ms = (time.interval[0], time.interval[1]) if time.interval else None
    return ScatterPoint(label(row), time.p50_ms, 100 * score.miou, ms, span, row.file.precision or "unknown", best)


def _classes(lineage: Lineage) -> list[Html]:
    """One heat table for every FP32 original and set of photos."""
    groups: dict[int, tuple[Score, list[Row]]] = {}
    for row in lineage.rows():
        original = lineage.reference_score(row.score) if row.score and row.score.class_iou else None
        if original is not None and original is not row.score:
            groups.setdefault(id(original), (original, []))[1].append(row)
    blocks = []
    for original, others in groups.values():
        names = [label(row) for row in others]
        columns = [
            (name if names.count(name) == 1 else f"{name} ({row.file.name})", row.score.class_iou)
            for name, row in zip(names, others, strict=True)
            if row.score
        ]
        reference = lineage.file(original.sha256)
        palette = reference.palette if reference else None
        colours = dict(zip(original.class_iou, palette, strict=False)) if palette else None
        blocks.append(class_losses(columns, original.class_iou, colours))  # type: ignore[arg-type]
    return blocks
