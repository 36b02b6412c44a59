"""A stand-in for Azure Service Bus, which exists outside of Docker only in the cloud: its wire on AMQP and its administration on HTTP.

It is judged by the vendor's clients and documentation, not by a vendor's server. `config` is JSON: `queues` (name -> settings),
`topics` (name -> settings with `subscriptions`, each with settings and `rules`), `keys` and `tokens` (see `access`). Settings:
`lock_s`, `max_deliveries`, `sessions`, `ttl_s`, `dead_letter_expired`, `duplicates_s`, `partitioned`, `max_message_bytes`. It stores in
memory only.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import sys
import sysconfig
import time

import broker_nb
from broker_nb.testing.servers.cache import ServerMissing, tool
from broker_nb.testing.servers.process import PortTaken, Process, ServerFailed

__all__ = ["launch", "prepare", "query"]

GREETING = b"AMQP\x03\x01\x00\x00"  # SASL


def prepare(name: str) -> pathlib.Path:
    """The folder of the AMQP library that the stand-in is made of; built from source, once.

    Raises
    ------
    ServerMissing
        It could not be built: it needs a C compiler, Python's headers and those of OpenSSL.
    """
    try:
        return tool(name)
    except ServerMissing as error:
        needs = "gcc, libssl-dev and Python's headers (python3-dev)"
        have = [f"no {what}" for what, there in (("gcc", _compiler()), ("Python.h", _headers())) if not there]
        raise ServerMissing(
            f"the stand-in for Service Bus is built here: install {needs}; {', '.join([*have, str(error)])}"
        ) from error


def _compiler() -> bool:
    return any(shutil.which(program) for program in ("cc", "gcc", "clang"))


def _headers() -> bool:
    return pathlib.Path(sysconfig.get_path("include"), "Python.h").exists()


def query(ports: list[int]) -> str:
    """What a URL has to say besides the address: as an emulator it has no TLS, a key that everybody knows, and two ports."""
    return f"?UseDevelopmentEmulator=true&administration_port={ports[1]}"


def launch(name: str, folder: pathlib.Path, ports: list[int], config: str, deadline: float) -> Process:
    """Start the stand-in, AMQP on the first of `ports` and administration on the second, and wait until it answers.

    Raises
    ------
    ServerMissing
        As `prepare` does.
    ServerFailed, PortTaken
        `config` is not JSON, or it ended, or was not ready by `deadline` (by `time.monotonic`).
    """
    library = prepare(name)
    try:
        (settings := folder / "entities.json").write_text(json.dumps(json.loads(config or "{}")))
    except ValueError as error:
        raise ServerFailed(f"the stand-in's configuration is not JSON: {error}") from error
    path = os.pathsep.join([str(library), str(pathlib.Path(broker_nb.__file__).parents[1])])
    command = ["/usr/bin/env", f"PYTHONPATH={path}", sys.executable, "-m", f"{__name__}.main"]
    process = Process([*command, str(ports[0]), str(ports[1]), settings], folder / "server.log")
    try:
        process.wait_for_port(ports[1], deadline)
        process.wait_for_port(ports[0], deadline)
        _greet(ports[0], process, deadline)
    except BaseException:
        process.kill()
        raise
    return process


def _greet(port: int, process: Process, deadline: float) -> None:
    """An AMQP peer answers a greeting with its own."""
    with socket.create_connection(("127.0.0.1", port), timeout=max(0.1, deadline - time.monotonic())) as talk:
        talk.sendall(GREETING)
        if talk.recv(8) != GREETING:
            process.check("the stand-in ended while starting")
            raise PortTaken(f"something that is no AMQP broker answers on 127.0.0.1:{port}")
