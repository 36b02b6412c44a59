"""Writing: requests of many rows, one after the other for each key, and a result per row.

The client's own publisher batches on threads, and pauses a key that failed until it is told to resume it. Here the rows of a send are
all known, so requests are made of them directly: nothing is left paused, and the next send of a key goes on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError
from google.pubsub_v1.types import PublishRequest

from broker_nb.backends.driver import NO_PARTITION, Outbound, SendResult, Sent
from broker_nb.backends.pubsub.catalogue import MAX_BYTES
from broker_nb.backends.pubsub.client import Clients, failure, kind_of, was_not_sent
from broker_nb.errors import BrokerError, ErrorKind

ROWS, BYTES = 1000, 1_000_000
"""Of one request: the most that the service takes, and what the client's own batches hold."""
_LANES = 8  # requests under way, which share the line
_REFUSALS = 100  # single rows that the service may refuse before a send ends
_SLOW_LINE = 125_000  # bytes per second that it has at least
_ROW_ONLY = frozenset({ErrorKind.INVALID, ErrorKind.TOO_LARGE})  # the service refuses the whole request for one such row
_UNSURE = frozenset({ErrorKind.TIMEOUT, ErrorKind.TRANSIENT, ErrorKind.UNKNOWN})
_BYTES = (bytes, type(None))
_MAX_NAME, _MAX_VALUE, _MAX_ATTRIBUTES, _MAX_KEY = 256, 1024, 100, 1024
_ROW_BYTES = 40  # that a row and each of its attributes take beside their content, at most


class _Sending:
    """Rows on their way, and what became of them."""

    def __init__(self, rows: Sequence[Outbound]) -> None:
        self.rows = rows
        self.results: list[SendResult | None] = [None] * len(rows)
        self.refused = 0  # by the service, each in a request of its own
        self.halt: BrokerError | None = None  # why nothing more is tried

    def end(self, rows: Sequence[int], state: Sent, cause: BrokerError) -> None:
        """These rows failed for a reason that is not theirs: nothing more is tried."""
        for i in rows:
            self.results[i] = SendResult(state, error=cause)
        self.halt = self.halt or cause

    def chains(self) -> deque[list[int]]:
        """What must follow each other: the rows of a key; of those without, handfuls."""
        by_key: dict[bytes, list[int]] = {}
        free: list[int] = []
        for i, row in enumerate(self.rows):
            (free if row.key is None else by_key.setdefault(row.key, [])).append(i)
        return deque([*by_key.values(), *(free[at : at + ROWS] for at in range(0, len(free), ROWS))])


