"""One open connection: a driver, and everything that is written once above it. Lives on the loop thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from broker_nb.backends import load
from broker_nb.backends.driver import Backlog, Driver, Effect, Entity, Event, Facts, Family, Kind, Summary, TakeOptions
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.host import ConnectionHost
from broker_nb.portable.look import Look, open_look
from broker_nb.portable.loop import anywhere
from broker_nb.portable.messages import MessageSubscription
from broker_nb.portable.publish import TopicPublisher
from broker_nb.portable.ranges import Range
from broker_nb.portable.records import RecordSubscription
from broker_nb.portable.tail import Tail, open_tail
from broker_nb.portable.transactions import TransactionalClientPublisher

log = logging.getLogger("broker_nb")

T = TypeVar("T")

FACTS_S = 30.0
HOLD_S = 600.0
CLOSE_S = 5.0
LEAVE_S = 1.0
PAUSES_S = (0.1, 0.2, 0.4, 0.8, 1.6)


class Client:
    """An open connection to one broker; make it with `Client.open`. A `Publisher` (`await client.topic(name)`)."""

    def __init__(self, driver: Driver, host: ConnectionHost, *, read_only: bool = False) -> None:
        self.driver = driver
        self.host = host
        self.read_only = read_only
        self._facts: dict[Entity, tuple[float, Facts]] = {}
        self._subscriptions: dict[tuple[str, str], MessageSubscription | RecordSubscription] = {}
        self._publishers: dict[str, TopicPublisher] = {}
        self._opening = asyncio.Lock()
        self._closing: asyncio.Task[None] | None = None
        host.listen(self._on_event)

    @classmethod
    async def open(
        cls,
        scheme: str,
        profile: Mapping[str, Any],
        *,
        name: str = "",
        secrets: Iterable[str] = (),
        read_only: bool = False,
    ) -> Client:
        """Connect. Effect on the broker: none beyond the connection.

        Parameters
        ----------
        profile
            What the driver needs: `hosts`, `path`, `options`, and `timeout` in seconds.
        secrets
            Texts that no error may show.
        """
        host = ConnectionHost(name or scheme, secrets)
        try:
            return cls(await load(scheme).open(profile, host), host, read_only=read_only)
        except BaseException:
            host.close()
            raise

    def _on_event(self, event: Event) -> None:
        for subscription in tuple(self._subscriptions.values()):
            subscription.on_event(event)

    @property
    def is_open(self) -> bool:
        """Whether it can still be used."""
        return self._closing is None

    def _check_open(self) -> None:
        if self._closing is not None:
            raise BrokerError(ErrorKind.CLOSED, self.host.name, f"{self.host.name} is closed; connect again")

    async def _answer(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer to a question that changes nothing; a cluster that is just electing or loading is asked again."""
        self._check_open()
        for pause in PAUSES_S:
            try:
                return await ask()
            except BrokerError as error:
                if error.kind not in (ErrorKind.TRANSIENT, ErrorKind.THROTTLED) or not error.retryable:
                    raise
                await asyncio.sleep(pause)
        return await ask()

    # -------------------------------------------------------------- catalogue
    @anywhere
    async def entities(self, pattern: str = "") -> list[Entity]:
        """Topics, queues and subscriptions whose name matches the shell-style pattern."""

        async def listed() -> list[Entity]:
            return [entity async for entity in self.driver.entities(pattern)]

        return await self._answer(listed)

    @anywhere
    async def summaries(self, topics: Sequence[Entity]) -> Sequence[Summary]:
        """A line per topic."""
        return await self._answer(lambda: self.driver.summaries(topics))

    @anywhere
    async def facts(self, entity: Entity, *, fresh: bool = False) -> Facts:
        """What holds for an entity now; at most 30 s old unless `fresh`. Creates nothing."""
        self._check_open()
        known = self._facts.get(entity)
        if known is None or fresh or time.monotonic() - known[0] > FACTS_S:
            facts = await self._answer(lambda: self.driver.facts(entity))
            known = self._facts[entity] = (time.monotonic(), facts)
        return known[1]

    @anywhere
    async def backlog(self, topic: str, subscription: str) -> Sequence[Backlog]:
        """How far a subscription is, per partition."""
        return await self._answer(lambda: self.driver.backlog(Entity(Kind.SUBSCRIPTION, subscription, topic)))

    # -------------------------------------------------------------- look
    @anywhere
    async def look(
        self,
        topic: str,
        asked: Range,
        *,
        want: frozenset[str],
        committed_only: bool = True,
        allow: Collection[Effect] = (),
        partitions: Collection[int] | None = None,
    ) -> Look:
        """Resolve a bounded look; nothing is read yet. Its batches are read on the loop thread."""
        facts = await self.facts(Entity(Kind.TOPIC, topic))

        def opened() -> Awaitable[Look]:
            return open_look(
                self.driver, facts, asked, want=want, committed_only=committed_only, allow=allow, partitions=partitions
            )

        return await self._answer(opened)

    @anywhere
    async def tail(
        self, topic: str, *, want: frozenset[str], committed_only: bool = True, allow: Collection[Effect] = ()
    ) -> Tail:
        """Follow a topic from its end as it stands now. Effect on the broker: none, or those in `allow`."""
        facts = await self.facts(Entity(Kind.TOPIC, topic))
        return await self._answer(lambda: open_tail(self.driver, facts, want=want, committed_only=committed_only, allow=allow))

    # -------------------------------------------------------------- take
    @anywhere
    async def subscribe(
        self,
        topic: str,
        subscription: str,
        *,
        family: Family | None = None,
        hold: float = HOLD_S,
        start: str = "earliest",
        create: bool = False,
        join: bool = False,
        max_held: int = 1000,
        native: Mapping[str, Any] | None = None,
    ) -> MessageSubscription | RecordSubscription:
        """The open subscription of that name, opened at first use. Effect on the broker: this session becomes a member.

        Parameters
        ----------
        family
            How to settle where the topic allows both; one by one (MESSAGE) by default.
        hold
            Seconds until which taken messages are kept for the caller.
        start
            Where a subscription without a position begins: "earliest" or "latest".
        create, join
            Allow creating it, and becoming a member beside live ones.
        """
        self._check_open()
        async with self._opening:
            known = self._subscriptions.get((topic, subscription))
            if known is not None and known.failed:
                await self.unsubscribe(topic, subscription)
            elif known is not None:
                if isinstance(known, MessageSubscription):
                    known.hold = hold
                return known
            entity, name = Entity(Kind.SUBSCRIPTION, subscription, topic), f"{topic}/{subscription}"

            def options(facts: Facts) -> TakeOptions:
                chosen = _family(name, facts, family)
                return TakeOptions(family=chosen, start=start, max_held=max_held, create=create, native=native or {})

            try:
                facts = await self.facts(entity, fresh=True)
            except BrokerError as error:
                if error.kind is not ErrorKind.NOT_FOUND or not create:
                    raise
                facts = await self.facts(Entity(Kind.TOPIC, topic), fresh=True)
                await (await self.driver.subscribe(entity, options(facts))).close()
                facts = await self.facts(entity, fresh=True)  # its own terms
            leaving = time.monotonic() + LEAVE_S  # a member that has just left may still be listed
            while facts.members and not join and time.monotonic() < leaving:
                await asyncio.sleep(0.1)
                facts = await self.facts(entity, fresh=True)
            if facts.members and not join:
                raise BrokerError(
                    ErrorKind.CONFLICT,
                    name,
                    f"{name} has {facts.members} live member(s), from which this would take messages; "
                    "take part with join=True, or name another subscription",
                )
            taking = options(facts)

            def source() -> Any:
                return self.driver.subscribe(entity, taking)

            made: MessageSubscription | RecordSubscription
            if taking.family is Family.MESSAGE:
                made = MessageSubscription(name, self.driver.capabilities, facts, source, hold, max_held)
            else:
                made = RecordSubscription(name, self.driver.capabilities, facts, source)
            await made.start()
            self._subscriptions[topic, subscription] = made
            return made

    @property
    def subscriptions(self) -> Mapping[tuple[str, str], MessageSubscription | RecordSubscription]:
        """Open subscriptions by (topic, subscription)."""
        return self._subscriptions

    @anywhere
    async def unsubscribe(self, topic: str, subscription: str) -> None:
        """Close one subscription: what it holds goes back."""
        if (known := self._subscriptions.pop((topic, subscription), None)) is not None:
            await known.close()

    # -------------------------------------------------------------- write
    def guard_writing(self, topic: str) -> None:
        """Raise when this connection may not write."""
        self._check_open()
        if self.read_only:
            text = f"{self.host.name} is read-only: nothing was sent to {topic}; connect with read_only=False to write"
            raise BrokerError(ErrorKind.PERMISSION, topic, text)

    @anywhere
    async def topic(self, name: str) -> TopicPublisher:
        """A publisher for one topic; NOT_FOUND when it is not there (it is not created)."""
        self._check_open()
        async with self._opening:
            publisher = self._publishers.get(name)
            if publisher is None:
                publisher = TopicPublisher(
                    name,
                    lambda: self._answer(lambda: self.driver.sender(Entity(Kind.TOPIC, name), {})),
                    lambda: self.guard_writing(name),
                )
                await publisher.start()
                self._publishers[name] = publisher
            return publisher

    @anywhere
    async def transactional_publisher(self, transactional_id: str, timeout: float = 60.0) -> TransactionalClientPublisher:
        """A publisher whose messages become visible together.

        Parameters
        ----------
        transactional_id
            Whoever used it before is fenced when a transaction begins.
        timeout
            Seconds after which the broker aborts a transaction that is left open.
        """
        self._check_open()
        if not self.driver.capabilities.transactions:
            why = {**self.driver.capabilities.notyet, **self.driver.capabilities.never}.get("transactions", "")
            text = f"{self.host.name} has no transactions" + (f" ({why})" if why else "") + "; publish without one"
            raise BrokerError(ErrorKind.UNSUPPORTED, transactional_id, text)
        return TransactionalClientPublisher(
            transactional_id, lambda: self.driver.begin(transactional_id, timeout), self.guard_writing
        )

    # -------------------------------------------------------------- closing
    @anywhere
    async def close(self) -> None:
        """Give back what is held, leave every group, close the driver. Idempotent; deletes nothing durable."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            for part in (*self._subscriptions.values(), *self._publishers.values(), self.driver):
                await self._bounded(part.close)
        finally:
            self.host.close()

    async def _bounded(self, close: Callable[[], Any]) -> None:
        """One step of closing; a broker that is gone must not keep the person waiting, nor the next step from running."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await close()
        except (TimeoutError, BrokerError) as error:
            log.warning("%s: while closing: %s", self.host.name, str(error) or f"no answer within {CLOSE_S:g} s")


def _family(name: str, facts: Facts, asked: Family | None) -> Family:
    """How a subscription is settled: as asked, else one by one where that is possible."""
    chosen = asked or (Family.MESSAGE if Family.MESSAGE in facts.families else Family.RECORD)
    if chosen not in facts.families:
        able = ", ".join(sorted(f"{f.value}s" for f in facts.families)) or "not at all"
        raise BrokerError(ErrorKind.UNSUPPORTED, name, f"{name} cannot be taken from as {chosen.value}s; it can be as: {able}")
    return chosen
