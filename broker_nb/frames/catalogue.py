"""The topics of a broker as a frame."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import pyarrow as pa

from broker_nb.backends.driver import Summary
from broker_nb.frames.schema import TEXT, TIME, to_pandas


def topics_frame(summaries: Sequence[Summary]) -> pd.DataFrame:
    """A row per topic; what the broker does not tell is missing.

    Returns
    -------
    topic str, partitions Int32, messages Int64, bytes Int64, oldest and newest datetime64[us, UTC], rate_1m float64 (messages per
    second over the last minute), kind str.
    """
    columns = {
        "topic": pa.array([s.entity.name for s in summaries], TEXT),
        "partitions": pa.array([s.partitions for s in summaries], pa.int32()),
        "messages": pa.array([s.messages for s in summaries], pa.int64()),
        "bytes": pa.array([s.bytes for s in summaries], pa.int64()),
        "oldest": _times([s.oldest_ns for s in summaries]),
        "newest": _times([s.newest_ns for s in summaries]),
        "rate_1m": pa.array([None if s.last_minute is None else s.last_minute / 60 for s in summaries], pa.float64()),
        "kind": pa.array([s.kind for s in summaries], TEXT),
    }
    return to_pandas({name: pa.chunked_array([column]) for name, column in columns.items()})


def _times(ns: Sequence[int | None]) -> pa.Array:
    return pa.array([None if t is None else t // 1000 for t in ns], TIME)
