"""Ranges become pieces, and a look ends when the broker has proved it: on the broker in memory, with gaps, times and transactions."""

import uuid

import pytest

from broker_nb.backends.driver import COLUMNS, Bounds, Effect, Entity, Facts, Kind, LookPlan, Outbound, Stop
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.client import Client
from broker_nb.portable.look import _ahead, _back, open_look
from broker_nb.portable.loop import shared_loop
from broker_nb.portable.ranges import parse_range

SECOND = 10**9
T0 = 1_800_000_000 * SECOND


@pytest.fixture
def broker():
    return InmemBroker.get(uuid.uuid4().hex)


def look(broker, topic, text, *, committed=True, timeout=20.0, **options):
    """Rows as (partition, offset) and the summary."""

    async def go():
        client = await Client.open("inmem", {"hosts": [broker.name], "options": {}})
        opened = await client.look(topic, parse_range(text), want=COLUMNS, committed_only=committed, **options)
        rows = [place async for batch in opened.batches(timeout, 7) for place in batch.codec.places(batch.rows)]
        await client.close()
        return [(p, at[0]) for p, at in rows], opened

    return shared_loop().run(go())


def fill(broker, topic, offsets, partition=0, key=None):
    return broker.publish(topic, [Outbound(b"%d" % i, key, (), partition, T0 + i * SECOND) for i in offsets])


def test_everything_and_an_empty_topic(broker):
    broker.create_topic("t", partitions=3)
    rows, opened = look(broker, "t", "..end")
    assert rows == []
    assert opened.summary.complete is True
    fill(broker, "t", range(50), 0)
    fill(broker, "t", range(20), 2)
    rows, opened = look(broker, "t", "..end")
    assert sorted(rows) == [(0, i) for i in range(50)] + [(2, i) for i in range(20)]
    assert opened.summary.complete is True
    assert opened.summary.total == 70


def test_the_newest_rows_are_found_behind_gaps(broker):
    broker.create_topic("t")
    fill(broker, "t", range(30), key=None)
    for _ in range(200):
        fill(broker, "t", [99], key=b"same")
    broker.compact("t")
    rows, opened = look(broker, "t", "-20")
    assert [o for _, o in sorted(rows)][-20:] == [*range(11, 30), 229]
    assert opened.summary.complete is True


def test_the_oldest_rows_are_found_behind_gaps(broker):
    broker.create_topic("t")
    for _ in range(200):
        fill(broker, "t", [1], key=b"same")
    fill(broker, "t", range(30))
    broker.compact("t")
    rows, opened = look(broker, "t", "+5")
    assert [o for _, o in rows][:5] == [199, 200, 201, 202, 203]
    assert opened.summary.complete is True


def test_offsets_are_clipped_to_what_is_there_and_a_range_that_aged_out_is_incomplete(broker):
    broker.create_topic("t")
    fill(broker, "t", range(40))
    assert [o for _, o in look(broker, "t", "12..15")[0]] == [12, 13, 14]
    rows, opened = look(broker, "t", "38..100")
    assert [o for _, o in rows] == [38, 39]
    assert opened.summary.complete is True
    broker.delete_records("t", {0: 20})
    rows, opened = look(broker, "t", "12..22")
    assert [o for _, o in rows] == [20, 21]
    assert opened.summary.complete is False
    assert "no longer there (partition 0)" in opened.summary.why


def test_a_time_range_reads_past_its_end_for_late_rows_and_says_so(broker):
    broker.create_topic("t")
    times = [0, 10, 5, 200, 12, 1000]
    broker.publish("t", [Outbound(b"", None, (), 0, T0 + s * SECOND) for s in times])
    rows, opened = look(broker, "t", f"@{_clock(5)}..{_clock(13)}")
    assert {o for _, o in rows} >= {1, 2, 4}
    assert opened.window_ns == (T0 + 5 * SECOND, T0 + 13 * SECOND)
    assert any("producers" in note for note in opened.summary.notes)
    assert opened.summary.complete is True


