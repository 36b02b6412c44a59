"""One call in flight per handle, and what was started is always brought to its end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Turnstile:
    """Lets one call at a time onto a handle; urgent ones (a person's settlement) go before the next slice.

    A caller that is cancelled while waiting for its turn leaves without a trace. Once its call has started, the call runs to its end
    all the same, because a driver call that is cut off could lose rows; so `start` must itself put away what it got.
    """

    def __init__(self) -> None:
        self._busy = False
        self._urgent: deque[asyncio.Future[None]] = deque()
        self._patient: deque[asyncio.Future[None]] = deque()

    async def call(self, start: Callable[[], Coroutine[Any, Any, T]], *, urgent: bool = False) -> T:
        """Run `start()` when it is its turn."""
        await self._enter(urgent)
        task = asyncio.ensure_future(start())
        task.add_done_callback(self._leave)
        return await asyncio.shield(task)

    async def drained(self, timeout: float) -> bool:
        """Wait until no call is in flight or waiting, at most `timeout` seconds; whether that came."""
        try:
            async with asyncio.timeout(timeout):
                await self._enter(urgent=False)
        except TimeoutError:
            return False
        self._next()
        return True

    async def _enter(self, urgent: bool) -> None:
        if not self._busy:
            self._busy = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line = self._urgent if urgent else self._patient
        line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._next()  # the turn came together with the cancellation: pass it on
            elif turn in line:
                line.remove(turn)
            raise

    def _next(self) -> None:
        for line in (self._urgent, self._patient):
            while line:
                turn = line.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._busy = False

    def _leave(self, task: asyncio.Future[Any]) -> None:
        if not task.cancelled():
            task.exception()  # when the caller has gone, nobody else looks at it
        self._next()
