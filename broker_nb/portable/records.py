"""A member of a group that reads a log: rows are marked done, and the contiguous prefix per partition is committed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from broker_nb.backends.driver import Batch, Capabilities, Codec, Envelope, Event, Facts, Outcome, Position, Settled, Source
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attributes, Record
from broker_nb.portable.commits import Prefix
from broker_nb.portable.loop import anywhere
from broker_nb.portable.messages import wall
from broker_nb.portable.pulling import Handle, Taken
from broker_nb.portable.subscription import MAX_KNOWN, Subscription


class Committed(NamedTuple):
    """Where one partition stands after a commit. `open_at` is the first row not done, `waiting` how many wait behind the prefix."""

    partition: int
    position: Position | None
    open_at: Position | None
    waiting: int
    error: BrokerError | None = None


class RecordSubscription(Subscription[Record]):
    """Rows of a log, read as a member of a group. Closing commits nothing and gives nothing up: uncommitted rows come again."""

    def __init__(
        self,
        name: str,
        capabilities: Capabilities,
        facts: Facts,
        open_source: Callable[[], Coroutine[Any, Any, Source]],
    ) -> None:
        super().__init__(name, capabilities, facts, open_source)
        self._prefixes: dict[int, Prefix] = {}
        self._places: dict[int, tuple[int, Position]] = {}
        self._void_below: dict[int, int] = {}  # partition -> serials below were taken away or given back
        self._next_serial = 1
        self._committing = asyncio.Lock()

    async def _choose(self) -> Handle:
        async with self._opening:
            if not self._handles:
                self._handles.append(Handle(await self._open_source(), concurrent_settle=False))
            return self._handles[0]

    def _took(self, handle: Handle, batch: Batch, first: int) -> None:
        del handle
        places = batch.codec.places(batch.rows)
        for serial, (partition, position) in enumerate(places, first):
            self._places[serial] = partition, position
            prefix = self._prefixes.get(partition)
            if prefix is None:
                prefix = self._prefixes[partition] = Prefix()
            prefix.deliver((position,))
        self._next_serial = first + len(places)
        if len(self._places) > self._forget_at:
            self._places = {s: (p, at) for s, (p, at) in self._places.items() if not self._prefixes[p].is_done(at)}
            self._forget_at = max(MAX_KNOWN, 2 * len(self._places))

    # -------------------------------------------------------------- taking
    @anywhere
    async def next_record(self, timeout: float | None = None) -> Record | None:
        """The next record; None when nothing is there within `timeout` seconds (None waits for ever)."""
        return await self._next(timeout)

    def _objects(self, taken: Iterable[Taken]) -> list[Record]:
        return [
            self._record(part.batch.codec, row, serial)
            for part in taken
            for serial, row in zip(part.serials, part.batch.rows, strict=True)
        ]

    def _record(self, codec: Codec, row: Any, serial: int) -> Record:
        envelope = codec.envelope(row)

        async def mark(through: bool) -> None:
            (done,) = await self.commit([serial], through=through)
            if done.error is not None:
                raise done.error

        return Record(
            topic=envelope.topic,
            id=envelope.id,
            key=envelope.key,
            data=envelope.data,
            attributes=Attributes(envelope.attributes),
            publish_time_ns=envelope.publish_time_ns,
            native=envelope.native,
            partition=envelope.partition,
            offset=envelope.position[0],
            ingestion_time=wall(time.monotonic()),
            _mark=mark,
            position=envelope.position,
        )

    # -------------------------------------------------------------- committing
    @anywhere
    async def commit(self, serials: Sequence[int], *, through: bool = False) -> list[Committed]:
        """Mark deliveries as done and commit, per partition, the contiguous prefix; never backwards.

        Parameters
        ----------
        serials
            Deliveries of this session.
        through
            Everything before each of them in its partition is done too.

        Returns
        -------
        Where each partition that was named stands.
        """
        moved: set[int] = set()
        void: dict[int, BrokerError] = {}
        named: dict[int, int] = {}  # partition -> one of its deliveries
        if never := [serial for serial in serials if not 0 < serial < self._next_serial]:
            text = f"{self.name}: row {never[0]} was never delivered to this session; nothing was committed"
            raise BrokerError(ErrorKind.INVALID, self.name, text)
        for serial in serials:
            if serial not in self._places:
                continue  # done long ago and forgotten
            partition, position = self._places[serial]
            named[partition] = serial
            if self._is_void(serial, partition):
                void[partition] = self._void_error(partition)
                continue
            prefix = self._prefixes[partition]
            moves = prefix.mark_to(position) if through else prefix.mark(position)
            if moves or prefix.position != prefix.committed:  # moved now, or before by a commit that failed
                moved.add(partition)
        tried = await self._flush() if moved else {}
        # Taken away while the commit waited for its turn: nothing was stored, whatever was marked.
        void |= {p: self._void_error(p) for p in moved - tried.keys() if self._is_void(named[p], p)}
        return [self._stand(p, void.get(p) or tried.get(p)) for p in named]

    def _is_void(self, serial: int, partition: int) -> bool:
        return serial < self._void_below.get(partition, 0)

    def _void_error(self, partition: int) -> BrokerError:
        text = f"{self.name}: partition {partition} was taken over by another member or given back; its rows come again"
        return BrokerError(ErrorKind.LEASE_LOST, self.name, text)

    def _stand(self, partition: int, error: BrokerError | None) -> Committed:
        prefix = self._prefixes.get(partition) or Prefix()
        return Committed(partition, prefix.committed, prefix.first_open, prefix.waiting, error)

    async def _flush(self) -> dict[int, BrokerError | None]:
        """Commit what moved: per partition that was tried, why it failed. Callers that come meanwhile share the next one."""
        async with self._committing:
            if not self._uncommitted():
                return {}
            handle = await self._choose()
            tried: dict[int, BrokerError | None] = {}

            async def store() -> None:
                if positions := self._uncommitted():  # as it stands now that its turn has come
                    outcomes = await handle.source.commit(positions)
                    tried.update((p, self._stored(p, positions[p], outcome)) for p, outcome in outcomes.items())

            await handle.settles.call(store, urgent=True)
            return tried

    def _uncommitted(self) -> dict[int, Position]:
        return {
            n: p.position
            for n, p in self._prefixes.items()
            if p.position is not None and (p.committed is None or p.committed < p.position)
        }

    def _stored(self, partition: int, position: Position, outcome: Outcome) -> BrokerError | None:
        if outcome.state in (Settled.CONFIRMED, Settled.SENT):
            self._prefixes[partition].committed = position
            return None
        text = f"{self.name}: partition {partition} was not committed ({outcome.state.value})"
        return outcome.error or BrokerError(ErrorKind.LEASE_LOST, self.name, text)

    # -------------------------------------------------------------- giving back
    @property
    def held_count(self) -> int:
        """Rows read and not done."""
        return sum(p.waiting for p in self._prefixes.values())

    def held_serials(self) -> list[int]:
        """The deliveries that are read and not done, in order."""
        return [
            s
            for s, (partition, position) in self._places.items()
            if s >= self._void_below.get(partition, 0) and not self._prefixes[partition].is_done(position)
        ]

    def place(self, serial: int) -> tuple[int, Position]:
        """Partition and position of a delivery that `held_serials` names."""
        return self._places[serial]

    def standing(self, serial: int) -> str:
        """Where a delivery stands: "open", "committed", or "void" (its partition was taken away or given back)."""
        if serial not in self._places:
            return "committed"  # done long ago and forgotten
        partition, position = self._places[serial]
        if self._is_void(serial, partition):
            return "void"
        committed = self._prefixes[partition].committed
        return "committed" if committed is not None and position < committed else "open"

    @anywhere
    async def rewind(self) -> int:
        """Read again what was read and is not committable; how many rows come again."""
        count = self.held_count
        self._puller.drop_ready()
        starts = {n: start for n, p in self._prefixes.items() if (start := p.rewind()) is not None}
        self._void(starts)
        if starts:
            handle = await self._choose()
            await handle.pulls.call(lambda: handle.source.seek(starts), urgent=True)
        return count

    def _void(self, partitions: Iterable[int]) -> None:
        self._void_below.update(dict.fromkeys(partitions, self._next_serial))

    def on_event(self, event: Event) -> None:
        super().on_event(event)
        if event.kind == "revoked" and any(event.handle in (None, h.source) for h in self._handles):
            for partition in event.partitions & self._prefixes.keys():
                self._prefixes[partition] = Prefix()
            self._void(event.partitions)


class PlaceCodec:
    """Rows of a log of which only the place is still known: (topic, partition, position)."""

    def columns(self, rows: Sequence[Any], want: frozenset[str]) -> Mapping[str, Any]:
        made = {"topic": [r[0] for r in rows], "partition": [r[1] for r in rows], "offset": [r[2][0] for r in rows]}
        return {name: made[name] for name in made.keys() & want}

    def envelope(self, row: Any) -> Envelope:
        topic, partition, position = row
        name = f"{partition}:{position[0]}"
        return Envelope(topic, partition, position, name, None, None, (), None, "", None, row)

    def places(self, rows: Sequence[Any]) -> Sequence[tuple[int, Position]]:
        return [(row[1], row[2]) for row in rows]

    def size(self, row: Any) -> int:
        del row
        return 0
