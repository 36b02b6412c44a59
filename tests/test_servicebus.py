"""The Service Bus driver on the stand-in (or what BROKER_NB_TEST_SERVICEBUS names); `test_conformance_servicebus` has the rest."""

import asyncio
import contextlib
import gc
import json
import math
import sys
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from azure.core.credentials import AccessToken, AzureNamedKeyCredential, AzureSasCredential
from azure.servicebus import ServiceBusMessage, exceptions
from azure.servicebus.amqp import AmqpAnnotatedMessage
from servicebus_bed import Bed
from test_servicebus_standin import signature

import broker_nb
from broker_nb import connection
from broker_nb.backends import has_secret
from broker_nb.backends.driver import (
    COLUMNS,
    DedupeId,
    Effect,
    Entity,
    Family,
    Kind,
    Outbound,
    Proof,
    Sent,
    Settled,
    Settlement,
    TakeOptions,
    Verdict,
)
from broker_nb.backends.servicebus.client import Place, Settings, place
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attribute, OutboundMessage, make_attribute
from broker_nb.portable.client import Client
from broker_nb.portable.host import ConnectionHost
from broker_nb.portable.loop import shared_loop
from broker_nb.portable.ranges import parse_range
from broker_nb.testing import servers
from broker_nb.testing.bench import refusal, until
from broker_nb.testing.servers.process import free_port

pytestmark = pytest.mark.xdist_group("servicebus")


@pytest.fixture(scope="module")
def bed(servicebus_url):
    return Bed(servicebus_url)


@pytest.fixture(scope="module")
def client(bed):
    opened = run(Client.open("servicebus", bed.profile))
    yield opened
    run(opened.close())


def run(coroutine, seconds=30):
    return shared_loop().run(asyncio.wait_for(coroutine, seconds))


async def source(client, name, subscription="queue", **options):
    return await client.driver.subscribe(Entity(Kind.SUBSCRIPTION, subscription, name), TakeOptions(Family.MESSAGE, **options))


async def pulled(taking, count, seconds=5.0):
    """Rows and tokens."""
    rows, tokens, end = [], [], time.monotonic() + seconds
    while len(rows) < count and time.monotonic() < end:
        if (batch := await taking.pull(count - len(rows), 1 << 20, 0.2)) is not None:
            rows += map(batch.codec.envelope, batch.rows)
            tokens += batch.tokens
    return rows, tokens


async def look(client, name, asked="..end", **options):
    opened = await client.look(name, parse_range(asked), want=COLUMNS, **options)
    rows = [row async for batch in opened.batches(20) for row in map(batch.codec.envelope, batch.rows)]
    return rows, opened.summary


async def send(client, name, *rows):
    sender = await client.driver.sender(Entity(Kind.TOPIC, name), {})
    return [*await sender.send(rows)]


# ------------------------------------------------------------------ names
@pytest.mark.parametrize(
    ("entity", "expected"),
    [
        (Entity(Kind.TOPIC, "a/b"), Place("a/b")),
        (Entity(Kind.TOPIC, "q/$deadletterqueue"), Place("q", "", True)),
        (Entity(Kind.TOPIC, "t/subscriptions/s/$DeadLetterQueue"), Place("t", "s", True)),
        (Entity(Kind.SUBSCRIPTION, "queue", "q"), Place("q")),
        (Entity(Kind.SUBSCRIPTION, "queue", "q/$DeadLetterQueue"), Place("q", "", True)),
        (Entity(Kind.SUBSCRIPTION, "queue/$DeadLetterQueue", "q"), Place("q", "", True)),
        (Entity(Kind.SUBSCRIPTION, "s", "t"), Place("t", "s")),
        (Entity(Kind.SUBSCRIPTION, "s/$DeadLetterQueue", "t"), Place("t", "s", True)),
        (Entity(Kind.SUBSCRIPTION, "s/A/b", "t"), Place("t", "s", False, "A/b")),
        (Entity(Kind.SUBSCRIPTION, "queue/*", "q"), Place("q", "", False, "*")),
    ],
)
def test_names(entity, expected):
    assert place(entity) == expected


# ------------------------------------------------------------------ connecting
def settings(options, **profile):
    async def make():
        return Settings({"options": options, **profile}, ConnectionHost("servicebus"))

    return run(make())


SECRET = "c2VjcmV0LWtleQ=="  # noqa: S105 - of nothing
CLOUD = f"Endpoint=sb://ns.example.net/;SharedAccessKeyName=root;SharedAccessKey={SECRET}"


class Token:
    def __init__(self):
        self.asked = []

    def get_token(self, *scopes, **_):
        self.asked.append(scopes)
        return AccessToken("a-token", int(time.time()) + 3600)


