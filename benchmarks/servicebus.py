"""Service Bus: the vendor's loops, and ours, over a stand-in in a process of its own: peeking, taking with confirmed settlement, sending.

Run by `make bench`. BROKER_NB_BENCH_SERVICEBUS_ROWS and BROKER_NB_BENCH_ROUNDS make it shorter.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias
from urllib.parse import parse_qs, urlsplit

import pandas as pd
from azure.servicebus import ServiceBusMessage, ServiceBusReceivedMessage
from azure.servicebus import exceptions as client_errors
from azure.servicebus.aio import ServiceBusClient, ServiceBusReceiver, ServiceBusSender
from azure.servicebus.management import ServiceBusAdministrationClient
from common import ROUNDS, Table, body

import broker_nb
from broker_nb.backends.servicebus.catalogue import PlainHttp
from broker_nb.testing.servers import start

ROWS = int(os.environ.get("BROKER_NB_BENCH_SERVICEBUS_ROWS", "10000"))
BATCH = 500
KEY = "SharedAccessKeyName=RootManageSharedAccessKey;SharedAccessKey=SAS_KEY_VALUE;UseDevelopmentEmulator=true"
Work: TypeAlias = Callable[[Any], Coroutine[Any, Any, int]]
PEEK, TAKE, SEND = "raw peek_messages", "raw receive_messages + complete_message", "raw send_messages of batches"


class Raw:
    """The vendor's client with its handles open: opening and closing one takes seconds, and is not what is measured."""

    def __init__(self, connection: str, queue: str) -> None:
        self._runner = asyncio.Runner()
        client = ServiceBusClient.from_connection_string(connection)
        self.receiver, self.sender = client.get_queue_receiver(queue), client.get_queue_sender(queue)
        for handle in (self.receiver, self.sender):
            self._runner.run(handle.__aenter__())

    def way(self, work: Work, handle: object) -> Callable[[], int]:
        return lambda: self._runner.run(work(handle))

    def close(self) -> None:
        async def end() -> None:
            await asyncio.gather(self.receiver.close(), self.sender.close())

        self._runner.run(end())
        self._runner.close()


def properties(i: int) -> dict[str | bytes, Any]:
    return {"trace": f"{i:016d}", "source": "bench"}


async def raw_peek(receiver: ServiceBusReceiver) -> int:
    found: list[ServiceBusReceivedMessage] = []
    while page := await receiver.peek_messages(BATCH, sequence_number=(found[-1].sequence_number or 0) + 1 if found else 1):
        found += page
    return whole(len([b"".join(message.body) for message in found]))


async def raw_take(receiver: ServiceBusReceiver) -> int:
    done = 0
    while done < ROWS:
        for message in await receiver.receive_messages(min(BATCH, ROWS - done), 5):
            await receiver.complete_message(message)
            done += 1
    return whole(done)


async def raw_send(sender: ServiceBusSender) -> int:
    batch = await sender.create_message_batch()
    for i in range(ROWS):
        message = ServiceBusMessage(body(i), application_properties=properties(i))
        try:
            batch.add_message(message)
        except client_errors.MessageSizeExceededError:
            await sender.send_messages(batch)
            batch = await sender.create_message_batch()
            batch.add_message(message)
    await sender.send_messages(batch)
    return ROWS


def look(conn: broker_nb.Connection, queue: str) -> int:
    return whole(len(conn.sample(queue, "..end", decode="none")))


def take(conn: broker_nb.Connection, queue: str) -> int:
    done = 0
    while done < ROWS:
        frame = conn.consume(queue, "queue", n=min(BATCH, ROWS - done), decode="none")
        if not (settled := conn.ack(frame)).ok:
            raise SystemExit(repr(settled))
        done += len(frame)
    return whole(done)


def publish(conn: broker_nb.Connection, queue: str, frame: pd.DataFrame) -> int:
    if not (published := conn.publish(frame, to=queue)).ok:
        raise SystemExit(repr(published))
    return whole(len(published.frame))


def whole(count: int) -> int:
    if count != ROWS:
        raise SystemExit(f"{count:,} of {ROWS:,} rows")
    return count


def main() -> None:
    with start("servicebus") as server:
        connection = f"Endpoint=sb://{server.address};{KEY}"
        port = int(parse_qs(urlsplit(server.url).query)["administration_port"][0])
        administration = ServiceBusAdministrationClient.from_connection_string(connection, transport=PlainHttp(port))
        looks, takes, writes = Table(ROWS), Table(ROWS), Table(ROWS)
        conn = broker_nb.connect(server.url, name="bench")
        for _ in range(ROUNDS):
            raws, ours = (f"bench-{uuid.uuid4().hex[:8]}" for _ in range(2))
            for name in (raws, ours):
                administration.create_queue(name)
            raw = Raw(connection, raws)
            writes.round({SEND: raw.way(raw_send, raw.sender)})
            frame = conn.sample(raws, "..end", decode="none")[["attributes", "data"]]
            conn.publish(frame.head(1), to=ours, dry_run=True)  # opens the sender
            writes.rounds[-1] |= one(lambda q=ours, f=frame: publish(conn, q, f), "publish(frame)")
            looks.round({PEEK: raw.way(raw_peek, raw.receiver), "sample": lambda q=raws: look(conn, q)})
            whole(len(conn.consume(ours, "queue", n=1, timeout=5)) + ROWS - 1)  # opens the receiver
            conn.release(conn.held())
            takes.round({TAKE: raw.way(raw_take, raw.receiver), f"consume({BATCH}) + ack": lambda q=ours: take(conn, q)})
            raw.close()
        looks.show("Service Bus (stand-in) -> DataFrame, ~100 B JSON, two properties", (PEEK,))
        takes.show(f"Service Bus (stand-in) -> DataFrame -> completed, {BATCH} at a time", (TAKE,))
        writes.show("DataFrame -> Service Bus (stand-in), ~100 B, two properties", (SEND,))
        conn.close()
        administration.close()


def one(way: Callable[[], int], name: str) -> dict[str, float]:
    table = Table(ROWS)
    table.round({name: way})
    return table.rounds[0]


if __name__ == "__main__":
    main()
