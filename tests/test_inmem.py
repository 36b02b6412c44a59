import asyncio
import json
import threading
import time
from collections import Counter
from contextlib import asynccontextmanager

import pytest

from broker_nb.backends.driver import (
    COLUMNS,
    Bounds,
    DedupeId,
    Entity,
    Family,
    Kind,
    Outbound,
    Outcome,
    Piece,
    Sent,
    Settled,
    Settlement,
    Stop,
    TakeOptions,
    Verdict,
)
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.backends.inmem.demo import DemoDriver, demo_broker, fill
from broker_nb.backends.inmem.driver import InmemDriver
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import make_attribute

ALL = 1 << 30
T = Entity(Kind.TOPIC, "t")
QUEUE = TakeOptions(Family.MESSAGE)
GROUP = TakeOptions(Family.RECORD)


class Host:
    def __init__(self):
        self.events = []

    def lane(self, name):
        raise AssertionError("needs no thread")

    def emit(self, event):
        self.events.append(event)

    def error(self, kind, entity, cause, *, retryable=False):
        return BrokerError(kind, entity, str(cause), retryable=retryable)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


def sub(name="s", topic="t"):
    return Entity(Kind.SUBSCRIPTION, name, topic)


def rows(*data, **fields):
    return [Outbound(each.encode(), **fields) for each in data]


@asynccontextmanager
async def connection(**topic):
    """A driver on a private broker with topic `t` (and `t.dlq`), for one test."""
    driver = await InmemDriver.open({"hosts": [], "timeout": 5}, Host())
    if topic.pop("with_dead_letter", False):
        driver.broker.create_topic("t.dlq")
        topic["dead_letter"] = "t.dlq"
    driver.broker.create_topic("t", **topic)
    yield driver
    await driver.close()


async def pulled(source, n=100, wait=0.0):
    """Data and tokens of what is there now."""
    batch = await source.pull(n, ALL, wait)
    return {} if batch is None else {data_of(batch, i): token for i, token in enumerate(batch.tokens)}


def data_of(batch, i):
    return batch.codec.envelope(batch.rows[i]).data.decode()


async def settle(source, tokens, verdict=Verdict.ACK, **how):
    outcomes = await source.settle([Settlement(token, verdict, **how) for token in tokens])
    return [outcome.state for outcome in outcomes]


async def looked(driver, *, committed=True, topic=T, pieces=None):
    """Everything a look shows, its stops, and where it got to."""
    if pieces is None:
        pieces = [Piece(b.partition, b.low, b.end) for b in await driver.bounds(topic, committed)]
    browser = await driver.browse(topic, pieces, COLUMNS, committed, frozenset())
    shown, stopped, skipped = [], {}, 0
    open_pieces = {p.partition: p.end for p in pieces}
    while open_pieces:
        step = await browser.read(100, ALL, 0.5)
        shown += [step.batch.codec.envelope(row).data for row in step.batch.rows] if step.batch else []
        stopped.update(step.stopped)
        skipped += step.skipped
        open_pieces = {p: end for p, end in open_pieces.items() if step.reached[p] < end and p not in stopped}
    await browser.close()
    return shown, stopped, skipped, step.reached


# ------------------------------------------------------------------ leases
def test_a_lease_that_ran_out_is_lost_and_the_row_comes_again_counted():
    async def test():
        async with connection(ack_deadline=30) as driver:
            driver.broker.publish("t", rows("a"))
            source = await driver.subscribe(sub(), QUEUE)
            batch = await source.pull(10, ALL, 0)
            assert 29 < batch.leased_until - time.monotonic() <= 30
            assert batch.codec.envelope(batch.rows[0]).delivery_count == 1
            driver.broker.advance(29)
            assert await source.pull(10, ALL, 0) is None
            driver.broker.advance(2)
            again = await source.pull(10, ALL, 0)
            assert again.codec.envelope(again.rows[0]).delivery_count == 2
            assert again.codec.envelope(again.rows[0]).id == batch.codec.envelope(batch.rows[0]).id
            assert await settle(source, batch.tokens) == [Settled.LOST]
            assert await settle(source, again.tokens) == [Settled.CONFIRMED]
            (event,) = driver.host.events
            assert (event.kind, event.tokens, event.handle) == ("lost", frozenset(batch.tokens), source)
            driver.broker.advance(3600)
            assert await source.pull(10, ALL, 0) is None

    run(test())


def test_settling_late_is_lost_although_nobody_pulled_since():
    async def test():
        async with connection(ack_deadline=30) as driver:
            driver.broker.publish("t", rows("a"))
            source = await driver.subscribe(sub(), QUEUE)
            tokens = (await pulled(source)).values()
            driver.broker.advance(31)
            assert await settle(source, tokens) == [Settled.LOST]
            assert list(await pulled(source)) == ["a"]

    run(test())


def test_extend_holds_longer_and_never_shorter():
    async def test():
        async with connection(ack_deadline=30) as driver:
            driver.broker.publish("t", rows("a", "b", "c"))
            source = await driver.subscribe(sub(), QUEUE)
            a, b, c = (await pulled(source)).values()
            await settle(source, [c])
            longer, gone = await source.extend([a, c], 100)
            assert 99 < longer - time.monotonic() <= 100
            assert gone is None
            (kept,) = await source.extend([b], 1)
            assert 29 < kept - time.monotonic() <= 30
            driver.broker.advance(31)
            assert list(await pulled(source)) == ["b"]
            assert await settle(source, [a]) == [Settled.CONFIRMED]

    run(test())


def test_a_row_of_another_consumer_or_never_delivered_is_lost():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a"))
            mine, other = await driver.subscribe(sub(), QUEUE), await driver.subscribe(sub(), QUEUE)
            (token,) = (await pulled(mine)).values()
            assert await settle(other, [token, 10**9]) == [Settled.LOST, Settled.LOST]
            assert await other.extend([token], 60) == [None]
            assert await settle(mine, [token]) == [Settled.CONFIRMED]

    run(test())


