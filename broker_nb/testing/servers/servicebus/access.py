"""Who may do what: shared-access-signature tokens, checked as the service checks them, and bearer tokens that the configuration names."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

RIGHTS = ("Manage", "Send", "Listen")
KEYS = {"RootManageSharedAccessKey": {"key": "SAS_KEY_VALUE"}}  # as in Microsoft's emulator


class Denied(Exception):
    """A token that does not count, and why."""


class Grant(NamedTuple):
    """What a token allows, until when."""

    paths: tuple[str, ...]  # lower case; "" = everything
    rights: frozenset[str]
    until: float

    def covers(self, path: str, right: str) -> bool:
        """Whether it allows `right` on an entity."""
        below = any(not p or path == p or path.startswith(p + "/") for p in self.paths)
        return below and right in self.rights and self.until > time.time()


def path_of(address: str | None) -> str:
    """The entity of an address or audience, lower case: what follows the host."""
    text = unquote(address or "")
    return (urlsplit(text).path if "://" in text else text).strip("/").lower()


class Access:
    """The configuration's `keys` (name -> key, rights, entities) and `tokens` (bearer token -> rights, entities)."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._keys: dict[str, dict[str, Any]] = config.get("keys", KEYS)
        self._tokens: dict[str, dict[str, Any]] = config.get("tokens", {})

    def grant(self, token: str, audience: str) -> Grant:
        """What `token` allows on `audience`.

        Raises
        ------
        Denied
            It is malformed, expired, signed with another key, or for another entity.
        """
        if not token.startswith("SharedAccessSignature "):
            if (known := self._tokens.get(token.removeprefix("Bearer "))) is None:
                raise Denied("InvalidIssuer: Token issuer is invalid.")
            return _grant(known, path_of(audience), time.time() + known.get("lasts_s", 3600))
        fields = dict(parse_qsl(token.partition(" ")[2], keep_blank_values=True))
        name, resource, expires = fields.get("skn", ""), fields.get("sr", ""), fields.get("se", "0")
        if (known := self._keys.get(name)) is None:
            raise Denied(f"InvalidSignature: there is no key named '{name}'.")
        raw = token.partition("sr=")[2].partition("&")[0]  # signed as it is written
        text = f"{raw}\n{expires}".encode()
        right = base64.b64encode(hmac.digest(known["key"].encode(), text, hashlib.sha256)).decode()
        if not hmac.compare_digest(right, fields.get("sig", "")):
            raise Denied("InvalidSignature: The token has an invalid signature.")
        if int(expires) <= time.time():
            raise Denied(f"ExpiredToken: The token is expired. Expiration time: {expires}.")
        path, wanted = path_of(resource), path_of(audience)
        if path and wanted != path and not wanted.startswith(path + "/"):
            raise Denied(f"InvalidAudience: the token is for '{path}'.")
        return _grant(known, wanted, float(expires))


def _grant(known: dict[str, Any], wanted: str, until: float) -> Grant:
    entities = known.get("entities")
    if entities is None:
        return Grant((wanted,), frozenset(known.get("rights", RIGHTS)), until)
    paths = tuple(e.lower() for e in entities if not wanted or e.lower() == wanted or wanted.startswith(e.lower() + "/"))
    return Grant(paths, frozenset(known.get("rights", RIGHTS)), until)
