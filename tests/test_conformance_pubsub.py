"""The conformance suites on Google's own fake server (pstest), which may be stopped for a moment."""

import time

import pytest
from own_server import freeze, own_server, thaw
from pubsub_bed import Bed

from broker_nb.testing.harness import Harness
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-pubsub")
LEASE_S = 5  # shorter than the service allows, which this server does not mind
ELSEWHERE = "a seek back crashes this server, and it takes every ack id: shown on a stand-in"


class PubsubHarness(Harness):
    scheme = "pubsub"
    redelivery_s = 12.0  # this server extends leases that are over
    never = {  # noqa: RUF012 - never changed
        "partitions": "a topic has none",
        "begin": "the broker has no transactions",
        "max_message_bytes": "one limit for the whole service: test_pubsub_write.py",
        "Stop.DRY": "the service does not tell that there is nothing more",
        "Stop.HELD_BACK": "the broker has no transactions",
        "Stop.AGED_OUT": "the service does not tell what is no longer there",
        "Sent.DUPLICATE": "the service keeps no ids of what was sent",
    }
    notyet = {  # noqa: RUF012 - never changed
        "look_effects": ELSEWHERE,
        "Stop.UNPROVEN": ELSEWHERE,
        "message.REFUSED": ELSEWHERE,
    }

    def __init__(self, server):
        self.server, self.bed, self.frozen = server, Bed(server.address), False
        self.snapshot = self.bed.snapshot
        self.profile = {"hosts": [server.address], "path": self.bed.project, "timeout": 2.0}
        self.made, self.names = {}, {}  # by topic: its subscription that has no name yet, and the wishes for more

    def make_topic(self, partitions, *, ack_deadline=None, ordered=False, unconfirmed=False, **_):
        topic = self.bed.topic()
        wishes = {"enable_exactly_once_delivery": not unconfirmed, "enable_message_ordering": ordered}
        self.made[topic] = wishes | ({"ack_deadline_seconds": LEASE_S} if ack_deadline else {})
        self.names[topic, None] = self.bed.subscription(topic, **self.made[topic])
        return topic

    def subscription(self, topic, name):
        if topic in self.made and (topic, name) not in self.names:
            first = self.names.pop((topic, None), None)
            self.names[topic, name] = first or self.bed.subscription(topic, **self.made[topic])
        return self.names.get((topic, name), name)

    def expire(self, topic):
        self.provoke()  # else it is extended in time
        time.sleep(LEASE_S + 0.3)
        self.mend()

    def provoke(self, *_):
        self.frozen = True
        freeze(self.server)

    def mend(self):
        if self.frozen:
            self.frozen = False
            thaw(self.server)


@pytest.fixture(scope="module")
def harness():
    with own_server("pubsub") as server:
        yield PubsubHarness(server)


globals().update(suites(PubsubHarness))
