"""The broker in memory with the manners of others: their constants and ways, and that a broken rule is caught."""

import asyncio
import uuid
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

import broker_nb
from broker_nb.backends import load, schemes
from broker_nb.backends.driver import (
    COLUMNS,
    DedupeId,
    Effect,
    Entity,
    Family,
    Kind,
    LeaseTerms,
    Outbound,
    Piece,
    Proof,
    Sent,
    Settled,
    Settlement,
    Stop,
    TakeOptions,
    Verdict,
)
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.backends.inmem.manners import ALL, JETSTREAM, KAFKA, MANNERS
from broker_nb.backends.inmem.manners.driver import driver_with
from broker_nb.backends.inmem.manners.manner import Misuse
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import OutboundMessage
from broker_nb.portable import messages, pulling
from broker_nb.portable.client import Client
from broker_nb.portable.commits import Prefix
from broker_nb.portable.loop import shared_loop
from broker_nb.portable.messages import MessageSubscription
from broker_nb.portable.ranges import parse_range
from broker_nb.portable.turnstile import Turnstile

T = Entity(Kind.TOPIC, "t")


@asynccontextmanager
async def connected(manner, rows=0, **topic):
    """A connection to a new broker with topic `t`."""
    name = uuid.uuid4().hex
    client = await Client.open("inmem", {"hosts": [name], "options": {"like": manner}})
    broker = InmemBroker.get(name)
    broker.create_topic("t", **topic)
    broker.publish("t", [Outbound(b"%d" % i) for i in range(rows)])
    try:
        yield client, broker
    finally:
        await client.close()


def run(coroutine):
    async def bounded():
        async with asyncio.timeout(20):
            return await coroutine

    return shared_loop().run(bounded())


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - any condition, with a deadline
            await asyncio.sleep(0.001)


# ------------------------------------------------------------------ connecting
def test_a_connection_says_whose_manners_it_has():
    with broker_nb.connect(f"inmem://{uuid.uuid4().hex}?like=kafka", name="k") as conn:
        assert conn.about.endswith(", 0 topics, with the manners of kafka")
    with broker_nb.connect("demo", options={"like": "kafka"}, name="d") as conn:
        assert len(conn.sample("orders", "-10")) == 10
        assert len(conn.consume("orders", "manners", n=5)) == 5


def test_the_constants_are_those_of_the_real_drivers():
    real = {"nats" if manner.name == "jetstream" else manner.name: manner for manner in ALL}  # share is a way to take from Kafka
    for scheme in real.keys() & set(schemes()):
        assert replace(load(scheme).capabilities, server_min={}) == real[scheme].able, scheme


# ------------------------------------------------------------------ kafka
def test_a_log_is_committed_and_nothing_else():
    async def go():
        async with connected("kafka", 3, families=Family) as (client, _):
            facts = await client.facts(T)
            assert (facts.families, facts.lease, facts.dedupe) == ({Family.RECORD}, None, None)
            assert not facts.look.sorted_times
            assert not (await client.facts(Entity(Kind.SUBSCRIPTION, "new", "t"))).look.possible
            with pytest.raises(BrokerError, match="cannot be taken from as messages; it can be as: records"):
                await client.subscribe("t", "g", family=Family.MESSAGE)
            with pytest.raises(BrokerError, match="no taking of messages with the manners of kafka"):
                await client.driver.subscribe(Entity(Kind.SUBSCRIPTION, "g", "t"), TakeOptions(Family.MESSAGE))
            with pytest.raises(BrokerError, match=r"has no transactions \(.*issue 6\); publish without one"):
                await client.transactional_publisher("id")
            with pytest.raises(BrokerError, match="no transactions with the manners of kafka"):
                await client.driver.begin("id", 60)

    run(go())


