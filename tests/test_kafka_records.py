import asyncio
import threading
import time
import uuid
from dataclasses import replace

import pytest
from confluent_kafka import TopicPartition
from kafka_bed import ALL, RECORDS, Bed, driver, group, pull, run, until_it_fails

from broker_nb.backends.driver import Family, Settled, TakeOptions
from broker_nb.errors import BrokerError, ErrorKind


@pytest.fixture(scope="module")
def bed(kafka_url):
    return Bed(kafka_url)


def filled(bed, partitions=1, rows=10):
    name = bed.topic(partitions)
    for partition in range(partitions):
        bed.put(name, *[b"%d" % i for i in range(rows)], partition=partition)
    return name, group(f"g-{uuid.uuid4().hex[:12]}", name)


def on(bed, body, within=40.0, **profile):
    async def go():
        async with driver(bed.servers, **profile) as opened:
            return await body(opened)

    return run(go(), within)


PROTOCOLS = [{}, {"partition.assignment.strategy": "cooperative-sticky"}, {"group.protocol": "consumer"}]


def numbers(rows):
    return [int(row.data) for row in rows]


@pytest.mark.parametrize("native", PROTOCOLS)
def test_commit_and_go_on(bed, native):
    _, entity = filled(bed)
    options = replace(RECORDS, native=native)

    async def body(opened):
        source = await opened.subscribe(entity, options)
        first = await pull(source, 6)
        outcomes = await source.commit({0: (3, 0)})  # after row 3
        assert outcomes[0].state is Settled.CONFIRMED
        await source.close()
        (line,) = await opened.backlog(entity)
        assert (line.committed, line.end, line.waiting) == ((4,), (10,), 6)
        source = await opened.subscribe(entity, options)
        rest = await pull(source, 6)
        await source.commit({0: (10,)})
        (line,) = await opened.backlog(entity)
        assert line.waiting == 0
        await source.close()
        return numbers(first), numbers(rest)

    assert on(bed, body) == ([0, 1, 2, 3, 4, 5], [4, 5, 6, 7, 8, 9])


def test_nothing_committed_comes_again_and_closing_commits_nothing(bed):
    _, entity = filled(bed)

    async def body(opened):
        for _ in range(2):
            source = await opened.subscribe(entity, RECORDS)
            assert numbers(await pull(source, 10)) == list(range(10))
            await source.close()
        return await opened.backlog(entity)

    assert [line.committed for line in on(bed, body)] == [None]


def test_start_latest_reads_what_comes(bed):
    name, entity = filled(bed)

    async def body(opened):
        source = await opened.subscribe(entity, replace(RECORDS, start="latest"))
        end = time.monotonic() + 15
        while (await opened.facts(entity)).details.get("state") != "stable" or not source.member_id:
            assert time.monotonic() < end
            assert await source.pull(10, ALL, 0.1) is None
        for _ in range(5):  # until the client knows where the end is
            await source.pull(10, ALL, 0.1)
        bed.put(name, b"99")
        return numbers(await pull(source, 1))

    assert on(bed, body) == [99]


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (replace(RECORDS, start="yesterday"), ErrorKind.INVALID),
        (TakeOptions(Family.MESSAGE), ErrorKind.UNSUPPORTED),
        (replace(RECORDS, session="s"), ErrorKind.UNSUPPORTED),
        (replace(RECORDS, native={"no.such.setting": 1}), ErrorKind.INVALID),
    ],
)
def test_wrong_options(bed, options, kind):
    _, entity = filled(bed, rows=0)

    async def body(opened):
        with pytest.raises(BrokerError) as caught:
            await opened.subscribe(entity, options)
        return caught.value.kind

    assert on(bed, body) is kind
    assert entity.name not in bed.groups()


def test_members_besides_us(bed):
    name, entity = filled(bed)
    member = bed.member(entity.name)
    member.subscribe([name])
    assert len(member.consume(10, 15)) == 10

    async def body(opened):
        theirs = (await opened.facts(entity)).members
        stop = threading.Event()
        serving = threading.Thread(target=lambda: [member.poll(0.1) for _ in iter(stop.is_set, True)])
        serving.start()
        source = await opened.subscribe(entity, RECORDS)
        end = time.monotonic() + 15
        while source.member_id is None:
            assert time.monotonic() < end
            await source.pull(10, ALL, 0.1)
        both = (await opened.facts(entity)).members
        await source.close()
        stop.set()
        serving.join()
        return theirs, both

    assert on(bed, body) == (1, 1)
    member.close()


