"""What is there: topics, subscriptions, and what holds for them. Nothing here changes anything."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from google.pubsub_v1.types import Subscription, Topic

from broker_nb.backends.driver import (
    Backlog,
    Effect,
    Entity,
    Facts,
    Family,
    Kind,
    LeaseTerms,
    LookPlan,
    Proof,
    Summary,
)
from broker_nb.backends.pubsub.client import Clients
from broker_nb.backends.pubsub.codec import PARTITION
from broker_nb.errors import BrokerError, ErrorKind

log = logging.getLogger("broker_nb.pubsub")

LOOK_LABEL = "broker_nb"  # of temporary subscriptions; its value is "look"
MAX_BYTES = 10_000_000  # of a message, and of a request: a limit of the service
LEASE_S = 10.0  # the shortest lease and the one by default
_SILENT = "Pub/Sub does not tell where a topic ends: a look stops when nothing more comes"
_NO_RETENTION = (
    "the topic keeps no messages for those who come later (message_retention_duration is not set); "
    "take from a subscription and release what you took"
)


def look_plan(topic: Topic) -> LookPlan:
    """Whether a topic can be looked at: only by a subscription of one's own, and only where the topic retains messages."""
    if not topic.message_retention_duration:
        return LookPlan(False, proof=Proof.NONE, end_is_fixed=False, reason=_NO_RETENTION)
    effects = frozenset({Effect.CREATES_SUBSCRIPTION})
    return LookPlan(True, effects, Proof.NONE, end_is_fixed=False, sorted_times=True, reason=_SILENT)


class Catalogue:
    """Questions to the service."""

    def __init__(self, clients: Clients) -> None:
        self._clients, self._names = clients, clients.names

    async def topic(self, name: str) -> Topic:
        """A topic's settings; NOT_FOUND when it is not there."""
        path = self._names.topic(name)
        call = self._clients.publisher.get_topic(request={"topic": path}, **self._clients.bounded)
        return await self._clients.ask(name, call)

    async def subscription(self, entity: Entity) -> Subscription | None:
        """A subscription's settings; None when these credentials may take from it at most, and not read them.

        Raises
        ------
        BrokerError
            NOT_FOUND, also where it belongs to another topic than it was said to.
        """
        path, parent = self._names.subscription(entity.name), entity.parent
        call = self._clients.subscriber.get_subscription(request={"subscription": path}, **self._clients.bounded)
        try:
            found = await self._clients.ask(entity.name, call)
        except BrokerError as error:
            if error.kind is ErrorKind.PERMISSION:
                return None
            if error.kind is ErrorKind.NOT_FOUND and parent is not None:
                await self.topic(parent)  # says that the topic is not there either
            raise
        if parent is not None and found.topic != self._names.topic(parent):
            text = f"{entity.name} is a subscription of {self._names.short(found.topic)}, not of {parent}"
            raise self._clients.host.error(ErrorKind.NOT_FOUND, entity.name, text)
        return found

    async def entities(self, pattern: str) -> AsyncIterator[Entity]:
        """Topics by name, then subscriptions of such topics, ours for looking left out."""
        async for topic in await self._list("list_topics", self._clients.publisher):
            if fnmatchcase(name := self._names.short(topic.name), pattern or "*"):
                yield Entity(Kind.TOPIC, name)
        try:
            subscriptions = await self._list("list_subscriptions", self._clients.subscriber)
        except BrokerError as error:
            if error.kind is not ErrorKind.PERMISSION:
                raise
            log.warning("subscriptions are not in the list: %s", error)
            return
        async for found in subscriptions:
            topic = self._names.short(found.topic)
            if fnmatchcase(topic, pattern or "*") and LOOK_LABEL not in found.labels:
                yield Entity(Kind.SUBSCRIPTION, self._names.short(found.name), topic)

    async def _list(self, method: str, client: Any) -> Any:
        call = getattr(client, method)(request={"project": f"projects/{self._names.project}"}, **self._clients.bounded)
        return await self._clients.ask(f"project {self._names.project}", call)

    async def look_subscriptions(self) -> Sequence[Subscription]:
        """The temporary ones, everybody's."""
        return [s async for s in await self._list("list_subscriptions", self._clients.subscriber) if s.labels.get(LOOK_LABEL)]

    def summary(self, topic: Entity) -> Summary:
        """Pub/Sub tells nothing about a topic's messages."""
        return Summary(topic, partitions=1, messages=None, kind="queue")

    async def facts(self, entity: Entity) -> Facts:
        """What holds for a topic or a subscription."""
        if entity.kind is not Kind.SUBSCRIPTION:
            return self._topic_facts(entity, await self.topic(entity.name))
        return self._subscription_facts(entity, await self.subscription(entity))

    def _topic_facts(self, entity: Entity, topic: Topic) -> Facts:
        retention = topic.message_retention_duration
        return Facts(
            entity=entity,
            partitions=(PARTITION,),
            look=look_plan(topic),
            families=frozenset({Family.MESSAGE}),
            lease=LeaseTerms(LEASE_S, renewable=True, return_counts=False, max_deliveries=None),
            max_message_bytes=MAX_BYTES,
            details=_told(
                retention=str(retention) if retention else "none: a look is not possible",
                labels=dict(topic.labels),
                schema=topic.schema_settings.schema,
                kms_key=topic.kms_key_name,
            ),
        )

    def _subscription_facts(self, entity: Entity, found: Subscription | None) -> Facts:
        about = found or Subscription()
        policy = about.dead_letter_policy
        buried = self._names.short(policy.dead_letter_topic) if policy.dead_letter_topic else None
        delivered = [about.push_config.push_endpoint, about.bigquery_config.table, about.cloud_storage_config.bucket]
        gone = "_deleted-topic_" if about.topic == "_deleted-topic_" else "detached" if about.detached else ""
        return Facts(
            entity=entity,
            partitions=(PARTITION,),
            look=LookPlan(False, proof=Proof.NONE, end_is_fixed=False, reason="a subscription is taken from; look at its topic"),
            families=frozenset() if any(delivered) or about.detached else frozenset({Family.MESSAGE}),
            lease=LeaseTerms(
                float(about.ack_deadline_seconds or LEASE_S),
                renewable=True,
                return_counts=buried is not None,
                max_deliveries=policy.max_delivery_attempts or None,
            ),
            ordered=about.enable_message_ordering,
            max_message_bytes=MAX_BYTES,
            dead_letter=None if buried is None else Entity(Kind.DEAD_LETTER, buried, entity.parent),
            details=_told(
                topic=gone,
                filter=about.filter,
                exactly_once=about.enable_exactly_once_delivery,
                delivered_to=next(filter(None, delivered), ""),
                retain_acked=about.retain_acked_messages,
                retention=str(about.message_retention_duration or ""),
                expires_after=str(about.expiration_policy.ttl or ""),
                labels=dict(about.labels),
                unknown="" if found else "these credentials may not read its settings (pubsub.subscriptions.get)",
            ),
        )

    async def backlog(self, entity: Entity) -> Sequence[Backlog]:
        """The service counts, but only its monitoring tells."""
        await self.subscription(entity)
        return [Backlog(PARTITION, committed=None, end=None, waiting=None)]


def _told(**details: Any) -> Mapping[str, Any]:
    """What is set."""
    return {name: value for name, value in details.items() if value}