def test_a_queue_cannot_be_taken_from_as_a_log():
    async def go():
        async with connected("kafka", families=[Family.MESSAGE]) as (client, _):
            with pytest.raises(BrokerError, match="cannot be taken from as records; it can be as: not at all"):
                await client.subscribe("t", "g")

    run(go())


def test_a_gap_at_the_end_is_passed_after_the_last_row():
    async def go():
        async with connected("kafka", 2) as (client, broker):
            transaction = broker.begin("x", 60)
            broker.topic("t").append([Outbound(b"aborted")], None, transaction)
            broker.end(transaction, commit=False)
            browser = await client.driver.browse(T, [Piece(0, (0,), (4,))], frozenset(), True, frozenset())
            step = await browser.read(10, 1000, 0.1)
            assert (len(step.batch.rows), step.reached) == (2, {0: (2,)})
            step = await browser.read(10, 1000, 0.1)
            assert (step.batch, step.reached, step.skipped) == (None, {0: (4,)}, 2)
            await browser.close()

    run(go())


def test_producers_set_the_time_in_milliseconds():
    async def go():
        async with connected("kafka") as (client, broker):
            sender = await client.driver.sender(T, {})
            times = (1_700_000_000_123_456_789, 1_600_000_000_000_000_000, None)
            await sender.send([Outbound(b"x", time_ns=t, dedupe=DedupeId("r", 1)) for t in times])
            rows = broker.topic("t").logs[0].rows
            assert [row.time_ns for row in rows[:2]] == [1_700_000_000_123_000_000, 1_600_000_000_000_000_000]
            assert {row.time_is for row in rows} == {"producer"}
            assert rows[2].time_ns % 10**6 == 0

    run(go())


def test_a_rebalance_takes_all_partitions_and_uncommitted_rows_come_again():
    async def go():
        async with connected("kafka", partitions=2) as (client, broker):
            broker.publish("t", [Outbound(b"%d" % i, partition=i % 2) for i in range(10)])
            first = await client.subscribe("t", "g")
            rows = await first.next_batch(1, count=10)
            assert len(rows) == 10
            second = await client.driver.subscribe(Entity(Kind.SUBSCRIPTION, "g", "t"), TakeOptions(Family.RECORD))
            await until(lambda: first.held_count == 0)  # told on the loop
            for row in rows:
                with pytest.raises(BrokerError, match="taken over by another member or given back"):
                    await row.ack()
            again = await first.next_batch(1, count=10)
            assert {row.data for row in again} == {b"%d" % i for i in range(10) if i % 2 == again[0].partition}
            await second.close()

    run(go())


# ------------------------------------------------------------------ jetstream
def test_a_subscription_is_made_only_on_demand():
    async def go():
        async with connected("jetstream", 1) as (client, broker):
            entity = Entity(Kind.SUBSCRIPTION, "s", "t")
            for call in (
                lambda: client.subscribe("t", "s"),
                lambda: client.backlog("t", "s"),
                lambda: client.driver.subscribe(entity, TakeOptions(Family.MESSAGE)),
            ):
                with pytest.raises(BrokerError, match="t has no subscription 's', and it was not made; create=True") as caught:
                    await call()
                assert caught.value.kind is ErrorKind.NOT_FOUND
            assert broker.topic("t").subscriptions == {}
            made = await client.subscribe("t", "s", create=True)
            assert made.facts.entity == entity
            assert (await made.next_message(1)).data == b"0"

    run(go())


def test_the_terms_of_a_subscription_that_is_there_are_its_own():
    async def go():
        async with connected("jetstream") as (client, broker):
            broker.create_subscription("t", "s", ack_deadline=7.0)
            assert (await client.subscribe("t", "s", create=True)).terms.seconds == 7.0

    run(go())


def test_a_rejected_row_goes_nowhere():
    async def go():
        async with connected("jetstream") as (client, broker):
            broker.create_topic("dead")
            broker.create_topic("buried", dead_letter="dead")
            broker.publish("buried", [Outbound(b"bad")])
            taken = await client.subscribe("buried", "s", create=True)
            assert taken.facts.dead_letter is None
            await (await taken.next_message(1)).reject("unreadable")
            assert await taken.next_message(0.05) is None
            assert broker.topic("dead").logs[0].rows == []

    run(go())


