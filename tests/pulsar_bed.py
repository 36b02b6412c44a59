"""A Pulsar as others see it: the admin API, and the bare client."""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from typing import Any

import pulsar

LOG = logging.getLogger("broker_nb.pulsar")


class Bed:
    def __init__(self, url: str) -> None:
        self.service, _, query = url.partition("?")
        self.address = self.service.partition("://")[2]
        self.admin = urllib.parse.parse_qs(query)["admin_url"][0]
        self.profile = {"hosts": [self.address], "options": {"admin_url": self.admin}}

    def api(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.admin}/admin/v2/{path}", data, method=method)  # noqa: S310 - a server of this test, on loopback
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310 - as above
            said = answer.read()
        return json.loads(said) if said else None

    def make(self, partitions: int = 0) -> str:
        local = f"topic-{uuid.uuid4().hex}"
        path = f"persistent/public/default/{local}"
        self.api("PUT", f"{path}/partitions" if partitions else path, partitions or None)
        return f"persistent://public/default/{local}"

    def policy(self, topic: str, name: str, value: Any) -> None:
        """Set it, and wait until the broker goes by it."""
        path, deadline = f"{topic.replace('://', '/')}/{name}", time.monotonic() + 20
        self.api("POST", path, value)
        while self.api("GET", path) != value:
            assert time.monotonic() < deadline, f"{name} of {topic}"
            time.sleep(0.05)

    def topics(self) -> list[str]:
        partitioned = self.api("GET", "persistent/public/default/partitioned")
        return sorted({*self.api("GET", "persistent/public/default"), *partitioned} - {None})

    def stats(self, topic: str) -> Any:
        return self.api("GET", f"{topic.replace('://', '/')}/stats")

    def subscriptions(self, topic: str) -> set[str]:
        return set(self.stats(topic)["subscriptions"])

    def _seen(self) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for topic in self.topics():
            try:
                stored = self.api("GET", f"{topic.replace('://', '/')}/internalStats")
                stats = self.stats(topic)
            except urllib.error.HTTPError:  # of partitions: they are seen themselves
                seen[topic] = "partitioned"
                continue
            cursors = {
                name: (c["markDeletePosition"], c["individuallyDeletedMessages"], c["readPosition"])
                for name, c in stored["cursors"].items()
            }
            members = {
                name: (s["msgBacklog"], s["unackedMessages"], sorted(c["consumerName"] for c in s["consumers"]))
                for name, s in stats["subscriptions"].items()
            }
            seen[topic] = (stored["lastConfirmedEntry"], cursors, members, len(stats["publishers"]))
        return seen

    def snapshot(self) -> object:
        """Once it stands still: acks are sent a tenth of a second late."""
        before, deadline = self._seen(), time.monotonic() + 20
        while True:
            time.sleep(0.2)
            if (now := self._seen()) == before:
                return now
            assert time.monotonic() < deadline, "the broker does not come to rest"
            before = now

    def client(self) -> pulsar.Client:
        return pulsar.Client(self.service, logger=LOG)
