"""A client's message -> values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Message

from broker_nb.backends.driver import Column, Envelope, Position
from broker_nb.messages import Attribute

_MS = 1_000_000
_LATEST_MS = (2**63 - 1) // _MS


def _times(rows: Sequence[Message]) -> Column:
    ms = np.fromiter(map(itemgetter(1), map(Message.timestamp, rows)), np.int64, len(rows))
    # The client's -1 stands for "none" only together with its type; a producer may set a time before 1970. And int64 ends in 2262.
    if len(ms) and (ms.min() < 0 or ms.max() > _LATEST_MS):
        return [_time(m) for m in rows]
    return ms * _MS


def _time(message: Message) -> int | None:
    kind, ms = message.timestamp()
    return ms * _MS if kind and ms != -1 else None


class KafkaCodec:
    """Rows of one topic. `id` is "partition:offset"."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._getters: dict[str, Callable[[Message], Any]] = {
            "partition": Message.partition,
            "offset": Message.offset,
            "key": Message.key,
            "data": Message.value,
            "attributes": Message.headers,
        }

    def columns(self, rows: Sequence[Any], want: frozenset[str]) -> Mapping[str, Column]:
        made: dict[str, Column] = {name: list(map(get, rows)) for name, get in self._getters.items() if name in want}
        if "publish_time_ns" in want:
            made["publish_time_ns"] = _times(rows)
        return made | {name: value for name, value in (("topic", self._topic), ("delivery_count", None)) if name in want}

    def envelope(self, row: Message) -> Envelope:
        partition, offset = row.partition(), row.offset()
        assert partition is not None  # noqa: S101 - only an error has none
        assert offset is not None  # noqa: S101 - only an error has none
        return Envelope(
            topic=self._topic,
            partition=partition,
            position=(offset,),
            id=f"{partition}:{offset}",
            key=row.key(),
            data=row.value(),
            attributes=[Attribute(*header) for header in row.headers() or ()],
            publish_time_ns=_time(row),
            time_is="server" if row.timestamp()[0] == TIMESTAMP_LOG_APPEND_TIME else "producer",
            delivery_count=None,
            native=row,
        )

    def places(self, rows: Sequence[Any]) -> Sequence[tuple[int, Position]]:
        return [(m.partition(), (m.offset(),)) for m in rows]

    def size(self, row: Message) -> int:
        key = row.key()
        return len(row) + (len(key) if key else 0)
