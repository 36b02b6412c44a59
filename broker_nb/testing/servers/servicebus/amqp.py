"""AMQP messages as raw sections, so that a stored message goes out with the bytes that it came in with.

Re-encoding through Python values would lose AMQP types; only header, annotations and (where a rule or a dead letter adds to them)
application properties are made anew. Runs in the stand-in's process, where python-qpid-proton is on the path.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from proton import Array, Data, Described, int32, symbol, timestamp

HEADER, ANNOTATIONS, PROPERTIES, APPLICATION = 0x70, 0x72, 0x73, 0x74
DELIVERY_ANNOTATIONS, FOOTER = 0x71, 0x78
BODIES = frozenset({0x75, 0x76, 0x77})
_FIXED = {4: 0, 5: 1, 6: 2, 7: 4, 8: 8, 9: 16}  # width by the upper half of the type's code


def _end(raw: bytes, at: int) -> int:
    """Where the value that starts at `at` ends; IndexError or struct.error where the bytes are no AMQP value."""
    code = raw[at]
    if code == 0:  # described
        return _end(raw, _end(raw, at + 1))
    if (width := _FIXED.get(code >> 4)) is not None:
        return at + 1 + width
    if code >> 4 in (0xA, 0xC, 0xE):
        return at + 2 + raw[at + 1]
    length: int = struct.unpack_from(">I", raw, at + 1)[0]
    return at + 5 + length


def sections(raw: bytes) -> list[tuple[int, bytes]]:
    """The sections of an encoded message, each with its code."""
    at, found = 0, []
    while at < len(raw):
        if raw[at] != 0 or raw[at + 1] not in (0x53, 0x80):
            raise ValueError("no AMQP section")
        end = _end(raw, at)
        if end > len(raw):
            raise ValueError("a section is cut off")
        found.append((raw[at + 2] if raw[at + 1] == 0x53 else raw[at + 9], raw[at:end]))
        at = end
    return found


def own(value: Any) -> Any:
    """A value that lasts: proton hands out binary as views into memory that it frees with the message."""
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, dict):
        return {own(k): own(v) for k, v in value.items()}
    if isinstance(value, list):
        return [own(v) for v in value]
    if isinstance(value, Array):
        return [own(v) for v in value.elements]
    if isinstance(value, Described):
        return own(value.value)
    return value


def decoded(raw: bytes) -> Any:
    """The value of one section."""
    data = Data()
    data.decode(raw)
    data.next()
    return own(data.get_object())


def section(code: int, value: Any) -> bytes:
    """A section with that value."""
    data = Data()
    data.put_described()
    data.enter()
    data.put_ulong(code)
    data.put_object(value)
    data.exit()
    return bytes(data.encode())


def batch_items(found: Sequence[tuple[int, bytes]]) -> list[bytes] | None:
    """The messages of a batch: data sections that are messages themselves; None when it is a single message.

    Service Bus tells by message-format, which proton does not hand out: so this judges by content, and would split a single
    message whose whole body is an encoded AMQP message.
    """
    items = []
    for raw in [raw for code, raw in found if code == 0x75]:
        item = bytes(decoded(raw))
        try:
            codes = [code for code, _ in sections(item)]
        except (IndexError, ValueError, struct.error):
            return None
        if not BODIES & set(codes) or codes != sorted(codes) or codes[0] < HEADER or codes[-1] > FOOTER:
            return None
        items.append(item)
    return items or None


class Parts:
    """What the broker reads of a message, and the rest as it came."""

    def __init__(self, raw: bytes) -> None:
        self.header: list[Any] = []
        self.annotations: dict[str, Any] = {}
        self.properties: list[Any] = []
        self.application: dict[str, Any] = {}
        self.rest: list[tuple[int, bytes]] = []  # properties, application properties, body, footer
        for code, part in sections(raw):
            if code == HEADER:
                self.header = decoded(part)
            elif code == ANNOTATIONS:
                self.annotations = {str(k): v for k, v in decoded(part).items()}
            elif code != DELIVERY_ANNOTATIONS:
                self.rest.append((code, part))
                if code == PROPERTIES:
                    self.properties = decoded(part)
                elif code == APPLICATION:
                    self.application = decoded(part)
        self.size = len(raw)

    def field(self, index: int) -> Any:
        """One field of the properties section; None where it is not there."""
        return self.properties[index] if len(self.properties) > index else None

    @property
    def ttl_s(self) -> float | None:
        """The header's time to live."""
        return self.header[2] / 1000 if len(self.header) > 2 and self.header[2] is not None else None

    def set_application(self, values: dict[str, Any]) -> None:
        """Replace the application properties, whatever the rest is."""
        self.application = values
        kept = [(code, raw) for code, raw in self.rest if code != APPLICATION]
        at = next((i for i, (code, _) in enumerate(kept) if code > APPLICATION), len(kept))
        kept.insert(at, (APPLICATION, section(APPLICATION, values)))
        self.rest = kept

    def encoded(self, count: int, annotations: dict[str, Any], delivery: dict[str, Any] | None = None) -> bytes:
        """The message with that delivery count, the broker's annotations added to its own, and those of the delivery."""
        given: list[Any] = [*self.header, None, None, None]
        data = Data()
        data.put_described()
        data.enter()
        data.put_ulong(HEADER)
        data.put_list()
        data.enter()
        data.put_bool(bool(given[0]))
        for value, put in ((given[1], data.put_ubyte), (given[2], data.put_uint), (None, data.put_bool), (count, data.put_uint)):
            if value is None:
                data.put_null()
            else:
                put(value)
        data.exit()
        data.exit()
        marks = {symbol(k): v for k, v in {**self.annotations, **annotations}.items()}
        own_marks = section(DELIVERY_ANNOTATIONS, {symbol(k): v for k, v in delivery.items()}) if delivery else b""
        return bytes(data.encode()) + own_marks + section(ANNOTATIONS, marks) + b"".join(raw for _, raw in self.rest)


def milliseconds(seconds: float) -> timestamp:
    """An AMQP timestamp."""
    return timestamp(int(seconds * 1000))


def small(value: int) -> int32:
    """An AMQP int."""
    return int32(value)
