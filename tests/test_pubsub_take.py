"""Taking from Pub/Sub: leases, settlements, orders, dead letters, new subscriptions. On Google's fake server."""

import asyncio
import time

import pytest
from pubsub_bed import Bed, data, driver, of, of_topic, on, pulled, run, taking, verdicts

from broker_nb.backends.driver import Family, Outbound, Settled, TakeOptions, Verdict
from broker_nb.backends.pubsub import pulls
from broker_nb.errors import BrokerError, ErrorKind


@pytest.fixture(scope="module")
def bed(pubsub_url):
    return Bed(pubsub_url.split("/")[2])


@pytest.fixture
def topic(bed):
    return bed.topic()


async def why(call):
    with pytest.raises(BrokerError) as caught:
        await call
    return caught.value


def states(outcomes):
    return [outcome.state for outcome in outcomes]


# ------------------------------------------------------------------ settling
def test_sent_or_confirmed(bed, topic):
    plain, exact = bed.subscription(topic), bed.subscription(topic, enable_exactly_once_delivery=True)
    bed.put(topic, b"1", b"2")

    async def body(opened):
        for name, state in ((plain, Settled.SENT), (exact, Settled.CONFIRMED)):
            source = await opened.subscribe(of(topic, name), taking())
            rows, tokens = await pulled(source, 2)
            assert data(rows) == [b"1", b"2"]
            assert states(await source.settle(verdicts(tokens))) == [state] * 2
            assert states(await source.settle(verdicts(tokens))) == [Settled.LOST] * 2, "they are no longer held"
            await source.close()

    on(bed.url, body)
    assert bed.pull(plain) == bed.pull(exact) == []


def test_a_group_of_2500(bed, topic):
    """More than a request takes; some acked, some given back."""
    name = bed.subscription(topic, ack_deadline_seconds=60)
    bodies = [b"%04d" % i for i in range(2500)]
    for at in range(0, 2500, 500):
        bed.put(topic, *bodies[at : at + 500])

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking(max_held=5000))
        rows, tokens = await pulled(source, 2500)
        assert data(rows) == bodies
        assert all(deadline > time.monotonic() + 50 for deadline in await source.extend(tokens, 60))
        items = verdicts(tokens[:2400]) + verdicts(tokens[2400:], Verdict.RELEASE)
        assert states(await source.settle(items)) == [Settled.SENT] * 2500
        again, _ = await pulled(source, 100)
        assert data(again) == data(rows[2400:])

    on(bed.url, body)


def test_nacks_at_once_and_later(bed, topic):
    name = bed.subscription(topic)
    bed.put(topic, b"1", b"2")

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking())
        rows, tokens = await pulled(source, 2)
        began = time.monotonic()
        items = [*verdicts(tokens[:1], Verdict.RELEASE), *verdicts(tokens[1:], Verdict.RELEASE, delay=1.2)]
        assert states(await source.settle(items)) == [Settled.SENT] * 2
        first, _ = await pulled(source, 1)
        assert time.monotonic() - began < 1
        assert data(first) == data(rows[:1])
        await pulled(source, 1)
        assert time.monotonic() - began >= 2, "seconds are whole ones: rounded up"

    on(bed.url, body)


def test_what_cannot_be_settled(bed, topic):
    name = bed.subscription(topic)
    bed.put(topic, b"1")

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking())
        _, tokens = await pulled(source, 1)
        for item, says in ((Verdict.REJECT, "cannot reject"), (Verdict.RELEASE, "at most 600 s")):
            (outcome,) = await source.settle(verdicts(tokens, item, delay=601))
            assert outcome.state is Settled.REFUSED
            assert says in str(outcome.error)
        assert states(await source.settle([*verdicts(["nonsense"]), *verdicts(tokens)])) == [Settled.LOST, Settled.SENT]
        for call in (source.commit({0: (1,)}), source.seek({0: (1,)}), opened.begin("x", 1)):
            assert (await why(call)).kind is ErrorKind.UNSUPPORTED

    on(bed.url, body)


def test_a_subscription_that_is_deleted_meanwhile(bed, topic):
    name = bed.subscription(topic)
    bed.put(topic, b"1")

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking())
        _, tokens = await pulled(source, 1)
        bed.subscriber.delete_subscription(subscription=bed.subscription_path(name))
        (outcome,) = await source.settle(verdicts(tokens))
        assert (outcome.state, outcome.error.kind) == (Settled.REFUSED, ErrorKind.NOT_FOUND)
        assert (await why(source.extend(tokens, 10))).kind is ErrorKind.NOT_FOUND
        error = await why(source.pull(1, 1, 2))
        assert (error.kind, name in str(error), error.retryable) == (ErrorKind.NOT_FOUND, True, False)

    on(bed.url, body)


