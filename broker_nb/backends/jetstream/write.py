"""Writing: every row asks for the stream's acknowledgement, many under way at once, and each one's fate is known afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from broker_nb.backends.driver import NO_PARTITION, Outbound, SendResult, Sent
from broker_nb.backends.jetstream.client import Answer, Wire, message
from broker_nb.backends.jetstream.codec import Pair, header_block, header_flaw, value_flaw
from broker_nb.backends.jetstream.errors import Refusal, failure, missing
from broker_nb.errors import BrokerError, ErrorKind

_ROWS, _BYTES = 1000, 32 << 20  # under way at once: the server refuses what it cannot keep waiting (10,000 rows, 128 MB in all)
_TEXT = ("", "str", "bytes")
_MSG_ID = "Nats-Msg-Id"
_FORBIDDEN = {
    "nats-rollup": "it would delete the rows before it",
    "nats-batch-id": "it would hold the row back until a batch is committed",
}
_SINCE = {  # what an older server would store without doing it
    "nats-ttl": ((2, 11, 0), "2.11"),
    "nats-schedule": ((2, 12, 0), "2.12"),
    "nats-incr": ((2, 12, 0), "2.12"),
}


class JetStreamSender:
    """Writes to one subject of one stream."""

    def __init__(self, wire: Wire, name: str, subject: str, config: Mapping[str, Any], key_header: str) -> None:
        self._wire, self._name, self._subject, self._key_header = wire, name, subject, key_header
        self._limit = int(config.get("max_msg_size", -1))
        # A stream that is full refuses one row and may take the next: then rows of one key go one after the other.
        full = any(int(config.get(n, -1)) > 0 for n in ("max_msgs", "max_bytes", "max_msgs_per_subject"))
        self._may_fill = full and config.get("discard") == "new"
        self._names: dict[str, str] = {}  # of attributes -> their flaw: the same few in every row
        self._closed = False

    # -------------------------------------------------------------- checking
    def check(self, row: Outbound) -> str | None:
        return self._flaw(row) or self._size_flaw(header_block(self._pairs(row)), row.data or b"")

    def _flaw(self, row: Outbound) -> str | None:
        data, key, attributes, partition, time_ns, _, native = row
        if type(data) is not bytes:
            return 'data must be bytes: NATS has no null body; make it b"", or leave the row out'
        if partition not in (NO_PARTITION, 0):
            return f"{self._name} has no partition {partition}; a stream has one, 0"
        if time_ns is not None:
            return "the server sets the time; leave it out"
        if native:
            return f"JetStream has no option {next(iter(native))!r} for a message; give a header as an attribute"
        if (flaw := self._key_flaw(key)) is not None:
            return flaw
        for name, content, type_ in attributes:
            if (why := self._attribute_flaw(name, content, type_)) is not None:
                return why
            if key is None and name == self._key_header:
                return f"attribute {name!r} would come back as the key: give it as key, or connect with another key_header"
        return None

    def _size_flaw(self, block: bytes, data: bytes) -> str | None:
        size, limit = len(block) + len(data), self._wire.max_payload
        if 0 <= self._limit < limit:
            limit = self._limit
        if size <= limit:
            return None
        what = "max_msg_size" if limit == self._limit else "the server's max_payload"
        return f"{size} bytes are too large: {self._name} takes messages up to {limit} bytes with their headers ({what})"

    def _key_flaw(self, key: bytes | None) -> str | None:
        if key is None:
            return None
        if type(key) is not bytes:
            return f"key must be bytes or None, not {type(key).__name__}; encode it first"
        if not self._key_header:
            text = 'a connection with key_header="" has the subject as key'
            return None if key == self._subject.encode() else f"{text}, which is {self._subject!r} here; leave the key out"
        flaw = value_flaw(key)
        return f"the key {flaw} (keys are header {self._key_header!r} here)" if flaw else None

    def _attribute_flaw(self, name: str, content: bytes | None, type_: str) -> str | None:
        if type_ not in _TEXT:
            return f"attribute {name!r} is of type {type_}; NATS headers are text: make it a str first"
        if content is None:
            return f"attribute {name!r} is null, which a NATS header cannot be; leave it out or make it empty"
        if (flaw := self._names.get(name)) is None:
            flaw = self._names[name] = self._name_flaw(name)
            if len(self._names) > 1000:
                self._names.clear()
        if flaw or (flaw := value_flaw(content)):
            return f"attribute {name!r} {flaw}"
        return None

    def _name_flaw(self, name: str) -> str:
        """Why there can be no header of that name; "" when there can."""
        low = name.lower()
        if why := _FORBIDDEN.get(low):
            return f"is not sent, because {why}; drop it"
        since = _SINCE.get(low)
        if since is not None and self._wire.version < since[0]:
            return f"needs nats-server {since[1]}; this is {self._wire.server_version}, which would ignore it"
        return header_flaw(name)

    def _pairs(self, row: Outbound) -> list[Pair]:
        pairs: list[Pair] = [(self._key_header, row.key)] if row.key is not None and self._key_header else []
        pairs += [(name, content or b"") for name, content, _ in row.attributes if row.dedupe is None or name != _MSG_ID]
        if row.dedupe is not None:
            pairs.append((_MSG_ID, row.dedupe.text.encode()))
        return pairs

    # -------------------------------------------------------------- sending
    async def send(self, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        if self._closed:
            raise self._error(ErrorKind.CLOSED, f"{self._name}: this sender is closed; open a new one")
        self._wire.check()
        sending = _Sending(self._wire, self._name, self._subject, rows, self._prepare)
        await sending.run()
        return [r for r in sending.results if r is not None]

    def _prepare(self, row: Outbound) -> tuple[bytes, bool]:
        """The header block, and whether the stream may refuse the row and take the next one; raises for one that cannot go."""
        why = self._flaw(row)
        block = b"" if why else header_block(self._pairs(row))
        if (why := why or self._size_flaw(block, row.data or b"")) is not None:
            raise self._error(ErrorKind.INVALID, f"{self._name}: {why}")
        return block, self._may_fill or b"\r\nNats-Expected-" in block

    def _error(self, kind: ErrorKind, text: str) -> BrokerError:
        return self._wire.host.error(kind, self._name, text)

    async def close(self) -> None:
        self._closed = True


def _acknowledgement(data: bytes) -> dict[str, Any] | None:
    """What a stream says about a row; None for what somebody else says, who answers requests on the same subject."""
    try:
        told: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(told, dict) or not isinstance(told.get("stream"), str):
        return None
    return told if isinstance(told.get("error"), dict) or ("error" not in told and isinstance(told.get("seq"), int)) else None


class _Sending:
    """Rows on their way, and what became of them."""

    def __init__(
        self,
        wire: Wire,
        name: str,
        subject: str,
        rows: Sequence[Outbound],
        prepare: Callable[[Outbound], tuple[bytes, bool]],
    ) -> None:
        self._wire, self._name, self._subject, self._rows, self._prepare = wire, name, subject, rows, prepare
        self.results: list[SendResult | None] = [None] * len(rows)
        self._under_way: dict[int, bytes | None] = {}  # row -> its key
        self._bytes = 0
        self._risky: set[bytes] = set()  # keys under way whose next row may only go when the fate of this one is known
        self._broken: set[bytes] = set()  # keys with a row that is not stored
        self._halt: BrokerError | None = None  # why nothing more is tried
        self._news = asyncio.Event()

    async def run(self) -> None:
        """Send every row, and wait for the last answer."""
        inbox = self._wire.inbox(self._take, self._cut, self._subject)
        try:
            commands: list[bytes] = []
            for i, row in enumerate(self._rows):
                if not i % _ROWS:
                    await asyncio.sleep(0)  # the loop is everybody's
                while len(self._under_way) >= _ROWS or self._bytes >= _BYTES or row.key in self._risky:
                    await self._go(commands)
                    await self._progress()
                if not self._held_back(i, row.key):
                    self._add(i, row, inbox.subject, commands)
            await self._go(commands)
            while self._under_way:
                await self._progress()
        finally:
            await self._wire.forget(inbox)

    def _add(self, i: int, row: Outbound, inbox: str, commands: list[bytes]) -> None:
        try:
            headers, risky = self._prepare(row)
        except BrokerError as error:
            self._refuse(i, error)
            return
        self._under_way[i] = row.key
        self._bytes += len(row.data or b"")
        if risky and row.key is not None:
            self._risky.add(row.key)
        commands.append(message(self._subject, f"{inbox}.{i}", headers, row.data or b""))

    async def _go(self, commands: list[bytes]) -> None:
        some, commands[:] = list(commands), []
        if some and self._halt is None:
            try:
                await self._wire.write(some)
            except BrokerError as error:
                self._cut(error)

    async def _progress(self) -> None:
        """Wait for an answer; without one for as long as a question may take, nobody knows."""
        self._news.clear()
        if not self._under_way:
            return
        try:
            async with asyncio.timeout(self._wire.timeout):
                await self._news.wait()
        except TimeoutError:
            text = f"{self._name}: no acknowledgement within {self._wire.timeout:g} s"
            self._cut(self._wire.host.error(ErrorKind.TIMEOUT, self._name, text, retryable=True))

    def _held_back(self, i: int, key: bytes | None) -> bool:
        if self._halt is not None:
            self.results[i] = SendResult(Sent.REFUSED, error=self._halt)
        elif key in self._broken:
            text = f"{self._name}: an earlier row of key {key!r} is not stored, so this one was not sent; send both again"
            self.results[i] = SendResult(Sent.REFUSED, error=self._wire.host.error(ErrorKind.CONFLICT, self._name, text))
        return self.results[i] is not None

    # -------------------------------------------------------------- results
    def _refuse(self, i: int, error: BrokerError, state: Sent = Sent.REFUSED) -> None:
        """Row i is not stored, or nobody knows."""
        self.results[i] = SendResult(state, error=error)
        if (key := self._rows[i].key) is not None:
            self._broken.add(key)

    def _take(self, answer: Answer) -> None:
        i = int(answer.subject)
        if i not in self._under_way:
            return
        if answer.status == 503:
            self._halt = missing(self._wire.host, self._name, "no stream holds the subject any more")
            self._refuse(i, self._halt)
        elif (told := _acknowledgement(answer.data)) is None:
            return
        elif "error" in told:
            self._refuse(i, failure(self._wire.host, self._name, Refusal(told["error"])))
        else:
            sequence = int(told["seq"])
            state = Sent.DUPLICATE if told.get("duplicate") else Sent.ACCEPTED
            self.results[i] = SendResult(state, str(sequence), 0, (sequence,))
        self._bytes -= len(self._rows[i].data or b"")
        if (key := self._under_way.pop(i)) is not None:
            self._risky.discard(key)
        self._news.set()

    def _cut(self, error: BrokerError) -> None:
        """No more answers come."""
        self._halt = error
        state = Sent.REFUSED if error.kind is ErrorKind.PERMISSION else Sent.UNKNOWN
        for i in self._under_way:
            self._refuse(i, error, state)
        self._under_way.clear()
        self._bytes = 0
        self._risky.clear()
        self._news.set()
