"""The rows of a live view: what is held stays, everything else is a ring with bounds."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from broker_nb.backends.driver import Codec, Envelope
from broker_nb.errors import one_line

KEEP_ROWS = 10_000
KEEP_BYTES = 64 << 20
PREVIEW, KEY, FIELD = 160, 60, 48
"""Characters of a body, of a key and of a chosen field that a row shows."""
MAX_PARSED = 256 << 10
_EPOCH = time.time() - time.monotonic()


@dataclass(slots=True, eq=False)
class Row:
    """One delivery, or one message that was only looked at."""

    n: int  # its name between kernel and page; counts from 1
    codec: Codec
    row: Any
    size: int
    serial: int | None = None  # the delivery, where it is one
    until: float | None = None  # time.monotonic() at which it goes back by itself
    state: str = "seen"
    why: str = ""
    pos: int = 0  # place in the ring; 0 = pinned above it


class Rows:
    """Pinned rows in order of arrival, and a ring of the others, bounded in rows and in bytes of body.

    Attributes
    ----------
    lo, hi
        The ring is the places `lo`..`hi`, both included, without a gap; empty when hi < lo.
    dropped
        Rows that left the ring because it was full.
    """

    def __init__(self, keep_rows: int = KEEP_ROWS, keep_bytes: int = KEEP_BYTES) -> None:
        self.pinned: dict[int, Row] = {}
        self.lo, self.hi, self.dropped, self.added = 1, 0, 0, 0
        self._ring: dict[int, Row] = {}  # place -> row
        self._by_n: dict[int, Row] = {}
        self._keep_rows, self._keep_bytes, self._bytes = keep_rows, keep_bytes, 0

    def __iter__(self) -> Iterator[Row]:
        yield from self.pinned.values()
        yield from self._ring.values()

    def __len__(self) -> int:
        return len(self._by_n)

    def get(self, n: int) -> Row | None:
        """The row of that name, while the view has it."""
        return self._by_n.get(n)

    def at(self, pos: int) -> Row | None:
        """The row at a place of the ring."""
        return self._ring.get(pos)

    def add(self, codec: Codec, row: Any, *, serial: int | None = None, until: float | None = None, state: str = "seen") -> Row:
        """Take in a new row: pinned where it is a delivery."""
        self.added += 1
        made = Row(self.added, codec, row, codec.size(row), serial, until, state)
        self._by_n[made.n] = made
        if serial is None:
            self._enter(made)
        else:
            self.pinned[made.n] = made
        return made

    def retire(self, row: Row) -> None:
        """A pinned row is done: it becomes the newest of the ring."""
        if self.pinned.pop(row.n, None) is not None:
            self._enter(row)

    def _enter(self, row: Row) -> None:
        self.hi += 1
        row.pos = self.hi
        self._ring[row.pos] = row
        self._bytes += row.size
        while len(self._ring) > self._keep_rows or (self._bytes > self._keep_bytes and len(self._ring) > 1):
            gone = self._ring.pop(self.lo)
            del self._by_n[gone.n]
            self.lo += 1
            self.dropped += 1
            self._bytes -= gone.size


def wire(row: Row, columns: Sequence[str]) -> list[Any]:
    """The row as the page gets it: plain text on one line each, cut to what a line can show."""
    try:
        return [*state(row), *_content(row, columns)]
    except Exception as error:  # noqa: BLE001 (one row that its codec cannot read must not end the view)
        problem = one_line(f"cannot be shown: {type(error).__name__}: {error}", PREVIEW)
        return [*state(row), None, "", None, problem, row.size, None, [None] * len(columns)]


def _content(row: Row, columns: Sequence[str]) -> list[Any]:
    e = row.codec.envelope(row.row)
    return [
        None if e.publish_time_ns is None else e.publish_time_ns // 1_000_000,
        place(e),
        key_text(e.key),
        preview(e.data),
        None if e.data is None else len(e.data),
        e.delivery_count,
        fields(e.data, columns) if columns else [],
    ]


def state(row: Row) -> list[Any]:
    """What may change about a row: name, place, state, why, when it goes back by itself."""
    return [row.n, row.pos, row.state, one_line(row.why, PREVIEW), None if row.until is None or row.pos else wall_ms(row.until)]


def wall_ms(monotonic: float) -> int:
    """A time.monotonic() as milliseconds of the kernel's wall clock; the page is told what that clock shows now."""
    return int((_EPOCH + monotonic) * 1000)


def place(envelope: Envelope) -> str:
    """Where the row is on the broker, in a few characters."""
    if envelope.position and envelope.partition >= 0:
        return f"{envelope.partition}@{envelope.position[0]}"
    return one_line(envelope.id, KEY)


def key_text(key: bytes | None) -> str | None:
    """A key on one line; bytes that are no UTF-8 show as a backslash, x and two digits."""
    return None if key is None else one_line(key[: 4 * KEY].decode("utf-8", "backslashreplace"), KEY)


def preview(data: bytes | None) -> str | None:
    """The beginning of a body on one line; one that is no text shows as hexadecimal."""
    if data is None:
        return None
    head = data[: 4 * PREVIEW]
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) == len(data):  # else only cut within a character
            return head[:48].hex(" ") + ("…" if len(data) > 48 else "")
        text = head[: error.start].decode("utf-8")
    return one_line(text, PREVIEW)


def fields(data: bytes | None, columns: Sequence[str]) -> list[str | None]:
    """Chosen fields (`status`, `order.id`) of a JSON body as text; None where there is no such field."""
    try:
        document = json.loads(data) if data is not None and len(data) <= MAX_PARSED else None
    except (ValueError, RecursionError):
        document = None
    return [_field(document, name) for name in columns]


def _field(document: Any, name: str) -> str | None:
    if not isinstance(document, dict):
        return None
    if name in document:
        value = document[name]
    else:
        head, dot, rest = name.partition(".")
        return _field(document.get(head), rest) if dot else None
    return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), FIELD)
