"""The Pulsar driver beside what the suites show: connecting, names, who we are, what is left behind."""

from __future__ import annotations

import asyncio
import base64
import http.server
import json
import logging
import threading
import time

import pytest
from pulsar_bed import Bed

from broker_nb.backends import profile_from_url
from broker_nb.backends.driver import COLUMNS, DedupeId, Entity, Family, Kind, Outbound, Piece, Sent, TakeOptions
from broker_nb.backends.pulsar.settings import read_settings
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attribute, OutboundMessage
from broker_nb.portable.client import Client
from broker_nb.portable.host import ConnectionHost
from broker_nb.portable.loop import shared_loop
from broker_nb.portable.ranges import parse_range
from broker_nb.testing.bench import refusal
from broker_nb.testing.servers.process import free_port

pytestmark = pytest.mark.xdist_group("pulsar")


@pytest.fixture(scope="module")
def bed(pulsar_url):
    return Bed(pulsar_url)


def run(body):
    return shared_loop().run(asyncio.wait_for(body, 60))


def on(bed, body, **profile):
    """Run `body(client)` on a connection."""

    async def whole():
        client = await Client.open("pulsar", {**bed.profile, **profile})
        try:
            return await body(client)
        finally:
            await client.close()

    return run(whole())


def settings(**profile):
    async def read():
        return read_settings({"hosts": ["h"], **profile}, ConnectionHost("pulsar", ["s3cret"]))

    return run(read())


async def publish(client, topic, *messages):
    rows = [m if isinstance(m, OutboundMessage) else OutboundMessage(m) for m in messages]
    results = await (await client.topic(topic)).batch_publish(*rows)
    assert [r.state for r in results] == ["accepted"] * len(rows)
    return results


async def looked(client, topic, asked="..end"):
    look = await client.look(topic, parse_range(asked), want=COLUMNS)
    rows = [batch.codec.envelope(row) async for batch in look.batches(20) for row in batch.rows]
    return rows, look.summary


# Settings


def test_the_url_of_the_test_bed_names_the_admin_api(pulsar_url):
    scheme, profile = profile_from_url(pulsar_url)
    assert (scheme, list(profile["options"])) == ("pulsar", ["admin_url"])

    async def about():
        client = await Client.open(scheme, profile)
        try:
            return client.driver.about
        finally:
            await client.close()

    assert "4.0.8" in run(about())


def test_usual_ports():
    plain, tls = settings(), settings(options={"use_tls": "true"})
    assert (plain.service_url, plain.admin_url) == ("pulsar://h:6650", "http://h:8080")
    assert (tls.service_url, tls.admin_url) == ("pulsar+ssl://h:6651", "https://h:8443")
    assert tls.client["tls_validate_hostname"] is True
    assert settings(hosts=["a:1", "b"]).service_url == "pulsar://a:1,b:6650"


@pytest.mark.parametrize(
    ("profile", "says"),
    [
        ({"options": {"tokn": "x"}}, "no option 'tokn'"),
        ({"options": {"admin_url": "ftp://x"}}, "admin_url must be like http"),
        ({"options": {"admin_url": "http://me:s3cret@localhost"}}, "without user and password"),
        ({"options": {"operation_timeout_seconds": "soon"}}, "must be int"),
        ({"options": {"token": "s3cret", "issuer_url": "https://x"}}, "only one way"),
        ({"options": {"certificate_path": "c"}}, "private_key_path"),
        ({"options": {"issuer_url": "https://x"}}, "private_key"),
        ({"options": {"tls_trust_certs_file_path": "/not/there"}}, "/not/there cannot be used"),
        ({"path": "public"}, "tenant/namespace"),
        ({"hosts": []}, "no server is named"),
    ],
)
def test_settings_that_cannot_be(profile, says):
    with pytest.raises(BrokerError, match=says) as caught:
        settings(**profile)
    assert caught.value.kind is ErrorKind.INVALID
    assert "s3cret" not in str(caught.value)


def test_who_we_are_is_told_to_the_admin_api_and_shown_nowhere():
    by_token = settings(options={"token": "s3cret"})
    assert by_token.headers(1) == {"Authorization": "Bearer s3cret"}
    assert "s3cret" not in repr(by_token)
    basic = settings(username="me", password="s3cret")  # noqa: S106 - not a real one
    assert basic.headers(1) == {"Authorization": "Basic " + base64.b64encode(b"me:s3cret").decode()}


