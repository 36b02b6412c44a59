"""Rows of no broker, for tests of what happens above one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from broker_nb.backends.driver import Batch, Column, Envelope, Position
from broker_nb.frames.build import FrameBuilder
from broker_nb.frames.report import ReadReport

Row = Mapping[str, Any]


class DictCodec:
    """A row is a dict of columns; what it lacks is missing. `constant` columns are given as scalars."""

    def __init__(self, **constant: Any) -> None:
        self.constant = constant

    def columns(self, rows: Sequence[Any], want: frozenset[str]) -> Mapping[str, Column]:
        names = ("topic", "partition", "offset", "key", "data", "attributes", "publish_time_ns", "delivery_count")
        columns: dict[str, Any] = {name: [row.get(name) for row in rows] for name in names}
        if any("id" in row for row in rows):
            columns["id"] = [row.get("id") for row in rows]
        return {**columns, **self.constant}

    def envelope(self, row: Any) -> Envelope:
        raise AssertionError("a frame is made without an object per row")

    def places(self, rows: Sequence[Any]) -> Sequence[tuple[int, Position]]:
        return [(row["partition"], (row["offset"],)) for row in rows]

    def size(self, row: Any) -> int:
        return len(row.get("data") or b"")


def batch(*rows: Row, **constant: Any) -> Batch:
    return Batch(DictCodec(**constant), rows)


def bodies(*data: bytes | None) -> Batch:
    return batch(*({"topic": "t", "partition": 0, "offset": i, "data": body} for i, body in enumerate(data)))


def built(builder: FrameBuilder, *batches: Batch, limit: int | None = None, as_: str = "pandas") -> tuple[Any, ReadReport]:
    for one in batches:
        builder.add(one)
    builder.finish(limit)
    report = ReadReport(verb="sample", topic="t", asked="..", complete=True, **builder.counts())
    return builder.to(as_, report), report


def decoded(*data: bytes | None, decode: str = "json") -> tuple[pd.DataFrame, ReadReport]:
    return built(FrameBuilder(decode=decode), bodies(*data))
