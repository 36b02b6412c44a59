"""Where the rows of a live view come from, and what may be done with them: a tail, a queue, a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from broker_nb import settling
from broker_nb.backends.driver import Codec
from broker_nb.portable.client import Client
from broker_nb.portable.leases import MARGIN_S
from broker_nb.portable.messages import MessageSubscription, State
from broker_nb.portable.records import RecordSubscription
from broker_nb.portable.tail import Tail

PULL_ROWS, PULL_BYTES = 500, 16 << 20
PULL_S, AGE_S = 0.5, 0.05
_FAILED = {"refused": "the broker refused it", "retry": "not settled, try again"}
_DONE = {"ack": "acked", "nack": "nacked", "release": "released", "reject": "rejected"}


class Arrived(NamedTuple):
    """One row that came. `serial` is None where it was only looked at; `until` is a time.monotonic()."""

    codec: Codec
    row: Any
    serial: int | None = None
    until: float | None = None


class Feed(Protocol):
    """What a live view needs of a source of rows. `actions` are the buttons that it has."""

    kind: str  # "tail", "queue" or "log"
    actions: tuple[str, ...]
    holder: str
    lease_s: float | None  # how long the broker waits for a session that is gone
    most: int | None  # deliveries, after which a row is dead-lettered or dropped
    dead: str  # where rejected rows go; "" = nowhere that is known

    async def take(self, room: int) -> list[Arrived]:
        """Up to `room` rows; after half a second with what came."""
        ...

    def stand(self, serial: int, until: float | None) -> tuple[str, str]:
        """State and reason of a delivery now."""
        ...

    async def settle(self, verb: str, serials: Sequence[int], delay: float, *, final: bool) -> dict[int, str]:
        """Do it; the deliveries with which it failed, and why."""
        ...

    async def close(self, serials: Sequence[int]) -> None:
        """Give back what is still held, and leave a subscription that nobody else here uses."""
        ...

    def notes(self) -> Sequence[str]:
        """What the person should know besides the rows."""
        ...

    def owns(self, handle: object) -> bool:
        """Whether an event of that handle is about this feed."""
        ...


class TailFeed:
    """Follows a topic from now. No effect, no buttons."""

    kind, holder = "tail", ""
    actions: tuple[str, ...] = ()
    lease_s: float | None = None
    most: int | None = None
    dead = ""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail

    async def take(self, room: int) -> list[Arrived]:
        del room  # nothing is held
        batch = await self._tail.take(PULL_ROWS * 4, PULL_BYTES, PULL_S)
        return [] if batch is None else [Arrived(batch.codec, row) for row in batch.rows]

    def stand(self, serial: int, until: float | None) -> tuple[str, str]:
        raise NotImplementedError("a tail has no deliveries")

    async def settle(self, verb: str, serials: Sequence[int], delay: float, *, final: bool) -> dict[int, str]:
        raise NotImplementedError("a tail has no deliveries")

    async def close(self, serials: Sequence[int]) -> None:
        del serials
        await self._tail.close()

    def notes(self) -> Sequence[str]:
        return self._tail.gaps

    def owns(self, handle: object) -> bool:
        return False


class _Subscribed:
    """What both families have in common. `fresh`: the view opened the subscription, so it may leave it."""

    lease_s: float | None = None
    most: int | None = None
    dead = ""

    def __init__(self, client: Client, key: tuple[str, str], holder: str, *, fresh: bool) -> None:
        self.holder = holder
        self._client, self._key, self._fresh = client, key, fresh

    async def _leave(self, others: bool) -> None:
        if self._fresh and not others:
            await self._client.unsubscribe(*self._key)

    def notes(self) -> Sequence[str]:
        return ()


class MessageFeed(_Subscribed):
    """Takes messages and holds them."""

    kind = "queue"

    def __init__(
        self, client: Client, key: tuple[str, str], holder: str, subscription: MessageSubscription, *, fresh: bool
    ) -> None:
        super().__init__(client, key, holder, fresh=fresh)
        self._of = subscription
        self.lease_s, self.most = subscription.terms.seconds, subscription.terms.max_deliveries
        self.dead = subscription.facts.dead_letter.name if subscription.facts.dead_letter else ""
        able = client.driver.capabilities
        self.actions = ("ack", "nack", *(["delay"] * able.release_delay), *(["reject"] * able.reject), "release")

    async def take(self, room: int) -> list[Arrived]:
        taken = await self._of.take(min(room, PULL_ROWS), PULL_BYTES, timeout=PULL_S, age=AGE_S)
        return [
            Arrived(part.batch.codec, row, serial, self._until(serial))
            for part in taken
            for serial, row in zip(part.serials, part.batch.rows, strict=True)
        ]

    def _until(self, serial: int) -> float:
        """When the lease keeper gives it back."""
        delivery, terms = self._of.delivery(serial), self._of.terms
        assert delivery is not None, "just delivered"  # noqa: S101 - take() says so
        over = delivery.taken_at + self._of.hold
        if delivery.deadline is None or terms.seconds is None or terms.renewable:
            return over
        return min(over, delivery.deadline - min(MARGIN_S, terms.seconds / 4))

    def stand(self, serial: int, until: float | None) -> tuple[str, str]:
        delivery = self._of.delivery(serial)
        if delivery is None:
            return "unknown", "settled so long ago that this session forgot how"
        at = f"{delivery.at:%H:%M:%S} UTC" if delivery.at else ""
        match delivery.state:
            case State.HELD:
                return "held", ""
            case State.ASKING:
                return "asking", delivery.word
            case State.LOST:
                return "lost", f"the lease was gone at {at}; it comes again as a new row, or went to someone else"
        over = delivery.word == "release" and until is not None and time.monotonic() >= until
        return _DONE[delivery.word], f"{at}, when its time was over" if over else at

    async def settle(self, verb: str, serials: Sequence[int], delay: float, *, final: bool) -> dict[int, str]:
        if verb in ("nack", "release") and not final:
            named = settling.Named({self.holder: self._of})
            named.serials[self.holder] = list(serials)
            settling.guard_last_delivery(verb, named)
        results = await self._of.settle(serials, verb, delay=delay)
        return {s.serial: s.text or _FAILED.get(s.state, s.state) for s in results if s.state not in ("settled", "sent")}

    async def close(self, serials: Sequence[int]) -> None:
        mine = set(serials)
        await self._of.settle(list(serials), "release")
        await self._leave(any(d.serial not in mine for d in self._of.held()))

    def owns(self, handle: object) -> bool:
        return any(h.source is handle for h in self._of.handles)


class RecordFeed(_Subscribed):
    """Reads a log as a member of its group."""

    kind = "log"
    actions: tuple[str, ...] = ("commit",)

    def __init__(
        self, client: Client, key: tuple[str, str], holder: str, subscription: RecordSubscription, *, fresh: bool
    ) -> None:
        super().__init__(client, key, holder, fresh=fresh)
        self._of = subscription

    async def take(self, room: int) -> list[Arrived]:
        taken = await self._of.take(min(room, PULL_ROWS), PULL_BYTES, timeout=PULL_S, age=AGE_S)
        return [
            Arrived(part.batch.codec, row, serial)
            for part in taken
            for serial, row in zip(part.serials, part.batch.rows, strict=True)
        ]

    def stand(self, serial: int, until: float | None) -> tuple[str, str]:
        del until
        match self._of.standing(serial):
            case "committed":
                return "committed", ""
            case "void":
                return "lost", "its partition went to another member, or was given back; it comes again"
        return "read", ""

    async def settle(self, verb: str, serials: Sequence[int], delay: float, *, final: bool) -> dict[int, str]:
        del verb, delay, final
        stands = await self._of.commit(serials, through=True)
        failed = {s.partition: str(s.error) for s in stands if s.error is not None}
        return {s: failed[p] for s in serials if (p := self._of.place(s)[0]) in failed} if failed else {}

    async def close(self, serials: Sequence[int]) -> None:
        mine = set(serials)
        await self._leave(any(s not in mine for s in self._of.held_serials()))

    def owns(self, handle: object) -> bool:
        return any(h.source is handle for h in self._of.handles)
