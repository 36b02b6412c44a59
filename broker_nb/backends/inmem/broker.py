"""A broker in memory: topics, subscriptions and transactions, and what an administrator or a test does to them.

Standard library only. Every public method takes the broker's lock, so that any thread may call it; code of this package that
works on topics and subscriptions directly holds `InmemBroker.lock`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from broker_nb.backends.driver import Family, Outbound, SendResult, Sent, Settled
from broker_nb.backends.inmem.topic import InmemTransaction, Topic
from broker_nb.errors import BrokerError, ErrorKind


class Clock:
    """The system's time, plus what `advance` moved it by."""

    def __init__(self) -> None:
        self._ahead = 0.0

    def monotonic(self) -> float:
        """Seconds, for leases and delays."""
        return time.monotonic() + self._ahead

    def time_ns(self) -> int:
        """Nanoseconds since 1970, for publish times."""
        return time.time_ns() + int(self._ahead * 1e9)

    def advance(self, seconds: float) -> None:
        """Move it ahead; use `InmemBroker.advance`, which also tells those who wait."""
        self._ahead += seconds


F = TypeVar("F", bound=BrokerError | Settled | Sent)


class Fault(NamedTuple, Generic[F]):
    """What goes wrong with one call (an error) or one row (a state)."""

    what: F
    done: bool  # the broker does its work, and only the answer is bad


