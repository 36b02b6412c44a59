"""Publishing to Pub/Sub: what can never be sent, a result per message, order per key, requests that are refused for one row."""

import asyncio

import pytest
from grpc import StatusCode
from pubsub_bed import Bed, driver, of_topic, on, run
from pubsub_standin import PROJECT, StandIn

from broker_nb.backends.driver import DedupeId, Outbound, Sent
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attribute

ACCEPTED, REFUSED, UNKNOWN = Sent.ACCEPTED, Sent.REFUSED, Sent.UNKNOWN


@pytest.fixture(scope="module")
def bed(pubsub_url):
    return Bed(pubsub_url.split("/")[2])


@pytest.fixture
def standin():
    with StandIn() as server:
        server.topic("orders")
        server.log = server.logs[f"projects/{PROJECT}/topics/orders"]
        yield server


def send(url, topic, *batches):
    """The results of a send per batch, by one sender."""

    async def body(opened):
        sender = await opened.sender(of_topic(topic), {})
        return [await sender.send(rows) for rows in batches]

    return on(url, body)


def states(results):
    return [result.state for result in results]


def refusing(code, part):
    """A guard that refuses requests with a body that has `part` in it."""

    def guard(method, request):
        return (code, "schema") if method == "Publish" and any(part in m.data for m in request.messages) else None

    return guard


def attribute(value, type_="str", name="a"):
    return (Attribute(name, value, type_),)


# ------------------------------------------------------------------ what can never be sent
@pytest.mark.parametrize(
    ("row", "says"),
    [
        (Outbound(None), "no null body"),
        (Outbound("text"), "data must be bytes, not str"),
        (Outbound(b"x", "key"), "key must be bytes, not str"),
        (Outbound(b""), "no empty message"),
        (Outbound(b"", b"key"), "no empty message"),
        (Outbound(b"x", b""), "an empty key is no key"),
        (Outbound(b"x", b"\xff"), "is not UTF-8"),
        (Outbound(b"x", b"k" * 1025), "1025 bytes is too long"),
        (Outbound(b"x", None, attribute(None)), "attribute 'a' is null"),
        (Outbound(b"x", None, attribute(b"1", "int")), "attribute 'a' is of type int"),
        (Outbound(b"x", None, attribute(b"\xff", "bytes")), "attribute 'a' is not UTF-8"),
        (Outbound(b"x", None, attribute(b"1", name="\udcff")), "is not UTF-8"),
        (Outbound(b"x", None, attribute(b"1", name="n" * 257)), "is too long"),
        (Outbound(b"x", None, attribute(b"v" * 1025)), "is too long"),
        (Outbound(b"x", None, attribute(b"1") * 2), "comes twice"),
        (Outbound(b"x", None, tuple(Attribute(str(i), b"1") for i in range(101))), "101 attributes are more than the 100"),
        (Outbound(bytes(10_000_001)), "too large"),
        (Outbound(b"x", partition=1), "has no partition 1"),
        (Outbound(b"x", time_ns=1), "sets the time itself"),
        (Outbound(b"x", native={"delay": 1}), "no option 'delay'"),
    ],
)
def test_checked_before_anything_is_sent(bed, row, says):
    topic = bed.topic()

    async def body(opened):
        sender = await opened.sender(of_topic(topic), {})
        assert sender.check(Outbound(b"fine", b"key", attribute(b"bytes that are text", "bytes"))) is None
        told = sender.check(row)
        (result,) = await sender.send([row])  # also unasked
        assert (result.state, result.error.kind) == (REFUSED, ErrorKind.INVALID)
        assert topic in str(result.error)
        return told

    assert says in on(bed.url, body)


def test_options_and_a_missing_topic(bed):
    topic = bed.topic()

    async def body(opened):
        for name, native, kind in ((topic, {"linger": 1}, ErrorKind.INVALID), ("missing", {}, ErrorKind.NOT_FOUND)):
            with pytest.raises(BrokerError) as caught:
                await opened.sender(of_topic(name), native)
            assert caught.value.kind is kind

    before = bed.snapshot()
    on(bed.url, body)
    assert bed.snapshot() == before


