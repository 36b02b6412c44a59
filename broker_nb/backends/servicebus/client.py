"""What every Service Bus handle shares: settings, a lane with a loop of its own, entity names, and errors in one line."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import re
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from azure.core.credentials import AccessToken, AzureNamedKeyCredential, AzureSasCredential
from azure.core.exceptions import AzureError, ClientAuthenticationError
from azure.servicebus import TransportType, exceptions
from azure.servicebus.aio import ServiceBusClient, ServiceBusReceiver, ServiceBusSender

from broker_nb.backends.driver import Entity, Host, Kind, Lane
from broker_nb.errors import BrokerError, ErrorKind

T = TypeVar("T")
# The client logs what it raises; without any handler logging's last resort would print it.
logging.getLogger("azure").addHandler(logging.NullHandler())

EMULATOR_KEY = ("RootManageSharedAccessKey", "SAS_KEY_VALUE")  # the same in every emulator
EMULATOR_ADMINISTRATION = 5300
CLIENT_OPTIONS = frozenset({"transport_type", "http_proxy", "custom_endpoint_address", "connection_verify", "ssl_context"})
CLIENT_OPTIONS |= {"user_agent", "logging_enable", "socket_timeout"}
OURS = frozenset({"connection_string", "credential", "entities", "administration_port", "UseDevelopmentEmulator"})
DEAD = "/$DeadLetterQueue"
QUEUE = "queue"
"""What a subscription is called where the entity is a queue: it has one place to take from, without a name."""

_KINDS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], ErrorKind], ...] = (
    (exceptions.MessagingEntityNotFoundError, ErrorKind.NOT_FOUND),
    ((exceptions.MessageLockLostError, exceptions.SessionLockLostError), ErrorKind.LEASE_LOST),
    ((exceptions.MessageAlreadySettled, exceptions.MessageNotFoundError), ErrorKind.LEASE_LOST),
    (exceptions.SessionCannotBeLockedError, ErrorKind.CONFLICT),
    (exceptions.MessageSizeExceededError, ErrorKind.TOO_LARGE),
    ((exceptions.ServiceBusAuthenticationError, ClientAuthenticationError), ErrorKind.AUTH),
    (exceptions.ServiceBusAuthorizationError, ErrorKind.PERMISSION),
    ((exceptions.OperationTimeoutError, TimeoutError), ErrorKind.TIMEOUT),
    ((exceptions.ServiceBusServerBusyError, exceptions.ServiceBusQuotaExceededError), ErrorKind.THROTTLED),
    (exceptions.MessagingEntityDisabledError, ErrorKind.PERMISSION),
    ((exceptions.ServiceBusConnectionError, exceptions.ServiceBusCommunicationError), ErrorKind.UNREACHABLE),
    (OSError, ErrorKind.UNREACHABLE),
)
_RETRYABLE = frozenset({ErrorKind.UNREACHABLE, ErrorKind.TIMEOUT, ErrorKind.THROTTLED, ErrorKind.TRANSIENT})
_CONDITIONS = {
    "amqp:not-allowed": ErrorKind.INVALID,
    "amqp:invalid-field": ErrorKind.INVALID,
    "amqp:not-implemented": ErrorKind.UNSUPPORTED,
}
_CONDITIONS |= {"com.microsoft:argument-error": ErrorKind.INVALID, "amqp:internal-error": ErrorKind.TRANSIENT}
_SECRET = re.compile(r"(SharedAccess(?:Key|Signature)\s*=|\bsig=)[^;&\s'\"]+", re.I)
_REFUSED = re.compile(
    r"(invalid|expired) ?(signature|token|issuer|audience)|status[ -]?code:? 401|InvalidSignature|ExpiredToken", re.I
)


class Place(NamedTuple):
    """Where an entity is: a queue or topic, a subscription of it, whether the dead-letter sub-queue is meant, and the session."""

    parent: str
    subscription: str = ""
    dead: bool = False
    session: str | None = None

    @property
    def path(self) -> str:
        """As the broker spells it."""
        below = f"/Subscriptions/{self.subscription}" if self.subscription else ""
        return f"{self.parent}{below}{DEAD if self.dead else ''}"


def place(entity: Entity) -> Place:
    """Where an entity is. "t/Subscriptions/s" and ".../$DeadLetterQueue" are names too.

    Of a queue the subscription is "queue". Behind a subscription's name may stand "/$DeadLetterQueue", or the id of a session,
    "/*" for any: there is no slash in names of subscriptions.
    """
    name, dead, session = entity.name, False, None
    if entity.kind is Kind.SUBSCRIPTION and entity.parent:
        name, slash, below = name.partition("/")
        name = f"{entity.parent}/Subscriptions/{name}" if name != QUEUE else entity.parent
        if f"/{below}".lower() == DEAD.lower():
            name += DEAD
        elif slash:
            session = below
    if name.lower().endswith(DEAD.lower()):
        name, dead = name[: -len(DEAD)], True
    parent, _, subscription = re.sub("/subscriptions/", "/Subscriptions/", name, flags=re.I).partition("/Subscriptions/")
    return Place(parent, subscription, dead, session)


class _Tokens:
    """A credential of azure-identity, which blocks, for the client, which must not."""

    def __init__(self, credential: Any) -> None:
        self._credential = credential

    async def get_token(self, *scopes: str, **given: Any) -> AccessToken:
        token: AccessToken = await asyncio.to_thread(self._credential.get_token, *scopes, **given)
        return token

    async def close(self) -> None:
        """Nothing: the credential belongs to the caller."""


class Settings:
    """A profile, understood.

    `hosts`: the namespace; `options`: the client's own by the client's names (`transport_type`, `http_proxy`, ...), and
    `connection_string`, or `credential` (of azure-identity, or "default"), `entities` (names, where the key may not list them),
    and for an emulator `UseDevelopmentEmulator` and `administration_port`.
    """

    def __init__(self, profile: Mapping[str, Any], host: Host) -> None:
        options = dict(profile.get("options") or {})
        self.host, self.timeout = host, float(profile.get("timeout", 5.0))
        if unknown := sorted(options.keys() - CLIENT_OPTIONS - OURS):
            raise self._bad(f"no option {unknown[0]!r}; there are: {', '.join(sorted(CLIENT_OPTIONS | OURS))}")
        hosts = list(profile.get("hosts") or [])
        text = str(options.get("connection_string") or "")
        emulator = str(options.get("UseDevelopmentEmulator", "")).lower() == "true"
        if len(hosts) != 1 and not text:
            raise self._bad("name one namespace, as servicebus://NAME.servicebus.windows.net, or give option connection_string")
        if not text and emulator:
            name, key = profile.get("username") or EMULATOR_KEY[0], profile.get("password") or EMULATOR_KEY[1]
            text = f"Endpoint=sb://{hosts[0]};SharedAccessKeyName={name};SharedAccessKey={key};UseDevelopmentEmulator=true"
        self.connection_string = text
        parts = {k.strip().lower(): v.strip() for k, _, v in (part.partition("=") for part in text.split(";"))}
        self.namespace = re.sub(r"^\w+://|/+$", "", parts.get("endpoint", "")) or (hosts[0] if hosts else "")
        self.emulator = parts.get("usedevelopmentemulator", "").lower() == "true"
        if text and hosts and not self.namespace.startswith(hosts[0].partition(":")[0]):
            raise self._bad("the connection string is for another namespace than the URL")
        self._secrets = [v for k, v in parts.items() if k in ("sharedaccesskey", "sharedaccesssignature") and v]
        self.credential = None if text else self._credential(options.get("credential"), profile)
        entities = options.get("entities") or ()
        self.entities: list[str] = [e.strip() for e in entities.split(",")] if isinstance(entities, str) else list(entities)
        self.entity_path = parts.get("entitypath", "")
        if self.entity_path:
            self.entities = [self.entity_path]
        self.administration_port = int(options.get("administration_port") or EMULATOR_ADMINISTRATION)
        self.client_options = {k: v for k, v in options.items() if k in CLIENT_OPTIONS}
        if isinstance(kind := self.client_options.get("transport_type"), str):
            known = {t.name.lower(): t for t in TransportType}
            if kind.lower() not in known:
                raise self._bad(f"transport_type {kind!r} is not one of: {', '.join(t.name for t in TransportType)}")
            self.client_options["transport_type"] = known[kind.lower()]
        wanted = self.client_options.get("transport_type") is TransportType.AmqpOverWebsocket
        if (wanted or {"http_proxy", "custom_endpoint_address"} & self.client_options.keys()) and importlib.util.find_spec(
            "aiohttp"
        ) is None:
            text = 'servicebus: AMQP over WebSocket needs aiohttp; run: pip install "broker-nb[servicebus]"'
            raise host.error(ErrorKind.UNSUPPORTED, "servicebus", text)
        try:
            self.client()
        except (ValueError, TypeError) as error:
            raise self._bad(self.clean(str(error))) from None  # the client's error may quote the connection string

    def _bad(self, text: str) -> BrokerError:
        return self.host.error(ErrorKind.INVALID, "servicebus", f"servicebus: {text}")

    def _credential(self, given: Any, profile: Mapping[str, Any]) -> Any:
        if profile.get("username") and profile.get("password"):
            return AzureNamedKeyCredential(profile["username"], profile["password"])
        if isinstance(given, AzureNamedKeyCredential | AzureSasCredential):
            return given
        if given is None or given == "default":
            try:
                from azure.identity import DefaultAzureCredential
            except ModuleNotFoundError:
                text = "no credential: give option connection_string or credential, or pip install azure-identity"
                raise self._bad(text) from None
            given = DefaultAzureCredential()
        if not hasattr(given, "get_token") or asyncio.iscoroutinefunction(given.get_token):
            raise self._bad("option credential must be one of azure-identity (not of its .aio), a SAS or a named-key credential")
        return given

    def client(self) -> ServiceBusClient:
        """A client; it connects only when a handle is opened. The portable layer retries, so this one never does."""
        options: dict[str, Any] = {**self.client_options, "retry_total": 0, "try_timeout": self.timeout}
        if self.connection_string:
            return ServiceBusClient.from_connection_string(self.connection_string, **options)
        credential = (
            self.credential
            if isinstance(self.credential, AzureNamedKeyCredential | AzureSasCredential)
            else _Tokens(self.credential)
        )
        return ServiceBusClient(self.namespace, credential, **options)  # type: ignore[arg-type] # a protocol of the client's

    def receiver(self, at: Place, **options: Any) -> ServiceBusReceiver:
        """An unopened receiver."""
        options = {"sub_queue": "deadletter" if at.dead else None, **options}
        if at.subscription:
            return self.client().get_subscription_receiver(at.parent, at.subscription, **options)
        return self.client().get_queue_receiver(at.parent, **options)

    def sender(self, name: str, **options: Any) -> ServiceBusSender:
        """An unopened sender, to a queue or a topic: the client does not tell them apart."""
        return self.client().get_queue_sender(name, **options)

    def clean(self, text: str) -> str:
        """`text` without keys and signatures."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _SECRET.sub(r"\1***", text)

    def failure(self, entity: str, cause: BaseException) -> BrokerError:
        """The client's error as ours, naming the entity."""
        kind = next((kind for types, kind in _KINDS if isinstance(cause, types)), ErrorKind.UNKNOWN)
        text = self.clean(str(cause) or type(cause).__name__)
        text = re.sub(r"\s*(Reference|TrackingId|Timestamp|SystemTracker):[^,;.\s]+[,;.]?", "", text).removeprefix(
            "Handler failed: "
        )
        if kind is ErrorKind.UNKNOWN and (said := re.search(r"Error condition: (?:ErrorCondition\.)?([\w:.-]+)", text)):
            kind = _CONDITIONS.get(said[1].rstrip("."), kind)
        if kind in (ErrorKind.AUTH, ErrorKind.PERMISSION, ErrorKind.UNKNOWN) and _REFUSED.search(text):
            kind = ErrorKind.AUTH
        if kind is ErrorKind.AUTH:
            text = f"the key or token was not accepted: check it, and this machine's clock ({text})"
        elif kind is ErrorKind.NOT_FOUND:
            text = "not in this namespace, and not created; check the name against the list of topics"
        elif kind is ErrorKind.TIMEOUT:
            text = f"no answer within {self.timeout:g} s ({text})"
        elif "requires sessions" in text or "without specifying a session" in text or "requires a session" in text:
            kind = ErrorKind.UNSUPPORTED
            text = 'it has sessions: name one behind the subscription, as "queue/ID", or "queue/*" for the next that is free'
        error = self.host.error(kind, entity, f"{entity}: {text}", retryable=kind in _RETRYABLE)
        error.__cause__ = None if self.clean(str(cause)) != str(cause) else cause  # a chained error would show what was cut out
        return error


