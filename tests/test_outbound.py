"""Rows of a frame as messages: bodies, keys, attributes, partitions, and every line of refusal."""

import re
from datetime import UTC, datetime

import orjson
import pandas as pd
import pyarrow as pa
import pytest

from broker_nb.backends.driver import NO_PARTITION
from broker_nb.errors import BrokerError
from broker_nb.frames.outbound import from_frame, from_messages
from broker_nb.frames.schema import ATTRIBUTES, to_pandas
from broker_nb.messages import Attribute, OutboundMessage

BIG = 2**53 + 1


def frame(**columns):
    return to_pandas({n: pa.chunked_array([c]) for n, c in columns.items()})


def refused(text):
    return pytest.raises(BrokerError, match=re.escape(text))


def test_the_bytes_travel_unchanged_null_and_empty_apart():
    data = pa.array([b"\xff\x00", b"", None], pa.binary())
    key = pa.array([None, b"", b"\x80"], pa.binary())
    rows, ignored = from_frame(
        frame(topic=pa.array(["t"] * 3, pa.large_string()), mine=pa.array([1, 2, 3]), key=key, data=data), "data", None
    )
    assert [(r.data, r.key) for r in rows] == [(b"\xff\x00", None), (b"", b""), (None, b"\x80")]
    assert ignored == ["mine"]
    assert all(r.partition == NO_PARTITION for r in rows)


def test_attributes_keep_order_repeats_nulls_and_types():
    attributes = pa.array(
        [
            [{"name": "a", "type": None, "value": b"1"}, {"name": "a", "type": "int", "value": b"2"}],
            [],
            None,
            [{"name": "n", "type": None, "value": None}],
        ],
        ATTRIBUTES,
    )
    rows, _ = from_frame(frame(attributes=attributes, data=pa.array([b"x"] * 4, pa.binary())), "data", None)
    assert [list(r.attributes) for r in rows] == [
        [Attribute("a", b"1"), Attribute("a", b"2", "int")],
        [],
        [],
        [Attribute("n", None)],
    ]


def test_a_slice_of_a_frame_takes_its_own_attributes():
    attributes = pa.array([[{"name": "i", "type": None, "value": b"%d" % i}] for i in range(5)], ATTRIBUTES)
    whole = frame(attributes=attributes, data=pa.array([b"%d" % i for i in range(5)], pa.binary()))
    rows, _ = from_frame(whole.iloc[3:], "data", None)
    assert [(r.data, r.attributes[0].value) for r in rows] == [(b"3", b"3"), (b"4", b"4")]


def test_attributes_may_be_dicts_or_pairs_with_python_values():
    made = pd.DataFrame(
        {"data": ["ä", "b"], "attributes": [{"n": 5, "when": datetime(2026, 1, 2, tzinfo=UTC)}, [("n", "x"), ("n", b"y")]]}
    )
    rows, _ = from_frame(made, "data", None)
    assert rows[0].data == "ä".encode()
    assert list(rows[0].attributes) == [Attribute("n", b"5", "int"), Attribute("when", b"2026-01-02T00:00:00+00:00", "datetime")]
    assert [a.value for a in rows[1].attributes] == [b"x", b"y"]


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ([{"good": "1"}, {"bad": {1, 2}}], "row 1: attribute 'bad': a set cannot be an attribute"),
        ([{"good": "1"}, "text"], "row 1: attributes are a str"),
        ([{"good": "1"}, [5]], "row 1: 5 is no attribute"),
        ([[(1, "x")], None], "row 0: attribute name 1 is not text"),
    ],
)
def test_a_value_that_cannot_be_an_attribute_is_named_with_its_row(attributes, text):
    with refused(text):
        from_frame(pd.DataFrame({"data": ["a", "b"], "attributes": attributes}), "data", None)


def test_a_column_as_the_body_text_bytes_and_missing():
    made = pd.DataFrame({"note": ["a", None, "c"], "raw": pd.Series([b"1", "2", None], dtype=object)})
    assert [r.data for r in from_frame(made, "data", "note")[0]] == [b"a", None, b"c"]
    assert [r.data for r in from_frame(made, "data", "raw")[0]] == [b"1", b"2", None]
    with refused("row 0: n is a int"):
        from_frame(pd.DataFrame({"n": [1, 2]}), "data", "n")