def _clock(seconds):
    from datetime import UTC, datetime

    return datetime.fromtimestamp(T0 / SECOND + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_a_time_range_that_is_younger_than_everything_is_empty_and_complete(broker):
    broker.create_topic("t", partitions=2)
    fill(broker, "t", range(5))
    rows, opened = look(broker, "t", f"@{_clock(9999)}..")
    assert rows == []
    assert opened.summary.complete is True


def test_an_open_transaction_ends_a_look_as_held_back(broker):
    broker.create_topic("t")
    fill(broker, "t", range(3))
    transaction = broker.begin("tx", 60)
    broker.topic("t").append([Outbound(b"open")], transaction=transaction)
    fill(broker, "t", range(2))
    rows, opened = look(broker, "t", "..end")
    assert [o for _, o in rows] == [0, 1, 2]
    assert opened.summary.complete is False
    assert opened.summary.parts[0].stop is Stop.HELD_BACK
    assert "open transaction" in opened.summary.why
    rows, opened = look(broker, "t", "..2")
    assert opened.summary.complete is True
    rows, opened = look(broker, "t", "..end", committed=False)
    assert [o for _, o in rows] == [0, 1, 2, 3, 4, 5]
    assert opened.summary.complete is True


def test_a_look_that_is_stopped_says_so(broker):
    broker.create_topic("t")
    fill(broker, "t", range(100))

    async def go():
        client = await Client.open("inmem", {"hosts": [broker.name], "options": {}})
        opened = await client.look("t", parse_range("..end"), want=COLUMNS)
        batches = opened.batches(None, 10)
        await anext(batches)
        opened.stop("limit of 10 rows")
        await batches.aclose()
        await client.close()
        return opened

    opened = shared_loop().run(go())
    assert opened.summary.complete is False
    assert opened.summary.why == "limit of 10 rows"


def test_unknown_partitions_and_topics_are_named_and_nothing_is_made(broker):
    broker.create_topic("t", partitions=2)
    with pytest.raises(BrokerError, match=r"t: no partition 7; there are 0\.\.1"):
        look(broker, "t", "-5", partitions=[7])
    with pytest.raises(BrokerError) as caught:
        look(broker, "nope", "-5")
    assert caught.value.kind is ErrorKind.NOT_FOUND
    assert list(broker.topics) == ["t"]


def test_effects_that_were_not_allowed_are_refused_by_name():
    plan = LookPlan(True, frozenset({Effect.CREATES_SUBSCRIPTION, Effect.COUNTS_DELIVERY}))

    async def go(plan, allow):
        facts = Facts(Entity(Kind.TOPIC, "t"), (0,), plan)
        await open_look(None, facts, parse_range("-1"), want=COLUMNS, committed_only=True, allow=allow)

    with pytest.raises(BrokerError, match=r"a temporary subscription on the topic\); allow them with allow=creates_subscription"):
        shared_loop().run(go(plan, [Effect.COUNTS_DELIVERY]))
    with pytest.raises(BrokerError, match="t cannot be looked at: no retention"):
        shared_loop().run(go(LookPlan(False, reason="no retention"), []))


LEDGERS = Bounds(0, (7, 0, 0), (12, 5, 0), runs=[((7, 0), 10), ((9, 0), 3), ((12, 0), 5)])


@pytest.mark.parametrize(
    ("end", "places", "start"),
    [
        ((12, 5, 0), 1, (12, 4)),
        ((12, 5, 0), 5, (12, 0)),
        ((12, 2, 4, 0), 1, (12, 2)),
        ((12, 2, 4, 0), 4, (9, 2)),
        ((9, 0), 1, (7, 9)),
        ((12, 5, 0), 1000, (7, 0, 0)),
    ],
)
def test_going_back_over_places_of_several_numbers(end, places, start):
    assert _back(end, LEDGERS, places) == start


@pytest.mark.parametrize(
    ("start", "places", "end"),
    [((7, 0, 0), 1, (7, 1)), ((7, 8), 4, (9, 2)), ((9, 1, 5), 2, (12, 0)), ((7, 0, 0), 1000, (12, 5, 0)), ((8, 0), 1, (9, 1))],
)
def test_going_on_over_places_of_several_numbers(start, places, end):
    assert _ahead(start, LEDGERS, places) == end
