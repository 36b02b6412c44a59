"""The conformance suites on an Apache Kafka of their own, which may be stopped for a moment."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, OffsetSpec, ResourceType
from confluent_kafka.cimpl import NewTopic

from broker_nb.testing.contract import Contract
from broker_nb.testing.delivery import Idle
from broker_nb.testing.groups import Records
from broker_nb.testing.harness import Harness, OtherTransaction
from broker_nb.testing.looking import Looking
from broker_nb.testing.publishing import Publishing
from broker_nb.testing.servers import OwnServer, ServerMissing
from broker_nb.testing.settling import Messages
from broker_nb.testing.states import Ends, MessageStates, RecordStates
from broker_nb.testing.tails import Tails

pytestmark = pytest.mark.xdist_group("conformance-kafka")


class Transaction:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self.producer = Producer({**config, "transactional.id": uuid.uuid4().hex})
        self.producer.init_transactions(10)
        self.producer.begin_transaction()

    def send(self, topic: str, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            self.producer.produce(topic, body)
        assert self.producer.flush(10) == 0

    def commit(self) -> None:
        self.producer.commit_transaction(10)

    def abort(self) -> None:
        self.producer.abort_transaction(10)


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

    def __init__(self, server: OwnServer) -> None:
        self.server = server
        self.profile = {"hosts": [server.address], "options": {"message.timeout.ms": "6000", "socket.timeout.ms": "6000"}}
        self.common = {"bootstrap.servers": server.address, "allow.auto.create.topics": False, "log_level": 0}
        self.admin, self.frozen = AdminClient(self.common), False

    def make_topic(self, name: str, partitions: int, **wishes: Any) -> None:
        config = {"max.message.bytes": str(wishes["max_message_bytes"])} if "max_message_bytes" in wishes else {}
        if wishes.get("compacted"):
            config = {
                "cleanup.policy": "compact",
                "segment.ms": "100",
                "min.cleanable.dirty.ratio": "0.0",
                "delete.retention.ms": "0",
            }
        self.admin.create_topics([NewTopic(name, partitions, 1, config=config)])[name].result(10)
        deadline = time.monotonic() + 30
        while True:  # the answer comes before every part of the broker knows it
            found = self.admin.list_topics(timeout=10).topics.get(name)
            if found and found.error is None and all(p.leader >= 0 for p in found.partitions.values()):
                break
            assert time.monotonic() < deadline, f"Kafka did not make {name}"
            time.sleep(0.02)

    def snapshot(self) -> object:
        topics = self.admin.list_topics(timeout=10).topics
        places = [TopicPartition(t, p) for t, found in topics.items() if not t.startswith("__") for p in found.partitions]
        ends = self.admin.list_offsets(dict.fromkeys(places, OffsetSpec.latest())) if places else {}
        groups = sorted(group.group_id for group in self.admin.list_consumer_groups().result(10).valid)
        described = self.admin.describe_consumer_groups(groups) if groups else {}
        committed = {
            group: self.admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])[group].result(10)
            for group in groups
        }
        return (
            {(tp.topic, tp.partition): found.result(10).offset for tp, found in ends.items()},
            {group: sorted(m.member_id for m in found.result(10).members) for group, found in described.items()},
            {group: sorted((tp.topic, tp.partition, tp.offset) for tp in c.topic_partitions) for group, c in committed.items()},
        )

    def begin(self) -> OtherTransaction:
        return Transaction(self.common)

    def delete_before(self, topic: str, offsets: Mapping[int, int]) -> None:
        asked = [TopicPartition(topic, partition, offset) for partition, offset in offsets.items()]
        for done in self.admin.delete_records(asked).values():
            done.result(10)

    def compact(self, topic: str) -> None:
        quick = ConfigEntry("log.cleaner.backoff.ms", "100", incremental_operation=AlterConfigOpType.SET)
        for done in self.admin.incremental_alter_configs(
            [ConfigResource(ResourceType.BROKER, "1", incremental_configs=[quick])]
        ).values():
            done.result(10)
        time.sleep(0.2)  # longer than segment.ms: the next row begins a segment, and what lies before it can be compacted
        producer = Producer(self.common)
        producer.produce(topic, b"last", b"other")
        assert producer.flush(10) == 0
        consumer, deadline = Consumer({**self.common, "group.id": "none"}), time.monotonic() + 60
        try:
            while True:
                consumer.assign([TopicPartition(topic, 0, 0)])
                if (row := consumer.poll(5)) is not None and row.offset() > 0:
                    break
                assert time.monotonic() < deadline, "Kafka did not compact"
        finally:
            consumer.close()

    def break_reads(self) -> None:
        self.frozen = True
        os.kill(self.server.pid, signal.SIGSTOP)

    def provoke(self, state: str, topic: str) -> None:
        self.break_reads()

    def mend(self) -> None:
        if self.frozen:
            self.frozen = False
            os.kill(self.server.pid, signal.SIGCONT)
            name = uuid.uuid4().hex
            self.make_topic(name, 1)  # waits until it is back
            self.admin.delete_topics([name])[name].result(10)


@pytest.fixture(scope="module")
def harness() -> Iterator[KafkaHarness]:
    try:
        server = OwnServer("kafka")
    except ServerMissing as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))
    with server:
        yield KafkaHarness(server)


class TestMessages(Messages, on=KafkaHarness): ...


class TestRecords(Records, on=KafkaHarness): ...


class TestPublishing(Publishing, on=KafkaHarness): ...


class TestTails(Tails, on=KafkaHarness): ...


class TestLooking(Looking, on=KafkaHarness): ...


class TestContract(Contract, on=KafkaHarness): ...


class TestEnds(Ends, on=KafkaHarness): ...


class TestMessageStates(MessageStates, on=KafkaHarness): ...


class TestRecordStates(RecordStates, on=KafkaHarness): ...


class TestIdle(Idle, on=KafkaHarness): ...
