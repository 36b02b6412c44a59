"""The Kafka driver: one connection. Look, records and publishing on confluent-kafka; transactions come later."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self, TypeVar

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from broker_nb.backends.driver import (
    Backlog,
    Bounds,
    Capabilities,
    Digest,
    Effect,
    Entity,
    Facts,
    Family,
    Host,
    Kind,
    Lane,
    Piece,
    Position,
    Summary,
    TakeOptions,
)
from broker_nb.backends.kafka.catalogue import Catalogue
from broker_nb.backends.kafka.client import Settings, failure, plain_text, topic_name
from broker_nb.backends.kafka.look import KafkaBrowser, Looks
from broker_nb.backends.kafka.records import KafkaSource, member_config
from broker_nb.backends.kafka.write import BATCH, KafkaSender, Writer
from broker_nb.errors import BrokerError, ErrorKind

T = TypeVar("T")

# Else questions about groups go unanswered for minutes after a restart of the broker: only a refresh connects to coordinators again.
_ADMIN = {"topic.metadata.refresh.interval.ms": 2000}
_GRACE_S = 1.0  # for the second address of a name, after the first one refused


class KafkaDriver:
    """One connection to a cluster. Profile: `hosts`, `timeout` (s), `username`, `password`, and `options` by the client's names."""

    capabilities: ClassVar[Capabilities] = Capabilities(
        families=frozenset({Family.RECORD}),
        slice_s=0.1,
        implicit_subscriptions=True,
        binary_keys=True,
        null_key_is_not_empty=True,
        null_data=True,
        attribute_types=frozenset({str, bytes}),
        null_attributes=True,
        repeated_attributes=True,
        notyet={
            "transactions": "publishing is idempotent, but in no transaction; issue 6",
            "messages": "on Kafka this takes share groups, which the client calls a preview; issue 6",
        },
        never={
            "nack": "a log has no single messages to give back; commit up to a position",
            "release_delay": "a log has no single messages to give back",
        },
    )
    requires: ClassVar[tuple[str, str]] = ("confluent_kafka", "kafka")

    def __init__(self, host: Host, settings: Settings, admin: AdminClient, lane: Lane, about: str) -> None:
        self._host, self._settings, self._admin, self._lane = host, settings, admin, lane
        self._about = about
        self._catalogue = Catalogue(admin, host, settings.timeout)
        self._looks = Looks(settings, host, self._check_alive)
        self._writers: dict[object, Writer] = {}
        self._sources: list[KafkaSource] = []
        self._closed = False

    @classmethod
    async def open(cls, profile: Mapping[str, Any], host: Host) -> Self:
        settings = Settings(profile, host)
        lane = host.lane("kafka-admin")
        try:
            admin, about = await lane.run(_connect, settings, host)
        except KafkaException as error:
            raise failure(host, settings.servers, error) from error
        return cls(host, settings, admin, lane, about)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for source in self._sources:
            await source.close()
        for writer in self._writers.values():
            await writer.close()
        await self._looks.close()
        self._lane.close()

    @property
    def about(self) -> str:
        return self._about

    async def _ask(self, question: Callable[..., T], *args: Any) -> T:
        """A question to the cluster, on the admin lane."""
        if self._closed:
            raise self._host.error(ErrorKind.CLOSED, "kafka", "the connection is closed; connect again")
        try:
            answer = await self._lane.run(question, *args)
        except BrokerError as error:
            if error.retryable and self._settings.health.down_since is not None:
                raise self._settings.health.unreachable() from error
            raise
        self._settings.health.on_answer()
        return answer

    async def _check_alive(self) -> None:
        """Raise UNREACHABLE unless a broker answers."""
        await self._ask(self._catalogue.nodes)

    # -------------------------------------------------------------- catalogue
    async def entities(self, pattern: str = "") -> AsyncIterator[Entity]:
        for entity in await self._ask(self._catalogue.entities, pattern):
            yield entity

    async def summaries(self, topics: Sequence[Entity]) -> Sequence[Summary]:
        return await self._ask(self._catalogue.summaries, topics) if topics else []

    async def facts(self, entity: Entity) -> Facts:
        if entity.kind is Kind.TOPIC:
            return await self._ask(self._catalogue.topic_facts, entity)
        ours = frozenset(source.member_id for source in self._sources)
        return await self._ask(self._catalogue.group_facts, entity, ours)

    async def backlog(self, entity: Entity) -> Sequence[Backlog]:
        return await self._ask(self._catalogue.backlog, entity)

    # -------------------------------------------------------------- look
    async def bounds(self, topic: Entity, committed_only: bool) -> Sequence[Bounds]:
        return await self._ask(self._catalogue.bounds, topic.name, committed_only)

    async def locate(self, topic: Entity, times_ns: Mapping[int, int]) -> Mapping[int, Position | None]:
        return await self._ask(self._catalogue.locate, topic.name, times_ns)

    async def browse(
        self,
        topic: Entity,
        pieces: Sequence[Piece],
        want: frozenset[str],
        committed_only: bool,
        allow: frozenset[Effect],
        digest: Digest | None = None,
    ) -> KafkaBrowser:
        del want, allow  # a fetch brings whole messages; a look has no effect to allow
        return await self._looks.browse(topic_name(self._host, topic.name), pieces, committed_only, digest)

    # -------------------------------------------------------------- take and write
    async def subscribe(self, subscription: Entity, options: TakeOptions) -> KafkaSource:
        group, topic = plain_text(self._host, "group", subscription.name), subscription.parent or ""
        if options.family is not Family.RECORD or options.session is not None:
            text = f"{group}: a Kafka group reads records, without sessions"
            raise self._host.error(ErrorKind.UNSUPPORTED, group, text)
        if options.start not in ("earliest", "latest"):
            text = f"{group}: cannot start at {options.start!r}; say earliest or latest"
            raise self._host.error(ErrorKind.INVALID, group, text)
        await self._ask(self._catalogue.describe, topic)
        config = member_config(self._settings, group, options)
        source = KafkaSource(topic, group, options.start, self._host.lane(f"kafka-{group}"), self._host, self._settings)
        await source.join(config)
        self._sources = [s for s in self._sources if not s.closed] + [source]
        return source

    async def sender(self, topic: Entity, native: Mapping[str, Any]) -> KafkaSender:
        partitions = await self._ask(self._catalogue.partitions, topic.name)
        settings = await self._ask(self._catalogue.settings, topic.name)
        # The client does not split a batch that the topic refuses as too large.
        batch = min(BATCH, int(settings.get("max.message.bytes", BATCH)))
        key = (batch, *sorted((name, repr(value)) for name, value in native.items()))
        writer = self._writers.get(key)
        if writer is None:
            writer = Writer(self._settings, self._host, self._host.lane("kafka-write"), batch, native)
            await writer.open()
            self._writers[key] = writer
        return KafkaSender(topic.name, partitions, settings, writer, self._host)

    async def begin(self, transactional_id: str, timeout_s: float) -> NoReturn:
        del timeout_s
        text = f"{transactional_id}: transactions on Kafka are not built yet (issue 6)"
        raise self._host.error(ErrorKind.UNSUPPORTED, transactional_id, text)


def _connect(settings: Settings, host: Host) -> tuple[AdminClient, str]:
    """On the admin lane: the first answer of the cluster, or why there is none, within the profile's time-out."""
    deadline = time.monotonic() + settings.timeout
    admin = AdminClient(settings.config(_ADMIN, {}))
    answer, health = admin.describe_cluster(request_timeout=settings.timeout), settings.health
    while not answer.done():
        admin.poll(0.02)  # hands over the connection's errors
        if health.refused is not None:
            raise failure(host, settings.servers, health.refused)
        if health.down_s > _GRACE_S or time.monotonic() > deadline:
            raise health.unreachable()
    if answer.exception() is not None:
        raise health.unreachable() from answer.exception()
    health.on_answer()
    brokers = len(answer.result().nodes)
    return admin, f"kafka, {brokers} broker{'' if brokers == 1 else 's'}, cluster {answer.result().cluster_id}"
