from __future__ import annotations

import gc
import threading

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from fake_rows import batch, built

from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.frames.build import FrameBuilder
from broker_nb.frames.columns import attribute_columns, paused_gc
from broker_nb.portable.ranges import parse_range

DTYPES = {
    "topic": "str",
    "partition": "Int32",
    "offset": "Int64",
    "id": "str",
    "publish_time": "datetime64[us, UTC]",
    "key": "binary[pyarrow]",
    "key_text": "str",
    "decode_error": "str",
    "delivery_count": "Int32",
    "ingestion_time": "datetime64[us, UTC]",
    "attributes": "list<item: struct<name: string, type: string, value: binary>>[pyarrow]",
    "data": "binary[pyarrow]",
}
ROW = {"topic": "t", "partition": 2, "offset": 7, "publish_time_ns": 1_795_385_400_123_456_789, "key": b"k", "data": b"x"}


def test_the_schema_with_and_without_rows() -> None:
    empty, _ = built(FrameBuilder(attributes=["a.b"], leases=True))
    full = FrameBuilder(attributes=["a.b"], leases=True)
    full.add(batch(ROW), ["7f3a-00001"])
    filled, _ = built(full)
    wanted = list(DTYPES.items())
    wanted = [*wanted[:7], ("attr_a_b", "str"), *wanted[7:], ("lease", "str")]
    for frame in (empty, filled):
        assert [(c, str(t)) for c, t in frame.dtypes.items()] == wanted
        assert isinstance(frame.index, pd.RangeIndex)
    assert (len(empty), len(filled)) == (0, 1)
    assert filled.lease[0] == "7f3a-00001"


@pytest.mark.parametrize("decode", ["auto", "json", "none"])
def test_no_rows_make_the_same_frame_for_every_decoder_and_condition(decode: str) -> None:
    for where in (None, "value_x = 1"):
        frame, report = built(FrameBuilder(decode=decode, where=where))
        assert {c: str(t) for c, t in frame.dtypes.items()} == DTYPES
        assert report.messages == 0
        assert "0 messages" in report.caption()


def test_values_of_one_row() -> None:
    frame, _ = built(FrameBuilder(decode="none"), batch(ROW))
    row = frame.iloc[0]
    assert (row.topic, row.partition, row.offset, row.id, row.key, row.key_text) == ("t", 2, 7, "2:7", b"k", "k")
    assert row.publish_time == pd.Timestamp("2026-11-22T22:10:00.123456Z")
    assert abs(row.ingestion_time - pd.Timestamp.now("UTC")) < pd.Timedelta(seconds=60)
    assert row.delivery_count is pd.NA


def test_what_is_missing_is_not_empty() -> None:
    rows = [{**ROW, "key": None, "data": None}, {**ROW, "key": b"", "data": b""}]
    frame, _ = built(FrameBuilder(), batch(*rows))
    assert frame.key.isna().tolist() == frame["data"].isna().tolist() == frame.key_text.isna().tolist() == [True, False]
    assert frame.key_text[1] == ""


def test_scalars_ids_and_arrow_columns_of_a_codec() -> None:
    rows = [{"id": "1:2:3", "data": b"a"}, {"id": "1:2:4", "data": b"b"}]
    constant = {"topic": "orders", "partition": None, "offset": None, "delivery_count": 3, "publish_time_ns": pa.array([0, None])}
    frame, _ = built(FrameBuilder(), batch(*rows, **constant))
    assert frame.topic.tolist() == ["orders", "orders"]
    assert frame.id.tolist() == ["1:2:3", "1:2:4"]
    assert frame.delivery_count.tolist() == [3, 3]
    assert frame.offset.isna().all()
    assert frame.publish_time.isna().tolist() == [False, True]


def test_int64_offsets_are_exact() -> None:
    frame, _ = built(FrameBuilder(), batch({**ROW, "offset": 2**63 - 1}, {**ROW, "offset": 2**53 + 1}, {**ROW, "offset": None}))
    assert frame.offset.tolist()[:2] == [2**63 - 1, 2**53 + 1]
    assert frame.id.isna().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("ns", "shown"),
    [
        (-1, "1969-12-31T23:59:59.999999Z"),
        (-(2**63), "1677-09-21T00:12:43.145224Z"),
        (253_402_300_799_999_999_999, "9999-12-31T23:59:59.999999Z"),
        (-62_135_596_800_000_000_000, "0001-01-01T00:00:00Z"),
    ],
)
def test_times_at_the_edges(ns: int, shown: str) -> None:
    frame, report = built(FrameBuilder(), batch({**ROW, "publish_time_ns": ns}))
    assert frame.publish_time[0] == pd.Timestamp(shown)
    assert report.times_out_of_range == 0
    assert repr(frame)


