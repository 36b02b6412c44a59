from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from fake_rows import batch, bodies, built, decoded

from broker_nb.frames.build import FrameBuilder
from broker_nb.frames.decode import MAX_CELLS, MAX_DEPTH, MAX_FIELDS, JsonDecoder, pieces


def fields(frame: pd.DataFrame) -> list[str]:
    return [c for c in frame.columns if c.startswith("value_")]


def test_the_types_of_plain_fields() -> None:
    frame, report = decoded(b'{"i":1,"f":1.5,"b":true,"s":"x","n":null,"o":{"a":[1]},"l":["x"]}', b"{}")
    assert {c: str(frame[c].dtype) for c in fields(frame)} == {
        "value_i": "Int64",
        "value_f": "float64",
        "value_b": "boolean",
        "value_s": "str",
        "value_n": "str",
        "value_o": "struct<a: list<item: int64>>[pyarrow]",
        "value_l": "list<item: string>[pyarrow]",
    }
    assert frame[fields(frame)].iloc[1].isna().all()
    assert frame.decode_error.isna().all()
    assert (report.decoded, report.undecodable, report.mixed) == ({"json": 2}, {}, {})


@pytest.mark.parametrize("extremes", [[2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63)], [2**53 + 1, None]])
def test_int64_never_passes_through_float(extremes: list[int | None]) -> None:
    frame, _ = decoded(*(json.dumps({"i": i}).encode() for i in extremes))
    assert str(frame.value_i.dtype) == "Int64"
    assert [None if i is pd.NA else int(i) for i in frame.value_i] == extremes


def test_a_large_integer_beside_a_fraction_becomes_text_whichever_way_it_comes() -> None:
    together, report = decoded(b'{"i":9007199254740993}', b'{"i":1.5}')
    assert list(together.value_i) == ["9007199254740993", "1.5"]
    assert "exactly" in report.mixed["value_i"]
    builder = FrameBuilder(decode="json", where="true")  # with a condition every batch is decoded by itself
    apart, report = built(builder, bodies(b'{"i":9007199254740993}'), bodies(b'{"i":1.5}'))
    assert list(apart.value_i) == ["9007199254740993", "1.5"]
    assert "value_i" in report.mixed


def test_small_integers_beside_fractions_are_float64() -> None:
    frame, report = decoded(b'{"i":3}', b'{"i":1.5}')
    assert str(frame.value_i.dtype) == "float64"
    assert list(frame.value_i) == [3.0, 1.5]
    assert not report.mixed


@pytest.mark.parametrize("huge", ["18446744073709551615", "123456789012345678901234567890"])
def test_integers_beyond_int64_lose_no_digit(huge: str) -> None:
    frame, report = decoded(b'{"i":%s}' % huge.encode(), b'{"i":1}')
    assert list(frame.value_i) == [huge, "1"]
    assert "value_i" in report.mixed


def test_text_that_looks_like_a_time_stays_text() -> None:
    texts = ["2026-11-22 22:10:00", "2026-11-22", "2026-11-22T22:10:00.123456789Z"]
    frame, _ = decoded(*(json.dumps({"t": t, "n": {"t": [t]}}).encode() for t in texts))
    assert list(frame.value_t) == texts
    assert [row["t"][0] for row in frame.value_n] == texts


def test_text_that_looks_like_a_time_in_a_later_batch_too() -> None:
    builder = FrameBuilder(decode="json", where="true")
    frame, _ = built(
        builder, bodies(b'{"t":"2026-11-22"}'), bodies(b'{"t":"x"}'), bodies(b'{"u":1}'), bodies(b'{"t":"2026-11-23"}')
    )
    assert frame.value_t.fillna("").tolist() == ["2026-11-22", "x", "", "2026-11-23"]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1, "20"], ["1", '"20"']),
        ([True, 1], ["true", "1"]),
        ([{"a": 1}, [1]], ['{"a":1}', "[1]"]),
        ([{"a": 1}, {"a": "x"}], ['{"a":1}', '{"a":"x"}']),
        ([[1, "x"], [None]], ['[1,"x"]', "[null]"]),
        ([{"a": 9007199254740993}, {"a": 0.5}], ['{"a":9007199254740993}', '{"a":0.5}']),
    ],
)
@pytest.mark.parametrize("where", [None, "true"], ids=["one piece", "piece by piece"])
def test_mixed_types_lose_nothing_and_are_said(values: list[Any], texts: list[str], where: str | None) -> None:
    builder = FrameBuilder(decode="json", where=where)
    frame, report = built(builder, *(bodies(json.dumps({"x": v}).encode()) for v in values), bodies(b'{"x":null}'))
    assert frame.value_x.iloc[:-1].tolist() == texts
    assert str(frame.value_x.dtype) == "str"
    assert pd.isna(frame.value_x.iloc[-1])
    assert list(report.mixed) == ["value_x"]


