"""One partition: rows at ascending offsets, which of them are visible, and which have gone."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import attrgetter
from typing import NamedTuple

from broker_nb.messages import Attribute

_OFFSET = attrgetter("offset")
_TIME = attrgetter("time_ns")
_UPTO = attrgetter("upto")


class Row(NamedTuple):
    """A stored row."""

    partition: int
    offset: int
    key: bytes | None
    data: bytes | None
    attributes: tuple[Attribute, ...] | None
    time_ns: int
    time_is: str  # "server" or "producer"
    upto: int  # bytes ever stored in the partition, up to and with this row: what bounds a read by bytes without a scan

    @property
    def size(self) -> int:
        """Bytes of key and data."""
        return (len(self.key) if self.key else 0) + (len(self.data) if self.data else 0)


class Piece(NamedTuple):
    """What one read found. Everything visible below `reached` was handed out."""

    rows: list[Row]
    reached: int
    skipped: int  # control and aborted rows that were passed
    size: int  # bytes


class Log:
    """The rows of one partition.

    Offsets ascend and may have gaps: a control record (the end of a transaction) takes one, and compaction leaves them.
    Rows of an open transaction are there and not yet visible to readers of committed rows; aborted ones never are.
    """

    __slots__ = ("aborted", "controls", "high", "low", "number", "open", "rows", "size", "sorted_times", "upto")

    def __init__(self, number: int) -> None:
        self.number = number
        self.rows: list[Row] = []
        self.low = self.high = 0
        self.size = self.upto = 0
        self.controls: list[int] = []
        self.aborted: set[int] = set()
        self.open: dict[object, int] = {}  # transaction -> its first offset here
        self.sorted_times = True

    @property
    def stable(self) -> int:
        """Where the first open transaction begins; else the end."""
        return min(self.open.values()) if self.open else self.high

    def index(self, offset: int) -> int:
        """Index in `rows` of the first row at or after an offset."""
        return bisect_left(self.rows, offset, key=_OFFSET)

    def append(
        self, key: bytes | None, data: bytes | None, attributes: tuple[Attribute, ...] | None, time_ns: int, time_is: str
    ) -> Row:
        """Store one row at the end."""
        size = (len(key) if key else 0) + (len(data) if data else 0)
        self.size += size
        self.upto += size
        row = Row(self.number, self.high, key, data, attributes, time_ns, time_is, self.upto)
        if self.rows and time_ns < self.rows[-1].time_ns:
            self.sorted_times = False
        self.rows.append(row)
        self.high += 1
        return row

    def end(self, transaction: object, offsets: list[int], committed: bool) -> None:
        """A transaction ends here: its rows become visible or are dropped, and a control record is written."""
        del self.open[transaction]
        if not committed:
            self.aborted.update(offsets)
        self.controls.append(self.high)
        self.high += 1

    def read(self, start: int, stop: int, max_rows: int, max_bytes: int, committed: bool) -> Piece:
        """Rows at `start` and after, below `stop`; at least one if there is one, however small `max_bytes` is."""
        rows = self.rows
        stop = min(stop, self.stable if committed else self.high)
        if start >= stop:
            return Piece([], start, 0, 0)
        first, last = self.index(start), self.index(stop)
        cut = min(last, first + max_rows)
        size = 0
        if cut > first:
            base = rows[first].upto - rows[first].size
            cut = max(first + 1, bisect_right(rows, base + max_bytes, first, cut, key=_UPTO))
            size = rows[cut - 1].upto - base
        found = rows[first:cut]
        reached = stop if cut == last else found[-1].offset + 1
        skipped = bisect_left(self.controls, reached) - bisect_left(self.controls, start)
        if committed and self.aborted:
            shown = [row for row in found if row.offset not in self.aborted]
            skipped += len(found) - len(shown)
            found = shown
        return Piece(found, reached, skipped, size)

    def count(self, start: int, stop: int) -> int:
        """How many rows from `start` below `stop` a reader of committed rows will see."""
        first, last = self.index(start), self.index(stop)
        hidden = sum(start <= offset < stop for offset in self.aborted)
        return max(0, last - first - hidden)

    def first_at(self, time_ns: int) -> int | None:
        """Offset of the first row whose time is at or after the given one; None = none such."""
        if self.sorted_times:
            index = bisect_left(self.rows, time_ns, key=_TIME)
            return self.rows[index].offset if index < len(self.rows) else None
        return next((row.offset for row in self.rows if row.time_ns >= time_ns), None)

    def count_since(self, time_ns: int) -> int:
        """How many rows have that time or a later one."""
        if self.sorted_times:
            return len(self.rows) - bisect_left(self.rows, time_ns, key=_TIME)
        return sum(row.time_ns >= time_ns for row in self.rows)

    def delete_before(self, offset: int) -> None:
        """Rows below `offset` age out; those of an open transaction stay."""
        offset = min(offset, self.stable)
        index = self.index(offset)
        self.size -= sum(row.size for row in self.rows[:index])
        del self.rows[:index]
        del self.controls[: bisect_left(self.controls, offset)]
        self.aborted = {o for o in self.aborted if o >= offset}
        self.low = max(self.low, offset)

    def compact(self) -> int:
        """Of each key only the newest committed row stays, and aborted rows go: gaps. Returns how many rows went."""
        stable, aborted = self.stable, self.aborted
        newest = {row.key: row.offset for row in self.rows if row.offset < stable and row.offset not in aborted}
        before, kept, self.upto = len(self.rows), [], 0
        for row in self.rows:
            current = row.key is None or newest.get(row.key) == row.offset
            if row.offset >= stable or (current and row.offset not in aborted):
                self.upto += row.size
                kept.append(row._replace(upto=self.upto))
        self.rows, self.size = kept, self.upto
        self.aborted = {offset for offset in aborted if offset >= stable}
        return before - len(kept)
