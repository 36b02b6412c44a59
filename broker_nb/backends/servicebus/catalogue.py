"""What there is and what holds for it: by the administration API where the key may ask it, else by asking the entity itself."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceNotFoundError,
    ServiceRequestError,
    ServiceResponseError,
)
from azure.core.pipeline.transport import RequestsTransport
from azure.servicebus.management import ServiceBusAdministrationClient

from broker_nb.backends.driver import (
    Backlog,
    Dedupe,
    Effect,
    Entity,
    Facts,
    Family,
    Kind,
    Lane,
    LeaseTerms,
    LookPlan,
    Proof,
    Summary,
)
from broker_nb.backends.servicebus.client import DEAD, Place, Settings, place
from broker_nb.errors import ErrorKind

T = TypeVar("T")
PARTITIONS = 16  # of a partitioned entity, by the service's choice
SHORTEST_LOCK_S = 5.0  # that the service allows: assumed where the key may not ask, so that leases are extended in time
AGAIN_S = 30.0  # after which an administration that did not answer is asked again
LONGEST = timedelta(days=3650)
_HELP = "the key or token may not list (claim Manage): name the entities in option entities, or use them by name"


class PlainHttp(RequestsTransport):  # type: ignore[misc] # the library loads it late, untyped
    """For emulators, whose administration is plain HTTP on a port of its own; the client insists on https."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    def send(self, request: Any, **kwargs: Any) -> Any:
        host, _, rest = request.url.partition("://")[2].partition("/")
        request.url = f"http://{host.partition(':')[0]}:{self._port}/{rest}"
        return super().send(request, **kwargs)


class NoAdministration(Exception):
    """The administration cannot be asked; the reason."""


class Administration:
    """The administration client, on a lane. Reads, and makes a subscription when told to."""

    def __init__(self, settings: Settings, lane: Lane) -> None:
        self._settings, self._lane = settings, lane
        self._client: ServiceBusAdministrationClient | None = None
        self._why_not, self._until = "", math.inf

    def _made(self) -> ServiceBusAdministrationClient:
        if self._client is None:
            s = self._settings
            given: dict[str, Any] = {"retry_total": 0, "connection_timeout": s.timeout, "read_timeout": s.timeout}
            if s.emulator:
                given["transport"] = PlainHttp(s.administration_port)
            if proxy := s.client_options.get("http_proxy"):
                user = f"{proxy['username']}:{proxy['password']}@" if proxy.get("username") else ""
                given["proxies"] = {"https": f"http://{user}{proxy['proxy_hostname']}:{proxy['proxy_port']}"}
            if s.connection_string:
                self._client = ServiceBusAdministrationClient.from_connection_string(s.connection_string, **given)
            else:
                self._client = ServiceBusAdministrationClient(s.namespace, cast("Any", s.credential), **given)
        return self._client

    async def ask(self, entity: str, question: Callable[[ServiceBusAdministrationClient], T]) -> T:
        """The answer; NoAdministration where it cannot be asked, with the reason."""
        if self._why_not and time.monotonic() < self._until:
            raise NoAdministration(self._why_not)

        def asked() -> T:
            try:
                return question(self._made())
            except ResourceNotFoundError as error:
                text = f"{entity}: not in this namespace, and not created; check the name against the list of topics"
                raise self._settings.host.error(ErrorKind.NOT_FOUND, entity, text) from error
            except (ServiceRequestError, ServiceResponseError) as error:
                self._until = time.monotonic() + AGAIN_S
                raise NoAdministration(self._settings.clean(str(error))) from None
            except ClientAuthenticationError as error:
                self._until = math.inf
                raise NoAdministration(self._settings.clean(str(error))) from None
            except HttpResponseError as error:
                if error.status_code in (401, 403):
                    raise NoAdministration(self._settings.clean(str(error))) from None
                raise self._settings.failure(entity, error) from None
            except (AzureError, ValueError, AttributeError) as error:  # a credential that administration has no use for
                raise NoAdministration(self._settings.clean(str(error))) from None

        try:
            return await self._lane.run(asked)
        except NoAdministration as error:
            self._why_not = str(error) or "no reason given"
            raise

    async def close(self) -> None:
        if self._client is not None:
            await self._lane.run(self._client.close)
        self._lane.close()