def test_nested_values_of_different_shapes_are_merged() -> None:
    builder = FrameBuilder(decode="json", where="true")
    frame, report = built(
        builder, bodies(b'{"o":{"a":1}}'), bodies(b'{"o":{"b":[{"c":"x"}]}}'), bodies(b'{"o":{"a":2.5,"b":[]}}')
    )
    assert frame.value_o.tolist() == [{"a": 1.0, "b": None}, {"a": None, "b": [{"c": "x"}]}, {"a": 2.5, "b": []}]
    assert not report.mixed


BAD = {
    b"": "no object: empty body",
    b"  \n ": "no object: empty body",
    b"[1,2]": "no object: a list",
    b'"x"': "no object: a text",
    b"5": "no object: a number",
    b"null": "no object: null",
    b"\x00\x01{": "no object: begins with b",
    b'{"a":': "malformed",
    b'{"a":1}}': "malformed",
    b'{"a":1}{"b":2}': "malformed",
    b'{"a":1}\n{"b":2}': "malformed",
    b'{"a":01}': "malformed",
    b'{"a":1,}': "malformed",
    b'{"a":"x\ny"}': "malformed",
    b'{"a":"\xff"}': "not UTF-8: byte 6",
    b'{"a":"\\ud800"}': "malformed",
    b'{"a":1e400}': "malformed",
    b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}": "too deep",
    b'{"a":"' + b"]" * 500 + b'","b":' + b"[" * 500 + b"]" * 500 + b"}": "too deep",
}


@pytest.mark.parametrize("bad", BAD, ids=[str(b[:12]) for b in BAD])
def test_a_bad_row_becomes_a_reason_and_stops_nothing(bad: bytes) -> None:
    frame, report = decoded(b'{"a":1}', bad, b'{"a":2}')
    assert list(frame.value_a)[::2] == [1, 2]
    assert str(frame.value_a.dtype) == "Int64"
    assert frame.value_a.isna()[1]
    assert BAD[bad] in frame.decode_error[1]
    assert frame.decode_error.isna()[[0, 2]].all()
    assert frame["data"][1] == bad
    assert (report.decoded, sum(report.undecodable.values())) == ({"json": 2}, 1)


def test_rows_cannot_run_into_each_other() -> None:
    """One that is cut off and one with two documents in it: as many documents as rows, and none in its place."""
    frame, _ = decoded(b'{"a":', b"1}", b'{"a":2}{"a":3}', b'{"a":"}', b'{"b":"}', b'{"a":4}')
    assert frame.value_a.tolist() == [pd.NA] * 5 + [4]
    assert frame.decode_error.notna().tolist() == [True] * 5 + [False]


def test_a_null_body_is_nothing_to_decode() -> None:
    frame, report = decoded(None, b'{"a":1}', None)
    assert frame.value_a.tolist() == [pd.NA, 1, pd.NA]
    assert frame["data"].isna().tolist() == [True, False, True]
    assert frame.decode_error.isna().all()
    assert report.decoded == {"json": 1}


def test_pretty_printed_with_a_mark_and_blank_lines() -> None:
    frame, _ = decoded(b'\xef\xbb\xbf{"a":1}', b'{\n  "a": 2\n}\n', b' \r\n{"a":3}\t', b'{"a":\n\n4}')
    assert frame.value_a.tolist() == [1, 2, 3, 4]


def test_not_a_number_is_taken_as_python_writes_it() -> None:
    frame, _ = decoded(b'{"a":NaN,"i":9007199254740993}', b'{"a":-Infinity,"s":"NaN"}', b'{"a":1.5,"x":01}')
    assert frame.value_a.isna().tolist() == [True, False, True]
    assert frame.value_i[0] == 9007199254740993
    assert frame.value_s[1] == "NaN"


def test_a_repeated_key_is_said() -> None:
    frame, report = decoded(b'{"a":1,"a":2}', b'{"a":3,"o":{"x":1,"x":2}}', b'{"a":"say \\"hi\\""}')
    assert frame.value_a.tolist() == ["2", "3", '"say \\"hi\\""']
    assert "2 bodies repeat a key" in " ".join(report.notes)


def test_names_that_differ_by_case_stay_apart_and_are_said() -> None:
    frame, report = decoded(b'{"Id":1,"id":"x"}')
    assert (frame.value_Id[0], frame.value_id[0]) == (1, "x")
    assert "value_Id and value_id differ by case only" in report.notes