def test_settling_twice_loses_the_second_time_and_touches_no_other_row():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a", "b"))
            source = await driver.subscribe(sub(), QUEUE)
            a, b = (await pulled(source)).values()
            assert await settle(source, [a]) == [Settled.CONFIRMED]
            assert await settle(source, [a], Verdict.RELEASE) == [Settled.LOST]
            assert await settle(source, []) == []
            assert (await driver.backlog(sub()))[0].held == 1
            assert await settle(source, [b]) == [Settled.CONFIRMED]

    run(test())


def test_released_rows_come_at_once_and_delayed_ones_later():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("now", "later", "new"))
            source = await driver.subscribe(sub(), QUEUE)
            got = await pulled(source, 2)
            await settle(source, [got["now"]], Verdict.RELEASE)
            await settle(source, [got["later"]], Verdict.RELEASE, delay=20)
            assert list(await pulled(source)) == ["now", "new"]
            assert (await driver.backlog(sub()))[0].waiting == 1
            driver.broker.advance(19)
            assert await pulled(source) == {}
            driver.broker.advance(2)
            assert list(await pulled(source)) == ["later"]

    run(test())


def test_a_waiting_pull_wakes_when_a_delay_has_passed():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a"))
            source = await driver.subscribe(sub(), QUEUE)
            await settle(source, (await pulled(source)).values(), Verdict.RELEASE, delay=0.2)
            began = time.monotonic()
            assert list(await pulled(source, wait=5)) == ["a"]
            assert 0.1 < time.monotonic() - began < 4

    run(test())


# ------------------------------------------------------------------ dead letters
def test_after_the_last_delivery_a_row_is_dead_lettered_with_its_origin():
    async def test():
        async with connection(with_dead_letter=True, max_deliveries=2, ack_deadline=30) as driver:
            driver.broker.publish("t", [Outbound(b"bad", b"k", (make_attribute("x", "1"),))])
            source = await driver.subscribe(sub(), QUEUE)
            assert (await driver.facts(sub())).lease.max_deliveries == 2
            await settle(source, (await pulled(source)).values(), Verdict.RELEASE)
            await pulled(source)
            driver.broker.advance(31)
            assert await pulled(source) == {}
            (row,) = driver.broker.topic("t.dlq").logs[0].rows
            assert (row.key, row.data) == (b"k", b"bad")
            assert [(a.name, a.value) for a in row.attributes] == [
                ("x", b"1"),
                ("origin.topic", b"t"),
                ("origin.subscription", b"s"),
                ("origin.id", b"0:0"),
                ("error.message", b"not acked in 2 deliveries"),
            ]

    run(test())


def test_reject_dead_letters_with_the_reason():
    async def test():
        async with connection(with_dead_letter=True) as driver:
            driver.broker.publish("t", rows("a"))
            source = await driver.subscribe(sub(), QUEUE)
            assert await settle(source, (await pulled(source)).values(), Verdict.REJECT, reason="no currency") == [
                Settled.CONFIRMED
            ]
            (row,) = driver.broker.topic("t.dlq").logs[0].rows
            assert row.attributes[-1].value == b"no currency"
            assert (await driver.backlog(sub()))[0].waiting == 0

    run(test())


def test_without_a_dead_letter_topic_reject_is_refused_and_rows_come_for_ever():
    async def test():
        async with connection(max_deliveries=2) as driver:
            driver.broker.publish("t", rows("a"))
            source = await driver.subscribe(sub(), QUEUE)
            assert (await driver.facts(T)).lease.max_deliveries is None
            (token,) = (await pulled(source)).values()
            (refused,) = await source.settle([Settlement(token, Verdict.REJECT)])
            assert refused.state is Settled.REFUSED
            assert "no dead-letter topic" in str(refused.error)
            for _ in range(5):
                assert await settle(source, [token], Verdict.RELEASE) == [Settled.CONFIRMED]
                (token,) = (await pulled(source)).values()

    run(test())


# ------------------------------------------------------------------ order
def test_on_an_ordered_queue_nothing_overtakes_an_unacked_row_of_its_key():
    async def test():
        async with connection(ordered=True, ack_deadline=30) as driver:
            driver.broker.publish("t", rows("a1", "a2", "a3", key=b"a") + rows("b1", key=b"b") + rows("n1", "n2"))
            source, other = await driver.subscribe(sub(), QUEUE), await driver.subscribe(sub(), QUEUE)
            got = await pulled(source)
            assert list(got) == ["a1", "b1", "n1", "n2"]
            assert await pulled(other) == {}
            await settle(source, [got["a1"]], Verdict.RELEASE, delay=10)
            assert await pulled(other) == {}
            driver.broker.advance(11)
            got = await pulled(other)
            assert list(got) == ["a1"]
            driver.broker.advance(31)
            got = await pulled(other)
            assert set(got) == {"a1", "b1", "n1", "n2"}
            await settle(other, got.values())
            got = await pulled(source)
            assert list(got) == ["a2"]
            driver.broker.publish("t", rows("a4", key=b"a"))
            assert await pulled(source) == {}
            for expected in ("a3", "a4"):
                await settle(source, got.values())
                got = await pulled(source)
                assert list(got) == [expected]

    run(test())


def test_a_dead_lettered_row_lets_the_next_of_its_key_go():
    async def test():
        async with connection(ordered=True, with_dead_letter=True, max_deliveries=1) as driver:
            driver.broker.publish("t", rows("a1", "a2", key=b""))
            source = await driver.subscribe(sub(), QUEUE)
            await settle(source, (await pulled(source)).values(), Verdict.RELEASE)
            assert list(await pulled(source)) == ["a2"]

    run(test())


def test_a_hot_key_does_not_park_the_whole_log():
    async def test():
        async with connection(ordered=True) as driver:
            driver.broker.publish("t", [Outbound(b"%d" % i, b"hot") for i in range(50_000)])
            source = await driver.subscribe(sub(), QUEUE)
            assert list(await pulled(source, 1000)) == ["0"]
            queue = driver.broker.topic("t").subscriptions["s"]
            assert await pulled(source, 1000) == {}
            assert queue._parked < 12_000
            assert (await driver.backlog(sub()))[0].waiting == 49_999

    run(test())


