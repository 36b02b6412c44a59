"""A token for the admin API by OAuth2's client credentials, from the same parameters as the client's own."""

from __future__ import annotations

import base64
import json
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

_EARLY_S = 30.0  # a token is renewed before it ends


class Oauth2:
    """The flow that the client does inside, for requests that it does not make. Its methods block: call them on a lane."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._issuer, self._key = str(parameters.get("issuer_url", "")), str(parameters.get("private_key", ""))
        if not self._issuer.startswith(("https://", "http://")) or not self._key:
            raise ValueError("it needs issuer_url (http or https) and private_key (a file with client_id and client_secret)")
        self._more = {name: str(parameters[name]) for name in ("audience", "scope") if parameters.get(name)}
        self._lock = threading.Lock()
        self._token, self._until = "", 0.0

    def token(self, timeout: float) -> str:
        """A token that is valid now; OSError or ValueError where there is none."""
        with self._lock:
            if time.monotonic() > self._until:
                known = self._credentials()
                endpoint = self._json(f"{self._issuer.rstrip('/')}/.well-known/openid-configuration", None, timeout)[
                    "token_endpoint"
                ]
                form = {"grant_type": "client_credentials", **known, **self._more}
                answer = self._json(str(endpoint), urllib.parse.urlencode(form).encode(), timeout)
                self._token = str(answer["access_token"])
                self._until = time.monotonic() + max(0.0, float(answer.get("expires_in", 60)) - _EARLY_S)
            return self._token

    def _credentials(self) -> dict[str, str]:
        if self._key.startswith("data:"):
            text = base64.b64decode(self._key.partition(",")[2])
        else:
            path = self._key.removeprefix("file:")
            with open(path.removeprefix("//"), "rb") as file:
                text = file.read()
        found = json.loads(text)
        return {name: str(found[name]) for name in ("client_id", "client_secret")}

    @staticmethod
    def _json(url: str, body: bytes | None, timeout: float) -> Any:
        with urllib.request.urlopen(url, body, timeout) as answer:  # noqa: S310 - http or https, as checked
            return json.load(answer)
