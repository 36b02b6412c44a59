"""The portable layer on a real Kafka: members beside each other, and a server that is killed while somebody waits for it."""

import asyncio
import contextlib
import os
import time
import uuid

import pytest
from kafka_bed import Bed

from broker_nb.backends.driver import COLUMNS, Outbound, Sent
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.client import Client
from broker_nb.portable.loop import shared_loop
from broker_nb.portable.ranges import parse_range
from broker_nb.testing.servers import OwnServer, ServerMissing

QUICK = {"message.timeout.ms": "5000", "socket.timeout.ms": "5000"}


@pytest.fixture(scope="module")
def bed(kafka_url):
    return Bed(kafka_url)


@contextlib.asynccontextmanager
async def connected(bed, **options):
    client = await Client.open("kafka", {"hosts": [bed.servers], "options": options})
    try:
        yield client
    finally:
        await client.close()


def on(bed, body, within=60, **options):
    """Run `await body(client)` on the loop thread."""

    async def go():
        async with asyncio.timeout(within), connected(bed, **options) as client:
            return await body(client)

    return shared_loop().run(go())


def filled(bed, partitions=1, rows=10):
    name = bed.topic(partitions)
    for partition in range(partitions):
        bed.put(name, *[b"%d" % i for i in range(rows)], partition=partition)
    return name, f"g-{uuid.uuid4().hex[:12]}"


async def records(subscription, count, within=15):
    found, end = [], time.monotonic() + within
    while len(found) < count and time.monotonic() < end:
        found += await subscription.next_batch(0.5, count=count - len(found))
    assert len(found) == count
    return found


# ------------------------------------------------------------------ members
def test_live_members_are_not_robbed_unasked(bed):
    name, group = filled(bed, partitions=2)

    async def body(ours):
        async with connected(bed) as theirs:
            await records(await theirs.subscribe(name, group), 20)
            with pytest.raises(BrokerError, match="1 live member") as caught:
                await ours.subscribe(name, group)
            assert "join=True" in str(caught.value)
            joined = await ours.subscribe(name, group, join=True)
            assert await ours.subscribe(name, group) is joined  # we are no stranger to ourselves
            return caught.value.kind

    assert on(bed, body) is ErrorKind.CONFLICT


def test_two_subscriptions_of_one_connection_do_not_touch_each_other(bed):
    (name, one), (other, two) = filled(bed), filled(bed, rows=5)

    async def body(client):
        first, second, third = [await client.subscribe(t, g) for t, g in ((name, one), (name, two), (other, two + "-b"))]
        rows = await asyncio.gather(records(first, 10), records(second, 10), records(third, 5))
        await rows[0][-1].commit_to()
        await client.unsubscribe(name, one)
        await rows[1][2].commit_to()
        places = [(await client.backlog(t, g))[0].waiting for t, g in ((name, one), (name, two), (other, two + "-b"))]
        return [len(r) for r in rows], places

    assert on(bed, body) == ([10, 10, 5], [0, 7, None])


def test_a_partition_that_was_taken_over_cannot_be_committed(bed):
    name, group = filled(bed, partitions=2)

    async def body(ours):
        mine = await ours.subscribe(name, group)
        rows = await records(mine, 20)
        async with connected(bed) as theirs:
            other, end, seen = await theirs.subscribe(name, group, join=True), time.monotonic() + 30, []
            while not seen:  # the group is balanced anew when both of us have polled
                assert time.monotonic() < end
                seen += await other.next_batch(0.2)
                await mine.next_batch(0.1)
            gone = seen[0].partition
            outcomes = {}
            for partition in (0, 1):
                last = [row for row in rows if row.partition == partition][-1]
                try:
                    await last.commit_to()
                    outcomes[partition] = None
                except BrokerError as error:
                    outcomes[partition] = error.kind
            await other.commit([], through=True)
            waiting = {line.partition: line.committed for line in await ours.backlog(name, group)}
            return gone, outcomes, waiting

    gone, outcomes, committed = on(bed, body)
    assert outcomes[gone] is ErrorKind.LEASE_LOST
    assert committed[gone] is None


def test_where_a_new_group_begins(bed):
    name, group = filled(bed)

    async def body(client):
        late = await client.subscribe(name, group + "-late", start="latest")
        early = await client.subscribe(name, group)
        assert await late.next_batch(3) == []  # it is a member now, at the end
        assert len(await records(early, 10)) == 10
        await (await client.topic(name)).send([Outbound(b"new")], [])
        return [row.data for row in (await records(late, 1)) + (await records(early, 1))]

    assert on(bed, body) == [b"new", b"new"]


# ------------------------------------------------------------------ publishing
def published(bed, name, rows, **options):
    """What became of rows, and what is there then."""

    async def body(client):
        results = []
        await (await client.topic(name)).send(rows, results)
        look = await client.look(name, parse_range("..end"), want=COLUMNS)
        return results, [row.value() async for batch in look.batches(20) for row in batch.rows]

    return on(bed, body, **options)


