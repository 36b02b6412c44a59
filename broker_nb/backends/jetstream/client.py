"""nats-py's connection, with every answer handed over as it came: raw headers, status frames, empty bodies."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import orjson
from nats.aio.client import Client
from nats.errors import Error, SecureConnRequiredError

from broker_nb.backends.driver import Event, Host
from broker_nb.backends.jetstream.errors import Refusal, connecting, failure
from broker_nb.errors import BrokerError, ErrorKind

log = logging.getLogger("broker_nb.nats")
# What asyncio tells at the end of each connection that nats-py has upgraded to TLS is about neither the person nor us.
logging.getLogger("asyncio").addFilter(lambda record: "eof_received() has no effect when using ssl" not in record.getMessage())

_DENIED = re.compile(r'permissions violation for (publish|subscription) to "([^"]*)"', re.I)
_VERSION = re.compile(r"(\d+)\.(\d+)\.(\d+)")
OLDEST = (2, 9, 0)
CHUNK = 1 << 16
"""Bytes of commands that are handed to the client at once."""


class Answer(NamedTuple):
    """A message to one of our inboxes. `headers` is the whole header block, None without one."""

    subject: bytes  # what follows the inbox; of a message that a consumer delivers, its own
    reply: bytes
    data: bytes
    headers: bytes | None

    @property
    def status(self) -> int:
        """The status that the server put into the header's first line; 0 for a message."""
        headers = self.headers
        if headers is None or not headers.startswith(b"NATS/1.0 "):
            return 0
        number = headers[9:12]
        return int(number) if number.isdigit() else 0


class Inbox:
    """A subject of ours that the server answers to. `take` and `cut` are called while the connection is read, and must be quick.
    What `take` raises ends up in `cut`.

    Parameters
    ----------
    take
        Gets every message to it.
    cut
        Told that what was asked for will not be answered: the connection is gone, or we may not ask.
    about
        Subject that is sent to, or what it begins with (up to a dot); a refusal by the server's permissions ends up in `cut`.
    """

    __slots__ = ("about", "cut", "key", "subject", "take")

    def __init__(
        self, key: bytes | int, subject: str, take: Callable[[Answer], None], cut: Callable[[BrokerError], None], about: str
    ) -> None:
        self.key, self.subject, self.take, self.cut, self.about = key, subject, take, cut, about.lower()


