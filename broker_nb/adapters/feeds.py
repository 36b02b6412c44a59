"""Where a `Pull` gets its items: something that it asks, or something that pushes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.interfaces import Batches, BatchReceives, BatchStreams, Receives, Streams

T = TypeVar("T")
Keep: TypeAlias = Callable[[Iterable[T]], None]


class Feed(Protocol):
    """One source. What comes is handed to a `Keep` in the very step in which it comes, so that no cancellation can lose it."""

    async def fetch(self, timeout: float | None) -> None:
        """Returns when something was kept, or after `timeout` seconds. Never two calls at a time."""
        ...

    async def pause(self) -> None:
        """Nothing is kept after this until the next fetch."""
        ...

    def close(self) -> Awaitable[None]: ...


@dataclass(frozen=True, slots=True)
class Asked(Generic[T]):
    """A source with a `next_...` method."""

    keep: Keep[T]
    ask: Callable[[float | None], Awaitable[Iterable[T]]]
    close: Callable[[], Awaitable[None]]

    async def fetch(self, timeout: float | None) -> None:
        self.keep(await self.ask(timeout))

    async def pause(self) -> None:
        """Comes only when asked."""


class Pushed(Generic[T]):
    """A source that runs by itself: a stream or a receiver. It runs from the first fetch on, and never ahead of the fetches."""

    def __init__(
        self, keep: Keep[T], run: Callable[[Callable[[Iterable[T]], Awaitable[None]]], Awaitable[None]], name: str
    ) -> None:
        self._keep, self._run, self._name = keep, run, name
        self._task: asyncio.Future[None] | None = None
        self._news, self._wanted = asyncio.Event(), asyncio.Event()

    async def fetch(self, timeout: float | None) -> None:
        self._news.clear()
        self._wanted.set()
        if self._task is None:
            self._task = asyncio.ensure_future(self._run(self._accept))
            self._task.add_done_callback(lambda _: self._news.set())
        if not self._task.done():
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                return
        if self._task.done():
            self._ended(self._task)

    def _ended(self, task: asyncio.Future[None]) -> None:
        if not task.cancelled() and task.exception() is None:  # stays ended: running it again would deliver again
            raise BrokerError(ErrorKind.CLOSED, self._name, f"{self._name} has ended; open it again to go on")
        self._task = None
        if not task.cancelled():
            task.result()

    async def _accept(self, items: Iterable[T]) -> None:
        self._keep(items)
        self._news.set()
        self._wanted.clear()
        await self._wanted.wait()

    async def pause(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task})

    async def close(self) -> None:
        await self.pause()


def feed_of(source: object, one: str, keep: Keep[Any]) -> Feed:
    """The feed for any shape; batches first, being the fewest calls. `one` is the method that gives a single item."""
    name = type(source).__name__
    match source:
        case Batches():
            return Asked(keep, source.next_batch, source.close)
        case object(close=close) if hasattr(source, one):
            return Asked(keep, partial(_as_batch, getattr(source, one)), close)
        case BatchStreams():
            return Pushed(keep, lambda accept: _each(source.batch_stream(), accept), name)
        case Streams():
            return Pushed(keep, lambda accept: _each(source.stream(), lambda item: accept([item])), name)
        case BatchReceives():
            return Pushed(keep, source.receive_batch, name)
        case Receives():
            return Pushed(keep, lambda accept: source.receive(lambda item: accept([item])), name)
    raise BrokerError(
        ErrorKind.INVALID, name, f"{name} cannot be pulled from; give an iterator with {one}, a stream or a receiver"
    )


async def _as_batch(next_one: Callable[[float | None], Awaitable[T | None]], timeout: float | None) -> list[T]:
    item = await next_one(timeout)
    return [] if item is None else [item]


async def _each(stream: AsyncIterator[T], accept: Callable[[T], Awaitable[None]]) -> None:
    async with AsyncExitStack() as leaving:
        if isinstance(stream, AsyncGenerator):
            leaving.push_async_callback(stream.aclose)  # at once, not when the collector finds it
        async for item in stream:
            await accept(item)
