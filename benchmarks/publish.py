"""Publishing a frame to Kafka: the raw produce loop that keeps a result per row, and ours.

Run by `make bench`. BROKER_NB_BENCH_PUBLISH_ROWS and BROKER_NB_BENCH_ROUNDS make it shorter.
"""

from __future__ import annotations

import os

import pandas as pd
from common import ROUNDS, Table, body, kafka, make_topic
from confluent_kafka import Producer

import broker_nb

ROWS = int(os.environ.get("BROKER_NB_BENCH_PUBLISH_ROWS", "200000"))
PARTITIONS = 4
RAW = "raw produce, a result per row"
Rows = list[tuple[bytes, bytes, list[tuple[str, bytes]]]]


def raw(address: str, topic: str, rows: Rows) -> int:
    """Lists that are already there, a callback per row, the partition and offset of each kept."""
    settings = {
        "bootstrap.servers": address,
        "enable.idempotence": True,
        "linger.ms": 5,
        "queue.buffering.max.messages": 1_000_000,
    }
    producer, results = Producer(settings), [None] * len(rows)

    def keep(i):  # type: ignore[no-untyped-def] # the snippet as people write it
        def told(error, message):  # type: ignore[no-untyped-def] # as in the snippet
            results[i] = (error, message.partition(), message.offset())

        return told

    for i, (data, key, headers) in enumerate(rows):
        producer.produce(topic, data, key=key, headers=headers, on_delivery=keep(i))
        if i % 1000 == 0:
            producer.poll(0)
    if producer.flush(120) or any(r is None or r[0] for r in results):
        raise SystemExit("the raw loop did not deliver everything")
    return len(rows)


def ours(conn: broker_nb.Connection, topic: str, frame: pd.DataFrame) -> int:
    published = conn.publish(frame, to=topic)
    if not published.ok:
        raise SystemExit(repr(published))
    return len(published.frame)


def main() -> None:
    with kafka() as address:
        topic = make_topic(address, PARTITIONS)
        rows: Rows = [(body(i), b"cust-%d" % (i % 5000), [("trace", b"%016d" % i), ("source", b"bench")]) for i in range(ROWS)]
        conn = broker_nb.connect(f"kafka://{address}", name="bench")
        raw(address, topic, rows)
        frame = conn.sample(topic, "..end", decode="none")[["key", "attributes", "data"]]
        table = Table(ROWS)
        for _ in range(ROUNDS):
            table.round(
                {
                    "raw produce, a result per row": lambda: raw(address, topic, rows),
                    "publish(frame)": lambda: ours(conn, topic, frame),
                }
            )
        table.show("DataFrame -> Kafka, ~100 B, key, two headers, acks=all, idempotent", (RAW,))
        conn.close()


if __name__ == "__main__":
    main()
