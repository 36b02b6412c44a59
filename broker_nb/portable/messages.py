"""A subscription whose messages are settled one by one: leases, first-wins settlement, release on close."""

from __future__ import annotations

import asyncio
import enum
import functools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from broker_nb.backends.driver import (
    Batch,
    Capabilities,
    Envelope,
    Event,
    Facts,
    Outcome,
    Settled,
    Settlement,
    Source,
    Token,
    Verdict,
)
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attributes, Message
from broker_nb.portable.leases import LeaseKeeper
from broker_nb.portable.loop import anywhere
from broker_nb.portable.pulling import Handle, Taken
from broker_nb.portable.subscription import CLOSE_S, MAX_KNOWN, Subscription

log = logging.getLogger("broker_nb")

MAX_LANES = 4
RETRIES_S = (0.05, 0.2, 0.5, 1.0)
VERDICTS = {"ack": Verdict.ACK, "nack": Verdict.RELEASE, "release": Verdict.RELEASE, "reject": Verdict.REJECT}


class State(enum.Enum):
    """Where one delivery stands."""

    HELD = "held"
    ASKING = "asking"
    SETTLED = "settled"
    LOST = "lost"


@dataclass(slots=True, eq=False)
class Delivery:
    """One row held by this session, from its pull until it is settled or lost."""

    serial: int
    token: Token
    handle: Handle
    row: Any
    codec: Any
    taken_at: float  # time.monotonic()
    deadline: float | None  # time.monotonic(); None = not timed
    state: State = State.HELD
    word: str = ""  # what was asked: ack, nack, release, reject
    at: datetime | None = None  # when it was settled or lost


class Settling(NamedTuple):
    """What became of one row that somebody wanted settled. state: settled, sent, already, lost, retry, refused, foreign."""

    serial: int
    state: str
    text: str = ""
    error: BrokerError | None = None


_STATES = {
    Settled.CONFIRMED: "settled",
    Settled.SENT: "sent",
    Settled.LOST: "lost",
    Settled.RETRY: "retry",
    Settled.REFUSED: "refused",
}


