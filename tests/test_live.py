"""The live view without a browser: what is pulled, told, asked and given back, on the broker in memory."""

import asyncio
import json
import re
import time
import uuid

import pytest
from kafka_bed import Bed

import broker_nb
from broker_nb import connection
from broker_nb.backends.driver import Event, Family, Outbound
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.loop import shared_loop
from broker_nb.widgets import feeds
from broker_nb.widgets import model as live_model
from broker_nb.widgets.rows import fields, preview
from broker_nb.widgets.view import LiveView


@pytest.fixture
def broker():
    return InmemBroker.get(uuid.uuid4().hex)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(feeds, "PULL_S", 0.05)  # closing waits for a pull to end


@pytest.fixture
def conn(broker):
    with broker_nb.connect(f"inmem://{broker.name}", name=broker.name) as opened:
        yield opened


class Page:
    """A page of a view: keeps what it is told, as live.js does."""

    def __init__(self, model, view="page-1"):
        self.model, self.view = model, view
        self.messages, self.replies, self.states, self.rows, self.bodies = [], {}, {}, {}, []
        self.req = 0
        model.send = self.hear
        self.say(type="ready", v=1, view=view)

    def hear(self, message, buffers):
        assert len(json.dumps(message)) < 30_000
        if self.messages:
            assert message["seq"] == self.messages[-1][1]["seq"] + 1
        self.messages.append((time.monotonic(), message))
        for row in message.get("rows", []):
            self.rows[row[0]], self.states[row[0]] = row, row[2]
        for row in message.get("states", []):
            self.states[row[0]] = row[2]
        for reply in message.get("replies", []):
            self.replies[reply["req"]] = reply
        if "body" in message:
            self.bodies.append((message["body"], buffers))

    def say(self, **message):
        shared_loop().loop.call_soon_threadsafe(self.model.receive, message)

    def ask(self, verb, rows, **more):
        """Press a button; the answer."""
        self.req += 1
        req = f"r{self.req}"
        self.say(**{"type": "ask", "req": req, "epoch": self.last["epoch"], "verb": verb, "rows": rows, **more})
        until(lambda: req in self.replies)
        return self.replies[req]

    @property
    def last(self):
        return self.messages[-1][1]

    def in_state(self, state):
        return [n for n, s in self.states.items() if s == state]


def until(condition, within=5.0):
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def opened(conn, *args, **kwargs):
    """The model of a view, as `conn.live` makes it; without a widget."""
    return shared_loop().run(connection.live(conn._session, *args, **kwargs))


def close(model):
    async def go():
        await model.close()

    shared_loop().run(go())


def fill(broker, n=5, topic="orders", **options):
    if topic not in broker.topics:
        broker.create_topic(topic, **options)
    broker.publish(topic, [Outbound(b'{"id":%d,"status":"ok"}' % i, b"k%d" % i) for i in range(n)])


def backlog(conn, subscription="s"):
    (line,) = shared_loop().run(conn._session.client.backlog("orders", subscription))
    return line


# ------------------------------------------------------------------ arriving
def test_nothing_is_taken_before_a_page_is_there(conn, broker):
    fill(broker)
    model = opened(conn, "orders", "s")
    time.sleep(0.2)
    assert backlog(conn).held == 0
    page = Page(model)
    until(lambda: len(page.in_state("held")) == 5)
    assert backlog(conn).held == 5
    snapshot = page.messages[0][1]
    assert (snapshot["type"], snapshot["topic"], snapshot["subscription"], snapshot["kind"]) == (
        "snapshot",
        "orders",
        "s",
        "queue",
    )
    assert snapshot["actions"] == ["ack", "nack", "delay", "reject", "release"]
    n, pos, state, why, expires, _, place, key, text, size, count, values = page.rows[1]
    assert (n, pos, state, why, place, key, text, size, count, values) == (
        1, 0, "held", "", "0@0", "k0", '{"id":0,"status":"ok"}', 22, 1, [],
    )  # fmt: skip
    assert 590 < (expires - page.last["now"]) / 1000 <= 600