def test_two_subscriptions_both_get_all_and_consumers_of_one_share():
    async def test():
        async with connection(partitions=3) as driver:
            sent = {f"m{i}" for i in range(100)}
            driver.broker.publish("t", rows(*sent))
            first, second = await driver.subscribe(sub("one"), QUEUE), await driver.subscribe(sub("one"), QUEUE)
            shared = Counter()
            while got := {**await pulled(first, 7), **await pulled(second, 7)}:
                shared.update(got.keys())
            assert shared == Counter(sent)
            alone = await driver.subscribe(sub("two"), QUEUE)
            assert set(await pulled(alone, 1000)) == sent

    run(test())


# ------------------------------------------------------------------ pull: waiting, credit, close, cancel
def test_a_waiting_pull_is_woken_by_a_publish_of_another_thread():
    async def test():
        async with connection() as driver:
            source = await driver.subscribe(sub(), QUEUE)
            pull = asyncio.create_task(pulled(source, wait=5))
            await asyncio.sleep(0)
            thread = threading.Thread(target=driver.broker.publish, args=("t", rows("a")))
            began = time.monotonic()
            thread.start()
            assert list(await pull) == ["a"]
            assert time.monotonic() - began < 2
            thread.join(5)

    run(test())


def test_no_credit_is_said_only_when_something_waits_and_ends_with_a_settlement():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a", "b", "c"))
            source = await driver.subscribe(sub(), TakeOptions(Family.MESSAGE, max_held=2))
            got = await pulled(source)
            assert list(got) == ["a", "b"]
            with pytest.raises(BrokerError, match="2 rows are held") as caught:
                await source.pull(10, ALL, 0)
            assert caught.value.kind is ErrorKind.NO_CREDIT
            pull = asyncio.create_task(pulled(source, wait=5))
            await asyncio.sleep(0)
            await settle(source, [got["a"]])
            assert list(await pull) == ["c"]
            await settle(source, [got["b"]])
            assert await pulled(source) == {}

    run(test())


def test_bytes_bound_a_pull_but_one_row_always_comes():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("x" * 1000, "y" * 1000, "z" * 1000))
            source = await driver.subscribe(sub(), QUEUE)
            assert len((await source.pull(10, 1, 0)).rows) == 1
            assert len((await source.pull(10, 2000, 0)).rows) == 2

    run(test())


@pytest.mark.parametrize("options", [QUEUE, GROUP])
def test_close_in_the_middle_of_a_slice_ends_it_and_frees_what_was_held(options):
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a"))
            source = await driver.subscribe(sub(), options)
            assert len((await source.pull(10, ALL, 0)).rows) == 1
            pull = asyncio.create_task(source.pull(10, ALL, 5))
            await asyncio.sleep(0)
            began = time.monotonic()
            await source.close()
            assert await pull is None
            assert time.monotonic() - began < 1
            await source.close()
            with pytest.raises(BrokerError) as caught:
                await source.pull(10, ALL, 0)
            assert caught.value.kind is ErrorKind.CLOSED
            assert (await driver.facts(sub())).members == 0
            after = await driver.subscribe(sub(), options)
            assert len((await after.pull(10, ALL, 0)).rows) == 1

    run(test())


@pytest.mark.parametrize("options", [QUEUE, GROUP])
def test_a_cancelled_pull_loses_nothing(options):
    async def test():
        async with connection() as driver:
            source = await driver.subscribe(sub(), options)
            pull = asyncio.create_task(source.pull(10, ALL, 5))
            await asyncio.sleep(0)
            driver.broker.publish("t", rows("a"))
            pull.cancel()
            with pytest.raises(asyncio.CancelledError):
                await pull
            assert len((await source.pull(10, ALL, 0)).rows) == 1
            assert not driver.broker.topic("t")._waiting

    run(test())


def test_closing_the_driver_closes_its_handles_and_ends_its_use():
    async def test():
        async with connection() as driver:
            browser = await driver.browse(T, [Piece(0, (0,), None)], COLUMNS, True, frozenset())
            read = asyncio.create_task(browser.read(10, ALL, 5))
            await asyncio.sleep(0)
            await driver.close()
            assert (await read).batch is None
            await driver.close()
            with pytest.raises(BrokerError, match="connect again"):
                await driver.facts(T)

    run(test())


# ------------------------------------------------------------------ groups
def test_a_group_reads_all_partitions_in_order_and_goes_on_from_its_commits():
    async def test():
        async with connection(partitions=2) as driver:
            driver.broker.publish("t", [Outbound(b"%d" % i, partition=i % 2) for i in range(10)])
            member = await driver.subscribe(sub(), GROUP)
            batch = await member.pull(100, ALL, 0)
            assert batch.tokens is None
            places = batch.codec.places(batch.rows)
            assert sorted(places) == [(p, (o,)) for p in range(2) for o in range(5)]
            assert await member.commit({0: (2, 0), 1: (1,)}) == {0: Outcome(Settled.CONFIRMED), 1: Outcome(Settled.CONFIRMED)}
            assert [(b.committed, b.waiting) for b in await driver.backlog(sub())] == [((3,), 2), ((1,), 4)]
            await member.close()
            after = await driver.subscribe(sub(), GROUP)
            batch = await after.pull(100, ALL, 0)
            assert sorted(batch.codec.places(batch.rows)) == [(0, (3,)), (0, (4,)), (1, (1,)), (1, (2,)), (1, (3,)), (1, (4,))]

    run(test())


