"""Taking and settling above the drivers: leases, first wins, retries, lanes, cancelled callers, closing."""

import asyncio
import itertools
import time
from dataclasses import dataclass, field, replace

import pytest

from broker_nb.backends.driver import (
    Batch,
    Capabilities,
    Entity,
    Facts,
    Family,
    Kind,
    LeaseTerms,
    LookPlan,
    Outcome,
    Settled,
    Verdict,
)
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.loop import shared_loop
from broker_nb.portable.messages import MessageSubscription
from broker_nb.portable.records import RecordSubscription

CAPABILITIES = Capabilities(frozenset(Family), slice_s=0.2, release_delay=True, reject=True)
TOKENS = itertools.count()


class Codec:
    def size(self, row):
        return len(row)

    def places(self, rows):
        return [(0, (int(row),)) for row in rows]


@dataclass
class Fake:
    """A source that hands out what it is given and notes what it is asked."""

    rows: list = field(default_factory=list)
    lease: float | None = None
    gate: asyncio.Event | None = None
    outcomes: list = field(default_factory=list)
    settled: list = field(default_factory=list)
    reasons: list = field(default_factory=list)
    extended: list = field(default_factory=list)
    committed: list = field(default_factory=list)
    sought: list = field(default_factory=list)
    closed: int = 0
    pull_errors: list = field(default_factory=list)

    async def pull(self, max_rows, max_bytes, wait):
        if self.pull_errors:
            raise self.pull_errors.pop(0)
        if self.gate is not None:
            await self.gate.wait()
        if not self.rows:
            await asyncio.sleep(min(wait, 0.01))
            return None
        taken, self.rows = self.rows[:max_rows], self.rows[max_rows:]
        until = None if self.lease is None else time.monotonic() + self.lease
        return Batch(Codec(), taken, [next(TOKENS) for _ in taken], until)

    async def settle(self, items):
        self.settled.append([(i.verdict, i.delay) for i in items])
        self.reasons += [i.reason for i in items]
        await asyncio.sleep(0.001)
        answer = self.outcomes.pop(0) if self.outcomes else Settled.CONFIRMED
        if isinstance(answer, BrokerError):
            raise answer
        return [Outcome(answer)] * len(items)

    async def extend(self, tokens, seconds):
        self.extended.append((time.monotonic(), len(tokens)))
        answer = self.outcomes.pop(0) if self.outcomes else None
        return [None if answer is Settled.LOST else time.monotonic() + seconds for _ in tokens]

    async def commit(self, positions):
        self.committed.append(dict(positions))
        return {p: Outcome(Settled.CONFIRMED) for p in positions}

    async def seek(self, positions):
        self.sought.append(dict(positions))

    async def close(self):
        self.closed += 1


def queue(*sources, seconds=None, renewable=True, hold=60.0, capabilities=CAPABILITIES):
    terms = LeaseTerms(seconds, renewable, return_counts=True, max_deliveries=5)
    facts = Facts(Entity(Kind.SUBSCRIPTION, "s", "t"), (0,), LookPlan(True), frozenset({Family.MESSAGE}), terms)
    rest = iter(sources)

    async def open_source():
        return next(rest)

    return MessageSubscription("t/s", capabilities, facts, open_source, hold)


def log(source):
    facts = Facts(Entity(Kind.SUBSCRIPTION, "g", "t"), (0,), LookPlan(True), frozenset({Family.RECORD}))

    async def open_source():
        return source

    return RecordSubscription("t/g", CAPABILITIES, facts, open_source)


def run(coro, seconds=20):
    async def bounded():
        async with asyncio.timeout(seconds):
            return await coro

    return shared_loop().run(bounded())


async def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the awaited condition did not come"
        await asyncio.sleep(0.005)


def bodies(taken):
    return [row for part in taken for row in part.batch.rows]


# ------------------------------------------------------------------ taking
def test_it_returns_as_soon_as_n_are_there_and_after_the_timeout_with_what_came():
    async def go():
        sub = queue(Fake(rows=[b"1", b"2", b"3"]))
        assert bodies(await sub.take(2, timeout=5)) == [b"1", b"2"]
        begin = time.monotonic()
        assert bodies(await sub.take(5, timeout=0.3)) == [b"3"]
        assert 0.25 < time.monotonic() - begin < 2
        assert await sub.take(5, timeout=0.05) == []

    run(go())


