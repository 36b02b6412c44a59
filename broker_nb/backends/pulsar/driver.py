"""The Pulsar driver: one client, whose blocking objects sit on lanes, and the admin REST API beside it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

import pulsar

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
    Outbound,
    Piece,
    Position,
    Sent,
    Summary,
    TakeOptions,
)
from broker_nb.backends.pulsar.admin import Admin
from broker_nb.backends.pulsar.catalogue import Catalogue
from broker_nb.backends.pulsar.errors import failure, missing
from broker_nb.backends.pulsar.look import PulsarBrowser
from broker_nb.backends.pulsar.messages import PulsarMessages
from broker_nb.backends.pulsar.records import PulsarRecords
from broker_nb.backends.pulsar.settings import Settings, read_settings
from broker_nb.backends.pulsar.taking import Consuming, consumer_options
from broker_nb.backends.pulsar.write import PulsarSender
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attribute

_NOBODY = "persistent://{}/broker_nb-is-here"
_MS = 1_000_000
# The client has one logger for the whole process, and takes it from the first connection.
_client_log = logging.getLogger("broker_nb.pulsar")


class PulsarDriver:
    """One connection to a cluster. Profile: `hosts`, `path` (tenant/namespace of names without one, else public/default), `timeout` (s),
    `username`, `password`, and `options` by the client's names.

    Options of ours: `admin_url` (else port 8080 of the first host, 8443 with TLS), `use_tls` (any tls_... option means it too), and who
    we are: `token`, `certificate_path` with `private_key_path`, or OAuth2's `issuer_url`, `private_key`, `audience`, `scope`.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        families=frozenset({Family.MESSAGE, Family.RECORD}),
        slice_s=0.2,
        concurrent_settle=True,
        confirmed_settle=False,
        reject=True,
        null_data=True,
        never={
            "release_delay": "a subscription has one delay for all that is given back: negative_ack_redelivery_delay_ms",
            "null_attributes": "a property of a Pulsar message always has a value, perhaps an empty one",
            "repeated_attributes": "a Pulsar message has one property of each name",
            "null_key_is_not_empty": "the client cannot tell an empty key from none",
            "numbered": "a place is ledger, entry and index in a batch, not one number",
        },
        notyet={
            "transactions": "the Python client has none",
            "binary_keys": "the Python client sends keys as text",
            "aged_out": "rows that the broker drops while a look runs are not noticed; issue 6",
        },
    )
    requires: ClassVar[tuple[str, str]] = ("pulsar", "pulsar")

    def __init__(
        self, host: Host, settings: Settings, admin: Admin, catalogue: Catalogue, client: pulsar.Client, about: str
    ) -> None:
        self._host, self._settings, self._admin, self._catalogue, self._client = host, settings, admin, catalogue, client
        self._about = about
        self._sources: list[Consuming] = []
        self._senders: list[PulsarSender] = []
        self._browsers: list[PulsarBrowser] = []
        self._closed = False

    @classmethod
    async def open(cls, profile: Mapping[str, Any], host: Host) -> Self:
        settings = read_settings(profile, host)
        lane, admin = host.lane("pulsar-open"), Admin(settings, host, host.lane("pulsar-admin"))
        catalogue = Catalogue(admin, settings, host)
        client: pulsar.Client | None = None
        try:
            client = await lane.run(_connect, settings, host)
            version = await admin.ask(catalogue.version)
        except BaseException:
            await admin.close()
            if client is not None:
                await lane.run(client.close)
            raise
        finally:
            lane.close()
        return cls(host, settings, admin, catalogue, client, f"pulsar {version}, admin API {settings.admin_url}")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        closing: list[PulsarBrowser | Consuming | PulsarSender] = [*self._browsers, *self._sources, *self._senders]
        for part in closing:
            await part.close()
        lane = self._host.lane("pulsar-close")
        with contextlib.suppress(pulsar.PulsarException):  # closed by itself
            await lane.run(self._client.close)
        lane.close()
        await self._admin.close()

    @property
    def about(self) -> str:
        return self._about

    # -------------------------------------------------------------- catalogue
    async def entities(self, pattern: str = "") -> AsyncIterator[Entity]:
        for entity in await self._admin.ask(self._catalogue.entities, pattern):
            yield entity

    async def summaries(self, topics: Sequence[Entity]) -> Sequence[Summary]:
        return await self._admin.ask(self._catalogue.summaries, topics)

    async def facts(self, entity: Entity) -> Facts:
        if entity.kind is Kind.TOPIC:
            return await self._admin.ask(self._catalogue.topic_facts, entity)
        ours = frozenset(source.consumer_name for source in self._sources)
        return await self._admin.ask(self._catalogue.subscription_facts, entity, ours)

    async def backlog(self, entity: Entity) -> Sequence[Backlog]:
        return await self._admin.ask(self._catalogue.backlog, entity)

    # -------------------------------------------------------------- look
    async def bounds(self, topic: Entity, committed_only: bool) -> Sequence[Bounds]:
        del committed_only
        return await self._admin.ask(self._catalogue.bounds, self._catalogue.topic(topic.name))

    async def locate(self, topic: Entity, times_ns: Mapping[int, int]) -> Mapping[int, Position | None]:
        return await self._admin.ask(self._catalogue.locate, self._catalogue.topic(topic.name), times_ns)

    async def browse(
        self,
        topic: Entity,
        pieces: Sequence[Piece],
        want: frozenset[str],
        committed_only: bool,
        allow: frozenset[Effect],
        digest: Digest | None = None,
    ) -> PulsarBrowser:
        del want, committed_only, allow  # a fetch brings whole messages; a look has no effect that outlives it
        name = self._catalogue.topic(topic.name)
        # A reader on a topic that is not there would make it, so it is asked for before every one.
        partitions = await self._admin.ask(self._catalogue.partitions, name)
        bounds = {b.partition: b for b in await self._admin.ask(self._catalogue.bounds, name, [p.partition for p in pieces])}
        lane = self._host.lane("pulsar-look")
        browser = PulsarBrowser(self._host, lane, topic.name, pieces, bounds, digest, self._check_alive)
        await browser.open(self._client, {number: part.name for number, part in partitions.items()})
        self._browsers = [b for b in self._browsers if not b.closed] + [browser]
        return browser

    async def _check_alive(self) -> None:
        """Raise UNREACHABLE or TIMEOUT unless the cluster answers."""
        await self._admin.ask(self._catalogue.version)

    # -------------------------------------------------------------- take and write
    async def subscribe(self, subscription: Entity, options: TakeOptions) -> PulsarMessages | PulsarRecords:
        topic = self._catalogue.topic(subscription.parent or "").name
        name = f"{topic}/{subscription.name}"
        taking = consumer_options(self._host, name, options)
        if not await self._admin.ask(self._catalogue.exists, subscription) and not options.create:
            raise missing(self._host, name, "there is no such subscription, and none was made; create=True makes it")
        lane = self._host.lane(f"pulsar-{subscription.name}")
        source: PulsarMessages | PulsarRecords
        if options.family is Family.MESSAGE:
            acks = self._host.lane(f"pulsar-acks-{subscription.name}")
            source = PulsarMessages(self._host, topic, subscription.name, lane, acks, options.max_held, self._bury)
        else:
            source = PulsarRecords(self._host, topic, subscription.name, lane)
        await source.open(self._client, subscription.name, taking)
        self._sources = [s for s in self._sources if not s.closed] + [source]
        return source

    async def _bury(self, topic: str, message: pulsar.Message, told: Mapping[str, str]) -> BrokerError | None:
        """A copy of a message to a dead-letter topic, which has to be there."""
        try:
            sender = await self.sender(Entity(Kind.TOPIC, topic), {})
        except BrokerError as error:
            return error
        try:
            properties = {**message.properties(), **told}
            row = Outbound(
                None if message.has_null_value() else message.data(),
                message.partition_key().encode() or None,
                [Attribute(name, value.encode()) for name, value in properties.items()],
                time_ns=message.event_timestamp() * _MS or None,
            )
            (result,) = await sender.send([row])
        finally:
            await sender.close()
        return None if result.state in (Sent.ACCEPTED, Sent.DUPLICATE) else result.error

    async def sender(self, topic: Entity, native: Mapping[str, Any]) -> PulsarSender:
        name = self._catalogue.topic(topic.name)
        partitions = await self._admin.ask(self._catalogue.partitions, name)
        limit = await self._admin.ask(self._catalogue.limit, name)
        topics = {number: part.name for number, part in partitions.items()}
        sender = PulsarSender(self._host, self._client, self._host.lane("pulsar-write"), name.name, topics, limit, native)
        await sender.open()
        self._senders = [s for s in self._senders if not s.closed] + [sender]
        return sender

    async def begin(self, transactional_id: str, timeout_s: float) -> NoReturn:
        del timeout_s
        text = f"{transactional_id}: the Python client of Pulsar has no transactions"
        raise self._host.error(ErrorKind.UNSUPPORTED, transactional_id, text)


def _connect(settings: Settings, host: Host) -> pulsar.Client:
    """On a lane: a client that has connected, or why it could not. It asks for a schema that nobody has, which makes nothing."""
    client = pulsar.Client(settings.service_url, logger=_client_log, **settings.client)
    try:
        client._client.get_schema_info(
            _NOBODY.format(settings.namespace), -1
        )  # the client's own question, which it does not wrap
    except pulsar.PulsarException as error:
        name = type(error).__name__
        if name in (
            "TopicNotFound",
            "AuthorizationError",
            "BrokerMetadataError",
            "LookupError",
            "UnknownError",
            "ServiceUnitNotReady",
        ):
            return client  # somebody answered
        client.close()
        if name in ("AuthenticationError", "ErrorGettingAuthenticationData"):
            raise failure(host, settings.service_url, error) from error
        text = f"{settings.service_url} does not answer ({name}); is the address right and the server running?"
        raise host.error(ErrorKind.UNREACHABLE, settings.service_url, text, retryable=True) from error
    return client
