"""What Google's fake server cannot show, by the conformance suites on the stand-in: looks, and what becomes of single messages."""

import uuid

import pytest
from grpc import StatusCode
from pubsub_standin import PROJECT, StandIn

from broker_nb.testing.harness import Harness
from broker_nb.testing.looking import Looking
from broker_nb.testing.states import Ends, MessageStates

pytestmark = pytest.mark.xdist_group("conformance-pubsub-standin")
PROVOKED = {
    "message.RETRY": ("Acknowledge", StatusCode.UNAVAILABLE),
    "message.REFUSED": ("Acknowledge", StatusCode.PERMISSION_DENIED),
    "Sent.UNKNOWN": ("Publish", StatusCode.UNAVAILABLE),
}


class StandInHarness(Harness):
    scheme = "pubsub"
    never = {  # noqa: RUF012 - never changed
        "partitions": "a topic has none",
        "begin": "the broker has no transactions",
        "Stop.DRY": "the service does not tell that there is nothing more",
        "Stop.HELD_BACK": "the broker has no transactions",
        "Stop.AGED_OUT": "the service does not tell what is no longer there",
        "Sent.DUPLICATE": "the service keeps no ids of what was sent",
    }

    @classmethod
    def backend(cls):
        return "pubsub, a stand-in"

    def __init__(self, server):
        self.server, self.queues, self.exact = server, {}, {}
        self.profile = {"hosts": [server.address], "path": PROJECT, "timeout": 2.0}

    def make_topic(self, partitions, *, unconfirmed=False, **_):
        name = f"topic-{uuid.uuid4().hex}"
        self.server.topic(name)
        self.exact[name] = not unconfirmed
        return name

    def subscription(self, topic, name):
        if topic in self.exact and (topic, name) not in self.queues:
            queue = self.server.subscription(name, topic, enable_exactly_once_delivery=self.exact[topic])
            queue.ready.extend(self.server.logs[queue.about.topic])  # as if it had been made with the topic
            self.queues[topic, name] = queue
        return name

    def snapshot(self):
        with self.server.changed:
            topics = {path: len(self.server.logs[path]) for path in self.server.topics}
            return topics, {p: (repr(q.about), len(q.ready), sorted(q.leased)) for p, q in self.server.queues.items()}

    def expire(self, topic):
        with self.server.changed:
            for (of, _), queue in self.queues.items():
                if of == topic:
                    queue.ready.extend(message for message, _ in queue.leased.values())
                    queue.leased.clear()

    def provoke(self, state, topic):
        if state in PROVOKED:
            method, code = PROVOKED[state]
            self.server.failures[method] = [(code, "provoked")]


@pytest.fixture(scope="module")
def harness():
    with StandIn() as server:
        yield StandInHarness(server)


class TestLooking(Looking, on=StandInHarness):
    pass


class TestEnds(Ends, on=StandInHarness):
    pass


class TestMessageStates(MessageStates, on=StandInHarness):
    pass