def test_no_page_for_a_minute_pauses_it(conn, broker, monkeypatch):
    monkeypatch.setattr(live_model, "ABSENT_S", 0.3)
    fill(broker)
    model = opened(conn, "orders", "s")
    page = Page(model)
    until(lambda: len(page.in_state("held")) == 5)
    time.sleep(1.0)
    fill(broker)
    told = len(page.messages)
    time.sleep(0.7)
    assert backlog(conn).held == 5  # what is held stays
    assert len(page.messages) == told
    page.say(type="beat", view=page.view)
    until(lambda: len(page.in_state("held")) == 10)


def test_max_held_and_pause(conn, broker):
    fill(broker, 8)
    model = opened(conn, "orders", "s", max_held=3)
    page = Page(model)
    until(lambda: page.messages and page.last["health"]["level"] == "full")
    assert backlog(conn).held == 3
    assert page.last["health"]["text"] == "3 held: settle some to get more"
    page.say(type="pause", on=True)
    until(lambda: page.last["health"]["level"] == "paused")
    assert page.ask("ack", [1, 2])["ok"]
    time.sleep(0.3)
    assert backlog(conn).held == 1
    page.say(type="pause", on=False)
    until(lambda: backlog(conn).held == 3)
    with pytest.raises(BrokerError, match="max_held=0: hold at least 1"):
        opened(conn, "orders", "t", max_held=0)


# ------------------------------------------------------------------ settling
def test_every_button(conn, broker):
    broker.create_topic("dead")
    fill(broker, 6, dead_letter="dead")
    page = Page(opened(conn, "orders", "s"))
    until(lambda: len(page.in_state("held")) == 6)
    assert page.ask("ack", [1])["ok"]
    assert page.ask("reject", [2])["ok"]
    assert page.ask("nack", [3], delay=60)["ok"]
    assert page.ask("nack", [4])["ok"]
    assert page.ask("release", [5])["ok"]
    assert page.messages[0][1]["dead"] == "dead"
    assert [page.states[n] for n in range(1, 7)] == ["acked", "rejected", "nacked", "nacked", "released", "held"]
    assert len(broker.topic("dead").logs[0].rows) == 1
    until(lambda: len(page.in_state("held")) == 3)  # two came again at once, as new rows
    again = [page.rows[n] for n in (7, 8)]
    assert [row[7] for row in again] == ["k3", "k4"]
    assert [row[10] for row in again] == [2, 2]
    until(lambda: page.last["counters"]["held"] == 3)
    assert {k: page.last["counters"][k] for k in ("seen", "acked", "nacked", "rejected", "released")} == {
        "seen": 8, "acked": 1, "nacked": 2, "rejected": 1, "released": 1,
    }  # fmt: skip
    broker.advance(61)
    until(lambda: 3 in [page.rows[n][10] for n in page.in_state("held")] or len(page.rows) > 8)


def test_many_at_once_and_the_first_settlement_wins(conn, broker):
    fill(broker, 300)
    page = Page(opened(conn, "orders", "s"))
    until(lambda: len(page.in_state("held")) == 300)
    assert page.ask("ack", list(range(1, 301)))["done"] == 300
    until(lambda: len(page.in_state("acked")) == 300)
    second = page.ask("nack", [1])
    assert not second["ok"]
    assert second["text"] == "nack: 1 of 1 not done: already acked"
    assert backlog(conn).held == 0


def test_two_pages_see_the_same_and_a_reload_too(conn, broker):
    fill(broker, 4)
    model = opened(conn, "orders", "s")
    first = Page(model)
    until(lambda: len(first.in_state("held")) == 4)
    assert first.ask("ack", [2])["ok"]
    reloaded = Page(model, "page-2")
    until(lambda: len(reloaded.rows) == 3)
    assert reloaded.messages[0][1]["view"] == "page-2"
    assert reloaded.messages[0][1]["ring"] == [1, 1]
    reloaded.say(type="want", lo=1, hi=1)  # the ring's rows come when they are looked at
    until(lambda: len(reloaded.rows) == 4)
    assert reloaded.states == first.states