class InmemBroker:
    """One broker in the memory of this process.

    >>> broker = InmemBroker("example")
    >>> orders = broker.create_topic("orders", partitions=2)
    >>> broker.publish("orders", [Outbound(b"{}", key=b"k")])[0].state
    <Sent.ACCEPTED: 'stored by the broker'>

    Parameters
    ----------
    name
        For texts. `InmemBroker.get(name)` is the instance that `inmem://name` connects to.
    clock
        Where times and leases come from.

    Attributes
    ----------
    misuses
        What connections with manners (`inmem://name?like=...`) were caught at, a line each; empty as long as the rules are kept.
    """

    _named: ClassVar[dict[str, InmemBroker]] = {}
    _naming: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, name: str = "", clock: Clock | None = None) -> None:
        self.name = name
        self.clock = clock or Clock()
        self.lock = threading.RLock()
        self.topics: dict[str, Topic] = {}
        self.faults: dict[str, deque[Fault[Any]]] = {}
        self.misuses: list[str] = []
        self._transactions: dict[str, InmemTransaction] = {}
        self._open: set[InmemTransaction] = set()
        self._serial = 1

    @classmethod
    def get(cls, name: str) -> InmemBroker:
        """The process's broker of that name, made empty when first asked for."""
        with cls._naming:
            if name not in cls._named:
                cls._named[name] = cls(name)
            return cls._named[name]

    # -------------------------------------------------------------- administration
    def create_topic(
        self,
        name: str,
        partitions: int = 1,
        *,
        families: Collection[Family] = tuple(Family),
        subscriptions: Iterable[str] = (),
        dead_letter: str | None = None,
        max_deliveries: int | None = 5,
        ack_deadline: float = 30.0,
        ordered: bool = False,
        max_message_bytes: int | None = None,
    ) -> Topic:
        """Make a topic.

        Parameters
        ----------
        families
            How it can be taken from: MESSAGE as a queue, RECORD as a log.
        subscriptions
            Queues to make at once, from the beginning; others come by being used.
        dead_letter
            An existing topic for rejected rows and those delivered `max_deliveries` times; without it rows come again for ever.
        ack_deadline
            Seconds for which a delivered row is leased.
        ordered
            At most one row of a key is out at a time on each queue.

        Raises
        ------
        BrokerError
            CONFLICT when it exists, INVALID for a bad name or number, NOT_FOUND for a missing dead-letter topic.
        """
        if not name or partitions < 1 or ack_deadline <= 0 or (max_deliveries is not None and max_deliveries < 1):
            raise BrokerError(ErrorKind.INVALID, name, f"topic {name!r}: it needs a name, a partition, a deadline and a delivery")
        with self.lock:
            if name in self.topics:
                raise BrokerError(ErrorKind.CONFLICT, name, f"topic {name!r} exists already")
            topic = Topic(
                self,
                name,
                partitions,
                frozenset(families),
                ack_deadline,
                max_deliveries,
                None if dead_letter is None else self.topic(dead_letter),
                ordered,
                max_message_bytes,
            )
            for subscription in subscriptions:
                topic.subscribe(subscription, Family.MESSAGE)
            self.topics[name] = topic
            return topic

    def create_subscription(
        self,
        topic: str,
        name: str,
        family: Family = Family.MESSAGE,
        *,
        start: str = "earliest",
        ack_deadline: float | None = None,
        max_deliveries: int | None = None,
        ordered: bool | None = None,
    ) -> None:
        """Make a subscription before anyone uses it; terms that are not given are the topic's."""
        with self.lock:
            self.topic(topic).subscribe(
                name,
                family,
                latest=start == "latest",
                ack_deadline=ack_deadline,
                max_deliveries=max_deliveries,
                ordered=ordered,
            )

    def topic(self, name: str) -> Topic:
        """A topic by name; NOT_FOUND, naming those that are there."""
        with self.lock:
            if (topic := self.topics.get(name)) is None:
                there = ", ".join(list(self.topics)[:5]) or "none"
                raise BrokerError(ErrorKind.NOT_FOUND, name, f"topic {name!r} is not there and was not made; there are: {there}")
            return topic

    def publish(self, topic: str, rows: Iterable[Outbound]) -> list[SendResult]:
        """Store rows, from any thread."""
        with self.lock:
            return self.topic(topic).append(rows)

    def delete_records(self, topic: str, before: Mapping[int, int]) -> None:
        """Rows below the given offset of each partition age out."""
        with self.lock:
            found = self.topic(topic)
            for partition, offset in before.items():
                found.logs[partition].delete_before(offset)
            found.wake()

    def compact(self, topic: str) -> int:
        """Keep only the newest committed row of each key; how many rows went."""
        with self.lock:
            return sum(log.compact() for log in self.topic(topic).logs)

    def advance(self, seconds: float) -> None:
        """Move the clock ahead: leases run out, delays pass, and those who wait look again."""
        with self.lock:
            self.clock.advance(seconds)
            self.sweep()
            for topic in self.topics.values():
                topic.wake()

    # -------------------------------------------------------------- faults
    def fail_next(self, call: str, fault: BrokerError | Settled | Sent, *, times: int = 1, done: bool = False) -> None:
        """Let a driver call go wrong.

        Parameters
        ----------
        call
            A method's name in the driver contract ("pull", "settle", "send", "facts", ...); "open" is to connect, "end" is commit
            and abort of a transaction.
        fault
            An error that the call raises; or the state of the next row of "settle" or "send", or of the next "commit".
        done
            The broker does its work all the same, and only the answer is bad.
        """
        with self.lock:
            self.faults.setdefault(call, deque()).extend([Fault(fault, done)] * times)

    def take_fault(self, call: str, kind: type[F]) -> Fault[F] | None:
        """The next fault of a call if it is of that kind; it is used up."""
        with self.lock:
            waiting = self.faults.get(call)
            if not waiting or not isinstance(waiting[0].what, kind):
                return None
            fault = waiting.popleft()
            if not waiting:
                del self.faults[call]
            return fault

    @contextmanager
    def faulty(self, call: str) -> Iterator[None]:
        """Around one call of the contract: raise the error that was asked for, before the work or after it."""
        fault = self.take_fault(call, BrokerError) if self.faults else None
        if fault is not None and not fault.done:
            raise fault.what
        yield
        if fault is not None:
            raise fault.what

    def serials(self, count: int) -> range:
        """Numbers that were never given out."""
        first = self._serial
        self._serial += count
        return range(first, self._serial)

    # -------------------------------------------------------------- transactions
    def begin(self, transactional_id: str, timeout: float) -> InmemTransaction:
        """Open a transaction; an earlier holder of the id is fenced, and what it had open is aborted."""
        with self.lock:
            if (earlier := self._transactions.get(transactional_id)) is not None:
                self._finish(earlier, committed=False)
                earlier.fenced = True
            transaction = InmemTransaction(transactional_id, self.clock.monotonic() + timeout)
            self._transactions[transactional_id] = transaction
            self._open.add(transaction)
            return transaction

    def end(self, transaction: InmemTransaction, commit: bool) -> bool:
        """Commit or abort, once; whether it ended that way. Positions of a member that lost partitions since abort it."""
        with self.lock:
            self.sweep()
            owned = all(member.losses == losses for _, member, losses, _ in transaction.positions)
            self._finish(transaction, committed=commit and owned)
            return transaction.state == ("committed" if commit else "aborted")

    def sweep(self) -> None:
        """Abort transactions whose time ran out."""
        now = self.clock.monotonic()
        for transaction in [t for t in self._open if t.expires <= now]:
            self._finish(transaction, committed=False)

    def _finish(self, transaction: InmemTransaction, *, committed: bool) -> None:
        if transaction.state != "open":
            return
        transaction.state = "committed" if committed else "aborted"
        self._open.discard(transaction)
        if committed:
            for group, member, _, positions in transaction.positions:
                group.commit(member, positions)
        else:
            for topic, dedupe in transaction.dedupes:
                topic.forget(dedupe)
        for (topic, log), offsets in transaction.offsets.items():
            log.end(transaction, offsets, committed)
            topic.wake()
