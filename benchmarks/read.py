"""Reading Kafka into a frame: the raw client loop, the snippet that people paste, and ours, over one topic in one process.

Run by `make bench`. BROKER_NB_BENCH_ROWS and BROKER_NB_BENCH_ROUNDS make it shorter.
"""

from __future__ import annotations

import os
import statistics
import threading
import time

import pandas as pd
import psutil
from common import ROUNDS, Table, fill, kafka, make_topic, raw_consumer

import broker_nb
from broker_nb.portable.look import Look

ROWS = int(os.environ.get("BROKER_NB_BENCH_ROWS", "1000000"))
PARTITIONS = 4
NAIVE_ROWS = ROWS // 5
NAIVE, OURS = "naive: a dict per message", 'sample(decode="none")'
RAW_BATCHES = (500, 1000, 4000, 10_000)


def raw(address: str, topic: str, batch: int) -> int:
    consumer, n = raw_consumer(address, topic, PARTITIONS), 0
    while n < ROWS:
        n += len(consumer.consume(batch, 0.5))
    consumer.close()
    return n


def naive(address: str, topic: str) -> int:
    """What is pasted everywhere: poll, a dict per message, DataFrame at the end."""
    consumer, rows = raw_consumer(address, topic, PARTITIONS), []
    while len(rows) < NAIVE_ROWS:
        message = consumer.poll(0.5)
        if message is None or message.error():
            continue
        rows.append(
            {
                "topic": message.topic(),
                "partition": message.partition(),
                "offset": message.offset(),
                "timestamp": pd.Timestamp(message.timestamp()[1], unit="ms", tz="UTC"),
                "key": message.key(),
                "value": message.value(),
                "headers": message.headers(),
            }
        )
    frame = pd.DataFrame(rows)
    consumer.close()
    return len(frame)


def ours(conn: broker_nb.Connection, topic: str, decode: str) -> int:
    frame = conn.sample(topic, "..end", decode=decode)
    if len(frame) != ROWS or frame.attrs["complete"] is not True:
        raise SystemExit(f"read {len(frame)} of {ROWS}, complete={frame.attrs['complete']}")
    return len(frame)


def peak_memory(conn: broker_nb.Connection, topic: str) -> tuple[float, float]:
    """MB above the start at the peak of one read, and MB of the frame in Arrow."""
    process, peak, done = psutil.Process(), 0, threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    table = conn.sample(topic, "..end", decode="none", as_="arrow")
    done.set()
    watcher.join()
    return (peak - before) / 1e6, table.nbytes / 1e6


def first_look(conn: broker_nb.Connection, topic: str) -> float:
    """Milliseconds of a whole small look on a warm connection."""
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        conn.sample(topic, "-100")
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times)


def idle_end(conn: broker_nb.Connection, topic: str) -> float:
    """Milliseconds between a read's last batch and the proof that it was the last."""
    gaps, batches = [], Look.batches

    async def watched(self, *args, **kwargs):  # type: ignore[no-untyped-def] # a stand-in for one measurement
        last = None
        async for batch in batches(self, *args, **kwargs):
            yield batch
            last = time.perf_counter()
        gaps.append((time.perf_counter() - last) * 1000)

    Look.batches = watched  # type: ignore[method-assign] # undone below
    try:
        for _ in range(5):
            conn.sample(topic, "-10000/p")
    finally:
        Look.batches = batches  # type: ignore[method-assign] # as it was
    return statistics.median(gaps)


def main() -> None:
    with kafka() as address:
        topic = make_topic(address, PARTITIONS)
        fill(address, topic, PARTITIONS, ROWS)
        conn = broker_nb.connect(f"kafka://{address}", name="bench")
        conn.sample(topic, "-10")
        peak, size = peak_memory(conn, topic)
        table = Table(ROWS)
        names = tuple(f"raw consume({n})" for n in RAW_BATCHES)
        for _ in range(ROUNDS):
            table.round(
                {
                    **{name: lambda n=n: raw(address, topic, n) for name, n in zip(names, RAW_BATCHES, strict=True)},
                    NAIVE: lambda: naive(address, topic),
                    OURS: lambda: ours(conn, topic, "none"),
                    'sample(decode="json")': lambda: ours(conn, topic, "json"),
                }
            )
        table.show("Kafka -> DataFrame, ~100 B JSON, two headers, 4 partitions", names)
        print("sample against the naive way:", table.ratio(OURS, NAIVE))
        print(f"small look (-100) on a warm connection, whole: {first_look(conn, topic):.0f} ms")
        print(f"idle between the last rows and the proof of the end: {idle_end(conn, topic):.1f} ms")
        print(f"peak memory of a read: {peak:,.0f} MB above the start; the frame in Arrow: {size:,.0f} MB", end="; ")
        print(f"bound: twice the frame + 200 MB = {2 * size + 200:,.0f} MB")
        conn.close()


if __name__ == "__main__":
    main()
