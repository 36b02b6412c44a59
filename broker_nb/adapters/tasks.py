"""Tasks that stand or fall together, with an error that `except BrokerError` catches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """`asyncio.TaskGroup` that raises its first error itself, not a group of errors."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as failed:
        raise first_of(failed.exceptions) from None


def first_of(errors: Sequence[BaseException]) -> BaseException:
    """The first error, with a note about the others."""
    first, *others = errors
    if others:
        first.add_note(f"and {len(others)} more, the next: {others[0]}")
    return first