class Catalogue:
    """Entities, facts and counts. `probe` tells of a place, by the entity itself, whether it has sessions; None = a topic."""

    def __init__(self, settings: Settings, administration: Administration, probe: Callable[[Place], Any]) -> None:
        self._settings, self._administration, self._probe = settings, administration, probe

    async def entities(self, pattern: str) -> list[Entity]:
        """Queues, topics, then subscriptions."""

        def listed(client: ServiceBusAdministrationClient) -> list[Entity]:
            topics = [t.name for t in client.list_topics() if _matches(t.name, pattern)]
            found = [Entity(Kind.QUEUE, q.name) for q in client.list_queues() if _matches(q.name, pattern)]
            found += [Entity(Kind.TOPIC, name) for name in topics]
            return found + [Entity(Kind.SUBSCRIPTION, s.name, t) for t in topics for s in client.list_subscriptions(t)]

        try:
            return await self._administration.ask("servicebus", listed)
        except NoAdministration as error:
            if not self._settings.entities:
                raise self._settings.host.error(ErrorKind.PERMISSION, "servicebus", f"servicebus: {_HELP} ({error})") from None
        places = [place(Entity(Kind.QUEUE, name)) for name in self._settings.entities if _matches(name, pattern)]
        plain = [Entity(Kind.TOPIC, p.path) for p in places if not p.subscription]
        return plain + [Entity(Kind.SUBSCRIPTION, p.subscription, p.parent) for p in places if p.subscription]

    async def summaries(self, topics: Sequence[Entity]) -> list[Summary]:
        """Counts, of all queues in one list."""

        def counted(client: ServiceBusAdministrationClient) -> dict[str, tuple[int | None, int | None, str]]:
            found: dict[str, tuple[int | None, int | None, str]] = {}
            for q in client.list_queues_runtime_properties():
                found[q.name.lower()] = (q.active_message_count, q.size_in_bytes, "queue")
                found[f"{q.name}{DEAD}".lower()] = (q.dead_letter_message_count, None, "dead letters")
            for t in client.list_topics_runtime_properties():
                found[t.name.lower()] = (None, t.size_in_bytes, f"topic, {t.subscription_count} subscriptions")
            return found

        try:
            known = await self._administration.ask("servicebus", counted)
        except NoAdministration:
            known = {}
        told = [known.get(place(entity).path.lower(), (None, None, "")) for entity in topics]
        return [Summary(e, 1, count, size, kind=kind) for e, (count, size, kind) in zip(topics, told, strict=True)]

    async def facts(self, entity: Entity) -> Facts:
        """By the administration, else by the entity; NOT_FOUND either way."""
        at = place(entity)

        def described(client: ServiceBusAdministrationClient) -> Facts:
            if at.subscription:
                partitioned = _topic(client, at.parent).enable_partitioning
                settings: Any = client.get_subscription(at.parent, at.subscription)
                counts: Any = client.get_subscription_runtime_properties(at.parent, at.subscription)
                return _facts(entity, at, settings, counts, partitioned=bool(partitioned))
            try:
                settings = client.get_queue(at.parent)
            except (ResourceNotFoundError, AttributeError):  # how the client says that it is not a queue, or a topic
                topic = _topic(client, at.parent)
                if at.dead:  # of a topic there is none
                    raise ResourceNotFoundError(at.path) from None
                return _topic_facts(entity, topic)
            counts = client.get_queue_runtime_properties(at.parent)
            return _facts(entity, at, settings, counts, partitioned=bool(settings.enable_partitioning))

        try:
            return await self._administration.ask(at.path, described)
        except NoAdministration as error:
            sessions = await self._probe(at)
            if sessions is None:
                return _topic_facts(entity, None)
            return _known_facts(entity, at, sessions=sessions, details={"administration": str(error)})

    async def backlog(self, entity: Entity) -> list[Backlog]:
        """What waits, as far as the broker tells; it has no positions."""
        facts = await self.facts(entity)
        return [Backlog(0, None, None, facts.details.get("active_message_count"))]

    async def create(self, at: Place) -> None:
        """Make a subscription that gets everything from now on."""
        path = at.path
        try:
            await self._administration.ask(path, lambda client: client.create_subscription(at.parent, at.subscription))
        except NoAdministration as error:
            text = f"{path}: not there, and the key may not create it: {error}"
            raise self._settings.host.error(ErrorKind.PERMISSION, path, text) from None