def test_a_second_member_takes_partitions_over_and_the_first_is_told():
    async def test():
        async with connection(partitions=3) as driver:
            driver.broker.publish("t", [Outbound(b"%d" % i, partition=i % 3) for i in range(9)])
            first = await driver.subscribe(sub(), GROUP)
            assert len((await first.pull(100, ALL, 0)).rows) == 9
            await first.commit({1: (2,)})
            second = await driver.subscribe(sub(), GROUP)
            (event,) = driver.host.events
            assert (event.kind, event.partitions, event.handle) == ("revoked", frozenset({1}), first)
            outcomes = await first.commit({0: (3,), 1: (3,)})
            assert [outcomes[p].state for p in (0, 1)] == [Settled.CONFIRMED, Settled.LOST]
            batch = await second.pull(100, ALL, 0)
            assert batch.codec.places(batch.rows) == [(1, (2,))]
            assert await first.pull(100, ALL, 0) is None
            await first.close()
            batch = await second.pull(100, ALL, 0)
            assert sorted(batch.codec.places(batch.rows)) == [(2, (0,)), (2, (1,)), (2, (2,))]

    run(test())


def test_more_members_than_partitions_leaves_one_idle_and_not_broken():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a"))
            members = [await driver.subscribe(sub(), GROUP) for _ in range(2)]
            found = [await member.pull(10, ALL, 0) for member in members]
            assert [batch is None for batch in found] == [False, True]

    run(test())


def test_seek_reads_again_and_a_commit_beyond_the_end_is_refused():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a", "b"))
            member = await driver.subscribe(sub(), GROUP)
            await member.pull(10, ALL, 0)
            await member.seek({0: (0, 0)})
            batch = await member.pull(10, ALL, 0)
            assert batch.codec.places(batch.rows) == [(0, (1,))]
            assert (await member.commit({0: (7,)}))[0].state is Settled.REFUSED
            with pytest.raises(BrokerError, match="commit positions"):
                await member.settle([])

    run(test())


def test_latest_is_where_the_end_was_when_the_subscription_came():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("old"))
            for name, family in (("q", Family.MESSAGE), ("g", Family.RECORD)):
                source = await driver.subscribe(sub(name), TakeOptions(family, start="latest"))
                await source.close()
            driver.broker.publish("t", rows("new"))
            for name, family in (("q", Family.MESSAGE), ("g", Family.RECORD)):
                source = await driver.subscribe(sub(name), TakeOptions(family, start="earliest"))
                batch = await source.pull(10, ALL, 0)
                assert [data_of(batch, i) for i in range(len(batch.rows))] == ["new"]

    run(test())


def test_a_group_whose_rows_aged_out_says_so_once_and_goes_on():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a", "b", "c"))
            member = await driver.subscribe(sub(), GROUP)
            driver.broker.delete_records("t", {0: 2})
            with pytest.raises(BrokerError, match=r"partition 0: 0\.\.2 aged out") as caught:
                await member.pull(10, ALL, 0)
            assert (caught.value.kind, caught.value.retryable) == (ErrorKind.AGED_OUT, False)
            batch = await member.pull(10, ALL, 0)
            assert batch.codec.places(batch.rows) == [(0, (2,))]

    run(test())


# ------------------------------------------------------------------ transactions
def test_an_open_transaction_holds_back_committed_readers_until_it_commits():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a"))
            queue, member = await driver.subscribe(sub("q"), QUEUE), await driver.subscribe(sub("g"), GROUP)
            transaction = await driver.begin("tx", 60)
            assert [r.state for r in await transaction.send("t", rows("b", "c"))] == [Sent.ACCEPTED] * 2
            driver.broker.publish("t", rows("d"))
            assert await driver.bounds(T, True) == [Bounds(0, (0,), (1,), (4,))]
            assert await driver.bounds(T, False) == [Bounds(0, (0,), (4,), (4,))]
            shown, stopped, _, reached = await looked(driver, pieces=[Piece(0, (0,), (4,))])
            assert (shown, stopped, reached) == ([b"a"], {0: Stop.HELD_BACK}, {0: (1,)})
            assert (await looked(driver, committed=False))[0] == [b"a", b"b", b"c", b"d"]
            assert list(await pulled(queue)) == ["a"]
            assert len((await member.pull(10, ALL, 0)).rows) == 1
            pull = asyncio.create_task(pulled(queue, wait=5))
            await asyncio.sleep(0)
            assert await transaction.commit() is True
            assert list(await pull) == ["b", "c", "d"]
            assert len((await member.pull(10, ALL, 0)).rows) == 3
            assert await driver.bounds(T, True) == [Bounds(0, (0,), (5,), (5,))]
            shown, stopped, skipped, reached = await looked(driver)
            assert (shown, stopped, skipped, reached) == ([b"a", b"b", b"c", b"d"], {}, 1, {0: (5,)})
            assert await transaction.commit() is True
            assert await transaction.abort() is False
            with pytest.raises(BrokerError, match="begin a new one"):
                await transaction.send("t", rows("e"))

    run(test())


def test_aborted_rows_are_skipped_by_committed_readers_only():
    async def test():
        async with connection() as driver:
            transaction = await driver.begin("tx", 60)
            (first,) = await transaction.send("t", rows("gone", dedupe=DedupeId("r", 1)))
            assert await transaction.abort() is True
            assert await transaction.commit() is False
            assert await looked(driver) == ([], {}, 2, {0: (2,)})
            assert (await looked(driver, committed=False))[:3] == ([b"gone"], {}, 1)
            assert await pulled(await driver.subscribe(sub(), QUEUE)) == {}
            assert (await driver.backlog(sub()))[0].waiting == 0
            again = driver.broker.publish("t", rows("gone", dedupe=DedupeId("r", 1)))[0]
            assert (again.state, again.position) == (Sent.ACCEPTED, (2,))
            assert first.position == (0,)

    run(test())


def test_a_transaction_whose_time_ran_out_is_aborted_and_a_newer_holder_fences():
    async def test():
        async with connection() as driver:
            late = await driver.begin("tx", 60)
            await late.send("t", rows("late"))
            driver.broker.advance(61)
            assert await driver.bounds(T, True) == [Bounds(0, (0,), (2,), (2,))]
            assert await late.commit() is False
            old = await driver.begin("tx", 60)
            await old.send("t", rows("old"))
            new = await driver.begin("tx", 60)
            with pytest.raises(BrokerError) as caught:
                await old.send("t", rows("x"))
            assert caught.value.kind is ErrorKind.FENCED
            assert await old.commit() is False
            await new.send("t", rows("new"))
            assert await new.commit() is True
            assert (await looked(driver))[0] == [b"new"]

    run(test())


