"""A server process that cannot outlive its owner, and its log."""

from __future__ import annotations

import atexit
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

__all__ = ["PortTaken", "Process", "ServerFailed", "free_port", "is_free"]

TAIL = 15  # lines of the log in an error


class ServerFailed(Exception):
    """A server did not start, or ended; the text has the last lines of its log."""


class PortTaken(ServerFailed):
    """Somebody else listens on the server's port."""


class Process:
    """A running program in a process group of its own, ended by `stop`, at exit, and (Linux) when its owner is killed.

    On Linux the kernel counts the *thread* that made this object as its owner: make it in one that lasts.

    Parameters
    ----------
    command
        The program and its arguments.
    log
        Where its output is appended.
    """

    def __init__(self, command: Sequence[str | os.PathLike[str]], log: pathlib.Path) -> None:
        self.log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        launcher = pathlib.Path(__file__).with_name("_exec.py")
        with open(log, "ab") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", launcher, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._popen.pid
        self._owner = os.getpid()
        atexit.register(self.kill)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._popen.poll() is None

    def stop(self, grace: float = 20.0) -> None:
        """Ask it to end, insist after `grace` seconds, and return when it has ended."""
        self._end(signal.SIGTERM, grace)
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would; may be called again."""
        self._end(signal.SIGKILL, 30.0)
        atexit.unregister(self.kill)

    def _end(self, how: signal.Signals, grace: float) -> None:
        if os.getpid() != self._owner or not self.running:  # a forked child runs its parent's exit handlers
            return
        os.killpg(self.pid, how)
        try:
            self._popen.wait(grace)
        except subprocess.TimeoutExpired:
            if how is signal.SIGKILL:
                raise

    def output(self) -> str:
        """What it has written since it was started."""
        with open(self.log, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode("utf-8", "replace")

    def check(self, what: str) -> None:
        """Raise `failure(what)` if it has ended."""
        if not self.running:
            raise self.failure(f"{what}, status {self._popen.returncode}")

    def failure(self, what: str) -> ServerFailed:
        """An error that says `what` happened and shows the end of the log."""
        output = self.output()
        lines = output.splitlines()[-TAIL:]
        kind = PortTaken if "address already in use" in output.lower() else ServerFailed
        return kind("\n  ".join([f"{what}; the end of {self.log}:", *(lines or ["(empty)"])]))

    def wait_for_port(self, port: int, deadline: float) -> None:
        """Return when something listens on `port`; `deadline` is by `time.monotonic`.

        Raises
        ------
        ServerFailed
            The program ended, or the deadline passed.
        """
        while True:
            self.check("the server ended while starting")
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise self.failure("the server did not start in time") from error
            time.sleep(0.02)


def free_port() -> int:
    """A loopback port that was free a moment ago; somebody else may still take it first.

    From below the range that systems give to outgoing connections: a client that keeps trying to reconnect to a server that is
    down could be given the server's own port, connect to itself, and keep the server from coming back.
    """
    while not is_free(port := random.randrange(15_000, 32_000)):  # noqa: S311 (not a secret)
        pass
    return port


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` of 127.0.0.1 now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: closed connections that linger do not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