@pytest.mark.parametrize("native", PROTOCOLS)
def test_rebalance_takes_partitions_away(bed, native):
    _, entity = filled(bed, partitions=2)
    options = replace(RECORDS, native=native)

    async def body(opened):
        ours = await opened.subscribe(entity, options)
        assert len(await pull(ours, 20)) == 20
        theirs = await opened.subscribe(entity, options)
        end, got = time.monotonic() + 25, None
        while got is None:
            assert time.monotonic() < end
            await ours.pull(10, ALL, 0.1)
            got = await theirs.pull(100, ALL, 0.1)
        gone = got.rows[0].partition()
        await asyncio.sleep(0)  # events come by way of the loop
        revoked = [e.partitions for e in opened.events if e.kind == "revoked" and e.handle is ours]
        assert gone in frozenset().union(*revoked)
        assert (1 - gone in frozenset().union(*revoked)) == (native == {})  # the classic protocol takes all away at first
        outcomes = await ours.commit({0: (5,), 1: (5,)})
        await ours.seek({gone: (0,)})  # no longer ours: nothing to do, and no error
        await ours.close()
        await theirs.close()
        committed = {line.partition: line.committed for line in await opened.backlog(entity)}
        return outcomes[gone].state, outcomes[1 - gone].state, committed[gone], committed[1 - gone]

    assert on(bed, body) == (Settled.LOST, Settled.CONFIRMED, None, (5,))


def test_seek_gives_rows_back(bed):
    _, entity = filled(bed, partitions=2)

    async def body(opened):
        source = await opened.subscribe(entity, RECORDS)
        assert len(await pull(source, 20)) == 20
        await source.seek({0: (2,), 1: (8, 0)})
        again = await pull(source, 9)
        assert await source.pull(10, ALL, 0.1) is None
        return sorted((row.partition, row.position[0]) for row in again)

    assert on(bed, body) == [*((0, i) for i in range(2, 10)), (1, 9)]


def test_seek_right_after_joining(bed):
    _, entity = filled(bed)

    async def body(opened):
        source = await opened.subscribe(entity, RECORDS)
        end = time.monotonic() + 15
        while source.member_id is None:  # assigned, and nothing fetched yet
            assert time.monotonic() < end
            await source.pull(1, ALL, 0.01)
        await source.seek({0: (7,)})
        return numbers(await pull(source, 3))

    assert on(bed, body) == [7, 8, 9]


def test_cancelled_pull_loses_nothing(bed):
    _, entity = filled(bed, rows=300)

    async def body(opened):
        source = await opened.subscribe(entity, RECORDS)
        got, cancelled, end = [], 0, time.monotonic() + 20
        while len(got) < 300:
            assert time.monotonic() < end
            pulling = asyncio.ensure_future(source.pull(20, ALL, 0.1))
            await asyncio.sleep(0)
            pulling.cancel()
            (first,) = await asyncio.gather(pulling, return_exceptions=True)
            cancelled += isinstance(first, asyncio.CancelledError)
            for batch in (first, await source.pull(7, ALL, 0.1)):
                got += [int(row.value()) for row in getattr(batch, "rows", ())]
        assert cancelled > 10
        return got

    assert on(bed, body) == list(range(300))


def test_commit_waits_for_no_more_than_a_slice(bed):
    _, entity = filled(bed)

    async def body(opened):
        source = await opened.subscribe(entity, RECORDS)
        await pull(source, 10)
        await source.commit({0: (1,)})
        times = []
        for i in range(2, 8):
            began = time.monotonic()
            pulling = asyncio.ensure_future(source.pull(10, ALL, 0.1))
            await asyncio.sleep(0)
            assert (await source.commit({0: (i,)}))[0].state is Settled.CONFIRMED
            times.append(time.monotonic() - began)
            await pulling
        return sorted(times)

    assert on(bed, body)[3] < 0.1 + 0.15


@pytest.mark.slow
def test_thinking_longer_than_the_poll_interval(bed):
    _, entity = filled(bed)
    native = {"max.poll.interval.ms": 6000, "session.timeout.ms": 6000}

    async def body(opened):
        source = await opened.subscribe(entity, replace(RECORDS, native=native, max_held=3))
        first = await pull(source, 3)
        member = source.member_id
        await asyncio.sleep(8)  # the pause itself is what is tested
        assert (await source.commit({0: (3,)}))[0].state is Settled.CONFIRMED
        rest = await pull(source, 7)
        assert source.member_id == member
        assert [e.kind for e in opened.events] == []
        return numbers(first), numbers(rest)

    assert on(bed, body) == ([0, 1, 2], [3, 4, 5, 6, 7, 8, 9])


def test_idle_member_lets_another_one_in(bed):
    """A rebalance is not held up by a member whose person thinks."""
    name, entity = filled(bed, partitions=2)

    async def body(opened):
        ours = await opened.subscribe(entity, RECORDS)
        await pull(ours, 20)
        member = bed.member(entity.name)
        member.subscribe([name])
        began = time.monotonic()
        row = await asyncio.to_thread(member.poll, 15)
        waited = time.monotonic() - began
        await asyncio.to_thread(member.close)
        assert row is not None
        assert row.error() is None
        return waited

    assert on(bed, body) < 10


