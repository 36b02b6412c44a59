"""Looks at Pub/Sub, through a temporary subscription that is put back in time: on the stand-in, as a seek back crashes the fake server."""

import asyncio
import contextlib
import logging
import time

import pytest
from grpc import StatusCode
from pubsub_bed import data, driver, of, of_topic, on, pulled, run, taking
from pubsub_standin import PROJECT, StandIn

from broker_nb.backends.driver import COLUMNS, Effect, Piece, Stop
from broker_nb.backends.pubsub import look as looks
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.client import Client
from broker_nb.portable.loop import shared_loop
from broker_nb.portable.ranges import parse_range

ALLOWED = frozenset({Effect.CREATES_SUBSCRIPTION})
ALL = [Piece(0, (), None)]


@pytest.fixture
def standin(monkeypatch):
    monkeypatch.setattr(looks, "FIRST_S", 1.0)
    monkeypatch.setattr(looks, "NEXT_S", 0.5)
    with StandIn() as server:
        server.topic("orders")
        server.put("orders", *(b"%d" % i for i in range(5)), age_s=100)
        yield server


def client(standin, body):
    """Run `await body(client)`, on the loop where clients live."""

    async def go():
        opened = await Client.open("pubsub", {"hosts": [standin.address], "path": PROJECT, "timeout": 2.0})
        try:
            return await body(opened)
        finally:
            await opened.close()

    return shared_loop().run(go())


async def looked(opened, asked, **options):
    """Bodies in order of time, and the summary."""
    options = {"want": COLUMNS, "allow": ALLOWED} | options
    found = await opened.look("orders", parse_range(asked), **options)
    rows = []
    async with contextlib.aclosing(found.batches(20)) as batches:
        async for batch in batches:
            rows += map(batch.codec.envelope, batch.rows)
    start, end = found.window_ns
    inside = [r for r in rows if (start or 0) <= r.publish_time_ns < (end or 2**63)]
    return [r.data for r in sorted(inside, key=lambda r: r.publish_time_ns)], found.summary


async def refusal(call):
    with pytest.raises(BrokerError) as caught:
        await call
    return caught.value


def browse(opened, pieces=ALL, allow=ALLOWED, topic="orders"):
    return opened.browse(of_topic(topic), pieces, COLUMNS, True, allow)


async def read_until_silence(browser):
    rows = []
    while True:
        step = await browser.read(100, 1 << 20, 0.1)
        rows += step.batch.rows if step.batch else []
        assert step.reached == {}, "nothing is proved"
        if step.stopped:
            assert step.stopped == {0: Stop.UNPROVEN}
            return rows


# ------------------------------------------------------------------ what it shows
def test_refused_unless_allowed_by_name(standin):
    standin.topic("forgets", retention_s=0)

    async def body(opened):
        error = await refusal(looked(opened, "..end", allow=()))
        assert (error.kind, "allow=creates_subscription" in str(error)) == (ErrorKind.UNSUPPORTED, True)
        for topic, allow, says in (("forgets", ALLOWED, "message_retention_duration"), ("orders", frozenset(), "temporary")):
            error = await refusal(browse(opened.driver, allow=allow, topic=topic))
            assert (error.kind, says in str(error)) == (ErrorKind.UNSUPPORTED, True)
        assert (await refusal(browse(opened.driver, topic="missing"))).kind is ErrorKind.NOT_FOUND

    client(standin, body)
    assert standin.names("CreateSubscription") == []


def test_everything_and_completeness_is_never_claimed(standin):
    standin.put("orders", b"now")

    async def body(opened):
        bodies, summary = await looked(opened, "..end")
        assert bodies == [b"0", b"1", b"2", b"3", b"4", b"now"]
        assert summary.complete is None
        assert Stop.UNPROVEN.value in summary.why
        assert summary.effects == ALLOWED

    client(standin, body)


def test_times_counts_and_no_offsets(standin):
    standin.put("orders", b"a", age_s=50)
    standin.put("orders", b"b", age_s=10)

    async def body(opened):
        assert (await looked(opened, "@-60s.."))[0] == [b"a", b"b"]
        assert (await looked(opened, "@-60s..-30s"))[0] == [b"a"]
        bodies, summary = await looked(opened, "@-5s..")
        assert (bodies, summary.complete) == ([], None)
        assert (await looked(opened, "-3"))[0][-3:] == [b"4", b"a", b"b"]
        error = await refusal(looked(opened, "2..4"))
        assert (error.kind, "has no offsets" in str(error)) == (ErrorKind.INVALID, True)

    client(standin, body)


