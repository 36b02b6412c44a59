"""Looking: stream reads, never a consumer. What was passed is proved by a later row, or by the stream's leader having none."""

from __future__ import annotations

import asyncio
import time
from base64 import b64decode
from collections import deque
from collections.abc import Mapping
from typing import Any

import orjson

from broker_nb.backends.driver import Batch, Piece, Position, Step, Stop
from broker_nb.backends.jetstream.catalogue import Catalogue, end_of, first_of
from broker_nb.backends.jetstream.client import Answer, Wire, fulfilled, message
from broker_nb.backends.jetstream.codec import JetStreamCodec, Row
from broker_nb.backends.jetstream.errors import NO_MESSAGE, Refusal, failure
from broker_nb.backends.jetstream.names import Place
from broker_nb.errors import BrokerError, ErrorKind

BATCHED = (2, 11, 0)
"""The server version from which one request brings many rows (where the stream has allow_direct)."""
_MOST, _BYTES = 256, 16 << 20  # what requests for single rows may bring at once: a server drops who is too slow for it
_POLL_S = 0.1  # between two questions for what comes next
_STREAM = b"\r\nNats-Stream: "  # the first of the lines that the server appends


class _Direct:
    """Many rows by one request, from any server that has the stream. The server's own lines come after those of the message."""

    again = False

    def __init__(self, place: Place) -> None:
        self._subject = {"next_by_subj": place.subject} if place.subject else {}
        self.over = False  # the last answer is there

    def requests(self, start: int, rows: int, max_bytes: int) -> list[bytes]:
        self.over = False
        return [orjson.dumps({"seq": start, "batch": rows, "max_bytes": max_bytes, **self._subject})]

    def rows(self, answer: Answer) -> list[Row]:
        """None by the end of the batch (204), or where there is nothing (404)."""
        head, mark, tail = (answer.headers or b"").rpartition(_STREAM)
        if not mark:
            self.over = True
            return []
        _, subject, sequence, stamp, *_ = tail.split(b"\r\n")
        own = head + b"\r\n\r\n" if b"\r\n" in head else b""
        return [Row(subject[14:].decode(), int(sequence[15:]), stamp[17:].decode(), None, own, answer.data)]


