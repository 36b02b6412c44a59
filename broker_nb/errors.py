"""What can go wrong with a broker, in one exception type with a kind.

    Exception
    └── BrokerError            kind, entity, retryable
        ├── NotFound           the topic, subscription or server object is not there
        ├── Refused            we or the broker will not do it as asked (bad input, permission, unsupported, closed)
        ├── Unavailable        not now: unreachable, timed out, throttled
        └── Lost               what was held is gone (lease expired, fenced, range aged out)

Standard library only. Every text is one line that names the thing and the way out; secrets never get here.
"""

from __future__ import annotations

import enum
import re
from typing import Any, Self


class ErrorKind(enum.Enum):
    """The broker-neutral cause of an error."""

    NOT_FOUND = "not found"
    PERMISSION = "permission"
    AUTH = "authentication"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    INVALID = "invalid"
    TOO_LARGE = "too large"
    CONFLICT = "conflict"
    FENCED = "fenced"
    THROTTLED = "throttled"
    LEASE_LOST = "lease lost"
    AGED_OUT = "aged out"
    NO_CREDIT = "no credit"
    CLOSED = "closed"
    TRANSIENT = "transient"
    UNSUPPORTED = "unsupported"
    UNKNOWN = "unknown"


class BrokerError(Exception):
    """An operation on a broker failed.

    Parameters
    ----------
    kind
        The cause, broker-neutral.
    entity
        The topic, subscription, server or row that it is about, as the person spelt it.
    text
        One line; line breaks and control characters are replaced.
    retryable
        Whether the same call may succeed later without any change.
    """

    kind: ErrorKind
    entity: str
    retryable: bool

    def __new__(cls, kind: ErrorKind = ErrorKind.UNKNOWN, *args: object, **kwargs: object) -> Self:
        chosen: type[Any] = _CLASSES.get(kind, BrokerError) if cls is BrokerError else cls
        made: Self = super().__new__(chosen)
        return made

    def __init__(self, kind: ErrorKind, entity: str, text: str, *, retryable: bool = False) -> None:
        self.kind = kind
        self.entity = entity
        self.retryable = retryable
        super().__init__(one_line(text))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.kind, self.entity, str(self), self.retryable)


class NotFound(BrokerError):
    """The topic, subscription or other object does not exist (and was not created)."""


class Refused(BrokerError):
    """The call cannot work as asked; the text says what to change."""


class Unavailable(BrokerError):
    """The broker could not be reached or did not answer in time."""


class Lost(BrokerError):
    """What this session held or asked for is no longer there."""


_CLASSES: dict[ErrorKind, type[BrokerError]] = {
    ErrorKind.NOT_FOUND: NotFound,
    **dict.fromkeys(
        (
            ErrorKind.PERMISSION,
            ErrorKind.AUTH,
            ErrorKind.INVALID,
            ErrorKind.TOO_LARGE,
            ErrorKind.CONFLICT,
            ErrorKind.CLOSED,
            ErrorKind.UNSUPPORTED,
            ErrorKind.NO_CREDIT,
        ),
        Refused,
    ),
    **dict.fromkeys(
        (ErrorKind.UNREACHABLE, ErrorKind.TIMEOUT, ErrorKind.THROTTLED, ErrorKind.TRANSIENT),
        Unavailable,
    ),
    **dict.fromkeys((ErrorKind.FENCED, ErrorKind.LEASE_LOST, ErrorKind.AGED_OUT), Lost),
}

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


def one_line(text: str, limit: int = 600) -> str:
    """`text` without control or bidirectional characters, on one line, cut at `limit` characters."""
    flat = _CONTROL.sub(" ", text).strip()
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def _rebuild(kind: ErrorKind, entity: str, text: str, retryable: bool) -> BrokerError:
    return BrokerError(kind, entity, text, retryable=retryable)
