"""A look that begins at the end of a topic and follows it: rows as they come, without any effect on the broker."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from broker_nb.backends.driver import Batch, Browser, Driver, Effect, Facts, Piece, Position, Step, Stop
from broker_nb.portable.look import refuse_effects
from broker_nb.portable.loop import anywhere
from broker_nb.portable.turnstile import Turnstile

CLOSE_S = 2.0


class Tail:
    """An open tail of one topic. One caller at a time.

    Attributes
    ----------
    gaps
        What the broker threw away before it was read, one line each; a tail goes on behind it.
    """

    def __init__(
        self,
        driver: Driver,
        facts: Facts,
        at: Mapping[int, Position],
        want: frozenset[str],
        committed_only: bool,
        allow: Collection[Effect],
    ) -> None:
        self.name = facts.entity.name
        self.gaps: list[str] = []
        self._driver, self._topic = driver, facts.entity
        self._want, self._committed_only, self._allow = want, committed_only, frozenset(allow)
        self._slice = driver.capabilities.slice_s
        self._at = dict(at)
        self._browser: Browser | None = None
        self._turnstile = Turnstile()
        self._step: Step | None = None  # read, and not handed out because the caller was cancelled

    @anywhere
    async def take(self, rows: int, max_bytes: int, wait: float) -> Batch | None:
        """The next rows, or None when nothing comes within `wait` seconds (at most one slice).

        Raises
        ------
        BrokerError
            What the broker said; when it is retryable, the next call goes on where this one stopped.
        """
        await self._turnstile.call(lambda: self._read(rows, max_bytes, min(wait, self._slice)))
        step, self._step = self._step, None
        return step.batch if step is not None else None

    async def _read(self, rows: int, max_bytes: int, wait: float) -> None:
        if self._step is not None:
            return
        try:
            if self._browser is None:
                pieces = [Piece(partition, at, None) for partition, at in self._at.items()]
                self._browser = await self._driver.browse(self._topic, pieces, self._want, self._committed_only, self._allow)
            step = await self._browser.read(rows, max_bytes, wait)
        except BaseException:
            await self._leave()  # a new one begins behind what was handed out
            raise
        if step.batch is not None:
            for partition, position in step.batch.codec.places(step.batch.rows):
                self._at[partition] = max(self._at[partition], (*position, 0))
        for partition, reached in step.reached.items():
            self._at[partition] = max(self._at[partition], reached)
        self._step = step
        if Stop.AGED_OUT in step.stopped.values():
            await self._catch_up([p for p, stop in step.stopped.items() if stop is Stop.AGED_OUT])

    async def _catch_up(self, partitions: Sequence[int]) -> None:
        await self._leave()
        for bounds in await self._driver.bounds(self._topic, self._committed_only):
            if bounds.partition in partitions:
                self._at[bounds.partition] = max(self._at[bounds.partition], bounds.low)
                self.gaps.append(f"{self.name}[{bounds.partition}]: rows were gone before they were read")

    async def _leave(self) -> None:
        browser, self._browser = self._browser, None
        if browser is not None:
            await browser.close()

    @anywhere
    async def close(self) -> None:
        """End it. Idempotent."""
        await self._turnstile.drained(self._slice + CLOSE_S)
        await self._leave()


async def open_tail(
    driver: Driver, facts: Facts, *, want: frozenset[str], committed_only: bool, allow: Collection[Effect]
) -> Tail:
    """Begin at the end as it stands now. Effect on the broker: those of `facts.look`, and only if `allow` names them all.

    Raises
    ------
    BrokerError
        UNSUPPORTED when looking is impossible or has effects that were not allowed.
    """
    refuse_effects(facts, allow)
    bounds = await driver.bounds(facts.entity, committed_only)
    now = time.time_ns()
    unknown = {b.partition: now for b in bounds if b.end is None}
    known = {b.partition: b.end or b.low for b in bounds}
    found = await driver.locate(facts.entity, unknown) if unknown else {}
    at = {partition: found.get(partition) or place for partition, place in known.items()}
    return Tail(driver, facts, at, want, committed_only, allow)