class MessageSubscription(Subscription[Message]):
    """Messages of one subscription, held until settled.

    Parameters
    ----------
    hold
        Seconds after delivery until which rows are kept for the caller; then they are given back.
    max_held
        With that many rows held no further source is opened, where each takes nothing more before its rows are settled.
    """

    def __init__(
        self,
        name: str,
        capabilities: Capabilities,
        facts: Facts,
        open_source: Callable[[], Coroutine[Any, Any, Source]],
        hold: float,
        max_held: int = 1000,
    ) -> None:
        if facts.lease is None:
            raise BrokerError(ErrorKind.UNSUPPORTED, name, f"{name} is a log: its rows are committed, not acked one by one")
        super().__init__(name, capabilities, facts, open_source)
        self.terms = facts.lease
        self.hold = hold
        self._max_held = max_held
        self._known: dict[int, Delivery] = {}
        self._by_token: dict[Token, Delivery] = {}
        self._keeper = LeaseKeeper(self)

    # -------------------------------------------------------------- taking
    @anywhere
    async def next_message(self, timeout: float | None = None) -> Message | None:
        """The next message; None when nothing is there within `timeout` seconds (None waits for ever)."""
        return await self._next(timeout)

    def _objects(self, taken: Iterable[Taken]) -> list[Message]:
        return [self.message(serial) for part in taken for serial in part.serials]

    def message(self, serial: int) -> Message:
        """The Message of a delivery of this session."""
        delivery = self._known[serial]
        envelope: Envelope = delivery.codec.envelope(delivery.row)

        async def settle(word: str, delay: float, reason: str) -> None:
            result = (await self.settle([serial], word, delay=delay, reason=reason))[0]
            if result.state in ("lost", "retry", "refused"):
                raise result.error or BrokerError(ErrorKind.LEASE_LOST, self.name, f"{self.name}: {result.text}")

        return Message(
            topic=envelope.topic,
            id=envelope.id,
            key=envelope.key,
            data=envelope.data,
            attributes=Attributes(envelope.attributes),
            publish_time_ns=envelope.publish_time_ns,
            native=envelope.native,
            delivery_count=envelope.delivery_count,
            ingestion_time=wall(delivery.taken_at),
            _settle=settle,
            _lease=lambda: None if delivery.deadline is None else wall(delivery.deadline),
        )

    async def _choose(self) -> Handle:
        async with self._opening:
            for handle in self._handles:
                if not handle.waits:
                    return handle
            if len(self._handles) >= MAX_LANES or self.held_count >= self._max_held:
                raise BrokerError(
                    ErrorKind.NO_CREDIT,
                    self.name,
                    f"{self.name}: {self.held_count} rows are held and this broker gives no more before they are settled; ack or release some",
                )
            able = self._capabilities
            handle = Handle(await self._open_source(), able.concurrent_settle, able.settle_before_pull)
            self._handles.append(handle)
            return handle

    def _took(self, handle: Handle, batch: Batch, first: int) -> None:
        now = time.monotonic()
        assert batch.tokens is not None, "a MESSAGE source hands out tokens"  # noqa: S101 - the contract
        for serial, (token, row) in enumerate(zip(batch.tokens, batch.rows, strict=True), first):
            delivery = Delivery(serial, token, handle, row, batch.codec, now, batch.leased_until)
            self._known[serial] = self._by_token[token] = delivery
        if len(self._known) > self._forget_at:  # tickets of the past are kept for their answer "already settled", not for ever
            self._known = {s: d for s, d in self._known.items() if d.at is None or s > first - MAX_KNOWN // 2}
            self._forget_at = max(MAX_KNOWN, 2 * len(self._known))
        handle.held += len(batch.rows)
        self._keeper.watch(range(first, first + len(batch.rows)), batch.leased_until, now + self.hold)

    # -------------------------------------------------------------- what is held
    @property
    def held_count(self) -> int:
        """How many rows this session holds now."""
        return sum(handle.held for handle in self._handles)

    def held(self) -> list[Delivery]:
        """The rows held now, in the order they were delivered."""
        return [d for d in self._known.values() if d.state in (State.HELD, State.ASKING)]

    def delivery(self, serial: int) -> Delivery | None:
        """One delivery of this session, settled ones included."""
        return self._known.get(serial)

    def delivery_count(self, serial: int) -> int | None:
        """How often a held row was delivered, where the broker counts; None once it is settled."""
        delivery = self._known.get(serial)
        if delivery is None or delivery.row is None:
            return None
        count: int | None = delivery.codec.envelope(delivery.row).delivery_count
        return count

    def on_event(self, event: Event) -> None:
        super().on_event(event)
        for token in event.tokens:  # the broker took these rows away from us
            if (delivery := self._by_token.get(token)) is not None:
                self.lose(delivery)

    def lose(self, delivery: Delivery) -> None:
        """The broker will deliver the row again, or has."""
        self._end(delivery, State.LOST)

    def _end(self, delivery: Delivery, state: State) -> None:
        if delivery.state in (State.HELD, State.ASKING):
            delivery.handle.held -= 1
            delivery.state, delivery.at = state, datetime.now(UTC)
            delivery.row = delivery.codec = None  # a settled row is not kept alive by its ticket
            self._by_token.pop(delivery.token, None)

    # -------------------------------------------------------------- settling
    @anywhere
    async def settle(self, serials: Sequence[int], word: str, *, delay: float = 0.0, reason: str = "") -> list[Settling]:
        """Settle deliveries of this session; a result per serial, in order.

        The first settlement of a delivery wins, later ones are "already". Nothing newer than the named delivery is touched.

        Parameters
        ----------
        word
            "ack", "nack", "release" or "reject".
        delay
            Seconds until a nacked row comes again.
        """
        verdict = VERDICTS[word]
        if verdict is Verdict.REJECT and not self._capabilities.reject:
            raise BrokerError(ErrorKind.UNSUPPORTED, self.name, f"{self.name}: this broker cannot reject; nack it, or ack it")
        if delay and not self._capabilities.release_delay:
            raise BrokerError(ErrorKind.UNSUPPORTED, self.name, f"{self.name}: this broker has no delay per row; leave delay out")
        results: dict[int, Settling] = {}
        asked: dict[Handle, list[Delivery]] = defaultdict(list)
        for serial in dict.fromkeys(serials):
            delivery = self._known.get(serial)
            if delivery is None:
                known = self._puller.delivered(serial)
                state, text = (
                    ("already", "settled or lost long ago")
                    if known
                    else ("foreign", f"{serial} was never delivered to this session")
                )
                results[serial] = Settling(serial, state, text)
            elif delivery.state is State.HELD:
                delivery.state, delivery.word = State.ASKING, word
                asked[delivery.handle].append(delivery)
            else:
                results[serial] = _past(delivery)
        for settled in await asyncio.gather(*(self._ask(h, d, verdict, delay, reason) for h, d in asked.items())):
            results.update(settled)
        return [results[serial] for serial in serials]

    async def _ask(
        self, handle: Handle, deliveries: list[Delivery], verdict: Verdict, delay: float, reason: str
    ) -> dict[int, Settling]:
        results: dict[int, Settling] = {}
        word = deliveries[0].word
        for pause in (*RETRIES_S, None):
            settle = functools.partial(self._settle, handle, deliveries, verdict, delay, reason)
            results.update((s.serial, s) for s in await handle.settles.call(settle, urgent=True))
            deliveries = [d for d in deliveries if results[d.serial].state == "retry" and d.state is State.HELD]
            if not deliveries or pause is None:
                break
            await asyncio.sleep(pause)
            # Meanwhile a row may have been lost, or settled by somebody else.
            results.update((d.serial, _past(d)) for d in deliveries if d.state is not State.HELD)
            deliveries = [d for d in deliveries if d.state is State.HELD]
            for delivery in deliveries:
                delivery.state, delivery.word = State.ASKING, word
        return results

    async def _settle(
        self, handle: Handle, deliveries: Sequence[Delivery], verdict: Verdict, delay: float, reason: str
    ) -> list[Settling]:
        """One try. Nothing is said about rows that were lost while it waited for its turn."""
        ours, gone = [d for d in deliveries if d.state is State.ASKING], [d for d in deliveries if d.state is not State.ASKING]
        items = [Settlement(d.token, verdict, delay, reason) for d in ours]
        try:
            outcomes = await handle.source.settle(items) if items else []
        except BrokerError as error:  # no row was attempted
            outcomes = [Outcome(Settled.RETRY if error.retryable else Settled.REFUSED, error)] * len(items)
        return [self._record(d, o) for d, o in zip(ours, outcomes, strict=True)] + [_past(d) for d in gone]

    def _record(self, delivery: Delivery, outcome: Outcome) -> Settling:
        if outcome.state is Settled.LOST:
            self._end(delivery, State.LOST)
            return _past(delivery)
        if outcome.state in (Settled.CONFIRMED, Settled.SENT):
            self._end(delivery, State.SETTLED)
        elif delivery.state is State.ASKING:
            delivery.state = State.HELD  # still ours, may be asked again
        return Settling(delivery.serial, _STATES[outcome.state], str(outcome.error or ""), outcome.error)

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Give rows back (end of hold, close)."""
        await self.settle([d.serial for d in deliveries], "release")

    async def extend(self, deliveries: Sequence[Delivery]) -> None:
        """Ask the broker for more time; rows that it calls lost are marked so. Raises BrokerError when none was attempted."""
        by_handle: dict[Handle, list[Delivery]] = defaultdict(list)
        for delivery in deliveries:
            by_handle[delivery.handle].append(delivery)
        assert self.terms.seconds is not None, "only timed leases are extended"  # noqa: S101 - the keeper's rule
        seconds = self.terms.seconds
        for handle, rows in by_handle.items():
            tokens = [d.token for d in rows]
            deadlines = await handle.settles.call(functools.partial(handle.source.extend, tokens, seconds))
            for delivery, deadline in zip(rows, deadlines, strict=True):
                if deadline is None:
                    self.lose(delivery)
                else:
                    delivery.deadline = deadline

    # -------------------------------------------------------------- closing
    async def _give_back(self) -> None:
        self._keeper.stop()
        await super()._give_back()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self.release([d for d in self.held() if d.state is State.HELD])
        except TimeoutError:
            log.warning("%s: the broker did not take rows back in %g s; it will when their lease ends", self.name, CLOSE_S)


def wall(monotonic: float) -> datetime:
    """The UTC time of a time.monotonic() reading."""
    return datetime.now(UTC) + timedelta(seconds=monotonic - time.monotonic())


def _past(delivery: Delivery) -> Settling:
    at = f"{delivery.at:%H:%M:%S} UTC" if delivery.at else "just now"
    if delivery.state is State.LOST:
        text = f"the lease was gone at {at}; it went or will go to someone else"
        error = BrokerError(ErrorKind.LEASE_LOST, str(delivery.serial), text)
        return Settling(delivery.serial, "lost", text, error)
    return Settling(delivery.serial, "already", f"{delivery.word} won at {at}")
