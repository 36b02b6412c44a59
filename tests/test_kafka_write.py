"""Publishing to a real Kafka: order per key, a fate per row, and nothing that is made or lost on the way."""

import asyncio
import contextlib
import time
import uuid

import pytest
from kafka_bed import Bed, driver, look, run, topic

from broker_nb.backends.driver import Outbound, Sent
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attribute
from broker_nb.portable.client import Client
from broker_nb.portable.loop import shared_loop

REFUSED, ACCEPTED = Sent.REFUSED, Sent.ACCEPTED


@pytest.fixture(scope="module")
def bed(kafka_url):
    return Bed(kafka_url)


def on(bed, body, within=40.0, **profile):
    async def go():
        async with driver(bed.servers, **profile) as opened:
            return await body(opened)

    return run(go(), within)


def sent(bed, name, rows, **profile):
    """Results of sending, and what is in the topic then."""

    async def body(opened):
        sender = await opened.sender(topic(name), {})
        results = await sender.send(rows)
        await sender.close()
        return results, (await look(opened, name)).rows

    return on(bed, body, **profile)


@contextlib.asynccontextmanager
async def opened_client(bed):
    client = await Client.open("kafka", {"hosts": [bed.servers], "options": {}})
    try:
        yield client
    finally:
        await client.close()


def test_values_arrive_as_they_are(bed):
    name = bed.topic()
    attributes = [Attribute("a", b"1"), Attribute("a", None), Attribute("ü", b""), Attribute("a", b"\xff", "bytes")]
    rows = [
        Outbound(b"", b""),
        Outbound(None, None),
        Outbound(b"\xff\x00", b"\x80", attributes, 0, 1_700_000_000_123_456_789),
        Outbound(b"x", attributes=()),
    ]
    results, found = sent(bed, name, rows)
    assert [(r.state, r.id, r.partition, r.position) for r in results] == [(ACCEPTED, f"0:{i}", 0, (i,)) for i in range(4)]
    assert [(row.data, row.key) for row in found] == [(row.data, row.key) for row in rows]
    assert [tuple(a)[:2] for a in found[2].attributes] == [tuple(a)[:2] for a in attributes]
    assert found[2].publish_time_ns == 1_700_000_000_123_000_000  # Kafka keeps milliseconds
    assert time.time_ns() - found[0].publish_time_ns < 60 * 10**9


def test_order_per_key_and_per_partition(bed):
    name = bed.topic(4)
    rows = [Outbound(b"%d" % i, b"key-%d" % (i % 7)) for i in range(3500)]
    rows += [Outbound(b"%d" % i, None, (), 3) for i in range(3500, 4000)]

    async def body(opened):
        sender = await opened.sender(topic(name), {})
        await asyncio.gather(*(sender.send(rows[i : i + 500]) for i in range(0, 4000, 500)))  # one after the other, all the same
        return (await look(opened, name)).rows

    found = on(bed, body)
    assert len(found) == 4000
    for key in {row.key for row in found}:
        mine = [int(row.data) for row in found if row.key == key]
        assert mine == sorted(mine)
        assert key is None or len({row.partition for row in found if row.key == key}) == 1
    assert {row.partition for row in found if row.key is None} == {3}


def test_no_rows(bed):
    results, found = sent(bed, bed.topic(), [])
    assert (list(results), found) == ([], [])


def test_a_row_that_is_too_large_stops_its_key_only(bed):
    name = bed.topic(max_message_bytes=2000)
    large = Outbound(b"x" * 5000, b"big")  # past `check`, as if the topic's limit had just been lowered
    rows = [Outbound(b"0", b"a"), Outbound(b"1", b"big"), large, Outbound(b"3", b"big"), Outbound(b"4", b"a"), Outbound(b"5")]
    results, found = sent(bed, name, rows)
    assert [r.state for r in results] == [ACCEPTED, ACCEPTED, REFUSED, REFUSED, ACCEPTED, ACCEPTED]
    assert results[2].error.kind is ErrorKind.TOO_LARGE
    assert results[3].error.kind is ErrorKind.CONFLICT
    assert "b'big'" in str(results[3].error)
    assert sorted(row.data for row in found) == [b"0", b"1", b"4", b"5"]


def test_a_partition_that_is_not_there_is_a_row_s_fate(bed):
    name = bed.topic()
    rows = [Outbound(b"0"), Outbound(b"1", b"k", (), 9), Outbound(b"2", b"k"), Outbound(b"3", b"l")]
    results, found = sent(bed, name, rows)  # past `check`, as if partitions had been counted wrongly
    assert results[1].state is REFUSED
    assert results[1].error.kind is ErrorKind.NOT_FOUND
    assert sorted(row.data for row in found) == [row.data for row, r in zip(rows, results, strict=True) if r.state is ACCEPTED]

    async def go():
        async with opened_client(bed) as client:
            results = []
            await (await client.topic(name)).send(rows, results)
            return [r.state for r in results], str(results[1].error)

    states, text = shared_loop().run(go())
    assert states == [ACCEPTED, REFUSED, REFUSED, ACCEPTED]
    assert "no partition 9" in text


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (Outbound("text"), "data must be bytes or None, not str"),
        (Outbound(b"x", "key"), "key must be bytes or None, not str"),
        (Outbound(bytearray(b"x")), "not bytearray"),
        (Outbound(b"x" * 2000), "too large"),
        (Outbound(b"x" * 1990), "too large"),
        (Outbound(b"x", b"k" * 2000), "too large"),
        (Outbound(b"x", b"k", [Attribute("a", b"y" * 2000)]), "too large"),
        (Outbound(b"x", b"k", [Attribute("a", b"1", "int")]), "type int"),
        (Outbound(b"x", b"k", [Attribute("a\0b", b"1")]), "NUL"),
        (Outbound(b"x", b"k", [Attribute("\udc00", b"1")]), "surrogate"),
        (Outbound(b"x", b"k", (), 2), "no partition 2; there are 0..1"),
        (Outbound(b"x", b"k", (), -1, 0), "1970"),
        (Outbound(b"x", b"k", (), -1, -(10**18)), "1970"),
        (Outbound(b"x", native={"session_id": "s"}), "'session_id'"),
    ],
)
def test_what_can_never_be_sent_is_told_before(bed, row, why):
    name = bed.topic(2, max_message_bytes=2000)

    async def body(opened):
        sender = await opened.sender(topic(name), {})
        return sender.check(row), sender.check(Outbound(b"x", b"k", [Attribute("a", b"1", "str"), Attribute("a", None)], 1))

    bad, good = on(bed, body)
    assert why in bad
    assert "\n" not in bad
    assert good is None


