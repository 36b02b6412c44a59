"""A frame's rows as messages to send: which columns are the body, the key, the attributes, and what is refused before anything goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, TypeVar

import orjson
import pandas as pd
import pyarrow as pa

from broker_nb.backends.driver import NO_PARTITION, Outbound
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.frames.jsontypes import dump
from broker_nb.frames.schema import HEAD, LEASE, TAIL
from broker_nb.messages import Attribute, Attributes, OutboundMessage, make_attribute

VALUE = "value_"
_KNOWN = frozenset({*HEAD, *TAIL, LEASE})
"""Every frame's own columns: that most of them do not travel needs no telling."""
_ABSENT = object()
T = TypeVar("T", Attribute, Outbound)


def from_messages(messages: Iterable[object]) -> list[Outbound]:
    """OutboundMessages as rows to send."""
    rows = []
    for i, message in enumerate(messages):
        if not isinstance(message, OutboundMessage):
            raise _invalid(f"row {i} is a {type(message).__name__}; publish takes a DataFrame or a list of OutboundMessage")
        rows.append(Outbound(message.data, message.key, message.attributes))
    return rows


def from_frame(frame: pd.DataFrame, body: str, column: str | None) -> tuple[list[Outbound], list[str]]:
    """The rows to send, and the columns of the person's own that were not used.

    Parameters
    ----------
    body
        "data": the bytes in `data`, refused where a `value_*` column was edited; "value": the `value_*` columns as JSON objects.
    column
        Instead: the column that is the body.

    Raises
    ------
    BrokerError
        INVALID, naming the row or column.
    """
    if not len(frame):
        raise _invalid("the frame has no rows; nothing was sent")
    if not frame.columns.is_unique:
        raise _invalid("two columns have the same name; rename one (frame.columns)")
    names = [str(c) for c in frame.columns]
    values = [n for n in names if n.startswith(VALUE)]
    if column is not None:
        bodies, used = _bytes(_get(frame, column), column), {column}
    elif body == "data":
        bodies, used = _bytes(_get(frame, "data"), "data"), {"data", *values}
        _refuse_edited(frame, bodies, values)
    elif body == "value":
        bodies, used = _encoded(frame, values), {"data", *values}
    else:
        raise _invalid(
            f'body={body!r}: say "data" (the bytes as they are) or "value" (encode the value_* columns), or name a column'
        )
    n = len(frame)
    keys = _bytes(frame["key"], "key") if "key" in names else repeat(None, n)
    attributes = _attributes(frame["attributes"]) if "attributes" in names else repeat((), n)
    partitions = _partitions(frame["partition"]) if "partition" in names else repeat(NO_PARTITION, n)
    rows = _tuples(Outbound, bodies, keys, attributes, partitions, repeat(None, n), repeat(None, n), repeat(None, n))
    return rows, [name for name in names if name not in used | _KNOWN]


def _tuples(kind: type[T], *columns: Iterable[Any]) -> list[T]:
    """Named tuples out of their columns, all of them, without a call of Python per row: that took as long as sending them."""
    return list(map(tuple.__new__, repeat(kind), zip(*columns, strict=True)))


def _objects(array: Any) -> list[Any]:
    """`to_pylist` of bytes or text, five times as fast."""
    return list(array.to_numpy(zero_copy_only=False).tolist())


def _invalid(text: str) -> BrokerError:
    return BrokerError(ErrorKind.INVALID, "publish", f"publish: {text}")


def _get(frame: pd.DataFrame, name: str) -> pd.Series[Any]:
    if name in frame.columns:
        return frame[name]
    there = ", ".join(map(str, frame.columns[:12]))
    raise _invalid(
        f'this frame has no column {name!r}; it has: {there}; name the body with column=, or body="value" for value_* columns'
    )


def _arrow(series: pd.Series[Any]) -> Any:
    """The column in Arrow, or None where its values have no one type."""
    try:
        made = pa.array(series, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    return made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made


def _cells(series: pd.Series[Any]) -> list[Any]:
    """The column's values in Python, None for what is missing; integers stay integers."""
    # Objects stay as they are: Arrow would give every dict the keys of all others.
    array = None if series.dtype == object else _arrow(series)
    if array is not None:
        return list(array.to_pylist())
    return [None if _is_missing(cell) else cell for cell in series]


def _is_missing(cell: Any) -> bool:
    return cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and cell != cell)


def _bytes(series: pd.Series[Any], name: str) -> list[bytes | None]:
    array = _arrow(series)
    if array is not None:
        kind = array.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind):
            return _objects(array)
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return _objects(array.cast(pa.large_binary()))
    found = []
    for i, cell in enumerate(_cells(series)):
        if isinstance(cell, str):
            cell = cell.encode()
        elif cell is not None and not isinstance(cell, bytes):
            raise _invalid(f"row {i}: {name} is a {type(cell).__name__}; make it bytes or text first")
        found.append(cell)
    return found


def _partitions(series: pd.Series[Any]) -> list[int]:
    cells = _cells(series)
    for i, cell in enumerate(cells):
        if cell is not None and (isinstance(cell, bool) or not isinstance(cell, int | float) or cell != int(cell) or cell < 0):
            raise _invalid(f"row {i}: partition {cell!r} is no partition number; drop the column to let the broker choose")
    return [NO_PARTITION if cell is None else int(cell) for cell in cells]


