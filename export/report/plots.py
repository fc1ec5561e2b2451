"""Drawings for reports as plain SVG and HTML text: curves, scatter plots, bars, masks. NumPy, Pillow, standard library.

Colours are CSS variables (``--c0`` .. ``--c7``, ``--ink``, ``--grid``), so one drawing serves light and dark pages.
"""

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from tinymim_export.report.markup import Html, html, join

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 240, 58, 14, 12, 34  # of a chart, in SVG units
WIDE, TALL = 820, 400  # of a scatter plot
LARGEST_STEP, LARGEST_VALUE = 1e12, 1e100  # of a curve
LETTER, LINE = 6.9, 15.0  # width of a letter and height of a line of text, in SVG units
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass
class Series:
    """One line of a chart.

    Args:
        name: Shown in the legend.
        points: (step, value) pairs; values that are not finite are left out.
        dots: Draw a dot at every point (few, held-out values) instead of a smoothed line.
        exact: Neither smoothed nor drawn in a logarithmic scale (learning rates).
    """

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    exact: bool = False

    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn: neither infinite nor absurd."""
        return [
            (float(x), float(y) if abs(y) > 1e-100 else 0.0)
            for x, y in self.points
            if abs(x) <= LARGEST_STEP and abs(y) <= LARGEST_VALUE
        ]


def number(value: float) -> str:
    """Three significant digits without needless zeros: 0.0123, 4.5, 12,300."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return re.sub(r"e([+-])0+", r"e\1", f"{value:.3g}")  # 1e-6, not 1e-06


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``, about ``count`` of them."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float, every: Sequence[float]) -> str:
    """:func:`number` with as many digits as tell the ticks of one axis apart."""
    if len({number(v) for v in every}) == len(every):
        return number(value)
    step = min(b - a for a, b in pairwise(sorted(every)))
    digits = next((d for d in range(12) if abs(round(step, d) - step) < 1e-3 * step), 12)
    return f"{value:,.{digits}f}"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving average, narrower at both ends."""
    total = np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))
    half = window // 2
    bounds = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [float((total[b] - total[a]) / (b - a)) for a, b in bounds]


def thin(points: list[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """At most ``most`` points, the last one kept."""
    stride = -(-len(points) // most)
    return points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])


def curve_svg(series: Sequence[Series], *, xlabel: str = "step", label: str = "", percent: bool = False) -> Html:
    """An SVG line chart; the raw line is faint behind its moving average. Empty text if there is nothing to draw."""
    lines = [(s, s.finite()) for s in series]
    lines = [(s, points) for s, points in lines if points]
    if max((len(points) for _, points in lines), default=0) < 2:
        return html("")
    shown = [y for s, points in lines for y in ([y for _, y in points] if s.dots or s.exact else _steady(points))]
    x0, x1 = min(p[0] for _, ps in lines for p in ps), max(p[0] for _, ps in lines for p in ps)
    y0, y1 = min(shown), max(shown)
    log = not percent and y0 > 0 and y1 / y0 > 30 and not any(s.exact for s, _ in lines)
    if log:
        y0, y1 = math.log10(y0), math.log10(y1)
    flat = y1 - y0 <= 1e-9 * max(abs(y0), abs(y1))
    pad = 0.05 * (abs(y1) or 1.0) if flat else 0.06 * (y1 - y0)
    y0, y1 = (0.0 if percent or (not log and 0 <= y0 < 0.3 * y1) else y0 - pad), y1 + pad
    x1 = x1 if x1 > x0 else x0 + 1

    def px(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        y = math.log10(max(y, 1e-300)) if log else y
        return round(TOP + (1 - (min(max(y, y0), y1) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM), 1)

    def path(points: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{px(x)},{py(y)}" for x, y in points)

    out = [html('<svg class="curves" viewBox="0 0 {} {}" role="img" aria-label="{}">', WIDTH, HEIGHT, label)]
    levels = [10.0**e for e in ticks(y0, y1, 4)] if log else ticks(y0, y1)
    for y in levels:
        text = f"{tick_label(100 * y, [100 * v for v in levels])}%" if percent else tick_label(y, levels)
        out.append(html('<path class="grid" d="M{},{}H{}"/>', LEFT, py(y), WIDTH - RIGHT))
        out.append(html('<text x="{}" y="{}" text-anchor="end">{}</text>', LEFT - 8, py(y) + 4, text))
    for x in [x for x in ticks(x0, x1, 6) if x == round(x)]:  # steps
        out.append(html('<text x="{}" y="{}" text-anchor="middle">{:,.0f}</text>', px(x), HEIGHT - 18, x))
    out.append(html('<text class="unit" x="{}" y="{}" text-anchor="end">{}</text>', WIDTH - RIGHT, HEIGHT - 3, xlabel))
    for i, (s, points) in enumerate(lines):
        if s.dots:
            out.append(html('<path class="line" style="stroke:var(--c{})" d="{}"/>', i % 8, path(points)))
            for x, y in points:
                title = (
                    f"{s.name}, {xlabel} {x:.0f}: {100 * y:.1f}%" if percent else f"{s.name}, {xlabel} {x:.0f}: {y:.5g}"
                )
                out.append(
                    html(
                        '<circle cx="{}" cy="{}" r="3.6" style="fill:var(--c{})"><title>{}</title></circle>',
                        px(x),
                        py(y),
                        i % 8,
                        title,
                    )
                )
            continue
        window = 1 if s.exact else max(1, len(points) // 25)
        soft = list(zip([x for x, _ in points], smooth([y for _, y in points], window), strict=True))
        if window > 1:
            out.append(html('<path class="raw" style="stroke:var(--c{})" d="{}"/>', i % 8, path(thin(points))))
        out.append(html('<path class="line" style="stroke:var(--c{})" d="{}"/>', i % 8, path(thin(soft))))
    return html("{}</svg>", join(out))


def _steady(points: list[tuple[float, float]]) -> list[float]:
    """The values that set the range: without the wild first steps, which would flatten the rest."""
    values = smooth([y for _, y in points], max(1, len(points) // 25))
    return values[len(values) // 50 :]


def chart(title: str, series: Sequence[Series], **options: object) -> Html:
    """A figure: title, legend with each line's last value, curves."""
    svg = curve_svg(series, label=title, **options)  # type: ignore[arg-type]
    if not svg:
        return svg
    percent = bool(options.get("percent"))
    keys = []
    for i, (s, points) in enumerate((s, s.finite()) for s in series if s.finite()):
        last = f"{100 * points[-1][1]:.1f} %" if percent else number(points[-1][1])
        keys.append(html('<span><i style="background:var(--c{})"></i>{} <b>{}</b></span>', i % 8, s.name, last))
    return html('<figure><figcaption>{}</figcaption><div class="keys">{}</div>{}</figure>', title, join(keys), svg)


