"""What the benchmarks share: a table of ratios measured side by side, the body of a row; a real Kafka and a filled topic."""

from __future__ import annotations

import json
import os
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from broker_nb.testing.servers import start

ROUNDS = int(os.environ.get("BROKER_NB_BENCH_ROUNDS", "3"))


@contextmanager
def kafka() -> Iterator[str]:
    """The address of a real Kafka."""
    with start("kafka") as server:
        yield server.address


def make_topic(address: str, partitions: int) -> str:
    name = f"bench-{uuid.uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": address})
    for future in admin.create_topics([NewTopic(name, partitions, 1)]).values():
        future.result(30)
    return name


def body(i: int) -> bytes:
    """A JSON document of about 100 B."""
    status = "failed" if i % 23 == 0 else "ok"
    text = json.dumps(
        {"order_id": 9007199254740993 + i, "status": status, "amount": i % 977 / 4, "currency": "EUR", "note": "x" * 12}
    )
    return text.encode()


def fill(address: str, topic: str, partitions: int, rows: int) -> None:
    producer = Producer({"bootstrap.servers": address, "linger.ms": 20, "queue.buffering.max.messages": 1_000_000})
    for i in range(rows):
        while True:
            try:
                headers = [("trace", b"%016d" % i), ("source", b"bench")]
                producer.produce(topic, body(i), key=b"cust-%d" % (i % 5000), headers=headers, partition=i % partitions)
                break
            except BufferError:
                producer.poll(0.05)
        if i % 1000 == 0:
            producer.poll(0)
    if producer.flush(120):
        raise SystemExit("filling the topic did not finish within 120 s")


def raw_consumer(address: str, topic: str, partitions: int) -> Consumer:
    """The client at its best setting for a bounded read."""
    consumer = Consumer(
        {
            "bootstrap.servers": address,
            "group.id": "bench-raw",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 20,
            "queued.min.messages": 1_000_000,
            "queued.max.messages.kbytes": 262_144,
            "fetch.message.max.bytes": 16_777_216,
        }
    )
    consumer.assign([TopicPartition(topic, p, 0) for p in range(partitions)])
    return consumer


class Table:
    """Seconds per way and round; printed as rates and as ratios to the first way, within each round."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.rounds: list[dict[str, float]] = []

    def round(self, ways: dict[str, Callable[[], int]]) -> None:
        """Run every way once. A way returns how many rows it handled, so that one that handles fewer can be compared."""
        seconds = {}
        for name, way in ways.items():
            begin = time.perf_counter()
            handled = way()
            seconds[name] = (time.perf_counter() - begin) / handled * self.rows
        self.rounds.append(seconds)

    def show(self, title: str, ceiling: tuple[str, ...]) -> None:
        """The median and the spread of each way's share of the fastest of `ceiling`, round by round."""
        print(f"\n{title} ({self.rows:,} rows, {len(self.rounds)} rounds, rates in rows/s)")
        print(f"{'':44}{'rate':>12}{'of the raw ceiling':>22}{'spread':>16}")
        for name in self.rounds[0]:
            rates = [self.rows / r[name] for r in self.rounds]
            ratios = [min(r[c] for c in ceiling) / r[name] for r in self.rounds]
            print(
                f"{name:44}{statistics.median(rates):>12,.0f}{statistics.median(ratios):>22.2f}{min(ratios):>9.2f}-{max(ratios):.2f}"
            )

    def ratio(self, way: str, other: str) -> str:
        ratios = [r[other] / r[way] for r in self.rounds]
        return f"{statistics.median(ratios):.1f}x ({min(ratios):.1f}-{max(ratios):.1f})"
