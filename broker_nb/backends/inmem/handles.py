"""What the driver hands out: browser, sources, sender and transaction of the broker in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from broker_nb.backends.driver import (
    Batch,
    Codec,
    Event,
    Host,
    Outbound,
    Outcome,
    Piece,
    Position,
    SendResult,
    Settled,
    Settlement,
    Source,
    Step,
    Stop,
    TakeOptions,
    Token,
)
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.backends.inmem.codec import LogCodec, QueueCodec
from broker_nb.backends.inmem.log import Row
from broker_nb.backends.inmem.subscriptions import Consumer, Group, Member, Queue
from broker_nb.backends.inmem.topic import InmemTransaction, Topic
from broker_nb.errors import BrokerError, ErrorKind

T = TypeVar("T")

CHUNK = 2_000
"""Rows that are stored or settled in one go, so that the loop is never held for more than some milliseconds."""
_DONE = Outcome(Settled.CONFIRMED)


def offset_of(position: Position) -> int:
    """The first offset at or after a position."""
    return 0 if not position else position[0] + (len(position) > 1)


class Handle:
    """What all handles have in common: they close once, and wait without missing anything."""

    def __init__(self, broker: InmemBroker, host: Host, entity: str, topic: Topic) -> None:
        self.broker, self.host, self.entity, self.topic = broker, host, entity, topic
        self.closed = False

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """One call of the contract: refused after close, and where a fault was asked for it happens here."""
        if self.closed:
            raise self.host.error(ErrorKind.CLOSED, self.entity, f"{self.entity} is closed; open it again")
        with self.broker.faulty(name):
            yield

    async def first(
        self, attempt: Callable[[], T | None], wait: float, due: Callable[[], float | None] = lambda: None
    ) -> T | None:
        """What `attempt` finds, as soon as it finds something; None after `wait` seconds or when the handle is closed.

        `due` tells when (the clock's monotonic()) to look again although nothing was published.
        """
        until = time.monotonic() + wait
        while not self.closed:
            with self.topic.change() as changed:  # before looking, so that nothing slips in between
                with self.broker.lock:
                    found, again = attempt(), due()
                left = until - time.monotonic()
                if found is not None or left <= 0:
                    return found
                if again is not None:
                    left = min(left, max(0.0, again - self.broker.clock.monotonic()))
                await asyncio.wait((changed,), timeout=left)
        return None

    async def close(self) -> None:
        self.closed = True
        with self.broker.lock:
            self.topic.wake()


class InmemBrowser(Handle):
    """A look. The broker does not notice it."""

    def __init__(self, broker: InmemBroker, host: Host, topic: Topic, pieces: Sequence[Piece], committed_only: bool) -> None:
        super().__init__(broker, host, topic.name, topic)
        self._codec: Codec = LogCodec(topic.name)
        self._committed = committed_only
        self._at = {piece.partition: offset_of(piece.start) for piece in pieces}
        self._ends = {piece.partition: None if piece.end is None else offset_of(piece.end) for piece in pieces}
        self._told: dict[int, Stop] = {}
        self._turn = 0

    async def read(self, max_rows: int, max_bytes: int, wait: float) -> Step:
        with self.call("read"):
            step = await self.first(lambda: self._step(max_rows, max_bytes), wait)
            return step or Step(None, self._reached())

    def _reached(self) -> dict[int, Position]:
        return {partition: (at,) for partition, at in self._at.items()}

    def _step(self, max_rows: int, max_bytes: int) -> Step | None:
        self.broker.sweep()
        before, rows, skipped, size = dict(self._at), list[Row](), 0, 0
        stopped: dict[int, Stop] = {}
        open_pieces = [p for p, end in self._ends.items() if end is None or self._at[p] < end]
        self._turn += 1
        for i in range(len(open_pieces)):
            partition = open_pieces[(self._turn + i) % len(open_pieces)]
            log, end = self.topic.logs[partition], self._ends[partition]
            if self._at[partition] < log.low:
                stopped[partition] = Stop.AGED_OUT
                continue
            if len(rows) >= max_rows or size >= max_bytes:
                continue
            stop = log.high if end is None else end
            found = log.read(self._at[partition], stop, max_rows - len(rows), max_bytes - size, self._committed)
            rows += found.rows
            skipped += found.skipped
            size += found.size
            self._at[partition] = found.reached
            if end is not None and end > found.reached == (log.stable if self._committed else log.high):
                stopped[partition] = Stop.HELD_BACK if found.reached < log.high else Stop.DRY
        nothing_to_come = len(stopped) == len(open_pieces)
        if not (rows or nothing_to_come or before != self._at or stopped != self._told):
            return None
        self._told = stopped
        return Step(Batch(self._codec, rows) if rows else None, self._reached(), stopped, skipped)


class InmemSource(Handle):
    """What both sources have in common: calls of the other family are refused."""

    def _not_mine(self, call: str, instead: str) -> BrokerError:
        return self.host.error(ErrorKind.UNSUPPORTED, self.entity, f"{self.entity} cannot {call}; {instead}")

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Outcome]:
        raise self._not_mine("settle rows one by one", "it is read as a log: commit positions")

    async def extend(self, tokens: Sequence[Token], seconds: float) -> Sequence[float | None]:
        raise self._not_mine("extend leases", "it is read as a log: rows are not leased")

    async def commit(self, positions: Mapping[int, Position]) -> Mapping[int, Outcome]:
        raise self._not_mine("commit positions", "it is a queue: settle its rows")

    async def seek(self, positions: Mapping[int, Position]) -> None:
        raise self._not_mine("seek", "it is a queue: release its rows")


class QueueSource(InmemSource):
    """A consumer of a queue."""

    def __init__(self, broker: InmemBroker, host: Host, queue: Queue, options: TakeOptions) -> None:
        super().__init__(broker, host, f"{queue.topic.name}/{queue.name}", queue.topic)
        self._queue = queue
        self._codec: Codec = QueueCodec(queue.topic.name)
        self.consumer = Consumer(
            options.max_held, lambda tokens: host.emit(Event("lost", tokens=frozenset[Token](tokens), handle=self))
        )
        queue.consumers.add(self.consumer)

    def _until(self, deadline: float) -> float:
        """A time of the broker's clock as time.monotonic()."""
        return time.monotonic() + deadline - self.broker.clock.monotonic()

    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        credit: list[BrokerError] = []

        def attempt() -> Batch | None:
            credit.clear()
            try:
                leased = self._queue.take(self.consumer, min(max_rows, CHUNK), max_bytes)
            except BrokerError as error:  # no credit: a settlement beside this pull may still give some
                credit.append(error)
                return None
            if leased is None:
                return None
            return Batch(self._codec, leased.deliveries, leased.tokens, self._until(leased.until))

        with self.call("pull"):
            batch = await self.first(attempt, wait, self._queue.next_due)
            if batch is None and credit and not self.closed:
                raise credit[0]
            return batch

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        with self.call("settle"):
            for start in range(0, len(items), CHUNK):
                if start:
                    await asyncio.sleep(0)
                with self.broker.lock:
                    self._queue.sweep(self.broker.clock.monotonic())
                    outcomes += [self._settle(item) for item in items[start : start + CHUNK]]
                    self.topic.wake()
        return outcomes

    def _settle(self, item: Settlement) -> Outcome:
        fault = self.broker.take_fault("settle", Settled) if self.broker.faults else None
        if fault is not None and not fault.done:
            state = fault.what
        else:
            assert isinstance(item.token, int), "tokens are ours"  # noqa: S101 - the contract
            state = self._queue.settle(self.consumer, item.token, item.verdict, item.delay, item.reason)
            state = state if fault is None else fault.what
        if state is Settled.CONFIRMED:
            return _DONE
        return Outcome(state, self._reason(state))

    def _reason(self, state: object) -> BrokerError | None:
        match state:
            case Settled.LOST:
                return self.host.error(
                    ErrorKind.LEASE_LOST, self.entity, f"{self.entity}: the lease was gone; the row comes again"
                )
            case Settled.REFUSED:
                text = f"{self.entity}: {self.topic.name} has no dead-letter topic to reject to; release the row, or ack it"
                return self.host.error(ErrorKind.UNSUPPORTED, self.entity, text)
            case Settled.RETRY:
                return self.host.error(ErrorKind.TRANSIENT, self.entity, f"{self.entity}: not done; try again", retryable=True)
        return None

    async def extend(self, tokens: Sequence[Token], seconds: float) -> Sequence[float | None]:
        with self.call("extend"), self.broker.lock:
            self._queue.sweep(self.broker.clock.monotonic())
            known = [token for token in tokens if isinstance(token, int)]
            deadlines = self._queue.extend(self.consumer, known, seconds)
            return [None if deadline is None else self._until(deadline) for deadline in deadlines]

    async def close(self) -> None:
        if not self.closed:
            with self.broker.lock:
                self._queue.leave(self.consumer)
        await super().close()


class GroupSource(InmemSource):
    """A member of a group."""

    def __init__(self, broker: InmemBroker, host: Host, group: Group, *, eager: bool = False) -> None:
        super().__init__(broker, host, f"{group.topic.name}/{group.name}", group.topic)
        self.group = group
        self._codec: Codec = LogCodec(group.topic.name)
        self.consumer = Member(lambda partitions: host.emit(Event("revoked", partitions=partitions, handle=self)), eager)
        group.join(self.consumer)

    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        def attempt() -> Batch | None:
            self.broker.sweep()
            rows = self.group.take(self.consumer, max_rows, max_bytes)
            return Batch(self._codec, rows) if rows else None

        with self.call("pull"):
            return await self.first(attempt, wait)

    async def commit(self, positions: Mapping[int, Position]) -> Mapping[int, Outcome]:
        with self.call("commit"), self.broker.lock:
            fault = self.broker.take_fault("commit", Settled) if self.broker.faults else None
            if fault is not None and not fault.done:
                states = dict.fromkeys(positions, fault.what)
            else:
                states = self.group.commit(self.consumer, {p: offset_of(at) for p, at in positions.items()})
                states = states if fault is None else dict.fromkeys(positions, fault.what)
            return {p: self._outcome(p, state) for p, state in states.items()}

    def _outcome(self, partition: int, state: Settled) -> Outcome:
        if state is Settled.CONFIRMED:
            return _DONE
        kind, why = {
            Settled.LOST: (ErrorKind.LEASE_LOST, "is another member's now; nothing was committed"),
            Settled.RETRY: (ErrorKind.TRANSIENT, "was not committed; try again"),
        }.get(state, (ErrorKind.INVALID, "ends before that position; nothing was committed"))
        text = f"{self.entity}: partition {partition} {why}"
        return Outcome(state, self.host.error(kind, self.entity, text, retryable=state is Settled.RETRY))

    async def seek(self, positions: Mapping[int, Position]) -> None:
        with self.call("seek"), self.broker.lock:
            mine = {p: offset_of(at) for p, at in positions.items() if p in self.consumer.places}
            self.consumer.places.update(mine)

    async def close(self) -> None:
        if not self.closed:
            with self.broker.lock:
                self.group.leave(self.consumer)
        await super().close()


class InmemSender(Handle):
    """Writes to one topic."""

    def check(self, row: Outbound) -> str | None:
        return self.topic.refusal(row)

    async def send(self, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        with self.call("send"):
            return await append(self.topic, rows, None, self.check)


async def append(
    topic: Topic,
    rows: Sequence[Outbound],
    transaction: InmemTransaction | None,
    check: Callable[[Outbound], str | None] | None = None,
) -> list[SendResult]:
    """Store rows in chunks, so that the loop goes on beside it."""
    stopped: set[bytes | int] = set()
    results: list[SendResult] = []
    for start in range(0, len(rows), CHUNK):
        if start:
            await asyncio.sleep(0)
        with topic.broker.lock:
            results += topic.append(rows[start : start + CHUNK], stopped, transaction, check)
    return results


class TransactionHandle:
    """One open transaction."""

    def __init__(self, broker: InmemBroker, host: Host, state: InmemTransaction) -> None:
        self._broker, self._host, self._state = broker, host, state

    def _check(self) -> None:
        self._broker.sweep()
        state = self._state
        if state.fenced:
            raise self._host.error(ErrorKind.FENCED, state.id, f"{state.id}: a newer holder of this transactional id took over")
        if state.state != "open":
            raise self._host.error(ErrorKind.CLOSED, state.id, f"{state.id}: this transaction is {state.state}; begin a new one")

    async def send(self, topic: str, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        with self._broker.faulty("send"), self._broker.lock:
            self._check()
            target = self._broker.topic(topic)
        return await append(target, rows, self._state)

    async def commit_positions(self, source: Source, positions: Mapping[int, Position]) -> None:
        with self._broker.faulty("commit_positions"), self._broker.lock:
            self._check()
            if not isinstance(source, GroupSource) or source.broker is not self._broker:
                raise self._host.error(
                    ErrorKind.INVALID, self._state.id, "only positions of a group of the same broker can be committed"
                )
            offsets = {p: offset_of(at) for p, at in positions.items()}
            if gone := sorted(offsets.keys() - source.consumer.places.keys()):
                text = f"{source.entity}: partition {gone[0]} is another member's now; abort the transaction"
                raise self._host.error(ErrorKind.FENCED, source.entity, text)
            self._state.positions.append((source.group, source.consumer, source.consumer.losses, offsets))

    async def commit(self) -> bool:
        with self._broker.faulty("end"):
            return self._broker.end(self._state, commit=True)

    async def abort(self) -> bool:
        with self._broker.faulty("end"):
            return self._broker.end(self._state, commit=False)


def check_pieces(host: Host, topic: Topic, pieces: Sequence[Piece]) -> None:
    """Each partition is there, and named once."""
    seen: set[int] = set()
    for piece in pieces:
        if not 0 <= piece.partition < len(topic.logs) or piece.partition in seen:
            why = "asked for twice" if piece.partition in seen else f"not there; it has 0..{len(topic.logs) - 1}"
            raise host.error(ErrorKind.INVALID, topic.name, f"{topic.name}: partition {piece.partition} is {why}")
        seen.add(piece.partition)


def refuse_native(host: Host, entity: str, native: Mapping[str, Any]) -> None:
    """The broker in memory has no options of its own; one that is given is an error, never ignored."""
    if native:
        raise host.error(ErrorKind.INVALID, entity, f"{entity}: the broker in memory has no option {next(iter(native))!r}")
