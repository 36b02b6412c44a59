"""The live view in a real JupyterLab: every button, a busy cell, reloads, hostile messages, a restarted kernel."""

import time

import nbformat
import pytest
from browser import lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), pytest.mark.xdist_group("lab")]

SETUP = """
%load_ext broker_nb
import json, time
import broker_nb
from broker_nb.backends.driver import Family, Outbound
from broker_nb.backends.inmem.broker import InmemBroker
broker = InmemBroker.get("live")
conn = broker_nb.connect("inmem://live")
broker.create_topic("dead")
broker.create_topic("orders", dead_letter="dead")
def fill(n=8, topic="orders"):
    broker.publish(topic, [Outbound(json.dumps({"id": i, "status": "ok"}).encode(), b"k%d" % i) for i in range(n)])
def queue():
    return broker.topic("orders").subscriptions["s"]
fill()
"""
START = """i => {
  const app = window.jupyterapp; app.shell.currentWidget.content.activeCellIndex = i;
  window.__busy = app.commands.execute('notebook:run-cell');
}"""


class View:
    """One view in the page, as a person uses it."""

    def __init__(self, page, index=0):
        self.page = page
        self.root = page.locator(".bnb-live").nth(index)

    def rows(self, state):
        return self.root.locator(f".bnb-space .bnb-row[data-state={state}]:not([hidden])")

    def keys(self, state):
        return self.rows(state).locator(".bnb-key").all_inner_texts()

    def until(self, condition, within=10.0):
        end = time.monotonic() + within
        while not condition():
            assert time.monotonic() < end, self.root.inner_text()
            self.page.wait_for_timeout(20)

    def held(self, count):
        self.until(lambda: self.rows("held").count() == count)

    def choose(self, key):
        self.rows("held").filter(has=self.page.locator(".bnb-key", has_text=key)).locator(".bnb-tick input").click()

    def press(self, action):
        self.root.locator(f".bnb-bar .bnb-do-{action}").click()

    @property
    def facts(self):
        return self.root.locator(".bnb-facts").inner_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    with lab(folder, tmp_path_factory.mktemp("scratch")) as page:
        page.folder = folder
        yield page


@pytest.fixture
def notebook(server, request):
    """Opens a notebook of these cells on a kernel of its own, and ends that; the page must not have complained."""

    def opened(*cells):
        made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
        made.cells = [nbformat.v4.new_code_cell(source) for source in cells]
        name = f"{request.node.name}.ipynb"
        nbformat.write(made, server.folder / name)
        server.errors.clear()
        server.open(name)
        return server

    yield opened
    server.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    assert server.errors == []


def ran(lab, cell):
    assert lab.run(cell), lab.text(cell)
    return lab.text(cell)


def start(lab, cell):
    """Run a cell and do not wait for it."""
    lab.page.evaluate(START, cell)


def test_every_button_reaches_the_broker(notebook):
    page = notebook(
        SETUP,
        "%broker live orders --subscription s --columns status",
        "print('state', len(queue()._held), len(broker.topic('dead').logs[0].rows), len(queue()._delayed))",
    )
    ran(page, 0)
    assert "live orders/s | opened" in ran(page, 1)
    view = View(page.page)
    view.held(8)
    view.choose("k0")
    view.press("ack")
    view.choose("k1")
    view.press("reject")
    view.choose("k2")
    view.root.locator(".bnb-delay").select_option("300")
    view.press("delay")
    view.held(5)
    assert "state 5 1 1" in ran(page, 2)
    view.choose("k3")
    view.press("nack")
    view.until(lambda: "2 nacked" in view.facts)
    view.choose("k4")
    view.press("release")
    view.until(lambda: "1 given back" in view.facts)
    view.held(5)  # both came again at once
    assert view.root.locator(".bnb-count", has_text="2").count() == 2
    assert "state 5 1 1" in ran(page, 2)
    view.root.locator(".bnb-labels input").click()
    view.press("ack")
    view.held(0)
    view.until(lambda: "6 acked" in view.facts)
    assert "state 0 1 1" in ran(page, 2)
    assert sorted(view.keys("acked")) == ["k0", "k3", "k4", "k5", "k6", "k7"]
