"""The stand-in's own checks, by the vendor's clients: Python for behaviour, Go as a second judge of the wire."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import pathlib
import subprocess
import time
import uuid
from datetime import UTC, datetime, timedelta
from urllib.parse import quote_plus

import pytest
from azure.core.credentials import AzureSasCredential
from azure.core.exceptions import HttpResponseError, ResourceExistsError, ResourceNotFoundError
from azure.servicebus import NEXT_AVAILABLE_SESSION, ServiceBusMessage, exceptions
from azure.servicebus.aio import ServiceBusClient
from azure.servicebus.management import CorrelationRuleFilter, SqlRuleAction, SqlRuleFilter
from servicebus_bed import Bed
from test_servers import up

from broker_nb.testing import servers
from broker_nb.testing.servers.go import build_folder

pytestmark = pytest.mark.xdist_group("servicebus")


class Vendor:
    """The vendor's client, and what it opened, which is closed at the end all at once: each takes a second."""

    def __init__(self, url):
        self.bed = Bed(url)
        self.runner = asyncio.Runner()
        self.client = ServiceBusClient.from_connection_string(self.bed.connection_string, retry_total=0)
        self.opened = []

    def run(self, coroutine):
        return self.runner.run(asyncio.wait_for(coroutine, 30))

    def receiver(self, path, **options):
        topic, _, subscription = path.partition("/")
        made = (
            self.client.get_subscription_receiver(topic, subscription, **options)
            if subscription
            else self.client.get_queue_receiver(topic, **options)
        )
        self.opened.append(made)
        return made

    def sender(self, name):
        self.opened.append(made := self.client.get_queue_sender(name))
        return made

    async def send(self, name, *bodies, **given):
        await self.sender(name).send_messages([ServiceBusMessage(body, **given) for body in bodies])

    async def take(self, receiver, count=1, seconds=5.0):
        found, end = [], time.monotonic() + seconds
        while len(found) < count and (left := end - time.monotonic()) > 0:
            found += await receiver.receive_messages(count - len(found), left)
        return found

    def close(self):
        self.run(asyncio.wait([self.runner.get_loop().create_task(each.close()) for each in self.opened]))
        self.runner.close()


@pytest.fixture(scope="module")
def vendor(servicebus_url):
    made = Vendor(servicebus_url)
    yield made
    made.close()


def text(message):
    return b"".join(message.body).decode()


# ------------------------------------------------------------------ locks
def test_too_many_deliveries_and_a_reason_end_in_the_dead_letter_queue(vendor):
    queue = vendor.bed.queue(max_delivery_count=3)

    async def go():
        await vendor.send(queue, "poison", "bad", application_properties={"k": 7})
        receiver = vendor.receiver(queue)
        poison, bad = await vendor.take(receiver, 2)
        await receiver.dead_letter_message(bad, reason="why", error_description="because")
        counts = [poison.delivery_count]
        for _ in range(2):
            await receiver.abandon_message(poison)
            (poison,) = await vendor.take(receiver)
            counts.append(poison.delivery_count)
        await receiver.abandon_message(poison)
        dead = vendor.receiver(queue, sub_queue="deadletter")
        buried = {text(m): m for m in await vendor.take(dead, 2)}
        return counts, buried

    counts, buried = vendor.run(go())
    assert counts == [0, 1, 2]
    assert buried["poison"].dead_letter_reason == "MaxDeliveryCountExceeded"
    assert (buried["bad"].dead_letter_reason, buried["bad"].dead_letter_error_description) == ("why", "because")
    assert (buried["bad"].application_properties[b"k"], buried["bad"].dead_letter_source) == (7, queue)


def test_a_lock_that_ran_out_counts_and_the_order_stays(vendor):
    queue = vendor.bed.queue(lock_duration=1)

    async def go():
        await vendor.send(queue, "1", "2")
        receiver = vendor.receiver(queue)
        (first,) = await vendor.take(receiver)
        renewed = await receiver.renew_message_lock(first)
        vendor.bed.ask(expire=queue)
        with pytest.raises(exceptions.MessageLockLostError):
            await receiver.complete_message(first)
        with pytest.raises(exceptions.MessageLockLostError):
            await receiver.renew_message_lock(first)
        return renewed, await vendor.take(receiver, 2)

    renewed, again = vendor.run(go())
    assert abs((renewed - datetime.now(UTC)).total_seconds()) < 5
    assert [(text(m), m.delivery_count) for m in again] == [("1", 1), ("2", 0)]


