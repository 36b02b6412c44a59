"""Taking from Pulsar beside what the suites show, and looks by places of three numbers."""

from __future__ import annotations

import asyncio
import time

import pytest
from test_pulsar import bed, looked, on, publish  # noqa: F401 - a fixture is used by its name

from broker_nb.backends.driver import COLUMNS, Entity, Family, Kind, Piece, Settled, Settlement, Stop, TakeOptions, Verdict
from broker_nb.errors import ErrorKind
from broker_nb.messages import OutboundMessage
from broker_nb.testing.bench import numbered, refusal

pytestmark = pytest.mark.xdist_group("pulsar")


async def pulled(source, count, seconds=10.0):
    rows, tokens, end = [], [], time.monotonic() + seconds
    while len(rows) < count and time.monotonic() < end:
        if (batch := await source.pull(count - len(rows), 1 << 20, 0.1)) is not None:
            rows += map(batch.codec.envelope, batch.rows)
            tokens += batch.tokens or ()
    return rows, tokens


async def bodies(source, count):
    return [row.data for row in (await pulled(source, count))[0]]


def subscription(topic, name="s"):
    return Entity(Kind.SUBSCRIPTION, name, topic)


# Consumer types


@pytest.mark.parametrize(
    ("word", "shown"), [("Shared", "Shared"), ("Failover", "Failover"), ("Exclusive", "Exclusive"), ("KeyShared", "Key_Shared")]
)
def test_types_are_what_they_are_called(bed, word, shown):  # noqa: F811 - the fixture
    topic = bed.make()

    async def use(client):
        options = TakeOptions(Family.MESSAGE, create=True, native={"consumer_type": word})
        source = await client.driver.subscribe(subscription(topic), options)
        await publish(client, topic, b"1")
        assert await bodies(source, 1) == [b"1"]
        return (await asyncio.to_thread(bed.stats, topic))["subscriptions"]["s"]["type"]

    assert on(bed, use) == shown


def test_a_second_exclusive_consumer_is_told(bed):  # noqa: F811 - the fixture
    topic = bed.make()

    async def use(client):
        options = TakeOptions(Family.RECORD, create=True, native={"consumer_type": "Exclusive"})
        await client.driver.subscribe(subscription(topic), options)
        return await refusal(client.driver.subscribe(subscription(topic), options))

    assert on(bed, use).kind is ErrorKind.CONFLICT


def test_a_subscription_in_use_one_by_one_is_no_log(bed):  # noqa: F811 - the fixture
    topic = bed.make()

    async def use(client):
        await client.driver.subscribe(subscription(topic), TakeOptions(Family.MESSAGE, create=True))
        mine = await client.driver.facts(subscription(topic))
        other = await on_other(client, topic)
        return mine.members, other.members, other.families

    async def on_other(client, topic):
        from broker_nb.portable.client import Client

        second = await Client.open("pulsar", bed.profile)
        try:
            return await second.driver.facts(subscription(topic))
        finally:
            await second.close()

    assert on(bed, use) == (0, 1, {Family.MESSAGE})


# Settling


def test_reject_needs_a_dead_letter_policy_and_its_topic(bed):  # noqa: F811 - the fixture
    topic, dead, nowhere = bed.make(), bed.make(), "persistent://public/default/nowhere-dead"

    async def use(client):
        await publish(client, topic, OutboundMessage(b"bad", b"k", {"a": "1"}))
        found = []
        for name, policy in (("a", None), ("b", nowhere), ("c", dead)):
            native = {"dead_letter_policy": {"max_redeliver_count": 5, "dead_letter_topic": policy}} if policy else {}
            source = await client.driver.subscribe(
                subscription(topic, name), TakeOptions(Family.MESSAGE, create=True, native=native)
            )
            _, (token,) = await pulled(source, 1)
            (outcome,) = await source.settle([Settlement(token, Verdict.REJECT, reason="unreadable")])
            found.append(outcome.state)
            await source.close()
        (row,), _ = await looked(client, dead)
        return found, row.data, row.key, {a.name: a.value for a in row.attributes}

    states, data, key, attributes = on(bed, use)
    assert states == [Settled.REFUSED, Settled.REFUSED, Settled.SENT]
    assert (data, key, attributes["a"], attributes["REJECT_REASON"]) == (b"bad", b"k", b"1", b"unreadable")
    assert attributes["REAL_TOPIC"].decode() == topic
    assert nowhere not in bed.topics()


