import logging
import socket
import time

import pytest
from confluent_kafka import Producer
from kafka_bed import RECORDS, Bed, driver, group, look, run, topic

from broker_nb.backends.driver import COLUMNS, Kind, Outbound, Piece
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


# ------------------------------------------------------------------ connecting
def refused(kind, hosts, within, **profile):
    async def go():
        async with driver(hosts, **profile):
            raise AssertionError("connected")

    began = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        run(go())
    assert time.monotonic() - began < within
    assert caught.value.kind is kind
    return str(caught.value)


def test_nobody_listens():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        text = refused(ErrorKind.UNREACHABLE, address, 5)
    assert address in text
    assert "is the address right" in text


def test_somebody_listens_and_says_nothing(capfd):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        refused(ErrorKind.UNREACHABLE, f"127.0.0.1:{mute.getsockname()[1]}", 3, timeout=1.5)
    assert capfd.readouterr() == ("", "")


def test_host_that_does_not_resolve():
    refused(ErrorKind.UNREACHABLE, "no-such-host.invalid:9092", 5)


@pytest.mark.parametrize(
    "options", [{"security.protocol": "SSL"}, {"no.such.setting": "1"}, {"client.id": "a\udcff"}, {"a\0b": "1"}]
)
def test_wrong_settings(bed, options):
    kind = ErrorKind.UNREACHABLE if "security.protocol" in options else ErrorKind.INVALID
    refused(kind, bed.servers, 5, options=options, timeout=2)


def test_no_server_named():
    assert "kafka://host:port" in refused(ErrorKind.INVALID, "", 1)


def test_options_reach_every_handle(bed):
    name = bed.topic()

    async def body(opened):
        bounds = await opened.bounds(topic(name), True)
        browser = await opened.browse(topic(name), [Piece(0, bounds[0].low, bounds[0].end)], COLUMNS, True, frozenset())
        await browser.close()
        return opened.about

    assert "1 broker" in on(bed, body, options={"client.id": "me", "socket.keepalive.enable": "true"})


def test_the_client_logs_and_never_prints(bed, capfd, caplog):
    with socket.socket() as held, caplog.at_level(logging.DEBUG, "broker_nb.kafka"):
        held.bind(("127.0.0.1", 0))
        refused(ErrorKind.UNREACHABLE, f"127.0.0.1:{held.getsockname()[1]}", 5)
    assert "Connection refused" in caplog.text
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------ catalogue
def test_entities_and_summaries(bed):
    name, empty = bed.topic(2), bed.topic()
    bed.put(name, b"a", b"b", timestamp=1_700_000_000_000)
    bed.put(name, b"c", partition=1)
    member = bed.member("group-of-" + name)
    member.subscribe([name])
    assert len(member.consume(3, 15)) == 3
    member.commit(asynchronous=False)
    member.close()

    async def body(opened):
        found = [e async for e in opened.entities("t-*")]
        every = {e.name async for e in opened.entities()}
        return found, every, await opened.summaries([topic(name), topic(empty), topic("t-gone")])

    found, every, (full, nothing, gone) = on(bed, body)
    assert topic(name) in found
    assert group("group-of-" + name, name) in found
    assert [e.kind for e in found] == sorted((e.kind for e in found), key=lambda kind: kind is not Kind.TOPIC)
    assert "__consumer_offsets" not in every
    assert (full.partitions, full.messages, full.last_minute, full.oldest_ns) == (2, 3, 1, 1_700_000_000 * 10**9)
    assert time.time_ns() - full.newest_ns < 60 * 10**9
    assert (nothing.partitions, nothing.messages, nothing.oldest_ns, nothing.newest_ns) == (1, 0, None, None)
    assert (gone.partitions, gone.messages) == (0, None)


def test_facts_of_topic_and_group(bed):
    name = bed.topic(3, max_message_bytes=2000, message_timestamp_type="LogAppendTime")

    async def body(opened):
        return await opened.facts(topic(name)), await opened.facts(group("new-" + name, name))

    facts, fresh = on(bed, body)
    assert (facts.partitions, facts.max_message_bytes, facts.look.sorted_times) == ((0, 1, 2), 2000, True)
    assert not facts.look.effects
    assert facts.details["cleanup.policy"] == "delete"
    assert (fresh.partitions, fresh.members) == ((0, 1, 2), 0)
    assert "new-" + name not in bed.groups()


