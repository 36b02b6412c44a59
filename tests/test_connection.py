"""The verbs as a person calls them, on the broker in memory: two faces, interrupts, leases in frames, every line of refusal."""

import _thread
import asyncio
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid

import pandas as pd
import pytest

import broker_nb
from broker_nb import connection
from broker_nb.backends.driver import Outbound, Sent
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import OutboundMessage


@pytest.fixture
def broker():
    return InmemBroker.get(uuid.uuid4().hex)


@pytest.fixture
def conn(broker):
    with broker_nb.connect(f"inmem://{broker.name}", name=broker.name) as opened:
        yield opened


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(connection, "captions", lines.append)
    return lines


def orders(broker, n=10, **topic):
    broker.create_topic("orders", **topic)
    broker.publish("orders", [Outbound(b'{"id":%d,"status":"%s"}' % (i, b"ok" if i % 3 else b"failed")) for i in range(n)])


def refused(text, kind=None):
    class Check:
        def __enter__(self):
            self.raises = pytest.raises(BrokerError, match=re.escape(text))
            self.info = self.raises.__enter__()
            return self.info

        def __exit__(self, *exc):
            result = self.raises.__exit__(*exc)
            assert "\n" not in str(self.info.value)
            if kind is not None:
                assert self.info.value.kind is kind
            return result

    return Check()


# ------------------------------------------------------------------ importing
def test_importing_is_light_and_loads_no_client_pandas_or_arrow():
    code = (
        "import sys, broker_nb; broker_nb.connect; "
        "print([m for m in ('pandas', 'pyarrow', 'numpy', 'duckdb', 'orjson', 'IPython', 'confluent_kafka') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_every_public_name_exists_and_unknown_ones_do_not():
    assert all(getattr(broker_nb, name) is not None for name in broker_nb.__all__)
    assert set(broker_nb._LAZY) <= set(broker_nb.__all__)
    assert set(broker_nb.__all__) <= set(dir(broker_nb))
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        broker_nb.nope  # noqa: B018 - the access is the test


# ------------------------------------------------------------------ connecting
def test_an_unknown_scheme_names_the_known_ones():
    with refused("inmem", ErrorKind.INVALID) as caught:
        broker_nb.connect("carrierpigeon://roof")
    assert "carrierpigeon" in str(caught.value)


def test_a_password_in_a_url_is_refused_and_never_repeated():
    with refused("a password in a cell is already in IPython's history") as caught:
        broker_nb.connect("kafka://user:hunter2@127.0.0.1:9092")
    assert "hunter2" not in str(caught.value)


def test_a_server_that_is_not_there_answers_within_five_seconds():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        broker_nb.connect(f"kafka://127.0.0.1:{port}")
    assert caught.value.kind is ErrorKind.UNREACHABLE
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert time.monotonic() - begin < 6


def test_a_missing_client_gives_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    for name in [m for m in sys.modules if m.startswith("broker_nb.backends.kafka")]:
        monkeypatch.delitem(sys.modules, name)
    with refused('pip install "broker-nb[kafka]"'):
        broker_nb.connect("kafka://127.0.0.1:1")


def test_the_same_name_replaces_and_closes_and_close_is_idempotent(broker):
    one = broker_nb.connect(f"inmem://{broker.name}", name="same")
    two = broker_nb.connect(f"inmem://{broker.name}", name="same")
    assert not one.is_open
    assert two in broker_nb.connections()
    assert one not in broker_nb.connections()
    two.close()
    two.close()
    assert two not in broker_nb.connections()
    with refused("same is closed; connect again", ErrorKind.CLOSED):
        two.sample("orders")


# ------------------------------------------------------------------ two faces
def test_the_awaited_methods_are_the_blocking_ones(conn, broker):
    orders(broker)

    async def cell():
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(conn.aio.sample("orders", "-5")) for _ in range(4)]
        return [t.result() for t in tasks]

    frames = asyncio.run(cell())
    pd.testing.assert_frame_equal(
        frames[0].drop(columns="ingestion_time"), conn.sample("orders", "-5").drop(columns="ingestion_time")
    )
    blocking = {n for n in dir(type(conn)) if not n.startswith("_")} - {"name", "url", "about", "is_open", "aio"}
    assert blocking <= {n for n in dir(type(conn.aio)) if not n.startswith("_")}


