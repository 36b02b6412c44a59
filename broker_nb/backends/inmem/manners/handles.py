"""The handles of the broker in memory, as those of another broker's client: as strict, and with its ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from broker_nb.backends.driver import (
    Batch,
    Host,
    Outbound,
    Outcome,
    Piece,
    Position,
    SendResult,
    Settled,
    Settlement,
    Step,
    TakeOptions,
    Token,
    Verdict,
)
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.backends.inmem.handles import GroupSource, InmemBrowser, InmemSender, QueueSource, offset_of
from broker_nb.backends.inmem.manners.manner import Guard, Manner, flaw
from broker_nb.backends.inmem.subscriptions import Group, Queue
from broker_nb.backends.inmem.topic import Topic
from broker_nb.messages import Attribute

_MS = 10**6  # ns
_KEPT = (Settled.RETRY, Settled.REFUSED)


class StrictBrowser(InmemBrowser):
    """A look."""

    def __init__(
        self, manner: Manner, broker: InmemBroker, host: Host, topic: Topic, pieces: Sequence[Piece], committed_only: bool
    ) -> None:
        super().__init__(broker, host, topic, pieces, committed_only)
        self._manner, self._guard = manner, Guard(self.entity, manner.able, broker.misuses)
        self._owed: Step | None = None

    async def read(self, max_rows: int, max_bytes: int, wait: float) -> Step:
        with self._guard.call("read", wait):
            if self._owed is not None and not self.closed:
                step, self._owed = self._owed, None
                return step
            before = self._reached()
            step = await super().read(max_rows, max_bytes, wait)
            if step.batch is None or not self._manner.late_proof:
                return step
            self._owed = replace(step, batch=None)
            return Step(step.batch, before | {row.partition: (row.offset + 1,) for row in step.batch.rows})


class StrictQueue(QueueSource):
    """A consumer of a subscription of family MESSAGE."""

    def __init__(self, manner: Manner, broker: InmemBroker, host: Host, queue: Queue, options: TakeOptions) -> None:
        super().__init__(broker, host, queue, options)
        self._manner, self._able = manner, manner.able
        self._guard = Guard(self.entity, manner.able, broker.misuses)
        self._over: set[Token] = set()  # settled or lost

    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        with self._guard.call("pull", wait):
            unsettled = self.consumer.held if self._able.settle_before_pull else 0
            self._guard.expect(not unsettled, f"pull before {unsettled} rows of the last one are settled")
            return await super().pull(max_rows, max_bytes, wait)

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Outcome]:
        with self._guard.call("settle"):
            tokens = {item.token for item in items}
            self._guard.expect(len(tokens) == len(items) and self._over.isdisjoint(tokens), "settle of a row that was settled")
            outcomes = await super().settle([self._as_sent(item) for item in items])
            self._over.update(i.token for i, outcome in zip(items, outcomes, strict=True) if outcome.state not in _KEPT)
            return [self._as_told(outcome) for outcome in outcomes]

    def _as_sent(self, item: Settlement) -> Settlement:
        name, able, rejected = item.verdict.name, self._able, item.verdict is Verdict.REJECT
        delayable = able.release_delay and item.verdict is Verdict.RELEASE
        self._guard.expect(not item.delay or delayable, f"{name} with a delay")
        self._guard.expect(not item.reason or rejected, f"{name} with a reason")
        self._guard.expect(able.reject or not rejected, f"{name} where there is none")
        return Settlement(item.token, Verdict.ACK) if rejected and self._manner.reject_is_final else item

    def _as_told(self, outcome: Outcome) -> Outcome:
        unconfirmed = outcome.state is Settled.CONFIRMED and not self._able.confirmed_settle
        return Outcome(Settled.SENT) if unconfirmed else outcome

    async def extend(self, tokens: Sequence[Token], seconds: float) -> Sequence[float | None]:
        with self._guard.call("extend"):
            return await super().extend(tokens, self._queue.ack_deadline if self._manner.fixed_lease else seconds)


class StrictGroup(GroupSource):
    """A member of a group. A wrong position cannot be undone: the rows below it never come again."""

    def __init__(self, manner: Manner, broker: InmemBroker, host: Host, group: Group) -> None:
        super().__init__(broker, host, group, eager=manner.eager_groups)
        self._guard = Guard(self.entity, manner.able, broker.misuses)
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
            return await super().commit(positions)

    async def seek(self, positions: Mapping[int, Position]) -> None:
        with self._guard.call("seek"):
            for partition, offset, read in self._mine(positions):
                self._guard.expect(offset <= read, f"seek in partition {partition} over unread rows, from {read} to {offset}")
            await super().seek(positions)

    def _mine(self, positions: Mapping[int, Position]) -> Iterable[tuple[int, int, int]]:
        """Partition, offset, and how far it was read; of the partitions that this member has."""
        mine = self.consumer.places
        return [(p, offset_of(at), self._read.get(p, mine[p])) for p, at in positions.items() if p in mine]


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
            return await super().send([row if self.check(row) else self._on_the_wire(row) for row in rows])

    def _on_the_wire(self, row: Outbound) -> Outbound:
        time_ns = row.time_ns
        if self._manner.producer_times:
            time_ns = (self.broker.clock.time_ns() if time_ns is None else time_ns) // _MS * _MS
        typed = bool(self._manner.able.attribute_types - {str, bytes})
        attributes = row.attributes if typed else tuple(Attribute(a.name, a.value) for a in row.attributes)
        return row._replace(attributes=attributes, time_ns=time_ns, dedupe=row.dedupe if self._manner.dedupe else None)
