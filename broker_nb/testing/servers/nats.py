"""NATS: one node with JetStream."""

from __future__ import annotations

import json
import pathlib
import socket
import time
import uuid

from broker_nb.testing.servers.cache import locked
from broker_nb.testing.servers.go import build
from broker_nb.testing.servers.process import PortTaken, Process

__all__ = ["launch", "prepare"]

CONFIG = """\
listen: 127.0.0.1:{port}
server_name: {name}
jetstream: {{ store_dir: {data} }}
"""


def prepare(name: str) -> pathlib.Path:
    """The server's program, built where it is missing.

    Raises
    ------
    ServerMissing
        There is no Go, or the build failed.
    """
    return build(locked(name)["go"])


def launch(name: str, folder: pathlib.Path, ports: list[int], config: str, deadline: float) -> Process:
    """Start NATS with its data in `folder`, on the first of `ports`, and wait until it answers.

    Raises
    ------
    ServerMissing
        As `prepare` does.
    ServerFailed, PortTaken
        It ended, or was not ready by `deadline` (by `time.monotonic`).
    """
    program = prepare(name)
    identity = f"broker-nb-{uuid.uuid4().hex}"
    own = CONFIG.format(port=ports[0], name=identity, data=json.dumps(str(folder / "data")))
    (settings := folder / "server.conf").write_text(own + config)  # the last of two equal keys counts
    process = Process([program, "-c", settings], folder / "server.log")
    try:
        _wait(process, ports[0], identity, deadline)
    except BaseException:
        process.kill()
        raise
    return process


def _wait(process: Process, port: int, identity: str, deadline: float) -> None:
    while True:
        process.check("the server ended while starting")
        try:
            return _greet(port, identity)
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise process.failure(f"NATS is not ready: {error}") from error
        time.sleep(0.01)


def _greet(port: int, identity: str) -> None:
    """Read the server's greeting, which it sends once JetStream is up; ping it unless it wants to know first who we are."""
    with socket.create_connection(("127.0.0.1", port), timeout=1) as talk, talk.makefile("rb") as said:
        info = json.loads(said.readline().removeprefix(b"INFO "))
        if info["server_name"] != identity:
            raise PortTaken(f"another NATS, {info['server_name']}, answers on 127.0.0.1:{port}")
        if not (info.get("auth_required") or info.get("tls_required")):
            talk.sendall(b"PING\r\n")
            if (answer := said.readline()) != b"PONG\r\n":
                raise ValueError(f"no pong but {answer!r}")
