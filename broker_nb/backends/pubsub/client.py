"""What every Pub/Sub handle shares: settings, the channel with its two clients, names, and errors."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

import google.auth
import grpc
from google.api_core.exceptions import GoogleAPICallError
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import GoogleAuthError
from google.oauth2 import service_account
from google.pubsub_v1.services.publisher import PublisherAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber import SubscriberAsyncClient
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

from broker_nb.backends.driver import Host
from broker_nb.errors import BrokerError, ErrorKind

T = TypeVar("T")

OPTIONS = ("api_endpoint", "credentials", "project", "quota_project_id", "service_account_file")
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),  # what the client sets for itself
    ("grpc.max_reconnect_backoff_ms", 1000),  # grpc's own two minutes would outlast every question after a restart
]
_LOGIN = "log in again (gcloud auth application-default login) or name a key file (service_account_file)"
_NAME = re.compile(r"(projects/[^/\s]+/(topics|subscriptions)/)?[A-Za-z][\w.~+%-]{2,254}", re.ASCII)
_KINDS = {
    grpc.StatusCode.NOT_FOUND: ErrorKind.NOT_FOUND,
    grpc.StatusCode.PERMISSION_DENIED: ErrorKind.PERMISSION,
    grpc.StatusCode.UNAUTHENTICATED: ErrorKind.AUTH,
    grpc.StatusCode.UNAVAILABLE: ErrorKind.TRANSIENT,
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorKind.TIMEOUT,
    grpc.StatusCode.INVALID_ARGUMENT: ErrorKind.INVALID,
    grpc.StatusCode.OUT_OF_RANGE: ErrorKind.INVALID,
    grpc.StatusCode.FAILED_PRECONDITION: ErrorKind.CONFLICT,
    grpc.StatusCode.ALREADY_EXISTS: ErrorKind.CONFLICT,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorKind.THROTTLED,
    grpc.StatusCode.UNIMPLEMENTED: ErrorKind.UNSUPPORTED,
    grpc.StatusCode.ABORTED: ErrorKind.TRANSIENT,
    grpc.StatusCode.INTERNAL: ErrorKind.TRANSIENT,
    grpc.StatusCode.CANCELLED: ErrorKind.TRANSIENT,
}
_RETRYABLE = frozenset({ErrorKind.UNREACHABLE, ErrorKind.TIMEOUT, ErrorKind.THROTTLED, ErrorKind.TRANSIENT})


def kind_of(error: GoogleAPICallError | GoogleAuthError) -> ErrorKind:
    """The broker-neutral kind of a client's error."""
    if isinstance(error, GoogleAuthError):
        return ErrorKind.AUTH
    text = error.message or ""
    if "metadata from plugin failed" in text:  # no token: grpc calls that UNAVAILABLE
        return ErrorKind.AUTH
    kind = _KINDS.get(error.grpc_status_code, ErrorKind.UNKNOWN)
    if kind is ErrorKind.TRANSIENT and was_not_sent(error):
        return ErrorKind.UNREACHABLE
    return ErrorKind.TOO_LARGE if kind is ErrorKind.THROTTLED and "larger than max" in text else kind


def was_not_sent(error: GoogleAPICallError) -> bool:
    """Whether a call failed because there was no connection to send it on."""
    return bool(
        re.search(r"failed to connect|resolving|resolution failed|metadata from plugin failed", error.message or "", re.I)
    )


def failure(host: Host, entity: str, error: GoogleAPICallError | GoogleAuthError) -> BrokerError:
    """The client's error as ours, naming the entity."""
    below: BaseException | None = error
    while below is not None:
        below.__traceback__ = None  # its frames know the channel, and with that keep grpc's thread after close
        below = below.__cause__
    kind, text = kind_of(error), getattr(error, "message", None) or str(error)
    match kind:
        case ErrorKind.NOT_FOUND:
            text = "not in this project, and not created; check the name against the list of topics and subscriptions"
        case ErrorKind.AUTH:
            text = f"not logged in ({text}); {_LOGIN}"
        case ErrorKind.PERMISSION:
            text = f"not allowed with these credentials: {text}"
        case ErrorKind.UNREACHABLE:
            text = f"no connection ({text}); is the address right and the server running?"
        case ErrorKind.TIMEOUT:
            text = f"no answer in time ({text})"
    return host.error(kind, entity, f"{entity}: {text}", retryable=kind in _RETRYABLE)


def _is_cancelled() -> bool:
    task = asyncio.current_task()  # not known to a frame that an exception keeps: it would know the exception, and so itself
    return task is not None and task.cancelling() > 0


class Names:
    """Short names <-> the paths that Pub/Sub knows things by. What is in another project keeps its path."""

    def __init__(self, project: str, host: Host) -> None:
        self.project, self._host = project, host

    def topic(self, name: str) -> str:
        """The path of a topic."""
        return self._path("topics", name)

    def subscription(self, name: str) -> str:
        """The path of a subscription."""
        return self._path("subscriptions", name)

    def _path(self, what: str, name: str) -> str:
        if not (fits := _NAME.fullmatch(name)) or fits[2] not in (None, what):
            text = f"{name!r} is no name of {what}: a letter and then at least two of letters, digits and . _ ~ + % - are allowed"
            raise self._host.error(ErrorKind.INVALID, name, text)
        return name if fits[1] else f"projects/{self.project}/{what}/{name}"

    def short(self, path: str) -> str:
        """What a person calls it."""
        ours = f"projects/{self.project}/"
        return path.rpartition("/")[2] if path.startswith(ours) else path


