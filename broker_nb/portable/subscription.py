"""What subscriptions of both families have in common: pulling in every bound, failing for good, closing once."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Generic, TypeVar

from broker_nb.backends.driver import Batch, Capabilities, Event, Facts, Source
from broker_nb.portable.loop import anywhere
from broker_nb.portable.pulling import Handle, Puller, Taken

M = TypeVar("M")
CLOSE_S = 2.0
MAX_KNOWN = 200_000
"""Deliveries of the past that a subscription remembers, so that settling one again has an answer."""


class Subscription(ABC, Generic[M]):
    """One open subscription.

    Parameters
    ----------
    name
        topic/subscription, for texts.
    open_source
        Opens one more Source on the subscription.
    """

    def __init__(
        self,
        name: str,
        capabilities: Capabilities,
        facts: Facts,
        open_source: Callable[[], Coroutine[Any, Any, Source]],
    ) -> None:
        self.name = name
        self.facts = facts
        self._capabilities = capabilities
        self._open_source = open_source
        self._opening = asyncio.Lock()
        self._handles: list[Handle] = []
        self._puller = Puller(name, capabilities.slice_s, self._choose, self._took)
        self._closed: asyncio.Task[None] | None = None
        self._forget_at = MAX_KNOWN  # grows with what is held, so that forgetting is not tried at each pull

    @property
    def handles(self) -> Sequence[Handle]:
        """The open sources; an event names the one that it is about."""
        return self._handles

    async def start(self) -> None:
        """Open the first source, so that a wrong name is an error now and not later."""
        await self._choose()

    @abstractmethod
    async def _choose(self) -> Handle:
        """The handle to pull from next, opened when needed."""

    @abstractmethod
    def _took(self, handle: Handle, batch: Batch, first: int) -> None:
        """Note rows that were pulled; the first is delivery `first`."""

    @abstractmethod
    def _objects(self, taken: Iterable[Taken]) -> list[M]:
        """What was taken, as objects."""

    @property
    @abstractmethod
    def held_count(self) -> int:
        """How many rows this session has and has not settled."""

    @anywhere
    async def take(
        self, rows: int, max_bytes: int = 1 << 30, *, timeout: float | None = None, age: float | None = None
    ) -> list[Taken]:
        """Take up to `rows` rows; see `Puller.take`. Effect on the broker: messages are leased to this session; a log: none."""
        return await self._puller.take(rows, max_bytes, timeout=timeout, age=age)

    @anywhere
    async def next_batch(
        self, timeout: float | None = None, *, count: int = 100, max_bytes: int = 1 << 24, age: float = 0.1
    ) -> list[M]:
        """Up to `count` of them or `max_bytes` bytes, at the latest `age` seconds after the first; empty = nothing yet."""
        return self._objects(await self._puller.take(count, max_bytes, timeout=timeout, age=age))

    async def _next(self, timeout: float | None) -> M | None:
        found = self._objects(await self._puller.take(1, 1 << 30, timeout=timeout))
        return found[0] if found else None

    @property
    def failed(self) -> bool:
        """Whether its source is gone for good; another one may be opened."""
        return self._puller.failure is not None

    def on_event(self, event: Event) -> None:
        """Told by the connection that something happened by itself."""
        if event.kind == "failed" and event.error is not None and any(h.source is event.handle for h in self._handles):
            self._puller.failure = event.error

    @anywhere
    async def close(self) -> None:
        """Give back what is held and leave. Idempotent; deletes nothing durable, and what was not settled comes again."""
        if self._closed is None:
            self._closed = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closed)

    async def _close(self) -> None:
        self._puller.closed = True
        for handle in self._handles:
            await handle.pulls.drained(self._capabilities.slice_s + CLOSE_S)
        await self._give_back()
        for handle in self._handles:
            await handle.source.close()

    async def _give_back(self) -> None:
        """Before the sources are closed: nothing more is pulled now."""
        self._puller.drop_ready()
