"""Every pull shape out of any one of them, for messages and for records."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import ClassVar, Generic, NamedTuple, Self, TypeAlias, TypeVar

from broker_nb.adapters.feeds import feed_of
from broker_nb.adapters.settle import nack_all
from broker_nb.adapters.streams import IDLE_S, BackOff, patiently, streamify
from broker_nb.adapters.tasks import task_group
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.interfaces import (
    Batches,
    BatchPolicy,
    BatchReceives,
    BatchStreams,
    MessageIterator,
    Receives,
    RecordIterator,
    Streams,
)
from broker_nb.messages import Message, Record

T = TypeVar("T", Message, Record)
Shapes: TypeAlias = Batches[T] | Streams[T] | BatchStreams[T] | Receives[T] | BatchReceives[T]

RELEASE_S = 5.0
"""Longest that giving leftovers back may hold up a cancellation or a close; what is not back by then comes after its lease."""

_ONE = BatchPolicy(count=1, bytes=None, age_s=0)
_AS_IT_COMES = BatchPolicy(count=sys.maxsize, bytes=None, age_s=0)
_log = logging.getLogger(__name__)


class _Held(NamedTuple, Generic[T]):
    item: T
    since: float
    bytes: int


class Pull(Generic[T]):
    """All pull shapes over one source; see `Messages` and `Records`.

    Items that were taken and not yet handed over wait in one buffer, which nothing but handing over or giving back empties. So
    timeouts, deadlines, cancellation and errors lose nothing.

    Parameters
    ----------
    source
        Any shape. It belongs to this object from now on: do not pull from it beside it.
    policy
        Batches of `next_batch`, `batch_stream` and `receive_batch`. Default: a source of batches keeps its own, others get
        `BatchPolicy()`.
    concurrency
        Most handlers running at the same time.
    back_off
        For retryable errors in streams and receivers; `next_...` raises every error.
    clock
        Seconds, monotonic; for tests.
    """

    _one_by: ClassVar[str]

    def __init__(
        self,
        source: MessageIterator | RecordIterator | Shapes[T],
        *,
        policy: BatchPolicy | None = None,
        concurrency: int = 10,
        back_off: BackOff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if concurrency < 1:
            raise BrokerError(ErrorKind.INVALID, "concurrency", f"concurrency={concurrency}: give 1 or more")
        batched = isinstance(source, Batches | BatchStreams | BatchReceives)
        self._policy = policy or (_AS_IT_COMES if batched else BatchPolicy())
        self._concurrency, self._back_off, self._clock = concurrency, back_off or BackOff(), clock
        self._feed = feed_of(source, self._one_by, self._keep)
        self._buffer: deque[_Held[T]] = deque()
        self._bytes = 0
        self._error: Exception | None = None
        self._turn = asyncio.Lock()
        self._closed = False

    async def _give_back(self, items: Sequence[T]) -> None:
        """What a failed handler had in hand goes back to the broker, where there is a way back."""

    async def _release(self) -> None:
        """The consumer has left: leftovers must not stay with us for nothing."""
        await self._feed.pause()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Give leftovers back and close the source; a call that waits gets CLOSED. Idempotent."""
        if not self._closed:
            self._closed = True
            await self._release()
            await self._feed.close()

    # ------------------------------------------------------------------ iterators
    async def next_batch(self, timeout: float | None = None) -> list[T]:
        """The next batch; empty when nothing came within `timeout` seconds. After a timeout, what is there is the batch.

        An error is raised after what came before it was handed over.
        """
        return await self._collect(timeout, self._policy)

    async def _next(self, timeout: float | None) -> T | None:
        found = await self._collect(timeout, _ONE)
        return found[0] if found else None

    async def _collect(self, timeout: float | None, policy: BatchPolicy) -> list[T]:
        deadline = math.inf if timeout is None else self._clock() + timeout
        asked = False
        while not self._enough(policy):
            due = min(deadline, self._buffer[0].since + policy.age_s) if self._buffer else deadline
            wait = None if due == math.inf else max(due - self._clock(), 0.0)
            if wait == 0 and (asked or self._buffer):
                break
            had, asked = len(self._buffer), True
            await self._fetch(wait)
            if len(self._buffer) == had and self._clock() < due and not self._error:
                await asyncio.sleep(IDLE_S)
        return self._hand_over(policy)

    def _enough(self, policy: BatchPolicy) -> bool:
        if self._closed:
            raise BrokerError(ErrorKind.CLOSED, "pull", "closed; open it again to go on")
        if self._error and not self._buffer:
            error, self._error = self._error, None
            raise error
        full = len(self._buffer) >= policy.count or (policy.bytes is not None and self._bytes >= policy.bytes)
        return full or self._error is not None

    async def _fetch(self, wait: float | None) -> None:
        """One call of the source, or waiting for one that another task has under way."""
        shared = self._turn.locked()
        try:
            async with asyncio.timeout(wait):
                await self._turn.acquire()
        except TimeoutError:
            return
        try:
            if not shared:
                await self._feed.fetch(wait)
        except Exception as error:  # noqa: BLE001 - nothing is swallowed: the next look at the buffer raises it in its turn
            self._error = error
        finally:
            self._turn.release()
        if self._closed:
            await self._release()

    def _keep(self, items: Iterable[T]) -> None:
        now = self._clock()
        for item in items:
            size = len(item.data or b"") + len(item.key or b"")
            self._buffer.append(_Held(item, now, size))
            self._bytes += size

    def _hand_over(self, policy: BatchPolicy) -> list[T]:
        batch: list[T] = []
        room = math.inf if policy.bytes is None else policy.bytes
        while self._buffer and len(batch) < policy.count and (not batch or self._buffer[0].bytes <= room):
            held = self._buffer.popleft()
            room -= held.bytes
            self._bytes -= held.bytes
            batch.append(held.item)
        return batch

    async def _put_back(self, items: Sequence[T]) -> None:
        behind, self._buffer, self._bytes = self._buffer, deque(), 0
        self._keep(items)
        self._bytes += sum(held.bytes for held in behind)
        self._buffer.extend(behind)

    # ------------------------------------------------------------------ streams
    async def stream(self, *, ahead: bool = False) -> AsyncGenerator[T, None]:
        """One by one. Retryable errors are waited out, any other ends the stream; leaving it gives leftovers back.

        Parameters
        ----------
        ahead
            Fetch the next one while the consumer works on this one.
        """
        async with aclosing(self._stream(_ONE, ahead)) as batches:
            async for batch in batches:
                yield batch[0]

    def batch_stream(self, *, ahead: bool = False) -> AsyncGenerator[list[T], None]:
        """As `stream`, batch by batch."""
        return self._stream(self._policy, ahead)

    async def _stream(self, policy: BatchPolicy, ahead: bool) -> AsyncGenerator[list[T], None]:
        fetch = partial(self._collect, None, policy)
        try:
            if ahead:
                async with aclosing(streamify(fetch, self._put_back, self._back_off)) as batches:
                    async for batch in batches:
                        yield batch
            while not ahead:
                yield await patiently(fetch, self._back_off)
        finally:
            await self._release()

    # ------------------------------------------------------------------ receivers
    async def receive(self, handler: Callable[[T], Awaitable[object]]) -> None:
        """Run `handler` on each item, `concurrency` at a time; those of equal topic and key one after the other, in order.

        Returning settles nothing: handlers ack by themselves. Receiving ends by being cancelled, by the source's first error that
        is not retryable, and by the first error of a handler, which is raised as it is after its message was given back. The
        other handlers are then cancelled, and that settles nothing either: what they had in hand stays held until its lease ends.
        What no handler had begun on is given back.
        """
        await self._serve(_ONE, lambda batch: handler(batch[0]), _key)

    async def receive_batch(self, handler: Callable[[list[T]], Awaitable[object]]) -> None:
        """As `receive`, with batches, and no order among batches that are handled at the same time (`concurrency=1` keeps it)."""
        await self._serve(self._policy, handler, lambda _: None)

    async def _serve(
        self,
        policy: BatchPolicy,
        handle: Callable[[list[T]], Awaitable[object]],
        order: Callable[[list[T]], Hashable | None],
    ) -> None:
        slots = asyncio.Semaphore(self._concurrency)
        untouched: dict[int, list[T]] = {}
        latest: dict[Hashable, asyncio.Task[None]] = {}

        async def work(batch: list[T], before: asyncio.Task[None] | None) -> None:
            try:
                if before is not None:
                    await asyncio.wait({before})
                del untouched[id(batch)]
                await handle(batch)
            except Exception:
                await self._give_back(batch)
                raise
            finally:
                slots.release()

        def done(key: Hashable, task: asyncio.Task[None]) -> None:
            if latest.get(key) is task:
                del latest[key]

        try:
            async with task_group() as workers:
                while True:
                    await slots.acquire()  # before fetching: nothing is taken that nobody can work on
                    batch = await patiently(partial(self._collect, None, policy), self._back_off)
                    untouched[id(batch)] = batch  # a task that is cancelled before its first step never runs at all
                    key = order(batch)
                    task = workers.create_task(work(batch, latest.get(key)))
                    if key is not None:
                        latest[key] = task
                        task.add_done_callback(partial(done, key))
        finally:
            await self._put_back([item for batch in untouched.values() for item in batch])
            await self._release()


