"""Taking: unary pulls, leases by deadline, settlements in groups."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError
from google.pubsub_v1.types import AcknowledgeRequest, ModifyAckDeadlineRequest, Subscription

from broker_nb.backends.driver import Batch, Outcome, Position, Settled, Settlement, TakeOptions, Token, Verdict
from broker_nb.backends.pubsub.catalogue import LEASE_S
from broker_nb.backends.pubsub.client import Clients, failure
from broker_nb.backends.pubsub.codec import PubsubCodec
from broker_nb.backends.pubsub.pulls import GROUP, Pulls
from broker_nb.errors import BrokerError, ErrorKind

log = logging.getLogger("broker_nb.pubsub")

SHORTEST_S, LONGEST_S = 10, 600  # of a lease, by the service
_CLOSE_S = 1.0
_ON_THE_WAY_S = 0.2  # a lease begins when the service hands the message over, a moment before it is here


class _Leased(Pulls):
    """Messages with the moment until which they are ours."""

    def __init__(self, clients: Clients, path: str, name: str, seconds: float) -> None:
        super().__init__(clients, path, name)
        self._seconds = seconds
        self.until: dict[str, float] = {}  # ack id -> time.monotonic(), of everything not settled

    def arrived(self, rows: list[Any]) -> None:
        until = time.monotonic() + self._seconds - _ON_THE_WAY_S
        self.until.update((row.ack_id, until) for row in rows)
        super().arrived(rows)

    def drop_expired(self) -> None:
        """Forget what is no longer ours."""
        now = time.monotonic()
        for ack_id in [ack_id for ack_id, until in self.until.items() if until <= now]:
            del self.until[ack_id]
        while self.ready and self.ready[0].ack_id not in self.until:
            self.ready.popleft()


class PubsubSource:
    """Takes messages from one subscription."""

    def __init__(self, clients: Clients, path: str, topic: str, name: str, about: Subscription, options: TakeOptions) -> None:
        self._clients, self._path, self._name, self._max_held = clients, path, name, options.max_held
        self._codec = PubsubCodec(topic)
        self._pulls = _Leased(clients, path, name, float(about.ack_deadline_seconds or LEASE_S))
        self._done = Outcome(Settled.CONFIRMED if about.enable_exactly_once_delivery else Settled.SENT)

    @property
    def closed(self) -> bool:
        return self._pulls.closed

    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        pulls = self._pulls
        pulls.check_open()
        if pulls.ready or len(pulls.until) >= self._max_held:
            pulls.drop_expired()
        if not pulls.ready:
            credit = self._max_held - len(pulls.until)
            if credit <= 0:
                text = f"{self._name}: {len(pulls.until)} messages are held, which is the most that was asked for; settle some"
                raise self._clients.host.error(ErrorKind.NO_CREDIT, self._name, text)
            await pulls.wait(min(max_rows, credit), wait)
        rows: list[Any] = []
        size = 0
        while pulls.ready and len(rows) < max_rows and size < max_bytes:
            rows.append(pulls.ready.popleft())
            size += self._codec.size(rows[-1])
        if not rows:
            return None
        tokens = [row.ack_id for row in rows]
        return Batch(self._codec, rows, tokens, min(pulls.until[token] for token in tokens))

    # -------------------------------------------------------------- settling
    async def settle(self, items: Sequence[Settlement]) -> Sequence[Outcome]:
        self._pulls.check_open()
        now, outcomes = time.monotonic(), dict[int, Outcome]()
        asked: dict[int | None, list[int]] = defaultdict(list)  # None: acknowledge; else the seconds until it comes again
        for i, item in enumerate(items):
            if self._pulls.until.get(str(item.token), 0.0) <= now:
                # Not sent: the service might take it although the message went to somebody else, and would not say so.
                outcomes[i] = self._lost()
            elif item.verdict is Verdict.ACK:
                asked[None].append(i)
            elif item.verdict is Verdict.RELEASE and item.delay <= LONGEST_S:
                asked[math.ceil(item.delay)].append(i)
            else:
                outcomes[i] = self._refused(item)
        groups = [(seconds, rows[at : at + GROUP]) for seconds, rows in asked.items() for at in range(0, len(rows), GROUP)]
        answers = await asyncio.gather(*(self._tell([str(items[i].token) for i in rows], s) for s, rows in groups))
        for (_, rows), answer in zip(groups, answers, strict=True):
            outcomes.update(zip(rows, answer, strict=True))
        for i, outcome in outcomes.items():
            if outcome.state in (Settled.CONFIRMED, Settled.SENT, Settled.LOST):
                self._pulls.until.pop(str(items[i].token), None)
        return [outcomes[i] for i in range(len(items))]

    async def _tell(self, ack_ids: Sequence[str], seconds: int | None) -> Sequence[Outcome]:
        """Acknowledge messages, or set their deadline."""
        client = self._clients.subscriber
        try:
            if seconds is None:
                done = AcknowledgeRequest(subscription=self._path, ack_ids=ack_ids)
                await self._clients.run(client.acknowledge(done, **self._clients.bounded))
            else:
                later = ModifyAckDeadlineRequest(subscription=self._path, ack_ids=ack_ids, ack_deadline_seconds=seconds)
                await self._clients.run(client.modify_ack_deadline(later, **self._clients.bounded))
        except (GoogleAPICallError, GoogleAuthError) as error:
            cause = failure(self._clients.host, self._name, error)
            said = getattr(error, "metadata", None) or {}
            return [self._outcome(said, ack_id, cause) for ack_id in ack_ids]
        return [self._done] * len(ack_ids)

    def _outcome(self, said: Mapping[str, str], ack_id: str, cause: BrokerError) -> Outcome:
        """One message's fate in a call that failed; with exactly-once delivery the service says why, for each that is to blame."""
        blamed = {a for a, why in said.items() if why.startswith(("PERMANENT_FAILURE", "TRANSIENT_FAILURE"))}
        why = said.get(ack_id, "")
        if why == "PERMANENT_FAILURE_INVALID_ACK_ID":
            return self._lost()
        # Those beside a blamed one are done, or not: asking again is harmless.
        again = cause.retryable if not blamed else ack_id not in blamed or why.startswith("TRANSIENT_FAILURE")
        return Outcome(Settled.RETRY if again else Settled.REFUSED, cause)

    def _lost(self) -> Outcome:
        text = f"{self._name}: the lease is over; the message went or will go to someone else"
        return Outcome(Settled.LOST, self._clients.host.error(ErrorKind.LEASE_LOST, self._name, text))

    def _refused(self, item: Settlement) -> Outcome:
        text = f"{self._name}: Pub/Sub delays by at most {LONGEST_S} s"
        if item.verdict is Verdict.REJECT:
            text = f"{self._name}: Pub/Sub cannot reject; nack it until its dead-letter policy takes it, or ack it"
        return Outcome(Settled.REFUSED, self._clients.host.error(ErrorKind.UNSUPPORTED, self._name, text))

    async def extend(self, tokens: Sequence[Token], seconds: float) -> Sequence[float | None]:
        self._pulls.check_open()
        until, gone, kept = self._pulls.until, set[str](), 0
        failed: BrokerError | None = None
        alive = [str(token) for token in tokens if until.get(str(token), 0.0) > time.monotonic()]
        for at in range(0, len(alive), GROUP):
            group, now = alive[at : at + GROUP], time.monotonic()
            wanted = max(seconds, *(until.get(ack_id, now) - now for ack_id in group))  # none is shortened
            given = min(max(SHORTEST_S, math.ceil(wanted)), LONGEST_S)
            outcomes = await self._tell(group, given)
            answered = time.monotonic()
            for ack_id, outcome in zip(group, outcomes, strict=True):
                # Over before the answer came: it may have gone to somebody meanwhile.
                if outcome.state is Settled.LOST or until.get(ack_id, 0.0) <= answered:
                    gone.add(ack_id)
                elif outcome is self._done:
                    until[ack_id], kept = now + given, kept + 1
                failed = failed or outcome.error
        if failed is not None and not gone and not kept:
            raise failed
        for ack_id in gone:
            until.pop(ack_id, None)
        ours = set(alive) - gone
        return [until.get(str(token)) if token in ours else None for token in tokens]

    async def commit(self, positions: Mapping[int, Position]) -> Mapping[int, Outcome]:
        raise self._no_log()

    async def seek(self, positions: Mapping[int, Position]) -> None:
        raise self._no_log()

    def _no_log(self) -> BrokerError:
        return self._clients.host.error(
            ErrorKind.UNSUPPORTED, self._name, f"{self._name} is no log: its messages are settled one by one"
        )

    async def close(self) -> None:
        if self.closed:
            return
        self._pulls.close()
        left = [row.ack_id for row in self._pulls.ready]
        self._pulls.ready.clear()
        if left and not self._clients.closed:
            try:
                async with asyncio.timeout(_CLOSE_S):
                    for at in range(0, len(left), GROUP):
                        await self._tell(left[at : at + GROUP], 0)
            except TimeoutError:
                log.warning("%s: %d messages that nobody saw come again when their lease ends", self._name, len(left))
