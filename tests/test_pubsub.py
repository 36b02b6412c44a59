"""The Pub/Sub driver: connecting, names, the catalogue, closing."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import threading
import time

import psutil
import pytest
from google.auth.credentials import AnonymousCredentials
from grpc import StatusCode
from pubsub_bed import Bed, driver, of, of_topic, on, pulled, run, taking, verdicts
from pubsub_standin import StandIn

from broker_nb import backends
from broker_nb.backends.driver import Effect, Kind, Outbound, Sent
from broker_nb.errors import BrokerError, ErrorKind, Unavailable
from broker_nb.testing.servers import OwnServer

PROJECT = "some-project"


@pytest.fixture(scope="module")
def bed(pubsub_url):
    return Bed(pubsub_url.split("/")[2])


@pytest.fixture
def standin():
    with StandIn() as server:
        yield server


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch, tmp_path):
    for name in ("PUBSUB_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")


def refused(kind, url, within=5.0, **profile):
    async def go():
        async with driver(url, **profile):
            raise AssertionError("connected")

    began = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        run(go())
    assert time.monotonic() - began < within
    assert caught.value.kind is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


async def why(call):
    with pytest.raises(BrokerError) as caught:
        await call
    assert "\n" not in str(caught.value)
    return caught.value


# ------------------------------------------------------------------ connecting
def test_nobody_listens(capfd):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        text = refused(ErrorKind.UNREACHABLE, f"pubsub://{address}/{PROJECT}")
    assert address in text
    assert "is the address right" in text
    assert capfd.readouterr() == ("", "")


def test_somebody_listens_and_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        refused(ErrorKind.UNREACHABLE, f"pubsub://127.0.0.1:{mute.getsockname()[1]}/{PROJECT}", timeout=1.5)


def test_host_that_does_not_resolve():
    refused(ErrorKind.UNREACHABLE, f"pubsub://no-such-host.invalid:8085/{PROJECT}", 6)


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("pubsub://127.0.0.1:8085", {}, "the project is missing; write pubsub://127.0.0.1:8085/PROJECT"),
        ("pubsub://a,b", {}, "write pubsub://PROJECT"),
        ("pubsub://ann@a", {}, "write pubsub://PROJECT"),
        ("pubsub://127.0.0.1:8085/a/b", {}, "write pubsub://PROJECT"),
        ("pubsub://127.0.0.1:8085/p", {"service_account_file": "x"}, "an emulator takes no option 'service_account_file'"),
        ("pubsub://a", {"emulator": "x"}, "no option 'emulator'; there are: api_endpoint, credentials, project"),
        ("pubsub://a", {"credentials": "text"}, "credentials is a str; give an object of google.auth"),
        ("pubsub://", {"credentials": AnonymousCredentials()}, "no project is named"),
    ],
)
def test_a_wrong_profile(url, options, says):
    assert says in refused(ErrorKind.INVALID, url, options=options)


def test_no_credentials():
    text = refused(ErrorKind.AUTH, f"pubsub://{PROJECT}")
    assert "default credentials" in text
    assert "service_account_file" in text


@pytest.mark.parametrize("content", [None, "", "{}", '{"type": "service_account", "private_key": "hunter2"}', "\0"])
def test_a_key_file_that_is_none(tmp_path, content):
    file = tmp_path / "key.json"
    if content is not None:
        file.write_text(content)
    text = refused(ErrorKind.AUTH, f"pubsub://{PROJECT}", options={"service_account_file": str(file)})
    assert str(file) in text
    assert "hunter2" not in text


def test_the_project_of_the_credentials(monkeypatch, tmp_path):
    """The project in the URL goes first, then the one that the credentials belong to."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    from broker_nb.backends.pubsub.client import Settings
    from broker_nb.portable.host import ConnectionHost

    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    key = rsa.generate_private_key(65537, 2048).private_bytes(*form).decode()
    content = {"type": "service_account", "private_key": key, "client_email": "a@example.com", "project_id": "of-key"}
    (file := tmp_path / "key.json").write_text(json.dumps(content | {"token_uri": "https://example.com/token"}))

    async def go():
        found = []
        for profile in ({}, {"hosts": ["of-url"]}, {"options": {"project": "of-option"}, "hosts": ["of-url"]}):
            options = {"service_account_file": str(file)} | profile.get("options", {})
            settings = Settings({**profile, "options": options}, ConnectionHost("test"))
            settings.log_in()
            found.append(settings.project)
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        settings = Settings({}, ConnectionHost("test"))
        settings.log_in()
        return [*found, settings.project]

    assert run(go()) == ["of-key", "of-url", "of-option", "of-key"]


