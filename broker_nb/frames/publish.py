"""Publishing a frame: made into rows and checked first, then sent, with a result per row whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from broker_nb.backends.driver import Outbound, SendResult, Sent
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.frames.columns import paused_gc
from broker_nb.frames.outbound import from_frame, from_messages
from broker_nb.frames.results import Published, sent_counts
from broker_nb.portable.client import Client


async def publish_frame(
    client: Client, frame: Any, to: str, *, body: str, column: str | None, dry_run: bool, said: Callable[[str], None]
) -> Published:
    """See `Session.publish`. `said` is told what happened when the caller is cancelled, and has no result to look at."""
    with (
        paused_gc()
    ):  # rows and a result for each are kept on purpose; scanning them again and again would cost as much as sending
        return await _publish(client, frame, to, body, column, dry_run, said)


async def _publish(
    client: Client, frame: Any, to: str, body: str, column: str | None, dry_run: bool, said: Callable[[str], None]
) -> Published:
    if not dry_run:
        client.guard_writing(to)
    rows, ignored = await asyncio.to_thread(_rows, frame, body, column)
    topic = await client.topic(to)
    if bad := await topic.check(rows):
        first = min(bad)
        raise BrokerError(
            ErrorKind.INVALID, to, f"publish {to}: row {first}: {bad[first]} ({len(bad)} of {len(rows)} rows); nothing was sent"
        )
    results: list[SendResult] = []
    tail = f"{_size(rows)}" + (f" | ignored columns: {', '.join(ignored)}" if ignored else "")
    if dry_run:
        results = [SendResult(Sent.ACCEPTED)] * len(rows)
        return Published(f"publish {to} | DRY RUN | {len(rows):,} messages, {tail} | nothing sent", results, dry_run=True)
    try:
        await topic.send(rows, results, bad)
    except asyncio.CancelledError:
        said(f"publish {to} | STOPPED by you | {sent_counts(results)}, {len(rows) - len(results):,} not sent")
        raise
    return Published(f"publish {to} | {sent_counts(results)} | {tail}", results)


def _rows(frame: Any, body: str, column: str | None) -> tuple[list[Outbound], list[str]]:
    if isinstance(frame, pd.DataFrame):
        return from_frame(frame, body, column)
    if isinstance(frame, list | tuple):
        if not frame:
            raise BrokerError(ErrorKind.INVALID, "publish", "publish: the list is empty; nothing was sent")
        return from_messages(frame), []
    text = f"publish: a DataFrame or a list of OutboundMessage is needed, not {type(frame).__name__}"
    raise BrokerError(ErrorKind.INVALID, "publish", text)


def _size(rows: Sequence[Outbound]) -> str:
    size, units = float(sum(len(row.data) for row in rows if row.data)), ["B", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        del units[0]
    return f"{size:.3g} {units[0]}"