def test_the_clients_own_options_reach_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)  # aiohttp is there only where WebSockets are wanted
    proxy = {"proxy_hostname": "proxy.example.net", "proxy_port": 3128}
    made = settings({"connection_string": CLOUD, "http_proxy": proxy})
    assert made.client()._config.http_proxy == proxy
    made = settings(
        {
            "connection_string": CLOUD,
            "transport_type": "AmqpOverWebsocket",
            "custom_endpoint_address": "sb://gate.example.net:8443",
        }
    )
    config = made.client()._config
    assert (config.transport_type.name, config.custom_endpoint_hostname, config.connection_port) == (
        "AmqpOverWebsocket", "gate.example.net", 8443,
    )  # fmt: skip
    made = settings({"connection_string": CLOUD + ";EntityPath=orders"})
    assert (made.namespace, made.entities, made.emulator) == ("ns.example.net", ["orders"], False)
    for credential in (Token(), AzureSasCredential("SharedAccessSignature sr=x"), AzureNamedKeyCredential("root", SECRET)):
        assert settings({"credential": credential}, hosts=["ns.example.net"]).credential is credential
    assert settings({}, hosts=["ns.example.net"], username="root", password=SECRET).credential.named_key == ("root", SECRET)


@pytest.mark.parametrize(
    ("options", "hosts", "text"),
    [
        ({}, [], "name one namespace"),
        ({"nonsense": 1}, ["ns"], "no option 'nonsense'; there are: UseDevelopmentEmulator"),
        ({"connection_string": "Endpoint=sb://ns;SharedAccessKey=" + SECRET}, [], "SharedAccessKeyName"),
        ({"connection_string": "rubbish " + SECRET}, [], "malformed"),
        ({"connection_string": CLOUD}, ["other.example.net"], "for another namespace"),
        ({"connection_string": CLOUD, "transport_type": "Pigeon"}, [], "transport_type 'Pigeon' is not one of: Amqp"),
        ({"credential": object()}, ["ns"], "must be one of azure-identity"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said_without_its_key(options, hosts, text):
    with pytest.raises(BrokerError) as refused:
        settings(options, hosts=hosts)
    assert refused.value.kind is ErrorKind.INVALID
    assert text in str(refused.value)
    assert SECRET not in repr(refused.value) + repr(refused.value.__cause__) + repr(
        refused.value.__context__ if not refused.value.__suppress_context__ else ""
    )


def test_a_connection_string_is_a_secret():
    assert has_secret(CLOUD)
    assert has_secret("servicebus://ns?connection_string=x")
    with pytest.raises(BrokerError) as refused:
        broker_nb.connect(CLOUD)
    assert SECRET not in str(refused.value)
    made = settings({"connection_string": CLOUD})
    assert SECRET not in str(made.failure("q", exceptions.ServiceBusError(f"what about {CLOUD} and sig=abc&se=1?")))
    assert "abc" not in str(made.failure("q", exceptions.ServiceBusError("sig=abc&se=1")))
    with pytest.raises(BrokerError) as refused:
        broker_nb.connect("servicebus", options={"connection_string": CLOUD.replace("ns.example.net", "127.0.0.1")}, timeout=1)
    assert SECRET not in str(refused.value)


def test_a_dead_address_answers_in_time():
    for options in ({"UseDevelopmentEmulator": "true"}, {"connection_string": CLOUD.replace("ns.example.net", "127.0.0.1")}):
        began = time.monotonic()
        with pytest.raises(BrokerError) as refused:
            run(Client.open("servicebus", {"hosts": [f"127.0.0.1:{free_port()}"], "options": options, "timeout": 3}))
        assert refused.value.kind is ErrorKind.UNREACHABLE
        assert "127.0.0.1" in str(refused.value)
        assert time.monotonic() - began < 5


def test_websockets_need_a_library_of_their_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    profile = {"options": {"connection_string": CLOUD, "transport_type": "AmqpOverWebsocket"}}
    error = run(refusal(Client.open("servicebus", profile)))
    assert (error.kind, "aiohttp" in str(error)) == (ErrorKind.UNSUPPORTED, True)


KEYS = {
    "queues": {"q": {}, "other": {}, "sess": {"sessions": True}},
    "topics": {"t": {"subscriptions": {"s": {}}}},
    "keys": {"root": {"key": "cm9vdA=="}, "reader": {"key": "cmVhZA==", "rights": ["Listen"], "entities": ["q", "sess", "t"]}},
    "tokens": {"a-token": {}},
}


@pytest.fixture(scope="module")
def guarded():
    with servers.OwnServer("servicebus", config=json.dumps(KEYS)) as server:
        yield server


def key(server, name, secret):
    text = f"Endpoint=sb://{server.address};SharedAccessKeyName={name};SharedAccessKey={secret};UseDevelopmentEmulator=true"
    return {"options": {"connection_string": text, "administration_port": server._ports[1]}}


def test_a_wrong_key_and_an_expired_token_say_so(guarded):
    expired = signature("q", "root", "cm9vdA==", -60)
    text = f"Endpoint=sb://{guarded.address};SharedAccessSignature={expired};UseDevelopmentEmulator=true;EntityPath=q"
    for profile in (key(guarded, "root", SECRET), {"options": {"connection_string": text}}):
        error = run(refusal(Client.open("servicebus", profile)))
        assert error.kind is ErrorKind.AUTH, error
        assert "the key or token was not accepted: check it" in str(error)
        assert SECRET not in str(error)
        assert expired not in str(error)


def test_a_key_that_may_little(guarded):
    """Without the administration, and on one entity only: facts come from the entity, the others are refused."""
    profile = key(guarded, "reader", "cmVhZA==")
    profile["options"]["entities"] = ["q", "sess", "t/Subscriptions/s"]

    async def go():
        opened = await Client.open("servicebus", profile)
        listed = await opened.entities()
        facts = await opened.facts(Entity(Kind.TOPIC, "q"))
        with_sessions = await opened.facts(Entity(Kind.TOPIC, "sess"))
        looked, _ = await look(opened, "q")
        denied = [
            await refusal(opened.facts(Entity(Kind.TOPIC, "other"))),
            await refusal(opened.topic("q")),
            await refusal(opened.subscribe("t", "new", create=True)),
        ]
        counts = await opened.summaries(listed[:1])
        taken = await opened.subscribe("q", "queue")
        assert await taken.next_message(0.2) is None
        await opened.close()
        return listed, facts, with_sessions, looked, denied, counts

    listed, facts, with_sessions, looked, denied, counts = run(go())
    assert [(e.name, e.parent) for e in listed] == [("q", None), ("sess", None), ("s", "t")]
    assert (facts.lease.seconds, facts.look.proof, "administration" in facts.details) == (5.0, Proof.DRY, True)
    assert with_sessions.look.effects == {Effect.LOCKS_SESSION}
    assert (looked, counts[0].messages) == ([], None)
    assert {e.kind for e in denied} <= {ErrorKind.PERMISSION, ErrorKind.AUTH, ErrorKind.NOT_FOUND}
    assert "other" in str(denied[0])


def test_a_key_that_may_not_list_says_how_to_go_on(guarded):
    unreachable = key(guarded, "root", "cm9vdA==")
    unreachable["options"]["administration_port"] = free_port()

    async def go(profile):
        opened = await Client.open("servicebus", profile)
        try:
            return await refusal(opened.entities())
        finally:
            await opened.close()

    for profile in (key(guarded, "reader", "cmVhZA=="), unreachable):
        error = run(go(profile))
        assert error.kind is ErrorKind.PERMISSION
        assert "name the entities in option entities" in str(error)


def test_a_token_credential(guarded):
    from broker_nb.backends.servicebus.client import _Tokens

    token = Token()

    async def go():
        return await _Tokens(token).get_token("scope")

    assert run(go()).token == "a-token"  # noqa: S105 - of nothing
    assert token.asked == [("scope",)]


def test_a_token_that_expires_meanwhile(guarded):
    """What is held then is neither settled nor lost: it comes again, and everything says why nothing works."""
    text = f"Endpoint=sb://{guarded.address};SharedAccessSignature={{}};UseDevelopmentEmulator=true;EntityPath=q"
    port = guarded._ports[1]

    def profile(lasts):
        return {
            "options": {"connection_string": text.format(signature("q", "root", "cm9vdA==", lasts)), "administration_port": port}
        }

    async def go():
        brief, lasting = await asyncio.gather(*(Client.open("servicebus", profile(lasts)) for lasts in (5, 600)))
        await send(lasting, "q", Outbound(b"held"))
        taking = await source(brief, "q")
        _, tokens = await pulled(taking, 1)
        await asyncio.sleep(6)
        (outcome,) = await taking.settle([Settlement(tokens[0], Verdict.ACK)])
        errors = [await refusal(taking.pull(1, 1000, 0.2)), await refusal(look(brief, "q"))]
        await brief.close()
        await asyncio.to_thread(Bed(guarded.url).ask, expire="q")
        again = await source(lasting, "q")
        rows, tokens = await pulled(again, 1)
        await again.settle([Settlement(tokens[0], Verdict.ACK)])
        await lasting.close()
        return outcome, errors, rows

    outcome, errors, rows = run(go())
    assert outcome.state in (Settled.REFUSED, Settled.RETRY)
    assert [e.kind for e in errors] == [ErrorKind.AUTH] * 2
    assert "sig=" not in "".join(map(str, errors)).replace("sig=***", "")
    assert [row.data for row in rows] == [b"held"]


# ------------------------------------------------------------------ rows
VALUES = (
    "text",
    b"text",
    b"\xff",
    7,
    2**40,
    -(2**63),
    0.5,
    math.inf,
    True,
    None,
    datetime(2026, 1, 2, 3, 4, 5, 678000, UTC),
    uuid.uuid4(),
)


def test_typed_attributes_both_ways(client, bed):
    queue = bed.queue()
    sent = [make_attribute(f"a{i}", value) for i, value in enumerate(VALUES)]

    async def go():
        results = await send(client, queue, Outbound(b"x", None, sent), Outbound(b"y"))
        return results, (await look(client, queue))[0]

    results, (row, bare) = run(go())
    assert [r.state for r in results] == [Sent.ACCEPTED] * 2
    assert list(row.attributes) == sent
    assert bare.attributes == []


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (Outbound(None), "no body"),
        (Outbound("text"), "a body of str"),
        (Outbound(b"", b""), "0 characters"),
        (Outbound(b"", b"\xff"), "not UTF-8"),
        (Outbound(b"", "ż".encode() * 129), "129 characters"),
        (Outbound(b"", None, [Attribute("a", b"1", "int"), Attribute("a", b"2", "int")]), "twice"),
        (Outbound(b"", None, [make_attribute("n", 2**63)]), "beyond 64 bits"),
        (Outbound(b"", None, [make_attribute("t", datetime(2026, 1, 1, 0, 0, 0, 1, UTC))]), "has microseconds"),
        (Outbound(b"", None, [Attribute("t", b"\xff", "str")]), "not UTF-8"),
        (Outbound(bytes(300_000)), "too large"),
        (Outbound(b"", partition=1), "chooses the partition"),
        (Outbound(b"", time_ns=1), "sets the time itself"),
        (Outbound(b"", native={"colour": "red"}), "no option 'colour'"),
        (Outbound(b"", native={"subject": 1}), "must be a str"),
    ],
)
def test_a_row_that_can_never_be_sent(client, bed, row, text):
    queue = bed.queue() if not hasattr(bed, "one") else bed.one
    bed.one = queue

    async def go():
        sender = await client.driver.sender(Entity(Kind.TOPIC, queue), {})
        results = await sender.send([Outbound(b"before", row.key), row, Outbound(b"after")])
        return sender.check(row), results

    why, results = run(go())
    assert text in why
    assert results[1].state is Sent.REFUSED
    assert text in str(results[1].error)
    assert results[2].state is Sent.ACCEPTED  # the others are sent


def test_properties_by_the_clients_own_names(client, bed):
    queue = bed.queue()
    given = {"subject": "s", "content_type": "c", "message_id": "m", "correlation_id": "x", "time_to_live": timedelta(hours=1)}

    async def go():
        later = {"scheduled_enqueue_time_utc": datetime.now(UTC) + timedelta(hours=1)}
        await send(
            client,
            queue,
            Outbound(b"1", b"key", native=given),
            Outbound(b"2", native=later),
            Outbound(b"3", dedupe=DedupeId("run", 1)),
        )
        return (await look(client, queue))[0]

    first, scheduled, third = run(go())
    message = first.native
    assert (message.subject, message.content_type, message.correlation_id, message.time_to_live) == (
        "s",
        "c",
        "x",
        timedelta(hours=1),
    )
    assert (first.id, first.key) == ("m:1", b"key")
    assert scheduled.native.state.name == "SCHEDULED"
    assert third.id == "run:1:3"


def test_bodies_that_are_not_bytes(client, bed):
    queue = bed.queue()
    with bed.client() as vendor, vendor.get_queue_sender(queue) as sender:
        for body in (
            {"value_body": {"a": [1, 2.5, None, True]}},
            {"value_body": "text"},
            {"value_body": None},
            {"sequence_body": [[1], [2]]},
        ):
            sender.send_messages(AmqpAnnotatedMessage(**body))
        sender.send_messages(AmqpAnnotatedMessage(data_body=[b"in ", b"parts"]))
    rows, _ = run(look(client, queue))
    assert [row.data for row in rows] == [b'{"a": [1, 2.5, null, true]}', b"text", None, b"[[1], [2]]", b"in parts"]


# ------------------------------------------------------------------ looking
def test_the_end_is_found_in_leaps_and_completeness_is_unknown(client, bed):
    queue = bed.queue()

    async def go():
        await send(client, queue, *(Outbound(b"%d" % i) for i in range(1000)))
        taking = await source(client, queue)
        _, tokens = await pulled(taking, 100)
        await taking.settle([Settlement(t, Verdict.ACK) for t in tokens])
        (bounds,) = await client.driver.bounds(Entity(Kind.TOPIC, queue), True)
        newest, summary = await look(client, queue, "-10")
        await taking.close()
        return bounds, newest, summary, await look(client, queue, "500..510")

    bounds, newest, summary, (part, _) = run(go())
    assert (bounds.low, bounds.end) == ((101,), (1001,))
    assert [row.data for row in newest] == [b"%d" % i for i in range(990, 1000)]
    assert (summary.complete, summary.why) == (None, "this broker cannot tell where the end is")
    assert [row.data for row in part] == [b"%d" % i for i in range(499, 509)]


def test_every_partition_is_paged(client, bed):
    queue = bed.queue(enable_partitioning=True)

    async def go():
        results = await send(client, queue, *(Outbound(b"%d" % i, b"key-%d" % (i % 40)) for i in range(400)))
        facts = await client.facts(Entity(Kind.TOPIC, queue))
        rows, _ = await look(client, queue)
        some, _ = await look(client, queue, partitions=[rows[0].partition])
        return results, facts, rows, some

    results, facts, rows, some = run(go())
    assert {r.state for r in results} == {Sent.ACCEPTED}
    assert facts.partitions == tuple(range(16))
    assert sorted(int(row.data) for row in rows) == list(range(400))
    assert len({row.partition for row in rows}) > 4
    assert {row.partition for row in some} == {rows[0].partition}
    by_key = {}
    for row in rows:
        by_key.setdefault(row.key, []).append(int(row.data))
    assert all(numbers == sorted(numbers) for numbers in by_key.values())


def test_a_subscription_and_dead_letters_are_looked_at_by_path(client, bed):
    topic = bed.topic("s")

    async def go():
        await send(client, topic, Outbound(b"good"), Outbound(b"bad"))
        taking = await source(client, topic, "s")
        rows, tokens = await pulled(taking, 2)
        outcomes = await taking.settle(
            [Settlement(tokens[0], Verdict.RELEASE), Settlement(tokens[1], Verdict.REJECT, reason="why")]
        )
        await taking.close()
        live, _ = await look(client, f"{topic}/Subscriptions/s")
        dead, _ = await look(client, f"{topic}/Subscriptions/s/$DeadLetterQueue")
        dying = await source(client, topic, "s/$DeadLetterQueue")
        _, tokens = await pulled(dying, 1)
        further = await dying.settle([Settlement(tokens[0], Verdict.REJECT)])
        done = await dying.settle([Settlement(tokens[0], Verdict.ACK)])
        await dying.close()
        refused = [await refusal(look(client, topic)), await refusal(client.topic(f"{topic}/Subscriptions/s"))]
        facts = await client.facts(Entity(Kind.SUBSCRIPTION, "s", topic))
        return rows, outcomes, live, dead, further + done, refused, facts

    rows, outcomes, live, dead, further, refused, facts = run(go())
    assert [row.topic for row in rows] == [topic] * 2
    assert [o.state for o in outcomes] == [Settled.CONFIRMED] * 2
    assert [(row.data, row.delivery_count) for row in live] == [(b"good", 1)]
    assert [(row.data, row.attributes[0]) for row in dead] == [(b"bad", Attribute("DeadLetterReason", b"why", "str"))]
    assert [o.state for o in further] == [Settled.REFUSED, Settled.CONFIRMED]
    assert "a topic keeps nothing itself" in str(refused[0])
    assert f"publish to {topic}" in str(refused[1])
    assert facts.dead_letter.name == f"{topic}/Subscriptions/s/$DeadLetterQueue"


def test_looking_at_sessions_has_to_be_allowed(client, bed):
    queue = bed.queue(requires_session=True)

    async def go():
        await send(client, queue, *(Outbound(b"%d" % i, b"AB"[i % 2 : i % 2 + 1]) for i in range(6)))
        refused = await refusal(look(client, queue))
        rows, summary = await look(client, queue, allow=[Effect.LOCKS_SESSION])
        holding = await source(client, queue, "queue/A")
        partly, held = await look(client, queue, allow=[Effect.LOCKS_SESSION])
        await holding.close()
        return refused, rows, summary, partly, held

    refused, rows, summary, partly, held = run(go())
    assert "allow=locks_session" in str(refused)
    assert [row.data for row in rows] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert [row.data for row in partly] == [b"1", b"3", b"5"]
    assert (summary.complete, held.complete) == (None, None)
    assert "silence; the broker cannot tell" in held.why


def test_a_queue_is_followed(client, bed):
    queue = bed.queue()

    async def go():
        await send(client, queue, Outbound(b"old"))
        tail = await client.tail(queue, want=COLUMNS)
        assert await tail.take(10, 1000, 0.1) is None
        await send(client, queue, Outbound(b"1"), Outbound(b"2"))
        seen = []
        while len(seen) < 2:
            if (batch := await tail.take(1, 1000, 0.2)) is not None:
                seen += [batch.codec.envelope(row).data for row in batch.rows]
        assert await tail.take(10, 1000, 0.1) is None
        await tail.close()
        return seen

    assert run(go()) == [b"1", b"2"]


# ------------------------------------------------------------------ taking
def test_a_lock_lost_in_the_middle_of_a_batch(client, bed):
    """Somebody else settles two of five: these are LOST, the others are done, and the source goes on."""
    queue = bed.queue()

    async def go():
        await send(client, queue, *(Outbound(b"%d" % i) for i in range(5)))
        taking = await source(client, queue)
        _, tokens = await pulled(taking, 5)
        lost = set(tokens[1:3])
        rows = [taking._held[token] for token in lost]
        await taking._worker.run(
            queue, lambda: taking._receiver._settle_message_via_mgmt_link("completed", [m.lock_token for m in rows])
        )
        outcomes = await taking.settle([Settlement(t, Verdict.ACK) for t in tokens])
        extended = await taking.extend(tokens[:2], 30)
        await send(client, queue, Outbound(b"next"))
        after, tokens = await pulled(taking, 1)
        deadline = (await taking.extend(tokens, 30))[0] - time.monotonic()
        await taking.close()
        return outcomes, extended, after, deadline, (await look(client, queue))[0]

    outcomes, extended, after, deadline, left = run(go())
    assert [o.state.name for o in outcomes] == ["CONFIRMED", "LOST", "LOST", "CONFIRMED", "CONFIRMED"]
    assert extended == [None, None]
    assert [row.data for row in after] == [b"next"]
    assert 25 < deadline < 31
    assert [row.data for row in left] == [b"next"]


def test_deferred_messages_are_fetched_by_number(client, bed):
    queue = bed.queue()

    async def go():
        await send(client, queue, Outbound(b"1"), Outbound(b"2"))
        taking = await source(client, queue)
        rows, tokens = await pulled(taking, 2)
        outcomes = await taking.defer(tokens)
        assert await taking.pull(10, 1000, 0.2) is None
        await taking.close()
        again = await source(client, queue, native={"sequence_numbers": [row.position[0] for row in rows]})
        fetched, tokens = await pulled(again, 2)
        done = await again.settle([Settlement(t, Verdict.ACK) for t in tokens])
        await again.close()
        missing = await source(client, queue, native={"sequence_numbers": [99]})
        error = await refusal(missing.pull(1, 1000, 0.1))
        await missing.close()
        return outcomes, [row.data for row in fetched], done, error

    outcomes, fetched, done, error = run(go())
    assert [o.state for o in [*outcomes, *done]] == [Settled.CONFIRMED] * 4
    assert fetched == [b"1", b"2"]
    assert queue in str(error)


def test_sessions_one_at_a_time(client, bed):
    queue = bed.queue(requires_session=True)

    async def go():
        await send(client, queue, *(Outbound(b"%d" % i, b"AB"[i % 2 : i % 2 + 1]) for i in range(6)))
        without = await refusal(client.subscribe(queue, "queue"))
        keyless = (await send(client, queue, Outbound(b"x")))[0]
        mine = await client.subscribe(queue, "queue/A")
        messages = await mine.next_batch(3, count=3, age=2)
        taken = await refusal(source(client, queue, "queue/A"))
        other = await source(client, queue, "queue/*")
        rows, tokens = await pulled(other, 3)
        none = await refusal(source(client, queue, "queue/*"))
        extended = await other.extend(tokens, 30)
        await messages[0].ack()
        await client.unsubscribe(queue, "queue/A")
        bed.ask(expire=queue)
        lost = await other.settle([Settlement(t, Verdict.ACK) for t in tokens])
        gone = await refusal(other.pull(1, 1000, 0.2))
        await other.close()
        again = await source(client, queue, "queue/A")
        left, _ = await pulled(again, 2)
        await again.close()
        return without, keyless, messages, taken, rows, none, extended, lost, gone, left

    without, keyless, messages, taken, rows, none, extended, lost, gone, left = run(go())
    assert without.kind is ErrorKind.UNSUPPORTED
    assert "queue/ID" in str(without)
    assert (keyless.state, "needs a key" in str(keyless.error)) == (Sent.REFUSED, True)
    assert [m.data for m in messages] == [b"0", b"2", b"4"]
    assert (taken.kind, "somebody else holds session 'A'" in str(taken)) == (ErrorKind.CONFLICT, True)
    assert [(row.data, row.key) for row in rows] == [(b"1", b"B"), (b"3", b"B"), (b"5", b"B")]
    assert (none.kind, "no session that has messages is free" in str(none)) == (ErrorKind.TIMEOUT, True)
    assert all(deadline > time.monotonic() for deadline in extended)
    assert {o.state for o in lost} == {Settled.LOST}
    assert gone.kind is ErrorKind.LEASE_LOST
    assert [row.data for row in left] == [b"2", b"4"]


def test_a_subscription_is_made_when_told(client, bed):
    topic = bed.topic()

    async def go():
        missing = await refusal(client.subscribe(topic, "new"))
        opened = await client.subscribe(topic, "new", create=True)
        await send(client, topic, Outbound(b"1"))
        message = await opened.next_message(5)
        await message.ack()
        await client.unsubscribe(topic, "new")
        queue = await refusal(client.subscribe(topic, "queue"))
        return missing, message.data, queue, [e for e in await client.entities(topic) if e.kind is Kind.SUBSCRIPTION]

    missing, data, queue, entities = run(go())
    assert (missing.kind, queue.kind, data) == (ErrorKind.NOT_FOUND, ErrorKind.NOT_FOUND, b"1")
    assert "name a subscription of it" in str(queue)
    assert [e.name for e in entities] == ["new"]


def test_what_came_unasked_goes_back(client, bed):
    """A pull leaves credit behind: what the broker sends on it comes with the next pull, or is given back soon, uncounted."""
    queue = bed.queue()

    async def go():
        idle = await source(client, queue)
        assert await idle.pull(100, 1000, 0.05) is None
        await send(client, queue, Outbound(b"1"))
        rows, tokens = await pulled(idle, 1)
        await idle.settle([Settlement(t, Verdict.ACK) for t in tokens])
        other = await source(client, queue)
        await send(client, queue, Outbound(b"2"))  # goes to the one that was first
        again, tokens = await pulled(other, 1, 15)
        await other.settle([Settlement(t, Verdict.ACK) for t in tokens])
        await asyncio.gather(idle.close(), other.close())
        return [(row.data, row.delivery_count) for row in rows + again]

    assert run(go()) == [(b"1", 1), (b"2", 1)]


# ------------------------------------------------------------------ writing
def test_batches_are_split_and_one_that_is_too_large_is_refused(client, bed):
    queue = bed.queue(max_message_size_in_kilobytes=256)
    rows = [Outbound(bytes(60_000) if i != 7 else bytes(262_100), b"k%d" % (i % 4)) for i in range(20)]

    async def go():
        results = await send(client, queue, *rows)
        return results, (await look(client, queue))[0]

    results, stored = run(go(), 60)
    assert [r.state for r in results] == [Sent.REFUSED if i in (7, 11, 15, 19) else Sent.ACCEPTED for i in range(20)]
    assert results[7].error.kind is ErrorKind.TOO_LARGE
    assert "earlier row of key b'k3'" in str(results[11].error)
    assert len(stored) == 16


def test_a_send_that_the_broker_refuses_or_does_not_answer(client, bed):
    queue = bed.queue()

    async def go():
        bed.ask(fault={"on": "send", "entity": queue, "condition": "com.microsoft:server-busy"})
        busy = await send(client, queue, Outbound(b"1"), Outbound(b"2"))
        bed.ask(fault={"on": "send", "entity": queue, "condition": "amqp:link:message-size-exceeded"})
        halved = await send(client, queue, *(Outbound(b"half") for _ in range(5)))
        bed.ask(fault={"on": "send", "entity": queue, "condition": "amqp:not-allowed"})
        refused = await send(client, queue, Outbound(b"3"))
        bed.ask(clear=True)
        return busy, halved, refused, await send(client, queue, Outbound(b"4")), (await look(client, queue))[0]

    busy, halved, refused, after, stored = run(go())
    assert [r.state for r in halved] == [Sent.ACCEPTED] * 5
    assert [(r.state, r.error.kind, r.error.retryable) for r in busy] == [(Sent.REFUSED, ErrorKind.THROTTLED, True)] * 2
    assert (refused[0].state, after[0].state) == (Sent.REFUSED, Sent.ACCEPTED)
    assert [row.data for row in stored] == [b"half"] * 5 + [b"4"]


def test_duplicates(client, bed):
    queue = bed.queue(requires_duplicate_detection=True, duplicate_detection_history_time_window=timedelta(minutes=5))

    async def go():
        for _ in range(2):
            await send(client, queue, Outbound(b"1", dedupe=DedupeId("run", 1)))
        return (await client.facts(Entity(Kind.TOPIC, queue))).dedupe, (await look(client, queue))[0]

    dedupe, stored = run(go())
    assert (dedupe.window_s, dedupe.replaces_message_id, len(stored)) == (300.0, True, 1)


# ------------------------------------------------------------------ closing
def test_after_close_nothing_is_left(bed):
    def threads():
        return {t.name for t in threading.enumerate() if "servicebus" in t.name}

    def sockets():
        return len(
            [
                c
                for c in psutil.Process().net_connections(kind="tcp")
                if c.status == "ESTABLISHED" and c.raddr and f"{c.raddr.ip}:{c.raddr.port}" in bed.hosts
            ]
        )

    async def go():
        before, tasks = (threads(), sockets()), len(asyncio.all_tasks())
        opened = await Client.open("servicebus", bed.profile)
        queue = await asyncio.to_thread(bed.queue)
        await send(opened, queue, Outbound(b"1"), Outbound(b"2"))
        await look(opened, queue)
        subscription = await opened.subscribe(queue, "queue")
        held = await subscription.next_message(5)
        began = time.monotonic()
        await asyncio.gather(opened.close(), opened.close())
        took = time.monotonic() - began
        with contextlib.suppress(AssertionError):  # it is told below
            await until(lambda: (threads(), sockets()) == before, 5, "closing")
        assert (await refusal(opened.entities())).kind is ErrorKind.CLOSED
        assert (await refusal(opened.driver.facts(Entity(Kind.TOPIC, queue)))).kind is ErrorKind.CLOSED
        return before, (threads(), sockets()), len(asyncio.all_tasks()) - tasks, took, held.data, bed.ask()[queue]

    before, after, tasks, took, data, stored = run(go())
    gc.collect()
    assert after == before
    assert (tasks, data) == (0, b"1")
    assert took < 5
    assert [state[2:] for state in stored[:2]] == [[0, False]] * 2  # given back


def test_the_broker_is_stopped_and_started(tmp_path):
    with servers.OwnServer("servicebus", config='{"queues": {"q": {}}}', keep=tmp_path) as server:
        own = Bed(server.url)

        async def go():
            opened = await Client.open("servicebus", own.profile)
            publisher = await opened.topic("q")
            await publisher.publish(OutboundMessage(b"1"))
            subscription = await opened.subscribe("q", "queue")
            await (await subscription.next_message(5)).ack()
            await asyncio.to_thread(server.kill)
            failed = await publisher.batch_publish(OutboundMessage(b"lost"))
            await asyncio.to_thread(server.start)
            assert (await publisher.publish(OutboundMessage(b"2"))).ok
            message = await subscription.next_message(10)
            await message.ack()
            rows, _ = await look(opened, "q")
            await opened.close()
            return failed, message.data, rows

        failed, data, rows = run(go(), 60)
    assert failed[0].state == "unknown"
    assert (failed[0].error.kind, data, rows) == (ErrorKind.UNREACHABLE, b"2", [])


def test_frames_and_captions(bed):
    said = []
    connection.set_captions(said.append)
    url = f"servicebus://{bed.hosts[0]}" if bed.hosts else "servicebus"
    try:
        with broker_nb.connect(url, options=bed.options, name="bus") as conn:
            queue = bed.queue()
            bed.send(queue, b'{"id": 1}', b'{"id": 2}')
            frame = conn.sample(queue)
            held = conn.consume(queue, "queue", n=2)
            done = conn.ack(held)
            topics = conn.topics(queue)
    finally:
        connection.set_captions(None)
    assert list(frame["value_id"]) == [1, 2]
    assert list(frame["offset"]) == [1, 2]
    assert frame.attrs["complete"] == "unknown"
    assert list(held["delivery_count"]) == [1, 1]
    assert done.ok
    assert list(topics["messages"]) == [0]
    assert not [line for line in said if "SAS_KEY_VALUE" in line]


def test_a_message_of_the_client_is_there_too(client, bed):
    queue = bed.queue()
    with bed.client() as vendor, vendor.get_queue_sender(queue) as sender:
        sender.send_messages(ServiceBusMessage(b"x", application_properties={"k": "v"}, session_id="s", reply_to="r"))
    (row,), _ = run(look(client, queue))
    assert (row.key, row.native.reply_to, row.time_is) == (b"s", "r", "server")
    assert abs(row.publish_time_ns - time.time_ns()) < 60e9
