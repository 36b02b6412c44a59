from __future__ import annotations

import pickle
from datetime import UTC, datetime

import pandas as pd
import pytest
from fake_rows import bodies, built

from broker_nb.errors import BrokerError
from broker_nb.frames.build import FrameBuilder
from broker_nb.frames.report import KEPT, ReadReport, keep, report


def test_the_caption_of_a_whole_read() -> None:
    made = ReadReport(
        verb="sample",
        topic="orders",
        asked="-1000",
        complete=True,
        messages=1000,
        total=12_000,
        seen_partitions=3,
        first_time=datetime(2026, 11, 22, 21, 55, tzinfo=UTC),
        last_time=datetime(2026, 11, 22, 21, 59, 59, tzinfo=UTC),
        decoded={"json": 998},
        undecodable={"json: malformed": 2},
        elapsed_s=0.02,
    )
    assert made.caption() == (
        "sample orders -1000 | complete | 1,000 of 12,000 messages, 3 partitions, 21:55:00..21:59:59 UTC"
        " | json 998, undecodable 2 | no effect on the broker | 0.02 s"
    )


@pytest.mark.parametrize(
    ("complete", "why", "said"),
    [(False, "timeout 5 s", "INCOMPLETE (timeout 5 s)"), ("unknown", "silence", "completeness unknown (silence)")],
)
def test_what_is_missing_is_said(complete: bool | str, why: str, said: str) -> None:
    made = ReadReport("sample", "t", "..", complete, why=why)  # type: ignore[arg-type] # one of the literals
    assert said in made.caption()


def test_times_of_the_range_are_resolved_with_their_date() -> None:
    window = (1_795_385_400 * 10**9, None)
    assert (
        ReadReport("sample", "t", "@22:10..", True, window_ns=window)
        .caption()
        .startswith("sample t @22:10.. = 2026-11-22T22:10:00Z..end |")
    )


def test_a_report_is_found_from_any_part_of_the_frame() -> None:
    frame, made = built(FrameBuilder(), bodies(b"x", b"y"))
    assert report(frame) is made
    assert report(frame[frame.offset == 1].copy()) is made
    assert report(pickle.loads(pickle.dumps(frame))) is made  # noqa: S301 - made here
    assert frame.attrs == {"read": made.id, "complete": True, "summary": made.caption()}
    pd.concat([frame, frame])  # attrs hold plain values only, or this would fail


@pytest.mark.parametrize("frame", [pd.DataFrame(), None, 5])
def test_no_report_for_what_is_no_read(frame: object) -> None:
    with pytest.raises(BrokerError, match="which read"):
        report(frame)


def test_only_the_last_reads_are_kept() -> None:
    frame, _ = built(FrameBuilder(), bodies(b"x"))
    for _ in range(KEPT):
        keep(ReadReport("sample", "t", "..", True))
    with pytest.raises(BrokerError, match="its caption: sample t"):
        report(frame)
