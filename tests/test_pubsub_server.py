"""Google's fake Pub/Sub (pstest) as a test bed, and what it bends: each is left out of a test somewhere, for this reason."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import socket
import time

import pytest
from google.api_core.exceptions import GoogleAPICallError, MethodNotImplemented
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from pubsub_bed import Bed
from test_servers import gone, up

from broker_nb.testing import servers
from broker_nb.testing.servers.go import build_folder
from broker_nb.testing.servers.process import free_port

NOW = {"retry": None, "timeout": 5}


@pytest.fixture(scope="module")
def bed(pubsub_url):
    return Bed(pubsub_url.split("/")[2])


# ------------------------------------------------------------------ starting
def test_killed_and_started_again_on_its_port_without_its_data(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], free_port(), free_port(), expected := free_port(), free_port(), free_port()]
        monkeypatch.setattr(servers, "free_port", lambda: ports.pop(0))
        server = servers.OwnServer("pubsub")
    with server:
        assert server.url == f"pubsub://127.0.0.1:{expected}/broker-nb"
        Bed(server.address).topic()
        before = server.pid
        server.kill()
        assert gone(before)
        server.start()
        assert Bed(server.address).snapshot() == ([], [])
    assert gone(server.pid)
    assert not server.folder.exists()


def test_it_has_no_configuration():
    with pytest.raises(servers.ServerMissing, match="has no configuration"):
        servers.OwnServer("pubsub", config="x")


def test_sources_that_do_not_build_say_why(tmp_path):
    for name in ("go.mod", "go.sum"):
        (tmp_path / name).write_text("module example.com/broken\n" if name == "go.mod" else "")
    (tmp_path / "main.go").write_text("package main\n\nfunc main() { nonsense }\n")
    with pytest.raises(servers.ServerMissing, match=r"could not be built: .*nonsense"):
        build_folder("broken", tmp_path)


def test_up():
    program, url = up("pubsub", "--port", port := free_port())
    assert url == f"pubsub://127.0.0.1:{port}/broker-nb"
    assert Bed(f"127.0.0.1:{port}").snapshot() == ([], [])
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=60) == ("pubsub stopped\n", "")


def test_what_is_built_is_locked():
    folder = pathlib.Path(servers.__file__).parent / "pubsub"
    assert "cloud.google.com/go/pubsub/v2 v2.8.1 h1:" in (folder / "go.sum").read_text()
    assert len((folder / "main.go").read_text().splitlines()) < 20


# ------------------------------------------------------------------ what it bends; a newer one that does not is noticed here
def test_it_hands_out_one_message_per_key_at_a_time(bed):
    """So reading many of one key takes a round each: `test_order_per_key` has 50 s."""
    topic = bed.topic()
    name = bed.subscription(topic, enable_message_ordering=True)
    bed.put(topic, b"1", b"2", key="a")
    assert [m.message.data for m in bed.pull(name)] == [b"1"]


def test_it_delivers_in_random_order(bed):
    """As the service may: the suites sort by time what has no key ("order")."""
    topic = bed.topic()
    names = [bed.subscription(topic) for _ in range(3)]
    bodies = [b"%02d" % i for i in range(40)]
    bed.put(topic, *bodies)
    assert any([m.message.data for m in bed.pull(name)] != bodies for name in names)


def test_an_empty_pull_waits_half_a_second(bed):
    """The service waits longer, and wakes up: how long a request stays open is seen on the stand-in."""
    name = bed.subscription(bed.topic())
    began = time.monotonic()
    assert bed.pull(name) == []
    assert 0.4 < time.monotonic() - began < 3


def test_it_ignores_retry_policies(bed):
    """So nothing tests that a nack is answered only after `minimum_backoff`."""
    topic = bed.topic()
    policy = {"minimum_backoff": Duration(seconds=60), "maximum_backoff": Duration(seconds=60)}
    name = bed.subscription(topic, retry_policy=policy)
    bed.put(topic, b"1")
    (message,) = bed.pull(name)
    bed.nack(name, message.ack_id)
    assert len(bed.pull(name)) == 1


def test_subscriptions_share_the_attempt_counter_and_dead_letters_have_no_source(bed):
    """So tests of attempts have one subscription per topic, and none looks for where a dead letter came from."""
    dead, topic = bed.topic(), bed.topic()
    policy = {"dead_letter_topic": bed.topic_path(dead), "max_delivery_attempts": 5}
    names = [bed.subscription(topic, dead_letter_policy=policy) for _ in range(2)]
    buried = bed.subscription(dead)
    bed.put(topic, b"1")
    messages = [bed.pull(name)[0] for name in names]
    assert [message.delivery_attempt for message in messages] == [1, 2]
    for _ in range(3):
        bed.nack(names[1], messages[1].ack_id)
        messages = [*messages[:1], *bed.pull(names[1])]
    bed.nack(names[1], messages[1].ack_id)
    assert bed.pull(names[1]) == []
    assert [dict(found.message.attributes) for found in bed.pull(buried)] == [{}]


def test_its_ids_are_short_and_it_takes_empty_messages(bed):
    """The driver refuses an empty message itself: test_pubsub_write.py."""
    (message_id,) = bed.put(bed.topic(), b"")
    assert message_id.startswith("m")


def test_it_takes_leases_that_are_too_short(bed):
    """Ten seconds is the shortest of the service: the suites use five, to be quicker."""
    assert bed.subscription(bed.topic(), ack_deadline_seconds=1)


def test_it_takes_stale_and_unknown_ack_ids_also_with_exactly_once_delivery(bed):
    """So LOST, RETRY and REFUSED for single messages are seen on the stand-in: test_pubsub_exact.py."""
    topic = bed.topic()
    name = bed.subscription(topic, enable_exactly_once_delivery=True)
    path = bed.subscription_path(name)
    bed.subscriber.acknowledge(subscription=path, ack_ids=["nonsense"], **NOW)
    bed.subscriber.modify_ack_deadline(subscription=path, ack_ids=["nonsense"], ack_deadline_seconds=20, **NOW)


def test_it_knows_no_schemas(bed):
    """A request refused for one row's schema is seen on the stand-in: test_pubsub_write.py."""
    topic = bed.topic(schema_settings={"schema": f"projects/{bed.project}/schemas/none", "encoding": 1})
    assert bed.put(topic, b"not of the schema")


def test_it_has_no_snapshots(bed):
    """The driver uses none."""
    name = bed.subscription(bed.topic())
    with pytest.raises(MethodNotImplemented):
        bed.subscriber.create_snapshot(
            name=f"projects/{bed.project}/snapshots/snap", subscription=bed.subscription_path(name), **NOW
        )


def test_a_seek_back_crashes_it():
    """So looks, and subscriptions that begin at the earliest message, are on the stand-in: test_pubsub_look.py."""
    with servers.OwnServer("pubsub") as server:
        own = Bed(server.address)
        topic = own.topic()
        name = own.subscription(topic)
        own.put(topic, b"1")
        past = Timestamp(seconds=int(time.time()) - 60)
        with contextlib.suppress(GoogleAPICallError):  # its answer may come before its end
            own.subscriber.seek({"subscription": own.subscription_path(name), "time": past}, **NOW)
        end = time.monotonic() + 10
        while not gone(server.pid):
            assert time.monotonic() < end
            time.sleep(0.02)


def test_it_takes_no_request_above_4_mib(bed):
    """The service takes 10 MB: a large message is seen on the stand-in."""
    topic = bed.topic()
    with pytest.raises(GoogleAPICallError, match="larger than max"):
        bed.put(topic, bytes(5 << 20))
