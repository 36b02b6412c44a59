"""What a case works with: topics of its own, readers, looks; all closed and checked when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from broker_nb.adapters import Messages as MessageShapes
from broker_nb.adapters import Records as RecordShapes
from broker_nb.adapters import ack_all, commit_highest_offsets
from broker_nb.backends.driver import COLUMNS, Entity, Envelope, Family, Kind
from broker_nb.errors import BrokerError
from broker_nb.messages import Message, OutboundMessage, Published, Record
from broker_nb.portable.client import Client
from broker_nb.portable.look import Summary
from broker_nb.portable.loop import shared_loop
from broker_nb.portable.messages import MessageSubscription
from broker_nb.portable.publish import TopicPublisher
from broker_nb.portable.ranges import Range, parse_range
from broker_nb.portable.records import RecordSubscription
from broker_nb.testing.harness import Harness
from broker_nb.testing.watch import Watch

Item: TypeAlias = Message | Record
QUIET_S = 0.5
"""How long nothing must come for "nothing more comes"."""


class Reader:
    """One member of a subscription, of either family."""

    def __init__(
        self, client: Client, topic: str, name: str, opened: MessageSubscription | RecordSubscription, *, in_order: bool = True
    ) -> None:
        self.client, self.topic, self.name, self.opened, self._in_order = client, topic, name, opened, in_order
        self.since = time.monotonic()

    async def one(self, timeout: float | None) -> Item | None:
        """The next one; None when nothing came in time."""
        if isinstance(self.opened, MessageSubscription):
            return await self.opened.next_message(timeout)
        return await self.opened.next_record(timeout)

    @property
    def shapes(self) -> MessageShapes | RecordShapes:
        """Every other shape of pulling."""
        return MessageShapes(self.opened) if isinstance(self.opened, MessageSubscription) else RecordShapes(self.opened)

    async def batch(self, timeout: float, count: int = 500, age: float = 0.05) -> list[Item]:
        """The next batch; empty when nothing came in time."""
        return [*await self.opened.next_batch(timeout, count=count, age=age)]

    async def read(self, count: int, seconds: float = 20.0, *, done: bool = True) -> list[Item]:
        """At most `count` items, as many as come within `seconds`; acked or committed unless told otherwise.

        As they come; from a broker that promises no order, as they were sent.
        """
        items: list[Item] = []
        end = time.monotonic() + seconds
        while len(items) < count and (left := end - time.monotonic()) > 0:
            got = await self.batch(left, count - len(items))
            if done:
                await finish(got)
            items += got
        return items if self._in_order else sorted(items, key=lambda item: item.publish_time_ns or 0)

    async def rest(self, seconds: float = QUIET_S) -> list[Item]:
        """What comes although nothing should; acked or committed."""
        got = await self.batch(seconds)
        await finish(got)
        return got

    async def close(self) -> None:
        """Leave."""
        await self.client.unsubscribe(self.topic, self.name)


async def finish(items: Collection[Item]) -> None:
    """Ack messages, commit records."""
    await ack_all(*(item for item in items if isinstance(item, Message)))
    await commit_highest_offsets(item for item in items if isinstance(item, Record))


class Looked(NamedTuple):
    """What a look showed."""

    rows: list[Envelope]
    summary: Summary
    seconds: float

    @property
    def bodies(self) -> list[bytes | None]:
        """The rows' bodies, in order."""
        return [row.data for row in self.rows]


