import asyncio
import time

import pytest
from kafka_bed import ALL, Bed, driver, look, run, topic, until_it_fails

from broker_nb.backends.driver import COLUMNS, Bounds, Piece, Stop
from broker_nb.errors import BrokerError, ErrorKind


@pytest.fixture(scope="module")
def bed(kafka_url):
    return Bed(kafka_url)


def on(bed, body, *, within=30.0, **profile):
    """Run `await body(driver)`."""

    async def go():
        async with driver(bed.servers, **profile) as opened:
            return await body(opened)

    return run(go(), within)


def test_missing_topic_under_a_look(bed):
    name = f"missing-{time.time_ns()}"

    async def body(opened):
        with pytest.raises(BrokerError, match=name) as caught:
            await look(opened, name, [Piece(0, (0,), (1,))])
        other = bed.topic()
        bed.put(other, b"x")
        return caught.value.kind, (await look(opened, other)).data

    assert on(bed, body) == (ErrorKind.NOT_FOUND, [b"x"])
    assert name not in bed.topics()


def test_a_look_leaves_nothing(bed):
    name = bed.topic(2)
    bed.put(name, *[b"%d" % i for i in range(10)])
    before = bed.topics(), bed.groups()

    async def body(opened):
        for _ in range(3):
            assert len((await look(opened, name)).rows) == 10

    on(bed, body)
    assert (bed.topics() - {"__consumer_offsets"}, bed.groups()) == (before[0] - {"__consumer_offsets"}, before[1])


def test_control_records_at_the_end(bed):
    name, producer = bed.topic(), bed.transactional()
    producer.begin_transaction()
    bed.put(name, b"kept", producer=producer)
    producer.commit_transaction(10)
    producer.begin_transaction()
    bed.put(name, b"dropped", producer=producer)
    producer.abort_transaction(10)

    async def body(opened):
        return await look(opened, name), await look(opened, name, committed_only=False)

    committed, every = on(bed, body)
    assert (committed.data, committed.reached, committed.stopped) == ([b"kept"], {0: (4,)}, {})
    assert (every.data, every.reached) == ([b"kept", b"dropped"], {0: (4,)})
    assert committed.seconds < 1
    assert every.seconds < 1


def test_open_transaction_holds_back(bed):
    name, producer = bed.topic(), bed.transactional()
    bed.put(name, b"before")
    producer.begin_transaction()
    bed.put(name, b"open", producer=producer)
    bed.put(name, b"after")

    async def body(opened):
        bounds = await opened.bounds(topic(name), True)
        assert bounds == [Bounds(0, (0,), (1,), (3,))]
        assert await opened.bounds(topic(name), False) == [Bounds(0, (0,), (3,), (3,))]
        held = await look(opened, name, [Piece(0, (0,), (3,))])
        every = await look(opened, name, committed_only=False)
        producer.commit_transaction(10)
        return held, every, await look(opened, name)

    held, every, later = on(bed, body)
    assert (held.data, held.reached, held.stopped) == ([b"before"], {0: (1,)}, {0: Stop.HELD_BACK})
    assert held.seconds < 1
    assert every.data == later.data == [b"before", b"open", b"after"]
    assert later.stopped == {}


def test_bounds_beside_a_busy_writer_hold_nothing_back(bed):
    name = bed.topic()

    async def body(opened):
        stop = asyncio.Event()

        async def write():
            while not stop.is_set():
                await asyncio.to_thread(bed.put, name, *[b"x"] * 20)

        writing = asyncio.ensure_future(write())
        found = [(await opened.bounds(topic(name), True))[0] for _ in range(50)]
        stop.set()
        await writing
        return found

    found = on(bed, body)
    assert found[-1].end > (0,)
    assert all(b.high == b.end for b in found)