def test_extending_begins_the_lease_anew_whatever_was_asked():
    async def go():
        async with connected("jetstream", 1, ack_deadline=2.0) as (client, _):
            options = TakeOptions(Family.MESSAGE, create=True)
            source = await client.driver.subscribe(Entity(Kind.SUBSCRIPTION, "s", "t"), options)
            batch = await source.pull(1, 1000, 0)
            (until,) = await source.extend(batch.tokens, 600)
            assert 0 <= until - batch.leased_until < 1

    run(go())


def test_a_repeated_id_is_dropped_within_the_window():
    async def go():
        async with connected("jetstream") as (client, broker):
            sender = await client.driver.sender(T, {})
            row = Outbound(b"x", dedupe=DedupeId("r", 1))
            states = []
            for ahead in (0, 0, 121, 0):
                broker.advance(ahead)
                states += [result.state for result in await sender.send([row])]
            assert states == [Sent.ACCEPTED, Sent.DUPLICATE, Sent.ACCEPTED, Sent.DUPLICATE]

    run(go())


# ------------------------------------------------------------------ share groups
async def opened(client, family=Family.MESSAGE, **native):
    options = TakeOptions(family, create=True, native=native)
    return await client.driver.subscribe(Entity(Kind.SUBSCRIPTION, "s", "t"), options)


async def settle(source, tokens, verdict=Verdict.ACK):
    return [outcome.state for outcome in await source.settle([Settlement(token, verdict) for token in tokens])]


def data(batch):
    return [batch.codec.envelope(row).data for row in batch.rows]


def test_a_poll_brings_more_than_was_asked_for():
    async def go():
        async with connected("share", 30) as (client, _):
            source = await opened(client)
            batch = await source.pull(5, 1 << 20, 0)
            assert len(batch.rows) == 5
            (line,) = await client.backlog("t", "s")
            assert (line.held, line.waiting) == (20, 10)
            await settle(source, batch.tokens)
            batch = await source.pull(50, 1 << 20, 0)
            assert data(batch) == [b"%d" % i for i in range(5, 20)]

    run(go())


def test_surplus_rows_whose_lease_ran_out_are_not_handed_out():
    async def go():
        async with connected("share", 3) as (client, broker):
            source = await opened(client)
            batch = await source.pull(1, 1 << 20, 0)
            broker.advance(31)
            assert await settle(source, batch.tokens) == [Settled.LOST]
            batch = await source.pull(3, 1 << 20, 0)
            assert [batch.codec.envelope(row).delivery_count for row in batch.rows] == [2, 2, 2]
            assert await settle(source, batch.tokens) == [Settled.CONFIRMED] * 3

    run(go())


def test_rows_of_a_partition_fare_alike():
    async def go():
        async with connected("share", partitions=2) as (client, broker):
            broker.publish("t", [Outbound(b"%d" % i, partition=i % 2) for i in range(6)])
            source = await opened(client)
            batch = await source.pull(6, 1 << 20, 0)
            places = [partition for partition, _ in batch.codec.places(batch.rows)]
            broker.fail_next("settle", Settled.RETRY)
            states = await settle(source, batch.tokens)
            assert {p: {s for s, at in zip(states, places, strict=True) if at == p} for p in (0, 1)} == {
                places[0]: {Settled.RETRY},
                1 - places[0]: {Settled.CONFIRMED},
            }

    run(go())