@dataclass
class ScatterPoint:
    """One point of a scatter plot.

    Args:
        name: Its label.
        x: Less is better (milliseconds).
        y: More is better (mIoU), in the same unit as the axis shows.
        x_interval: (low, high), drawn as a whisker.
        y_interval: (low, high).
        group: Points of one group share a colour and a legend entry.
        mark: Ring it (the winner, today's file).
    """

    name: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None
    group: str = ""
    mark: bool = False


def pareto_front(points: Sequence[ScatterPoint]) -> list[ScatterPoint]:
    """The points that no other beats (x not larger and y not smaller, one of them strictly), by rising x."""
    front: list[ScatterPoint] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def scatter(title: str, points: Sequence[ScatterPoint], xlabel: str, ylabel: str, *, less: str = "faster") -> Html:
    """A figure: points with whiskers and labels, and the Pareto front (small x, large y) as a dashed staircase.

    The x axis is logarithmic where values span more than a factor of 8. Labels that fit nowhere without covering
    another are left to the point's tooltip. Points that are not finite are left out; without any: empty text.
    ``less``: what a small x is.
    """
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not points:
        return html("")
    xs = [v for p in points for v in (p.x, *(p.x_interval or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_interval or ()))]
    log = min(xs) > 0 and max(xs) / min(xs) > 8
    (x0, x1), (y0, y1) = _range([math.log10(x) for x in xs] if log else xs, 0.08), _range(ys, 0.10)

    def px(x: float) -> float:
        return round(LEFT + ((math.log10(x) if log else x) - x0) / (x1 - x0) * (WIDE - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(TOP + (y1 - y) / (y1 - y0) * (TALL - TOP - 44), 1)

    bottom = TALL - 44
    out = [html('<svg class="scatter" viewBox="0 0 {} {}" role="img" aria-label="{}">', WIDE, TALL, title)]
    rows, columns = ticks(y0, y1), _log_ticks(x0, x1) if log else ticks(x0, x1, 8)
    for y in rows:
        out.append(html('<path class="grid" d="M{},{}H{}"/>', LEFT, py(y), WIDE - RIGHT))
        out.append(html('<text x="{}" y="{}" text-anchor="end">{}</text>', LEFT - 8, py(y) + 4, tick_label(y, rows)))
    for x in columns:
        out.append(html('<path class="grid" d="M{},{}V{}"/>', px(x), TOP, bottom))
        out.append(
            html('<text x="{}" y="{}" text-anchor="middle">{}</text>', px(x), bottom + 17, tick_label(x, columns))
        )
    out.append(
        html(
            '<text x="{}" y="{}" text-anchor="end">{} &#8594;{}</text>',
            WIDE - RIGHT,
            TALL - 6,
            xlabel,
            " (logarithmic)" if log else "",
        )
    )
    out.append(html('<text x="{}" y="{}">&#8593; {}</text>', LEFT + 6, TOP + 10, ylabel))
    front = pareto_front(points)
    corners = [(px(front[0].x), float(bottom)), (px(front[0].x), py(front[0].y))]
    for p in front[1:]:
        corners += [(px(p.x), corners[-1][1]), (px(p.x), py(p.y))]
    corners.append((float(WIDE - RIGHT), corners[-1][1]))
    out.append(html('<path class="front" d="M{}"/>', "L".join((f"{x},{y}" for x, y in corners))))
    groups = list(dict.fromkeys(p.group for p in points))
    for p in points:
        out.append(_dot(p, px, py, f"var(--c{groups.index(p.group) % 8})", xlabel, ylabel))
    lines = [(min(a, c), min(b, d), max(a, c), max(b, d)) for (a, b), (c, d) in pairwise(corners)]
    for p in points:
        low, high = p.y_interval or (p.y, p.y)
        left, right = p.x_interval or (p.x, p.x)
        lines += [(px(p.x), py(high), px(p.x), py(low)), (px(left), py(p.y), px(right), py(p.y))]
    first = sorted(points, key=lambda p: (not p.mark, p not in front, p.x))
    out += _labels(first, px, py, (LEFT, TOP, WIDE - RIGHT, bottom), lines)
    keys = [html('<span><i style="background:var(--c{})"></i>{}</span>', i % 8, g) for i, g in enumerate(groups) if g]
    keys.append(html("<span>dashed: no measured point is both {} and better</span>", less))
    return html(
        '<figure><figcaption>{}</figcaption><div class="keys">{}</div><div class="wide">{}</svg></div></figure>',
        title,
        join(keys),
        join(out),
    )


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Smallest and largest value with some air, never empty."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    single = high - low <= 1e-9 * max(size, 1.0)
    pad = (0.05 * size if size > 1e-6 else 1.0) if single else margin * (high - low)
    return low - pad, high + pad


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between two exponents."""
    values = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    return [v for v in values if low <= math.log10(v) <= high]


def _dot(
    p: ScatterPoint, px: Callable[[float], float], py: Callable[[float], float], colour: str, xlabel: str, ylabel: str
) -> Html:
    """Whiskers, ring and dot with a tooltip."""
    x, y, parts = px(p.x), py(p.y), []
    tooltip = f"{p.name}: {xlabel} {number(p.x)}, {ylabel} {number(p.y)}"
    if p.x_interval:
        low, high = map(px, p.x_interval)
        parts.append(f"M{low},{y - 4}v8M{low},{y}H{high}M{high},{y - 4}v8")
        tooltip += f"; {xlabel} from {number(p.x_interval[0])} to {number(p.x_interval[1])}"
    if p.y_interval:
        low, high = map(py, p.y_interval)
        parts.append(f"M{x - 4},{low}h8M{x},{low}V{high}M{x - 4},{high}h8")
        tooltip += f"; {ylabel} from {number(p.y_interval[0])} to {number(p.y_interval[1])}"
    whiskers = html('<path class="whisker" style="stroke:{}" d="{}"/>', colour, join(parts)) if parts else ""
    ring = html('<circle class="ring" cx="{}" cy="{}" r="9"/>', x, y) if p.mark else ""
    return html(
        '{}{}<circle cx="{}" cy="{}" r="5" style="fill:{}"><title>{}</title></circle>',
        whiskers,
        ring,
        x,
        y,
        colour,
        tooltip,
    )


def _labels(
    points: Sequence[ScatterPoint],
    px: Callable[[float], float],
    py: Callable[[float], float],
    frame: Box,
    lines: Sequence[Box],
) -> list[str]:
    """Names next to their points, important ones first: never over a dot or a name, over a line only if necessary."""
    taken = [(px(p.x) - 7, py(p.y) - 7, px(p.x) + 7, py(p.y) + 7) for p in points]
    taken.append((frame[0], frame[1], frame[0] + 120, frame[1] + LINE))  # the name of the y axis
    out = []
    for p in points:
        x, y, wide = px(p.x), py(p.y), LETTER * len(p.name)
        best: tuple[float, Box] | None = None
        for far in (0, 12, 24, 38):
            side, up = 11 + far, 9 + far
            places = [
                (x + side, y - LINE / 2),
                (x - wide / 2, y - up - LINE),
                (x - wide / 2, y + up),
                (x - side - wide, y - LINE / 2),
                (x + side, y - up - LINE / 2),
                (x + side, y + up - LINE / 2),
                (x - side - wide, y - up - LINE / 2),
                (x - side - wide, y + up - LINE / 2),
            ]
            for a, b in places:
                box = (a, b, a + wide, b + LINE)
                inside = a >= frame[0] and box[2] <= frame[2] and b >= frame[1] and box[3] <= frame[3]
                cost = far + 14 * sum(_meet(box, line) for line in lines)
                if inside and (best is None or cost < best[0]) and not any(_meet(box, other) for other in taken):
                    best = (cost, box)
        if best is None:
            continue
        a, b, c, d = best[1]
        taken.append(best[1])
        end = (min(max(x, a), c), min(max(y, b), d))
        if math.dist(end, (x, y)) > 13:
            out.append(html('<path class="leader" d="M{},{}L{:.1f},{:.1f}"/>', x, y, end[0], end[1]))
        out.append(
            html(
                '<text class="name{}" x="{:.1f}" y="{:.1f}" textLength="{:.1f}" lengthAdjust="spacingAndGlyphs">'
                "{}</text>",
                " marked" if p.mark else "",
                a,
                d - 4,
                wide,
                p.name,
            )
        )
    return out


def _meet(a: Box, b: Box) -> bool:
    """Whether two boxes (left, top, right, bottom) touch."""
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def stacked_bar(parts: Sequence[tuple[str, float, str]]) -> Html:
    """One bar cut into shares.

    Args:
        parts: (name, size, what the legend says about it), sizes in any one unit.
    """
    total = sum(max(size, 0) for _, size, _ in parts) or 1.0
    cells, keys = [], []
    for i, (name, size, note) in enumerate(parts):
        share = 100 * max(size, 0) / total
        inside = f"{share:.0f} %" if share >= 9 else ""
        tip = f"{name}: {note}, {share:.0f} %"
        cells.append(
            html('<div style="width:{:.2f}%;background:var(--c{})" title="{}">{}</div>', share, i % 8, tip, inside)
        )
        keys.append(html('<span><i style="background:var(--c{})"></i>{} <b>{}</b></span>', i % 8, name, note))
    return html('<div class="bar" role="img">{}</div><div class="keys">{}</div>', join(cells), join(keys))


def swatch(colour: Sequence[int]) -> Html:
    """A small square in a class's colour."""
    return html('<i class="swatch" style="background:rgb({})"></i>', ",".join(str(int(v)) for v in colour))


def meter(share: float) -> Html:
    """A share from 0 to 1 as a small horizontal bar and in percent, for table cells."""
    width = 100 * min(max(share, 0), 1)
    return html('<div class="meter"><div style="width:{:.1f}%"></div></div><span>{:.1f} %</span>', width, 100 * share)


def data_uri(image: Image.Image | np.ndarray | str | Path, *, width: int | None = None) -> str:
    """A picture as a ``data:`` address: photos as JPEG, palette pictures as PNG.

    Args:
        image: Pillow image, (H, W, 3) uint8 array, or a file.
        width: Shrink wider pictures to this many pixels.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    elif isinstance(image, str | Path):
        image = Image.open(image)
    flat = image.mode == "P"
    image = image if flat else image.convert("RGB")
    if width is not None and image.width > width:
        how = Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS
        image = image.resize((width, max(1, round(image.height * width / image.width))), how)
    buffer = io.BytesIO()
    if flat:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=88)
    return f"data:image/{'png' if flat else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def mask_image(mask_HW: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
    """A mask of class ids as a palette picture; ids without a colour are grey.

    Args:
        mask_HW: (H, W), class ids.
        palette: RGB 0..255 per class.
    """
    image = Image.fromarray(mask_HW.astype(np.uint8))
    colours = np.full((256, 3), 128, np.uint8)
    colours[: len(palette)] = np.asarray(palette, np.uint8)
    image.putpalette(colours.tobytes())
    return image
