"""A connection to the broker in memory with the manners of another broker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from broker_nb.backends.driver import (
    Backlog,
    Bounds,
    Browser,
    Digest,
    Effect,
    Entity,
    Facts,
    Family,
    Kind,
    LeaseTerms,
    LookPlan,
    Piece,
    Position,
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
            lease=self._lease(facts, topic, subscription) if Family.MESSAGE in families else None,
            dedupe=self.manner.dedupe,
            dead_letter=None if self.manner.reject_is_final or self.manner.archives else facts.dead_letter,
        )

    def _lease(self, facts: Facts, topic: Topic, subscription: Queue | Group | None) -> LeaseTerms | None:
        manner, terms = self.manner, subscription if isinstance(subscription, Queue) else topic
        return facts.lease and replace(
            facts.lease,
            seconds=facts.lease.seconds if manner.timed else None,
            renewable=manner.timed and manner.renewable,
            return_counts=not manner.uncounted or facts.dead_letter is not None,
            max_deliveries=terms.max_deliveries if manner.archives else facts.lease.max_deliveries,
        )

    # -------------------------------------------------------------- places
    async def backlog(self, entity: Entity) -> Sequence[Backlog]:
        return [replace(b, committed=self._place(b.committed), end=self._place(b.end)) for b in await super().backlog(entity)]

    async def bounds(self, topic: Entity, committed_only: bool) -> Sequence[Bounds]:
        found = await super().bounds(topic, committed_only)
        if not self.manner.places.sizes:
            return [Bounds(b.partition, (), None) for b in found]
        return [Bounds(b.partition, self._place(b.low) or (), self._place(b.end), self._place(b.high)) for b in found]

    async def locate(self, topic: Entity, times_ns: Mapping[int, int]) -> Mapping[int, Position | None]:
        found = await super().locate(topic, times_ns)
        if not self.manner.places.sizes:
            return {partition: (ns,) for partition, ns in times_ns.items()}  # a place is a moment
        return {partition: self._place(at) for partition, at in found.items()}

    def _place(self, at: Position | None) -> Position | None:
        return None if at is None else self.manner.places.of(at[0]) or None

    async def browse(
        self,
        topic: Entity,
        pieces: Sequence[Piece],
        want: frozenset[str],
        committed_only: bool,
        allow: frozenset[Effect],
        digest: Digest | None = None,
    ) -> Browser:
        with self.broker.lock:
            self.broker.topic(topic.name)
        if missing := self.manner.look.effects - allow:
            text = f"{topic.name} cannot be looked at without this: {'; '.join(effect.value for effect in missing)}"
            raise self.host.error(ErrorKind.UNSUPPORTED, topic.name, text)
        return await super().browse(topic, pieces, want, committed_only, allow, digest)

    # -------------------------------------------------------------- taking
    def _check_native(self, subscription: str, native: Mapping[str, Any]) -> None:
        manner = self.manner
        known = {manner.confirmed_by, manner.delay_by, manner.single_by} - {""}
        super()._check_native(subscription, {name: value for name, value in native.items() if name not in known})

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
        queue.archives = self.manner.archives
        if not self.manner.timed:
            queue.ack_deadline = math.inf
        return StrictQueue(self.manner, self.broker, self.host, queue, options)

    def _group(self, group: Group) -> StrictGroup:
        return StrictGroup(self.manner, self.broker, self.host, group)

    def _sender(self, topic: Topic) -> StrictSender:
        return StrictSender(self.manner, self.broker, self.host, topic)


def driver_with(manner: Manner) -> type[MannerlyDriver]:
    """The driver of a manner: capabilities are constants of a driver class."""
    return type(f"InmemLike{manner.name.title()}", (MannerlyDriver,), {"manner": manner, "capabilities": manner.able})
