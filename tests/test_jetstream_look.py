import asyncio
import json
import time
import uuid

import pytest
from nats_bed import ALL, Bed, on, read, until_it_fails

from broker_nb.backends.driver import COLUMNS, Entity, Kind, Piece, Stop
from broker_nb.backends.jetstream.client import Answer
from broker_nb.backends.jetstream.look import _Direct, _Single
from broker_nb.backends.jetstream.names import Place
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.testing.servers import OwnServer
from broker_nb.testing.watch import disagreements

HOSTILE = (
    b"Status: 404\r\nDescription: not really\r\nA:  two spaces \r\na: other case\r\nA: again\r\nempty: \r\nnospace:x\r\n"
    b"Nats-Stream: forged\r\nNats-Subject: forged\r\nNats-Sequence: 9\r\nNats-Time-Stamp: 1970-01-01T00:00:00Z"
)
EXPECTED = [
    ("Status", b"404"),
    ("Description", b"not really"),
    ("A", b" two spaces "),
    ("a", b"other case"),
    ("A", b"again"),
    ("empty", b""),
    ("nospace", b"x"),
    ("Nats-Stream", b"forged"),
    ("Nats-Subject", b"forged"),
    ("Nats-Sequence", b"9"),
    ("Nats-Time-Stamp", b"1970-01-01T00:00:00Z"),
]
NOTHING = Answer(b"", b"", b'{"error": {"code": 404, "err_code": 10037, "description": "no message found"}}', None)
WAYS = pytest.mark.parametrize("allow_direct", [True, False], ids=["batched", "single"])


@pytest.fixture(scope="module")
def bed(nats_url):
    return Bed(nats_url)


def row_answer(sequence):
    message = {"subject": "s", "seq": sequence, "time": "2026-11-25T10:00:00Z"}
    return Answer(b"", b"", json.dumps({"message": message}).encode(), None)


async def browser(opened, topic, piece):
    return await opened.driver.browse(Entity(Kind.TOPIC, topic), [piece], COLUMNS, True, frozenset())


@WAYS
def test_hostile_headers_and_empty_bodies_are_shown_as_they_are(bed, allow_direct):
    name = bed.stream(allow_direct=allow_direct)
    bed.put(name, b"", b"x" * 10, raw=HOSTILE)
    bed.put(name, b"")
    bed.put(name, b"keyed", raw=b"x: 1\r\nKey: k\r\nKey: second")
    rows, _ = on(bed, lambda opened: opened.look(name))
    assert [(r.data, r.position, r.topic, r.delivery_count) for r in rows] == [
        (b"", (1,), name, None),
        (b"x" * 10, (2,), name, None),
        (b"", (3,), name, None),
        (b"keyed", (4,), name, None),
    ]
    assert [[(a.name, a.value) for a in r.attributes] for r in rows] == [
        EXPECTED,
        EXPECTED,
        [],
        [("x", b"1"), ("Key", b"second")],
    ]
    assert [r.key for r in rows] == [None, None, None, b"k"]
    assert all(abs(r.publish_time_ns - time.time_ns()) < 60e9 for r in rows)


@WAYS
def test_times_are_exact(bed, allow_direct):
    name = bed.stream(allow_direct=allow_direct)
    bed.put(name, *[b"%d" % i for i in range(50)])
    rows, _ = on(bed, lambda opened: opened.look(name))
    stored = [bed.api(f"STREAM.MSG.GET.{name}", seq=s)["message"]["time"] for s in (1, 50)]
    nanoseconds = [int(t.rstrip("Z").partition(".")[2].ljust(9, "0")) for t in stored]
    assert [rows[0].publish_time_ns % 10**9, rows[-1].publish_time_ns % 10**9] == nanoseconds


def test_the_subject_as_key(bed):
    name = bed.stream(subjects=[f"x{uuid.uuid4().hex}.>"])
    subject = bed.api(f"STREAM.INFO.{name}")["config"]["subjects"][0].replace(">", "one")
    bed.put(subject, b"1", raw=b"Key: k")
    (row,), _ = on(bed, lambda opened: opened.look(name), key_header="")
    assert (row.topic, row.key, [a.name for a in row.attributes]) == (subject, subject.encode(), ["Key"])
    (row,), _ = on(bed, lambda opened: opened.look(name), key_header="other")
    assert (row.topic, row.key) == (subject, None)


