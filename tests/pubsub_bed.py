"""A Pub/Sub server seen from outside the driver: topics and subscriptions of one's own, by the client's blocking half."""

from __future__ import annotations

import uuid
from typing import Any

import grpc
from google.pubsub_v1 import PublisherClient, SubscriberClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport
from google.pubsub_v1.types import Subscription, Topic


class Bed:
    """One server, and a project of its own there."""

    def __init__(self, address: str) -> None:
        self.project = f"test-{uuid.uuid4().hex[:12]}"
        channel = grpc.insecure_channel(address)
        self.publisher = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        self.subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        self.url = f"pubsub://{address}/{self.project}"

    def topic(self, **settings: Any) -> str:
        """A new topic; its name."""
        name = f"topic-{uuid.uuid4().hex[:12]}"
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
        return [*self.publisher.publish(topic=self.topic_path(topic), messages=messages).message_ids]

    def pull(self, subscription: str, count: int = 100) -> list[Any]:
        """What another consumer gets now."""
        path = self.subscription_path(subscription)
        return [*self.subscriber.pull(subscription=path, max_messages=count, timeout=5).received_messages]

    def subscriptions(self) -> list[Subscription]:
        """What subscriptions there are."""
        return [*self.subscriber.list_subscriptions(project=f"projects/{self.project}")]

    def snapshot(self) -> object:
        """Every topic and subscription with its settings."""
        topics = self.publisher.list_topics(project=f"projects/{self.project}")
        return sorted(map(repr, topics)), sorted(map(repr, self.subscriptions()))