def test_the_clients_own_dead_letters(bed):  # noqa: F811 - the fixture
    topic, dead = bed.make(), bed.make()

    async def use(client):
        await publish(client, topic, b"bad")
        native = {
            "dead_letter_policy": {"max_redeliver_count": 1, "dead_letter_topic": dead},
            "negative_ack_redelivery_delay_ms": 100,
        }
        source = await client.driver.subscribe(subscription(topic), TakeOptions(Family.MESSAGE, create=True, native=native))
        counts = []
        for _ in range(2):
            (row,), (token,) = await pulled(source, 1)
            counts.append(row.delivery_count)
            await source.settle([Settlement(token, Verdict.RELEASE)])
        assert await bodies_until(client, dead) == [b"bad"]
        return counts

    async def bodies_until(client, topic):
        end = time.monotonic() + 15
        while not (rows := (await looked(client, topic))[0]):
            assert time.monotonic() < end, "no dead letter"
            await asyncio.sleep(0.1)
        return [row.data for row in rows]

    assert on(bed, use) == [1, 2]


# Records


def test_commit_in_the_middle_of_a_batch(bed):  # noqa: F811 - the fixture
    topic = bed.make()

    async def use(client):
        await publish(client, topic, *numbered(10))
        source = await client.driver.subscribe(subscription(topic), TakeOptions(Family.RECORD, create=True))
        rows, _ = await pulled(source, 10)
        assert len({row.position[:2] for row in rows}) == 1, "not one batch"
        (outcome,) = (await source.commit({0: (*rows[3].position, 0)})).values()
        (beyond,) = (await source.commit({0: (rows[9].position[0] + 1,)})).values()
        await source.seek({0: rows[4].position})
        again = await bodies(source, 6)
        await source.close()
        source = await client.driver.subscribe(subscription(topic), TakeOptions(Family.RECORD))
        return outcome.state, beyond.state, again, await bodies(source, 6)

    states = on(bed, use)
    assert states == (Settled.SENT, Settled.REFUSED, numbered(10)[4:], numbered(10)[4:])


def test_backlog_counts_whole_batches(bed):  # noqa: F811 - the fixture
    topic = bed.make()

    async def use(client):
        await publish(client, topic, *numbered(10))
        source = await client.driver.subscribe(subscription(topic), TakeOptions(Family.RECORD, create=True))
        (before,) = await client.driver.backlog(subscription(topic))
        rows, _ = await pulled(source, 10)
        await source.commit({0: (*rows[9].position, 0)})
        await source.close()  # which hands over what was grouped
        (after,) = await client.driver.backlog(subscription(topic))
        return before, after

    before, after = on(bed, use)
    assert (before.waiting, after.waiting) == (10, 0)
    assert before.committed < before.end == after.committed == after.end


# Looking


def test_the_newest_rows_without_reading_all(bed):  # noqa: F811 - the fixture
    topic = bed.make()

    async def use(client):
        for part in range(6):
            await publish(client, topic, *numbered(3, f"{part}-"))
        newest, _ = await looked(client, topic, "-2")
        oldest, _ = await looked(client, topic, "+2")
        return [r.data for r in newest], [r.data for r in oldest]

    newest, oldest = on(bed, use)
    assert newest[-2:] == numbered(3, "5-")[-2:]
    assert oldest[:2] == numbered(3, "0-")[:2]
    assert max(len(newest), len(oldest)) <= 9, "read more than it needed"


def test_a_piece_inside_a_batch(bed):  # noqa: F811 - the fixture
    topic = bed.make()

    async def use(client):
        await publish(client, topic, *numbered(10))
        rows, summary = await looked(client, topic)
        assert summary.complete is True
        pieces = [Piece(0, rows[3].position, rows[7].position), Piece(0, (*rows[3].position, 0), (*rows[7].position, 0))]
        return [await read(client, topic, piece) for piece in pieces]

    inside, after = on(bed, use)
    assert (inside, after) == ((numbered(10)[3:7], None), (numbered(10)[4:8], None))


async def read(client, topic, piece):
    look = await client.driver.browse(Entity(Kind.TOPIC, topic), [piece], COLUMNS, True, frozenset())
    seen, end = [], time.monotonic() + 10
    while time.monotonic() < end:
        step = await look.read(100, 1 << 20, 0.1)
        seen += [step.batch.codec.envelope(row).data for row in step.batch.rows] if step.batch else []
        if step.stopped or step.reached.get(0, ()) >= piece.end:
            break
    await look.close()
    return seen, step.stopped.get(0)


def test_what_was_removed_is_aged_out(bed):  # noqa: F811 - the fixture
    topic = bed.make()
    path = topic.replace("://", "/")
    bed.policy(topic, "retention", {"retentionTimeInMinutes": 0, "retentionSizeInMB": 0})

    async def use(client):
        await publish(client, topic, b"old")
        (old,), _ = await looked(client, topic)
        await asyncio.to_thread(bed.api, "PUT", f"{path}/unload")  # begins a new ledger
        end = time.monotonic() + 20
        await publish(client, topic, b"new")
        while len(rows := (await looked(client, topic))[0]) > 1:
            assert time.monotonic() < end, "not removed"
            await asyncio.to_thread(bed.api, "POST", f"{path}/trim")
        return await read(client, topic, Piece(0, old.position, (*rows[0].position, 0))), [r.data for r in rows]

    assert on(bed, use) == (([], Stop.AGED_OUT), [b"new"])
