"""Settling many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import TypeVar

from broker_nb.adapters.tasks import first_of
from broker_nb.messages import Message, Record

T = TypeVar("T")
G = TypeVar("G", bound=Hashable)


async def ack_all(*messages: Message) -> None:
    """Acknowledge every message, all at the same time.

    Raises
    ------
    BrokerError
        The first failure in the order given, after all were tried; a note on it counts the others.
    """
    await _all(m.ack() for m in messages)


async def nack_all(*messages: Message, delay: float = 0.0) -> None:
    """Give every message back, to come again after `delay` seconds where the broker can; raises as `ack_all` does."""
    await _all(m.nack(delay) for m in messages)


async def commit_highest_offsets(records: Iterable[Record]) -> None:
    """Commit everything up to and with the highest record of each topic and partition among `records`; raises as `ack_all` does.

    The order of `records` does not matter, and a group that is further already stays where it is.
    """
    highest: dict[tuple[str, int], Record] = {}
    for record in records:
        place = record.topic, record.partition
        if place not in highest or _position(record) > _position(highest[place]):
            highest[place] = record
    await _all(r.commit_to() for r in highest.values())


def _position(record: Record) -> tuple[int, ...]:
    return record.position or (record.offset,)


def group_batch_by(batch: Iterable[T], grouper: Callable[[T], G]) -> dict[G, list[T]]:
    """`batch` in groups of equal `grouper(item)`: groups by first appearance, each in the batch's order."""
    groups: dict[G, list[T]] = {}
    for item in batch:
        groups.setdefault(grouper(item), []).append(item)
    return groups


async def _all(settling: Iterable[Awaitable[None]]) -> None:
    results = await asyncio.gather(*settling, return_exceptions=True)
    errors = [r for r in results if r is not None]
    if errors:
        raise first_of(errors)
