"""A connection to the broker in memory with the manners of another broker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from broker_nb.backends.driver import (
    Entity,
    Facts,
    Family,
    Kind,
    LookPlan,
    Piece,
    Source,
    TakeOptions,
    Transaction,
)
from broker_nb.backends.inmem.driver import InmemDriver
from broker_nb.backends.inmem.manners.handles import StrictBrowser, StrictGroup, StrictQueue, StrictSender
from broker_nb.backends.inmem.manners.manner import Manner
from broker_nb.backends.inmem.subscriptions import Group, Queue
from broker_nb.backends.inmem.topic import Topic
from broker_nb.errors import ErrorKind

_POSITION = LookPlan(False, reason="a subscription is a position in a topic; look at the topic")


class MannerlyDriver(InmemDriver):
    """Says of itself, of its entities and of rows what the real driver would, and is as strict as the real client."""

    manner: ClassVar[Manner]

    @property
    def about(self) -> str:
        return f"{super().about}, with the manners of {self.manner.name}"

    def _subscription(self, entity: Entity) -> tuple[Topic, Queue | Group | None]:
        topic, subscription = super()._subscription(entity)
        if subscription is None and not self.capabilities.implicit_subscriptions:
            text = f"{topic.name} has no subscription {entity.name!r}, and it was not made; create=True makes it"
            raise self.host.error(ErrorKind.NOT_FOUND, entity.name, text)
        return topic, subscription

    def _facts(self, entity: Entity, topic: Topic, subscription: Queue | Group | None) -> Facts:
        facts, families = super()._facts(entity, topic, subscription), self.capabilities.families
        return replace(
            facts,
            look=_POSITION if entity.kind is Kind.SUBSCRIPTION else self.manner.look,
            families=facts.families & families,
            lease=facts.lease if Family.MESSAGE in families else None,
            dedupe=self.manner.dedupe,
            dead_letter=None if self.manner.reject_is_final else facts.dead_letter,
        )

    async def subscribe(self, subscription: Entity, options: TakeOptions) -> Source:
        if options.family not in self.capabilities.families:
            text = f"{subscription.name}: there is no taking of {options.family.value}s with the manners of {self.manner.name}"
            raise self.host.error(ErrorKind.UNSUPPORTED, subscription.name, text)
        if not options.create:
            with self.broker.lock:
                self._subscription(subscription)
        return await super().subscribe(subscription, options)

    async def begin(self, transactional_id: str, timeout_s: float) -> Transaction:
        if not self.capabilities.transactions:
            text = f"{transactional_id}: there are no transactions with the manners of {self.manner.name}"
            raise self.host.error(ErrorKind.UNSUPPORTED, transactional_id, text)
        return await super().begin(transactional_id, timeout_s)

    # -------------------------------------------------------------- handles
    def _browser(self, topic: Topic, pieces: Sequence[Piece], committed_only: bool) -> StrictBrowser:
        return StrictBrowser(self.manner, self.broker, self.host, topic, pieces, committed_only)

    def _queue(self, queue: Queue, options: TakeOptions) -> StrictQueue:
        return StrictQueue(self.manner, self.broker, self.host, queue, options)

    def _group(self, group: Group) -> StrictGroup:
        return StrictGroup(self.manner, self.broker, self.host, group)

    def _sender(self, topic: Topic) -> StrictSender:
        return StrictSender(self.manner, self.broker, self.host, topic)


def driver_with(manner: Manner) -> type[MannerlyDriver]:
    """The driver of a manner: capabilities are constants of a driver class."""
    return type(f"InmemLike{manner.name.title()}", (MannerlyDriver,), {"manner": manner, "capabilities": manner.able})
