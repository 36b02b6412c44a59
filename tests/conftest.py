"""The real servers, each started at most once per run, in the process that outlives all others of the run."""

from __future__ import annotations

import multiprocessing.connection as mpc
import os
import signal
import threading

import pytest

from broker_nb.testing.servers import Server, ServerMissing, start

pytest_plugins = ["broker_nb.testing.plugin"]


class Keeper:
    """Starts servers on demand and stops them with the run; under pytest-xdist its workers ask over a socket."""

    def __init__(self) -> None:
        self._answers: dict[str, Server | Exception] = {}
        self.listener: mpc.Listener | None = None
        self.authkey = os.urandom(16)

    def get(self, name: str) -> Server | Exception:
        if name not in self._answers:
            try:
                self._answers[name] = start(name)
            except Exception as error:  # noqa: BLE001 (every test that needs the server tells it)
                self._answers[name] = error
        return self._answers[name]

    def listen(self) -> str:
        """The address to ask at. The one thread owns the servers, so it must last: the kernel ends them with it."""
        if self.listener is None:
            self.listener = mpc.Listener(family="AF_UNIX", authkey=self.authkey)
            threading.Thread(target=self._answer, args=[self.listener], daemon=True).start()
        return str(self.listener.address)

    def _answer(self, listener: mpc.Listener) -> None:
        while True:
            with listener.accept() as connection:
                answer = self.get(connection.recv())
                connection.send(answer.url if isinstance(answer, Server) else answer)

    def close(self) -> None:
        for answer in self._answers.values():
            if isinstance(answer, Server):
                answer.stop()


KEEPER = pytest.StashKey[Keeper]()


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell without job control hands it down ignored
    config.stash[KEEPER] = Keeper()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:  # of pytest-xdist, which has no types
    keeper = node.config.stash[KEEPER]
    node.workerinput["servers"] = (keeper.listen(), keeper.authkey)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[KEEPER].close()


def server_url(config: pytest.Config, name: str) -> str:
    """The URL of server `name`; skips where it is missing, or fails in CI."""
    if ask := getattr(config, "workerinput", {}).get("servers"):
        with mpc.Client(ask[0], authkey=ask[1]) as keeper:
            keeper.send(name)
            answer = keeper.recv()
    else:
        found = config.stash[KEEPER].get(name)
        answer = found.url if isinstance(found, Server) else found
    if isinstance(answer, ServerMissing) and os.environ.get("CI") != "true":
        pytest.skip(str(answer))
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture(scope="session")
def kafka_url(pytestconfig: pytest.Config) -> str:
    """An Apache Kafka of this run, shared by its tests: use topics and groups of your own."""
    return server_url(pytestconfig, "kafka")


@pytest.fixture(scope="session")
def nats_url(pytestconfig: pytest.Config) -> str:
    """A NATS server with JetStream of this run, shared by its tests: use streams and subjects of your own."""
    return server_url(pytestconfig, "nats")


@pytest.fixture(scope="session")
def pubsub_url(pytestconfig: pytest.Config) -> str:
    """Google's fake Pub/Sub of this run, shared by its tests: use projects of your own."""
    return server_url(pytestconfig, "pubsub")


@pytest.fixture(scope="session")
def servicebus_url(pytestconfig: pytest.Config) -> str:
    """A stand-in for Service Bus of this run (or what BROKER_NB_TEST_SERVICEBUS names), shared by its tests: use entities of your own."""
    return server_url(pytestconfig, "servicebus")


@pytest.fixture(scope="session")
def pulsar_url(pytestconfig: pytest.Config) -> str:
    """A Pulsar of this run, shared by its tests: use topics of your own."""
    return server_url(pytestconfig, "pulsar")
