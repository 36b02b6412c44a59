"""The one shape of every frame: names, order and types in Arrow, and the pandas dtypes that they become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

TEXT = pa.large_string()  # what pandas' `str` is made of, so that nothing is copied
TIME = pa.timestamp("us", "UTC")
ATTRIBUTES = pa.list_(pa.struct([("name", pa.string()), ("type", pa.string()), ("value", pa.binary())]))

HEAD: Mapping[str, Any] = {
    "topic": TEXT,
    "partition": pa.int32(),
    "offset": pa.int64(),
    "id": TEXT,
    "publish_time": TIME,
    "key": pa.binary(),
    "key_text": TEXT,
}
TAIL: Mapping[str, Any] = {
    "decode_error": TEXT,
    "delivery_count": pa.int32(),
    "ingestion_time": TIME,
    "attributes": ATTRIBUTES,
    "data": pa.binary(),
}
LEASE = "lease"

_SMALL, _SMALL_CHUNK = 16 << 20, 64 << 10  # bytes
_STR: Any = pd.StringDtype(storage="pyarrow", na_value=np.nan)
_DTYPES: Mapping[Any, Any] = {
    TEXT: _STR,
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
    TIME: pd.DatetimeTZDtype("us", "UTC"),
}


def frame_schema(attributes: Iterable[str] = (), values: Mapping[str, Any] | None = None, *, leases: bool = False) -> Any:
    """The Arrow schema of a frame, in order.

    Parameters
    ----------
    attributes
        Names of the columns of chosen attributes, "attr_..." each.
    values
        Names ("value_...") and Arrow types of the decoded fields.
    leases
        Whether the rows are held, and named by a lease.
    """
    fields = {**HEAD, **dict.fromkeys(attributes, TEXT), **(values or {}), **TAIL, **({LEASE: TEXT} if leases else {})}
    return pa.schema(list(fields.items()))


def to_pandas(columns: dict[str, Any]) -> pd.DataFrame:
    """Columns (Arrow, all of one length) as a frame with the documented dtypes. Empties `columns`, so that memory is let go."""
    names = list(columns)
    with ThreadPoolExecutor(2) as pool:  # mostly copying, outside of the interpreter
        made = list(pool.map(lambda name: _series(columns.pop(name)), names))
    frame = pd.DataFrame(dict(enumerate(made)), copy=False)
    frame.columns = pd.Index(names, dtype=_STR)
    return frame


def whole(column: Any) -> Any:
    """The column in one chunk, unless it has few and large ones: copying those would cost more than it gains."""
    small = column.num_chunks > 1 and column.nbytes < max(_SMALL, column.num_chunks * _SMALL_CHUNK)
    return pa.chunked_array([column.combine_chunks()]) if small else column


def _series(column: Any) -> Any:
    if column.type == pa.float64():
        return column.to_numpy()
    column, dtype = whole(column), _DTYPES.get(column.type)
    return pd.arrays.ArrowExtensionArray(column) if dtype is None else dtype.__from_arrow__(column)
