"""Writing: one producer per connection, a delivery report per row, and no row past a failed one of its key."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from broker_nb.backends.driver import NO_PARTITION, Host, Lane, Outbound, SendResult, Sent
from broker_nb.backends.kafka.client import Settings, failure, kind_of, text_flaw
from broker_nb.errors import BrokerError, ErrorKind

_OURS = {
    "linger.ms": 5,
    "message.timeout.ms": 30_000,  # a person waits; the client's own is 5 min
    "partitioner": "murmur2_random",  # the Java clients' choice: equal keys go where theirs go
    "message.max.bytes": 1_000_000_000,  # the topic's own limit decides
    "queue.buffering.max.messages": 500_000,
    "topic.metadata.propagation.max.ms": 5_000,  # how long a topic that was not found is waited for
}
BATCH = 1_000_000  # the client's own batch.size; smaller for topics that take less
_RECORD = 70  # bytes that Kafka adds to a lone row, at least
_SERVE = 1000  # rows between two looks at delivery reports
_UNSURE = frozenset({ErrorKind.TIMEOUT, ErrorKind.UNREACHABLE, ErrorKind.FENCED, ErrorKind.TRANSIENT, ErrorKind.UNKNOWN})
_ROW_ONLY = frozenset({ErrorKind.TOO_LARGE, ErrorKind.INVALID})  # the next row may do better
_TEXT_OR_BYTES = ("", "str", "bytes")
_ACCEPTED = Sent.ACCEPTED  # looking up a member costs as much as the rest of a delivery report
_BYTES = (bytes, type(None))
_name_flaw = lru_cache(1024)(text_flaw)  # the same few names in every row


class _Sending:
    """Rows on their way, and what became of them."""

    def __init__(self, topic: str, rows: Sequence[Outbound], host: Host) -> None:
        self.topic, self.rows, self._host = topic, rows, host
        self.results: list[SendResult | None] = [None] * len(rows)
        self.again: list[int] = []  # taken back from the client's queue, not sent
        self.failed = False  # in this round
        self.broken: set[bytes] = set()  # keys with a row that is not stored
        self.halt: BrokerError | None = None  # why nothing more is tried

    def report(self, i: int, error: KafkaError | None, message: Message) -> None:
        """The client's delivery report for row i."""
        if error is None:
            partition, offset = message.partition(), message.offset()
            if offset is not None and partition is not None and offset >= 0:
                self.results[i] = SendResult(_ACCEPTED, f"{partition}:{offset}", partition, (offset,))
            else:
                self.results[i] = SendResult(_ACCEPTED)  # stored by an earlier try, whose answer was lost
        elif error.code() == KafkaError._PURGE_QUEUE:
            self.again.append(i)
        else:
            self.fail(i, error)

    def fail(self, i: int, error: KafkaError) -> None:
        """Row i is not stored, or nobody knows."""
        kind, cause = kind_of(error), failure(self._host, self.topic, error)
        self.results[i] = SendResult(Sent.UNKNOWN if kind in _UNSURE else Sent.REFUSED, error=cause)
        self.failed = True
        if (key := self.rows[i].key) is not None:
            self.broken.add(key)
        if kind not in _ROW_ONLY:
            self.halt = self.halt or cause

    def refuse_some(self, indices: Iterable[int]) -> list[int]:
        """Give those their result that must not be sent any more; the others."""
        rest = []
        for i in indices:
            if self.halt is not None:
                self.results[i] = SendResult(Sent.REFUSED, error=self.halt)
            elif self.rows[i].key in self.broken:
                text = f"{self.topic}: an earlier row of key {self.rows[i].key!r} is not stored, so this one was not sent; send both again"
                self.results[i] = SendResult(Sent.REFUSED, error=self._host.error(ErrorKind.CONFLICT, self.topic, text))
            else:
                rest.append(i)
        return rest


