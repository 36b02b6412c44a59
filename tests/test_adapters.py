"""Every pull shape out of every other; what cancelling, deadlines and batches do."""

import asyncio
import math
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from scripted import (
    DENIED,
    Clock,
    InBatches,
    OneByOne,
    RecordByRecord,
    Silence,
    consume,
    ids,
    message,
    record,
    run,
    until,
)

from broker_nb import adapters, interfaces
from broker_nb.adapters import (
    Messages,
    Records,
)
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.interfaces import BatchPolicy

# ------------------------------------------------------------------ every shape out of every shape
SOURCES = ["iterator", "batched iterator", "stream", "batched stream", "receiver", "batched receiver"]
SHAPES = [*SOURCES, "stream ahead", "batched stream ahead"]


def source_of(shape, items, pull, one_by_one):
    """Three items behind nothing but the methods of one shape; and the script, where what was never taken stays."""
    under = one_by_one(*items) if shape in ("iterator", "stream", "receiver") else InBatches(items[:2], items[2:])
    if "iterator" in shape:
        return under, under.script
    method = {"stream": "stream", "batched stream": "batch_stream", "receiver": "receive", "batched receiver": "receive_batch"}[
        shape
    ]
    return SimpleNamespace(**{method: getattr(pull(under), method)}), under.script


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("pull", "one_by_one", "make"), [(Messages, OneByOne, message), (Records, RecordByRecord, record)])
def test_every_shape_out_of_every_shape(pull, one_by_one, make, source, shape):
    async def main():
        saw = []
        under, _ = source_of(source, [make(n) for n in range(3)], pull, one_by_one)
        async with pull(under, policy=BatchPolicy(count=2, age_s=0.01)) as it:
            task = asyncio.ensure_future(consume(it, shape, saw))
            await until(lambda: len(saw) == 3 or task.done())
            assert not task.done(), "an idle source is not the end"
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return ids(saw)

    assert run(main()) == [0, 1, 2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("source", SOURCES)
def test_cancelling_at_any_moment_loses_and_doubles_nothing(source, shape):
    async def main(ticks):
        log, saw = [], []
        items = [message(n, log, key=b"k" if n % 2 else None) for n in range(3)]
        under, script = source_of(source, items, Messages, OneByOne)
        async with Messages(under, policy=BatchPolicy(count=2, age_s=0.0), concurrency=2) as it:
            task = asyncio.ensure_future(consume(it, shape, saw, work=lambda: asyncio.sleep(0)))
            for _ in range(ticks):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task}, timeout=5)
            assert task.cancelled()
        given_back = [n for verb, n in log if verb == "nack"]
        left = [m for step in script for m in (step if isinstance(step, list) else [step])]
        assert sorted(ids(saw) + given_back + ids(left)) == [0, 1, 2]
        return len(saw)

    seen = {run(main(ticks)) for ticks in range(60)}
    assert {0, 3} <= seen, "the moments must lie before, between and after the deliveries"


@pytest.mark.parametrize("shape", SHAPES)
def test_cancelling_keeps_records_for_the_next_call(shape):
    async def main(ticks):
        saw = []
        it = Records(InBatches([record(n) for n in range(4)]), concurrency=2)
        task = asyncio.ensure_future(consume(it, shape, saw, work=lambda: asyncio.sleep(0)))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        while (r := await it.next_record(timeout=0.0)) is not None:
            saw.append(r)
        return ids(saw)

    for ticks in range(30):
        assert run(main(ticks)) == [0, 1, 2, 3]


def test_the_adapters_have_the_contracts_methods():
    it = Messages(OneByOne())
    for protocol in (
        interfaces.MessageIterator,
        interfaces.Batches,
        interfaces.Streams,
        interfaces.BatchStreams,
        interfaces.Receives,
        interfaces.BatchReceives,
    ):
        assert isinstance(it, protocol)
    assert isinstance(Records(RecordByRecord()), interfaces.RecordIterator)
    assert all(hasattr(adapters, name) for name in adapters.__all__)


@pytest.mark.parametrize("wrong", [None, 5, "kafka", [], SimpleNamespace(next_message=1), RecordByRecord()])
def test_a_source_without_a_shape_is_an_error_that_names_it(wrong):
    with pytest.raises(BrokerError, match=type(wrong).__name__) as e:
        Messages(wrong)
    assert e.value.kind is ErrorKind.INVALID


@pytest.mark.parametrize("wrong", [{"count": 0}, {"bytes": 0}, {"age_s": -1.0}, {"age_s": math.nan}])
def test_a_batch_policy_that_cannot_be_met(wrong):
    with pytest.raises(BrokerError, match="start at"):
        BatchPolicy(**wrong)


def test_no_handlers_at_all_is_refused():
    with pytest.raises(BrokerError, match="concurrency"):
        Messages(OneByOne(), concurrency=0)


# ------------------------------------------------------------------ cancelled, deadline, nothing yet
@pytest.mark.parametrize("shape", ["iterator", "stream"])
def test_nothing_yet_deadline_and_cancelled_are_three_things(shape):
    async def main():
        source = OneByOne()
        it = Messages(source if shape == "iterator" else SimpleNamespace(stream=Messages(source).stream), clock=source.clock)
        if shape == "iterator":
            assert await it.next_message(timeout=3) is None
            assert await it.next_batch(timeout=3) == []
            assert source.clock.now == 1006
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await it.next_message()
        task = asyncio.ensure_future(it.next_batch())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        source.script.append(message(1))
        if shape == "iterator":
            assert (await it.next_message(timeout=1)).id == "1"
        await it.close()
        with pytest.raises(BrokerError) as e:
            await it.next_message(timeout=1)
        assert e.value.kind is ErrorKind.CLOSED

    run(main())