def test_settled_by_a_cell(conn, broker):
    fill(broker, 3)
    model = opened(conn, "orders", "s")
    page = Page(model)
    until(lambda: len(page.in_state("held")) == 3)
    frame = LiveView(model, print).frame()
    assert list(frame["state"]) == ["held"] * 3
    assert conn.ack(frame[frame["key_text"] == "k1"]).ok
    model.send = page.hear
    until(lambda: page.states[2] == "acked")
    assert model.settled["acked"] == 1


def test_a_lease_that_ran_out(conn, broker):
    fill(broker, 2)
    page = Page(opened(conn, "orders", "s"))
    until(lambda: len(page.in_state("held")) == 2)
    broker.advance(31)
    until(lambda: len(page.in_state("lost")) == 2)
    until(lambda: len(page.in_state("held")) == 2)  # the new deliveries are new rows
    assert sorted(page.in_state("held")) == [3, 4]
    answer = page.ask("ack", [1])
    assert answer["text"] == "ack: 1 of 1 not done: already lost"
    assert [page.states[3], page.states[4]] == ["held", "held"]


def test_the_hold_is_over(conn, broker):
    fill(broker, 2)
    page = Page(opened(conn, "orders", "s", hold=0.5))
    until(lambda: len(page.in_state("held")) == 2)
    page.say(type="pause", on=True)
    until(lambda: len(page.in_state("released")) == 2)
    until(lambda: backlog(conn).held == 0)


def test_the_last_delivery_asks_first(conn, broker):
    broker.create_topic("dead")
    fill(broker, 1, dead_letter="dead", max_deliveries=1)
    page = Page(opened(conn, "orders", "s"))
    until(lambda: page.in_state("held"))
    answer = page.ask("nack", [1])
    assert answer["question"].endswith("are at delivery 1 of 1: giving them back dead-letters or drops them")
    until(lambda: page.states[1] == "held")
    assert page.ask("nack", [1], final=True)["ok"]
    assert len(broker.topic("dead").logs[0].rows) == 1


def test_a_broker_that_refuses_keeps_the_row(conn, broker):
    fill(broker, 1)
    model = opened(conn, "orders", "s")
    page = Page(model)
    until(lambda: page.in_state("held"))
    broker.fail_next("settle", BrokerError(ErrorKind.PERMISSION, "orders", "orders: not allowed to settle"))
    answer = page.ask("ack", [1])
    assert answer["text"] == "ack: 1 of 1 not done: orders: not allowed to settle"
    assert (page.states[1], model.rows.get(1).why) == ("held", "orders: not allowed to settle")
    assert page.ask("ack", [1])["ok"]


def test_rejecting_without_dead_letters_says_so(conn, broker):
    fill(broker, 1)
    page = Page(opened(conn, "orders", "s"))
    until(lambda: page.in_state("held"))
    assert page.messages[0][1]["dead"] == ""
    assert (
        page.ask("reject", [1])["text"]
        == "reject: 1 of 1 not done: orders/s: orders has no dead-letter topic to reject to; release the row, or ack it"
    )
    assert page.states[1] == "held"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"verb": "explode", "rows": [1]}, "explode cannot be done here"),
        ({"verb": "ack", "rows": [1], "epoch": "0"}, "this page shows an earlier view"),
        ({"verb": "nack", "rows": [1], "delay": -1}, "nack cannot be done here"),
        ({"verb": "ack", "rows": "all"}, "not understood"),
        ({"verb": "ack", "rows": [99]}, "ack: 1 of 1 not done: no longer in the view"),
    ],
)
def test_what_is_not_understood_is_answered(conn, broker, message, text):
    fill(broker, 1)
    page = Page(opened(conn, "orders", "s"))
    until(lambda: page.in_state("held"))
    answer = page.ask(**message)
    assert not answer["ok"]
    assert text in answer["text"]
    for nonsense in (None, [], {"type": "ask"}, {"type": "pause"}, {"type": "body", "row": "x", "req": 1}, {"type": "?"}):
        shared_loop().loop.call_soon_threadsafe(page.model.receive, nonsense)
    assert page.ask("ack", [1])["ok"]


