"""Bounded looks: a range becomes pieces, pieces are read until the broker has proved their end, and it is known what is missing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field

from broker_nb.backends.driver import (
    Batch,
    Bounds,
    Browser,
    Capabilities,
    Digest,
    Driver,
    Effect,
    Entity,
    Facts,
    Piece,
    Position,
    Proof,
    Step,
    Stop,
)
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.pulling import BACKOFF_S
from broker_nb.portable.ranges import Bound, Offset, Range, Time
from broker_nb.portable.turnstile import Turnstile

READ_ROWS = 8192
READ_BYTES = 16 << 20
MARGIN_NS = 300 * 10**9
"""How far past the end of a time range rows are read where producers set the time, so that late ones are found."""
STALL_S = 30.0


@dataclass(slots=True)
class Part:
    """What was asked and read of one partition. Half-open; `stop` says why it gave no more before `end`."""

    partition: int
    start: Position
    end: Position | None
    reached: Position | None = None
    stop: Stop | None = None
    cut: bool = False  # the range began before what the broker still has

    @property
    def done(self) -> bool:
        """Whether the broker has proved that everything up to `end` was handed out."""
        return self.end is not None and (self.start >= self.end or (self.reached is not None and self.reached >= self.end))


@dataclass(slots=True)
class Summary:
    """How a look ended. complete: True, False, or None = cannot be known."""

    parts: dict[int, Part] = field(default_factory=dict)
    skipped: int = 0
    stopped: str = ""  # why the reader stopped it: "limit of 100 rows", "timeout 5 s", ...
    notes: list[str] = field(default_factory=list)
    total: int | None = None  # rows between the bounds of the topic when the look began, where positions are numbers
    effects: frozenset[Effect] = frozenset()
    provable: bool = True

    @property
    def complete(self) -> bool | None:
        """Whether every row of the range was handed out."""
        if self.stopped or any(p.cut or p.stop in (Stop.HELD_BACK, Stop.AGED_OUT) for p in self.parts.values()):
            return False
        open_parts = [p for p in self.parts.values() if not p.done]
        if not self.provable or any(p.stop in (Stop.DRY, Stop.UNPROVEN) for p in open_parts):
            return None
        return not open_parts

    @property
    def why(self) -> str:
        """Why it is not complete; "" when it is."""
        said = [self.stopped] if self.stopped else []
        for stop in dict.fromkeys(
            p.stop for p in self.parts.values() if p.stop is not None and not (p.done and p.stop is Stop.DRY)
        ):
            where = ", ".join(str(p.partition) for p in self.parts.values() if p.stop is stop)
            said.append(f"{stop.value} (partition {where})")
        if cut := [str(p.partition) for p in self.parts.values() if p.cut]:
            said.append(f"older rows are no longer there (partition {', '.join(cut)})")
        if not said and not self.provable:
            said.append("this broker cannot tell where the end is")
        return "; ".join(said)


class Look:
    """An open look over one topic. Read `batches()` once, then `summary`.

    `window_ns` is a half-open time filter that the reader still has to apply, and `keep_newest` / `keep_oldest` what it has to
    trim to: the look hands out at least these rows, and more where only a look at the rows can tell.
    """

    def __init__(
        self,
        driver: Driver,
        topic: Entity,
        facts: Facts,
        asked: Range,
        bounds: Sequence[Bounds],
        pieces: Sequence[Piece],
        *,
        want: frozenset[str],
        committed_only: bool,
        allow: Collection[Effect],
    ) -> None:
        self.asked = asked
        self.window_ns = (_ns(asked.start), _ns(asked.end))
        self._driver, self._topic, self._facts = driver, topic, facts
        self._bounds = {b.partition: b for b in bounds}
        self._pieces = list(pieces)
        self._want, self._committed_only, self._allow = want, committed_only, frozenset(allow)
        self._capabilities: Capabilities = driver.capabilities
        self._rows: Counter[int] = Counter()
        self._counting = asked.newest is not None or asked.oldest is not None
        plan = facts.look
        self.summary = Summary(effects=plan.effects, provable=plan.proof is not Proof.NONE and plan.end_is_fixed)
        self.summary.total = _total(bounds)
        for piece in pieces:
            low = self._bounds[piece.partition].low
            aged = isinstance(asked.start, Offset) and (asked.start.n, *(0,) * (len(low) - 1)) < low
            self.summary.parts[piece.partition] = Part(piece.partition, piece.start, piece.end, cut=aged)

    def stop(self, why: str) -> None:
        """The reader leaves rows behind, in its hand or unread, whatever the broker has proved; the first reason stays."""
        self.summary.stopped = self.summary.stopped or why

    async def batches(
        self, timeout: float | None = None, read_rows: int = READ_ROWS, digest: Digest | None = None
    ) -> AsyncGenerator[Batch, None]:
        """Every batch of the range; close the generator to end the look early.

        Parameters
        ----------
        timeout
            Seconds for the whole look; what is missing then is said in the summary.
        digest
            What becomes of the rows, where the driver can do it while it reads (`Batch.digests`). Not in a look that counts rows.
        """
        end = None if timeout is None else time.monotonic() + timeout
        pieces = [p for p in self._pieces if p.end is None or p.start < p.end]
        while pieces:
            async with contextlib.aclosing(self._read(pieces, end, timeout, read_rows, digest)) as steps:
                async for batch in steps:
                    yield batch
            if self.summary.stopped:
                return
            pieces = self._further()
        self._note_held_back()

    async def _read(
        self, pieces: Sequence[Piece], end: float | None, timeout: float | None, read_rows: int, digest: Digest | None
    ) -> AsyncGenerator[Batch, None]:
        """One browser over some pieces, until each is proved or stopped."""
        open_pieces = {p.partition: p for p in pieces}
        failures, alive = 0, time.monotonic()
        turnstile = Turnstile()
        browser = await self._browse(pieces, digest)
        try:
            while open_pieces:
                now = time.monotonic()
                if end is not None and now >= end:
                    self.stop(f"stopped after {timeout:g} s (timeout)")
                    return
                if now - alive > STALL_S:
                    self.stop(f"no answer from the broker for {STALL_S:g} s")
                    return
                wait = min(self._capabilities.slice_s, 0.5 if end is None else max(0.0, min(0.5, end - now)))
                try:
                    step = await turnstile.call(lambda wait=wait: browser.read(read_rows, READ_BYTES, wait))  # type: ignore[misc] # bound now
                    failures = 0
                except BrokerError as error:
                    if not error.retryable or failures >= len(BACKOFF_S):
                        raise
                    await asyncio.sleep(BACKOFF_S[failures])
                    failures += 1
                    continue
                if self._note(step, open_pieces) or step.batch is not None:
                    alive = time.monotonic()
                if step.batch is not None and (step.batch.rows or step.batch.digests):
                    if self._counting:
                        self._rows.update(p for p, _ in step.batch.codec.places(step.batch.rows))
                    yield step.batch
        finally:
            await turnstile.drained(self._capabilities.slice_s + 2)
            await browser.close()

    async def _browse(self, pieces: Sequence[Piece], digest: Digest | None) -> Browser:
        return await self._driver.browse(self._topic, pieces, self._want, self._committed_only, self._allow, digest)

    def _note(self, step: Step, open_pieces: dict[int, Piece]) -> bool:
        """Whether anything was reached or stopped."""
        self.summary.skipped += step.skipped
        news = bool(step.skipped or step.stopped)
        for partition, reached in step.reached.items():
            part, piece = self.summary.parts[partition], open_pieces.get(partition)
            if piece is not None and piece.end is not None and reached >= piece.end:
                del open_pieces[partition]
            if part.reached is None or reached > part.reached:
                part.reached, news = reached, True
        for partition, stop in step.stopped.items():
            # Rows that went are missing, also where the driver says that it passed them.
            if open_pieces.pop(partition, None) is not None or stop is Stop.AGED_OUT:
                self.summary.parts[partition].stop = stop
        return news

    def _further(self) -> list[Piece]:
        """More pieces where gaps left a count short: further back for the newest rows, further on for the oldest."""
        wanted = self.asked.newest if self.asked.newest is not None else self.asked.oldest
        if wanted is None:
            return []
        further = []
        for part in self.summary.parts.values():
            missing = wanted - self._rows[part.partition]
            bounds = self._bounds[part.partition]
            if missing <= 0 or part.stop is not None or part.end is None or bounds.end is None:
                continue
            if self.asked.newest is not None and part.start > bounds.low:
                piece = Piece(part.partition, _back(part.start, bounds, self._more(part)), part.start)
                part.start = piece.start
            elif self.asked.oldest is not None and part.end < bounds.end:
                piece = Piece(part.partition, part.end, _ahead(part.end, bounds, self._more(part)))
                part.end = piece.end
            else:
                continue
            further.append(piece)
        return further

    def _more(self, part: Part) -> int:
        """How many places further to go where so many had too few rows."""
        if part.end is not None and len(part.start) == len(part.end) == 1:
            return 2 * (part.end[0] - part.start[0])
        return 2 * (self.asked.newest or self.asked.oldest or 1)

    def _note_held_back(self) -> None:
        """A range that runs to the end is cut short by an open transaction, also where its end was proved."""
        for part in self.summary.parts.values():
            bounds = self._bounds[part.partition]
            if bounds.high is not None and bounds.end is not None and bounds.high > bounds.end and part.end == bounds.end:
                part.stop = part.stop or Stop.HELD_BACK


async def open_look(
    driver: Driver,
    facts: Facts,
    asked: Range,
    *,
    want: frozenset[str],
    committed_only: bool,
    allow: Collection[Effect],
    partitions: Collection[int] | None = None,
) -> Look:
    """Resolve a range on a topic. Effect on the broker: those of `facts.look`, and only if `allow` names them all.

    Raises
    ------
    BrokerError
        UNSUPPORTED when looking is impossible or has effects that were not allowed; INVALID for a partition that is not there, a
        range whose end comes before its start, or offsets where there are none.
    """
    topic, plan = facts.entity, facts.look
    refuse_effects(facts, allow)
    if partitions is not None and (unknown := sorted(set(partitions) - set(facts.partitions))):
        there = f"0..{len(facts.partitions) - 1}" if facts.partitions else "none"
        raise BrokerError(ErrorKind.INVALID, topic.name, f"{topic.name}: no partition {unknown[0]}; there are {there}")
    bounds = [b for b in await driver.bounds(topic, committed_only) if partitions is None or b.partition in partitions]
    if any(isinstance(bound, Offset) for bound in (asked.start, asked.end)) and any(b.low == () for b in bounds):
        text = f"{topic.name} has no offsets; ask for a count (-100) or for times (@-1h..)"
        raise BrokerError(ErrorKind.INVALID, topic.name, text)
    pieces = await _resolve(driver, topic, facts, asked, bounds)
    look = Look(driver, topic, facts, asked, bounds, pieces, want=want, committed_only=committed_only, allow=allow)
    if look.window_ns != (None, None) and not plan.sorted_times:
        look.summary.notes.append(
            f"producers set the times: read {MARGIN_NS // 10**9} s past the end and filtered; what came later than that is not in it"
        )
    return look


def refuse_effects(facts: Facts, allow: Collection[Effect]) -> None:
    """Raise where looking is impossible, or has effects that were not allowed by name."""
    name, plan = facts.entity.name, facts.look
    if not plan.possible:
        raise BrokerError(ErrorKind.UNSUPPORTED, name, f"{name} cannot be looked at: {plan.reason}")
    if missing := sorted(plan.effects - frozenset(allow), key=lambda e: e.name):
        costs = "; ".join(e.value for e in missing)
        names = ",".join(e.name.lower() for e in missing)
        raise BrokerError(ErrorKind.UNSUPPORTED, name, f"looking at {name} has effects ({costs}); allow them with allow={names}")


async def _resolve(driver: Driver, topic: Entity, facts: Facts, asked: Range, bounds: Sequence[Bounds]) -> list[Piece]:
    starts = await _places(driver, topic, asked.start, bounds, margin_ns=0)
    margin = 0 if facts.look.sorted_times else MARGIN_NS
    ends = await _places(driver, topic, asked.end, bounds, margin_ns=margin)
    pieces = []
    for b in bounds:
        start, end = b.low, b.end
        if asked.newest is not None and b.end is not None:
            start = _back(b.end, b, asked.newest)
        elif asked.oldest is not None and b.end is not None:
            end = _ahead(b.low, b, asked.oldest)
        else:
            if asked.start is not None:  # None from the broker: nothing is that young
                start = starts[b.partition] or b.end or b.low
            if asked.end is not None:
                end = ends[b.partition] or b.end
        start = max(start, b.low)
        if end is not None:
            end = end if b.end is None else min(end, b.end)
            start = min(start, end) if asked.start is not None else start
        pieces.append(Piece(b.partition, start, end))
    return pieces


async def _places(
    driver: Driver, topic: Entity, bound: Bound, bounds: Sequence[Bounds], *, margin_ns: int
) -> dict[int, Position | None]:
    match bound:
        case Time(ns):
            return dict(await driver.locate(topic, {b.partition: ns + margin_ns for b in bounds}))
        case Offset(n):
            return {b.partition: (n,) for b in bounds}
    return {b.partition: None for b in bounds}


def _back(end: Position, bounds: Bounds, places: int) -> Position:
    """`places` before `end`; everything there is, where the driver does not tell how they are numbered."""
    if len(end) == 1:
        return max(bounds.low, (end[0] - places,))
    for first, count in reversed(bounds.runs):
        if first >= end:
            continue
        *run, number = first
        below = min(count, end[len(run)] - number + 1) if [*end[: len(run)]] == run else count
        if places <= below:
            return max(bounds.low, (*run, number + below - places))
        places -= below
    return bounds.low


def _ahead(start: Position, bounds: Bounds, places: int) -> Position:
    """`places` after `start`, at most the end."""
    assert bounds.end is not None, "only a look with an end counts rows"  # noqa: S101 - see _resolve
    if len(bounds.end) == 1:
        return min(bounds.end, (start[0] + places,))
    for first, count in bounds.runs:
        *run, number = first
        if [*start[: len(run)]] > run:
            continue
        begin = max(number, start[len(run)]) if [*start[: len(run)]] == run and len(start) > len(run) else number
        there = number + count - begin
        if places < there:
            return min(bounds.end, (*run, begin + places))
        places -= max(0, there)
    return bounds.end


def _total(bounds: Sequence[Bounds]) -> int | None:
    """Rows between the bounds, where a position is one number; gaps are counted."""
    if any(b.end is None or len(b.end) != 1 for b in bounds):
        return None
    return sum(max(0, b.end[0] - b.low[0]) for b in bounds if b.end is not None)


def _ns(bound: Bound) -> int | None:
    return bound.ns if isinstance(bound, Time) else None