@pytest.mark.parametrize("call", ["facts", "group", "backlog", "bounds", "locate", "sender", "subscribe"])
def test_missing_topic_is_not_found_and_not_created(bed, call):
    name = f"missing-{time.time_ns()}"
    calls = {
        "facts": lambda d: d.facts(topic(name)),
        "group": lambda d: d.facts(group("g", name)),
        "backlog": lambda d: d.backlog(group("g", name)),
        "bounds": lambda d: d.bounds(topic(name), True),
        "locate": lambda d: d.locate(topic(name), {0: 0}),
        "sender": lambda d: d.sender(topic(name), {}),
        "subscribe": lambda d: d.subscribe(group("g-" + name, name), RECORDS),
    }

    async def body(opened):
        with pytest.raises(BrokerError, match=name) as caught:
            await calls[call](opened)
        return caught.value.kind

    assert on(bed, body) is (ErrorKind.TRANSIENT if call == "locate" else ErrorKind.NOT_FOUND)
    assert name not in bed.topics()
    assert "g-" + name not in bed.groups()


@pytest.mark.parametrize("name", ["", "a/b", "a b", "ü", "a\udcff", "a\0b", "x" * 250, ".."])
def test_names_that_would_crash_the_client(bed, name):
    async def body(opened):
        for call in (
            opened.facts(topic(name)),
            opened.bounds(topic(name), True),
            opened.locate(topic(name), {0: 0}),
            opened.browse(topic(name), [], COLUMNS, True, frozenset()),
            opened.sender(topic(name), {}),
            opened.summaries([topic(name)]),
        ):
            with pytest.raises(BrokerError) as caught:
                await call
            assert caught.value.kind is ErrorKind.INVALID

    on(bed, body)


@pytest.mark.parametrize("name", ["a\udcff", "a\0b"])
def test_group_names_that_would_crash_the_client(bed, name):
    of = bed.topic()

    async def body(opened):
        for call in (opened.facts(group(name, of)), opened.backlog(group(name, of)), opened.subscribe(group(name, of), RECORDS)):
            with pytest.raises(BrokerError) as caught:
                await call
            assert caught.value.kind is ErrorKind.INVALID

    on(bed, body)


def test_locate(bed):
    name = bed.topic(2)
    for ms in (1000, 2000, 3000):
        bed.put(name, b"x", timestamp=1_700_000_000_000 + ms)

    async def body(opened):
        at = 1_700_000_000 * 10**9
        return [
            (await opened.locate(topic(name), {0: at + ns, 1: at + ns}))
            for ns in (0, 2 * 10**9, 2 * 10**9 + 1, 10**12, -(10**30))
        ]

    assert [found[0] for found in on(bed, body)] == [(0,), (1,), (2,), None, (0,)]


def test_begin_is_not_there_yet(bed):
    async def body(opened):
        with pytest.raises(BrokerError) as caught:
            await opened.begin("run", 10)
        return caught.value.kind

    assert on(bed, body) is ErrorKind.UNSUPPORTED


def test_closed_connection(bed):
    name = bed.topic()

    async def body(opened):
        sender = await opened.sender(topic(name), {})
        await opened.close()
        await opened.close()
        for call in (opened.facts(topic(name)), opened.sender(topic(name), {}), sender.send([Outbound(b"x")])):
            with pytest.raises(BrokerError) as caught:
                await call
            assert caught.value.kind is ErrorKind.CLOSED

    on(bed, body)


def test_equal_keys_go_where_those_of_the_java_clients_go(bed):
    name = bed.topic(7)
    java = Producer(bed.common | {"partitioner": "murmur2"})
    for i in range(50):
        java.produce(name, b"theirs", key=b"key-%d" % i)
    assert java.flush(10) == 0

    async def body(opened):
        sender = await opened.sender(topic(name), {})
        await sender.send([Outbound(b"ours", b"key-%d" % i) for i in range(50)])
        return await look(opened, name)

    where = {}
    for row in on(bed, body).rows:
        where.setdefault(row.key, set()).add(row.partition)
    assert len(where) == 50
    assert all(len(partitions) == 1 for partitions in where.values())
