"""A daemon thread that owns one client object which only one thread may touch."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from broker_nb.errors import BrokerError, ErrorKind

T = TypeVar("T")
log = logging.getLogger("broker_nb")


class LaneThread:
    """Runs calls one after the other on a thread of its own. Daemon, so that the interpreter's exit is not held up."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._idle: tuple[Callable[[], object], float] | None = None
        self._closed = False
        threading.Thread(target=self._work, name=f"broker-nb-{name}", daemon=True).start()

    async def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Call `fn(*args)` on the thread. Cancelling the wait does not stop the call."""
        if self._closed:
            raise BrokerError(ErrorKind.CLOSED, self.name, f"{self.name} is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(value)  # type: ignore[arg-type] # value is T when there is no error
            else:
                future.set_exception(error)

        def call() -> None:
            try:
                outcome: tuple[T | None, BaseException | None] = (fn(*args), None)
            except BaseException as error:  # noqa: BLE001 - it belongs to the caller, not to this thread
                outcome = (None, error)
            if not loop.is_closed():  # else: the interpreter is leaving
                loop.call_soon_threadsafe(settle, *outcome)

        self._calls.put(call)
        return await future

    def idle(self, fn: Callable[[], object], every: float) -> None:
        """Call `fn` on the thread whenever nothing else ran for `every` seconds."""
        self._idle = (fn, every)
        self._calls.put(lambda: None)  # wake it, so that it waits with the new interval

    def close(self) -> None:
        """End the thread after what is queued. Idempotent."""
        if not self._closed:
            self._closed = True
            self._calls.put(None)

    def _work(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=self._idle[1] if self._idle else None)
            except queue.Empty:
                self._rest()
                continue
            if call is None:
                return
            call()
            del call  # do not pin the last call's rows while waiting

    def _rest(self) -> None:
        if self._idle is None:
            return
        try:
            self._idle[0]()
        except Exception:
            log.exception("%s: the idle call failed; it is not called again", self.name)
            self._idle = None