@WAYS
def test_several_subjects_in_one_stream(bed, allow_direct):
    root = f"r{uuid.uuid4().hex}"
    name = bed.stream(subjects=[f"{root}.>"], allow_direct=allow_direct)
    for i in range(30):
        bed.put(f"{root}.{'eu' if i % 10 == 0 else 'us'}.{i % 2}", b"%d" % i)

    async def body(opened):
        return [
            [r.data for r in (await opened.look(topic))[0]]
            for topic in (name, f"{root}.eu.*", f"subject:{root}.*.1", f"{root}.eu.0", f"{root}.nothing")
        ]

    everything, eu, odd, exact, nothing = on(bed, body)
    assert everything == [b"%d" % i for i in range(30)]
    assert eu == exact == [b"0", b"10", b"20"]
    assert odd == [b"%d" % i for i in range(1, 30, 2)]
    assert nothing == []


@WAYS
def test_gaps(bed, allow_direct):
    """Rows deleted at the head, in the middle and at the end; ends inside gaps; page after page."""
    name = bed.stream(allow_direct=allow_direct)
    bed.put(name, *[b"%d" % i for i in range(1, 301)])
    gone = {*range(1, 5), *range(50, 251), 299, 300}
    bed.delete(name, *gone)
    left = [i for i in range(1, 301) if i not in gone]

    async def body(opened):
        for start, end in ((5, 301), (5, 100), (60, 70), (49, 51), (250, 260), (299, 301), (251, 299)):
            for rows in (ALL, 7):
                found, steps = await opened.look(name, start, end, rows=rows)
                assert [r.position[0] for r in found] == [i for i in left if start <= i < end]
                assert steps[-1].reached == {0: (end,)}
                assert not any(step.stopped for step in steps)

    on(bed, body)


@WAYS
def test_answers_in_any_order(bed, allow_direct):
    """The server answers questions for single rows on many threads."""
    name = bed.stream(allow_direct=allow_direct)
    bed.put(name, *[b"%d" % i for i in range(5000)])

    async def body(opened):
        for _ in range(3):
            found, _ = await opened.look(name)
            assert [r.position[0] for r in found] == list(range(1, 5001))

    on(bed, body)


@WAYS
def test_columns_and_envelopes(bed, allow_direct):
    name = bed.stream(allow_direct=allow_direct)
    bed.put(name, b"", b"x", raw=HOSTILE + b"\r\nKey: k")
    bed.put(name, b"\xff")

    async def body(opened):
        step = await (await browser(opened, name, Piece(0, (1,), (4,)))).read(10, ALL, 0.2)
        assert len(step.batch.rows) == 3
        assert disagreements(step.batch.codec, step.batch.rows) == []

    on(bed, body)


@WAYS
@pytest.mark.parametrize("retention", ["workqueue", "interest"])
def test_a_queue_is_looked_at_without_effect(bed, allow_direct, retention):
    """Also one that has its only consumer, and rows in somebody's hands."""
    name = bed.stream(allow_direct=allow_direct, retention=retention, max_consumers=1)
    consumer = bed.consumer(name)
    bed.put(name, *[b"%d" % i for i in range(10)])

    async def body(opened):
        source = await opened.source(name, consumer)
        assert len((await source.pull(3, ALL, 0.2)).rows) == 3
        before = await asyncio.to_thread(bed.snapshot, name)
        found, _ = await opened.look(name)
        assert len(found) == 10
        assert await asyncio.to_thread(bed.snapshot, name) == before

    on(bed, body)


def test_rows_that_go_while_a_queue_is_looked_at(bed):
    """What is left is shown, and the look says that it is not all."""
    name = bed.stream(retention="workqueue")
    bed.put(name, *[b"%d" % i for i in range(20)])

    async def body(opened):
        look = await browser(opened, name, Piece(0, (1,), (21,)))
        first = await look.read(5, ALL, 0.2)
        await asyncio.to_thread(bed.api, f"STREAM.PURGE.{name}", seq=11)
        rest, steps = await read(look, Piece(0, (1,), (21,)))
        late = await browser(opened, name, Piece(0, (1,), (21,)))
        return len(first.batch.rows), [r.position[0] for r in rest], steps[-1], await read(late, Piece(0, (1,), (21,)))

    first, rest, last, (late, late_steps) = on(bed, body)
    assert (first, rest) == (5, list(range(11, 21)))
    assert (last.stopped, last.reached) == ({0: Stop.AGED_OUT}, {})
    assert [r.position[0] for r in late] == list(range(11, 21))
    assert late_steps[-1].stopped == {0: Stop.AGED_OUT}