@pytest.mark.parametrize("verdict", [Verdict.REJECT, Verdict.RELEASE])
def test_a_record_that_was_rejected_or_delivered_five_times_is_archived(verdict):
    async def go():
        async with connected("share", 1) as (client, _):
            terms = LeaseTerms(30.0, renewable=False, return_counts=True, max_deliveries=5)
            assert (await client.facts(T)).lease == terms
            source = await opened(client)
            for _ in range(1 if verdict is Verdict.REJECT else 5):
                batch = await source.pull(1, 1000, 0)
                assert await settle(source, batch.tokens, verdict) == [Settled.CONFIRMED]
            assert await source.pull(1, 1000, 0) is None
            (line,) = await client.backlog("t", "s")
            assert (line.held, line.waiting) == (0, 0)

    run(go())


# ------------------------------------------------------------------ service bus
def test_a_peek_shows_what_is_there_and_no_end_is_proved():
    async def go():
        async with connected("servicebus", 3) as (client, _):
            look = (await client.facts(T)).look
            assert (look.proof, look.end_is_fixed, look.effects) == (Proof.DRY, False, frozenset())
            browser = await client.driver.browse(T, [Piece(0, (0,), None)], COLUMNS, True, frozenset())
            assert len((await browser.read(10, 1000, 0)).batch.rows) == 3
            step = await browser.read(10, 1000, 0)
            assert (step.batch, step.stopped) == (None, {0: Stop.DRY})

    run(go())


def test_giving_back_counts_until_the_row_is_a_dead_letter():
    async def go():
        async with connected("servicebus") as (client, broker):
            broker.create_topic("dead")
            broker.create_topic("q", dead_letter="dead", max_deliveries=2)
            broker.publish("q", [Outbound(b"poison"), Outbound(b"bad")])
            taken = await client.subscribe("q", "s", create=True)
            assert (taken.terms.return_counts, taken.terms.max_deliveries) == (True, 2)
            poison, bad = await taken.next_batch(1, count=2)
            await bad.reject("unreadable")
            await poison.nack()
            await (await taken.next_message(1)).nack()
            assert await taken.next_message(0.05) is None
            told = [{a.name: a.value for a in row.attributes}["error.message"] for row in broker.topic("dead").logs[0].rows]
            assert told == [b"unreadable", b"not acked in 2 deliveries"]

    run(go())


# ------------------------------------------------------------------ pub/sub
def test_a_look_goes_through_a_subscription_that_was_allowed_and_is_removed():
    async def go():
        async with connected("pubsub", 3) as (client, broker):
            with pytest.raises(BrokerError, match="allow=creates_subscription"):
                await client.look("t", parse_range("..end"), want=COLUMNS)
            with pytest.raises(BrokerError, match="t cannot be looked at without this: a temporary subscription"):
                await client.driver.browse(T, [Piece(0, (), None)], COLUMNS, True, frozenset())
            allowed = frozenset({Effect.CREATES_SUBSCRIPTION})
            look = await client.look("t", parse_range("..end"), want=COLUMNS, allow=allowed)
            rows = []
            async for batch in look.batches(5):
                assert len(broker.topic("t").subscriptions) == 1
                rows += [batch.codec.envelope(row) for row in batch.rows]
            assert [(row.data, row.position) for row in rows] == [(b"%d" % i, ()) for i in range(3)]
            assert (look.summary.complete, broker.topic("t").subscriptions) == (None, {})
            assert Stop.UNPROVEN.value in look.summary.why
            until = rows[1].publish_time_ns
            browser = await client.driver.browse(T, [Piece(0, (until,), (until + 1,))], COLUMNS, True, allowed)
            assert data((await browser.read(10, 1000, 0)).batch) == [b"1"]

    run(go())


@pytest.mark.parametrize(("exactly_once", "state"), [(True, Settled.CONFIRMED), (False, Settled.SENT)])
def test_acks_are_only_sent_unless_delivery_is_exactly_once(exactly_once, state):
    async def go():
        async with connected("pubsub", 3) as (client, _):
            source = await opened(client, enable_exactly_once_delivery=exactly_once)
            batch = await source.pull(3, 1000, 0)
            assert sorted(data(batch)) == [b"0", b"1", b"2"] != data(batch)  # in any order
            assert await settle(source, batch.tokens) == [state] * 3

    run(go())