# ------------------------------------------------------------------ attributes
def _attributes(series: pd.Series[Any]) -> list[Sequence[Attribute]]:
    array = None if series.dtype == object else _arrow(series)
    if array is not None and pa.types.is_list(array.type) and pa.types.is_struct(array.type.value_type):
        names = {f.name for f in array.type.value_type}
        if {"name", "value"} <= names and pa.types.is_binary(array.type.value_type.field("value").type):
            return _from_structs(array, typed="type" in names)
    rows = []
    for i, cell in enumerate(_cells(series)):
        try:
            rows.append(Attributes(_listed(cell)))
        except BrokerError as error:
            raise _invalid(f"row {i}: {error}") from None
    return list(rows)


def _from_structs(array: Any, *, typed: bool) -> list[Sequence[Attribute]]:
    """The frame's own column, without a Python object per struct."""
    flat = array.flatten()
    names, values = _objects(flat.field("name")), _objects(flat.field("value"))
    types = [t or "" for t in _objects(flat.field("type"))] if typed else repeat("", len(names))
    made = _tuples(Attribute, names, values, types)
    ends = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).cumsum().tolist()
    return [made[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _listed(cell: Any) -> Iterable[Attribute]:
    if cell is None:
        return ()
    if isinstance(cell, Mapping):
        return Attributes.of(cell)
    if not isinstance(cell, Iterable) or isinstance(cell, str | bytes):
        raise BrokerError(
            ErrorKind.INVALID, "attributes", f"attributes are a {type(cell).__name__}; use a dict, or a list of pairs"
        )
    return [_one(item) for item in cell]


def _one(item: Any) -> Attribute:
    if isinstance(item, Mapping):
        kind = item.get("type") or ""
        value = item.get("value")
        if kind and isinstance(value, bytes):
            return Attribute(item["name"], value, kind)
        return make_attribute(item.get("name"), value)
    if isinstance(item, Sequence) and not isinstance(item, str | bytes) and len(item) >= 2:
        return make_attribute(item[0], item[1])
    raise BrokerError(ErrorKind.INVALID, "attributes", f"{item!r} is no attribute; use (name, value)")


# ------------------------------------------------------------------ bodies out of value_* columns
def _fields(frame: pd.DataFrame, names: Sequence[str]) -> dict[str, list[Any]]:
    """Field -> its cells."""
    return {name[len(VALUE) :]: _cells(frame[name]) for name in names}


def _documents(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The documents that the rows came from, {} where there is none."""
    if "data" not in frame.columns:
        return [{}] * len(frame)
    return [_document(data) for data in _bytes(frame["data"], "data")]


def _document(data: bytes | None) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        found = orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_edited(frame: pd.DataFrame, bodies: Sequence[bytes | None], names: Sequence[str]) -> None:
    """`data` and `value_*` travel in one frame: when they disagree, only the person knows which is meant."""
    if not names:
        return
    documents = [_document(b) for b in bodies]
    rows: set[int] = set()
    edited = []
    for field, cells in _fields(frame, names).items():
        differ = [
            i for i, (cell, doc) in enumerate(zip(cells, documents, strict=True)) if not _same(cell, doc.get(field, _ABSENT))
        ]
        if differ:
            edited.append(VALUE + field)
            rows.update(differ)
    if edited:
        raise _invalid(
            f"{len(rows):,} rows: {', '.join(edited)} differs from data, which would be sent; "
            'say body="value" to send the columns, or drop them'
        )


def _encoded(frame: pd.DataFrame, names: Sequence[str]) -> list[bytes | None]:
    if not names:
        raise _invalid('body="value" needs value_* columns, and this frame has none; use column=, or sample with decode="json"')
    fields = _fields(frame, names)
    made: list[bytes | None] = []
    for i, document in enumerate(_documents(frame)):
        row = {}
        for field, cells in fields.items():
            original = document.get(field, _ABSENT)
            # An untouched field keeps its original form: null stays null, 1.0 stays 1.0, missing stays missing.
            value = original if _untouched(cells[i], original) else cells[i]
            if value is not _ABSENT:
                row[field] = value
        try:
            made.append(dump(row))
        except (TypeError, ValueError) as error:
            raise _invalid(f"row {i}: {error}; make its value_* cells text or numbers") from None
    return made


def _same(cell: Any, original: Any) -> bool:
    """Whether a frame's cell still is what the document says; a missing cell is both null and absent."""
    if original is _ABSENT or original is None:
        return cell is None
    if isinstance(original, dict):
        return isinstance(cell, dict) and all(_same(cell.get(k), original.get(k, _ABSENT)) for k in {*cell, *original})
    if isinstance(original, list):
        return isinstance(cell, list) and len(cell) == len(original) and all(map(_same, cell, original))
    if isinstance(original, bool) or isinstance(cell, bool):
        return cell is original
    return bool(cell == original)


def _untouched(cell: Any, original: Any) -> bool:
    """The same for a whole field, which may stand in the frame as JSON text (a field of several types)."""
    if _same(cell, original):
        return True
    return isinstance(cell, str) and original is not _ABSENT and cell.encode() == dump(original)
