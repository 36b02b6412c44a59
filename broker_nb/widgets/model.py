"""A live view without its widget: what came, what is held, what is told to the page. Lives on the loop thread.

Kernel and page speak in messages of JSON (docs/design.md, "The live view"). The kernel owns every state; the page may be reloaded,
doubled or gone at any time, and asks for what it lacks.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from broker_nb.backends.driver import Batch, Event
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.settling import FINAL, lease_text
from broker_nb.widgets import wording
from broker_nb.widgets.feeds import Feed
from broker_nb.widgets.outbox import FLUSH_ROWS, Outbox, body
from broker_nb.widgets.rows import Row, Rows, wall_ms

log = logging.getLogger("broker_nb")

FLUSH_S = 0.1
"""Shortest time between two messages to the page: the server drops messages above its own rate, whole cells' ends among them."""
TICK_S = 1.0
ABSENT_S = 60.0
"""After so long without a sign of a page nothing more is pulled. What is held stays until its time is over."""
RATE_S = 5.0
MAX_ASKED = 1000
RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
STOP_S = 5.0
LIVE = ("held", "asking", "read")

Send = Callable[[dict[str, Any], list[bytes]], None]


def view_name(topic: str, subscription: str | None) -> str:
    """What a view is called: topic, or topic/subscription."""
    return topic if subscription is None else f"{topic}/{subscription}"