def test_one_row_of_an_ordering_key_is_out_at_a_time():
    async def go():
        async with connected("pubsub", ordered=True) as (client, broker):
            broker.publish("t", [Outbound(b"%d" % i, b"k") for i in range(2)])
            source = await opened(client)
            batch = await source.pull(10, 1000, 0)
            assert data(batch) == [b"0"]
            assert await source.pull(10, 1000, 0) is None
            await settle(source, batch.tokens)
            assert data(await source.pull(10, 1000, 0)) == [b"1"]

    run(go())


# ------------------------------------------------------------------ pulsar
def test_a_place_is_ledger_entry_and_index():
    async def go():
        async with connected("pulsar", 15) as (client, broker):
            (bounds,) = await client.driver.bounds(T, True)
            assert (bounds.low, bounds.end) == ((0, 0, 0), (1, 1, 0))
            assert await client.driver.locate(T, {0: broker.topic("t").logs[0].rows[13].time_ns}) == {0: (1, 0, 1)}
            browser = await client.driver.browse(T, [Piece(0, (1,), (1, 0, 2))], COLUMNS, True, frozenset())
            step = await browser.read(10, 1000, 0)
            assert (data(step.batch), step.reached) == ([b"12", b"13"], {0: (1, 0, 2)})
            (result,) = await (await client.driver.sender(T, {})).send([Outbound(b"15")])
            assert result.position == (1, 1, 0)
            source = await opened(client, Family.RECORD)
            batch = await source.pull(14, 1000, 0)
            (outcome,) = (await source.commit({0: (*batch.codec.places(batch.rows)[-1][1], 0)})).values()
            assert outcome.state is Settled.SENT
            (line,) = await client.backlog("t", "s")
            assert (line.committed, line.waiting) == ((1, 0, 2), 2)
            await source.seek({0: (0, 3)})
            assert data(await source.pull(1, 1000, 0)) == [b"9"]
            look = await client.look("t", parse_range("0.."), want=COLUMNS)
            assert [row async for batch in look.batches(5) for row in batch.rows]
            assert look.summary.complete is True

    run(go())


def test_rows_are_held_as_long_as_their_consumer_lives():
    async def go():
        async with connected("pulsar", 1) as (client, broker):
            assert (await client.facts(T)).lease == LeaseTerms(None, renewable=False, return_counts=True, max_deliveries=None)
            source = await opened(client)
            batch = await source.pull(1, 1000, 0)
            broker.advance(10**6)
            assert batch.leased_until is None
            assert await settle(source, batch.tokens) == [Settled.SENT]

    run(go())


def test_what_is_given_back_comes_after_the_delay_of_the_subscription():
    async def go():
        async with connected("pulsar", 1) as (client, broker):
            source = await opened(client)
            await settle(source, (await source.pull(1, 1000, 0)).tokens, Verdict.RELEASE)
            broker.advance(59)
            assert await source.pull(1, 1000, 0) is None
            broker.advance(1.1)
            assert data(await source.pull(1, 1000, 0)) == [b"0"]

    run(go())


@pytest.mark.parametrize(("single", "again"), [(True, [b"4"]), (False, [b"3", b"4", b"5"])])
def test_a_row_that_is_given_back_brings_its_batch_where_acks_are_by_batch(single, again):
    async def go():
        async with connected("pulsar", 9) as (client, _):
            source = await opened(client, batch_index_ack_enabled=single, negative_ack_redelivery_delay_ms=0)
            batch = await source.pull(9, 1000, 0)
            await settle(source, [token for i, token in enumerate(batch.tokens) if i != 4])
            await settle(source, [batch.tokens[4]], Verdict.RELEASE)
            assert sorted(data(await source.pull(9, 1000, 0))) == again
            assert await source.pull(9, 1000, 0) is None

    run(go())


