"""The loop thread and the lanes: who waits, who is interrupted, what is cleaned up."""

import _thread
import asyncio
import os
import signal
import threading
import time

import pytest

from broker_nb.errors import BrokerError
from broker_nb.portable.lane import LaneThread
from broker_nb.portable.loop import LoopThread, anywhere, shared_loop


@pytest.fixture
def loop():
    thread = LoopThread("test-loop")
    yield thread
    thread.close()


def test_run_returns_the_result_and_raises_the_error(loop):
    async def double(x):
        return x * 2

    async def fail():
        raise ValueError("no")

    assert loop.run(double(21)) == 42
    with pytest.raises(ValueError, match="no"):
        loop.run(fail())


def test_the_coroutines_own_timeout_is_not_taken_for_the_tick(loop):
    async def late():
        async with asyncio.timeout(0.01):
            await asyncio.sleep(5)

    with pytest.raises(TimeoutError):
        loop.run(late())


def test_an_interrupt_ends_a_blocked_call_within_half_a_second_and_runs_its_clean_up(loop):
    cleaned = threading.Event()
    started = threading.Event()

    async def forever():
        try:
            started.set()
            await asyncio.sleep(60)
        finally:
            cleaned.set()

    def interrupt():
        started.wait(5)
        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        loop.run(forever())
    assert time.monotonic() - begin < 2  # 0.5 s on a machine that is not loaded
    assert cleaned.wait(5)
    assert loop.run(asyncio.sleep(0, "usable")) == "usable"


def test_a_signal_wakes_an_idle_await(loop):
    """As the kernel's stop button: the cell's task is cancelled from a signal handler, which does not wake the selector."""
    cleaned = threading.Event()

    async def forever():
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.set()

    async def cell():
        task = asyncio.current_task()
        previous = signal.signal(signal.SIGINT, lambda *_: task.cancel())
        try:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            await loop.arun(forever())
        finally:
            signal.signal(signal.SIGINT, previous)

    begin = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cell())
    assert time.monotonic() - begin < 3  # 0.5 s on a machine that is not loaded
    assert cleaned.wait(5)


def test_a_blocking_call_from_the_loop_itself_is_refused(loop):
    async def inner():
        loop.run(asyncio.sleep(0))

    with pytest.raises(RuntimeError, match="await"):
        loop.run(inner())


def test_it_starts_again_after_close(loop):
    loop.close()
    assert loop.run(asyncio.sleep(0, 1)) == 1


def test_anywhere_hops_from_a_foreign_loop_and_stays_on_its_own():
    class Thing:
        @anywhere
        async def where(self):
            return threading.current_thread().name

        @anywhere
        async def nested(self):
            return await self.where()

    assert asyncio.run(Thing().nested()) == "broker-nb-loop"
    assert shared_loop().run(Thing().nested()) == "broker-nb-loop"


def test_a_lane_runs_in_order_on_one_thread_and_hands_over_errors(loop):
    async def go():
        lane = LaneThread("x")
        names = await asyncio.gather(*(lane.run(lambda i=i: (i, threading.get_ident())) for i in range(50)))
        with pytest.raises(ZeroDivisionError):
            await lane.run(lambda: 1 / 0)
        lane.close()
        lane.close()
        with pytest.raises(BrokerError, match="closed"):
            await lane.run(print)
        return names

    names = loop.run(go())
    assert [i for i, _ in names] == list(range(50))
    assert len({thread for _, thread in names}) == 1


def test_a_lane_rests_only_when_idle_and_survives_a_failing_rest(loop):
    rested = threading.Event()

    async def go():
        lane = LaneThread("y")
        lane.idle(rested.set, 0.01)
        assert await asyncio.to_thread(rested.wait, 5)
        failed = threading.Event()

        def fail():
            failed.set()
            raise ZeroDivisionError

        lane.idle(fail, 0.01)
        assert await asyncio.to_thread(failed.wait, 5)
        assert await lane.run(lambda: "alive") == "alive"
        lane.close()

    loop.run(go())


def test_abandoning_a_lane_call_does_not_break_the_lane(loop):
    async def go():
        lane = LaneThread("z")
        gate = threading.Event()
        waiting = asyncio.ensure_future(lane.run(gate.wait, 5))
        await asyncio.sleep(0)
        waiting.cancel()
        gate.set()
        assert await lane.run(lambda: 7) == 7
        lane.close()

    loop.run(go())
