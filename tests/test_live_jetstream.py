"""The live view on a real JetStream, in a real JupyterLab; what became of each message is asked of the server by another client."""

import asyncio
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import nats
import pytest
from nats_bed import Bed
from test_live_lab import View, click, notebook, ran, server, start  # noqa: F401 - two are fixtures

from broker_nb.testing.servers import OwnServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.xdist_group("lab")]


class Outside(Bed):
    """The server as others see it; from a thread, since the browser's driver has the main thread's loop."""

    def run(self, call):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(super().run, call).result(30)

    def pending(self, stream):
        """Messages that are delivered and not settled, and messages that the stream still has."""
        return self.consumer_info(stream, "debug")["num_ack_pending"], self.state(stream)["messages"]


class Watch:
    """Notes when the server counts one more message as acknowledged."""

    def __init__(self, url, stream):
        self.seen, self._end = [], threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch(url, stream)))

    async def _watch(self, url, stream):
        connection = await nats.connect(url)
        before = None
        while not self._end.is_set():
            answer = await connection.request(f"$JS.API.CONSUMER.INFO.{stream}.debug", timeout=5)
            info = json.loads(answer.data)
            if before is not None and info["num_ack_pending"] < before:
                self.seen += [time.time()] * (before - info["num_ack_pending"])
            before = info["num_ack_pending"]
            await asyncio.sleep(0.002)
        await connection.close()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join(10)


@pytest.fixture
def outside(nats_url):
    return Outside(nats_url)


def setup(outside, count, **config):
    stream = outside.stream(**config)
    outside.put(stream, *(json.dumps({"id": f"m{n}"}).encode() for n in range(count)))
    return stream, f"%load_ext broker_nb\nimport broker_nb, time\nconn = broker_nb.connect({outside.url!r})"


def test_every_button_reaches_jetstream(notebook, outside):  # noqa: F811 - a fixture
    stream, connect = setup(outside, 8, retention="workqueue")
    page = notebook(connect, f"view = %broker live {stream} --subscription debug --create --columns id", "view.close()")
    ran(page, 0)
    ran(page, 1)
    view = View(page.page)
    view.held(8)
    assert outside.pending(stream) == (8, 8)

    def press(name, action):
        view.rows("held").filter(has_text=name).locator(".bnb-tick input").click()
        view.press(action)

    press("m0", "ack")
    view.until(lambda: "1 acked" in view.facts)
    assert outside.pending(stream) == (7, 7)
    press("m1", "reject")
    view.until(lambda: "1 rejected" in view.facts)
    assert outside.pending(stream) == (6, 6)
    view.root.locator(".bnb-delay").select_option("300")
    press("m2", "delay")
    view.until(lambda: "1 nacked" in view.facts)
    view.held(5)
    press("m3", "nack")
    view.until(lambda: "2 nacked" in view.facts)
    press("m4", "release")
    view.until(lambda: "1 released" in view.facts)
    view.held(5)  # both came again
    assert outside.pending(stream) == (6, 6)
    assert outside.consumer_info(stream, "debug")["num_redelivered"] >= 2
    view.root.locator(".bnb-labels input").click()
    view.press("ack")
    view.until(lambda: "6 acked" in view.facts)
    assert outside.pending(stream) == (1, 1)  # the one that comes again in five minutes
    outside.put(stream, b'{"id":"late"}')
    view.held(1)
    ran(page, 2)
    info = outside.consumer_info(stream, "debug")  # what was held went back, and nobody waits for it any more
    assert (info["num_ack_pending"], outside.state(stream)["messages"]) == (2, 2)
    again = outside.run(lambda connection: taken(connection, stream))
    assert again == b'{"id":"late"}'


async def taken(connection, stream):
    """The next message of the consumer, by another client."""
    subscription = await connection.jetstream().pull_subscribe_bind("debug", stream)
    (message,) = await subscription.fetch(1, timeout=5)
    return message.data


