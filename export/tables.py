"""Tables for terminals and Markdown, and counts that read well. Imports nothing."""

from collections.abc import Sequence


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown of a heading and rows."""
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]]) + "\n"


def text_table(lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
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
