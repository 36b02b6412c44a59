"""One topic: where a row goes, what it refuses, who subscribes to it and who waits for it to change.

Nothing here locks but `change`: the broker's lock is held by whoever calls.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from broker_nb.backends.driver import NO_PARTITION, DedupeId, Family, Outbound, SendResult, Sent
from broker_nb.backends.inmem.log import Log, Row
from broker_nb.backends.inmem.subscriptions import Group, Member, Queue
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attribute

if TYPE_CHECKING:
    from broker_nb.backends.inmem.broker import Fault, InmemBroker


@dataclass(slots=True, eq=False)
class InmemTransaction:
    """One transaction, as the broker sees it."""

    id: str
    expires: float  # the clock's monotonic()
    state: str = "open"  # "open", "committed", "aborted"
    fenced: bool = False
    offsets: dict[tuple[Topic, Log], list[int]] = field(default_factory=dict)
    dedupes: list[tuple[Topic, DedupeId]] = field(default_factory=list)
    positions: list[tuple[Group, Member, int, Mapping[int, int]]] = field(default_factory=list)  # with Member.losses then


class Topic:
    """Partitions with their subscriptions. Made by `InmemBroker.create_topic`."""

    def __init__(
        self,
        broker: InmemBroker,
        name: str,
        partitions: int,
        families: frozenset[Family],
        ack_deadline: float,
        max_deliveries: int | None,
        dead_letter: Topic | None,
        ordered: bool,
        max_message_bytes: int | None,
    ) -> None:
        self.broker, self.name, self.families = broker, name, families
        self.logs = [Log(number) for number in range(partitions)]
        self.ack_deadline, self.max_deliveries, self.ordered = ack_deadline, max_deliveries, ordered
        self.dead_letter, self.max_message_bytes = dead_letter, max_message_bytes
        self.subscriptions: dict[str, Queue | Group] = {}
        self._sent: dict[DedupeId, Row] = {}
        self._waiting: set[asyncio.Future[None]] = set()
        self._turn = 0

    @contextmanager
    def change(self) -> Iterator[asyncio.Future[None]]:
        """A future of the running loop that is set when something may have changed for a reader of this topic."""
        changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self.broker.lock:
            self._waiting.add(changed)
        try:
            yield changed
        finally:
            with self.broker.lock:
                self._waiting.discard(changed)

    def wake(self) -> None:
        """Tell those who wait, whatever thread they are on."""
        waiting, self._waiting = self._waiting, set()
        for changed in waiting:
            changed.get_loop().call_soon_threadsafe(_set, changed)

    def refusal(self, row: Outbound) -> str | None:
        """One line why a row can never be stored, or None."""
        if row.partition != NO_PARTITION and not 0 <= row.partition < len(self.logs):
            return f"no partition {row.partition} in {self.name}; it has 0..{len(self.logs) - 1}"
        if row.native:
            return f"the broker in memory has no option {next(iter(row.native))!r}; leave it out"
        if self.max_message_bytes is not None and (size := len(row.data or b"") + len(row.key or b"")) > self.max_message_bytes:
            return f"{size} bytes, and {self.name} takes at most {self.max_message_bytes}"
        return None

    def append(
        self,
        rows: Iterable[Outbound],
        stopped: set[bytes | int] | None = None,
        transaction: InmemTransaction | None = None,
        check: Callable[[Outbound], str | None] | None = None,
    ) -> list[SendResult]:
        """Store rows; after one that was not stored, later ones of its key (without a key: of its partition) are refused.

        `stopped` has those keys and partitions, for callers that store in several goes; `check` says why a row is refused, instead
        of `refusal`.
        """
        now, check = self.broker.clock.time_ns(), check or self.refusal
        stopped = set() if stopped is None else stopped
        results: list[SendResult] = []
        for i, row in enumerate(rows):  # no two have the same time
            lane = row.partition if row.key is None else row.key
            if stopped and lane in stopped:
                result = self._refused(ErrorKind.CONFLICT, "an earlier row of its key was not stored; send them again in order")
            else:
                why = check(row)
                result = self._refused(ErrorKind.INVALID, why) if why is not None else self._store(row, now + i, transaction)
                if result.error is not None and lane != NO_PARTITION:
                    stopped.add(lane)
            results.append(result)
        self.wake()
        return results

    def _store(self, row: Outbound, now: int, transaction: InmemTransaction | None) -> SendResult:
        data, key, attributes, partition, time_ns, dedupe, _ = row
        if dedupe is not None and (known := self._sent.get(dedupe)) is not None:
            return SendResult(Sent.DUPLICATE, f"{known.partition}:{known.offset}", known.partition, (known.offset,))
        fault = self.broker.take_fault("send", Sent) if self.broker.faults else None
        if fault is not None and not fault.done:
            return self._failed(fault)
        if partition == NO_PARTITION:
            if key is None:
                partition = self._turn = (self._turn + 1) % len(self.logs)
            else:
                partition = zlib.crc32(key) % len(self.logs)
        log = self.logs[partition]
        if transaction is not None:
            log.open.setdefault(transaction, log.high)
            transaction.offsets.setdefault((self, log), []).append(log.high)
        given = tuple(attributes) if attributes else None
        stored = (
            log.append(key, data, given, now, "server") if time_ns is None else log.append(key, data, given, time_ns, "producer")
        )
        if dedupe is not None:
            self._sent[dedupe] = stored
            if transaction is not None:
                transaction.dedupes.append((self, dedupe))
        if fault is not None:
            return self._failed(fault)
        return SendResult(Sent.ACCEPTED, f"{partition}:{stored.offset}", partition, (stored.offset,))

    def _refused(self, kind: ErrorKind, text: str) -> SendResult:
        return SendResult(Sent.REFUSED, error=BrokerError(kind, self.name, f"{self.name}: {text}"))

    def _failed(self, fault: Fault[Sent]) -> SendResult:
        error = BrokerError(ErrorKind.TIMEOUT, self.name, f"{self.name}: no answer from the broker", retryable=True)
        return SendResult(fault.what, error=error)

    def forget(self, dedupe: DedupeId) -> None:
        """The row with this id was aborted and may be sent again."""
        del self._sent[dedupe]

    def forget_before(self, time_ns: int, dedupes: Iterable[DedupeId]) -> None:
        """Those of these ids whose row is older may be sent again."""
        for dedupe in dedupes:
            if (known := self._sent.get(dedupe)) is not None and known.time_ns < time_ns:
                self.forget(dedupe)

    def bury(self, row: Row, subscription: str, reason: str) -> None:
        """Put a row of this topic into its dead-letter topic, with where it came from and why."""
        assert self.dead_letter is not None, "callers ask first"  # noqa: S101 - a row must never vanish
        notes = {"origin.topic": self.name, "origin.subscription": subscription, "origin.id": f"{row.partition}:{row.offset}"}
        if reason:
            notes["error.message"] = reason
        added = tuple(Attribute(name, value.encode(), "str") for name, value in notes.items())
        self.dead_letter.append([Outbound(row.data, row.key, (row.attributes or ()) + added)])

    def subscribe(
        self,
        name: str,
        family: Family,
        *,
        latest: bool = False,
        ack_deadline: float | None = None,
        max_deliveries: int | None = None,
        ordered: bool | None = None,
    ) -> Queue | Group:
        """The subscription of that name; made where there is none, with the topic's own terms where none are given."""
        entity = f"{self.name}/{name}"
        if family not in self.families:
            kind = "log: read it as a group" if family is Family.MESSAGE else "queue: its rows are acked one by one"
            raise BrokerError(ErrorKind.UNSUPPORTED, entity, f"{self.name} is a {kind}")
        found = self.subscriptions.get(name)
        if found is None:
            if family is Family.RECORD:
                found = Group(self, name, latest=latest)
            else:
                found = Queue(
                    self,
                    name,
                    latest=latest,
                    ack_deadline=self.ack_deadline if ack_deadline is None else ack_deadline,
                    max_deliveries=self.max_deliveries if max_deliveries is None else max_deliveries,
                    ordered=self.ordered if ordered is None else ordered,
                )
            self.subscriptions[name] = found
        elif found.family is not family:
            kind = "a queue, acked one by one" if found.family is Family.MESSAGE else "a group, committed by position"
            raise BrokerError(ErrorKind.CONFLICT, entity, f"{entity} is {kind}; take another name for the other use")
        return found


def _set(changed: asyncio.Future[None]) -> None:
    if not changed.done():
        changed.set_result(None)