def test_a_click_reaches_jetstream_while_a_cell_is_busy(notebook, outside):  # noqa: F811 - a fixture
    stream, connect = setup(outside, 14)
    page = notebook(connect, f"view = %broker live {stream} --subscription debug --create", "time.sleep(6)")
    ran(page, 0)
    ran(page, 1)
    view = View(page.page)
    view.held(14)
    took = {}
    for kernel in ("idle", "busy"):
        if kernel == "busy":
            start(page, 2)
            page.page.wait_for_timeout(700)
        with Watch(outside.url, stream) as watch:
            page.page.wait_for_timeout(300)
            clicked = []
            for n in range(5):
                clicked.append(click(view))
                view.until(lambda n=n: len(watch.seen) > n)
        took[kernel] = [f"{at - pressed:.3f} s" for pressed, at in zip(clicked, watch.seen, strict=True)]
        assert max(at - pressed for pressed, at in zip(clicked, watch.seen, strict=True)) < 1.0
    print("a click reaches the server within", took)
    page.page.evaluate("window.__busy")


def test_following_a_stream_makes_no_consumer(notebook, outside):  # noqa: F811 - a fixture
    stream, connect = setup(outside, 3)
    before = outside.snapshot(stream)
    page = notebook(connect, f"%broker live {stream} --columns id")
    ran(page, 0)
    ran(page, 1)
    view = View(page.page)
    view.until(lambda: "no effect" in view.root.inner_text())
    assert outside.snapshot(stream) == before
    outside.put(stream, b'{"id":"new"}', b"\xff")
    view.until(lambda: view.rows("seen").count() == 2)
    assert view.rows("seen").first.locator(".bnb-field").inner_text() != ""
    assert outside.api(f"CONSUMER.NAMES.{stream}").get("consumers") in (None, [])


def test_a_consumer_that_is_missing_is_not_made(notebook, outside):  # noqa: F811 - a fixture
    stream, connect = setup(outside, 2)
    page = notebook(connect, f"view = %broker live {stream} --subscription nobody")
    ran(page, 0)
    assert not page.run(1)
    assert "no such consumer; create=True makes one" in page.text(1)
    assert outside.api(f"CONSUMER.NAMES.{stream}").get("consumers") in (None, [])


def test_a_server_that_stops_for_a_moment(notebook):  # noqa: F811 - a fixture
    with OwnServer("nats") as own:
        bed = Outside(own.url)
        stream, connect = setup(bed, 3)
        page = notebook(connect, f"view = %broker live {stream} --subscription debug --create --columns id")
        ran(page, 0)
        ran(page, 1)
        view = View(page.page)
        view.held(3)
        os.kill(own.pid, signal.SIGSTOP)
        try:
            click(view)
            view.until(lambda: view.rows("asking").count() == 1)  # green only when the server has said so
            view.until(lambda: "waiting for the broker" in view.root.inner_text())
            assert "acked" not in view.facts
        finally:
            os.kill(own.pid, signal.SIGCONT)
        view.until(lambda: "1 acked" in view.facts, 20)
        bed.put(stream, b'{"id":"after"}')
        view.until(lambda: view.rows("held").filter(has_text="after").count() == 1, 20)
        view.until(lambda: view.root.locator(".bnb-dot").get_attribute("data-level") == "ok", 20)


def test_a_server_that_is_killed_and_comes_back(notebook, tmp_path):  # noqa: F811 - a fixture
    with OwnServer("nats", keep=tmp_path) as own:
        bed, port = Outside(own.url), int(own.url.rpartition(":")[2])
        stream, connect = setup(bed, 3, storage="file")
        page = notebook(connect, f"view = %broker live {stream} --subscription debug --create --columns id")
        ran(page, 0)
        ran(page, 1)
        view = View(page.page)
        view.held(3)
        own.kill()
    view.until(lambda: view.root.locator(".bnb-dot").get_attribute("data-level") == "warn")
    with OwnServer("nats", port=port, keep=tmp_path) as own:
        view.until(lambda: view.root.locator(".bnb-dot").get_attribute("data-level") == "ok", 30)
        click(view)
        view.until(lambda: "1 acked" in view.facts, 20)
        assert bed.pending(stream) == (2, 3)
        bed.put(stream, b'{"id":"after"}')
        view.until(lambda: view.rows("held").filter(has_text="after").count() == 1, 20)


def test_a_restarted_kernel_gives_back_what_it_held(notebook, outside):  # noqa: F811 - a fixture
    stream, connect = setup(outside, 3)
    page = notebook(connect, f"view = %broker live {stream} --subscription debug --create")
    ran(page, 0)
    ran(page, 1)
    view = View(page.page)
    view.held(3)
    page.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    view.until(lambda: "The kernel was restarted: 3 messages will be redelivered by about" in view.root.inner_text(), 20)
    assert outside.run(lambda connection: taken(connection, stream))  # at once, long before the leases would have ended
    page.ready()
