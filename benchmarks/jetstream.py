"""NATS JetStream: nats-py's own loops, and ours, over one stream in one process: looking, taking with confirmed acks, publishing.

Run by `make bench`. BROKER_NB_BENCH_NATS_ROWS and BROKER_NB_BENCH_ROUNDS make it shorter.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import nats
import pandas as pd
from common import ROUNDS, Table, body
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig

import broker_nb
from broker_nb.testing.servers import start

ROWS = int(os.environ.get("BROKER_NB_BENCH_NATS_ROWS", "100000"))
PAGES = (500, 1000, 4000)
BATCH, WINDOW = 500, 4000
Work: TypeAlias = Callable[[Client], Coroutine[Any, Any, int]]
LOOK = "raw batched direct get({})"
TAKE, CORE_TAKE, UNCONFIRMED = "raw fetch + ack_sync", "raw fetch + acks confirmed to one inbox", "raw fetch + acks sent only"
PUBLISH, CORE_PUBLISH = "raw publish_async", "raw publish, answers to one inbox"


def plain(work: Work, address: str) -> int:
    """`work` on a connection of its own."""

    async def run() -> int:
        connection = await nats.connect(f"nats://{address}")
        try:
            return await work(connection)
        finally:
            await connection.close()

    return asyncio.run(run())


def raw_look(stream: str, page: int) -> Work:
    """A request per page, its answers to a callback, until the page's status frame."""

    async def work(connection: Client) -> int:
        inbox, found, over = connection.new_inbox(), [], asyncio.Event()

        async def take(message: Msg) -> None:
            if message.headers and message.headers.get("Status"):
                over.set()
            else:
                found.append(message)

        await connection.subscribe(inbox, cb=take, pending_bytes_limit=1 << 30)
        for first in range(1, ROWS + 1, page):
            over.clear()
            asked = json.dumps({"seq": first, "batch": min(page, ROWS + 1 - first)}).encode()
            await connection.publish(f"$JS.API.DIRECT.GET.{stream}", asked, reply=inbox)
            await over.wait()
        return whole(len(found))

    return work


class Answers:
    """One inbox for the answers to many requests; at most so many are under way."""

    def __init__(self, connection: Client) -> None:
        self.connection, self.inbox, self.sent = connection, connection.new_inbox(), 0
        self.came: list[Msg] = []
        self.news = asyncio.Event()

    async def open(self) -> None:
        await self.connection.subscribe(f"{self.inbox}.*", cb=self.take)

    async def take(self, message: Msg) -> None:
        self.came.append(message)
        self.news.set()

    async def ask(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        await self.connection.publish(subject, data, f"{self.inbox}.{self.sent}", headers)
        self.sent += 1
        await self.until(WINDOW)

    async def until(self, open_: int) -> None:
        while self.sent - len(self.came) > open_:
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), 10)


def raw_take(stream: str, way: str) -> Work:
    """Fetch by the batch; the acks of a batch go out together."""

    async def work(connection: Client) -> int:
        js, name, done, answers = connection.jetstream(), consumer(), 0, Answers(connection)
        await answers.open()
        config = ConsumerConfig(name=name, durable_name=name, max_ack_pending=BATCH * 4)
        taken = await js.pull_subscribe("", name, stream=stream, config=config)
        while done < ROWS:
            messages = await taken.fetch(min(BATCH, ROWS - done))
            if way == CORE_TAKE:
                for message in messages:
                    await answers.ask(message.reply, b"+ACK")
                await answers.until(0)
            else:
                await asyncio.gather(*(m.ack_sync(timeout=10) if way == TAKE else m.ack() for m in messages))
            done += len(messages)
        await js.delete_consumer(stream, name)
        return whole(done)

    return work


def raw_publish(subject: str, rows: list[tuple[bytes, dict[str, str]]]) -> Work:
    """Lists that are already there; the sequence of each row is kept."""

    async def work(connection: Client) -> int:
        js = connection.jetstream()
        waiting = [await js.publish_async(subject, data, headers=headers, wait_stall=10) for data, headers in rows]
        return whole(len([ack.seq for ack in await asyncio.gather(*waiting)]))

    return work


