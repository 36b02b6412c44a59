"""Taking: a member of a consumer group, which commits a position per partition."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_END,
    OFFSET_STORED,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from broker_nb.backends.driver import Batch, Event, Host, Lane, Outcome, Position, Settled, Settlement, TakeOptions
from broker_nb.backends.kafka.client import Settings, failure, fetch, is_about, kind_of, log, offset_of, split
from broker_nb.backends.kafka.codec import KafkaCodec
from broker_nb.errors import BrokerError, ErrorKind

_CLOSE_S = 1.9
_COMMIT_S = 5.0
_REST_S = 1.0  # how often an idle member polls: also how long a rebalance of the group may wait for us
_ASK_S = 5.0
_SEEK_TRIES = 20
_LOST = frozenset({ErrorKind.LEASE_LOST, ErrorKind.FENCED})
_RETRY = frozenset({ErrorKind.UNREACHABLE, ErrorKind.TIMEOUT, ErrorKind.THROTTLED, ErrorKind.TRANSIENT})


def member_config(settings: Settings, group: str, options: TakeOptions) -> dict[str, Any]:
    """Settings of a group member."""
    ours = {
        "isolation.level": "read_committed",
        "fetch.wait.max.ms": 100,
        "queued.min.messages": max(1000, options.max_held),
        "topic.metadata.propagation.max.ms": 5000,  # how long a topic that was not found is waited for
    }
    # A partition without a usable position is told, and begun by us: the client would jump over rows in silence.
    forced = {"group.id": group, "enable.auto.commit": False, "enable.partition.eof": False, "auto.offset.reset": "error"}
    return settings.config(ours, forced, options.native)


class KafkaSource:
    """One member of one group, reading one topic. Leaves the group when closed."""

    def __init__(self, topic: str, group: str, start: str, lane: Lane, host: Host, settings: Settings) -> None:
        self._start = start
        self._topic, self._group, self._lane, self._host, self._settings = topic, group, lane, host, settings
        self._name = f"{topic}/{group}"
        self._codec = KafkaCodec(topic)
        self._consumer: Consumer
        self._assigned: set[int] = set()
        self._resting = False
        self._rows: list[Message] = []  # read and not handed out
        self._answers: dict[frozenset[tuple[int, int]], dict[int, KafkaError | None]] = {}  # to commits
        self._failed: BrokerError | None = None
        self.closed = False
        self.member_id: str | None = None

    async def join(self, config: dict[str, Any]) -> None:
        """Become a member; partitions come with the first pulls."""
        try:
            await self._lane.run(self._join, config)
        except KafkaException as error:
            self._lane.close()
            raise failure(self._host, self._group, error) from error
        longest = float(config.get("max.poll.interval.ms", 300_000)) / 1000
        self._lane.idle(self._rest, min(_REST_S, longest / 4))

    def _join(self, config: dict[str, Any]) -> None:
        self._consumer = Consumer(
            config | {"error_cb": self._settings.health.watch(self._on_error), "on_commit": self._on_commit}
        )
        self._consumer.subscribe([self._topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke)

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.member_id = consumer.memberid()
        self._assigned |= {tp.partition for tp in partitions}
        try:
            stands = {tp.partition: tp.offset for tp in consumer.committed(partitions, timeout=_ASK_S)}
        except KafkaException as error:
            self._failed = failure(self._host, self._name, error)
            return  # the client then begins where was committed, and tells where nothing was
        begin = OFFSET_END if self._start == "latest" else OFFSET_BEGINNING
        self._assign({p: begin if offset < 0 else offset for p, offset in stands.items()}, fresh=True)

    def _assign(self, offsets: dict[int, int], fresh: bool) -> None:
        """On the lane: read partitions from there; the others of the assignment go on."""
        places = [TopicPartition(self._topic, p, offset) for p, offset in offsets.items()]
        try:
            if not fresh:
                self._consumer.incremental_unassign(places)
            self._consumer.incremental_assign(places)
        except KafkaException as error:
            if error.args[0].code() != KafkaError._STATE:
                raise
            # A group whose members give up everything at each rebalance takes whole assignments only.
            others = [TopicPartition(self._topic, p) for p in self._assigned - offsets.keys()]
            rest = [
                TopicPartition(tp.topic, tp.partition, max(tp.offset, OFFSET_STORED)) for tp in self._consumer.position(others)
            ]
            self._consumer.assign(places + rest)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        consumer.resume(partitions)  # the client would remember a pause until they come back, and never read them
        gone = frozenset(tp.partition for tp in partitions)
        self._assigned -= gone
        self._rows = [m for m in self._rows if m.partition() not in gone]
        if gone and not self.closed:
            self._host.emit(Event("revoked", partitions=gone, handle=self))

    def _on_error(self, error: KafkaError) -> None:
        if is_about(error, self._topic):
            self._failed = failure(self._host, self._topic, error)

    def _rest(self) -> None:
        """Stay a member while a person thinks: poll, with the partitions paused so that no row comes."""
        if self.closed:
            return
        self._consumer.pause(self._consumer.assignment())
        self._resting = True
        self._take(1, 0, 0)

    def _take(self, max_rows: int, max_bytes: int, wait: float) -> None:
        before = frozenset(self._assigned)
        rows, events = split(fetch(self._consumer, max_rows, max_bytes, wait)[0])
        if not before <= self._assigned:  # taken away between two rows
            rows = [m for m in rows if m.partition() in self._assigned]
        self._rows += rows
        for event in events:
            error = event.error()
            assert error is not None  # noqa: S101 - because split put it here for that
            if error.code() == KafkaError._MAX_POLL_EXCEEDED:
                log.warning("%s: out of the group for a while, because this process was stopped; joining again", self._group)
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                self._resume(TopicPartition(self._topic, event.partition() or 0))
            else:
                self._failed = failure(self._host, self._name, error)

    def _resume(self, at: TopicPartition) -> None:
        """On the lane: go on with a partition where the rows that are there begin, and tell which are gone."""
        try:
            stands = max(tp.offset for tp in (*self._consumer.committed([at], timeout=_ASK_S), *self._consumer.position([at])))
            low, _ = self._consumer.get_watermark_offsets(at, timeout=_ASK_S)
            self._assign({at.partition: low}, fresh=False)
        except KafkaException as error:
            self._failed = failure(self._host, self._name, error)
            return
        text = f"{self._name}: rows from {stands} of partition {at.partition} are no longer there; reading goes on at {low}"
        self._failed = self._host.error(ErrorKind.AGED_OUT, self._name, text)

    # -------------------------------------------------------------- reading
    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        self._check_open()
        if not self._rows and self._failed is None:
            await self._lane.run(self._pull, max_rows, max_bytes, wait)
        rows, self._rows = self._rows[:max_rows], self._rows[max_rows:]
        if rows:
            self._settings.health.on_answer()
            return Batch(self._codec, rows)
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        return None

    def _pull(self, max_rows: int, max_bytes: int, wait: float) -> None:
        """On the lane: what was read stays in the handle until somebody takes it, also when the caller was cancelled."""
        if self._rows or self.closed:
            return
        if self._resting:
            self._consumer.resume(self._consumer.assignment())
            self._resting = False
        self._take(max_rows, max_bytes, wait)

    async def seek(self, positions: Mapping[int, Position]) -> None:
        self._check_open()
        for _ in range(_SEEK_TRIES):
            positions = await self._lane.run(self._seek, positions)
            if not positions:
                return
        raise self._host.error(
            ErrorKind.TRANSIENT,
            self._topic,
            f"{self._topic}: the client is not ready to read from elsewhere; try again",
            retryable=True,
        )

    def _seek(self, positions: Mapping[int, Position]) -> Mapping[int, Position]:
        """On the lane. Returns what has to be tried again: a partition that was just assigned does not take it yet."""
        self._rows = [m for m in self._rows if m.partition() not in positions]
        late = {}
        for partition, position in positions.items():
            if partition not in self._assigned:
                continue  # its new owner begins where was committed
            try:
                self._consumer.seek(TopicPartition(self._topic, partition, offset_of(position)))
            except KafkaException as error:
                if error.args[0].code() != KafkaError._STATE:
                    raise failure(self._host, f"{self._topic}[{partition}]", error) from error
                late[partition] = position
        if late:
            self._take(1, 0, 0.1)
        return late

    # -------------------------------------------------------------- committing
    async def commit(self, positions: Mapping[int, Position]) -> Mapping[int, Outcome]:
        self._check_open()
        return await self._lane.run(self._commit, positions)

    def _commit(self, positions: Mapping[int, Position]) -> Mapping[int, Outcome]:
        """On the lane, where partitions come and go: the broker would take a commit for a partition that is no longer ours.

        Not the client's blocking commit, which without a broker does not return until the session has ended.
        """
        offsets = {p: offset_of(at) for p, at in positions.items() if p in self._assigned}
        outcomes = {p: Outcome(Settled.LOST) for p in positions if p not in offsets}
        if not offsets:
            return outcomes
        key = frozenset(offsets.items())
        self._answers.clear()
        try:
            self._consumer.commit(offsets=[TopicPartition(self._topic, p, offset) for p, offset in key], asynchronous=True)
        except KafkaException as error:
            return outcomes | dict.fromkeys(offsets, self._outcome(error.args[0]))
        end = time.monotonic() + _COMMIT_S
        while key not in self._answers and time.monotonic() < end and not self.closed:
            self._take(1, 0, 0.05)  # hands over the answer; a row that comes is kept
        answer = self._answers.get(key, dict.fromkeys(offsets, KafkaError(KafkaError._TIMED_OUT, "no answer to the commit")))
        return outcomes | {p: Outcome(Settled.CONFIRMED) if e is None else self._outcome(e) for p, e in answer.items()}

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        self._answers[frozenset((tp.partition, tp.offset) for tp in partitions)] = {
            tp.partition: tp.error or error for tp in partitions
        }

    def _outcome(self, error: KafkaError) -> Outcome:
        kind = kind_of(error)
        state = Settled.LOST if kind in _LOST else Settled.RETRY if kind in _RETRY else Settled.REFUSED
        return Outcome(state, failure(self._host, self._name, error))

    async def settle(self, items: Sequence[Settlement]) -> NoReturn:
        raise self._positions_only()

    async def extend(self, tokens: Sequence[object], seconds: float) -> NoReturn:
        raise self._positions_only()

    def _positions_only(self) -> BrokerError:
        text = f"{self._group}: rows of a log are not settled one by one; commit a position"
        return self._host.error(ErrorKind.UNSUPPORTED, self._group, text)

    # -------------------------------------------------------------- closing
    def _check_open(self) -> None:
        if self.closed:
            raise self._host.error(ErrorKind.CLOSED, self._group, f"{self._group}: this member has left; subscribe again")

    async def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        leaving = asyncio.ensure_future(self._lane.run(self._consumer.close))
        # Without a broker nobody can be told; the lane ends by itself when the client gives up.
        await asyncio.wait({leaving}, timeout=_CLOSE_S)
        self._lane.close()
        if not leaving.done():
            leaving.add_done_callback(_log_late)
        elif (error := leaving.exception()) is not None:
            log.warning("%s: leaving: %s", self._group, error)


def _log_late(late: asyncio.Future[Any]) -> None:
    if not late.cancelled():
        log.info("answered late: %s", late.exception() or "done")
