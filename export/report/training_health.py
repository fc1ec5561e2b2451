"""Pictures of what ``tinymim.engine.health`` wrote into metrics.jsonl. NumPy and HTML text."""

import math
import re
from collections.abc import Callable, Sequence

from tinymim_export.report.markup import Html, html, join
from tinymim_export.report.plots import LEFT, RIGHT, TOP, WIDTH, Series, chart, number

Curves = dict[str, list[tuple[float, float]]]
OUTLIER = re.compile(r"outlier/block_(\d\d)/(qkv|proj|fc1|fc2|stream)")
HEALTH = re.compile(r"(kl_[^/]+|entropy|outlier|outlier_channel)/|(knn|linear)_top1$")
PLACES = ("qkv", "proj", "fc1", "fc2", "stream")  # the last one stays in float in our INT8 files
INT8 = "tinymim-export --checkpoint segmentor.pth --precision int8 --calibration PHOTOS --data FOLDER"
MOST_HEADS = 8  # lines of a chart
ROW = 24  # height of a row, in SVG units
NOTE = (
    "Entropy: 0 where a head looks at one token, 1 where it looks at all of them equally. KL: how far a head's "
    "relation still is from the teacher's. Outliers: the largest activation that enters a layer (or leaves the block: "
    "stream) as a multiple of the usual one. k-NN and linear probe: frozen features. Layers that training does not "
    "reach keep their initial values (in the published form, everything after q, k, v of the last block)."
)


def is_health_metric(name: str) -> bool:
    """Whether a number of metrics.jsonl is drawn here and needs no chart of its own."""
    return bool(HEALTH.match(name))


def health_figures(metrics: Curves) -> list[list[Html]]:
    """Figures that belong side by side: k-NN, linear probe and KL per head; outliers; entropy at start and end."""
    probes = [
        Series(text, metrics[name], dots=True)
        for name, text in (("knn_top1", "k-NN"), ("linear_top1", "linear"))
        if name in metrics
    ]
    relations = sorted({name.partition("/")[0] for name in metrics if re.match(r"kl_[^/]+/", name)})
    learned = [chart("Top-1 of frozen features", probes, percent=True), *(_kl(name, metrics) for name in relations)]
    return [learned, _outliers(metrics), _entropy(metrics)]


def outlier_verdict(metrics: Curves) -> Html:
    """The warning of the run, with what to type; empty where no input of a linear layer exceeds the limit."""
    limit = metrics.get("outlier/limit", [(0.0, 0.0)])[-1][1]
    last = {name: points[-1][1] for name, points in metrics.items() if OUTLIER.fullmatch(name)}
    inputs = {name: ratio for name, ratio in last.items() if not name.endswith("/stream")}
    over = {name: ratio for name, ratio in inputs.items() if ratio > limit}
    if not over:
        return html("")
    worst = max(over, key=lambda name: over[name])
    _, block, layer = worst.split("/")
    channel = _channel(metrics, worst)
    return html(
        '<p class="verdict bad">Outliers predict trouble for INT8: the largest input of {} in block {} '
        "(channel {:.0f}) is {:.0f} times the usual one; {} of {} inputs exceed {:g}.</p>"
        "<p>Once a segmentor is trained, see what INT8 costs per block, and leave the worst in float:</p>"
        "<pre>{} --sensitivity\n{} --onnx int8.onnx --max-miou-drop 0.5</pre>",
        layer,
        int(block[-2:]),
        channel,
        over[worst],
        len(over),
        len(inputs),
        limit,
        INT8,
        INT8,
    )


def _channel(metrics: Curves, name: str) -> float:
    """The channel of an outlier at the end; NaN where the lines that say it are damaged."""
    return metrics.get(name.replace("outlier/", "outlier_channel/"), [(0.0, math.nan)])[-1][1]


