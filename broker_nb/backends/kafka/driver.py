"""The driver contract over confluent-kafka."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, TypeVar

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from broker_nb.backends.driver import (
    Backlog,
    Bounds,
    Browser,
    Capabilities,
    Effect,
    Entity,
    Facts,
    Family,
    Host,
    Kind,
    Lane,
    Piece,
    Position,
    Sender,
    Source,
    Summary,
    TakeOptions,
    Transaction,
)
from broker_nb.backends.kafka.catalogue import Catalogue
from broker_nb.backends.kafka.client import Settings, failure, plain_text, topic_name
from broker_nb.backends.kafka.look import Looks
from broker_nb.backends.kafka.records import KafkaSource, member_config
from broker_nb.backends.kafka.write import KafkaSender, Writer
from broker_nb.errors import BrokerError, ErrorKind

T = TypeVar("T")


class KafkaDriver:
    """A connection to a Kafka cluster: `kafka://host:port,host:port`; the client's own settings as options by their own names."""

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
            "transactions": "issue 6",
            "messages": "share groups: the client calls them a preview; issue 6",
        },
        never={
            "nack": "a log has no single messages to give back; commit up to a position",
            "release_delay": "a log has no single messages to give back",
        },
    )
    requires: ClassVar[tuple[str, str]] = ("confluent_kafka", "kafka")

    def __init__(self, settings: Settings, host: Host, lane: Lane, admin: AdminClient, about: str) -> None:
        self._settings, self._host, self._lane, self._about = settings, host, lane, about
        self._catalogue = Catalogue(admin, host, settings.timeout)
        self._looks = Looks(settings, host, self._check_alive)
        self._writers: dict[int, Writer] = {}
        self._sources: list[KafkaSource] = []
        self._closed = False

    @classmethod
    async def open(cls, profile: Mapping[str, Any], host: Host) -> Self:
        settings = Settings(profile, host)
        lane = host.lane("kafka-admin")
        try:
            async with asyncio.timeout(settings.timeout + 1):
                admin = await lane.run(AdminClient, settings.config({}, {}))
                about = await lane.run(_hello, admin, settings.timeout)
        except (KafkaException, TimeoutError) as error:
            lane.close()
            if (refused := settings.health.refused) is not None:
                raise failure(host, settings.servers, refused) from error
            raise settings.health.unreachable() from error
        return cls(settings, host, lane, admin, about)

    @property
    def about(self) -> str:
        return self._about

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for source in self._sources:
            await source.close()
        await self._looks.close()
        for writer in self._writers.values():
            await writer.close()
        self._lane.close()

    async def _ask(self, question: Callable[..., T], *args: Any) -> T:
        """A question of the catalogue, on the admin lane."""
        if self._closed:
            raise self._host.error(ErrorKind.CLOSED, "kafka", "the connection is closed; connect again")
        try:
            answer = await self._lane.run(question, *args)
        except BrokerError as error:
            if error.kind is ErrorKind.TIMEOUT and self._settings.health.down_since is not None:
                raise self._settings.health.unreachable() from error
            raise
        self._settings.health.on_answer()
        return answer

    async def _check_alive(self) -> None:
        """Raise when no broker answers."""
        await self._ask(self._catalogue.entities, "\0")

    # -------------------------------------------------------------- catalogue
    async def entities(self, pattern: str = "") -> AsyncIterator[Entity]:
        for entity in await self._ask(self._catalogue.entities, pattern):
            yield entity

    async def summaries(self, topics: Sequence[Entity]) -> Sequence[Summary]:
        return await self._ask(self._catalogue.summaries, topics) if topics else []

    async def facts(self, entity: Entity) -> Facts:
        if entity.kind is Kind.SUBSCRIPTION:
            ours = frozenset(source.member_id for source in self._sources)
            return await self._ask(self._catalogue.group_facts, entity, ours)
        return await self._ask(self._catalogue.topic_facts, entity)

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
    ) -> Browser:
        del want, allow  # a message has all its columns, and looking has no effect to allow
        return await self._looks.browse(topic_name(self._host, topic.name), pieces, committed_only)

    # -------------------------------------------------------------- take and write
    async def subscribe(self, subscription: Entity, options: TakeOptions) -> Source:
        group = plain_text(self._host, "group", subscription.name)
        if options.family is not Family.RECORD:
            raise self._host.error(ErrorKind.UNSUPPORTED, group, f"{group}: Kafka is read as records, in a group")
        topic = await self._there(subscription.parent or "")
        source = KafkaSource(topic, group, self._host.lane(f"kafka-{group}"), self._host, self._settings)
        await source.join(member_config(self._settings, group, options))
        self._sources.append(source)
        return source

    async def _there(self, topic: str) -> str:
        """The topic's name; NOT_FOUND when there is none, as a group or a producer would only wait."""
        await self._ask(self._catalogue.describe, topic)
        return topic

    async def sender(self, topic: Entity, native: Mapping[str, Any]) -> Sender:
        partitions = await self._ask(self._catalogue.partitions, topic.name)
        settings = await self._ask(self._catalogue.settings, topic.name)
        limit = int(settings.get("max.message.bytes", 1 << 20))
        writer = self._writers.get(limit)
        if writer is None or native:
            writer = Writer(self._settings, self._host, self._host.lane("kafka-write"), min(1_000_000, limit), native)
            await writer.open()
            self._writers[limit] = writer
        return KafkaSender(topic.name, partitions, settings, writer, self._host)

    async def begin(self, transactional_id: str, timeout_s: float) -> Transaction:
        del timeout_s
        raise self._host.error(
            ErrorKind.UNSUPPORTED, transactional_id, "transactions on Kafka are not there yet; publish without one"
        )


def _hello(admin: AdminClient, timeout: float) -> str:
    """On the lane: the first answer of the cluster."""
    brokers = admin.list_topics(timeout=timeout).brokers
    return f"kafka, {len(brokers)} broker{'s' * (len(brokers) != 1)}"
