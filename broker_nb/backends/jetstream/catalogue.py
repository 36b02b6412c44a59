"""What is on the server. Every function only asks; nothing here creates, reads by a consumer, or acknowledges."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from broker_nb.backends.driver import (
    Backlog,
    Bounds,
    Dedupe,
    Entity,
    Facts,
    Family,
    Kind,
    LeaseTerms,
    LookPlan,
    Position,
    Summary,
)
from broker_nb.backends.jetstream.client import Wire
from broker_nb.backends.jetstream.codec import nanoseconds, rfc3339
from broker_nb.backends.jetstream.errors import NO_CONSUMER, NO_MESSAGE, Refusal, failure, missing
from broker_nb.backends.jetstream.names import Names, Place, consumer_name
from broker_nb.errors import BrokerError, ErrorKind

_NS = 1_000_000_000
ACK_WAIT_S = 30.0  # the server's own, for a consumer that says nothing else
_AT_ONCE = 50
_SHOWN = ("retention", "storage", "num_replicas", "max_age", "max_msgs", "max_bytes", "discard", "allow_direct", "sealed")
_SHOWN_OF_CONSUMER = ("num_ack_pending", "num_redelivered", "num_waiting", "num_pending", "paused")


def first_of(info: Mapping[str, Any]) -> int:
    """Sequence of the oldest row; one past the newest when there is none."""
    return max(int(info["state"]["first_seq"]), 1)


def end_of(info: Mapping[str, Any]) -> int:
    """One past the sequence of the newest row that there ever was."""
    return max(int(info["state"]["last_seq"]) + 1, first_of(info))


def leases(config: Mapping[str, Any]) -> list[float]:
    """Seconds for which the first, second, ... delivery of a row stays ours; the last one goes on for all later ones."""
    return [ns / _NS for ns in config.get("backoff") or (config.get("ack_wait") or ACK_WAIT_S * _NS,)]


def terms(config: Mapping[str, Any]) -> LeaseTerms:
    """What holds for rows of a consumer."""
    most = int(config.get("max_deliver") or -1)
    return LeaseTerms(min(leases(config)), renewable=True, return_counts=True, max_deliveries=most if most > 0 else None)


class Catalogue:
    """Questions to the server about streams and consumers."""

    def __init__(self, wire: Wire, names: Names) -> None:
        self._wire, self._names, self._host = wire, names, wire.host
        self.find = names.find
        self.lows: dict[str, Position] = {}  # topic -> where it began when that was last told

    # -------------------------------------------------------------- names
    async def entities(self, pattern: str) -> AsyncIterator[Entity]:
        """Streams that match, then their durable consumers."""
        names = sorted([s async for s in self._pages("STREAM.NAMES", "streams") if fnmatchcase(s, pattern or "*")])
        for name in names:
            yield Entity(Kind.TOPIC, name)
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            for stream, consumers in zip(some, await asyncio.gather(*map(self._consumers, some)), strict=True):
                for consumer in consumers:
                    yield Entity(Kind.SUBSCRIPTION, consumer, stream)

    async def _pages(self, call: str, what: str) -> AsyncIterator[Any]:
        offset = 0
        while True:
            page = await self._wire.told(call, "nats", {"offset": offset})
            found = page.get(what) or []
            for one in found:
                yield one
            offset += len(found)
            if not found or offset >= page["total"]:
                return

    async def _consumers(self, stream: str) -> list[str]:
        try:
            return sorted(
                [c["name"] async for c in self._pages(f"CONSUMER.LIST.{stream}", "consumers") if "durable_name" in c["config"]]
            )
        except BrokerError as error:
            if error.kind not in (ErrorKind.NOT_FOUND, ErrorKind.PERMISSION):  # gone meanwhile, or none of our business
                raise
            return []

    async def summaries(self, topics: Sequence[Entity]) -> list[Summary]:
        """A line per topic."""
        lines: list[Summary] = []
        for start in range(0, len(topics), _AT_ONCE):
            lines += await asyncio.gather(*map(self._summary, topics[start : start + _AT_ONCE]))
        return lines

    async def _summary(self, topic: Entity) -> Summary:
        try:
            place, info = await self._names.find(topic.name)
        except BrokerError as error:
            if error.kind is ErrorKind.CONFLICT and not topic.name.startswith("stream:"):  # it was listed as a stream
                return replace(await self._summary(replace(topic, name=f"stream:{topic.name}")), entity=topic)
            if error.kind is not ErrorKind.NOT_FOUND:  # else it is gone meanwhile
                raise
            return Summary(topic, 1, None)
        state = info["state"]
        kind = "log" if info["config"]["retention"] == "limits" else "queue"
        if place.subject or not state["messages"]:
            return Summary(topic, 1, None if place.subject else 0, None if place.subject else 0, kind=kind)
        oldest, newest = nanoseconds(state["first_ts"]), nanoseconds(state["last_ts"])
        return Summary(topic, 1, state["messages"], state["bytes"], oldest, newest, kind=kind)

    # -------------------------------------------------------------- one topic
    async def topic_facts(self, entity: Entity) -> Facts:
        """What holds for a topic."""
        place, info = await self._names.find(entity.name)
        config = info["config"]
        limit, payload = int(config.get("max_msg_size", -1)), self._wire.max_payload
        window = int(config.get("duplicate_window", 0))
        return Facts(
            entity=entity,
            partitions=(0,),
            look=LookPlan(possible=True, sorted_times=True),
            families=frozenset({Family.MESSAGE}),
            lease=LeaseTerms(ACK_WAIT_S, renewable=True, return_counts=True, max_deliveries=None),
            dedupe=Dedupe(window / _NS, ordered=False, replaces_message_id=False) if window else None,
            ordered=True,
            max_message_bytes=min(limit, payload) if limit >= 0 else payload,
            details={"stream": place.stream, "subjects": config.get("subjects") or []}
            | {name: config[name] for name in _SHOWN if name in config},
        )

    async def bounds(self, name: str) -> list[Bounds]:
        """Begin and end of the topic's stream."""
        _, info = await self._names.find(name)
        self.lows[name] = (first_of(info),)
        return [Bounds(0, self.lows[name], (end_of(info),))]

    async def locate(self, name: str, time_ns: int) -> Position | None:
        """First row of the topic that the server got at or after a time."""
        place, info = await self._names.find(name)
        low, high = first_of(info), end_of(info)
        try:
            row = await self.message(place, {"start_time": rfc3339(time_ns)} if time_ns > 0 else {"seq": low})
        except ValueError:  # later than a date can be
            return None
        if row is None:
            return None
        if nanoseconds(row["time"]) >= time_ns:
            return (int(row["seq"]),)
        found: Position | None = None  # a server that knows no start_time answered with its first row: search
        while low < high:
            middle = (low + high) // 2
            row = await self.message(place, {"seq": middle})
            if row is None or int(row["seq"]) >= high:  # there is none between the two
                high = middle
            elif nanoseconds(row["time"]) >= time_ns:
                found, high = (int(row["seq"]),), middle
            else:
                low = int(row["seq"]) + 1
        return found

    async def message(self, place: Place, start: Mapping[str, Any]) -> dict[str, Any] | None:
        """The first row of a topic at or after a start, as the stream's leader has it; None when there is none."""
        try:
            answer = await self._wire.api(f"STREAM.MSG.GET.{place.stream}", place.name, {"next_by_subj": place.filter, **start})
        except Refusal as refusal:
            if refusal.number != NO_MESSAGE:
                raise failure(self._host, place.name, refusal) from refusal
            return None
        row: dict[str, Any] = answer["message"]
        return row

    # -------------------------------------------------------------- one consumer
    async def consumer(self, place: Place, name: str) -> dict[str, Any] | None:
        """The server's information about a consumer, if it is one that we can take from; None when it is not there.

        Raises
        ------
        BrokerError
            UNSUPPORTED for a consumer of another kind, CONFLICT for one of other subjects than the topic's.
        """
        try:
            info = await self._wire.api(f"CONSUMER.INFO.{place.stream}.{consumer_name(self._wire, name)}", name)
        except Refusal as refusal:
            if refusal.number != NO_CONSUMER:
                raise failure(self._host, name, refusal) from refusal
            return None
        self._check_kind(place, name, info["config"])
        return info

    def _check_kind(self, place: Place, name: str, config: Mapping[str, Any]) -> None:
        flaws: dict[str, Callable[[], bool]] = {
            "a push consumer": lambda: bool(config.get("deliver_subject")),
            "an ephemeral consumer": lambda: not config.get("durable_name"),
            f"a consumer of ack policy {config.get('ack_policy')}": lambda: config.get("ack_policy") != "explicit",
            "a consumer that delivers headers only": lambda: bool(config.get("headers_only")),
            "a consumer with priority groups": lambda: bool(config.get("priority_groups")),
        }
        if flaw := next((what for what, holds in flaws.items() if holds()), ""):
            text = f"{name} is {flaw}: only durable pull consumers with explicit acks can be taken from; name another, or sample"
            raise self._host.error(ErrorKind.UNSUPPORTED, name, text)
        subjects = config.get("filter_subjects") or [s for s in (config.get("filter_subject"),) if s]
        if place.subject and subjects != [place.subject]:
            told = ", ".join(subjects) or f"everything in {place.stream}"
            text = f"{name} delivers {told}, not {place.subject}: name the topic stream:{place.stream}, or another consumer"
            raise self._host.error(ErrorKind.CONFLICT, name, text)

    async def consumer_of(self, entity: Entity) -> tuple[Place, dict[str, Any], dict[str, Any]]:
        """Place, stream and consumer; NOT_FOUND without creating it."""
        place, stream = await self._names.find(entity.parent or "")
        info = await self.consumer(place, entity.name)
        if info is None:
            text = f"stream {place.stream} has no such consumer; create=True makes one"
            raise missing(self._host, entity.name, text)
        return place, stream, info

    async def consumer_facts(self, entity: Entity, waiting: Callable[[str, str], int]) -> Facts:
        """What holds for a consumer; `waiting` tells how many requests of ours it has."""
        place, _, info = await self.consumer_of(entity)
        config = info["config"]
        return Facts(
            entity=entity,
            partitions=(0,),
            look=LookPlan(possible=False, reason="a consumer is not looked at; sample its topic"),
            families=frozenset({Family.MESSAGE}),
            lease=terms(config),
            ordered=config.get("max_ack_pending") == 1,
            # The nearest that the server tells: who waits for rows now. One that is at work on its rows is not seen.
            members=max(0, int(info["num_waiting"]) - waiting(place.stream, entity.name)),
            max_message_bytes=self._wire.max_payload,
            details={"stream": place.stream} | {name: info[name] for name in _SHOWN_OF_CONSUMER if name in info} | dict(config),
        )

    async def backlog(self, entity: Entity) -> list[Backlog]:
        """How far a consumer is."""
        _, stream, info = await self.consumer_of(entity)
        done = int(info["ack_floor"]["stream_seq"])
        return [Backlog(0, (done + 1,), (end_of(stream),), int(info["num_pending"]), int(info["num_ack_pending"]))]
