"""Text of messages, made fit to be shown as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from broker_nb.errors import one_line
from broker_nb.messages import Attribute

MAX_ATTRIBUTES, MAX_TEXT, MAX_ALL = 100, 2000, 12_000


def plain(text: str) -> str:
    """On one line, without control and bidirectional characters."""
    return one_line(text, MAX_TEXT)


def attributes(given: Iterable[Attribute | Sequence[object]]) -> list[list[str | None]]:
    """Name, value and type of each, in order, repeats kept; the last line says how many are left out."""
    made: list[list[str | None]] = []
    every, size = list(given or ()), 0
    for name, value, *kind in every[:MAX_ATTRIBUTES]:
        if size > MAX_ALL:
            break
        text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else None
        made.append([plain(str(name)), None if text is None else plain(text), str(kind[0]) if kind else ""])
        size += sum(len(part or "") for part in made[-1])
    if len(every) > len(made):
        made.append([f"… and {len(every) - len(made)} more", "", ""])
    return made