def test_odd_field_names() -> None:
    names = ["", "a.b", "order id", "é", "x\x00y", "data"]
    frame, _ = decoded(json.dumps({name: i for i, name in enumerate(names)}).encode())
    assert [frame[f"value_{name}"][0] for name in names] == list(range(len(names)))
    assert frame["data"][0].startswith(b"{")


@pytest.mark.parametrize("size", [100, 3000])
def test_maps_with_ever_new_keys_stay_bounded(size: int) -> None:
    """Keys that are ids: fields stop at a bound, nested maps become text, and nothing of it is silent."""
    docs = [json.dumps({"id": i, f"k{i}": 1, "by": {f"n{i}": i}}).encode() for i in range(size)]
    frame, report = decoded(*docs)
    assert len(fields(frame)) <= MAX_FIELDS
    assert frame.value_id.tolist() == list(range(size))
    if size > MAX_FIELDS:
        assert frame.value_by[size - 1] == json.dumps({f"n{size - 1}": size - 1}, separators=(",", ":"))
        assert "value_by" in report.mixed
        assert "are in data only" in " ".join(report.notes)


def test_pieces_bound_what_the_reader_may_need() -> None:
    wide = b"{%s}" % b",".join(b'"%d":1' % i for i in range(2000))
    data = pa.array([b'{"a":1}'] * 100 + [wide] * 2000, pa.binary())
    cuts = list(pieces(data))
    assert [start for start, _ in cuts] == [0, *(s + n for s, n in cuts)][:-1]
    assert sum(n for _, n in cuts) == len(data)
    assert max(n * sum(b.count(b":") for b in data.slice(s, n).to_pylist()) for s, n in cuts) <= MAX_CELLS
    assert len(cuts) > 1


def test_deep_but_allowed() -> None:
    body = b'{"a":' + b"[" * (MAX_DEPTH - 2) + b"]" * (MAX_DEPTH - 2) + b"}"
    frame, _ = decoded(body, b'{"b":"' + b"[" * 500 + b'"}')
    assert frame.decode_error.isna().all()
    assert frame.value_b[1] == "[" * 500


def test_only_empty_objects_become_text() -> None:
    frame, _ = decoded(b'{"o":{}}')
    assert frame.value_o.tolist() == ["{}"]


def test_auto_calls_plain_text_nothing_bad() -> None:
    frame, report = decoded(b"hello", b"\x00\x01", None, decode="auto")
    assert not fields(frame)
    assert frame.decode_error.isna().all()
    assert (report.decoded, report.undecodable) == ({}, {})


def test_auto_reports_the_few_that_are_no_json() -> None:
    frame, report = decoded(b'{"a":1}', b'{"a":2}', b"\x00", decode="auto")
    assert frame.value_a.tolist() == [1, 2, pd.NA]
    assert report.undecodable == {"json: no object": 1}
    assert "json 2, undecodable 1" in report.caption()


def test_auto_decodes_the_few_that_are_json() -> None:
    frame, report = decoded(b"x", b"y", b'{"a":1}', decode="auto")
    assert frame.value_a.tolist() == [pd.NA, pd.NA, 1]
    assert (report.decoded, report.undecodable) == ({"json": 1}, {})


def test_none_decodes_nothing() -> None:
    frame, report = decoded(b'{"a":1}', decode="none")
    assert not fields(frame)
    assert (report.decoded, report.mixed) == ({}, {})


def test_both_paths_agree() -> None:
    """Whatever the fast path takes, the slow one reads the same."""
    docs = [
        {"i": i, "f": i + 0.5, "s": f"é{i}", "b": i % 2 == 0, "o": {"x": [i, None], "y": {"z": "t"}}, "m": None if i % 3 else i}
        for i in range(50)
    ]
    data = pa.array([json.dumps(d).encode() for d in docs], pa.binary())
    fast, _ = JsonDecoder().decode(data)
    slow, reasons = JsonDecoder()._slow(data.to_pylist())
    assert not reasons
    assert {n: c.to_pylist() for n, c in fast.items()} == {n: c.to_pylist() for n, c in slow.items()}
    assert {n: c.type for n, c in fast.items()} == {n: c.type for n, c in slow.items()}


def test_many_batches_make_one_table() -> None:
    rows = [
        {"topic": "t", "partition": i % 3, "offset": i, "data": b'{"n":%d,"late%d":1}' % (i, i // 5000)} for i in range(20_000)
    ]
    builder = FrameBuilder(decode="json")
    frame, _ = built(builder, *(batch(*rows[i : i + 700]) for i in range(0, len(rows), 700)))
    assert frame.value_n.tolist() == list(range(20_000))
    assert frame.value_late3.notna().sum() == 5000
    assert frame.id.iloc[-1] == "1:19999"
