"""JSON bodies -> one Arrow column per field, piece by piece.

The fast path is Arrow's own reader over a joined piece. It is given only what it cannot get wrong: bodies that begin with { and
end with } (so that no row can run into the next one), UTF-8, not deeper than `MAX_DEPTH`, in pieces so small that even all
different fields fit into memory. What it gives back is checked for what it does silently: text taken for times, integers turned
into floats. Everything else goes the slow way, row by row, where a bad row becomes a reason and never stops the read.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from broker_nb.frames.jsontypes import JSON_TEXT, dump, json_text, may_be_inexact, spoken, temporal_as_text, unify, width

MAX_DEPTH = 64
MAX_FIELDS = 500
MAX_CELLS = 1 << 25
"""Fields times rows of one piece, at most: Arrow's reader makes room for every field in every row."""
FOREIGN = "json: no object: "
"""How the reason of a body begins that does not even look like a JSON object."""

_LONG_NUMBER = re.compile(rb"\d{16}")  # may be more than float64 holds, or orjson
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_FINITE = re.compile(rb"-?(?:NaN|Infinity)")
_WHITE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


class JsonDecoder:
    """Decodes the bodies of one read, and remembers what it saw, so that every piece becomes part of one table.

    Attributes
    ----------
    types
        Field -> Arrow type that holds all its values so far; JSON_TEXT where there is none.
    mixed
        Field -> the kinds of values that do not go together.
    objects, foreign, failed
        Bodies that look like JSON objects, bodies that do not, and bodies of the first sort that are none after all.
    repeated
        Bodies in which a key comes twice; the last value is taken.
    left_out
        Fields beyond `MAX_FIELDS`; they stay in `data` only.
    """

    def __init__(self) -> None:
        self.types: dict[str, Any] = {}
        self.mixed: dict[str, set[str]] = defaultdict(set)
        self.objects = self.foreign = self.failed = self.repeated = 0
        self.left_out: set[str] = set()
        self._not_times: dict[str, Any] = {}  # fields with text that Arrow's reader would take for times

    def decode(self, data: Any) -> tuple[dict[str, Any], Any]:
        """The fields' columns of one piece (see `pieces`), and per row why it could not be decoded (None: all could)."""
        bodies, rows, reasons = _candidates(data)
        self.objects += len(bodies) + sum(not why.startswith(FOREIGN) for why in reasons.values())
        self.foreign += sum(why.startswith(FOREIGN) for why in reasons.values())
        columns = self._fast(bodies) if len(bodies) else {}
        if columns is None:
            columns, bad = self._slow(bodies.to_pylist())
            reasons.update({i if rows is None else rows[i]: why for i, why in bad.items()})
        self.failed += sum(not why.startswith(FOREIGN) for why in reasons.values())
        if rows is not None:
            place = np.full(len(data), -1)
            place[rows] = np.arange(len(rows))
            index = pa.array(place, mask=place < 0)
            columns = {name: column.take(index) for name, column in columns.items()}
        for name, column in columns.items():
            self._learn(name, column.type)
        return columns, pa.array([reasons.get(i) for i in range(len(data))], pa.large_string()) if reasons else None

    def _learn(self, name: str, kind: Any) -> None:
        known = self.types.setdefault(name, pa.null())
        both = unify(known, kind)
        if both != JSON_TEXT and width(both) > MAX_FIELDS:
            both = JSON_TEXT
        if both == JSON_TEXT and JSON_TEXT not in (known, kind):
            self.mixed[name] |= {spoken(known), spoken(kind)}
        self.types[name] = both

    def texts(self, data: Any, names: Sequence[str]) -> dict[str, Any]:
        """Some fields of a piece as JSON text, for those of which another piece showed that they have no one type."""
        bodies, rows, _ = _candidates(data)
        found: list[dict[str, Any] | None] = [None] * len(data)
        for i, body in zip(range(len(data)) if rows is None else rows, bodies.to_pylist(), strict=True):
            found[i], _ = _parse(body)
        return {name: json_text([None if doc is None else doc.get(name) for doc in found]) for name in names}

    def _fast(self, bodies: Any) -> dict[str, Any] | None:
        """By Arrow's reader; None when it cannot, or may be wrong."""
        if len(self.types) > MAX_FIELDS:
            return None
        try:
            bodies.cast(pa.string())  # the reader does not look whether text is UTF-8
            joined = pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(bodies)], pa.int32()), bodies), b"\n")[
                0
            ].as_buffer()
            if _deep(joined, bodies):
                return None  # Arrow's reader would overflow the stack
            table = _read(joined, self._not_times)
            taken_for_times = {f.name: text for f in table.schema if (text := temporal_as_text(f.type)) is not None}
            if taken_for_times:
                for name, text in taken_for_times.items():
                    self._not_times[name] = unify(self._not_times.get(name, pa.null()), text)
                order = table.schema.names
                table = _read(joined, self._not_times).select(order)
                if any(temporal_as_text(kind) is not None for kind in table.schema.types):
                    return None
        except pa.ArrowInvalid:
            return None
        if (
            table.num_rows != len(bodies)
            or table.num_columns > MAX_FIELDS
            or any(width(t) > MAX_FIELDS for t in table.schema.types)
        ):
            return None
        columns = {name: column.combine_chunks() for name, column in zip(table.schema.names, table.columns, strict=True)}
        return None if any(may_be_inexact(column) for column in columns.values()) else columns

    def _slow(self, bodies: Sequence[bytes]) -> tuple[dict[str, Any], dict[int, str]]:
        """By orjson, row by row: every column that can be had, and the reason of every row that cannot be decoded."""
        reasons: dict[int, str] = {}
        docs: list[dict[str, Any]] = []
        for i, body in enumerate(bodies):
            doc, why = _parse(body)
            if doc is None:
                reasons[i] = why
            elif _repeats_a_key(body, doc):
                self.repeated += 1
            docs.append(doc or {})
        columns = {}
        for name in dict.fromkeys(chain.from_iterable(docs)):
            if name in self.types or len(self.types) < MAX_FIELDS:
                self.types.setdefault(name, pa.null())
                columns[name] = self._column(name, [doc.get(name) for doc in docs])
            else:
                self.left_out.add(name)
        return columns, reasons

    def _column(self, name: str, values: list[Any]) -> Any:
        """One field's values as Arrow, where they have a type in common; else as JSON text."""
        kinds = set(map(type, values)) - {type(None)}
        try:
            if kinds <= {int} or kinds <= {str} or kinds <= {bool} or kinds <= {float}:
                return pa.array(values)
            if kinds == {int, float}:  # raises for an integer that float64 does not hold
                return pa.array(values, pa.float64())
            if kinds in ({dict}, {list}):
                nested = pa.array(values)
                if width(nested.type) <= MAX_FIELDS:
                    return nested
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
            pass  # no type in common, as the next line says
        self.mixed[name] |= {_SPOKEN[kind] for kind in kinds}
        return json_text(values)