# ------------------------------------------------------------------ leases
def test_leases_run_out_and_are_extended(bed, topic):
    name = bed.subscription(topic, ack_deadline_seconds=2)
    bed.put(topic, b"1")

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking())
        began = time.monotonic()
        batch = await source.pull(1, 1, 2)
        assert 1.5 < batch.leased_until - began < 4
        (deadline,) = await source.extend(batch.tokens, 2)
        assert 9 < deadline - time.monotonic() <= 10, "ten seconds is the least"
        assert await source.extend(batch.tokens, 20) > [deadline]
        (later,) = await source.extend(batch.tokens, 1)
        assert later > time.monotonic() + 18, "no lease is shortened"
        assert await source.extend(["nonsense"], 10) == [None]
        bed.put(topic, b"2")
        other = await source.pull(1, 1, 2)
        await asyncio.sleep(max(0.0, other.leased_until - time.monotonic()) + 0.05)
        assert await source.extend(other.tokens, 10) == [None]
        assert states(await source.settle(verdicts([*batch.tokens, *other.tokens]))) == [Settled.SENT, Settled.LOST]

    on(bed.url, body)
    assert [m.message.data for m in bed.pull(name)] == [b"2"], "one whose lease is over is left to others"


def test_what_is_held_is_bounded(bed, topic):
    name = bed.subscription(topic, ack_deadline_seconds=2)
    bed.put(topic, *(b"%d" % i for i in range(9)))

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking(max_held=4))
        _, tokens = await pulled(source, 4)
        error = await why(source.pull(10, 1 << 20, 0.1))
        assert error.kind is ErrorKind.NO_CREDIT
        assert "4 messages are held" in str(error)
        await source.settle(verdicts(tokens[:1]))
        assert len((await source.pull(10, 1 << 20, 1)).rows) == 1
        await asyncio.sleep(2.1)  # what is over is no longer held
        assert len((await pulled(source, 4))[0]) == 4

    on(bed.url, body)


def test_bounds_in_bytes_leave_the_rest_for_the_next_call(bed, topic):
    name = bed.subscription(topic)
    bed.put(topic, *(bytes(1000) for _ in range(10)))

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking())
        sizes = []
        while sum(sizes) < 10:
            sizes.append(len((await source.pull(10, 2500, 1)).rows))
        assert sizes == [3, 3, 3, 1]

    on(bed.url, body)


# ------------------------------------------------------------------ requests that are open
def test_a_request_outlives_a_slice_but_not_its_reader(bed, topic, monkeypatch):
    """While slices follow each other a request stays open; soon after the last it is given up, and what comes is for others."""
    monkeypatch.setattr(pulls, "LINGER_S", 0.2)
    name = bed.subscription(topic)

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking())
        assert await source.pull(1, 1, 0.02) is None
        asked = source._pulls._request
        assert asked is not None
        assert await source.pull(1, 1, 0.02) is None
        assert source._pulls._request is asked
        await asyncio.sleep(0.7)
        assert source._pulls._request is None
        await asyncio.to_thread(bed.put, topic, b"1")
        found = await asyncio.to_thread(bed.pull, name)
        assert [m.message.data for m in found] == [b"1"]
        await asyncio.to_thread(bed.nack, name, found[0].ack_id)
        assert data((await pulled(source, 1))[0]) == [b"1"]

    on(bed.url, body)


def test_what_came_and_nobody_took_is_given_back_by_close(bed, topic):
    name = bed.subscription(topic, ack_deadline_seconds=600)
    bed.put(topic, b"1", b"2", b"3")

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking())
        assert len((await source.pull(10, 1, 1)).rows) == 1  # the others came with it
        await source.close()
        await source.close()
        assert (await why(source.pull(1, 1, 0))).kind is ErrorKind.CLOSED

    on(bed.url, body)
    assert len(bed.pull(name)) == 2


