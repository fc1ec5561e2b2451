"""HTML that cannot forget to escape: a template with holes, and text that is escaped unless it is HTML already.

Templates are literals in our own source (``tests/test_structure.py`` holds that), values come from anywhere. Standard
library only; markupsafe and jinja2 are not on the machines that only need a report.
"""

import re
from collections.abc import Iterable
from html import escape as _escape
from typing import Any

UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # no page may hold these


class Html(str):
    """Text that is HTML. Only :func:`html`, :func:`escape` and :func:`join` make it."""

    __slots__ = ()

    def __add__(self, other: str) -> "Html":
        return Html(str.__add__(self, escape(other)))

    def __radd__(self, other: str) -> "Html":
        return Html(str.__add__(escape(other), self))

    def __mul__(self, times: Any) -> "Html":
        return Html(str.__mul__(self, times))


class _Hole:
    """A value that is formatted, then escaped."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __format__(self, spec: str) -> str:
        return self.value if isinstance(self.value, Html) and not spec else escape(format(self.value, spec))


def escape(value: object) -> Html:
    """A value as text safe in HTML, inside quoted attributes, too; HTML stays as it is."""
    return value if isinstance(value, Html) else Html(_escape(UNSEEN.sub("\ufffd", str(value)), quote=True))


def html(template: str, *values: object) -> Html:
    """A literal template with ``{}`` or ``{:.2f}`` where values go; what is not :class:`Html` is escaped."""
    return Html(template.format(*map(_Hole, values)))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Parts one after the other; those that are not HTML are escaped, as is what stands between them."""
    return Html(str.join(escape(between), map(escape, parts)))
