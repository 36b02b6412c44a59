"""The JetStream driver: one connection of nats-py, on the connection's own loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

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
    Piece,
    Position,
    Summary,
    TakeOptions,
)
from broker_nb.backends.jetstream.catalogue import Catalogue
from broker_nb.backends.jetstream.client import Wire
from broker_nb.backends.jetstream.codec import JetStreamCodec
from broker_nb.backends.jetstream.consumers import SERVER_MIN, Consumers
from broker_nb.backends.jetstream.look import JetStreamBrowser
from broker_nb.backends.jetstream.messages import JetStreamSource
from broker_nb.backends.jetstream.names import Names, is_subject
from broker_nb.backends.jetstream.settings import read_settings
from broker_nb.backends.jetstream.write import JetStreamSender
from broker_nb.errors import ErrorKind


class JetStreamDriver:
    """One connection to NATS with JetStream. Profile: `hosts`, `timeout` (s), `username`, and `options` by the client's names.

    Options of ours: `key_header`, the header that holds a message's key ("Key"; "" = the subject is the key); JetStream's `domain` or
    `prefix`.
    A topic is a stream (all its subjects) or a subject, wildcards included; `stream:` or `subject:` before the name decides.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        families=frozenset({Family.MESSAGE}),
        slice_s=0.2,
        concurrent_settle=True,
        release_delay=True,
        reject=True,
        null_key_is_not_empty=True,
        repeated_attributes=True,
        server_min={
            "batched looks": "2.11",
            "reasons of a reject": "2.10.4",
            "Nats-TTL": "2.11",
            "Nats-Schedule": "2.12",
            "Nats-Incr": "2.12",
        }
        | SERVER_MIN,
        never={
            "records": "a consumer of a stream stores acks, not one position",
            "transactions": "JetStream has none over several streams or beside acks",
            "null_data": "a NATS message always has a body, perhaps an empty one",
            "null_attributes": "a NATS header always has a value, perhaps an empty one",
            "binary_keys": "keys are headers, which are text",
        },
    )
    requires: ClassVar[tuple[str, str]] = ("nats", "nats")

    def __init__(self, host: Host, wire: Wire, key_header: str) -> None:
        self._host, self._wire, self._key_header = host, wire, key_header
        self._codec = JetStreamCodec(key_header)
        self._catalogue = Catalogue(wire, Names(wire))
        self._consumers = Consumers(wire, self._catalogue, SERVER_MIN)
        self._sources: list[JetStreamSource] = []

    @classmethod
    async def open(cls, profile: Mapping[str, Any], host: Host) -> Self:
        settings = read_settings(profile, host)
        wire = Wire(host, settings.servers, settings.timeout, tls=settings.tls, api=settings.api)
        await wire.open(settings.client)
        return cls(host, wire, settings.key_header)

    async def close(self) -> None:
        for source in self._sources:
            await source.close()
        await self._wire.shut()

    @property
    def about(self) -> str:
        cluster = f", cluster {self._wire.cluster}" if self._wire.cluster else ""
        return f"nats-server {self._wire.server_version} with JetStream{cluster}"

    # -------------------------------------------------------------- catalogue
    async def entities(self, pattern: str = "") -> AsyncIterator[Entity]:
        async for entity in self._catalogue.entities(pattern):
            yield entity

    async def summaries(self, topics: Sequence[Entity]) -> Sequence[Summary]:
        return await self._catalogue.summaries(topics)

    async def facts(self, entity: Entity) -> Facts:
        if entity.kind is Kind.TOPIC:
            return await self._catalogue.topic_facts(entity)
        return await self._catalogue.consumer_facts(entity, self._waiting)

    def _waiting(self, stream: str, consumer: str) -> int:
        return sum(s.waits for s in self._sources if (s.stream, s.name) == (stream, consumer))

    async def backlog(self, entity: Entity) -> Sequence[Backlog]:
        return await self._catalogue.backlog(entity)

    # -------------------------------------------------------------- look
    async def bounds(self, topic: Entity, committed_only: bool) -> Sequence[Bounds]:
        del committed_only
        return await self._catalogue.bounds(topic.name)

    async def locate(self, topic: Entity, times_ns: Mapping[int, int]) -> Mapping[int, Position | None]:
        return {partition: await self._catalogue.locate(topic.name, time) for partition, time in times_ns.items()}

    async def browse(
        self,
        topic: Entity,
        pieces: Sequence[Piece],
        want: frozenset[str],
        committed_only: bool,
        allow: frozenset[Effect],
        digest: Digest | None = None,
    ) -> JetStreamBrowser:
        # Whole messages come, there are no transactions, nothing is to be allowed, and the loop is everybody's.
        del want, committed_only, allow, digest
        place, info = await self._catalogue.find(topic.name)
        (piece,) = pieces
        late = piece.start == self._catalogue.lows.get(topic.name)
        return JetStreamBrowser(self._wire, self._catalogue, self._codec, place, info, piece, late=late)

    # -------------------------------------------------------------- take and write
    async def subscribe(self, subscription: Entity, options: TakeOptions) -> JetStreamSource:
        name = subscription.name
        if options.family is not Family.MESSAGE or options.session is not None:
            raise self._host.error(ErrorKind.UNSUPPORTED, name, f"{name}: a consumer's rows are messages, without sessions")
        if options.start not in ("earliest", "latest"):
            text = f"{name}: cannot start at {options.start!r}; say earliest or latest"
            raise self._host.error(ErrorKind.INVALID, name, text)
        place, info = await self._consumers.open(subscription, options)
        source = JetStreamSource(self._wire, self._codec, info, options.max_held, lambda: self._catalogue.consumer(place, name))
        self._sources = [s for s in self._sources if not s.closed] + [source]
        return source

    async def sender(self, topic: Entity, native: Mapping[str, Any]) -> JetStreamSender:
        if native:
            text = f"{topic.name}: JetStream has no option {next(iter(native))!r} for publishing; leave it out"
            raise self._host.error(ErrorKind.INVALID, topic.name, text)
        place, info = await self._catalogue.find(topic.name)
        config = info["config"]
        subject = place.subject
        if not subject:
            subjects = [str(s) for s in config.get("subjects") or ()]
            if len(subjects) != 1 or not is_subject(subjects[0], wildcards=False):
                told = ", ".join(subjects) or "none of its own"
                text = f"{topic.name}: the stream has the subjects {told}; publish to one subject, for example subject:orders.new"
                raise self._host.error(ErrorKind.INVALID, topic.name, text)
            subject = subjects[0]
        elif not is_subject(subject, wildcards=False):
            text = f"{topic.name}: one cannot publish to a subject with wildcards; name one subject"
            raise self._host.error(ErrorKind.INVALID, topic.name, text)
        if config.get("no_ack"):
            text = f"{topic.name}: stream {place.stream} acknowledges nothing (no_ack), so nobody would know what is stored"
            raise self._host.error(ErrorKind.UNSUPPORTED, topic.name, text)
        return JetStreamSender(self._wire, topic.name, subject, config, self._key_header)

    async def begin(self, transactional_id: str, timeout_s: float) -> NoReturn:
        del timeout_s
        raise self._host.error(ErrorKind.UNSUPPORTED, transactional_id, f"{transactional_id}: JetStream has no transactions")