@pytest.mark.slow
def test_compacted_gap_and_tombstone_at_the_end(bed):
    name = bed.topic(cleanup_policy="compact", segment_ms=100, min_cleanable_dirty_ratio=0.01, max_compaction_lag_ms=100)
    bed.put(name, *[b"%d" % i for i in range(20)], key=b"k")

    async def body(opened):
        end = time.monotonic() + 80
        while len((whole := await look(opened, name)).rows) > 3:  # the broker's cleaner comes every 15 s
            assert time.monotonic() < end
            bed.put(name, None, key=b"k")  # begins a new segment, so that the one before can be cleaned
            await asyncio.sleep(0.5)
        last = whole.rows[-1].position[0]
        assert (whole.rows[-1].data, whole.rows[-1].key, whole.reached) == (None, b"k", {0: (last + 1,)})
        assert whole.seconds < 1
        gap = await look(opened, name, [Piece(0, (3,), (7,))])  # proved by what comes behind
        assert (gap.rows, gap.reached, gap.stopped) == ([], {0: (7,)}, {})
        assert gap.seconds < 1

    on(bed, body, within=100)


def test_deleted_records(bed):
    name, gone = bed.topic(), bed.topic()
    bed.put(name, *[b"%d" % i for i in range(10)])
    bed.put(gone, b"x", b"y")
    bed.delete_before(name, 6)
    bed.delete_before(gone, 2)

    async def body(opened):
        assert await opened.bounds(topic(gone), True) == [Bounds(0, (2,), (2,), (2,))]
        nothing = await look(opened, gone)
        return nothing, await look(opened, name), await look(opened, name, [Piece(0, (0,), (10,))])

    nothing, rest, aged = on(bed, body)
    assert (nothing.rows, nothing.stopped) == ([], {})
    assert nothing.seconds < 1
    assert rest.data == [b"6", b"7", b"8", b"9"]
    assert (aged.rows, aged.stopped) == ([], {0: Stop.AGED_OUT})
    assert aged.seconds < 2


def test_pieces_end_inside_a_batch_of_the_broker(bed):
    name = bed.topic(3)
    for partition in range(3):
        bed.put(name, *[b"%d" % i for i in range(1000)], partition=partition)
    pieces = [Piece(0, (10,), (20,)), Piece(1, (0, 0), (5,)), Piece(2, (999,), (1000,))]

    async def body(opened):
        return await look(opened, name, pieces)

    seen = on(bed, body)
    assert {p: [r.position[0] for r in seen.rows if r.partition == p] for p in range(3)} == {
        0: list(range(10, 20)),
        1: [1, 2, 3, 4],
        2: [999],
    }
    assert seen.reached == {0: (20,), 1: (5,), 2: (1000,)}
    assert seen.seconds < 1


def test_piece_beyond_the_end_is_dry(bed):
    name = bed.topic()
    bed.put(name, b"x")
    seen = on(bed, lambda opened: look(opened, name, [Piece(0, (0,), (5,))]))
    assert (seen.data, seen.reached, seen.stopped) == ([b"x"], {0: (1,)}, {0: Stop.DRY})


def test_empty_pieces_and_no_pieces(bed):
    name = bed.topic(2)
    bed.put(name, b"x")
    seen = on(bed, lambda opened: look(opened, name, [Piece(0, (1,), (1,)), Piece(1, (0,), (0,))]))
    assert (seen.rows, seen.reached) == ([], {0: (1,), 1: (0,)})
    assert on(bed, lambda opened: look(opened, name, [])).rows == []


def test_tail_goes_on_after_the_end(bed):
    name = bed.topic()

    async def body(opened):
        browser = await opened.browse(topic(name), [Piece(0, (0,), None)], COLUMNS, True, frozenset())
        got, end = [], time.monotonic() + 10
        for i in range(3):
            bed.put(name, b"%d" % i)
            while len(got) <= i:
                assert time.monotonic() < end
                step = await browser.read(10, ALL, 0.1)
                assert not step.stopped
                got += [row.value() for row in step.batch.rows] if step.batch else []
        await browser.close()
        return got

    assert on(bed, body) == [b"0", b"1", b"2"]


