"""Bounded looks: they end at once where the broker proves the end, and never say "complete" where something is missing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from broker_nb.backends.driver import COLUMNS, Entity, Kind, Proof, Stop
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import OutboundMessage
from broker_nb.portable.ranges import Range, Time, parse_range
from broker_nb.testing.bench import Bench, Looked, numbered, refusal
from broker_nb.testing.harness import Suite, case

IN_TIME_S = 1.0


class Tails(Suite):
    """Ends of ranges at which others wait for a row that never comes."""

    needs = ("look",)

    @case("null_data")
    async def test_a_tombstone_at_the_end(self, bench: Bench) -> None:
        """The last row has a null body: it is shown, and the look is complete in time."""
        topic = await bench.topic()
        await bench.publish(topic, [OutboundMessage(b"1", b"k"), OutboundMessage(None, b"k")])
        await complete(bench, topic, "..end", [b"1", None])

    @case("begin")
    async def test_control_records_at_the_end(self, bench: Bench) -> None:
        """A committed and an aborted transaction end the topic: only committed rows, or all of them, and complete in time."""
        topic = await bench.topic()
        await bench.publish(topic, [b"before"])
        await transaction(bench, topic, [b"yes"], commit=True)
        await transaction(bench, topic, [b"no", b"no"], commit=False)
        await complete(bench, topic, "..end", [b"before", b"yes"])
        looked = await bench.look(topic, committed_only=False)
        assert looked.bodies == [b"before", b"yes", b"no", b"no"]
        assert looked.summary.complete is True
        newest = await bench.look(topic, "-2")
        assert newest.bodies[-2:] == [b"before", b"yes"], "looked back over rows that are not shown"

    @case("begin")
    async def test_an_open_transaction(self, bench: Bench) -> None:
        """Rows behind an open transaction are held back: the look ends in time, says so, and is not complete until it is over."""
        topic = await bench.topic()
        await bench.publish(topic, [b"before"])
        other = await asyncio.to_thread(bench.harness.begin)
        await asyncio.to_thread(other.send, topic, [b"open"])
        try:
            await bench.publish(topic, [b"behind"])
            looked = await bench.look(topic)
            assert (looked.bodies, looked.summary.complete) == ([b"before"], False)
            assert Stop.HELD_BACK.value in looked.summary.why
            assert min(looked.seconds, (await bench.look(topic)).seconds) < IN_TIME_S
            looked = await bench.look(topic, committed_only=False)
            assert looked.bodies == [b"before", b"open", b"behind"]
        finally:
            await asyncio.to_thread(other.commit)
        await complete(bench, topic, "..end", [b"before", b"open", b"behind"])

    @case("compact", "numbered", seconds=90)
    async def test_a_compacted_gap(self, bench: Bench) -> None:
        """A range that ends inside a gap that compaction left, and one over it: complete in time, with the rows that are left."""
        topic = await bench.topic(compacted=True)
        await bench.publish(
            topic, [OutboundMessage(b"first", b"stays"), *(OutboundMessage(b"%d" % i, b"same") for i in range(10))]
        )
        first = await first_of(bench, topic)
        await asyncio.to_thread(bench.harness.compact, topic)
        await complete(bench, topic, "..end", [b"first", b"9", b"last"])
        await complete(bench, topic, f"{first + 3}..{first + 8}", [])
        await complete(bench, topic, f"..{first + 10}", [b"first"])
        newest = await bench.look(topic, "-2")
        assert newest.bodies[-2:] == [b"9", b"last"]

    @case("partitions")
    async def test_empty_partitions_among_full_ones(self, bench: Bench) -> None:
        """Eight partitions of which two have rows: complete in time, also where only empty ones are asked for."""
        topic = await bench.topic(partitions=8)
        keys = [b"key-a", b"key-b"]
        results = await bench.publish(topic, [OutboundMessage(b"%d" % i, keys[i % 2]) for i in range(50)])
        full = {r.partition for r in results if r.partition is not None}
        looked = await complete(bench, topic, "..end", None)
        assert len(looked.rows) == 50
        partitions = set((await bench.client.facts(Entity(Kind.TOPIC, topic))).partitions)
        looked = await bench.look(topic, partitions=partitions - full)
        assert (looked.rows, looked.summary.complete) == ([], True)
        assert {r.partition for r in (await bench.look(topic, partitions=full)).rows} == full

    @case("numbered")
    async def test_a_range_inside_a_batch(self, bench: Bench) -> None:
        """Offsets in the middle of what was written in one go: exactly these rows, complete in time."""
        topic = await bench.topic()
        wanted = numbered(1000)
        await bench.publish(topic, wanted)
        first = await first_of(bench, topic)
        for start, end in ((0, 37), (500, 501), (990, 1000), (999, 1000)):
            await complete(bench, topic, f"{first + start}..{first + end}", wanted[start:end])
        await complete(bench, topic, f"{first + 995}..", wanted[995:])
        await complete(bench, topic, f"..{first + 5}", wanted[:5])
        assert (await bench.look(topic, "-10")).bodies == wanted[-10:]
        assert (await bench.look(topic, "+10")).bodies == wanted[:10]

    @case()
    async def test_nothing_in_the_range(self, bench: Bench) -> None:
        """An empty topic, and a range beyond what there is: no rows, complete in time."""
        topic = await bench.topic(partitions=3)
        await complete(bench, topic, "..end", [])
        await complete(bench, topic, "-10", [])
        await bench.publish(topic, [b"1"])
        await complete(bench, topic, f"{10**12}..", [])

    @case("delete_before", "numbered")
    async def test_rows_that_aged_out(self, bench: Bench) -> None:
        """A range that begins before what is left is not complete and says so; what is left is complete, also when it is nothing."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(10))
        first = await first_of(bench, topic)
        await asyncio.to_thread(bench.harness.delete_before, topic, {0: first + 6})
        await complete(bench, topic, "..end", numbered(10)[6:])
        looked = await bench.look(topic, f"{first + 2}..{first + 8}")
        assert (looked.bodies, looked.summary.complete) == (numbered(10)[6:8], False)
        assert "no longer" in looked.summary.why
        await asyncio.to_thread(bench.harness.delete_before, topic, {0: first + 10})
        await complete(bench, topic, "..end", [])

    @case()
    async def test_the_end_is_fixed_at_the_start(self, bench: Bench) -> None:
        """Writers that go on while a look runs: it shows what was there when it began, and ends."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(2000))
        look = await bench.client.look(topic, parse_range("..end"), want=COLUMNS)
        shown = 0
        async with contextlib.aclosing(look.batches(20, read_rows=500)) as batches:
            async for batch in batches:
                shown += len(batch.rows)
                await bench.publish(topic, numbered(500, "new"))
        assert (shown, look.summary.complete) == (2000, await whole(bench, topic))

    @case()
    async def test_times(self, bench: Bench) -> None:
        """Start and end times, either alone and both: the rows between them; a start after everything shows nothing, completely."""
        topic = await bench.topic()
        for part in (b"1", b"2", b"3"):
            await bench.publish(topic, [part])
            await asyncio.sleep(0.03)
        first, second, third = (row.publish_time_ns or 0 for row in (await bench.look(topic)).rows)  # by the broker's clock
        assert first < second < third
        for start, end, expected in (
            (second, None, [b"2", b"3"]),
            (None, second, [b"1"]),
            (second, third, [b"2"]),
            (second - 1, second + 1, [b"2"]),
            (third + 10**9, None, []),
        ):
            asked = Range("", None if start is None else Time(start), None if end is None else Time(end))
            looked = await bench.look(topic, asked)
            # Where producers set times, more is read, and the reader filters.
            inside = [r.data for r in looked.rows if (start or 0) <= (r.publish_time_ns or 0) < (end or 2**63)]
            assert (inside, looked.summary.complete) == (expected, await whole(bench, topic))

    @case()
    async def test_stopped_early(self, bench: Bench) -> None:
        """A look that its reader stops, or whose time is up, is not complete and says why."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(100))
        look = await bench.client.look(topic, parse_range("..end"), want=COLUMNS)
        async with contextlib.aclosing(look.batches(20, read_rows=10)) as batches:
            async for _ in batches:
                look.stop("limit of 10 rows")
                break
        assert (look.summary.complete, look.summary.why) == (False, "limit of 10 rows")
        looked = await bench.look(topic, timeout=0)
        assert looked.summary.complete is False
        assert "timeout" in looked.summary.why

    @case()
    async def test_unknown_partition(self, bench: Bench) -> None:
        """A partition that is not there is an error that says which there are."""
        topic = await bench.topic(partitions=2)
        there = (await bench.client.facts(Entity(Kind.TOPIC, topic))).partitions
        error = await refusal(bench.look(topic, partitions=[there[-1], 7]))
        assert error.kind is ErrorKind.INVALID
        assert "7" in str(error)
        assert f"0..{there[-1]}" in str(error)

    @case("break_reads", seconds=90)
    async def test_a_dying_broker(self, bench: Bench) -> None:
        """A broker that dies in the middle of a look: an error, or not complete with the reason; never a silent end."""
        topic = await bench.topic()
        wanted = [body + bytes(20_000) for body in numbered(1000)]  # more than a client fetches ahead at once
        await bench.publish(topic, wanted)
        look = await bench.client.look(topic, parse_range("..end"), want=COLUMNS)
        shown, failed = 0, None
        try:
            async with contextlib.aclosing(look.batches(5, read_rows=10)) as batches:
                async for batch in batches:
                    if not shown:
                        await asyncio.to_thread(bench.harness.break_reads)
                    shown += len(batch.rows)
        except BrokerError as error:
            failed = error
        assert shown < len(wanted), "the broker did not die"
        assert failed is not None or (look.summary.complete is False and look.summary.why)
        assert look.summary.complete is not True


