"""``tinymim report A B``: two files, runs or lineages side by side. Only what is comparable is subtracted. No torch."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tinymim.errors import DataError
from tinymim.files import write_json
from tinymim.schema import read_json
from tinymim_export.bench.compare import SESSION_SPREAD
from tinymim_export.bench.stats import bootstrap_miou_drop, distinguishable
from tinymim_export.report.artifacts import WEIGHTS, read_paths, result_kind, weights_file
from tinymim_export.report.figures import class_losses, points
from tinymim_export.report.lineage import File, Lineage, Score, Time
from tinymim_export.report.markup import Html, html
from tinymim_export.report.page import Section, cards, charts, is_ratio, table, write_report
from tinymim_export.report.plots import Series, chart
from tinymim_export.tables import markdown_table, printable, text_table


@dataclass
class Difference:
    """One quantity of both sides.

    Attributes:
        of: The file or pair of files.
        what: "mIoU", "p50 ms", "MiB", ...
        change: In words; empty where the two do not compare.
        why_not: Why they do not compare.
        tone: "good" (b is better), "bad", or "" (no difference, or no better or worse).
    """

    of: str
    what: str
    a: str
    b: str
    change: str = ""
    why_not: str = ""
    tone: str = ""


@dataclass
class CompareResult:
    """Two sides and what differs; prints, writes JSON and Markdown."""

    a: str
    b: str
    report: str
    rows: list[Difference] = field(default_factory=list)
    settings: list[dict[str, str]] = field(default_factory=list)  # {"of", "key", "a", "b"}

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to ``path``."""
        value = {"kind": "tinymim.difference"} | asdict(self)
        if path is not None:
            write_json(path, value)
        return json.dumps(value, indent=1)

    def table(self) -> list[list[str]]:
        """Heading and one row per quantity."""
        head = ["of", "what", f"A: {self.a}", f"B: {self.b}", "B against A"]
        return [
            head,
            *([r.of, r.what, r.a, r.b, r.change or (f"({r.why_not})" if r.why_not else "")] for r in self.rows),
        ]

    def to_markdown(self) -> str:
        """Tables of what differs."""
        lines = [["settings of", "key", "A", "B"], *([s["of"], s["key"], s["a"], s["b"]] for s in self.settings)]
        return markdown_table(self.table()) + ("\n" + markdown_table(lines) if self.settings else "")

    def print(self) -> None:
        """The table for a terminal."""
        print(text_table(self.table()))
        for item in self.settings[:20]:
            print(printable(f"setting of the {item['of']}: {item['key']}: {item['a']} -> {item['b']}"))
        if len(self.settings) > 20:
            print(f"... and {len(self.settings) - 20} more settings (on the page)")
        print(printable(f"report: {self.report}"))


def kind_of(path: Path) -> str | None:
    """The kind of a path, to decide whether two paths are of one kind: "onnx", "student", "lineage", ..."""
    if path.suffix == ".onnx":
        return "onnx"
    if path.is_dir():
        weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        return weights_file(weights).role if weights else "lineage"
    if path.suffix in (".pth", ".safetensors") and path.is_file():
        return weights_file(path).role
    try:
        return "lineage" if result_kind(read_json(path)) == "lineage" else None
    except DataError:  # read_paths says what is wrong with it
        return None


def compare_reports(a: str | Path, b: str | Path, out: str | Path) -> CompareResult:
    """Compare two .onnx files, two run folders, two folders of files or two lineage.json; JSON lies beside the page.

    Scores are subtracted where photos, labels and mode are the same, times where machine, threads and input are.

    Raises:
        DataError: a path that is missing, damaged or not one of ours.
    """
    paths, out = [Path(a), Path(b)], Path(out)
    lineages = [read_paths([path]) for path in paths]
    names = [
        path.name if path.name != other.name else f"{path.resolve().parent.name}/{path.name}"
        for path, other in (paths, paths[::-1])
    ]
    result = CompareResult(names[0], names[1], str(out))
    pairs = list(_pairs(lineages[0], lineages[1], single=all(kind_of(path) != "lineage" for path in paths)))
    classes: list[Html] = []
    for of, first, second in pairs:
        result.rows += _sizes(of, first, second)
        for x, y in _scores(lineages, first, second):
            result.rows.append(_score_row(_words(of, (x or y).engine), x, y))  # type: ignore[union-attr]
            if x and y and _same_photos(x, y) and x.class_iou:
                heading = html("<h3>{}</h3>", _words(of, x.engine))
                colours = dict(zip(x.class_iou, first.palette or [], strict=False)) if first else None
                classes.append(heading + class_losses([("B - A, points", y.class_iou)], x.class_iou, colours, "A, IoU"))
        result.rows += _time_rows(of, lineages, first, second)
        if first and second:
            result.settings += _settings(first, second)
    write_report(
        out,
        f"{names[0]} against {names[1]}",
        f"A is {names[0]}, B is {names[1]}. Only what was measured alike is subtracted: scores of the same photos and "
        "labels, times of the same machine, threads and input.",
        Section("In short", [_headline(result)]),
        Section("Side by side", [_table(result)]),
        Section("Class by class", classes, "Change of the IoU from A to B, in points; same photos."),
        Section("How they learned", [charts(*_curves(pairs))]),
        Section(
            "Settings that differ", [table(("of", "setting", "A", "B"), [tuple(s.values()) for s in result.settings])]
        ),
        Section("Where each comes from", [table(("", "A", "B"), _origins(pairs))]),
        footer="Written by tinymim report. The .json beside this page holds the same facts for machines.",
    )
    result.to_json(out.with_suffix(".json"))
    return result