class PubsubSender:
    """Writes to one topic."""

    def __init__(self, clients: Clients, path: str, topic: str, native: Mapping[str, Any]) -> None:
        if native:
            text = f"{topic}: Pub/Sub has no option {next(iter(native))!r} for publishing; leave it out"
            raise clients.host.error(ErrorKind.INVALID, topic, text)
        self._clients, self._path, self._topic = clients, path, topic
        self._closed = False

    def check(self, row: Outbound) -> str | None:
        data, key, attributes, partition, time_ns, _, native = row
        if type(data) not in _BYTES or type(key) not in _BYTES:
            what, value = ("key", key) if type(data) in _BYTES else ("data", data)
            return f"{what} must be bytes, not {type(value).__name__}; encode it first"
        if data is None:
            return "Pub/Sub has no null body; send an empty one, with an attribute"
        if key is not None and (why := _bad_key(key)):
            return why
        size, names = len(data) + len(key or b"") + _ROW_BYTES, set()
        for name, content, type_ in attributes:
            if (why := _bad_attribute(name, content, type_)) is not None:
                return why
            names.add(name)
            size += len(name) * 4 + len(content or b"") + _ROW_BYTES
        if len(names) < len(attributes):
            return "an attribute name comes twice; Pub/Sub keeps one value per name"
        if len(names) > _MAX_ATTRIBUTES:
            return f"{len(names)} attributes are more than the {_MAX_ATTRIBUTES} that Pub/Sub takes"
        if not data and not names:
            return "it has neither body nor attributes, and Pub/Sub takes no empty message"
        if size > MAX_BYTES:
            return f"{size} bytes are too large: Pub/Sub takes messages up to {MAX_BYTES} bytes"
        if partition != NO_PARTITION:
            return f"{self._topic} has no partition {partition}: Pub/Sub has none; use a key"
        if time_ns is not None:
            return "Pub/Sub sets the time itself; leave it out"
        return f"Pub/Sub has no option {next(iter(native))!r} for a message; leave it out" if native else None

    async def send(self, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        if self._closed or self._clients.closed:
            raise self._clients.host.error(ErrorKind.CLOSED, self._topic, f"{self._topic}: this sender is closed; open a new one")
        sending = _Sending(rows)
        chains = sending.chains()

        async def work() -> None:
            while chains:
                await self._send_chain(sending, chains.popleft())

        await asyncio.gather(*(work() for _ in range(min(_LANES, len(chains)))))
        return [result for result in sending.results if result is not None]

    async def _send_chain(self, sending: _Sending, chain: Sequence[int], most: int = ROWS) -> None:
        """Rows of one key in order, or some without a key, at most so many at once; after one of a key that is not stored, no other."""
        at = 0
        while at < len(chain):
            if sending.halt is not None or (at and self._broken(sending, chain[at - 1], chain[at])):
                sending.results[chain[at]] = self._held_back(sending, chain[at])
                at += 1
                continue
            some, request, size = self._pack(sending, chain[at : at + most])
            if some:
                await self._publish(sending, some, request, size)
                at += len(some)
            else:
                at += 1  # refused without being sent

    def _broken(self, sending: _Sending, before: int, row: int) -> bool:
        result = sending.results[before]
        return sending.rows[row].key is not None and (result is None or result.state is not Sent.ACCEPTED)

    def _held_back(self, sending: _Sending, row: int) -> SendResult:
        key = sending.rows[row].key
        text = f"{self._topic}: an earlier row of key {key!r} is not stored, so this one was not sent; send both again"
        return SendResult(Sent.REFUSED, error=sending.halt or self._clients.host.error(ErrorKind.CONFLICT, self._topic, text))

    def _pack(self, sending: _Sending, chain: Sequence[int]) -> tuple[Sequence[int], Any, int]:
        """As many rows as make a request; none, with its result, when the first can never be sent."""
        request = PublishRequest.pb(PublishRequest(topic=self._path))
        size = count = 0
        for i in chain:
            data, key, attributes, *_ = row = sending.rows[i]
            if (why := self.check(row)) is not None:
                if not count:
                    error = self._clients.host.error(ErrorKind.INVALID, self._topic, f"{self._topic}: {why}")
                    sending.results[i] = SendResult(Sent.REFUSED, error=error)
                break
            length = len(data or b"") + sum(len(a[0]) + len(a[1] or b"") + _ROW_BYTES for a in attributes)
            if count and size + length > BYTES:
                break
            texts = {a[0]: (a[1] or b"").decode() for a in attributes}
            request.messages.add(data=data, attributes=texts, ordering_key=key.decode() if key else "")
            size, count = size + length, count + 1
        return chain[:count], request, size

    async def _publish(self, sending: _Sending, some: Sequence[int], request: Any, size: int) -> None:
        timeout = 2 * self._clients.timeout + _LANES * size / _SLOW_LINE
        try:
            call = self._clients.publisher.publish(PublishRequest.wrap(request), retry=None, timeout=timeout)
        except BrokerError as error:  # the connection was closed meanwhile
            sending.end(some, Sent.REFUSED, error)
            return
        try:
            answer = await self._clients.run(call)
        except BrokerError as error:  # closed while it was under way
            sending.end(some, Sent.UNKNOWN, error)
        except (GoogleAPICallError, GoogleAuthError) as error:
            await self._failed(sending, some, error)
        else:
            for i, message_id in zip(some, answer.message_ids, strict=True):
                sending.results[i] = SendResult(Sent.ACCEPTED, message_id)

    async def _failed(self, sending: _Sending, some: Sequence[int], error: GoogleAPICallError | GoogleAuthError) -> None:
        kind, cause = kind_of(error), failure(self._clients.host, self._topic, error)
        if kind in _ROW_ONLY and len(some) > 1:  # nothing of it is stored: the rows apart, so that only the bad one is refused
            await self._send_chain(sending, some, (len(some) + 1) // 2)
            return
        unsure = kind in _UNSURE and not (isinstance(error, GoogleAPICallError) and was_not_sent(error))
        if kind in _ROW_ONLY:
            sending.results[some[0]] = SendResult(Sent.REFUSED, error=cause)
            sending.refused += 1
            if sending.refused >= _REFUSALS:  # it is not about single rows
                text = f"{self._topic}: {sending.refused} messages were refused, the last: {cause}; nothing more was tried"
                sending.halt = sending.halt or self._clients.host.error(kind, self._topic, text)
        else:
            sending.end(some, Sent.UNKNOWN if unsure else Sent.REFUSED, cause)

    async def close(self) -> None:
        self._closed = True


def _bad_key(key: bytes) -> str | None:
    if not key:
        return "an empty key is no key on Pub/Sub; leave it out"
    if len(key) > _MAX_KEY:
        return f"a key of {len(key)} bytes is too long: Pub/Sub takes up to {_MAX_KEY}"
    return None if _is_text(key) else f"key {key!r} is not UTF-8, and Pub/Sub's ordering keys are text"


def _bad_attribute(name: str, content: bytes | None, type_: str) -> str | None:
    if content is None:
        return f"attribute {name!r} is null, and Pub/Sub has only text; leave it out"
    if type_ not in ("", "str", "bytes"):
        return f"attribute {name!r} is of type {type_}; Pub/Sub attributes are text: make it a str first"
    if not _is_text(content) or not _is_text(name.encode("utf-8", "surrogatepass")):
        return f"attribute {name!r} is not UTF-8, and Pub/Sub attributes are text"
    if len(name) > _MAX_NAME or len(content) > _MAX_VALUE:
        return f"attribute {name[:40]!r} is too long: Pub/Sub takes names of {_MAX_NAME} and values of {_MAX_VALUE} bytes"
    return None


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
