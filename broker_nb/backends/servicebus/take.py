"""Taking: one receiver per source, one call at a time, rows settled one by one and each outcome seen."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from azure.servicebus import NEXT_AVAILABLE_SESSION, ServiceBusReceivedMessage
from azure.servicebus import exceptions as client_errors
from azure.servicebus.aio import ServiceBusReceiver

from broker_nb.backends.driver import Batch, Event, Outcome, Position, Settled, Settlement, TakeOptions, Token, Verdict
from broker_nb.backends.servicebus.client import Pending, Place, Settings, Worker
from broker_nb.backends.servicebus.codec import ServiceBusCodec
from broker_nb.errors import BrokerError, ErrorKind

SLICE_S = 0.2
NEXT = "*"
"""In place of a session's id: whichever has something and nobody holds."""
_LEAST_S = 0.01  # the client takes no zero
_LOST = Outcome(Settled.LOST)
_DONE = Outcome(Settled.CONFIRMED)


class ServiceBusSource:
    """Messages of a queue, a subscription, or one session of it, in peek-lock.

    Native options: the client's for a receiver, and `sequence_numbers`: take these deferred messages first.
    """

    def __init__(self, at: Place, options: TakeOptions, settings: Settings, worker: Worker) -> None:
        self._at, self._settings, self._worker = at, settings, worker
        self._max_held = options.max_held
        self._codec = ServiceBusCodec(at.path if at.dead or not at.subscription else at.parent, taken=True)
        native = dict(options.native)
        self._deferred: list[int] = [int(n) for n in native.pop("sequence_numbers", ())]
        self._asked = options.session if options.session is not None else at.session
        if self._asked is not None:
            native["session_id"] = NEXT_AVAILABLE_SESSION if self._asked == NEXT else self._asked
            native.setdefault("max_wait_time", settings.timeout / 2)
        self._receiver: ServiceBusReceiver = settings.receiver(at, **native)
        self._session = self._asked is not None
        self._held: dict[Token, ServiceBusReceivedMessage] = {}
        self._ready: deque[ServiceBusReceivedMessage] = deque()
        self._pulling: Pending[None] = Pending()
        self.closed = False

    async def open(self) -> None:
        """Attach to the entity, so that what is wrong with it is an error now."""
        try:
            await self._worker.run(self._at.path, self._receiver.__aenter__)
        except BrokerError as error:
            if error.kind is ErrorKind.TIMEOUT and self._asked == NEXT:
                text = f"{self._at.path}: no session that has messages is free; name one, or try again"
                raise self._settings.host.error(ErrorKind.TIMEOUT, self._at.path, text, retryable=True) from error
            if error.kind is ErrorKind.CONFLICT:
                text = f"{self._at.path}: somebody else holds session {self._asked!r}; wait until they are done, or take another"
                raise self._settings.host.error(ErrorKind.CONFLICT, self._at.path, text) from error
            raise
        self._worker.idle(1.0)

    # -------------------------------------------------------------- pull
    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        del max_bytes  # the client counts messages only
        if self.closed:
            raise self._settings.host.error(
                ErrorKind.CLOSED, self._at.path, f"{self._at.path}: this was closed; consume opens it anew"
            )
        if not self._ready:
            await self._pulling.call(lambda: self._receive(max_rows, wait))
        rows = [self._ready.popleft() for _ in range(min(max_rows, len(self._ready)))]
        if not rows:
            return None
        tokens = [self._token(m) for m in rows]
        self._held.update(zip(tokens, rows, strict=True))
        return Batch(self._codec, rows, tokens, min(map(self._deadline, rows)))

    async def _receive(self, max_rows: int, wait: float) -> None:
        room = self._max_held - len(self._held)
        if room <= 0 and (room := self._max_held - self._count_alive()) <= 0:
            text = f"{self._at.path}: {len(self._held)} messages are held, and no more than that were asked for; settle some"
            raise self._settings.host.error(ErrorKind.NO_CREDIT, self._at.path, text)
        count = min(max_rows, room)

        async def received() -> list[ServiceBusReceivedMessage]:
            await self._receiver.__aenter__()  # opens it again where its connection was lost
            if self._deferred:
                numbers, self._deferred = self._deferred[:count], self._deferred[count:]
                return await self._receiver.receive_deferred_messages(numbers, timeout=self._settings.timeout)
            return await self._receiver.receive_messages(count, max(_LEAST_S, wait))

        try:
            self._ready += await self._worker.run(self._at.path, received, self._settings.timeout + wait)
        except BrokerError as error:
            if self._session and error.kind in (ErrorKind.LEASE_LOST, ErrorKind.UNREACHABLE):
                self._lose_all(error)
            raise

    def _lose_all(self, error: BrokerError) -> None:
        """The session is gone, and everything that was locked in it."""
        tokens, self._held = frozenset(self._held), {}
        self._settings.host.emit(Event("lost", tokens=tokens, error=error, handle=self))

    def _count_alive(self) -> int:
        """How many rows are held whose lock did not run out."""
        now = time.monotonic()
        self._held = {token: m for token, m in self._held.items() if self._deadline(m) > now}
        return len(self._held)

    def _token(self, message: ServiceBusReceivedMessage) -> Token:
        return str(message.lock_token)

    def _deadline(self, message: ServiceBusReceivedMessage) -> float:
        until = self._receiver.session.locked_until_utc if self._session else message.locked_until_utc
        left = (until - datetime.now(UTC)).total_seconds() if until is not None else 0.0
        return time.monotonic() + left

    # -------------------------------------------------------------- settle
    async def settle(self, items: Sequence[Settlement]) -> Sequence[Outcome]:
        async def settled() -> list[Outcome]:
            return [await self._one(item, item.verdict) for item in items]

        return await self._worker.run(self._at.path, settled, self._settings.timeout * (1 + len(items)))

    async def defer(self, tokens: Sequence[Token]) -> Sequence[Outcome]:
        """Put rows aside: they come again only to a source that is opened with their `sequence_numbers`."""

        async def deferred() -> list[Outcome]:
            return [await self._one(Settlement(token, Verdict.RELEASE), None) for token in tokens]

        return await self._worker.run(self._at.path, deferred, self._settings.timeout * (1 + len(tokens)))

    async def _one(self, item: Settlement, verdict: Verdict | None) -> Outcome:
        """One row; what goes wrong with it is its own outcome."""
        if (message := self._held.get(item.token)) is None:
            return _LOST
        receiver = self._receiver
        steps: dict[Verdict | None, Callable[[], Awaitable[None]]] = {
            Verdict.ACK: lambda: receiver.complete_message(message),
            Verdict.RELEASE: lambda: receiver.abandon_message(message),
            Verdict.REJECT: lambda: receiver.dead_letter_message(message, reason=item.reason or None),
            None: lambda: receiver.defer_message(message),
        }
        if item.verdict is Verdict.REJECT and self._at.dead:
            text = f"{self._at.path}: a dead letter goes no further: ack it, or release it"
            return Outcome(Settled.REFUSED, self._settings.host.error(ErrorKind.UNSUPPORTED, self._at.path, text))
        try:
            await self._bounded(steps[verdict])
        except (client_errors.ServiceBusError, OSError, ValueError) as error:
            failed = self._settings.failure(self._at.path, error)
            if failed.kind is ErrorKind.LEASE_LOST:
                self._held.pop(item.token, None)
                return _LOST
            return Outcome(Settled.RETRY if failed.retryable else Settled.REFUSED, failed)
        self._held.pop(item.token, None)
        return _DONE

    async def _bounded(self, step: Callable[[], Awaitable[None]]) -> None:
        await self._receiver.__aenter__()
        async with asyncio.timeout(self._settings.timeout):
            await step()

    async def extend(self, tokens: Sequence[Token], seconds: float) -> Sequence[float | None]:
        del seconds  # the entity's own lock duration, counted from now

        async def extended() -> list[float | None]:
            await self._receiver.__aenter__()
            if self._session:
                return await self._extend_session(tokens)
            return [await self._extend_one(token) for token in tokens]

        return await self._worker.run(self._at.path, extended, self._settings.timeout * (1 + len(tokens)))

    async def _extend_session(self, tokens: Sequence[Token]) -> list[float | None]:
        try:
            await self._receiver.session.renew_lock(timeout=self._settings.timeout)
        except client_errors.SessionLockLostError:
            self._held.clear()
        return [self._deadline(self._held[token]) if token in self._held else None for token in tokens]

    async def _extend_one(self, token: Token) -> float | None:
        if (message := self._held.get(token)) is None:
            return None
        try:
            await self._receiver.renew_message_lock(message, timeout=self._settings.timeout)
        except (client_errors.MessageLockLostError, client_errors.MessageAlreadySettled):
            self._held.pop(token, None)
            return None
        return self._deadline(message)

    # -------------------------------------------------------------- records have no place here
    async def commit(self, positions: Mapping[int, Position]) -> Mapping[int, Outcome]:
        raise self._no_positions(positions)

    async def seek(self, positions: Mapping[int, Position]) -> None:
        raise self._no_positions(positions)

    def _no_positions(self, _: Any) -> BrokerError:
        return self._settings.host.error(
            ErrorKind.UNSUPPORTED, self._at.path, f"{self._at.path}: messages are settled one by one"
        )

    async def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        await self._pulling.ended()
        await self._worker.close(self._leave)

    async def _leave(self) -> None:
        """Give back what was taken and never handed out, and close the receiver."""
        for message in self._ready:
            with contextlib.suppress(client_errors.ServiceBusError, OSError, ValueError):  # it comes again when its lock ends
                await self._receiver.abandon_message(message)
        self._ready.clear()
        await self._receiver.close()