class Wire(Client):
    """One connection to a NATS server (or to one of several).

    nats-py parses headers into a dict on the way to a subscription: repeats collapse, values are stripped, and a user's own header
    `Status` looks like the server's. So messages to our inboxes leave it one step before that, in `_process_msg`, which its parser
    calls with the raw header block. If a version of it no longer did so, the first question of `open` would stay unanswered.
    """

    def __init__(self, host: Host, servers: list[str], timeout: float, *, tls: bool, api: str) -> None:
        super().__init__()
        self.host, self.timeout = host, timeout
        self.name = ",".join(servers)
        self.prefix = ""
        self.ended = False  # by us
        self._urls = [f"nats://{server}" for server in servers]
        self._needs_tls, self._api_prefix = tls, api
        self._inboxes: dict[bytes | int, Inbox] = {}  # by what follows the prefix, or by the number of a subscription of its own
        self._numbers = itertools.count()
        self._skip = 0
        self._failures: list[BaseException] = []
        self._failed = asyncio.Event()
        self._is_open = False
        self._deaf: BrokerError | None = None  # why no answer can be heard

    # -------------------------------------------------------------- opening and closing
    async def open(self, settings: Mapping[str, Any]) -> None:
        """Connect, and ask whether JetStream is there.

        Raises
        ------
        BrokerError
            UNREACHABLE, AUTH, INVALID for a setting that the client refuses, UNSUPPORTED without JetStream or on an old server.
        """
        callbacks = {
            "error_cb": self._on_error,
            "disconnected_cb": self._on_disconnected,
            "reconnected_cb": self._on_reconnected,
            "closed_cb": self._on_closed,
        }
        async with asyncio.TaskGroup() as tasks:
            connect = tasks.create_task(self._connect({"servers": self._urls, **settings, **callbacks}))
            failed = tasks.create_task(self._failed.wait())
            await asyncio.wait({connect, failed}, timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            self.options["allow_reconnect"] = connect.done()  # it may swallow that it is cancelled
            connect.cancel()
            failed.cancel()
        error = self._failures[-1] if self._failures else None
        if not connect.cancelled() and connect.result() is not None:
            error = connect.result()
        elif not connect.cancelled() and self.is_connected:
            error = None
        elif error is None and self._server_info:
            error = ConnectionResetError("without a word")  # which the client takes for a connection
        if error is not None or not self.is_connected:
            asked = any(self._server_info.get(word) for word in ("auth_required", "tls_verify"))
            await self.shut()
            if error is not None and not isinstance(error, OSError | Error):
                raise self.host.error(
                    ErrorKind.INVALID, self.name, f"{self.name}: the client does not take these settings: {error}"
                )
            raise connecting(self.host, self.name, error, asked=asked)
        self._is_open = True
        try:
            await self._begin()
        except BaseException:
            await self.shut()
            raise

    async def _connect(self, settings: dict[str, Any]) -> BaseException | None:
        """What the client's `connect` raised; it tries again for ever if it is let."""
        try:
            await self.connect(**settings)
        except Exception as error:  # noqa: BLE001 - returned, and told by the caller
            return error
        return None

    async def _begin(self) -> None:
        if self.version < OLDEST:
            text = f"{self.name} runs nats-server {self.server_version}; {'.'.join(map(str, OLDEST))} or newer is needed"
            raise self.host.error(ErrorKind.UNSUPPORTED, self.name, text)
        self.prefix = self.new_inbox()
        self._skip = len(self.prefix) + 1
        await self.subscribe(f"{self.prefix}.>")
        try:
            await self.told("INFO", self.name)
        except BrokerError as error:
            # A user who may only read some streams may do that, one who may not hear the answers may do nothing.
            if error.kind is not ErrorKind.PERMISSION or self._deaf is not None:
                raise self._deaf or error from error

    async def shut(self) -> None:
        """Disconnect. Idempotent."""
        self.ended = True
        self._cut(self.closed())
        if not self.is_closed and self._flush_queue is not None:  # else it never began to connect
            await self.close()

    def closed(self) -> BrokerError:
        """The error of whoever comes too late."""
        return self.host.error(ErrorKind.CLOSED, "nats", "the connection is closed; connect again")

    # -------------------------------------------------------------- what the client tells
    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # nats-py goes on in plain text where the server does not demand TLS, and would send our password so.
        if initial_connection and self._needs_tls and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise SecureConnRequiredError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def _on_error(self, error: Exception) -> None:
        if not self._is_open:
            self._failures.append(error)
            if len(self._failures) >= len(self._urls):  # every server had its chance
                self._failed.set()
        elif (found := _DENIED.search(str(error))) is not None:
            self._deny(found[1].lower(), found[2])
        else:
            log.info("%s: %s", self.name, str(error) or type(error).__name__)

    def _deny(self, what: str, subject: str) -> None:
        if what == "publish":
            text = f"{subject}: this user may not publish there; ask for the permission"
        else:
            text = (
                f"{subject}: this user may not subscribe there; ask for the permission, or give an inbox_prefix that is allowed"
            )
        denied = self.host.error(ErrorKind.PERMISSION, subject, text)
        self._deaf = denied if what == "subscription" else self._deaf
        subject = subject.lower()  # as the client has it
        for inbox in list(self._inboxes.values()):
            if what == "subscription" or subject == inbox.about or (inbox.about[-1:] == "." and subject.startswith(inbox.about)):
                inbox.cut(denied)

    async def _on_disconnected(self) -> None:
        gone = self.unreachable()
        self._cut(self.closed() if self.ended else gone)
        if self._is_open and not self.ended:
            self.host.emit(Event("reconnecting", error=gone))

    async def _on_closed(self) -> None:
        if self._is_open and not self.ended:
            self.host.emit(Event("failed", error=self.unreachable()))

    async def _on_reconnected(self) -> None:
        self.host.emit(Event("reconnected"))

    def _cut(self, error: BrokerError) -> None:
        for inbox in list(self._inboxes.values()):
            inbox.cut(error)

    def unreachable(self) -> BrokerError:
        """The error while the client has no connection; by some errors the server ends it for good."""
        if not self.is_closed:
            return connecting(self.host, self.name, self.last_error)
        why = str(self.last_error or "nobody knows why").removeprefix("nats: ")
        return self.host.error(ErrorKind.CLOSED, self.name, f"{self.name} closed the connection: {why}; connect again")

    # -------------------------------------------------------------- the server
    @property
    def server_version(self) -> str:
        """As the server writes it."""
        return str(self._server_info.get("version", "0.0.0"))

    @property
    def version(self) -> tuple[int, ...]:
        """Of the server we are connected to."""
        found = _VERSION.match(self.server_version)
        return tuple(map(int, found.groups())) if found else (0, 0, 0)

    @property
    def cluster(self) -> str:
        """The server's cluster; "" when it stands alone."""
        return str(self._server_info.get("cluster", ""))

    # -------------------------------------------------------------- in
    def inbox(self, take: Callable[[Answer], None], cut: Callable[[BrokerError], None], about: str) -> Inbox:
        """A new inbox under the one subscription that all questions share."""
        key = b"%d" % next(self._numbers)
        self._inboxes[key] = inbox = Inbox(key, f"{self.prefix}.{key.decode()}", take, cut, about)
        return inbox

    async def own_inbox(self, take: Callable[[Answer], None], cut: Callable[[BrokerError], None], about: str) -> Inbox:
        """A new inbox with its own subscription: what a consumer delivers comes under the subject of the message."""
        self.check()
        subject = self.new_inbox()
        number = (await self.subscribe(f"{subject}.*"))._id
        self._inboxes[number] = inbox = Inbox(number, subject, take, cut, about)
        return inbox

    async def forget(self, inbox: Inbox) -> None:
        """Hand over nothing more. Idempotent."""
        self._inboxes.pop(inbox.key, None)
        if isinstance(inbox.key, int) and (subscription := self._subs.get(inbox.key)) is not None and not self.is_closed:
            await subscription.unsubscribe()

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        inbox = self._inboxes.get(sid)
        if inbox is None:  # the subscription that all questions share
            key, _, subject = subject[self._skip :].partition(b".")
            inbox = self._inboxes.get(key)
        if inbox is None:
            if (
                reply.startswith(b"$JS.ACK.") and self.is_connected and not self.ended
            ):  # for a request that was given up: to whoever comes next
                await self.write([message(reply.decode(), "", b"", b"-NAK")])
            return
        try:
            inbox.take(Answer(subject, reply, data, headers))
        except Exception as error:  # noqa: BLE001 - the client would stop reading, and all would wait for ever
            text = f"{self.name}: an answer that cannot be understood: {error!r}"
            inbox.cut(self.host.error(ErrorKind.UNKNOWN, self.name, text))

    # -------------------------------------------------------------- out
    def check(self) -> None:
        """Raise unless there is a connection: what is written without one would be sent later, when nobody waits for it."""
        if self.ended:
            raise self.closed()
        if not self.is_connected:
            raise self.unreachable()

    async def write(self, commands: Iterable[bytes]) -> None:
        """Hand protocol lines to the client."""
        self.check()
        some, size = [], 0
        for command in commands:
            some.append(command)
            size += len(command)
            if size > CHUNK:
                await self._send_command(b"".join(some))
                await asyncio.sleep(0)  # the loop is everybody's
                some, size = [], 0
        if some:
            await self._send_command(b"".join(some))
        if self._flush_queue is not None and self._flush_queue.empty():
            await self._flush_pending()

    async def ask(self, subject: str, payload: bytes = b"") -> Answer:
        """One question, one answer.

        Raises
        ------
        BrokerError
            TIMEOUT, UNREACHABLE, PERMISSION, CLOSED.
        """
        waiting: asyncio.Future[Answer | BrokerError] = asyncio.get_running_loop().create_future()

        def done(answer: Answer | BrokerError) -> None:
            if not waiting.done():
                waiting.set_result(answer)

        inbox = self.inbox(done, done, subject)
        try:
            await self.write([message(subject, inbox.subject, b"", payload)])
            async with asyncio.timeout(self.timeout):
                answer = await waiting
        except TimeoutError as late:
            text = f"{self.name} did not answer within {self.timeout:g} s ({subject})"
            raise self.host.error(ErrorKind.TIMEOUT, self.name, text, retryable=True) from late
        finally:
            await self.forget(inbox)
        if isinstance(answer, BrokerError):
            raise answer
        return answer

    async def api(self, call: str, entity: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A question to JetStream.

        Raises
        ------
        Refusal
            It is answered, by no.
        BrokerError
            It is not answered.
        """
        answer = await self.ask(f"{self._api_prefix}.{call}", orjson.dumps(request) if request else b"")
        if answer.status == 503:
            text = f"{entity}: there is no JetStream on this server, or not for this account (or domain)"
            raise self.host.error(ErrorKind.UNSUPPORTED, entity, text)
        return fulfilled(answer.data)

    async def told(self, call: str, entity: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `api`, with a refusal as an error about the entity."""
        try:
            return await self.api(call, entity, request)
        except Refusal as refusal:
            raise failure(self.host, entity, refusal) from refusal

    def api_subject(self, call: str) -> str:
        """Where a question to JetStream is sent."""
        return f"{self._api_prefix}.{call}"


def fulfilled(data: bytes) -> dict[str, Any]:
    """JetStream's answer; raises Refusal where it says no."""
    try:
        answer: dict[str, Any] = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Refusal({"description": f"an answer that is not JSON: {error}"}) from error
    if "error" in answer:
        raise Refusal(answer["error"])
    return answer


def message(subject: str, reply: str, headers: bytes, data: bytes) -> bytes:
    """The protocol's line for one message; subject and reply were checked, `headers` is a whole block or empty."""
    if headers:
        return b"HPUB %s %s %d %d\r\n%s%s\r\n" % (
            subject.encode(),
            reply.encode(),
            len(headers),
            len(headers) + len(data),
            headers,
            data,
        )
    return b"PUB %s %s %d\r\n%s\r\n" % (subject.encode(), reply.encode(), len(data), data)