def test_a_secure_channel_to_nobody():
    """With credentials, a channel to the service (or its `api_endpoint`) is made, and a dead one answers in time."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        options = {"credentials": AnonymousCredentials(), "api_endpoint": f"127.0.0.1:{held.getsockname()[1]}"}
        refused(ErrorKind.UNREACHABLE, f"pubsub://{PROJECT}", options=options)


def test_the_emulator_of_the_environment(bed, monkeypatch):
    monkeypatch.setenv("PUBSUB_EMULATOR_HOST", bed.url.split("/")[2])
    name = bed.topic()

    async def body(opened):
        assert [e.name async for e in opened.entities()] == [name]
        return opened.about

    assert on(f"pubsub://{bed.project}", body) == f"an emulator at {bed.url.split('/')[2]}, project {bed.project}"


def test_a_token_that_is_not_taken(standin):
    standin.guard = lambda method, request: (StatusCode.UNAUTHENTICATED, "Request had invalid authentication credentials.")
    text = refused(ErrorKind.AUTH, standin.url)
    assert "log in again" in text


def test_a_token_that_expires_meanwhile(standin):
    """One line; what is held stays held, and the connection goes on when there is a token again."""
    standin.topic("orders")
    standin.subscription("debug", "orders")
    standin.put("orders", b"1")

    async def body(opened):
        source = await opened.subscribe(of("orders", "debug"), taking())
        _, tokens = await pulled(source, 1)
        standin.guard = lambda method, request: (StatusCode.UNAUTHENTICATED, "token expired")
        (outcome,) = await source.settle(verdicts(tokens))
        assert outcome.error.kind is ErrorKind.AUTH
        error = await why(opened.facts(of_topic("orders")))
        assert (error.kind, "log in again" in str(error)) == (ErrorKind.AUTH, True)
        standin.guard = lambda method, request: None
        (outcome,) = await source.settle(verdicts(tokens))
        return outcome.error

    assert on(standin.url, body) is None


def test_credentials_that_are_looked_for_in_vain(monkeypatch):
    """A metadata server that does not answer."""
    monkeypatch.setattr("google.auth.default", lambda: time.sleep(1))
    assert "no credentials were found within 0.2 s" in refused(ErrorKind.AUTH, f"pubsub://{PROJECT}", 3, timeout=0.2)


def test_who_may_not_list_subscriptions_sees_topics(standin, caplog):
    standin.topic("orders")
    standin.guard = lambda m, r: (StatusCode.PERMISSION_DENIED, "no") if m == "ListSubscriptions" else None

    async def body(opened):
        return [e.name async for e in opened.entities()]

    with caplog.at_level(logging.WARNING, "broker_nb.pubsub"):
        assert on(standin.url, body) == ["orders"]
    assert "subscriptions are not in the list" in caplog.text


def test_who_may_not_list_topics_is_connected(standin):
    standin.guard = lambda m, request: (StatusCode.PERMISSION_DENIED, "User not authorized.") if m == "ListTopics" else None

    async def body(opened):
        return await why(anext(opened.entities()))

    assert on(standin.url, body).kind is ErrorKind.PERMISSION


# ------------------------------------------------------------------ catalogue
def test_entities(bed):
    one, two = bed.topic(), bed.topic()
    name = bed.subscription(one)
    bed.subscription(two, labels={"broker_nb": "look"})

    async def body(opened):
        found = [(e.kind, e.name, e.parent) async for e in opened.entities(one)]
        assert found == [(Kind.TOPIC, one, None), (Kind.SUBSCRIPTION, name, one)]
        everything = {e.name async for e in opened.entities()}
        assert {one, two, name} <= everything
        assert sum(e.parent == two for e in [e async for e in opened.entities()]) == 0, "ours for looking are left out"
        (line,) = await opened.summaries([of_topic(one)])
        assert (line.messages, line.partitions) == (None, 1)
        assert [b.waiting for b in await opened.backlog(of(one, name))] == [None]

    on(bed.url, body)


def test_facts_of_topics(bed):
    plain, kept = bed.topic(), bed.topic(message_retention_duration={"seconds": 86_400})

    async def body(opened):
        look = (await opened.facts(of_topic(plain))).look
        assert not look.possible
        assert "message_retention_duration" in look.reason
        facts = await opened.facts(of_topic(kept))
        assert facts.look.effects == {Effect.CREATES_SUBSCRIPTION}
        assert not facts.look.end_is_fixed
        assert facts.details["retention"] == "1 day, 0:00:00"

    on(bed.url, body)


def test_facts_of_subscriptions(bed):
    topic, dead = bed.topic(), bed.topic()
    name = bed.subscription(
        topic,
        ack_deadline_seconds=60,
        filter='attributes.kind = "a"',
        enable_exactly_once_delivery=True,
        enable_message_ordering=True,
        dead_letter_policy={"dead_letter_topic": bed.topic_path(dead), "max_delivery_attempts": 7},
    )
    pushed = bed.subscription(topic, push_config={"push_endpoint": "https://example.com/push"})

    async def body(opened):
        facts = await opened.facts(of(topic, name))
        assert (facts.lease.seconds, facts.lease.renewable, facts.lease.max_deliveries) == (60.0, True, 7)
        assert (facts.lease.return_counts, facts.ordered, facts.dead_letter.name) == (True, True, dead)
        assert facts.details["filter"] == 'attributes.kind = "a"'
        assert facts.details["exactly_once"] is True
        assert facts.members is None
        facts = await opened.facts(of(topic, pushed))
        assert not facts.families
        assert facts.details["delivered_to"] == "https://example.com/push"
        error = await why(opened.facts(of(dead, name)))
        assert (error.kind, f"is a subscription of {topic}, not of {dead}" in str(error)) == (ErrorKind.NOT_FOUND, True)
        error = await why(opened.facts(of(topic, "no/name")))
        assert error.kind is ErrorKind.INVALID

    on(bed.url, body)


def test_a_deleted_topic_and_names_of_another_project(bed):
    topic, other = bed.topic(), Bed(bed.url.split("/")[2])
    orphan = bed.subscription(topic)
    bed.publisher.delete_topic(topic=bed.topic_path(topic))
    far = other.topic_path(other.topic())

    async def body(opened):
        facts = await opened.facts(of(None, orphan))
        assert facts.details["topic"] == "_deleted-topic_"
        assert (await opened.facts(of_topic(far))).entity.name == far
        sender = await opened.sender(of_topic(far), {})
        (result,) = await sender.send([Outbound(b"1")])
        assert result.state is Sent.ACCEPTED

    on(bed.url, body)


def test_who_may_only_take_takes(standin):
    """With roles/pubsub.subscriber one may not read a subscription's settings: the least that the service allows is taken for them."""
    standin.topic("orders")
    standin.subscription("debug", "orders")
    standin.put("orders", b"1")
    standin.guard = lambda m, request: (StatusCode.PERMISSION_DENIED, "not authorized") if "Get" in m or "List" in m else None

    async def body(opened):
        facts = await opened.facts(of("orders", "debug"))
        assert facts.lease.seconds == 10
        assert "pubsub.subscriptions.get" in facts.details["unknown"]
        source = await opened.subscribe(of("orders", "debug"), taking())
        rows, _ = await pulled(source, 1)
        sender = await opened.sender(of_topic("orders"), {})
        assert (await sender.send([Outbound(b"2")]))[0].state is Sent.ACCEPTED
        return rows[0].message.data

    assert on(standin.url, body) == b"1"