def _matches(name: str, pattern: str) -> bool:
    return not pattern or fnmatch.fnmatchcase(name, pattern)


def _topic(client: ServiceBusAdministrationClient, name: str) -> Any:
    try:
        return client.get_topic(name)
    except AttributeError:  # a queue of that name
        raise ResourceNotFoundError(name) from None


def _seconds(given: timedelta | None) -> float | None:
    return None if given is None or given > LONGEST else given.total_seconds()


def _topic_facts(entity: Entity, settings: Any) -> Facts:
    reason = f"a topic keeps nothing itself: look at a subscription of it, {entity.name}/Subscriptions/NAME"
    kilobytes = settings and settings.max_message_size_in_kilobytes
    return Facts(
        entity=entity,
        partitions=tuple(range(PARTITIONS)) if settings and settings.enable_partitioning else (0,),
        look=LookPlan(possible=False, reason=reason),
        families=frozenset({Family.MESSAGE}),
        lease=_lease(None, None),
        dedupe=_dedupe(settings),
        max_message_bytes=kilobytes * 1024 if kilobytes else None,
    )


def _facts(entity: Entity, at: Place, settings: Any, counts: Any, *, partitioned: bool) -> Facts:
    kilobytes = getattr(settings, "max_message_size_in_kilobytes", None)
    details = {
        "active_message_count": counts.dead_letter_message_count if at.dead else counts.active_message_count,
        "dead_letter_message_count": counts.dead_letter_message_count,
        "scheduled_message_count": getattr(counts, "scheduled_message_count", None),
        "default_message_time_to_live": _seconds(settings.default_message_time_to_live),
        "dead_lettering_on_message_expiration": settings.dead_lettering_on_message_expiration,
        "status": str(getattr(settings.status, "value", settings.status)),
    }
    return _known_facts(
        entity,
        at,
        sessions=bool(settings.requires_session) and not at.dead,
        details=details,
        partitioned=partitioned,
        lease=_lease(_seconds(settings.lock_duration), None if at.dead else settings.max_delivery_count),
        dedupe=_dedupe(settings),
        max_message_bytes=kilobytes * 1024 if kilobytes else None,
    )


def _known_facts(
    entity: Entity,
    at: Place,
    *,
    sessions: bool,
    details: dict[str, Any],
    partitioned: bool = False,
    lease: LeaseTerms | None = None,
    dedupe: Dedupe | None = None,
    max_message_bytes: int | None = None,
) -> Facts:
    look = LookPlan(
        possible=True,
        effects=frozenset({Effect.LOCKS_SESSION}) if sessions else frozenset(),
        proof=Proof.DRY,
        end_is_fixed=False,
        sorted_times=True,
        reason="locked, deferred, scheduled and perhaps expired messages are shown too",
    )
    return Facts(
        entity=entity,
        partitions=tuple(range(PARTITIONS)) if partitioned else (0,),
        look=look,
        families=frozenset({Family.MESSAGE}),
        lease=lease or _lease(None, None),
        dedupe=dedupe,
        ordered=sessions,
        max_message_bytes=max_message_bytes,
        dead_letter=None if at.dead else Entity(Kind.DEAD_LETTER, f"{at.path}{DEAD}", at.path),
        details=details | {"sessions": sessions},
    )


def _lease(seconds: float | None, max_deliveries: int | None) -> LeaseTerms:
    return LeaseTerms(seconds or SHORTEST_LOCK_S, renewable=True, return_counts=True, max_deliveries=max_deliveries)


def _dedupe(settings: Any) -> Dedupe | None:
    if not getattr(settings, "requires_duplicate_detection", False):
        return None
    window = _seconds(settings.duplicate_detection_history_time_window)
    return Dedupe(window, ordered=False, replaces_message_id=True)
