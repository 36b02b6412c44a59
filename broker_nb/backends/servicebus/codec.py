"""A client's message -> values, and back."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from azure.servicebus import ServiceBusReceivedMessage
from azure.servicebus._pyamqp import _decode
from azure.servicebus.amqp import AmqpMessageBodyType

from broker_nb.backends.driver import Column, Envelope, Position
from broker_nb.messages import Attribute

BELOW = 48
"""Bits of a sequence number below its partition."""
LONGEST_KEY = 128
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ENQUEUED = b"x-opt-enqueued-time"
_INT64 = range(-(2**63), 2**63)


# ------------------------------------------------------------------ what the client's decoder does not tell
class Text(bytes):
    """Bytes that came as AMQP text."""


class Milliseconds(int):
    """A number that came as an AMQP timestamp."""


def _tell_apart() -> None:
    """Mark text and times in the client's decoder, which gives both away as plain bytes and numbers.

    Subclasses, so that the client and everybody else sees what it always saw.
    """
    decoders = _decode._DECODE_BY_CONSTRUCTOR  # a list by type code
    for code, mark in ((0xA1, Text), (0xB1, Text), (0x83, Milliseconds)):
        plain: Callable[..., tuple[Any, Any]] = decoders[code]

        def marked(buffer: memoryview, depth: int = 0, plain: Any = plain, mark: Any = mark) -> tuple[memoryview, Any]:
            rest, value = plain(buffer, depth)
            return rest, mark(value)

        decoders[code] = marked


_tell_apart()


# ------------------------------------------------------------------ attributes
def attribute(name: Any, value: Any) -> Attribute:
    """An application property as ours; of types that we have no word for, the text."""
    name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    match value:
        case None:
            return Attribute(name, None)
        case Text() | str():
            return Attribute(name, bytes(value) if isinstance(value, bytes) else value.encode(), "str")
        case bytes():
            return Attribute(name, value, "bytes")
        case bool():
            return Attribute(name, b"true" if value else b"false", "bool")
        case Milliseconds():
            return Attribute(name, _time_text(value), "datetime")
        case int():
            return Attribute(name, b"%d" % value, "int")
        case float():
            return Attribute(name, repr(value).encode(), "float")
        case uuid.UUID():
            return Attribute(name, str(value).encode(), "uuid")
    return Attribute(name, str(value).encode(), "str")


def _time_text(value: int) -> bytes:
    try:
        return (_EPOCH + timedelta(milliseconds=value)).isoformat().encode()
    except OverflowError:  # beyond the years that Python knows
        return b"%d ms" % value


def native(given: Attribute) -> Any:
    """An attribute as the client sends it; ValueError with the reason where Service Bus cannot hold it."""
    _, value, kind = given
    if value is None:
        return None
    if kind == "bytes":
        return {"TYPE": "BINARY", "VALUE": value}  # the client would make text of plain bytes
    text = value.decode()
    if kind in ("", "str"):
        return text
    if kind == "bool":
        return text == "true"
    if kind == "int":
        if (number := int(text)) not in _INT64:
            raise ValueError("is beyond 64 bits")
        return {"TYPE": "LONG", "VALUE": number}
    if kind == "float":
        return float(text)
    if kind == "uuid":
        return uuid.UUID(text)
    at = datetime.fromisoformat(text)
    if at.microsecond % 1000:
        raise ValueError("has microseconds, and Service Bus keeps milliseconds: round it first")
    return {"TYPE": "TIMESTAMP", "VALUE": (at - _EPOCH) // timedelta(milliseconds=1)}


# ------------------------------------------------------------------ rows
def body(message: ServiceBusReceivedMessage) -> bytes | None:
    """The bytes of a body; an AMQP value or sequence, which some clients send, as text or JSON."""
    if message.body_type is AmqpMessageBodyType.DATA:
        return b"".join(message.body)
    value = message.body if message.body_type is AmqpMessageBodyType.VALUE else list(message.body)
    if value is None or isinstance(value, bytes):
        return None if value is None else bytes(value)
    return json.dumps(_plain(value), ensure_ascii=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {str(_plain(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | float | str | None) else str(value)


def key(message: ServiceBusReceivedMessage) -> bytes | None:
    """Session id, else partition key."""
    found = message.session_id if message.session_id is not None else message.partition_key
    return None if found is None else found.encode()


def number(message: ServiceBusReceivedMessage) -> int:
    """The sequence number."""
    found = message.sequence_number
    assert found is not None  # noqa: S101 - the broker sets it
    return found


def enqueued_ns(message: ServiceBusReceivedMessage) -> int | None:
    """When the broker stored it."""
    at: int | None = (message.raw_amqp_message.annotations or {}).get(_ENQUEUED)
    return None if at is None else at * 1_000_000


def _id(message: ServiceBusReceivedMessage) -> str:
    return f"{message.message_id}:{number(message)}" if message.message_id else str(number(message))


def _attributes(message: ServiceBusReceivedMessage) -> list[Attribute]:
    return [attribute(name, value) for name, value in (message.application_properties or {}).items()]


class ServiceBusCodec:
    """Rows of one entity. `offset` is the sequence number, whose upper bits are the partition; `id` is "message id:sequence number"."""

    def __init__(self, topic: str, *, taken: bool) -> None:
        self._topic, self._taken = topic, taken  # being taken is a delivery, which the broker counts when it ends
        self._getters: dict[str, Callable[[ServiceBusReceivedMessage], Any]] = {
            "partition": lambda m: number(m) >> BELOW,
            "offset": number,
            "id": _id,
            "key": key,
            "data": body,
            "attributes": lambda m: _attributes(m) or None,
            "publish_time_ns": enqueued_ns,
            "delivery_count": self._count,
        }

    def _count(self, message: ServiceBusReceivedMessage) -> int:
        return (message.delivery_count or 0) + self._taken

    def columns(self, rows: Sequence[Any], want: frozenset[str]) -> Mapping[str, Column]:
        made: dict[str, Column] = {name: list(map(get, rows)) for name, get in self._getters.items() if name in want}
        return made | ({"topic": self._topic} if "topic" in want else {})

    def envelope(self, row: ServiceBusReceivedMessage) -> Envelope:
        return Envelope(
            topic=self._topic,
            partition=number(row) >> BELOW,
            position=(number(row),),
            id=_id(row),
            key=key(row),
            data=body(row),
            attributes=_attributes(row),
            publish_time_ns=enqueued_ns(row),
            time_is="server",
            delivery_count=self._count(row),
            native=row,
        )

    def places(self, rows: Sequence[Any]) -> Sequence[tuple[int, Position]]:
        return [(number(m) >> BELOW, (number(m),)) for m in rows]

    def size(self, row: ServiceBusReceivedMessage) -> int:
        return len(body(row) or b"")