async def complete(bench: Bench, topic: str, asked: str, expected: Sequence[bytes | None] | None) -> Looked:
    """A look that must show exactly these rows, be complete (where that can be known), and end in time.

    It may be late twice, on a busy machine: one that waits for a row that never comes is late every time.
    """
    known = await whole(bench, topic)
    took: list[float] = []
    while True:
        looked = await bench.look(topic, asked)
        assert looked.summary.complete is known, looked.summary.why
        assert looked.summary.why == "" or not known
        assert expected is None or looked.bodies == expected
        took.append(looked.seconds)
        if looked.seconds < IN_TIME_S:
            return looked
        assert len(took) < 3, f"{asked} took {took} s"


async def whole(bench: Bench, topic: str) -> bool | None:
    """How complete a look is that leaves nothing out: None where the broker cannot prove its end."""
    plan = (await bench.client.facts(Entity(Kind.TOPIC, topic))).look
    return True if plan.end_is_fixed and plan.proof is not Proof.NONE else None


async def first_of(bench: Bench, topic: str) -> int:
    """The number of the first row of partition 0; brokers count from 0 or from 1."""
    (bounds,) = await bench.client.driver.bounds(Entity(Kind.TOPIC, topic), True)
    return bounds.low[0]


async def transaction(bench: Bench, topic: str, rows: Sequence[bytes], *, commit: bool) -> None:
    """Rows of a transaction of somebody else."""

    def run() -> None:
        other = bench.harness.begin()
        other.send(topic, rows)
        (other.commit if commit else other.abort)()

    await asyncio.to_thread(run)
