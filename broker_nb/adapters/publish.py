"""Publishing many with a topic that can do one, and the transaction block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from broker_nb.adapters.settle import group_batch_by
from broker_nb.adapters.tasks import task_group
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.interfaces import Topic, TransactionalPublisher
from broker_nb.messages import OutboundMessage, Published

# After these the broker may have stored the message all the same.
_UNKNOWN = frozenset({ErrorKind.TIMEOUT, ErrorKind.UNREACHABLE, ErrorKind.TRANSIENT, ErrorKind.UNKNOWN})


async def simple_publisher_parallelization(topic: Topic, *messages: OutboundMessage, concurrency: int = 100) -> list[Published]:
    """Publish each message by `topic.publish`, at most `concurrency` at a time, those of equal key in order.

    After the first error nothing more is sent; what is under way is waited for. Being cancelled cancels what is under way.

    Returns
    -------
    list of Published
        One per message, in the order given: "refused" with the error, "unknown" where the broker may have it, and "refused" with
        an error that says so for what was never sent.
    """
    if concurrency < 1:
        raise BrokerError(ErrorKind.INVALID, "concurrency", f"concurrency={concurrency}: give 1 or more")
    results: list[Published | None] = [None] * len(messages)
    failed: list[BrokerError] = []

    async def send(one: int) -> None:
        try:
            results[one] = await topic.publish(messages[one])
        except BrokerError as error:
            failed.append(error)
            results[one] = Published("unknown" if error.kind in _UNKNOWN else "refused", error=error)

    # A lane is what must go one after the other. Without a key every message is its own lane.
    lanes = group_batch_by(range(len(messages)), lambda i: (i, None) if messages[i].key is None else (-1, messages[i].key))
    waiting = iter(lanes.values())

    async def worker() -> None:
        for lane in waiting:
            for one in lane:
                if failed:
                    return
                await send(one)

    async with task_group() as workers:
        for _ in range(min(concurrency, len(lanes))):
            workers.create_task(worker())
    return [r or _not_sent(failed[0]) for r in results]


def _not_sent(cause: BrokerError) -> Published:
    text = f"not sent, because an earlier message failed: {cause}"
    return Published("refused", error=BrokerError(cause.kind, cause.entity, text, retryable=cause.retryable))


@asynccontextmanager
async def transaction(publisher: TransactionalPublisher) -> AsyncIterator[None]:
    """`TransactionalPublisher.transaction`, out of begin, commit and abort.

    Raises
    ------
    BrokerError
        CONFLICT when the broker aborted instead of committing; TIMEOUT when it is not known: `await publisher.commit()` tells.
    """
    await publisher.begin()
    try:
        yield
    except BaseException as error:
        try:
            await publisher.abort()
        except BrokerError as second:
            error.add_note(f"and the transaction was not aborted: {second}")
        raise
    if not await publisher.commit():
        raise BrokerError(
            ErrorKind.CONFLICT, "transaction", "the broker aborted the transaction; nothing of it was published, run it again"
        )
