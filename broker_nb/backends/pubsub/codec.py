"""A message as Pub/Sub delivers it -> values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.pubsub_v1.types import ReceivedMessage

from broker_nb.backends.driver import Column, Envelope, Position
from broker_nb.messages import Attribute

PARTITION = 0  # a topic has no partitions; everything is in this one


def _attributes(row: Any) -> list[tuple[str, bytes]] | None:
    found = row.message.attributes
    return [(name, found[name].encode()) for name in sorted(found)] if found else None  # the wire keeps no order


def publish_time_ns(row: Any) -> int:
    """When the service got it."""
    stamp = row.message.publish_time
    return int(stamp.seconds) * 1_000_000_000 + int(stamp.nanos)


_GETTERS: dict[str, Callable[[Any], Any]] = {
    "id": lambda row: row.message.message_id,
    "key": lambda row: row.message.ordering_key.encode() or None,
    "data": lambda row: row.message.data,
    "attributes": _attributes,
    "publish_time_ns": publish_time_ns,
    "delivery_count": lambda row: row.delivery_attempt or None,
}


class PubsubCodec:
    """Rows are the protobuf messages inside the client's `ReceivedMessage`, whose wrappers cost more than the message."""

    def __init__(self, topic: str) -> None:
        self._scalars = {"topic": topic, "partition": PARTITION, "offset": None}

    def columns(self, rows: Sequence[Any], want: frozenset[str]) -> Mapping[str, Column]:
        made: dict[str, Column] = {name: list(map(get, rows)) for name, get in _GETTERS.items() if name in want}
        return made | {name: value for name, value in self._scalars.items() if name in want}

    def envelope(self, row: Any) -> Envelope:
        return Envelope(
            topic=str(self._scalars["topic"]),
            partition=PARTITION,
            position=(),
            id=row.message.message_id,
            key=row.message.ordering_key.encode() or None,
            data=row.message.data,
            attributes=[Attribute(*pair) for pair in _attributes(row) or ()],
            publish_time_ns=publish_time_ns(row),
            time_is="server",
            delivery_count=row.delivery_attempt or None,
            native=ReceivedMessage.wrap(row),
        )

    def places(self, rows: Sequence[Any]) -> Sequence[tuple[int, Position]]:
        return [(PARTITION, ())] * len(rows)

    def size(self, row: Any) -> int:
        return len(row.message.data) + len(row.message.ordering_key)
