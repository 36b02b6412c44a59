"""Taking: pull requests of our own to a durable consumer, every settlement confirmed.

The server acknowledges by the sequence in the stream: an ack of a delivery whose time is up would settle the next one, in somebody
else's hands, and be confirmed. So we keep the time of every delivery, from before it can have been made, and send nothing after it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn

import orjson

from broker_nb.backends.driver import Batch, Outcome, Settled, Settlement, Token, Verdict
from broker_nb.backends.jetstream.acks import Heard, confirm, delivery
from broker_nb.backends.jetstream.catalogue import leases
from broker_nb.backends.jetstream.client import Answer, Inbox, Wire, log, message
from broker_nb.backends.jetstream.codec import JetStreamCodec, Row
from broker_nb.backends.jetstream.errors import missing
from broker_nb.errors import BrokerError, ErrorKind

_ANSWER_S = 0.1  # how long an answer is waited for, also by a call that may not wait for rows
_AT_LEAST_S = 0.02  # a request without an end would stay with the server while it may deliver no more
_CHECK_S = 1.0  # between two questions why nothing comes while rows are held
_CLOSE_S = 1.5
_BYTES = 16 << 20  # of one request: a server drops who is too slow for what it sends
_TIMED_OUT, _NONE, _CONFLICT = 408, 404, 409
REASONS = (2, 10, 4)
"""The server version from which a reject may say why; an older one would not understand it at all."""


class JetStreamSource:
    """Takes rows from one consumer.

    Parameters
    ----------
    ask
        The server's information about the consumer, None when it is gone.
    """

    def __init__(
        self,
        wire: Wire,
        codec: JetStreamCodec,
        info: Mapping[str, Any],
        max_held: int,
        ask: Callable[[], Awaitable[Mapping[str, Any] | None]],
    ) -> None:
        self._wire, self._codec, self._ask_info = wire, codec, ask
        self.stream, self.name = str(info["stream_name"]), str(info["name"])
        config = info["config"]
        self._leases = leases(config)
        self._limit = int(config.get("max_ack_pending") or -1)
        self._most_rows = min(n for n in (max_held, int(config.get("max_batch") or 0) or max_held) if n)
        self._most_bytes = int(config.get("max_bytes") or 0)
        self._longest_s = int(config.get("max_expires") or 0) / 1e9
        self._max_held = max_held
        self._subject = wire.api_subject(f"CONSUMER.MSG.NEXT.{self.stream}.{self.name}")
        self._held: dict[Token, float] = {}  # reply subject -> until when it is ours, time.monotonic()
        self._rows: deque[tuple[str, Row]] = deque()  # with their reply subjects; delivered, not handed out
        self._number = 0  # of the request
        self._asked_at: float | None = None  # while it is under way
        self._lease_from = 0.0  # when the last request was made: nothing was delivered to it before
        self._left = 0  # rows it may still bring
        self._status = 0  # what ended it
        self._said = ""
        self._checked_at = -math.inf
        self._size_bound = True
        self._error: BrokerError | None = None
        self._news = asyncio.Event()
        self._inbox: Inbox | None = None
        self.closed = False

    @property
    def waits(self) -> bool:
        """Whether the server counts a request of ours as waiting."""
        return self._asked_at is not None

    # -------------------------------------------------------------- while the connection is read
    def _take(self, answer: Answer) -> None:
        if answer.reply.startswith(b"$JS.ACK."):
            self._deliver(answer)
            self._left -= 1
            if not self._left:
                self._end(0, "")
        elif answer.status and answer.subject.endswith(b".%d" % self._number) and self._asked_at is not None:
            line = (answer.headers or b"").partition(b"\r\n")[0]
            self._end(answer.status, line[13:].decode("utf-8", "replace"))

    def _deliver(self, answer: Answer) -> None:
        reply = answer.reply.decode()
        tries, sequence, time_ns = delivery(reply)
        self._held[reply] = self._lease_from + self._lease(tries)
        self._rows.append((reply, Row(answer.subject.decode(), sequence, time_ns, tries, answer.headers or b"", answer.data)))

    def _lease(self, tries: int) -> float:
        return self._leases[min(tries, len(self._leases)) - 1]

    def _end(self, status: int, said: str) -> None:
        self._asked_at, self._status, self._said = None, status, said
        self._news.set()

    def _cut(self, error: BrokerError) -> None:
        if self._asked_at is not None:
            self._error = error
            self._end(0, "")

    # -------------------------------------------------------------- pulling
    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        self._check_open()
        if not self._rows:
            await self._fetch(max_rows, max_bytes, wait)
        rows: list[Row] = []
        tokens: list[Token] = []
        now = time.monotonic()
        while self._rows and len(rows) < max_rows and not self.closed:
            reply, row = self._rows.popleft()
            if self._held.get(reply, 0.0) > now:  # else it lay here too long, and comes again
                rows.append(row)
                tokens.append(reply)
            else:
                self._held.pop(reply, None)
        return Batch(self._codec, rows, tokens, min(self._held[t] for t in tokens)) if rows else None

    async def _fetch(self, max_rows: int, max_bytes: int, wait: float) -> None:
        until = time.monotonic() + max(wait, _ANSWER_S)
        if self._asked_at is None:
            room = self._room()
            await self._ask(min(max_rows, room, self._most_rows), max_bytes, wait)
        while self._asked_at is not None and not self.closed and (left := until - time.monotonic()) > 0:
            self._news.clear()
            try:
                async with asyncio.timeout(left):
                    await self._news.wait()
            except TimeoutError:
                break
        error, self._error = self._error, None
        if error is not None and not self._rows:
            raise error
        if not self._rows and not self.closed:
            await self._why_nothing()

    def _room(self) -> int:
        """How many more rows may be held; NO_CREDIT when none."""
        most = min(self._max_held, self._limit) if self._limit > 0 else self._max_held
        if len(self._held) >= most:
            now = time.monotonic()
            self._held = {token: until for token, until in self._held.items() if until > now}
        if len(self._held) >= most:
            raise self._full(f"{len(self._held)} rows are held, the most that it gives or that was asked for")
        return most - len(self._held)

    async def _ask(self, rows: int, max_bytes: int, wait: float) -> None:
        expires = max(_AT_LEAST_S, 0.8 * wait)  # so that its end is told within the slice
        if self._longest_s:
            expires = min(expires, self._longest_s)
        # "As soon as there is something, whatever there is": with both words the server waits for the first row only.
        request: dict[str, Any] = {"batch": rows, "expires": int(expires * 1e9), "no_wait": True}
        if self._size_bound:
            request["max_bytes"] = min(max_bytes, self._most_bytes or _BYTES, _BYTES)
        else:  # the next row alone is larger than that
            request["batch"], self._size_bound = 1, True
        if self._inbox is None:
            self._inbox = await self._wire.own_inbox(self._take, self._cut, self._subject)
        self._number += 1
        self._left, self._status, self._said = int(request["batch"]), 0, ""
        self._asked_at = self._lease_from = time.monotonic()
        try:
            await self._wire.write([message(self._subject, f"{self._inbox.subject}.{self._number}", b"", orjson.dumps(request))])
        except BaseException:
            self._asked_at = None
            raise

    async def _why_nothing(self) -> None:
        """What an empty pull means, where it means more than that nothing is there."""
        if self._asked_at is not None:
            if time.monotonic() - self._asked_at > self._wire.timeout:
                await self._leave()  # a row that still comes for this request would be taken for the next one's
                text = f"{self.name}: no answer within {self._wire.timeout:g} s"
                raise self._wire.host.error(ErrorKind.TIMEOUT, self.name, text, retryable=True)
            return
        if self._status == _CONFLICT and "MaxBytes" in self._said:
            self._size_bound = False
        elif self._status not in (0, _NONE, _TIMED_OUT) or (self._held and time.monotonic() - self._checked_at > _CHECK_S):
            self._checked_at = time.monotonic()
            await self._check_consumer()

    async def _check_consumer(self) -> None:
        info = await self._ask_info()
        if info is None:
            raise missing(self._wire.host, self.name, "it was deleted meanwhile; create=True makes one")
        pending = int(info["num_ack_pending"])
        if self._held and self._limit > 0 and pending >= self._limit and not self._rows:
            raise self._full(
                f"{pending} rows are delivered and not settled, {len(self._held)} of them here (max_ack_pending={self._limit})"
            )

    def _full(self, why: str) -> BrokerError:
        return self._wire.host.error(ErrorKind.NO_CREDIT, self.name, f"{self.name}: {why}; ack or release some")

    # -------------------------------------------------------------- settling
    async def settle(self, items: Sequence[Settlement]) -> Sequence[Outcome]:
        self._check_open()
        now = time.monotonic()
        ours = [i for i, item in enumerate(items) if self._held.get(item.token, 0.0) > now]
        shortest = min((self._held[items[i].token] for i in ours), default=now) - now
        # Half of it, so that what was not confirmed can be tried once more.
        wait = min(self._wire.timeout, shortest / 2)
        heard = await confirm(self._wire, self.name, [(str(items[i].token), self._words(items[i])) for i in ours], wait)
        outcomes = [Outcome(Settled.LOST)] * len(items)
        for i, one in zip(ours, heard, strict=True):
            outcomes[i] = self._outcome(items[i].verdict, one)
        for item, outcome in zip(items, outcomes, strict=True):
            if outcome.state is not Settled.RETRY:
                self._held.pop(item.token, None)
        return outcomes

    def _words(self, item: Settlement) -> bytes:
        if item.verdict is Verdict.ACK:
            return b"+ACK"
        if item.verdict is Verdict.RELEASE:
            return b"-NAK" if not item.delay else b'-NAK {"delay": %d}' % int(item.delay * 1e9)
        if item.reason and self._wire.version < REASONS:
            log.warning("%s: rejected, but this server does not keep the reason", self.name)
        reason = item.reason.encode("utf-8", "replace") if self._wire.version >= REASONS else b""
        return b"+TERM " + reason if reason else b"+TERM"

    def _outcome(self, verdict: Verdict, heard: Heard) -> Outcome:
        answer = heard.answer
        if isinstance(answer, BrokerError):
            if verdict is Verdict.RELEASE and heard.said and answer.retryable:
                return Outcome(Settled.LOST, answer)  # saying it again might take the row from whoever got it by now
            return Outcome(Settled.RETRY if answer.retryable else Settled.REFUSED, answer)
        if answer.status == 503:  # nobody listens for acks: the consumer is gone, and with it every lease
            return Outcome(Settled.LOST, missing(self._wire.host, self.name, "it was deleted meanwhile"))
        return Outcome(Settled.CONFIRMED)

    async def extend(self, tokens: Sequence[Token], seconds: float) -> Sequence[float | None]:
        self._check_open()
        del seconds  # the server begins the consumer's ack_wait again
        now = time.monotonic()
        ours = [str(token) for token in tokens if self._held.get(token, 0.0) > now]
        heard = await confirm(self._wire, self.name, [(token, b"+WPI") for token in ours], self._wire.timeout)
        kept: dict[Token, float] = {}
        for token, (answer, at, _) in zip(ours, heard, strict=True):
            until = self._held.pop(token, 0.0)
            if isinstance(answer, BrokerError):
                kept |= {token: until} if until > time.monotonic() else {}
            elif answer.status != 503 and at < until:  # one that is heard too late is confirmed too, and keeps nothing
                kept[token] = now + self._lease(delivery(token).tries)
        self._held |= kept
        return [kept.get(token) for token in tokens]

    async def commit(self, positions: Mapping[int, object]) -> NoReturn:
        raise self._one_by_one()

    async def seek(self, positions: Mapping[int, object]) -> NoReturn:
        raise self._one_by_one()

    def _one_by_one(self) -> BrokerError:
        text = f"{self.name}: rows of a consumer are settled one by one; ack or release them"
        return self._wire.host.error(ErrorKind.UNSUPPORTED, self.name, text)

    # -------------------------------------------------------------- closing
    async def _leave(self) -> None:
        inbox, self._inbox, self._asked_at = self._inbox, None, None
        if inbox is not None:
            await self._wire.forget(inbox)

    def _check_open(self) -> None:
        if self.closed:
            raise self._wire.host.error(ErrorKind.CLOSED, self.name, f"{self.name}: this source is closed; subscribe again")

    async def close(self) -> None:
        """What was delivered and not handed out goes back at once, also what still comes for the last request."""
        if self.closed:
            return
        self.closed = True
        self._news.set()
        until = time.monotonic() + _CLOSE_S
        while self._asked_at is not None and (left := until - time.monotonic()) > 0:
            self._news.clear()
            try:
                async with asyncio.timeout(left):
                    await self._news.wait()
            except TimeoutError:
                break
        back = [(reply, b"-NAK") for reply, _ in self._rows if self._held.get(reply, 0.0) > time.monotonic()]
        await self._leave()
        if back:
            heard = await confirm(self._wire, self.name, back, max(0.1, until - time.monotonic()))
            if late := sum(isinstance(one.answer, BrokerError) for one in heard):
                log.warning("%s: %d rows come again when their time is up", self.name, late)
