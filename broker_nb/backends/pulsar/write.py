"""Writing: asynchronous sends with a callback per row, and no row past a failed one of its key."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import pulsar

from broker_nb.backends.driver import NO_PARTITION, Host, Lane, Outbound, SendResult, Sent
from broker_nb.backends.pulsar.codec import id_of, place_of
from broker_nb.backends.pulsar.errors import failure, invalid, kind_of, options_of
from broker_nb.errors import BrokerError, ErrorKind

log = logging.getLogger("broker_nb")
_AHEAD = 10_000  # rows on their way at once: few enough that not much follows a failed one
_OVERHEAD = 256  # bytes that Pulsar adds to a lone row, about
_UNSURE = frozenset({ErrorKind.TIMEOUT, ErrorKind.UNREACHABLE, ErrorKind.TRANSIENT, ErrorKind.CLOSED, ErrorKind.UNKNOWN})
_ROW_ONLY = frozenset({ErrorKind.TOO_LARGE, ErrorKind.INVALID})  # the next row may do better
_BYTES = (bytes, type(None))
_TEXT = ("", "str", "bytes")
_OF_ROW = {
    "ordering_key": str,
    "deliver_at": int,
    "deliver_after": timedelta,
    "replication_clusters": list,
    "disable_replication": bool,
}
_OPTIONS = frozenset(
    {
        "compression_type",
        "send_timeout_millis",
        "batching_enabled",
        "batching_max_messages",
        "batching_max_allowed_size_in_bytes",
        "batching_max_publish_delay_ms",
        "batching_type",
        "chunking_enabled",
        "message_routing_mode",
        "properties",
        "encryption_key",
        "crypto_key_reader",
    }
)
_OURS: dict[str, Any] = {
    "send_timeout_millis": 20_000,
    "batching_enabled": True,
    "batching_max_publish_delay_ms": 5,
    "block_if_queue_full": True,
    "max_pending_messages": 2 * _AHEAD,
}


def text_flaw(value: bytes) -> str | None:
    """Why bytes cannot go where Pulsar has text."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return "is not UTF-8 text, which is all that the client can send there"
    return None


