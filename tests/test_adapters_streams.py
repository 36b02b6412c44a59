"""Streams out of anything: errors, silences, leaving, and fetching one ahead."""

import asyncio
import logging
import math
from contextlib import aclosing
from types import SimpleNamespace

import pytest
from scripted import (
    BROKEN,
    DENIED,
    FAST,
    Clock,
    InBatches,
    OneByOne,
    Silence,
    ids,
    message,
    run,
    until,
)

from broker_nb.adapters import (
    BackOff,
    Messages,
    nack_all,
    streamify,
)
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.interfaces import BatchPolicy
from broker_nb.messages import Message


# ------------------------------------------------------------------ streams
def test_consumer_reads_messages_first_and_then_gets_the_error():
    """More messages than any buffer, then an error, and the consumer only reads: no deadlock, nothing missing (defect 2)."""

    class Failing:
        async def receive(self, handler):
            async with asyncio.TaskGroup() as group:
                for n in range(200):
                    group.create_task(handler(message(n)))
            raise DENIED()

    async def main():
        saw = []
        with pytest.raises(BrokerError, match="ask for READ"):  # noqa: PT012 - the loop is what raises
            async for m in Messages(Failing()).stream():
                saw.append(m)  # noqa: PERF401 - the error must not take what was read with it
        return ids(saw)

    assert run(main()) == list(range(200))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_retryable_error_is_waited_out_and_a_lasting_one_ends_the_stream(ahead, caplog):
    async def main():
        saw = []
        source = OneByOne(message(1), BROKEN(), BROKEN(), message(2), DENIED(), message(3))
        with pytest.raises(BrokerError, match="ask for READ"):  # noqa: PT012 - the loop is what raises
            async for m in Messages(source, back_off=FAST).stream(ahead=ahead):
                saw.append(m)  # noqa: PERF401 - the error must not take what was read with it
        assert ids(saw) == [1, 2]
        assert len(source.script) == 1, "nothing is taken after the end"

    with caplog.at_level(logging.WARNING, "broker_nb"):
        run(main())
    assert [r.message for r in caplog.records] == [f"{BROKEN()}; trying again in 0.0 s"] * 2


def test_a_pushed_source_is_started_again_after_a_retryable_error():
    async def main():
        attempts = []

        async def stream():
            attempts.append(1)
            yield message(len(attempts))
            raise BROKEN()

        async with aclosing(Messages(SimpleNamespace(stream=stream), back_off=FAST).stream()) as items:
            assert [(await anext(items)).id for _ in range(3)] == ["1", "2", "3"]

    run(main())


def test_a_source_that_ends_is_closed_and_not_begun_again():
    async def main():
        async def stream():
            yield message(1)

        it = Messages(SimpleNamespace(stream=stream), policy=BatchPolicy(count=2, age_s=math.inf))
        assert ids(await it.next_batch()) == [1]
        for _ in range(2):
            with pytest.raises(BrokerError) as e:
                await it.next_batch()
            assert e.value.kind is ErrorKind.CLOSED

    run(main())


def test_back_off_doubles_up_to_its_limit():
    delays = BackOff(first_s=0.1, limit_s=1.0).delays()
    assert [next(delays) for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    assert next(BackOff(first_s=9.0, limit_s=1.0).delays()) == 1.0


def test_back_off_starts_anew_after_a_success():
    async def main(monkeypatch):
        waits, sleep = [], asyncio.sleep

        async def asleep(seconds):
            waits.append(seconds)
            await sleep(0)

        monkeypatch.setattr("broker_nb.adapters.streams.asyncio.sleep", asleep)
        source = InBatches(BROKEN(), BROKEN(), [message(1)], BROKEN(), [message(2)])
        async with aclosing(Messages(source, back_off=BackOff(1.0, 60.0)).stream()) as items:
            await anext(items)
            await anext(items)
        return [w for w in waits if w >= 1]

    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(main(monkeypatch)) == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stream_that_was_idle_for_an_hour_still_delivers(ahead):
    async def main():
        clock = Clock()
        source = OneByOne(Silence(3600), message(1), Silence(3600), message(2), clock=clock)
        async with aclosing(Messages(source, clock=clock).stream(ahead=ahead)) as items:
            return [(await anext(items)).id, (await anext(items)).id]

    assert run(main()) == ["1", "2"]


def test_leaving_a_stream_gives_leftovers_back():
    async def main():
        log = []
        it = Messages(InBatches([message(n, log) for n in range(4)]))
        async with aclosing(it.stream()) as items:
            async for _ in items:
                break
        assert log == [("nack", 1), ("nack", 2), ("nack", 3)]

    run(main())


def test_leaving_a_stream_without_closing_it_gives_leftovers_back_too():
    async def main():
        log = []
        async for _ in Messages(InBatches([message(n, log) for n in range(3)])).stream():
            break
        await until(lambda: log == [("nack", 1), ("nack", 2)])

    run(main())


def test_closing_while_a_stream_waits_ends_it_with_closed():
    async def main():
        source = OneByOne()
        it = Messages(source)
        task = asyncio.ensure_future(anext(it.stream()))
        await asyncio.sleep(0.01)
        await it.close()
        await it.close()
        with pytest.raises(BrokerError) as e:
            await task
        assert e.value.kind is ErrorKind.CLOSED
        assert source.closed.is_set()

    run(main())


# ------------------------------------------------------------------ double buffering
def test_streamify_fetches_the_next_while_the_consumer_works():
    async def main():
        source = OneByOne(*(message(n) for n in range(3)))
        async with aclosing(streamify(source.next_message, Message.nack)) as items:
            for n in range(3):
                assert (await anext(items)).id == str(n)
                await until(lambda n=n: len(source.script) == max(0, 1 - n))

    run(main())


def test_streamify_puts_back_what_was_not_consumed():
    async def main():
        log = []
        source = InBatches([message(1, log)], [message(2, log), message(3, log)], [message(4, log)])
        async with aclosing(streamify(source.next_batch, lambda batch: nack_all(*batch))) as batches:
            assert ids(await anext(batches)) == [1]
            await until(lambda: len(source.script) == 1)
        assert log == [("nack", 2), ("nack", 3)]
        assert len(source.script) == 1

    run(main())


def test_streamify_raises_an_error_in_its_turn():
    async def main():
        stream = streamify(OneByOne(message(1), DENIED()).next_message, Message.nack)
        assert (await anext(stream)).id == "1"
        await asyncio.sleep(0.01)
        with pytest.raises(BrokerError, match="ask for READ"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(main())
