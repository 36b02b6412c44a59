"""The conformance suites on an Apache Kafka of their own, which may be stopped for a moment."""

import contextlib
import time
import uuid

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.cimpl import NewTopic
from kafka_bed import Bed
from own_server import freeze, own_server, thaw

from broker_nb.testing.harness import Harness
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-kafka")
BOUNDS = {"message.timeout.ms": "6000", "socket.timeout.ms": "2000", "coordinator.query.interval.ms": "300"}
COMPACTED = {"cleanup.policy": "compact", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.0"}


class Transaction:
    def __init__(self, bed):
        self.bed, self.producer = bed, bed.transactional()
        self.producer.begin_transaction()
        self.commit, self.abort = self.producer.commit_transaction, self.producer.abort_transaction

    def send(self, topic, bodies):
        self.bed.put(topic, *bodies, producer=self.producer)


class KafkaHarness(Harness):
    scheme = "kafka"
    never = {  # noqa: RUF012 - never changed
        "explicit_subscriptions": "a group comes by being used",
        "look_effects": "a look has no effect on this broker",
        "Stop.UNPROVEN": "the broker announces the end of every partition",
        "Sent.DUPLICATE": "an idempotent producer drops duplicates without telling",
        "record.SENT": "every commit is confirmed",
    }
    notyet = {"record.REFUSED": "the test bed's Kafka has no permissions by which it could refuse"}  # noqa: RUF012 - never changed

    def __init__(self, server):
        self.server, self.bed, self.frozen = server, Bed(server.url), False
        self.snapshot = self.bed.snapshot
        self.profile = {"hosts": [server.address], "options": BOUNDS}

    def make_topic(self, partitions, *, compacted=False, max_message_bytes=None, **_):
        config = COMPACTED if compacted else {"max.message.bytes": str(max_message_bytes)} if max_message_bytes else {}
        name, deadline = f"topic-{uuid.uuid4().hex}", time.monotonic() + 100
        while True:  # after a stop the broker is no member of its cluster for a moment, and not every part of it learns at once
            try:
                self.bed.admin.create_topics([NewTopic(name, partitions, 1, config=config)])[name].result(5)
            except (KafkaException, TimeoutError):
                if time.monotonic() > deadline:
                    raise
            with contextlib.suppress(KafkaException):  # as above
                found = self.bed.admin.list_topics(timeout=5).topics.get(name)
                if found and found.error is None and all(p.leader >= 0 for p in found.partitions.values()):
                    return name
            assert time.monotonic() < deadline, f"{name} is not there"
            time.sleep(0.02)

    def begin(self):
        return Transaction(self.bed)

    def delete_before(self, topic, offsets):
        for partition, offset in offsets.items():
            self.bed.delete_before(topic, offset, partition)

    def compact(self, topic):
        time.sleep(0.2)  # longer than segment.ms: the next row begins a segment, and what lies before it can be compacted
        self.bed.put(topic, b"last", key=b"other")
        self.bed.await_compaction(topic)

    def break_reads(self, *_):
        self.frozen = True
        freeze(self.server)

    provoke = break_reads

    def mend(self):
        if self.frozen:
            self.frozen = False
            thaw(self.server)
            self.make_topic(1)


@pytest.fixture(scope="module")
def harness():
    with own_server("kafka") as server:
        yield KafkaHarness(server)


globals().update(suites(KafkaHarness))