def test_positions_are_committed_with_the_transaction_or_not_at_all():
    async def test():
        async with connection() as driver:
            driver.broker.create_topic("out")
            driver.broker.publish("t", rows("a", "b"))
            member = await driver.subscribe(sub(), GROUP)
            await member.pull(10, ALL, 0)
            aborted = await driver.begin("tx", 60)
            await aborted.commit_positions(member, {0: (2,)})
            await aborted.abort()
            assert (await driver.backlog(sub()))[0].committed is None
            done = await driver.begin("tx", 60)
            await done.send("out", rows("A"))
            await done.commit_positions(member, {0: (1,)})
            assert (await driver.backlog(sub()))[0].committed is None
            assert await done.commit() is True
            assert (await driver.backlog(sub()))[0].committed == (1,)
            torn = await driver.begin("tx", 60)
            await torn.send("out", rows("B"))
            await torn.commit_positions(member, {0: (2,)})
            await member.close()
            assert await torn.commit() is False
            assert (await looked(driver, topic=Entity(Kind.TOPIC, "out")))[0] == [b"A"]
            assert (await driver.backlog(sub()))[0].committed == (1,)

    run(test())


def test_a_partition_that_was_lost_and_came_back_aborts_the_transaction():
    async def test():
        async with connection(partitions=2) as driver:
            driver.broker.publish("t", [Outbound(b"a", partition=1)])
            member = await driver.subscribe(sub(), GROUP)
            await member.pull(10, ALL, 0)
            transaction = await driver.begin("tx", 60)
            await transaction.commit_positions(member, {1: (1,)})
            other = await driver.subscribe(sub(), GROUP)
            with pytest.raises(BrokerError, match="another member's") as caught:
                await transaction.commit_positions(member, {1: (1,)})
            assert caught.value.kind is ErrorKind.FENCED
            await other.close()
            assert await transaction.commit() is False
            assert [b.committed for b in await driver.backlog(sub())] == [None, None]

    run(test())


def test_an_unknown_commit_is_found_out_by_asking_again():
    async def test():
        async with connection() as driver:
            transaction = await driver.begin("tx", 60)
            await transaction.send("t", rows("a"))
            timeout = BrokerError(ErrorKind.TIMEOUT, "tx", "tx: no answer", retryable=True)
            driver.broker.fail_next("end", timeout, done=True)
            with pytest.raises(BrokerError, match="no answer"):
                await transaction.commit()
            assert await transaction.commit() is True
            assert (await looked(driver))[0] == [b"a"]

    run(test())


# ------------------------------------------------------------------ looks
def test_an_empty_topic_and_an_empty_partition_end_at_once():
    async def test():
        async with connection(partitions=3) as driver:
            assert (await looked(driver))[:2] == ([], {})
            driver.broker.publish("t", rows("a", partition=1))
            assert (await looked(driver))[:2] == ([b"a"], {})

    run(test())


def test_tombstones_nulls_and_empties_stay_apart_and_columns_agree_with_envelopes():
    async def test():
        async with connection(partitions=2) as driver:
            attributes = (
                make_attribute("trace", "a"),
                make_attribute("trace", "b"),
                make_attribute("none"),
                make_attribute("n", 7),
            )
            driver.broker.publish(
                "t",
                [
                    Outbound(None, b"k"),
                    Outbound(b"", b""),
                    Outbound(b"\xff\x00", None, attributes, time_ns=5),
                    Outbound(b"d", b"\xfe\x00", ()),
                ],
            )
            browser = await driver.browse(T, [Piece(0, (0,), (9,)), Piece(1, (0,), (9,))], COLUMNS, True, frozenset())
            source = await driver.subscribe(sub(), QUEUE)
            for batch in ((await browser.read(10, ALL, 0)).batch, await source.pull(10, ALL, 0)):
                envelopes = [batch.codec.envelope(row) for row in batch.rows]
                assert {(e.key, e.data) for e in envelopes} == {
                    (b"k", None),
                    (b"", b""),
                    (None, b"\xff\x00"),
                    (b"\xfe\x00", b"d"),
                }
                (full,) = (e for e in envelopes if e.attributes)
                assert tuple(full.attributes) == attributes
                assert (full.publish_time_ns, full.time_is) == (5, "producer")
                assert {e.time_is for e in envelopes if e is not full} == {"server"}
                columns = batch.codec.columns(batch.rows, COLUMNS)
                assert columns["topic"] == "t"
                assert batch.codec.columns(batch.rows, frozenset({"key"})) == {"key": columns["key"]}
                for i, e in enumerate(envelopes):
                    assert columns["partition"][i] == e.partition
                    assert columns["offset"][i] == e.position[0]
                    assert e.id == f"{e.partition}:{e.position[0]}"
                    assert columns["key"][i] == e.key
                    assert columns["data"][i] == e.data
                    assert (columns["attributes"][i] or ()) == e.attributes
                    assert columns["publish_time_ns"][i] == e.publish_time_ns
                    counts = columns["delivery_count"]
                    assert (counts[i] if counts else None) == e.delivery_count
                    assert batch.codec.size(batch.rows[i]) == len(e.key or b"") + len(e.data or b"")

    run(test())


def test_a_compacted_gap_at_the_end_is_passed():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("1", "2", key=b"k") + rows("n") + rows("3", key=b"k"))
            transaction = await driver.begin("tx", 60)
            await transaction.send("t", rows("aborted"))
            await transaction.abort()
            assert driver.broker.compact("t") == 3
            assert (await looked(driver))[:2] == ([b"n", b"3"], {})
            assert (await looked(driver, pieces=[Piece(0, (0,), (2,))]))[0] == []
            assert (await driver.summaries([T]))[0].bytes == 3
            got = await pulled(await driver.subscribe(sub(), QUEUE))
            assert list(got) == ["n", "3"]

    run(test())