# ------------------------------------------------------------------ what cannot be stored
@pytest.mark.parametrize(
    ("able", "row", "says"),
    [
        ({}, OutboundMessage(None), "no null body"),
        ({"keys": False}, OutboundMessage(b"x", b"k"), "no keys"),
        ({"null_key_is_not_empty": False}, OutboundMessage(b"x", b""), "an empty key is no key"),
        ({}, OutboundMessage(b"x", b"\xff"), "this one is not UTF-8"),
        ({"repeated_attributes": False}, OutboundMessage(b"x", None, [("a", "1"), ("a", "2")]), "cannot repeat"),
        ({}, OutboundMessage(b"x", None, {"a": None}), "attribute 'a' is null"),
        ({}, OutboundMessage(b"x", None, {"a": 1}), "attribute 'a' is of type int"),
        ({}, OutboundMessage(b"x", None, {"a": b"\xff"}), "attribute 'a' is not UTF-8"),
        ({}, OutboundMessage(b"x", None, {"a b": "1"}), "attribute 'a b' is no name of a header"),
        ({}, OutboundMessage(b"x", None, {"a": "1\n2"}), "line break"),
        ({}, OutboundMessage(b"x", b"1\r2"), "line break"),
        ({}, OutboundMessage(b"x", b"", {"a": b"text"}), None),
        ({"attribute_types": frozenset({str, int})}, OutboundMessage(b"x", None, {"a": 1}), None),
    ],
)
def test_a_row_that_the_broker_could_not_store_is_refused(monkeypatch, able, row, says):
    monkeypatch.setitem(MANNERS, "other", driver_with(replace(JETSTREAM, name="other", able=replace(JETSTREAM.able, **able))))

    async def go():
        async with connected("other") as (client, broker):
            (result,) = await (await client.topic("t")).batch_publish(row)
            assert (result.state, says is None or says in str(result.error)) == ("accepted" if says is None else "refused", True)
            # also by a sender that was not asked first
            (sent,) = await (await client.driver.sender(T, {})).send([Outbound(row.data, row.key, row.attributes)])
            assert sent.state is (Sent.ACCEPTED if says is None else Sent.REFUSED)
            typed = {a.type for stored in broker.topic("t").logs[0].rows for a in stored.attributes or ()}
            assert typed <= ({"int"} if able else {""})

    run(go())


def test_manners_with_transactions_have_them(monkeypatch):
    able = replace(KAFKA.able, transactions=True, notyet={})
    monkeypatch.setitem(MANNERS, "other", driver_with(replace(KAFKA, name="other", able=able)))

    async def go():
        async with connected("other") as (client, broker):
            publisher = await client.transactional_publisher("id")
            async with publisher.transaction():
                await (await publisher.topic("t")).publish(OutboundMessage(b"1"))
            assert [row.data for row in broker.topic("t").logs[0].rows] == [b"1"]

    run(go())


def test_only_producers_of_such_brokers_set_the_time():
    async def go():
        async with connected("jetstream") as (client, _):
            sender = await client.driver.sender(T, {})
            assert sender.check(Outbound(b"x", time_ns=1)) == "the server sets the time; leave it out"

    run(go())


# ------------------------------------------------------------------ a broker whose rows are settled before the next pull
def test_rows_that_wait_for_their_verdict_block_only_their_own_handle():
    async def go():
        async with connected("share", 10) as (client, broker):
            taken = await client.subscribe("t", "s", create=True)
            first = await taken.next_batch(1, count=3, age=0)
            broker.publish("t", [Outbound(b"%d" % i) for i in range(10, 20)])
            second = await taken.next_batch(1, count=3, age=0)
            assert [m.data for m in first + second] == [
                b"%d" % i for i in (0, 1, 2, 10, 11, 12)
            ]  # the first poll brought all ten
            results = await taken.settle([d.serial for d in taken.held()], "ack")
            assert {r.state for r in results} == {"settled"}
            assert [m.data for m in await taken.next_batch(1, count=20)] == [b"%d" % i for i in (*range(3, 10), *range(13, 20))]
            assert broker.misuses == []

    run(go())


