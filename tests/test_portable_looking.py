"""Looks at brokers that stop, fail, fall silent or cannot tell their end: never a silent gap."""

import asyncio

import pytest

from broker_nb.backends.driver import (
    COLUMNS,
    Batch,
    Bounds,
    Capabilities,
    Entity,
    Facts,
    Family,
    Kind,
    LookPlan,
    Proof,
    Step,
    Stop,
)
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable import look as looking
from broker_nb.portable.look import open_look
from broker_nb.portable.loop import shared_loop
from broker_nb.portable.ranges import parse_range

T = Entity(Kind.TOPIC, "t")
GONE = BrokerError(ErrorKind.UNREACHABLE, "t", "t: no answer from the broker", retryable=True)
DENIED = BrokerError(ErrorKind.PERMISSION, "t", "t: you may not read it")


class Codec:
    """Rows are (partition, position)."""

    def places(self, rows):
        return list(rows)

    def size(self, row):
        return 1


class Scripted:
    """A driver whose looks go through a list of steps and errors; the last one is repeated."""

    capabilities = Capabilities(frozenset(Family), slice_s=0.1)

    def __init__(self, bounds, *scripts):
        self.ends, self.scripts = bounds, [list(script) for script in scripts]
        self.pieces, self.closed = [], 0

    async def bounds(self, topic, committed_only):
        return self.ends

    async def browse(self, topic, pieces, *_):
        self.pieces.append(pieces)
        self.script = self.scripts.pop(0)
        return self

    async def read(self, max_rows, max_bytes, wait):
        await asyncio.sleep(0.001)
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(step, BrokerError):
            raise step
        return step

    async def close(self):
        self.closed += 1


def rows(partition, *offsets):
    return Batch(Codec(), [(partition, (offset,)) for offset in offsets])


def look(driver, text="..end", plan=None, timeout=20.0):
    async def go():
        plain = plan or LookPlan(True)
        facts = Facts(T, tuple(b.partition for b in driver.ends), plain)
        opened = await open_look(driver, facts, parse_range(text), want=COLUMNS, committed_only=True, allow=())
        try:
            places = [place for batch in [b async for b in opened.batches(timeout)] for place in batch.codec.places(batch.rows)]
        finally:
            assert driver.closed == len(driver.pieces)
        return [at[0] for _, at in places], opened.summary

    return shared_loop().run(go())


TWO = [Bounds(0, (0,), (10,)), Bounds(1, (0,), (10,))]
ONE = TWO[:1]


# ------------------------------------------------------------------ why it stopped
@pytest.mark.parametrize(
    ("stop", "complete"),
    [(Stop.AGED_OUT, False), (Stop.HELD_BACK, False), (Stop.DRY, None), (Stop.UNPROVEN, None)],
)
def test_a_partition_that_stops_in_the_middle_is_told_and_the_others_go_on(stop, complete):
    first = Step(rows(0, 0, 1), {0: (2,)}, {0: stop})
    found, summary = look(Scripted(TWO, [first, Step(rows(1, 5), {1: (10,)})]))
    assert found == [0, 1, 5]
    assert summary.complete is complete
    assert summary.why == f"{stop.value} (partition 0)"


def test_a_stop_of_a_partition_that_was_proved_says_nothing():
    _, summary = look(Scripted(ONE, [Step(rows(0, 9), {0: (10,)}, {0: Stop.DRY})]))
    assert (summary.complete, summary.why) == (True, "")


@pytest.mark.parametrize("plan", [LookPlan(True, proof=Proof.NONE), LookPlan(True, end_is_fixed=False)])
def test_a_broker_that_cannot_tell_its_end_is_never_complete(plan):
    _, summary = look(Scripted(ONE, [Step(rows(0, 9), {0: (10,)})]), plan=plan)
    assert (summary.complete, summary.why) == (None, "this broker cannot tell where the end is")


def test_an_open_end_is_read_until_the_broker_stops():
    found, summary = look(
        Scripted([Bounds(0, (0,), None)], [Step(rows(0, 0, 1), {0: (2,)}), Step(None, {0: (2,)}, {0: Stop.DRY})])
    )
    assert (found, summary.complete, summary.total) == ([0, 1], None, None)


def test_the_newest_rows_of_places_that_are_no_single_numbers():
    bounds = [Bounds(0, (7, 0, 0), (9, 3, 0))]
    driver = Scripted(bounds, [Step(rows(0, 7, 8), {0: (9, 3, 0)})])
    found, summary = look(driver, "-5")
    assert found == [7, 8]
    assert [(p.start, p.end) for p in driver.pieces[0]] == [((7, 0, 0), (9, 3, 0))]
    assert (summary.complete, summary.total) == (True, None)


def test_it_looks_further_back_only_where_rows_may_be():
    bounds = [Bounds(0, (0,), (10,)), Bounds(1, (0,), (10,)), Bounds(2, (8,), (10,))]
    first = [Step(rows(0, 9), {0: (10,), 1: (10,), 2: (10,)}, {1: Stop.AGED_OUT})]
    driver = Scripted(bounds, first, [Step(rows(0, 4, 5), {0: (7,)})])
    found, summary = look(driver, "-3")
    assert found == [9, 4, 5]
    assert [[(p.partition, p.start, p.end) for p in pieces] for pieces in driver.pieces] == [
        [(0, (7,), (10,)), (1, (7,), (10,)), (2, (8,), (10,))],
        [(0, (1,), (7,))],
    ]
    assert summary.complete is False


# ------------------------------------------------------------------ silence and failures
def test_a_broker_that_falls_silent_ends_the_look_with_the_reason(monkeypatch):
    monkeypatch.setattr(looking, "STALL_S", 0.2)
    for silent in (Step(None, {}), Step(None, {0: (1,)}), Step(None, {0: (0,)})):
        found, summary = look(Scripted(ONE, [Step(rows(0, 0), {0: (1,)}), silent]))
        assert (found, summary.complete) == ([0], False)
        assert summary.why == "no answer from the broker for 0.2 s"


def test_a_broker_that_only_skips_is_not_silent(monkeypatch):
    monkeypatch.setattr(looking, "STALL_S", 0.05)
    skipping = [Step(None, {}, skipped=1)] * 100
    found, summary = look(Scripted(ONE, [*skipping, Step(Batch(Codec(), []), {0: (10,)})]))
    assert (found, summary.complete, summary.skipped) == ([], True, 100)


def test_a_failure_that_passes_is_waited_for(monkeypatch):
    monkeypatch.setattr(looking, "BACKOFF_S", (0.001,) * 3)
    found, summary = look(Scripted(ONE, [GONE, GONE, GONE, Step(rows(0, 0), {0: (1,)}), GONE, Step(rows(0, 9), {0: (10,)})]))
    assert (found, summary.complete) == ([0, 9], True)


@pytest.mark.parametrize("error", [GONE, DENIED])
def test_a_failure_that_stays_is_an_error(monkeypatch, error):
    monkeypatch.setattr(looking, "BACKOFF_S", (0.001,) * 3)
    driver = Scripted(ONE, [Step(rows(0, 0), {0: (1,)}), error])
    with pytest.raises(BrokerError) as caught:
        look(driver)
    assert caught.value is error


def test_a_time_out_while_the_broker_fails_is_told():
    _, summary = look(Scripted(ONE, [GONE]), timeout=0.15)
    assert (summary.complete, summary.why) == (False, "stopped after 0.15 s (timeout)")
