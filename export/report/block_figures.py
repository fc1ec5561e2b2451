"""Figures of numbers by block: lines, heat maps, boxes; narrow SVG for light and dark pages."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tinymim_export.report.markup import Html, html, join
from tinymim_export.report.plots import LETTER, tick_label, ticks

WIDTH, LEFT, RIGHT, PLOT, FOOT, LINE = 420, 46, 12, 220, 40, 17  # of a picture, in pixels
STYLE = Html("""<style>
svg {
  max-width: 100%; height: auto;
  --ink: #1c1d20; --soft: #5d6068; --grid: #dcdcd8; --page: #fff; --c0: #2f6fdb; --c1: #d8602a; --c2: #1a8f63;
  --c3: #9155c8; --c4: #b0850f; --c5: #d0467f; --c6: #218ca0; --c7: #7a7f88;
}
@media (prefers-color-scheme: dark) {
  svg {
    --ink: #ecedef; --soft: #a0a4ac; --grid: #3a3d42; --page: #131416; --c0: #6ba0f5; --c1: #f08c58; --c2: #4cc495;
    --c3: #b98ae6; --c4: #e0bd55; --c5: #ee7fab; --c6: #5fc6d8; --c7: #9aa0a9;
  }
}
text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.title { font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--grid); fill: none; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
</style>""")


@dataclass
class Curve:
    """A line of a picture.

    Args:
        name: In the legend.
        points: (x, y).
        colour: 0 to 7.
        dots: Further points of its colour, without a line: single heads.
        dashed: Another stroke, for more lines than colours.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dots: Sequence[tuple[float, float]] = field(default_factory=list)
    dashed: bool = False


def drawing(height: float, title: str, parts: Sequence[Html]) -> Html:
    """An SVG file with its title."""
    head = html(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" height="{}" role="img" '
        'aria-label="{}">{}<text class="title" x="4" y="16">{}</text>',
        *(WIDTH, height, WIDTH, height),
        *(title, STYLE, title),
    )
    return html("{}{}</svg>\n", head, join(parts))


def legend(curves: Sequence[Curve]) -> tuple[list[Html], float]:
    """Names with their colours, in as many rows as they need; and where the rows end."""
    out, x, y = [], 4.0, 16.0 + LINE
    for curve in curves:
        wide = 22 + LETTER * len(curve.name)
        if x > 4 and x + wide > WIDTH:
            x, y = 4.0, y + LINE
        dash = "4 3" if curve.dashed else "none"
        out.append(
            html(
                '<path class="line" style="stroke:var(--c{});stroke-dasharray:{}" d="M{:.1f},{}h14"/>'
                '<text x="{:.1f}" y="{}">{}</text>',
                *(curve.colour, dash, x, y - 4, x + 18, y, curve.name),
            )
        )
        x += wide + 12
    return out, y


def chart(title: str, xlabel: str, curves: Sequence[Curve]) -> Html:
    """Lines over whole numbers; the y axis begins at 0."""
    out, top = legend(curves)
    top += 12
    everything = [point for curve in curves for point in (*curve.points, *curve.dots)]
    left, right = min(x for x, _ in everything), max(x for x, _ in everything)
    most = 1.05 * max(y for _, y in everything) or 1.0
    right = max(right, left + 1)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - left) / (right - left)
        return LEFT + 6 + across * (WIDTH - LEFT - RIGHT - 12), top + PLOT * (1 - point[1] / most)

    rows = ticks(0, most, 5)
    for y in rows:
        at, text = place((left, y))[1], tick_label(y, rows)
        out.append(
            html(
                '<path class="grid" d="M{},{:.1f}H{}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>',
                *(LEFT, at, WIDTH - RIGHT, LEFT - 6, at + 4, text),
            )
        )
    bottom = top + PLOT
    for x in [x for x in ticks(left, right, 12) if x == round(x)]:
        at = place((x, 0))[0]
        out.append(html('<text x="{:.1f}" y="{}" text-anchor="middle">{:.0f}</text>', at, bottom + 17, x))
    out.append(html('<text x="{}" y="{}" text-anchor="end">{}</text>', WIDTH - RIGHT, bottom + 34, xlabel))
    for curve in curves:
        path = "L".join("{:.1f},{:.1f}".format(*place(point)) for point in curve.points)
        dash = "5 4" if curve.dashed else "none"
        out += [
            html(
                '<circle cx="{:.1f}" cy="{:.1f}" r="2.6" style="fill:var(--c{});fill-opacity:.5"/>',
                *place(point),
                curve.colour,
            )
            for point in curve.dots
        ]
        out.append(
            html('<path class="line" style="stroke:var(--c{});stroke-dasharray:{}" d="M{}"/>', curve.colour, dash, path)
        )
        if len(curve.points) == 1:
            out.append(
                html(
                    '<circle cx="{:.1f}" cy="{:.1f}" r="4" style="fill:var(--c{})"/>',
                    *place(curve.points[0]),
                    curve.colour,
                )
            )
    return drawing(bottom + FOOT, title, out)


