"""Taking a log: one consumer per partition is the active one, and a cumulative ack is the commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import pulsar

from broker_nb.backends.driver import Batch, Event, Host, Lane, Outcome, Position, Settled, Settlement
from broker_nb.backends.pulsar.codec import PulsarCodec, place_of
from broker_nb.backends.pulsar.errors import RETRYABLE, failure, kind_of
from broker_nb.backends.pulsar.taking import Consuming
from broker_nb.errors import BrokerError, ErrorKind


class PulsarRecords(Consuming):
    """One member, Failover or Exclusive."""

    def __init__(self, host: Host, topic: str, subscription: str, lane: Lane) -> None:
        super().__init__(host, topic, subscription, lane)
        self._codec = PulsarCodec(topic)
        self._given: dict[int, list[tuple[Position, pulsar.MessageId]]] = {}  # handed out and not committed, in order
        self._last: dict[int, Position] = {}
        self._done: dict[int, Position] = {}  # committed by us

    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        self._check_open()
        if not self._rows:
            await self._receive(max_rows, max_bytes, wait)
            self._check_open()
        rows, self._rows = self._rows[:max_rows], self._rows[max_rows:]
        fresh: list[pulsar.Message] = []
        for n, message in enumerate(rows):
            at = message.message_id()
            partition, place = max(at.partition(), 0), place_of(at)
            done = self._done.get(partition, ())
            if place < done and place[:2] == done[:2]:
                continue  # of a batch that we committed in part; what is further back was put back by somebody
            if place <= self._last.get(partition, (-1,)):
                if fresh:
                    self._rows = [*rows[n:], *self._rows]
                    break
                # The partition went to another member and came back: what we had of it before is void.
                self._rows = [*rows[n:], *self._rows]
                self._forget(partition)
                self._host.emit(Event("revoked", partitions=frozenset({partition}), handle=self))
                return None
            self._last[partition] = place
            self._given.setdefault(partition, []).append((place, at))
            fresh.append(message)
        return Batch(self._codec, fresh) if fresh else None

    def _forget(self, partition: int) -> None:
        self._given.pop(partition, None)
        self._last.pop(partition, None)

    async def commit(self, positions: Mapping[int, Position]) -> Mapping[int, Outcome]:
        self._check_open()
        return await self._lane.run(self._commit, dict(positions))

    def _commit(self, positions: Mapping[int, Position]) -> Mapping[int, Outcome]:
        return {partition: self._acknowledge(partition, position) for partition, position in positions.items()}

    def _acknowledge(self, partition: int, position: Position) -> Outcome:
        """On the lane: acknowledge the last row below a position, and with it all before."""
        given = self._given.get(partition, [])
        below = [at for place, at in given if place < position]
        if not below:
            if position <= self._done.get(partition, ()):
                return Outcome(Settled.SENT)
            return Outcome(Settled.LOST)
        if position > (*given[-1][0], 0):
            text = f"{self.name}: partition {partition} was read to {given[-1][0]} only, which is before {position}"
            return Outcome(Settled.REFUSED, self._host.error(ErrorKind.INVALID, self.name, text))
        try:
            self._consumer.acknowledge_cumulative(below[-1])
        except pulsar.PulsarException as error:
            state = Settled.RETRY if kind_of(type(error).__name__) in RETRYABLE else Settled.REFUSED
            return Outcome(state, failure(self._host, self.name, error))
        self._given[partition] = given[len(below) :]
        self._done[partition] = max(position, self._done.get(partition, ()))
        return Outcome(Settled.SENT)

    async def seek(self, positions: Mapping[int, Position]) -> None:
        """The broker sends everything again that is not acknowledged; a real seek would move the subscription."""
        self._check_open()
        del positions  # the first rows that are not committed
        await self._lane.run(self._again)

    def _again(self) -> None:
        self._rows.clear()
        self._given.clear()
        self._last.clear()
        self._consumer.redeliver_unacknowledged_messages()

    async def settle(self, items: Sequence[Settlement]) -> NoReturn:
        raise self._positions_only()

    async def extend(self, tokens: Sequence[object], seconds: float) -> NoReturn:
        raise self._positions_only()

    def _positions_only(self) -> BrokerError:
        return self._unsupported("rows of a log are not settled one by one; commit a position")
