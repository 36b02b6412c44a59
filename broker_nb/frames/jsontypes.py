"""What the Arrow types of decoded JSON have in common, and where they do not go together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

JSON_TEXT = pa.json_(pa.string())
"""A field that has no one type: its values as JSON text, so that nothing is lost."""

EXACT = 2**53
"""From here on float64 does not hold every integer."""


def unify(a: Any, b: Any) -> Any:
    """One type for the values of both: equal, or nothing beside something, or int beside float, also within structs and lists.

    Everything else is JSON_TEXT. Whether the integers really fit into float64 is for the cast to find out.
    """
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if {a, b} == {pa.int64(), pa.float64()}:
        return pa.float64()
    if pa.types.is_list(a) and pa.types.is_list(b):
        inner = unify(a.value_type, b.value_type)
        return JSON_TEXT if inner == JSON_TEXT else pa.list_(inner)
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        fields = {f.name: f.type for f in a}
        for field in b:
            fields[field.name] = unify(fields.get(field.name, pa.null()), field.type)
        return JSON_TEXT if JSON_TEXT in fields.values() else pa.struct(list(fields.items()))
    return JSON_TEXT


def width(kind: Any) -> int:
    """How many plain values a type is made of; 0 for an object without fields."""
    if pa.types.is_list(kind):
        return width(kind.value_type)
    return sum(width(f.type) for f in kind) if pa.types.is_struct(kind) else 1


def temporal_as_text(kind: Any) -> Any:
    """The part of a type that was taken for times, as text; None when there is no such part."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_list(kind):
        inner = temporal_as_text(kind.value_type)
        return None if inner is None else pa.list_(inner)
    if pa.types.is_struct(kind):
        fields = [(f.name, text) for f in kind if (text := temporal_as_text(f.type)) is not None]
        return pa.struct(fields) if fields else None
    return None


def may_be_inexact(array: Any) -> bool:
    """Whether a float in here may have been an integer that float64 does not hold."""
    kind = array.type
    if pa.types.is_float64(kind):
        largest = pc.max(pc.abs(array)).as_py()
        return largest is not None and largest >= EXACT
    if pa.types.is_list(kind):
        return may_be_inexact(array.flatten())
    return pa.types.is_struct(kind) and any(may_be_inexact(part) for part in array.flatten())


def spoken(kind: Any) -> str:
    """A type in a person's words."""
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if pa.types.is_boolean(kind):
        return "true/false"
    if pa.types.is_struct(kind):
        return "object"
    if pa.types.is_list(kind):
        return "list"
    return "mixed" if kind == JSON_TEXT else "text"


def dump(value: Any) -> bytes:
    """A value as JSON, exactly; integers of any length."""
    try:
        return orjson.dumps(value)
    except TypeError:  # an integer beyond 64 bits
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_text(values: Sequence[Any]) -> Any:
    """Values as a column of JSON text."""
    texts = [None if value is None else dump(value) for value in values]
    return pa.ExtensionArray.from_storage(JSON_TEXT, pa.array(texts, pa.binary()).cast(pa.string()))
