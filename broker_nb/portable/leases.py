"""Keeps rows for a person who is thinking: extends leases in the background, and gives rows back before they expire."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from broker_nb.errors import BrokerError

if TYPE_CHECKING:
    from broker_nb.portable.messages import Delivery, MessageSubscription

log = logging.getLogger("broker_nb")

MARGIN_S = 3.0
"""How long before a lease ends a row that cannot be extended is given back."""
RETRY_S = 0.5


class LeaseKeeper:
    """One task per subscription, running while something is watched.

    Rows of one pull share a deadline and are handled together. Renewable leases are extended at half time until `hold` is over;
    others, and those whose hold is over, are given back so that the source goes on.
    """

    def __init__(self, subscription: MessageSubscription) -> None:
        self._of = subscription
        self._groups: list[tuple[float, int, tuple[int, ...], float]] = []  # due, first serial, serials, hold until
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def watch(self, serials: Iterable[int], deadline: float | None, hold_until: float) -> None:
        """Take care of rows just delivered. `deadline` and `hold_until` are time.monotonic() readings."""
        group = tuple(serials)
        heapq.heappush(self._groups, (self._due(deadline, hold_until), group[0], group, hold_until))
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._work())

    def stop(self) -> None:
        """Leave the rows to whoever closes the subscription."""
        if self._task is not None:
            self._task.cancel()

    def _due(self, deadline: float | None, hold_until: float) -> float:
        terms = self._of.terms
        if deadline is None or terms.seconds is None:
            return hold_until
        if terms.renewable:
            return min(hold_until, deadline - terms.seconds / 2)
        return min(hold_until, deadline - min(MARGIN_S, terms.seconds / 4))

    async def _work(self) -> None:
        while self._groups:
            wait = self._groups[0][0] - time.monotonic()
            if wait > 0:
                self._changed.clear()
                try:
                    async with asyncio.timeout(wait):
                        await self._changed.wait()
                except TimeoutError:
                    pass
                continue
            _, _, serials, hold_until = heapq.heappop(self._groups)
            held = [d for s in serials if (d := self._of.delivery(s)) is not None and d.at is None]
            if held:
                await self._care(held, hold_until)

    async def _care(self, held: Sequence[Delivery], hold_until: float) -> None:
        over = time.monotonic() >= hold_until
        try:
            if over or not self._of.terms.renewable:
                await self._of.release(held)  # one that is just being settled stays as it is
                held = [d for d in held if d.at is None]
                if held:
                    self._again(held, time.monotonic() + RETRY_S, hold_until)
                return
            await self._of.extend(held)
        except BrokerError as error:
            log.warning("%s: %d rows could not be kept: %s", self._of.name, len(held), error)
            held = self._expired(held)
            if held:  # asked again at the latest when they are lost, so that they are told to be
                last = min((d.deadline for d in held if d.deadline is not None), default=hold_until)
                self._again(held, min(last, time.monotonic() + RETRY_S) if error.retryable else last, hold_until)
            return
        kept = [d for d in held if d.at is None]
        if kept:
            deadline = min((d.deadline for d in kept if d.deadline is not None), default=None)
            self._again(kept, self._due(deadline, hold_until), hold_until)

    def _again(self, deliveries: Sequence[Delivery], due: float, hold_until: float) -> None:
        heapq.heappush(self._groups, (due, deliveries[0].serial, tuple(d.serial for d in deliveries), hold_until))

    def _expired(self, held: Sequence[Delivery]) -> list[Delivery]:
        now = time.monotonic()
        alive = []
        for delivery in held:
            if delivery.deadline is not None and delivery.deadline <= now:
                self._of.lose(delivery)
            else:
                alive.append(delivery)
        return alive