def test_a_topic_that_is_deleted_meanwhile(bed):
    topic = bed.topic()

    async def go():
        async with driver(bed.url) as opened:
            sender = await opened.sender(of_topic(topic), {})
            bed.publisher.delete_topic(topic=bed.topic_path(topic))
            return await sender.send([Outbound(b"1"), Outbound(b"2", b"k")])

    results = run(go())
    assert states(results) == [REFUSED] * 2
    assert {r.error.kind for r in results} == {ErrorKind.NOT_FOUND}


# ------------------------------------------------------------------ results and order
def test_every_row_has_its_id(bed):
    topic = bed.topic()
    name = bed.subscription(topic)
    rows = [Outbound(b"%05d" % i, None if i % 3 else b"key-%d" % (i % 7), attribute(b"%d" % i)) for i in range(3300)]
    (results,) = send(bed.url, topic, rows)
    assert states(results) == [ACCEPTED] * 3300
    found = {}
    while len(found) < 3300:
        messages = bed.pull(name, 1000)
        found |= {m.message.message_id: (m.message.data, m.message.ordering_key, dict(m.message.attributes)) for m in messages}
    for row, result in zip(rows, results, strict=True):
        assert found[result.id] == (row.data, (row.key or b"").decode(), {"a": row.attributes[0].value.decode()})


def test_a_key_is_sent_in_order_one_request_after_the_other(standin):
    """Also in requests of their own: the service refuses one with several keys."""
    rows = [Outbound(b"%05d" % i, b"key-%d" % (i % 3)) for i in range(4500)]
    (results,) = send(standin.url, "orders", rows)
    assert states(results) == [ACCEPTED] * 4500
    for key in range(3):
        assert [m.data for m in standin.log if m.ordering_key == f"key-{key}"] == [b"%05d" % i for i in range(key, 4500, 3)]
    requests = [request for name, request in standin.asked if name == "Publish"]
    assert all(len({m.ordering_key for m in r.messages}) == 1 and len(r.messages) <= 1000 for r in requests)
    assert len(requests) == 6


def test_requests_are_bounded_in_bytes(standin):
    rows = [Outbound(bytes(300_000)) for _ in range(7)]
    (results,) = send(standin.url, "orders", rows)
    assert states(results) == [ACCEPTED] * 7
    assert all(len(r.messages) <= 3 for name, r in standin.asked if name == "Publish")


def test_a_large_message_goes_alone(standin):
    (results,) = send(standin.url, "orders", [Outbound(b"1"), Outbound(bytes(3_000_000)), Outbound(b"2")])
    assert states(results) == [ACCEPTED] * 3


def test_a_request_that_is_refused_for_one_row(standin):
    """As one that a schema does not take: that row is refused, later ones of its key are held back, the others are sent, once."""
    standin.guard = refusing(StatusCode.INVALID_ARGUMENT, b"bad")
    rows = [Outbound(b"bad" if i in (57, 630) else b"%03d" % i, b"k" if i >= 600 else None) for i in range(700)]
    (results,) = send(standin.url, "orders", rows)
    assert [i for i, r in enumerate(results) if r.state is not ACCEPTED] == [57, *range(630, 700)]
    assert {r.state for r in results} == {ACCEPTED, REFUSED}
    assert {r.error.kind for r in results[631:]} == {ErrorKind.CONFLICT}
    assert sorted(m.data for m in standin.log) == sorted(row.data for i, row in enumerate(rows) if results[i].state is ACCEPTED)


def test_one_that_is_too_large_for_the_server(bed):
    """It is refused, later ones of its key are held back, the others of the batch are sent."""
    topic = bed.topic()
    name = bed.subscription(topic)
    rows = [Outbound(b"1", b"a"), Outbound(bytes(5 << 20), b"a"), Outbound(b"2", b"a"), Outbound(b"3", b"b"), Outbound(b"4")]
    (results,) = send(bed.url, topic, rows)
    assert states(results) == [ACCEPTED, REFUSED, REFUSED, ACCEPTED, ACCEPTED]
    assert [r.error.kind for r in results[1:3]] == [ErrorKind.TOO_LARGE, ErrorKind.CONFLICT]
    assert sorted(m.message.data for m in bed.pull(name)) == [b"1", b"3", b"4"]


