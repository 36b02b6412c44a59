"""Every state that a driver claims is produced: by nature where nature can, else by a fault that the harness provokes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from broker_nb.backends.driver import (
    Batch,
    DedupeId,
    Entity,
    Family,
    Kind,
    Outbound,
    Outcome,
    Piece,
    SendResult,
    Sent,
    Settled,
    Settlement,
    Source,
    Step,
    Stop,
    Verdict,
)
from broker_nb.messages import OutboundMessage
from broker_nb.testing.bench import Bench, numbered
from broker_nb.testing.contract import open_source, pulled, steps
from broker_nb.testing.harness import Suite, case


class Ends(Suite):
    """Why a look stops before the end that it was asked for, and the fate of a row that was sent."""

    @case("Stop.DRY")
    async def test_dry(self, bench: Bench) -> None:
        """A piece whose end lies beyond the last row: the rows, then DRY, and nothing is said to be reached beyond them."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(3))
        (bounds,) = await bench.client.driver.bounds(Entity(Kind.TOPIC, topic), True)
        assert bounds.end is not None
        beyond = (bounds.end[0] + 10,)
        found = await steps(bench, topic, [Piece(0, bounds.low, beyond)])
        assert stop_of(found) is Stop.DRY
        assert shown(found) == numbered(3)
        assert all(step.reached.get(0, ()) < beyond for step in found)

    @case("Stop.HELD_BACK", "begin")
    async def test_held_back(self, bench: Bench) -> None:
        """A piece that reaches into an open transaction: the rows before it, then HELD_BACK."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(3))
        other = await asyncio.to_thread(bench.harness.begin)
        await asyncio.to_thread(other.send, topic, [b"open"])
        try:
            (bounds,) = await bench.client.driver.bounds(Entity(Kind.TOPIC, topic), True)
            assert bounds.high is not None
            assert bounds.end is not None
            assert bounds.high > bounds.end
            found = await steps(bench, topic, [Piece(0, bounds.low, bounds.high)])
            assert stop_of(found) is Stop.HELD_BACK
            assert shown(found) == numbered(3)
        finally:
            await asyncio.to_thread(other.abort)

    @case("Stop.AGED_OUT", "delete_before", "numbered")
    async def test_aged_out(self, bench: Bench) -> None:
        """A piece whose start is no longer there: AGED_OUT, never rows from another place."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(10))
        (bounds,) = await bench.client.driver.bounds(Entity(Kind.TOPIC, topic), True)
        first = bounds.low[0]
        await asyncio.to_thread(bench.harness.delete_before, topic, {0: first + 6})
        found = await steps(bench, topic, [Piece(0, (first + 2,), (first + 10,))])
        assert stop_of(found) is Stop.AGED_OUT
        assert shown(found) == []

    @case("Stop.UNPROVEN", "provoke")
    async def test_unproven(self, bench: Bench) -> None:
        """Silence of a broker that cannot tell where the end is."""
        topic = await bench.topic()
        await asyncio.to_thread(bench.harness.provoke, "Stop.UNPROVEN", topic)
        assert stop_of(await steps(bench, topic, [Piece(0, (), None)])) is Stop.UNPROVEN

    @case("Sent.ACCEPTED")
    async def test_accepted(self, bench: Bench) -> None:
        """An accepted row has no error, and is there."""
        topic = await bench.topic()
        (result,) = await send(bench, topic, Outbound(b"1"))
        assert result.state is Sent.ACCEPTED
        assert await stored(bench, topic, 1) == [b"1"]

    @case("Sent.DUPLICATE")
    async def test_duplicate(self, bench: Bench) -> None:
        """The same row of the same run sent again is a duplicate, and is there once."""
        topic = await bench.topic()
        run = bench.name("run")
        rows = [Outbound(b"%d" % seq, dedupe=DedupeId(run, seq)) for seq in (1, 2, 1)]
        results = await send(bench, topic, *rows[:2]) + await send(bench, topic, rows[2])
        assert [r.state for r in results] == [Sent.ACCEPTED, Sent.ACCEPTED, Sent.DUPLICATE]
        assert await stored(bench, topic, 2) == [b"1", b"2"]

    @case("Sent.REFUSED")
    async def test_refused(self, bench: Bench) -> None:
        """A row for a partition that is not there is refused, a later one of its key is not sent, the others are stored."""
        topic = await bench.topic()
        rows = [Outbound(b"1", b"a"), Outbound(b"2", b"b", partition=999), Outbound(b"3", b"b"), Outbound(b"4", b"a")]
        results: list[SendResult] = []
        await (await bench.client.topic(topic)).send(rows, results)
        results += await send(bench, topic, rows[1])  # also by a sender that was not asked first
        assert [r.state for r in results] == [Sent.ACCEPTED, Sent.REFUSED, Sent.REFUSED, Sent.ACCEPTED, Sent.REFUSED]
        assert all(topic in str(r.error) for r in results if r.error is not None)
        assert await stored(bench, topic, 2) == [b"1", b"4"]

    @case("Sent.UNKNOWN", "provoke", seconds=60)
    async def test_unknown(self, bench: Bench) -> None:
        """A send whose answer does not come is unknown, and a later row of its key is not sent."""
        topic = await bench.topic()
        sender = await bench.client.driver.sender(Entity(Kind.TOPIC, topic), {})
        await asyncio.to_thread(bench.harness.provoke, "Sent.UNKNOWN", topic)
        first, second = await sender.send([Outbound(b"1", b"a"), Outbound(b"2", b"a")])
        assert first.state is Sent.UNKNOWN
        assert second.state in (Sent.REFUSED, Sent.UNKNOWN)
        await sender.close()


