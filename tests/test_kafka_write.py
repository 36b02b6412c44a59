import asyncio
import contextlib
import time

import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from kafka_bed import RECORDS, Bed, driver, group, look, pull, run, topic, until_it_fails

from broker_nb.backends.driver import COLUMNS, DedupeId, Outbound, Piece, Sent, Settled
from broker_nb.errors import BrokerError, ErrorKind, Unavailable
from broker_nb.messages import Attribute, Attributes
from broker_nb.testing import servers


@pytest.fixture(scope="module")
def bed(kafka_url):
    return Bed(kafka_url)


def on(bed, body, within=40.0, **profile):
    async def go():
        async with driver(bed.servers, **profile) as opened:
            return await body(opened)

    return run(go(), within)


def send(bed, name, rows, native=(), **profile):
    """Send, and look at the topic after."""

    async def body(opened):
        sender = await opened.sender(topic(name), dict(native))
        results = await sender.send(rows)
        await sender.close()
        return results, await look(opened, name)

    return on(bed, body, **profile)


def limit(bed, name, size):
    """Lower a topic's limit behind the back of open senders."""
    entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=[entry])
    bed.admin.incremental_alter_configs([resource])[resource].result(10)


def test_results_are_aligned_and_true(bed):
    name = bed.topic(3)
    rows = [Outbound(b"%d" % i, b"k%d" % (i % 17)) for i in range(2000)]
    results, seen = send(bed, name, rows)
    where = {row.id: row for row in seen.rows}
    assert {r.state for r in results} == {Sent.ACCEPTED}
    assert len({r.id for r in results}) == 2000
    for row, result in zip(rows, results, strict=True):
        stored = where[result.id]
        assert (stored.data, stored.key, stored.partition, stored.position) == (
            row.data,
            row.key,
            result.partition,
            result.position,
        )


def test_order_per_key_and_per_partition(bed):
    name = bed.topic(3)
    keyed = [Outbound(b"%d" % i, b"k%d" % (i % 5)) for i in range(1000)]
    placed = [Outbound(b"%d" % i, partition=i % 3) for i in range(1000)]
    _, seen = send(bed, name, keyed + placed)
    for key in {row.key for row in seen.rows}:
        for partition in range(3):
            got = [int(row.data) for row in seen.rows if row.key == key and row.partition == partition]
            assert got == sorted(got)
    assert [int(r.data) for r in seen.rows if r.key is None and r.partition == 1] == list(range(1, 1000, 3))


def test_headers_keys_bodies_and_times_as_given(bed):
    name = bed.topic(2)
    attributes = Attributes(
        [Attribute("a", b"1"), Attribute("a", None), Attribute("", b""), Attribute("ü" * 50, b"\xff", "bytes")]
    )
    rows = [
        Outbound(b"", b"", attributes, partition=1, time_ns=1_700_000_000_123_456_789),
        Outbound(None, None, partition=1),
        Outbound(b"\x00\xff" * 50_000, b"\x00\xff", partition=1, dedupe=DedupeId("run", 1)),
    ]
    _, seen = send(bed, name, rows)
    assert [(r.key, r.data, r.partition) for r in seen.rows] == [(r.key, r.data, 1) for r in rows]
    assert [(a.name, a.value) for a in seen.rows[0].attributes] == [(a.name, a.value) for a in attributes]
    assert seen.rows[0].publish_time_ns == 1_700_000_000_123_000_000
    assert time.time_ns() - seen.rows[1].publish_time_ns < 60 * 10**9


def test_nothing_to_send(bed):
    results, seen = send(bed, bed.topic(), [])
    assert (list(results), seen.rows) == ([], [])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Outbound("text"), "data must be bytes"),
        (Outbound(b"x", "key"), "key must be bytes"),
        (Outbound(bytearray(b"x")), "data must be bytes"),
        (Outbound(b"x", attributes=[Attribute("n", b"1", "int")]), "'n' is of type int"),
        (Outbound(b"x", attributes=[Attribute("a\0b", b"1")]), "NUL"),
        (Outbound(b"x", attributes=[Attribute("a\udcff", b"1")]), "surrogate"),
        (Outbound(b"x" * 1_048_588), "max.message.bytes"),
        (Outbound(b"x", attributes=[Attribute("n", b"x" * 1_048_588)]), "max.message.bytes"),
        (Outbound(b"x", partition=2), "no partition 2"),
        (Outbound(b"x", time_ns=0), "1970"),
        (Outbound(b"x", time_ns=-1), "1970"),
        (Outbound(b"x", time_ns=time.time_ns() + 10 * 24 * 3600 * 10**9), "future"),
        (Outbound(b"x", native={"deliver_at": 1}), "deliver_at"),
    ],
)
def test_check_says_why(bed, row, words):
    name = bed.topic(2)

    async def body(opened):
        return (await opened.sender(topic(name), {})).check(row)

    assert words in on(bed, body)