def test_many_bad_rows_are_not_tried_one_by_one_for_ever(standin):
    """A topic that takes none of them: after a hundred the send ends, and says why."""
    standin.guard = refusing(StatusCode.INVALID_ARGUMENT, b"")
    (results,) = send(standin.url, "orders", [Outbound(b"%d" % i) for i in range(1500)])
    assert states(results) == [REFUSED] * 1500
    assert len(standin.names("Publish")) < 500
    assert sum("nothing more was tried" in str(r.error) for r in results) > 1000


# ------------------------------------------------------------------ failures
def test_a_key_that_failed_goes_on_with_the_next_send(standin):
    """Nothing is left paused, as it is with the client's own publisher until `resume_publish`."""
    standin.guard = refusing(StatusCode.INVALID_ARGUMENT, b"1")
    one, two = send(
        standin.url, "orders", [Outbound(b"1", b"k"), Outbound(b"2", b"k")], [Outbound(b"2", b"k"), Outbound(b"3", b"k")]
    )
    assert states(one) == [REFUSED, REFUSED]
    assert "an earlier row of key b'k' is not stored" in str(one[1].error)
    assert states(two) == [ACCEPTED, ACCEPTED]
    assert [m.data for m in standin.log] == [b"2", b"3"]


@pytest.mark.parametrize(
    ("code", "state", "kind"),
    [
        (StatusCode.UNAVAILABLE, UNKNOWN, ErrorKind.TRANSIENT),
        (StatusCode.DEADLINE_EXCEEDED, UNKNOWN, ErrorKind.TIMEOUT),
        (StatusCode.INTERNAL, UNKNOWN, ErrorKind.TRANSIENT),
        (StatusCode.UNKNOWN, UNKNOWN, ErrorKind.UNKNOWN),
        (StatusCode.PERMISSION_DENIED, REFUSED, ErrorKind.PERMISSION),
        (StatusCode.UNAUTHENTICATED, REFUSED, ErrorKind.AUTH),
        (StatusCode.NOT_FOUND, REFUSED, ErrorKind.NOT_FOUND),
        (StatusCode.FAILED_PRECONDITION, REFUSED, ErrorKind.CONFLICT),
        (StatusCode.RESOURCE_EXHAUSTED, REFUSED, ErrorKind.THROTTLED),
    ],
)
def test_what_is_not_about_a_row_ends_the_send(standin, code, state, kind):
    """Nothing is sent twice, and rows that were not tried are refused."""
    standin.failures["Publish"] = [None, (code, "no")]
    (results,) = send(standin.url, "orders", [Outbound(b"%d" % i, b"k") for i in range(3000)])
    assert states(results) == [ACCEPTED] * 1000 + [state] * 1000 + [REFUSED] * 1000
    assert {r.error.kind for r in results[1000:]} == {kind}
    assert all("orders" in str(r.error) for r in results[1000:])
    assert standin.names("Publish") == ["Publish"] * 2


def test_nobody_listens_any_more():
    with StandIn() as server:
        server.topic("orders")

        async def body(opened):
            sender = await opened.sender(of_topic("orders"), {})
            await asyncio.to_thread(server.__exit__)
            return await sender.send([Outbound(b"1"), Outbound(b"2", b"k", dedupe=DedupeId("run", 1))])

        results = on(server.url, body)
    assert states(results) == [REFUSED] * 2, "what was never sent is not stored"
    assert {r.error.kind for r in results} == {ErrorKind.UNREACHABLE}


def test_closed_in_the_middle(standin):
    """What was under way is unknown, the rest is refused, and nobody is cancelled."""

    async def go():
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def slow(asked, context):
            loop.call_soon_threadsafe(begun.set)
            standin.changed.wait(0.5)
            context.abort(StatusCode.INTERNAL, "too late")

        standin.publish = slow
        async with driver(standin.url) as opened:
            sender = await opened.sender(of_topic("orders"), {})
            sending = asyncio.ensure_future(sender.send([Outbound(b"%d" % i, b"k") for i in range(1500)]))
            await begun.wait()
        return await sending

    results = run(go())
    assert states(results) == [UNKNOWN] * 1000 + [REFUSED] * 500
    assert {r.error.kind for r in results} == {ErrorKind.CLOSED}


def test_nothing_to_send(bed):
    assert send(bed.url, bed.topic(), []) == [[]]
