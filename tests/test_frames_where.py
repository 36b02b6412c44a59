from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from fake_rows import batch, bodies, built

from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.frames.build import FrameBuilder
from broker_nb.frames.where import Where

DOCS = (b'{"id":1,"s":"ok"}', b'{"id":2,"s":"failed"}', b'{"id":9007199254740993}', b'{"id":4,"s":null}', b"broken")


def ids(where: str, *data: bytes, params: dict[str, Any] | None = None, zone: str = "UTC") -> list[Any]:
    builder = FrameBuilder(decode="json", where=where, params=params, zone=zone)
    frame, _ = built(builder, bodies(*(data or DOCS)))
    return list(frame.value_id)


@pytest.mark.parametrize(
    ("where", "params", "expected"),
    [
        ("value_s = 'failed'", {}, [2]),
        ("VALUE_S = 'failed'", {}, [2]),
        ("value_s <> 'ok'", {}, [2]),
        ("value_s is distinct from 'ok' and value_id is not null", {}, [2, 9007199254740993, 4]),
        ("value_id = 9007199254740993", {}, [9007199254740993]),
        ("value_id = {{ n }}", {"n": 9007199254740993}, [9007199254740993]),
        ("value_id in {{ids}}", {"ids": [1, 4]}, [1, 4]),
        ("value_s = {{s}}", {"s": "x' or true --"}, []),
        ("value_id = $n", {"n": 1, "unused": 2}, [1]),
        ('"offset" >= 1 and batch.value_id < 3', {}, [2]),
        ("decode(data) like '%failed%'", {}, [2]),
        ("decode(data) like '%\"ok\"%'", {}, [1]),
        ("decode_error is null and value_id > 2 -- a comment", {}, [9007199254740993, 4]),
        ("case when value_id = 1 then true else false end", {}, [1]),
        ("len(list_filter([value_id], lambda x: x = 2)) = 1", {}, [2]),
    ],
)
def test_conditions(where: str, params: dict[str, Any], expected: list[int]) -> None:
    assert ids(where, params=params) == expected


def test_true_false_and_unknown_are_counted() -> None:
    builder = FrameBuilder(decode="json", where="value_s <> 'ok'")
    _, report = built(builder, bodies(*DOCS[:3]), bodies(*DOCS[3:]))
    assert (report.where_true, report.where_false, report.where_unknown) == (1, 1, 3)
    assert "1 of 5 match, 3 unknown" in report.caption()


def test_times_compare_with_text_and_now_in_the_asked_zone() -> None:
    ns = pd.Timestamp("2026-11-22T21:10:00Z").value
    row = {"topic": "t", "partition": 0, "offset": 0, "data": b'{"id":1}', "publish_time_ns": ns}
    for zone, hour, found in (("Europe/Zagreb", 22, 1), ("UTC", 22, 0), ("UTC", 21, 1)):
        builder = FrameBuilder(
            where=f"publish_time >= '2026-11-22 {hour}:10' and publish_time < now() + interval 100 year", zone=zone
        )
        frame, _ = built(builder, batch(row))
        assert len(frame) == found, (zone, hour)


def test_attributes_and_nested_fields() -> None:
    row = {"data": b'{"id":1,"c":{"country":"HR","tags":["a","b"]}}', "attributes": [("trace", b"x"), ("trace", b"y")]}
    for where in (
        "value_c.country = 'HR'",
        "list_contains(value_c.tags, 'b')",
        "attr_trace = 'y'",
        "len(list_filter(attributes, lambda a: a.name = 'trace')) = 2",
    ):
        frame, _ = built(
            FrameBuilder(decode="json", attributes=["trace"], where=where), batch(row, topic="t", partition=0, offset=0)
        )
        assert len(frame) == 1, where


# ------------------------------------------------------------------ what it must not do
ESCAPES = [
    "true; select 1",
    "true) as keep from batch; create table pwn(a int); select (true",
    "true) as keep, (true",
    "true) as keep from batch union all select (true",
    "true) as keep from read_csv('/etc/passwd') --",
    "(select count(*) from duckdb_settings()) > 0",
    "exists (select 1 from read_text('/etc/passwd'))",
    "row_number() over () = 1",
    "count(*) > 0",
    "sum(value_id) > 1",
    "unnest([1, 2]) = 1",
    "columns(*) is null",
    "*",
    "read_text('/etc/passwd') = 'x'",
    "getenv('HOME') = 'x'",
    "true /* open",
    "value_id",
    "1",
    "'x'",
    "",
    "  ",
    "value_id >",
    "nope = 1",
    "pragma_version()",
]


@pytest.mark.parametrize("where", ESCAPES)
def test_anything_but_one_condition_is_refused_in_one_line(where: str) -> None:
    with pytest.raises(BrokerError) as caught:
        ids(where)
    assert caught.value.kind is ErrorKind.INVALID
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "statement",
    [
        "COPY (SELECT 1) TO '{file}'",
        "ATTACH '{file}'",
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM some_local",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET memory_limit = '90GB'",
        "CALL enable_logging(storage = 'file', storage_path = '{file}')",
        "EXPORT DATABASE '{file}'",
    ],
)
def test_the_sandbox_itself_reaches_nothing(statement: str, tmp_path: Path) -> None:
    import duckdb

    some_local = pd.DataFrame({"a": [1]})
    assert len(some_local) == 1
    database = Where("true")._db
    with pytest.raises(duckdb.Error):
        database.execute(statement.format(file=tmp_path / "out")).fetchall()
    assert not list(tmp_path.iterdir())


