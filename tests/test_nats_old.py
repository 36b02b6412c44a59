"""NATS 2.9 accepts fields that it does not know and drops them without a word: here is what, beside a server that knows them."""

import asyncio
import json
import re
import time
import uuid

import nats
import pandas as pd
import pytest
from nats_bed import Bed, on

import broker_nb
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.testing.servers import OwnServer

STREAM = {"subjects": [], "retention": "limits", "storage": "file", "num_replicas": 1, "allow_direct": True}
CONSUMER = {"ack_policy": "explicit", "deliver_policy": "all", "replay_policy": "instant"}
NEWER_STREAM = {
    "metadata": {"owner": "me"},
    "compression": "s2",
    "first_seq": 10,
    "allow_msg_ttl": True,
    "allow_msg_schedules": True,
}
NEWER_CONSUMER = {
    "filter_subjects": ["kept.a", "kept.b"],
    "metadata": {"owner": "me"},
    "pause_until": "2099-01-01T00:00:00Z",
}


@pytest.fixture(scope="module", params=["nats@2.9", "nats"])
def server(request):
    with OwnServer(request.param) as server:
        yield server


class Raw:
    """The client without the parts of it that know which server knows what."""

    def __init__(self, connection):
        self.connection, self.js = connection, connection.jetstream()

    async def ask(self, subject, **body):
        answer = await self.connection.request(f"$JS.API.{subject}", json.dumps(body).encode(), timeout=10)
        return json.loads(answer.data)

    async def stream(self, name, **more):
        return await self.ask(f"STREAM.CREATE.{name}", **STREAM | {"name": name, "subjects": [f"{name}.>"]} | more)

    async def consumer(self, stream, name, action="create", **more):
        config = CONSUMER | {"name": name, "durable_name": name} | more
        return await self.ask(f"CONSUMER.CREATE.{stream}.{name}", stream_name=stream, config=config, action=action)

    async def answers(self, subject, seconds, **body):
        """What comes to one request within so many seconds, until a status says that it is over."""
        inbox = self.connection.new_inbox()
        subscription = await self.connection.subscribe(inbox)
        await self.connection.publish(f"$JS.API.{subject}", json.dumps(body).encode(), reply=inbox)
        found = []
        try:
            while not (found and (found[-1].headers or {}).get("Status")):
                found.append(await subscription.next_msg(seconds))
        except nats.errors.TimeoutError:
            pass  # nothing more comes: what is there is asserted
        await subscription.unsubscribe()
        return found


def run(server, work):
    async def with_connection():
        connection = await nats.connect(f"nats://{server.address}", allow_reconnect=False)
        try:
            return await work(Raw(connection))
        finally:
            await connection.close()

    return asyncio.run(with_connection())


def old(server):
    return server.name == "nats@2.9"


def test_fields_of_a_stream(server):
    async def work(raw):
        return await raw.stream("fields", **NEWER_STREAM)

    answer = run(server, work)
    assert "error" not in answer
    kept = {name for name in NEWER_STREAM if name in answer["config"]}
    assert kept == (set() if old(server) else {*NEWER_STREAM})


def test_fields_of_a_consumer_and_what_it_then_delivers(server):
    async def work(raw):
        await raw.stream("kept")
        made = await raw.consumer("kept", "filtered", **NEWER_CONSUMER)
        await raw.consumer("kept", "both", filter_subjects=["kept.a", "kept.b"])
        for subject in ("kept.a", "kept.c", "kept.b"):
            await raw.js.publish(subject, b"")
        pulled = await raw.js.pull_subscribe_bind("both", "kept")
        return made, [message.subject for message in await pulled.fetch(3, timeout=0.5)]

    made, delivered = run(server, work)
    assert "error" not in made
    assert {name for name in NEWER_CONSUMER if name in made["config"]} == (set() if old(server) else {*NEWER_CONSUMER})
    assert delivered == (["kept.a", "kept.c", "kept.b"] if old(server) else ["kept.a", "kept.b"])


