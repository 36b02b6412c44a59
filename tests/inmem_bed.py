"""The broker in memory for the conformance suites, plain and with the manners of another one."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from broker_nb.backends.driver import Capabilities, Outbound, Sent, Settled
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.backends.inmem.manners import Manner
from broker_nb.backends.inmem.subscriptions import Queue
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.testing.harness import Harness, OtherTransaction


class Transaction:
    def __init__(self, broker: InmemBroker) -> None:
        self.broker, self.state = broker, broker.begin(uuid.uuid4().hex, 60)

    def send(self, topic: str, bodies: Sequence[bytes]) -> None:
        with self.broker.lock:
            self.broker.topic(topic).append([Outbound(body) for body in bodies], None, self.state)

    def commit(self) -> None:
        assert self.broker.end(self.state, commit=True)

    def abort(self) -> None:
        assert self.broker.end(self.state, commit=False)


class InmemHarness(Harness):
    scheme = "inmem"
    never = {  # noqa: RUF012 - never changed
        "explicit_subscriptions": "a subscription comes by being used",
        "look_effects": "a look has no effect on this broker",
        "Stop.UNPROVEN": "the broker always knows its end",
        "message.SENT": "every settlement is confirmed",
        "record.SENT": "every commit is confirmed",
    }

    def __init__(self) -> None:
        self.profile = {"hosts": [f"conformance-{uuid.uuid4().hex}"]}
        self.broker = InmemBroker.get(self.profile["hosts"][0])

    def make_topic(self, partitions: int, *, compacted: bool = False, **wishes: Any) -> str:
        return self.broker.create_topic(f"topic-{uuid.uuid4().hex}", partitions, **wishes).name

    def snapshot(self) -> object:
        with self.broker.lock:
            return {
                (topic.name, name): (len(sub.consumers), sub.backlog(), isinstance(sub, Queue) and [d.tries for d in sub._ready])
                for topic in self.broker.topics.values()
                for name, sub in topic.subscriptions.items()
            } | {topic.name: [(log.low, log.high, len(log.rows)) for log in topic.logs] for topic in self.broker.topics.values()}

    def begin(self) -> OtherTransaction:
        return Transaction(self.broker)

    def delete_before(self, topic: str, offsets: Mapping[int, int]) -> None:
        self.broker.delete_records(topic, offsets)

    def compact(self, topic: str) -> None:
        self.broker.publish(topic, [Outbound(b"last", b"other")])
        self.broker.compact(topic)

    def expire(self, topic: str) -> None:
        self.broker.advance(1.1)

    def break_reads(self) -> None:
        self.broker.fail_next("read", BrokerError(ErrorKind.UNREACHABLE, "inmem", "inmem: gone", retryable=True), times=100)

    def provoke(self, state: str, topic: str) -> None:
        call, fault = {"message": ("settle", Settled), "record": ("commit", Settled), "Sent": ("send", Sent)}[state.split(".")[0]]
        self.broker.fail_next(call, fault[state.split(".")[1]])

    def mend(self) -> None:
        self.broker.faults.clear()


class MannerHarness(InmemHarness):
    """For the broker with the manners of another one. After each case, nothing must have been done that a real client would punish."""

    manner: ClassVar[Manner]

    def __init__(self) -> None:
        super().__init__()
        self.profile = {**self.profile, "options": {"like": self.manner.name}}

    @classmethod
    def backend(cls) -> str:
        return f"inmem?like={cls.manner.name}"

    @classmethod
    def capabilities(cls) -> Capabilities:
        return cls.manner.able

    def mend(self) -> None:
        super().mend()
        assert self.broker.misuses == []
