"""The pytest plugin of the conformance suites: `pytest_plugins = ["broker_nb.testing.plugin"]`.

A test module gives a module-scoped fixture `harness`. With BROKER_NB_CONFORMANCE=FILE, what became of every case on every backend is
written there as JSON: {backend: {suite: {case: {"state": "pass" | "fail" | "notyet" | "never", "says": docstring or reason}}}}.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.register_assert_rewrite(
    *(
        f"broker_nb.testing.{name}"
        for name in ("bench", "contract", "delivery", "groups", "looking", "publishing", "settling", "states", "tails")
    )
)

from broker_nb.portable.client import Client  # noqa: E402 - the suites' modules are rewritten first
from broker_nb.portable.loop import shared_loop  # noqa: E402 - as above
from broker_nb.testing.bench import Bench, Reader  # noqa: E402 - as above
from broker_nb.testing.delivery import Idle  # noqa: E402 - as above
from broker_nb.testing.harness import Harness, title  # noqa: E402 - as above
from broker_nb.testing.watch import Watch  # noqa: E402 - as above

RESULTS = pytest.StashKey[dict[str, Any]]()


# ------------------------------------------------------------------ fixtures
@pytest.fixture(scope="module")
def connection(harness: Harness) -> Iterator[tuple[Client, Watch]]:
    """One connection per module."""
    client = shared_loop().run(harness.open())
    watch = Watch(client.driver.capabilities)
    watch.driver(client.driver)
    yield client, watch
    shared_loop().run(client.close())


@pytest.fixture(scope="module")
def silent(request: pytest.FixtureRequest, harness: Harness, connection: tuple[Client, Watch]) -> Iterator[dict[type, Reader]]:
    """Subscriptions on which nothing happens, one per idle suite of the module, opened before its first case."""
    mine = [i for i in request.session.items if isinstance(i, pytest.Function) and i.module is request.module]
    suites = {i.cls for i in mine if i.originalname in vars(Idle) and i.cls is not None and issubclass(i.cls, Idle)}
    readers = {}
    for suite in suites:
        bench = Bench(harness, *connection, suite.family)

        async def wait(bench: Bench = bench) -> Reader:
            reader = await bench.reader(await bench.topic())
            assert await reader.rest() == []
            return reader

        readers[suite] = shared_loop().run(wait())
    yield readers
    for reader in readers.values():
        shared_loop().run(reader.close())


@pytest.fixture
def bench(
    request: pytest.FixtureRequest,
    harness: Harness,
    connection: tuple[Client, Watch],
    silent: dict[type, Reader],
    record_property: Callable[[str, object], None],
) -> Bench:
    """What a case works with."""
    says = (request.function.__doc__ or "").strip().partition("\n")[0]
    record_property("conformance", [harness.backend(), title(request.cls), request.node.originalname, "pass", says])
    made = Bench(harness, *connection, request.cls.family)
    made.silent = silent.get(request.cls)
    return made


# ------------------------------------------------------------------ report
def pytest_configure(config: pytest.Config) -> None:
    """Begin the report."""
    config.stash[RESULTS] = {}
    config.pluginmanager.register(_Report(config.stash[RESULTS]), "broker-nb-conformance-report")


class _Report:
    def __init__(self, results: dict[str, Any]) -> None:
        self._results = results

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup" and report.passed:
            return
        for name, value in report.user_properties:
            if name == "conformance" and isinstance(value, list | tuple):
                backend, suite, case, state, says = map(str, value)
                known = self._results.setdefault(backend, {}).setdefault(suite, {})
                failed = known.get(case, {}).get("state") == "fail" or (state == "pass" and not report.passed)
                known[case] = {"state": "fail" if failed else state, "says": says}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        path = os.environ.get("BROKER_NB_CONFORMANCE")
        if path and self._results and not hasattr(session.config, "workerinput"):
            pathlib.Path(path).write_text(json.dumps(self._results, indent=1, sort_keys=True) + "\n")