def test_no_permission(standin):
    standin.topic("orders")
    standin.guard = lambda m, request: (StatusCode.PERMISSION_DENIED, "User not authorized") if m == "Publish" else None

    async def body(opened):
        sender = await opened.sender(of_topic("orders"), {})
        (result,) = await sender.send([Outbound(b"1")])
        return result

    result = on(standin.url, body)
    assert (result.state, result.error.kind) == (Sent.REFUSED, ErrorKind.PERMISSION)
    assert "orders" in str(result.error)


# ------------------------------------------------------------------ closing, and a server that goes
def test_nothing_is_left_after_close(bed):
    topic = bed.topic()
    bed.subscription(topic)

    async def go():
        before = {task.get_name() for task in asyncio.all_tasks()}
        async with driver(bed.url) as opened:
            source = await opened.subscribe(of(topic, bed.subscription(topic)), taking())
            assert await source.pull(10, 1 << 20, 0.05) is None  # its request is still open
            await why(opened.facts(of_topic("missing")))
            sender = await opened.sender(of_topic(topic), {})
            await sender.send([Outbound(b"1", b"k")])
            before_close = connections(bed)
        await opened.close()
        for call in (
            source.pull(1, 1, 0),
            sender.send([Outbound(b"2")]),
            opened.facts(of_topic(topic)),
            anext(opened.entities()),
        ):
            assert (await why(call)).kind is ErrorKind.CLOSED
        await source.close()
        await asyncio.sleep(0)
        assert {task.get_name() for task in asyncio.all_tasks()} == before
        return before_close

    gc.collect()
    threads, others = set(threading.enumerate()), connections(bed)
    assert run(go()) > others
    end = time.monotonic() + 5
    while (left := set(threading.enumerate()) - threads) or connections(bed) > others:
        assert time.monotonic() < end, left
        time.sleep(0.02)