@pytest.mark.parametrize("native", PROTOCOLS)
def test_a_partition_that_an_idle_member_lost_is_read_when_it_comes_back(bed, native):
    """An idle member's partitions are paused, and the client remembers that while another member has them."""
    name, entity = filled(bed, partitions=2)

    async def body(opened):
        ours = await opened.subscribe(entity, replace(RECORDS, native=native))
        await pull(ours, 20)
        await ours.commit({0: (10,), 1: (10,)})
        member = bed.member(entity.name, **native)
        member.subscribe([name])
        end = time.monotonic() + 20
        while not member.assignment():  # given up while ours is idle
            assert time.monotonic() < end
            assert await asyncio.to_thread(member.poll, 0.1) is None
        assert await ours.pull(1, ALL, 0.1) is None
        await asyncio.to_thread(member.close)
        bed.put(name, b"10", partition=0)
        bed.put(name, b"10", partition=1)
        came = set()  # a row may come twice, when the other one comes to us in a later rebalance
        while came != {0, 1}:
            came |= {row.partition for row in await pull(ours, 1)}

    on(bed, body, 80)


def test_close_in_the_middle_of_a_slice_and_twice(bed):
    _, entity = filled(bed, rows=0)

    async def body(opened):
        source = await opened.subscribe(entity, RECORDS)
        await source.pull(10, ALL, 0.1)
        pulling = asyncio.ensure_future(source.pull(10, ALL, 0.1))
        await asyncio.sleep(0)
        began = time.monotonic()
        await source.close()
        await source.close()
        assert time.monotonic() - began < 2.1
        assert await pulling is None
        assert (await opened.facts(entity)).members == 0
        for call in (source.pull(1, ALL, 0.1), source.commit({0: (1,)}), source.seek({0: (0,)})):
            with pytest.raises(BrokerError) as caught:
                await call
            assert caught.value.kind is ErrorKind.CLOSED
        return [e.kind for e in opened.events]

    assert on(bed, body) == []


def test_rows_are_not_settled_one_by_one(bed):
    _, entity = filled(bed)

    async def body(opened):
        source = await opened.subscribe(entity, RECORDS)
        for call in (source.settle([]), source.extend([], 1.0)):
            with pytest.raises(BrokerError) as caught:
                await call
            assert caught.value.kind is ErrorKind.UNSUPPORTED

    on(bed, body)


def test_aborted_rows_do_not_come_and_read_uncommitted_can_be_asked_for(bed):
    name, entity = filled(bed, rows=0)
    producer = bed.transactional()
    producer.begin_transaction()
    bed.put(name, b"1", producer=producer)
    producer.abort_transaction(10)
    bed.put(name, b"2")

    async def body(opened):
        source = await opened.subscribe(entity, RECORDS)
        committed = numbers(await pull(source, 1))
        other = replace(RECORDS, native={"isolation.level": "read_uncommitted"})
        source = await opened.subscribe(group(entity.name + "-u", name), other)
        return committed, numbers(await pull(source, 2))

    assert on(bed, body) == ([2], [1, 2])


@pytest.mark.parametrize("start", ["earliest", "latest"])
@pytest.mark.parametrize("native", PROTOCOLS)
def test_position_that_aged_out_is_told_and_nothing_that_is_there_is_skipped(bed, start, native):
    name, entity = filled(bed)
    member = bed.member(entity.name)
    member.commit(offsets=[TopicPartition(name, 0, 2)], asynchronous=False)
    member.close()
    bed.delete_before(name, 5)

    async def body(opened):
        source = await opened.subscribe(entity, replace(RECORDS, start=start, native=native))
        with pytest.raises(BrokerError, match="rows from 2 of partition 0") as caught:
            await until_it_fails(lambda: source.pull(1, ALL, 0.1), 15)
        return caught.value.kind, numbers(await pull(source, 5))

    assert on(bed, body) == (ErrorKind.AGED_OUT, [5, 6, 7, 8, 9])


def test_topic_deleted_under_a_member(bed):
    name, entity = filled(bed)

    async def body(opened):
        source = await opened.subscribe(entity, RECORDS)
        await pull(source, 10)
        bed.admin.delete_topics([name])[name].result(10)
        with pytest.raises(BrokerError, match=name) as caught:
            await until_it_fails(lambda: source.pull(10, ALL, 0.1), 15)
        return caught.value.kind

    options = {"topic.metadata.refresh.interval.ms": "500", "topic.metadata.propagation.max.ms": "500"}
    assert on(bed, body, options=options) is ErrorKind.NOT_FOUND
    assert name not in bed.topics()