def test_what_a_topic_s_settings_refuse(bed):
    compacted, compressed = bed.topic(cleanup_policy="compact"), bed.topic(max_message_bytes=2000, compression_type="gzip")
    strict = bed.topic(message_timestamp_after_max_ms=60_000)
    late = Outbound(b"x", None, (), -1, time.time_ns() + 3600 * 10**9)

    async def body(opened):
        senders = [await opened.sender(topic(t), {}) for t in (compacted, compressed, strict)]
        nul = [senders[0].check(Outbound(b"x")), senders[2].check(late)]
        return nul, [
            senders[0].check(Outbound(b"x", b"")),
            senders[1].check(Outbound(b"x" * 5000)),
            senders[2].check(Outbound(b"x")),
        ]

    (no_key, in_future), fine = on(bed, body)
    assert "every message needs a key" in no_key
    assert "in the future" in in_future
    assert fine == [None, None, None]  # a compressed row of 5000 may fit into 2000


def test_rows_larger_than_the_batch_and_the_client_s_queue(bed):
    name = bed.topic(max_message_bytes=5_000_000)
    rows = [Outbound(b"%d" % i * 400_000, b"k") for i in range(10)]
    results, found = sent(bed, name, rows, options={"queue.buffering.max.kbytes": "1000"})
    assert {r.state for r in results} == {ACCEPTED}
    assert [row.data for row in found] == [row.data for row in rows]
    results, found = sent(bed, name, [Outbound(b"y" * 3_000_000), Outbound(b"z")], options={"queue.buffering.max.kbytes": "1000"})
    assert [(r.state, r.error and r.error.kind) for r in results] == [(REFUSED, ErrorKind.TOO_LARGE), (ACCEPTED, None)]
    assert found[-1].data == b"z"


def test_full_queue_of_the_client_waits(bed):
    name = bed.topic()
    rows = [Outbound(b"%d" % i) for i in range(2000)]
    results, found = sent(bed, name, rows, options={"queue.buffering.max.messages": "10"})
    assert {r.state for r in results} == {ACCEPTED}
    assert [row.data for row in found] == [row.data for row in rows]


def test_topic_deleted_under_a_sender_is_not_made_again(bed):
    name = bed.topic()

    async def body(opened):
        sender = await opened.sender(topic(name), {})
        assert (await sender.send([Outbound(b"x")]))[0].state is ACCEPTED
        bed.admin.delete_topics([name])[name].result(10)
        return await sender.send([Outbound(b"y", b"k")] * 3)

    results = on(bed, body, options={"message.timeout.ms": "4000", "topic.metadata.refresh.interval.ms": "500"})
    assert ACCEPTED not in {r.state for r in results}
    assert all(r.error is not None and name in str(r.error) for r in results)
    assert name not in bed.topics()


def test_sending_after_close(bed):
    name = bed.topic()

    async def body(opened):
        sender, other = await opened.sender(topic(name), {}), await opened.sender(topic(name), {})
        await sender.close()
        await sender.close()
        with pytest.raises(BrokerError) as caught:
            await sender.send([Outbound(b"x")])
        return caught.value.kind, (await other.send([Outbound(b"y")]))[0].state

    assert on(bed, body) == (ErrorKind.CLOSED, ACCEPTED)


def test_idempotence_and_auto_creation_cannot_be_switched(bed):
    missing = f"missing-{uuid.uuid4().hex}"
    options = {"enable.idempotence": "false", "acks": "0", "allow.auto.create.topics": "true"}
    results, found = sent(bed, bed.topic(), [Outbound(b"x")], options=options)
    assert results[0].position == (0,)  # acks=0 would know no offset
    assert len(found) == 1

    async def body(opened):
        with pytest.raises(BrokerError) as caught:
            await opened.sender(topic(missing), {})
        return caught.value.kind

    assert on(bed, body, options=options) is ErrorKind.NOT_FOUND
    assert missing not in bed.topics()


def test_publishing_leaves_no_group_and_makes_no_topic(bed):
    name, missing = bed.topic(), f"missing-{uuid.uuid4().hex}"
    before = bed.topics(), bed.groups()

    async def go():
        async with opened_client(bed) as client:
            with pytest.raises(BrokerError, match=missing) as caught:
                await client.topic(missing)
            rows = [Outbound(b"x", b"k"), Outbound(b"y" * 2_000_000, b"k"), Outbound(b"z", b"k"), Outbound(b"w", b"l")]
            results = []
            await (await client.topic(name)).send(rows, results)
            return caught.value.kind, [r.state for r in results], bed.topics()

    kind, states, topics = shared_loop().run(go())
    assert (kind, states) == (ErrorKind.NOT_FOUND, [ACCEPTED, REFUSED, REFUSED, ACCEPTED])
    assert topics == before[0]
    assert bed.groups() == before[1]
