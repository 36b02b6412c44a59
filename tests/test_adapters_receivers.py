"""Receivers out of anything: concurrency, order, failing handlers, cancelling."""

import asyncio
import random

import pytest
from scripted import (
    DENIED,
    NOW,
    InBatches,
    OneByOne,
    consume,
    message,
    run,
    until,
)

from broker_nb.adapters import (
    Messages,
    fan_in_receivers,
)
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.interfaces import BatchPolicy
from broker_nb.messages import Attributes, Message


# ------------------------------------------------------------------ receivers
def test_a_receiver_raises_the_iterators_error_at_once():
    """Not when it is cancelled, and not when a handler that takes for ever comes to its end (defect 1)."""

    async def main():
        log, cancelled = [], []

        async def handler(m):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(m.id)
                raise

        with pytest.raises(BrokerError, match="ask for READ"):
            await Messages(OneByOne(message(1, log), message(2, log), DENIED())).receive(handler)
        assert sorted(cancelled) == ["1", "2"]
        assert log == [], "cancelling a handler settles nothing"

    run(main(), within=2)


@pytest.mark.parametrize("shape", ["receiver", "batched receiver"])
def test_cancelling_while_a_batch_is_handed_out_does_not_hang(shape):
    async def main():
        log, saw = [], []
        it = Messages(InBatches([message(n, log) for n in range(10)]), policy=BatchPolicy(count=2), concurrency=1)
        task = asyncio.ensure_future(consume(it, shape, saw, work=lambda: asyncio.Event().wait()))
        await until(lambda: saw)
        task.cancel()
        await asyncio.wait({task}, timeout=2)
        assert task.cancelled()
        assert log == [("nack", n) for n in range(len(saw), 10)], "leftovers go back, what a handler had in hand stays held"

    run(main())


def test_cancelling_does_not_hang_when_the_broker_does_not_answer(monkeypatch, caplog):
    monkeypatch.setattr("broker_nb.adapters.pull.RELEASE_S", 0.05)

    async def main():
        async def never(verb, delay, reason):
            await asyncio.Event().wait()

        stuck = [Message("orders", str(n), None, b"", Attributes(), None, None, 1, NOW, never, lambda: None) for n in range(3)]
        it = Messages(InBatches(stuck), concurrency=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await it.receive(lambda m: asyncio.Event().wait())

    run(main(), within=2)
    assert "2 messages were not given back" in caplog.text


def test_a_failed_release_is_logged_and_does_not_hide_the_cancellation(caplog):
    async def main():
        gone = BrokerError(ErrorKind.LEASE_LOST, "2", "message 2: no longer held")
        it = Messages(InBatches([message(1), message(2, fail=gone)]), concurrency=1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await it.receive(lambda m: asyncio.Event().wait())

    run(main())
    assert "message 2: no longer held" in caplog.text


@pytest.mark.parametrize("shape", ["receiver", "batched receiver"])
def test_a_handler_that_raises_gives_its_messages_back_and_the_error_surfaces(shape):
    async def main():
        log = []
        it = Messages(InBatches([message(0, log), message(1, log)], [message(2, log)]))

        async def handler(given):
            first = given[0] if isinstance(given, list) else given
            if first.id == "0":
                await first.ack()
                raise ZeroDivisionError("row 0")

        with pytest.raises(ZeroDivisionError, match="row 0"):
            await (it.receive if shape == "receiver" else it.receive_batch)(handler)
        # It had acked message 0 itself: the first settlement wins on a broker, and this nack does nothing.
        assert log == [("ack", 0), ("nack", 0), ("nack", 1)][: 2 if shape == "receiver" else 3]

    run(main())


def test_two_handlers_that_fail_together_are_both_told():
    async def main():
        ready = asyncio.Event()

        async def handler(m):
            if m.id == "2":
                ready.set()
            await ready.wait()
            raise ValueError(f"row {m.id}")

        with pytest.raises(ValueError, match="row") as e:
            await Messages(OneByOne(message(1), message(2))).receive(handler)
        assert sorted([str(e.value), e.value.__notes__[0][-5:]]) == ["row 1", "row 2"]

    run(main())


def test_handlers_run_concurrently_within_the_bound_and_nothing_is_taken_ahead():
    async def main():
        source, running, most = OneByOne(*(message(n) for n in range(20))), 0, 0
        release = asyncio.Event()

        async def handler(_):
            nonlocal running, most
            running += 1
            most = max(most, running)
            await release.wait()
            running -= 1

        task = asyncio.ensure_future(Messages(source, concurrency=4).receive(handler))
        await until(lambda: running == 4)
        await asyncio.sleep(0.01)
        assert len(source.script) == 16
        release.set()
        await until(lambda: not source.script and running == 0)
        task.cancel()
        assert most == 4

    run(main())


def test_equal_keys_in_order_others_at_the_same_time():
    async def main():
        rng = random.Random(7)  # noqa: S311 - a fixed seed, no secret
        began, ended, most = {}, {}, [0]
        items = [message(n, key=rng.choice([b"", b"a", b"b", None])) for n in range(200)]

        async def handler(m):
            began.setdefault(m.key, []).append(int(m.id))
            most[0] = max(most[0], sum(map(len, began.values())) - sum(map(len, ended.values())))
            for _ in range(rng.randrange(5)):
                await asyncio.sleep(0)
            ended.setdefault(m.key, []).append(int(m.id))

        task = asyncio.ensure_future(Messages(OneByOne(*items), concurrency=8).receive(handler))
        await until(lambda: sum(map(len, ended.values())) == 200)
        task.cancel()
        for key in (b"", b"a", b"b"):
            assert began[key] == ended[key] == sorted(began[key])
        assert most[0] > 3, "no parallelism"

    run(main())


def test_one_failure_of_a_key_keeps_later_ones_of_it_away_from_the_handler():
    async def main():
        log, saw = [], []

        async def handler(m):
            saw.append(m.id)
            await asyncio.sleep(0.01)
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await Messages(OneByOne(*(message(n, log, key=b"k") for n in range(4)))).receive(handler)
        assert saw == ["0"]
        assert sorted(log) == [("nack", n) for n in range(4)]

    run(main())


def test_fan_in_receives_from_all_and_the_first_error_ends_all():
    async def main():
        saw, trigger = [], asyncio.Event()

        class Fails:
            async def receive(self, handler):
                await handler(message(9))
                await trigger.wait()
                raise DENIED()

        async def handler(m):
            saw.append(m.id)
            if len(saw) == 3:
                trigger.set()

        with pytest.raises(BrokerError, match="ask for READ"):
            await fan_in_receivers(Messages(OneByOne(message(1), message(2))), Fails()).receive(handler)
        assert sorted(saw) == ["1", "2", "9"]

    run(main())
    with pytest.raises(BrokerError, match="at least one"):
        fan_in_receivers()