def test_nothing_is_acknowledged_and_what_comes_twice_is_shown_once(standin):
    async def body(opened):
        browser = await browse(opened)
        (path,) = [path for path in standin.queues if "look" in path]
        assert len(await read_until_silence(browser)) == 5
        standin.queues[path].ready.extend(message for message, _ in standin.queues[path].leased.values())
        assert await read_until_silence(browser) == []
        standin.put("orders", b"later")
        assert data(await read_until_silence(browser)) == [b"later"], "silence is not the end"
        assert standin.names("Acknowledge") == standin.names("ModifyAckDeadline") == []
        await browser.close()

    on(standin.url, body)


def test_the_first_row_is_waited_for_longer(standin):
    """A seek takes its time."""

    async def body(opened):
        standin.queues.clear()
        now = time.time_ns()
        browser = await browse(opened, [Piece(0, (now,), None)])
        began = time.monotonic()
        assert await read_until_silence(browser) == []
        assert 0.9 < time.monotonic() - began < 5
        await browser.close()

    on(standin.url, body)


def test_what_was_read_and_not_taken_comes_with_the_next_call(standin):
    async def body(opened):
        browser = await browse(opened)
        seen = []
        while len(seen) < 5:
            step = await browser.read(2, 1 << 20, 0.2)
            seen += step.batch.rows if step.batch else []
            assert step.batch is None or len(step.batch.rows) <= 2
        assert data(seen) == [b"0", b"1", b"2", b"3", b"4"]
        await browser.close()

    on(standin.url, body)


def test_a_cancelled_read_loses_nothing(standin):
    async def body(opened):
        browser = await browse(opened, [Piece(0, (time.time_ns(),), None)])
        rows = []
        for wait in (0.01, 0.05, 0.1):
            reading = asyncio.ensure_future(browser.read(10, 1 << 20, 1))
            await asyncio.sleep(wait)
            reading.cancel()
            await asyncio.wait({reading})
            rows += [] if reading.cancelled() else reading.result().batch.rows
            standin.put("orders", b"%d" % (wait * 100))
        assert data(rows + await read_until_silence(browser)) == [b"1", b"10", b"5"]
        await browser.close()

    on(standin.url, body)


def test_following_begins_now(standin):
    async def body(opened):
        tail = await opened.tail("orders", want=COLUMNS, allow=ALLOWED)
        assert await tail.take(10, 1 << 20, 0.1) is None
        standin.put("orders", b"new")
        end = time.monotonic() + 5
        while (batch := await tail.take(10, 1 << 20, 0.2)) is None:
            assert time.monotonic() < end
        assert data(batch.rows) == [b"new"]
        await tail.close()

    client(standin, body)
    assert standin.queues == {}


# ------------------------------------------------------------------ what it leaves behind
def test_the_temporary_subscription(standin):
    async def body(opened):
        browser = await browse(opened)
        ((path, queue),) = standin.queues.items()
        about = queue.about
        assert "/broker_nb-look-" in path
        assert about.labels["broker_nb"] == "look"
        assert about.labels["owner"] == looks.owner()
        assert abs(int(about.labels["used"]) - time.time()) < 60
        assert about.expiration_policy.ttl.total_seconds() == 86_400
        assert about.ack_deadline_seconds == 600
        assert [e.name async for e in opened.entities()] == ["orders"], "it is not shown among the others"
        await browser.close()
        await browser.close()
        assert standin.queues == {}
        assert (await refusal(browser.read(1, 1, 0))).kind is ErrorKind.CLOSED

    on(standin.url, body)


def test_closing_the_connection_deletes_it(standin):
    async def body(opened):
        await browse(opened)
        await browse(opened)
        assert len(standin.queues) == 2

    on(standin.url, body)
    assert standin.queues == {}
    assert standin.names("DeleteSubscription") == ["DeleteSubscription"] * 2


def left_behind(standin, name, owner, used):
    return standin.subscription(name, "orders", labels={"broker_nb": "look", "owner": owner, "used": used})


def test_what_a_killed_kernel_left_is_swept_up_by_the_next_look(standin):
    """Ours, and not used for more than an hour; a look that goes on for longer says so."""
    me, long_ago, now = looks.owner(), str(int(time.time()) - 3700), str(int(time.time()) - 3500)
    for name, owner, used in (("dead", me, long_ago), ("alive", me, now), ("not-ours", "else", long_ago), ("odd", me, "odd")):
        left_behind(standin, name, owner, used)
    standin.subscription("a-persons", "orders", labels={"used": long_ago, "owner": me})

    async def body(opened):
        await (await browse(opened)).close()

    on(standin.url, body)
    assert sorted(path.rpartition("/")[2] for path in standin.queues) == ["a-persons", "alive", "not-ours", "odd"]


