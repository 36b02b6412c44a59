"""The handles of the broker in memory, as those of another broker's client: as strict, and with its ways."""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from broker_nb.backends.driver import (
    Batch,
    Effect,
    Family,
    Host,
    Outbound,
    Outcome,
    Piece,
    Position,
    Proof,
    SendResult,
    Settled,
    Settlement,
    Step,
    Stop,
    TakeOptions,
    Token,
    Verdict,
)
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.backends.inmem.handles import GroupSource, InmemBrowser, InmemSender, QueueSource
from broker_nb.backends.inmem.log import Row
from broker_nb.backends.inmem.manners.manner import Guard, Manner, flaw
from broker_nb.backends.inmem.subscriptions import Delivery, Group, Queue
from broker_nb.backends.inmem.topic import Topic
from broker_nb.messages import Attribute

_MS = 10**6  # ns
_KEPT = (Settled.RETRY, Settled.REFUSED)


class StrictBrowser(InmemBrowser):
    """A look."""

    def __init__(
        self, manner: Manner, broker: InmemBroker, host: Host, topic: Topic, pieces: Sequence[Piece], committed_only: bool
    ) -> None:
        super().__init__(broker, host, topic, [self._numbered(manner, topic, piece) for piece in pieces], committed_only)
        self._manner, self._guard = manner, Guard(self.entity, manner.able, broker.misuses)
        self._codec = manner.places.codec(self._codec)
        self._owed: Step | None = None
        ends = [piece.end for piece in pieces if piece.end is not None]
        self._until_ns = ends[0][0] if ends and not manner.places.sizes else None
        self._temporary = ""
        if Effect.CREATES_SUBSCRIPTION in manner.look.effects:
            self._temporary = f"look-{uuid.uuid4().hex}"
            topic.subscribe(self._temporary, Family.MESSAGE)

    @staticmethod
    def _numbered(manner: Manner, topic: Topic, piece: Piece) -> Piece:
        """A piece as the broker in memory counts; where there are no places it begins at a moment, and silence is its end."""
        if not manner.places.sizes:
            first = topic.logs[piece.partition].first_at(piece.start[0] if piece.start else 0)
            return Piece(piece.partition, (topic.logs[piece.partition].high if first is None else first,), None)
        end = None if piece.end is None else (manner.places.offset(piece.end),)
        return Piece(piece.partition, (manner.places.offset(piece.start),), end)

    def _reached(self) -> dict[int, Position]:
        return {p: self._manner.places.of(at) for p, at in self._at.items()} if self._manner.places.sizes else {}

    async def close(self) -> None:
        with self.broker.lock:
            self.topic.subscriptions.pop(self._temporary, None)
        await super().close()

    async def read(self, max_rows: int, max_bytes: int, wait: float) -> Step:
        with self._guard.call("read", wait):
            if self._owed is not None and not self.closed:
                step, self._owed = self._owed, None
                return step
            before = self._reached()
            step = await super().read(max_rows, max_bytes, wait)
            if step.batch is None:
                return replace(step, stopped={**step.stopped, **self._silent()})
            if self._until_ns is not None:
                rows = [row for row in step.batch.rows if row.time_ns < self._until_ns]
                step = replace(step, batch=replace(step.batch, rows=rows) if rows else None)
            if step.batch is None or not self._manner.late_proof:
                return step
            self._owed = replace(step, batch=None)
            return Step(step.batch, before | {row.partition: (row.offset + 1,) for row in step.batch.rows})

    def _silent(self) -> dict[int, Stop]:
        """What silence means in pieces without an end; nothing where ends are known."""
        meaning = {Proof.DRY: Stop.DRY, Proof.NONE: Stop.UNPROVEN}.get(self._manner.look.proof)
        return {} if meaning is None else {p: meaning for p, end in self._ends.items() if end is None}


