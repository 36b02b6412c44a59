import asyncio
import time

import pytest
from nats_bed import Bed, on

import broker_nb
from broker_nb.backends.driver import Entity, Family, Kind
from broker_nb.backends.jetstream.codec import nanoseconds, parse_headers, rfc3339
from broker_nb.backends.jetstream.names import is_subject
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.testing.servers import OwnServer


@pytest.fixture(scope="module")
def bed(nats_url):
    return Bed(nats_url)


def topic(name):
    return Entity(Kind.TOPIC, name)


def refusal(bed, *names):
    """Kind and text of what each name ends in."""

    async def body(opened):
        found = []
        for name in names:
            with pytest.raises(BrokerError) as caught:
                await opened.driver.facts(topic(name))
            found.append((caught.value.kind, str(caught.value)))
        return found

    return on(bed, body)


# ------------------------------------------------------------------ names
def test_a_name_that_is_a_stream_and_a_subject(bed):
    """Refused with both spellings, unless both mean the same rows."""
    word = f"n{time.time_ns()}"
    bed.stream(word, subjects=[f"{word}.>"])
    other = bed.stream(subjects=[word, f"{word}-more"])
    bed.put(f"{word}.a", b"of the stream")
    bed.put(word, b"of the subject")
    bed.put(f"{word}-more", b"more")
    ((kind, text),) = refusal(bed, word)
    assert kind is ErrorKind.CONFLICT
    assert all(spelling in text for spelling in (f"stream:{word}", f"subject:{word}", other))

    async def body(opened):
        return [[r.data for r in (await opened.look(f"{kind}:{word}"))[0]] for kind in ("stream", "subject")]

    assert on(bed, body) == [[b"of the stream"], [b"of the subject"]]

    async def listed(opened):
        return await opened.driver.summaries([topic(word), topic(f"gone-{word}")])

    line, gone = on(bed, listed)
    assert (line.entity.name, line.messages) == (word, 1)
    assert (gone.entity.name, gone.messages) == (f"gone-{word}", None)
    same = bed.stream()
    bed.put(same, b"x")

    async def both(opened):
        return [[r.data for r in (await opened.look(name))[0]] for name in (same, f"stream:{same}", f"subject:{same}")]

    assert on(bed, both) == [[b"x"]] * 3


def test_subjects_of_several_streams(bed):
    root = f"m{time.time_ns()}"
    names = sorted([bed.stream(subjects=[f"{root}.a"]), bed.stream(subjects=[f"{root}.b"])])
    ((kind, text),) = refusal(bed, f"{root}.*")
    assert (kind, ", ".join(names) in text, f"stream:{names[0]}" in text) == (ErrorKind.CONFLICT, True, True)


