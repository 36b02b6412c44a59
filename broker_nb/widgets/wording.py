"""Text of messages, made fit to be shown as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from broker_nb.errors import one_line
from broker_nb.messages import Attribute

MAX_ATTRIBUTES, MAX_TEXT = 100, 2000


def plain(text: str) -> str:
    """On one line, without control and bidirectional characters."""
    return one_line(text, MAX_TEXT)


def attributes(given: Iterable[Attribute | Sequence[object]]) -> list[list[str | None]]:
    """Name, value and type of each, in order, repeats kept; the last line says how many are left out."""
    made: list[list[str | None]] = []
    every = list(given or ())
    for name, value, *kind in every[:MAX_ATTRIBUTES]:
        text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else None
        made.append([plain(str(name)), None if text is None else plain(text), str(kind[0]) if kind else ""])
    if len(every) > MAX_ATTRIBUTES:
        made.append([f"… and {len(every) - MAX_ATTRIBUTES} more", "", ""])
    return made
