"""What every Kafka handle shares: settings, names that are safe to pass on, errors, and whether the brokers answer."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message

from broker_nb.backends.driver import Event, Host, Position
from broker_nb.errors import BrokerError, ErrorKind

log = logging.getLogger("broker_nb.kafka")
log.addHandler(logging.NullHandler())  # without any handler logging's last resort would print the client's lines to stderr


class _Once(logging.Filter):
    """Lets a line pass every 30 s: while a broker is away each handle repeats itself twenty times a second."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        line, now = record.getMessage().partition(" (after ")[0], time.monotonic()
        if now - self._seen.get(line, -math.inf) < 30:
            return False
        if len(self._seen) > 100:
            self._seen.clear()
        self._seen[line] = now
        return True


log.addFilter(_Once())

CONSUME = 1000
"""Rows per client call: larger batches were slower, smaller ones too."""

_KINDS: dict[int, ErrorKind] = {
    code: kind
    for kind, codes in {
        ErrorKind.NOT_FOUND: (
            KafkaError.UNKNOWN_TOPIC_OR_PART,
            KafkaError.UNKNOWN_TOPIC_ID,
            KafkaError.GROUP_ID_NOT_FOUND,
            KafkaError._UNKNOWN_TOPIC,
            KafkaError._UNKNOWN_PARTITION,
            KafkaError._UNKNOWN_GROUP,
        ),
        ErrorKind.PERMISSION: (
            KafkaError.TOPIC_AUTHORIZATION_FAILED,
            KafkaError.GROUP_AUTHORIZATION_FAILED,
            KafkaError.CLUSTER_AUTHORIZATION_FAILED,
            KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        ),
        ErrorKind.AUTH: (
            KafkaError._AUTHENTICATION,
            KafkaError._SSL,
            KafkaError.SASL_AUTHENTICATION_FAILED,
            KafkaError.UNSUPPORTED_SASL_MECHANISM,
            KafkaError.ILLEGAL_SASL_STATE,
        ),
        ErrorKind.UNREACHABLE: (
            KafkaError._TRANSPORT,
            KafkaError._ALL_BROKERS_DOWN,
            KafkaError._RESOLVE,
            KafkaError.BROKER_NOT_AVAILABLE,
            KafkaError.NETWORK_EXCEPTION,
        ),
        ErrorKind.TIMEOUT: (
            KafkaError._TIMED_OUT,
            KafkaError._TIMED_OUT_QUEUE,
            KafkaError._MSG_TIMED_OUT,
            KafkaError.REQUEST_TIMED_OUT,
        ),
        ErrorKind.INVALID: (
            KafkaError._INVALID_ARG,
            KafkaError.TOPIC_EXCEPTION,
            KafkaError.INVALID_GROUP_ID,
            KafkaError.INVALID_RECORD,
            KafkaError.INVALID_TIMESTAMP,
            KafkaError.INVALID_MSG,
            KafkaError.INVALID_REQUEST,
            KafkaError.INVALID_CONFIG,
            KafkaError.POLICY_VIOLATION,
        ),
        ErrorKind.TOO_LARGE: (
            KafkaError.MSG_SIZE_TOO_LARGE,
            KafkaError.RECORD_LIST_TOO_LARGE,
            KafkaError.OFFSET_METADATA_TOO_LARGE,
        ),
        ErrorKind.CONFLICT: (KafkaError.INCONSISTENT_GROUP_PROTOCOL, KafkaError.GROUP_MAX_SIZE_REACHED),
        ErrorKind.FENCED: (KafkaError._FENCED, KafkaError.FENCED_INSTANCE_ID, KafkaError.PRODUCER_FENCED),
        ErrorKind.LEASE_LOST: (
            KafkaError.ILLEGAL_GENERATION,
            KafkaError.UNKNOWN_MEMBER_ID,
            KafkaError.STALE_MEMBER_EPOCH,
            KafkaError.FENCED_MEMBER_EPOCH,
            KafkaError._ASSIGNMENT_LOST,
        ),
        ErrorKind.THROTTLED: (KafkaError.THROTTLING_QUOTA_EXCEEDED,),
        ErrorKind.AGED_OUT: (KafkaError.OFFSET_OUT_OF_RANGE, KafkaError._AUTO_OFFSET_RESET),
        ErrorKind.UNSUPPORTED: (KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION),
        ErrorKind.TRANSIENT: (
            KafkaError._NOENT,  # what list_offsets answers while a partition has no leader
            KafkaError._WAIT_COORD,
            KafkaError._STATE,
            KafkaError.LEADER_NOT_AVAILABLE,
            KafkaError.NOT_LEADER_FOR_PARTITION,
            KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
            KafkaError.COORDINATOR_NOT_AVAILABLE,
            KafkaError.NOT_COORDINATOR,
            KafkaError.REBALANCE_IN_PROGRESS,
            KafkaError.NOT_ENOUGH_REPLICAS,
        ),
    }.items()
    for code in codes
}
_RETRYABLE = frozenset({ErrorKind.UNREACHABLE, ErrorKind.TIMEOUT, ErrorKind.THROTTLED, ErrorKind.TRANSIENT})
_OURS = {
    "client.id": "broker_nb",
    "reconnect.backoff.max.ms": 1000,  # the client's own 10 s would outlast every question after a restart of the broker
}
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


def kind_of(error: KafkaError) -> ErrorKind:
    """The broker-neutral kind of a client's error."""
    return _KINDS.get(error.code(), ErrorKind.TRANSIENT if error.retriable() else ErrorKind.UNKNOWN)


def failure(host: Host, entity: str, cause: KafkaError | KafkaException) -> BrokerError:
    """The client's error as ours, naming the entity."""
    error = cause.args[0] if isinstance(cause, KafkaException) else cause
    if not isinstance(error, KafkaError):
        return host.error(ErrorKind.UNKNOWN, entity, str(cause))
    kind = kind_of(error)
    if kind is ErrorKind.NOT_FOUND:
        return host.error(
            kind, entity, f"{entity}: not on this broker, and not created; check the name against the list of topics"
        )
    text = error.str().removeprefix("Broker: ").removeprefix("Local: ")
    return host.error(kind, entity, f"{entity}: {text}", retryable=kind in _RETRYABLE)


def topic_name(host: Host, name: str) -> str:
    """`name`, if it can be a topic's. The client crashes the process on text that is not UTF-8, so nothing else gets to it."""
    if not _TOPIC.fullmatch(name) or name in (".", ".."):
        raise host.error(
            ErrorKind.INVALID,
            name,
            f"{name!r} cannot be a Kafka topic: 1 to 249 ASCII letters, digits, dots, _ and - are allowed",
        )
    return name


def plain_text(host: Host, what: str, text: str) -> str:
    """`text`, if the client can take it: it crashes on what is not UTF-8 and cuts at a NUL."""
    if flaw := text_flaw(text):
        raise host.error(ErrorKind.INVALID, what, f"{what} {text!r} {flaw}; Kafka takes UTF-8 text without it")
    return text


def text_flaw(text: str) -> str:
    """Why the client cannot take a text; "" when it can."""
    if "\0" in text:
        return "has a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "has a lone surrogate"
    return ""


def offset_of(position: Position) -> int:
    """The offset a position stands for: (n,) is row n, (n, ...) is after row n."""
    return position[0] + (len(position) > 1)


class Health:
    """Whether the brokers answer, from what the client's background threads report. Any thread may call it."""

    def __init__(self, host: Host, servers: str) -> None:
        self._host, self._servers = host, servers
        self.down_since: float | None = None
        self.refused: KafkaError | None = None  # the last time the broker did not accept who we are
        self.last = "no answer"

    def on_error(self, error: KafkaError) -> None:
        """The clients' `error_cb`."""
        if error.code() == KafkaError._ALL_BROKERS_DOWN:
            if self.down_since is None:
                self.down_since = time.monotonic()
                self._host.emit(Event("reconnecting", error=self.unreachable()))
        elif kind_of(error) is ErrorKind.AUTH:
            self.refused = error
        elif kind_of(error) is ErrorKind.UNREACHABLE:
            self.last = error.str()

    def watch(self, note: Callable[[KafkaError], None]) -> Callable[[KafkaError], None]:
        """An `error_cb` of one handle, which wants to know too."""

        def on_error(error: KafkaError) -> None:
            self.on_error(error)
            note(error)

        return on_error

    def on_answer(self) -> None:
        """A broker answered."""
        if self.down_since is not None:
            self.down_since = None
            self._host.emit(Event("reconnected"))

    @property
    def down_s(self) -> float:
        """Seconds since every broker went away; 0.0 while one is there."""
        since = self.down_since
        return 0.0 if since is None else time.monotonic() - since

    def unreachable(self) -> BrokerError:
        """The error to raise when nothing answers."""
        text = f"{self._servers} does not answer ({self.last}); is the address right and the broker running?"
        return self._host.error(ErrorKind.UNREACHABLE, self._servers, text, retryable=True)


class Settings:
    """The profile as settings for one handle after the other."""

    def __init__(self, profile: Mapping[str, Any], host: Host) -> None:
        self.servers = ",".join(profile.get("hosts") or ())
        self._options = dict(profile.get("options") or {})
        if not self.servers and "bootstrap.servers" not in self._options:
            raise host.error(ErrorKind.INVALID, "kafka", "kafka: no server is named; write kafka://host:port")
        self.servers = str(self._options.pop("bootstrap.servers", "")) or self.servers
        if profile.get("username") is not None:
            login = {"security.protocol": "SASL_SSL", "sasl.mechanisms": "PLAIN", "sasl.username": profile["username"]}
            self._options = login | {"sasl.password": profile.get("password") or ""} | self._options
        self.timeout = float(profile.get("timeout", 5.0))
        self._host = host
        self.health = Health(host, self.servers)

    def config(self, ours: Mapping[str, Any], forced: Mapping[str, Any], native: Mapping[str, Any] = {}) -> dict[str, Any]:
        """Settings of one handle: our defaults, the profile's options, the call's own, and what must not be changed."""
        asked = {"bootstrap.servers": self.servers, **_OURS, **ours, **self._options, **native}
        for name, value in asked.items():
            for text in (name, value):
                if isinstance(text, str):
                    plain_text(self._host, "option", text)
        guards = {"allow.auto.create.topics": False, "logger": log, "error_cb": self.health.on_error}
        return asked | guards | dict(forced)


def is_about(error: KafkaError, topic: str) -> bool:
    """Whether an error that came beside the rows ends reading the topic: it, or our right to read it, is gone."""
    return kind_of(error) in (ErrorKind.NOT_FOUND, ErrorKind.PERMISSION) and error.str().startswith(f"{topic} [")


def fetch(consumer: Consumer, max_rows: int, max_bytes: int, wait: float) -> tuple[list[Message], int]:
    """What is there now, after at most `wait` seconds for the first row, and its bytes. Errors and ends of partitions come as rows."""
    first = consumer.poll(wait)
    if first is None:
        return [], 0
    rows, size = [first], len(first)
    while len(rows) < max_rows and size < max_bytes:
        more = consumer.consume(min(CONSUME, max_rows - len(rows)), 0)  # waits for nothing: a longer time-out is waited in full
        if not more:
            break
        rows += more
        size += sum(map(len, more))
    return rows, size


def split(rows: list[Message]) -> tuple[list[Message], list[Message]]:
    """Messages, and what came between them as errors."""
    if not any(map(Message.error, rows)):
        return rows, []
    return [m for m in rows if m.error() is None], [m for m in rows if m.error() is not None]


def last_offsets(rows: list[Message]) -> dict[int, int]:
    """Per partition the offset of its last row."""
    last = dict(zip(map(Message.partition, rows), rows, strict=True))
    return {partition: message.offset() for partition, message in last.items()}  # type: ignore[misc] # a message has both