class Issuer(http.server.ThreadingHTTPServer):
    """An OAuth2 issuer that counts its tokens."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.forms = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"token_endpoint": f"http://127.0.0.1:{self.server.server_port}/token"})

        def do_POST(self):
            self.server.forms.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.answer({"access_token": f"t{len(self.server.forms)}", "expires_in": 3600})

        def answer(self, said):
            body = json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass


def test_oauth2_asks_the_issuer_once(tmp_path):
    (tmp_path / "key.json").write_text(json.dumps({"client_id": "me", "client_secret": "s3cret"}))
    with Issuer() as issuer:
        thread = threading.Thread(target=issuer.serve_forever, args=[0.05])
        thread.start()
        url = f"http://127.0.0.1:{issuer.server_port}"
        headers = settings(
            options={"issuer_url": url, "private_key": f"file://{tmp_path}/key.json", "audience": "pulsar"}
        ).headers
        assert [headers(5), headers(5)] == [{"Authorization": "Bearer t1"}] * 2
        issuer.shutdown()
        thread.join()
    (form,) = issuer.forms
    assert "client_id=me" in form
    assert "audience=pulsar" in form


# Connecting


@pytest.mark.parametrize("dead", ["broker", "admin"])
def test_a_dead_address_answers_within_five_seconds(bed, dead):
    nobody = f"127.0.0.1:{free_port()}"
    profile = {
        "hosts": [nobody if dead == "broker" else bed.address],
        "options": {"admin_url": bed.admin if dead == "broker" else f"http://{nobody}"},
        "timeout": 3.0,
    }
    began = time.monotonic()
    error = run(refusal(Client.open("pulsar", profile)))
    assert time.monotonic() - began < 5
    assert error.kind is ErrorKind.UNREACHABLE
    assert nobody in str(error)


def test_nothing_is_left_after_close(bed, capfd):
    topic = bed.make()

    def ours():
        return [t.name for t in threading.enumerate() if t.name.startswith("broker-nb-pulsar")]

    async def use(client):
        await publish(client, topic, b"1", b"2")
        driver, entity = client.driver, Entity(Kind.TOPIC, topic)
        (bounds,) = await driver.bounds(entity, True)
        look = await driver.browse(entity, [Piece(0, bounds.low, None)], COLUMNS, True, frozenset())
        await look.read(1, 1000, 0.2)
        assert len(await asyncio.to_thread(bed.subscriptions, topic)) == 1
        await driver.subscribe(Entity(Kind.SUBSCRIPTION, "stays", topic), TakeOptions(Family.MESSAGE, create=True))

    on(bed, use)
    assert bed.subscriptions(topic) == {"stays"}
    stats = bed.stats(topic)
    assert stats["publishers"] == stats["subscriptions"]["stays"]["consumers"] == []
    deadline = time.monotonic() + 10
    while ours():
        assert time.monotonic() < deadline, ours()
        time.sleep(0.02)
    assert capfd.readouterr().err == ""


def test_the_client_logs_by_logging(bed, caplog, capfd):
    with caplog.at_level(logging.INFO, "broker_nb.pulsar"):
        topic = bed.make()
        on(bed, lambda client: publish(client, topic, b"1"))
    assert "broker_nb.pulsar" in {record.name for record in caplog.records}
    assert capfd.readouterr().err == ""


# Names


@pytest.mark.parametrize("name", ["nowhere", "public/nowhere/x", "persistent://nobody/nowhere/x", "orders-partition-7"])
def test_what_is_not_there_is_not_made(bed, name):
    before = bed.topics(), bed.api("GET", "tenants"), bed.api("GET", "namespaces/public")

    async def use(client):
        driver, entity = client.driver, Entity(Kind.TOPIC, name)
        subscription = Entity(Kind.SUBSCRIPTION, "s", name)
        for call in (
            driver.facts(entity),
            driver.bounds(entity, True),
            driver.browse(entity, [Piece(0, (0,), None)], COLUMNS, True, frozenset()),
            driver.sender(entity, {}),
            driver.subscribe(subscription, TakeOptions(Family.MESSAGE, create=True)),
            driver.subscribe(subscription, TakeOptions(Family.RECORD, create=True)),
            driver.backlog(subscription),
        ):
            error = await refusal(call)
            assert error.kind is ErrorKind.NOT_FOUND
            assert name.rpartition("/")[2] in str(error)

    on(bed, use)
    assert (bed.topics(), bed.api("GET", "tenants"), bed.api("GET", "namespaces/public")) == before


@pytest.mark.parametrize(
    ("name", "kind"),
    [("", ErrorKind.INVALID), ("a/b", ErrorKind.INVALID), ("http://a/b/c", ErrorKind.INVALID), ("a\nb", ErrorKind.INVALID),
     ("non-persistent://public/default/x", ErrorKind.UNSUPPORTED)],
)  # fmt: skip
def test_names_that_cannot_be(bed, name, kind):
    assert on(bed, lambda c: refusal(c.driver.facts(Entity(Kind.TOPIC, name)))).kind is kind


def test_short_names_and_the_namespace_of_the_url(bed):
    full = bed.make()
    short = full.rpartition("/")[2]

    async def use(client):
        await publish(client, short, b"1")
        rows, _ = await looked(client, short)
        return {row.topic for row in rows}, {e.name for e in await client.entities(short)}

    assert on(bed, use) == on(bed, use, path="public/default") == ({short}, {full})


# Publishing


def test_rows_that_pulsar_cannot_hold(bed):
    topic = bed.make(2)

    async def use(client):
        sender = await client.driver.sender(Entity(Kind.TOPIC, topic), {})
        return [
            sender.check(row)
            for row in (
                Outbound(b"x", b""),
                Outbound(b"x", b"\xff"),
                Outbound(b"x", None, [Attribute("a", b"1", "int")]),
                Outbound(b"x", None, [Attribute("a", None)]),
                Outbound(b"x", None, [Attribute("a", b"\xff")]),
                Outbound(b"x", None, [Attribute("a", b"1"), Attribute("a", b"2")]),
                Outbound(bytes(6_000_000)),
                Outbound(b"x", partition=2),
                Outbound(b"x", time_ns=0),
                Outbound(b"x", native={"colour": "red"}),
                Outbound(b"x", native={"deliver_at": "soon"}),
            )
        ] + [sender.check(Outbound(None, b"k", [Attribute("a", b"1")], 1, time.time_ns(), native={"ordering_key": "o"}))]

    *flaws, fine = on(bed, use)
    assert all(flaws)
    assert fine is None


def test_partition_time_and_ordering_key(bed):
    topic = bed.make(3)

    async def use(client):
        sender = await client.driver.sender(Entity(Kind.TOPIC, topic), {})
        row = Outbound(b"x", b"k", (), 2, 1_700_000_000_123_000_000, native={"ordering_key": "o"})
        (result,) = await sender.send([row])
        (seen,), _ = await looked(client, topic)
        return result, seen

    result, seen = on(bed, use)
    assert (result.partition, result.position, result.id) == (seen.partition, seen.position, seen.id)
    assert (seen.partition, seen.native.event_timestamp(), seen.native.ordering_key()) == (2, 1_700_000_000_123, "o")


def test_a_second_producer_of_a_run_is_fenced(bed):
    topic = bed.make()

    async def use(client):
        entity, row = Entity(Kind.TOPIC, topic), Outbound(b"1", dedupe=DedupeId("run", 1))
        first, second = await client.driver.sender(entity, {}), await client.driver.sender(entity, {})
        return [*await first.send([row]), *await second.send([row])]

    one, two = on(bed, use)
    assert one.state is Sent.ACCEPTED
    assert two.state is Sent.REFUSED
    assert two.error is not None
    assert two.error.kind is ErrorKind.FENCED


def test_options_that_the_client_does_not_have(bed):
    topic = bed.make()

    async def use(client):
        driver, sub = client.driver, Entity(Kind.SUBSCRIPTION, "s", topic)
        return [
            (await refusal(call)).kind
            for call in (
                driver.sender(Entity(Kind.TOPIC, topic), {"colour": "red"}),
                driver.subscribe(sub, TakeOptions(Family.MESSAGE, create=True, native={"colour": "red"})),
                driver.subscribe(sub, TakeOptions(Family.MESSAGE, create=True, native={"consumer_type": "Loose"})),
                driver.subscribe(sub, TakeOptions(Family.RECORD, create=True, native={"consumer_type": "Shared"})),
                driver.subscribe(sub, TakeOptions(Family.MESSAGE, create=True, native={"dead_letter_policy": {"x": 1}})),
                driver.subscribe(sub, TakeOptions(Family.MESSAGE, create=True, start="middle")),
            )
        ]

    assert on(bed, use) == [ErrorKind.INVALID] * 6
    assert bed.subscriptions(topic) == set()