def test_create_only_changes_the_consumer_that_is_there(server):
    async def work(raw):
        await raw.stream("made")
        first = await raw.consumer("made", "mine", max_deliver=3)
        again = await raw.consumer("made", "mine", max_deliver=7)
        now = await raw.ask("CONSUMER.INFO.made.mine")
        return first, again, now["config"]["max_deliver"]

    first, again, now = run(server, work)
    assert first["config"]["max_deliver"] == 3
    assert now == (7 if old(server) else 3)
    assert ("error" in again) is not old(server)


def test_a_batched_direct_get_brings_one_message_and_never_ends(server):
    async def work(raw):
        await raw.stream("read")
        for number in range(3):
            await raw.js.publish("read.it", b"%d" % number)
        return await raw.answers("DIRECT.GET.read", 0.5, seq=1, batch=3)

    found = run(server, work)
    assert [message.data for message in found] == ([b"0"] if old(server) else [b"0", b"1", b"2", b""])
    assert all(("Nats-Num-Pending" in message.headers) is not old(server) for message in found)
    assert found[-1].headers.get("Status") == (None if old(server) else "204")


def test_a_message_that_should_have_gone(server):
    async def work(raw):
        await raw.stream("ttl", allow_msg_ttl=True)
        await raw.js.publish("ttl.gone", b"", headers={"Nats-TTL": "1s"})
        until = time.monotonic() + (1.5 if old(server) else 15)
        left = 1
        while left and time.monotonic() < until:
            await asyncio.sleep(0.05)
            left = (await raw.ask("STREAM.INFO.ttl"))["state"]["messages"]
        return left

    assert run(server, work) == (1 if old(server) else 0)


# Our driver there


@pytest.fixture(scope="module")
def old_server():
    with OwnServer("nats@2.9") as server:
        yield server


@pytest.fixture
def stream(old_server):
    """A stream of three messages."""
    name = f"s-{uuid.uuid4().hex}"

    async def fill(raw):
        await raw.stream(name)
        for number in range(3):
            await raw.js.publish(f"{name}.{number}", b"%d" % number)

    run(old_server, fill)
    return name


@pytest.fixture
def conn(old_server):
    with broker_nb.connect(old_server.url, name="old") as conn:
        yield conn


def test_a_look_is_whole(conn, stream):
    for topic in (stream, f"{stream}.*"):
        frame = conn.sample(topic, "..end", decode="none")
        assert frame["data"].tolist() == [b"0", b"1", b"2"]
        assert frame.attrs["complete"] is True


def test_take_and_settle(conn, stream):
    held = conn.consume(stream, "mine", create=True, n=3)
    assert held["delivery_count"].tolist() == [1, 1, 1]
    assert conn.ack(held[:1]).ok
    assert conn.nack(held[1:2], delay=0.2).ok
    assert conn.reject(held[2:], reason="not a number").ok
    again = conn.consume(stream, "mine", n=3, timeout=1.5)
    assert again["data"].tolist() == [b"1"]
    assert again["delivery_count"].tolist() == [2]
    assert conn.ack(again).ok


@pytest.mark.parametrize(("setting", "value"), [*NEWER_CONSUMER.items()])
def test_a_newer_setting_of_a_consumer_is_refused_by_name(old_server, stream, setting, value):
    async def work(opened):
        with pytest.raises(BrokerError) as refused:
            await opened.source(stream, "mine", create=True, native={setting: value})
        return refused.value

    error = on(Bed(old_server.url), work)
    assert error.kind is ErrorKind.UNSUPPORTED
    assert re.fullmatch(rf"mine: {setting} needs nats-server 2\.1[01]; this is 2\.9\.25, which would ignore it", str(error))
    assert Bed(old_server.url).api(f"STREAM.INFO.{stream}")["state"]["consumer_count"] == 0


@pytest.mark.parametrize(
    ("header", "since"),
    [("Nats-TTL", "2.11"), ("Nats-Schedule", "2.12"), ("Nats-Incr", "2.12")],
)
def test_a_newer_header_is_refused_by_name(conn, stream, header, since):
    frame = pd.DataFrame({"data": [b"1"], "attributes": [{header: "1"}]})
    with pytest.raises(
        BrokerError, match=rf"attribute '{header}' needs nats-server {since}; this is 2\.9\.25, which would ignore"
    ):
        conn.publish(frame, to=f"{stream}.new")
    assert len(conn.sample(stream, "..end")) == 3