def test_memory_is_capped_and_nothing_goes_to_disk() -> None:
    """DuckDB's own buffers are; a value that one expression makes huge is not, which is the writer's own doing."""
    database = Where("true")._db
    settings = database.execute("SELECT current_setting('memory_limit'), current_setting('temp_directory')").fetchall()
    assert settings == [("488.2 MiB", "")]


def test_a_reserved_word_tells_the_way_out() -> None:
    with pytest.raises(BrokerError, match='write "offset" in double quotes'):
        ids("offset > 5")


def test_a_wrong_column_is_found_before_the_read_with_a_suggestion() -> None:
    with pytest.raises(BrokerError, match=r"did you mean .*key_text"):
        FrameBuilder(where="keytext = 'a'")


def test_parameters_without_a_value_and_in_quotes() -> None:
    with pytest.raises(BrokerError, match=r"\{\{n\}\} has no value"):
        FrameBuilder(where="value_id = {{n}}")
    with pytest.raises(BrokerError, match="leave the quotes out"):
        FrameBuilder(where="value_s = '{{n}}'", params={"n": 1})


def test_a_failing_cast_tells_the_way_out() -> None:
    with pytest.raises(BrokerError, match="try_cast"):
        ids("value_s::int > 1")
    assert ids("try_cast(value_s as int) > 1") == []


def test_an_unknown_zone_is_refused() -> None:
    with pytest.raises(BrokerError, match="Mars/Base"):
        FrameBuilder(where="true", zone="Mars/Base")


# ------------------------------------------------------------------ one meaning from the first row to the last
def test_a_field_that_comes_late_or_never() -> None:
    builder = FrameBuilder(decode="json", where="value_late = 1 or value_typo = 1")
    frame, report = built(builder, bodies(b'{"id":1}'), bodies(b'{"id":2,"late":1}'), bodies(b'{"id":3}'))
    assert list(frame.value_id) == [2]
    assert report.where_unknown == 2
    assert "where: no message has value_typo" in report.notes
    assert not any("value_late" in note for note in report.notes)


def test_a_type_that_changes_does_not_change_the_condition() -> None:
    builder = FrameBuilder(decode="json", where="value_a > 9")
    data = [(b'{"a":5}', b'{"a":20}'), (b'{"a":"5"}', b'{"a":"20"}'), (b'{"a":5.5}', b'{"a":20.5}')]
    frame, report = built(builder, *(bodies(*d) for d in data))
    assert frame.value_a.tolist() == ["20", "20.5"]
    assert report.where_unknown == 2
    assert any("2 values of value_a had another type" in note for note in report.notes)


def test_types_mixed_in_one_batch_count_as_the_most_frequent_one() -> None:
    builder = FrameBuilder(decode="json", where="value_a > 9")
    frame, report = built(builder, bodies(b'{"a":5}', b'{"a":20}', b'{"a":"20"}', b'{"a":null}', b'{"a":10.5}'))
    assert frame.value_a.tolist() == ["20", "10.5"]
    assert (report.where_true, report.where_false, report.where_unknown) == (2, 1, 2)


def test_columns_that_differ_by_case_are_refused_where_they_are_named() -> None:
    data = b'{"id":1,"Name":"a","name":"b"}'
    with pytest.raises(BrokerError, match="differ by case only"):
        ids("value_name = 'b'", data)
    assert ids("value_id = 1", data) == [1]


# ------------------------------------------------------------------ on a frame
def test_a_frame_is_filtered_with_its_index() -> None:
    frame, _ = built(FrameBuilder(decode="json"), bodies(*DOCS))
    where = Where('value_s = {{s}} or "offset" = 2', {"s": "ok"})
    assert list(where.select(frame).index) == [0, 2]
    assert (where.true, where.false, where.unknown) == (2, 1, 2)
    assert list(where.select(frame.iloc[::-1]).index) == [2, 0]
    with pytest.raises(BrokerError, match="no column value_nope"):
        Where("value_nope = 1").select(frame)


def test_a_frame_made_by_hand() -> None:
    frame = pd.DataFrame({"a": [1, 2, None], "b": ["x", None, "z"], "c": pd.to_datetime(["2026-01-01"] * 3)})
    assert len(Where("a > 1 or b = 'z'").select(frame)) == 2
    assert len(Where("c = '2026-01-01'").select(frame)) == 3
    assert len(Where("a > 1").select(frame.iloc[:0])) == 0


def test_a_column_given_as_absent_is_null() -> None:
    keep = Where("value_a is null").matches({"value_a": None, "topic": pa.array(["t"] * 3)}, 3)
    assert keep.to_pylist() == [True, True, True]