def test_check_lets_pass_what_can_be_sent(bed):
    name, compacted = bed.topic(2), bed.topic(cleanup_policy="compact")
    row = Outbound(b"x" * 1_048_000, b"k", [Attribute("a", b"1", "str"), Attribute("b", None)], 1, time.time_ns())

    async def body(opened):
        sender = await opened.sender(topic(name), {})
        compressing = await opened.sender(topic(name), {"compression.type": "zstd"})
        keyed = await opened.sender(topic(compacted), {})
        return (
            sender.check(row),
            sender.check(Outbound(None)),
            compressing.check(Outbound(b"x" * 2_000_000)),
            keyed.check(Outbound(None, b"k")),
            keyed.check(Outbound(b"x")),
            (await compressing.send([Outbound(b"x" * 2_000_000)]))[0].state,
            (await sender.send([row]))[0].state,
        )

    *fine, reason, compressed, plain = on(bed, body)
    assert fine == [None] * 4
    assert "needs a key" in reason
    assert (compressed, plain) == (Sent.ACCEPTED, Sent.ACCEPTED)


def test_topic_that_takes_less_than_the_clients_batch(bed):
    name = bed.topic(max_message_bytes=20_000)
    results, seen = send(bed, name, [Outbound(b"x" * 1000, b"k")] * 500)
    assert {r.state for r in results} == {Sent.ACCEPTED}
    assert len(seen.rows) == 500


def test_rows_of_a_failed_key_are_not_sent_and_the_others_are(bed):
    name = bed.topic()

    async def body(opened):
        sender = await opened.sender(topic(name), {"batch.num.messages": 1, "max.in.flight.requests.per.connection": 1})
        assert (await sender.send([Outbound(b"first", b"a")]))[0].state is Sent.ACCEPTED
        limit(bed, name, 5_000)
        rows = [Outbound(b"x" * 10_000, b"bad")]
        rows += [Outbound(b"%d" % i, b"bad" if i % 2 else b"good") for i in range(5000)]
        results = await sender.send(rows)
        return rows, results, await look(opened, name)

    rows, results, seen = on(bed, body)
    assert (results[0].state, results[0].error.kind) == (Sent.REFUSED, ErrorKind.TOO_LARGE)
    assert {r.state for row, r in zip(rows, results, strict=True) if row.key == b"good"} == {Sent.ACCEPTED}
    late = [r for row, r in zip(rows[1:], results[1:], strict=True) if row.key == b"bad"]
    assert len([r for r in late if r.state is Sent.REFUSED]) > 2400  # all but what was on the wire already
    assert {r.error.kind for r in late if r.error} == {ErrorKind.CONFLICT}
    stored = {row.id: row.data for row in seen.rows}
    assert all(stored[r.id] == row.data for row, r in zip(rows, results, strict=True) if r.state is Sent.ACCEPTED)
    assert len(stored) == 1 + sum(r.state is Sent.ACCEPTED for r in results)
    good = [int(row.data) for row in seen.rows if row.key == b"good"]
    assert good == sorted(good)


def test_topic_deleted_under_a_sender(bed):
    name = bed.topic()

    async def body(opened):
        sender = await opened.sender(topic(name), {})
        await sender.send([Outbound(b"x")])
        bed.admin.delete_topics([name])[name].result(10)
        return await sender.send([Outbound(b"%d" % i, b"%d" % i) for i in range(3000)])

    began = time.monotonic()
    results = on(bed, body, options={"topic.metadata.refresh.interval.ms": "500", "topic.metadata.propagation.max.ms": "500"})
    assert time.monotonic() - began < 15
    assert not {r.state for r in results} & {Sent.ACCEPTED, Sent.DUPLICATE}
    assert all(name in str(r.error) for r in results)
    assert name not in bed.topics()


def test_full_queue_of_the_client(bed):
    name = bed.topic()
    results, seen = send(bed, name, [Outbound(b"%d" % i) for i in range(3000)], {"queue.buffering.max.messages": 100})
    assert {r.state for r in results} == {Sent.ACCEPTED}
    assert [int(row.data) for row in seen.rows] == list(range(3000))