# ------------------------------------------------------------------ trouble
def test_trouble_is_shown_and_passes(conn, broker):
    fill(broker, 1)
    broker.fail_next("pull", BrokerError(ErrorKind.UNREACHABLE, "orders", "orders: no answer", retryable=True), times=8)
    page = Page(opened(conn, "orders", "s"))
    until(
        lambda: (
            page.messages and page.last["health"] == {"level": "warn", "text": "orders: no answer", "notes": [], "paused": False}
        ),
        15,
    )
    until(lambda: page.in_state("held"), 15)
    until(lambda: page.last["health"]["level"] == "ok")


def test_a_failure_for_good_is_shown(conn, broker, monkeypatch):
    fill(broker, 1)
    broker.fail_next("pull", BrokerError(ErrorKind.PERMISSION, "orders", "orders: not allowed to read"))
    page = Page(opened(conn, "orders", "s"))
    until(lambda: page.messages and page.last["health"]["level"] == "error")
    assert page.last["health"]["text"] == "orders: not allowed to read"
    again = Page(opened(conn, "orders", "s"))  # opened again, it is tried again
    assert again.model is not page.model
    until(lambda: again.in_state("held"))


def test_a_row_whose_broker_is_gone_is_unknown(conn, broker):
    fill(broker, 2)
    page = Page(opened(conn, "orders", "s"))
    until(lambda: len(page.in_state("held")) == 2)
    broker.fail_next("pull", BrokerError(ErrorKind.PERMISSION, "orders", "orders: thrown out"))
    fill(broker, 1)
    until(lambda: page.last["health"]["level"] == "error")
    broker.fail_next("settle", BrokerError(ErrorKind.CLOSED, "orders", "orders: gone"))
    assert not page.ask("ack", [1])["ok"]
    assert page.states[1] == "unknown"
    assert page.model.rows.get(1).why == "orders: gone; it may come again"
    assert page.ask("ack", [2])["ok"]  # what can still be done can be done


def test_events_of_the_connection_are_shown(conn, broker):
    fill(broker, 1)
    page = Page(opened(conn, "orders", "s"))
    until(lambda: page.in_state("held"))
    host = conn._session.client.host
    host.emit(Event("reconnecting"))
    until(lambda: page.last["health"]["text"] == "the broker does not answer; trying again")
    host.emit(Event("reconnected"))
    until(lambda: page.last["health"]["level"] == "ok")
    close(page.model)
    assert page.model.on_event not in host._listeners
    assert conn._session.views == {}


def test_our_own_mistake_is_shown(conn, broker, monkeypatch):
    fill(broker, 1)
    model = opened(conn, "orders", "s")

    async def broken(room):
        raise ZeroDivisionError("x")

    monkeypatch.setattr(model._feed, "take", broken)
    page = Page(model)
    until(lambda: page.messages and page.last["health"]["text"] == "internal error: ZeroDivisionError: x")


# ------------------------------------------------------------------ the end
def test_closing_gives_back_and_leaves(conn, broker):
    fill(broker, 3)
    model = opened(conn, "orders", "s")
    lines = []
    model.on_end.append(lines.append)
    page = Page(model)
    until(lambda: len(page.in_state("held")) == 3)
    assert page.ask("ack", [1])["ok"]
    close(model)
    close(model)
    assert page.last["type"] == "bye"
    assert len(lines) == 1
    assert lines[0].endswith("UTC | 3 seen, 0 held, 1 acked, 2 released")
    assert not broker.topic("orders").subscriptions["s"].consumers
    assert len(conn.consume("orders", "s", n=2)) == 2


def test_closing_leaves_what_a_cell_holds(conn, broker):
    fill(broker, 3)
    held = conn.consume("orders", "s", n=1)
    page = Page(opened(conn, "orders", "s"))
    until(lambda: len(page.in_state("held")) == 2)
    close(page.model)
    assert len(conn.held()) == 1
    assert conn.ack(held).ok