def test_deferred_scheduled_cancelled(vendor):
    queue = vendor.bed.queue()

    async def go():
        sender, receiver = vendor.sender(queue), vendor.receiver(queue)
        at = datetime.now(UTC) + timedelta(seconds=3)
        numbers = await sender.schedule_messages([ServiceBusMessage("soon"), ServiceBusMessage("never")], at)
        await sender.cancel_scheduled_messages(numbers[1])
        with pytest.raises(exceptions.MessageNotFoundError):
            await sender.cancel_scheduled_messages(numbers[1])
        peeked = await receiver.peek_messages(10)
        began = time.monotonic()
        (soon,) = await vendor.take(receiver)
        waited = time.monotonic() - began
        await receiver.defer_message(soon)
        assert await vendor.take(receiver, seconds=0.3) == []
        (deferred,) = await receiver.receive_deferred_messages(soon.sequence_number)
        await receiver.complete_message(deferred)
        with pytest.raises(exceptions.MessageNotFoundError):
            await receiver.receive_deferred_messages(soon.sequence_number)
        return [(text(m), m.state.name) for m in peeked], waited, soon.sequence_number > numbers[0], deferred.state.name

    assert (found := vendor.run(go()))[0] == [("soon", "SCHEDULED")]
    assert 0.1 < found[1] < 4
    assert found[2:] == (True, "DEFERRED")


def test_what_expires_is_dropped_or_dead_lettered(vendor):
    dropping, burying = vendor.bed.queue(), vendor.bed.queue(dead_lettering_on_message_expiration=True)

    async def go():
        for queue in (dropping, burying):
            await vendor.send(queue, "short", time_to_live=timedelta(milliseconds=200))
        (dead,) = await vendor.take(vendor.receiver(burying, sub_queue="deadletter"))
        return dead.dead_letter_reason, await vendor.receiver(dropping).peek_messages(5)

    assert vendor.run(go()) == ("TTLExpiredException", [])


# ------------------------------------------------------------------ entities
def test_duplicates_are_dropped_without_telling(vendor):
    queue = vendor.bed.queue(requires_duplicate_detection=True)

    async def go():
        for body in ("first", "second"):
            await vendor.send(queue, body, message_id="same")
        await vendor.send(queue, "third", message_id="other")
        return [text(m) for m in await vendor.receiver(queue).peek_messages(5)]

    assert vendor.run(go()) == ["first", "third"]


def test_a_partitioned_queue_numbers_each_partition(vendor):
    queue = vendor.bed.queue(enable_partitioning=True)

    async def go():
        for key in ("a", "b", "c", "d"):
            await vendor.send(queue, key, key, partition_key=key)
        receiver = vendor.receiver(queue)
        peeked = [m for p in range(16) for m in await receiver.peek_messages(10, sequence_number=(p << 48) + 1)]
        return peeked, await vendor.take(receiver, 8)

    peeked, taken = vendor.run(go())
    places = {(m.sequence_number >> 48, m.sequence_number & (1 << 48) - 1): text(m) for m in peeked}
    assert len(places) == 8
    assert len({p for p, _ in places}) > 1
    assert all(places[p, n] == places[p, n + 1] for p, n in places if (p, n + 1) in places and n % 2)
    assert sorted(map(text, taken)) == ["a", "a", "b", "b", "c", "c", "d", "d"]


def test_a_message_that_is_too_large(vendor):
    queue = vendor.bed.queue(max_message_size_in_kilobytes=10)

    async def go():
        sender = vendor.sender(queue)
        with pytest.raises(exceptions.MessageSizeExceededError):
            await sender.send_messages(ServiceBusMessage(bytes(20_000)))
        await sender.send_messages(ServiceBusMessage(bytes(9_000)))
        return len(await vendor.receiver(queue).peek_messages(5))

    assert vendor.run(go()) == 1


