"""The notebooks in a real JupyterLab, and hostile messages in everything that is shown."""

import pathlib
import shutil

import nbformat
import pytest
from browser import lab

ROOT = pathlib.Path(__file__).parent.parent
FIRED = "window.__pwned === undefined"
HOSTILE = [
    "<script>window.__pwned = 1</script>",
    "<img src=x onerror='window.__pwned = 2'>",
    "<svg onload='window.__pwned = 3'></svg>",
    "[click](javascript:window.__pwned=4)",
    "$$\\href{javascript:window.__pwned=5}{x}$$",
    "\x1b]8;;javascript:window.__pwned=6\x07link\x1b]8;;\x07",
    "\u202egnp.exe",
    '=HYPERLINK("javascript:window.__pwned=7")',
    "x" * 1_000_000,
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.xdist_group("lab")]


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, folder)
    return folder


def test_the_notebooks_run_in_jupyterlab(notebooks, tmp_path):
    with lab(notebooks, tmp_path) as page:
        for name in sorted(path.name for path in notebooks.glob("*.ipynb")):
            for cell in range(page.open(name)):
                assert page.run(cell), page.text(cell)
                if name.startswith("00") and cell == 5:
                    page.page.evaluate("window.jupyterapp.shell.collapseLeft()")
                    page.page.evaluate("window.jupyterapp.shell.currentWidget.content.node.scrollTo(0, 0)")
                    page.page.wait_for_timeout(500)  # for the layout to come to rest before the picture
                    page.page.screenshot(path=tmp_path / "quickstart.png")
            page.page.screenshot(path=tmp_path / f"{name}.png")
        assert page.errors == []


def test_hostile_messages_execute_nowhere(notebooks, tmp_path):
    setup = f"""
import broker_nb
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.messages import OutboundMessage
import json
%load_ext broker_nb
hostile = {HOSTILE!r}
broker = InmemBroker.get("hostile"); broker.create_topic("t")
conn = broker_nb.connect("inmem://hostile")
conn.publish([OutboundMessage(json.dumps({{h[:50]: h}}).encode(), h.encode(), [(h[:50], h)]) for h in hostile]
             + [OutboundMessage(h.encode(), None) for h in hostile], to="t")
"""
    cells = [
        setup,
        "%broker sample t -100",
        "conn.sample('t', '-100', attributes=[h[:50] for h in hostile])",
        "held = conn.consume('t', hostile[1], n=5)\nheld",
        "conn.ack(held)",
        "conn.held()",
        "broker_nb.report(conn.sample('t', '-100'))",
        "conn.topics()",
        "conn",
    ]
    failing = ["conn.sample(hostile[1])", '%broker sample "<img/src=x/onerror=window.__pwned=8>"', "conn.sample('t', hostile[0])"]
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells + failing]
    nbformat.write(notebook, notebooks / "hostile.ipynb")
    with lab(notebooks, tmp_path) as page:
        page.open("hostile.ipynb")
        for cell in range(len(cells)):
            assert page.run(cell), page.text(cell)
        for cell in range(len(cells), len(cells + failing)):
            assert not page.run(cell)
            assert "onerror" in page.text(cell) or "script" in page.text(cell)
        page.page.wait_for_timeout(1000)  # handlers of images fire after the cell has ended
        assert page.page.evaluate(FIRED)
        page.page.screenshot(path=tmp_path / "hostile.png")