def _key(batch: Sequence[Message | Record]) -> Hashable | None:
    return None if batch[0].key is None else (batch[0].topic, batch[0].key)


class Messages(Pull[Message]):
    """Every pull shape of messages out of any one of them; parameters as for `Pull`.

    Leaving a stream or a receiver, and `close`, nack what was taken and not handed over. What a cancelled `next_...` had taken
    comes with the next call.

    Examples
    --------
    >>> async with Messages(iterator, policy=BatchPolicy(count=100)) as messages:  # doctest: +SKIP
    ...     await messages.receive_batch(work)
    """

    _one_by = "next_message"

    async def next_message(self, timeout: float | None = None) -> Message | None:
        """The next message; None when nothing came within `timeout` seconds."""
        return await self._next(timeout)

    async def _give_back(self, items: Sequence[Message]) -> None:
        try:
            async with asyncio.timeout(RELEASE_S):
                await nack_all(*items)
        except (BrokerError, TimeoutError) as error:
            _log.warning(
                "%d messages were not given back and come when their lease ends: %s", len(items), str(error) or "no answer"
            )

    async def _release(self) -> None:
        await super()._release()
        await self._give_back(self._hand_over(_AS_IT_COMES))


class Records(Pull[Record]):
    """Every pull shape of records out of any one of them; parameters as for `Pull`.

    A record cannot be given back, and passing over one would let a later commit lose it. So what was taken and not handed over
    stays here for the next call, and after `close` comes to whoever reads the group next. Handlers that run at the same time use
    `ack`, which commits only the contiguous prefix, not `commit_to`; a record whose handler failed stays uncommitted.
    """

    _one_by = "next_record"

    async def next_record(self, timeout: float | None = None) -> Record | None:
        """The next record; None when nothing came within `timeout` seconds."""
        return await self._next(timeout)


def fan_in_receivers(*receivers: Receives[T]) -> Receives[T]:
    """One receiver out of several, each within its own bounds: the first error of any ends all, and is raised.

    Raises
    ------
    BrokerError
        INVALID without any receiver.
    """
    if not receivers:
        raise BrokerError(ErrorKind.INVALID, "receivers", "fan_in_receivers needs at least one receiver")
    return _FanIn(receivers)


@dataclass(frozen=True, slots=True)
class _FanIn(Generic[T]):
    receivers: Sequence[Receives[T]]

    async def receive(self, handler: Callable[[T], Awaitable[object]]) -> None:
        async with task_group() as group:
            for receiver in self.receivers:
                group.create_task(receiver.receive(handler))
