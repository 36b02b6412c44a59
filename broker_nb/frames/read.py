"""Reads, from the portable layer to a frame with its report: the loop fetches while a worker thread converts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from broker_nb.backends.driver import Batch
from broker_nb.frames import report as reports
from broker_nb.frames.build import FrameBuilder, as_asked
from broker_nb.frames.report import PartReport, ReadReport
from broker_nb.portable.look import READ_ROWS, Look
from broker_nb.portable.pulling import Taken


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
    builder = await asyncio.to_thread(FrameBuilder, decode=decode, attributes=attributes, where=where, params=params, zone=zone)
    asked = look.asked
    trimming = asked.newest is not None or asked.oldest is not None
    read_rows = READ_ROWS if where is not None or trimming else min(READ_ROWS, limit)
    async with contextlib.aclosing(look.batches(timeout, read_rows)) as batches:
        converting: asyncio.Task[int] | None = None
        async for batch in batches:
            if converting is not None:
                await converting
            if builder.rows >= limit and not trimming:
                look.stop(f"limit of {limit:,} messages")
                break
            if builder.bytes >= max_bytes:
                look.stop(f"limit of {max_bytes:,} bytes")
                break
            converting = asyncio.ensure_future(asyncio.to_thread(builder.add, batch))
        if converting is not None:
            await converting
    if trimming:
        wanted = (asked.newest or asked.oldest or 0) * (len(look.summary.parts) if asked.per_partition else 1)
        if min(wanted, builder.rows) > limit:
            look.summary.stopped = f"limit of {limit:,} messages"
    elif builder.rows > limit:
        look.summary.stopped = f"limit of {limit:,} messages"  # also when the whole range was read: rows are cut off
    table = await asyncio.to_thread(
        builder.finish,
        newest=asked.newest,
        oldest=asked.oldest,
        per_partition=asked.per_partition,
        window_ns=look.window_ns,
        limit=limit,
    )
    made = _look_report(look, topic, builder, table, where, time.monotonic() - began)
    return await _finished(table, as_, made)


async def _finished(table: Any, as_: str, made: ReadReport) -> tuple[Any, str]:
    reports.keep(made)
    frame = await asyncio.to_thread(as_asked, table, as_)
    if as_ == "pandas":
        frame.attrs.update(made.attrs())
    return frame, made.caption()


def _look_report(look: Look, topic: str, builder: FrameBuilder, table: Any, where: str | None, elapsed: float) -> ReadReport:
    summary = look.summary
    first, last = _times(table)
    complete = summary.complete
    return ReadReport(
        verb="sample",
        topic=topic,
        asked=look.asked.text,
        complete="unknown" if complete is None else complete,
        why=summary.why,
        messages=len(table),
        scanned=builder.scanned,
        total=summary.total,
        bytes=builder.bytes,
        parts=tuple(
            PartReport(p.partition, p.start, p.end, p.reached, p.stop.value if p.stop else "") for p in summary.parts.values()
        ),
        first_time=first,
        last_time=last,
        skipped=summary.skipped,
        where=where,
        where_true=builder.where.true if builder.where else 0,
        where_false=builder.where.false if builder.where else 0,
        where_unknown=builder.where.unknown if builder.where else 0,
        decoded=_decoded(builder, table),
        undecodable=dict(builder.undecodable),
        mixed=builder.mixed,
        times_out_of_range=builder.times_lost,
        notes=(*summary.notes, *_notes(builder)),
        effects=tuple(e.value for e in summary.effects),
        elapsed_s=elapsed,
    )


def _decoded(builder: FrameBuilder, table: Any) -> dict[str, int]:
    if not builder.decoder.objects:
        return {}
    bad = sum(builder.undecodable.values())
    empty = table.column("data").null_count
    return {"json": len(table) - bad - empty, "null body": empty}


def _notes(builder: FrameBuilder) -> list[str]:
    notes = []
    if builder.times_lost:
        notes.append(f"{builder.times_lost:,} times outside the years 1-9999 are missing")
    if builder.decoder.repeated:
        notes.append(f"{builder.decoder.repeated:,} bodies repeat a key; the last value is taken")
    if builder.decoder.left_out:
        notes.append(f"{len(builder.decoder.left_out):,} fields beyond the first 500 are in data only")
    if builder.where is not None:
        notes.extend(f"where: no message has {name.removeprefix('value_')}" for name in builder.where.never)
        notes.extend(
            f"where: {n:,} values of {name} had another type and count as unknown" for name, n in builder.where.clashes.items()
        )
    return notes


def _times(table: Any) -> tuple[str, str]:
    """The first and the last publish time, as a caption shows them."""
    import pyarrow.compute as pc

    both = pc.min_max(table.column("publish_time")).as_py()
    first, last = both["min"], both["max"]
    if first is None:
        return "", ""
    shape = "%H:%M:%S" if first.date() == last.date() else "%Y-%m-%d %H:%M:%S"
    return f"{first:{shape}}", f"{last:{shape}}"


# ------------------------------------------------------------------ taken rows
async def read_taken(
    taken: Iterable[Taken], topic: str, lease: Any, *, decode: str, attributes: Sequence[str]
) -> tuple[Any, dict[int, int]]:
    """The frame of rows that were taken, and how many rows were delivered how often.

    Parameters
    ----------
    lease
        Serial of a delivery -> the text that names it.
    """
    began = time.monotonic()
    builder = FrameBuilder(decode=decode, attributes=attributes, leases=True)
    parts = [(part.batch, [lease(serial) for serial in part.serials]) for part in taken]
    return await asyncio.to_thread(_build_taken, builder, parts, topic, "consume", began)


async def held_frame(parts: Sequence[tuple[Batch, list[str]]], names: str) -> tuple[Any, str]:
    """The frame of rows that are held; each batch with the names of its leases."""
    builder = FrameBuilder(leases=True)
    frame, _ = await asyncio.to_thread(_build_taken, builder, parts, names, "held", time.monotonic())
    return frame, f"held | {len(frame):,} messages" + (f" of {names}" if names else "") + " | settle with ack, nack or release"


def _build_taken(
    builder: FrameBuilder, parts: Sequence[tuple[Batch, list[str]]], topic: str, verb: str, began: float
) -> tuple[Any, dict[int, int]]:
    for batch, leases in parts:
        builder.add(batch, leases)
    table = builder.finish()
    counts = Counter(table.column("delivery_count").drop_null().to_pylist())
    first, last = _times(table)
    made = ReadReport(
        verb=verb,
        topic=topic,
        asked="",
        complete=True,
        messages=len(table),
        scanned=builder.scanned,
        bytes=builder.bytes,
        first_time=first,
        last_time=last,
        decoded=_decoded(builder, table),
        undecodable=dict(builder.undecodable),
        mixed=builder.mixed,
        times_out_of_range=builder.times_lost,
        notes=tuple(_notes(builder)),
        elapsed_s=time.monotonic() - began,
    )
    reports.keep(made)
    frame = as_asked(table, "pandas")
    frame.attrs.update(made.attrs())
    return frame, dict(counts)
