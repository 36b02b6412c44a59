"""One call in flight, urgent ones first, and a started call always ends."""

import asyncio

import pytest

from broker_nb.portable.turnstile import Turnstile


def test_one_at_a_time_urgent_first():
    async def go():
        turnstile, order, flying = Turnstile(), [], 0

        async def work(name):
            nonlocal flying
            flying += 1
            assert flying == 1
            order.append(name)
            await asyncio.sleep(0.001)
            flying -= 1

        first = asyncio.ensure_future(turnstile.call(lambda: work("first")))
        await asyncio.sleep(0)
        patient = [asyncio.ensure_future(turnstile.call(lambda i=i: work(f"p{i}"))) for i in range(3)]
        await asyncio.sleep(0)
        urgent = asyncio.ensure_future(turnstile.call(lambda: work("urgent"), urgent=True))
        await asyncio.gather(first, urgent, *patient)
        return order

    assert asyncio.run(go()) == ["first", "urgent", "p0", "p1", "p2"]


def test_a_started_call_ends_although_its_caller_left_and_the_next_waits_for_it():
    async def go():
        turnstile, put_away, gate = Turnstile(), [], asyncio.Event()

        async def pull():
            await gate.wait()
            put_away.append("rows")

        caller = asyncio.ensure_future(turnstile.call(pull))
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert not await turnstile.drained(0.01)
        following = asyncio.ensure_future(turnstile.call(lambda: asyncio.sleep(0, tuple(put_away))))
        gate.set()
        return await following

    assert asyncio.run(go()) == ("rows",)


def test_a_caller_that_leaves_the_line_leaves_no_trace():
    async def go():
        turnstile, started, gate = Turnstile(), [], asyncio.Event()

        async def work(name):
            started.append(name)
            await gate.wait()

        tasks = [asyncio.ensure_future(turnstile.call(lambda n=n: work(n))) for n in "abc"]
        await asyncio.sleep(0)
        tasks[1].cancel()
        gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await turnstile.drained(1)
        return started

    assert asyncio.run(go()) == ["a", "c"]


def test_a_turn_granted_together_with_a_cancellation_is_passed_on():
    async def go():
        turnstile, gate = Turnstile(), asyncio.Event()
        first = asyncio.ensure_future(turnstile.call(gate.wait))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(turnstile.call(lambda: asyncio.sleep(0)))
        await asyncio.sleep(0)
        gate.set()
        await first
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        return await turnstile.call(lambda: asyncio.sleep(0, "free"))

    assert asyncio.run(asyncio.wait_for(go(), 5)) == "free"


def test_a_failing_call_frees_the_handle():
    async def go():
        turnstile = Turnstile()

        async def fail():
            raise ValueError

        with pytest.raises(ValueError):  # noqa: PT011 - the plain error must come through unchanged
            await turnstile.call(fail)
        return await turnstile.call(lambda: asyncio.sleep(0, 1))

    assert asyncio.run(go()) == 1