def test_times_outside_of_the_years_are_missing_and_counted() -> None:
    """Microseconds in a field of milliseconds: the year 58692, with which the repr of a frame would fail."""
    times = [1_795_385_400_123_456 * 10**6, None, 253_402_300_800 * 10**9, -62_135_596_800 * 10**9 - 1000, 0]
    frame, report = built(FrameBuilder(), batch(*({**ROW, "publish_time_ns": t} for t in times)))
    assert frame.publish_time.isna().tolist() == [True, True, True, True, False]
    assert report.times_out_of_range == 3
    assert "3 times outside" in report.caption()
    assert repr(frame)


def test_keys_that_are_no_text_are_shown_as_such() -> None:
    frame, _ = built(FrameBuilder(), batch({**ROW, "key": b"\xff\x00a"}, {**ROW, "key": "é".encode()}, {**ROW, "key": None}))
    assert frame.key_text.tolist()[:2] == ["\\xff\x00a", "é"]
    assert frame.key[0] == b"\xff\x00a"


def test_attributes_keep_order_repeats_types_and_nulls() -> None:
    rows = [
        {**ROW, "attributes": [("trace", b"ab"), ("trace", b"cd"), ("n", None)]},
        {**ROW, "attributes": None},
        {**ROW, "attributes": [("i", b"1", "int"), ("s", b"\xff", "")]},
        {**ROW, "attributes": ()},
    ]
    frame, _ = built(FrameBuilder(attributes=["trace", "s", "nope"]), batch(*rows), batch(*rows[:1]))

    def entry(name: str, value: bytes | None, kind: str | None = None) -> dict[str, object]:
        return {"name": name, "type": kind, "value": value}

    first = [entry("trace", b"ab"), entry("trace", b"cd"), entry("n", None)]
    expected = [first, [], [entry("i", b"1", "int"), entry("s", b"\xff")], [], first]
    assert [list(row) for row in frame.attributes] == expected
    assert frame.attr_trace.tolist()[0] == frame.attr_trace.tolist()[4] == "cd"
    assert frame.attr_trace.isna().tolist() == [False, True, True, True, False]
    assert frame.attr_s[2] == "�"
    assert frame.attr_nope.isna().all()


def test_attribute_names_become_columns_that_do_not_clash() -> None:
    names = ["error.class", "error_class", "error-class", "plain", "plain"]
    assert list(attribute_columns(names).values()) == [
        "attr_error_class",
        "attr_error_class_2",
        "attr_error_class_3",
        "attr_plain",
    ]
    row = {**ROW, "attributes": [("error.class", b"a"), ("error_class", b"b")]}
    frame, report = built(FrameBuilder(attributes=names), batch(row))
    assert (frame.attr_error_class[0], frame.attr_error_class_2[0]) == ("a", "b")
    assert "attr_error_class_2 is the attribute error_class" in report.notes


def test_one_attribute_may_be_named_without_a_list() -> None:
    frame, _ = built(FrameBuilder(attributes="trace"), batch({**ROW, "attributes": [("trace", b"x")]}))
    assert frame.attr_trace[0] == "x"


def test_comparisons_behave_as_in_plain_pandas() -> None:
    rows = [{**ROW, "data": b'{"s":"ok"}'}, {**ROW, "data": b'{"s":"bad"}'}, {**ROW, "data": b"{}"}]
    frame, _ = built(FrameBuilder(decode="json"), batch(*rows))
    assert len(frame[~(frame.value_s == "ok")]) == 2  # rows without the field are not dropped
    assert len(frame[frame.publish_time > "2026-11-22"]) == 3
    assert frame.drop(columns=["attributes"]).drop_duplicates(["value_s"]).shape[0] == 3
    assert frame.attrs.keys() == {"read", "complete", "summary"}


# ------------------------------------------------------------------ counts, windows, limits
def rows_of(*places: tuple[int, int, int | None]) -> list[dict[str, object]]:
    return [
        {"topic": "t", "partition": p, "offset": o, "publish_time_ns": None if t is None else t * 10**9, "data": b'{"o":%d}' % o}
        for p, o, t in places
    ]


PLACES = [(0, 0, 10), (0, 1, 40), (0, 2, 30), (1, 0, 20), (1, 1, 40), (1, 2, None)]


