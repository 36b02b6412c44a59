"""The Service Bus driver: one connection. Looks by peek, takes in peek-lock, writes in batches, on azure-servicebus."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
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
from broker_nb.backends.servicebus.catalogue import Administration, Catalogue
from broker_nb.backends.servicebus.client import QUEUE, Settings, Worker, place
from broker_nb.backends.servicebus.codec import BELOW
from broker_nb.backends.servicebus.look import FIRST, Browser, Looks
from broker_nb.backends.servicebus.take import SLICE_S, ServiceBusSource
from broker_nb.backends.servicebus.write import ServiceBusSender, Writer
from broker_nb.errors import BrokerError, ErrorKind

PROBE = "broker-nb-probe"
"""An entity that is not there: that the broker says so proves address, key and clock."""


class ServiceBusDriver:
    """One connection to a namespace. Profile: see `Settings`.

    A queue is a topic with one subscription, "queue". "t/Subscriptions/s" is a name to look at, and
    ".../$DeadLetterQueue" after any of them.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        families=frozenset({Family.MESSAGE}),
        slice_s=SLICE_S,
        reject=True,
        attribute_types=frozenset({str, bytes, int, float, bool, datetime, uuid.UUID}),
        null_attributes=True,
        notyet={
            "transactions": "the client offers none",
        },
        never={
            "members": "the broker does not tell who else receives",
            "proven_end": "Service Bus tells only that it had no more to show: how complete a look is stays unknown, and that is said",
            "records": "a queue has no positions to commit: messages are settled one by one",
            "release_delay": "an abandoned message comes again at once",
            "binary_keys": "a session id or partition key is text",
            "null_key_is_not_empty": "an empty session id or partition key does not exist",
            "null_data": "a message has a body, which may be empty",
            "repeated_attributes": "application properties have one value per name",
        },
    )
    requires: ClassVar[tuple[str, str]] = ("azure.servicebus", "servicebus")

    def __init__(self, host: Host, settings: Settings) -> None:
        self._host, self._settings = host, settings
        self._looks = Looks(settings, Worker(host.lane("servicebus-look"), settings))
        self._administration = Administration(settings, host.lane("servicebus-administration"))
        self._catalogue = Catalogue(settings, self._administration, self._looks.sessions)
        self._sources: list[ServiceBusSource] = []
        self._writers: dict[object, Writer] = {}
        self._opening = asyncio.Lock()
        self._closed = False

    @classmethod
    async def open(cls, profile: Mapping[str, Any], host: Host) -> Self:
        settings = Settings(profile, host)
        worker = Worker(host.lane("servicebus-open"), settings)
        receiver = settings.receiver(place(Entity(Kind.QUEUE, settings.entities[0] if settings.entities else PROBE)))
        try:
            await worker.run(settings.namespace, receiver.__aenter__)
        except BrokerError as error:
            if error.kind in (ErrorKind.AUTH, ErrorKind.UNREACHABLE, ErrorKind.TIMEOUT, ErrorKind.UNKNOWN):
                kind = error.kind if error.kind is ErrorKind.AUTH else ErrorKind.UNREACHABLE
                raise host.error(kind, settings.namespace, str(error), retryable=error.retryable) from error.__cause__
        finally:
            await worker.close(receiver.close)
        return cls(host, settings)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        closing = [source.close() for source in self._sources] + [writer.close() for writer in self._writers.values()]
        await asyncio.gather(*closing, self._looks.close(), self._administration.close())

    @property
    def about(self) -> str:
        return f"Azure Service Bus, {self._settings.namespace}{' (emulator)' if self._settings.emulator else ''}"

    def _check_open(self) -> None:
        if self._closed:
            raise self._host.error(ErrorKind.CLOSED, "servicebus", "servicebus: the connection is closed; connect again")

    # -------------------------------------------------------------- catalogue
    async def entities(self, pattern: str = "") -> AsyncIterator[Entity]:
        self._check_open()
        for entity in await self._catalogue.entities(pattern):
            yield entity

    async def summaries(self, topics: Sequence[Entity]) -> Sequence[Summary]:
        self._check_open()
        return await self._catalogue.summaries(topics) if topics else []

    async def facts(self, entity: Entity) -> Facts:
        self._check_open()
        facts = await self._catalogue.facts(entity)
        if entity.kind is Kind.SUBSCRIPTION and not facts.look.possible:
            text = f"{entity.parent} is a topic: name a subscription of it, not {QUEUE!r}"
            raise self._host.error(ErrorKind.NOT_FOUND, entity.name, text)
        return facts

    async def backlog(self, entity: Entity) -> Sequence[Backlog]:
        self._check_open()
        return await self._catalogue.backlog(entity)

    # -------------------------------------------------------------- look
    async def bounds(self, topic: Entity, committed_only: bool) -> Sequence[Bounds]:
        del committed_only  # what a transaction holds is never shown
        facts = await self.facts(topic)
        self._check_look(facts)
        if facts.look.effects:  # a session cannot be peeked into without locking it
            return [Bounds(p, ((p << BELOW) + FIRST,), None) for p in facts.partitions]
        return [await self._looks.bounds(place(topic), partition) for partition in facts.partitions]

    async def locate(self, topic: Entity, times_ns: Mapping[int, int]) -> Mapping[int, Position | None]:
        facts = await self.facts(topic)
        self._check_look(facts)
        if facts.look.effects:
            text = f"{topic.name}: an entity with sessions cannot be searched by time; read it with ..end and filter"
            raise self._host.error(ErrorKind.UNSUPPORTED, topic.name, text)
        at = place(topic)
        return {p: await self._looks.locate(at, await self._looks.bounds(at, p), ns) for p, ns in times_ns.items()}

    def _check_look(self, facts: Facts) -> None:
        if not facts.look.possible:
            name = facts.entity.name
            raise self._host.error(ErrorKind.UNSUPPORTED, name, f"{name} cannot be looked at: {facts.look.reason}")

    async def browse(
        self,
        topic: Entity,
        pieces: Sequence[Piece],
        want: frozenset[str],
        committed_only: bool,
        allow: frozenset[Effect],
        digest: Digest | None = None,
    ) -> Browser:
        del want, committed_only, digest  # peeking brings whole messages, a page at a time, to the loop
        self._check_open()
        return await self._looks.browse(topic, pieces, allow)

    # -------------------------------------------------------------- take and write
    async def subscribe(self, subscription: Entity, options: TakeOptions) -> ServiceBusSource:
        self._check_open()
        at = place(subscription)
        if options.family is not Family.MESSAGE:
            raise self._host.error(
                ErrorKind.UNSUPPORTED, at.path, f"{at.path}: messages are settled one by one, there are no records"
            )
        source = ServiceBusSource(at, options, self._settings, Worker(self._host.lane(f"servicebus-{at.path}"), self._settings))
        try:
            await source.open()
        except BrokerError as error:
            await source.close()
            if not (error.kind is ErrorKind.NOT_FOUND and options.create and at.subscription):
                raise
            await self._catalogue.create(at)
            return await self.subscribe(
                subscription, TakeOptions(options.family, max_held=options.max_held, native=options.native)
            )
        self._sources = [s for s in self._sources if not s.closed] + [source]
        return source

    async def sender(self, topic: Entity, native: Mapping[str, Any]) -> ServiceBusSender:
        facts = await self.facts(topic)
        name = place(topic).path
        if place(topic).subscription or place(topic).dead:
            raise self._host.error(ErrorKind.UNSUPPORTED, name, f"{name} is not written to; publish to {place(topic).parent}")
        chosen = (name, *sorted((key, repr(value)) for key, value in native.items()))
        async with self._opening:
            writer = self._writers.get(chosen)
            if writer is None:
                writer = Writer(name, self._settings, Worker(self._host.lane(f"servicebus-{name}"), self._settings), native)
                try:
                    await writer.open()
                except BrokerError:
                    await writer.close()
                    raise
                self._writers[chosen] = writer
        return ServiceBusSender(facts, writer, self._settings)

    async def begin(self, transactional_id: str, timeout_s: float) -> NoReturn:
        del timeout_s
        text = f"{transactional_id}: {self.capabilities.notyet['transactions']}; publish without one"
        raise self._host.error(ErrorKind.UNSUPPORTED, transactional_id, text)
