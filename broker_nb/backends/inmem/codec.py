"""Stored rows and deliveries as columns and envelopes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from broker_nb.backends.driver import Column, Envelope, Position
from broker_nb.backends.inmem.log import Row
from broker_nb.backends.inmem.subscriptions import Delivery

_COLUMNS: Mapping[str, Callable[[Sequence[Row]], Column]] = {
    "partition": lambda rows: [row.partition for row in rows],
    "offset": lambda rows: [row.offset for row in rows],
    "key": lambda rows: [row.key for row in rows],
    "data": lambda rows: [row.data for row in rows],
    "attributes": lambda rows: [row.attributes for row in rows],
    "publish_time_ns": lambda rows: [row.time_ns for row in rows],
    "delivery_count": lambda rows: None,
}


class LogCodec:
    """Rows as they are stored."""

    __slots__ = ("_topic",)

    def __init__(self, topic: str) -> None:
        self._topic = topic

    def columns(self, rows: Sequence[Row], want: frozenset[str]) -> Mapping[str, Column]:
        columns = {name: _COLUMNS[name](rows) for name in want & _COLUMNS.keys()}
        return columns | {"topic": self._topic} if "topic" in want else columns

    def envelope(self, row: Row) -> Envelope:
        return self._envelope(row, None, row)

    def _envelope(self, row: Row, delivery_count: int | None, native: object) -> Envelope:
        return Envelope(
            topic=self._topic,
            partition=row.partition,
            position=(row.offset,),
            id=f"{row.partition}:{row.offset}",
            key=row.key,
            data=row.data,
            attributes=row.attributes or (),
            publish_time_ns=row.time_ns,
            time_is=row.time_is,
            delivery_count=delivery_count,
            native=native,
        )

    def places(self, rows: Sequence[Row]) -> Sequence[tuple[int, Position]]:
        return [(row.partition, (row.offset,)) for row in rows]

    def size(self, row: Row) -> int:
        return row.size


class QueueCodec:
    """Rows as a queue delivers them."""

    __slots__ = ("_log",)

    def __init__(self, topic: str) -> None:
        self._log = LogCodec(topic)

    def columns(self, rows: Sequence[Delivery], want: frozenset[str]) -> Mapping[str, Column]:
        columns = self._log.columns([delivery.row for delivery in rows], want)
        return {**columns, "delivery_count": [delivery.tries for delivery in rows]} if "delivery_count" in want else columns

    def envelope(self, row: Delivery) -> Envelope:
        return self._log._envelope(row.row, row.tries, row)

    def places(self, rows: Sequence[Delivery]) -> Sequence[tuple[int, Position]]:
        return [(row.partition, (row.offset,)) for row, _ in rows]

    def size(self, row: Delivery) -> int:
        return row.row.size
