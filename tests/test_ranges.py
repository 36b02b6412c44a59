from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.ranges import Offset, Range, Time, is_range, parse_duration, parse_range

NOW = datetime(2026, 11, 22, 22, 15, tzinfo=UTC)


def at(text: str) -> Time:
    return Time(round((datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()) * 10**9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-100", Range("-100", newest=100)),
        ("-100/p", Range("-100/p", newest=100, per_partition=True)),
        ("+100", Range("+100", oldest=100)),
        ("+5/p", Range("+5/p", oldest=5, per_partition=True)),
        ("12..40", Range("12..40", Offset(12), Offset(40))),
        ("0..", Range("0..", Offset(0))),
        ("..40", Range("..40", end=Offset(40))),
        ("..end", Range("..end")),
        ("start..end", Range("start..end")),
        ("..", Range("..")),
    ],
)
def test_counts_and_offsets(text: str, expected: Range) -> None:
    assert parse_range(text, now=NOW) == expected


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("@22:10..22:20", "2026-11-22T22:10Z", "2026-11-22T22:20Z"),  # the end may still come
        ("@22:10..", "2026-11-22T22:10Z", None),
        ("@22:20..", "2026-11-21T22:20Z", None),  # the latest such time that is not in the future
        ("@..22:10", None, "2026-11-22T22:10Z"),
        ("@-1h..-30m", "2026-11-22T21:15Z", "2026-11-22T21:45Z"),
        ("@-1h30m..now", "2026-11-22T20:45Z", "2026-11-22T22:15Z"),
        ("@2026-11-22T22:10..", "2026-11-22T22:10Z", None),
        ("@2026-11-22 22:10..", "2026-11-22T22:10Z", None),
        ("@2026-11-22..2026-11-23", "2026-11-22T00:00Z", "2026-11-23T00:00Z"),
        ("@2026-11-22T22:10+01:00..22:20", "2026-11-22T21:10Z", "2026-11-22T22:20Z"),
        ("@2026-11-22T22:10Z..@2026-11-22T22:11:30Z", "2026-11-22T22:10Z", "2026-11-22T22:11:30Z"),
        ("@2026-11-22T22:10..22:20", "2026-11-22T22:10Z", "2026-11-22T22:20Z"),
        ("@22:10[Europe/Zagreb]..", "2026-11-22T21:10Z", None),
        ("@23:50..00:10", "2026-11-21T23:50Z", "2026-11-22T00:10Z"),  # over midnight
        ("@18:00..08:00", "2026-11-22T18:00Z", None),
    ],
)
def test_times(text: str, start: str | None, end: str | None) -> None:
    if text == "@18:00..08:00":  # fourteen hours, most of them in the future: rather a slip
        with pytest.raises(BrokerError, match="ends before it starts"):
            parse_range(text, now=NOW)
        return
    parsed = parse_range(text, now=NOW)
    assert parsed.start == (at(start) if start else None)
    assert parsed.end == (at(end) if end else None)


def test_midnight_in_the_middle_and_soon_after() -> None:
    parsed = parse_range("@23:50..00:10", now=datetime(2026, 11, 22, 0, 5, tzinfo=UTC))
    assert (parsed.start, parsed.end) == (at("2026-11-21T23:50Z"), at("2026-11-22T00:10Z"))


def test_offsets_and_times_mix() -> None:
    parsed = parse_range("12..@22:10", now=NOW)
    assert (parsed.start, parsed.end) == (Offset(12), at("2026-11-22T22:10Z"))
    assert parse_range("@22:10..40", now=NOW).end == Offset(40)


def test_the_zone_is_the_one_asked_for() -> None:
    parsed = parse_range("@22:10..", ZoneInfo("Europe/Zagreb"), NOW)
    assert parsed.start == at("2026-11-22T21:10Z")


def test_where_clocks_are_set_back_a_range_takes_both_hours() -> None:
    zone = ZoneInfo("Europe/Zagreb")  # 2026-10-25: 03:00 becomes 02:00
    parsed = parse_range("@02:30..02:30", zone, datetime(2026, 10, 25, 12, tzinfo=UTC))
    assert (parsed.start, parsed.end) == (at("2026-10-25T00:30Z"), at("2026-10-25T01:30Z"))


def test_nanoseconds_are_kept() -> None:
    start = parse_range("@2026-11-22T22:10:11.123456789..", now=NOW).start
    assert isinstance(start, Time)
    assert start.ns % 10**9 == 123_456_789


@pytest.mark.parametrize(
    "text",
    [
        "",
        "foo",
        "-0",
        "-100/x",
        "@",
        "@22:10",
        "@22..",
        "@25:10..",
        "@2026-13-01..",
        "@22h10..",
        "..22:20",
        "1..x",
        "12:40",
        "@-1h",
        "-1..5",
        "9223372036854775808..",
        "@10:00[Mars/Base]..",
        "1...",
        "@99999999999999999999d..",
        "--5",
        "@-1000000000d..",
    ],
)
def test_malformed_is_one_line_that_names_it_and_shows_good_ones(text: str) -> None:
    with pytest.raises(BrokerError) as caught:
        parse_range(text, now=NOW)
    said = str(caught.value)
    assert caught.value.kind is ErrorKind.INVALID
    assert f"'{text}'" in said
    assert all(good in said for good in ("-100", "12..40", "@22:10..22:20"))
    assert "\n" not in said


@pytest.mark.parametrize("text", ["40..12", "@-30m..-1h", "@2026-11-23..2026-11-22", "@22:14..22:12"])
def test_the_end_before_the_start(text: str) -> None:
    with pytest.raises(BrokerError, match="ends before it starts"):
        parse_range(text, now=NOW)


def test_an_empty_range_says_that_the_end_is_not_included() -> None:
    with pytest.raises(BrokerError, match="not included"):
        parse_range("12..12")


@pytest.mark.parametrize(
    ("token", "is_one"),
    [("-100", True), ("+5/p", True), ("@22h", True), ("..end", True), ("12..40", True), ("--limit", False), ("orders", False)],
)
def test_what_is_meant_as_a_range(token: str, is_one: bool) -> None:
    assert is_range(token) is is_one


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30s", 30),
        ("10m", 600),
        ("1h", 3600),
        ("1h30m", 5400),
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("5", 5),
        (7, 7),
        (0.5, 0.5),
        (timedelta(minutes=2), 120),
        ("2d", 172800),
        (0, 0),
    ],
)
def test_durations(value: str | float | timedelta, seconds: float) -> None:
    assert parse_duration(value) == pytest.approx(seconds)


@pytest.mark.parametrize("value", ["", "-5s", "10 minutes", "1m30", -1, float("nan"), float("inf"), True, None, timedelta(-1)])
def test_no_durations(value: object) -> None:
    with pytest.raises(BrokerError, match="not a duration"):
        parse_duration(value)  # type: ignore[arg-type] # what a person may pass all the same