HOSTILE = (
    "",
    "a b",
    "a..b",
    ".a",
    "a.",
    "a>",
    "a.>.b",
    "*a",
    "a\r\nPUB x 0\r\n\r\n",
    "a\0b",
    "a\tb",
    "\ud800",
    "x" * 2000,
    "stream:a.b",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_can_be_nothing(bed, name):
    ((kind, _),) = refusal(bed, name)
    assert kind is ErrorKind.INVALID


def test_names_of_what_is_not_there(bed):
    for kind, text in refusal(
        bed, "missing", "missing.too", "stream:missing", "subject:missing", "missing.*.>", "żółć", "$JS.API.INFO"
    ):
        assert kind is ErrorKind.NOT_FOUND
        assert "missing" in text or "żółć" in text or "$JS" in text
    assert not {"missing", "żółć"} & bed.streams()


def test_a_subject_that_moves_to_another_stream(bed):
    """A name is looked up again when the stream that held it has other subjects."""
    root = f"v{time.time_ns()}"
    first = bed.stream(subjects=[f"{root}.a", f"{root}.b"])
    bed.put(f"{root}.a", b"old")

    async def body(opened):
        assert [r.data for r in (await opened.look(f"{root}.a"))[0]] == [b"old"]
        config = (await asyncio.to_thread(bed.api, f"STREAM.INFO.{first}"))["config"]
        await asyncio.to_thread(bed.api, f"STREAM.UPDATE.{first}", **config | {"subjects": [f"{root}.b"]})
        await asyncio.to_thread(bed.stream, subjects=[f"{root}.a"])
        await asyncio.to_thread(bed.put, f"{root}.a", b"new")
        return [r.data for r in (await opened.look(f"{root}.a"))[0]]

    assert on(bed, body) == [b"new"]


def test_a_subject_of_other_letters(bed):
    bed.stream(f"s{time.time_ns()}", subjects=["zażółć.🦆"])
    bed.put("zażółć.🦆", b"x")
    (row,), _ = on(bed, lambda opened: opened.look("zażółć.*"))
    assert (row.topic, row.data) == ("zażółć.🦆", b"x")


@pytest.mark.parametrize("subject", ["a", "a.b", "$x", "a-b_c", "a.*", "*", ">", "a.>", "*.*.>"])
def test_subjects(subject):
    assert is_subject(subject, wildcards=True)
    assert is_subject(subject, wildcards=False) is not any(c in subject for c in "*>")


# ------------------------------------------------------------------ catalogue
def test_what_is_there():
    with OwnServer("nats") as server:
        bed = Bed(server.url)
        for name in ("orders", "invoices"):
            bed.stream(name, subjects=[f"{name}.>"], retention="workqueue" if name == "invoices" else "limits")
        bed.consumer("orders", "two")
        bed.consumer("orders", "one", deliver_subject="push")
        bed.api("CONSUMER.CREATE.orders.gone", stream_name="orders", config={"name": "gone", "ack_policy": "explicit"})
        bed.put("orders.eu", b"1", b"22")

        async def body(opened):
            found = [entity async for entity in opened.driver.entities()]
            some = [entity.name async for entity in opened.driver.entities("inv*")]
            lines = await opened.driver.summaries([*found[:2], topic("orders.eu")])
            return found, some, lines, opened.driver.about

        found, some, (invoices, orders, subject), about = on(bed, body)
        assert found == [
            topic("invoices"),
            topic("orders"),
            Entity(Kind.SUBSCRIPTION, "one", "orders"),
            Entity(Kind.SUBSCRIPTION, "two", "orders"),
        ]
        assert some == ["invoices"]
        assert (orders.messages, orders.partitions, orders.kind, orders.oldest_ns <= orders.newest_ns) == (2, 1, "log", True)
        assert orders.bytes > 3
        assert abs(orders.newest_ns - time.time_ns()) < 60e9
        assert (invoices.messages, invoices.kind, invoices.oldest_ns) == (0, "queue", None)
        assert subject.messages is None
        assert about.startswith("nats-server 2.")


def test_many_streams():
    """More than one page of names, and than are asked about at once."""
    with OwnServer("nats") as server:
        bed = Bed(server.url)

        async def make(connection):
            js = connection.jetstream()
            for i in range(300):
                await js.add_stream(name=f"s{i:03}", storage="memory")

        bed.run(make)

        async def body(opened):
            found = [entity async for entity in opened.driver.entities()]
            return [e.name for e in found], len(await opened.driver.summaries(found))

        assert on(bed, body) == ([f"s{i:03}" for i in range(300)], 300)


def test_facts(bed):
    name = bed.stream(max_msg_size=5000, duplicate_window=7_000_000_000, max_age=3_600_000_000_000)
    facts = on(bed, lambda opened: opened.driver.facts(topic(name)))
    assert (facts.partitions, facts.families, facts.max_message_bytes) == ((0,), frozenset({Family.MESSAGE}), 5000)
    assert (facts.look.possible, facts.look.effects, facts.look.sorted_times) == (True, frozenset(), True)
    assert (facts.dedupe.window_s, facts.dedupe.ordered) == (7.0, False)
    assert (facts.lease.seconds, facts.lease.renewable) == (30.0, True)
    assert (facts.details["stream"], facts.details["subjects"], facts.details["retention"]) == (name, [name], "limits")
    consumer = bed.consumer(name, ack_wait=2_000_000_000, max_deliver=3, max_ack_pending=1)
    entity = Entity(Kind.SUBSCRIPTION, consumer, name)
    facts = on(bed, lambda opened: opened.driver.facts(entity))
    assert (facts.lease.seconds, facts.lease.max_deliveries, facts.ordered, facts.members) == (2.0, 3, True, 0)
    assert (facts.look.possible, facts.details["num_pending"]) == (False, 0)


def test_bounds(bed):
    name = bed.stream()

    async def bounds(opened):
        (found,) = await opened.driver.bounds(topic(name), True)
        return found.low, found.end

    assert on(bed, bounds) == ((1,), (1,))
    bed.put(name, b"1", b"2", b"3")
    assert on(bed, bounds) == ((1,), (4,))
    bed.delete(name, 1, 3)
    assert on(bed, bounds) == ((2,), (4,))
    bed.api(f"STREAM.PURGE.{name}")
    assert on(bed, bounds) == ((4,), (4,))


def test_closing(bed):
    async def body(opened):
        await asyncio.gather(opened.driver.close(), opened.driver.close())
        with pytest.raises(BrokerError) as caught:
            await opened.driver.facts(topic("x"))
        return caught.value.kind

    assert on(bed, body) is ErrorKind.CLOSED


def test_an_answer_that_cannot_be_understood(bed):
    """Ends what was asked, and not the connection."""
    name = bed.stream()

    async def body(opened):
        wire = opened.driver._wire
        found = asyncio.get_running_loop().create_future()
        inbox = wire.inbox(lambda answer: int(answer.data), found.set_result, "x")
        await asyncio.to_thread(bed.run, lambda connection: connection.publish(inbox.subject, b"not a number"))
        error = await found
        assert (error.kind, "not a number" in str(error)) == (ErrorKind.UNKNOWN, True)
        await wire.forget(inbox)
        return (await opened.driver.facts(topic(name))).partitions

    assert on(bed, body) == (0,)


def test_a_server_that_ends_the_connection_for_good(bed):
    """The client does not come back from some errors: it is told, and nothing hangs."""

    async def body(opened):
        await opened.driver._wire._send_command(b"NONSENSE\r\n")
        await opened.driver._wire._flush_pending()
        await opened.until("failed")
        with pytest.raises(BrokerError, match="connect again") as caught:
            await opened.driver.facts(topic("x"))
        return caught.value.kind, opened.events[-1].error.kind

    assert on(bed, body) == (ErrorKind.CLOSED, ErrorKind.CLOSED)


# ------------------------------------------------------------------ above the driver
def test_the_newest_rows_of_a_sparse_subject(nats_url):
    """-N looks further back until it has N, or all that there are."""
    bed, root = Bed(nats_url), f"z{time.time_ns()}"
    bed.stream(subjects=[f"{root}.>"])
    for i in range(5):
        bed.put(f"{root}.rare", b"%d" % i)
        bed.put(f"{root}.often", *[b"x"] * 100)

    with broker_nb.connect(nats_url) as connection:
        for asked, expected in (("-3", [b"2", b"3", b"4"]), ("+2", [b"0", b"1"]), ("-100", [b"%d" % i for i in range(5)])):
            frame = connection.sample(f"{root}.rare", asked, decode="none")
            assert (sorted(frame["data"]), frame.attrs["complete"]) == (expected, True)
            assert set(frame["topic"]) == {f"{root}.rare"}


def test_a_session(nats_url):
    """Publish, look, take, settle, as a person does; the subject is in the frame beside the key."""
    bed, root = Bed(nats_url), f"p{time.time_ns()}"
    stream = bed.stream(subjects=[f"{root}.>"])
    with broker_nb.connect(nats_url) as connection:
        sent = [broker_nb.OutboundMessage(b'{"n": %d}' % i, b"k", [("a", "1"), ("a", "2")]) for i in range(3)]
        assert connection.publish(sent, f"{root}.eu").ok
        frame = connection.sample(stream, "..end")
        assert list(frame["value_n"]) == [0, 1, 2]
        assert set(frame["topic"]) == {f"{root}.eu"}
        assert set(frame["key_text"]) == {"k"}
        assert connection.publish(frame, f"{root}.again").ok
        with pytest.raises(BrokerError, match="create=True"):
            connection.consume(stream, "debug", n=6)
        held = connection.consume(stream, "debug", n=6, create=True)
        assert list(held["delivery_count"]) == [1] * 6
        assert connection.ack(held[held["topic"] == f"{root}.eu"]).ok
        assert connection.nack(held[held["topic"] == f"{root}.again"], delay="100ms").ok
        again = connection.consume(stream, "debug", n=3)
        assert (set(again["topic"]), set(again["delivery_count"])) == ({f"{root}.again"}, {2})
        assert connection.reject(again).ok
    assert bed.consumer_info(stream, "debug")["ack_floor"]["stream_seq"] == 6


# ------------------------------------------------------------------ text
def test_header_lines():
    """One space after the colon is the format's; what has no colon is no header; a status of the first line is none either."""
    block = b"NATS/1.0 404 No Messages\r\nA: 1\r\nB:2\r\nA:  3 \r\nbroken\r\n: empty\r\nC: a:b\r\n\r\n"
    assert parse_headers(block) == [("A", b"1"), ("B", b"2"), ("A", b" 3 "), ("", b"empty"), ("C", b"a:b")]
    assert parse_headers(b"") == []
    assert parse_headers(b"NATS/1.0\r\n\xff: \xff\r\n\r\n") == [("\\xff", b"\xff")]


def test_times():
    for text, ns in (
        ("1970-01-01T00:00:00Z", 0),
        ("2026-11-25T10:00:00.5Z", 1795600800500000000),
        ("2026-11-25T10:00:00.000000001Z", 1795600800000000001),
        ("9999-12-31T23:59:59.999999999Z", 253402300799999999999),
    ):
        assert nanoseconds(text) == ns
        assert nanoseconds(rfc3339(ns)) == ns
