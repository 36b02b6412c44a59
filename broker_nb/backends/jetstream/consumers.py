"""Making a consumer, when told to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import orjson
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from broker_nb.backends.driver import Entity, TakeOptions
from broker_nb.backends.jetstream.catalogue import Catalogue
from broker_nb.backends.jetstream.client import Wire
from broker_nb.backends.jetstream.errors import missing
from broker_nb.backends.jetstream.names import Place
from broker_nb.errors import BrokerError, ErrorKind

SERVER_MIN = {"filter_subjects": "2.10", "metadata": "2.10", "pause_until": "2.11"}
"""Settings of a consumer that an older server would drop without a word."""
_FIXED = (
    "name",
    "durable_name",
    "ack_policy",
    "deliver_subject",
    "deliver_group",
    "flow_control",
    "idle_heartbeat",
    "headers_only",
)
_NAMES = frozenset(f.name for f in fields(ConsumerConfig)) - {*_FIXED}


class Consumers:
    """Consumers to take from."""

    def __init__(self, wire: Wire, catalogue: Catalogue, server_min: Mapping[str, str]) -> None:
        self._wire, self._catalogue, self._server_min = wire, catalogue, server_min

    async def open(self, entity: Entity, options: TakeOptions) -> tuple[Place, dict[str, Any]]:
        """The consumer's place and the server's information about it. Effect on the broker: with `options.create` it is made."""
        place, _ = await self._catalogue.find(entity.parent or "")
        info = await self._catalogue.consumer(place, entity.name)
        config = self._config(place, entity.name, options)
        if info is not None:
            if differs := [n for n in options.native if info["config"].get(n) != config.get(n)]:
                has = info["config"].get(differs[0])
                text = f"{entity.name} is there already with {differs[0]}={has}, and is not changed: leave {differs[0]} out"
                raise self._error(ErrorKind.CONFLICT, entity.name, text)
            return place, info
        if not options.create:
            raise missing(self._wire.host, entity.name, f"stream {place.stream} has no such consumer; create=True makes one")
        request = {"stream_name": place.stream, "config": config, "action": "create"}
        await self._wire.told(f"CONSUMER.DURABLE.CREATE.{place.stream}.{entity.name}", entity.name, request)
        made = await self._catalogue.consumer(place, entity.name)
        if made is None:
            raise missing(self._wire.host, entity.name, "it was deleted as soon as it was made")
        return place, made

    def _config(self, place: Place, name: str, options: TakeOptions) -> dict[str, Any]:
        for option in options.native:
            if option not in _NAMES:
                text = f"{name}: {option!r} is no setting of a consumer to take from; there are: {', '.join(sorted(_NAMES))}"
                raise self._error(ErrorKind.INVALID, name, text)
            oldest = self._server_min.get(option, "0")
            if self._wire.version < tuple(map(int, oldest.split("."))):
                text = f"{name}: {option} needs nats-server {oldest}; this is {self._wire.server_version}, which would ignore it"
                raise self._error(ErrorKind.UNSUPPORTED, name, text)
        asked: dict[str, Any] = {
            "durable_name": name,
            "ack_policy": AckPolicy.EXPLICIT,
            "deliver_policy": DeliverPolicy.ALL if options.start == "earliest" else DeliverPolicy.NEW,
            "max_ack_pending": options.max_held,
        }
        if place.subject:
            asked["filter_subject"] = place.subject
        try:
            config = dict(ConsumerConfig(**asked | dict(options.native)).as_dict())
            orjson.dumps(config)
        except (TypeError, ValueError) as error:  # orjson's is one of them
            raise self._error(ErrorKind.INVALID, name, f"{name}: a setting of the consumer is wrong: {error}") from error
        return config

    def _error(self, kind: ErrorKind, name: str, text: str) -> BrokerError:
        return self._wire.host.error(kind, name, text)