def test_closing_the_connection_closes_its_views(broker):
    fill(broker, 3)
    conn = broker_nb.connect(f"inmem://{broker.name}")
    page = Page(opened(conn, "orders", "s"))
    until(lambda: len(page.in_state("held")) == 3)
    conn.close()
    assert page.last["type"] == "bye"
    assert not page.model.is_open
    with broker_nb.connect(f"inmem://{broker.name}") as again:
        assert len(again.consume("orders", "s", n=3)) == 3


def test_opened_twice_is_one_view(conn, broker):
    fill(broker, 3)
    model = opened(conn, "orders", "s", columns=["status"])
    assert opened(conn, "orders", "s", columns="status", max_held=2, hold="1m") is model
    assert model.max_held == 2
    assert conn._session.client.subscriptions["orders", "s"].hold == 60
    with pytest.raises(BrokerError, match=r"live orders/s is open with columns \['status'\]; view.close\(\) it first"):
        opened(conn, "orders", "s")
    close(model)
    assert opened(conn, "orders", "s") is not model
    with pytest.raises(BrokerError, match="nothing") as error:
        opened(conn, "nothing", "s")
    assert error.value.kind is ErrorKind.NOT_FOUND


# ------------------------------------------------------------------ a log
def test_a_log_has_one_button(conn, broker):
    fill(broker, 10, families=[Family.RECORD])
    page = Page(opened(conn, "orders", "group"))
    until(lambda: len(page.in_state("read")) == 10)
    assert page.messages[0][1]["actions"] == ["commit"]
    assert page.ask("commit", [4])["done"] == 4
    until(lambda: len(page.in_state("committed")) == 4)
    assert backlog(conn, "group").committed == (4,)
    assert not page.ask("ack", [5])["ok"]
    close(page.model)
    assert backlog(conn, "group").committed == (4,)
    assert list(conn.consume("orders", "group", n=6)["offset"]) == list(range(4, 10))


def test_a_commit_that_fails_and_is_tried_again(conn, broker):
    fill(broker, 5, families=[Family.RECORD])
    page = Page(opened(conn, "orders", "group"))
    until(lambda: len(page.in_state("read")) == 5)
    broker.fail_next("commit", BrokerError(ErrorKind.UNREACHABLE, "orders", "orders: no answer", retryable=True))
    assert "orders: no answer" in page.ask("commit", [3])["text"]
    assert page.in_state("committed") == []
    assert page.ask("commit", [3])["ok"]
    until(lambda: len(page.in_state("committed")) == 3)


def test_kafka_is_followed_without_effect_and_committed_up_to_a_row(kafka_url):
    bed = Bed(kafka_url)
    topic, group = bed.topic(partitions=2), f"g-{uuid.uuid4().hex[:8]}"
    bed.put(topic, b"old")
    with broker_nb.connect(kafka_url) as conn:
        before = bed.snapshot()
        tail = Page(opened(conn, topic))
        until(lambda: tail.messages and tail.last["health"]["level"] == "ok")
        assert bed.snapshot() == before
        bed.put(topic, *(b"new %d" % n for n in range(10)))
        until(lambda: len(tail.in_state("seen")) == 10)
        assert {row[8] for row in tail.rows.values()} == {f"new {n}" for n in range(10)}
        group_view = Page(opened(conn, topic, group))
        until(lambda: len(group_view.in_state("read")) == 11, 20)
        row = next(n for n, row in group_view.rows.items() if row[8] == "new 3")
        assert group_view.ask("commit", [row])["ok"]
        until(lambda: len(group_view.in_state("committed")) == 5)
        (line,) = [each for each in shared_loop().run(conn._session.client.backlog(topic, group)) if each.partition == 0]
        assert line.committed == (5,)
        close(group_view.model)
        again = conn.consume(topic, group, n=6)  # what was not committed is there again
        assert [bytes(data) for data in again["data"]] == [b"new %d" % n for n in range(4, 10)]