# ------------------------------------------------------------------ sabotage
def no_turnstile(monkeypatch):
    async def call(self, start, *, urgent=False):
        return await start()

    monkeypatch.setattr(Turnstile, "call", call)


async def two_pulls(client):
    taken = await client.subscribe("t", "s", create=True)
    await asyncio.gather(taken.next_batch(0.2, count=50), taken.next_batch(0.2, count=50))


async def commit_while_pulling(client):
    taken = await client.subscribe("t", "s")
    (row,) = await taken.next_batch(1, count=1)
    waiting = asyncio.ensure_future(taken.next_batch(0.3, count=50, age=5))
    await asyncio.sleep(0.05)
    try:
        await row.ack()
    finally:
        await waiting


async def settle_twice_at_once(client):
    taken = await client.subscribe("t", "s", create=True, max_held=9000)
    await taken.take(6000, timeout=2)
    await asyncio.gather(taken.settle(range(1, 3001), "ack"), taken.settle(range(3001, 6001), "ack"))


async def two_sends(client):
    publisher = await client.topic("t")
    await asyncio.gather(*(publisher.batch_publish(*[OutboundMessage(b"x")] * 3000) for _ in range(2)))


def long_slices(monkeypatch):
    monkeypatch.setattr(pulling.Puller, "_slice", property(lambda self: 3.0, lambda self, value: None), raising=False)


async def take_all(client):
    taken = await client.subscribe("t", "s", create=True)
    return taken, await taken.next_batch(1, count=50, age=0)


async def look_on(client):
    look = await client.look("t", parse_range("..end"), want=frozenset())
    look._capabilities = replace(look._capabilities, slice_s=9)
    return [batch async for batch in look.batches()]


def never_over(monkeypatch):
    monkeypatch.setattr(
        MessageSubscription, "_end", lambda self, delivery, state: setattr(delivery, "state", messages.State.HELD)
    )


async def ack_twice(client):
    taken, _ = await take_all(client)
    for _ in range(2):
        await taken.settle([1], "ack")


def wrong_words(monkeypatch):
    monkeypatch.setattr(messages, "VERDICTS", dict.fromkeys(messages.VERDICTS, messages.Verdict.ACK))


async def nack_later(client):
    taken, _ = await take_all(client)
    await taken.settle([1], "nack", delay=5)


async def reject_one(client):
    taken, _ = await take_all(client)
    taken._capabilities = replace(taken._capabilities, reject=True)
    await taken.settle([1], "reject", reason="unreadable")


def one_handle_for_all(monkeypatch):
    choose = MessageSubscription._choose

    async def first(self):
        return self._handles[0] if self._handles else await choose(self)

    monkeypatch.setattr(MessageSubscription, "_choose", first)
    monkeypatch.setattr(pulling.Handle, "waits", False)


async def take_again(client):
    taken, _ = await take_all(client)
    await taken.next_batch(0.1)


def two_at_once(monkeypatch):
    monkeypatch.setattr(pulling.Handle, "waits", property(lambda self: False))


async def two_takers(client):
    taken = await client.subscribe("t", "s", create=True)
    await asyncio.gather(taken.next_batch(0.5, count=1), taken.next_batch(0.5, count=1))


async def extend_all(client):
    taken, _ = await take_all(client)
    taken.terms = replace(taken.terms, seconds=30.0)
    await taken.extend(taken.held())


def concurrent(monkeypatch):
    turnstiles = pulling.Handle.__init__
    monkeypatch.setattr(pulling.Handle, "__init__", lambda self, source, *_: turnstiles(self, source, True))