_SPOKEN = {int: "number", float: "number", str: "text", bool: "true/false", dict: "object", list: "list"}


def pieces(data: Any) -> Iterator[tuple[int, int]]:
    """Cut some bodies into (start, length) that are safe to decode at once, `MAX_CELLS` being the bound."""
    todo = [(0, len(data))]
    while todo:
        start, length = todo.pop()
        cells = _count(_content(data.slice(start, length)), b":") * length
        if length > 1 and cells > MAX_CELLS:
            step = max(1, int(length / math.ceil(math.sqrt(cells / MAX_CELLS) + 0.1)))
            todo += [(at, min(step, start + length - at)) for at in range(start, start + length, step)][::-1]
        elif length:
            yield start, length


def _content(data: Any) -> Any:
    """The bytes of a binary array, one after the other."""
    if len(data) == 0:
        return np.empty(0, np.uint8)
    offsets = np.frombuffer(data.buffers()[1], np.int32, len(data) + 1, data.offset * 4)
    return np.frombuffer(data.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]


def _count(content: Any, characters: bytes) -> int:
    return sum(int(np.count_nonzero(content == character)) for character in characters)


def _candidates(data: Any) -> tuple[Any, Any, dict[int, str]]:
    """The bodies that look like JSON objects, their rows (None: all), and per other row why not. Null bodies are neither."""
    if data.null_count == 0 and pc.all(pc.and_(pc.starts_with(data, b"{"), pc.ends_with(data, b"}"))).as_py():
        return data, None, {}
    reasons: dict[int, str] = {}
    rows, bodies = [], []
    for i, body in enumerate(data.to_pylist()):
        if body is None:
            continue
        clean = body.removeprefix(_BOM).strip(_WHITE)
        if not clean.startswith(b"{"):
            reasons[i] = FOREIGN + _sort(clean)
        elif not clean.endswith(b"}"):
            reasons[i] = "json: malformed: it does not end with }"
        else:
            rows.append(i)
            bodies.append(clean)
    return pa.array(bodies, pa.binary()), np.array(rows, np.int64), reasons


