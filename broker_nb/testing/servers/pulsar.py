"""Apache Pulsar: broker, bookie and metadata in one process (standalone)."""

from __future__ import annotations

import http.client
import json
import pathlib
import time
from typing import Any

from broker_nb.testing.servers.cache import LockedFile, locked, unpacked
from broker_nb.testing.servers.java import java
from broker_nb.testing.servers.process import Process

__all__ = ["launch", "prepare", "query"]

# The last of two equal keys counts.
SETTINGS = """
brokerServicePort={port}
webServicePort={web}
bindAddress=127.0.0.1
advertisedAddress=127.0.0.1
dbStorage_writeCacheMaxSizeMb=16
dbStorage_readAheadCacheMaxSizeMb=16
journalSyncData=false
diskUsageThreshold=0.99
diskUsageWarnThreshold=0.98
webSocketServiceEnabled=false
# Topics outlive the minute without a subscription, and rows the last one that read them.
brokerDeleteInactiveTopicsEnabled=false
defaultRetentionTimeInMinutes=-1
defaultRetentionSizeInMB=-1
# As clusters have it on which single messages of a batch are acknowledged; without it, the rest of a batch comes whole again.
acknowledgmentAtBatchIndexLevelEnabled=true
"""
# Its own file: the one of the tarball writes beside the console, and buffers.
LOGGING = """\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d %p %m (%c{1})%n%ex{short}
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
"""
HEALTH = "/admin/v2/brokers/health"
NAMESPACES = "/admin/v2/namespaces/public"


def query(ports: list[int]) -> str:
    """What has to follow the address in a URL: where the admin API is."""
    return f"?admin_url=http://127.0.0.1:{ports[1]}"


def prepare(name: str) -> tuple[str, pathlib.Path]:
    """Java and the unpacked server, fetched where they are missing.

    Raises
    ------
    ServerMissing
        Java or Pulsar itself is missing and could not be fetched.
    DigestMismatch
        What was fetched is not what was locked.
    """
    (line,) = locked(name)["maven"]
    return java(), unpacked(LockedFile(line))


def launch(name: str, folder: pathlib.Path, ports: list[int], config: str, deadline: float) -> Process:
    """Start Pulsar with its data in `folder`, on `ports` (clients', the admin API's, the bookie's), and wait until it is healthy.

    Raises
    ------
    ServerMissing, DigestMismatch
        As `prepare` does.
    ServerFailed, PortTaken
        It ended, or was not ready by `deadline` (by `time.monotonic`).
    """
    program, home = prepare(name)
    port, web, bookie = ports
    usual = (home / "conf" / "standalone.conf").read_text()
    (settings := folder / "standalone.conf").write_text(usual + SETTINGS.format(port=port, web=web) + config)
    (logging := folder / "log4j2.properties").write_text(LOGGING)
    environment = {
        "JAVA_HOME": pathlib.Path(program).resolve().parent.parent,
        "PULSAR_STANDALONE_CONF": settings,
        "PULSAR_LOG_CONF": logging,
        "PULSAR_LOG_DIR": folder / "logs",
        "PULSAR_MEM": "-Xms256m -Xmx512m -XX:MaxDirectMemorySize=512m",
        "PULSAR_GC": "-XX:+UseSerialGC",
    }
    command: list[str | pathlib.Path] = [
        "/usr/bin/env",
        *(f"{key}={value}" for key, value in environment.items()),
        home / "bin" / "pulsar",
        "standalone",
    ]
    where: list[str | pathlib.Path] = [
        "--metadata-dir",
        folder / "metadata",
        "--bookkeeper-dir",
        folder / "bookkeeper",
        "--bookkeeper-port",
        str(bookie),
    ]
    process = Process([*command, "-nfw", "-nss", "-a", "127.0.0.1", *where], folder / "server.log")
    try:
        process.wait_for_port(web, deadline)
        _wait(process, web, deadline)
    except BaseException:
        process.kill()
        raise
    return process


def _wait(process: Process, web: int, deadline: float) -> None:
    """Healthy means that a message went through; the namespace that everybody uses is made last."""
    while True:
        process.check("the server ended while starting")
        try:
            if _get(web, HEALTH) == b"ok" and "public/default" in json.loads(_get(web, NAMESPACES)):
                return
            said: Any = "not healthy yet"
        except (OSError, http.client.HTTPException, ValueError) as error:
            said = error
        if time.monotonic() > deadline:
            raise process.failure(f"Pulsar is not ready: {said}")
        time.sleep(0.1)


def _get(web: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", web, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()
