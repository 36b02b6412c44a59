"""Taking rows from a source, whatever the family: slices, bounds by count, bytes and time, and nothing dropped on the way."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from broker_nb.backends.driver import Batch, Source
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.turnstile import Turnstile

MAX_WAIT_S = 0.5
"""Longest slice, also where a driver would allow more: closing and the next call after an interrupt wait for a slice to end."""
BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class Taken:
    """Rows handed to a caller; row i of the batch is delivery `first + i` of this subscription."""

    batch: Batch
    first: int

    @property
    def serials(self) -> range:
        """The deliveries, aligned with the rows."""
        return range(self.first, self.first + len(self.batch.rows))

    def split(self, rows: int) -> tuple[Taken, Taken]:
        """The first `rows` and the rest."""
        return self._part(0, rows), self._part(rows, len(self.batch.rows))

    def _part(self, start: int, stop: int) -> Taken:
        tokens = None if self.batch.tokens is None else self.batch.tokens[start:stop]
        return Taken(replace(self.batch, rows=self.batch.rows[start:stop], tokens=tokens), self.first + start)


class Handle:
    """One Source with its turnstiles."""

    __slots__ = ("_settle_first", "held", "pulls", "settles", "source")

    def __init__(self, source: Source, concurrent_settle: bool, settle_before_pull: bool = False) -> None:
        self.source, self._settle_first = source, settle_before_pull
        self.pulls = Turnstile()
        self.settles = Turnstile() if concurrent_settle else self.pulls
        self.held = 0

    @property
    def waits(self) -> bool:
        """Whether what it gave must be settled before it may be pulled from again."""
        return self._settle_first and self.held > 0


class Choose(Protocol):
    """Which handle to pull from next (a settle-before-pull source with held rows cannot be)."""

    async def __call__(self) -> Handle: ...


class Puller:
    """Collects rows up to the asked bounds; rows taken and not delivered come first next time."""

    def __init__(self, entity: str, slice_s: float, choose: Choose, took: Callable[[Handle, Batch, int], None]) -> None:
        self._entity = entity
        self._slice = min(slice_s, MAX_WAIT_S)
        self._choose = choose
        self._took = took
        self._ready: deque[Taken] = deque()
        self._next_serial = 1
        self._failures = 0
        self.closed = False
        self.failure: BrokerError | None = None

    def delivered(self, serial: int) -> bool:
        """Whether there ever was a delivery of that number."""
        return 0 < serial < self._next_serial

    def drop_ready(self) -> list[Taken]:
        """Rows that were pulled and never delivered; they are the caller's to give back now."""
        ready, self._ready = list(self._ready), deque()
        return ready

    async def take(self, rows: int, max_bytes: int, *, timeout: float | None, age: float | None = None) -> list[Taken]:
        """Up to `rows` rows and about `max_bytes` bytes.

        Returns as soon as they are there, or `age` seconds after the first row, or after `timeout` seconds with what came (perhaps
        nothing; None waits for ever). When the caller is cancelled, what had come is delivered by the next call.
        """
        got: list[Taken] = []
        count = size = 0
        end = None if timeout is None else time.monotonic() + timeout
        try:
            while count < rows and size < max_bytes:
                taken = await self._more(rows - count, max_bytes - size, end, impatient=bool(got))
                if taken is None:
                    if end is not None and time.monotonic() >= end:
                        break
                    if got and age is None and end is None:
                        break
                    continue
                got.append(taken)
                count += len(taken.batch.rows)
                size += sum(map(taken.batch.codec.size, taken.batch.rows))
                if len(got) == 1 and age is not None:
                    ripe = time.monotonic() + age
                    end = ripe if end is None else min(end, ripe)
        except BaseException as error:
            if got and isinstance(error, BrokerError) and error.kind is ErrorKind.NO_CREDIT:
                return got
            self._ready.extendleft(reversed(got))
            raise
        return got

    async def _more(self, rows: int, max_bytes: int, end: float | None, *, impatient: bool) -> Taken | None:
        if not self._ready:
            if self.closed:
                raise BrokerError(ErrorKind.CLOSED, self._entity, f"{self._entity} is closed; consume again opens it anew")
            if self.failure is not None:
                raise self.failure
            wait = self._slice if end is None else max(0.0, min(self._slice, end - time.monotonic()))
            if impatient and end is None:
                wait = 0.0
            handle = await self._choose()
            try:
                await handle.pulls.call(lambda: self._pull(handle, rows, max_bytes, wait))
                self._failures = 0
            except BrokerError as error:
                # A broken connection is tried again with growing pauses; a permanent error ends it.
                if not error.retryable or self._failures >= len(BACKOFF_S):
                    raise
                pause = BACKOFF_S[self._failures]
                self._failures += 1
                await asyncio.sleep(pause if end is None else max(0.0, min(pause, end - time.monotonic())))
        if not self._ready:
            return None
        taken = self._ready.popleft()
        if len(taken.batch.rows) > rows:
            taken, rest = taken.split(rows)
            self._ready.appendleft(rest)
        return taken

    async def _pull(self, handle: Handle, rows: int, max_bytes: int, wait: float) -> None:
        if handle.waits:  # somebody else's pull, that had its turn first, brought rows
            return
        batch = await handle.source.pull(rows, max_bytes, wait)
        if batch is not None and batch.rows:
            first, self._next_serial = self._next_serial, self._next_serial + len(batch.rows)
            self._took(handle, batch, first)
            self._ready.append(Taken(batch, first))
