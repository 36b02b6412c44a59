"""The two ways to take from a topic: a queue (rows are leased and settled one by one) and a group (positions are committed).

Nothing here locks: the broker's lock is held by whoever calls.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from broker_nb.backends.driver import Backlog, Family, Settled, Token, Verdict
from broker_nb.backends.inmem.log import Log, Row
from broker_nb.errors import BrokerError, ErrorKind

if TYPE_CHECKING:
    from broker_nb.backends.inmem.topic import Topic

MAX_PARKED = 10_000
"""Rows of an ordered queue that wait behind their key. Beyond it nothing more is fetched until some of them went."""


class Delivery(NamedTuple):
    """A row of a queue; `tries` is how often it was delivered."""

    row: Row
    tries: int


@dataclass(slots=True, eq=False)
class Consumer:
    """One who takes from a queue."""

    limit: int  # rows it may hold
    lost: Callable[[frozenset[int]], None]  # told of leases that ran out
    held: int = 0


@dataclass(slots=True, eq=False)
class _Lease:
    delivery: Delivery
    until: float
    owner: Consumer


class Leased(NamedTuple):
    """Rows handed to a consumer."""

    deliveries: list[Delivery]
    tokens: range
    until: float  # the clock's monotonic()


class Queue:
    """A subscription of family MESSAGE.

    Rows come in order of their partition, given-back ones first. On an ordered queue at most one row of a key is out at a time,
    so that nothing overtakes an unacked row of its key. A row whose last allowed delivery failed goes to the topic's dead-letter
    topic; without one, it comes again for ever.
    """

    family = Family.MESSAGE

    def __init__(
        self, topic: Topic, name: str, *, latest: bool, ack_deadline: float, max_deliveries: int | None, ordered: bool
    ) -> None:
        self.topic, self.name = topic, name
        self.ack_deadline, self.max_deliveries, self.ordered = ack_deadline, max_deliveries, ordered
        self.consumers: set[Consumer] = set()
        self.archives = (
            False  # a row that is rejected or was delivered too often goes nowhere, where there is no dead-letter topic
        )
        self._next = {log.number: log.high if latest else log.low for log in topic.logs}
        self._turn = 0
        self._ready: deque[Delivery] = deque()
        self._delayed: list[tuple[float, int, Delivery]] = []  # heap: ready at, serial
        self._held: dict[int, _Lease] = {}
        self._leases: list[tuple[float, int, Sequence[int]]] = []  # heap: runs out at, serial, tokens that may run out then
        self._busy: dict[bytes, deque[Row]] = {}  # ordered: key with an unacked row -> rows behind it
        self._parked = 0

    # -------------------------------------------------------------- handing out
    def take(self, owner: Consumer, max_rows: int, max_bytes: int) -> Leased | None:
        """Lease rows to a consumer; None when nothing is there now.

        Raises
        ------
        BrokerError
            NO_CREDIT when rows wait and the consumer holds all it may.
        """
        now = self.topic.broker.clock.monotonic()
        self.sweep(now)
        room = min(max_rows, owner.limit - owner.held)
        if room <= 0:
            if max_rows > 0 and any(b.waiting for b in self.backlog()):
                raise self._error(ErrorKind.NO_CREDIT, f"{owner.held} rows are held, the most that was asked for; settle some")
            return None
        deliveries, size = list[Delivery](), 0
        while self._ready and len(deliveries) < room and size < max_bytes:
            row, tries = self._ready.popleft()
            deliveries.append(Delivery(row, tries + 1))
            size += row.size
        if len(deliveries) < room and size < max_bytes:
            deliveries += [Delivery(row, 1) for row in self._fresh(room - len(deliveries), max_bytes - size)]
        if not deliveries:
            return None
        tokens = self.topic.broker.serials(len(deliveries))
        until = now + self.ack_deadline
        for token, delivery in zip(tokens, deliveries, strict=True):
            self._held[token] = _Lease(delivery, until, owner)
        owner.held += len(deliveries)
        heapq.heappush(self._leases, (until, tokens[0], tokens))
        return Leased(deliveries, tokens, until)

    def _fresh(self, max_rows: int, max_bytes: int) -> list[Row]:
        """Rows that were never delivered, a share of each partition."""
        logs, fresh, size = self.topic.logs, list[Row](), 0
        moved = True
        while moved and not fresh and self._parked < MAX_PARKED:
            moved = False
            for turn in range(len(logs)):
                if len(fresh) >= max_rows or size >= max_bytes:
                    break
                log = logs[(self._turn + turn) % len(logs)]
                share = -(-(max_rows - len(fresh)) // (len(logs) - turn))
                start = self._next[log.number]
                found = log.read(start, log.high, share, max_bytes - size, committed=True)
                self._next[log.number] = found.reached
                moved |= found.reached > start
                size += found.size
                fresh += self._unblocked(found.rows) if self.ordered else found.rows
            self._turn += 1
        return fresh

    def _unblocked(self, rows: Iterable[Row]) -> list[Row]:
        free = []
        for row in rows:
            if row.key is None:
                free.append(row)
            elif (behind := self._busy.get(row.key)) is None:
                self._busy[row.key] = deque()
                free.append(row)
            else:
                behind.append(row)
                self._parked += 1
        return free

    # -------------------------------------------------------------- settling
    def settle(self, owner: Consumer, token: int, verdict: Verdict, delay: float, reason: str) -> Settled:
        """Decide over one leased row; LOST when the consumer no longer holds it, REFUSED when it cannot be rejected."""
        lease = self._held.get(token)
        if lease is None or lease.owner is not owner:
            return Settled.LOST
        if verdict is Verdict.REJECT and not self._has_end:
            return Settled.REFUSED
        del self._held[token]
        owner.held -= 1
        if verdict is Verdict.ACK:
            if self.ordered:
                self._next_of_key(lease.delivery.row.key)
        elif verdict is Verdict.RELEASE:
            self._give_back(lease.delivery, delay)
        else:
            self._dead_letter(lease.delivery, reason)
        return Settled.CONFIRMED

    def extend(self, owner: Consumer, tokens: Sequence[int], seconds: float) -> list[float | None]:
        """Hold rows longer, never shorter; per row until when, None = no longer held."""
        until = self.topic.broker.clock.monotonic() + seconds
        result: list[float | None] = []
        for token in tokens:
            lease = self._held.get(token)
            if lease is None or lease.owner is not owner:
                result.append(None)
                continue
            lease.until = max(lease.until, until)
            result.append(lease.until)
        # Longer leases are looked at again then; an entry whose rows were settled meanwhile does nothing.
        heapq.heappush(self._leases, (until, self.topic.broker.serials(1)[0], tuple(tokens)))
        return result

    def holds(self, owner: Consumer, token: Token) -> bool:
        """Whether the consumer still has that row."""
        return isinstance(token, int) and token in self._held and self._held[token].owner is owner

    def again(self, partition: int, start: int, stop: int, delay: float) -> None:
        """Rows that were delivered and settled come once more, as if nobody had."""
        known = [lease.delivery for lease in self._held.values()] + [*self._ready] + [entry[2] for entry in self._delayed]
        out = {delivery.row.offset for delivery in known if delivery.row.partition == partition}
        stop = min(stop, self._next[partition])
        for row in self.topic.logs[partition].read(start, stop, stop, 1 << 62, committed=True).rows:
            if row.offset not in out:
                self._give_back(Delivery(row, 1), delay)

    def leave(self, owner: Consumer) -> None:
        """A consumer goes; what it still holds is free at once."""
        self.consumers.discard(owner)
        for token in [token for token, lease in self._held.items() if lease.owner is owner]:
            self._give_back(self._held.pop(token).delivery, 0.0)
        owner.held = 0

    def sweep(self, now: float) -> None:
        """Take back what ran out, and make ready what was delayed until now."""
        lost: dict[Consumer, list[int]] = {}
        while self._leases and self._leases[0][0] <= now:
            for token in heapq.heappop(self._leases)[2]:
                lease = self._held.get(token)
                if lease is not None and lease.until <= now:
                    del self._held[token]
                    lease.owner.held -= 1
                    lost.setdefault(lease.owner, []).append(token)
                    self._give_back(lease.delivery, 0.0)
        while self._delayed and self._delayed[0][0] <= now:
            self._ready.append(heapq.heappop(self._delayed)[2])
        for owner, tokens in lost.items():
            owner.lost(frozenset(tokens))

    def next_due(self) -> float | None:
        """When (the clock's monotonic()) rows may come back by themselves."""
        return min((heap[0][0] for heap in (self._leases, self._delayed) if heap), default=None)

    def _give_back(self, delivery: Delivery, delay: float) -> None:
        if self._has_end and self.max_deliveries is not None and delivery.tries >= self.max_deliveries:
            self._dead_letter(delivery, f"not acked in {delivery.tries} deliveries")
        elif delay > 0:
            broker = self.topic.broker
            heapq.heappush(self._delayed, (broker.clock.monotonic() + delay, broker.serials(1)[0], delivery))
        else:
            self._ready.append(delivery)

    @property
    def _has_end(self) -> bool:
        return self.archives or self.topic.dead_letter is not None

    def _dead_letter(self, delivery: Delivery, reason: str) -> None:
        if self.topic.dead_letter is not None:
            self.topic.bury(delivery.row, self.name, reason)
        if self.ordered:
            self._next_of_key(delivery.row.key)

    def _next_of_key(self, key: bytes | None) -> None:
        if key is None:
            return
        if behind := self._busy[key]:
            self._ready.append(Delivery(behind.popleft(), 0))
            self._parked -= 1
        else:
            del self._busy[key]

    # -------------------------------------------------------------- telling
    def backlog(self) -> list[Backlog]:
        """How far it is, per partition."""
        held = Counter(lease.delivery.row.partition for lease in self._held.values())
        waiting = Counter(delivery.row.partition for delivery in self._ready)
        waiting.update(delivery.row.partition for _, _, delivery in self._delayed)
        waiting.update(row.partition for behind in self._busy.values() for row in behind)
        return [
            Backlog(
                partition=log.number,
                committed=None,
                end=(log.stable,),
                waiting=waiting[log.number] + log.count(self._next[log.number], log.stable),
                held=held[log.number],
            )
            for log in self.topic.logs
        ]

    def _error(self, kind: ErrorKind, text: str) -> BrokerError:
        entity = f"{self.topic.name}/{self.name}"
        return BrokerError(kind, entity, f"{entity}: {text}")


@dataclass(slots=True, eq=False)
class Member:
    """One member of a group."""

    revoked: Callable[[frozenset[int]], None]  # told of partitions that went to others
    eager: bool = False  # gives up all its partitions at each rebalance
    places: dict[int, int] = field(default_factory=dict)  # assigned partition -> next offset
    losses: int = 0  # how often partitions were taken away: what was read before may be another's work now


class Group:
    """A subscription of family RECORD: partitions are dealt to the members, and each commits how far it is."""

    family = Family.RECORD

    def __init__(self, topic: Topic, name: str, *, latest: bool) -> None:
        self.topic, self.name = topic, name
        self.members: list[Member] = []
        self.committed: dict[int, int] = {}
        self._start = {log.number: log.high for log in topic.logs} if latest else {}
        self._turn = 0

    @property
    def consumers(self) -> Sequence[Member]:
        """Who takes from it."""
        return self.members

    def join(self, member: Member) -> None:
        """Become a member: partitions are dealt anew."""
        self.members.append(member)
        self._deal()

    def leave(self, member: Member) -> None:
        """Go; what was not committed comes to another member."""
        if member in self.members:
            self.members.remove(member)
            member.places = {}
            member.losses += 1
            self._deal()

    def _deal(self) -> None:
        for i, member in enumerate(self.members):
            mine = range(i, len(self.topic.logs), len(self.members))
            kept = set() if member.eager else member.places.keys() & set(mine)
            gone = member.places.keys() - kept
            member.places = {p: member.places[p] if p in kept else self._place(p) for p in mine}
            if gone:
                member.losses += 1
                member.revoked(frozenset(gone))

    def _place(self, partition: int) -> int:
        start = self.committed.get(partition, self._start.get(partition))
        return self.topic.logs[partition].low if start is None else start

    def take(self, member: Member, max_rows: int, max_bytes: int) -> list[Row]:
        """The next committed rows of the member's partitions; empty when there are none now.

        Raises
        ------
        BrokerError
            AGED_OUT, once per gap, when rows went before they were read; the next call goes on after them.
        """
        taken: list[Row] = []
        size = 0
        partitions = sorted(member.places)
        for turn in range(len(partitions)):
            if len(taken) >= max_rows or size >= max_bytes:
                break
            log: Log = self.topic.logs[partitions[(self._turn + turn) % len(partitions)]]
            place = member.places[log.number]
            if place < log.low:
                if taken:
                    break  # what was taken goes out first
                member.places[log.number] = log.low
                raise self._error(
                    ErrorKind.AGED_OUT, f"partition {log.number}: {place}..{log.low} aged out before they were read"
                )
            found = log.read(place, log.high, max_rows - len(taken), max_bytes - size, committed=True)
            member.places[log.number] = found.reached
            taken += found.rows
            size += found.size
        self._turn += 1
        return taken

    def commit(self, member: Member, positions: Mapping[int, int]) -> dict[int, Settled]:
        """Store positions; LOST where the partition is another's now, REFUSED beyond the end of the log."""
        states = {}
        for partition, offset in positions.items():
            if partition not in member.places:
                states[partition] = Settled.LOST
            elif offset > self.topic.logs[partition].high:
                states[partition] = Settled.REFUSED
            else:
                self.committed[partition] = offset
                states[partition] = Settled.CONFIRMED
        return states

    def backlog(self) -> list[Backlog]:
        """How far it is, per partition."""
        return [
            Backlog(
                partition=log.number,
                committed=(self.committed[log.number],) if log.number in self.committed else None,
                end=(log.stable,),
                waiting=log.count(max(log.low, self._place(log.number)), log.stable),
            )
            for log in self.topic.logs
        ]

    def _error(self, kind: ErrorKind, text: str) -> BrokerError:
        entity = f"{self.topic.name}/{self.name}"
        return BrokerError(kind, entity, f"{entity}: {text}")
