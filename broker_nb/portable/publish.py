"""Publishing: every row is checked before the first is sent, sent in slices, and its fate is known afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any

from broker_nb.backends.driver import NO_PARTITION, Outbound, Sender, SendResult, Sent
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import OutboundMessage, Published
from broker_nb.portable.loop import anywhere
from broker_nb.portable.turnstile import Turnstile

SLICE_ROWS = 50_000
SLICE_BYTES = 64 << 20
CHECK_ROWS = 5000


class TopicPublisher:
    """Publishes to one topic. Never creates it."""

    def __init__(self, name: str, open_sender: Callable[[], Coroutine[Any, Any, Sender]], guard: Callable[[], None]) -> None:
        self.name = name
        self._open_sender = open_sender
        self._guard = guard
        self._sender: Sender | None = None
        self._opening = asyncio.Lock()
        self._turnstile = Turnstile()
        self._closed = False

    async def start(self) -> None:
        """Open the sender, so that a wrong name is an error now."""
        await self._get()

    async def _get(self) -> Sender:
        async with self._opening:
            if self._closed:
                raise BrokerError(
                    ErrorKind.CLOSED, self.name, f"{self.name}: the publisher is closed; ask the connection for a new one"
                )
            if self._sender is None:
                self._sender = await self._open_sender()
            return self._sender

    @anywhere
    async def publish(self, message: OutboundMessage) -> Published:
        """Send one message; returns when the broker has accepted it, or raises."""
        (published,) = await self.batch_publish(message)
        if published.error is not None:
            raise published.error
        return published

    @anywhere
    async def batch_publish(self, *messages: OutboundMessage) -> list[Published]:
        """Send messages; a result for each, in order. Raises only when none was attempted."""
        rows = [Outbound(m.data, m.key, m.attributes) for m in messages]
        results: list[SendResult] = []
        await self.send(rows, results)
        return [published(r) for r in results]

    async def check(self, rows: Sequence[Outbound]) -> dict[int, str]:
        """Without sending: index of each row that can never be sent -> one line why."""
        check, bad = (await self._get()).check, {}
        for i, row in enumerate(rows):
            if (why := check(row)) is not None:
                bad[i] = why
            if i % CHECK_ROWS == CHECK_ROWS - 1:
                await asyncio.sleep(0)  # the loop is everybody's
        return bad

    async def send(self, rows: Sequence[Outbound], results: list[SendResult], bad: Mapping[int, str] | None = None) -> None:
        """Send rows in slices and append a result per row to `results`, in order. `bad` is what `check` said of them, if it was asked.

        A row that can never be sent is REFUSED, and so are later rows of its key; the others are sent. When the caller is cancelled,
        the slice in flight is finished and `results` has a row for everything that was attempted.
        """
        self._guard()
        if bad is None:
            bad = await self.check(rows)
        sender = await self._get()
        stopped_keys: set[bytes] = set()
        for start, stop in _slices(rows):

            async def attempt(start: int = start, stop: int = stop) -> None:
                if bad or stopped_keys:
                    results.extend(await self._send_some(sender, rows, range(start, stop), bad, stopped_keys))
                    return
                sent = await sender.send(rows[start:stop])
                results.extend(sent)
                stopped_keys.update(_stopped(rows[start:stop], sent))

            try:
                await self._turnstile.call(attempt)
            except BrokerError as error:
                if not results:
                    raise
                refusal = SendResult(Sent.REFUSED, error=error)
                results.extend(refusal for _ in range(len(rows) - len(results)))
                return
            except asyncio.CancelledError:
                await self._turnstile.drained(60)
                raise

    async def _send_some(
        self, sender: Sender, rows: Sequence[Outbound], which: range, bad: Mapping[int, str], stopped_keys: set[bytes]
    ) -> list[SendResult]:
        """The slice without rows that cannot go, and without rows whose key stopped earlier."""
        refused: dict[int, SendResult] = {}
        for i in which:
            key = rows[i].key
            if i in bad:
                refused[i] = self._refusal(ErrorKind.INVALID, bad[i])
                stopped_keys.update((key,) if key is not None else ())
            elif key is not None and key in stopped_keys:
                refused[i] = self._refusal(
                    ErrorKind.CONFLICT, f"an earlier row of key {key!r} was not sent, so this one was held back"
                )
        going = [rows[i] for i in which if i not in refused]
        sent = await sender.send(going) if going else []
        stopped_keys.update(_stopped(going, sent))
        rest = iter(sent)
        return [refused[i] if i in refused else next(rest) for i in which]

    def _refusal(self, kind: ErrorKind, text: str) -> SendResult:
        return SendResult(Sent.REFUSED, error=BrokerError(kind, self.name, f"{self.name}: {text}"))

    @anywhere
    async def close(self) -> None:
        """Wait for what is being sent, then let go. Idempotent."""
        self._closed = True
        async with self._opening:
            sender, self._sender = self._sender, None
        if sender is not None:
            await self._turnstile.drained(60)
            await sender.close()


def _slices(rows: Sequence[Outbound]) -> Iterable[tuple[int, int]]:
    start = size = 0
    for i, row in enumerate(rows):
        size += len(row.data) if row.data else 0
        if i + 1 - start >= SLICE_ROWS or size >= SLICE_BYTES:
            yield start, i + 1
            start, size = i + 1, 0
    if start < len(rows):
        yield start, len(rows)


def _stopped(rows: Sequence[Outbound], sent: Sequence[SendResult]) -> set[bytes]:
    bad = (Sent.REFUSED, Sent.UNKNOWN)
    return {row.key for row, result in zip(rows, sent, strict=True) if result.state in bad and row.key is not None}


def published(result: SendResult) -> Published:
    """A driver's result as a person's."""
    return Published(
        state=result.state.name.lower(),
        id=result.id,
        partition=None if result.partition == NO_PARTITION else result.partition,
        offset=result.position[0] if result.position else None,
        error=result.error,
    )