def test_a_range_that_aged_out_stops_and_shows_nothing_of_the_rest():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a", "b", "c", "d"))
            pieces = [Piece(b.partition, b.low, b.end) for b in await driver.bounds(T, True)]
            driver.broker.delete_records("t", {0: 2})
            assert (await looked(driver, pieces=pieces))[:2] == ([], {0: Stop.AGED_OUT})
            assert (await driver.bounds(T, True))[0].low == (2,)
            assert (await looked(driver))[0] == [b"c", b"d"]
            assert (await driver.summaries([T]))[0].messages == 2

    run(test())


def test_a_range_beyond_the_end_is_dry_and_a_following_look_waits_for_more():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a"))
            assert (await looked(driver, pieces=[Piece(0, (0,), (9,))]))[:2] == ([b"a"], {0: Stop.DRY})
            browser = await driver.browse(T, [Piece(0, (0,), None)], COLUMNS, True, frozenset())
            assert len((await browser.read(10, ALL, 0)).batch.rows) == 1
            step = await browser.read(10, ALL, 0.05)
            assert (step.batch, step.reached, step.stopped) == (None, {0: (1,)}, {})
            read = asyncio.create_task(browser.read(10, ALL, 5))
            await asyncio.sleep(0)
            driver.broker.publish("t", rows("b"))
            assert len((await read).batch.rows) == 1

    run(test())


def test_positions_between_rows_mean_the_next_row():
    async def test():
        async with connection() as driver:
            driver.broker.publish("t", rows("a", "b", "c"))
            assert (await looked(driver, pieces=[Piece(0, (0, 0), (1, 0))]))[0] == [b"b"]
            assert (await looked(driver, pieces=[Piece(0, (), (1,))]))[0] == [b"a"]

    run(test())


def test_small_reads_lose_and_repeat_nothing():
    async def test():
        async with connection(partitions=3) as driver:
            driver.broker.publish("t", rows(*map(str, range(50))))
            pieces = [Piece(b.partition, b.low, b.end) for b in await driver.bounds(T, True)]
            browser = await driver.browse(T, pieces, COLUMNS, True, frozenset())
            shown = []
            while (step := await browser.read(7, 5, 0)).batch is not None:
                assert len(step.batch.rows) <= 7
                shown += [data_of(step.batch, i) for i in range(len(step.batch.rows))]
            assert Counter(shown) == Counter(map(str, range(50)))
            assert all(step.reached[p.partition] == p.end for p in pieces)

    run(test())


def test_times_are_found_also_where_producers_set_them_unsorted():
    async def test():
        async with connection(partitions=2) as driver:
            driver.broker.publish("t", [Outbound(b"", partition=0, time_ns=t) for t in (10, 20, 20, 30)])
            assert (await driver.facts(T)).look.sorted_times
            assert await driver.locate(T, {0: 20, 1: 0}) == {0: (1,), 1: None}
            assert await driver.locate(T, {0: 31}) == {0: None}
            driver.broker.publish("t", [Outbound(b"", partition=0, time_ns=t) for t in (5, 40)])
            assert not (await driver.facts(T)).look.sorted_times
            assert (await driver.summaries([T]))[0].last_minute == 0
            driver.broker.publish("t", rows("now"))
            assert (await driver.summaries([T]))[0].last_minute == 1
            assert await driver.locate(T, {0: 31}) == {0: (5,)}
            with pytest.raises(BrokerError, match=r"partition 2 is not there; it has 0\.\.1"):
                await driver.locate(T, {2: 0})

    run(test())


def test_looking_changes_nothing():
    async def test():
        async with connection(partitions=2) as driver:
            driver.broker.publish("t", rows("a", "b"))
            source = await driver.subscribe(sub(), QUEUE)
            await source.pull(1, ALL, 0)

            async def state():
                return (
                    [e async for e in driver.entities()],
                    await driver.facts(T),
                    await driver.backlog(sub()),
                    await driver.facts(sub()),
                )

            before = await state()
            await looked(driver)
            await driver.facts(sub("never used"))
            assert [b.waiting for b in await driver.backlog(sub("never used"))] == [1, 1]
            for call in (driver.facts, driver.backlog):
                with pytest.raises(BrokerError) as caught:
                    await call(sub("s", "missing"))
                assert caught.value.kind is ErrorKind.NOT_FOUND
            assert await state() == before

    run(test())


# ------------------------------------------------------------------ write
def test_a_missing_topic_is_not_found_by_every_call_and_not_made():
    async def test():
        async with connection() as driver:
            missing = Entity(Kind.TOPIC, "missing")
            transaction = await driver.begin("tx", 60)
            for call in (
                lambda: driver.facts(missing),
                lambda: driver.bounds(missing, True),
                lambda: driver.locate(missing, {0: 0}),
                lambda: driver.browse(missing, [], COLUMNS, True, frozenset()),
                lambda: driver.summaries([T, missing]),
                lambda: driver.sender(missing, {}),
                lambda: driver.subscribe(sub("s", "missing"), QUEUE),
                lambda: transaction.send("missing", rows("a")),
            ):
                with pytest.raises(BrokerError, match="topic 'missing' is not there") as caught:
                    await call()
                assert caught.value.kind is ErrorKind.NOT_FOUND
            assert [e.name async for e in driver.entities()] == ["t"]

    run(test())


def test_keys_choose_the_partition_and_keep_their_order_and_others_are_spread():
    async def test():
        async with connection(partitions=4) as driver:
            sender = await driver.sender(T, {})
            sent = [Outbound(b"%d" % i, b"k%d" % (i % 16)) for i in range(5000)]
            results = await sender.send(sent)
            assert all(r.state is Sent.ACCEPTED for r in results)
            places = {}
            for row, result in zip(sent, results, strict=True):
                places.setdefault(row.key, []).append((result.partition, result.position))
            for of_key in places.values():
                assert of_key == sorted(of_key)
                assert len({partition for partition, _ in of_key}) == 1
            spread = Counter(r.partition for r in await sender.send(rows(*"abcdefgh")))
            assert spread == Counter({0: 2, 1: 2, 2: 2, 3: 2})
            assert await sender.send([]) == []

    run(test())


