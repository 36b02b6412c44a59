import asyncio
import json
import os
import signal
import time

import pytest
from nats_bed import ALL, Bed, on, take, until_it_fails
from test_jetstream_look import EXPECTED, HOSTILE

from broker_nb.backends.driver import Entity, Kind, Settled, Settlement, Verdict
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.testing.servers import OwnServer
from broker_nb.testing.watch import disagreements

ACK, RELEASE, REJECT = Verdict.ACK, Verdict.RELEASE, Verdict.REJECT


@pytest.fixture(scope="module")
def bed(nats_url):
    return Bed(nats_url)


async def settle(source, verdict, *tokens, **more):
    return [o.state for o in await source.settle([Settlement(t, verdict, **more) for t in tokens])]


async def refused(call, *words):
    with pytest.raises(BrokerError) as caught:
        await call
    assert all(word in str(caught.value) for word in words), caught.value
    return caught.value.kind


def test_rows_that_look_like_status_frames(bed):
    """A header `Status`, repeats, spaces, empty bodies: rows are what has a subject for its ack, and they are complete."""
    name = bed.stream()
    consumer = bed.consumer(name)
    bed.put(name, b"", b"x", raw=HOSTILE)
    bed.put(name, b"")
    for status in (b"100", b"408", b"409", b"503"):
        bed.put(name, b"", raw=b"Status: " + status + b"\r\nKey: k")

    async def body(opened):
        source = await opened.source(name, consumer)
        return await take(source, 7)

    rows = [row for row, _ in on(bed, body)]
    assert [r.data for r in rows] == [b"", b"x", b"", b"", b"", b"", b""]
    assert [[(a.name, a.value) for a in r.attributes] for r in rows[:3]] == [EXPECTED, EXPECTED, []]
    assert [(r.key, r.attributes[0].value) for r in rows[3:]] == [(b"k", s) for s in (b"100", b"408", b"409", b"503")]
    assert {(r.topic, r.delivery_count) for r in rows} == {(name, 1)}
    assert [r.id for r in rows] == [str(i) for i in range(1, 8)]


def test_a_pull_does_not_wait_to_fill_up(bed):
    name = bed.stream()
    consumer = bed.consumer(name)

    async def body(opened):
        source = await opened.source(name, consumer)
        assert await source.pull(20, ALL, 0) is None
        await asyncio.to_thread(bed.put, name, *[b"%d" % i for i in range(10)])
        began = time.monotonic()
        batch = await source.pull(20, ALL, 0.2)
        assert time.monotonic() - began < 0.15
        assert (len(batch.rows), disagreements(batch.codec, batch.rows)) == (10, [])
        waiting = asyncio.ensure_future(take(source, 1))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(bed.put, name, b"late")
        assert [r.data for r, _ in await waiting] == [b"late"]

    on(bed, body)


def test_full_max_ack_pending(bed):
    """It is no time-out: it is told, at once where all rows are ours; after an ack the next one comes."""
    name = bed.stream()
    consumer = bed.consumer(name, max_ack_pending=5)
    bed.put(name, *[b"%d" % i for i in range(10)])

    async def body(opened):
        source, other = await opened.source(name, consumer), await opened.source(name, consumer)
        ours = await take(source, 4)
        (theirs,) = await take(other, 1)
        assert await refused(source.pull(10, ALL, 0.2), consumer, "max_ack_pending=5", "4 of them here") is ErrorKind.NO_CREDIT
        assert await settle(source, ACK, ours[0][1]) == [Settled.CONFIRMED]
        ours += await take(source, 1)
        assert [r.data for r, _ in ours] == [b"0", b"1", b"2", b"3", b"5"]
        assert theirs[0].data == b"4"
        limited = await opened.source(name, consumer, max_held=1)
        await settle(source, ACK, ours[1][1])
        await take(limited, 1)
        assert await refused(limited.pull(10, ALL, 0.2), consumer) is ErrorKind.NO_CREDIT
        waits = await opened.source(name, consumer)
        assert await waits.pull(10, ALL, 0.1) is None  # nothing here that could be settled: others hold it all

    on(bed, body)


