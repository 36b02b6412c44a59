"""Questions to the admin REST API, on a lane: only GET, and the one POST that counts a backlog and changes nothing."""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from broker_nb.backends.driver import Host, Lane
from broker_nb.backends.pulsar.errors import invalid, refusal
from broker_nb.backends.pulsar.settings import Settings
from broker_nb.errors import BrokerError, ErrorKind

T = TypeVar("T")
_REDIRECTS = 3


class Topic(NamedTuple):
    """A topic's name, in full."""

    namespace: str
    local: str

    @property
    def name(self) -> str:
        """As the broker spells it."""
        return f"persistent://{self.namespace}/{self.local}"

    @property
    def path(self) -> str:
        """Where the admin API has it."""
        return f"persistent/{self.namespace}/{urllib.parse.quote(self.local, safe='')}"

    def partition(self, number: int) -> Topic:
        """One of its partitions, which is a topic too."""
        return Topic(self.namespace, f"{self.local}-partition-{number}")


def parse_topic(host: Host, name: str, namespace: str) -> Topic:
    """A topic by its full name, by tenant/namespace/name, or by its name in `namespace`."""
    scheme, mark, rest = name.partition("://")
    if mark and scheme == "non-persistent":
        text = f"{name}: a non-persistent topic keeps nothing, so there is nothing to look at or to give back; use its own client"
        raise host.error(ErrorKind.UNSUPPORTED, name, text)
    parts = (rest if mark else name).split("/")
    if (
        (mark and scheme != "persistent")
        or len(parts) not in ((3,) if mark else (1, 3))
        or not all(parts)
        or not name.isprintable()
    ):
        raise invalid(host, name, "a topic is written as name, tenant/namespace/name or persistent://tenant/namespace/name")
    return Topic("/".join(parts[:2]), parts[2]) if len(parts) == 3 else Topic(namespace, parts[0])


class Admin:
    """One connection to the admin API, on a lane of its own."""

    def __init__(self, settings: Settings, host: Host, lane: Lane) -> None:
        self._settings, self._host, self._lane = settings, host, lane
        self._base = urllib.parse.urlsplit(settings.admin_url)
        self._open: dict[tuple[str, str], http.client.HTTPConnection] = {}
        self._closed = False

    async def ask(self, question: Callable[..., T], *args: Any) -> T:
        """A question that is made of several requests, on the lane."""
        if self._closed:
            raise self._host.error(ErrorKind.CLOSED, "pulsar", "the connection is closed; connect again")
        return await self._lane.run(question, *args)

    def get(self, path: str, entity: str) -> Any:
        """The answer, parsed; None where it is empty."""
        return self.request("GET", path, entity)

    def find(self, path: str, entity: str) -> Any:
        """As `get`; None also where we may not ask, or nothing is there."""
        try:
            return self.get(path, entity)
        except BrokerError as error:
            if error.kind in (ErrorKind.NOT_FOUND, ErrorKind.PERMISSION, ErrorKind.AUTH, ErrorKind.UNSUPPORTED):
                return None
            raise

    def request(self, method: str, path: str, entity: str) -> Any:
        """One request, on the lane; a connection that the server closed meanwhile is opened again."""
        scheme, place, target = self._base.scheme, self._base.netloc, f"{self._base.path}/admin/v2/{path}"
        for _ in range(_REDIRECTS):
            status, said, location = self._send(scheme, place, method, target, entity)
            if location is None:
                break
            to = urllib.parse.urlsplit(location)  # the broker that owns the topic
            scheme, place, target = to.scheme or scheme, to.netloc or place, to.path + (f"?{to.query}" if to.query else "")
        if status not in (200, 204):
            raise refusal(self._host, entity, status, _reason(said))
        try:
            return json.loads(said) if said else None
        except ValueError:  # a version comes as plain text
            return said.decode("utf-8", "replace")

    def _send(self, scheme: str, place: str, method: str, target: str, entity: str) -> tuple[int, bytes, str | None]:
        for fresh in (False, True):
            connection = self._open.get((scheme, place))
            if connection is None or fresh:
                connection, fresh = self._connect(scheme, place), True
            try:
                connection.request(method, target, headers=self._settings.headers(self._settings.timeout))
                answer = connection.getresponse()
                return answer.status, answer.read(), answer.headers.get("Location") if 300 < answer.status < 309 else None
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                connection.close()
                self._open.pop((scheme, place), None)
                if fresh or isinstance(error, TimeoutError):
                    raise self._unreachable(f"{scheme}://{place}", entity, error) from error
        raise AssertionError  # the second try returns or raises

    def _connect(self, scheme: str, place: str) -> http.client.HTTPConnection:
        timeout = self._settings.timeout
        if scheme == "https":
            context = self._settings.context or ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(place, timeout=timeout, context=context)
        else:
            connection = http.client.HTTPConnection(place, timeout=timeout)
        self._open[scheme, place] = connection
        return connection

    def _unreachable(self, url: str, entity: str, error: Exception) -> BrokerError:
        if isinstance(error, ssl.SSLError):
            text = f"{entity}: TLS failed at the admin API {url}: {error.reason or error}; check tls_trust_certs_file_path and the host's name"
            return self._host.error(ErrorKind.AUTH, entity, text)
        kind = ErrorKind.TIMEOUT if isinstance(error, TimeoutError) else ErrorKind.UNREACHABLE
        why = str(error) or type(error).__name__
        text = f"{entity}: the admin API at {url} does not answer ({why}); is the server running, and is admin_url right?"
        return self._host.error(kind, entity, text, retryable=True)

    async def close(self) -> None:
        """Close what is open."""
        if not self._closed:
            self._closed = True
            await self._lane.run(self._shut)
            self._lane.close()

    def _shut(self) -> None:
        for connection in self._open.values():
            connection.close()


def _reason(said: bytes) -> str:
    try:
        return str(json.loads(said)["reason"])
    except (ValueError, KeyError, TypeError):
        return ""