def test_refused_rows_stop_the_later_rows_of_their_key_also_in_a_later_chunk():
    async def test():
        async with connection(partitions=2, max_message_bytes=10) as driver:
            sender = await driver.sender(T, {})
            big = Outbound(b"x" * 11, b"a")
            assert "12 bytes" in sender.check(big)
            assert "no partition 9" in sender.check(Outbound(b"", partition=9))
            assert "'deliver_at'" in sender.check(Outbound(b"", native={"deliver_at": 1}))
            assert sender.check(Outbound(None)) is None
            sent = [big, *rows("1", key=b"a"), *rows("2"), *[Outbound(b"f", b"b")] * 3000, *rows("3", key=b"a")]
            results = await sender.send(sent)
            assert [r.state for r in results[:3]] == [Sent.REFUSED, Sent.REFUSED, Sent.ACCEPTED]
            assert results[-1].state is Sent.REFUSED
            assert "earlier row" in str(results[-1].error)
            assert sum(r.state is Sent.ACCEPTED for r in results) == 3001

    run(test())


def test_a_repeated_send_is_a_duplicate_with_the_first_place():
    async def test():
        async with connection() as driver:
            assert (await driver.facts(T)).dedupe.window_s is None
            sender = await driver.sender(T, {})
            (first,) = await sender.send(rows("a", dedupe=DedupeId("run", 1)))
            again, other = await sender.send(rows("a", dedupe=DedupeId("run", 1)) + rows("a", dedupe=DedupeId("run", 2)))
            assert (again.state, again.id, again.position) == (Sent.DUPLICATE, first.id, first.position)
            assert other.state is Sent.ACCEPTED

    run(test())


def test_options_that_the_broker_does_not_have_are_errors():
    async def test():
        async with connection(families=[Family.RECORD]) as driver:
            driver.broker.create_topic("q", families=[Family.MESSAGE])
            for call, says in (
                (lambda: driver.sender(T, {"linger.ms": 5}), "'linger.ms'"),
                (lambda: driver.subscribe(sub(), TakeOptions(Family.RECORD, native={"x": 1})), "'x'"),
                (lambda: driver.subscribe(sub(), TakeOptions(Family.RECORD, session="s1")), "no sessions"),
                (lambda: driver.subscribe(sub(), TakeOptions(Family.RECORD, start="middle")), "'middle'"),
                (lambda: driver.subscribe(sub(), QUEUE), "t is a log"),
                (lambda: driver.subscribe(sub("s", "q"), GROUP), "q is a queue"),
                (lambda: driver.subscribe(Entity(Kind.SUBSCRIPTION, "s"), GROUP), "name the topic too"),
                (lambda: driver.browse(T, [Piece(1, (), None)], COLUMNS, True, frozenset()), "partition 1 is not there"),
                (lambda: driver.browse(T, [Piece(0, (), None)] * 2, COLUMNS, True, frozenset()), "asked for twice"),
            ):
                with pytest.raises(BrokerError, match=says):
                    await call()
            assert [e.kind async for e in driver.entities()] == [Kind.TOPIC, Kind.TOPIC]
            await driver.subscribe(sub("g"), GROUP)
            driver.broker.create_topic("both")
            await driver.subscribe(sub("g", "both"), GROUP)
            with pytest.raises(BrokerError, match="take another name") as caught:
                await driver.subscribe(sub("g", "both"), QUEUE)
            assert caught.value.kind is ErrorKind.CONFLICT

    run(test())


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({"hosts": ["a", "b"]}, "name 'b'"),
        ({"hosts": ["a"], "path": "p"}, "path 'p'"),
        ({"hosts": [], "options": {"user": "me"}}, "takes one name and like=; leave out the option 'user'"),
        (
            {"hosts": [], "options": {"like": "mqtt"}},
            "no manners like 'mqtt'; there are: jetstream, kafka, pubsub, pulsar, servicebus, share",
        ),
    ],
)
def test_a_wrong_address_is_an_error_and_not_a_default(profile, says):
    with pytest.raises(BrokerError, match=says) as caught:
        run(InmemDriver.open(profile, Host()))
    assert caught.value.kind is ErrorKind.INVALID


def test_administration_refuses_what_cannot_be():
    broker = InmemBroker()
    broker.create_topic("t")
    for wrong, kind in (
        (lambda: broker.create_topic("t"), ErrorKind.CONFLICT),
        (lambda: broker.create_topic(""), ErrorKind.INVALID),
        (lambda: broker.create_topic("x", 0), ErrorKind.INVALID),
        (lambda: broker.create_topic("x", dead_letter="missing"), ErrorKind.NOT_FOUND),
        (lambda: broker.publish("missing", rows("a")), ErrorKind.NOT_FOUND),
    ):
        with pytest.raises(BrokerError) as caught:
            wrong()
        assert caught.value.kind is kind
    assert list(broker.topics) == ["t"]


def test_named_brokers_are_shared_and_private_ones_are_not():
    async def test():
        shared = [await InmemDriver.open({"hosts": ["test-inmem-shared"]}, Host()) for _ in range(2)]
        private = [await InmemDriver.open({"hosts": []}, Host()) for _ in range(2)]
        shared[0].broker.create_topic("t")
        private[0].broker.create_topic("t")
        assert [[e.name async for e in driver.entities()] for driver in (shared[1], private[1])] == [["t"], []]
        source = await shared[0].subscribe(sub(), QUEUE)
        assert [(await driver.facts(sub())).members for driver in shared] == [0, 1]
        await source.close()
        assert (await shared[1].facts(sub())).members == 0

    run(test())


def test_entities_match_the_pattern_topics_first():
    async def test():
        async with connection() as driver:
            driver.broker.create_topic("orders", subscriptions=["debug"], families=[Family.MESSAGE])
            assert [e async for e in driver.entities()] == [T, Entity(Kind.TOPIC, "orders"), sub("debug", "orders")]
            assert [e async for e in driver.entities("o*")] == [Entity(Kind.TOPIC, "orders"), sub("debug", "orders")]
            assert [e async for e in driver.entities("O*")] == []
            assert (await driver.summaries([T]))[0].oldest_ns is None
            assert [s.kind for s in await driver.summaries([T, Entity(Kind.TOPIC, "orders")])] == ["log + queue", "queue"]

    run(test())


