"""Looking, where that was allowed: through a temporary subscription that is put back in time, read without acknowledging, and deleted.

What a killed kernel leaves behind carries labels and is swept up by the next look of the same person on the same machine; the service
removes it after a day in any case.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from google.pubsub_v1.types import ExpirationPolicy, SeekRequest, Subscription, Topic, UpdateSubscriptionRequest

from broker_nb.backends.driver import Batch, Piece, Step, Stop
from broker_nb.backends.pubsub.catalogue import LOOK_LABEL, Catalogue
from broker_nb.backends.pubsub.client import Clients
from broker_nb.backends.pubsub.codec import PARTITION, PubsubCodec, publish_time_ns
from broker_nb.backends.pubsub.pulls import GROUP, Pulls
from broker_nb.errors import BrokerError, ErrorKind

log = logging.getLogger("broker_nb.pubsub")

FIRST_S, NEXT_S = 5.0, 2.0
"""How long nothing has to come until that is taken for the end: in the beginning (a seek takes its time), and later."""
STALE_S = 3600
_USED_S = 600.0  # how often a long look says that it is still there
_DAY_S = 86_400  # the shortest expiration that there is
_LEASE_S = 600  # the longest: what was shown does not come again during the look
_RETENTION_S = 600  # the shortest; the topic's own is what counts
_CLOSE_S = 2.0


def owner() -> str:
    """Who looks, from which machine, as a label may be spelt."""
    return hashlib.sha256(f"{socket.gethostname()}:{os.path.expanduser('~')}".encode()).hexdigest()[:16]


def _labels() -> dict[str, str]:
    return {LOOK_LABEL: "look", "owner": owner(), "used": str(int(time.time()))}


class Looks:
    """The temporary subscriptions of one connection."""

    def __init__(self, clients: Clients, catalogue: Catalogue) -> None:
        self._clients, self._catalogue = clients, catalogue
        self._open: list[PubsubBrowser] = []
        self._swept = -math.inf

    async def browse(self, topic: Topic, name: str, pieces: Sequence[Piece]) -> PubsubBrowser:
        """Make one, put it back to where the pieces begin, and read from it."""
        await self._sweep()
        start = min((piece.start for piece in pieces), default=())
        since = start[0] if start else time.time_ns() - int(topic.message_retention_duration.total_seconds() * 1e9)
        path = self._clients.names.subscription(f"broker_nb-look-{uuid.uuid4().hex}")
        browser = PubsubBrowser(self._clients, path, name, pieces)
        self._open = [*(b for b in self._open if not b.closed), browser]
        made = Subscription(
            name=path,
            topic=topic.name,
            labels=_labels(),
            ack_deadline_seconds=_LEASE_S,
            expiration_policy=ExpirationPolicy(ttl=Duration(seconds=_DAY_S)),
            message_retention_duration=Duration(seconds=_RETENTION_S),
        )
        try:
            await self._clients.ask(name, self._clients.subscriber.create_subscription(made, **self._clients.bounded))
            back = SeekRequest(subscription=path, time=Timestamp(seconds=since // 10**9, nanos=since % 10**9))
            await self._clients.ask(name, self._clients.subscriber.seek(back, **self._clients.bounded))
        except BaseException:  # also cancelled: the service may have made it
            await browser.close()
            raise
        return browser

    async def _sweep(self) -> None:
        """Delete what looks of ours left behind that were killed; looked for once an hour."""
        if time.monotonic() - self._swept < STALE_S:
            return
        self._swept = time.monotonic()
        try:
            found = await self._catalogue.look_subscriptions()
            stale = [s.name for s in found if s.labels.get("owner") == owner() and _age_s(s.labels) > STALE_S]
            for path in stale:
                await self._clients.ask(
                    path, self._clients.subscriber.delete_subscription(subscription=path, **self._clients.bounded)
                )
                log.info("deleted %s, which a look left behind", path)
        except BrokerError as error:  # may be forbidden; the service removes them after a day
            log.warning("subscriptions that looks left behind could not be swept up: %s", error)

    async def close(self) -> None:
        """Delete those still open."""
        await asyncio.gather(*(browser.close() for browser in self._open))


def _age_s(labels: Mapping[str, str]) -> float:
    used = labels.get("used", "")
    return time.time() - int(used) if used.isdecimal() else 0.0


class PubsubBrowser:
    """A look at one topic from a moment on. It never ends: silence is told, and what comes later is shown all the same."""

    def __init__(self, clients: Clients, path: str, topic: str, pieces: Sequence[Piece]) -> None:
        self._clients, self._path, self._topic = clients, path, topic
        self._codec = PubsubCodec(topic)
        ends = [piece.end for piece in pieces]
        self._end_ns = None if not ends or None in ends else max(end[0] for end in ends if end)
        self._pulls = Pulls(clients, path, topic)
        self._seen: set[str] = set()
        self._quiet_s = 0.0  # waited since the last row
        self._used = time.monotonic()

    @property
    def closed(self) -> bool:
        return self._pulls.closed

    async def read(self, max_rows: int, max_bytes: int, wait: float) -> Step:
        pulls, began = self._pulls, time.monotonic()
        pulls.check_open()
        if began - self._used > _USED_S:
            await self._say_used()
        if not pulls.ready:
            await pulls.wait(GROUP, wait)
        rows: list[Any] = []
        size = 0
        while pulls.ready and len(rows) < max_rows and size < max_bytes:
            row = pulls.ready.popleft()
            self._quiet_s = 0.0
            if self._is_new(row):
                rows.append(row)
                size += self._codec.size(row)
        if rows:
            return Step(Batch(self._codec, rows), {})
        self._quiet_s += time.monotonic() - began
        silent = self._quiet_s >= (NEXT_S if self._seen else FIRST_S)
        return Step(None, {}, {PARTITION: Stop.UNPROVEN} if silent else {})

    def _is_new(self, row: Any) -> bool:
        """Whether it is in the range and was not shown: what is delivered twice is one message."""
        if row.message.message_id in self._seen:
            return False
        self._seen.add(row.message.message_id)
        return self._end_ns is None or publish_time_ns(row) < self._end_ns

    async def _say_used(self) -> None:
        """So that no sweep takes it away."""
        self._used = time.monotonic()
        about = Subscription(name=self._path, labels=_labels())
        request = UpdateSubscriptionRequest(subscription=about, update_mask=FieldMask(paths=["labels"]))
        await self._clients.ask(self._topic, self._clients.subscriber.update_subscription(request, **self._clients.bounded))

    async def close(self) -> None:
        if self.closed:
            return
        self._pulls.close()
        if self._clients.closed:
            return
        try:
            async with asyncio.timeout(_CLOSE_S):
                call = self._clients.subscriber.delete_subscription(subscription=self._path, **self._clients.bounded)
                await self._clients.ask(self._path, call)
        except (BrokerError, TimeoutError) as error:
            if getattr(error, "kind", None) is not ErrorKind.NOT_FOUND:  # then it was never made
                log.warning(
                    "%s was not deleted (%s); the next look, or the service, does that", self._path, str(error) or "no answer"
                )