def test_row_larger_than_the_clients_queue(bed):
    name = bed.topic()
    rows = [Outbound(b"x" * 30_000, b"a"), Outbound(b"fits", b"b")]
    results, _ = send(bed, name, rows, {"queue.buffering.max.kbytes": 10})
    assert [r.state for r in results] == [Sent.REFUSED, Sent.ACCEPTED]


def test_wrong_setting_of_a_sender(bed):
    name = bed.topic()

    async def body(opened):
        with pytest.raises(BrokerError, match=r"no\.such") as caught:
            await opened.sender(topic(name), {"no.such": 1})
        return caught.value.kind

    assert on(bed, body) is ErrorKind.INVALID


def test_senders_side_by_side(bed):
    names = [bed.topic() for _ in range(3)]

    async def body(opened):
        senders = [await opened.sender(topic(name), {}) for name in names for _ in range(2)]
        await asyncio.gather(*(s.send([Outbound(b"%d" % i) for i in range(500)]) for s in senders))
        return [len((await look(opened, name)).rows) for name in names]

    assert on(bed, body) == [1000] * 3


def test_the_loop_is_not_held_up(bed):
    name = bed.topic(4)

    async def body(opened):
        sender = await opened.sender(topic(name), {})
        sending = asyncio.ensure_future(sender.send([Outbound(b"x" * 100, b"%d" % i) for i in range(50_000)]))
        gaps, last = [], time.monotonic()
        while not sending.done():
            await asyncio.sleep(0)
            now = time.monotonic()
            gaps.append(now - last)
            last = now
        return sorted(gaps), await sending

    gaps, results = on(bed, body)
    assert len(results) == 50_000
    assert gaps[len(gaps) * 99 // 100] < 0.05


# ------------------------------------------------------------------ a broker that goes away
@pytest.mark.slow
@pytest.mark.xdist_group("servers")
def test_outage():
    with servers.OwnServer("kafka") as server:
        bed = Bed(server.url)
        name = bed.topic()
        bed.put(name, *[b"%d" % i for i in range(10)])

        async def body(opened):
            source = await opened.subscribe(group("g", name), RECORDS)
            await pull(source, 10)
            sender = await opened.sender(topic(name), {"message.timeout.ms": 1500})
            await sender.send([Outbound(b"10", b"k")])
            browser = await opened.browse(topic(name), [Piece(0, (11,), None)], COLUMNS, True, frozenset())
            await asyncio.to_thread(server.kill)

            began = time.monotonic()
            with pytest.raises(BrokerError, match="does not answer") as caught:
                await until_it_fails(lambda: browser.read(10, 1 << 20, 0.1), 20)
            assert (caught.value.kind, caught.value.retryable) == (ErrorKind.UNREACHABLE, True)
            assert "reconnecting" in [e.kind for e in opened.events]
            results = await sender.send([Outbound(b"11", b"k"), *[Outbound(b"%d" % i, b"%d" % i) for i in range(12, 5000)]])
            assert results[0].state is Sent.UNKNOWN
            assert {r.state for r in results} <= {Sent.UNKNOWN, Sent.REFUSED}
            assert (await source.commit({0: (5,)}))[0].state is Settled.RETRY
            with pytest.raises(BrokerError) as caught:
                await opened.bounds(topic(name), True)
            assert caught.value.retryable
            assert time.monotonic() - began < 40

            await asyncio.to_thread(server.start)
            end = time.monotonic() + 60
            while "reconnected" not in [e.kind for e in opened.events]:
                assert time.monotonic() < end
                with contextlib.suppress(Unavailable):
                    await browser.read(10, 1 << 20, 0.1)
            await browser.close()
            while (await source.commit({0: (5,)}))[0].state is not Settled.CONFIRMED:
                assert time.monotonic() < end
                await source.pull(10, 1 << 20, 0.1)
            assert (await sender.send([Outbound(b"again", b"k")]))[0].state is Sent.ACCEPTED
            seen = await look(opened, name)
            assert seen.data[:11] == [b"%d" % i for i in range(11)]
            assert seen.data[-1] == b"again"

            await asyncio.to_thread(server.kill)
            began = time.monotonic()
            await source.close()
            assert time.monotonic() - began < 2.1
            await opened.close()
            assert time.monotonic() - began < 5

        on(bed, body, within=150, timeout=2)