class Bench:
    """The server and the connection of one case."""

    def __init__(self, harness: Harness, client: Client, watch: Watch, family: Family | None) -> None:
        self.harness, self.client, self.watch = harness, client, watch
        self.capabilities = client.driver.capabilities
        self.family = family or next(f for f in Family if f in self.capabilities.families)
        self.silent: Reader | None = None  # for an idle suite: a subscription on which nothing happened since `since`
        self._ordered: set[str] = set()  # topics that were made so
        self._id = uuid.uuid4().hex[:8]
        self._count = 0
        self._closing: list[Callable[[], Awaitable[object]]] = []

    def run(self, body: Coroutine[Any, Any, None], seconds: float) -> None:
        """The case itself, then its clean-up, then the rules of the contract."""

        async def bounded() -> None:
            try:
                async with asyncio.timeout(seconds):
                    await body
            finally:
                await asyncio.to_thread(self.harness.mend)
                for close in reversed(self._closing):
                    async with asyncio.timeout(20):
                        await close()

        self.watch.broken.clear()
        self.watch.seen.clear()
        shared_loop().run(bounded())
        assert not self.watch.broken, "\n".join(self.watch.broken[:20])
        denied = [state for state in self.watch.seen if self.harness.missing(state)]
        assert not denied, f"{denied}: produced, although the harness says that it cannot be"

    def name(self, what: str) -> str:
        """A name that nothing has yet."""
        self._count += 1
        return f"{what}-{self._id}-{self._count}"

    async def topic(self, partitions: int = 1, **wishes: Any) -> str:
        """A new topic, made out of band."""
        topic = await asyncio.to_thread(self.harness.make_topic, partitions, **wishes)
        if wishes.get("ordered"):
            self._ordered.add(topic)
        return topic

    async def subscription(self, topic: str, name: str | None = None) -> str:
        """The name of a subscription that gets everything since its topic was made."""
        return await asyncio.to_thread(self.harness.subscription, topic, name or self.name("sub"))

    async def connect(self) -> Client:
        """One more connection, watched as the first."""
        client = await self.harness.open()
        self._closing.append(client.close)
        self.watch.driver(client.driver)
        return client

    # -------------------------------------------------------------- writing
    async def publisher(self, topic: str) -> TopicPublisher:
        """A publisher with a sender of its own."""
        client = self.client
        opened = TopicPublisher(topic, lambda: client.driver.sender(Entity(Kind.TOPIC, topic), {}), lambda: None)
        self._closing.append(opened.close)
        await opened.start()
        return opened

    async def publish(self, topic: str, messages: Iterable[OutboundMessage | bytes]) -> list[Published]:
        """Publish, every message accepted."""
        rows = [m if isinstance(m, OutboundMessage) else OutboundMessage(m) for m in messages]
        results = await (await self.client.topic(topic)).batch_publish(*rows)
        assert [r.state for r in results] == ["accepted"] * len(rows), next(r for r in results if not r.ok)
        return results

    # -------------------------------------------------------------- taking
    async def reader(
        self,
        topic: str,
        name: str | None = None,
        *,
        family: Family | None = None,
        client: Client | None = None,
        start: str = "earliest",
        max_held: int = 10_000,
    ) -> Reader:
        """A member of a subscription, which is made where it is not there."""
        client, name = client or self.client, await self.subscription(topic, name)
        opened = await client.subscribe(
            topic,
            name,
            family=family or self.family,
            create=True,
            join=True,
            start=start,
            max_held=max_held,
            native=self.harness.native(topic),
        )
        in_order = topic in self._ordered or not self.harness.missing("order")
        reader = Reader(client, topic, name, opened, in_order=in_order)
        self._closing.append(reader.close)
        return reader

    # -------------------------------------------------------------- looking
    async def look(
        self,
        topic: str,
        asked: str | Range = "..end",
        *,
        committed_only: bool = True,
        partitions: Collection[int] | None = None,
        timeout: float = 20.0,
    ) -> Looked:
        """Read a range to its end."""
        began = time.monotonic()
        look = await self.client.look(
            topic,
            parse_range(asked) if isinstance(asked, str) else asked,
            want=COLUMNS,
            committed_only=committed_only,
            partitions=partitions,
        )
        rows: list[Envelope] = []
        async with contextlib.aclosing(look.batches(timeout)) as batches:
            async for batch in batches:
                rows += map(batch.codec.envelope, batch.rows)
        return Looked(rows, look.summary, time.monotonic() - began)

    async def snapshot(self) -> object:
        """What is on the server, seen from outside."""
        return await asyncio.to_thread(self.harness.snapshot)


def bodies(items: Iterable[Item | Envelope]) -> list[bytes | None]:
    """The bodies, in order."""
    return [item.data for item in items]


def in_any_order(items: Iterable[Item | Envelope]) -> list[bytes]:
    """The bodies, sorted."""
    return sorted(item.data for item in items if item.data is not None)


def numbered(count: int, prefix: str = "m") -> list[bytes]:
    """That many different bodies."""
    return [f"{prefix}{i:06}".encode() for i in range(count)]


async def refusal(call: Awaitable[object]) -> BrokerError:
    """The BrokerError that a call ends in."""
    try:
        result = await call
    except BrokerError as error:
        return error
    raise AssertionError(f"no error, but {result!r}")


async def until(check: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        await asyncio.sleep(0.02)


def spread(items: Sequence[bytes], parts: int) -> list[list[bytes]]:
    """The items dealt to so many."""
    return [list(items[i::parts]) for i in range(parts)]