def test_rows_that_cannot_be_sent_stop_their_key_only_and_nothing_is_made(bed):
    name, before = bed.topic(), (bed.topics(), bed.groups())
    rows = [
        Outbound(b"0", b"a"),
        Outbound(b"1" * 2_000_000, b"a"),
        Outbound(b"2", b"a"),
        Outbound(b"3", b"b"),
        Outbound(b"4", b"c", (), 9),
        Outbound(b"5", b"c"),
        Outbound(b"6"),
    ]
    results, there = published(bed, name, rows)
    assert [i for i, r in enumerate(results) if r.state is Sent.ACCEPTED] == [0, 3, 6]
    assert [r.error.kind for r in results if r.error] == [ErrorKind.INVALID, ErrorKind.CONFLICT] * 2
    assert "no partition 9; there are 0..0" in str(results[4].error)
    assert there == [b"0", b"3", b"6"]
    assert (bed.topics(), bed.groups()) == before


def test_neither_idempotence_nor_topics_that_make_themselves_can_be_switched_by_options(bed):
    options = {"enable.idempotence": "false", "acks": "0", "allow.auto.create.topics": "true"}
    results, there = published(bed, bed.topic(), [Outbound(b"x")], **options)
    assert results[0].position == (0,)  # which acks=0 would not know
    assert there == [b"x"]
    missing = f"missing-{uuid.uuid4().hex}"
    with pytest.raises(BrokerError, match=missing) as caught:
        published(bed, missing, [Outbound(b"x")], **options)
    assert caught.value.kind is ErrorKind.NOT_FOUND
    assert missing not in bed.topics()


# ------------------------------------------------------------------ a server that is killed
@pytest.fixture(scope="module")
def mortal():
    try:
        server = OwnServer("kafka")
    except ServerMissing as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))
    with server:
        yield server


def with_own_server(test):
    return pytest.mark.slow(pytest.mark.xdist_group("servers")(test))


class Killed:
    """The server away for as long as the block lasts."""

    def __init__(self, server):
        self.server = server

    async def __aenter__(self):
        await asyncio.to_thread(self.server.kill)

    async def __aexit__(self, *_):
        await asyncio.to_thread(self.server.start)


@with_own_server
def test_a_look_at_a_killed_server_ends_and_says_so(mortal):
    bed = Bed(mortal.url)
    name = bed.topic()
    bed.put(name, *[b"x" * 100_000] * 1500)  # more than the client fetches ahead

    async def body(client):
        look, shown, failed = await client.look(name, parse_range("..end"), want=COLUMNS), 0, None
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with contextlib.aclosing(look.batches(20, 5)) as batches:
                    async for batch in batches:
                        if not shown:
                            await stack.enter_async_context(Killed(mortal))
                            began = time.monotonic()
                        shown += len(batch.rows)
            except BrokerError as error:
                failed = error
            seconds = time.monotonic() - began
        again = await client.look(name, parse_range("-3"), want=COLUMNS)
        rows = [row async for batch in again.batches(20) for row in batch.rows]
        return shown, failed, look.summary, seconds, len(rows), again.summary.complete

    shown, failed, summary, seconds, after, complete = on(bed, body, within=100, **QUICK)
    assert shown < 1500
    assert seconds < 25
    assert summary.complete is False or failed is not None
    assert summary.why or failed.kind is ErrorKind.UNREACHABLE
    assert (after, complete) == (3, True)  # the connection goes on when the server is back


@with_own_server
def test_a_member_of_a_killed_server_goes_on_where_it_stood(mortal):
    bed = Bed(mortal.url)
    name, group = filled(bed)

    async def body(client):
        subscription = await client.subscribe(name, group)
        rows = await records(subscription, 10)
        await rows[3].commit_to()
        async with Killed(mortal):
            began = time.monotonic()
            with pytest.raises(BrokerError) as caught:
                await rows[6].commit_to()
            seconds = time.monotonic() - began
        (line,) = await client.backlog(name, group)  # the connection's other clients are back, too
        end, again = time.monotonic() + 40, []
        while not again or again[-1].offset < 9:  # rows that were not committed come again, if the member was thought dead
            assert time.monotonic() < end
            with contextlib.suppress(BrokerError):  # lost with the membership
                await rows[6].commit_to()
                break
            again += await subscription.next_batch(0.5)
        return (
            caught.value,
            seconds,
            line.committed,
            [row.offset for row in again],
            (await client.backlog(name, group))[0].committed,
        )

    error, seconds, stood, again, stands = on(bed, body, within=110, **QUICK)
    assert seconds < 15
    assert error.retryable
    assert stood in ((4,), (7,))  # the commit that was not answered may have been stored
    assert again == list(range(stands[0], 10)) if again else stands == (7,)
