"""The driver contract over the broker in memory."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar

from broker_nb.backends.driver import (
    Backlog,
    Bounds,
    Browser,
    Capabilities,
    Dedupe,
    Digest,
    Effect,
    Entity,
    Facts,
    Family,
    Host,
    Kind,
    LeaseTerms,
    LookPlan,
    Piece,
    Position,
    Proof,
    Sender,
    Source,
    Summary,
    TakeOptions,
    Transaction,
)
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.backends.inmem.handles import (
    GroupSource,
    InmemBrowser,
    InmemSender,
    QueueSource,
    TransactionHandle,
    check_pieces,
    refuse_native,
)
from broker_nb.backends.inmem.subscriptions import Group, Queue
from broker_nb.backends.inmem.topic import Topic
from broker_nb.errors import ErrorKind

_MINUTE_NS = 60 * 10**9
H = TypeVar("H", InmemBrowser, QueueSource, GroupSource, InmemSender)


class InmemDriver:
    """A connection to a broker in the memory of this process: `inmem://name`, or `inmem://` for one of its own.

    `broker` is the broker itself, to make topics on. `inmem://name?like=kafka` behaves as a client of that broker would (`manners`).
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        families=frozenset(Family),
        slice_s=5.0,
        concurrent_settle=True,
        release_delay=True,
        reject=True,
        implicit_subscriptions=True,
        binary_keys=True,
        null_key_is_not_empty=True,
        null_data=True,
        attribute_types=frozenset({str, bytes, int, float, bool, datetime, uuid.UUID}),
        null_attributes=True,
        repeated_attributes=True,
        transactions=True,
    )
    requires: ClassVar[tuple[str, str]] = ("", "")
    scheme: ClassVar[str] = "inmem"
    most_names: ClassVar[int] = 1

    def __init__(self, broker: InmemBroker, host: Host) -> None:
        self.broker, self.host = broker, host
        self._closed = False
        self._handles: list[InmemBrowser | QueueSource | GroupSource | InmemSender] = []

    @classmethod
    async def open(cls, profile: Mapping[str, Any], host: Host) -> InmemDriver:
        name, driver = cls._name(profile, host), cls._with_manners(profile, host)
        broker = await cls.find(name)
        with broker.faulty("open"):
            return driver(broker, host)

    @classmethod
    def _with_manners(cls, profile: Mapping[str, Any], host: Host) -> type[InmemDriver]:
        """The class itself, or the driver with the manners that the option `like` names."""
        from broker_nb.backends.inmem.manners import MANNERS  # they are made of this driver

        like = profile.get("options", {}).get("like")
        if like is not None and like not in MANNERS:
            text = f"{cls.scheme} has no manners like {like!r}; there are: {', '.join(sorted(MANNERS))}"
            raise host.error(ErrorKind.INVALID, cls.scheme, text)
        return cls if like is None else MANNERS[like]

    @classmethod
    def _name(cls, profile: Mapping[str, Any], host: Host) -> str:
        names = list(profile.get("hosts", ()))
        wrong = [f"name {name!r}" for name in names[cls.most_names :]]
        wrong += [f"path {path!r}" for path in (profile.get("path"),) if path]
        wrong += [f"option {option!r}" for option in profile.get("options", {}) if option != "like"]
        if wrong:
            takes = "takes one name and like=" if cls.most_names else "takes nothing but like="
            raise host.error(ErrorKind.INVALID, cls.scheme, f"{cls.scheme} {takes}; leave out the {wrong[0]}")
        return names[0] if names else ""

    @classmethod
    async def find(cls, name: str) -> InmemBroker:
        """The broker to connect to."""
        return InmemBroker.get(name) if name else InmemBroker()

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            for handle in self._handles:
                await handle.close()

    @property
    def about(self) -> str:
        which = f"broker {self.broker.name!r}" if self.broker.name else "a private broker"
        return f"{which} in the memory of this process, {len(self.broker.topics)} topics"

    @contextmanager
    def _call(self, name: str, entity: str = "") -> Iterator[None]:
        if self._closed:
            raise self.host.error(ErrorKind.CLOSED, entity or "connection", "the connection is closed; connect again")
        with self.broker.faulty(name), self.broker.lock:
            self.broker.sweep()
            yield

    # -------------------------------------------------------------- catalogue
    async def entities(self, pattern: str = "") -> AsyncIterator[Entity]:
        with self._call("entities"):
            topics = [t for t in self.broker.topics.values() if fnmatchcase(t.name, pattern or "*")]
            found = [Entity(Kind.TOPIC, topic.name) for topic in topics]
            found += [Entity(Kind.SUBSCRIPTION, name, topic.name) for topic in topics for name in topic.subscriptions]
        for entity in found:
            yield entity

    async def summaries(self, topics: Sequence[Entity]) -> Sequence[Summary]:
        with self._call("summaries"):
            return [self._summary(entity, self.broker.topic(entity.name)) for entity in topics]

    def _summary(self, entity: Entity, topic: Topic) -> Summary:
        filled = [log for log in topic.logs if log.rows]
        since = self.broker.clock.time_ns() - _MINUTE_NS
        words = {Family.RECORD: "log", Family.MESSAGE: "queue"}
        return Summary(
            entity=entity,
            partitions=len(topic.logs),
            messages=sum(len(log.rows) for log in topic.logs),
            bytes=sum(log.size for log in topic.logs),
            oldest_ns=min((log.rows[0].time_ns for log in filled), default=None),
            newest_ns=max((log.rows[-1].time_ns for log in filled), default=None),
            last_minute=sum(log.count_since(since) for log in filled),
            kind=" + ".join(word for family, word in words.items() if family in topic.families),
        )

    async def facts(self, entity: Entity) -> Facts:
        with self._call("facts", entity.name):
            if entity.kind is Kind.SUBSCRIPTION:
                topic, subscription = self._subscription(entity)
                return self._facts(entity, topic, subscription)
            return self._facts(entity, self.broker.topic(entity.name), None)

    def _facts(self, entity: Entity, topic: Topic, subscription: Queue | Group | None) -> Facts:
        families = topic.families if subscription is None else frozenset({subscription.family})
        terms = subscription if isinstance(subscription, Queue) else topic
        ours = [h.consumer for h in self._handles if isinstance(h, QueueSource | GroupSource) and not h.closed]
        buried = topic.dead_letter
        return Facts(
            entity=entity,
            partitions=tuple(range(len(topic.logs))),
            look=LookPlan(True, proof=Proof.POSITION, sorted_times=all(log.sorted_times for log in topic.logs)),
            families=families,
            lease=LeaseTerms(
                terms.ack_deadline,
                renewable=True,
                return_counts=True,
                max_deliveries=None if buried is None else terms.max_deliveries,
            )
            if Family.MESSAGE in families
            else None,
            dedupe=Dedupe(window_s=None, ordered=False, replaces_message_id=False),
            ordered=terms.ordered,
            members=0 if subscription is None else sum(c not in ours for c in subscription.consumers),
            max_message_bytes=topic.max_message_bytes,
            dead_letter=None if buried is None else Entity(Kind.DEAD_LETTER, buried.name, topic.name),
            details={"subscriptions": sorted(topic.subscriptions)} if entity.kind is not Kind.SUBSCRIPTION else {},
        )

    def _subscription(self, entity: Entity) -> tuple[Topic, Queue | Group | None]:
        """A subscription with its topic; None where nobody used it yet."""
        topic = self._parent(entity)
        return topic, topic.subscriptions.get(entity.name)

    def _parent(self, entity: Entity) -> Topic:
        if entity.parent is None:
            text = f"subscription {entity.name!r} belongs to a topic; name the topic too"
            raise self.host.error(ErrorKind.INVALID, entity.name, text)
        return self.broker.topic(entity.parent)

    async def backlog(self, entity: Entity) -> Sequence[Backlog]:
        with self._call("backlog", entity.name):
            topic, subscription = self._subscription(entity)
            if isinstance(subscription, Queue):
                subscription.sweep(self.broker.clock.monotonic())
            # One that was never used stands at the beginning, and asking does not make it.
            return (subscription or Group(topic, entity.name, latest=False)).backlog()

    # -------------------------------------------------------------- look
    async def bounds(self, topic: Entity, committed_only: bool) -> Sequence[Bounds]:
        with self._call("bounds", topic.name):
            return [
                Bounds(log.number, (log.low,), (log.stable if committed_only else log.high,), (log.high,))
                for log in self.broker.topic(topic.name).logs
            ]

    async def locate(self, topic: Entity, times_ns: Mapping[int, int]) -> Mapping[int, Position | None]:
        with self._call("locate", topic.name):
            found = self.broker.topic(topic.name)
            check_pieces(self.host, found, [Piece(partition, (), None) for partition in times_ns])
            offsets = {partition: found.logs[partition].first_at(time_ns) for partition, time_ns in times_ns.items()}
            return {partition: None if offset is None else (offset,) for partition, offset in offsets.items()}

    async def browse(
        self,
        topic: Entity,
        pieces: Sequence[Piece],
        want: frozenset[str],
        committed_only: bool,
        allow: frozenset[Effect],
        digest: Digest | None = None,
    ) -> Browser:
        with self._call("browse", topic.name):
            found = self.broker.topic(topic.name)
            check_pieces(self.host, found, pieces)
            return self._keep(self._browser(found, pieces, committed_only))

    # -------------------------------------------------------------- take and write
    async def subscribe(self, subscription: Entity, options: TakeOptions) -> Source:
        with self._call("subscribe", subscription.name):
            topic = self._parent(subscription)
            self._check_native(subscription.name, options.native)
            if options.session is not None:
                raise self.host.error(
                    ErrorKind.UNSUPPORTED, subscription.name, "the broker in memory has no sessions; leave it out"
                )
            if options.start not in ("earliest", "latest"):
                text = f"start is 'earliest' or 'latest', not {options.start!r}"
                raise self.host.error(ErrorKind.INVALID, subscription.name, text)
            found = topic.subscribe(subscription.name, options.family, latest=options.start == "latest")
            if isinstance(found, Queue):
                return self._keep(self._queue(found, options))
            return self._keep(self._group(found))

    async def sender(self, topic: Entity, native: Mapping[str, Any]) -> Sender:
        with self._call("sender", topic.name):
            found = self.broker.topic(topic.name)
            refuse_native(self.host, topic.name, native)
            return self._keep(self._sender(found))

    def _check_native(self, subscription: str, native: Mapping[str, Any]) -> None:
        refuse_native(self.host, subscription, native)

    def _browser(self, topic: Topic, pieces: Sequence[Piece], committed_only: bool) -> InmemBrowser:
        return InmemBrowser(self.broker, self.host, topic, pieces, committed_only)

    def _queue(self, queue: Queue, options: TakeOptions) -> QueueSource:
        return QueueSource(self.broker, self.host, queue, options)

    def _group(self, group: Group) -> GroupSource:
        return GroupSource(self.broker, self.host, group)

    def _sender(self, topic: Topic) -> InmemSender:
        return InmemSender(self.broker, self.host, topic.name, topic)

    async def begin(self, transactional_id: str, timeout_s: float) -> Transaction:
        with self._call("begin", transactional_id):
            return TransactionHandle(self.broker, self.host, self.broker.begin(transactional_id, timeout_s))

    def _keep(self, handle: H) -> H:
        self._handles = [*(h for h in self._handles if not h.closed), handle]
        return handle
