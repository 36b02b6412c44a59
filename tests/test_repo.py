"""Rules of the repository that no linter knows; part of `make lint`."""

from __future__ import annotations

import hashlib
import io
import pathlib
import re
import subprocess
import sys
import tokenize

ROOT = pathlib.Path(__file__).parent.parent
ASKED = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
TRACKED = [ROOT / name for name in ASKED.split("\0") if name and (ROOT / name).exists()]
MODULES = [path for path in TRACKED if path.suffix == ".py"]
# Hosts that a file may name: this machine, names and addresses reserved for examples, and what the licence and file formats name.
HOST = re.compile(
    r"localhost|127\.0\.0\.1|\[::1\]|(.*\.)?(example|invalid|test)(\.(com|org|net))?|192\.0\.2\.\d+|www\.apache\.org|json-schema\.org|www\.w3\.org|schemas\.microsoft\.com"
)


def comments(path: pathlib.Path) -> list[tuple[int, str]]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def test_no_foreign_host_and_no_path_of_a_machine() -> None:
    found = []
    for path in TRACKED:
        text = path.read_text("utf-8", "replace")
        hosts = re.findall(r"\bhttps?://(?:[^/\s@\"'`]*@)?([\w.-]+\w|\[::1\])", text)
        found += [(path, host) for host in hosts if not HOST.fullmatch(host)]
        found += [(path, match[0]) for match in re.finditer(r"(?<![\w.])/(root|home/\w+|Users/\w+|work)/\w+", text)]
    assert not found


def test_every_silenced_warning_says_why() -> None:
    reason = r"(noqa: [A-Z0-9, ]+|type: ignore\[[\w, -]+\])\W+\w.{3,}"
    silenced = [(path, line, text) for path in MODULES for line, text in comments(path) if re.search(r"noqa|type: ignore", text)]
    assert silenced
    assert not [each for each in silenced if not re.search(reason, each[2])]


def test_a_module_is_one_idea() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in MODULES if ROOT / "broker_nb" in path.parents}
    del lengths[ROOT / "broker_nb" / "backends" / "driver.py"]  # the contract, most of it doc comments
    assert not {path: length for path, length in lengths.items() if length > 400}


def test_nothing_of_the_package_is_left_out_of_git() -> None:
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "broker_nb"]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert not [name for name in ignored if "__pycache__" not in name and "/labextension/" not in name]


def test_the_licence_is_the_pure_text() -> None:
    digest = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == digest


def test_containers_listen_on_this_machine_only() -> None:
    ports = re.findall(r"ports: \[(.*)\]", (ROOT / "compose.yaml").read_text())
    assert ports
    assert all(re.fullmatch(r'"127\.0\.0\.1:\d+:\d+"', port) for line in ports for port in line.split(", "))


def test_importing_the_package_imports_no_client_and_no_frame_library() -> None:
    code = "import sys, broker_nb; print(*{'confluent_kafka', 'grpc', 'pandas', 'pyarrow', 'duckdb', 'orjson', 'IPython'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