def test_a_lease_that_ran_out_is_lost_and_the_new_delivery_untouched(bed):
    name = bed.stream()
    consumer = bed.consumer(name, ack_wait=1_000_000_000)
    bed.put(name, b"slow", b"other")

    async def body(opened):
        source, other = await opened.source(name, consumer), await opened.source(name, consumer)
        (slow, token), (_, second) = await take(source, 2)
        began = time.monotonic()
        found = await take(other, 2)  # when their time is up
        assert 0.9 < time.monotonic() - began < 5
        assert {(r.id, r.delivery_count) for r, _ in found} == {(slow.id, 2), ("2", 2)}
        for verdict in (ACK, RELEASE, REJECT):
            assert await settle(source, verdict, token, second) == [Settled.LOST, Settled.LOST]
        assert await source.extend([token], 30) == [None]
        info = await asyncio.to_thread(bed.consumer_info, name, consumer)
        assert (info["num_ack_pending"], info["ack_floor"]["stream_seq"]) == (2, 0)
        assert await settle(other, ACK, *(t for _, t in found)) == [Settled.CONFIRMED] * 2

    on(bed, body)


def test_extending(bed):
    """A second twice over; only what was extended stays."""
    name = bed.stream()
    consumer = bed.consumer(name, ack_wait=1_000_000_000)
    bed.put(name, b"kept", b"left")

    async def body(opened):
        source = await opened.source(name, consumer)
        (_, kept), (_, left) = await take(source, 2)
        for _ in range(5):
            await asyncio.sleep(0.4)
            (until,) = await source.extend([kept], 1.0)
            assert 0.5 < until - time.monotonic() <= 1.0
        assert await source.extend([left, "never"], 1.0) == [None, None]
        assert await settle(source, ACK, kept, left) == [Settled.CONFIRMED, Settled.LOST]
        return [(r.data, r.delivery_count) for r, _ in await take(source, 1)]

    ((data, count),) = on(bed, body)
    assert data == b"left"
    assert count >= 2


def test_leases_by_backoff(bed):
    name = bed.stream()
    consumer = bed.consumer(name, backoff=[200_000_000, 1_500_000_000], max_deliver=3)
    bed.put(name, b"x")

    async def body(opened):
        facts = await opened.driver.facts(Entity(Kind.SUBSCRIPTION, consumer, name))
        assert (facts.lease.seconds, facts.lease.max_deliveries, facts.lease.return_counts) == (0.2, 3, True)
        source = await opened.source(name, consumer)
        first = await source.pull(1, ALL, 0.2)
        assert first.leased_until - time.monotonic() < 0.21
        (again,) = await take(source, 1)
        assert again[0].delivery_count == 2
        await asyncio.sleep(0.4)  # longer than the first lease
        assert await settle(source, ACK, again[1]) == [Settled.CONFIRMED]

    on(bed, body)


def test_settling(bed):
    """Confirmed by the server: done, given back, given back for later, never again, with the reason in the server's advisory."""
    name = bed.stream()
    consumer = bed.consumer(name)
    bed.put(name, *[b"%d" % i for i in range(5)])

    async def body(opened):
        source = await opened.source(name, consumer)
        advisories = []
        inbox = await opened.driver._wire.subscribe(f"$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{name}.{consumer}")
        opened.driver._wire._inboxes[inbox._id] = type("Inbox", (), {"take": advisories.append, "cut": print, "about": ""})()
        rows = await take(source, 5)
        tokens = [t for _, t in rows]
        assert await settle(source, ACK, tokens[0], "never") == [Settled.CONFIRMED, Settled.LOST]
        assert await settle(source, RELEASE, tokens[1]) == [Settled.CONFIRMED]
        assert await settle(source, RELEASE, tokens[2], delay=0.5) == [Settled.CONFIRMED]
        assert await settle(source, REJECT, tokens[3], reason="no such order") == [Settled.CONFIRMED]
        assert await settle(source, REJECT, tokens[4]) == [Settled.CONFIRMED]
        began = time.monotonic()
        (now,) = await take(source, 1)
        assert time.monotonic() - began < 0.4
        (later,) = await take(source, 1)
        assert 0.4 < time.monotonic() - began < 5
        assert [(r.data, r.delivery_count) for r, _ in (now, later)] == [(b"1", 2), (b"2", 2)]
        assert await settle(source, ACK, now[1], later[1]) == [Settled.CONFIRMED] * 2
        assert [json.loads(a.data).get("reason") for a in advisories] == ["no such order", None]
        return await asyncio.to_thread(bed.consumer_info, name, consumer)

    info = on(bed, body)
    assert (info["num_ack_pending"], info["num_pending"], info["ack_floor"]["stream_seq"]) == (0, 0, 5)