@WAYS
def test_rows_of_a_log_that_go_while_it_is_read(bed, allow_direct):
    name = bed.stream(allow_direct=allow_direct)
    bed.put(name, *[b"%d" % i for i in range(20)])

    async def body(opened):
        look = await browser(opened, name, Piece(0, (1,), (21,)))
        first = await look.read(5, ALL, 0.2)
        await asyncio.to_thread(bed.api, f"STREAM.PURGE.{name}")
        rest, steps = await read(look, Piece(0, (1,), (21,)))
        return len(first.batch.rows), rest, steps[-1].stopped

    assert on(bed, body) == (5, [], {0: Stop.AGED_OUT})


def test_the_oldest_rows_of_a_full_log(bed):
    """They go while one looks: what is left from the beginning on is shown, and the look says that it is not all."""
    name = bed.stream(max_msgs=10)
    bed.put(name, *[b"%d" % i for i in range(1, 11)])

    async def body(opened):
        (bounds,) = await opened.driver.bounds(Entity(Kind.TOPIC, name), True)
        await asyncio.to_thread(bed.put, name, b"11", b"12")
        rows, steps = await read(await browser(opened, name, Piece(0, bounds.low, bounds.end)), Piece(0, bounds.low, bounds.end))
        later = Piece(0, (2,), (11,))
        gone = await read(await browser(opened, name, later), later)
        return [r.position[0] for r in rows], steps[-1], gone

    rows, last, (none, steps) = on(bed, body)
    assert rows == list(range(3, 11))
    assert (last.stopped, last.reached) == ({0: Stop.AGED_OUT}, {})
    assert (none, steps[-1].stopped) == ([], {0: Stop.AGED_OUT})


@pytest.mark.parametrize("fixed", [True, False])
def test_questions_for_single_rows_while_rows_are_written(fixed):
    """The third of four questions found nothing, then rows 3 and 4 were written, then the fourth was answered."""
    way = _Single(Place("s", "s", ""), fixed)
    way._width = 4
    assert [json.loads(r)["seq"] for r in way.requests(1, 10, ALL)] == [1, 2, 3, 4]
    found = [row.sequence for answer in (row_answer(4), row_answer(2), NOTHING, row_answer(1)) for row in way.rows(answer)]
    assert (found, way.over, way.again) == (([1, 2, 4], True, False) if fixed else ([1, 2], True, True))
    if not fixed:
        assert [json.loads(r)["seq"] for r in way.requests(3, 10, ALL)] == [3]
        assert ([r.sequence for r in way.rows(row_answer(3))], way.again) == ([3], False)


@WAYS
def test_following_while_rows_are_written(bed, allow_direct):
    """None is missed between two questions that are answered at the same time as rows come."""
    name = bed.stream(allow_direct=allow_direct)

    async def body(opened):
        look = await browser(opened, name, Piece(0, (1,), None))
        writing = asyncio.gather(*(asyncio.to_thread(bed.put, name, *[b"x"] * 500) for _ in range(4)))
        seen, until = [], time.monotonic() + 20
        while len(seen) < 2000:
            assert time.monotonic() < until, f"{len(seen)} rows"
            step = await look.read(1000, ALL, 0.2)
            seen += [r.sequence for r in step.batch.rows] if step.batch else []
        await writing
        await look.close()
        return seen

    assert on(bed, body) == list(range(1, 2001))


@WAYS
def test_large_rows(bed, allow_direct):
    """Not more at once than a client can take: the server would drop it."""
    name = bed.stream(allow_direct=allow_direct, storage="file")
    bed.put(name, *[b"%d" % i for i in range(100)], *[bytes(900_000) for _ in range(60)])

    async def body(opened):
        found, steps = await opened.look(name, seconds=25)
        assert max(sum(len(r.data) for r in s.batch.rows) for s in steps if s.batch) < 64e6
        assert opened.events == []
        return [r.position[0] for r in found]

    assert on(bed, body) == list(range(1, 161))


@WAYS
def test_following(bed, allow_direct):
    name = bed.stream(allow_direct=allow_direct)
    bed.put(name, b"before")

    async def body(opened):
        look = await browser(opened, name, Piece(0, (2,), None))
        assert (await look.read(10, ALL, 0.1)).batch is None
        await asyncio.to_thread(bed.put, name, b"1", b"2")
        seen, until = [], time.monotonic() + 10
        while len(seen) < 2:
            assert time.monotonic() < until
            step = await look.read(10, ALL, 0.2)
            seen += [r.data for r in step.batch.rows] if step.batch else []
        assert step.reached == {0: (4,)}
        closing = asyncio.ensure_future(look.read(10, ALL, 0.2))
        await asyncio.sleep(0.01)
        await look.close()
        assert (await closing).batch is None
        return seen

    assert on(bed, body) == [b"1", b"2"]