def _pairs(a: Lineage, b: Lineage, single: bool) -> Iterator[tuple[str, File | None, File | None]]:
    """Files that belong together: the two given ones, or those of one role, precision and graph in order."""
    sides = [[file for file in lineage.files if file.given] for lineage in (a, b)]
    if single:
        first, second = (next(file for file in side if file.path) for side in sides)
        yield "", first, second
        return
    keys = list(dict.fromkeys((file.role, file.kind) for side in sides for file in side))
    for role, kind in keys:
        found = [[file for file in side if (file.role, file.kind) == (role, kind)] for side in sides]
        several = max(map(len, found)) > 1
        for i in range(max(map(len, found))):
            pair = [side[i] if i < len(side) else None for side in found]
            of = kind or role if role == "onnx" else role
            yield f"{of} {i + 1}" if several else of, pair[0], pair[1]


def _words(*words: str) -> str:
    return ", ".join(filter(None, words))


def _sizes(of: str, a: File | None, b: File | None) -> list[Difference]:
    rows = []
    if a and b and a.sha256 == b.sha256:
        rows.append(Difference(of, "sha256", a.sha256[:10], b.sha256[:10], "the same file"))
    for what, name, scale, unit in (
        ("size", "mib", 1, " MiB"),
        ("parameters", "parameters", 1e6, " M"),
        ("multiply-adds", "macs", 1e9, " G"),
    ):
        x, y = (getattr(side, name) if side else None for side in (a, b))
        if x is None and y is None:
            continue
        sizes = [a.size if a else None, b.size if b else None]
        other = name == "macs" and sizes[0] != sizes[1]
        row = Difference(of, what, *(f"{v / scale:.2f}{unit}" if v else "not given" for v in (x, y)))
        if other:
            row.why_not = f"at {sizes[0]} and {sizes[1]}"
        elif x and y:
            row.change = "equal" if x == y else f"{100 * (y / x - 1):+.1f} %"
            row.tone = "" if abs(y / x - 1) < 0.0005 else "good" if y < x else "bad"
        rows.append(row)
    return rows


def _scores(lineages: Sequence[Lineage], a: File | None, b: File | None) -> list[tuple[Score | None, Score | None]]:
    """Scores of both files by engine and photos; those that do not pair up stand alone."""
    left, right = (
        [score for score in lineage.scores if file and score.sha256 == file.sha256]
        for lineage, file in zip(lineages, (a, b), strict=True)
    )
    out: list[tuple[Score | None, Score | None]] = []
    for score in left:
        same = [other for other in right if other.engine == score.engine]
        match = next((other for other in same if _same_photos(score, other)), same[0] if same else None)
        if match is not None:
            right.remove(match)
        out.append((score, match))
    return out + [(None, score) for score in right]


def _same_photos(a: Score, b: Score) -> bool:
    return a.data is not None and (a.data, a.mode) == (b.data, b.mode)


def _score_row(of: str, a: Score | None, b: Score | None) -> Difference:
    row = Difference(of, "mIoU", *(f"{100 * s.miou:.2f} %" if s else "not scored" for s in (a, b)))
    if a is None or b is None:
        return row
    if not _same_photos(a, b):
        known = a.data is not None and b.data is not None
        row.why_not = "other photos, labels or mode" if known else "whether the photos are the same is not recorded"
        return row
    change = b.miou - a.miou
    row.change = f"{points(-change)} points"
    sure = True
    if a.counts and b.counts and a.counts.names == b.counts.names:
        low, high = (-100 * v for v in reversed(bootstrap_miou_drop(a.counts, b.counts)))
        sure = distinguishable(low, high, than=0)
        row.change += f" (95 %: {low:+.2f} to {high:+.2f}{'' if sure else ', not distinguishable'})"
    row.tone = "" if not sure or change == 0 else "good" if change > 0 else "bad"
    return row


