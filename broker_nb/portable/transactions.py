"""Publishing in transactions: what is sent between begin and commit becomes visible together, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from broker_nb.adapters.publish import transaction
from broker_nb.backends.driver import Outbound, SendResult, Transaction
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import OutboundMessage, Published
from broker_nb.portable.loop import anywhere
from broker_nb.portable.publish import published
from broker_nb.portable.turnstile import Turnstile


class TransactionalTopic:
    """One topic of a transactional publisher; it can be published to while a transaction is open."""

    def __init__(self, name: str, send: Callable[[str, Sequence[Outbound]], Coroutine[Any, Any, Sequence[SendResult]]]) -> None:
        self.name = name
        self._send = send

    @anywhere
    async def publish(self, message: OutboundMessage) -> Published:
        """Send one message in the open transaction; raises when it was not accepted."""
        (one,) = await self.batch_publish(message)
        if one.error is not None:
            raise one.error
        return one

    @anywhere
    async def batch_publish(self, *messages: OutboundMessage) -> list[Published]:
        """Send messages in the open transaction; a result for each, in order. Raises only when none was attempted."""
        sent = await self._send(self.name, [Outbound(m.data, m.key, m.attributes) for m in messages])
        return [published(result) for result in sent]


class TransactionalClientPublisher:
    """A `TransactionalPublisher`: one transactional id, one open transaction at a time.

    Parameters
    ----------
    name
        The transactional id. Beginning fences whoever used it before.
    begin
        Opens a transaction of the driver.
    guard
        Raises when writing to a topic is not allowed.
    """

    def __init__(self, name: str, begin: Callable[[], Coroutine[Any, Any, Transaction]], guard: Callable[[str], None]) -> None:
        self.name = name
        self._begin, self._guard = begin, guard
        self._open: Transaction | None = None
        self._turnstile = Turnstile()

    async def topic(self, name: str) -> TransactionalTopic:
        """The topic of that name; that it is missing is told when it is first published to."""
        self._guard(name)
        return TransactionalTopic(name, self._send)

    @anywhere
    async def begin(self) -> None:
        """Open a transaction. Effect on the broker: an earlier holder of the id is fenced."""
        if self._open is not None:
            raise BrokerError(ErrorKind.CONFLICT, self.name, f"{self.name}: a transaction is open; commit or abort it first")
        self._open = await self._begin()

    @anywhere
    async def commit(self) -> bool:
        """Make it visible. False: the broker aborted it. TIMEOUT is raised when unknown: call again to find out."""
        return await self._end(lambda opened: opened.commit())

    @anywhere
    async def abort(self) -> bool:
        """Take it back. Whether it committed: True means that it was too late."""
        return not await self._end(lambda opened: opened.abort())

    def transaction(self) -> AbstractAsyncContextManager[None]:
        """`begin` on entering; on leaving `commit`, or `abort` when the block was left by an exception."""
        return transaction(self)

    @anywhere
    async def close(self) -> None:
        """Abort what is open. Idempotent."""
        if self._open is not None:
            await self.abort()

    def _opened(self) -> Transaction:
        if self._open is None:
            raise BrokerError(
                ErrorKind.CLOSED, self.name, f"{self.name}: no transaction is open; begin one, or use transaction()"
            )
        return self._open

    async def _end(self, end: Callable[[Transaction], Coroutine[Any, Any, bool]]) -> bool:
        opened = self._opened()
        done = await self._turnstile.call(lambda: end(opened))
        self._open = None  # not when it raised: then it may still be asked again
        return done

    async def _send(self, topic: str, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        self._guard(topic)
        opened = self._opened()
        return await self._turnstile.call(lambda: opened.send(topic, rows))
