"""One module or folder per broker, found by URL scheme; see `driver.py` for what each supplies.

A backend outside this package registers an entry point in the group `broker_nb.backends`: its name is the scheme, its value the
driver class ("my_package.my_module:MyDriver"). Nothing here imports a client before its scheme is asked for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, unquote

from broker_nb.errors import BrokerError, ErrorKind

if TYPE_CHECKING:
    from broker_nb.backends.driver import Driver

GROUP = "broker_nb.backends"


class _Entry(NamedTuple):
    target: str  # module:class
    client: str  # the importable module that comes with the extra; "" = none
    extra: str


_SCHEMES = {
    "demo": _Entry("broker_nb.backends.inmem.demo:DemoDriver", "", ""),
    "inmem": _Entry("broker_nb.backends.inmem.driver:InmemDriver", "", ""),
    "kafka": _Entry("broker_nb.backends.kafka.driver:KafkaDriver", "confluent_kafka", "kafka"),
    "nats": _Entry("broker_nb.backends.jetstream.driver:JetStreamDriver", "nats", "nats"),
    "pubsub": _Entry("broker_nb.backends.pubsub.driver:PubsubDriver", "google.pubsub_v1", "pubsub"),
    "servicebus": _Entry("broker_nb.backends.servicebus.driver:ServiceBusDriver", "azure.servicebus", "servicebus"),
    "pulsar": _Entry("broker_nb.backends.pulsar.driver:PulsarDriver", "pulsar", "pulsar"),
}


def schemes() -> list[str]:
    """Every scheme that `load` knows, installed third-party backends included."""
    return sorted({*_SCHEMES, *importlib.metadata.entry_points(group=GROUP).names})


def load(scheme: str) -> type[Driver]:
    """The driver class of a scheme; imports its client library.

    Raises
    ------
    BrokerError
        INVALID for an unknown scheme, naming those that exist; UNSUPPORTED when the backend's client library is not installed,
        with the line that installs it. Any other error of the import passes through unchanged.
    """
    if (entry := _SCHEMES.get(scheme)) is not None:
        return _import(scheme, entry)
    for point in importlib.metadata.entry_points(group=GROUP, name=scheme):
        driver: type[Driver] = point.load()
        client, extra = driver.requires
        distribution = point.dist.name if point.dist is not None else client
        if client and not _is_there(client):
            raise _missing(scheme, client, f"{distribution}[{extra}]" if extra else client)
        return driver
    raise BrokerError(ErrorKind.INVALID, scheme, f"no backend for {scheme!r}; there are: {', '.join(schemes())}")


def _import(scheme: str, entry: _Entry) -> type[Driver]:
    module, _, name = entry.target.partition(":")
    try:
        driver: type[Driver] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if entry.client and error.name and f"{entry.client}.".startswith(f"{error.name}."):  # it, or a namespace above it
            raise _missing(scheme, entry.client, f"broker-nb[{entry.extra}]") from error
        raise
    return driver


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a namespace above it is not there either
        return False


def _missing(scheme: str, client: str, requirement: str) -> BrokerError:
    text = f'{scheme}: its client {client} is not installed; run: pip install "{requirement}"'
    return BrokerError(ErrorKind.UNSUPPORTED, scheme, text)


# ------------------------------------------------------------------ URLs
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_SECRET = re.compile(
    r"pass(word|phrase|wd)?$|pwd$|secret|token|seed_str$|credential|private.?key|api.?key|access.?key|sas.?key|jaas|connection.?string|signature",
    re.I,
)


_CONNECTION_STRING = re.compile(r"SharedAccess(Key|Signature)\s*=", re.I)


class _Parts(NamedTuple):
    scheme: str
    username: str | None
    password: str | None
    hosts: list[str]
    path: str
    options: list[tuple[str, str]]


def has_secret(url: str) -> bool:
    """Whether a URL carries a password: before the host, or in an option whose name says so; or is a connection string."""
    if _CONNECTION_STRING.search(url):
        return True
    try:
        parts = _split(url)
    except BrokerError:  # malformed, perhaps by the password itself: doubt counts as yes
        return bool(re.search(r":.*@", url.partition("://")[2]))
    return parts.password is not None or any(_SECRET.search(name) for name, _ in parts.options)


def profile_from_url(url: str, *, allow_secret: bool = False) -> tuple[str, dict[str, Any]]:
    """Take a connection URL apart, without connecting and without importing the backend.

    Parameters
    ----------
    url
        scheme://[user[:password]@]host[:port][,host[:port]...][/path][?option=value&...], or a bare scheme ("demo").
    allow_secret
        Accept a password in it. Refused by default: what is typed into a cell stays in its history.

    Returns
    -------
    The scheme, lower case, and a profile: `hosts` (list of "host" or "host:port"), `path` (without its first slash), `options`
    (mapping of text), and `username` / `password` where given.

    Raises
    ------
    BrokerError
        INVALID when the URL is malformed or carries a password that is not allowed. The text never repeats a password.
    """
    if not allow_secret and has_secret(url):
        scheme = url.partition(":")[0]
        text = (
            f"{scheme}: the URL carries a password, which stays in the notebook and in its history: "
            "change it, and give it apart from the URL"
        )
        raise BrokerError(ErrorKind.INVALID, scheme, text)
    parts = _split(url)
    options: dict[str, str] = {}
    for name, value in parts.options:
        if name in options:
            raise _bad(parts.scheme, f"option {name!r} is given twice")
        options[name] = value
    profile: dict[str, Any] = {"hosts": parts.hosts, "path": parts.path, "options": options}
    if parts.username is not None:
        profile["username"] = parts.username
    if parts.password is not None:
        profile["password"] = parts.password
    return parts.scheme, profile


def _split(url: str) -> _Parts:
    scheme, mark, rest = url.strip().partition("://")
    if not _SCHEME.fullmatch(scheme):
        raise _bad("url", "that is not a connection URL; write scheme://host:port, for example kafka://localhost:9092, or demo")
    scheme = scheme.lower()
    if mark and not rest.isprintable():
        raise _bad(scheme, "the URL has control characters in it")
    rest, _, query = rest.partition("?")
    # A password may hold "/" and "@" unquoted: user and password end at the last "@" before the query.
    user_info, at, place = rest.rpartition("@")
    authority, _, path = place.partition("/")
    username, colon, password = user_info.partition(":")
    hosts = authority.split(",") if authority else []
    for host in hosts:
        _check_host(scheme, host, "a host" if "@" in url else repr(host))
    try:
        options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        raise _bad(scheme, "the part after ? must be option=value&option=value") from None
    return _Parts(scheme, unquote(username) if at else None, unquote(password) if colon else None, hosts, unquote(path), options)


def _check_host(scheme: str, host: str, shown: str) -> None:
    name, _, port = host.rpartition(":") if re.fullmatch(r"[^:]*:[^:]*|\[.*\]:[^:]*", host) else (host, "", None)
    if not name or any(c.isspace() for c in name):
        raise _bad(scheme, f"{shown} in the URL is not a host name or address; write host:port")
    if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise _bad(scheme, f"{shown} in the URL has a bad port; it must be a number from 1 to 65535")


def _bad(scheme: str, text: str) -> BrokerError:
    return BrokerError(ErrorKind.INVALID, scheme, text if scheme == "url" else f"{scheme}: {text}")