def _time_rows(of: str, lineages: Sequence[Lineage], a: File | None, b: File | None) -> list[Difference]:
    """Times by engine; a ratio only where the place is the same."""
    sides: list[list[Time]] = [
        [time for time in lineage.times if file and time.sha256 == file.sha256]
        for lineage, file in zip(lineages, (a, b), strict=True)
    ]
    rows = []
    for engine in dict.fromkeys(t.engine for side in sides for t in side):
        own = [{t.place: t for t in side if t.engine == engine} for side in sides]
        both = [place for place in own[0] if place in own[1]]
        for place in both:
            x, y = own[0][place], own[1][place]
            row = Difference(_words(of, engine), "p50 ms", f"{x.p50_ms:.1f}", f"{y.p50_ms:.1f}")
            ratio, sure = y.than(x)
            row.change = f"{ratio:.2f} times as fast{f' ({sure})' if sure else ''}"
            if "not" not in sure and (x.source == y.source or abs(ratio - 1) > SESSION_SPREAD):
                row.tone = "good" if ratio > 1 else "bad"
            rows.append(row)
        if not both:
            texts = ["; ".join(f"{t.p50_ms:.1f} on {t.place}" for t in side.values()) or "not timed" for side in own]
            row = Difference(_words(of, engine), "p50 ms", texts[0], texts[1])
            row.why_not = "other machine, threads or input" if own[0] and own[1] else ""
            rows.append(row)
    return rows


def _settings(a: File, b: File) -> list[dict[str, str]]:
    """Settings that differ, by dotted key."""
    if not a.settings or not b.settings:
        return []
    keys = [key for key in dict.fromkeys([*a.settings, *b.settings]) if a.settings.get(key) != b.settings.get(key)]
    sides = [{key: str(side.settings.get(key, "not set")) for key in keys} for side in (a, b)]
    differing = [{"of": a.role, "key": key, "a": sides[0][key], "b": sides[1][key]} for key in keys]
    hashes = [side.data["list_sha256"][:10] if side.data else "not given" for side in (a, b)]
    if hashes[0] != hashes[1]:
        differing.append({"of": a.role, "key": "photos (hash of the list)", "a": hashes[0], "b": hashes[1]})
    return differing


def _headline(result: CompareResult) -> Html:
    """The clearest differences as cards: mIoU, time, size, of the first pair that has them."""
    items = []
    for what in ("mIoU", "p50 ms", "size"):
        row = next((row for row in result.rows if row.what == what and row.change), None)
        if row is not None:
            value = row.b if what != "p50 ms" else f"{row.b} ms"
            items.append((_words(what, row.of), value, f"A: {row.a}. {row.change}", row.tone))
    return cards(items)


def _table(result: CompareResult) -> Html:
    tone = {"good": "ok", "bad": "fail", "": ""}
    rows = [
        (
            row.of,
            row.what,
            row.a,
            row.b,
            html('<span class="{}">{}</span>', tone[row.tone], row.change)
            if row.change
            else html('<span class="missing">{}</span>', "not compared: " + row.why_not if row.why_not else ""),
        )
        for row in result.rows
    ]
    return table(("of", "what", "A", "B", "B against A"), rows)


def _curves(pairs: Sequence[tuple[str, File | None, File | None]]) -> Iterator[Html]:
    for of, a, b in pairs:
        if a and b:
            for name in (name for name in a.curves if name in b.curves):
                series = [
                    Series(side, [(x, y) for x, y in file.curves[name]], dots=name != "loss")
                    for side, file in (("A", a), ("B", b))
                ]
                yield chart(_words(of, name), series, percent=is_ratio(name))


def _origins(pairs: Sequence[tuple[str, File | None, File | None]]) -> Iterator[tuple[str, str, str]]:
    for of, a, b in pairs:
        for what, get in (
            ("sha256", lambda f: f.sha256[:10]),
            ("made from", lambda f: ", ".join(f"{r} {sha[:10]}" for r, sha in f.parents.items())),
            ("recipe", lambda f: (f.recipe_sha256 or f.config_sha256 or "not given")[:10]),
            ("data", lambda f: f"{f.data['folder']}, {f.data['files']:,} files" if f.data else ""),
        ):
            values = ["" if side is None else get(side) for side in (a, b)]
            if any(values):
                yield _words(of, what), *values  # type: ignore[misc]
