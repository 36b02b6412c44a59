"""What a read can say of itself: whether it is complete, why it stopped, what was read, what could not be decoded."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from broker_nb.errors import BrokerError, ErrorKind

KEPT = 100


@dataclass(frozen=True, slots=True)
class PartReport:
    """What was asked and read of one partition; half-open, as the broker numbers rows."""

    partition: int
    start: tuple[int, ...]
    end: tuple[int, ...] | None
    reached: tuple[int, ...] | None
    stopped: str = ""


@dataclass(frozen=True, slots=True)
class ReadReport:
    """How one read went.

    `complete` is True when the broker proved that every row of the range was read, False when something is missing, "unknown" where
    the broker cannot tell. Counts are messages; `bytes` are those of the bodies; `elapsed_s` is in seconds.
    """

    verb: str
    topic: str
    asked: str
    complete: bool | Literal["unknown"]
    why: str = ""  # why it is not complete
    messages: int = 0
    scanned: int = 0  # messages read within the range's times, before trimming and `where`
    total: int | None = None  # messages in the topic when the read began; gaps are counted
    bytes: int = 0
    parts: tuple[PartReport, ...] = ()
    seen_partitions: int = 0  # that gave at least one message
    window_ns: tuple[int | None, int | None] = (None, None)  # the asked times, half-open, ns UTC
    first_time: datetime | None = None
    last_time: datetime | None = None
    skipped: int = 0  # control and aborted rows, where the client tells
    where: str | None = None
    where_true: int = 0
    where_false: int = 0
    where_unknown: int = 0
    decoded: Mapping[str, int] = field(default_factory=dict)  # decoder -> messages
    undecodable: Mapping[str, int] = field(default_factory=dict)  # decoder and cause -> messages
    mixed: Mapping[str, str] = field(default_factory=dict)  # field -> the kinds of its values; it became JSON text
    times_out_of_range: int = 0
    notes: tuple[str, ...] = ()
    effects: tuple[str, ...] = ()
    elapsed_s: float = 0.0
    id: str = field(default_factory=lambda: secrets.token_hex(6))

    def caption(self) -> str:
        """All that matters, on one line."""
        state = {True: "complete", False: f"INCOMPLETE ({self.why})", "unknown": f"completeness unknown ({self.why})"}[
            self.complete
        ]
        of = f" of {self.total:,}" if self.total is not None else ""
        found = [_plural(self.messages, "message") if not of else f"{self.messages:,}{of} messages"]
        if self.messages:
            found.append(_plural(self.seen_partitions, "partition"))
            found.append(_span(self.first_time, self.last_time) or _size(self.bytes))
        asked = [None if ns is None else _moment(ns) for ns in self.window_ns]
        resolved = f" = {asked[0] or 'oldest'}..{asked[1] or 'end'}" if any(asked) else ""
        line = [f"{self.verb} {self.topic} {self.asked}".rstrip() + resolved, state, ", ".join(found)]
        decoded = [f"{name} {n:,}" for name, n in self.decoded.items() if n]
        if failed := sum(self.undecodable.values()):
            decoded.append(f"undecodable {failed:,}")
        if decoded:
            line.append(", ".join(decoded))
        if self.where is not None:
            unknown = f", {self.where_unknown:,} unknown" if self.where_unknown else ""
            judged = self.where_true + self.where_false + self.where_unknown
            line.append(f"where: {self.where_true:,} of {judged:,} match{unknown}")
        if self.mixed:
            line.append("JSON text, as types differ: " + ", ".join(self.mixed))
        line.extend(self.notes)
        line.append("effects: " + ", ".join(self.effects) if self.effects else "no effect on the broker")
        line.append(f"{self.elapsed_s:.2f} s")
        return " | ".join(line)

    def attrs(self) -> dict[str, Any]:
        """What the frame itself carries; attrs are copied at every step and saved into files, so it is little."""
        return {"read": self.id, "complete": self.complete, "summary": self.caption()}


def _plural(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _size(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"


def _moment(ns: int) -> str:
    """A time of the range, in UTC; with its date unless that is today."""
    moment = datetime.fromtimestamp(ns // 10**9, UTC)
    return f"{moment:%H:%M:%SZ}" if moment.date() == datetime.now(UTC).date() else f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def _span(first: datetime | None, last: datetime | None) -> str:
    if first is None or last is None:
        return ""
    shape = "%H:%M:%S" if first.date() == last.date() else "%Y-%m-%d %H:%M:%S"
    return f"{first:{shape}}..{last:{shape}} UTC"


_kept: OrderedDict[str, ReadReport] = OrderedDict()
_lock = threading.Lock()


def keep(made: ReadReport) -> None:
    """Remember a report for `report(frame)`; the last 100 of the process."""
    with _lock:
        _kept[made.id] = made
        while len(_kept) > KEPT:
            _kept.popitem(last=False)


def report(frame: Any) -> ReadReport:
    """The report of the read that a frame came from, filtered or not.

    Raises
    ------
    BrokerError
        INVALID when the frame carries no read, or one that is no longer known (the last 100 of this process are).
    """
    attrs = getattr(frame, "attrs", {})
    name = attrs.get("read")
    if name is None:
        text = "report: this frame does not say which read it came from (merge, concat and CSV lose that); ask with the frame that sample gave"
        raise BrokerError(ErrorKind.INVALID, "report", text)
    with _lock:
        found = _kept.get(name)
    if found is None:
        text = f"report: read {name} is not known here (another session, or more than {KEPT} reads ago); its caption: {attrs.get('summary')}"
        raise BrokerError(ErrorKind.INVALID, "report", text)
    return found
