"""Pub/Sub: the client's own loops, and ours, against Google's fake server: taking with acks, publishing with an id per message.

Run by `make bench`. BROKER_NB_BENCH_PUBSUB_ROWS and BROKER_NB_BENCH_ROUNDS make it shorter.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import grpc
import pandas as pd
from common import ROUNDS, Table, body
from google.cloud import pubsub_v1
from google.pubsub_v1 import PublisherAsyncClient, PublisherClient, SubscriberAsyncClient, SubscriberClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport, PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport, SubscriberGrpcTransport

import broker_nb
from broker_nb.testing.servers import start

ROWS = int(os.environ.get("BROKER_NB_BENCH_PUBSUB_ROWS", "20000"))
BATCH = 1000
PATH = "projects/broker-nb"
Rows: TypeAlias = list[tuple[bytes, dict[str, str]]]
Work: TypeAlias = Callable[[grpc.aio.Channel], Coroutine[Any, Any, int]]
PULL = "raw pull + acknowledge, on asyncio"
FUTURES, REQUESTS = "raw publish, a future per message", "raw publish requests of 1,000, on asyncio"


def plain(work: Work, address: str) -> int:
    """`work` on a channel of its own."""

    async def run() -> int:
        async with grpc.aio.insecure_channel(address) as channel:
            return await work(channel)

    return asyncio.run(run())


def raw_take(subscription: str) -> Work:
    """Pull, look at each message's body, acknowledge."""

    async def work(channel: grpc.aio.Channel) -> int:
        client = SubscriberAsyncClient(transport=SubscriberGrpcAsyncIOTransport(channel=channel))
        path, done, size = f"{PATH}/subscriptions/{subscription}", 0, 0
        while done < ROWS:
            answer = await client.pull(subscription=path, max_messages=BATCH)
            size += sum(len(received.message.data) for received in answer.received_messages)
            ack_ids = [received.ack_id for received in answer.received_messages]
            await client.acknowledge(subscription=path, ack_ids=ack_ids)
            done += len(ack_ids)
        return whole(done)

    return work


def raw_requests(topic: str, rows: Rows) -> Work:
    async def work(channel: grpc.aio.Channel) -> int:
        client, ids = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel)), []
        for at in range(0, len(rows), BATCH):
            messages = [pubsub_v1.types.PubsubMessage(data=data, attributes=a) for data, a in rows[at : at + BATCH]]
            ids += (await client.publish(topic=f"{PATH}/topics/{topic}", messages=messages)).message_ids
        return whole(len(ids))

    return work


def raw_futures(address: str, topic: str, rows: Rows) -> int:
    """What the client's documentation shows."""
    os.environ["PUBSUB_EMULATOR_HOST"] = address
    try:
        client = pubsub_v1.PublisherClient()
        futures = [client.publish(f"{PATH}/topics/{topic}", data, **attributes) for data, attributes in rows]
        ids = [future.result(60) for future in futures]
        client.stop()
    finally:
        del os.environ["PUBSUB_EMULATOR_HOST"]
    return whole(len(ids))


def take(conn: broker_nb.Connection, name: str) -> pd.DataFrame:
    frames: list[pd.DataFrame] = []
    while sum(map(len, frames)) < ROWS:
        frames.append(conn.consume(name, name, n=BATCH, decode="none"))
        if not (settled := conn.ack(frames[-1])).ok:
            raise SystemExit(repr(settled))
    return pd.concat(frames, ignore_index=True)


def publish(conn: broker_nb.Connection, topic: str, frame: pd.DataFrame) -> int:
    published = conn.publish(frame, to=topic)
    if not published.ok:
        raise SystemExit(repr(published))
    return whole(len(published.frame))


def whole(count: int) -> int:
    if count != ROWS:
        raise SystemExit(f"{count:,} of {ROWS:,} rows")
    return count


class Topics:
    """Topics, filled outside of what is measured."""

    def __init__(self, address: str) -> None:
        channel = grpc.insecure_channel(address)
        self.publisher = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        self.subscriber = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
        self.plain = self.make()

    def make(self) -> str:
        name = f"bench-{uuid.uuid4().hex[:8]}"
        self.publisher.create_topic(name=f"{PATH}/topics/{name}")
        return name

    def filled(self, rows: Rows) -> str:
        """A topic with a subscription of the same name."""
        name = self.make()
        self.subscriber.create_subscription(
            name=f"{PATH}/subscriptions/{name}", topic=f"{PATH}/topics/{name}", ack_deadline_seconds=60
        )
        for at in range(0, len(rows), BATCH):
            messages = [{"data": data, "attributes": attributes} for data, attributes in rows[at : at + BATCH]]
            self.publisher.publish(topic=f"{PATH}/topics/{name}", messages=messages)
        return name


def main() -> None:
    rows = [(body(i), {"trace": f"{i:016d}", "source": "bench"}) for i in range(ROWS)]
    with start("pubsub") as server:
        topics, conn = Topics(server.address), broker_nb.connect(server.url, name="bench")
        frame = take(conn, topics.filled(rows))[["attributes", "data"]]
        takes, writes = Table(ROWS), Table(ROWS)
        for _ in range(ROUNDS):
            one, two = topics.filled(rows), topics.filled(rows)
            takes.round(
                {
                    PULL: lambda one=one: plain(raw_take(one), server.address),  # type: ignore[misc] # bound now
                    f"consume({BATCH}) + ack": lambda two=two: whole(len(take(conn, two))),  # type: ignore[misc] # bound now
                }
            )
            writes.round(
                {
                    FUTURES: lambda: raw_futures(server.address, topics.plain, rows),
                    REQUESTS: lambda: plain(raw_requests(topics.plain, rows), server.address),
                    "publish(frame)": lambda: publish(conn, topics.plain, frame),
                }
            )
        takes.show(f"Pub/Sub -> DataFrame -> acked, {BATCH} at a time", (PULL,))
        writes.show("DataFrame -> Pub/Sub, ~100 B, two attributes", (FUTURES, REQUESTS))
        conn.close()


if __name__ == "__main__":
    main()
