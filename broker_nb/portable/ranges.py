"""What a person may write for "which part of a topic", and for how long: text in, numbers out.

    -100  -100/p        the newest 100 of the topic, or of every partition
    +100  +100/p        the oldest 100
    12..40  12..  ..40  offsets, the end not included (12..40 is 28 offsets)
    @22:10..22:20       times, the end not included; @22:10.. until now; @..22:20 from the oldest
    @-1h..-30m          times counted back from now
    @2026-11-22T22:10+01:00..  with a date, a zone ("Z", "+01:00" or "[Europe/Zagreb]")
    ..end  start..end   everything there is; "start", "end", offsets and times mix: 12..@22:20

A clock time without a date is the latest such time that is not in the future; as an end, the first such time after the start.
Standard library only.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import TypeAlias
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from broker_nb.errors import BrokerError, ErrorKind

_MAX_INT64 = 2**63 - 1
_HOUR = 3_600 * 10**9  # ns
_EXAMPLES = "-100 (newest), 12..40 (offsets), @22:10..22:20 (times)"
_COUNT = re.compile(r"([-+])(\d+)(/p)?")
_RANGE_LIKE = re.compile(r"[-+]\d|@|.*\.\.")
_PART = r"(\d+(?:\.\d+)?)(ms|s|m|h|d)"
_DURATION = re.compile(rf"(?:{_PART})+")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(
    r"(?:(?P<date>\d{4}-\d\d-\d\d)(?:[T ](?=\d)|$|(?=[Z+\[])))?"
    r"(?:(?P<clock>\d\d?:\d\d(?::\d\d)?)(?:\.(?P<fraction>\d{1,9}))?)?"
    r"\s?(?P<zone>Z|[+-]\d\d:?\d\d|\[[\w/+\-]+\])?"
)


@dataclass(frozen=True, slots=True)
class Offset:
    """A place in every partition, as the broker numbers rows."""

    n: int


@dataclass(frozen=True, slots=True)
class Time:
    """A moment, in nanoseconds since 1970 UTC."""

    ns: int


Bound: TypeAlias = Offset | Time | None


@dataclass(frozen=True, slots=True)
class Range:
    """A parsed range: either a count (`newest` or `oldest`) or the half-open stretch from `start` up to, not including, `end`.

    `start` None is the oldest row there is, `end` None the end as it stands when the read begins.
    """

    text: str
    start: Bound = None
    end: Bound = None
    newest: int | None = None
    oldest: int | None = None
    per_partition: bool = False


def is_range(token: str) -> bool:
    """Whether `token` is meant as a range, well formed or not: to be asked before options are parsed."""
    return _RANGE_LIKE.match(token) is not None


def parse_range(text: str, zone: tzinfo = UTC, now: datetime | None = None) -> Range:
    """Parse a range; the module's docstring has the grammar.

    Parameters
    ----------
    text
        What the person wrote.
    zone
        The zone of times that name none.
    now
        The moment that relative and clock times count from (aware); default: the system's clock.

    Raises
    ------
    BrokerError
        INVALID, one line that names the range and shows good ones: malformed, empty, or the end before the start.
    """
    clean = text.strip()
    if counted := _COUNT.fullmatch(clean):
        sign, digits, per_partition = counted.groups()
        if not 0 < (n := int(digits)) <= _MAX_INT64:
            raise _bad(text, "a count is at least 1 and below 2^63")
        newest = sign == "-"
        return Range(text, newest=n if newest else None, oldest=None if newest else n, per_partition=bool(per_partition))
    head, dots, tail = clean.partition("..")
    if not dots:
        raise _bad(text, "it is not understood" if clean else "it is empty")
    clock = _Clock(text, zone, now or datetime.now(UTC))
    timed = head.startswith("@")
    head, tail = head.removeprefix("@").strip(), tail.strip()
    if timed and head.isdecimal():
        raise _bad(text, f"'{head}' is not a time")
    start = None if head in ("", "start") else _offset(text, head) or clock.time(head, timed, None)
    timed = timed or tail.startswith("@")
    tail = tail.removeprefix("@").strip()
    end = None if tail in ("", "end") else _offset(text, tail) or clock.time(tail, timed, start)
    for bound in (start, end):
        if isinstance(bound, Time) and not 0 <= bound.ns <= _MAX_INT64:
            raise _bad(text, "times are between 1970 and 2262")
    match start, end:
        case (Offset(a), Offset(b)) | (Time(a), Time(b)) if b <= a:
            raise _bad(text, "it ends before it starts" if b < a else "it is empty, because the end is not included")
    return Range(text, start, end)


def parse_duration(value: str | float | timedelta) -> float:
    """A duration in seconds: from "30s", "10m", "1h", "1h30m", "250ms", a number of seconds (or its text) or a timedelta.

    Raises
    ------
    BrokerError
        INVALID when it is malformed, negative or not finite.
    """
    seconds = math.nan
    if isinstance(value, timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        text = value.strip().lower()
        if _DURATION.fullmatch(text):
            seconds = sum(float(n) * _SECONDS[unit] for n, unit in re.findall(_PART, text))
        elif re.fullmatch(r"\d+(\.\d+)?", text):
            seconds = float(text)
    elif not isinstance(value, bool):
        with contextlib.suppress(TypeError):  # said below, as for any other value that is no duration
            seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise BrokerError(ErrorKind.INVALID, str(value), f"{value!r} is not a duration; write 30s, 10m, 1h or seconds")
    return seconds


@dataclass(frozen=True, slots=True)
class _Clock:
    """Turns the written times of one range into moments."""

    text: str
    zone: tzinfo
    now: datetime

    def time(self, written: str, timed: bool, start: Bound) -> Time:
        """The moment that `written` means; `start` is set for the end of a range."""
        if not timed:
            raise _bad(self.text, f"'{written}' is neither an offset nor start or end; a time begins with @")
        if written == "now":
            return Time(_ns(self.now))
        if _DURATION.fullmatch(written.removeprefix("-")) and written.startswith("-"):
            return Time(_ns(self.now) - round(parse_duration(written[1:]) * 1e9))
        found = _TIME.fullmatch(written)
        if not found or not (found["date"] or found["clock"]):
            raise _bad(self.text, f"'{written}' is not a time")
        zone, fraction = self._zone(found["zone"]), int((found["fraction"] or "").ljust(9, "0"))
        try:
            if found["date"]:
                moment = datetime.fromisoformat(f"{found['date']}T{(found['clock'] or '00:00').zfill(5)}")
                return Time(_ns(moment.replace(tzinfo=zone)) + fraction)
            hour, minute, *second = (int(x) for x in found["clock"].split(":"))
            today = self.now.astimezone(zone).replace(hour=hour, minute=minute, second=second[0] if second else 0, microsecond=0)
        except (ValueError, OverflowError):
            raise _bad(self.text, f"'{written}' is not a time") from None
        # Where clocks are set back a time comes twice: a start is the first of the two, an end the second.
        if start is None:
            today = today.replace(fold=0)
            ns = _ns(today) + fraction
            return Time(ns if ns <= _ns(self.now) else _ns(today - timedelta(days=1)) + fraction)
        return self._end(today.replace(fold=1), fraction, start)

    def _end(self, clock: datetime, fraction: int, start: Bound) -> Time:
        """An end that is a clock time: the first one after the start, unless that makes a long range into the future."""
        now = _ns(self.now)
        if not isinstance(start, Time):
            ns = _ns(clock) + fraction
            return Time(ns if ns <= now else _ns(clock - timedelta(days=1)) + fraction)
        first = datetime.fromtimestamp(start.ns // 10**9, UTC).astimezone(clock.tzinfo)
        same_day = clock.replace(year=first.year, month=first.month, day=first.day)
        ns = _ns(same_day) + fraction
        if ns >= start.ns:
            return Time(ns)
        ns = _ns(same_day + timedelta(days=1)) + fraction
        # Past midnight: taken when it is over, or soon after the start. Otherwise it is rather a slip: 22:20..22:10.
        over = ns <= now and now - start.ns < 24 * _HOUR
        return Time(ns) if over or ns - start.ns <= 12 * _HOUR else Time(start.ns - 1)

    def _zone(self, written: str | None) -> tzinfo:
        if not written:
            return self.zone
        if written == "Z":
            return UTC
        try:
            if written.startswith("["):
                return ZoneInfo(written[1:-1])
            sign, digits = written[0], written[1:].replace(":", "")
            shift = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
            return timezone(-shift if sign == "-" else shift)
        except (ValueError, ZoneInfoNotFoundError, OSError):
            raise _bad(self.text, f"'{written}' is not a time zone") from None


def _ns(moment: datetime) -> int:
    """Nanoseconds since 1970, without passing through float."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def _offset(text: str, written: str) -> Offset | None:
    if not re.fullmatch(r"[0-9]+", written):
        return None
    if (n := int(written)) > _MAX_INT64:
        raise _bad(text, f"offset {written} is beyond 2^63-1")
    return Offset(n)


def _bad(text: str, why: str) -> BrokerError:
    return BrokerError(ErrorKind.INVALID, text, f"range '{text}': {why}; good ones: {_EXAMPLES}")
