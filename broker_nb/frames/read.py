"""Reads, from the portable layer to a frame with its report: the loop fetches while a worker thread converts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd

from broker_nb.backends.driver import Batch
from broker_nb.frames.build import FrameBuilder, check_format
from broker_nb.frames.columns import paused_gc
from broker_nb.frames.report import PartReport, ReadReport
from broker_nb.portable.look import READ_ROWS, Look
from broker_nb.portable.pulling import Taken

AHEAD = 3
"""Batches given to the converting threads before the oldest is waited for."""


async def read_look(
    look: Look,
    topic: str,
    *,
    limit: int,
    max_bytes: int,
    decode: str,
    attributes: Sequence[str],
    where: str | None,
    params: Mapping[str, Any] | None,
    zone: str,
    as_: str,
    timeout: float | None,
) -> tuple[Any, str]:
    """The frame of a look, and its caption. See `Session.sample`."""
    began = time.monotonic()
    check_format(as_)
    asked, summary = look.asked, look.summary
    builder = await asyncio.to_thread(
        FrameBuilder, decode=decode, attributes=attributes, where=where, params=params, zone=zone, span=asked
    )
    with paused_gc():
        await _convert(look, builder, limit, max_bytes, timeout)
        before = builder.rows
        kept = await asyncio.to_thread(builder.finish, limit)
    trimming = _trims(look)
    if kept == limit and (trimming or before > limit):
        wanted = (asked.newest or asked.oldest or 0) * (len(summary.parts) if asked.per_partition else 1)
        if not trimming or min(wanted, before) > limit:
            look.stop(f"limit of {limit:,} messages")
    complete = summary.complete
    made = ReadReport(
        verb="sample",
        topic=topic,
        asked=asked.text,
        complete="unknown" if complete is None else complete,
        why=summary.why,
        total=summary.total,
        parts=tuple(
            PartReport(p.partition, p.start, p.end, p.reached, p.stop.value if p.stop else "") for p in summary.parts.values()
        ),
        window_ns=look.window_ns,
        skipped=summary.skipped,
        effects=tuple(e.value for e in summary.effects),
        elapsed_s=time.monotonic() - began,
        **_with_notes(await asyncio.to_thread(builder.counts), summary.notes),
    )
    return await asyncio.to_thread(builder.to, as_, made), made.caption()


def _trims(look: Look) -> bool:
    return look.asked.newest is not None or look.asked.oldest is not None


async def _convert(look: Look, builder: FrameBuilder, limit: int, max_bytes: int, timeout: float | None) -> None:
    """Read the look to its end or to a limit, converting batches while the next are fetched."""
    trimming = _trims(look)
    read_rows = READ_ROWS if trimming or builder.filtering else min(READ_ROWS, limit)
    under_way = deque[asyncio.Future[int]]()
    # A thread of its own with a batch in hand goes on by itself; it would wait for the loop, and the loop for the interpreter.
    worker = ThreadPoolExecutor(1, "broker-nb-convert")
    digest = None if trimming else builder.convert

    def keep(batch: Batch) -> int:
        return sum(builder.keep(*digested) for digested in batch.digests or (builder.convert(batch),))

    try:
        async with contextlib.aclosing(look.batches(timeout, read_rows, digest)) as batches:
            async for batch in batches:
                while len(under_way) >= AHEAD:
                    await under_way.popleft()
                if builder.rows >= limit and not trimming:
                    look.stop(f"limit of {limit:,} messages")
                    break
                if builder.bytes >= max_bytes:
                    look.stop(f"limit of {max_bytes:,} bytes")
                    break
                under_way.append(asyncio.wrap_future(worker.submit(keep, batch)))
                under_way[-1].add_done_callback(_seen)
        for kept in under_way:
            await kept
    finally:
        worker.shutdown(wait=False, cancel_futures=True)


def _seen(kept: asyncio.Future[int]) -> None:
    """The first failure is raised; those of batches behind it are not worth a line in the log."""
    if not kept.cancelled():
        kept.exception()


def _with_notes(counts: dict[str, Any], notes: Iterable[str]) -> dict[str, Any]:
    return {**counts, "notes": (*notes, *counts["notes"])}


async def read_taken(
    taken: Iterable[Taken],
    topic: str,
    lease: Callable[[int], str],
    *,
    decode: str,
    attributes: Sequence[str],
) -> tuple[Any, dict[int, int]]:
    """The frame of rows that were taken, and delivery count -> rows. `lease` names a delivery by its serial."""
    builder = FrameBuilder(decode=decode, attributes=attributes, leases=True)
    parts: list[tuple[Batch, list[str] | None]] = [(part.batch, [lease(serial) for serial in part.serials]) for part in taken]
    return await asyncio.to_thread(_build_held, builder, parts, topic, "consume")


async def held_frame(parts: Sequence[tuple[Batch, list[str] | None]], names: str) -> tuple[Any, str]:
    """The frame of rows that are held, and its caption; each batch comes with the names of its leases."""
    frame, _ = await asyncio.to_thread(_build_held, FrameBuilder(leases=True), parts, names, "held")
    of = f" of {names}" if names else ""
    return frame, f"held | {len(frame):,} messages{of} | settle with ack, nack or release"


async def live_frame(parts: Sequence[tuple[Batch, list[str] | None]], states: Sequence[str], topic: str, dropped: int) -> Any:
    """The frame of what a live view has, with each row's state; `dropped` rows have left it."""
    builder = FrameBuilder(leases=any(leases is not None for _, leases in parts))
    why = f"{dropped:,} older rows have left the view" if dropped else ""
    frame, _ = await asyncio.to_thread(_build_held, builder, parts, topic, "live", why)
    return frame.assign(state=pd.Series(states, dtype="str"))


def _build_held(
    builder: FrameBuilder, parts: Sequence[tuple[Batch, list[str] | None]], topic: str, verb: str, why: str = ""
) -> tuple[Any, dict[int, int]]:
    began = time.monotonic()
    for batch, leases in parts:
        builder.add(batch, leases)
    builder.finish()
    counts, delivered = builder.counts(), builder.delivered()
    made = ReadReport(verb=verb, topic=topic, asked="", complete=not why, why=why, elapsed_s=time.monotonic() - began, **counts)
    return builder.to("pandas", made), delivered
