"""The profile as settings of the client, by the client's own names."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple

from broker_nb.backends.driver import Host
from broker_nb.backends.jetstream.codec import header_flaw
from broker_nb.backends.jetstream.names import is_subject
from broker_nb.errors import ErrorKind

_TLS = ("tls", "tls_ca", "tls_cert", "tls_key", "tls_hostname", "tls_handshake_first")
_OURS = {"key_header": "Key", "domain": "", "prefix": ""}  # the last two are of the client's JetStream
_PASSED: dict[str, type] = {  # of Client.connect: the name, and what text in a URL means
    "user": str,
    "password": str,
    "token": str,
    "user_credentials": str,
    "nkeys_seed": str,
    "nkeys_seed_str": str,
    "signature_cb": str,
    "user_jwt_cb": str,
    "tls": str,
    "tls_hostname": str,
    "tls_handshake_first": bool,
    "name": str,
    "inbox_prefix": str,
    "connect_timeout": float,
    "reconnect_time_wait": float,
    "max_reconnect_attempts": int,
    "ping_interval": float,
    "max_outstanding_pings": int,
    "dont_randomize": bool,
    "pending_size": int,
}
_DEFAULTS: dict[str, Any] = {
    "name": "broker_nb",
    "reconnect_time_wait": 0.5,  # the client's own 2 s would outlast every question after a restart of the server
    "max_reconnect_attempts": -1,
    "ping_interval": 15,  # the client's own 120 s leaves a dead connection unnoticed for six minutes
}


class Settings(NamedTuple):
    """What a profile says."""

    servers: list[str]
    timeout: float
    client: dict[str, Any]
    tls: bool  # nothing is to go out in plain text
    key_header: str
    api: str  # begin of JetStream's subjects


def read_settings(profile: Mapping[str, Any], host: Host) -> Settings:
    """Take a profile apart.

    Raises
    ------
    BrokerError
        INVALID for no server, an unknown option, a bad value, a file that cannot be read.
    """
    servers = [server if ":" in server.rpartition("]")[2] else f"{server}:4222" for server in profile.get("hosts") or ()]
    if not servers:
        raise host.error(ErrorKind.INVALID, "nats", "nats: no server is named; write nats://host:port")
    options = dict(profile.get("options") or {})
    timeout = float(profile.get("timeout", 5.0))
    known = {**_PASSED, **dict.fromkeys((*_TLS, *_OURS), str)}
    if unknown := sorted(options.keys() - known.keys()):
        text = f"nats: there is no option {unknown[0]!r}; there are: {', '.join(sorted(known))}"
        raise host.error(ErrorKind.INVALID, "nats", text)
    client = _DEFAULTS | {"connect_timeout": timeout}
    for name in ("username", "password"):
        if profile.get(name) is not None:
            client["user" if name == "username" else name] = profile[name]
    for name in options.keys() & _PASSED.keys():
        client[name] = _typed(host, name, options[name])
    if client.get("user") is not None and client.get("password") is None:
        client["password"] = ""  # else the client sends neither
    tls = any(options.get(name) for name in _TLS)
    if context := _context(host, options):
        client["tls"] = context
    key_header = str(options.get("key_header", _OURS["key_header"]) or "")
    if key_header and (flaw := header_flaw(key_header)):
        raise host.error(ErrorKind.INVALID, "nats", f"nats: key_header={key_header!r} {flaw}")
    domain, prefix = str(options.get("domain") or ""), str(options.get("prefix") or "")
    api = prefix or (f"$JS.{domain}.API" if domain else "$JS.API")
    if not is_subject(api, wildcards=False) or "." in domain or (domain and prefix):
        given = f"domain={domain!r}, prefix={prefix!r}"
        raise host.error(
            ErrorKind.INVALID, "nats", f"nats: {given}: give one of them, as a word or as a subject without wildcards"
        )
    return Settings(servers, timeout, client, tls, key_header, api)


def _typed(host: Host, name: str, value: Any) -> Any:
    """An option of the client; text, as it comes in a URL, in the type that the client takes."""
    kind = _PASSED[name]
    if not isinstance(value, str) or kind is str:
        return value
    if kind is bool and value.lower() in ("true", "1", "yes", "false", "0", "no"):
        return value.lower() in ("true", "1", "yes")
    try:
        return {int: int, float: float}[kind](value)
    except (KeyError, ValueError):
        raise host.error(ErrorKind.INVALID, "nats", f"nats: option {name}={value!r} must be a {kind.__name__}") from None


def _context(host: Host, options: Mapping[str, Any]) -> ssl.SSLContext | None:
    """TLS by file names; a context that is given as such is passed on."""
    files = {name: str(options[name]) for name in ("tls_ca", "tls_cert", "tls_key") if options.get(name)}
    given = options.get("tls")
    if given is not None and not isinstance(given, ssl.SSLContext):
        text = "nats: tls takes an ssl.SSLContext; give files as tls_ca, tls_cert and tls_key"
        raise host.error(ErrorKind.INVALID, "nats", text)
    if not files:
        return given
    if given is not None or ("tls_key" in files and "tls_cert" not in files):
        text = "nats: give either tls (an ssl.SSLContext), or tls_ca and, where the server asks for it, tls_cert with tls_key"
        raise host.error(ErrorKind.INVALID, "nats", text)
    try:
        context = ssl.create_default_context(cafile=files.get("tls_ca"))
        if "tls_cert" in files:
            context.load_cert_chain(files["tls_cert"], files.get("tls_key"))
    except OSError as error:  # a file that is not there, or has no certificate in it
        text = f"nats: {', '.join(f'{n}={f}' for n, f in files.items())} cannot be used: {error}"
        raise host.error(ErrorKind.INVALID, "nats", text) from error
    return context