def test_an_interrupt_ends_a_blocked_consume_and_loses_nothing(conn, broker):
    broker.create_topic("orders")
    threading.Timer(0.3, _thread.interrupt_main).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        conn.consume("orders", "s", timeout=30)
    assert time.monotonic() - begin < 0.3 + 2  # 0.5 s on a machine that is not loaded
    broker.publish("orders", [Outbound(b"1"), Outbound(b"2")])
    assert len(conn.consume("orders", "s", n=2, timeout=5)) == 2


def test_iterators_and_publishers_can_be_used_from_any_loop(conn, broker):
    broker.create_topic("orders")

    async def cell():
        topic = await conn.aio.topic("orders")
        published = await topic.batch_publish(OutboundMessage(b"1", b"k", {"a": "x"}), OutboundMessage(b"2"))
        sub = await conn.aio.subscribe("orders", "s")
        first, second = await sub.next_message(5), await sub.next_message(5)
        await first.ack()
        await second.nack()
        again = await sub.next_message(5)
        nothing = await sub.next_message(0.05)
        return published, first, again, nothing

    published, first, again, nothing = asyncio.run(cell())
    assert [p.ok for p in published] == [True, True]
    assert (first.data, first.key, first.attributes.text("a")) == (b"1", b"k", "x")
    assert (again.data, again.delivery_count) == (b"2", 2)
    assert nothing is None


# ------------------------------------------------------------------ looking
def test_looking_changes_nothing_and_creates_nothing(conn, broker):
    orders(broker, subscriptions=["s"])
    before = conn.topics()
    conn.sample("orders", "..end")
    with refused("nope", ErrorKind.NOT_FOUND):
        conn.sample("nope")
    pd.testing.assert_frame_equal(before, conn.topics())
    assert list(broker.topics) == ["orders"]
    assert list(broker.topic("orders").subscriptions) == ["s"]


@pytest.mark.parametrize("text", ["abc", "@25:99", "40..12", "-0", "@22:10:22:20"])
def test_a_malformed_range_is_named_with_examples(conn, broker, text):
    orders(broker)
    with refused(text, ErrorKind.INVALID):
        conn.sample("orders", text)
    assert len(conn.sample("orders", "-1")) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"decode": "xml"}, "decode"),
        ({"as_": "excel"}, "as_"),
        ({"isolation": "dirty"}, "isolation='dirty'"),
        ({"allow": ["magic"]}, "allow='magic'"),
        ({"where": "value_status ="}, "where"),
        ({"where": "nope = 1"}, "nope"),
        ({"partitions": [9]}, "no partition 9"),
    ],
)
def test_bad_options_are_one_line_and_the_connection_goes_on(conn, broker, options, text):
    orders(broker)
    with refused(text):
        conn.sample("orders", "-3", **options)
    assert len(conn.sample("orders", "-3")) == 3


def test_a_limit_cuts_and_says_so(conn, broker, said):
    orders(broker, 100)
    frame = conn.sample("orders", "..end", limit=7)
    assert len(frame) == 7
    assert frame.attrs["complete"] is False
    assert "INCOMPLETE (limit of 7 messages)" in said[-1]
    frame = conn.sample("orders", "-50", limit=7)
    assert (len(frame), frame.attrs["complete"]) == (7, False)
    assert conn.sample("orders", "..end", limit=100).attrs["complete"] is True


def test_a_byte_limit_cuts_between_fetches_and_says_so(conn, broker, said):
    orders(broker, 40_000)
    frame = conn.sample("orders", "..end", max_bytes=1000)
    assert 0 < len(frame) < 40_000
    assert frame.attrs["complete"] is False
    assert "INCOMPLETE (limit of 1,000 bytes)" in said[-1]


def test_a_caption_is_said_once_per_read(conn, broker, said):
    orders(broker)
    conn.sample("orders", "-3", where="value_status = 'failed'")
    assert len(said) == 1
    assert said[0].startswith("sample orders -3 | complete | ")


# ------------------------------------------------------------------ leases in frames
def test_the_lease_column_survives_what_people_do(conn, broker, said):
    orders(broker, 9)
    held = conn.consume("orders", "s", n=9)
    buffer = io.StringIO(held.sort_values("value_id", ascending=False).reset_index(drop=True).to_csv(index=False))
    result = conn.ack(pd.read_csv(buffer))
    assert result.ok
    assert result.frame.outcome.tolist() == ["acked"] * 9
    assert len(conn.held()) == 0
    result = conn.nack(held)
    assert (result.ok, set(result.frame.outcome)) == (True, {"already"})
    assert "0 back now, 9 already settled (ack won at " in said[-1]


