"""Drawings for reports as plain SVG and HTML text: curves, scatter plots, bars, masks. NumPy, Pillow, standard library.

Colours are CSS variables (``--c0`` .. ``--c7``, ``--ink``, ``--grid``), so one drawing serves light and dark pages.
"""

import base64
import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 240, 58, 14, 12, 34  # of a chart, in SVG units
WIDE, TALL = 820, 400  # of a scatter plot
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
        """The points that can be drawn."""
        return [(float(x), float(y)) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


def escape(text: object) -> str:
    """Text safe inside HTML."""
    return html.escape(str(text), quote=True)


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


def curve_svg(series: Sequence[Series], *, xlabel: str = "step", label: str = "", percent: bool = False) -> str:
    """An SVG line chart; the raw line is faint behind its moving average. Empty text if there is nothing to draw."""
    lines = [(s, s.finite()) for s in series]
    lines = [(s, points) for s, points in lines if points]
    if max((len(points) for _, points in lines), default=0) < 2:
        return ""
    shown = [y for s, points in lines for y in ([y for _, y in points] if s.dots or s.exact else _steady(points))]
    x0, x1 = min(p[0] for _, ps in lines for p in ps), max(p[0] for _, ps in lines for p in ps)
    y0, y1 = min(shown), max(shown)
    log = not percent and y0 > 0 and y1 / y0 > 30 and not any(s.exact for s, _ in lines)
    if log:
        y0, y1 = math.log10(y0), math.log10(y1)
    pad = 0.06 * (y1 - y0) or 0.05 * (abs(y1) or 1.0)
    y0, y1 = (0.0 if percent or (not log and 0 <= y0 < 0.3 * y1) else y0 - pad), y1 + pad
    x1 = x1 if x1 > x0 else x0 + 1

    def px(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        y = math.log10(max(y, 1e-300)) if log else y
        return round(TOP + (1 - (min(max(y, y0), y1) - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM), 1)

    def path(points: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{px(x)},{py(y)}" for x, y in points)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    levels = [10.0**e for e in ticks(y0, y1, 4)] if log else ticks(y0, y1)
    for y in levels:
        text = f"{100 * y:.0f}%" if percent else tick_label(y, levels)
        out.append(f'<path class="grid" d="M{LEFT},{py(y)}H{WIDTH - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{py(y) + 4}" text-anchor="end">{text}</text>')
    for x in ticks(x0, x1, 6):
        out.append(f'<text x="{px(x)}" y="{HEIGHT - 18}" text-anchor="middle">{x:,.0f}</text>')
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(xlabel)}</text>')
    for i, (s, points) in enumerate(lines):
        if s.dots:
            out.append(f'<path class="line" style="stroke:var(--c{i % 8})" d="{path(points)}"/>')
            for x, y in points:
                title = (
                    f"{s.name}, {xlabel} {x:.0f}: {100 * y:.1f}%" if percent else f"{s.name}, {xlabel} {x:.0f}: {y:.5g}"
                )
                out.append(
                    f'<circle cx="{px(x)}" cy="{py(y)}" r="3.6" style="fill:var(--c{i % 8})">'
                    f"<title>{escape(title)}</title></circle>"
                )
            continue
        window = 1 if s.exact else max(1, len(points) // 25)
        soft = list(zip([x for x, _ in points], smooth([y for _, y in points], window), strict=True))
        if window > 1:
            out.append(f'<path class="raw" style="stroke:var(--c{i % 8})" d="{path(thin(points))}"/>')
        out.append(f'<path class="line" style="stroke:var(--c{i % 8})" d="{path(thin(soft))}"/>')
    return "".join(out) + "</svg>"


def _steady(points: list[tuple[float, float]]) -> list[float]:
    """The values that set the range: without the wild first steps, which would flatten the rest."""
    values = smooth([y for _, y in points], max(1, len(points) // 25))
    return values[len(values) // 50 :]


def chart(title: str, series: Sequence[Series], **options: object) -> str:
    """A figure: title, legend with each line's last value, curves."""
    svg = curve_svg(series, label=title, **options)  # type: ignore[arg-type]
    if not svg:
        return ""
    percent = bool(options.get("percent"))
    keys = []
    for i, (s, points) in enumerate((s, s.finite()) for s in series if s.finite()):
        last = f"{100 * points[-1][1]:.1f} %" if percent else number(points[-1][1])
        keys.append(f'<span><i style="background:var(--c{i % 8})"></i>{escape(s.name)} <b>{last}</b></span>')
    return f'<figure><figcaption>{escape(title)}</figcaption><div class="keys">{"".join(keys)}</div>{svg}</figure>'


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


def scatter(title: str, points: Sequence[ScatterPoint], xlabel: str, ylabel: str) -> str:
    """A figure: points with whiskers and labels, and the Pareto front (small x, large y) as a dashed staircase.

    The x axis is logarithmic where values span more than a factor of 8. Labels that fit nowhere without covering
    another are left to the point's tooltip. Points that are not finite are left out; without any: empty text.
    """
    points = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not points:
        return ""
    xs = [v for p in points for v in (p.x, *(p.x_interval or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_interval or ()))]
    log = min(xs) > 0 and max(xs) / min(xs) > 8
    (x0, x1), (y0, y1) = _range([math.log10(x) for x in xs] if log else xs, 0.08), _range(ys, 0.10)

    def px(x: float) -> float:
        return round(LEFT + ((math.log10(x) if log else x) - x0) / (x1 - x0) * (WIDE - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(TOP + (y1 - y) / (y1 - y0) * (TALL - TOP - 44), 1)

    bottom = TALL - 44
    out = [f'<svg class="scatter" viewBox="0 0 {WIDE} {TALL}" role="img" aria-label="{escape(title)}">']
    rows, columns = ticks(y0, y1), _log_ticks(x0, x1) if log else ticks(x0, x1, 8)
    for y in rows:
        out.append(f'<path class="grid" d="M{LEFT},{py(y)}H{WIDE - RIGHT}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{py(y) + 4}" text-anchor="end">{tick_label(y, rows)}</text>')
    for x in columns:
        out.append(f'<path class="grid" d="M{px(x)},{TOP}V{bottom}"/>')
        out.append(f'<text x="{px(x)}" y="{bottom + 17}" text-anchor="middle">{tick_label(x, columns)}</text>')
    out.append(
        f'<text x="{WIDE - RIGHT}" y="{TALL - 6}" text-anchor="end">{escape(xlabel)} &#8594;'
        f"{' (logarithmic)' if log else ''}</text>"
    )
    out.append(f'<text x="{LEFT + 6}" y="{TOP + 10}">&#8593; {escape(ylabel)}</text>')
    front = pareto_front(points)
    corners = [(px(front[0].x), float(bottom)), (px(front[0].x), py(front[0].y))]
    for p in front[1:]:
        corners += [(px(p.x), corners[-1][1]), (px(p.x), py(p.y))]
    corners.append((float(WIDE - RIGHT), corners[-1][1]))
    out.append(f'<path class="front" d="M{"L".join(f"{x},{y}" for x, y in corners)}"/>')
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
    keys = [f'<span><i style="background:var(--c{i % 8})"></i>{escape(g)}</span>' for i, g in enumerate(groups) if g]
    keys.append("<span>dashed: no measured point is both faster and better</span>")
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="keys">{"".join(keys)}</div>'
        f'<div class="wide">{"".join(out)}</svg></div></figure>'
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
) -> str:
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
    whiskers = f'<path class="whisker" style="stroke:{colour}" d="{"".join(parts)}"/>' if parts else ""
    ring = f'<circle class="ring" cx="{x}" cy="{y}" r="9"/>' if p.mark else ""
    return (
        f'{whiskers}{ring}<circle cx="{x}" cy="{y}" r="5" style="fill:{colour}">'
        f"<title>{escape(tooltip)}</title></circle>"
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
            out.append(f'<path class="leader" d="M{x},{y}L{end[0]:.1f},{end[1]:.1f}"/>')
        out.append(
            f'<text class="name{" marked" if p.mark else ""}" x="{a:.1f}" y="{d - 4:.1f}" '
            f'textLength="{wide:.1f}" lengthAdjust="spacingAndGlyphs">{escape(p.name)}</text>'
        )
    return out


def _meet(a: Box, b: Box) -> bool:
    """Whether two boxes (left, top, right, bottom) touch."""
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def stacked_bar(parts: Sequence[tuple[str, float, str]]) -> str:
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
        cells.append(f'<div style="width:{share:.2f}%;background:var(--c{i % 8})" title="{escape(tip)}">{inside}</div>')
        keys.append(f'<span><i style="background:var(--c{i % 8})"></i>{escape(name)} <b>{escape(note)}</b></span>')
    return f'<div class="bar" role="img">{"".join(cells)}</div><div class="keys">{"".join(keys)}</div>'


def swatch(colour: Sequence[int]) -> str:
    """A small square in a class's colour."""
    return f'<i class="swatch" style="background:rgb({",".join(str(int(v)) for v in colour)})"></i>'


def meter(share: float) -> str:
    """A share from 0 to 1 as a small horizontal bar and in percent, for table cells."""
    width = 100 * min(max(share, 0), 1)
    return f'<div class="meter"><div style="width:{width:.1f}%"></div></div><span>{100 * share:.1f} %</span>'


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
