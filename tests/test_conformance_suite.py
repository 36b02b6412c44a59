"""The conformance suite notices what it is for: sabotaged drivers fail, and what is left out has its reason."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from inmem_bed import InmemHarness

from broker_nb.backends.driver import Batch, Capabilities, Envelope, Family, Outcome, Piece, SendResult, Sent, Settled, Step
from broker_nb.backends.inmem.driver import InmemDriver
from broker_nb.backends.inmem.handles import GroupSource, InmemBrowser, InmemSender, QueueSource
from broker_nb.errors import NotFound
from broker_nb.portable.loop import shared_loop
from broker_nb.testing.bench import Bench, Reader
from broker_nb.testing.contract import Contract
from broker_nb.testing.groups import Records
from broker_nb.testing.looking import Looking
from broker_nb.testing.publishing import Publishing
from broker_nb.testing.settling import Messages
from broker_nb.testing.tails import Tails
from broker_nb.testing.watch import Watch, disagreements


# ------------------------------------------------------------------ sabotage
@contextlib.contextmanager
def a_bench(family):
    harness = InmemHarness()
    client = shared_loop().run(harness.open())
    watch = Watch(client.driver.capabilities)
    watch.driver(client.driver)
    try:
        yield Bench(harness, client, watch, family)
    finally:
        shared_loop().run(client.close())


def loses_a_row(monkeypatch):
    pull = QueueSource.pull

    async def lossy(self, *args):
        batch = await pull(self, *args)
        return batch and replace(batch, rows=batch.rows[1:], tokens=batch.tokens[1:])

    monkeypatch.setattr(QueueSource, "pull", lossy)


def settles_nothing(monkeypatch):
    async def settle(self, items):
        return [Outcome(Settled.CONFIRMED) for _ in items]

    monkeypatch.setattr(QueueSource, "settle", settle)


def commits_too_much(monkeypatch):
    commit = GroupSource.commit

    async def greedy(self, positions):
        await commit(self, {p: (len(self.topic.logs[p].rows),) for p in positions})
        return {p: Outcome(Settled.CONFIRMED) for p in positions}

    monkeypatch.setattr(GroupSource, "commit", greedy)


def sends_twice(monkeypatch):
    send = InmemSender.send

    async def twice(self, rows):
        await send(self, rows)
        return await send(self, rows)

    monkeypatch.setattr(InmemSender, "send", twice)


def says_stored(monkeypatch):
    async def send(self, rows):
        return [SendResult(Sent.ACCEPTED) for _ in rows]

    monkeypatch.setattr(InmemSender, "send", send)


def makes_what_it_is_asked_about(monkeypatch):
    facts = InmemDriver.facts

    async def generous(self, entity):
        try:
            return await facts(self, entity)
        except NotFound:
            self.broker.create_topic(entity.parent or entity.name)
            raise

    monkeypatch.setattr(InmemDriver, "facts", generous)


def looks_as_a_member(monkeypatch):
    browse = InmemDriver.browse

    async def member(self, topic, *args):
        self.broker.topic(topic.name).subscribe("looker", Family.RECORD)
        return await browse(self, topic, *args)

    monkeypatch.setattr(InmemDriver, "browse", member)


def stops_one_short(monkeypatch):
    read = InmemBrowser.read

    async def short(self, *args):
        step = await read(self, *args)
        return replace(step, batch=step.batch and replace(step.batch, rows=step.batch.rows[:-1]))

    monkeypatch.setattr(InmemBrowser, "read", short)


def gives_too_many(monkeypatch):
    pull = QueueSource.pull

    async def generous(self, max_rows, *args):
        return await pull(self, 100, *args)

    monkeypatch.setattr(QueueSource, "pull", generous)


def closes_slowly(monkeypatch):
    close = InmemBrowser.close

    async def slow(self):
        await asyncio.sleep(2.5)
        await close(self)

    monkeypatch.setattr(InmemDriver, "capabilities", replace(InmemDriver.capabilities, slice_s=0.2))
    monkeypatch.setattr(InmemBrowser, "close", slow)


SABOTAGE = [
    (loses_a_row, Messages, "test_everything_sent_arrives_once", "At index 0 diff"),
    (settles_nothing, Messages, "test_first_settlement_wins", r"b'm000000'\] == \[b'm000002'"),
    (commits_too_much, Records, "test_only_the_contiguous_prefix_is_committed", "At index 2 diff: 5 != 2"),
    (commits_too_much, Records, "test_what_was_not_acked_comes_again", r"\[\] == \[b'C', b'D', b'E'\]"),
    (sends_twice, Records, "test_everything_sent_arrives_once", "Extra items in the left"),
    (says_stored, Publishing, "test_bodies_are_bytes", "Right contains 6 more"),
    (makes_what_it_is_asked_about, Messages, "test_missing_topic", "no error, but"),
    (looks_as_a_member, Looking, "test_nothing_changes", "looker"),
    (stops_one_short, Tails, "test_a_range_inside_a_batch", "Right contains one more item"),
    (gives_too_many, Contract, "test_one_row_is_enough", "assert 5 == 1"),
    (closes_slowly, Contract, "test_close_in_the_middle_of_a_slice", r"< \(0.2 \+ 2.0\)"),
]


@pytest.mark.parametrize(("sabotage", "suite", "name", "notices"), SABOTAGE, ids=lambda value: getattr(value, "__name__", None))
def test_a_sabotaged_driver_fails_the_case(monkeypatch, sabotage, suite, name, notices):
    monkeypatch.setattr(Reader.read, "__defaults__", (1.0,))  # seconds that a case waits for a row that never comes
    sabotage(monkeypatch)
    with a_bench(suite.family) as bench, pytest.raises(AssertionError, match=notices):
        getattr(suite, name)(suite(), bench)


# ------------------------------------------------------------------ rules that hold in every call
class Scripted:
    """A driver whose handles answer what a test says, one step of the loop later."""

    def __init__(self, answer=None):
        self.answer = answer

    async def handle(self, *args):
        async def call(*args):
            await asyncio.sleep(0)
            return self.answer

        names = ("read", "pull", "settle", "extend", "commit", "seek", "send")
        return SimpleNamespace(**dict.fromkeys(names, call))

    browse = subscribe = sender = handle


def broken(name, answer, *args, times=1, opened=(), **able):
    """What the watch says about so many calls at the same time."""

    async def go():
        watch, driver = Watch(Capabilities(frozenset(Family), slice_s=0.5, **able)), Scripted(answer)
        watch.driver(driver)
        kind = {"read": driver.browse, "send": driver.sender}.get(name, driver.subscribe)
        handle = await kind(*opened)
        names = [name] * times if isinstance(name, str) else name
        await asyncio.gather(*(getattr(handle, n)(*args) for n in names))
        return watch.broken

    return asyncio.run(go())


class PlainCodec:
    """Rows are offsets; `wrong` is a column that does not agree with the envelope."""

    wrong = None

    def columns(self, rows, want):
        made = {"topic": "t", "partition": 0, "offset": list(rows), "key": None, "data": [b"%d" % r for r in rows]}
        made |= {"attributes": None, "publish_time_ns": [r * 10 for r in rows], "delivery_count": None}
        return {n: (["?"] * len(rows) if n == self.wrong else made[n]) for n in made.keys() & want}

    def envelope(self, row):
        return Envelope("t", 0, (row,), f"0:{row}", None, b"%d" % row, (), row * 10, "server", None, row)

    def places(self, rows):
        return [(0, (row,)) for row in rows]

    def size(self, row):
        return len(b"%d" % row)


def test_two_calls_in_flight_on_one_handle_are_noticed():
    assert broken("pull", None, 1, 1, 0.1) == []
    assert broken("pull", None, 1, 1, 0.1, times=2) == ["pull beside ['pull'] on one handle"]
    assert broken("settle", [], [], times=2, concurrent_settle=True) == ["settle beside ['settle'] on one handle"]
    assert broken("send", [], [], times=2) == ["send beside ['send'] on one handle"]


def test_waiting_longer_than_a_slice_is_noticed():
    assert "pull was asked to wait 0.6 s of 0.5" in broken("pull", None, 1, 1, 0.6)
    assert "read was asked to wait 0.6 s of 0.5" in broken("read", Step(None, {}), 1, 1, 0.6, opened=("t", ()))


def test_more_rows_than_asked_for_are_noticed():
    assert broken("pull", Batch(PlainCodec(), [1, 2]), 2, 1, 0.1) == []
    assert broken("pull", Batch(PlainCodec(), [1, 2, 3]), 2, 1, 0.1) == ["pull gave 3 rows, 2 were asked for"]


@pytest.mark.parametrize("name", ["topic", "partition", "offset", "key", "data", "publish_time_ns", "delivery_count"])
def test_a_column_that_is_not_the_envelopes_is_noticed(name):
    assert disagreements(PlainCodec(), [1, 2]) == []
    codec = PlainCodec()
    codec.wrong = name
    assert len([line for line in disagreements(codec, [1, 2]) if f"column {name} is '?'" in line]) == 2


def test_rows_outside_their_piece_and_out_of_order_are_noticed():
    pieces = ("t", [Piece(0, (5,), (9,))])

    def read(rows, reached=None):
        return broken("read", Step(Batch(PlainCodec(), rows), reached or {}), 10, 1, 0.1, opened=pieces)

    assert read([5, 6, 8], {0: (9,)}) == []
    assert "row (9,) is not below the end (9,)" in read([8, 9])[0]
    assert "row (4,) came after (5,)" in read([4])[0]
    assert "row (6,) came after (7, 0)" in read([7, 6])[0]
    assert "reached (6,) after rows up to (8, 0)" in read([8], {0: (6,)})[0]


def test_results_that_are_not_aligned_are_noticed():
    tokens = Batch(PlainCodec(), [1, 2], [7])
    assert broken("pull", tokens, 2, 1, 0.1) == ["pull: tokens are not aligned with rows"]
    assert broken("settle", [Outcome(Settled.CONFIRMED)], [1, 2])[0] == "settle: 1 outcomes for 2 rows"
    assert broken("extend", [1.0], [1, 2], 1)[0] == "extend: 1 deadlines for 2 rows"
    assert broken("send", [SendResult(Sent.ACCEPTED)], [1, 2])[0] == "send: 1 results for 2 rows"
    assert broken("send", [SendResult(Sent.UNKNOWN)], [1]) == ["send: error and state do not fit together"]
    assert broken("commit", {0: Outcome(Settled.CONFIRMED)}, {1: (5,)})[0].startswith("commit: the outcomes are not of the")


# ------------------------------------------------------------------ choosing, reporting
CASES = """
import pytest
from broker_nb.testing.harness import Harness, Suite, case

