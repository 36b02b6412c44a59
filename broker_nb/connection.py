"""`connect()`: one connection with two faces, blocking methods and the same methods awaited under `.aio`."""

from __future__ import annotations

import atexit
import functools
import logging
from collections.abc import Callable, Coroutine, Mapping
from datetime import tzinfo
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from broker_nb.backends import has_secret
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.live import live
from broker_nb.portable.loop import shared_loop
from broker_nb.session import Session

if TYPE_CHECKING:
    from broker_nb.widgets.model import LiveModel
    from broker_nb.widgets.view import LiveView

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger("broker_nb")

_open: dict[str, Connection] = {}


def _to_log(line: str) -> None:
    log.info("%s", line)


captions: Callable[[str], None] = _to_log
"""Where the one line per read or settlement goes: the log, or, once the notebook extension is loaded, the cell."""


def set_captions(sink: Callable[[str], None] | None) -> None:
    """Have captions handed to `sink`, on the caller's thread; None = back to the log."""
    global captions
    captions = sink or _to_log


def set_timezone(zone: tzinfo | None) -> None:
    """For clock times without a zone in ranges and captions; None = this host's zone."""
    Session.zone = zone


def _say(session: Session) -> None:
    while session.said:
        captions(session.said.popleft())


def _blocking(
    method: Callable[Concatenate[Session, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Connection, P], T]:
    @functools.wraps(method)
    def call(self: Connection, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return shared_loop().run(method(self._session, *args, **kwargs))
        finally:
            _say(self._session)

    return call


def _awaited(
    method: Callable[Concatenate[Session, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[AioConnection, P], Coroutine[Any, Any, T]]:
    @functools.wraps(method)
    async def call(self: AioConnection, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await shared_loop().arun(method(self._session, *args, **kwargs))
        finally:
            _say(self._session)

    return call


def _shown(
    method: Callable[Concatenate[Session, P], Coroutine[Any, Any, LiveModel]],
) -> Callable[Concatenate[Connection, P], LiveView]:
    @functools.wraps(method)
    def call(self: Connection, /, *args: P.args, **kwargs: P.kwargs) -> LiveView:
        from broker_nb.widgets import view

        view.check_notebook()
        return view.show(shared_loop().run(method(self._session, *args, **kwargs)), _caption)

    return call


def _shown_async(
    method: Callable[Concatenate[Session, P], Coroutine[Any, Any, LiveModel]],
) -> Callable[Concatenate[AioConnection, P], Coroutine[Any, Any, LiveView]]:
    @functools.wraps(method)
    async def call(self: AioConnection, /, *args: P.args, **kwargs: P.kwargs) -> LiveView:
        from broker_nb.widgets import view

        view.check_notebook()
        return view.show(await shared_loop().arun(method(self._session, *args, **kwargs)), _caption)

    return call


def _caption(line: str) -> None:
    captions(line)


class AioConnection:
    """The methods of a connection, to be awaited in a cell or a script that is async itself."""

    def __init__(self, session: Session) -> None:
        self._session = session

    topics = _awaited(Session.topics)
    sample = _awaited(Session.sample)
    consume = _awaited(Session.consume)
    live = _shown_async(live)
    held = _awaited(Session.held)
    ack = _awaited(Session.ack)
    nack = _awaited(Session.nack)
    reject = _awaited(Session.reject)
    release = _awaited(Session.release)
    commit = _awaited(Session.commit)
    publish = _awaited(Session.publish)
    subscribe = _awaited(Session.subscribe)
    topic = _awaited(Session.topic)
    transactional_publisher = _awaited(Session.transactional_publisher)
    close = _awaited(Session.close)


class Connection:
    """An open connection; every method blocks, Ctrl-C ends it and leaves the connection usable. Made by `connect`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.aio = AioConnection(session)

    @property
    def name(self) -> str:
        """What `%broker use` and `connections()` call it."""
        return self._session.name

    @property
    def url(self) -> str:
        """Where it is connected to."""
        return self._session.url

    @property
    def about(self) -> str:
        """The server, in a few words."""
        return self._session.client.driver.about

    @property
    def is_open(self) -> bool:
        """Whether it can still be used."""
        return self._session.client.is_open

    topics = _blocking(Session.topics)
    sample = _blocking(Session.sample)
    consume = _blocking(Session.consume)
    live = _shown(live)
    held = _blocking(Session.held)
    ack = _blocking(Session.ack)
    nack = _blocking(Session.nack)
    reject = _blocking(Session.reject)
    release = _blocking(Session.release)
    commit = _blocking(Session.commit)
    publish = _blocking(Session.publish)

    def close(self) -> None:
        """Give back what is held and disconnect. Idempotent; deletes nothing durable."""
        _open.pop(self.name, None)
        _blocking(Session.close)(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.name}: {self.about}{'' if self.is_open else ' (closed)'}>"


def connect(
    url: str,
    *,
    name: str | None = None,
    timeout: float = 5.0,
    options: Mapping[str, Any] | None = None,
    read_only: bool = False,
    **settings: Any,
) -> Connection:
    """Connect to a broker. Effect on the broker: none beyond the connection.

    Parameters
    ----------
    url
        "demo" (an embedded broker with made-up orders), "inmem://name", "kafka://host:port[,host:port]", "nats://[user@]host:port[,host:port]",
        "pubsub://PROJECT", "pubsub://host:port/PROJECT" (an emulator),
        "servicebus://NAME.servicebus.windows.net" (or "servicebus" with connection_string=...).
    name
        What to call it; the same name replaces (and closes) an earlier connection.
    timeout
        Seconds within which the server has to answer.
    options
        The client's own settings by the client's own names, for example {"sasl.password": os.environ["KAFKA_PASSWORD"]}.
    read_only
        Refuse to publish.
    settings
        More options, where their names can be written so: connect("nats://host", user="me", password=os.environ["NATS_PASSWORD"]).
        No error shows what says who we are (password, token, seed, ...).

    Raises
    ------
    BrokerError
        INVALID for an unknown scheme or a password in the URL, UNREACHABLE, AUTH.
    """
    if has_secret(url):
        raise BrokerError(
            ErrorKind.INVALID,
            "url",
            "a password in a cell is already in IPython's history and in this notebook: change it, then pass it from the environment: "
            'connect(url, options={"sasl.password": os.environ["..."]})',
        )
    if twice := settings.keys() & (options or {}).keys():
        text = f"{min(twice)} is given twice, in options and as an argument: leave one out"
        raise BrokerError(ErrorKind.INVALID, min(twice), text)
    asked = {**(options or {}), **settings}
    session = shared_loop().run(Session.open(url, name=name, timeout=timeout, options=asked, read_only=read_only))
    connection = Connection(session)
    if (earlier := _open.pop(connection.name, None)) is not None:
        earlier.close()
    _open[connection.name] = connection
    # A process that ends gives back what it holds; leases that nobody extends would otherwise be waited for. What is registered
    # last runs first: anew with each connection, so that the loop, which ends itself at exit, still runs.
    atexit.unregister(_close_all)
    atexit.register(_close_all)
    return connection


def connections() -> list[Connection]:
    """The open connections, oldest first."""
    return list(_open.values())


def _close_all() -> None:
    for connection in connections():
        for view in connection._session.views.values():
            view.mute()
        connection.close()
