"""The live view's buttons on Service Bus (our stand-in) and Pub/Sub (Google's fake server), each seen at the server."""

import time

import pubsub_bed
import pytest
import servicebus_bed
from test_live import Page, close, opened, until

import broker_nb


@pytest.fixture
def bus(servicebus_url):
    bed = servicebus_bed.Bed(servicebus_url)
    hosts = f"//{bed.hosts[0]}" if bed.hosts else ""
    with broker_nb.connect(f"servicebus:{hosts}" if hosts else "servicebus", options=bed.options) as conn:
        yield bed, conn


def counts(bed, queue):
    now = bed.administration.get_queue_runtime_properties(queue)
    return now.active_message_count, now.dead_letter_message_count


def held(model, n):
    page = Page(model)
    until(lambda: len(page.in_state("held")) == n, 20)
    return page


def test_service_bus_buttons(bus):
    bed, conn = bus
    queue = bed.queue(max_delivery_count=5)
    bed.send(queue, *(b'{"id":%d}' % n for n in range(5)))
    page = held(opened(conn, queue, "queue", max_held=5), 5)
    assert page.messages[0][1]["actions"] == ["ack", "nack", "reject", "release"]
    first, second, third, fourth, fifth = page.in_state("held")
    assert page.ask("ack", [first])["ok"]
    until(lambda: counts(bed, queue) == (4, 0))
    assert page.ask("reject", [second])["ok"]
    until(lambda: counts(bed, queue) == (3, 1))
    assert page.ask("nack", [third])["ok"]
    assert page.ask("release", [fourth])["ok"]
    until(lambda: len(page.in_state("held")) == 3, 20)  # both came again, as new rows, beside the one that was left alone
    assert fifth in page.in_state("held")
    assert {page.states[n] for n in (third, fourth)} == {"nacked", "released"}
    assert counts(bed, queue) == (3, 1)
    close(page.model)
    again = conn.consume(queue, "queue", n=3, timeout=10)
    assert len(again) == 3
    assert conn.ack(again).ok
    assert counts(bed, queue) == (0, 1)


def test_service_bus_session(bus):
    bed, conn = bus
    queue = bed.queue(requires_session=True)
    bed.send(queue, b"1", b"2", session_id="a")
    page = held(opened(conn, queue, "queue/a"), 2)
    assert page.ask("ack", page.in_state("held"))["ok"]
    until(lambda: counts(bed, queue) == (0, 0))
    close(page.model)


@pytest.mark.parametrize("exactly_once", [False, True])
def test_pubsub_buttons(pubsub_url, exactly_once):
    bed = pubsub_bed.Bed(pubsub_url.split("/")[2])
    topic = bed.topic()
    name = bed.subscription(topic, ack_deadline_seconds=10, enable_exactly_once_delivery=exactly_once)
    bed.put(topic, *(b"%d" % n for n in range(4)))
    with broker_nb.connect(bed.url) as conn:
        page = held(opened(conn, topic, name, max_held=4), 4)
        assert page.messages[0][1]["actions"] == ["ack", "nack", "delay", "release"]
        first, second, third, fourth = page.in_state("held")
        assert page.ask("ack", [first])["ok"]
        assert page.ask("nack", [second])["ok"]
        assert page.ask("release", [third])["ok"]
        until(lambda: len(page.in_state("held")) == 3, 20)  # two of them came again
        began = time.monotonic()
        assert page.ask("nack", [fourth], delay=2)["ok"]
        until(lambda: len(page.in_state("held")) == 3, 20)
        assert time.monotonic() - began > 1.5
        assert page.ask("ack", page.in_state("held"))["ok"]
        assert not page.in_state("held")
        close(page.model)
    assert bed.pull(name) == []


def test_a_lock_that_is_gone(bus):
    bed, conn = bus
    if not bed.stand_in:
        pytest.skip("only the stand-in takes locks away when it is told to: unset BROKER_NB_TEST_SERVICEBUS")
    queue = bed.queue(max_delivery_count=5)
    bed.send(queue, b"1")
    page = held(opened(conn, queue, "queue", max_held=1), 1)
    (gone,) = page.in_state("held")
    bed.ask(expire=queue)
    assert not page.ask("ack", [gone])["ok"]
    assert page.states[gone] == "lost"
    until(lambda: len(page.in_state("held")) == 1, 20)  # the same message, as a new row
    assert counts(bed, queue) == (1, 0)
    assert page.ask("ack", page.in_state("held"))["ok"]
    until(lambda: counts(bed, queue) == (0, 0))
    close(page.model)
