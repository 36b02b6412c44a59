"""The profile as settings of the client and of the admin API, by the client's own names."""

from __future__ import annotations

import base64
import json
import ssl
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pulsar

from broker_nb.backends.driver import Host
from broker_nb.backends.pulsar.errors import invalid
from broker_nb.backends.pulsar.oauth import Oauth2
from broker_nb.errors import BrokerError

_CLIENT: dict[str, type] = {  # of pulsar.Client: the name, and what text in a URL means
    "operation_timeout_seconds": int,
    "connection_timeout_ms": int,
    "io_threads": int,
    "message_listener_threads": int,
    "concurrent_lookup_requests": int,
    "stats_interval_in_seconds": int,
    "listener_name": str,
    "tls_trust_certs_file_path": str,
    "tls_certificate_file_path": str,
    "tls_private_key_file_path": str,
    "tls_allow_insecure_connection": bool,
    "tls_validate_hostname": bool,
}
_OAUTH2 = ("issuer_url", "private_key", "audience", "scope")  # the fields of its parameters
_AUTH = ("token", "certificate_path", "private_key_path", "auth_params_string", *_OAUTH2)
_OURS = ("admin_url", "use_tls")
_TLS = tuple(name for name in _CLIENT if name.startswith("tls_"))
Headers = Callable[[float], Mapping[str, str]]


@dataclass(frozen=True)
class Settings:
    """What a profile says."""

    service_url: str
    admin_url: str
    timeout: float
    namespace: str  # "tenant/namespace" of names without one
    everything: bool  # no namespace was named: list those of all tenants
    client: dict[str, Any] = field(repr=False)
    headers: Headers = field(repr=False)  # of a request to the admin API; within so many seconds
    context: ssl.SSLContext | None = field(repr=False, default=None)


def read_settings(profile: Mapping[str, Any], host: Host) -> Settings:
    """Take a profile apart.

    Raises
    ------
    BrokerError
        INVALID for no server, an unknown option, a bad value, a file that cannot be read.
    """
    options = {name: value for name, value in (profile.get("options") or {}).items() if value is not None}
    known = {*_CLIENT, *_AUTH, *_OURS}
    if unknown := sorted(options.keys() - known):
        raise invalid(host, "pulsar", f"there is no option {unknown[0]!r}; there are: {', '.join(sorted(known))}")
    tls = _typed(host, "use_tls", options.get("use_tls", False), bool) or any(name in options for name in _TLS)
    hosts = [str(h) for h in profile.get("hosts") or ()]
    if not hosts:
        raise invalid(host, "pulsar", "no server is named; write pulsar://host:6650")
    servers = ",".join(h if ":" in h.rpartition("]")[2] else f"{h}:{6651 if tls else 6650}" for h in hosts)
    timeout = float(profile.get("timeout", 5.0))
    path = str(profile.get("path") or "").strip("/")
    if path and (path.count("/") != 1 or not all(path.split("/"))):
        raise invalid(host, "pulsar", f"the path {path!r} must be tenant/namespace, for example public/default")
    seconds = max(1, round(timeout))
    client: dict[str, Any] = {
        "operation_timeout_seconds": seconds,  # the client's own 30 s; a person waits
        "connection_timeout_ms": int(seconds * 1000),
        "stats_interval_in_seconds": 0,
    }
    if tls:
        client["tls_validate_hostname"] = True
    client |= {name: _typed(host, name, options[name], kind) for name, kind in _CLIENT.items() if name in options}
    authentication, headers = _authentication(host, profile, options)
    if authentication is not None:
        client["authentication"] = authentication
    return Settings(
        service_url=f"pulsar{'+ssl' if tls else ''}://{servers}",
        admin_url=_admin_url(host, options.get("admin_url"), hosts[0], tls),
        timeout=timeout,
        namespace=path or "public/default",
        everything=not path,
        client=client,
        headers=headers,
        context=_context(host, client, options) if tls or str(options.get("admin_url", "")).startswith("https:") else None,
    )


def _admin_url(host: Host, given: Any, server: str, tls: bool) -> str:
    """The admin API's address: as given, else on the usual port of the first server."""
    if given is None:
        name = server.rpartition(":")[0] if ":" in server.rpartition("]")[2] else server
        return f"https://{name}:8443" if tls else f"http://{name}:8080"
    parts = urllib.parse.urlsplit(str(given))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise invalid(host, "pulsar", "admin_url must be like http://localhost:8080 (or https), without user and password")
    return str(given).rstrip("/")


def _authentication(
    host: Host, profile: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[pulsar.Authentication | None, Headers]:
    """Who we are, for the client and for the admin API."""
    user, password = profile.get("username"), profile.get("password")
    given = [name for name in ("token", "certificate_path", "auth_params_string", "issuer_url") if name in options]
    given += ["username"] if user is not None else []
    if len(given) > 1:
        raise invalid(host, "pulsar", f"{' and '.join(given)} are given; say only one way who we are")
    if user is not None:
        pair = base64.b64encode(f"{user}:{password or ''}".encode()).decode()
        return pulsar.AuthenticationBasic(str(user), str(password or "")), lambda _: {"Authorization": f"Basic {pair}"}
    if "token" in options:
        token = options["token"]
        current = token if callable(token) else lambda: str(token)
        return pulsar.AuthenticationToken(token), lambda _: {"Authorization": f"Bearer {current()}"}
    if "certificate_path" in options:
        if "private_key_path" not in options:
            raise invalid(host, "pulsar", "certificate_path needs its private_key_path")
        return pulsar.AuthenticationTLS(str(options["certificate_path"]), str(options["private_key_path"])), lambda _: {}
    if "issuer_url" in options or "auth_params_string" in options:
        text = options.get("auth_params_string") or json.dumps({n: str(options[n]) for n in _OAUTH2 if n in options})
        try:
            flow = Oauth2(json.loads(text))
        except ValueError as error:
            raise invalid(host, "pulsar", f"OAuth2: {error}") from None
        return pulsar.AuthenticationOauth2(text), lambda timeout: {"Authorization": f"Bearer {flow.token(timeout)}"}
    return None, lambda _: {}


def _typed(host: Host, name: str, value: Any, kind: type) -> Any:
    """An option of the client; text, as it comes in a URL, in the type that the client takes."""
    if kind is bool and str(value).lower() in ("true", "1", "yes", "false", "0", "no"):
        return str(value).lower() in ("true", "1", "yes")
    try:
        return {int: int, str: str}[kind](value)
    except (KeyError, ValueError):
        raise invalid(host, "pulsar", f"option {name}={value!r} must be {kind.__name__}") from None


def _context(host: Host, client: Mapping[str, Any], options: Mapping[str, Any]) -> ssl.SSLContext:
    """The same trust for the admin API as for the client."""
    trust = client.get("tls_trust_certs_file_path")
    certificate = client.get("tls_certificate_file_path") or options.get("certificate_path")
    key = client.get("tls_private_key_file_path") or options.get("private_key_path")
    try:
        context = ssl.create_default_context(cafile=trust)
        if certificate:
            context.load_cert_chain(certificate, key)
    except OSError as error:  # a file that is not there, or has no certificate in it
        raise _unreadable(host, [trust, certificate, key], error) from error
    if client.get("tls_allow_insecure_connection"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif not client.get("tls_validate_hostname", True):
        context.check_hostname = False
    return context


def _unreadable(host: Host, files: list[Any], error: OSError) -> BrokerError:
    return invalid(host, "pulsar", f"{', '.join(str(f) for f in files if f)} cannot be used: {error}")