def test_what_is_not_there_and_what_cannot_be_received_from(vendor):
    topic = vendor.bed.topic("s")

    async def go():
        for open_it in (
            vendor.sender("nothing").__aenter__,
            vendor.receiver("nothing").__aenter__,
            vendor.receiver(f"{topic}/x").__aenter__,
        ):
            with pytest.raises(exceptions.MessagingEntityNotFoundError):
                await open_it()
        with pytest.raises(exceptions.ServiceBusError, match="is a topic"):
            await vendor.receiver(topic).__aenter__()

    vendor.run(go())


def test_administration(vendor):
    admin, name = vendor.bed.administration, f"admin-{uuid.uuid4().hex}"
    made = admin.create_queue(name, lock_duration=timedelta(seconds=45), max_delivery_count=7, requires_session=True)
    assert (made.lock_duration, made.max_delivery_count, made.requires_session) == (timedelta(seconds=45), 7, True)
    assert admin.get_queue(name).default_message_time_to_live > timedelta(days=3650)
    assert name in {q.name for q in admin.list_queues()}
    with pytest.raises(ResourceExistsError):
        admin.create_queue(name)
    vendor.run(vendor.send(name, "x", session_id="s"))
    counts = admin.get_queue_runtime_properties(name)
    assert (counts.active_message_count, counts.total_message_count, counts.size_in_bytes > 0) == (1, 1, True)
    admin.delete_queue(name)
    with pytest.raises(ResourceNotFoundError):
        admin.get_queue(name)
    topic = vendor.bed.topic("a", "b")
    assert {s.name for s in admin.list_subscriptions(topic)} == {"a", "b"}
    admin.delete_subscription(topic, "a")
    assert admin.get_topic_runtime_properties(topic).subscription_count == 1
    assert admin.get_namespace_properties().name == "namespace"


# ------------------------------------------------------------------ rules
FILTERS = {
    "1=1": "abcd",
    "1=0": "",
    "n > 5": "b",
    "n >= 1 AND n + 1 < 10 OR color = 'red'": "abc",
    "NOT (color = 'red')": "b",
    "color <> 'red'": "b",
    "color IN ('blue', 'green')": "b",
    "color NOT IN ('blue')": "ac",
    "color LIKE 'r_d'": "ac",
    "color LIKE '%l%' AND size IS NULL": "b",
    "note LIKE '10!%' ESCAPE '!'": "d",
    "size IS NOT NULL": "c",
    "EXISTS(size)": "c",
    "size * 2 = 3 AND -size < 0": "c",
    "[a name] = 'it''s'": "d",
    "sys.Label = 'subject'": "a",
    "user.n % 2 = 1": "a",
    "n / 0 = 1": "",
    "color > 3": "",
    "TRUE = flag": "d",
}


def test_sql_filters(vendor):
    topic = vendor.bed.topic()
    names = {f"s{i}": sql for i, sql in enumerate(FILTERS)}
    for name, sql in names.items():
        vendor.bed.administration.create_subscription(topic, name)
        vendor.bed.administration.delete_rule(topic, name, "$Default")
        vendor.bed.administration.create_rule(topic, name, "only", filter=SqlRuleFilter(sql))

    async def go():
        await vendor.send(topic, "a", application_properties={"n": 1, "color": "red"}, subject="subject")
        await vendor.send(topic, "b", application_properties={"n": 8, "color": "blue"})
        await vendor.send(topic, "c", application_properties={"color": "red", "size": 1.5})
        await vendor.send(topic, "d", application_properties={"note": "10%", "a name": "it's", "flag": True})
        return {
            sql: "".join(text(m) for m in await vendor.receiver(f"{topic}/{name}").peek_messages(10))
            for name, sql in names.items()
        }

    assert vendor.run(go()) == FILTERS


def test_correlation_filters_and_actions(vendor):
    topic, admin = vendor.bed.topic("s", "copies"), vendor.bed.administration
    admin.delete_rule(topic, "s", "$Default")
    admin.create_rule(topic, "s", "only", filter=CorrelationRuleFilter(correlation_id="c", properties={"k": "v"}))
    admin.create_rule(topic, "copies", "mark", action=SqlRuleAction("SET marked = n + 1; REMOVE k"))
    assert {r.name for r in admin.list_rules(topic, "copies")} == {"$Default", "mark"}
    with pytest.raises(HttpResponseError, match="not understood"):
        admin.create_rule(topic, "s", "bad", filter=SqlRuleFilter("n >"))

    async def go():
        await vendor.send(topic, "yes", correlation_id="c", application_properties={"k": "v", "n": 1})
        await vendor.send(topic, "no", correlation_id="c", application_properties={"k": "w", "n": 1})
        found = await vendor.receiver(f"{topic}/s").peek_messages(5)
        copies = await vendor.receiver(f"{topic}/copies").peek_messages(5)
        return [text(m) for m in found], [(text(m), m.application_properties) for m in copies]

    only, copies = vendor.run(go())
    assert only == ["yes"]
    assert [body for body, _ in copies] == ["yes", "yes", "no", "no"]  # one by the rule with an action, one by the other
    assert copies[0][1] == {b"n": 1, b"marked": 2}
    assert copies[1][1] == {b"k": b"v", b"n": 1}