def raw_core_publish(subject: str, rows: list[tuple[bytes, dict[str, str]]]) -> Work:
    """As above, with no future per row."""

    async def work(connection: Client) -> int:
        answers, sequences = Answers(connection), [0] * len(rows)
        await answers.open()
        for data, headers in rows:
            await answers.ask(subject, data, headers)
        await answers.until(0)
        for answer in answers.came:
            sequences[int(answer.subject.rpartition(".")[2])] = json.loads(answer.data)["seq"]
        return whole(len({*sequences}))

    return work


def consumer() -> str:
    return f"bench-{uuid.uuid4().hex[:8]}"


def look(conn: broker_nb.Connection, stream: str, decode: str) -> int:
    frame = conn.sample(stream, "..end", decode=decode)
    if frame.attrs["complete"] is not True:
        raise SystemExit(frame.attrs["summary"])
    return whole(len(frame))


def take(conn: broker_nb.Connection, stream: str) -> int:
    name, done = consumer(), 0
    while done < ROWS:
        frame = conn.consume(stream, subscription=name, create=True, n=min(BATCH, ROWS - done), decode="none")
        if not (settled := conn.ack(frame)).ok:
            raise SystemExit(repr(settled))
        done += len(frame)
    return whole(done)


def publish(conn: broker_nb.Connection, subject: str, frame: pd.DataFrame) -> int:
    published = conn.publish(frame, to=subject)
    if not published.ok:
        raise SystemExit(repr(published))
    return whole(len(published.frame))


def whole(count: int) -> int:
    if count != ROWS:
        raise SystemExit(f"{count:,} of {ROWS:,} rows")
    return count


async def make(connection: Client, *streams: str) -> int:
    for stream in streams:
        await connection.jetstream().add_stream(name=stream, subjects=[stream.lower()], allow_direct=True)
    return len(streams)


def main() -> None:
    rows = [(body(i), {"trace": f"{i:016d}", "source": "bench"}) for i in range(ROWS)]
    with start("nats") as server:

        def raw(work: Work) -> Callable[[], int]:
            return lambda: plain(work, server.address)

        raw(lambda connection: make(connection, "READ", "WRITE"))()
        raw(raw_publish("read", rows))()
        conn = broker_nb.connect(server.url, name="bench")
        frame = conn.sample("READ", "..end", decode="none")[["attributes", "data"]]
        looks, takes, writes = Table(ROWS), Table(ROWS), Table(ROWS)
        for _ in range(ROUNDS):
            looks.round(
                {
                    **{LOOK.format(page): raw(raw_look("READ", page)) for page in PAGES},
                    'sample(decode="none")': lambda: look(conn, "READ", "none"),
                    'sample(decode="json")': lambda: look(conn, "READ", "json"),
                }
            )
            takes.round(
                {
                    **{way: raw(raw_take("READ", way)) for way in (TAKE, CORE_TAKE, UNCONFIRMED)},
                    f"consume({BATCH}) + ack, confirmed": lambda: take(conn, "READ"),
                }
            )
            writes.round(
                {
                    PUBLISH: raw(raw_publish("write", rows)),
                    CORE_PUBLISH: raw(raw_core_publish("write", rows)),
                    "publish(frame)": lambda: publish(conn, "write", frame),
                }
            )
        looks.show("JetStream -> DataFrame, ~100 B JSON, two headers", tuple(map(LOOK.format, PAGES)))
        takes.show(f"JetStream -> DataFrame -> acked, {BATCH} at a time", (TAKE, CORE_TAKE))
        writes.show("DataFrame -> JetStream, ~100 B, two headers, stored in a file", (PUBLISH, CORE_PUBLISH))
        conn.close()


if __name__ == "__main__":
    main()
