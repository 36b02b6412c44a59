"""Pub/Sub: Google's own fake server (pstest), a Go program whose source and locked modules lie beside this file."""

from __future__ import annotations

import pathlib
import time

from broker_nb.testing.servers.cache import ServerMissing
from broker_nb.testing.servers.go import build_folder
from broker_nb.testing.servers.process import Process

__all__ = ["launch", "prepare"]


def prepare(name: str) -> pathlib.Path:
    """The server's program, built where it is missing.

    Raises
    ------
    ServerMissing
        There is no Go, or the build failed.
    """
    return build_folder(name, pathlib.Path(__file__).parent)


def launch(name: str, folder: pathlib.Path, ports: list[int], config: str, deadline: float) -> Process:
    """Start it on the first of `ports` and wait until it answers. It keeps everything in memory.

    Raises
    ------
    ServerMissing
        As `prepare` does, or there is something in `config`, of which it has none.
    ServerFailed, PortTaken
        It ended, or was not ready by `deadline` (by `time.monotonic`).
    """
    if config:
        raise ServerMissing("Google's fake Pub/Sub has no configuration; leave it out")
    process = Process([prepare(name), f"127.0.0.1:{ports[0]}"], folder / "server.log")
    try:
        _wait(process, deadline)
    except BaseException:
        process.kill()
        raise
    return process


def _wait(process: Process, deadline: float) -> None:
    """Until it says so: it listens before it does."""
    while "listening on" not in process.output():
        process.check("the server ended while starting")
        if time.monotonic() > deadline:
            raise process.failure("Pub/Sub is not ready")
        time.sleep(0.01)
