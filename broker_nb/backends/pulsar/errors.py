"""What Pulsar, its client and its admin API answer instead, as errors of ours."""

from __future__ import annotations

from typing import Any

import pulsar

from broker_nb.backends.driver import Host
from broker_nb.errors import BrokerError, ErrorKind

RETRYABLE = frozenset({ErrorKind.UNREACHABLE, ErrorKind.TIMEOUT, ErrorKind.THROTTLED, ErrorKind.TRANSIENT})

_KINDS = {
    "Timeout": ErrorKind.TIMEOUT,
    "ConnectError": ErrorKind.UNREACHABLE,
    "NotConnected": ErrorKind.UNREACHABLE,
    "AuthenticationError": ErrorKind.AUTH,
    "ErrorGettingAuthenticationData": ErrorKind.AUTH,
    "AuthorizationError": ErrorKind.PERMISSION,
    "TopicNotFound": ErrorKind.NOT_FOUND,
    "SubscriptionNotFound": ErrorKind.NOT_FOUND,
    "ConsumerNotFound": ErrorKind.NOT_FOUND,
    "ConsumerBusy": ErrorKind.CONFLICT,
    "ConsumerAssignError": ErrorKind.CONFLICT,
    "ProducerBusy": ErrorKind.FENCED,
    "ProducerFenced": ErrorKind.FENCED,
    "MessageTooBig": ErrorKind.TOO_LARGE,
    "InvalidMessage": ErrorKind.INVALID,
    "IncompatibleSchema": ErrorKind.INVALID,
    "InvalidConfiguration": ErrorKind.INVALID,
    "InvalidTopicName": ErrorKind.INVALID,
    "InvalidUrl": ErrorKind.INVALID,
    "TopicTerminated": ErrorKind.UNSUPPORTED,
    "OperationNotSupported": ErrorKind.UNSUPPORTED,
    "NotAllowedError": ErrorKind.UNSUPPORTED,
    "UnsupportedVersionError": ErrorKind.UNSUPPORTED,
    "CumulativeAcknowledgementNotAllowedError": ErrorKind.UNSUPPORTED,
    "LookupError": ErrorKind.TRANSIENT,
    "ServiceUnitNotReady": ErrorKind.TRANSIENT,
    "BrokerMetadataError": ErrorKind.TRANSIENT,
    "BrokerPersistenceError": ErrorKind.TRANSIENT,
    "TooManyLookupRequestException": ErrorKind.THROTTLED,
    "ProducerQueueIsFull": ErrorKind.THROTTLED,
    "MemoryBufferIsFull": ErrorKind.THROTTLED,
    "ProducerBlockedQuotaExceededError": ErrorKind.THROTTLED,
    "ProducerBlockedQuotaExceededException": ErrorKind.THROTTLED,
    "AlreadyClosed": ErrorKind.CLOSED,
}
_BY_STATUS = {
    401: ErrorKind.AUTH,
    403: ErrorKind.PERMISSION,
    404: ErrorKind.NOT_FOUND,
    405: ErrorKind.UNSUPPORTED,
    408: ErrorKind.TIMEOUT,
    409: ErrorKind.CONFLICT,
    412: ErrorKind.INVALID,
    429: ErrorKind.THROTTLED,
    503: ErrorKind.TRANSIENT,
    504: ErrorKind.TIMEOUT,
}
_SAID = {
    ErrorKind.TIMEOUT: "no answer in time",
    ErrorKind.UNREACHABLE: "the broker is not reachable",
    ErrorKind.NOT_FOUND: "not on this cluster, and not created; check the name against the list of topics",
    ErrorKind.PERMISSION: "not allowed to whom we are",
    ErrorKind.AUTH: "the cluster does not accept who we are; check token, username and password, or the certificate",
    ErrorKind.CONFLICT: "somebody else is connected in a way that excludes us; use another subscription, or its consumer_type",
    ErrorKind.FENCED: "another producer of this name is connected; end it first",
}


def kind_of(name: str) -> ErrorKind:
    """The broker-neutral kind of one of the client's results, by its name."""
    return _KINDS.get(name, ErrorKind.UNKNOWN)


def failure(host: Host, entity: str, error: pulsar.PulsarException | str) -> BrokerError:
    """One of the client's exceptions, or the name of one of its results, as an error that names the entity."""
    name = error if isinstance(error, str) else type(error).__name__
    kind = kind_of(name)
    said = _SAID.get(kind, name if isinstance(error, str) else str(error).removeprefix("Pulsar error: "))
    return host.error(kind, entity, f"{entity}: {said} ({name})", retryable=kind in RETRYABLE)


def refusal(host: Host, entity: str, status: int, said: str) -> BrokerError:
    """An answer of the admin API that is none."""
    kind = _BY_STATUS.get(status, ErrorKind.TRANSIENT if status >= 500 else ErrorKind.UNKNOWN)
    text = f"{entity}: {_SAID.get(kind, 'the admin API refused')} ({said or status})"
    return host.error(kind, entity, text, retryable=kind in RETRYABLE)


def missing(host: Host, entity: str, why: str) -> BrokerError:
    """NOT_FOUND, with the way out."""
    return host.error(ErrorKind.NOT_FOUND, entity, f"{entity}: {why}")


def invalid(host: Host, entity: str, why: str) -> BrokerError:
    """INVALID, with the way out."""
    return host.error(ErrorKind.INVALID, entity, f"{entity}: {why}")


def options_of(host: Host, entity: str, given: dict[str, Any], known: frozenset[str], what: str) -> dict[str, Any]:
    """The given options, all of which the client knows."""
    if unknown := sorted(given.keys() - known):
        raise invalid(host, entity, f"there is no option {unknown[0]!r} for {what}; there are: {', '.join(sorted(known))}")
    return given
