"""Taking one by one: acks are handed to the broker, which does not answer them to this client."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn

import pulsar

from broker_nb.backends.driver import Batch, Host, Lane, Outcome, Settled, Settlement, Token, Verdict
from broker_nb.backends.pulsar.codec import PulsarCodec, id_of
from broker_nb.backends.pulsar.errors import RETRYABLE, failure, kind_of
from broker_nb.backends.pulsar.taking import Consuming
from broker_nb.errors import BrokerError, ErrorKind

Bury = Callable[[str, pulsar.Message, Mapping[str, str]], Awaitable[BrokerError | None]]
"""Write a copy of a message to a topic, with these properties beside its own; why it could not."""


class PulsarMessages(Consuming):
    """One consumer whose messages are settled one by one."""

    def __init__(self, host: Host, topic: str, subscription: str, lane: Lane, acks: Lane, max_held: int, bury: Bury) -> None:
        super().__init__(host, topic, subscription, lane)
        self._acks, self._max_held, self._bury = acks, max_held, bury
        self._subscription = subscription
        self._codec = PulsarCodec(topic, counts=True)
        self._held: dict[Token, pulsar.Message] = {}
        self._serial = 0
        self._dead_letter: str | None = None

    async def open(self, client: pulsar.Client, subscription: str, options: dict[str, Any]) -> None:
        if (policy := options.get("dead_letter_policy")) is not None:
            self._dead_letter = policy.dead_letter_topic or f"{self._topic}-{subscription}-DLQ"
        try:
            await super().open(client, subscription, options)
        except BrokerError:
            self._acks.close()
            raise

    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        self._check_open()
        room = self._max_held - len(self._held)
        if room <= 0:
            text = f"{self.name}: {len(self._held)} rows are held, the most that was asked for (max_held); ack or release some"
            raise self._host.error(ErrorKind.NO_CREDIT, self.name, text)
        if not self._rows:
            await self._receive(min(max_rows, room), max_bytes, wait)
            self._check_open()
        count = min(max_rows, room)
        rows, self._rows = self._rows[:count], self._rows[count:]
        tokens: list[Token] = list(range(self._serial, self._serial + len(rows)))
        self._serial += len(rows)
        self._held.update(zip(tokens, rows, strict=True))
        return Batch(self._codec, rows, tokens) if rows else None

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Outcome]:
        self._check_open()
        refused: dict[Token, Outcome] = {}
        for item in items:
            if item.verdict is Verdict.REJECT and (why := await self._reject(item)) is not None:
                refused[item.token] = Outcome(Settled.RETRY if why.retryable else Settled.REFUSED, why)
        handed = [item for item in items if item.token not in refused]
        outcomes = refused | dict(zip((i.token for i in handed), await self._acks.run(self._settle, handed), strict=True))
        for item in items:
            if outcomes[item.token].state not in (Settled.RETRY, Settled.REFUSED):
                self._held.pop(item.token, None)
        return [outcomes[item.token] for item in items]

    async def _reject(self, item: Settlement) -> BrokerError | None:
        """Put a copy where dead letters are, as the client itself does after too many deliveries."""
        message = self._held.get(item.token)
        if message is None:
            return None
        if self._dead_letter is None:
            text = "to reject a message, subscribe with a dead_letter_policy; or nack it, or ack it"
            return self._unsupported(text)
        told = {
            "REAL_TOPIC": self._topic,
            "REAL_SUBSCRIPTION": self._subscription,
            "ORIGIN_MESSAGE_ID": id_of(message.message_id()),
        }
        return await self._bury(self._dead_letter, message, told | ({"REJECT_REASON": item.reason} if item.reason else {}))

    def _settle(self, items: Sequence[Settlement]) -> list[Outcome]:
        """On the lane for acks; the client sends them together."""
        outcomes = []
        for item in items:
            message = self._held.get(item.token)
            if message is None:
                outcomes.append(Outcome(Settled.LOST))
                continue
            try:
                if item.verdict is Verdict.RELEASE:
                    self._consumer.negative_acknowledge(message)
                else:
                    self._consumer.acknowledge(message)
                outcomes.append(Outcome(Settled.SENT))
            except pulsar.PulsarException as error:
                state = Settled.RETRY if kind_of(type(error).__name__) in RETRYABLE else Settled.REFUSED
                outcomes.append(Outcome(state, failure(self._host, self.name, error)))
        return outcomes

    async def extend(self, tokens: Sequence[Token], seconds: float) -> NoReturn:
        raise self._unsupported("a message is held as long as its consumer lives; there is nothing to extend")

    async def commit(self, positions: Mapping[int, object]) -> NoReturn:
        raise self._one_by_one()

    async def seek(self, positions: Mapping[int, object]) -> NoReturn:
        raise self._one_by_one()

    def _one_by_one(self) -> BrokerError:
        return self._unsupported("messages are settled one by one; ack or release them")

    async def close(self) -> None:
        await super().close()
        self._acks.close()