# ------------------------------------------------------------------ a tail
def test_a_tail_has_no_effect_and_no_buttons(conn, broker):
    fill(broker, 5, partitions=2)
    model = opened(conn, "orders")
    page = Page(model)
    until(lambda: page.messages)
    fill(broker, 3)
    until(lambda: len(page.in_state("seen")) == 3)
    assert page.messages[0][1]["actions"] == []
    assert "cannot be done here" in page.ask("ack", [1])["text"]
    assert not broker.topic("orders").subscriptions
    view = LiveView(model, print)
    frame = view.frame()
    assert "lease" not in frame
    assert list(frame["key_text"]) == ["k0", "k1", "k2"]
    assert frame.attrs["complete"] is True
    assert repr(view) == "live orders | open | 3 seen"


def test_a_tail_goes_on_after_trouble_and_tells_of_gaps(conn, broker):
    fill(broker, 5)
    page = Page(opened(conn, "orders"))
    until(lambda: page.messages and page.last["health"]["level"] == "ok")
    broker.fail_next("read", BrokerError(ErrorKind.UNREACHABLE, "orders", "orders: no answer", retryable=True), times=2)
    fill(broker, 3)
    until(lambda: len(page.in_state("seen")) == 3)
    page.say(type="pause", on=True)
    until(lambda: page.last["health"]["level"] == "paused")
    time.sleep(0.6)
    fill(broker, 4)
    broker.delete_records("orders", {0: 10})
    page.say(type="pause", on=False)
    until(lambda: len(page.in_state("seen")) == 5)
    until(lambda: page.last["health"]["notes"] == ["orders[0]: rows were gone before they were read"])


def test_a_flood_keeps_its_bounds(conn, broker):
    broker.create_topic("orders")
    model = opened(conn, "orders")
    page = Page(model)
    until(lambda: page.messages)
    began, first = time.monotonic(), len(page.messages)
    for _ in range(20):
        fill(broker, 1000)
        time.sleep(0.05)
    until(lambda: model.rows.added == 20_000)
    elapsed = time.monotonic() - began
    assert len(page.messages) - first <= 10 * elapsed + 2
    assert len(model.rows) == 10_000
    assert model.rows.dropped == 10_000
    until(lambda: page.last["ring"] == [10_001, 20_000])
    page.say(type="want", lo=10_001, hi=10_020)  # any row of the ring can be had
    until(lambda: set(range(10_001, 10_021)) <= set(page.rows))
    frame = LiveView(model, print).frame()
    assert len(frame) == 10_000
    assert frame.attrs["complete"] is False
    assert broker_nb.report(frame).why == "10,000 older rows have left the view"


# ------------------------------------------------------------------ one message
def test_many_long_texts_stay_within_a_message(conn, broker):
    broker.create_topic("orders")
    rows = [
        Outbound(b"\xe2\x80\x94" * 500, "\u2014".encode() * 200, [("n" * 5000, b"\\" * 5000, "str")] * 200) for _ in range(300)
    ]
    broker.publish("orders", rows)
    page = Page(opened(conn, "orders", "s"))  # which looks at every message's size
    until(lambda: len(page.in_state("held")) == 300)
    page.say(type="body", req="b", row=1)
    until(lambda: page.bodies)
    assert page.bodies[0][0]["attributes"][-1][0] == "\u2026 and 197 more"
    broker.fail_next("settle", BrokerError(ErrorKind.PERMISSION, "orders", "orders: " + "no" * 300))
    assert not page.ask("ack", list(range(1, 301)))["ok"]
    until(lambda: len(page.in_state("held")) == 300)


def test_a_row_that_cannot_be_read_does_not_end_the_view(conn, broker, monkeypatch):
    fill(broker, 2)
    model = opened(conn, "orders", "s", columns=["id"])
    broken = model._feed.take

    class Codec:
        def __init__(self, codec):
            self.codec = codec

        def size(self, row):
            return self.codec.size(row)

        def envelope(self, row):
            raise ZeroDivisionError("odd")

    async def take(room):
        return [each._replace(codec=Codec(each.codec)) for each in await broken(room)]

    monkeypatch.setattr(model._feed, "take", take)
    page = Page(model)
    until(lambda: len(page.in_state("held")) == 2)
    assert page.rows[1][8] == "cannot be shown: ZeroDivisionError: odd"
    page.say(type="body", req="b", row=1)
    until(lambda: "b" in page.replies)
    assert page.ask("ack", [1])["ok"]


