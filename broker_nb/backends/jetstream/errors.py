"""What JetStream and its client answer instead, as errors of ours."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

from nats.errors import SecureConnRequiredError

from broker_nb.backends.driver import Host
from broker_nb.errors import BrokerError, ErrorKind

NO_STREAM, NO_CONSUMER, NO_MESSAGE = 10059, 10014, 10037  # the server's own numbers

_KINDS = {
    10013: ErrorKind.CONFLICT,  # consumer name already in use
    10026: ErrorKind.CONFLICT,  # maximum consumers limit reached
    10039: ErrorKind.UNSUPPORTED,  # not enabled for account
    10054: ErrorKind.TOO_LARGE,
    10076: ErrorKind.UNSUPPORTED,  # not enabled
    10097: ErrorKind.TOO_LARGE,  # header size
    10099: ErrorKind.CONFLICT,  # several consumers without a filter on a work-queue stream
    10100: ErrorKind.CONFLICT,  # ... or with filters that overlap
    10148: ErrorKind.CONFLICT,  # consumer already exists
    10167: ErrorKind.THROTTLED,
}
_BY_CODE = {
    400: ErrorKind.INVALID,
    403: ErrorKind.PERMISSION,
    404: ErrorKind.NOT_FOUND,
    408: ErrorKind.TIMEOUT,
    409: ErrorKind.CONFLICT,
    429: ErrorKind.THROTTLED,
    503: ErrorKind.TRANSIENT,
}
RETRYABLE = frozenset({ErrorKind.UNREACHABLE, ErrorKind.TIMEOUT, ErrorKind.THROTTLED, ErrorKind.TRANSIENT})
_AUTH = ("authorization violation", "authentication", "user authentication", "account authentication")


class Refusal(Exception):
    """The server's answer to a question about JetStream that it does not fulfil."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        self.number = int(error.get("err_code", 0))
        self.code = int(error.get("code", 500))
        self.description = str(error.get("description", "refused"))
        super().__init__(self.description)

    @property
    def kind(self) -> ErrorKind:
        """The broker-neutral kind."""
        return _KINDS.get(self.number, _BY_CODE.get(self.code, ErrorKind.UNKNOWN))


def failure(host: Host, entity: str, refusal: Refusal) -> BrokerError:
    """The server's refusal as an error that names the entity."""
    kind = refusal.kind
    if kind is ErrorKind.NOT_FOUND:
        return missing(host, entity)
    return host.error(kind, entity, f"{entity}: {refusal.description}", retryable=kind in RETRYABLE)


def missing(host: Host, entity: str, way_out: str = "check the name against the list of topics") -> BrokerError:
    """NOT_FOUND, with the way out."""
    return host.error(ErrorKind.NOT_FOUND, entity, f"{entity}: not on this server, and not created; {way_out}")


def connecting(host: Host, servers: str, error: BaseException | None, *, asked: bool = False) -> BrokerError:
    """Why no connection was made. `asked`: the server greeted us, and wanted to know who we are."""
    text = (str(error) or type(error).__name__).removeprefix("nats: ")
    if isinstance(error, SecureConnRequiredError):
        text = f"{servers} does not offer TLS, which was asked for by tls or tls_...; nothing was sent"
        return host.error(ErrorKind.AUTH, servers, text)
    if isinstance(error, ssl.SSLError):
        hint = "is tls_ca the authority that signed the server, and are tls_cert and tls_key ours?"
        return host.error(ErrorKind.AUTH, servers, f"{servers}: TLS failed: {error.reason or text}; {hint}")
    if asked and isinstance(error, ConnectionError):  # it closes at once, and so its last word may be lost
        text = f"it closed the connection: {text}"
    elif isinstance(error, OSError) and error.filename is not None:
        return host.error(ErrorKind.INVALID, servers, f"{servers}: user_credentials or nkeys_seed cannot be read: {text}")
    elif not any(word in text.lower() for word in _AUTH):
        why = "no answer" if error is None else text
        text = f"{servers} does not answer ({why}); is the address right and the server running?"
        return host.error(ErrorKind.UNREACHABLE, servers, text, retryable=True)
    hint = "check user and password, token, nkeys_seed or user_credentials, tls_cert"
    return host.error(ErrorKind.AUTH, servers, f"{servers} does not accept who we are ({text}); {hint}")
