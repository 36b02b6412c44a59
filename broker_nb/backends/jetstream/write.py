"""Writing: every row asks for the stream's acknowledgement, many under way at once, and each one's fate is known afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from broker_nb.backends.driver import NO_PARTITION, Outbound, SendResult, Sent
from broker_nb.backends.jetstream.client import Answer, Wire, fulfilled, message
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
        self._stream = str(config["name"])
        self._limit = int(config.get("max_msg_size", -1))
        # A stream that is full refuses one row and may take the next: then rows of one key go one after the other.
        full = any(int(config.get(n, -1)) > 0 for n in ("max_msgs", "max_bytes", "max_msgs_per_subject"))
        self._may_fill = full and config.get("discard") == "new"
        self._closed = False

    # -------------------------------------------------------------- checking
    def check(self, row: Outbound) -> str | None:
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
        block = header_block(self._pairs(row))
        size = len(block) + len(data)
        limit = min(n for n in (self._limit, self._wire.max_payload) if n >= 0)
        if size > limit:
            what = "max_msg_size" if limit == self._limit else "the server's max_payload"
            return f"{size} bytes are too large: {self._name} takes messages up to {limit} bytes with their headers ({what})"
        return None

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
        if flaw := header_flaw(name):
            return f"attribute {name!r} {flaw}"
        if flaw := value_flaw(content):
            return f"attribute {name!r} {flaw}"
        low = name.lower()
        if why := _FORBIDDEN.get(low):
            return f"attribute {name!r} is not sent, because {why}; drop it"
        since = _SINCE.get(low)
        if since is not None and self._wire.version < since[0]:
            return f"attribute {name!r} needs nats-server {since[1]}; this is {self._wire.server_version}, which would ignore it"
        return None

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
        sending = _Sending(self._wire, self._name, self._subject, rows, careful=self._may_fill or _expects(rows))
        for i, row in enumerate(rows):
            if (why := self.check(row)) is not None:
                sending.refuse(i, self._error(ErrorKind.INVALID, f"{self._name}: {why}"))
        await sending.run(lambda row: header_block(self._pairs(row)))
        return [r for r in sending.results if r is not None]

    def _error(self, kind: ErrorKind, text: str) -> BrokerError:
        return self._wire.host.error(kind, self._name, text)

    async def close(self) -> None:
        self._closed = True


def _expects(rows: Sequence[Outbound]) -> bool:
    """Whether a row may be refused because of what the stream's last one is."""
    return any(name.startswith("Nats-Expected-") for row in rows for name, _, _ in row.attributes)


class _Sending:
    """Rows on their way, and what became of them.

    Parameters
    ----------
    careful
        A row may be refused and the next one taken: no row goes before the fate of the one before it with the same key is known.
    """

    def __init__(self, wire: Wire, name: str, subject: str, rows: Sequence[Outbound], *, careful: bool) -> None:
        self._wire, self._name, self._subject, self._rows, self._careful = wire, name, subject, rows, careful
        self.results: list[SendResult | None] = [None] * len(rows)
        self._under_way: dict[int, bytes | None] = {}  # row -> its key
        self._bytes = 0
        self._busy: set[bytes] = set()  # keys under way
        self._broken: set[bytes] = set()  # keys with a row that is not stored
        self._halt: BrokerError | None = None  # why nothing more is tried
        self._news = asyncio.Event()

    async def run(self, headers: Callable[[Outbound], bytes]) -> None:
        """Send every row that has no result yet, and wait for the last answer."""
        inbox = self._wire.inbox(self._take, self._cut, self._subject)
        try:
            commands: list[bytes] = []
            for i, row in enumerate(self._rows):
                key = row.key
                while self._halt is None and (
                    len(self._under_way) >= _ROWS
                    or self._bytes >= _BYTES
                    or (self._careful and key is not None and key in self._busy)
                ):
                    await self._go(commands)
                    await self._progress()
                if self.results[i] is None and not self._held_back(i, key):
                    self._under_way[i] = key
                    self._bytes += len(row.data or b"")
                    if key is not None:
                        self._busy.add(key)
                    commands.append(message(self._subject, f"{inbox.subject}.{i}", headers(row), row.data or b""))
            await self._go(commands)
            while self._under_way:
                await self._progress()
        finally:
            await self._wire.forget(inbox)

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
    def refuse(self, i: int, error: BrokerError, state: Sent = Sent.REFUSED) -> None:
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
            self.refuse(i, self._halt)
        else:
            try:
                told = fulfilled(answer.data)
            except Refusal as refusal:
                self.refuse(i, failure(self._wire.host, self._name, refusal))
            else:
                if "seq" not in told:  # somebody else answers requests on this subject
                    return
                sequence = int(told["seq"])
                state = Sent.DUPLICATE if told.get("duplicate") else Sent.ACCEPTED
                self.results[i] = SendResult(state, str(sequence), 0, (sequence,))
        self._bytes -= len(self._rows[i].data or b"")
        if (key := self._under_way.pop(i)) is not None:
            self._busy.discard(key)
        self._news.set()

    def _cut(self, error: BrokerError) -> None:
        """No more answers come."""
        self._halt = error
        state = Sent.REFUSED if error.kind is ErrorKind.PERMISSION else Sent.UNKNOWN
        for i in self._under_way:
            self.refuse(i, error, state)
        self._under_way.clear()
        self._bytes = 0
        self._busy.clear()
        self._news.set()