@pytest.mark.parametrize(
    ("made", "body", "column", "text"),
    [
        (pd.DataFrame({"data": []}), "data", None, "the frame has no rows"),
        (pd.DataFrame({"x": ["1"]}), "data", None, "this frame has no column 'data'; it has: x"),
        (pd.DataFrame({"x": ["1"]}), "data", "nope", "this frame has no column 'nope'"),
        (pd.DataFrame({"data": ["1"]}), "patched", None, "body='patched'"),
        (pd.DataFrame({"data": ["1"]}), "value", None, 'body="value" needs value_* columns'),
        (pd.DataFrame([["a", "b"]], columns=["data", "data"]), "data", None, "two columns have the same name"),
        (pd.DataFrame({"data": ["1"], "partition": [-3]}), "data", None, "row 0: partition -3"),
        (pd.DataFrame({"data": ["1"], "partition": [1.5]}), "data", None, "row 0: partition 1.5"),
        (pd.DataFrame({"data": ["1"], "key": [5]}), "data", None, "row 0: key is a int"),
    ],
)
def test_bad_frames_are_refused_in_one_line(made, body, column, text):
    with refused(text):
        from_frame(made, body, column)


def decoded(*docs, **values):
    return frame(data=pa.array([orjson.dumps(d) for d in docs], pa.binary()), **values)


def test_data_is_refused_when_a_decoded_column_was_edited_and_sent_when_not():
    made = decoded(
        {"id": BIG, "f": 1, "s": None}, {"id": 2, "f": 1.5}, value_id=pa.array([BIG, 2]), value_f=pa.array([1.0, 1.5]),
        value_s=pa.array([None, None], pa.large_string()),
    )  # fmt: skip
    assert [r.data for r in from_frame(made, "data", None)[0]] == made["data"].tolist()
    made.loc[1, "value_id"] = 3
    with refused("1 rows: value_id differs from data"):
        from_frame(made, "data", None)


def test_value_keeps_untouched_fields_as_they_were_and_encodes_edited_ones():
    made = decoded(
        {"id": BIG, "ok": True, "n": None, "f": 1, "deep": {"a": [1, {"b": None}]}, "mixed": 5},
        {"id": -(2**63), "ok": False, "f": 2.5, "deep": None, "mixed": "5"},
        value_id=pa.array([BIG, -(2**63)]),
        value_ok=pa.array([True, False]),
        value_n=pa.array([None, None], pa.large_string()),
        value_f=pa.array([1.0, 2.5]),
        value_deep=pa.array([{"a": [{"b": None}]}, None]).cast(pa.struct([("a", pa.list_(pa.struct([("b", pa.int64())])))])),
        value_mixed=pa.array(["5", '"5"']),
    )
    made.loc[0, "value_ok"] = False
    sent = [orjson.loads(r.data) for r in from_frame(made, "value", None)[0]]
    assert sent[0] == {"id": BIG, "ok": False, "n": None, "f": 1, "deep": {"a": [{"b": None}]}, "mixed": 5}
    assert sent[1] == {"id": -(2**63), "ok": False, "f": 2.5, "deep": None, "mixed": "5"}


def test_value_without_data_encodes_what_is_there_and_leaves_missing_fields_out():
    made = pd.DataFrame({"value_a": pd.array([1, None], dtype="Int64"), "value_t": pd.to_datetime(["2026-01-02T03:04:05Z"] * 2)})
    assert [r.data for r in from_frame(made, "value", None)[0]] == [
        b'{"a":1,"t":"2026-01-02T03:04:05+00:00"}',
        b'{"t":"2026-01-02T03:04:05+00:00"}',
    ]


def test_messages_are_taken_as_they_are_and_other_things_refused():
    (row,) = from_messages([OutboundMessage(b"x", b"k", {"a": "1"})])
    assert (row.data, row.key, row.attributes[0]) == (b"x", b"k", Attribute("a", b"1", "str"))
    with refused("row 1 is a dict"):
        from_messages([OutboundMessage(b"x"), {}])