def test_duplicates_collapse_and_are_told(conn, broker, said):
    orders(broker, 3)
    held = conn.consume("orders", "s", n=3)
    conn.ack(pd.concat([held, held, held.head(1)]))
    assert "3 acked" in said[-1]
    assert "7 rows name 3 leases" in said[-1]


@pytest.mark.parametrize("verb", ["ack", "nack", "reject", "release", "commit"])
def test_frames_without_their_lease_are_refused_and_nothing_is_settled(conn, broker, verb):
    orders(broker, 3)
    held = conn.consume("orders", "s", n=3)
    settle = getattr(conn, verb)
    with refused(f"{verb}: this frame has no 'lease' column; keep it, or pass conn.held()"):
        settle(held[["value_status"]])
    with refused(f"{verb}: leases 0000-* belong to another session"):
        settle(held.assign(lease="0000-00001"))
    with refused("is no lease"):
        settle(held.assign(lease=[held.lease[0], None, "x"]))
    with refused(f"{verb}: a frame with a lease column is needed, not str"):
        settle("held")
    assert len(conn.held()) == 3


def test_an_expired_lease_is_lost_by_name_and_the_new_delivery_is_untouched(conn, broker, said):
    orders(broker, 1, ack_deadline=30.0)
    held = conn.consume("orders", "s", n=1)
    broker.advance(31)
    again = conn.consume("orders", "s", n=1)
    assert again.lease[0] != held.lease[0]
    assert again.delivery_count[0] == 2
    result = conn.ack(held)
    assert result.frame.outcome.tolist() == ["lost"]
    assert held.lease[0] in said[-1]
    assert conn.ack(again).frame.outcome.tolist() == ["acked"]


def test_a_rejected_row_goes_to_the_dead_letters_with_the_reason(conn, broker, said):
    broker.create_topic("orders.dlq")
    orders(broker, 4, max_deliveries=1, dead_letter="orders.dlq")
    held = conn.consume("orders", "s", n=4)
    result = conn.reject(held[:3], reason="total < 0 ❌")  # meant, so that the last delivery does not ask again
    assert result.ok
    assert result.frame.outcome.tolist() == ["rejected"] * 3
    assert said[-1] == "reject orders/s | 3 rejected to orders.dlq | 1 still held (%broker held)"
    dead = conn.sample("orders.dlq", "+10", attributes=["error.message"])
    assert dead["attr_error_message"].tolist() == ["total < 0 ❌"] * 3
    assert dead.data.tolist() == held.data[:3].tolist()
    assert conn.reject(held).frame.outcome.tolist() == ["already"] * 3 + ["rejected"]
    conn.reject(all=True)
    assert said[-1] == "reject nothing held | 0 rejected"


def test_where_there_are_no_dead_letters_a_rejected_row_stays_held(conn, broker, said):
    orders(broker, 2)
    result = conn.reject(conn.consume("orders", "s", n=2), reason="unreadable")
    assert not result.ok
    assert result.frame.outcome.tolist() == ["refused"] * 2
    assert "orders has no dead-letter topic to reject to; release the row, or ack it" in said[-1]
    assert "0 rejected, 2 refused by the broker" in said[-1]
    assert asyncio.run(conn.aio.release()).ok


def test_settling_needs_a_frame_or_all(conn, broker):
    orders(broker, 4)
    conn.consume("orders", "s", n=4)
    with refused("ack: name a frame with a lease column, or say all=True"):
        conn.ack()
    with refused("not both"):
        conn.ack(conn.held(), all=True)
    assert "4 acked" in repr(conn.ack(all=True))
    assert "0 acked" in repr(conn.ack(all=True))


def test_closing_gives_back_and_a_lease_of_a_closed_connection_is_foreign(broker):
    orders(broker, 2)
    with broker_nb.connect(f"inmem://{broker.name}", name="first") as first:
        held = first.consume("orders", "s", n=2)
    with broker_nb.connect(f"inmem://{broker.name}", name="second") as second:
        assert len(second.consume("orders", "s", n=2, timeout=5)) == 2
        with refused("belong to another session"):
            second.ack(held)


def test_a_release_that_would_be_the_last_delivery_asks_first(conn, broker):
    broker.create_topic("orders.dlq")
    orders(broker, 1, max_deliveries=2, dead_letter="orders.dlq")
    conn.nack(conn.consume("orders", "s", n=1))
    held = conn.consume("orders", "s", n=1)
    assert held.delivery_count[0] == 2
    with refused("at delivery 2 of 2"):
        conn.nack(held)
    with refused("say final=True"):
        conn.release()
    assert conn.release(final=True).ok


