"""The notebooks run from top to bottom, say what they should, and carry no outputs and no secrets."""

import pathlib
import re

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"


def execute(name):
    """Tag -> what the cell showed, as text."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOKS)}}
    client = nbclient.NotebookClient(notebook, timeout=240, store_widget_state=False, resources=where)
    client.execute()
    shown = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            errors = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stderr"]
            assert not errors, cell.source
            for tag in cell.metadata.get("tags", []):
                shown[tag] = "\n".join(
                    o.text if o.output_type == "stream" else o.data.get("text/plain", "") for o in cell.outputs
                )
    return shown


def expect(shown, tag, pattern):
    assert re.search(pattern, shown[tag]), shown[tag]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.name)
def test_a_notebook_is_kept_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert not re.search(r"password|secret|token", path.read_text(), re.IGNORECASE)


@pytest.mark.slow
def test_the_quickstart_shows_what_the_first_five_minutes_promise():
    shown = execute("00-quickstart.ipynb")
    expect(shown, "connect", r"demo: embedded broker in this kernel, 3 topics with made-up orders\. Next: %broker topics")
    expect(shown, "topics", r"orders +3 +12000 ")
    expect(
        shown,
        "sample",
        r"^sample orders -1000 \| complete \| 1,000 of 12,000 messages, 3 partitions, .* \| json 998, undecodable 2 \| no effect",
    )
    expect(shown, "counts", r"ok +951\nfailed +43\nNaN +6\n")
    expect(shown, "where", r"where: 2 of 1,000 match")
    expect(
        shown,
        "consume",
        r"consume orders/debug \| 100 held until .* \(extended for you, at most 10m\) \| first delivery 97, second 3, dead-letter at 5",
    )
    expect(shown, "leases", r"[0-9a-f]{4}-00001 +9007199254740")
    expect(shown, "ack", r"ack orders/debug \| 95 acked \| 5 still held")
    expect(shown, "nack", r"nack orders/debug \| 5 back in 30 s")
    expect(shown, "again", r"0 acked, 5 already settled \(nack won at ")
    expect(
        shown, "live", r"live payments/night \| opened [\d:]+ UTC\nlive payments/night \| closed [\d:]+ UTC \| 0 seen, 0 held$"
    )
    expect(shown, "dry", r"DRY RUN \| 5 messages, .* \| nothing sent")
    expect(shown, "publish", r"(?s)5 accepted.*accepted")
    expect(shown, "refused", r"publish: 5 rows: value_reason differs from data")
    expect(shown, "python", r'conn\.sample\("orders", "@-10m\.\.", limit=5000\)')
    expect(shown, "await", r"sample payments -5 \| complete")
    expect(shown, "close", r"demo \| closed")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_notebook_on_the_servers_it_starts():
    shown = execute("01-real-brokers.ipynb")
    expect(shown, "start", r"kafka://127\.0\.0\.1:\d+ nats://127\.0\.0\.1:\d+")
    expect(shown, "publish", r"publish orders \| 1,000 accepted")
    expect(shown, "sample", r"complete \| 50 of 1,000 messages, 3 partitions.* \| where: 50 of 1,000 match")
    expect(shown, "head", r"9007199254740992")
    assert shown["groups"] == "[]"
    expect(shown, "consume", r"consume orders/billing \| 1,000 read, nothing committed")
    expect(shown, "commit", r"orders\[\d\]: (committed to \d+|nothing committed); \d+ not in the selection, \d+ after it wait")
    expect(shown, "log", r"ack orders/billing: this is a log")
    expect(shown, "rest", r"orders\[\d\]: committed to \d+( \||$)")
    expect(shown, "nats-connect", r"<nats: nats-server 2\.15\.0 with JetStream>")
    expect(shown, "nats-publish", r"publish orders\.eu \| 100 accepted")
    expect(shown, "nats-topics", r"ORDERS +1 +100 ")
    expect(
        shown,
        "nats-sample",
        r"sample ORDERS -20 \| complete \| 1 of 100 messages.* \| where: 1 of 20 match \| no effect on the broker",
    )
    expect(shown, "nats-subject", r"sample orders\.\* \+3 \| complete \| 3 of 100 messages")
    assert shown["nats-consumers"] == "0"
    expect(shown, "nats-consume", r"consume ORDERS/billing \| 100 held until .* \| first delivery 100")
    expect(shown, "nats-ack", r"ack ORDERS/billing \| 95 acked \| 5 still held")
    expect(shown, "nats-nack", r"nack ORDERS/billing \| 3 back in 1 s \| 2 still held")
    expect(shown, "nats-reject", r"reject ORDERS/billing \| 2 rejected")
    expect(shown, "nats-again", r"(?s)3 held until .* \| second delivery 3.*cust-0 +2")
    expect(shown, "nats-rest", r"ack ORDERS/billing \| 3 acked")
    assert shown["nats-pending"] == "(0, 0)"
