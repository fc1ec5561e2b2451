"""Figures of the report on a lineage: bars, heat tables of classes, and where two masks differ. NumPy and HTML text."""

from collections.abc import Sequence

import numpy as np

from tinymim_export.bench.stats import LEVEL
from tinymim_export.report.markup import Html, escape, html, join
from tinymim_export.report.plots import swatch

MISSING = html('<span class="missing">not given</span>')
UNCHANGED = 0.0005  # change of an IoU that rounds to 0.0 points
WORSE, BETTER, OTHER = (214, 39, 40), (31, 140, 90), (230, 160, 30)  # colours of a difference picture


def bars(title: str, rows: Sequence[tuple[str, float, str]], least: float = 0.0) -> Html:
    """Horizontal bars from a common zero line; negative values go to the left, in green (they cost nothing).

    Args:
        title: Above the figure.
        rows: (label, value, text next to the bar).
        least: Smallest value a full bar stands for, so that noise does not look like a finding.
    """
    if not rows:
        return html("")
    low, high = min(0.0, *(v for _, v, _ in rows)), max(least, *(v for _, v, _ in rows))
    span = (high - low) or 1.0
    lines = []
    for label, value, note in rows:
        start, width = 100 * (min(value, 0.0) - low) / span, 100 * abs(value) / span
        tone = "var(--good)" if value < 0 else "var(--c1)"
        lines.append(
            html(
                '<span>{}</span><div><i style="left:{:.2f}%;width:{:.2f}%;background:{}"></i></div><b>{}</b>',
                label,
                start,
                max(width, 0.4),
                tone,
                note,
            )
        )
    return html('<figure><figcaption>{}</figcaption><div class="bars">{}</div></figure>', title, join(lines))


def class_losses(
    columns: Sequence[tuple[str, dict[str, float | None]]],
    original: dict[str, float | None],
    colours: dict[str, Sequence[int]] | None = None,
    base: str = "FP32 IoU",
) -> Html:
    """A table of classes: IoU of the original, then what each other column loses (red) or gains (green), in points.

    Args:
        columns: (heading, class -> IoU); fractions, None where the class never occurs.
        original: The same of what they are compared with.
        colours: RGB of the classes.
        base: Heading of the original's column.
    """
    order = sorted((name for name in original if original[name] is not None), key=lambda name: -(original[name] or 0))
    changes = [
        max((abs(value - (original[name] or 0)) for name in order if (value := iou.get(name)) is not None), default=0.0)
        for _, iou in columns
    ]
    alike = [text for (text, _), change in zip(columns, changes, strict=True) if change < UNCHANGED]
    columns = [column for column, change in zip(columns, changes, strict=True) if change >= UNCHANGED]
    said = f"No class changes by {100 * UNCHANGED:g} points: {', '.join(alike)}."
    note = html('<p class="note">{}</p>', said) if alike else html("")
    if not order or not columns:
        return note if order else html("")
    strongest = max(*changes, 0.005)
    head = join(html("<th>{}</th>", text) for text in ("class", base, *(name for name, _ in columns)))
    body = []
    for name in order:
        own = original[name] or 0.0
        square = swatch(colours[name]) if colours and name in colours else ""
        cells = [html("<td>{}{}</td><td>{:.1f} %</td>", square, name, 100 * own)]
        for _, iou in columns:
            value = iou.get(name)
            if value is None:
                cells.append(html("<td>absent</td>"))
                continue
            change = value - own
            tone, share = ("bad" if change < 0 else "good"), round(70 * abs(change) / strongest)
            text = "0.0" if abs(change) < UNCHANGED else f"{100 * change:+.1f}"
            cells.append(
                html('<td style="background:color-mix(in srgb,var(--{}) {}%,transparent)">{}</td>', tone, share, text)
            )
        body.append(html("<tr>{}</tr>", join(cells)))
    return html('<div class="scroll"><table class="heat"><tr>{}</tr>{}</table></div>{}', head, join(body), note)


def difference_image(
    photo_HW3: np.ndarray, first_HW: np.ndarray, second_HW: np.ndarray, truth_HW: np.ndarray | None = None
) -> np.ndarray:
    """The faded photo with the pixels where two masks differ.

    Args:
        photo_HW3: uint8 RGB.
        first_HW: Class ids of the original.
        second_HW: Class ids of the other file.
        truth_HW: Labels, 255 where unknown. With them: red where the original was right, green where the other is,
            amber if neither is or it is unknown; without: amber everywhere.

    Returns:
        (H, W, 3) uint8.
    """
    grey = photo_HW3.astype(np.float32).mean(-1, keepdims=True)
    out_HW3 = np.repeat(150 + grey * (105 / 255), 3, axis=-1).astype(np.uint8)
    differ = first_HW != second_HW
    out_HW3[differ] = OTHER
    if truth_HW is not None:
        out_HW3[differ & (first_HW == truth_HW)] = WORSE
        out_HW3[differ & (second_HW == truth_HW)] = BETTER
    return out_HW3


def short(sha256: str) -> Html:
    """The first 10 digits of a hash, all of it in the tooltip."""
    return html('<code title="{}">{}</code>', sha256, sha256[:10])


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction in percent, or a dash."""
    return "\u2013" if value is None else f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """A loss as a signed change in points of mIoU: 0.012 -> "-1.20"."""
    return f"{-100 * value:+.2f}".replace("-0.00", "+0.00")


def with_interval(text: str, small: str) -> Html:
    """A figure with small print under it."""
    return html("{}<small>{}</small>", text, small) if small else escape(text)


def interval_text(interval: Sequence[float] | None, scale: float, digits: int = 1) -> str:
    """ "58.1 to 63.0", or nothing."""
    if not interval:
        return ""
    low, high = (round(scale * v, digits) + 0.0 for v in interval)  # + 0.0: no "-0.0"
    return f"{low:.{digits}f} to {high:.{digits}f}"


def legend(*entries: tuple[Sequence[int], str]) -> Html:
    """Colours and what they mean, in one line."""
    return html(
        '<div class="legend">{}</div>', join((html("<span>{}{}</span>", swatch(c), text) for c, text in entries))
    )


def class_legend(classes: Sequence[tuple[Sequence[int], str]], most: int = 40) -> Html:
    """Colours and names of classes, in one line; "and N more" where there are more than ``most``."""
    more = html("<span>and {} more</span>", len(classes) - most) if len(classes) > most else ""
    shown = join(html("<span>{}{}</span>", swatch(colour), name) for colour, name in classes[:most])
    return html('<div class="legend">{}{}</div>', shown, more) if classes else html("")


INTERVAL_NOTE = f"Small print: {100 * LEVEL:.0f} % intervals (bootstrap over photos, or over timed runs)."
