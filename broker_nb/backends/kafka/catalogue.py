"""What is on the cluster. Every function runs on the admin lane and only asks; nothing here creates, joins or commits."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from fnmatch import fnmatchcase
from typing import Any

from confluent_kafka import (
    OFFSET_INVALID,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, OffsetSpec, ResourceType

from broker_nb.backends.driver import Backlog, Bounds, Entity, Facts, Family, Host, Kind, LookPlan, Position, Summary
from broker_nb.backends.kafka.client import failure, plain_text, topic_name
from broker_nb.errors import ErrorKind

_INTERNAL = frozenset({"__consumer_offsets", "__transaction_state", "__share_group_state"})
_ALIVE_S = 2.0
_CHUNK = 100  # groups asked about at a time
_SHOWN = ("cleanup.policy", "retention.ms", "retention.bytes", "message.timestamp.type", "compression.type")
_UNCOMMITTED, _COMMITTED = IsolationLevel.READ_UNCOMMITTED, IsolationLevel.READ_COMMITTED

Ask = tuple[OffsetSpec, IsolationLevel]
Found = Mapping[tuple[str, int], Any]  # (topic, partition) -> the client's answer (offset, timestamp), or its exception


class Catalogue:
    """Questions to the cluster, each answered within `timeout` seconds or with an error."""

    def __init__(self, admin: AdminClient, host: Host, timeout: float) -> None:
        self._admin, self._host, self._timeout = admin, host, timeout

    def nodes(self) -> int:
        """How many brokers there are; soon, or an error."""
        try:
            return len(self._admin.describe_cluster(request_timeout=min(_ALIVE_S, self._timeout)).result().nodes)
        except KafkaException as error:
            raise failure(self._host, "kafka", error) from error

    # -------------------------------------------------------------- names
    def entities(self, pattern: str) -> list[Entity]:
        """Topics that match, then the groups that committed or read there."""
        try:
            names = self._admin.list_topics(timeout=self._timeout).topics
            topics = sorted(n for n in names if n not in _INTERNAL and fnmatchcase(n, pattern or "*"))
            groups = self._groups()
        except KafkaException as error:
            raise failure(self._host, "kafka", error) from error
        found = [Entity(Kind.TOPIC, name) for name in topics]
        shown = set(topics)
        return found + [Entity(Kind.SUBSCRIPTION, g, t) for g, read in groups.items() for t in sorted(read & shown)]

    def _groups(self) -> dict[str, set[str]]:
        listed = self._admin.list_consumer_groups(request_timeout=self._timeout).result()
        names = sorted(g.group_id for g in listed.valid)
        return {name: read for i in range(0, len(names), _CHUNK) for name, read in self._topics_of(names[i : i + _CHUNK]).items()}

    def _topics_of(self, groups: list[str]) -> dict[str, set[str]]:
        """Where each group has committed, or reads now. A group that cannot be asked about is left out of no list, but has none."""
        described = self._admin.describe_consumer_groups(groups, request_timeout=self._timeout)
        offsets = {g: self._group_offsets(g, None) for g in groups}
        read: dict[str, set[str]] = {}
        for group in groups:
            members = _value(described[group])
            committed = _value(offsets[group])
            read[group] = {tp.topic for tp in committed.topic_partitions} if committed else set()
            for member in members.members if members else ():
                read[group] |= {tp.topic for tp in member.assignment.topic_partitions}
        return read

    def _group_offsets(self, group: str, partitions: list[TopicPartition] | None) -> Future[Any]:
        request = [ConsumerGroupTopicPartitions(group, partitions)]
        return self._admin.list_consumer_group_offsets(request, request_timeout=self._timeout)[group]

    # -------------------------------------------------------------- one topic
    def describe(self, topic: str) -> Any:
        """The client's description of a topic; NOT_FOUND without creating it."""
        topic_name(self._host, topic)
        asked = self._admin.describe_topics(TopicCollection([topic]), request_timeout=self._timeout)
        return self._result(topic, asked[topic])

    def partitions(self, topic: str) -> tuple[int, ...]:
        """The numbers of a topic's partitions."""
        return tuple(sorted(p.id for p in self.describe(topic).partitions))

    def settings(self, topic: str) -> dict[str, str]:
        """A topic's settings; empty where we may not read them."""
        resource = ConfigResource(ResourceType.TOPIC, topic)
        answer = _value(self._admin.describe_configs([resource], request_timeout=self._timeout)[resource])
        return {name: entry.value for name, entry in (answer or {}).items()}

    def topic_facts(self, entity: Entity) -> Facts:
        """What holds for a topic."""
        described = self.describe(entity.name)
        settings = self.settings(entity.name)
        limit = settings.get("max.message.bytes")
        return Facts(
            entity=entity,
            partitions=tuple(sorted(p.id for p in described.partitions)),
            look=LookPlan(possible=True, sorted_times=settings.get("message.timestamp.type") == "LogAppendTime"),
            families=frozenset({Family.RECORD}),
            ordered=True,
            max_message_bytes=int(limit) if limit else None,
            details={name: settings[name] for name in _SHOWN if name in settings}
            | {"replicas": max((len(p.replicas) for p in described.partitions), default=0)},
        )

    # -------------------------------------------------------------- one group
    def group_facts(self, entity: Entity, ours: Collection[str | None]) -> Facts:
        """What holds for a group on a topic. A group comes by being used: an unknown one is as good as a new one."""
        partitions = self.partitions(self._parent(entity))
        plain_text(self._host, "group", entity.name)
        asked = self._admin.describe_consumer_groups([entity.name], request_timeout=self._timeout)
        try:
            group = asked[entity.name].result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
                raise failure(self._host, entity.name, error) from error
            group = None
        members = [m for m in group.members if m.member_id not in ours] if group else []
        return Facts(
            entity=entity,
            partitions=partitions,
            look=LookPlan(possible=False, reason="a group is a position in a topic; look at the topic"),
            families=frozenset({Family.RECORD}),
            ordered=True,
            members=len(members),
            details={"state": group.state.name.lower(), "assignor": group.partition_assignor} if group else {},
        )

    def backlog(self, entity: Entity) -> list[Backlog]:
        """Committed offset and end per partition. What waits is unknown where nothing was committed."""
        topic = self._parent(entity)
        partitions = self.partitions(topic)
        plain_text(self._host, "group", entity.name)
        asked = self._group_offsets(entity.name, [TopicPartition(topic, p) for p in partitions])
        ends = self._offsets([(topic, p) for p in partitions], [(OffsetSpec.latest(), _UNCOMMITTED)])[0]
        answer = self._result(entity.name, asked)
        committed = {tp.partition: tp.offset for tp in answer.topic_partitions if tp.offset != OFFSET_INVALID}
        lines = []
        for partition in partitions:
            end, at = self._offset(topic, ends, partition), committed.get(partition)
            waiting = None if at is None else max(0, end - at)
            lines.append(Backlog(partition, None if at is None else (at,), (end,), waiting))
        return lines

    def _parent(self, entity: Entity) -> str:
        if entity.kind is Kind.SUBSCRIPTION and entity.parent is not None:
            return entity.parent
        raise self._host.error(ErrorKind.INVALID, entity.name, f"{entity.name}: name a group together with its topic")

    # -------------------------------------------------------------- offsets
    def bounds(self, topic: str, committed_only: bool) -> list[Bounds]:
        """First offset, visible end and end of each partition."""
        partitions = self.partitions(topic)
        places = [(topic, p) for p in partitions]
        low, high = self._offsets(places, [(OffsetSpec.earliest(), _UNCOMMITTED), (OffsetSpec.latest(), _UNCOMMITTED)])
        # Asked after `high`, so that what is written meanwhile does not look held back.
        visible = self._offsets(places, [(OffsetSpec.latest(), _COMMITTED)])[0] if committed_only else high
        result = []
        for p in partitions:
            end = self._offset(topic, visible, p)
            result.append(Bounds(p, (self._offset(topic, low, p),), (end,), (max(end, self._offset(topic, high, p)),)))
        return result

    def locate(self, topic: str, times_ns: Mapping[int, int]) -> dict[int, Position | None]:
        """The first offset whose time is at or after the given one."""
        topic_name(self._host, topic)
        # Kafka keeps milliseconds; below 0 the client would read a special meaning.
        asked = {TopicPartition(topic, p): OffsetSpec.for_timestamp(max(0, -(-ns // 1_000_000))) for p, ns in times_ns.items()}
        futures = self._admin.list_offsets(asked, request_timeout=self._timeout) if asked else {}
        offsets = {tp.partition: self._result(f"{topic}[{tp.partition}]", f).offset for tp, f in futures.items()}
        return {p: None if offset < 0 else (offset,) for p, offset in offsets.items()}

    def summaries(self, topics: Sequence[Entity]) -> list[Summary]:
        """A line per topic, from one metadata request and five for all partitions at once."""
        names = [topic_name(self._host, t.name) for t in topics]
        described = self._admin.describe_topics(TopicCollection([*dict.fromkeys(names)]), request_timeout=self._timeout)
        partitions = {n: [p.id for p in d.partitions] if (d := _value(f)) else [] for n, f in described.items()}
        places = [(name, p) for name, numbers in partitions.items() for p in numbers]
        minute = OffsetSpec.for_timestamp(int((time.time() - 60) * 1000))
        specs = (OffsetSpec.earliest(), OffsetSpec.latest(), OffsetSpec.for_timestamp(0), OffsetSpec.max_timestamp(), minute)
        found = self._offsets(places, [(spec, _UNCOMMITTED) for spec in specs]) if places else [{}] * 5
        return [self._summary(topic, partitions[topic.name], *found) for topic in topics]

    @staticmethod
    def _summary(
        topic: Entity, partitions: list[int], low: Found, high: Found, oldest: Found, newest: Found, minute: Found
    ) -> Summary:
        places = [(topic.name, p) for p in partitions]
        known = bool(places) and not any(isinstance(end[at], KafkaException) for end in (low, high, minute) for at in places)
        since = {at: minute[at].offset for at in places} if known else {}
        return Summary(
            entity=topic,
            partitions=len(partitions),
            messages=sum(high[at].offset - low[at].offset for at in places) if known else None,
            oldest_ns=min(_times(oldest, places), default=None),
            newest_ns=max(_times(newest, places), default=None),
            last_minute=sum(high[at].offset - n for at, n in since.items() if n >= 0) if known else None,
            kind="log",
        )

    def _offsets(self, places: Iterable[tuple[str, int]], asks: Sequence[Ask]) -> list[Found]:
        """Per question, every place's answer or exception. All are under way at the same time."""
        at = [TopicPartition(topic, p) for topic, p in places]
        asked = [
            self._admin.list_offsets(dict.fromkeys(at, spec), isolation_level=isolation, request_timeout=self._timeout)
            for spec, isolation in asks
        ]
        return [{(tp.topic, tp.partition): f.exception() or f.result() for tp, f in futures.items()} for futures in asked]

    def _offset(self, topic: str, found: Found, partition: int) -> int:
        answer = found[topic, partition]
        if isinstance(answer, KafkaException):
            raise failure(self._host, f"{topic}[{partition}]", answer) from answer
        return int(answer.offset)

    def _result(self, name: str, future: Future[Any]) -> Any:
        try:
            return future.result()
        except KafkaException as error:
            raise failure(self._host, name, error) from error


def _value(future: Future[Any]) -> Any | None:
    """The answer; None where the cluster has none for us."""
    try:
        return future.result()
    except KafkaException:
        return None


def _times(found: Found, places: Iterable[tuple[str, int]]) -> list[int]:
    """The times that the cluster knows; brokers before 3.0 know no newest one."""
    answers = (found[at] for at in places)
    return [a.timestamp * 1_000_000 for a in answers if not isinstance(a, KafkaException) and a.offset >= 0 and a.timestamp >= 0]
