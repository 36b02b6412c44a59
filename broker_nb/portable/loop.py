"""One background event loop per process, for cells that block and cells that await.

A kernel runs cells, widget callbacks and subshells on threads and loops of its own choice, so everything that touches a client
runs on this one thread. Nothing patches anybody's asyncio.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

T = TypeVar("T")
S = TypeVar("S")
P = ParamSpec("P")

TICK_S = 0.2
"""How often a waiting caller wakes: an interrupt does not wake an idle `await`, nor a plain wait on Windows."""
CLEANUP_S = 0.4
"""How long an interrupted caller waits for the call's own clean-up; with TICK_S the longest an interrupt can take."""


class Call(concurrent.futures.Future[T]):
    """A coroutine running on the loop thread. Cancelling asks it to stop; it is done when it has stopped."""

    def __init__(self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T]) -> None:
        super().__init__()
        self._on = loop
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._start, coro)

    def _start(self, coro: Coroutine[Any, Any, T]) -> None:
        self._task = self._on.create_task(coro)
        self._task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.set_exception(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self.set_exception(error)
        else:
            self.set_result(task.result())

    def cancel(self) -> bool:
        def ask() -> None:
            if self._task is not None:
                self._task.cancel()

        if self.done():
            return False
        self._on.call_soon_threadsafe(ask)
        return True


class LoopThread:
    """A daemon thread with an asyncio loop; started on first use and again after a fork."""

    def __init__(self, name: str = "broker-nb-loop") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._pid = -1

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop."""
        with self._lock:
            if self._loop is None or self._pid != os.getpid():
                self._spawn()
            assert self._loop is not None  # noqa: S101 - _spawn sets it
            return self._loop

    def _spawn(self) -> None:
        ready: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()

        async def live() -> None:
            self._stop = asyncio.Event()
            ready.set_result(asyncio.get_running_loop())
            await self._stop.wait()

        self._thread = threading.Thread(target=lambda: asyncio.run(live()), name=self._name, daemon=True)
        self._thread.start()
        self._loop, self._pid = ready.result(), os.getpid()
        atexit.register(self.close)

    def submit(self, coro: Coroutine[Any, Any, T]) -> Call[T]:
        """Start it on the loop thread, from any thread."""
        return Call(self.loop, coro)

    def run(self, coro: Coroutine[Any, Any, T]) -> T:
        """Block the calling thread until it is done.

        An interrupt (Ctrl-C, the kernel's stop button) cancels it and waits a moment for its clean-up.
        """
        if threading.current_thread() is self._thread:
            coro.close()
            raise RuntimeError("a blocking call on the broker loop would wait for itself; await the .aio method instead")
        call = self.submit(coro)
        try:
            while True:
                done, _ = concurrent.futures.wait([call], timeout=TICK_S)
                if done:
                    return call.result()
        except KeyboardInterrupt:
            call.cancel()
            concurrent.futures.wait([call], timeout=CLEANUP_S)
            raise

    async def arun(self, coro: Coroutine[Any, Any, T]) -> T:
        """Await it from any loop; cancelling travels to the loop thread."""
        if asyncio.get_running_loop() is self._loop and self._pid == os.getpid():
            return await coro
        call = self.submit(coro)
        waiter = asyncio.wrap_future(call)
        waiter.add_done_callback(lambda f: f.cancelled() or f.exception())  # an abandoned failure is not "never retrieved"
        try:
            while not (await asyncio.wait({waiter}, timeout=TICK_S))[0]:
                pass
        except asyncio.CancelledError:
            call.cancel()
            await asyncio.wait({waiter}, timeout=CLEANUP_S)
            raise
        return waiter.result()

    def close(self) -> None:
        """End the thread; what still runs on it is cancelled. It starts again when used again."""
        with self._lock:
            loop, stop, thread = self._loop, self._stop, self._thread
            self._loop = self._stop = self._thread = None
        if loop is not None and stop is not None and thread is not None and self._pid == os.getpid():
            loop.call_soon_threadsafe(stop.set)
            thread.join(5)


_shared = LoopThread()


def shared_loop() -> LoopThread:
    """The one loop thread of this process."""
    return _shared


def anywhere(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Let an async method be awaited from any loop; it runs on the shared loop thread."""

    @functools.wraps(method)
    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await _shared.arun(method(self, *args, **kwargs))

    return call