def test_a_replica_that_has_not_got_it_yet(bed, monkeypatch):
    """Any server that has the stream may answer, also one that is behind: the leader is asked before a range counts as read."""
    name = bed.stream()
    bed.put(name, *[b"%d" % i for i in range(10)])
    rows, answered = _Direct.rows, []

    def behind(way, answer):
        answered.append(answer)
        found = rows(way, answer)
        return [row for row in found if row.sequence <= 4]

    monkeypatch.setattr(_Direct, "rows", behind)
    found, steps = on(bed, lambda opened: opened.look(name, rows=5))
    assert answered
    assert [r.position[0] for r in found] == list(range(1, 11))
    assert (steps[-1].reached, steps[-1].stopped) == ({0: (11,)}, {})


def test_a_stream_that_is_deleted_or_changed_in_the_middle(bed):
    name, other = bed.stream(), bed.stream()
    for stream in (name, other):
        bed.put(stream, *[b"%d" % i for i in range(20)])

    async def body(opened):
        piece = Piece(0, (1,), (21,))
        look, changed = await browser(opened, name, piece), await browser(opened, other, piece)
        assert len((await look.read(5, ALL, 0.2)).batch.rows) == len((await changed.read(5, ALL, 0.2)).batch.rows) == 5
        config = (await asyncio.to_thread(bed.api, f"STREAM.INFO.{other}"))["config"]
        await asyncio.to_thread(bed.api, f"STREAM.UPDATE.{other}", **config | {"allow_direct": False})
        rows, steps = await read(changed, piece)
        assert (len(rows), steps[-1].reached) == (15, {0: (21,)})
        await asyncio.to_thread(bed.api, f"STREAM.DELETE.{name}")
        with pytest.raises(BrokerError, match=name) as caught:
            await read(look, piece)
        assert caught.value.kind is ErrorKind.NOT_FOUND
        with pytest.raises(BrokerError, match=name) as caught:
            await opened.look(name)
        assert caught.value.kind is ErrorKind.NOT_FOUND

    on(bed, body)
    assert name not in bed.streams()


def test_bytes_bound_a_read(bed):
    name = bed.stream()
    bed.put(name, *[bytes(50_000) for _ in range(20)])

    async def body(opened):
        step = await (await browser(opened, name, Piece(0, (1,), (21,)))).read(1000, 200_000, 0.2)
        assert len(step.batch.rows) == 4
        assert len((await opened.look(name, bytes_=1))[0]) == 20  # one at a time

    on(bed, body)


@WAYS
def test_first_row_at_a_time(bed, allow_direct):
    name = bed.stream(allow_direct=allow_direct)
    for i in range(6):
        bed.put(name, b"%d" % i)
        time.sleep(0.002)
    bed.delete(name, 3)

    async def body(opened):
        rows, _ = await opened.look(name)
        asked = [0, *(r.publish_time_ns + d for r in rows for d in (-1, 0, 1)), 2**63, 10**21]
        found = [(await opened.driver.locate(Entity(Kind.TOPIC, name), {0: t}))[0] for t in asked]
        expected = [next((r.position for r in rows if r.publish_time_ns >= t), None) for t in asked]
        assert found == expected
        empty = await opened.driver.locate(Entity(Kind.TOPIC, f"subject:{name}"), {0: rows[-1].publish_time_ns})
        assert empty == {0: rows[-1].position}

    on(bed, body)


@WAYS
def test_a_server_that_is_killed_under_a_look(allow_direct):
    """An error that may be tried again, at once; when the server is back the look goes on where it was, and no row is lost or twice."""
    with OwnServer("nats") as server:
        bed = Bed(server.url)
        name = bed.stream(storage="file", allow_direct=allow_direct)
        bed.put(name, *[b"%d" % i for i in range(300)])

        async def body(opened):
            look = await browser(opened, name, Piece(0, (1,), (301,)))
            rows = list((await look.read(20, ALL, 0.2)).batch.rows)
            server.kill()
            began = time.monotonic()

            async def more():
                rows.extend((await look.read(20, ALL, 0.2)).batch.rows)

            error = await until_it_fails(more)
            assert (error.kind, error.retryable) == (ErrorKind.UNREACHABLE, True)
            assert server.address in str(error)
            assert time.monotonic() - began < 5
            await asyncio.to_thread(server.start)
            await opened.until("reconnected")
            rest, steps = await read(look, Piece(0, (1,), (301,)))
            assert [r.sequence for r in rows] + [r.position[0] for r in rest] == list(range(1, 301))
            assert steps[-1].reached == {0: (301,)}
            assert [e.kind for e in opened.events] == ["reconnecting", "reconnected"]

        on(bed, body, reconnect_time_wait=0.05)