class Mine(Harness):
    scheme, profile = "inmem", {}
    never = {"compact": "it forgets nothing"}
    notyet = {"Stop.UNPROVEN": "the next version"}

class Some(Suite):
    @case()
    async def test_good(self, bench):
        "It works."
    @case("transactions")
    async def test_bad(self, bench):
        "It does not."
        assert 1 == 2
    @case("compact")
    async def test_never(self, bench): ...
    @case("keys", "Stop.UNPROVEN")
    async def test_not_yet(self, bench): ...
    @case("begin")
    async def test_for_no_reason(self, bench): ...

@pytest.fixture(scope="module")
def harness(): return Mine()

class TestMine(Some, on=Mine): ...
"""


def test_what_is_left_out_is_not_collected_and_everything_is_in_the_report(tmp_path):
    (tmp_path / "test_mine.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "broker_nb.testing.plugin", str(tmp_path)]
    env = {**os.environ, "BROKER_NB_CONFORMANCE": str(report), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert "2 failed, 1 passed" in done.stdout, done.stdout + done.stderr  # the two: a bad case, and a gap without a reason
    assert "say why in Capabilities or in the harness" in done.stdout
    assert json.loads(report.read_text())["inmem"]["Some"] == {
        "test_good": {"state": "pass", "says": "It works."},
        "test_bad": {"state": "fail", "says": "It does not."},
        "test_never": {"state": "never", "says": "it forgets nothing"},
        "test_not_yet": {"state": "notyet", "says": "the next version"},
        "test_for_no_reason": {"state": "never", "says": ""},
    }