def connections(bed):
    """Of this process to the server."""
    port = int(bed.url.split("/")[2].split(":")[1])
    return sum(bool(c.raddr) and c.raddr.port == port for c in psutil.Process().net_connections("tcp"))


def test_a_server_that_stops_dies_and_comes_back():
    with OwnServer("pubsub") as server:
        bed = Bed(server.address)
        topic = bed.topic()
        name = bed.subscription(topic)

        async def body(opened):
            source = await opened.subscribe(of(topic, name), taking())
            sender = await opened.sender(of_topic(topic), {})
            os.kill(server.pid, signal.SIGSTOP)
            began = time.monotonic()
            (result,) = await sender.send([Outbound(b"1", b"k")])
            assert result.state is Sent.UNKNOWN
            assert (await why(opened.facts(of_topic(topic)))).kind is ErrorKind.TIMEOUT
            assert time.monotonic() - began < 5
            os.kill(server.pid, signal.SIGCONT)
            server.kill()
            began = time.monotonic()
            error = await why(opened.facts(of_topic(topic)))
            assert error.retryable
            (result,) = await sender.send([Outbound(b"3")])
            assert result.state is Sent.REFUSED
            error = await why(pulls(source))
            assert error.kind in (ErrorKind.UNREACHABLE, ErrorKind.TRANSIENT)
            assert time.monotonic() - began < 5
            server.start()
            Bed(server.address, bed.project).topic(topic)
            await until_it_works(lambda: opened.facts(of_topic(topic)), 10)

        on(bed.url, body, timeout=1.0)


async def until_it_works(call, seconds):
    """Only retryable errors come meanwhile."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(Unavailable):
            return await call()
        await asyncio.sleep(0.05)
    raise AssertionError("not in time")


async def pulls(source):
    while True:
        await source.pull(1, 1 << 20, 0.2)


# ------------------------------------------------------------------ the scheme table
@pytest.mark.parametrize("gone", ["google", "google.pubsub_v1"])
def test_without_the_client_there_is_a_line_that_installs_it(monkeypatch, gone):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {gone!r}", name=gone)

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    with pytest.raises(BrokerError, match=r'pip install "broker-nb\[pubsub\]"'):
        backends.load("pubsub")


@pytest.mark.parametrize("gone", ["googleapiclient", "google.pubsub_v1.types.odd", "goo"])
def test_another_missing_module_is_not_hidden(monkeypatch, gone):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {gone!r}", name=gone)

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=gone):
        backends.load("pubsub")


def test_a_namespace_that_is_not_there():
    assert not backends._is_there("no_such_namespace.client")
