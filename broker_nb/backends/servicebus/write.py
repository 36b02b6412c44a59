"""Writing: batches split by the broker's size, a result per row, and no row past a failed one of its key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from azure.servicebus import ServiceBusMessage, ServiceBusMessageBatch
from azure.servicebus import exceptions as client_errors
from azure.servicebus.aio import ServiceBusSender as ClientSender

from broker_nb.backends.driver import NO_PARTITION, Facts, Outbound, SendResult, Sent
from broker_nb.backends.servicebus.client import Settings, Worker
from broker_nb.backends.servicebus.codec import LONGEST_KEY, native
from broker_nb.errors import BrokerError, ErrorKind

OPTIONS: dict[str, type | tuple[type, ...]] = {
    "session_id": str,
    "partition_key": str,
    "message_id": str,
    "scheduled_enqueue_time_utc": datetime,
    "time_to_live": timedelta,
    "content_type": str,
    "correlation_id": str,
    "subject": str,
    "to": str,
    "reply_to": str,
    "reply_to_session_id": str,
}
"""What a row may say besides, by the client's own names."""
_UNSURE = frozenset({ErrorKind.TIMEOUT, ErrorKind.UNREACHABLE, ErrorKind.TRANSIENT, ErrorKind.UNKNOWN})
_ROW_ONLY = frozenset({ErrorKind.TOO_LARGE, ErrorKind.INVALID, ErrorKind.UNSUPPORTED})  # the next row may do better


class Writer:
    """The client's sender to one entity, shared by the connection's senders: each would take a connection, and a second to close."""

    def __init__(self, name: str, settings: Settings, worker: Worker, options: Mapping[str, Any]) -> None:
        self.name, self._settings, self._worker = name, settings, worker
        self._client: ClientSender = settings.sender(name, **options)

    async def open(self) -> None:
        """Attach to the entity, so that what is wrong with it is an error now."""
        await self._worker.run(self.name, self._client.__aenter__)
        self._worker.idle(10.0)

    async def send(self, sending: _Sending) -> None:
        """Send everything that can be sent."""
        for rows in sending.rounds():
            await self._worker.run(self.name, lambda rows=rows: self._send(sending, rows), 3600)  # type: ignore[misc] # bound now

    async def _send(self, sending: _Sending, indices: Sequence[int]) -> None:
        """One batch after the other; a message that does not fit into an empty one goes alone."""
        await self._client.__aenter__()  # opens it again where its connection was lost
        left, limit = list(indices), None  # the client's own
        while left := sending.refuse_some(left):
            batch = await self._client.create_message_batch(max_size_in_bytes=limit)
            taken: list[int] = []
            for i in left:
                try:
                    batch.add_message(sending.message(i))
                except client_errors.MessageSizeExceededError:
                    break
                taken.append(i)
            if not taken:
                taken = left[:1]
            if await self._attempt(sending, batch if len(batch) else sending.message(taken[0]), taken):
                left = left[len(taken) :]
            else:
                limit = batch.size_in_bytes // 2

    async def _attempt(self, sending: _Sending, what: ServiceBusMessageBatch | ServiceBusMessage, indices: Sequence[int]) -> bool:
        """Send, and note what became of it; False where a batch was too large for the broker and nothing of it is stored."""
        try:
            await self._client.send_messages(what, timeout=self._settings.timeout)
        except (client_errors.ServiceBusError, OSError, ValueError, TypeError) as error:
            if isinstance(error, client_errors.MessageSizeExceededError) and len(indices) > 1:
                return False
            sending.fail(indices, self._settings.failure(self.name, error))
        else:
            sending.accept(indices)
        return True

    async def close(self) -> None:
        """Close the client's sender."""
        await self._worker.close(self._client.close)


