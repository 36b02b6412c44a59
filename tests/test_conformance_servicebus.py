"""The conformance suites on a stand-in for Service Bus of their own, which may be stopped for a moment."""

import pytest
from own_server import freeze, own_server, thaw
from servicebus_bed import Bed

from broker_nb.testing.harness import Harness
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-servicebus")
FAULTS = {
    "message.RETRY": {"on": "settle", "condition": "com.microsoft:server-busy", "times": 100},
    "message.REFUSED": {"on": "settle", "condition": "amqp:not-allowed", "times": 100},
    "Sent.UNKNOWN": {"on": "send", "condition": ""},
}


class ServiceBusHarness(Harness):
    scheme = "servicebus"
    never = {  # noqa: RUF012 - never changed
        "partitions": "how many partitions a partitioned entity has is the service's choice",
        "ordered": "order per key is that of a session, and sessions are taken one at a time",
        "begin": "transactions of others are never seen before they are over",
        "delete_before": "rows leave a queue by being settled, so a gap is nothing unusual",
        "compact": "nothing is compacted",
        "Stop.HELD_BACK": "transactions of others are never seen before they are over",
        "Stop.AGED_OUT": "rows leave a queue by being settled, so a gap is nothing unusual",
        "Stop.UNPROVEN": "only where somebody else holds a session of a look, which is tested beside",
        "Sent.DUPLICATE": "duplicate detection drops without telling",
        "message.SENT": "every settlement is confirmed",
    }

    def __init__(self, server):
        self.server, self.bed, self.frozen = server, Bed(server.url), False
        self.profile = self.bed.profile
        self.snapshot = self.bed.ask

    def make_topic(self, partitions, *, subscriptions=(), ack_deadline=30, dead_letter=None, max_message_bytes=1 << 20, **wishes):
        settings = {"lock_duration": ack_deadline, "max_delivery_count": 2000}
        if subscriptions:
            return self.bed.topic(*subscriptions)
        return self.bed.queue(
            **settings,
            requires_session=bool(wishes.get("look_effects")),
            forward_dead_lettered_messages_to=dead_letter,
            max_message_size_in_kilobytes=-(-max_message_bytes // 1024),
        )

    def subscription(self, topic, name):
        return name if topic.startswith("topic-") else "queue"

    def expire(self, topic):
        self.bed.ask(expire=topic)

    def break_reads(self):
        self.frozen = True
        freeze(self.server)

    def provoke(self, state, topic):
        self.bed.ask(fault={**FAULTS[state], "entity": topic})

    def mend(self):
        if self.frozen:
            self.frozen = False
            thaw(self.server)
        self.bed.ask(clear=True)


@pytest.fixture(scope="module")
def harness():
    with own_server("servicebus") as server:
        yield ServiceBusHarness(server)


globals().update(suites(ServiceBusHarness))
