"""A message of a stream -> values; headers both ways."""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

from broker_nb.backends.driver import Column, Envelope, Position
from broker_nb.messages import Attribute

VERSION = b"NATS/1.0"
_HEADER = re.compile(r"[!-9;-~]+")  # ADR-4: printable ASCII but the colon


class Row(NamedTuple):
    """One message, however it was read. `time` is in ns, or RFC 3339 as looks get it; `headers` are its own lines, as they came."""

    subject: str
    sequence: int
    time: int | str
    deliveries: int | None
    headers: bytes
    data: bytes


Pair = tuple[str, bytes]


def parse_headers(block: bytes) -> list[Pair]:
    """Header lines in order, repeats kept. One space after the colon belongs to the format; all others to the value."""
    pairs = []
    for line in block.split(b"\r\n")[1:]:  # the first one is the version, on old servers with a status that a user wrote
        name, colon, value = line.partition(b":")
        if colon:
            pairs.append((name.decode("utf-8", "backslashreplace"), value[1:] if value[:1] == b" " else value))
    return pairs


def header_flaw(name: str) -> str:
    """Why a header cannot be called so; "" when it can."""
    if _HEADER.fullmatch(name):
        return ""
    return "is no name of a NATS header: printable ASCII without spaces and colons"


def value_flaw(value: bytes) -> str:
    """Why a header cannot have that value; "" when it can."""
    if b"\r" in value or b"\n" in value:
        return "has a line break, which would end the header"
    try:
        value.decode()
    except UnicodeDecodeError:
        return "is not UTF-8 text; encode it, for example as base64"
    return ""


def header_block(pairs: Iterable[Pair]) -> bytes:
    """Names and values that were checked, as the protocol has them; empty without any."""
    lines = [b"%s: %s\r\n" % (name.encode(), value) for name, value in pairs]
    return b"%s\r\n%s\r\n" % (VERSION, b"".join(lines)) if lines else b""


@lru_cache(64)
def _second(text: str) -> int:
    return calendar.timegm((int(text[:4]), int(text[5:7]), int(text[8:10]), int(text[11:13]), int(text[14:16]), int(text[17:19])))


def nanoseconds(time: int | str) -> int:
    """A time of the server, which writes RFC 3339 in UTC and leaves out zeros at the end."""
    if isinstance(time, int):
        return time
    return _second(time[:19]) * 1_000_000_000 + int(time[20:-1].ljust(9, "0") or 0)


def rfc3339(time_ns: int) -> str:
    """A time as the server takes it; ValueError beyond what a date can say."""
    return f"{datetime.fromtimestamp(time_ns // 1_000_000_000, UTC):%Y-%m-%dT%H:%M:%S}.{time_ns % 1_000_000_000:09}Z"


class JetStreamCodec:
    """Rows of a stream; `topic` is each row's subject. The key is the first header called `key_header`; "" = the subject is the key."""

    def __init__(self, key_header: str) -> None:
        self._key_header = key_header

    def _key(self, row: Row, pairs: list[Pair]) -> bytes | None:
        """The row's key; its header is taken out of `pairs`."""
        if not self._key_header:
            return row.subject.encode()
        for i, (name, value) in enumerate(pairs):
            if name == self._key_header:
                del pairs[i]
                return value
        return None

    def columns(self, rows: Sequence[Any], want: frozenset[str]) -> Mapping[str, Column]:
        made: dict[str, Column] = {}
        if "topic" in want:
            made["topic"] = [r.subject for r in rows]
        if "partition" in want:
            made["partition"] = 0
        if "offset" in want:
            made["offset"] = [r.sequence for r in rows]
        if "id" in want:
            made["id"] = [str(r.sequence) for r in rows]
        if "data" in want:
            made["data"] = [r.data for r in rows]
        if "publish_time_ns" in want:
            made["publish_time_ns"] = [nanoseconds(r.time) for r in rows]
        if "delivery_count" in want:
            made["delivery_count"] = [r.deliveries for r in rows]
        if "key" in want or "attributes" in want:
            headers = [parse_headers(r.headers) if r.headers else [] for r in rows]
            keys = [self._key(r, pairs) for r, pairs in zip(rows, headers, strict=True)]
            columns: dict[str, Column] = {"key": keys, "attributes": [pairs or None for pairs in headers]}
            made |= {name: column for name, column in columns.items() if name in want}
        return made

    def envelope(self, row: Row) -> Envelope:
        pairs = parse_headers(row.headers)
        return Envelope(
            topic=row.subject,
            partition=0,
            position=(row.sequence,),
            id=str(row.sequence),
            key=self._key(row, pairs),
            data=row.data,
            attributes=[Attribute(*pair) for pair in pairs],
            publish_time_ns=nanoseconds(row.time),
            time_is="server",
            delivery_count=row.deliveries,
            native=row,
        )

    def places(self, rows: Sequence[Any]) -> Sequence[tuple[int, Position]]:
        return [(0, (r.sequence,)) for r in rows]

    def size(self, row: Row) -> int:
        return len(row.data) + len(row.headers)