def heat_map(
    title: str, rows: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], tuple[float, str, str]]
) -> Html:
    """A figure of coloured cells.

    Args:
        title: Above it.
        rows: Labels, top to bottom.
        columns: Labels, left to right.
        cell: (row, column) -> (strength of the colour 0 to 1, or above 1 for red; text inside; tooltip).
    """
    wide, high = (WIDTH - LEFT - RIGHT) / len(columns), TOP + ROW * len(rows) + 22
    out = [html('<svg class="cells" viewBox="0 0 {} {}" role="img" aria-label="{}">', WIDTH, high, title)]
    for i, row in enumerate(rows):
        y = TOP + ROW * i
        out.append(html('<text x="{}" y="{}" text-anchor="end">{}</text>', LEFT - 8, y + 16, row))
        for j, column in enumerate(columns):
            x, (strength, text, tip) = LEFT + wide * j, cell(row, column)
            strength = strength if math.isfinite(strength) else 0.0
            colour = f"var(--{'bad' if strength > 1 else 'c0'}) {5 + 65 * min(max(strength, 0), 1):.0f}%"
            out.append(
                html(
                    '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="3" '
                    'style="fill:color-mix(in srgb,{},var(--card))"><title>{}</title></rect>'
                    '<text x="{:.1f}" y="{}" text-anchor="middle" '
                    'style="fill:var(--ink);pointer-events:none">{}</text>',
                    x,
                    y,
                    wide - 2,
                    ROW - 2,
                    colour,
                    tip,
                    x + wide / 2 - 1,
                    y + 15,
                    text,
                )
            )
    for j, column in enumerate(columns):
        out.append(
            html(
                '<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>', LEFT + wide * (j + 0.5) - 1, high - 8, column
            )
        )
    return html('<figure><figcaption>{}</figcaption><div class="wide">{}</svg></div></figure>', title, join(out))


def _kl(relation: str, metrics: Curves) -> Html:
    """One line per head; of many heads, the worst."""
    heads = sorted(name for name in metrics if re.fullmatch(re.escape(relation) + r"/head_\d\d", name))
    worst = sorted(sorted(heads, key=lambda name: -metrics[name][-1][1])[:MOST_HEADS])
    title = f"KL of {relation.removeprefix('kl_')} by head"
    if len(heads) > MOST_HEADS:
        title += f", the {MOST_HEADS} largest of {len(heads)}"
    return chart(title, [Series(f"head {int(name[-2:])}", metrics[name], dots=True) for name in worst])


def _outliers(metrics: Curves) -> list[Html]:
    """The largest of all blocks over steps, with the limit; and every block at the end."""
    limit, names = metrics.get("outlier/limit"), [name for name in metrics if OUTLIER.fullmatch(name)]
    if not limit or not names:
        return []
    over_steps = []
    for place in PLACES:
        points = [metrics[name] for name in names if name.endswith(f"/{place}")] or [[]]
        known = min(map(len, points))
        peaks = [(x, max(line[i][1] for line in points)) for i, (x, _) in enumerate(points[0][:known])]
        over_steps.append(Series(f"{place} (stays in float)" if place == "stream" else place, peaks, dots=True))

    def cell(row: str, place: str) -> tuple[float, str, str]:
        name = f"block_{int(row):02d}/{place}"
        if f"outlier/{name}" not in metrics:
            return 0.0, "", f"block {row}, {place}: not trained"
        ratio, channel = metrics[f"outlier/{name}"][-1][1], _channel(metrics, f"outlier/{name}")
        strength = ratio / (limit[-1][1] or math.nan)
        return (
            min(strength, 1.0) if place == "stream" else strength,
            f"{number(ratio)}",
            f"block {row}, {place}: largest over usual {ratio:.3g}, in channel {channel:.0f}",
        )

    blocks = sorted({int(name.split("/")[1][-2:]) for name in names})
    return [
        chart("Largest activation over the usual, worst block", [*over_steps, Series("limit", limit, exact=True)]),
        heat_map(f"Largest over usual, by block, step {limit[-1][0]:,.0f}", [str(b) for b in blocks], PLACES, cell),
    ]


def _entropy(metrics: Curves) -> list[Html]:
    """Block by head, at the first and at the last measurement."""
    found = [re.fullmatch(r"entropy/block_(\d\d)/head_(\d\d)", name) for name in metrics]
    places = [(int(m[1]), int(m[2])) for m in found if m]
    if not places:
        return []
    blocks, heads = ([str(i) for i in sorted(set(ids))] for ids in zip(*places, strict=True))
    first = metrics[next(name for name in metrics if name.startswith("entropy/"))]
    figures = []
    for at in sorted({0, len(first) - 1}):

        def cell(block: str, head: str, at: int = at) -> tuple[float, str, str]:
            lines = metrics.get(f"entropy/block_{int(block):02d}/head_{int(head):02d}", [])
            share = lines[at][1] if at < len(lines) else math.nan
            return share, f"{share:.2f}", f"block {block}, head {head}: {share:.3f} of log T"

        figures.append(heat_map(f"Attention entropy, block by head, step {first[at][0]:,.0f}", blocks, heads, cell))
    return figures
