"""A client's rows -> Arrow columns, on a worker thread, with no object of ours per row."""

from __future__ import annotations

import contextlib
import gc
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from broker_nb.backends.driver import COLUMNS, Batch
from broker_nb.frames.schema import ATTRIBUTES, TEXT, TIME

# The years 1-9999, which is what datetime, DuckDB and the repr of a frame can show.
MIN_US, MAX_US = -62_135_596_800_000_000, 253_402_300_799_999_999

_PAIRS = pa.map_(pa.string(), pa.binary())  # only to convert pairs in one go; a map's names may repeat here

_gc_lock = threading.Lock()
_gc_pauses = 0
_gc_was_on = False


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """No automatic garbage collection meanwhile: scanning a million fresh rows again and again costs half of the read.

    May be nested and used from several threads at once; the last one out switches it on again, if it was on.
    """
    global _gc_pauses, _gc_was_on
    with _gc_lock:
        if _gc_pauses == 0:
            _gc_was_on = gc.isenabled()
            gc.disable()
        _gc_pauses += 1
    try:
        yield
    finally:
        with _gc_lock:
            _gc_pauses -= 1
            if _gc_pauses == 0 and _gc_was_on:
                gc.enable()


def attribute_columns(names: Sequence[str]) -> dict[str, str]:
    """The column of each chosen attribute: "attr_" and the name, odd characters as "_"; names that clash get a number."""
    columns: dict[str, str] = {}
    for name in dict.fromkeys(names):
        plain = column = "attr_" + re.sub(r"\W", "_", name)
        n = 1
        while column in columns.values():
            n += 1
            column = f"{plain}_{n}"
        columns[name] = column
    return columns


def to_columns(batch: Batch, attributes: Mapping[str, str], leases: Sequence[str] | None = None) -> tuple[dict[str, Any], int]:
    """The batch's rows as Arrow arrays under the frame's names, and how many times were outside the years 1-9999.

    `id` is left out where it is made of partition and offset (`ids`).

    Parameters
    ----------
    attributes
        Chosen attribute -> its column's name.
    leases
        What each held row is called, aligned with the rows.
    """
    n = len(batch.rows)
    with paused_gc():
        given = batch.codec.columns(batch.rows, COLUMNS)
        times, lost = _times(given.get("publish_time_ns"), n)
        key = _column(given.get("key"), n, pa.binary())
        held = _attributes(given.get("attributes"), n)
        columns = {
            "topic": _column(given.get("topic"), n, TEXT),
            "partition": _column(given.get("partition"), n, pa.int32()),
            "offset": _column(given.get("offset"), n, pa.int64()),
            "publish_time": times,
            "key": key,
            "key_text": _readable(key),
            **{column: _last_value(held, name) for name, column in attributes.items()},
            "delivery_count": _column(given.get("delivery_count"), n, pa.int32()),
            "ingestion_time": pa.repeat(pa.scalar(time.time_ns() // 1000, TIME), n),
            "attributes": held,
            "data": _column(given.get("data"), n, pa.binary()),
        }
    if "id" in given:
        columns["id"] = _column(given["id"], n, TEXT)
    if leases is not None:
        columns["lease"] = pa.array(leases, TEXT)
    return columns, lost


def _column(values: Any, n: int, kind: Any) -> Any:
    """A column of a codec (list, scalar or Arrow) as an Arrow array of `n` rows."""
    if values is None:
        return pa.nulls(n, kind)
    if hasattr(values, "__arrow_c_array__"):
        array = pa.array(values)
        return array if array.type == kind else array.cast(kind)
    if isinstance(values, str | bytes | int):
        return pa.repeat(pa.scalar(values, kind), n)
    return pa.array(values, kind)


def ids(partition: Any, offset: Any) -> Any:
    """The ids of rows that the broker names by their place."""
    return pc.binary_join_element_wise(partition.cast(pa.string()), offset.cast(pa.string()), ":").cast(TEXT)


def _times(ns: Any, n: int) -> tuple[Any, int]:
    """Nanoseconds -> microseconds rounded down; what is outside the years 1-9999 becomes missing."""
    try:
        array = _column(ns, n, pa.int64())
    except (OverflowError, pa.ArrowInvalid):  # beyond int64, so beyond the year 2262: milliseconds given as nanoseconds, say
        listed = [ns] * n if isinstance(ns, int) else ns
        us = [None if t is None or not MIN_US <= t // 1000 <= MAX_US else t // 1000 for t in listed]
        return pa.array(us, TIME), us.count(None) - sum(t is None for t in listed)
    if array.null_count == n:
        return array.cast(TIME), 0
    valid = None if array.null_count == 0 else array.is_null().to_numpy(zero_copy_only=False)
    return pa.array(array.fill_null(0).to_numpy() // 1000, pa.int64(), mask=valid).cast(TIME), 0


def _readable(key: Any) -> Any:
    """Keys as text; bytes that are no UTF-8 show as a backslash, x and two digits."""
    try:
        return key.cast(pa.string()).cast(TEXT)
    except pa.ArrowInvalid:
        return pa.array([None if k is None else k.decode("utf-8", "backslashreplace") for k in key.to_pylist()], TEXT)


def _attributes(values: Any, n: int) -> Any:
    """Per row a sequence of (name, value) or (name, value, type), or None, as list<struct<name, type, value>>."""
    if values is None:
        values = [None] * n
    elif hasattr(values, "__arrow_c_array__"):
        return pa.array(values).cast(ATTRIBUTES)
    try:
        pairs = pa.array(values, _PAIRS)
    except pa.ArrowInvalid:  # with types, or some without a name: the slower way
        return _typed_attributes([row or () for row in values])
    types = pa.nulls(len(pairs.keys), pa.string())
    flat = pa.StructArray.from_arrays([pairs.keys, types, pairs.items], fields=list(ATTRIBUTES.value_type))
    return pa.ListArray.from_arrays(pairs.offsets, flat)


def _typed_attributes(rows: Sequence[Sequence[Any]]) -> Any:
    offsets = pa.array(list(accumulate(map(len, rows), initial=0)), pa.int32())
    flat = list(chain.from_iterable(rows))
    try:
        parts = list(zip(*flat, strict=True)) or [(), ()]  # names, values and, from a broker with types, types
    except ValueError:  # some have a type, others not
        parts = list(zip(*((*a, None)[:3] for a in flat), strict=True))
    names, data = pa.array(parts[0], pa.string()), pa.array(parts[1], pa.binary())
    types = pa.array([t or None for t in parts[2]], pa.string()) if len(parts) > 2 else pa.nulls(len(flat), pa.string())
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays([names, types, data], fields=list(ATTRIBUTES.value_type)))


def _last_value(attributes: Any, name: str) -> Any:
    """The last value of one attribute per row as text; undecodable bytes are replaced."""
    flat = attributes.flatten()
    here = pc.equal(flat.field("name"), name).to_numpy(zero_copy_only=False)
    rows = pc.list_parent_indices(attributes).to_numpy()[here]
    where = np.full(len(attributes), -1)
    where[rows] = np.flatnonzero(here)  # of repeated rows numpy keeps the last
    values = flat.field("value").take(pa.array(where, mask=where < 0))
    try:
        return values.cast(pa.string()).cast(TEXT)
    except pa.ArrowInvalid:
        return pa.array([None if v is None else v.decode("utf-8", "replace") for v in values.to_pylist()], TEXT)