# ------------------------------------------------------------------ order, dead letters, filters
def test_a_key_in_order(bed, topic):
    name = bed.subscription(topic, enable_message_ordering=True)

    async def body(opened):
        sender = await opened.sender(of_topic(topic), {})
        await sender.send([Outbound(b"%d" % i, b"key") for i in range(5)])
        source = await opened.subscribe(of(topic, name), taking())
        seen = []
        while len(seen) < 6:
            (row,), tokens = await pulled(source, 1)
            seen.append(row.message.data)
            assert row.message.ordering_key == "key"
            verdict = Verdict.RELEASE if seen == [b"0", b"1"] else Verdict.ACK
            await source.settle(verdicts(tokens, verdict))
        return seen

    assert on(bed.url, body) == [b"0", b"1", b"1", b"2", b"3", b"4"]


def test_attempts_are_the_delivery_count_until_it_is_a_dead_letter(bed, topic):
    dead = bed.topic()
    buried = bed.subscription(dead)
    name = bed.subscription(topic, dead_letter_policy={"dead_letter_topic": bed.topic_path(dead), "max_delivery_attempts": 5})
    bed.put(topic, b"bad")

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking())
        counts = []
        for _ in range(5):
            batch = await source.pull(1, 1, 2)
            counts += batch.codec.columns(batch.rows, frozenset({"delivery_count"}))["delivery_count"]
            await source.settle(verdicts(batch.tokens, Verdict.RELEASE))
        assert await source.pull(1, 1, 0.7) is None
        return counts

    assert on(bed.url, body) == [1, 2, 3, 4, 5]
    assert [m.message.data for m in bed.pull(buried)] == [b"bad"]


def test_without_a_policy_nothing_counts(bed, topic):
    name = bed.subscription(topic)
    bed.put(topic, b"1")

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking())
        batch = await source.pull(1, 1, 2)
        return batch.codec.envelope(batch.rows[0])

    envelope = on(bed.url, body)
    assert envelope.delivery_count is None
    assert type(envelope.native).__name__ == "ReceivedMessage"
    assert envelope.native.message.data == b"1"


def test_a_filter_is_the_subscriptions(bed, topic):
    name = bed.subscription(topic, filter='attributes.kind = "a"')
    bed.put(topic, b"1", kind="a")
    bed.put(topic, b"2", kind="b")

    async def body(opened):
        source = await opened.subscribe(of(topic, name), taking())
        assert data((await pulled(source, 1))[0]) == [b"1"]
        assert await source.pull(1, 1, 0.6) is None

    on(bed.url, body)


# ------------------------------------------------------------------ new subscriptions
def test_create(bed, topic):
    native = {"ack_deadline_seconds": 30, "enable_message_ordering": True, "labels": {"who": "me"}}

    async def body(opened):
        new = of(topic, "made-here")
        assert (await why(opened.subscribe(new, taking()))).kind is ErrorKind.NOT_FOUND
        error = await why(opened.subscribe(new, taking(create=True)))
        assert (error.kind, "start='latest'" in str(error)) == (ErrorKind.INVALID, True)
        assert (await why(opened.subscribe(new, taking(create=True, start="middle")))).kind is ErrorKind.INVALID
        error = await why(opened.subscribe(new, taking(create=True, start="latest", native={"no_such": 1})))
        assert (error.kind, "no_such" in str(error)) == (ErrorKind.INVALID, True)
        assert bed.subscriptions() == before
        source = await opened.subscribe(new, taking(create=True, start="latest", native=native))
        await source.close()
        facts = await opened.facts(new)
        assert (facts.lease.seconds, facts.ordered, facts.details["labels"]) == (30.0, True, {"who": "me"})
        again = await opened.subscribe(new, taking(create=True, start="latest", native=native))
        await again.close()
        error = await why(opened.subscribe(new, taking(native={"ack_deadline_seconds": 20})))
        assert (error.kind, "another ack_deadline_seconds: 30, not 20" in str(error)) == (ErrorKind.CONFLICT, True)
        assert (await why(opened.subscribe(of("missing", "made-here-2"), taking(create=True)))).kind is ErrorKind.NOT_FOUND

    before = bed.subscriptions()
    on(bed.url, body)


def test_families_and_sessions(bed, topic):
    name = bed.subscription(topic)

    async def go():
        async with driver(bed.url) as opened:
            for options in (TakeOptions(family=Family.RECORD), taking(session="s")):
                error = await why(opened.subscribe(of(topic, name), options))
                assert error.kind is ErrorKind.UNSUPPORTED

    run(go())
