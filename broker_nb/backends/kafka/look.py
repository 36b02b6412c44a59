"""Looking: explicit offsets on a consumer that belongs to no group, read until the broker has proved that the end was passed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from broker_nb.backends.driver import Batch, Digest, Host, Lane, Piece, Position, Step, Stop
from broker_nb.backends.kafka.client import Settings, failure, fetch, is_about, last_offsets, log, offset_of, split
from broker_nb.backends.kafka.codec import KafkaCodec
from broker_nb.errors import BrokerError, ErrorKind

_OURS = {
    "group.id": "broker_nb-look",  # the client wants one; it is never joined, and nothing is committed
    "fetch.wait.max.ms": 20,  # else the end of a partition is announced 0.4 s late
    "queued.min.messages": 1_000_000,  # the default of 100,000 read at a third of the speed; bounded by 64 MiB all the same
    "max.partition.fetch.bytes": 2 << 20,
    "topic.metadata.propagation.max.ms": 1000,  # how long a topic that was not found is waited for
}
BITE = 2000
"""Rows that are digested at once."""
_IDLE = 2  # consumers kept between looks
_SERVE_S = 5.0  # how often an idle consumer hands over its events


@dataclass(slots=True)
class Warm:
    """A consumer with its lane. Its connections and metadata make the next look quick."""

    lane: Lane
    committed_only: bool
    consumer: Consumer = field(init=False)
    browser: KafkaBrowser | None = None  # who reads now

    def open(self, config: dict[str, Any]) -> None:
        """Make the consumer; on the lane."""
        self.consumer = Consumer(config)

    def on_error(self, error: KafkaError) -> None:
        """What the client tells beside the rows; on the lane, while polling."""
        if self.browser is not None:
            self.browser.on_error(error)

    def rest(self) -> None:
        """Read nothing; on the lane."""
        self.consumer.unassign()
        self.browser = None

    def serve(self) -> None:
        """Let the client hand over its log lines and events, while nobody reads."""
        if self.browser is None:
            self.consumer.poll(0)


class Looks:
    """The consumers for looks of one connection."""

    def __init__(self, settings: Settings, host: Host, check_alive: Callable[[], Awaitable[None]]) -> None:
        self._settings, self._host, self.check_alive = settings, host, check_alive
        self._idle: list[Warm] = []
        self._closed = False

    async def browse(
        self, topic: str, pieces: Sequence[Piece], committed_only: bool, digest: Digest | None = None
    ) -> KafkaBrowser:
        """Begin to read pieces of a topic."""
        warm = await self._take(committed_only)
        browser = KafkaBrowser(self, warm, self._host, self._settings, topic, pieces, digest)
        try:
            await warm.lane.run(browser.assign)
        except KafkaException as error:
            await self._drop(warm)
            raise failure(self._host, topic, error) from error
        return browser

    async def _take(self, committed_only: bool) -> Warm:
        for warm in self._idle:
            if warm.committed_only is committed_only:
                self._idle.remove(warm)
                return warm
        isolation = "read_committed" if committed_only else "read_uncommitted"
        forced: dict[str, Any] = {
            "isolation.level": isolation,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",  # an offset that is not there is told, never replaced
        }
        lane = self._host.lane("kafka-look")
        warm = Warm(lane, committed_only)
        forced["error_cb"] = self._settings.health.watch(warm.on_error)
        try:
            await lane.run(warm.open, self._settings.config(_OURS, forced))
        except KafkaException as error:
            lane.close()
            raise failure(self._host, "kafka", error) from error
        lane.idle(warm.serve, _SERVE_S)
        return warm

    async def give_back(self, warm: Warm, healthy: bool) -> None:
        """Keep a consumer for the next look, or close it."""
        if not healthy or self._closed or len(self._idle) >= _IDLE:
            await self._drop(warm)
            return
        await warm.lane.run(warm.rest)
        self._idle.append(warm)

    async def _drop(self, warm: Warm) -> None:
        await warm.lane.run(warm.consumer.close)
        warm.lane.close()

    async def close(self) -> None:
        """Close what is idle; what is still read is closed when given back."""
        self._closed = True
        while self._idle:
            await self._drop(self._idle.pop())


class KafkaBrowser:
    """A look over fixed pieces of one topic."""

    def __init__(
        self,
        looks: Looks,
        warm: Warm,
        host: Host,
        settings: Settings,
        topic: str,
        pieces: Sequence[Piece],
        digest: Digest | None,
    ) -> None:
        self._looks, self._warm, self._host, self._settings, self._topic = looks, warm, host, settings, topic
        self._codec, self._digest = KafkaCodec(topic), digest
        self._starts = {p.partition: offset_of(p.start) for p in pieces}
        self._ends = {p.partition: None if p.end is None else offset_of(p.end) for p in pieces}
        self._open = {p for p, end in self._ends.items() if end is None or self._starts[p] < end}
        self._news: dict[int, Position] = {p: (end,) for p, end in self._ends.items() if end is not None and p not in self._open}
        self._step: Step | None = None  # read and not handed out
        self._failed: BrokerError | None = None
        self._closed = False

    def assign(self) -> None:
        """On the lane. The client drops what earlier assignments left in its queues."""
        self._warm.browser = self
        self._warm.consumer.assign([TopicPartition(self._topic, p, self._starts[p]) for p in sorted(self._open)])

    async def read(self, max_rows: int, max_bytes: int, wait: float) -> Step:
        if self._closed:
            raise self._host.error(ErrorKind.CLOSED, self._topic, f"{self._topic}: this look is closed; begin a new one")
        if self._failed is not None:
            raise self._failed
        if self._step is None:
            await self._warm.lane.run(self._read, max_rows, max_bytes, wait)
        step, self._step = self._step or Step(None, {}), None
        if step.batch is None and self._failed is not None:
            raise self._failed
        if step.batch is not None or step.reached:
            self._settings.health.on_answer()
        elif self._settings.health.down_s > self._settings.timeout:
            await self._looks.check_alive()
        return step

    def _read(self, max_rows: int, max_bytes: int, wait: float) -> None:
        """On the lane: what was read stays here until somebody takes it, also when the caller was cancelled."""
        if self._step is not None or self._closed:
            return
        reached, self._news = self._news, {}
        stopped: dict[int, Stop] = {}
        batch = self._fetch(max_rows, max_bytes, wait if self._open else 0, reached, stopped)
        done = {p for p in self._open & reached.keys() if (end := self._ends[p]) is not None and reached[p] >= (end,)}
        self._open -= done
        if done and self._open:  # a partition whose piece is read would fill the queue with rows that nobody wants
            self._warm.consumer.incremental_unassign([TopicPartition(self._topic, p) for p in done])
        self._step = Step(batch, reached, stopped)

    def _fetch(
        self, max_rows: int, max_bytes: int, wait: float, reached: dict[int, Position], stopped: dict[int, Stop]
    ) -> Batch | None:
        """What is there now; where it is digested, in small bites, which the processor's cache still holds then."""
        digests, taken, size = [], 0, 0
        bite = max_rows if self._digest is None else BITE
        while taken < max_rows and size < max_bytes:
            fetched, n = fetch(self._warm.consumer, min(bite, max_rows - taken), max_bytes - size, 0 if taken else wait)
            rows, events = split(fetched)
            rows = self._advance(rows, reached)
            for event in events:
                self._note(event, reached, stopped)
            if self._digest is None:
                return Batch(self._codec, rows) if rows else None
            if rows:
                digests.append(self._digest(Batch(self._codec, rows)))
            taken, size = taken + len(fetched), size + n
            if len(fetched) < bite:
                break
        return Batch(self._codec, (), digests=digests) if digests else None

    def _advance(self, rows: list[Message], reached: dict[int, Position]) -> list[Message]:
        """Note how far rows go, and leave out those beyond their piece."""
        beyond = False
        for partition, offset in last_offsets(rows).items():
            end = self._ends[partition]
            if end is None or offset < end:
                reached[partition] = (offset + 1,)
            else:
                reached[partition], beyond = (end,), True
        if not beyond:
            return rows
        ends = {p: float("inf") if end is None else end for p, end in self._ends.items()}
        return [m for m in rows if m.offset() < ends[m.partition()]]  # type: ignore[operator,index] # a message has both

    def _note(self, event: Message, reached: dict[int, Position], stopped: dict[int, Stop]) -> None:
        error, partition, offset = event.error(), event.partition(), event.offset()
        assert error is not None  # noqa: S101 - because split put it here for that
        if error.code() == KafkaError._PARTITION_EOF and partition in self._ends and offset is not None:
            at, end = max((offset,), reached.get(partition, (0,))), self._ends[partition]
            reached[partition] = at if end is None else min(at, (end,))
            if end is not None and at < (end,):
                stopped[partition] = self._why(partition, offset)
        elif error.code() == KafkaError._AUTO_OFFSET_RESET and partition in self._ends:
            stopped[partition] = Stop.AGED_OUT
        elif error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
            log.debug("%s: %s; no group is joined, so it does not matter", self._topic, error)
        else:
            self._failed = failure(self._host, self._topic, error)

    def on_error(self, error: KafkaError) -> None:
        """On the lane, while reading: an error that does not come as a row."""
        if is_about(error, self._topic):
            self._failed = failure(self._host, self._topic, error)

    def _why(self, partition: int, offset: int) -> Stop:
        """Why a partition ends before its piece: rows are there that a reader of committed ones does not get, or there are none."""
        _, high = self._warm.consumer.get_watermark_offsets(TopicPartition(self._topic, partition), cached=True)
        return Stop.HELD_BACK if self._warm.committed_only and high > offset else Stop.DRY

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._looks.give_back(self._warm, self._failed is None)
