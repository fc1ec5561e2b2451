"""Tables for terminals and Markdown, and counts that read well. Standard library only."""

import re
from collections.abc import Sequence

from tinymim.files import writable

UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters would steer a terminal


def printable(text: str) -> str:
    """Text for a terminal: lines stay, control characters that a file brought do not."""
    return "\n".join(UNSEEN.sub("?", line) for line in writable(text).split("\n"))


def markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no HTML, no column of its own."""
    return UNSEEN.sub(" ", writable(text)).replace("<", "&lt;").replace("|", "\\|")


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown of a heading and rows."""
    rows = ["| " + " | ".join(map(markdown, line)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]]) + "\n"


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    lines = [[UNSEEN.sub("?", cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def millions(count: int) -> str:
    """``5.53 M``."""
    return f"{count / 1e6:.2f} M"


def billions(count: int) -> str:
    """``10.43 G``, or ``1.20 M`` where that reads better."""
    return f"{count / 1e9:.2f} G" if count >= 1e8 else millions(count)
