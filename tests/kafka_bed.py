"""A Kafka seen from outside our driver, and our driver on it."""

import asyncio
import contextlib
import itertools
import time
import uuid

from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, OffsetSpec, ResourceType
from confluent_kafka.cimpl import NewTopic

from broker_nb.backends.driver import COLUMNS, Entity, Family, Kind, Piece, TakeOptions
from broker_nb.backends.kafka.driver import KafkaDriver
from broker_nb.portable.host import ConnectionHost

RECORDS = TakeOptions(Family.RECORD)
ALL = 1 << 30


class Bed:
    """What an administrator and other people's programs do. Blocking."""

    def __init__(self, url):
        self.servers = url.removeprefix("kafka://")
        self.common = {"bootstrap.servers": self.servers, "allow.auto.create.topics": False, "log_level": 0}
        self.admin = AdminClient(self.common)
        self.producer = Producer(self.common | {"linger.ms": 0, "enable.idempotence": True})  # else a retried row comes late

    def topic(self, partitions=1, **config):
        name = f"t-{uuid.uuid4().hex[:12]}"
        config = {key.replace("_", "."): str(value) for key, value in config.items()}
        self.admin.create_topics([NewTopic(name, partitions, 1, config=config)])[name].result(10)
        return name

    def put(self, topic, *bodies, partition=0, producer=None, **more):
        failed = []
        producer = producer or self.producer
        for body in bodies:
            producer.produce(topic, body, partition=partition, on_delivery=lambda e, _: e and failed.append(e), **more)
        assert producer.flush(10) == 0
        assert not failed

    def transactional(self):
        producer = Producer(self.common | {"transactional.id": uuid.uuid4().hex})
        producer.init_transactions(10)
        return producer

    def delete_before(self, topic, offset, partition=0):
        for done in self.admin.delete_records([TopicPartition(topic, partition, offset)]).values():
            done.result(10)

    def topics(self):
        return set(self.admin.list_topics(timeout=10).topics)

    def groups(self):
        return {g.group_id for g in self.admin.list_consumer_groups().result(10).valid}

    def snapshot(self):
        """Ends of topics, members and positions of groups."""
        admin, topics = self.admin, self.admin.list_topics(timeout=10).topics
        places = [TopicPartition(t, p) for t, found in topics.items() if not t.startswith("__") for p in found.partitions]
        ends = admin.list_offsets(dict.fromkeys(places, OffsetSpec.latest())) if places else {}
        groups = sorted(self.groups())
        members = admin.describe_consumer_groups(groups) if groups else {}
        committed = {g: admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(g)])[g].result(10) for g in groups}
        return (
            {(tp.topic, tp.partition): found.result(10).offset for tp, found in ends.items()},
            {group: sorted(m.member_id for m in found.result(10).members) for group, found in members.items()},
            {group: sorted((tp.topic, tp.partition, tp.offset) for tp in c.topic_partitions) for group, c in committed.items()},
        )

    def await_compaction(self, topic):
        """Until rows of a topic are gone."""
        quick = ConfigEntry("log.cleaner.backoff.ms", "100", incremental_operation=AlterConfigOpType.SET)
        broker = ConfigResource(ResourceType.BROKER, "1", incremental_configs=[quick])
        self.admin.incremental_alter_configs([broker])[broker].result(10)
        consumer, deadline = Consumer(self.common | {"group.id": "none"}), time.monotonic() + 60
        while True:
            consumer.assign([TopicPartition(topic, 0, 0)])
            for expected in itertools.count():
                if (row := consumer.poll(5 if expected == 0 else 0.2)) is None:
                    break
                if row.offset() > expected:
                    return consumer.close()
            assert time.monotonic() < deadline, "Kafka did not compact"

    def member(self, group, **options):
        return Consumer(
            self.common | {"group.id": group, "auto.offset.reset": "earliest", "enable.auto.commit": False, **options}
        )


def run(coroutine, within=30.0):
    return asyncio.run(asyncio.wait_for(coroutine, within))


def topic(name):
    return Entity(Kind.TOPIC, name)


def group(name, of):
    return Entity(Kind.SUBSCRIPTION, name, of)


@contextlib.asynccontextmanager
async def driver(servers, **profile):
    """Our driver, with the events that it emitted as `driver.events`."""
    host = ConnectionHost("test")
    opened = await KafkaDriver.open({"hosts": servers.split(","), **profile}, host)
    opened.events = []
    host.listen(opened.events.append)
    try:
        yield opened
    finally:
        await opened.close()
        host.close()


class Seen:
    """What a look found."""

    def __init__(self):
        self.rows, self.reached, self.stopped, self.seconds = [], {}, {}, 0.0

    @property
    def data(self):
        return [row.data for row in self.rows]


async def look(opened, name, pieces=None, *, committed_only=True, within=10.0, max_rows=8192, max_bytes=ALL):
    """Read pieces (all of the topic by default) until each was proved or stopped."""
    if pieces is None:
        pieces = [Piece(b.partition, b.low, b.end) for b in await opened.bounds(topic(name), committed_only)]
    began, seen = time.monotonic(), Seen()
    browser = await opened.browse(topic(name), pieces, COLUMNS, committed_only, frozenset())
    waiting = {p.partition: p.end for p in pieces}
    try:
        while waiting:
            assert time.monotonic() - began < within, f"not proved: {waiting}, {seen.reached}"
            step = await browser.read(max_rows, max_bytes, 0.1)
            if step.batch:
                assert len(step.batch.rows) <= max_rows
                seen.rows += [step.batch.codec.envelope(row) for row in step.batch.rows]
            seen.reached |= step.reached
            seen.stopped |= step.stopped
            waiting = {p: end for p, end in waiting.items() if seen.reached.get(p, (-1,)) < end and p not in seen.stopped}
    finally:
        seen.seconds = time.monotonic() - began
        await browser.close()
    return seen


async def until_it_fails(call, within):
    """Call again and again; gives up after `within` seconds."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        await call()


async def pull(source, count, within=15.0):
    """Rows of a member until there are `count`, as envelopes."""
    rows, end = [], time.monotonic() + within
    while len(rows) < count:
        assert time.monotonic() < end, f"{len(rows)} of {count} rows"
        if batch := await source.pull(count - len(rows), ALL, 0.1):
            rows += [batch.codec.envelope(row) for row in batch.rows]
    return rows
