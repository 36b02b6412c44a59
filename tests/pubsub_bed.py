"""A Pub/Sub server seen from outside the driver: topics and subscriptions of one's own, by the client's blocking half."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from typing import Any

import grpc
from google.pubsub_v1 import PublisherClient, SubscriberClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport
from google.pubsub_v1.types import Subscription, Topic

from broker_nb.backends import profile_from_url
from broker_nb.backends.driver import Entity, Family, Kind, Settlement, TakeOptions, Verdict
from broker_nb.backends.pubsub.driver import PubsubDriver
from broker_nb.portable.host import ConnectionHost


class Bed:
    """One server, and a project of its own there."""

    def __init__(self, address: str, project: str = "") -> None:
        self.project = project or f"test-{uuid.uuid4().hex[:12]}"
        channel = grpc.insecure_channel(address)
        self.publisher = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        self.subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        self.url = f"pubsub://{address}/{self.project}"

    def topic(self, name: str = "", **settings: Any) -> str:
        """A new topic; its name."""
        name = name or f"topic-{uuid.uuid4().hex[:12]}"
        self.publisher.create_topic(Topic(name=self.topic_path(name), **settings))
        return name

    def subscription(self, topic: str, **settings: Any) -> str:
        """A new subscription; its name."""
        name = f"sub-{uuid.uuid4().hex[:12]}"
        self.subscriber.create_subscription(
            Subscription(name=self.subscription_path(name), topic=self.topic_path(topic), **settings)
        )
        return name

    def topic_path(self, name: str) -> str:
        return f"projects/{self.project}/topics/{name}"

    def subscription_path(self, name: str) -> str:
        return f"projects/{self.project}/subscriptions/{name}"

    def put(self, topic: str, *bodies: bytes, key: str = "", **attributes: str) -> list[str]:
        """Publish; the ids."""
        messages = [{"data": body, "attributes": attributes, "ordering_key": key} for body in bodies]
        return [*self.publisher.publish(topic=self.topic_path(topic), messages=messages, retry=None).message_ids]

    def pull(self, subscription: str, count: int = 100) -> list[Any]:
        """What another consumer gets now."""
        path = self.subscription_path(subscription)
        return [*self.subscriber.pull(subscription=path, max_messages=count, timeout=5).received_messages]

    def nack(self, subscription: str, *ack_ids: str) -> None:
        """Give back."""
        path = self.subscription_path(subscription)
        self.subscriber.modify_ack_deadline(subscription=path, ack_ids=ack_ids, ack_deadline_seconds=0)

    def subscriptions(self) -> list[Subscription]:
        """What subscriptions there are."""
        return [*self.subscriber.list_subscriptions(project=f"projects/{self.project}")]

    def snapshot(self) -> object:
        """Every topic and subscription with its settings."""
        topics = self.publisher.list_topics(project=f"projects/{self.project}")
        return sorted(map(repr, topics)), sorted(map(repr, self.subscriptions()))


# ------------------------------------------------------------------ the driver
def run(coroutine, within=30.0):
    return asyncio.run(asyncio.wait_for(coroutine, within))


def of_topic(name):
    return Entity(Kind.TOPIC, name)


def of(topic, name):
    return Entity(Kind.SUBSCRIPTION, name, topic)


def on(url, body, *, within=30.0, **profile):
    """Run `await body(driver)` on a connection of its own."""

    async def go():
        async with driver(url, **profile) as opened:
            return await body(opened)

    return run(go(), within)


@contextlib.asynccontextmanager
async def driver(url, **profile):
    """Our driver."""
    host = ConnectionHost("test")
    try:
        opened = await PubsubDriver.open({**profile_from_url(url)[1], **profile}, host)
        try:
            yield opened
        finally:
            await opened.close()
    finally:
        host.close()


def taking(**options):
    return TakeOptions(family=Family.MESSAGE, **options)


async def pulled(source, count, within=10.0):
    """Rows and tokens, so many."""
    rows, tokens, end = [], [], time.monotonic() + within
    while len(rows) < count and time.monotonic() < end:
        if batch := await source.pull(count - len(rows), 1 << 30, 0.2):
            rows += batch.rows
            tokens += batch.tokens
    assert len(rows) == count
    return rows, tokens


def data(rows):
    return sorted(row.message.data for row in rows)


def verdicts(tokens, verdict=Verdict.ACK, **how):
    return [Settlement(token, verdict, **how) for token in tokens]