class Pending(Generic[T]):
    """A call whose result waits for the next caller when its own was cancelled."""

    def __init__(self) -> None:
        self._task: asyncio.Task[T] | None = None

    async def ended(self) -> None:
        """Wait for a call that is under way, whoever wants its result."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def call(self, begin: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of `begin()`, or of the call that a cancelled caller left behind."""
        if self._task is None:
            self._task = asyncio.ensure_future(begin())
        task = self._task
        try:
            return await asyncio.shield(task)
        finally:
            if task.done() and not asyncio.current_task().cancelling():  # type: ignore[union-attr] # this runs in one
                self._task = None


class _Loop(asyncio.SelectorEventLoop):
    """Knows the connections that were opened on it: the client forgets one that died, and leaves its socket open."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()

    async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        transport, protocol = await super().create_connection(*args, **kwargs)
        self._opened.add(transport)
        return transport, protocol

    async def hang_up(self) -> None:
        """Close what is still open."""
        for transport in self._opened:
            transport.close()
        await asyncio.sleep(0)  # closing takes a turn


class Worker:
    """A lane with an event loop of its own, on which the client's coroutines run to their end.

    On the shared loop decoding would hold up everybody, and a caller's cancellation would go through the client, which then may
    lose rows; the client's blocking twin reads its socket from two threads at once, and may mix up the frames of large messages.
    """

    def __init__(self, lane: Lane, settings: Settings) -> None:
        self._lane, self._settings = lane, settings
        self._runner: asyncio.Runner | None = None
        self._closed = False

    async def run(self, entity: str, work: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        """Await `work()` there, for at most `seconds` (the profile's time-out by default); errors come as ours."""
        if self._closed:
            raise self._settings.host.error(ErrorKind.CLOSED, entity, f"{entity}: this was closed; open it anew")
        return await self._lane.run(self._work, entity, work, seconds or self._settings.timeout)

    def _work(self, entity: str, work: Callable[[], Awaitable[T]], seconds: float) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(seconds):
                return await work()

        if self._runner is None:
            self._runner = asyncio.Runner(loop_factory=_Loop)
        try:
            return self._runner.run(bounded())
        except BrokerError:
            raise
        except (AzureError, OSError, ValueError) as error:
            failed = self._settings.failure(entity, error)
            raise failed from failed.__cause__

    def rest(self) -> None:
        """Let the client's own tasks work for a moment: they give back what came unasked, and keep the connection."""
        if self._runner is not None:
            self._runner.run(asyncio.sleep(0.05))

    def idle(self, every: float) -> None:
        """Have `rest` called whenever nothing else ran for so many seconds."""
        self._lane.idle(self.rest, every)

    async def close(self, *closing: Callable[[], Awaitable[object]]) -> None:
        """Close what is open on it, all at once (each takes a second), and end. Idempotent."""
        if not self._closed:
            self._closed = True
            await self._lane.run(self._end, closing)
            self._lane.close()

    def _end(self, closing: tuple[Callable[[], Awaitable[object]], ...]) -> None:
        async def end() -> None:
            async with asyncio.timeout(self._settings.timeout):
                await asyncio.gather(*(close() for close in closing), return_exceptions=True)

        if self._runner is not None:
            try:
                self._runner.run(end())
            except TimeoutError:
                logging.getLogger("broker_nb").info("servicebus: no answer while closing")
            loop = self._runner.get_loop()
            if isinstance(loop, _Loop):
                self._runner.run(loop.hang_up())
            self._runner.close()