def test_nothing_yet_from_a_source_that_pushes():
    async def main():
        queue = asyncio.Queue()

        async def stream():
            while True:
                yield await queue.get()

        async with Messages(SimpleNamespace(stream=stream)) as it:
            assert await it.next_message(timeout=0.01) is None
            queue.put_nowait(message(1))
            assert (await it.next_message(timeout=5)).id == "1"
            assert await it.next_batch(timeout=0.01) == []

    run(main())


def test_timeout_zero_takes_what_is_there():
    async def main():
        it = Messages(InBatches([message(1), message(2)]))
        assert ids(await it.next_batch(timeout=0)) == [1, 2]
        assert await it.next_batch(timeout=0) == []

    run(main())


def test_a_source_that_says_nothing_yet_is_not_at_its_end():
    async def main():
        source = InBatches([], [], [], [message(1)])
        async with aclosing(Messages(source).stream()) as stream:
            assert (await anext(stream)).id == "1"

    run(main())


def test_a_partly_collected_batch_survives_the_callers_deadline():
    async def main():
        source = OneByOne(message(1), message(2))
        it = Messages(source, policy=BatchPolicy(count=3, age_s=math.inf))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await it.next_batch()
        source.script.append(message(3))
        assert ids(await it.next_batch()) == [1, 2, 3]

    run(main())


def test_two_callers_share_one_source():
    async def main():
        source = OneByOne()
        it = Messages(source)
        first, second = asyncio.ensure_future(it.next_message()), asyncio.ensure_future(it.next_message())
        await asyncio.sleep(0.01)
        assert await it.next_message(timeout=0.01) is None, "a caller waits no longer than it said, whoever else waits"
        await it.close()
        for task in (first, second):
            with pytest.raises(BrokerError) as e:
                await task
            assert e.value.kind is ErrorKind.CLOSED

    run(main())


# ------------------------------------------------------------------ batches
def test_the_age_is_measured_from_the_first_message():
    """One message every 2 s, batches of at most 5 s: a window measured from the last message would never end (defect 3)."""

    async def main():
        clock = Clock()
        drip = [step for n in range(6) for step in (message(n), Silence(2))]
        it = Messages(OneByOne(*drip, clock=clock), policy=BatchPolicy(age_s=5), clock=clock)
        assert ids(await it.next_batch()) == [0, 1, 2]
        assert clock.now == 1005
        assert ids(await it.next_batch()) == [3, 4, 5]
        assert clock.now == 1011

    run(main())


def test_a_long_silence_before_the_first_message_does_not_use_up_the_age():
    async def main():
        clock = Clock()
        it = Messages(
            OneByOne(Silence(600), message(1), Silence(4), message(2), clock=clock), policy=BatchPolicy(age_s=5), clock=clock
        )
        assert ids(await it.next_batch()) == [1, 2]

    run(main())


def test_the_timeout_hands_over_what_is_there():
    async def main():
        clock = Clock()
        it = Messages(OneByOne(message(1), clock=clock), policy=BatchPolicy(age_s=60), clock=clock)
        assert ids(await it.next_batch(timeout=2)) == [1]
        assert clock.now == 1002

    run(main())


def test_batches_end_at_count_and_bytes_and_a_larger_message_goes_alone():
    async def main():
        sizes = [40, 40, 40, 500, 10, 10, 10, 90, 0, 10]
        items = [message(n, data=b"x" * size) for n, size in enumerate(sizes)]
        it = Messages(OneByOne(*items), policy=BatchPolicy(count=3, bytes=100, age_s=math.inf))
        return [ids(await it.next_batch()) for _ in range(5)]

    assert run(main()) == [[0, 1], [2], [3], [4, 5, 6], [7, 8, 9]]


def test_keys_count_as_bytes_and_null_is_nothing():
    async def main():
        it = Messages(OneByOne(*(message(n, key=b"k" * 60, data=None) for n in range(4))), policy=BatchPolicy(bytes=120))
        return ids(await it.next_batch())

    assert run(main()) == [0, 1]


def test_a_source_of_batches_keeps_its_own_unless_told():
    async def main():
        batches = [[message(0), message(1)], [message(2)]]
        own = Messages(InBatches(*batches))
        assert [ids(await own.next_batch()) for _ in batches] == [[0, 1], [2]]
        cut = Messages(InBatches(*batches), policy=BatchPolicy(count=1))
        assert [ids(await cut.next_batch()) for _ in range(3)] == [[0], [1], [2]]

    run(main())


def test_what_came_before_an_error_is_delivered_before_it():
    async def main():
        it = Messages(OneByOne(message(1), message(2), DENIED(), message(3)), policy=BatchPolicy(count=3, age_s=math.inf))
        assert ids(await it.next_batch()) == [1, 2]
        with pytest.raises(BrokerError, match="ask for READ"):
            await it.next_batch()
        assert (await it.next_message()).id == "3"

    run(main())