def test_the_age_of_a_batch_counts_from_its_first_row():
    async def go():
        source = Fake(rows=[b"1"])
        sub = queue(source)

        async def trickle():
            while True:
                await asyncio.sleep(0.05)
                source.rows.append(b"x")

        feeding = asyncio.ensure_future(trickle())
        begin = time.monotonic()
        got = await sub.take(10_000, timeout=None, age=0.3)
        feeding.cancel()
        assert 2 <= len(bodies(got)) < 20
        assert time.monotonic() - begin < 1.5

    run(go())


def test_a_byte_bound_ends_a_batch():
    async def go():
        sub = queue(Fake(rows=[b"x" * 10] * 50))
        assert sum(map(len, bodies(await sub.take(50, max_bytes=1, timeout=1)))) >= 1

    run(go())


def test_a_cancelled_take_leaves_its_rows_to_the_next():
    async def go():
        source = Fake(rows=[b"1", b"2"], gate=asyncio.Event())
        sub = queue(source)
        taking = asyncio.ensure_future(sub.take(2, timeout=None))
        await until(lambda: sub._puller._ready is not None and bool(sub._handles))
        await asyncio.sleep(0.02)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        source.gate.set()
        assert bodies(await sub.take(2, timeout=1)) == [b"1", b"2"]

    run(go())


def test_a_take_cancelled_after_some_rows_came_keeps_them():
    async def go():
        source = Fake(rows=[b"1", b"2"])
        sub = queue(source)
        taking = asyncio.ensure_future(sub.take(5, timeout=None, age=30))
        await until(lambda: sub.held_count == 2)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        source.rows.append(b"3")
        assert bodies(await sub.take(3, timeout=2)) == [b"1", b"2", b"3"]

    run(go())


def test_a_retryable_error_is_tried_again_and_a_permanent_one_ends_it():
    async def go():
        hiccup = BrokerError(ErrorKind.TRANSIENT, "t", "hiccup", retryable=True)
        sub = queue(Fake(rows=[b"1"], pull_errors=[hiccup, hiccup]))
        assert bodies(await sub.take(1, timeout=5)) == [b"1"]
        gone = BrokerError(ErrorKind.NOT_FOUND, "t", "t was deleted")
        with pytest.raises(BrokerError, match="deleted"):
            await queue(Fake(pull_errors=[gone])).take(1, timeout=5)

    run(go())


def test_no_credit_gives_what_came_and_is_an_error_when_nothing_came():
    async def go():
        full = BrokerError(ErrorKind.NO_CREDIT, "t", "1000 rows are held; settle some")
        source = Fake(rows=[b"1"])
        sub = queue(source)
        first = asyncio.ensure_future(sub.take(5, timeout=5))
        await until(lambda: sub.held_count == 1)
        source.pull_errors = [full, full]
        assert bodies(await first) == [b"1"]
        with pytest.raises(BrokerError, match="settle some"):
            await sub.take(1, timeout=1)

    run(go())


def test_a_source_that_wants_its_rows_settled_first_gets_company_and_then_no_credit():
    async def go():
        sources = [Fake(rows=[b"1", b"2"]) for _ in range(4)]
        sub = queue(*sources, capabilities=replace(CAPABILITIES, settle_before_pull=True))
        for _ in range(4):
            assert len(bodies(await sub.take(1, timeout=1))) == 1
        with pytest.raises(BrokerError) as caught:
            await sub.take(1, timeout=1)
        assert caught.value.kind is ErrorKind.NO_CREDIT
        await sub.settle([2], "ack")
        assert bodies(await sub.take(1, timeout=1)) == [b"2"]

    run(go())


# ------------------------------------------------------------------ settling
def test_the_first_settlement_wins_also_when_both_are_under_way():
    async def go():
        source = Fake(rows=[b"1"])
        sub = queue(source)
        await sub.take(1, timeout=1)
        (one,), (two,) = await asyncio.gather(sub.settle([1], "ack"), sub.settle([1], "nack"))
        assert (one.state, two.state) == ("settled", "already")
        (three,) = await sub.settle([1], "nack")
        assert three.state == "already"
        assert three.text.startswith("ack won at ")
        assert source.settled == [[(Verdict.ACK, 0.0)]]
        assert sub.held_count == 0

    run(go())


def test_a_delivery_named_twice_is_settled_once():
    async def go():
        source = Fake(rows=[b"1"])
        sub = queue(source)
        await sub.take(1, timeout=1)
        results = await sub.settle([1, 1], "ack")
        assert [r.state for r in results] == ["settled", "settled"]
        assert source.settled == [[(Verdict.ACK, 0.0)]]

    run(go())