async def settle_beside_pull(client):
    taken = await client.subscribe("t", "s", create=True)
    (row,) = await taken.next_batch(1, count=1)
    waiting = asyncio.ensure_future(taken.next_batch(0.3, count=50, age=5))
    await asyncio.sleep(0.05)
    try:
        await row.ack()
    finally:
        await waiting


def commits_back(monkeypatch):
    def advance(self):
        self.position, self.committed = (*self._done.pop(), 0), None
        return True

    monkeypatch.setattr(Prefix, "_advance", advance)


def commits_beyond(monkeypatch):
    def advance(self):
        self.position = (self._done.pop()[0] + 40,)
        return True

    monkeypatch.setattr(Prefix, "_advance", advance)


async def ack_backwards(client):
    _, rows = await take_all(client)
    for row in reversed(rows):
        await row.ack()


def rewinds_on(monkeypatch):
    monkeypatch.setattr(Prefix, "rewind", lambda self: (99,))


async def rewind(client):
    taken, _ = await take_all(client)
    await taken.rewind()


def nothing(monkeypatch):
    """What the case does is wrong already."""


SABOTAGE = [
    ("kafka", no_turnstile, two_pulls, "pull while pull is in flight"),
    ("kafka", no_turnstile, commit_while_pulling, "commit while pull is in flight"),
    ("jetstream", no_turnstile, two_pulls, "pull while pull is in flight"),
    ("jetstream", no_turnstile, settle_twice_at_once, "settle while settle is in flight"),
    ("kafka", no_turnstile, two_sends, "send while send is in flight"),
    ("kafka", long_slices, two_pulls, " s, and a slice is 0.1 s"),
    ("kafka", nothing, look_on, "read would wait 0.5 s, and a slice is 0.1 s"),
    ("jetstream", never_over, ack_twice, "settle of a row that was settled"),
    ("jetstream", wrong_words, nack_later, "ACK with a delay"),
    ("jetstream", wrong_words, reject_one, "ACK with a reason"),
    ("pubsub", nothing, reject_one, "REJECT where there is none"),
    ("share", one_handle_for_all, take_again, "pull before 5 rows of the last one are settled"),
    ("share", two_at_once, two_takers, "pull before 1 rows of the last one are settled"),
    ("share", nothing, extend_all, "extend of a lease that cannot be kept longer"),
    ("pulsar", nothing, extend_all, "extend of a lease that cannot be kept longer"),
    ("servicebus", concurrent, settle_beside_pull, "settle while pull is in flight"),
    ("kafka", commits_back, ack_backwards, "commit of partition 0 back from 5 to 4"),
    ("kafka", commits_beyond, ack_backwards, "commit of partition 0 to 44, and it was read up to 5"),
    ("kafka", rewinds_on, rewind, "seek in partition 0 over unread rows, from 5 to 99"),
]


@pytest.mark.parametrize(
    ("manner", "sabotage", "case", "caught"), SABOTAGE, ids=lambda value: getattr(value, "__name__", str(value)[:12])
)
def test_a_broken_rule_is_caught(monkeypatch, manner, sabotage, case, caught):
    sabotage(monkeypatch)

    async def go():
        async with connected(manner, 6000 if case is settle_twice_at_once else 5) as (client, broker):
            with pytest.raises(Misuse, match=caught):
                await case(client)
            assert caught in broker.misuses[0]

    run(go())


GOOD = dict.fromkeys((manner, case) for manner, sabotage, case, _ in SABOTAGE if sabotage is not nothing)


@pytest.mark.parametrize(("manner", "case"), GOOD, ids=lambda value: getattr(value, "__name__", value))
def test_without_sabotage_nothing_is_caught(manner, case):
    async def go():
        async with connected(manner, 6000 if case is settle_twice_at_once else 5) as (client, broker):
            await case(client)
            assert broker.misuses == []

    run(go())