class Settings:
    """The profile, taken apart: where the server is, in which project, and who we are."""

    def __init__(self, profile: Mapping[str, Any], host: Host) -> None:
        self.timeout = float(profile.get("timeout", 5.0))
        self._host = host
        self._options = dict(profile.get("options") or {})
        hosts, path = list(profile.get("hosts") or ()), str(profile.get("path") or "")
        self.emulator = hosts[0] if path and hosts else os.environ.get("PUBSUB_EMULATOR_HOST", "")
        self.project = str(self._options.get("project", "")) or path or (hosts[0] if hosts else "")
        if unknown := sorted(set(self._options) - set(OPTIONS)):
            raise self._bad(f"no option {unknown[0]!r}; there are: {', '.join(OPTIONS)}")
        if len(hosts) > 1 or "/" in self.project or profile.get("username") is not None:
            raise self._bad("write pubsub://PROJECT, or pubsub://host:port/PROJECT for an emulator")
        if hosts and not path and ":" in hosts[0]:
            raise self._bad(f"the project is missing; write pubsub://{hosts[0]}/PROJECT")
        if path and self._options:
            raise self._bad(f"an emulator takes no option {min(self._options)!r}; leave it out, or write pubsub://PROJECT")

    def _bad(self, text: str) -> BrokerError:
        return self._host.error(ErrorKind.INVALID, "pubsub", f"pubsub: {text}")

    def log_in(self) -> Credentials:
        """Credentials as the profile names them, else the environment's. Reads files and may ask a metadata server: not on the loop."""
        given, file = self._options.get("credentials"), self._options.get("service_account_file")
        if self.emulator:
            return AnonymousCredentials()  # type: ignore[no-untyped-call] # google-auth leaves constructors untyped
        if given is not None and not isinstance(given, Credentials):
            raise self._bad(f"credentials is a {type(given).__name__}; give an object of google.auth, or service_account_file")
        try:
            if given is not None:
                found, project = given, getattr(given, "project_id", None)
            elif file is not None:
                found = service_account.Credentials.from_service_account_file(str(file))  # type: ignore[no-untyped-call] # untyped there
                project = found.project_id
            else:
                found, project = google.auth.default()
        except (OSError, ValueError, GoogleAuthError) as error:  # a malformed key file is a ValueError
            what = f"key file {file}" if file is not None else "default credentials"
            raise self._host.error(ErrorKind.AUTH, "pubsub", f"pubsub: {what}: {error}; {_LOGIN}") from error
        self.project = self.project or project or ""
        return found

    def connect(self, credentials: Credentials) -> Clients:
        """The clients; nothing is sent yet."""
        if not self.project:
            raise self._bad("no project is named; write pubsub://PROJECT")
        if self.emulator:
            channel = grpc.aio.insecure_channel(self.emulator, options=_CHANNEL)
        else:
            channel = PublisherGrpcAsyncIOTransport.create_channel(
                str(self._options.get("api_endpoint", PublisherGrpcAsyncIOTransport.DEFAULT_HOST)),
                credentials=credentials,
                quota_project_id=self._options.get("quota_project_id"),
                options=_CHANNEL,
            )
        return Clients(channel, Names(self.project, self._host), self._host, self.timeout)


class Clients:
    """One channel, and the client's two halves on it."""

    def __init__(self, channel: grpc.aio.Channel, names: Names, host: Host, timeout: float) -> None:
        self.names, self.host, self.timeout = names, host, timeout
        self._channel: Any = channel
        self._publisher: PublisherAsyncClient | None
        self._publisher = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))
        self._subscriber: SubscriberAsyncClient | None
        self._subscriber = SubscriberAsyncClient(transport=SubscriberGrpcAsyncIOTransport(channel=channel))

    @property
    def closed(self) -> bool:
        """Whether the connection is closed."""
        return self._channel is None

    @property
    def publisher(self) -> PublisherAsyncClient:
        """The half that knows topics."""
        if self._publisher is None:
            raise self._is_closed()
        return self._publisher

    @property
    def subscriber(self) -> SubscriberAsyncClient:
        """The half that knows subscriptions."""
        if self._subscriber is None:
            raise self._is_closed()
        return self._subscriber

    def _is_closed(self) -> BrokerError:
        return self.host.error(ErrorKind.CLOSED, "pubsub", "the connection is closed; connect again")

    @property
    def bounded(self) -> dict[str, Any]:
        """How a call that should answer at once is made: the clients' own retries go on for a minute."""
        return {"retry": None, "timeout": self.timeout}

    async def run(self, call: Awaitable[T]) -> T:
        """The answer of a call, which grpc cancels when the channel is closed: that is no cancellation of whoever waits."""
        try:
            return await call
        except asyncio.CancelledError:
            if not self.closed or _is_cancelled():
                raise
            raise self._is_closed() from None

    async def ask(self, entity: str, call: Awaitable[T]) -> T:
        """The answer of a call; its error as ours."""
        try:
            return await self.run(call)
        except (GoogleAPICallError, GoogleAuthError) as error:
            raise failure(self.host, entity, error) from error

    async def close(self) -> None:
        """End what is under way and disconnect."""
        channel, self._channel = self._channel, None
        self._publisher = self._subscriber = None  # grpc's thread ends when nobody knows the channel any more
        if channel is not None:
            await channel.close()