def test_an_empty_consume_is_a_frame_and_a_missing_subscription_a_hint(conn, broker, said):
    broker.create_topic("orders")
    frame = conn.consume("orders", "s", timeout=0.05)
    assert len(frame) == 0
    assert "lease" in frame
    assert "0 of 100 within 0.05 s" in said[-1]
    with refused("name a subscription"):
        conn.consume("orders")
    with refused("n=0"):
        conn.consume("orders", "s", n=0)


# ------------------------------------------------------------------ logs
def test_a_log_is_committed_by_prefix_and_refuses_acks(conn, broker, said):
    broker.create_topic("orders", families=[broker_nb.backends.driver.Family.RECORD])
    broker.publish("orders", [Outbound(b'{"ok":%s}' % (b"false" if i == 3 else b"true")) for i in range(6)])
    read = conn.consume("orders", "billing", n=6)
    with refused("this is a log: commit works per partition, up to a position"):
        conn.ack(read)
    with refused(
        "reject orders/billing: this is a log: commit works per partition, up to a position; conn.publish(frame, to=...)"
    ):
        conn.reject(read)
    result = conn.commit(read[read.value_ok])
    assert result.frame.committed.tolist() == [2]
    assert "orders[0]: committed to 2; 3 not in the selection, 2 after it wait" in said[-1]
    assert conn.held().offset.tolist() == [3]
    conn.release()
    assert conn.consume("orders", "billing", n=6, timeout=1).offset.tolist() == [3, 4, 5]


# ------------------------------------------------------------------ publishing
def test_publishing_a_frame_keeps_bytes_keys_and_attributes(conn, broker):
    broker.create_topic("a")
    broker.create_topic("b")
    rows = [
        Outbound(b"\xff", b"", [broker_nb.Attribute("t", b"1"), broker_nb.Attribute("t", None)]),
        Outbound(None, b"\x80"),
        Outbound(b"", None),
    ]
    broker.publish("a", rows)
    published = conn.publish(conn.sample("a", "..end"), to="b")
    assert published.ok
    assert published.frame.state.tolist() == ["accepted"] * 3
    one, two = (conn.sample(t, "..end")[["key", "data", "attributes"]] for t in "ab")
    pd.testing.assert_frame_equal(one, two)


def test_a_dry_run_sends_nothing_and_a_read_only_connection_neither(broker):
    orders(broker, 2)
    with broker_nb.connect(f"inmem://{broker.name}", name="ro", read_only=True) as conn:
        frame = conn.sample("orders", "..end")
        assert "DRY RUN | 2 messages" in repr(conn.publish(frame, to="orders", dry_run=True))
        with refused("ro is read-only: nothing was sent to orders", ErrorKind.PERMISSION):
            conn.publish(frame, to="orders")
        assert len(conn.sample("orders", "..end")) == 2


def test_what_was_not_sent_is_told_row_by_row(conn, broker):
    broker.create_topic("orders")
    broker.fail_next("send", Sent.UNKNOWN)
    published = conn.publish(
        [OutboundMessage(b"1", b"k"), OutboundMessage(b"2", b"k"), OutboundMessage(b"3", b"other")], to="orders"
    )
    assert not published.ok
    assert published.frame.state.tolist() == ["unknown", "refused", "accepted"]


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (pd.DataFrame({"data": []}), "no rows"),
        (pd.DataFrame({"x": [1]}), "no column 'data'"),
        ([], "the list is empty"),
        ("text", "not str"),
        ([1], "row 0 is a int"),
    ],
)
def test_what_cannot_be_published_is_one_line(conn, broker, frame, text):
    broker.create_topic("orders")
    with refused(text):
        conn.publish(frame, to="orders")
    with refused("nope", ErrorKind.NOT_FOUND):
        conn.publish([OutboundMessage(b"x")], to="nope")
    assert list(broker.topics) == ["orders"]


def test_a_process_that_ends_gives_back_what_it_holds():
    code = (
        "import broker_nb; from broker_nb.backends.inmem.broker import InmemBroker; from broker_nb.backends.driver import Outbound\n"
        "b = InmemBroker.get('x'); b.create_topic('t'); b.publish('t', [Outbound(b'1')]); c = broker_nb.connect('inmem://x')\n"
        "import atexit; c.consume('t', 's', n=1)\n"
        "import logging, sys; logging.basicConfig(stream=sys.stdout, level='INFO')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 0
    assert "1 held messages were given back" in done.stdout
    assert done.stderr == ""