@pytest.mark.parametrize("retention", ["workqueue", "interest"])
def test_queues(bed, retention):
    """What is acked is gone from the stream, what is given back is not."""
    name = bed.stream(retention=retention, max_consumers=1 if retention == "interest" else -1)
    consumer = bed.consumer(name)
    bed.put(name, b"1", b"2")

    async def body(opened):
        source = await opened.source(name, consumer)
        (_, done), (_, back) = await take(source, 2)
        assert await settle(source, ACK, done) == [Settled.CONFIRMED]
        assert await settle(source, RELEASE, back) == [Settled.CONFIRMED]
        assert await refused(opened.source(name, "second", create=True), "second") is ErrorKind.CONFLICT
        return (await asyncio.to_thread(bed.state, name))["messages"]

    assert on(bed, body) == 1


def test_closing_gives_back_at_once(bed):
    """Also what came for a pull that nobody waited for; the lease of half a minute is not waited for."""
    name = bed.stream()
    consumer = bed.consumer(name)

    async def body(opened):
        source = await opened.source(name, consumer)
        pulling = asyncio.ensure_future(source.pull(5, ALL, 0.2))
        await asyncio.sleep(0.02)
        pulling.cancel()
        await asyncio.gather(pulling, return_exceptions=True)
        await asyncio.to_thread(bed.put, name, *[b"%d" % i for i in range(5)])
        began = time.monotonic()
        await source.close()
        await source.close()
        assert time.monotonic() - began < 2
        assert await refused(source.pull(1, ALL, 0), consumer) is ErrorKind.CLOSED
        again = await opened.source(name, consumer)
        assert sorted(r.data for r, _ in await take(again, 5, 3)) == [b"%d" % i for i in range(5)]

    on(bed, body)


def test_a_server_that_does_not_answer():
    """An ack is tried again; what was given back is not: by then somebody else may have it. Closing does not wait for long."""
    with OwnServer("nats") as server:
        bed = Bed(server.url)
        name = bed.stream()
        consumer = bed.consumer(name, ack_wait=20_000_000_000)
        bed.put(name, b"1", b"2", b"3")

        async def body(opened):
            source = await opened.source(name, consumer)
            (_, done), (_, back), (_, bad) = await take(source, 3)
            os.kill(server.pid, signal.SIGSTOP)
            try:
                await asyncio.to_thread(os.waitid, os.P_PID, server.pid, os.WSTOPPED)
                items = [Settlement(done, ACK), Settlement(back, RELEASE), Settlement(bad, REJECT)]
                outcomes = await source.settle(items)
                assert [o.state for o in outcomes] == [Settled.RETRY, Settled.LOST, Settled.RETRY]
                assert {o.error.kind for o in outcomes} == {ErrorKind.TIMEOUT}
                error = await until_it_fails(lambda: source.pull(1, ALL, 0.2))
                assert (error.kind, error.retryable) == (ErrorKind.TIMEOUT, True)
                began = time.monotonic()
                await source.close()
                assert time.monotonic() - began < 2
            finally:
                os.kill(server.pid, signal.SIGCONT)
            other = await opened.source(name, consumer)
            assert [r.data for r, _ in await take(other, 1)] == [b"2"]

        on(bed, body, timeout=1.0)


def test_a_row_that_comes_too_late(bed):
    """For a pull that was given up: it goes back at once, and not when its lease of half a minute is over."""
    name = bed.stream()
    consumer = bed.consumer(name)

    async def body(opened):
        source = await opened.source(name, consumer)
        pulling = asyncio.ensure_future(source.pull(1, ALL, 0.2))
        await asyncio.sleep(0.02)
        assert source.waits
        opened.driver._wire._inboxes.pop(source._inbox.key)  # as if it was not answered in time, and the server did not hear yet
        await asyncio.to_thread(bed.put, name, b"late")
        assert await pulling is None
        other = await opened.source(name, consumer)
        assert [(r.data, r.delivery_count > 1) for r, _ in await take(other, 1, 5)] == [(b"late", True)]

    on(bed, body)


