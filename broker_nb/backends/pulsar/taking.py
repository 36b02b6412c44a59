"""What taking one by one and taking a log have in common: one consumer, which waits on a lane."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Mapping
from typing import Any

import pulsar

from broker_nb.backends.driver import Family, Host, Lane, TakeOptions
from broker_nb.backends.pulsar.errors import failure, invalid, options_of
from broker_nb.errors import BrokerError, ErrorKind

log = logging.getLogger("broker_nb")
_CLOSE_S = 1.9
_TYPES = {
    "Shared": pulsar.ConsumerType.Shared,
    "Failover": pulsar.ConsumerType.Failover,
    "Exclusive": pulsar.ConsumerType.Exclusive,
    "KeyShared": pulsar.ConsumerType.KeyShared,
}
_LOG = ("Failover", "Exclusive")
_STARTS = {"earliest": pulsar.InitialPosition.Earliest, "latest": pulsar.InitialPosition.Latest}
_OPTIONS = frozenset(
    {
        "consumer_type",
        "negative_ack_redelivery_delay_ms",
        "dead_letter_policy",
        "receiver_queue_size",
        "max_total_receiver_queue_size_across_partitions",
        "unacked_messages_timeout_ms",
        "properties",
        "key_shared_policy",
        "batch_index_ack_enabled",
        "replicate_subscription_state_enabled",
        "max_pending_chunked_message",
        "auto_ack_oldest_chunked_message_on_queue_full",
        "crypto_key_reader",
        "crypto_failure_action",
    }
)


def consumer_options(host: Host, name: str, options: TakeOptions) -> dict[str, Any]:
    """Arguments of the client's `subscribe`, by its own names.

    Raises
    ------
    BrokerError
        INVALID or UNSUPPORTED for what the client or the family cannot.
    """
    if options.session is not None:
        raise host.error(
            ErrorKind.UNSUPPORTED, name, f"{name}: Pulsar has no sessions; consumer_type='KeyShared' keeps keys together"
        )
    if options.start not in _STARTS:
        raise invalid(host, name, f"cannot start at {options.start!r}; say earliest or latest")
    given = dict(options_of(host, name, dict(options.native), _OPTIONS, "a subscription"))
    kind = given.pop("consumer_type", "Shared" if options.family is Family.MESSAGE else "Failover")
    word = kind if isinstance(kind, str) else getattr(kind, "name", "")
    if word not in _TYPES:
        raise invalid(host, name, f"there is no consumer_type {kind!r}; there are: {', '.join(_TYPES)}")
    if options.family is Family.RECORD and word not in _LOG:
        raise invalid(host, name, f"a log is committed by a consumer_type {' or '.join(_LOG)}, not {word}")
    policy = given.get("dead_letter_policy")
    if isinstance(policy, Mapping):
        try:
            given["dead_letter_policy"] = pulsar.ConsumerDeadLetterPolicy(**policy)
        except (TypeError, ValueError, pulsar.PulsarException) as error:
            raise invalid(host, name, f"dead_letter_policy: {error}") from None
    ours: dict[str, Any] = {
        "receiver_queue_size": max(1, min(1000, options.max_held)),
        "negative_ack_redelivery_delay_ms": 1000,  # the client's own minute outlasts a person's patience
        "batch_index_ack_enabled": True,
    }
    forced = {
        "consumer_type": _TYPES[word],
        "initial_position": _STARTS[options.start],
        "consumer_name": f"broker_nb-{uuid.uuid4().hex}",
    }
    return {**ours, **given, **forced}


class Consuming:
    """One consumer of one subscription."""

    def __init__(self, host: Host, topic: str, subscription: str, lane: Lane) -> None:
        self._host, self._topic, self._lane = host, topic, lane
        self.name = f"{topic}/{subscription}"
        self.consumer_name = ""
        self._consumer: pulsar.Consumer
        self._rows: list[pulsar.Message] = []  # received and not handed out
        self.closed = False

    async def open(self, client: pulsar.Client, subscription: str, options: dict[str, Any]) -> None:
        """Become a consumer; the topic is there, and the subscription, or it may be made."""
        self.consumer_name = options["consumer_name"]

        def begin() -> None:
            self._consumer = client.subscribe(self._topic, subscription, **options)

        try:
            await self._lane.run(begin)
        except pulsar.PulsarException as error:
            self._lane.close()
            raise failure(self._host, self.name, error) from error
        except (TypeError, ValueError) as error:
            self._lane.close()
            raise invalid(self._host, self.name, str(error)) from error

    async def _receive(self, max_rows: int, max_bytes: int, wait: float) -> None:
        """Wait for a first row, and take what else is there."""
        try:
            await self._lane.run(self._take, max_rows, max_bytes, wait)
        except pulsar.PulsarException as error:
            if not self._rows and not self.closed:
                raise failure(self._host, self.name, error) from error

    def _take(self, max_rows: int, max_bytes: int, wait: float) -> None:
        """On the lane: what was received stays in the handle until somebody takes it, also when the caller was cancelled."""
        receive, size = self._consumer.receive, 0
        while len(self._rows) < max_rows and size < max_bytes and not self.closed:
            try:
                message = receive(0 if self._rows else max(1, int(wait * 1000)))
            except pulsar.Timeout:
                return
            self._rows.append(message)
            size += len(message.data())

    def _check_open(self) -> None:
        if self.closed:
            raise self._host.error(ErrorKind.CLOSED, self.name, f"{self.name}: this source is closed; subscribe again")

    def _unsupported(self, why: str) -> BrokerError:
        return self._host.error(ErrorKind.UNSUPPORTED, self.name, f"{self.name}: {why}")

    async def close(self) -> None:
        """What was delivered and not acknowledged goes to another consumer, or waits for the next."""
        if self.closed:
            return
        self.closed = True
        leaving = asyncio.ensure_future(self._lane.run(self._shut))
        await asyncio.wait({leaving}, timeout=_CLOSE_S)
        self._lane.close()
        if leaving.done():
            leaving.result()
        # Else nobody can be told; the lane ends when the client gives up.

    def _shut(self) -> None:
        try:
            self._consumer.close()
        except pulsar.PulsarException as error:
            log.warning("%s: leaving: %s", self.name, error)