class Writer:
    """A producer with its lane, shared by the senders of a connection; sends follow one another."""

    def __init__(self, settings: Settings, host: Host, lane: Lane, batch: int, native: Mapping[str, Any]) -> None:
        forced = {"enable.idempotence": True, "acks": "all"}
        self._config = settings.config(_OURS | {"batch.size": batch}, forced, native)
        compression = self._config.get("compression.codec", self._config.get("compression.type", "none"))
        self.compresses = compression != "none"
        self._host, self._lane, self._settings = host, lane, settings
        self._producer: Producer | None = None
        self._fatal = False
        self._closed = False  # set by another thread

    async def send(self, topic: str, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        """Send, and wait for every row's fate."""
        sending = _Sending(topic, rows, self._host)
        try:
            await self._lane.run(self._send, sending)
        except KafkaException as error:
            raise failure(self._host, topic, error) from error
        return [r for r in sending.results if r is not None]

    async def open(self) -> None:
        """Make the client, so that a wrong setting is an error now."""
        try:
            await self._lane.run(self._open)
        except KafkaException as error:
            raise failure(self._host, "kafka", error) from error

    def _open(self) -> Producer:
        if self._producer is None or self._fatal:
            self._producer, self._fatal = Producer(self._config | {"error_cb": self._on_error}), False
        return self._producer

    def _on_error(self, error: KafkaError) -> None:
        self._fatal |= error.fatal()
        self._settings.health.on_error(error)

    def _send(self, sending: _Sending) -> None:
        """On the lane. After a failure, take back what waits in the client, and go on without the rows of failed keys.

        What was already on the wire then is stored if the broker takes it: `check` keeps out what it would not.
        """
        producer = self._open()
        rest: Sequence[int] = range(len(sending.rows))
        while rest:
            sending.failed, sending.again = False, []
            unsent = self._produce(producer, sending, rest)
            while len(producer):  # messages without their report; of this call, as they follow one another
                producer.poll(0.1)
                if sending.failed or self._closed:
                    producer.purge(in_queue=True, in_flight=self._closed, blocking=False)
            if self._closed:
                sending.halt = self._host.error(ErrorKind.CLOSED, sending.topic, f"{sending.topic}: the connection was closed")
            rest = sending.refuse_some([*sorted(sending.again), *unsent])
        if sending.halt is None:
            self._settings.health.on_answer()

    def _produce(self, producer: Producer, sending: _Sending, todo: Sequence[int]) -> Sequence[int]:
        """Hand rows to the client until a delivery report, which only `poll` brings, tells of a failure; what was not handed over."""
        topic, rows, produce, report = sending.topic, sending.rows, producer.produce, sending.report
        for n, i in enumerate(todo):
            if n % _SERVE == 0 and self._must_stop(producer, sending, 0):
                return todo[n:]
            data, key, attributes, partition, time_ns, _, _ = rows[i]
            headers: list[tuple[str, str | bytes | None]] | None = [(a[0], a[1]) for a in attributes] if attributes else None
            stamp = 0 if time_ns is None else time_ns // 1_000_000
            while True:
                try:
                    produce(topic, data, key, partition, partial(report, i), None, stamp, headers)
                    break
                except BufferError:  # the client's queue is full
                    if not len(producer):
                        sending.fail(i, KafkaError(KafkaError.MSG_SIZE_TOO_LARGE, "larger than the client's queue"))
                        return todo[n + 1 :]
                    if self._must_stop(producer, sending, 0.05):
                        return todo[n:]
                except KafkaException as error:
                    sending.fail(i, error.args[0])
                    return todo[n + 1 :]
        return []

    def _must_stop(self, producer: Producer, sending: _Sending, wait: float) -> bool:
        producer.poll(wait)
        return sending.failed or self._closed

    async def close(self) -> None:
        """Wait for nothing: every send was answered, or is cut off now as unknown."""
        if not self._closed:
            self._closed = True
            self._lane.close()


class KafkaSender:
    """Writes to one topic."""

    def __init__(self, topic: str, partitions: Sequence[int], settings: Mapping[str, str], writer: Writer, host: Host) -> None:
        self._topic, self._partitions, self._writer, self._host = topic, frozenset(partitions), writer, host
        compressed = settings.get("compression.type", "producer") != "producer" or writer.compresses
        limit = settings.get("max.message.bytes")
        self._limit = int(limit) if limit and not compressed else None
        self._needs_key = "compact" in settings.get("cleanup.policy", "")
        ahead = settings.get("message.timestamp.after.max.ms")
        self._ahead_ms = int(ahead) if ahead and settings.get("message.timestamp.type") == "CreateTime" else None
        self._closed = False

    def check(self, row: Outbound) -> str | None:
        # Kafka refuses a whole batch for one such row, and the client crashes on some: so nothing of it gets there.
        data, key, attributes, partition, time_ns, _, native = row
        if type(data) not in _BYTES or type(key) not in _BYTES:
            what, value = ("key", key) if type(data) in _BYTES else ("data", data)
            return f"{what} must be bytes or None, not {type(value).__name__}; encode it first"
        size = (len(data) if data else 0) + (len(key) if key else 0)
        for name, content, type_ in attributes:
            if type_ not in _TEXT_OR_BYTES:
                return f"attribute {name!r} is of type {type_}; Kafka headers are text or bytes: make it a str first"
            if flaw := _name_flaw(name):
                return f"attribute {name!r} {flaw} in its name; Kafka header names are UTF-8 text without it"
            size += len(name) + (len(content) if content else 0)
        if self._limit is not None and size + _RECORD > self._limit:
            return f"{size} bytes are too large: {self._topic} takes messages up to {self._limit} bytes (max.message.bytes)"
        if partition != NO_PARTITION and partition not in self._partitions:
            return f"{self._topic} has no partition {partition}; there are 0..{len(self._partitions) - 1}"
        if key is None and self._needs_key:
            return f"{self._topic} is compacted: every message needs a key"
        if time_ns is not None and (why := self._bad_time(time_ns)):
            return why
        if native:
            return f"Kafka has no option {next(iter(native))!r} for a message; leave it out"
        return None

    def _bad_time(self, time_ns: int) -> str | None:
        if time_ns < 1_000_000:
            return "the time is 1970-01-01 or before, which the client cannot send; leave it out"
        if self._ahead_ms is not None and time_ns / 1e6 > time.time() * 1000 + self._ahead_ms:
            return (
                f"the time is in the future, more than {self._topic} takes ({self._ahead_ms} ms, message.timestamp.after.max.ms)"
            )
        return None

    async def send(self, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        if self._closed:
            raise self._host.error(ErrorKind.CLOSED, self._topic, f"{self._topic}: this sender is closed; open a new one")
        return await self._writer.send(self._topic, rows)

    async def close(self) -> None:
        self._closed = True