class StrictQueue(QueueSource):
    """A consumer of a subscription of family MESSAGE."""

    def __init__(self, manner: Manner, broker: InmemBroker, host: Host, queue: Queue, options: TakeOptions) -> None:
        super().__init__(broker, host, queue, options)
        self._manner, self._able = manner, manner.able
        self._guard = Guard(self.entity, manner.able, broker.misuses)
        self._over: set[Token] = set()  # settled or lost
        self._out: dict[Token, Row] = {}  # handed out and not over
        self._surplus: deque[tuple[Delivery, Token, float | None]] = deque()
        self._codec = manner.places.codec(self._codec)
        self._confirmed = self._able.confirmed_settle and bool(
            options.native.get(manner.confirmed_by) if manner.confirmed_by else True
        )
        self._delay = options.native.get(manner.delay_by, manner.delay_ms) / 1000
        self._whole_batches = bool(manner.single_by) and not options.native.get(manner.single_by, True)

    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        with self._guard.call("pull", wait):
            unsettled = sum(self._holds(token) for token in self._out) if self._able.settle_before_pull else 0
            self._guard.expect(not unsettled, f"pull before {unsettled} rows of the last one are settled")
            self._surplus = deque(each for each in self._surplus if self._holds(each[1]))
            if not self._surplus:
                batch = await super().pull(max(max_rows, self._manner.poll_rows), max_bytes, wait)
                if batch is None:
                    return None
                tokens = batch.tokens or ()
                until = batch.leased_until if self._manner.timed else None
                came = [(row, token, until) for row, token in zip(batch.rows, tokens, strict=True)]
                self._surplus += reversed(came) if self._manner.unordered else came
            handed = [self._surplus.popleft() for _ in range(min(max_rows, len(self._surplus)))]
            self._out.update((token, delivery.row) for delivery, token, _ in handed)
            return Batch(self._codec, [delivery for delivery, _, _ in handed], [token for _, token, _ in handed], handed[0][2])

    def _holds(self, token: Token) -> bool:
        with self.broker.lock:
            return self._queue.holds(self.consumer, token)

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Outcome]:
        with self._guard.call("settle"):
            tokens = {item.token for item in items}
            self._guard.expect(len(tokens) == len(items) and self._over.isdisjoint(tokens), "settle of a row that was settled")
            sent = [self._as_sent(item) for item in items]
            outcomes = await (self._settle_alike(sent) if self._manner.by_partition else super().settle(sent))
            for item, outcome in zip(items, outcomes, strict=True):
                if outcome.state not in _KEPT:
                    self._over.add(item.token)
                    row = self._out.pop(item.token)
                    if self._whole_batches and item.verdict is Verdict.RELEASE:
                        self._bring_batch(row)
            return [as_told(outcome, self._confirmed) for outcome in outcomes]

    async def _settle_alike(self, items: Sequence[Settlement]) -> Sequence[Outcome]:
        """The broker answers per partition: one row that cannot be settled fails those beside it."""
        outcomes: dict[Token, Outcome] = {}
        partitions: dict[int, list[Settlement]] = {}
        for item in items:
            partitions.setdefault(self._out[item.token].partition, []).append(item)
        for together in partitions.values():
            first = next((item for item in together if not self._holds(item.token)), together[0])
            rest = [item for item in together if item is not first]
            (answer,) = await super().settle([first])
            outcomes[first.token] = answer
            told = await super().settle(rest) if answer.state is Settled.CONFIRMED else [answer] * len(rest)
            outcomes.update((item.token, outcome) for item, outcome in zip(rest, told, strict=True))
        return [outcomes[item.token] for item in items]

    def _bring_batch(self, row: Row) -> None:
        batch = self._manner.places.batch(row.offset)
        with self.broker.lock:
            self._queue.again(row.partition, batch.start, batch.stop, self._delay)
            self.topic.wake()

    def _as_sent(self, item: Settlement) -> Settlement:
        name, able, rejected = item.verdict.name, self._able, item.verdict is Verdict.REJECT
        delayable = able.release_delay and item.verdict is Verdict.RELEASE
        self._guard.expect(not item.delay or delayable, f"{name} with a delay")
        self._guard.expect(not item.reason or rejected, f"{name} with a reason")
        self._guard.expect(able.reject or not rejected, f"{name} where there is none")
        if rejected and self._manner.reject_is_final:
            return Settlement(item.token, Verdict.ACK)
        return replace(item, delay=self._delay) if self._delay and item.verdict is Verdict.RELEASE else item

    async def extend(self, tokens: Sequence[Token], seconds: float) -> Sequence[float | None]:
        with self._guard.call("extend"):
            self._guard.expect(self._manner.timed and self._manner.renewable, "extend of a lease that cannot be kept longer")
            return await super().extend(tokens, self._queue.ack_deadline if self._manner.fixed_lease else seconds)