class _Single:
    """A request per row, answered by the stream's leader, many under way at once.

    Answers come in any order, and of neighbours in a gap all bring the row after it: so they are sorted when the last one is there.
    While rows are being written, one request may find nothing and a later one the row after the next: then the next one is asked
    for alone.

    Parameters
    ----------
    fixed
        Every row that is asked for was there before.
    """

    def __init__(self, place: Place, fixed: bool) -> None:
        self._filter, self._fixed = place.filter, fixed
        self._width, self._largest = 16, 1  # rows at once; bytes of the largest row of the last time
        self._start = self._asked = self._waiting = 0
        self._found: dict[int, Row] = {}
        self._nothing = False
        self.over = self.again = False

    def requests(self, start: int, rows: int, max_bytes: int) -> list[bytes]:
        self._start, self._asked = start, min(self._width, rows, max(1, min(max_bytes, _BYTES) // self._largest))
        self._waiting, self._found, self._nothing, self._largest = self._asked, {}, False, 1
        self.over = self.again = False
        return [orjson.dumps({"seq": start + i, "next_by_subj": self._filter}) for i in range(self._asked)]

    def rows(self, answer: Answer) -> list[Row]:
        """Raises Refusal; that there is nothing is no refusal."""
        self._waiting -= 1
        try:
            stored: dict[str, Any] = fulfilled(answer.data)["message"]
        except Refusal as refusal:
            if refusal.number != NO_MESSAGE:
                raise
            self._nothing = True
        else:
            headers, data = b64decode(stored.get("hdrs", "")), b64decode(stored.get("data", ""))
            self._found[stored["seq"]] = Row(stored["subject"], stored["seq"], stored["time"], None, headers, data)
            self._largest = max(self._largest, len(answer.data))
        return [] if self._waiting else self._all()

    def _all(self) -> list[Row]:
        self.over = True
        rows = [self._found[sequence] for sequence in sorted(self._found)]
        if self._nothing and self._asked > 1 and not self._fixed:
            self.again, self._width = True, 1
            return [row for i, row in enumerate(rows) if row.sequence == self._start + i]
        self._width = min(2 * self._width, _MOST) if 2 * len(rows) > self._asked else max(self._width // 2, 1)
        return rows


class JetStreamBrowser:
    """A look over one piece of a stream.

    Parameters
    ----------
    late
        The piece begins with the oldest row that there was, whichever that is by now.
    """

    def __init__(
        self,
        wire: Wire,
        catalogue: Catalogue,
        codec: JetStreamCodec,
        place: Place,
        info: Mapping[str, Any],
        piece: Piece,
        *,
        late: bool,
    ) -> None:
        self._wire, self._catalogue, self._codec, self._place = wire, catalogue, codec, place
        self._next = piece.start[0] + (len(piece.start) > 1)  # the sequence to ask for
        self._end = None if piece.end is None else piece.end[0] + (len(piece.end) > 1)
        self._over = self._end is not None and self._next >= self._end  # nothing more is to be read
        self._stop: Stop | None = None
        self._high = end_of(info)
        if not self._over and self._next < first_of(info):
            # Rows of a queue go when they are done, and the oldest of a full log all the time: what is left is shown.
            self._stop, self._over = Stop.AGED_OUT, not (late or info["config"]["retention"] != "limits")
        self._single = _Single(place, self._end is not None and self._end <= self._high)
        batched = info["config"].get("allow_direct") and wire.version >= BATCHED
        self._way: _Direct | _Single = _Direct(place) if batched else self._single
        self._rows: deque[Row] = deque()  # read, not handed out
        self._number = 0  # of the request
        self._asked_at: float | None = None  # while it is under way
        self._came = False  # a row, by this request
        self._gap: int | None = None  # first sequence that no row came for, since it was last asked why
        self._error: BrokerError | Refusal | None = None
        self._news = asyncio.Event()
        self._closed = False
        self._inbox = wire.inbox(self._take, self._cut, "")

    # -------------------------------------------------------------- while the connection is read
    def _take(self, answer: Answer) -> None:
        if self._asked_at is None or answer.subject != b"%d" % self._number:  # of a request that was given up
            return
        try:
            rows = self._way.rows(answer)
        except Refusal as refusal:
            self._cut(refusal)
            return
        for row in rows:
            self._came = True
            if row.sequence > self._next and self._gap is None:
                self._gap = self._next
            self._next = row.sequence + 1
            if self._end is None or row.sequence < self._end:
                self._rows.append(row)
        if self._way.over:
            self._asked_at = None
            self._news.set()

    def _cut(self, error: BrokerError | Refusal) -> None:
        if self._asked_at is not None:
            self._error, self._asked_at = error, None
            self._news.set()

    # -------------------------------------------------------------- reading
    async def read(self, max_rows: int, max_bytes: int, wait: float) -> Step:
        if self._closed:
            raise self._host_error(ErrorKind.CLOSED, "this look is closed; begin a new one")
        if not self._rows and not self._over:
            await self._fetch(max_rows, max_bytes, time.monotonic() + wait)
        return self._step(max_rows)

    async def _fetch(self, max_rows: int, max_bytes: int, until: float) -> None:
        if self._asked_at is None:
            self._news.clear()
            await self._ask(max_rows, max_bytes)
        await self._wait(until)
        if self._error is not None:
            error, self._error = self._error, None
            raise failure(self._wire.host, self._place.name, error) if isinstance(error, Refusal) else error
        if self._asked_at is not None:
            if time.monotonic() - self._asked_at > self._wire.timeout and not self._closed:
                self._asked_at = None
                raise self._host_error(ErrorKind.TIMEOUT, f"no answer within {self._wire.timeout:g} s", retryable=True)
            return
        if not self._came and not self._way.again:
            await self._nothing(until)
        self._over |= self._end is not None and self._next >= self._end
        if self._gap is not None:
            await self._why(self._gap)

    async def _ask(self, max_rows: int, max_bytes: int) -> None:
        rows = max_rows if self._end is None else min(max_rows, self._end - self._next)
        call = "DIRECT.GET" if isinstance(self._way, _Direct) else "STREAM.MSG.GET"
        subject = self._wire.api_subject(f"{call}.{self._place.stream}")
        self._number += 1
        self._came, self._inbox.about = False, subject.lower()
        reply = f"{self._inbox.subject}.{self._number}"
        asked = [message(subject, reply, b"", request) for request in self._way.requests(self._next, rows, max_bytes)]
        self._asked_at = time.monotonic()
        try:
            await self._wire.write(asked)
        except BaseException:
            self._asked_at = None
            raise

    async def _wait(self, until: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                await self._news.wait()
        except TimeoutError:
            pass

    async def _nothing(self, until: float) -> None:
        """No row came: there is none, or a server answered that has not got it yet, or none that answers so (any more)."""
        if self._end is None:
            self._news.clear()
            await self._wait(min(until, time.monotonic() + _POLL_S))
        elif isinstance(self._way, _Direct):
            self._way = self._single  # ask the leader
        elif self._end > self._high:
            _, info = await self._catalogue.find(self._place.name)
            self._over, self._high = end_of(info) == self._high, end_of(info)
            self._stop = self._stop or (Stop.DRY if self._over else None)
        else:
            self._gap = self._next if self._gap is None else self._gap
            self._next, self._over = self._end, True

    async def _why(self, gap: int) -> None:
        """Rows that were deleted before are no rows of the range; those that went since its end was fixed are missing."""
        _, info = await self._catalogue.find(self._place.name)
        self._gap = None
        if gap < first_of(info):
            self._stop = Stop.AGED_OUT
            self._over |= self._end is None

    def _step(self, max_rows: int) -> Step:
        rows = [self._rows.popleft() for _ in range(min(max_rows, len(self._rows)))]
        batch = Batch(self._codec, rows) if rows else None
        ended = self._over and not self._rows
        reached: dict[int, Position] = {0: (rows[-1].sequence + 1,)} if rows else {}
        if ended and self._stop is None and self._end is not None:
            reached = {0: (self._end,)}
        if ended and self._stop is Stop.AGED_OUT:
            reached = {}  # else the range would count as read
        return Step(batch, reached, {0: self._stop} if ended and self._stop is not None else {})

    def _host_error(self, kind: ErrorKind, text: str, *, retryable: bool = False) -> BrokerError:
        return self._wire.host.error(kind, self._place.name, f"{self._place.name}: {text}", retryable=retryable)

    async def close(self) -> None:
        self._closed = True
        self._news.set()
        await self._wire.forget(self._inbox)