def _sort(body: bytes) -> str:
    """What a body is that is no JSON object, from its first byte."""
    if not body:
        return "empty body"
    first = body[:1]
    if first in b'["-0123456789':
        return {b"[": "a list", b'"': "a text"}.get(first, "a number")
    return body.decode("ascii") if body in (b"null", b"true", b"false") else f"begins with {body[:8]!r}"


def _deep(joined: Any, bodies: Any) -> bool:
    """Whether some body is nested deeper than `MAX_DEPTH`."""
    if _count(np.frombuffer(joined, np.uint8), b"{[") - len(bodies) < MAX_DEPTH:
        return False
    content = _content(bodies)
    starts = np.frombuffer(bodies.buffers()[1], np.int32, len(bodies), bodies.offset * 4)
    opening = ((content == ord("{")) | (content == ord("["))).view(np.uint8)
    many = np.add.reduceat(opening, starts - starts[0], dtype=np.int64) > MAX_DEPTH
    return any(_depth(bodies[int(i)].as_py()) > MAX_DEPTH for i in np.flatnonzero(many))


def _depth(body: bytes) -> int:
    """How deep a body is nested; brackets within text do not count."""
    content = np.frombuffer(_STRING.sub(b"", body), np.uint8)
    level = np.isin(content, (ord("{"), ord("["))).astype(np.int64) - np.isin(content, (ord("}"), ord("]")))
    return int(level.cumsum().max(initial=0))


def _read(joined: Any, not_times: dict[str, Any]) -> Any:
    """Arrow's reader over one piece as one block, so that it never has to look for the place where to cut."""
    return pj.read_json(
        pa.BufferReader(joined),
        read_options=pj.ReadOptions(use_threads=False, block_size=max(joined.size + 1, 64)),
        parse_options=pj.ParseOptions(explicit_schema=pa.schema(list(not_times.items())) if not_times else None),
    )


def _parse(body: bytes) -> tuple[dict[str, Any] | None, str]:
    """One body that begins with { as a dict; or None and why not."""
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _depth(body) > MAX_DEPTH:
        return None, f"json: too deep: nested deeper than {MAX_DEPTH} levels"
    try:
        doc = orjson.loads(body)
        if _LONG_NUMBER.search(body):  # integers of any length, which orjson would turn into floats
            doc = json.loads(body.decode())
    except orjson.JSONDecodeError as error:
        if not body.isascii():
            try:
                body.decode()
            except UnicodeDecodeError as bad:
                return None, f"json: not UTF-8: byte {bad.start}"
        if _NOT_FINITE.search(body):  # no JSON, but common; orjson and Arrow agree on the rest
            doc, _ = _parse(_NOT_FINITE.sub(b"0", body))
            return (None, f"json: malformed: {error}") if doc is None else (json.loads(body), "")
        return None, f"json: malformed: {error}"
    return doc, ""


def _repeats_a_key(body: bytes, doc: dict[str, Any]) -> bool:
    """Whether a key comes twice in one object; seldom, so a cheap sign is looked for first."""
    if body.count(b'"') == dump(doc).count(b'"'):
        return False
    repeated = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(found)
        if len(made) != len(found):
            repeated.append(True)
        return made

    json.loads(body, object_pairs_hook=pairs)
    return bool(repeated)