class StrictGroup(GroupSource):
    """A member of a group. A wrong position cannot be undone: the rows below it never come again."""

    def __init__(self, manner: Manner, broker: InmemBroker, host: Host, group: Group) -> None:
        super().__init__(broker, host, group, eager=manner.eager_groups)
        self._guard, self._places = Guard(self.entity, manner.able, broker.misuses), manner.places
        self._codec = manner.places.codec(self._codec)
        self._confirmed = manner.able.confirmed_settle
        self._read: dict[int, int] = {}  # partition -> how far it ever was

    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        with self._guard.call("pull", wait):
            batch = await super().pull(max_rows, max_bytes, wait)
            for partition, place in self.consumer.places.items():
                self._read[partition] = max(place, self._read.get(partition, 0))
            return batch

    async def commit(self, positions: Mapping[int, Position]) -> Mapping[int, Outcome]:
        with self._guard.call("commit"):
            for partition, offset, read in self._mine(positions):
                stands = self.group.committed.get(partition, 0)
                self._guard.expect(offset >= stands, f"commit of partition {partition} back from {stands} to {offset}")
                self._guard.expect(offset <= read, f"commit of partition {partition} to {offset}, and it was read up to {read}")
            outcomes = await super().commit(self._numbered(positions))
            return {partition: as_told(outcome, self._confirmed) for partition, outcome in outcomes.items()}

    async def seek(self, positions: Mapping[int, Position]) -> None:
        with self._guard.call("seek"):
            for partition, offset, read in self._mine(positions):
                self._guard.expect(offset <= read, f"seek in partition {partition} over unread rows, from {read} to {offset}")
            await super().seek(self._numbered(positions))

    def _numbered(self, positions: Mapping[int, Position]) -> dict[int, Position]:
        return {partition: (self._places.offset(at),) for partition, at in positions.items()}

    def _mine(self, positions: Mapping[int, Position]) -> Iterable[tuple[int, int, int]]:
        """Partition, offset, and how far it was read; of the partitions that this member has."""
        mine = self.consumer.places
        return [(p, self._places.offset(at), self._read.get(p, mine[p])) for p, at in positions.items() if p in mine]


class StrictSender(InmemSender):
    """Writes to one topic."""

    def __init__(self, manner: Manner, broker: InmemBroker, host: Host, topic: Topic) -> None:
        super().__init__(broker, host, topic.name, topic)
        self._manner, self._guard = manner, Guard(self.entity, manner.able, broker.misuses)
        self._window_s = manner.dedupe.window_s if manner.dedupe else None

    def check(self, row: Outbound) -> str | None:
        return super().check(row) or flaw(self._manner, row)

    async def send(self, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        with self._guard.call("send"):
            if self._window_s is not None:
                since = self.broker.clock.time_ns() - int(self._window_s * 1e9)
                with self.broker.lock:
                    self.topic.forget_before(since, [row.dedupe for row in rows if row.dedupe is not None])
            results = await super().send([row if self.check(row) else self._on_the_wire(row) for row in rows])
            return [self._placed(result) for result in results]

    def _placed(self, result: SendResult) -> SendResult:
        if result.position is None:
            return result
        return result._replace(position=self._manner.places.of(result.position[0]) or None)

    def _on_the_wire(self, row: Outbound) -> Outbound:
        time_ns = row.time_ns
        if self._manner.producer_times:
            time_ns = (self.broker.clock.time_ns() if time_ns is None else time_ns) // _MS * _MS
        typed = bool(self._manner.able.attribute_types - {str, bytes})
        attributes = row.attributes if typed else tuple(Attribute(a.name, a.value) for a in row.attributes)
        return row._replace(attributes=attributes, time_ns=time_ns, dedupe=row.dedupe if self._manner.dedupe else None)


def as_told(outcome: Outcome, confirmed: bool) -> Outcome:
    """What a client hears of it whose broker does not confirm."""
    return outcome if confirmed or outcome.state is not Settled.CONFIRMED else Outcome(Settled.SENT)
