"""Rules of the repository that no linter knows; part of `make lint`."""

from __future__ import annotations

import hashlib
import io
import pathlib
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ASKED = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
TRACKED = [ROOT / name for name in ASKED.split("\0") if name and (ROOT / name).exists()]
MODULES = [path for path in TRACKED if path.suffix == ".py"]
# Hosts that a file may name: this machine, names and addresses reserved for examples, and what the licence and file formats name.
HOST = re.compile(
    r"localhost|127\.0\.0\.1|\[::1\]|(.*\.)?(example|invalid|test)(\.(com|org|net))?|192\.0\.2\.\d+|www\.apache\.org|json-schema\.org"
)


def comments(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", TRACKED, ids=name)
def test_no_foreign_host_and_no_path_of_a_machine(path: pathlib.Path) -> None:
    text = path.read_text("utf-8", "replace")
    named = {host for host in re.findall(r"\bhttps?://(?:[^/\s@\"'`]*@)?([\w.-]+\w|\[::1\])", text) if not HOST.fullmatch(host)}
    assert not named
    assert not re.search(r"(?<![\w.])/(root|home/\w+|Users/\w+|work)/\w", text)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_silenced_warning_says_why(path: pathlib.Path) -> None:
    silenced = [(line, text) for line, text in comments(path) if re.search(r"noqa|type: ignore", text)]
    bare = [each for each in silenced if not re.search(r"(noqa: [A-Z0-9, ]+|type: ignore\[[\w, -]+\])\W+\w+ \w+", each[1])]
    assert not bare


@pytest.mark.parametrize("path", [path for path in MODULES if ROOT / "broker_nb" in path.parents], ids=name)
def test_a_module_is_one_idea(path: pathlib.Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


def test_the_licence_is_the_pure_text() -> None:
    digest = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == digest


def test_containers_listen_on_this_machine_only() -> None:
    ports = re.findall(r"ports: \[(.*)\]", (ROOT / "compose.yaml").read_text())
    assert ports
    assert all(re.fullmatch(r'"127\.0\.0\.1:\d+:\d+"', port) for line in ports for port in line.split(", "))


def test_importing_the_package_imports_no_client_and_no_frame_library() -> None:
    code = (
        "import sys, broker_nb; print(*{'confluent_kafka', 'pandas', 'pyarrow', 'duckdb', 'orjson', 'IPython'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