class Settlements(Suite):
    """What becomes of a settlement or a commit: `MessageStates` and `RecordStates`."""

    @case("{family}.CONFIRMED")
    async def test_confirmed(self, bench: Bench) -> None:
        """The broker said that it is done."""
        source, batch, _ = await one_taken(bench)
        assert (await done(source, batch)).state is Settled.CONFIRMED

    @case("{family}.SENT")
    async def test_sent(self, bench: Bench) -> None:
        """Handed to a broker that does not confirm."""
        wishes = {"unconfirmed": True} if bench.capabilities.confirmed_settle else {}
        source, batch, _ = await one_taken(bench, **wishes)
        assert (await done(source, batch)).state is Settled.SENT

    @case("{family}.RETRY", "provoke")
    async def test_retry(self, bench: Bench) -> None:
        """Not done now, with the reason; the next try works."""
        source, batch, topic = await one_taken(bench)
        await asyncio.to_thread(bench.harness.provoke, f"{bench.family.value}.RETRY", topic)
        outcome = await done(source, batch)
        assert outcome.state is Settled.RETRY
        assert outcome.error is not None
        await asyncio.to_thread(bench.harness.mend)
        assert (await done(source, batch)).state in (Settled.CONFIRMED, Settled.SENT)


class MessageStates(Settlements):
    """What becomes of a settlement of single messages."""

    family = Family.MESSAGE
    needs = ("messages",)

    @case("message.LOST", "expire")
    async def test_lost(self, bench: Bench) -> None:
        """Settled after the lease ran out."""
        source, batch, topic = await one_taken(bench)
        await asyncio.to_thread(bench.harness.expire, topic)
        assert (await done(source, batch)).state is Settled.LOST

    @case("message.REFUSED", "provoke")
    async def test_refused(self, bench: Bench) -> None:
        """Not done and never will be, with the reason."""
        source, batch, topic = await one_taken(bench)
        await asyncio.to_thread(bench.harness.provoke, "message.REFUSED", topic)
        outcome = await done(source, batch)
        assert outcome.state is Settled.REFUSED
        assert outcome.error is not None


class RecordStates(Settlements):
    """What becomes of a commit to a log."""

    family = Family.RECORD
    needs = ("records",)

    @case("record.LOST")
    async def test_lost(self, bench: Bench) -> None:
        """A commit for a partition that went to another member."""
        topic, name = await bench.topic(partitions=2), bench.name("sub")
        first = await open_source(bench, topic, Family.RECORD, name)
        await bench.publish(topic, [OutboundMessage(body, body) for body in numbered(50)])
        batches = await pulled(first, 50)
        last = {p: (*at, 0) for batch in batches for p, at in batch.codec.places(batch.rows)}
        assert len(last) == 2
        second = await open_source(bench, topic, Family.RECORD, name)
        until = time.monotonic() + 15
        outcomes: set[Settled] = set()
        stored = Settled.CONFIRMED if bench.capabilities.confirmed_settle else Settled.SENT
        while outcomes != {stored, Settled.LOST}:  # one partition each
            assert time.monotonic() < until, f"{outcomes}: no partition went to the second member"
            await asyncio.gather(first.pull(1, 1, 0.05), second.pull(1, 1, 0.05))
            outcomes = {outcome.state for outcome in (await first.commit(last)).values()}
        await first.close()
        await second.close()

    @case("record.REFUSED")
    async def test_refused(self, bench: Bench) -> None:
        """A position beyond the end is not stored, with the reason."""
        source, batch, _ = await one_taken(bench)
        ((partition, position),) = batch.codec.places(batch.rows)
        outcome = (await source.commit({partition: (position[0] + 1000,)}))[partition]
        assert outcome.state is Settled.REFUSED
        assert outcome.error is not None


# ------------------------------------------------------------------ one row
async def one_taken(bench: Bench, **wishes: bool) -> tuple[Source, Batch, str]:
    """A source that holds one row of a new topic."""
    topic = await bench.topic(ack_deadline=1, **wishes)
    await bench.publish(topic, [b"1"])
    source = await open_source(bench, topic, bench.family)
    (batch,) = await pulled(source, 1)
    return source, batch, topic


async def done(source: Source, batch: Batch) -> Outcome:
    """Ack or commit the one row."""
    if batch.tokens is not None:
        (outcome,) = await source.settle([Settlement(batch.tokens[0], Verdict.ACK)])
        return outcome
    ((partition, position),) = batch.codec.places(batch.rows)
    return (await source.commit({partition: (*position, 0)}))[partition]


async def send(bench: Bench, topic: str, *rows: Outbound) -> list[SendResult]:
    """By a sender of its own."""
    sender = await bench.client.driver.sender(Entity(Kind.TOPIC, topic), {})
    try:
        return [*await sender.send(rows)]
    finally:
        await sender.close()


async def stored(bench: Bench, topic: str, count: int) -> list[bytes | None]:
    """The bodies that a topic has, `count` of them if it has as many: by a look, or by taking them where a look is not free."""
    if not bench.harness.missing("look"):
        return shown(await steps(bench, topic))
    reader = await bench.reader(topic)
    return [item.data for item in await reader.read(count) + await reader.rest()]


def stop_of(found: Sequence[Step]) -> Stop | None:
    """Why partition 0 stopped."""
    return next((step.stopped[0] for step in found if 0 in step.stopped), None)


def shown(found: Sequence[Step]) -> list[bytes | None]:
    """The bodies, in order."""
    return [step.batch.codec.envelope(row).data for step in found if step.batch for row in step.batch.rows]
