"""What a log reader has done: the contiguous prefix per partition, and nothing beyond it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from broker_nb.backends.driver import Position


class Prefix:
    """One partition: rows delivered in order, marked as done in any order, committed as a contiguous run.

    >>> p = Prefix()
    >>> p.deliver([(10,), (11,), (12,)])
    >>> p.mark((11,)), p.mark((10,)), p.waiting
    (False, True, 1)
    >>> p.position
    (11, 0)
    """

    __slots__ = ("_done", "_rows", "committed", "position")

    def __init__(self) -> None:
        self._rows: deque[Position] = deque()
        self._done: set[Position] = set()
        self.position: Position | None = None  # everything below is done
        self.committed: Position | None = None  # what the broker has stored for us

    def deliver(self, positions: Iterable[Position]) -> None:
        """Rows handed to the caller, in order."""
        self._rows.extend(positions)

    def mark(self, row: Position) -> bool:
        """One row is done; whether the prefix moved."""
        self._done.add(row)
        return self._advance()

    def mark_to(self, row: Position) -> bool:
        """Everything up to and with `row` is done; whether the prefix moved. Never moves back."""
        self._done.update(r for r in self._rows if r <= row)
        return self._advance()

    def _advance(self) -> bool:
        moved = False
        while self._rows and self._rows[0] in self._done:
            row = self._rows.popleft()
            self._done.discard(row)
            self.position = (*row, 0)
            moved = True
        return moved

    def is_done(self, row: Position) -> bool:
        """Whether the row is marked, or below the prefix."""
        return row in self._done or (self.position is not None and row < self.position)

    @property
    def first_open(self) -> Position | None:
        """The first delivered row that is not done."""
        return self._rows[0] if self._rows else None

    @property
    def waiting(self) -> int:
        """Rows delivered and not committable yet."""
        return len(self._rows)

    def rewind(self) -> Position | None:
        """Forget what was delivered and is not committable; the place to read from again, if anything was open."""
        start = self.first_open
        self._rows.clear()
        self._done.clear()
        return start
