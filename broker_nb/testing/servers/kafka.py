"""Apache Kafka: one node, broker and controller in one process (KRaft)."""

from __future__ import annotations

import base64
import os
import pathlib
import subprocess
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from broker_nb.testing.servers.cache import LockedFile, ServerMissing, fetch, locked
from broker_nb.testing.servers.java import java
from broker_nb.testing.servers.process import PortTaken, Process, ServerFailed

__all__ = ["launch"]

T = TypeVar("T")
PROPERTIES = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
controller.quorum.voters=1@127.0.0.1:{controller}
log.dirs={data}
num.partitions=1
# As most real clusters have it: a look that creates topics is caught.
auto.create.topics.enable=true
offsets.topic.replication.factor=1
offsets.topic.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
group.initial.rebalance.delay.ms=0
# The controller holds the place of a broker that was killed for this long (9 s by default) before it may come back.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
"""
LOGGING = """\
status = error
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d %p %m (%c{1})%n%ex{short}
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
"""


def prepare(name: str) -> tuple[str, list[pathlib.Path]]:
    """Java and the jars, fetched where they are missing.

    Raises
    ------
    ServerMissing
        Java, the client, or Kafka itself is missing and could not be fetched.
    DigestMismatch
        What was fetched is not what was locked.
    """
    _client()
    return java(), fetch([LockedFile(line) for line in locked(name)["maven"]])


def launch(name: str, folder: pathlib.Path, ports: list[int], config: str, deadline: float) -> Process:
    """Start Kafka with its data in `folder`, on `ports` (clients', the controller's), and wait until a produce succeeds.

    Raises
    ------
    ServerMissing, DigestMismatch
        As `prepare` does.
    ServerFailed, PortTaken
        It ended, or was not ready by `deadline` (by `time.monotonic`).
    """
    program, jars = prepare(name)
    (data := folder / "data").mkdir(exist_ok=True)
    own = PROPERTIES.format(port=ports[0], controller=ports[1], data=data)
    (properties := folder / "server.properties").write_text(own + config)
    (logging := folder / "log4j2.properties").write_text(LOGGING)
    base = [
        program,
        "-Xms256m",
        "-Xmx512m",
        "-XX:+UseSerialGC",
        f"-Dlog4j2.configurationFile={logging}",
        "-cp",
        os.pathsep.join(map(str, jars)),
    ]
    if not (identity := data / "meta.properties").exists():
        _format([*base, "kafka.tools.StorageTool", "format", "-t", _new_id(), "-c", str(properties)])
    process = Process([*base, "kafka.Kafka", properties], folder / "server.log")
    try:
        process.wait_for_port(ports[0], deadline)
        _probe(process, f"127.0.0.1:{ports[0]}", identity, deadline)
    except BaseException:
        process.kill()
        raise
    return process


def _new_id() -> str:
    # The first byte keeps it from starting with "-", which would make it an option.
    return base64.urlsafe_b64encode(b"K" + uuid.uuid4().bytes[1:]).decode().rstrip("=")


def _format(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ServerFailed(f"Kafka could not prepare its data folder: {done.stdout}{done.stderr}")


def _client() -> None:
    try:
        import confluent_kafka.admin  # noqa: F401 (asked for, to say early that it is missing)
    except ImportError as error:
        raise ServerMissing(f'the Kafka client is missing ({error}): pip install "broker-nb[kafka]"') from error


def _probe(process: Process, address: str, identity: pathlib.Path, deadline: float) -> None:
    """Describe the cluster; produce to a throw-away topic; delete it, and see it gone."""
    from confluent_kafka import KafkaException, Producer
    from confluent_kafka.admin import AdminClient
    from confluent_kafka.cimpl import NewTopic

    def until(what: Callable[[], T]) -> T:
        while True:
            try:
                return what()
            except KafkaException as error:
                if not process.running or time.monotonic() > deadline:
                    raise process.failure(f"Kafka is not ready: {error}") from error
            time.sleep(0.05)

    client: dict[str, str | int | float | bool] = {
        "bootstrap.servers": address,
        "log_level": 0,
        "allow.auto.create.topics": False,
    }
    admin = AdminClient(client)
    topic = f"broker-nb-ready-{uuid.uuid4().hex}"
    cluster = until(lambda: admin.describe_cluster(request_timeout=2).result(3))
    if f"cluster.id={cluster.cluster_id}\n" not in identity.read_text():
        raise PortTaken(f"another Kafka, cluster {cluster.cluster_id}, answers on {address}")
    until(lambda: admin.create_topics([NewTopic(topic, 1, 1)], request_timeout=2)[topic].result(3))
    producer = Producer(client | {"enable.idempotence": True})
    failed: list[object] = []
    producer.produce(topic, b"", on_delivery=lambda error, _: failed.append(error) if error else None)
    if producer.flush(max(deadline - time.monotonic(), 1)) or failed:
        raise process.failure(f"Kafka takes no message: {failed or 'no answer'}")
    until(lambda: admin.delete_topics([topic], request_timeout=2)[topic].result(3))
    while topic in until(lambda: admin.list_topics(timeout=2)).topics:
        time.sleep(0.02)
