"""Drawings for reports as plain SVG and HTML text: curves, stacked bars, masks. NumPy, Pillow and the standard library.

Colours are CSS variables (``--c0`` .. ``--c7``, ``--ink``, ``--grid``), so one drawing serves light and dark pages.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 240, 52, 14, 12, 34  # of a chart, in SVG units


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
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between ``low`` and ``high``, about ``count`` of them."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


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
    """An SVG line chart; the raw line is faint behind its moving average. Empty text where nothing can be drawn."""
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
        text = f"{100 * y:.0f}%" if percent else number(y)
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
                out.append(f'<circle cx="{px(x)}" cy="{py(y)}" r="3.6" style="fill:var(--c{i % 8})">'
                           f"<title>{escape(title)}</title></circle>")  # fmt: skip
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
