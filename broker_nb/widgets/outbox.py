"""What is to be told to the page, in messages of bounded size."""

from __future__ import annotations

import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker_nb.widgets import wording
from broker_nb.widgets.rows import Row, Rows, state, wall_ms, wire

VERSION = 1
FLUSH_BYTES, FLUSH_ROWS, NEWEST = 24_000, 200, 60
MAX_BODY = 4 << 20


class Outbox:
    """Collects what changed; `message` makes one message out of it.

    Attributes
    ----------
    news, changes
        Rows to be sent whole, and rows of which only the state changed.
    replies, bodies, snapshots
        Answers to what pages asked; the last are the pages that want everything.
    told
        Counters and health as they were told last.
    epoch
        Names this view, so that a page of an earlier one cannot ask for its rows.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self.news: dict[int, Row] = {}
        self.changes: dict[int, Row] = {}
        self.replies: list[dict[str, Any]] = []
        self.bodies: deque[dict[str, Any]] = deque()
        self.snapshots: deque[str] = deque()
        self.told: tuple[Any, ...] = ()
        self.epoch = secrets.token_hex(4)
        self._columns, self._seq, self._told_hi = columns, 0, 0

    @property
    def more(self) -> bool:
        """Whether something did not fit into the last message."""
        return bool(self.news or self.changes or self.bodies or self.snapshots)

    def message(
        self, rows: Rows, about: Callable[[], dict[str, Any]], counters: Mapping[str, Any], health: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[bytes]] | None:
        """What is new, and its buffers; None when nothing is."""
        told = (counters, health, rows.lo, rows.hi)
        if not (self.more or self.replies or told != self.told):
            return None
        self.told = told
        buffers: list[bytes] = []
        message: dict[str, Any] = {"type": "delta"}
        if self.snapshots:
            message = {"type": "snapshot", "v": VERSION, "view": self.snapshots.popleft(), **about()}
            self.news = {**rows.pinned, **self.news}
            self._told_hi = 0
        message |= {"counters": counters, "health": health, "ring": [rows.lo, rows.hi], "replies": self.replies}
        self.replies = []
        budget = FLUSH_BYTES - len(json.dumps(message))
        message["states"] = []
        while self.changes and budget > 0:
            row = self.changes.pop(next(iter(self.changes)))
            if row.n not in self.news:
                message["states"].append(state(row))
                budget -= len(json.dumps(message["states"][-1]))
        if self.bodies:
            found = self.bodies.popleft()
            buffers = [found.pop("data")]
            message["body"] = found
        message["rows"] = self._rows(rows, budget)
        return self.signed(message), buffers

    def signed(self, message: dict[str, Any]) -> dict[str, Any]:
        """With its number, so that a page notices when the server has dropped one."""
        self._seq += 1
        return {**message, "epoch": self.epoch, "seq": self._seq, "now": wall_ms(time.monotonic())}

    def _rows(self, rows: Rows, budget: int) -> list[list[Any]]:
        """Rows asked for and pinned ones first, then the newest; the page asks for others when it comes to them."""
        found: list[list[Any]] = []
        while self.news and budget > 0 and len(found) < FLUSH_ROWS:
            row = self.news.pop(next(iter(self.news)))
            if rows.get(row.n) is row:
                found.append(wire(row, self._columns))
                budget -= len(json.dumps(found[-1]))
        pos, floor = rows.hi, max(self._told_hi, rows.hi - NEWEST, rows.lo - 1)
        while pos > floor and budget > 0:
            newest = rows.at(pos)
            if newest is not None and newest.serial is None:
                found.append(wire(newest, self._columns))
                budget -= len(json.dumps(found[-1]))
            pos -= 1
        self._told_hi = rows.hi
        return found


def body(req: object, row: Row | None, n: int) -> dict[str, Any]:
    """One message whole, for the page that asked; its bytes travel beside the JSON."""
    if row is None:
        return {"req": req, "row": n, "gone": True, "data": b""}
    envelope = row.codec.envelope(row.row)
    data = envelope.data or b""
    return {
        "req": req,
        "row": n,
        "null": envelope.data is None,
        "size": len(data),
        "key": None if envelope.key is None else wording.plain(envelope.key.decode("utf-8", "backslashreplace")),
        "attributes": wording.attributes(envelope.attributes),
        "data": data[:MAX_BODY],
    }
