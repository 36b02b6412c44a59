"""What is on the cluster. Every function runs on the admin lane and only asks; nothing here creates, joins or acknowledges."""

from __future__ import annotations

import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from broker_nb.backends.driver import (
    Backlog,
    Bounds,
    Dedupe,
    Entity,
    Facts,
    Family,
    Host,
    Kind,
    LeaseTerms,
    LookPlan,
    Position,
    Summary,
)
from broker_nb.backends.pulsar.admin import Admin, Topic, parse_topic
from broker_nb.backends.pulsar.errors import invalid, missing
from broker_nb.backends.pulsar.settings import Settings
from broker_nb.errors import BrokerError, ErrorKind

_SKEW_MS = 10_000  # producers set the times, by which the broker searches as if they only rose: begin that much earlier
_COUNTED = 10_000  # entries; a longer backlog is not counted, because the broker reads it for that
_LEASE = LeaseTerms(seconds=None, renewable=False, return_counts=True, max_deliveries=None)
_BOTH = frozenset({Family.MESSAGE, Family.RECORD})
_ONE_BY_ONE = ("Shared", "Key_Shared")
_DEFAULT_LIMIT = 5_242_880  # the broker's own


class Catalogue:
    """Questions to the cluster, each request answered within the profile's time-out or with an error."""

    def __init__(self, admin: Admin, settings: Settings, host: Host) -> None:
        self._admin, self._settings, self._host = admin, settings, host
        self._broker: dict[str, Any] | None = None  # its settings; empty where only others may read them

    def version(self) -> str:
        """The broker's version: the first question to the admin API."""
        return str(self._admin.get("brokers/version", "pulsar"))

    def topic(self, name: str) -> Topic:
        """A name taken apart."""
        return parse_topic(self._host, name, self._settings.namespace)

    # -------------------------------------------------------------- names
    def entities(self, pattern: str) -> list[Entity]:
        """Topics that match, then their durable subscriptions."""
        topics = [t for namespace in self._namespaces() for t in self._topics(namespace) if _matches(t, pattern)]
        found = [Entity(Kind.TOPIC, t.name) for t in topics]
        for topic in topics:
            try:
                subscriptions = self._stats(topic)["subscriptions"]
            except BrokerError as error:
                if error.kind is not ErrorKind.NOT_FOUND:  # deleted meanwhile
                    raise
                continue
            found += [Entity(Kind.SUBSCRIPTION, name, topic.name) for name, s in sorted(subscriptions.items()) if s["isDurable"]]
        return found

    def _namespaces(self) -> list[str]:
        if not self._settings.everything:
            return [self._settings.namespace]
        tenants = self._admin.find("tenants", "pulsar")
        if tenants is None:  # only a superuser sees all
            return [self._settings.namespace]
        return [
            ns
            for tenant in sorted(tenants)
            if tenant != "pulsar"
            for ns in self._admin.find(f"namespaces/{tenant}", tenant) or ()
        ]

    def _topics(self, namespace: str) -> Iterator[Topic]:
        partitioned = set(self._admin.get(f"persistent/{namespace}/partitioned", namespace))
        plain = set(self._admin.get(f"persistent/{namespace}", namespace))
        for name in sorted(partitioned | {n for n in plain if n.rpartition("-partition-")[0] not in partitioned}):
            local = name.removeprefix(f"persistent://{namespace}/")
            if not local.startswith("__"):
                yield Topic(namespace, local)

    # -------------------------------------------------------------- one topic
    def partitions(self, topic: Topic) -> dict[int, Topic]:
        """The topic of each partition; a topic without partitions is its own partition 0. NOT_FOUND without creating anything."""
        count = int(self._admin.get(f"{topic.path}/partitions?checkAllowAutoCreation=false", topic.name)["partitions"])
        if count == 0:
            self._stats(topic, partitioned=False)  # an older broker says 0 of a topic that is not there
            return {0: topic}
        return {number: topic.partition(number) for number in range(count)}

    def _stats(self, topic: Topic, *, partitioned: bool | None = None) -> Any:
        if partitioned is None:
            partitioned = bool(self._admin.get(f"{topic.path}/partitions?checkAllowAutoCreation=false", topic.name)["partitions"])
        path = "partitioned-stats?perPartition=false" if partitioned else "stats"
        return self._admin.get(f"{topic.path}/{path}", topic.name)

    def limit(self, topic: Topic) -> tuple[int, bool]:
        """The most bytes of a message, and whether it is the topic's own limit."""
        own = self._admin.find(f"{topic.path}/maxMessageSize", topic.name)
        return (int(own), True) if own else (int(self._broker_setting("maxMessageSize", _DEFAULT_LIMIT)), False)

    def _broker_setting(self, name: str, default: Any) -> Any:
        if self._broker is None:
            self._broker = self._admin.find("brokers/configuration/runtime", "pulsar") or {}
        return self._broker.get(name, default)

    def _deduplicates(self, topic: Topic) -> bool:
        for path in (f"{topic.path}/deduplicationEnabled", f"namespaces/{topic.namespace}/deduplication"):
            if (said := self._admin.find(path, topic.name)) is not None:
                return bool(said)
        return str(self._broker_setting("brokerDeduplicationEnabled", False)).lower() == "true"

    def topic_facts(self, entity: Entity) -> Facts:
        """What holds for a topic."""
        topic = self.topic(entity.name)
        partitions = self.partitions(topic)
        return Facts(
            entity=entity,
            partitions=tuple(partitions),
            look=LookPlan(possible=True),
            families=_BOTH,
            lease=_LEASE,
            dedupe=Dedupe(None, ordered=True, replaces_message_id=False) if self._deduplicates(topic) else None,
            ordered=True,
            max_message_bytes=self.limit(topic)[0],
            details=self._acks(),
        )

    def _acks(self) -> dict[str, Any]:
        said = self._broker_setting("acknowledgmentAtBatchIndexLevelEnabled", None)
        return {} if said is None else {"acknowledges single messages of a batch": str(said).lower() == "true"}

    # -------------------------------------------------------------- one subscription
    def subscription_facts(self, entity: Entity, ours: Collection[str]) -> Facts:
        """What holds for a subscription; `ours` are the names of our own consumers on it."""
        topic, found = self._subscription(entity)
        partitions = self.partitions(topic)
        consumers = {c["consumerName"] for c in self.consumers(topic, entity.name, partitions)} - set(ours)
        kind = str(found.get("type") or "")
        taking = {Family.MESSAGE} if kind in _ONE_BY_ONE and consumers else _BOTH
        return Facts(
            entity=entity,
            partitions=tuple(partitions),
            look=LookPlan(possible=False, reason="a subscription is a position in a topic; look at the topic"),
            families=frozenset(taking),
            lease=_LEASE,
            ordered=kind not in _ONE_BY_ONE,
            members=len(consumers),
            details={"type": kind or "not in use"} | self._acks(),
        )

    def consumers(self, topic: Topic, subscription: str, partitions: Mapping[int, Topic]) -> Iterator[Mapping[str, Any]]:
        """Every live consumer of a subscription, per partition."""
        for part in partitions.values():
            found = self._stats(part, partitioned=False)["subscriptions"].get(subscription) or {}
            yield from found.get("consumers") or ()

    def exists(self, entity: Entity) -> bool:
        """Whether a subscription is there; NOT_FOUND where its topic is not."""
        return entity.name in self._stats(self.topic(self._parent(entity)))["subscriptions"]

    def _subscription(self, entity: Entity) -> tuple[Topic, Mapping[str, Any]]:
        topic = self.topic(self._parent(entity))
        found = self._stats(topic)["subscriptions"].get(entity.name)
        if found is None:
            raise missing(
                self._host,
                f"{topic.name}/{entity.name}",
                "there is no such subscription, and none was made; create=True makes it",
            )
        return topic, found

    def _parent(self, entity: Entity) -> str:
        if entity.kind is Kind.SUBSCRIPTION and entity.parent is not None:
            return entity.parent
        raise invalid(self._host, entity.name, "name a subscription together with its topic")

    def backlog(self, entity: Entity) -> list[Backlog]:
        """Where a subscription stands, by entries: of a batch that is acknowledged in part, all messages are waiting."""
        topic, _ = self._subscription(entity)
        lines = []
        for number, part in self.partitions(topic).items():
            stored = self._internal(part)
            cursor = stored["cursors"].get(entity.name)
            committed = None
            if cursor is not None:
                ledger, entry = map(int, cursor["markDeletePosition"].split(":"))
                committed = (ledger, entry + 1, 0)
            lines.append(Backlog(number, committed, _bounds(number, stored).end, self._waiting(part, entity.name)))
        return lines

    def _waiting(self, part: Topic, subscription: str) -> int | None:
        found = self._stats(part, partitioned=False)["subscriptions"].get(subscription)
        if found is None or found["msgBacklog"] > _COUNTED:
            return None
        if not found["msgBacklog"]:
            return 0
        path = f"{part.path}/subscription/{urllib.parse.quote(subscription, safe='')}/analyzeBacklog"
        try:  # a POST that only reads
            told = self._admin.request("POST", path, part.name)
        except BrokerError as error:
            if error.kind in (ErrorKind.PERMISSION, ErrorKind.UNSUPPORTED, ErrorKind.NOT_FOUND):
                return None
            raise
        return None if told["aborted"] else int(told["messages"])

    # -------------------------------------------------------------- positions
    def bounds(self, topic: Topic, wanted: Iterable[int] | None = None) -> list[Bounds]:
        """First and last place of each partition."""
        partitions = self.partitions(topic)
        numbers = partitions if wanted is None else [n for n in partitions if n in set(wanted)]
        return [_bounds(number, self._internal(partitions[number])) for number in numbers]

    def _internal(self, part: Topic) -> Any:
        return self._admin.get(f"{part.path}/internalStats", part.name)

    def locate(self, topic: Topic, times_ns: Mapping[int, int]) -> dict[int, Position | None]:
        """The first entry whose time is at or after the given one, less what producers' clocks may differ."""
        partitions = self.partitions(topic)
        ends = {b.partition: b.end for b in self.bounds(topic, times_ns)}
        found: dict[int, Position | None] = {}
        for number, ns in times_ns.items():
            ms = max(0, -(-ns // 1_000_000) - _SKEW_MS)
            told = self._admin.get(f"{partitions[number].path}/messageid/{ms}", partitions[number].name)
            at = (int(told["ledgerId"]), max(0, int(told["entryId"])), 0)
            end = ends[number]
            found[number] = None if end is not None and at >= end else at
        return found

    def summaries(self, topics: Sequence[Entity]) -> list[Summary]:
        """A line per topic. How many messages there are is not known without reading: the broker counts batches."""
        return [self._summary(entity) for entity in topics]

    def _summary(self, entity: Entity) -> Summary:
        topic = self.topic(entity.name)
        count = int(self._admin.get(f"{topic.path}/partitions?checkAllowAutoCreation=false", topic.name)["partitions"])
        stats = self._stats(topic, partitioned=count > 0)
        return Summary(entity, max(1, count), messages=None, bytes=int(stats["storageSize"]), kind="log + queue")


def _matches(topic: Topic, pattern: str) -> bool:
    """By the full name or by the last part of it."""
    return not pattern or fnmatchcase(topic.name, pattern) or fnmatchcase(topic.local, pattern)


def _bounds(number: int, stored: Any) -> Bounds:
    """From what is stored: ledgers with entries, of which the broker counts those of the last one apart."""
    runs = [((int(ledger["ledgerId"]), 0), int(ledger["entries"])) for ledger in stored["ledgers"]]
    ledger, entry = map(int, stored["lastConfirmedEntry"].split(":"))
    runs = [(start, max(entries, entry + 1) if start[0] == ledger else entries) for start, entries in runs]
    runs = [run for run in runs if run[1] > 0]
    end = (ledger, entry + 1, 0)
    low = (*runs[0][0], 0) if runs else end
    return Bounds(number, low, max(low, end), runs=runs)
