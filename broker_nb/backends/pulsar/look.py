"""Looking: a reader per partition, read until the broker says that nothing is left below the end."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import pulsar

from broker_nb.backends.driver import Batch, Bounds, Digest, Host, Lane, Piece, Position, Step, Stop
from broker_nb.backends.pulsar.codec import PulsarCodec, place_of
from broker_nb.backends.pulsar.errors import failure
from broker_nb.errors import ErrorKind

BITE = 2000
"""Rows that are digested at once."""
_SILENT_S = 3.0  # how long the client may say that there is more, and nothing comes: markers and the like
_ASK_S = 0.1  # between two questions whether there is more
_TURN_MS = 50  # between two looks at every partition
_PREFETCH = 2000


class PulsarBrowser:
    """A look over fixed pieces of one topic. Each open reader shows as a subscription until it is closed."""

    def __init__(
        self,
        host: Host,
        lane: Lane,
        topic: str,
        pieces: Sequence[Piece],
        bounds: Mapping[int, Bounds],
        digest: Digest | None,
        check_alive: Callable[[], Awaitable[None]],
    ) -> None:
        self._host, self._lane, self._topic, self._check_alive = host, lane, topic, check_alive
        self._codec, self._digest = PulsarCodec(topic), digest
        self._pieces = {p.partition: p for p in pieces}
        self._bounds = bounds
        self._readers: dict[int, pulsar.Reader] = {}
        self._heard: dict[int, float] = {}  # when each partition gave its last row
        self._asked: dict[int, float] = {}
        self._reached: dict[int, Position] = {}
        self._stopped: dict[int, Stop] = {}
        self._first: dict[int, pulsar.Message] = {}  # came while waiting
        self._step: Step | None = None  # read and not handed out
        self.closed = False

    async def open(self, client: pulsar.Client, topics: Mapping[int, str]) -> None:
        """Open the readers; the topics are there."""
        try:
            await self._lane.run(self._begin, client, topics)
        except pulsar.PulsarException as error:
            await self.close()
            raise failure(self._host, self._topic, error) from error

    def _begin(self, client: pulsar.Client, topics: Mapping[int, str]) -> None:
        for partition, piece in self._pieces.items():
            if piece.end is not None and piece.start >= piece.end:
                self._reached[partition] = piece.end
            elif piece.start < self._bounds[partition].low:
                self._stopped[partition] = Stop.AGED_OUT
            else:
                ledger, entry = (*piece.start, 0)[:2]
                # A whole entry, of which rows before the start are left out: no index in a batch to get wrong.
                start = pulsar.MessageId(-1, ledger, entry, -1)
                self._readers[partition] = client.create_reader(
                    topics[partition], start, receiver_queue_size=_PREFETCH, start_message_id_inclusive=True
                )
                self._heard[partition] = time.monotonic()

    async def read(self, max_rows: int, max_bytes: int, wait: float) -> Step:
        if self.closed:
            raise self._host.error(ErrorKind.CLOSED, self._topic, f"{self._topic}: this look is closed; begin a new one")
        if self._step is None:
            try:
                silent = await self._lane.run(self._read, max_rows, max_bytes, wait)
            except pulsar.PulsarException as error:
                raise failure(self._host, self._topic, error) from error
            if silent:
                await self._check_alive()  # else it is not the partition that is silent
        step, self._step = self._step or Step(None, {}), None
        return step

    def _read(self, max_rows: int, max_bytes: int, wait: float) -> bool:
        """On the lane: what was read stays here until somebody takes it. Whether a partition has been silent for long."""
        if self._step is not None or self.closed:
            return False
        until = time.monotonic() + wait
        rows: list[pulsar.Message] = []
        digests: list[object] = []
        silent, taken, size = False, 0, 0
        while True:
            for partition in tuple(self._readers):
                bite = min(BITE, max_rows - taken) if self._digest else max_rows - taken
                got, n = self._drain(partition, bite, max_bytes - size)
                taken, size = taken + len(got), size + n
                if self._digest is not None and got:
                    digests.append(self._digest(Batch(self._codec, got)))
                else:
                    rows += got
                if not got and partition in self._readers:
                    silent |= self._ask(partition)
                if taken >= max_rows or size >= max_bytes:
                    break
            left = until - time.monotonic()
            if any((taken, self._reached, self._stopped, self.closed, silent, left <= 0)):
                break
            self._wait(left)
        batch = Batch(self._codec, rows, digests=digests) if rows or digests else None
        reached, self._reached, stopped, self._stopped = self._reached, {}, self._stopped, {}
        self._step = Step(batch, reached, stopped)
        return silent

    def _drain(self, partition: int, max_rows: int, max_bytes: int) -> tuple[list[pulsar.Message], int]:
        """What a partition's reader has fetched already."""
        read, piece = self._readers[partition].read_next, self._pieces[partition]
        rows: list[pulsar.Message] = []
        size, at = 0, None
        while len(rows) < max_rows and size < max_bytes:
            try:
                message = self._first.pop(partition) if partition in self._first else read(0)
            except pulsar.Timeout:
                break
            at = place_of(message.message_id())
            if piece.end is not None and at >= piece.end:
                self._finish(partition, piece.end)
                return rows, size
            if at >= piece.start:
                rows.append(message)
                size += len(message.data())
        if at is not None:
            self._heard[partition] = time.monotonic()
            if at >= piece.start:
                self._reached[partition] = (*at, 0)
                if piece.end is not None and (*at, 0) >= piece.end:
                    self._finish(partition, piece.end)
        return rows, size

    def _ask(self, partition: int) -> bool:
        """Whether a bounded piece is over; True when it should have ended long ago."""
        end, now = self._pieces[partition].end, time.monotonic()
        if end is None or now - self._asked.get(partition, 0.0) < _ASK_S:
            return False
        self._asked[partition] = now
        more = bool(self._readers[partition].has_message_available())
        known = self._bounds[partition].end
        if not more and known is not None and end <= known:
            self._finish(partition, end)
        elif not more or now - self._heard[partition] > _SILENT_S:
            self._stopped[partition] = Stop.DRY
            self._end(partition)
            return more
        return False

    def _wait(self, left: float) -> None:
        """In the client, until a row comes to any partition; a row that comes is drained first."""
        each = max(1, min(int(left * 1000), _TURN_MS) // max(1, len(self._readers)))
        for partition, reader in self._readers.items():
            try:
                self._first[partition] = reader.read_next(each)
            except pulsar.Timeout:
                continue
            return

    def _finish(self, partition: int, end: Position) -> None:
        self._reached[partition] = end
        self._end(partition)

    def _end(self, partition: int) -> None:
        self._readers.pop(partition).close()

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            try:
                await self._lane.run(self._shut)
            except pulsar.PulsarException as error:
                raise failure(self._host, self._topic, error) from error
            finally:
                self._lane.close()

    def _shut(self) -> None:
        while self._readers:
            self._readers.popitem()[1].close()