def test_a_body_travels_beside_the_json(conn, broker):
    broker.create_topic("orders")
    broker.publish("orders", [Outbound(b"\x00\xff", b"\xfe", [("h", b"1", "bytes"), ("h", None, "")]), Outbound(None)])
    page = Page(opened(conn, "orders", "s"))
    until(lambda: len(page.in_state("held")) == 2)
    page.say(type="body", req="b", row=1)
    page.say(type="body", req="b", row=2)
    page.say(type="body", req="b", row=77)
    until(lambda: len(page.bodies) == 3)
    assert page.bodies[0] == (
        {"req": "b", "row": 1, "null": False, "size": 2, "key": "\\xfe", "attributes": [["h", "1", "bytes"], ["h", None, ""]]},
        [b"\x00\xff"],
    )
    assert page.bodies[1][0]["null"] is True
    assert page.bodies[2][0]["gone"] is True
    assert page.ask("ack", [1])["ok"]
    page.say(type="body", req="b", row=1)  # the view still has what it showed
    until(lambda: len(page.bodies) == 4)
    assert page.bodies[3][1] == [b"\x00\xff"]


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (None, None),
        (b"", ""),
        (b"plain\n  text\x1b[31m \xe2\x80\xaegnp", "plain text [31m gnp"),
        (b"\x80\x81", "80 81"),
        (b"a" * 200, "a" * 159 + "…"),
        ("é".encode() * 400, "é" * 159 + "…"),
        (b"x" + "é".encode() * 400, "x" + "é" * 158 + "…"),
    ],
)
def test_previews(data, shown):
    text = preview(data)
    assert (None if text is None else " ".join(text.split())) == shown


def test_fields():
    data = b'{"a":{"b":9007199254740993,"c":[1,2]},"d":"x","e.f":true}'
    assert fields(data, ["a.b", "a.c", "d", "e.f", "nothing", "d.x"]) == ["9007199254740993", "[1, 2]", "x", "true", None, None]
    for other in (None, b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a":"' + b"x" * 300_000 + b'"}'):
        assert fields(other, ["a"]) == [None]


# ------------------------------------------------------------------ the widget's side
def test_no_row_and_no_secret_is_in_a_trait(conn, broker):
    broker.create_topic("orders")
    broker.publish("orders", [Outbound(b"xxsecretxx", b"xxsecretxx")])
    model = opened(conn, "orders", "s")
    view = LiveView(model, print)
    page = Page(model)
    until(lambda: page.in_state("held"))
    state = view._widget.get_state()
    assert "xxsecretxx" not in str(state)
    assert "orders" not in str({k: v for k, v in state.items() if k not in ("_esm", "_css")})
    view._widget._handle_custom_msg({"type": "pause", "on": True}, [])
    until(lambda: page.last["health"]["level"] == "paused")
    view._widget._handle_custom_msg({"type": "pause", "on": False, "padding": "x" * 70_000}, [])
    view._widget._handle_custom_msg({"type": {1, 2}}, [])
    time.sleep(0.1)
    assert page.last["health"]["level"] == "paused"
    view.close()
    view.stop()
    assert not view.is_open
    assert re.fullmatch(r"live orders/s \| closed [\d:]+ UTC \| 1 seen, 0 held, 1 released", repr(view))


def test_outside_of_a_notebook(conn, broker):
    fill(broker)
    with pytest.raises(BrokerError, match="live: works in a notebook") as error:
        conn.live("orders", "s")
    assert error.value.kind is ErrorKind.UNSUPPORTED
    with pytest.raises(BrokerError, match="live: works in a notebook"):
        asyncio.run(conn.aio.live("orders", "s"))
    assert "s" not in broker.topic("orders").subscriptions
