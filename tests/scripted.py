"""Sources for tests of the adapters: scripts of items, errors and silences, on a clock of the test's own."""

import asyncio
import math
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

from broker_nb.adapters import BackOff
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attributes, Message, Record

NOW = datetime(2026, 1, 1, tzinfo=UTC)
FAST = BackOff(first_s=0.001, limit_s=0.002)
BROKEN = partial(BrokerError, ErrorKind.UNREACHABLE, "orders", "orders: no answer; is the server up?", retryable=True)
DENIED = partial(BrokerError, ErrorKind.PERMISSION, "orders", "orders: not allowed to read; ask for READ")


def run(coroutine, within=10.0):
    return asyncio.run(asyncio.wait_for(coroutine, within))


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - any condition, with a deadline
            await asyncio.sleep(0.001)


def message(n, log=None, key=None, data=b"x", fail=None):
    async def settle(verb, delay, reason):
        if fail is not None:
            raise fail
        if log is not None:
            log.append((verb, n))

    return Message("orders", str(n), key, data, Attributes(), None, None, 1, NOW, settle, lambda: None)


def record(n, log=None, key=None, partition=0, topic="orders", data=b"x"):
    async def mark(upto):
        if log is not None:
            log.append((upto, topic, partition, n))

    return Record(topic, f"{partition}:{n}", key, data, Attributes(), None, None, partition, n, NOW, mark)


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@dataclass
class Silence:
    seconds: float


class Source:
    """Plays a script of items, errors and silences; silences pass on the clock. After it, nothing comes."""

    def __init__(self, *script, clock=None):
        self.script, self.clock = deque(script), clock or Clock()
        self.closed, self.busy, self.asked, self.fetches = asyncio.Event(), False, [], 0

    async def take(self, timeout=None):
        assert not self.busy, "two calls in flight"
        self.busy = True
        self.asked.append(timeout)
        try:
            await asyncio.sleep(0)
            return await self.play(timeout)
        finally:
            self.busy = False

    async def play(self, timeout):
        left = math.inf if timeout is None else timeout
        while not self.closed.is_set():
            if not self.script:
                if timeout is None:
                    await self.closed.wait()
                    continue
                self.clock.now += left
                return None
            step = self.script[0]
            if isinstance(step, Silence):
                passed = min(left, step.seconds)
                self.clock.now += passed
                left, step.seconds = left - passed, step.seconds - passed
                if step.seconds > 0:
                    return None
                self.script.popleft()
            else:
                self.script.popleft()
                if isinstance(step, Exception):
                    raise step
                return step
        raise BrokerError(ErrorKind.CLOSED, "orders", "closed")

    async def close(self):
        self.closed.set()


class OneByOne(Source):
    async def next_message(self, timeout=None):
        return await self.take(timeout)


class RecordByRecord(Source):
    async def next_record(self, timeout=None):
        return await self.take(timeout)


class InBatches(Source):
    async def next_batch(self, timeout=None):
        return await self.take(timeout) or []


def ids(items):
    return [int(i.id.rpartition(":")[2]) for i in items]


async def consume(pull, shape, saw, work=None):
    """Consumes in one shape for ever; `saw` gets an item when the consumer has it."""

    async def handle(items):
        saw.extend(items)
        if work:
            await work()

    one = getattr(pull, "next_message", None) or pull.next_record
    if shape == "iterator":
        while True:
            await handle([await one()])
    if shape == "batched iterator":
        while True:
            await handle(await pull.next_batch())
    if shape == "receiver":
        await pull.receive(lambda item: handle([item]))
    if shape == "batched receiver":
        await pull.receive_batch(handle)
    if "batched" in shape:
        async with aclosing(pull.batch_stream(ahead="ahead" in shape)) as batches:
            async for batch in batches:
                await handle(batch)
    async with aclosing(pull.stream(ahead="ahead" in shape)) as items:
        async for item in items:
            await handle([item])