def test_rules_over_amqp(vendor):
    """As the vendor's clients in other languages have them; the Python one has the administration only."""
    topic = vendor.bed.topic("s")
    receiver = vendor.receiver(f"{topic}/s")

    async def ask(operation, body):
        def read(status, message, description, **_):
            return status, message.value, description

        return await receiver._mgmt_request_response_with_retry(b"com.microsoft:" + operation, body, read)

    async def go():
        rule = {"sql-filter": {"expression": "n > 1"}, "sql-rule-action": {"expression": "SET x = 1"}, "rule-name": "r"}
        codes = [(await ask(b"add-rule", {"rule-name": "r", "rule-description": rule}))[0] for _ in range(2)]
        bad = await ask(b"add-rule", {"rule-name": "b", "rule-description": {"sql-filter": {"expression": "n >"}}})
        listed = (await ask(b"enumerate-rules", {"skip": 0, "top": 10}))[1]
        removed = [(await ask(b"remove-rule", {"rule-name": "$Default"}))[0] for _ in range(2)]
        await vendor.send(topic, "small", application_properties={"n": 1})
        await vendor.send(topic, "large", application_properties={"n": 2})
        return (
            codes,
            bad[0],
            [each[b"rule-description"][2] for each in listed[b"rules"]],
            removed,
            await receiver.peek_messages(5),
        )

    codes, bad, listed, removed, found = vendor.run(go())
    assert (codes[0], codes[1] >= 400, bad >= 400, listed, removed) == (200, True, True, [b"$Default", b"r"], [200, 404])
    assert [(text(m), m.application_properties[b"x"]) for m in found] == [("large", 1)]


# ------------------------------------------------------------------ sessions
def test_sessions(vendor):
    queue = vendor.bed.queue(requires_session=True)

    async def go():
        for session, body in (("A", "a1"), ("B", "b1"), ("A", "a2")):
            await vendor.send(queue, body, session_id=session)
        with pytest.raises(exceptions.ServiceBusError, match="session id"):
            await vendor.send(queue, "none")
        with pytest.raises(exceptions.ServiceBusError, match="requires sessions"):
            await vendor.receiver(queue).__aenter__()
        listed = [session async for session in vendor.client.list_queue_sessions(queue)]
        mine = vendor.receiver(queue, session_id="A")
        taken = await vendor.take(mine, 2)
        await mine.session.set_state(b"state")
        state, renewed = await mine.session.get_state(), await mine.session.renew_lock()
        with pytest.raises(exceptions.SessionCannotBeLockedError):
            await vendor.receiver(queue, session_id="A").__aenter__()
        free = vendor.receiver(queue, session_id=NEXT_AVAILABLE_SESSION, max_wait_time=3)
        (other,) = await vendor.take(free)
        with pytest.raises(exceptions.OperationTimeoutError):
            await vendor.receiver(queue, session_id=NEXT_AVAILABLE_SESSION, max_wait_time=0.5).__aenter__()
        vendor.bed.ask(expire=queue)
        with pytest.raises(exceptions.SessionLockLostError):
            await mine.complete_message(taken[0])
        return listed, [text(m) for m in taken], state, renewed > datetime.now(UTC), free.session.session_id, text(other)

    assert vendor.run(go()) == (["A", "B"], ["a1", "a2"], b"state", True, "B", "b1")


# ------------------------------------------------------------------ access
CONFIG = {
    "queues": {"q": {}, "other": {}},
    "keys": {
        "root": {"key": "cm9vdA=="},
        "reader": {"key": "cmVhZA==", "rights": ["Listen"], "entities": ["q"]},
    },
    "tokens": {"a-token": {"rights": ["Listen"], "entities": ["q"]}, "brief": {"lasts_s": 0.5}},
}