@pytest.mark.parametrize(
    ("span", "ids"),
    [
        ("-2", ["0:1", "1:1"]),
        ("-3", ["0:2", "0:1", "1:1"]),
        ("-100", ["1:2", "0:0", "1:0", "0:2", "0:1", "1:1"]),
        ("+2", ["1:2", "0:0"]),
        ("-1/p", ["1:2", "0:2"]),
        ("+2/p", ["0:0", "1:0", "0:1", "1:1"]),
    ],
)
@pytest.mark.parametrize("batches", [1, 3])
def test_counts_are_trimmed_and_sorted_by_time(span: str, ids: list[str], batches: int) -> None:
    rows = rows_of(*PLACES)
    step = len(rows) // batches
    builder = FrameBuilder(span=parse_range(span))
    frame, report = built(builder, *(batch(*rows[i : i + step]) for i in range(0, len(rows), step)))
    assert frame.id.tolist() == ids
    assert (report.messages, report.scanned) == (len(ids), 6)


def test_the_condition_applies_to_the_rows_that_were_asked_for() -> None:
    """The newest three of the topic, and of those the ones that match: not the newest three that match."""
    frame, report = built(FrameBuilder(span=parse_range("-3"), where="value_o <= 1"), batch(*rows_of(*PLACES)))
    assert frame.id.tolist() == ["0:1", "1:1"]
    assert (report.where_true, report.where_false, report.where_unknown) == (2, 1, 0)
    assert "where: 2 of 3 match" in report.caption()


def test_times_are_half_open_and_rows_without_one_are_said() -> None:
    builder = FrameBuilder(
        span=parse_range("@1970-01-01T00:00:20..1970-01-01T00:00:40".replace("..", "..@")), where="value_o < 5"
    )
    frame, report = built(builder, batch(*rows_of(*PLACES)))
    assert frame.id.tolist() == ["0:2", "1:0"]
    assert report.scanned == report.where_true == 2  # what lies outside of the range was not asked for
    assert "1 messages without a time left out" in report.notes


@pytest.mark.parametrize("span", [None, "-5"])
def test_a_limit_cuts(span: str | None) -> None:
    builder = FrameBuilder(span=parse_range(span) if span else None)
    frame, report = built(builder, batch(*rows_of(*PLACES[:5])), limit=3)
    assert len(frame) == report.messages == 3


def test_add_tells_how_many_rows_stay() -> None:
    builder = FrameBuilder(where="value_o > 0")
    assert builder.add(batch(*rows_of(*PLACES))) == 4
    assert builder.add(batch()) == 0
    assert (builder.rows, builder.finish()) == (4, 4)


# ------------------------------------------------------------------ forms
def test_as_arrow_says_what_the_frame_says() -> None:
    table, report = built(FrameBuilder(decode="json"), batch(*rows_of(*PLACES)), as_="arrow")
    assert isinstance(table, pa.Table)
    assert table.schema.field("publish_time").type == pa.timestamp("us", "UTC")
    assert report.id in table.schema.metadata[b"broker_nb"].decode()


@pytest.mark.parametrize("as_", ["csv", "polars"])
def test_a_form_that_cannot_be_made_is_refused(as_: str) -> None:
    from broker_nb.frames.build import check_format

    with pytest.raises(BrokerError) as caught:
        check_format(as_)
    assert caught.value.kind is ErrorKind.INVALID


def test_an_unknown_decoder_is_refused() -> None:
    with pytest.raises(BrokerError, match="auto, json, none"):
        FrameBuilder(decode="yaml")


def test_peak_memory_stays_near_the_frame() -> None:
    n, step = 200_000, 5000
    body = b'{"id":%d,"text":"' + b"x" * 500 + b'"}'
    before = pa.total_allocated_bytes()
    builder, peak = FrameBuilder(decode="json"), 0
    for start in range(0, n, step):
        builder.add(batch(*({"data": body % i, "offset": i} for i in range(start, start + step)), topic="t", partition=0))
        peak = max(peak, pa.total_allocated_bytes() - before)
    frame, _ = built(builder)
    size = pa.total_allocated_bytes() - before
    assert len(frame) == n
    assert peak < 1.5 * size + 50e6


# ------------------------------------------------------------------ garbage collection
def test_gc_pauses_nest_and_cross_threads() -> None:
    assert gc.isenabled()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with paused_gc():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with paused_gc():
        thread.start()
        assert entered.wait(10)
        with paused_gc():
            assert not gc.isenabled()
    assert not gc.isenabled()  # the other thread still is in it
    leave.set()
    thread.join(10)
    assert gc.isenabled()


def test_gc_stays_off_for_who_switched_it_off_and_comes_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), paused_gc():
        1 / 0  # noqa: B018 - it is there to fail
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_numbers_reach_numpy_without_a_detour() -> None:
    frame, _ = built(
        FrameBuilder(decode="json"), batch(*({"data": b'{"f":%d.5}' % i} for i in range(3)), topic="t", partition=0, offset=1)
    )
    assert isinstance(frame.value_f.to_numpy(), np.ndarray)
    assert frame.value_f.sum() == 4.5
