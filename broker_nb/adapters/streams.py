"""Streams: back-off for what may pass, and fetching one ahead."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from broker_nb.errors import BrokerError

T = TypeVar("T")

IDLE_S = 0.01
"""Pause before asking again where a source says "nothing yet" without having waited."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BackOff:
    """How long to wait after a retryable error: `first_s` seconds, then twice as long each time, at most `limit_s`."""

    first_s: float = 0.1
    limit_s: float = 30.0

    def delays(self) -> Iterator[float]:
        """The waits in seconds, for ever."""
        delay = min(self.first_s, self.limit_s)
        while True:
            yield delay
            delay = min(delay * 2, self.limit_s)


async def patiently(fetch: Callable[[], Awaitable[T | None]], back_off: BackOff) -> T:
    """The first thing that `fetch` gives: None and empty mean nothing yet, a retryable BrokerError is logged and waited out."""
    delays = back_off.delays()
    while True:
        try:
            if found := await fetch():
                return found
            await asyncio.sleep(IDLE_S)
        except BrokerError as error:
            if not error.retryable:
                raise
            delay = next(delays)
            _log.warning("%s; trying again in %.1f s", error, delay)
            await asyncio.sleep(delay)


async def streamify(
    fetch: Callable[[], Awaitable[T | None]],
    put_back: Callable[[T], Awaitable[object]],
    back_off: BackOff | None = None,
) -> AsyncGenerator[T, None]:
    """Double buffering: while the consumer works on one item, the next is fetched.

    Parameters
    ----------
    fetch
        Gives the next item, say `iterator.next_message` or `iterator.next_batch`; what counts as nothing yet is skipped.
    put_back
        Takes what was fetched and not consumed when the stream ends, say `Message.nack`.
    back_off
        For retryable errors; any other ends the stream, after everything that came before it.

    Examples
    --------
    >>> async with contextlib.aclosing(streamify(iterator.next_message, Message.nack)) as stream:  # doctest: +SKIP
    ...     async for message in stream:
    ...         await work(message)
    """
    pause = back_off or BackOff()
    ahead = asyncio.ensure_future(patiently(fetch, pause))
    try:
        while True:
            await asyncio.wait({ahead})  # unlike `await ahead`, being cancelled here does not cancel the fetch
            item = ahead.result()
            ahead = asyncio.ensure_future(patiently(fetch, pause))
            yield item
    finally:
        ahead.cancel()
        await asyncio.wait({ahead})
        # An error that the consumer did not wait for is not its business; a lasting one meets the next call.
        if not ahead.cancelled() and ahead.exception() is None:
            await put_back(ahead.result())
