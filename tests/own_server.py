"""A server of a test module's own, which may be stopped for a moment."""

import os
import signal

import pytest

from broker_nb.testing.servers import OwnServer, ServerMissing


def own_server(name, **options):
    """A new server; skips where it is missing, or fails in CI."""
    try:
        return OwnServer(name, **options)
    except ServerMissing as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))


def freeze(server):
    """Stop a server of this process; its threads go on for a moment, which is waited for."""
    os.kill(server.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, server.pid, os.WSTOPPED)


def thaw(server):
    """Let it go on."""
    os.kill(server.pid, signal.SIGCONT)
