"""Looking changes nothing: what a second client could see is the same before and after."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from broker_nb.backends.driver import COLUMNS, Entity, Kind, Piece
from broker_nb.errors import ErrorKind
from broker_nb.messages import OutboundMessage
from broker_nb.portable.client import Client
from broker_nb.portable.ranges import Range, Time, parse_range
from broker_nb.testing.bench import Bench, numbered, refusal
from broker_nb.testing.harness import Suite, case


class Looking(Suite):
    """Every way to look, beside subscriptions that have read, committed and hold something."""

    @case(seconds=60)
    async def test_nothing_changes(self, bench: Bench) -> None:
        """Sample, time ranges, follow, describe, catalogue and backlog leave topics, groups, positions, members and counts alone."""
        topic, name = await bench.topic(partitions=3), bench.name("sub")
        await bench.publish(topic, [OutboundMessage(body, body) for body in numbered(100)])
        readers = [await bench.reader(topic, f"{name}-{family.value}", family=family) for family in bench.capabilities.families]
        for reader in readers:
            await reader.read(10)
            await reader.read(10, done=False)
        before = await bench.snapshot()
        client = await bench.connect()
        await every_look(bench, client, topic, [reader.name for reader in readers])
        assert await bench.snapshot() == before, "while the second connection is open"
        await client.close()
        assert await bench.snapshot() == before
        for reader in readers:  # and those who take are not disturbed
            assert len(await reader.read(10)) == 10

    @case()
    async def test_a_missing_topic_is_not_made(self, bench: Bench) -> None:
        """Facts, look and backlog of a topic that is not there: NOT_FOUND, at once, naming it, and it is still not there."""
        before, missing = await bench.snapshot(), bench.name("missing")
        entity = Entity(Kind.TOPIC, missing)
        driver = bench.client.driver
        subscription = Entity(Kind.SUBSCRIPTION, "nobody", missing)

        async def browse() -> None:
            look = await driver.browse(entity, [Piece(0, (0,), (1,))], COLUMNS, True, frozenset())
            try:
                while True:
                    await look.read(1, 1000, bench.capabilities.slice_s)
            finally:
                await look.close()

        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: bench.client.facts(entity),
            lambda: bench.look(missing),
            lambda: driver.facts(entity),
            lambda: driver.facts(subscription),
            lambda: driver.bounds(entity, True),
            lambda: driver.backlog(subscription),
            browse,
        ]
        for call in calls:
            began = time.monotonic()
            error = await refusal(call())
            assert error.kind is ErrorKind.NOT_FOUND, error
            assert missing in str(error)
            assert time.monotonic() - began < 5
        assert await bench.snapshot() == before

    @case()
    async def test_a_missing_subscription_is_not_made(self, bench: Bench) -> None:
        """Facts and backlog of a subscription that nobody used make none."""
        topic, nobody = await bench.topic(), bench.name("nobody")
        before = await bench.snapshot()
        entity = Entity(Kind.SUBSCRIPTION, nobody, topic)
        if bench.capabilities.implicit_subscriptions:
            assert (await bench.client.facts(entity)).members in (0, None)
            assert all(line.committed is None for line in await bench.client.backlog(topic, nobody))
        else:
            assert (await refusal(bench.client.facts(entity))).kind is ErrorKind.NOT_FOUND
        assert await bench.snapshot() == before

    @case("look_effects")
    async def test_an_effect_that_was_not_allowed(self, bench: Bench) -> None:
        """A look that would change something is refused and names what; allowed by name, it works."""
        topic = await bench.topic(look_effects=True)
        effects = (await bench.client.facts(Entity(Kind.TOPIC, topic))).look.effects
        assert effects
        before = await bench.snapshot()
        error = await refusal(bench.look(topic))
        assert error.kind is ErrorKind.UNSUPPORTED
        assert all(effect.name.lower() in str(error) for effect in effects)
        assert await bench.snapshot() == before
        look = await bench.client.look(topic, parse_range("..end"), want=COLUMNS, allow=effects)
        assert [batch async for batch in look.batches(20)] == []

    @case("look")
    async def test_rows_are_shown_as_sent(self, bench: Bench) -> None:
        """A look shows body, key, attributes, partition and place as they were accepted, and a time."""
        topic = await bench.topic(partitions=2)
        sent = [OutboundMessage(b"%d" % i, b"k%d" % i, {"n": str(i)}) for i in range(20)]
        published = await bench.publish(topic, sent)
        shown = {row.data: row for row in (await bench.look(topic)).rows}
        assert len(shown) == 20
        for message, result in zip(sent, published, strict=True):
            row = shown[message.data]
            assert (row.topic, row.key, row.time_is in ("server", "producer")) == (topic, message.key, True)
            assert [(a.name, a.value) for a in row.attributes] == [(a.name, a.value) for a in message.attributes]
            assert abs((row.publish_time_ns or 0) - time.time_ns()) < 3600e9
            assert result.partition in (None, row.partition)
            assert result.offset in (None, *row.position)


async def every_look(bench: Bench, client: Client, topic: str, subscriptions: list[str]) -> None:
    """Look in every way that there is, by a connection of its own."""
    entity = Entity(Kind.TOPIC, topic)
    found = await client.entities(topic)
    assert topic in {e.name for e in found if e.kind in (Kind.TOPIC, Kind.QUEUE)}
    await client.entities()
    (summary,) = await client.summaries([entity])
    assert summary.messages in (None, 90, 100)  # what is settled leaves a queue
    facts = await client.facts(entity, fresh=True)
    assert len(facts.partitions) == (1 if bench.harness.missing("partitions") else 3)
    for name in subscriptions:
        await client.facts(Entity(Kind.SUBSCRIPTION, name, topic))
        await client.backlog(topic, name)
    if bench.harness.missing("look"):
        return
    other = Bench(bench.harness, client, bench.watch, None)
    now = time.time_ns()
    for asked in ("..end", "-10", "+10", "5..9", Range("", Time(now - 10**12), Time(now)), Range("", Time(now))):
        for committed_only in (True, False):
            await other.look(topic, asked, committed_only=committed_only)
    follow = await client.driver.browse(
        entity,
        [Piece(b.partition, b.end or b.low, None) for b in await client.driver.bounds(entity, True)],
        COLUMNS,
        True,
        frozenset(),
    )
    await asyncio.gather(follow.read(10, 1000, min(0.2, client.driver.capabilities.slice_s)))
    await follow.close()