def heat_map(title: str, values: Sequence[Sequence[float | None]], xlabel: str, frame: int | None = None) -> Html:
    """Numbers from 0 to 1, in percent: rows upwards, columns to the right, both from 1; a column may be framed."""
    rows, columns = len(values), len(values[0])
    cell = (WIDTH - LEFT - RIGHT) / columns
    high, top = min(cell, 26.0), 28.0
    bottom, out = top + rows * high, list[Html]()
    for i, row in enumerate(values):
        y = bottom - (i + 1) * high
        out.append(html('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>', LEFT - 6, y + high / 2 + 4, i + 1))
        for j, value in enumerate(row):
            x, strength = LEFT + j * cell, min(max(value or 0.0, 0.0), 1.0)
            out.append(
                html(
                    '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" '
                    'style="fill:var(--c0);fill-opacity:{:.3f}"/>',
                    *(x, y, cell - 1, high - 1, 0.05 + 0.95 * strength),
                )
            )
            if cell >= 24 and value is not None:
                ink = "page" if strength > 0.75 else "ink"
                text = f"{100 * value:.0f}"
                out.append(
                    html(
                        '<text x="{:.1f}" y="{:.1f}" text-anchor="middle" style="fill:var(--{});font-size:11px">'
                        "{}</text>",
                        *(x + cell / 2, y + high / 2 + 4, ink, text),
                    )
                )
    for j in range(0, columns, -(-columns // 16)):
        out.append(
            html('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>', LEFT + (j + 0.5) * cell, bottom + 16, j + 1)
        )
    if frame is not None:
        out.append(
            html(
                '<rect x="{:.1f}" y="{}" width="{:.1f}" height="{:.1f}" style="fill:none;stroke:var(--c1);'
                'stroke-width:2"/>',
                *(LEFT + (frame - 1) * cell - 0.5, top, cell, bottom - top),
            )
        )
    out.append(html('<text x="{}" y="{}" text-anchor="end">{}</text>', WIDTH - RIGHT, bottom + 34, xlabel))
    return drawing(bottom + FOOT, title, out)


@dataclass
class Boxes:
    """The numbers of a block's heads, block by block.

    Args:
        name: In the legend.
        values: A list for each block.
        colour: 0 to 7.
    """

    name: str
    values: Sequence[Sequence[float]]
    colour: int


def box_plot(title: str, xlabel: str, series: Sequence[Boxes]) -> Html:
    """Boxes from the first to the third quartile with the median, whiskers to the extremes; the y axis begins at 0."""
    out, top = legend([Curve(each.name, [], each.colour) for each in series])
    top += 12
    blocks = max(len(each.values) for each in series)
    most = 1.05 * max(max(row) for each in series for row in each.values) or 1.0
    step = (WIDTH - LEFT - RIGHT) / blocks
    wide = min(0.8 * step / len(series), 14.0)

    def height(value: float) -> float:
        return top + PLOT * (1 - value / most)

    rows = ticks(0, most, 5)
    for y in rows:
        out.append(
            html(
                '<path class="grid" d="M{},{:.1f}H{}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>',
                *(LEFT, height(y), WIDTH - RIGHT, LEFT - 6, height(y) + 4, tick_label(y, rows)),
            )
        )
    for j in range(0, blocks, -(-blocks // 16)):
        x = LEFT + (j + 0.5) * step
        out.append(html('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>', x, top + PLOT + 17, j + 1))
    for i, each in enumerate(series):
        for j, row in enumerate(each.values):
            least, q1, median, q3, largest = (height(value) for value in five_numbers(row))
            x = LEFT + (j + 0.5) * step + (i - (len(series) - 1) / 2) * (wide + 1)
            out.append(
                html(
                    '<g style="stroke:var(--c{});fill:var(--c{})">'
                    '<path d="M{:.1f},{:.1f}V{:.1f}M{:.1f},{:.1f}V{:.1f}"/>'
                    '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" style="fill-opacity:.25"/>'
                    '<path style="stroke-width:2" d="M{:.1f},{:.1f}h{:.1f}"/></g>',
                    *(each.colour, each.colour, x, least, q1, x, q3, largest),
                    *(x - wide / 2, q3, wide, max(q1 - q3, 0.5), x - wide / 2, median, wide),
                )
            )
    out.append(html('<text x="{}" y="{}" text-anchor="end">{}</text>', WIDTH - RIGHT, top + PLOT + 34, xlabel))
    return drawing(top + PLOT + FOOT, title, out)


def five_numbers(values: Sequence[float]) -> list[float]:
    """Smallest, first quartile, median, third quartile, largest; linear between values."""
    rising = sorted(values)
    found = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = share * (len(rising) - 1)
        low = int(at)
        high = min(low + 1, len(rising) - 1)
        found.append(rising[low] + (at - low) * (rising[high] - rising[low]))
    return found