class _Sending:
    """Rows on their way, and what became of them."""

    def __init__(
        self,
        name: str,
        rows: Sequence[Outbound],
        bad: Mapping[int, str],
        settings: Settings,
        *,
        sessions: bool,
        partitioned: bool,
    ) -> None:
        self._name, self._rows, self._bad, self._settings = name, rows, bad, settings
        self._sessions, self._partitioned = sessions, partitioned
        self.results: list[SendResult | None] = [None] * len(rows)
        self._broken: set[bytes] = set()
        self._halt: BrokerError | None = None

    def rounds(self) -> Iterator[list[int]]:
        """Indices of rows that may share batches: all of them, or in a partitioned entity those of one key."""
        todo = [i for i, result in enumerate(self.results) if result is None]
        if not self._partitioned:
            if todo:
                yield todo
            return
        by_key: dict[object, list[int]] = {}
        for i in todo:
            row = self._rows[i]
            by_key.setdefault(
                (row.key, (row.native or {}).get("session_id"), (row.native or {}).get("partition_key")), []
            ).append(i)
        yield from by_key.values()

    def message(self, i: int) -> ServiceBusMessage:
        """Row i as the client's."""
        row = self._rows[i]
        given = dict(row.native or {})
        if row.key is not None:
            given.setdefault("session_id" if self._sessions else "partition_key", row.key.decode())
        if row.dedupe is not None:
            given.setdefault("message_id", row.dedupe.text)
        properties: dict[Any, Any] = {a.name: native(a) for a in row.attributes}
        return ServiceBusMessage(row.data, application_properties=properties or None, **given)

    def accept(self, indices: Sequence[int]) -> None:
        """Rows that the broker stored."""
        for i in indices:
            self.results[i] = SendResult(Sent.ACCEPTED)  # without an id: the broker does not tell a sender sequence numbers

    def fail(self, indices: Sequence[int], error: BrokerError) -> None:
        """Rows that are not stored, or nobody knows."""
        state = Sent.UNKNOWN if error.kind in _UNSURE else Sent.REFUSED
        for i in indices:
            self.results[i] = SendResult(state, error=error)
            if (key := self._rows[i].key) is not None:
                self._broken.add(key)
        if error.kind not in _ROW_ONLY:
            self._halt = self._halt or error

    def refuse_some(self, indices: Sequence[int]) -> list[int]:
        """Give those their result that must not be sent any more; the others."""
        rest = []
        for i in indices:
            if self._halt is not None:
                self.results[i] = SendResult(Sent.REFUSED, error=self._halt)
            elif i in self._bad:
                self.fail([i], self._settings.host.error(ErrorKind.INVALID, self._name, f"{self._name}: {self._bad[i]}"))
            elif self._rows[i].key in self._broken:
                text = f"{self._name}: an earlier row of key {self._rows[i].key!r} is not stored, so this one was not sent; send both again"
                self.results[i] = SendResult(Sent.REFUSED, error=self._settings.host.error(ErrorKind.CONFLICT, self._name, text))
            else:
                rest.append(i)
        return rest


class ServiceBusSender:
    """Writes to one queue or topic."""

    def __init__(self, facts: Facts, writer: Writer, settings: Settings) -> None:
        self._facts, self._writer, self._settings = facts, writer, settings
        self._name = writer.name
        self._sessions = bool(facts.details.get("sessions"))
        self._partitioned = len(facts.partitions) > 1 or "administration" in facts.details
        self._closed = False

    def check(self, row: Outbound) -> str | None:
        if type(row.data) is not bytes:
            what = "no body" if row.data is None else f"a body of {type(row.data).__name__}"
            return f"{what}: Service Bus messages have one, in bytes, which may be empty"
        given = row.native or {}
        if (why := self._bad_key(row.key, given)) or (why := self._bad_options(given)):
            return why
        names = set()
        for attribute in row.attributes:
            if attribute.name in names:
                return f"attribute {attribute.name!r} is there twice; Service Bus has one value per name"
            names.add(attribute.name)
            try:
                native(attribute)
                attribute.name.encode()
            except UnicodeError:
                return f"attribute {attribute.name!r} is not UTF-8 text; make it bytes, or text without lone surrogates"
            except (ValueError, OverflowError) as error:
                return f"attribute {attribute.name!r} {error}"
        if self._facts.max_message_bytes is not None and len(row.data) > self._facts.max_message_bytes:
            return f"{len(row.data)} bytes are too large: {self._name} takes messages up to {self._facts.max_message_bytes} bytes"
        if row.partition != NO_PARTITION:
            return f"partition {row.partition}: Service Bus chooses the partition by the key; leave it out"
        if row.time_ns is not None:
            return "Service Bus sets the time itself; leave it out, or schedule by scheduled_enqueue_time_utc"
        return None

    def _bad_key(self, key: bytes | None, given: Mapping[str, Any]) -> str | None:
        if key is None:
            if self._sessions and not given.get("session_id"):
                return f"{self._name} has sessions: every message needs a key, which is its session id"
            return None
        try:
            text = key.decode()
        except UnicodeDecodeError:
            return "the key is not UTF-8 text, which a session id or partition key must be"
        if not 0 < len(text) <= LONGEST_KEY:
            return f"the key has {len(text)} characters; a session id or partition key has 1 to {LONGEST_KEY}, or leave it out"
        return None

    def _bad_options(self, given: Mapping[str, Any]) -> str | None:
        for name, value in given.items():
            if (wanted := OPTIONS.get(name)) is None:
                return f"Service Bus has no option {name!r} for a message; there are: {', '.join(OPTIONS)}"
            if not isinstance(value, wanted):
                return f"option {name} must be a {getattr(wanted, '__name__', wanted)}, not {type(value).__name__}"
        return None

    async def send(self, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        if self._closed:
            raise self._settings.host.error(ErrorKind.CLOSED, self._name, f"{self._name}: this sender is closed; open a new one")
        bad = {i: why for i, row in enumerate(rows) if (why := self.check(row)) is not None}
        sending = _Sending(self._name, rows, bad, self._settings, sessions=self._sessions, partitioned=self._partitioned)
        await self._writer.send(sending)
        return [result for result in sending.results if result is not None]

    async def close(self) -> None:
        self._closed = True
