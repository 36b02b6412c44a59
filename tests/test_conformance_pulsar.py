"""The conformance suites on a Pulsar of their own, which may be stopped for a moment."""

import pytest
from own_server import freeze, own_server, thaw
from pulsar_bed import Bed

from broker_nb.testing.harness import Harness
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-pulsar")
NO_ANSWER = "acks are not answered to the Python client, so nobody knows more than that they were handed over"


class PulsarHarness(Harness):
    scheme = "pulsar"
    never = {  # noqa: RUF012 - never changed
        "begin": "the Python client has no transactions, and the test bed's Pulsar has them switched off",
        "delete_before": "Pulsar removes whole ledgers, not rows below a position: see test_pulsar_look.py",
        "compact": "looks read the topic as written, never its compacted copy, so compaction leaves no gap",
        "expire": "a message is held as long as its consumer lives",
        "look_effects": "a look has no effect that outlives it",
        "order_after_nack": "what was given back comes again after what was already on its way",
        "Stop.HELD_BACK": "the Python client has no transactions",
        "Stop.UNPROVEN": "the broker tells whether there is more",
        "message.CONFIRMED": NO_ANSWER,
        "message.RETRY": NO_ANSWER,
        "message.REFUSED": NO_ANSWER,
        "message.LOST": "Pulsar takes an ack by the message's id, from whoever holds it",
        "record.CONFIRMED": NO_ANSWER,
        "record.RETRY": NO_ANSWER,
        "record.LOST": "Pulsar takes a cumulative ack from every member, whichever is the active one",
    }

    def __init__(self, server):
        self.server, self.bed, self.frozen, self.wishes = server, Bed(server.url), False, {}
        self.snapshot, self.profile = self.bed.snapshot, self.bed.profile

    def make_topic(self, partitions, *, dead_letter=None, ordered=False, max_message_bytes=None, **_):
        name = self.bed.make(partitions if partitions > 1 else 0)
        if max_message_bytes:
            self.bed.policy(name, "maxMessageSize", max_message_bytes)
        policy = {"dead_letter_policy": {"max_redeliver_count": 100, "dead_letter_topic": dead_letter}}
        self.wishes[name] = policy if dead_letter else {"consumer_type": "Failover"} if ordered else {}
        return name

    def native(self, topic):
        return self.wishes.get(topic, {})

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
    with own_server("pulsar", config="brokerDeduplicationEnabled=true\n") as server:
        yield PulsarHarness(server)


globals().update(suites(PulsarHarness))