def test_retry_is_tried_again_and_what_stays_undone_is_held_on():
    async def go():
        source = Fake(rows=[b"1", b"2"], outcomes=[Settled.RETRY, Settled.CONFIRMED, *[Settled.RETRY] * 9])
        sub = queue(source)
        await sub.take(2, timeout=1)
        assert (await sub.settle([1], "ack"))[0].state == "settled"
        assert (await sub.settle([2], "ack"))[0].state == "retry"
        assert sub.held_count == 1
        source.outcomes.clear()
        assert (await sub.settle([2], "ack"))[0].state == "settled"

    run(go())


@pytest.mark.parametrize(
    ("outcome", "state", "held"), [(Settled.LOST, "lost", 0), (Settled.REFUSED, "refused", 1), (Settled.SENT, "sent", 0)]
)
def test_each_outcome_reaches_the_caller(outcome, state, held):
    async def go():
        sub = queue(Fake(rows=[b"1"], outcomes=[outcome]))
        await sub.take(1, timeout=1)
        assert (await sub.settle([1], "ack"))[0].state == state
        assert sub.held_count == held

    run(go())


def test_a_settlement_that_could_not_be_attempted_is_refused_row_by_row_and_the_row_is_still_held():
    async def go():
        denied = BrokerError(ErrorKind.PERMISSION, "t", "you may not settle on t")
        sub = queue(Fake(rows=[b"1"], outcomes=[denied]))
        await sub.take(1, timeout=1)
        (result,) = await sub.settle([1], "ack")
        assert (result.state, result.error) == ("refused", denied)
        assert sub.held_count == 1

    run(go())


def test_a_rejection_carries_its_reason_to_the_broker():
    async def go():
        source = Fake(rows=[b"1"])
        sub = queue(source)
        await sub.take(1, timeout=1)
        assert (await sub.settle([1], "reject", reason="unreadable"))[0].state == "settled"
        assert source.settled == [[(Verdict.REJECT, 0.0)]]
        assert source.reasons == ["unreadable"]

    run(go())


@pytest.mark.parametrize(
    ("asked", "says"), [({"word": "reject"}, "nack it, or ack it"), ({"word": "nack", "delay": 3.0}, "leave delay out")]
)
def test_what_a_broker_cannot_is_refused_with_a_way_out_and_the_row_is_still_held(asked, says):
    async def go():
        source = Fake(rows=[b"1"])
        sub = queue(source, capabilities=replace(CAPABILITIES, reject=False, release_delay=False))
        await sub.take(1, timeout=1)
        with pytest.raises(BrokerError, match=says) as caught:
            await sub.settle([1], **asked)
        assert caught.value.kind is ErrorKind.UNSUPPORTED
        assert source.settled == []
        assert (await sub.settle([1], "ack"))[0].state == "settled"

    run(go())


def test_a_serial_that_was_never_delivered_touches_nothing():
    async def go():
        source = Fake(rows=[b"1"])
        sub = queue(source)
        await sub.take(1, timeout=1)
        assert (await sub.settle([77], "ack"))[0].state == "foreign"
        assert source.settled == []

    run(go())


def test_a_person_who_settles_goes_before_the_next_slice():
    async def go():
        source = Fake(gate=asyncio.Event())
        sub = queue(source)
        source.rows = [b"1"]
        source.gate.set()
        await sub.take(1, timeout=1)
        source.gate.clear()
        waiting = [asyncio.ensure_future(sub.take(1, timeout=None)) for _ in range(3)]
        await asyncio.sleep(0.02)
        settling = asyncio.ensure_future(sub.settle([1], "ack"))
        await asyncio.sleep(0)
        source.gate.set()
        assert (await settling)[0].state == "settled"
        assert not any(w.done() for w in waiting)
        for w in waiting:
            w.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(go())


# ------------------------------------------------------------------ leases
def test_a_lease_is_extended_at_half_time_and_given_back_when_hold_is_over():
    async def go():
        source = Fake(rows=[b"1", b"2"], lease=0.4)
        sub = queue(source, seconds=0.4, hold=1.0)
        begin = time.monotonic()
        await sub.take(2, timeout=1)
        await until(lambda: source.extended)
        assert 0.15 < source.extended[0][0] - begin < 0.4
        await until(lambda: source.settled)
        assert source.settled == [[(Verdict.RELEASE, 0.0)] * 2]
        assert time.monotonic() - begin >= 0.95
        assert (await sub.settle([1], "ack"))[0].state == "already"

    run(go())