class _Sending:
    """Rows on their way, and what became of them. Reports come on a thread of the client."""

    def __init__(self, topic: str, rows: Sequence[Outbound], host: Host, *, parted: bool) -> None:
        self.topic, self.rows, self._host = topic, rows, host
        self.parted = parted
        self.stored: list[Any] = [None] * len(rows)  # the broker's id of each row
        self.failed: dict[int, SendResult] = {}
        self.broken: set[bytes] = set()  # keys with a row that is not stored
        self.halt: BrokerError | None = None  # why nothing more is tried
        self._on_way = 0
        self._news = threading.Condition()

    def report(self, i: int, result: Any, message_id: Any) -> None:
        """The client's word about row i; its thread does as little as it can."""
        with self._news:
            if int(result) == 0:
                self.stored[i] = message_id
            else:
                self.fail(i, failure(self._host, self.topic, result.name), kind_of(result.name))
            self._on_way -= 1
            if self._on_way in (0, _AHEAD // 2):  # else one thread would wake the other for every row
                self._news.notify_all()

    def fates(self) -> list[SendResult]:
        """What became of each row, once all have their report."""
        return [self.failed[i] if at is None else self._stored(at, i) for i, at in enumerate(self.stored)]

    def _stored(self, message_id: Any, i: int) -> SendResult:
        if message_id.ledger_id() < 0:  # the broker's way to say that it had it
            return SendResult(Sent.DUPLICATE)
        named = self.rows[i].partition if self.parted else NO_PARTITION
        # The producer of one partition does not know which.
        number = message_id.partition() if named == NO_PARTITION else named
        return SendResult(Sent.ACCEPTED, id_of(message_id, number), max(number, 0), place_of(message_id))

    def fail(self, i: int, cause: BrokerError, kind: ErrorKind) -> None:
        """Row i is not stored, or nobody knows."""
        self.failed[i] = SendResult(Sent.UNKNOWN if kind in _UNSURE else Sent.REFUSED, error=cause)
        if (key := self.rows[i].key) is not None:
            self.broken.add(key)
        if kind not in _ROW_ONLY:
            self.halt = self.halt or cause

    def may_send(self, i: int) -> bool:
        """Count row i as under way, once there is room; False where it must not be sent any more, and has its result."""
        with self._news:
            if self._on_way >= _AHEAD:
                self._news.wait_for(lambda: self._on_way <= _AHEAD // 2 or self.halt is not None)
            if self.halt is not None:
                self.failed[i] = SendResult(Sent.REFUSED, error=self.halt)
            elif self.rows[i].key in self.broken:
                text = f"{self.topic}: an earlier row of key {self.rows[i].key!r} is not stored, so this one was not sent; send both again"
                self.failed[i] = SendResult(Sent.REFUSED, error=self._host.error(ErrorKind.CONFLICT, self.topic, text))
            else:
                self._on_way += 1
                return True
            return False

    def not_sent(self, i: int, cause: BrokerError, kind: ErrorKind) -> None:
        """Row i did not get to the client."""
        with self._news:
            self._on_way -= 1
            self.fail(i, cause, kind)

    def wait(self) -> None:
        """Until every row has its report; the client gives one at the latest when its send time-out is over."""
        with self._news:
            self._news.wait_for(lambda: self._on_way == 0)


class PulsarSender:
    """Writes to one topic: a producer for rows of any partition, one for each partition that is named, one for each run."""

    def __init__(
        self,
        host: Host,
        client: pulsar.Client,
        lane: Lane,
        topic: str,
        partitions: Mapping[int, str],
        limit: tuple[int, bool],
        native: Mapping[str, Any],
    ) -> None:
        self._host, self._client, self._lane = host, client, lane
        self._topic, self._partitions = topic, partitions
        self._limit, self._own_limit = limit
        self._native = options_of(host, topic, dict(native), _OPTIONS, "publishing")
        self._producers: dict[tuple[str, str], pulsar.Producer] = {}
        self.closed = False

    async def open(self) -> None:
        """Make the producer, so that what is wrong is an error now. The topic is there."""
        try:
            await self._lane.run(self._producer, self._topic, "")
        except pulsar.PulsarException as error:
            self._lane.close()
            raise failure(self._host, self._topic, error) from error
        except (TypeError, ValueError) as error:
            self._lane.close()
            raise self._host.error(ErrorKind.INVALID, self._topic, f"{self._topic}: {error}") from error

    def _producer(self, topic: str, run: str) -> pulsar.Producer:
        known = self._producers.get((topic, run))
        if known is None:
            settings = _OURS | self._native
            if self._own_limit:  # the broker closes the connection on a batch beyond it, again and again
                most = settings.get("batching_max_allowed_size_in_bytes", 128 * 1024)
                settings["batching_max_allowed_size_in_bytes"] = max(1, min(most, self._limit - _OVERHEAD))
            if run:
                # Of a batch that it knows in part, the broker drops all.
                settings |= {"producer_name": run, "batching_enabled": False}
            known = self._producers[topic, run] = self._client.create_producer(topic, **settings)
        return known

    def check(self, row: Outbound) -> str | None:
        data, key, attributes, partition, time_ns, _, native = row
        if type(data) not in _BYTES:
            return f"data must be bytes or None, not {type(data).__name__}; encode it first"
        if key is not None:
            if type(key) is not bytes:
                return f"key must be bytes or None, not {type(key).__name__}; encode it first"
            if not key:
                return "Pulsar has no empty key; leave the key out"
            if flaw := text_flaw(key):
                return f"the key {flaw}"
        size = (len(data) if data else 0) + (len(key) if key else 0)
        names = set()
        for name, content, type_ in attributes:
            if type_ not in _TEXT:
                return f"attribute {name!r} is of type {type_}; Pulsar's properties are text: make it a str first"
            if content is None:
                return f"attribute {name!r} is null; Pulsar's properties are text: leave it out, or make it empty"
            if flaw := text_flaw(content):
                return f"attribute {name!r} {flaw}"
            if name in names:
                return f"attribute {name!r} is given twice; Pulsar keeps one of each name"
            names.add(name)
            size += len(name) + len(content)
        if size + (_OVERHEAD if self._own_limit else 0) > self._limit and not self._native.get("chunking_enabled"):
            return f"{size} bytes are too large: {self._topic} takes messages up to {self._limit} bytes (maxMessageSize)"
        if partition != NO_PARTITION and partition not in self._partitions:
            return f"{self._topic} has no partition {partition}; there are 0..{len(self._partitions) - 1}"
        if time_ns is not None and time_ns < 1_000_000:
            return "the time is 1970-01-01 or before, which the client cannot send; leave it out"
        return self._flaw_of_options(native or {})

    @staticmethod
    def _flaw_of_options(native: Mapping[str, Any]) -> str | None:
        for name, value in native.items():
            if name not in _OF_ROW:
                return f"Pulsar has no option {name!r} for a message; there are: {', '.join(_OF_ROW)}"
            if not isinstance(value, _OF_ROW[name]):
                return f"option {name} must be {_OF_ROW[name].__name__}, not {type(value).__name__}"
        return None

    async def send(self, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        if self.closed:
            raise self._host.error(ErrorKind.CLOSED, self._topic, f"{self._topic}: this sender is closed; open a new one")
        sending = _Sending(self._topic, rows, self._host, parted=self._partitions.get(0) != self._topic)
        await self._lane.run(self._send, sending)
        return await self._lane.run(sending.fates)

    def _send(self, sending: _Sending) -> None:
        """On the lane."""
        for i, row in enumerate(sending.rows):
            if sending.may_send(i):
                try:
                    self._hand_over(i, row, sending)
                except pulsar.PulsarException as error:
                    sending.not_sent(i, failure(self._host, self._topic, error), kind_of(type(error).__name__))
                except (LookupError, TypeError, ValueError) as error:  # by a caller that did not ask `check` first
                    flaw = self.check(row) or str(error)
                    sending.not_sent(i, invalid(self._host, self._topic, flaw), ErrorKind.INVALID)
        sending.wait()

    def _hand_over(self, i: int, row: Outbound, sending: _Sending) -> None:
        data, key, attributes, partition, time_ns, dedupe, native = row
        topic = self._topic if partition == NO_PARTITION else self._partitions[partition]
        self._producer(topic, dedupe.run if dedupe else "").send_async(
            data,
            partial(sending.report, i),
            properties={name: (content or b"").decode() for name, content, _ in attributes} or None,
            partition_key=key.decode() if key else None,
            sequence_id=dedupe.seq if dedupe else None,
            event_timestamp=time_ns // 1_000_000 if time_ns is not None else None,
            **(native or {}),
        )

    async def close(self) -> None:
        """Every send was answered. Idempotent."""
        if not self.closed:
            self.closed = True
            await self._lane.run(self._shut)
            self._lane.close()

    def _shut(self) -> None:
        for producer in self._producers.values():
            try:
                producer.close()
            except pulsar.PulsarException as error:
                log.warning("%s: closing a producer: %s", self._topic, error)