def test_a_long_look_says_that_it_is_used(standin, monkeypatch):
    monkeypatch.setattr(looks, "_USED_S", 0.1)

    async def body(opened):
        browser = await browse(opened)
        ((_, queue),) = standin.queues.items()
        queue.about.labels["used"] = "1"
        await asyncio.sleep(0.15)
        await browser.read(1, 1, 0.01)
        assert int(queue.about.labels["used"]) > 1
        await browser.close()

    on(standin.url, body)


@pytest.mark.parametrize("method", ["CreateSubscription", "Seek"])
def test_one_that_could_not_be_made_leaves_nothing(standin, method):
    async def body(opened):
        standin.failures[method] = [(StatusCode.PERMISSION_DENIED, "not authorized")]
        error = await refusal(browse(opened))
        assert (error.kind, "orders" in str(error)) == (ErrorKind.PERMISSION, True)
        assert standin.queues == {}
        await (await browse(opened)).close()

    on(standin.url, body)


def test_cancelled_while_it_is_made(standin):
    async def body(opened):
        real, made = standin.seek, asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(asked, context):
            loop.call_soon_threadsafe(made.set)
            standin.changed.wait(0.3)
            return real(asked, context)

        standin.seek = slow
        making = asyncio.ensure_future(browse(opened))
        await made.wait()
        making.cancel()
        await asyncio.wait({making})
        assert making.cancelled()
        assert standin.queues == {}

    on(standin.url, body)


def test_one_that_cannot_be_deleted_is_told_and_the_look_is_good(standin, caplog):
    async def body(opened):
        browser = await browse(opened)
        assert len(await read_until_silence(browser)) == 5
        standin.failures["DeleteSubscription"] = [(StatusCode.PERMISSION_DENIED, "not authorized")]
        await browser.close()

    with caplog.at_level(logging.WARNING, "broker_nb.pubsub"):
        on(standin.url, body)
    assert len(standin.queues) == 1
    assert "was not deleted (" in caplog.text
    assert "not allowed" in caplog.text


def test_who_may_not_list_looks_all_the_same(standin, caplog):
    standin.guard = lambda m, request: (StatusCode.PERMISSION_DENIED, "no") if m == "ListSubscriptions" else None

    async def body(opened):
        browser = await browse(opened)
        rows = await read_until_silence(browser)
        await browser.close()
        return data(rows)

    with caplog.at_level(logging.WARNING, "broker_nb.pubsub"):
        assert len(on(standin.url, body)) == 5
    assert "could not be swept up" in caplog.text
    assert standin.queues == {}


def test_a_server_that_goes_in_the_middle(standin):
    """An error, never a silent end."""

    async def go():
        async with driver(standin.url, timeout=1.0) as opened:
            browser = await browse(opened)
            assert (await browser.read(2, 1 << 20, 1)).batch is not None
            standin.guard = lambda method, request: (StatusCode.UNAVAILABLE, "gone") if method == "Pull" else None
            error = await refusal(read_until_silence(browser))
            assert error.retryable
            standin.guard = lambda method, request: None
            await read_until_silence(browser)
            await browser.close()

    run(go())


# ------------------------------------------------------------------ a subscription that begins at the earliest message
def test_a_new_subscription_from_the_earliest_message_that_is_kept(standin):
    standin.put("orders", b"too old", age_s=10_000)
    standin.put("orders", b"now")

    async def body(opened):
        source = await opened.subscribe(of("orders", "new"), taking(create=True))
        rows, _ = await pulled(source, 6)
        again = await opened.subscribe(of("orders", "new"), taking(create=True))
        await again.close()
        return data(rows)

    assert on(standin.url, body) == [b"0", b"1", b"2", b"3", b"4", b"now"]
    assert standin.names("Seek") == ["Seek"]
    assert len(standin.queues) == 1, "it is the person's, and stays"


def test_one_that_cannot_be_put_back_is_told(standin):
    async def body(opened):
        standin.failures["Seek"] = [(StatusCode.PERMISSION_DENIED, "not authorized")]
        return await refusal(opened.subscribe(of("orders", "new"), taking(create=True)))

    assert on(standin.url, body).kind is ErrorKind.PERMISSION
