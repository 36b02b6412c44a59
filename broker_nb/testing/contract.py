"""The rules of the driver contract that no other suite looks at; those that hold in every call are in `watch`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from broker_nb.backends.driver import (
    COLUMNS,
    Batch,
    Browser,
    Digest,
    Entity,
    Family,
    Kind,
    Piece,
    Position,
    Settlement,
    Source,
    Step,
    TakeOptions,
    Verdict,
)
from broker_nb.errors import ErrorKind
from broker_nb.messages import OutboundMessage
from broker_nb.testing.bench import Bench, numbered, refusal
from broker_nb.testing.harness import Suite, case
from broker_nb.testing.watch import disagreements

CLOSE_S = 2.0
TRICKLE = 20


class Contract(Suite):
    """The driver's handles, called directly."""

    @case()
    async def test_columns_and_envelopes_agree(self, bench: Bench) -> None:
        """Row by row the same values, for every kind of row that the broker has, seen by a look and taken by every family."""
        topic = await bench.topic(partitions=2)
        able = bench.capabilities
        sent = [OutboundMessage(b"\xff\0", None, {"a": "1"}), OutboundMessage(b"x" * 1000, b"key")]
        sent += [OutboundMessage(b"", b"") if able.null_key_is_not_empty else OutboundMessage(b"", b"key", {"a": "1"})]
        sent += [OutboundMessage(None, b"key")] if able.null_data else []
        sent += [OutboundMessage(b"x", b"\xff\0")] if able.binary_keys else []
        sent += [OutboundMessage(b"x", None, [("a", "1"), ("b", "2"), ("a", "3")])] if able.repeated_attributes else []
        sent += [OutboundMessage(b"x", None, [("a", None)])] if able.null_attributes else []
        await bench.publish(topic, sent)
        looks = 0 if bench.harness.missing("look") else 1
        batches = [step.batch for step in await steps(bench, topic) if step.batch] if looks else []
        for family in able.families:
            source = await open_source(bench, topic, family)
            batches += await pulled(source, len(sent))
            await source.close()
        assert sum(len(batch.rows) for batch in batches) == len(sent) * (looks + len(able.families))
        for batch in batches:
            assert disagreements(batch.codec, batch.rows) == []

    @case()
    async def test_only_wanted_columns(self, bench: Bench) -> None:
        """A codec gives the columns that were asked for and no others; none of no rows."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(3))
        if bench.harness.missing("look"):
            source = await open_source(bench, topic, next(iter(bench.capabilities.families)))
            batch, *_ = await pulled(source, 3)
            await source.close()
        else:
            (batch,) = [step.batch for step in await steps(bench, topic) if step.batch]
        for name in COLUMNS:
            assert batch.codec.columns(batch.rows, frozenset({name})).keys() <= {name}
        assert batch.codec.columns(batch.rows, frozenset()) == {}
        assert disagreements(batch.codec, []) == []

    @case("look")
    async def test_digests_are_of_every_row(self, bench: Bench) -> None:
        """A look that digests its rows gives away the same ones, each once, whether or not the driver does it itself."""
        topic = await bench.topic(partitions=2)
        await bench.publish(topic, numbered(50))

        def digest(batch: Batch) -> list[tuple[int, Position]]:
            return list(batch.codec.places(batch.rows))

        found: list[tuple[int, Position]] = []
        for step in await steps(bench, topic, digest=digest):
            if step.batch is not None:
                assert not (step.batch.rows and step.batch.digests)
                found += [place for digested in step.batch.digests or [digest(step.batch)] for place in digested]
        whole = [place for step in await steps(bench, topic) if step.batch for place in digest(step.batch)]
        assert sorted(found) == sorted(whole)
        assert len(found) == 50

    @case()
    async def test_close_in_the_middle_of_a_slice(self, bench: Bench) -> None:
        """Closing a handle whose call waits: call and close both return within the slice and two seconds; a second close is fine."""
        topic = await bench.topic()
        slice_s = bench.capabilities.slice_s
        handles: list[tuple[Browser | Source, Callable[[], Awaitable[Step | Batch | None]]]] = []
        if not bench.harness.missing("look"):
            look = await follower(bench, topic)
            handles.append((look, lambda: look.read(10, 1000, slice_s)))
        for family in bench.capabilities.families:
            source = await open_source(bench, topic, family)
            handles.append((source, lambda source=source: source.pull(10, 1000, slice_s)))  # type: ignore[misc] # bound now
        for handle, call in handles:
            waiting = asyncio.ensure_future(call())
            await asyncio.sleep(0.05)
            began = time.monotonic()
            await handle.close()
            (ended,) = await asyncio.gather(waiting, return_exceptions=True)
            assert time.monotonic() - began < slice_s + CLOSE_S
            assert ended is None or isinstance(ended, Step) or getattr(ended, "kind", None) is ErrorKind.CLOSED
            await handle.close()
            assert (await refusal(call())).kind is ErrorKind.CLOSED

    @case(seconds=60)
    async def test_a_cancelled_call_loses_nothing(self, bench: Bench) -> None:
        """Every second pull and read is cancelled while rows arrive: each row comes all the same, once."""
        slice_s = min(0.5, bench.capabilities.slice_s)
        looks = () if bench.harness.missing("look") else (None,)
        for family in (*looks, *bench.capabilities.families):
            topic = await bench.topic()
            handle = await (open_source(bench, topic, family) if family else follower(bench, topic))
            call: Callable[..., Awaitable[Any]] = getattr(handle, "pull" if family else "read")
            sending = asyncio.ensure_future(trickle(bench, topic))
            seen: list[bytes | None] = []
            for turn in range(1000):
                calling = asyncio.ensure_future(call(2, 1000, slice_s))
                if turn % 2:
                    await asyncio.wait({calling}, timeout=0.003)
                    calling.cancel()
                ended: object = (await asyncio.gather(calling, return_exceptions=True))[0]
                batch: object = ended.batch if isinstance(ended, Step) else ended
                if isinstance(batch, Batch):
                    seen += [batch.codec.envelope(row).data for row in batch.rows]
                    await make_room(bench, handle, batch)
                if len(seen) >= TRICKLE and not turn % 2 and batch is None:
                    break
            await sending
            assert (sorted(map(bytes, filter(None, seen))) if bench.harness.missing("order") else seen) == numbered(TRICKLE)
            await handle.close()

    @case()
    async def test_one_row_is_enough(self, bench: Bench) -> None:
        """A pull that may wait the whole slice returns with the first row, and with no more rows than asked for."""
        topic = await bench.topic()
        for family in bench.capabilities.families:
            source = await open_source(bench, topic, family)
            assert await source.pull(10, 1000, 0) is None
            await bench.publish(topic, numbered(5))
            first, *_ = await pulled(source, 1)
            assert len(first.rows) == 1
            await make_room(bench, source, first)
            began = time.monotonic()
            assert sum(len(batch.rows) for batch in await pulled(source, 4, most=100)) == 4
            assert time.monotonic() - began < 1
            await source.close()
            topic = await bench.topic()


# ------------------------------------------------------------------ handles
async def follower(bench: Bench, topic: str) -> Browser:
    """A look at what comes."""
    entity, driver = Entity(Kind.TOPIC, topic), bench.client.driver
    pieces = [Piece(b.partition, b.end or b.low, None) for b in await driver.bounds(entity, True)]
    return await driver.browse(entity, pieces, COLUMNS, True, frozenset())


async def open_source(bench: Bench, topic: str, family: Family, name: str | None = None, **options: Any) -> Source:
    """A source on a new subscription."""
    subscription = Entity(Kind.SUBSCRIPTION, await bench.subscription(topic, name), topic)
    asked: dict[str, Any] = {"family": family, "create": True, "native": bench.harness.native(topic), **options}
    return await bench.client.driver.subscribe(subscription, TakeOptions(**asked))


async def steps(
    bench: Bench,
    topic: str,
    pieces: Sequence[Piece] | None = None,
    *,
    committed_only: bool = True,
    digest: Digest | None = None,
) -> list[Step]:
    """Every step of a look, until each piece was read to its end or stopped."""
    entity, driver = Entity(Kind.TOPIC, topic), bench.client.driver
    pieces = pieces or [Piece(b.partition, b.low, b.end) for b in await driver.bounds(entity, committed_only)]
    effects = (await driver.facts(entity)).look.effects
    look = await driver.browse(entity, pieces, COLUMNS, committed_only, effects, digest)
    found: list[Step] = []
    ends = {p.partition: p.end for p in pieces if p.end is None or p.start < p.end}
    until = time.monotonic() + 10
    while ends and time.monotonic() < until:
        step = await look.read(1000, 1 << 20, min(0.1, bench.capabilities.slice_s))
        found.append(step)
        over = set(step.stopped) | {p for p, at in step.reached.items() if (end := ends.get(p)) is not None and at >= end}
        ends = {p: end for p, end in ends.items() if p not in over}
    await look.close()
    assert not ends, f"{topic}: partitions {sorted(ends)} neither ended nor stopped"
    return found


async def make_room(bench: Bench, source: Any, batch: Batch) -> None:
    """Settle rows before the next pull, where a source wants that."""
    if batch.tokens is not None and bench.capabilities.settle_before_pull:
        await source.settle([Settlement(token, Verdict.ACK) for token in batch.tokens])


async def trickle(bench: Bench, topic: str) -> None:
    """Rows one by one."""
    for body in numbered(TRICKLE):
        await bench.publish(topic, [body])
        await asyncio.sleep(0.005)


async def pulled(source: Source, count: int, seconds: float = 15.0, most: int | None = None) -> list[Batch]:
    """Batches of so many rows together."""
    found: list[Batch] = []
    end, left = time.monotonic() + seconds, count
    while left > 0 and time.monotonic() < end:
        batch = await source.pull(most or left, 1 << 20, 0.1)
        if batch is not None:
            found.append(batch)
            left -= len(batch.rows)
    return found
