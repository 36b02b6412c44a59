"""Batches in, one frame out: converted, decoded and filtered as they come, so that no client's row is kept."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from broker_nb.backends.driver import Batch
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.frames.columns import attribute_columns, ids, paused_gc, to_columns
from broker_nb.frames.decode import FOREIGN, MAX_FIELDS, JsonDecoder, pieces
from broker_nb.frames.jsontypes import JSON_TEXT, width
from broker_nb.frames.report import ReadReport, keep
from broker_nb.frames.schema import TEXT, frame_schema, to_pandas
from broker_nb.frames.where import Where
from broker_nb.portable.ranges import Range, Time

DECODERS = ("auto", "json", "none")
FORMATS = ("pandas", "arrow", "polars")
BLOCK_ROWS = 4096
"""Small batches are put together up to this before they are decoded."""


class FrameBuilder:
    """Makes one frame out of the batches of one read: `add` each, `finish`, `counts`, `to`.

    All of it takes long: call it on a worker thread, from one thread at a time.

    Parameters
    ----------
    decode
        "json": bodies become `value_` columns; "auto": the same, where bodies that are no JSON objects count as undecodable only if
        they are the smaller part; "none".
    attributes
        Attributes that get an `attr_` column of text.
    where, params, zone
        A SQL condition, its parameters, and the zone of times that it writes without one.
    leases
        Whether the rows are held: `add` is then given their leases, and the frame has a `lease` column.
    span
        The range of the read. Rows outside of its times are dropped, to the microsecond; a count is trimmed to, and sorted by time,
        in `finish`, and the condition is then applied to what is left.

    Raises
    ------
    BrokerError
        INVALID for an unknown decoder or a condition that cannot work.

    Attributes
    ----------
    scanned
        Rows added that are within the range's times.
    rows, bytes
        Rows kept so far, and the bytes of all bodies that were added.
    """

    def __init__(
        self,
        *,
        decode: str = "auto",
        attributes: Sequence[str] = (),
        where: str | None = None,
        params: Mapping[str, Any] | None = None,
        zone: str = "UTC",
        leases: bool = False,
        span: Range | None = None,
    ) -> None:
        if decode not in DECODERS:
            raise BrokerError(ErrorKind.INVALID, "decode", f"decode='{decode}' is not known; there are {', '.join(DECODERS)}")
        self._attributes = attribute_columns([attributes] if isinstance(attributes, str) else attributes)
        self._decoder = None if decode == "none" else JsonDecoder()
        self._lenient = decode == "auto"
        self._leases = leases
        self._span = span or Range("")
        self._counting = self._span.newest is not None or self._span.oldest is not None
        self._where = None if where is None else Where(where, params, zone)
        self._waiting: list[dict[str, Any]] = []
        self._pieces: list[tuple[int, dict[str, Any]]] = []
        self._columns: dict[str, Any] = {}
        self.scanned = self.rows = self.bytes = self._times_lost = self._without_time = self._forgiven = 0
        if self._where is not None:
            self._where.check({f.name: f.type for f in self._schema()})

    @property
    def filtering(self) -> bool:
        """Whether a condition leaves rows out."""
        return self._where is not None

    def _schema(self, values: Mapping[str, Any] | None = None) -> Any:
        return frame_schema(self._attributes.values(), values, leases=self._leases)

    def _values(self) -> dict[str, Any]:
        return {} if self._decoder is None else {f"value_{name}": kind for name, kind in self._decoder.types.items()}

    # ------------------------------------------------------------------ one batch
    def add(self, batch: Batch, leases: Sequence[str] | None = None) -> int:
        """Take in a batch, and its rows' leases where they are held. Returns how many rows stay (before the trimming of a count)."""
        return self.keep(*self.convert(batch, leases))

    def convert(self, batch: Batch, leases: Sequence[str] | None = None) -> tuple[dict[str, Any], int]:
        """The first half of `add`, which remembers nothing: it may run beside `keep`, on another thread."""
        return to_columns(batch, self._attributes, leases)

    def keep(self, columns: dict[str, Any], lost: int) -> int:
        """The second half of `add`: what `convert` gave is decoded and filtered, mostly outside of the interpreter."""
        self._times_lost += lost
        self.bytes += pc.sum(pc.binary_length(columns["data"])).as_py() or 0
        if "id" not in columns:
            columns["id"] = ids(columns["partition"], columns["offset"])
        columns = self._within(columns)
        rows = len(columns["data"])
        self.scanned += rows
        if self._where is not None and not self._counting:
            rows = sum(map(self._piece, self._cut(columns)))
        elif rows:
            self._waiting.append(columns)
            if sum(len(waiting["data"]) for waiting in self._waiting) >= BLOCK_ROWS:
                self._flush()
        self.rows += rows
        return rows

    def _within(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The rows within the range's times; one without a time is in none."""
        start, end, times = self._span.start, self._span.end, columns["publish_time"]
        inside = []
        if isinstance(start, Time):
            inside.append(pc.greater_equal(times, pa.scalar(start.ns // 1000, times.type)))
        if isinstance(end, Time):
            inside.append(pc.less(times, pa.scalar(-(-end.ns // 1000), times.type)))
        if not inside:
            return columns
        self._without_time += times.null_count
        mask = pc.and_(inside[0], inside[-1])
        return {name: column.filter(mask) for name, column in columns.items()}

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            joined = {name: pa.concat_arrays([columns[name] for columns in waiting]) for name in waiting[0]}
            for piece in self._cut(joined):
                self._piece(piece)

    def _cut(self, columns: dict[str, Any]) -> list[dict[str, Any]]:
        cuts = [] if self._decoder is None else list(pieces(columns["data"]))
        if len(cuts) <= 1:
            return [columns]
        return [{name: column.slice(start, length) for name, column in columns.items()} for start, length in cuts]

    def _piece(self, columns: dict[str, Any]) -> int:
        """Decode a piece, filter it where that can be done now, keep it."""
        if self._decoder is not None:
            with paused_gc():
                fields, errors = self._decoder.decode(columns["data"])
            columns.update({f"value_{name}": column for name, column in fields.items()})
            columns["decode_error"] = pa.nulls(len(columns["data"]), TEXT) if errors is None else errors
        if not self._counting:
            columns = self._filtered(columns)
        if rows := len(columns["data"]):
            self._pieces.append((rows, columns))
        return rows

    def _filtered(self, columns: dict[str, Any]) -> dict[str, Any]:
        if self._where is None:
            return columns
        known = self._schema(self._values()).names
        mask = self._where.matches({name: columns.get(name) for name in known}, len(columns["data"]))
        return {name: column.filter(mask) for name, column in columns.items()}

    # ------------------------------------------------------------------ the end
    def finish(self, limit: int | None = None) -> int:
        """No more batches: bring the columns together, trim them to the range's count and to `limit` rows. Returns the rows."""
        with paused_gc():
            self._flush()
            self._settle_types()
            schema = self._schema(self._values())
            for name, kind in zip(schema.names, schema.types, strict=True):
                chunks = [_typed(piece.pop(name, None), rows, kind) for rows, piece in self._pieces]
                self._columns[name] = pa.chunked_array(chunks, _plain(kind))
            self._pieces.clear()
            if self._counting:
                self._trim()
                self._columns = self._filtered(self._columns)
            if limit is not None:
                self._columns = {name: column.slice(0, limit) for name, column in self._columns.items()}
            self._forgive()
        self.rows = len(self._columns["data"])
        return self.rows

    def _settle_types(self) -> None:
        """Give every field one type in all pieces; as JSON text, made from the bodies again, where there is none."""
        if self._decoder is None:
            return
        types = self._decoder.types
        as_text = {name for name, kind in types.items() if kind == JSON_TEXT or width(kind) == 0}
        for _, piece in self._pieces:
            for name in types.keys() - as_text:
                column = piece.get(f"value_{name}")
                if column is None or column.type == types[name]:
                    continue
                try:
                    piece[f"value_{name}"] = column.cast(types[name])
                except pa.ArrowInvalid:  # an integer that float64 does not hold
                    as_text.add(name)
                    self._decoder.mixed[name].add("number")
        for _, piece in self._pieces:
            todo = [n for n in as_text if (c := piece.get(f"value_{n}")) is not None and c.type not in (JSON_TEXT, pa.null())]
            for name, column in self._decoder.texts(piece["data"], todo).items() if todo else ():
                piece[f"value_{name}"] = column
        types.update(dict.fromkeys(as_text, JSON_TEXT))

    def _trim(self) -> None:
        """The newest or oldest rows, sorted by time, then partition and offset."""
        times, partitions, offsets = (
            self._columns[name].combine_chunks().cast(pa.int64()).fill_null(-(2**63)).to_numpy()
            for name in ("publish_time", "partition", "offset")
        )
        order = np.lexsort((offsets, partitions, times))
        newest, n = self._span.newest is not None, self._span.newest or self._span.oldest or 0
        if self._span.per_partition:
            places = np.lexsort((offsets, partitions))
            _, starts, sizes = np.unique(partitions[places], return_index=True, return_counts=True)
            rank = np.arange(len(places)) - np.repeat(starts, sizes)
            kept = np.zeros(len(places), bool)
            kept[places] = rank >= np.repeat(sizes, sizes) - n if newest else rank < n
            order = order[kept[order]]
        else:
            order = order[-n:] if newest else order[:n]
        if len(order) < len(times) or (order[1:] < order[:-1]).any():
            rows = pa.array(order)
            # Taking from many chunks is slow, and one chunk of binary holds 2 GB.
            self._replace(lambda column: (column.combine_chunks() if column.nbytes < 2**31 else column).take(rows))

    def _replace(self, change: Callable[[Any], Any]) -> None:
        """Change every column, letting go of each old one at once."""
        for name in self._columns:
            changed = change(self._columns[name])
            self._columns[name] = changed if isinstance(changed, pa.ChunkedArray) else pa.chunked_array([changed])

    def _forgive(self) -> None:
        """In a read that is mostly no JSON, "auto" calls nobody undecodable for not looking like it."""
        if self._lenient and self._decoder is not None and self._decoder.foreign > self._decoder.objects:
            errors = self._columns["decode_error"]
            foreign = pc.starts_with(errors, FOREIGN).fill_null(False)
            self._forgiven = pc.sum(foreign).as_py() or 0
            self._columns["decode_error"] = pc.if_else(foreign, pa.scalar(None, TEXT), errors)

    # ------------------------------------------------------------------ what came of it
    def counts(self) -> dict[str, Any]:
        """What this builder knows of the read: keyword arguments of ReadReport. After `finish`, before `to`."""
        columns = self._columns
        times = pc.min_max(columns["publish_time"]).as_py()
        errors = [error.split(": ", 2)[1] for error in columns["decode_error"].drop_null().to_pylist()]
        said: dict[str, Any] = {
            "messages": self.rows,
            "scanned": self.scanned,
            "bytes": pc.sum(pc.binary_length(columns["data"])).as_py() or 0,
            "seen_partitions": pc.count_distinct(columns["partition"]).as_py(),
            "first_time": times["min"],
            "last_time": times["max"],
            "times_out_of_range": self._times_lost,
            "undecodable": {f"json: {cause}": n for cause, n in Counter(errors).items()},
        }
        if self._where is not None:
            said |= {"where": self._where.text, "where_true": self._where.true}
            said |= {"where_false": self._where.false, "where_unknown": self._where.unknown}
        if self._decoder is not None:
            decoded = self.rows - columns["data"].null_count - len(errors) - self._forgiven
            said |= {"decoded": {"json": decoded} if decoded else {}}
            said |= {"mixed": {f"value_{name}": _mixture(kinds) for name, kinds in self._decoder.mixed.items()}}
        return {**said, "notes": tuple(self._notes())}

    def _notes(self) -> list[str]:
        notes = [f"{c} is the attribute {a}" for a, c in self._attributes.items() if _numbered(a, c)]
        if self._times_lost:
            notes.append(f"{self._times_lost:,} times outside the years 1-9999 are missing")
        if self._without_time:
            notes.append(f"{self._without_time:,} messages without a time left out")
        spelled: dict[str, list[str]] = {}
        for name in self._columns:
            spelled.setdefault(name.lower(), []).append(name)
        notes += [f"{' and '.join(names)} differ by case only" for names in spelled.values() if len(names) > 1]
        if self._where is not None:
            notes += [f"where: no message has {name}" for name in self._where.never if self.scanned]
            notes += [f"where: {n:,} values of {c} had another type: unknown" for c, n in self._where.clashes.items() if n]
        if self._decoder is not None and self._decoder.repeated:
            notes.append(f"{self._decoder.repeated:,} bodies repeat a key: the last value is shown")
        if self._decoder is not None and self._decoder.left_out:
            notes.append(f"{len(self._decoder.left_out):,} fields beyond {MAX_FIELDS} are in data only")
        return notes

    def delivered(self) -> dict[int, int]:
        """Delivery count -> rows, where the broker counts. After `finish`, before `to`."""
        return dict(sorted(Counter(self._columns["delivery_count"].drop_null().to_pylist()).items()))

    def to(self, as_: str, report: ReadReport) -> Any:
        """The frame, with `report` kept for `report(df)`. Once, after `finish`: the columns are given away."""
        check_format(as_)
        keep(report)
        columns, self._columns = self._columns, {}
        if as_ == "pandas":
            frame = to_pandas(columns)
            frame.attrs.update(report.attrs())
            return frame
        table = pa.table(columns).replace_schema_metadata({"broker_nb": json.dumps(report.attrs())})
        return table if as_ == "arrow" else importlib.import_module("polars").from_arrow(table)


def check_format(as_: str) -> None:
    """Raise where `as_` names no format, or one whose library is missing: before the read, not after it."""
    if as_ not in FORMATS:
        raise BrokerError(ErrorKind.INVALID, "as_", f"as_='{as_}' is not known; there are {', '.join(FORMATS)}")
    if as_ == "polars" and importlib.util.find_spec("polars") is None:
        raise BrokerError(ErrorKind.INVALID, "polars", "as_='polars' needs polars: pip install polars")


_SHAPES = {
    "number": "numbers that neither int64 nor float64 holds exactly",
    "object": "objects of many shapes",
    "list": "lists of many shapes",
}


def _mixture(kinds: set[str]) -> str:
    only = next(iter(kinds))
    return " and ".join(sorted(kinds)) if len(kinds) > 1 else _SHAPES.get(only, only)


def _numbered(name: str, column: str) -> bool:
    """Whether a column got a number because another attribute had its name."""
    return attribute_columns([name])[name] != column


def _plain(kind: Any) -> Any:
    """The type of a frame's column for the type of a decoded one."""
    return TEXT if kind in (JSON_TEXT, pa.string(), pa.null()) else kind


def _typed(column: Any, rows: int, kind: Any) -> Any:
    if column is None or pa.types.is_null(column.type):
        return pa.nulls(rows, _plain(kind))
    return (column.storage if column.type == JSON_TEXT else column).cast(_plain(kind))