def test_a_lease_that_cannot_be_extended_is_given_back_before_it_ends():
    async def go():
        source = Fake(rows=[b"1"], lease=0.8)
        sub = queue(source, seconds=0.8, renewable=False)
        begin = time.monotonic()
        await sub.take(1, timeout=1)
        await until(lambda: source.settled)
        assert time.monotonic() - begin < 0.8
        assert source.extended == []

    run(go())


def test_a_row_that_could_not_be_extended_is_lost_by_name():
    async def go():
        source = Fake(rows=[b"1"], lease=0.2, outcomes=[Settled.LOST])
        sub = queue(source, seconds=0.2)
        await sub.take(1, timeout=1)
        await until(lambda: sub.held_count == 0)
        (result,) = await sub.settle([1], "ack")
        assert result.state == "lost"
        assert result.error.kind is ErrorKind.LEASE_LOST
        assert source.settled == []

    run(go())


# ------------------------------------------------------------------ closing
def test_closing_gives_back_what_is_held_and_what_was_never_delivered():
    async def go():
        source = Fake(rows=[b"1", b"2", b"3"])
        sub = queue(source)
        taken = await sub.take(3, timeout=1)
        sub._puller._ready.extend(taken[0].split(2)[1:])  # as if the third had not been delivered
        await sub.settle([1], "ack")
        await asyncio.gather(sub.close(), sub.close())
        assert source.settled == [[(Verdict.ACK, 0.0)], [(Verdict.RELEASE, 0.0)] * 2]
        assert source.closed == 1
        with pytest.raises(BrokerError) as caught:
            await sub.take(1, timeout=1)
        assert caught.value.kind is ErrorKind.CLOSED

    run(go())


def test_closing_waits_for_the_slice_in_flight_and_gives_its_rows_back():
    async def go():
        source = Fake(rows=[b"1"], gate=asyncio.Event())
        sub = queue(source)
        taking = asyncio.ensure_future(sub.take(1, timeout=None))
        await asyncio.sleep(0.02)
        taking.cancel()
        closing = asyncio.ensure_future(sub.close())
        await asyncio.sleep(0.02)
        source.gate.set()
        await closing
        assert source.settled == [[(Verdict.RELEASE, 0.0)]]

    run(go())


# ------------------------------------------------------------------ logs
def test_a_log_commits_the_contiguous_prefix_and_tells_where_it_stopped():
    async def go():
        source = Fake(rows=[b"0", b"1", b"2", b"3", b"4"])
        sub = log(source)
        await sub.take(5, timeout=1)
        (stand,) = await sub.commit([1, 2, 4])
        assert source.committed == [{0: (1, 0)}]
        assert (stand.position, stand.open_at, stand.waiting) == ((1, 0), (2,), 3)
        (stand,) = await sub.commit([3])
        assert source.committed[-1] == {0: (3, 0)}
        (stand,) = await sub.commit([1], through=True)
        assert len(source.committed) == 2
        assert stand.position == (3, 0)
        assert sub.held_serials() == [5]

    run(go())


def test_releasing_a_log_reads_it_again_and_voids_the_old_rows():
    async def go():
        source = Fake(rows=[b"0", b"1", b"2"])
        sub = log(source)
        await sub.take(3, timeout=1)
        await sub.commit([1])
        assert await sub.rewind() == 2
        assert source.sought == [{0: (1,)}]
        (stand,) = await sub.commit([2])
        assert stand.error.kind is ErrorKind.LEASE_LOST
        assert len(source.committed) == 1
        source.rows = [b"1", b"2"]
        await sub.take(2, timeout=1)
        (stand,) = await sub.commit([4])
        assert stand.position == (1, 0)

    run(go())


def test_commits_under_way_share_one_call():
    async def go():
        source = Fake(rows=[b"%d" % i for i in range(50)])
        sub = log(source)
        await sub.take(50, timeout=1)
        await asyncio.gather(*(sub.commit([i]) for i in range(1, 51)))
        assert source.committed[-1] == {0: (49, 0)}
        assert len(source.committed) < 10
        assert [c[0] for c in source.committed] == sorted(c[0] for c in source.committed)

    run(go())
