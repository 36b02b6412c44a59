"""A stand-in for Pub/Sub, for what Google's fake server lacks: seeks back, exactly-once delivery, permissions, and errors on demand.

Judged only through the client; where it and the documentation of the service differ, the documentation is right. It runs in the test's
own process, so that a test can look into it.
"""

from __future__ import annotations

import collections
import itertools
import re
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, Self

import grpc
from google.protobuf.any_pb2 import Any as Wrapped
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from google.pubsub_v1 import types as t
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

PROJECT = "standin"
REQUESTS = {
    "Publisher": {"GetTopic": t.GetTopicRequest, "ListTopics": t.ListTopicsRequest, "Publish": t.PublishRequest},
    "Subscriber": {
        "CreateSubscription": t.Subscription,
        "GetSubscription": t.GetSubscriptionRequest,
        "UpdateSubscription": t.UpdateSubscriptionRequest,
        "ListSubscriptions": t.ListSubscriptionsRequest,
        "DeleteSubscription": t.DeleteSubscriptionRequest,
        "Pull": t.PullRequest,
        "Acknowledge": t.AcknowledgeRequest,
        "ModifyAckDeadline": t.ModifyAckDeadlineRequest,
        "Seek": t.SeekRequest,
    },
}
Failure = tuple[grpc.StatusCode, str]


class Queue:
    """A subscription: what is to be delivered, and what is leased (ack id -> message, time)."""

    def __init__(self, about: t.Subscription) -> None:
        self.about, self.ready, self.leased, self.done = about, collections.deque[t.PubsubMessage](), {}, set[str]()

    def expire(self) -> None:
        for ack_id, (message, until) in list(self.leased.items()):
            if until <= time.time():
                del self.leased[ack_id]
                self.ready.append(message)