@pytest.fixture(scope="module")
def guarded():
    with servers.OwnServer("servicebus", config=json.dumps(CONFIG)) as server:
        yield server


def signature(path, name, key, lasts):
    resource, expires = quote_plus(f"sb://127.0.0.1/{path}"), int(time.time() + lasts)
    sign = base64.b64encode(hmac.digest(key.encode(), f"{resource}\n{expires}".encode(), hashlib.sha256))
    return f"SharedAccessSignature sr={resource}&sig={quote_plus(sign)}&se={expires}&skn={name}"


async def opens(address, credential, name, *, write=False):
    """How opening ends."""
    if isinstance(credential, str):
        client = ServiceBusClient.from_connection_string(
            f"Endpoint=sb://{address};{credential};UseDevelopmentEmulator=true", retry_total=0
        )
    else:
        client = ServiceBusClient(address, credential, use_tls=False, retry_total=0)
    handle = client.get_queue_sender(name) if write else client.get_queue_receiver(name)
    try:
        await handle.__aenter__()
    except exceptions.ServiceBusError as error:
        return type(error).__name__.removeprefix("ServiceBus")
    finally:
        await handle.close()
    return "open"


def test_access(guarded):
    def key(name, secret):
        return f"SharedAccessKeyName={name};SharedAccessKey={secret}"

    async def go():
        at = guarded.address
        return await asyncio.gather(
            opens(at, key("root", "cm9vdA=="), "other"),
            opens(at, key("root", "d3Jvbmc="), "q"),
            opens(at, key("nobody", "cm9vdA=="), "q"),
            opens(at, key("reader", "cmVhZA=="), "q"),
            opens(at, key("reader", "cmVhZA=="), "other"),
            opens(at, key("reader", "cmVhZA=="), "q", write=True),
            opens(at, AzureSasCredential(signature("q", "root", "cm9vdA==", 60)), "q"),
            opens(at, AzureSasCredential(signature("q", "root", "cm9vdA==", 60)), "other"),
            opens(at, AzureSasCredential(signature("q", "root", "cm9vdA==", -60)), "q"),
        )

    found = asyncio.run(go())
    assert [found[0], found[3], found[6]] == ["open"] * 3
    assert all(end in ("AuthenticationError", "AuthorizationError") for i, end in enumerate(found) if i not in (0, 3, 6)), found


# ------------------------------------------------------------------ its process
def test_the_second_judge(vendor):
    judge = build_folder("servicebus_judge", pathlib.Path(__file__).with_name("servicebus_judge"))
    queue, sessions = vendor.bed.queue(), vendor.bed.queue(requires_session=True)
    said = subprocess.run([judge, vendor.bed.connection_string, queue, sessions], capture_output=True, text=True, timeout=90)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout) == {
        "peeked": ["complete", "abandon", "bury", "defer"],
        "taken": ["complete", "abandon", "bury", "defer"],
        "properties": {"n": 7, "at": "1970-01-01T00:00:01Z"},
        "renewed": True,
        "settled": [True] * 4,
        "again": "abandon",
        "count": 2,
        "deferred": ["defer"],
        "fetched": [True, True],
        "buried": ["bury", "why", "because"],
        "session": ["A", ["s"], True],
        "missing": True,
    }


def test_up_and_a_bad_configuration(tmp_path):
    program, url = up("servicebus")
    with contextlib.ExitStack() as stack:
        stack.callback(program.communicate, timeout=60)
        stack.callback(program.terminate)
        assert url.startswith("servicebus://127.0.0.1:")
        assert "UseDevelopmentEmulator=true&administration_port=" in url
        bed = Bed(url)
        bed.send(queue := bed.queue(), b"1")
        assert bed.ask()[queue][0] == [1, 0, 0, False]
    with pytest.raises(servers.ServerFailed, match=r"configuration is not JSON: .* line 1"):
        servers.OwnServer("servicebus", config="{", keep=tmp_path)


def test_no_compiler_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("BROKER_NB_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        servers.ServerMissing, match=r"install gcc, libssl-dev and .*; no gcc, python-qpid-proton==0.40.0 could not be"
    ):
        servers.OwnServer("servicebus")