def test_warm_look_begins_at_once_and_no_row_of_an_earlier_one_comes(bed):
    name, other = bed.topic(2), bed.topic()
    for partition in range(2):
        bed.put(name, *[b"x" * 100] * 20_000, partition=partition)
    bed.put(other, *[b"%d" % i for i in range(100)])

    async def body(opened):
        first_row = []
        for i in range(15):
            browser = await opened.browse(topic(name), [Piece(0, (i,), None), Piece(1, (0,), None)], COLUMNS, True, frozenset())
            while not (await browser.read(10, ALL, 0.1)).batch:
                pass
            await browser.close()  # with thousands of rows in the client's queue
            began = time.monotonic()
            seen = await look(opened, *((other, [Piece(0, (i,), (i + 3,))]) if i % 2 else (name, [Piece(1, (i,), (i + 3,))])))
            first_row.append(time.monotonic() - began)
            assert [(r.topic, r.position) for r in seen.rows] == [(other if i % 2 else name, (i + n,)) for n in range(3)]
        return sorted(first_row)

    assert on(bed, body)[7] < 0.1


def test_row_and_byte_bounds(bed):
    name = bed.topic()
    bed.put(name, *[b"x" * 10_000] * 3000)

    async def body(opened):
        browser = await opened.browse(topic(name), [Piece(0, (0,), (3000,))], COLUMNS, True, frozenset())
        sizes, total, end = [], 0, time.monotonic() + 20
        while total < 3000:
            assert time.monotonic() < end
            step = await browser.read(700, 50_000, 0.1)
            if step.batch:
                sizes.append(len(step.batch.rows))
                total += sizes[-1]
        await browser.close()
        assert max(sizes) <= 700
        return total

    assert on(bed, body) == 3000


def test_cancelled_read_loses_nothing(bed):
    name = bed.topic()
    bed.put(name, *[b"%d" % i for i in range(500)])

    async def body(opened):
        browser = await opened.browse(topic(name), [Piece(0, (0,), (500,))], COLUMNS, True, frozenset())
        got, end = [], time.monotonic() + 10
        while len(got) < 500:
            assert time.monotonic() < end
            reading = asyncio.ensure_future(browser.read(50, ALL, 0.1))
            await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            step = await browser.read(50, ALL, 0.1)
            got += [row.offset() for row in step.batch.rows] if step.batch else []
        await browser.close()
        return got

    assert on(bed, body) == list(range(500))


def test_close_in_the_middle_of_a_read(bed):
    name = bed.topic()

    async def body(opened):
        browser = await opened.browse(topic(name), [Piece(0, (0,), None)], COLUMNS, True, frozenset())
        reading = asyncio.ensure_future(browser.read(10, ALL, 0.1))
        await asyncio.sleep(0)
        began = time.monotonic()
        await browser.close()
        await browser.close()
        assert time.monotonic() - began < 1
        assert (await reading).batch is None
        with pytest.raises(BrokerError) as caught:
            await browser.read(10, ALL, 0.1)
        return caught.value.kind

    assert on(bed, body) is ErrorKind.CLOSED


def test_two_looks_at_once_and_a_catalogue_beside_them(bed):
    names = [bed.topic() for _ in range(4)]
    for name in names:
        bed.put(name, *[name.encode()] * 50)

    async def body(opened):
        seen = await asyncio.gather(*(look(opened, name) for name in names), opened.facts(topic(names[0])))
        return [set(s.data) for s in seen[:4]]

    assert on(bed, body) == [{name.encode()} for name in names]