# ------------------------------------------------------------------ faults
def test_faults_give_each_state_and_error_once():
    async def test():
        async with connection() as driver:
            broker = driver.broker
            sender, source = await driver.sender(T, {}), await driver.subscribe(sub(), QUEUE)
            broker.fail_next("send", Sent.UNKNOWN, done=True)
            broker.fail_next("send", Sent.UNKNOWN)
            results = await sender.send(rows("kept", "lost", "c"))
            assert [r.state for r in results] == [Sent.UNKNOWN, Sent.UNKNOWN, Sent.ACCEPTED]
            got = await pulled(source)
            assert list(got) == ["kept", "c"]
            for state in (Settled.RETRY, Settled.REFUSED, Settled.LOST):
                broker.fail_next("settle", state)
                (outcome,) = await source.settle([Settlement(got["c"], Verdict.ACK)])
                assert outcome.state is state
                assert outcome.error is not None
            assert await settle(source, [got["c"]]) == [Settled.CONFIRMED]
            for call in (
                lambda: source.pull(1, ALL, 0),
                lambda: source.extend([got["kept"]], 60),
                lambda: driver.facts(T),
                lambda: sender.send(rows("x")),
                lambda: InmemDriver.open({"hosts": ["test-inmem-faults"]}, Host()),
            ):
                down = BrokerError(ErrorKind.UNREACHABLE, "t", "t: gone", retryable=True)
                for name in ("pull", "extend", "facts", "send"):
                    broker.fail_next(name, down)
                InmemBroker.get("test-inmem-faults").fail_next("open", down)
                with pytest.raises(BrokerError, match="t: gone"):
                    await call()
                broker.faults.clear()
                InmemBroker.get("test-inmem-faults").faults.clear()
                await call()

    run(test())


# ------------------------------------------------------------------ many at once, speed
def test_many_publishers_and_consumers_on_threads_lose_and_repeat_nothing():
    async def test():
        async with connection(partitions=3) as driver:
            broker = driver.broker
            threads = [
                threading.Thread(target=lambda n=n: [broker.publish("t", rows(f"{n}-{i}")) for i in range(200)])
                for n in range(10)
            ]
            got = Counter()

            async def consume():
                source = await driver.subscribe(sub(), QUEUE)
                while sum(got.values()) < 2000:
                    batch = await pulled(source, 50, 0.2)
                    got.update(batch.keys())
                    await settle(source, batch.values())

            for thread in threads:
                thread.start()
            await asyncio.gather(*(consume() for _ in range(5)))
            for thread in threads:
                thread.join(5)
            assert got == Counter(f"{n}-{i}" for n in range(10) for i in range(200))

    run(test())


def test_the_loop_is_never_held_for_long():
    async def test():
        async with connection() as driver:
            gaps, running = [], True

            async def beat():
                while running:
                    began = time.perf_counter()
                    await asyncio.sleep(0)
                    gaps.append(time.perf_counter() - began)

            beating = asyncio.create_task(beat())
            sender, source = (
                await driver.sender(T, {}),
                await driver.subscribe(sub(), TakeOptions(Family.MESSAGE, max_held=50_000)),
            )
            await sender.send([Outbound(b"x")] * 50_000)
            tokens = []
            while batch := await source.pull(50_000, ALL, 0):
                tokens += batch.tokens
            assert len(tokens) == 50_000
            assert set(await settle(source, tokens)) == {Settled.CONFIRMED}
            running = False
            await beating
            assert len(gaps) > 40
            assert sorted(gaps)[len(gaps) // 2] < 0.05

    run(test())


# ------------------------------------------------------------------ demo
def test_the_demo_has_what_the_first_five_minutes_show():
    async def test():
        driver = DemoDriver(InmemBroker(), Host())
        fill(driver.broker)
        names = ["orders", "orders.dlq", "payments"]
        summaries = await driver.summaries([Entity(Kind.TOPIC, name) for name in names])
        assert [(s.partitions, s.messages, s.kind) for s in summaries] == [
            (3, 12_000, "log + queue"),
            (1, 37, "log"),
            (2, 8_000, "log + queue"),
        ]
        assert 190 <= summaries[0].last_minute <= 200
        for summary in summaries:
            assert summary.newest_ns <= time.time_ns()
            assert summary.newest_ns - summary.oldest_ns < 3600 * 10**9
        assert driver.about == "embedded broker in this kernel, 3 topics with made-up orders"
        orders = driver.broker.topic("orders")
        newest = sorted((row for log in orders.logs for row in log.rows), key=lambda row: row.time_ns)[-1000:]
        statuses = Counter()
        for row in newest:
            try:
                document = json.loads(row.data)
            except ValueError:
                statuses["undecodable"] += 1
                continue
            assert document["order_id"] > 2**53
            statuses[document.get("status")] += 1
        assert statuses == Counter({"ok": 951, "failed": 43, None: 4, "undecodable": 2})
        assert all([a.name for a in row.attributes] == ["trace", "trace"] for row in newest)
        assert (await driver.facts(sub("debug", "orders"))).lease.max_deliveries == 5
        await driver.close()

    run(test())


def test_the_demo_is_one_per_process_and_quick_to_make():
    assert run(DemoDriver.open({"hosts": []}, Host())).broker is demo_broker() is InmemBroker.get("demo")
    first, second = InmemBroker(), InmemBroker()
    began = time.perf_counter()
    fill(first)
    assert time.perf_counter() - began < 2.0  # 0.2 s on an idle machine
    fill(second)
    for name in first.topics:
        data = [[[row.data for row in log.rows] for log in broker.topic(name).logs] for broker in (first, second)]
        assert data[0] == data[1]


def test_the_demo_takes_no_name():
    with pytest.raises(BrokerError, match="leave out the name 'x'"):
        run(DemoDriver.open({"hosts": ["x"]}, Host()))
