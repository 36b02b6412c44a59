"""What a program is written against: publishing, and every shape of pulling.

Three things are told apart everywhere
    cancelled by the caller     `asyncio.CancelledError`
    the caller's deadline       `TimeoutError`, out of the caller's own `asyncio.timeout`
    nothing there yet           None or an empty list: never an error, and never the end

Pulling has no end of its own: after `close()` everything raises BrokerError of kind CLOSED. A call that is cancelled loses
nothing: what it had already taken comes with the next call.

Standard library only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Message, OutboundMessage, Published, Record

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """When a batch is handed over: at the first limit that it reaches, or as soon as the caller's timeout has passed.

    Parameters
    ----------
    count
        Most messages in a batch.
    bytes
        Most bytes of data and keys, never exceeded but by a single larger message; None = no limit.
    age_s
        Seconds that the batch's first message may wait for company; 0 = take what is there, `math.inf` = no limit.
    """

    count: int = 5000
    bytes: int | None = 1_000_000
    age_s: float = 1.0

    def __post_init__(self) -> None:
        if self.count < 1 or (self.bytes is not None and self.bytes < 1) or not self.age_s >= 0:
            raise BrokerError(ErrorKind.INVALID, "batch", f"{self}: count and bytes start at 1, age_s at 0")


# ------------------------------------------------------------------ publishing
class Topic(Protocol):
    """One place to publish to."""

    async def publish(self, message: OutboundMessage) -> Published:
        """Returns when the broker has accepted the message.

        Raises
        ------
        BrokerError
            It was not accepted, or (TIMEOUT, UNREACHABLE) nobody knows. NOT_FOUND: the topic is not there, and is not created.
        """
        ...

    async def batch_publish(self, *messages: OutboundMessage) -> list[Published]:
        """Returns when the fate of every message is known: a result per message, in order. Raises only if none was tried."""
        ...


class Publisher(Protocol):
    """Makes topics."""

    async def topic(self, name: str) -> Topic:
        """The topic of that name; NOT_FOUND when it is not there. Nothing is created."""
        ...

    async def close(self) -> None:
        """Waits for what is being sent. Idempotent."""
        ...


class TransactionalPublisher(Publisher, Protocol):
    """A publisher whose messages become visible together, or not at all."""

    async def begin(self) -> None: ...

    async def commit(self) -> bool:
        """Whether it committed: False means that the broker aborted it. TIMEOUT: unknown, call again to find out."""
        ...

    async def abort(self) -> bool:
        """Whether it committed: True means that it was too late to abort."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[None]:
        """`begin` on entering; on leaving `commit`, or `abort` when the block was left by an exception."""
        ...


# ------------------------------------------------------------------ pulling: the shapes
@runtime_checkable
class Batches(Protocol[T]):
    """Several at a time."""

    async def next_batch(self, timeout: float | None = None) -> list[T]:
        """The next batch; empty when nothing came within `timeout` seconds (None = wait for ever)."""
        ...

    async def close(self) -> None:
        """Gives back what was taken and not handed over; ends a call that waits. Deletes nothing durable. Idempotent."""
        ...


@runtime_checkable
class Streams(Protocol[T_co]):
    """Pulled by `async for`."""

    def stream(self) -> AsyncIterator[T_co]:
        """One by one until cancelled or closed; at most one error, raised after everything that came before it."""
        ...


@runtime_checkable
class BatchStreams(Protocol[T]):
    """Pulled batch by batch by `async for`."""

    def batch_stream(self) -> AsyncIterator[list[T]]:
        """As `Streams.stream`, in batches that are never empty."""
        ...


@runtime_checkable
class Receives(Protocol[T_co]):
    """Calls a handler."""

    async def receive(self, handler: Callable[[T_co], Awaitable[object]]) -> None:
        """Runs `handler` on each, concurrently within a bound, until cancelled or the first error. Returning settles nothing."""
        ...


@runtime_checkable
class BatchReceives(Protocol[T]):
    """Calls a handler with batches."""

    async def receive_batch(self, handler: Callable[[list[T]], Awaitable[object]]) -> None:
        """As `Receives.receive`, in batches that are never empty."""
        ...


# ------------------------------------------------------------------ messages: each settled by itself
@runtime_checkable
class MessageIterator(Protocol):
    """One message at a time."""

    async def next_message(self, timeout: float | None = None) -> Message | None:
        """The next message; None when nothing came within `timeout` seconds (None = wait for ever)."""
        ...

    async def close(self) -> None:
        """As `Batches.close`."""
        ...


class BatchedMessageIterator(Batches[Message], Protocol):
    """Several messages at a time."""


class MessageStream(Streams[Message], Protocol):
    """Messages by `async for`."""


class BatchedMessageStream(BatchStreams[Message], Protocol):
    """Batches of messages by `async for`."""


class Receiver(Receives[Message], Protocol):
    """Messages by handler."""


class BatchedReceiver(BatchReceives[Message], Protocol):
    """Batches of messages by handler."""


# ------------------------------------------------------------------ records: a position per partition is committed
@runtime_checkable
class RecordIterator(Protocol):
    """One record at a time, in order within a partition."""

    async def next_record(self, timeout: float | None = None) -> Record | None:
        """The next record; None when nothing came within `timeout` seconds (None = wait for ever)."""
        ...

    async def close(self) -> None:
        """As `Batches.close`; records are not given back, an uncommitted one comes to whoever reads the group next."""
        ...


class BatchedIterator(Batches[Record], Protocol):
    """Several records at a time; the batch is acknowledged as a batch (`commit_highest_offsets`)."""