def test_topic_deleted_under_a_look(bed):
    name = bed.topic()
    bed.put(name, b"x")

    async def body(opened):
        browser = await opened.browse(topic(name), [Piece(0, (0,), None)], COLUMNS, True, frozenset())
        end = time.monotonic() + 10
        while not (await browser.read(10, ALL, 0.1)).batch:
            assert time.monotonic() < end
        bed.admin.delete_topics([name])[name].result(10)
        with pytest.raises(BrokerError, match=name) as caught:
            await until_it_fails(lambda: browser.read(10, ALL, 0.1), 10)
        await browser.close()
        return caught.value.kind

    assert on(bed, body, options={"topic.metadata.refresh.interval.ms": "500"}) is ErrorKind.NOT_FOUND
    assert name not in bed.topics()


# ------------------------------------------------------------------ values
def test_columns_agree_with_envelopes(bed):
    name = bed.topic(2, message_timestamp_after_max_ms=2**63 - 1)
    bed.put(name, b"", key=b"")
    bed.put(name, None, key=b"\x00\xff\xfe", headers=[("a", b"1"), ("a", None), ("ü", b""), ("a", b"\xff")])
    bed.put(name, b"\xff\x00", timestamp=1)
    bed.put(name, b"9007199254740993", partition=1)
    bed.put(name, b"old", timestamp=-5)
    bed.put(name, b"microseconds given as milliseconds", timestamp=1_700_000_000_000_000)

    async def body(opened):
        bounds = await opened.bounds(topic(name), True)
        browser = await opened.browse(topic(name), [Piece(b.partition, b.low, b.end) for b in bounds], COLUMNS, True, frozenset())
        batches, rows, end = [], 0, time.monotonic() + 10
        while rows < 6:
            assert time.monotonic() < end
            if batch := (await browser.read(2, ALL, 0.1)).batch:
                batches.append(batch)
                rows += len(batch.rows)
        await browser.close()
        return batches

    envelopes = []
    for batch in on(bed, body):
        columns = batch.codec.columns(batch.rows, COLUMNS)
        assert set(columns) == COLUMNS - {"id"}
        assert set(batch.codec.columns(batch.rows, frozenset({"key"}))) == {"key"}
        made = [batch.codec.envelope(row) for row in batch.rows]
        assert columns["topic"] == name
        assert columns["delivery_count"] is None
        assert columns["partition"] == [e.partition for e in made]
        assert columns["offset"] == [e.position[0] for e in made]
        assert columns["key"] == [e.key for e in made]
        assert columns["data"] == [e.data for e in made]
        assert list(columns["publish_time_ns"]) == [e.publish_time_ns for e in made]
        assert [[tuple(a)[:2] for a in e.attributes] for e in made] == [list(h or ()) for h in columns["attributes"]]
        assert list(batch.codec.places(batch.rows)) == [(e.partition, e.position) for e in made]
        assert [batch.codec.size(row) for row in batch.rows] == [len(e.data or b"") + len(e.key or b"") for e in made]
        envelopes += made
    by_id = {e.id: e for e in envelopes}
    assert (by_id["0:0"].key, by_id["0:0"].data, by_id["0:0"].attributes) == (b"", b"", [])
    assert (by_id["0:1"].key, by_id["0:1"].data) == (b"\x00\xff\xfe", None)
    assert [(a.name, a.value) for a in by_id["0:1"].attributes] == [("a", b"1"), ("a", None), ("ü", b""), ("a", b"\xff")]
    assert (by_id["0:2"].key, by_id["0:2"].data, by_id["0:2"].publish_time_ns) == (None, b"\xff\x00", 1_000_000)
    assert by_id["0:3"].publish_time_ns == -5_000_000
    assert {e.time_is for e in envelopes} == {"producer"}
    assert by_id["1:0"].partition == 1


def test_server_time(bed):
    name = bed.topic(message_timestamp_type="LogAppendTime")
    bed.put(name, b"x", timestamp=1)
    (row,) = on(bed, lambda opened: look(opened, name)).rows
    assert row.time_is == "server"
    assert time.time_ns() - row.publish_time_ns < 60 * 10**9