def test_a_consumer_that_is_deleted_meanwhile(bed):
    name = bed.stream()
    consumer = bed.consumer(name)
    bed.put(name, b"1")

    async def body(opened):
        source = await opened.source(name, consumer)
        ((_, token),) = await take(source, 1)
        waiting = asyncio.ensure_future(source.pull(1, ALL, 0.2))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(bed.api, f"CONSUMER.DELETE.{name}.{consumer}")
        assert await refused(waiting, consumer, "create=True") is ErrorKind.NOT_FOUND
        assert await refused(source.pull(1, ALL, 0.2), consumer) is ErrorKind.NOT_FOUND
        (outcome,) = await source.settle([Settlement(token, ACK)])
        assert (outcome.state, outcome.error.kind) == (Settled.LOST, ErrorKind.NOT_FOUND)

    on(bed, body)
    assert bed.api(f"CONSUMER.NAMES.{name}")["consumers"] == []


def test_limits_of_the_consumer(bed):
    """Its own bounds for requests are kept to; a row that is larger than the bytes asked for comes all the same."""
    name = bed.stream()
    consumer = bed.consumer(name, max_batch=3, max_expires=50_000_000, max_bytes=10_000)
    bed.put(name, *[b"%d" % i for i in range(5)], bytes(50_000), b"last")

    async def body(opened):
        source = await opened.source(name, consumer)
        found = await take(source, 7)
        assert [len(r.data) for r, _ in found] == [1, 1, 1, 1, 1, 50_000, 4]
        assert await source.pull(10, ALL, 0.2) is None

    on(bed, body)


def test_large_rows(bed):
    """Not more at once than a client can take: the server would drop it."""
    name = bed.stream(storage="file")
    consumer = bed.consumer(name)
    bed.put(name, *[bytes(900_000) for _ in range(60)])

    async def body(opened):
        source = await opened.source(name, consumer)
        batches, until = [], time.monotonic() + 20
        while sum(batches) < 60:
            assert time.monotonic() < until
            batch = await source.pull(1000, ALL, 0.2)
            batches.append(len(batch.rows) if batch else 0)
        assert max(batches) < 20
        assert opened.events == []

    on(bed, body)


