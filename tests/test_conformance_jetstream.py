"""The conformance suites on a NATS server of their own, which may be stopped for a moment."""

import time
import uuid

import pytest
from nats_bed import Bed
from own_server import freeze, own_server, thaw

from broker_nb.testing.harness import Harness
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-jetstream")


class JetStreamHarness(Harness):
    scheme = "nats"
    awkward = 23  # names of headers are printable ASCII without spaces and colons; values have no line breaks
    never = {  # noqa: RUF012 - never changed
        "partitions": "a stream has one partition",
        "begin": "JetStream has no transactions",
        "dead_letter": "JetStream has no dead-letter queue: a rejected message stays in its stream, and is delivered no more",
        "look_effects": "a look has no effect on this broker",
        "Stop.HELD_BACK": "JetStream has no transactions",
        "Stop.UNPROVEN": "the stream's leader tells where it ends",
        "message.SENT": "every settlement is confirmed",
    }
    notyet = {"message.REFUSED": "needs a user who may not acknowledge: see test_jetstream_auth.py"}  # noqa: RUF012 - never changed

    def __init__(self, server):
        self.server, self.bed, self.frozen, self.wishes = server, Bed(server.url), False, {}
        self.snapshot = self.bed.snapshot
        self.profile = {"hosts": [server.address]}

    def make_topic(self, partitions, *, ack_deadline=None, ordered=False, max_message_bytes=-1, **_):
        name = f"topic-{uuid.uuid4().hex}"
        self.bed.stream(name, max_msg_size=max_message_bytes, allow_direct=len(self.wishes) % 2 == 0)  # both ways of looking
        self.wishes[name] = {"ack_wait": 1.5 * ack_deadline} if ack_deadline else {"max_ack_pending": 1} if ordered else {}
        return name

    def native(self, topic):
        return self.wishes.get(topic, {})

    def delete_before(self, topic, offsets):
        self.bed.api(f"STREAM.PURGE.{topic}", seq=offsets[0])

    def compact(self, topic):
        (last,) = self.bed.put(topic, b"last", raw=b"Key: other")
        self.bed.delete(topic, *range(2, last - 1))  # what is left of the key that the rows in the middle share

    def expire(self, topic):
        self.break_reads()  # else it is extended in time
        time.sleep(self.wishes[topic]["ack_wait"] + 0.1)
        self.mend()

    def break_reads(self, *_):
        self.frozen = True
        freeze(self.server)

    provoke = break_reads

    def mend(self):
        if self.frozen:
            self.frozen = False
            thaw(self.server)


@pytest.fixture(scope="module")
def harness():
    with own_server("nats") as server:
        yield JetStreamHarness(server)


globals().update(suites(JetStreamHarness))
