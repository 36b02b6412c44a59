"""A client's message -> values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pulsar

from broker_nb.backends.driver import Column, Envelope, Position
from broker_nb.messages import Attribute

_MS = 1_000_000


def place_of(message_id: Any) -> Position:
    """Ledger, entry and index in the batch; a message that is not in a batch is its first."""
    return message_id.ledger_id(), message_id.entry_id(), max(message_id.batch_index(), 0)


def id_of(message_id: Any, partition: int | None = None) -> str:
    """ledger:entry:partition:batch index, with the client's -1 for none."""
    number = message_id.partition() if partition is None else partition
    return f"{message_id.ledger_id()}:{message_id.entry_id()}:{number}:{message_id.batch_index()}"


def _key(message: pulsar.Message) -> bytes | None:
    return message.partition_key().encode() or None


def _data(message: pulsar.Message) -> bytes | None:
    body: bytes = message.data()
    return None if not body and message.has_null_value() else body


def _attributes(message: pulsar.Message) -> list[tuple[str, bytes]] | None:
    found = message.properties()
    return [(name, value.encode()) for name, value in found.items()] if found else None


class PulsarCodec:
    """Rows of one topic. The time is the producer's; `counts`: the broker counts deliveries."""

    def __init__(self, topic: str, *, counts: bool = False) -> None:
        self._topic, self._counts = topic, counts

    def columns(self, rows: Sequence[Any], want: frozenset[str]) -> Mapping[str, Column]:
        made: dict[str, Column] = {}
        if want & {"partition", "offset", "id"}:
            ids = [m.message_id() for m in rows]
            if "partition" in want:
                made["partition"] = [max(i.partition(), 0) for i in ids]
            if "offset" in want:
                made["offset"] = [i.ledger_id() for i in ids]
            if "id" in want:
                made["id"] = [id_of(i) for i in ids]
        if "key" in want:
            made["key"] = [_key(m) for m in rows]
        if "data" in want:
            made["data"] = [_data(m) for m in rows]
        if "attributes" in want:
            made["attributes"] = [_attributes(m) for m in rows]
        if "publish_time_ns" in want:
            made["publish_time_ns"] = [m.publish_timestamp() * _MS for m in rows]
        if "topic" in want:
            made["topic"] = self._topic
        if "delivery_count" in want:
            made["delivery_count"] = [m.redelivery_count() + 1 for m in rows] if self._counts else None
        return made

    def envelope(self, row: pulsar.Message) -> Envelope:
        at = row.message_id()
        return Envelope(
            topic=self._topic,
            partition=max(at.partition(), 0),
            position=place_of(at),
            id=id_of(at),
            key=_key(row),
            data=_data(row),
            attributes=[Attribute(*each) for each in _attributes(row) or ()],
            publish_time_ns=row.publish_timestamp() * _MS,
            time_is="producer",
            delivery_count=row.redelivery_count() + 1 if self._counts else None,
            native=row,
        )

    def places(self, rows: Sequence[Any]) -> Sequence[tuple[int, Position]]:
        ids = [m.message_id() for m in rows]
        return [(max(i.partition(), 0), place_of(i)) for i in ids]

    def size(self, row: pulsar.Message) -> int:
        return len(row.data())