class LiveModel:
    """One live view.

    Parameters
    ----------
    topic, subscription
        What it shows, for texts; without a subscription it is a tail.
    columns
        Fields of JSON bodies that get a column each.
    max_held
        Nothing more is pulled while so many are held.
    """

    def __init__(
        self, topic: str, subscription: str | None, feed: Feed, *, columns: Sequence[str] = (), max_held: int = 500
    ) -> None:
        self.name = view_name(topic, subscription)
        self.columns, self.max_held = tuple(columns), max_held
        self._titles = {"topic": wording.plain(topic), "subscription": wording.plain(subscription or "")}
        self.opened = datetime.now(UTC)
        self.send: Send | None = None
        self.on_end: list[Callable[[str], object]] = []
        self.shown_by: object = None  # the widget's side of it
        self.rows = Rows()
        self.settled: Counter[str] = Counter()
        self.failed = self.ended = ""
        self._feed = feed
        self._out = Outbox(columns)
        self._alive: float | None = None  # when a page was last heard
        self._paused, self._trouble, self._remote = False, "", ""
        self._arrivals: deque[tuple[float, int]] = deque()
        self._wake, self._changed = asyncio.Event(), asyncio.Event()
        self._asking: set[asyncio.Task[None]] = set()
        self._busy: set[int] = set()  # rows that a person is settling here
        self._closing = False
        self._ending: asyncio.Task[None] | None = None
        self._work = [asyncio.ensure_future(work()) for work in (self._pump, self._flush)]
        for task in self._work:
            task.add_done_callback(self._ended)

    # -------------------------------------------------------------- pulling
    @property
    def is_open(self) -> bool:
        """Whether it still takes and shows."""
        return self._ending is None

    @property
    def _watched(self) -> bool:
        return self._alive is not None and time.monotonic() - self._alive < ABSENT_S

    @property
    def _room(self) -> int:
        return self.max_held - len(self.rows.pinned)

    async def _pump(self) -> None:
        failures = 0
        while not self._closing:
            if self._paused or not self._watched or self._room <= 0:
                await self._sleep(TICK_S)
                continue
            try:
                arrived = await self._feed.take(self._room)
            except BrokerError as error:
                if not error.retryable and error.kind is not ErrorKind.NO_CREDIT:
                    raise
                self._trouble = str(error)
                self._changed.set()
                await self._sleep(RETRY_S[min(failures, len(RETRY_S) - 1)])
                failures += 1
                continue
            failures, self._trouble = 0, ""
            first = "read" if self._feed.kind == "log" else "held"
            for codec, row, serial, until in arrived:
                made = self.rows.add(codec, row, serial=serial, until=until, state="seen" if serial is None else first)
                if serial is not None:
                    self._out.news[made.n] = made
            if arrived:
                self._arrivals.append((time.monotonic(), len(arrived)))
                self._changed.set()

    async def _sleep(self, seconds: float) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A task of ours ended by itself: the person is told why."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed = str(error) if isinstance(error, BrokerError) else f"internal error: {type(error).__name__}: {error}"
            log.error("live %s: %s", self.name, self.failed, exc_info=None if isinstance(error, BrokerError) else error)
            self._changed.set()
            if task is self._work[1]:  # which would have told it
                self._push(self._out.signed({"type": "bye", "text": wording.plain(self.failed)}), [])

    def on_event(self, event: Event) -> None:
        """Told by the connection that something happened by itself."""
        if event.handle is None or self._feed.owns(event.handle):
            if event.kind == "reconnecting":
                self._remote = "the broker does not answer; trying again"
            elif event.kind == "reconnected":
                self._remote = ""
            self._changed.set()

    # -------------------------------------------------------------- from the page
    def receive(self, content: object) -> None:
        """One message of a page. What is not understood is answered, never raised."""
        if not isinstance(content, dict) or not self.is_open:
            return
        self._alive = time.monotonic()
        self._wake.set()
        try:
            match content.get("type"):
                case "ready":
                    self._out.snapshots.append(str(content["view"])[:64])
                case "beat":
                    self._out.told = ()  # answered, whether or not there is news
                case "pause":
                    self._paused = bool(content["on"])
                case "want":
                    self._want(int(content["lo"]), int(content["hi"]), content.get("rows", []))
                case "body":
                    self._out.bodies.append(body(content["req"], self.rows.get(int(content["row"])), int(content["row"])))
                case "ask":
                    self._ask(content)
        except Exception as error:  # noqa: BLE001 (whatever it is, the person is told)
            self._out.replies.append({"req": content.get("req"), "ok": False, "text": f"not understood: {error!r}"})
        self._changed.set()

    def _want(self, lo: int, hi: int, names: Sequence[int]) -> None:
        """Rows that a page has scrolled to, or is told about and does not have."""
        for pos in range(max(lo, self.rows.lo), min(hi, self.rows.hi, lo + FLUSH_ROWS) + 1):
            if (row := self.rows.at(pos)) is not None:
                self._out.news[row.n] = row
        for n in names[:FLUSH_ROWS]:
            if (row := self.rows.get(n)) is not None:
                self._out.news[row.n] = row

    def _ask(self, content: Mapping[str, Any]) -> None:
        req, verb, names = content["req"], str(content["verb"]), [int(n) for n in content["rows"][:MAX_ASKED]]
        delay = float(content.get("delay", 0))
        if content["epoch"] != self._out.epoch:
            raise ValueError("this page shows an earlier view")
        if ("delay" if verb == "nack" and delay else verb) not in self._feed.actions or not 0 <= delay <= 86_400:
            raise ValueError(f"{verb} cannot be done here")
        rows, missed = [], []
        for n in dict.fromkeys(names):
            row = self.rows.get(n)
            if row is not None and row.state in ("held", "read"):
                rows.append(row)
            else:
                missed.append("no longer in the view" if row is None else f"already {row.state}")
        for row in rows:
            self._set(row, "asking", verb)
        self._busy.update(row.n for row in rows)
        task = asyncio.ensure_future(self._settle(req, verb, rows, missed, delay, final=content.get("final") is True))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        task.add_done_callback(self._ended)

    async def _settle(
        self, req: object, verb: str, rows: Sequence[Row], missed: Sequence[str], delay: float, *, final: bool
    ) -> None:
        problems: dict[int, str] = {}
        question, before = "", self.settled["committed"]
        try:
            if rows:
                problems = await self._feed.settle(verb, [r.serial for r in rows if r.serial is not None], delay, final=final)
        except BrokerError as error:
            problems = {r.serial: str(error) for r in rows if r.serial is not None}
            question = str(error).removesuffix(FINAL) if error.kind is ErrorKind.CONFLICT and not final else ""
        finally:
            self._busy.difference_update(row.n for row in rows)
        for row in rows:
            self._refresh(row, "" if question else problems.get(row.serial or 0, ""))
            if row.state == "nacked" and delay:
                row.why = f"back in {delay:g} s"
        done = len(rows) - len(problems)
        if self._feed.kind == "log":  # rows before the named ones are committed with them
            self._refresh_all()
            done = self.settled["committed"] - before
        why = [*problems.values(), *missed]
        text = "" if not why else f"{verb}: {len(why)} of {len(rows) + len(missed)} not done: {why[0]}"
        self._out.replies.append({"req": req, "ok": not why, "done": done, "text": text, "verb": verb, "question": question})
        self._changed.set()

    # -------------------------------------------------------------- states
    def _set(self, row: Row, to: str, why: str) -> None:
        if (row.state, row.why) != (to, why):
            row.state, row.why = to, why
            self._out.changes[row.n] = row

    def _refresh(self, row: Row, problem: str = "") -> None:
        """Bring a pinned row up to what the session knows of its delivery."""
        if row.pos or row.serial is None or row.n in self._busy:
            return
        to, why = self._feed.stand(row.serial, row.until)
        if problem and self.failed and to in LIVE:
            to, problem = "unknown", f"{problem}; it may come again"
        stays = row.why if row.state == to else ""  # an error stays beside the row until something else becomes of it
        self._set(row, to, problem or why or stays)
        if to not in LIVE:
            self.settled[to] += 1
            self.rows.retire(row)

    def _refresh_all(self) -> None:
        for row in list(self.rows.pinned.values()):
            self._refresh(row)

    # -------------------------------------------------------------- to the page
    async def _flush(self) -> None:
        """One message per flush. A state that changed elsewhere (hold over, settled by a cell) is seen at the next tick."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()
            self._changed.clear()
            self._refresh_all()
            if not self._watched:
                continue
            made = self._out.message(self.rows, self._about, self._counters(), self._health())
            if made is not None:
                self._push(*made)
                if self._out.more:
                    self._changed.set()
                await asyncio.sleep(FLUSH_S)

    def _push(self, message: dict[str, Any], buffers: list[bytes]) -> None:
        if self.send is not None:
            self.send(message, buffers)

    def _about(self) -> dict[str, Any]:
        return {
            **self._titles,
            "kind": self._feed.kind,
            "actions": list(self._feed.actions),
            "columns": [wording.plain(c) for c in self.columns],
            "opened": int(self.opened.timestamp() * 1000),
            "lease": self._feed.lease_s,
            "most": self._feed.most,
            "dead": wording.plain(self._feed.dead),
        }

    def _counters(self) -> dict[str, Any]:
        now = time.monotonic()
        while self._arrivals and now - self._arrivals[0][0] > RATE_S:
            self._arrivals.popleft()
        ends = [row.until for row in self.rows.pinned.values() if row.until is not None]
        return {
            "seen": self.rows.added,
            "held": len(self.rows.pinned),
            "dropped": self.rows.dropped,
            "rate": round(sum(n for _, n in self._arrivals) / RATE_S, 1),
            "next": wall_ms(min(ends)) if ends else None,
            **self.settled,
        }

    def _health(self) -> dict[str, Any]:
        notes = [wording.plain(note) for note in self._feed.notes()][-3:]
        if self.failed:
            return {"level": "error", "text": wording.plain(self.failed), "notes": notes, "paused": self._paused}
        if self._paused:
            return {"level": "paused", "text": "paused", "notes": notes, "paused": True}
        if self._trouble or self._remote:
            return {"level": "warn", "text": self._trouble or self._remote, "notes": notes, "paused": False}
        if self._room <= 0:
            word = "read and not committed" if self._feed.kind == "log" else "held"
            text = f"{len(self.rows.pinned)} {word}: settle some to get more"
            return {"level": "full", "text": text, "notes": notes, "paused": False}
        return {"level": "ok", "text": "", "notes": notes, "paused": False}

    # -------------------------------------------------------------- for the person
    def batches(self) -> tuple[list[tuple[Batch, list[str] | None]], list[str]]:
        """What the view has, held rows first, with the lease of each where it is a delivery; and each row's state."""
        made: list[tuple[Batch, list[str] | None]] = []
        for codec, group in itertools.groupby(self.rows, key=lambda row: row.codec):
            rows = list(group)
            leases = [lease_text(self._feed.holder, row.serial) for row in rows if row.serial is not None]
            made.append((Batch(codec, [row.row for row in rows]), leases or None))
        return made, [row.state for row in self.rows]

    def line(self) -> str:
        """The view in one line."""
        counts = [f"{n:,} {word}" for word, n in self.settled.items()]
        held = f"{len(self.rows.pinned):,} {'not committed' if self._feed.kind == 'log' else 'held'}"
        what = [f"{self.rows.added:,} seen", *([held] if self._feed.kind != "tail" else []), *counts]
        return f"live {self.name} | {self.ended or 'open'} | {', '.join(what)}"

    # -------------------------------------------------------------- the end
    async def close(self) -> None:
        """Stop; what is held goes back. Idempotent."""
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._close())
        await asyncio.shield(self._ending)

    def mute(self) -> None:
        """The process ends: its pages have let go of it, and would complain about whatever is still said."""
        self.send = None
        self.on_end.clear()

    async def _close(self) -> None:
        self._closing = True
        self._wake.set()
        await asyncio.wait({self._work[0], *self._asking}, timeout=STOP_S)
        for task in (*self._work, *self._asking):
            task.cancel()
        text = ""
        try:
            async with asyncio.timeout(STOP_S):
                await self._feed.close([r.serial for r in self.rows.pinned.values() if r.serial is not None])
        except (BrokerError, TimeoutError) as error:
            text = f" | while closing: {str(error) or 'no answer from the broker'}"
        self._refresh_all()
        self.ended = f"closed {datetime.now(UTC):%H:%M:%S} UTC"
        line = self.line() + text
        self._push(self._out.signed({"type": "bye", "text": line}), [])
        for end in self.on_end:
            end(line)