FOREIGN = {
    "a push consumer": {"deliver_subject": "somewhere"},
    "ack policy none": {"ack_policy": "none"},
    "ack policy all": {"ack_policy": "all"},
    "headers only": {"headers_only": True},
    "priority groups": {"priority_groups": ["a"], "priority_policy": "overflow"},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_consumers_of_another_kind(bed, what):
    name = bed.stream()
    consumer = bed.consumer(name, **FOREIGN[what])
    before = bed.snapshot(name)

    async def body(opened):
        assert await refused(opened.source(name, consumer, create=True), consumer, what) is ErrorKind.UNSUPPORTED
        facts = opened.driver.facts(Entity(Kind.SUBSCRIPTION, consumer, name))
        assert await refused(facts, consumer, what) is ErrorKind.UNSUPPORTED

    on(bed, body)
    assert bed.snapshot(name) == before


def test_an_ephemeral_consumer(bed):
    name = bed.stream()
    made = bed.api(f"CONSUMER.CREATE.{name}.gone", stream_name=name, config={"name": "gone", "ack_policy": "explicit"})
    assert made["name"] == "gone"
    assert on(bed, lambda opened: refused(opened.source(name, "gone"), "ephemeral")) is ErrorKind.UNSUPPORTED


def test_creating(bed):
    """Only when told to; from the start or only what comes; with settings by the client's names; never changed afterwards."""
    name = bed.stream()
    bed.put(name, b"old")

    async def body(opened):
        for call in (opened.source(name, "new"), opened.driver.facts(Entity(Kind.SUBSCRIPTION, "new", name))):
            assert await refused(call, "new", name, "create=True") is ErrorKind.NOT_FOUND
        assert (await asyncio.to_thread(bed.api, f"CONSUMER.NAMES.{name}"))["consumers"] == []
        for native in ({"ack_waits": 1}, {"deliver_subject": "x"}, {"ack_policy": "none"}):
            assert await refused(opened.source(name, "new", create=True, native=native), "new", *native) is ErrorKind.INVALID
        native = {"ack_wait": 1.5, "max_deliver": 4, "metadata": {"owner": "me"}}
        source = await opened.source(name, "new", create=True, native=native, max_held=7)
        await opened.source(name, "new", create=True, native={"ack_wait": 1.5})
        kind = await refused(opened.source(name, "new", create=True, native={"ack_wait": 2}), "new", "ack_wait")
        assert kind is ErrorKind.CONFLICT
        late = await opened.source(name, "late", create=True, start="latest")
        await asyncio.to_thread(bed.put, name, b"young")
        assert [r.data for r, _ in await take(source, 2)] == [b"old", b"young"]
        assert [r.data for r, _ in await take(late, 1)] == [b"young"]
        for bad in ("a.b", "a b", "*", "", "a/b", "x\ny", "\ud800"):
            assert await refused(opened.source(name, bad, create=True)) is ErrorKind.INVALID

    on(bed, body)
    config = bed.consumer_info(name, "new")["config"]
    assert (config["ack_wait"], config["max_deliver"], config["max_ack_pending"]) == (1_500_000_000, 4, 7)
    assert config["metadata"]["owner"] == "me"


def test_taking_from_a_subject(bed):
    root = f"t{time.time_ns()}"
    name = bed.stream(subjects=[f"{root}.>"])
    bed.put(f"{root}.eu", b"1")
    bed.put(f"{root}.us", b"2")
    everything = bed.consumer(name)

    async def body(opened):
        source = await opened.source(f"{root}.us", "us", create=True)
        assert [(r.topic, r.data) for r, _ in await take(source, 1)] == [(f"{root}.us", b"2")]
        assert await source.pull(1, ALL, 0.1) is None
        kind = await refused(opened.source(f"{root}.us", everything), everything, f"stream:{name}")
        assert kind is ErrorKind.CONFLICT
        assert len(await take(await opened.source(f"stream:{name}", everything), 2)) == 2

    on(bed, body)


def test_members_and_backlog(bed):
    name = bed.stream()
    consumer = bed.consumer(name)
    bed.put(name, *[b"%d" % i for i in range(5)])
    entity = Entity(Kind.SUBSCRIPTION, consumer, name)

    async def body(opened):
        source = await opened.source(name, consumer)
        rows = await take(source, 3)
        await settle(source, ACK, rows[0][1])
        (line,) = await opened.driver.backlog(entity)
        assert (line.committed, line.end, line.waiting, line.held) == ((2,), (6,), 2, 2)
        await take(source, 2)
        pulling = asyncio.ensure_future(source.pull(1, ALL, 0.2))
        await asyncio.sleep(0.02)
        assert (await opened.driver.facts(entity)).members == 0  # our own waits, and is none
        await pulling

        async def other(connection):
            inbox = connection.new_inbox()
            await connection.subscribe(inbox)
            request = json.dumps({"batch": 1, "expires": 5_000_000_000}).encode()
            await connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{name}.{consumer}", request, reply=inbox)
            await connection.flush()
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(opened.driver.facts(entity), loop))

        loop = asyncio.get_running_loop()
        assert (await asyncio.to_thread(bed.run, other)).members == 1

    on(bed, body)


def test_a_server_that_is_killed_while_rows_are_held():
    """A pull and a settlement are errors that may be tried again, at once; after a restart every row is there that was not acked."""
    with OwnServer("nats") as server:
        bed = Bed(server.url)
        name = bed.stream(storage="file")
        consumer = bed.consumer(name)
        bed.put(name, *[b"%d" % i for i in range(10)])

        async def body(opened):
            source = await opened.source(name, consumer)
            rows = await take(source, 5)
            server.kill()
            began = time.monotonic()
            error = await until_it_fails(lambda: source.pull(1, ALL, 0.2))
            assert (error.kind, error.retryable) == (ErrorKind.UNREACHABLE, True)
            outcomes = await source.settle([Settlement(t, ACK) for _, t in rows])
            assert {o.state for o in outcomes} == {Settled.RETRY}
            assert all(o.error.kind is ErrorKind.UNREACHABLE for o in outcomes)
            assert time.monotonic() - began < 5
            await asyncio.to_thread(server.start)
            await opened.until("reconnected")
            # Its state is written now and then: what it does not know to be delivered it delivers again, and confirms no ack of it.
            outcomes = await source.settle([Settlement(t, ACK) for _, t in rows])
            done = {r.data for (r, _), o in zip(rows, outcomes, strict=True) if o.state is Settled.CONFIRMED}
            while len(done) < 10:
                for row, token in await take(source, 1):
                    assert await settle(source, ACK, token) == [Settled.CONFIRMED]
                    done.add(row.data)

        on(bed, body, reconnect_time_wait=0.05)
