"""The Pub/Sub driver: one connection to a project, on google-cloud-pubsub's asynchronous gapic clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from google.protobuf.timestamp_pb2 import Timestamp
from google.pubsub_v1.types import SeekRequest, Subscription, Topic

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
    Piece,
    Position,
    Summary,
    TakeOptions,
    Transaction,
)
from broker_nb.backends.pubsub.catalogue import Catalogue, look_plan
from broker_nb.backends.pubsub.client import Clients, Settings
from broker_nb.backends.pubsub.codec import PARTITION
from broker_nb.backends.pubsub.look import Looks, PubsubBrowser
from broker_nb.backends.pubsub.take import PubsubSource
from broker_nb.backends.pubsub.write import PubsubSender
from broker_nb.errors import BrokerError, ErrorKind


class PubsubDriver:
    """One connection to a project: `pubsub://PROJECT`, or `pubsub://host:port/PROJECT` for an emulator (also PUBSUB_EMULATOR_HOST).

    Without more, the environment's default credentials are used. Options, by the client's own names: `service_account_file`,
    `credentials`, `project`, `quota_project_id`, `api_endpoint`.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(
        families=frozenset({Family.MESSAGE}),
        slice_s=5.0,
        concurrent_settle=True,
        release_delay=True,
        never={
            "look": "only through a temporary subscription, where you allow that by name, and without proof of an end",
            "order": "messages without a key come in any order",
            "records": "Pub/Sub settles message by message and has no positions",
            "reject": "no call for it: a dead-letter policy takes what was nacked too often",
            "settle_before_pull": "messages of one pull may be settled at any time",
            "implicit_subscriptions": "a subscription is made by name",
            "binary_keys": "ordering keys are text",
            "null_key_is_not_empty": "an empty ordering key is none",
            "null_data": "a body is bytes, possibly none",
            "null_attributes": "attributes are text",
            "repeated_attributes": "attributes are a map",
            "transactions": "the broker has none",
        },
    )
    requires: ClassVar[tuple[str, str]] = ("google.pubsub_v1", "pubsub")

    def __init__(self, clients: Clients, host: Host, about: str) -> None:
        self._clients, self._host, self._about = clients, host, about
        self._catalogue = Catalogue(clients)
        self._looks = Looks(clients, self._catalogue)
        self._sources: list[PubsubSource] = []
        self._closed = False

    @classmethod
    async def open(cls, profile: Mapping[str, Any], host: Host) -> Self:
        settings = Settings(profile, host)
        lane = host.lane("pubsub-login")
        try:
            async with asyncio.timeout(settings.timeout):
                credentials = await lane.run(settings.log_in)
        except TimeoutError as error:
            text = f"pubsub: no credentials were found within {settings.timeout:g} s; name a key file (service_account_file)"
            raise host.error(ErrorKind.AUTH, "pubsub", text) from error
        finally:
            lane.close()
        clients = settings.connect(credentials)
        where = settings.emulator or "pubsub"
        listing = clients.publisher.list_topics(
            request={"project": f"projects/{clients.names.project}", "page_size": 1}, **clients.bounded
        )
        try:
            await clients.ask(where, listing)
        except BrokerError as error:
            if error.kind is not ErrorKind.PERMISSION:  # who may not list topics is logged in all the same
                await clients.close()
                if error.kind is ErrorKind.TIMEOUT:
                    raise host.error(ErrorKind.UNREACHABLE, where, str(error), retryable=True) from error
                raise
        except BaseException:
            await clients.close()
            raise
        server = f"an emulator at {settings.emulator}" if settings.emulator else "Google Pub/Sub"
        return cls(clients, host, f"{server}, project {clients.names.project}")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(self._looks.close(), *(source.close() for source in self._sources))
        await self._clients.close()

    @property
    def about(self) -> str:
        return self._about

    # -------------------------------------------------------------- catalogue
    async def entities(self, pattern: str = "") -> AsyncIterator[Entity]:
        async for entity in self._catalogue.entities(pattern):
            yield entity

    async def summaries(self, topics: Sequence[Entity]) -> Sequence[Summary]:
        return [self._catalogue.summary(topic) for topic in topics]

    async def facts(self, entity: Entity) -> Facts:
        return await self._catalogue.facts(entity)

    async def backlog(self, entity: Entity) -> Sequence[Backlog]:
        return await self._catalogue.backlog(entity)

    # -------------------------------------------------------------- look
    async def bounds(self, topic: Entity, committed_only: bool) -> Sequence[Bounds]:
        await self._catalogue.topic(topic.name)
        return [Bounds(PARTITION, low=(), end=None)]

    async def locate(self, topic: Entity, times_ns: Mapping[int, int]) -> Mapping[int, Position | None]:
        return {partition: (time_ns,) for partition, time_ns in times_ns.items()}  # a place is a moment here

    async def browse(
        self,
        topic: Entity,
        pieces: Sequence[Piece],
        want: frozenset[str],
        committed_only: bool,
        allow: frozenset[Effect],
        digest: Digest | None = None,
    ) -> PubsubBrowser:
        del want, committed_only, digest
        about = await self._catalogue.topic(topic.name)
        plan = look_plan(about)
        if not plan.possible or plan.effects - allow:
            text = plan.reason if not plan.possible else "; ".join(effect.value for effect in plan.effects)
            raise self._host.error(ErrorKind.UNSUPPORTED, topic.name, f"{topic.name} cannot be looked at without this: {text}")
        return await self._looks.browse(about, topic.name, pieces)

    # -------------------------------------------------------------- take and write
    async def subscribe(self, subscription: Entity, options: TakeOptions) -> PubsubSource:
        name, topic = subscription.name, subscription.parent
        if options.family is not Family.MESSAGE or options.session is not None:
            text = f"{name}: Pub/Sub hands out single messages, without sessions"
            raise self._host.error(ErrorKind.UNSUPPORTED, name, text)
        try:
            about = await self._catalogue.subscription(subscription) or Subscription()
            self._check_same(name, about, options)
        except BrokerError as error:
            if error.kind is not ErrorKind.NOT_FOUND or not options.create or topic is None:
                raise
            about = await self._create(name, await self._catalogue.topic(topic), options)
        names = self._clients.names
        source = PubsubSource(self._clients, names.subscription(name), topic or names.short(about.topic), name, about, options)
        self._sources = [*(s for s in self._sources if not s.closed), source]
        return source

    async def _create(self, name: str, topic: Topic, options: TakeOptions) -> Subscription:
        """Make a subscription; one that shall begin earlier than now needs a topic that retains messages."""
        earliest = options.start != "latest"
        if options.start not in ("earliest", "latest") or (earliest and not topic.message_retention_duration):
            text = f"{name}: its topic keeps no messages for a new subscription, which gets only what comes from now on; say start='latest'"
            if options.start not in ("earliest", "latest"):
                text = f"{name}: cannot start at {options.start!r}; say earliest or latest"
            raise self._host.error(ErrorKind.INVALID, name, text)
        wanted = self._wanted(name, options)
        wanted.name, wanted.topic = self._clients.names.subscription(name), topic.name
        made = await self._clients.ask(name, self._clients.subscriber.create_subscription(wanted, **self._clients.bounded))
        if earliest:
            since = time.time() - topic.message_retention_duration.total_seconds()
            back = SeekRequest(subscription=made.name, time=Timestamp(seconds=int(since)))
            await self._clients.ask(name, self._clients.subscriber.seek(back, **self._clients.bounded))
        return made

    def _wanted(self, name: str, options: TakeOptions) -> Subscription:
        try:
            return Subscription(dict(options.native))
        except (ValueError, TypeError) as error:
            text = f"{name}: {error}; options are the fields of the client's Subscription"
            raise self._host.error(ErrorKind.INVALID, name, text) from error

    def _check_same(self, name: str, about: Subscription, options: TakeOptions) -> None:
        """Options make a subscription what it is; one that is there is as it is."""
        wanted = self._wanted(name, options)
        for option in options.native:
            there, asked = getattr(about, option), getattr(wanted, option)
            if about.name and there != asked:
                text = f"{name} is there already with another {option}: {there!r}, not {asked!r}; leave it out, or name a new subscription"
                raise self._host.error(ErrorKind.CONFLICT, name, text)

    async def sender(self, topic: Entity, native: Mapping[str, Any]) -> PubsubSender:
        try:
            await self._catalogue.topic(topic.name)
        except BrokerError as error:
            if error.kind is not ErrorKind.PERMISSION:  # who may publish may perhaps not look it up; publishing tells
                raise
        return PubsubSender(self._clients, self._clients.names.topic(topic.name), topic.name, native)

    async def begin(self, transactional_id: str, timeout_s: float) -> Transaction:
        text = f"{transactional_id}: Pub/Sub has no transactions; publish without one"
        raise self._host.error(ErrorKind.UNSUPPORTED, transactional_id, text)