class StandIn:
    """A server in this process; leave the context to end it."""

    def __init__(self, tls: grpc.ServerCredentials | None = None) -> None:
        self.topics: dict[str, t.Topic] = {}
        self.logs: dict[str, list[t.PubsubMessage]] = collections.defaultdict(list)
        self.queues: dict[str, Queue] = {}
        self.asked: list[tuple[str, Any]] = []  # every call and its request
        self.failures: dict[str, list[Failure | None]] = collections.defaultdict(list)  # what the next calls of a method end in
        self.trouble: dict[str, str] = {}  # ack id -> what is wrong with it, once
        self.guard: Callable[[str, Any], Failure | None] = lambda method, request: None
        self.changed, self._ids = threading.Condition(), itertools.count(1)
        self._pool = futures.ThreadPoolExecutor(16)
        self._server = grpc.server(self._pool)
        for service, methods in REQUESTS.items():
            handlers = {name: self._handler(name, request) for name, request in methods.items()}
            generic = grpc.method_handlers_generic_handler(f"google.pubsub.v1.{service}", handlers)
            self._server.add_generic_rpc_handlers((generic,))
        port = self._server.add_secure_port("127.0.0.1:0", tls) if tls else self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        self.url = f"pubsub://{self.address}/{PROJECT}"
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()
        self._pool.shutdown()

    def _handler(self, name: str, request: Any) -> Any:
        def call(asked: Any, context: Any) -> Any:
            with self.changed:
                self.asked.append((name, asked))
                failure = self.failures[name].pop(0) if self.failures[name] else self.guard(name, asked)
                if failure is not None:
                    context.abort(*failure)
                return getattr(self, re.sub(r"\B(?=[A-Z])", "_", name).lower())(asked, context)

        def write(answer: Any) -> bytes:
            return answer.SerializeToString() if isinstance(answer, Empty) else type(answer).serialize(answer)

        return grpc.unary_unary_rpc_method_handler(call, request.deserialize, write)

    # what a test makes
    def topic(self, name: str, retention_s: int = 3600) -> str:
        path = f"projects/{PROJECT}/topics/{name}"
        self.topics[path] = t.Topic(name=path, message_retention_duration={"seconds": retention_s} if retention_s else None)
        return path

    def subscription(self, name: str, topic: str, **settings: Any) -> Queue:
        path = f"projects/{PROJECT}/subscriptions/{name}"
        about = t.Subscription(name=path, topic=f"projects/{PROJECT}/topics/{topic}", ack_deadline_seconds=10)
        for setting, value in settings.items():
            setattr(about, setting, value)
        self.queues[path] = Queue(about)
        return self.queues[path]

    def put(self, topic: str, *bodies: bytes, age_s: float = 0.0) -> None:
        """Published so long ago."""
        at = time.time() - age_s
        with self.changed:
            self._append(f"projects/{PROJECT}/topics/{topic}", [t.PubsubMessage(data=body) for body in bodies], at)

    def _append(self, topic: str, messages: list[t.PubsubMessage], at: float) -> list[str]:
        for message in messages:
            message.message_id, message.publish_time = str(next(self._ids)), Timestamp(seconds=int(at), nanos=int(at % 1 * 1e9))
            self.logs[topic].append(message)
            for queue in self.queues.values():
                if queue.about.topic == topic:
                    queue.ready.append(message)
        self.changed.notify_all()
        return [message.message_id for message in messages]

    def names(self, kind: str = "") -> list[str]:
        """Of calls, in order."""
        return [name for name, _ in self.asked if kind in name]

    # what the client calls
    def _topic(self, path: str, context: Any) -> t.Topic:
        return self.topics.get(path) or context.abort(grpc.StatusCode.NOT_FOUND, f"Resource not found (resource={path}).")

    def _queue(self, path: str, context: Any) -> Queue:
        return self.queues.get(path) or context.abort(grpc.StatusCode.NOT_FOUND, f"Resource not found (resource={path}).")

    def get_topic(self, asked, context):
        return self._topic(asked.topic, context)

    def list_topics(self, asked, context):
        return t.ListTopicsResponse(topics=[*self.topics.values()])

    def publish(self, asked, context):
        self._topic(asked.topic, context)
        return t.PublishResponse(message_ids=self._append(asked.topic, [*asked.messages], time.time()))

    def create_subscription(self, asked, context):
        self._topic(asked.topic, context)
        self.queues[asked.name] = Queue(asked)
        return asked

    def get_subscription(self, asked, context):
        return self._queue(asked.subscription, context).about

    def update_subscription(self, asked, context):
        queue = self._queue(asked.subscription.name, context)
        for path in asked.update_mask.paths:
            setattr(queue.about, path, getattr(asked.subscription, path))
        return queue.about

    def list_subscriptions(self, asked, context):
        return t.ListSubscriptionsResponse(subscriptions=[queue.about for queue in self.queues.values()])

    def delete_subscription(self, asked, context):
        self._queue(asked.subscription, context)
        del self.queues[asked.subscription]
        self.changed.notify_all()
        return Empty()

    def pull(self, asked, context):
        end = time.monotonic() + 0.3
        while True:
            queue = self._queue(asked.subscription, context)
            queue.expire()
            if queue.ready or (left := end - time.monotonic()) <= 0:
                break
            self.changed.wait(min(left, 0.05))
        found = []
        while queue.ready and len(found) < asked.max_messages:
            ack_id, message = f"ack-{next(self._ids)}", queue.ready.popleft()
            queue.leased[ack_id] = (message, time.time() + (queue.about.ack_deadline_seconds or 10))
            found.append(t.ReceivedMessage(ack_id=ack_id, message=message))
        return t.PullResponse(received_messages=found)

    def acknowledge(self, asked, context):
        return self._settle(asked, context, lambda queue, ack_id: queue.leased.pop(ack_id, None))

    def modify_ack_deadline(self, asked, context):
        def modify(queue: Queue, ack_id: str) -> None:
            if held := queue.leased.pop(ack_id, None):
                if asked.ack_deadline_seconds:
                    queue.leased[ack_id] = (held[0], time.time() + asked.ack_deadline_seconds)
                else:
                    queue.ready.append(held[0])

        return self._settle(asked, context, modify)

    def _settle(self, asked: Any, context: Any, settle: Callable[[Queue, str], object]) -> Empty:
        """With exactly-once delivery, what is wrong with single ids comes as the metadata of an ErrorInfo."""
        queue = self._queue(asked.subscription, context)
        queue.expire()
        wrong = {i: "PERMANENT_FAILURE_INVALID_ACK_ID" for i in asked.ack_ids if i not in queue.leased and i not in queue.done}
        wrong |= {i: why for i in asked.ack_ids if (why := self.trouble.pop(i, ""))}
        for ack_id in set(asked.ack_ids) - wrong.keys():
            settle(queue, ack_id)
            queue.done.add(ack_id)
        self.changed.notify_all()
        if wrong and queue.about.enable_exactly_once_delivery:
            status = Status(code=grpc.StatusCode.FAILED_PRECONDITION.value[0], message="Some acknowledgement ids failed.")
            (packed := Wrapped()).Pack(ErrorInfo(reason="ACK_FAILED", domain="pubsub.googleapis.com", metadata=wrong))
            status.details.append(packed)
            context.abort_with_status(rpc_status.to_status(status))
        return Empty()

    def seek(self, asked, context):
        queue = self._queue(asked.subscription, context)
        queue.leased.clear()
        queue.ready = collections.deque(m for m in self.logs[queue.about.topic] if m.publish_time >= asked.time)
        self.changed.notify_all()
        return t.SeekResponse()
