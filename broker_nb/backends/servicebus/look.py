"""Looking by peek: nothing is locked or counted, but the session of an entity that has sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from azure.servicebus import ServiceBusReceivedMessage
from azure.servicebus import exceptions as client_errors
from azure.servicebus.aio import ServiceBusReceiver

from broker_nb.backends.driver import Batch, Bounds, Effect, Entity, Piece, Position, Step, Stop
from broker_nb.backends.servicebus.client import Pending, Place, Settings, Worker, place
from broker_nb.backends.servicebus.codec import BELOW, ServiceBusCodec, enqueued_ns, number
from broker_nb.errors import BrokerError, ErrorKind

T = TypeVar("T")
PAGE = 500
KEPT = 8  # receivers: opening one takes a connection and closing one a second
FIRST = 1  # sequence numbers begin here


class Looks:
    """Receivers that only peek, on one worker, kept for the next look."""

    def __init__(self, settings: Settings, worker: Worker) -> None:
        self._settings, self._worker = settings, worker
        self._receivers: dict[Place, ServiceBusReceiver] = {}
        worker.idle(2.0)

    async def run(self, at: Place, work: Callable[[ServiceBusReceiver], Awaitable[T]]) -> T:
        """`work` with the receiver of an entity; again with a new one where the connection of a kept one had died."""
        at = at._replace(session=None)

        async def call() -> T:
            kept = at in self._receivers
            try:
                return await work(await self._receiver(at))
            except (client_errors.ServiceBusConnectionError, client_errors.ServiceBusAuthorizationError):
                self._receivers.pop(at, None)
                if not kept:
                    raise
            return await work(await self._receiver(at))

        return await self._worker.run(at.path, call)

    async def _receiver(self, at: Place) -> ServiceBusReceiver:
        receiver = self._receivers.pop(at, None)
        if receiver is None:
            receiver = self._settings.receiver(at)
            while len(self._receivers) >= KEPT:
                await self._receivers.pop(next(iter(self._receivers))).close()
        await receiver.__aenter__()  # opens it, also again
        self._receivers[at] = receiver
        return receiver

    async def sessions(self, at: Place) -> bool | None:
        """Whether an entity has sessions; None for a topic, which cannot be received from. NOT_FOUND when it is not there."""

        async def opened(_: ServiceBusReceiver) -> None:
            return

        try:
            await self.run(at, opened)
        except BrokerError as error:
            if error.kind is ErrorKind.UNSUPPORTED:
                return True
            if error.kind not in (ErrorKind.INVALID, ErrorKind.NOT_FOUND) or at.subscription or at.dead:
                raise
            if error.kind is ErrorKind.NOT_FOUND:
                await self._written_to(at, error)
            return None
        return False

    async def _written_to(self, at: Place, error: BrokerError) -> None:
        """Raise `error` unless messages can be sent there: then it is a topic."""
        sender = self._settings.sender(at.parent)

        async def opened() -> None:
            async with sender:
                return

        try:
            await self._worker.run(at.path, opened)
        except BrokerError:
            raise error from None

    async def peek(self, at: Place, start: int, count: int) -> list[ServiceBusReceivedMessage]:
        """Up to so many messages from a sequence number on."""

        async def peeked(receiver: ServiceBusReceiver) -> list[ServiceBusReceivedMessage]:
            return await receiver.peek_messages(count, sequence_number=start, timeout=self._settings.timeout)

        return await self.run(at, peeked)

    async def first(self, at: Place, start: int) -> ServiceBusReceivedMessage | None:
        """The first message at or after a sequence number, in its partition."""
        found = await self.peek(at, start, 1)
        return found[0] if found and number(found[0]) >> BELOW == start >> BELOW else None

    async def bounds(self, at: Place, partition: int) -> Bounds:
        """The first message, and one past the last that the broker shows now: found by asking for what is beyond, in leaps.

        It is where the broker had no more to show, not proof that nothing else is in there.
        """
        base = partition << BELOW
        oldest = await self.first(at, base + FIRST)
        if oldest is None:
            return Bounds(partition, (base + FIRST,), (base + FIRST,))
        last, beyond, leap = number(oldest), None, 1
        while beyond is None or last + 1 < beyond:
            probe = last + leap if beyond is None else (last + beyond + 1) // 2
            found = await self.first(at, probe)
            if found is None:
                beyond = probe
            else:
                last, leap = number(found), leap * 2
        return Bounds(partition, (number(oldest),), (last + 1,))

    async def locate(self, at: Place, bounds: Bounds, time_ns: int) -> Position | None:
        """The first message that was enqueued at or after a time."""
        (low,), end = bounds.low, bounds.end
        high = end[0] if end else low
        found: Position | None = None
        while low < high:
            middle = (low + high) // 2
            message = await self.first(at, middle)
            if message is None or (enqueued_ns(message) or 0) >= time_ns:
                high, found = middle, (number(message),) if message is not None else found
            else:
                low = number(message) + 1
        return found

    async def browse(self, topic: Entity, pieces: Sequence[Piece], allow: frozenset[Effect]) -> Browser:
        """Open a look."""
        at = place(topic)
        has_sessions = await self.sessions(at)
        if has_sessions is None:
            raise self._settings.host.error(
                ErrorKind.UNSUPPORTED, at.path, f"{at.path}: a topic keeps nothing itself; look at a subscription"
            )
        if has_sessions and Effect.LOCKS_SESSION not in allow:
            text = f"{at.path}: looking locks its sessions one by one; allow it with allow=locks_session"
            raise self._settings.host.error(ErrorKind.UNSUPPORTED, at.path, text)
        return Browser(self, self._settings, at, pieces, sessions=has_sessions)

    async def of_sessions(self, at: Place) -> tuple[list[ServiceBusReceivedMessage], bool]:
        """Everything in every session, each locked while it is peeked; whether one was held by somebody else."""
        found: list[ServiceBusReceivedMessage] = []
        missed = False

        async def listed() -> list[str]:
            client = self._settings.client()
            pages = (
                client.list_subscription_sessions(at.parent, at.subscription)
                if at.subscription
                else client.list_queue_sessions(at.parent)
            )
            return [session async for session in pages]

        async def peeked(session: str) -> list[ServiceBusReceivedMessage]:
            rows: list[ServiceBusReceivedMessage] = []
            async with self._settings.receiver(at, session_id=session) as receiver:
                while page := await receiver.peek_messages(PAGE, sequence_number=number(rows[-1]) + 1 if rows else FIRST):
                    rows += page
            return rows

        for session in sorted(set(await self._worker.run(at.path, listed, 30))):
            try:
                found += await self._worker.run(at.path, lambda session=session: peeked(session), 30)  # type: ignore[misc] # bound now
            except BrokerError as error:
                if error.kind is not ErrorKind.CONFLICT:
                    raise
                missed = True
        return sorted(found, key=number), missed

    async def close(self) -> None:
        """Close every receiver."""
        await self._worker.close(*(receiver.close for receiver in self._receivers.values()))


class Browser:
    """A look over fixed pieces, one partition after the other."""

    def __init__(self, looks: Looks, settings: Settings, at: Place, pieces: Sequence[Piece], *, sessions: bool) -> None:
        self._looks, self._settings, self._at = looks, settings, at
        self._codec = ServiceBusCodec(at.path, taken=False)
        self._pieces = {p.partition: p for p in pieces if p.end is None or p.start < p.end}
        self._cursors = {p.partition: max(_first(p.start), (p.partition << BELOW) + FIRST) for p in pieces}
        self._sessions = sessions
        self._rows: list[ServiceBusReceivedMessage] | None = None  # of every session, in order
        self._dry: set[int] = set()
        self._missed = self._closed = False
        self._pending: Pending[Step] = Pending()

    async def read(self, max_rows: int, max_bytes: int, wait: float) -> Step:
        if self._closed:
            raise self._settings.host.error(ErrorKind.CLOSED, self._at.path, f"{self._at.path}: this look is closed; look again")
        return await self._pending.call(lambda: self._fetch(max_rows, wait))

    async def _fetch(self, max_rows: int, wait: float) -> Step:
        if not self._pieces:
            return Step(None, {})
        partition, piece = next(iter(self._pieces.items()))
        rows = await self._page(partition, min(max_rows, PAGE))
        if not rows:
            return await self._nothing(partition, piece, wait)
        kept = [m for m in rows if piece.end is None or (number(m),) < piece.end]
        if piece.end is not None and len(kept) < len(rows):  # a later row
            del self._pieces[partition]
            return self._step(kept, partition, piece.end)
        self._cursors[partition] = number(rows[-1]) + 1
        return self._step(kept, partition, (self._cursors[partition],))

    async def _nothing(self, partition: int, piece: Piece, wait: float) -> Step:
        """The broker has no more to show of a partition; one that is followed is asked again, after the others."""
        if partition in self._dry and self._sessions:
            text = f"{self._at.path}: an entity with sessions cannot be followed, as each look locks them; look again"
            raise self._settings.host.error(ErrorKind.UNSUPPORTED, self._at.path, text)
        self._dry.add(partition)
        del self._pieces[partition]
        if piece.end is None:
            if not self._pieces:
                await asyncio.sleep(wait)
            self._pieces[partition] = piece
        return Step(None, {}, {partition: Stop.UNPROVEN if self._missed else Stop.DRY})

    async def _page(self, partition: int, count: int) -> list[ServiceBusReceivedMessage]:
        start = self._cursors[partition]
        if not self._sessions:
            page = await self._looks.peek(self._at, start, count)
        else:
            if self._rows is None:
                self._rows, self._missed = await self._looks.of_sessions(self._at)
            page = [m for m in self._rows if number(m) >= start][:count]
        return [m for m in page if number(m) >> BELOW == partition]

    def _step(self, rows: list[ServiceBusReceivedMessage], partition: int, reached: Position) -> Step:
        return Step(Batch(self._codec, rows) if rows else None, {partition: reached})

    async def close(self) -> None:
        self._closed = True


def _first(start: Position) -> int:
    """The first sequence number at or after a place."""
    return start[0] + (len(start) > 1) if start else 0
