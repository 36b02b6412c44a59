"""Watches a driver while the suites use it: the contract's rules that hold in every call of every handle."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from broker_nb.backends.driver import COLUMNS, Batch, Capabilities, Codec, Driver, Outcome, Piece, Position, SendResult, Step
from broker_nb.messages import Attribute

SHOWN = 8
"""Rows of each batch whose columns are compared with their envelopes, from either end."""


def values(column: object, rows: int) -> list[Any]:
    """A column as one value per row, whatever form it came in."""
    if hasattr(column, "__arrow_c_array__"):
        import pyarrow as pa

        return list(pa.array(column).to_pylist())
    if hasattr(column, "tolist"):
        return list(column.tolist())
    return list(column) if isinstance(column, Sequence) and not isinstance(column, str | bytes) else [column] * rows


def disagreements(codec: Codec, rows: Sequence[Any]) -> list[str]:
    """Where columns, envelopes and places of the same rows differ."""
    columns = {name: values(column, len(rows)) for name, column in codec.columns(rows, COLUMNS).items()}
    places = codec.places(rows)
    found = [f"column {name} is not there" for name in COLUMNS - columns.keys() - {"id"}]
    found += [f"column {name} has {len(v)} values for {len(rows)} rows" for name, v in columns.items() if len(v) != len(rows)]
    if found:
        return found
    for i, envelope in enumerate(map(codec.envelope, rows)):
        expected = {name: getattr(envelope, name) for name in COLUMNS - {"offset", "attributes"}}
        expected["offset"] = envelope.position[0] if envelope.position else None
        expected["attributes"] = list(envelope.attributes)
        got = {name: column[i] for name, column in columns.items()}
        got["attributes"] = [Attribute(*a) for a in got["attributes"] or ()]
        got.setdefault("id", f"{got['partition']}:{got['offset']}")
        found += [f"row {i}: column {n} is {got[n]!r}, the envelope says {e!r}" for n, e in expected.items() if got[n] != e]
        if places[i] != (envelope.partition, envelope.position):
            found.append(f"row {i}: place {places[i]}, the envelope says {envelope.partition, envelope.position}")
        if codec.size(rows[i]) < len(envelope.data or b""):
            found.append(f"row {i}: size {codec.size(rows[i])} is below its body's {len(envelope.data or b'')}")
    return found


class Watch:
    """What was broken (`broken`, one line each) and which states were produced (`seen`) on the drivers that it watches."""

    def __init__(self, capabilities: Capabilities) -> None:
        self.capabilities = capabilities
        self.broken: list[str] = []
        self.seen: set[str] = set()  # "Stop.DRY", "message.LOST", "record.CONFIRMED", "Sent.ACCEPTED"

    def driver(self, driver: Driver) -> None:
        """Watch every handle that a driver opens from now on."""
        for name, look_after in (("browse", self.browser), ("subscribe", self.source), ("sender", self.sender)):
            self._wrap(driver, name, look_after)

    def _wrap(self, driver: Driver, name: str, look_after: Callable[..., None]) -> None:
        call = getattr(driver, name)

        async def opened(*args: Any) -> Any:
            handle = await call(*args)
            look_after(handle, *args)
            return handle

        setattr(driver, name, opened)

    def _guard(self, handle: Any, checks: Mapping[str, Callable[..., None]]) -> None:
        """Never two calls in flight on the handle; after each call, its check."""
        running: list[str] = []

        def guarded(name: str, call: Callable[..., Awaitable[Any]], check: Callable[..., None]) -> Callable[..., Awaitable[Any]]:
            async def watched(*args: Any) -> Any:
                self._expect(not [n for n in running if not self._beside(n, name)], f"{name} beside {running} on one handle")
                running.append(name)
                try:
                    result = await call(*args)
                finally:
                    running.remove(name)
                check(result, *args)
                return result

            return watched

        for name, check in checks.items():
            setattr(handle, name, guarded(name, getattr(handle, name), check))

    def _beside(self, one: str, other: str) -> bool:
        settling = {"settle", "extend"}
        return self.capabilities.concurrent_settle and (
            (one == "pull" and other in settling) or (other == "pull" and one in settling)
        )

    def _expect(self, holds: bool, rule: str) -> None:
        if not holds:
            self.broken.append(rule)

    # -------------------------------------------------------------- rules
    def _batch(self, call: str, batch: Batch | None, max_rows: int, wait: float) -> None:
        self._expect(0 <= wait <= self.capabilities.slice_s, f"{call} was asked to wait {wait} s of {self.capabilities.slice_s}")
        if batch is None:
            return
        self._expect(len(batch.rows) <= max_rows, f"{call} gave {len(batch.rows)} rows, {max_rows} were asked for")
        some = list(batch.rows[:SHOWN]) + list(batch.rows[SHOWN:][-SHOWN:])
        self.broken += [f"{call}: {line}" for line in disagreements(batch.codec, some)]

    def browser(self, browser: Any, topic: object, pieces: Sequence[Piece], *_: object) -> None:
        """Rows come in order, below their piece's end, and never below what was said to be reached."""
        ends = {p.partition: p.end for p in pieces}
        proven: dict[int, Position] = {p.partition: p.start for p in pieces}

        def read(step: Step, max_rows: int, max_bytes: int, wait: float) -> None:
            del max_bytes
            self._batch("read", step.batch, max_rows, wait)
            for partition, position in step.batch.codec.places(step.batch.rows) if step.batch else ():
                end = ends.get(partition)
                self._expect(partition in ends, f"read: a row of partition {partition}, which is in no piece")
                self._expect(end is None or position < end, f"read: row {position} is not below the end {end}")
                low = proven.get(partition, ())
                self._expect(position >= low, f"read: row {position} came after {low} was said to be reached")
                proven[partition] = (*position, 0)
            for partition, reached in step.reached.items():
                low = proven.get(partition, ())
                self._expect((*reached, 0) >= low, f"read: reached {reached} after rows up to {low}")
                proven[partition] = max(low, reached)
            self.seen.update(f"Stop.{stop.name}" for stop in step.stopped.values())

        self._guard(browser, {"read": read})

    def source(self, source: Any, *_: object) -> None:
        """Tokens and outcomes are aligned, a token names one delivery."""
        given: set[object] = set()

        def pull(batch: Batch | None, max_rows: int, max_bytes: int, wait: float) -> None:
            del max_bytes
            self._batch("pull", batch, max_rows, wait)
            if batch is not None and batch.tokens is not None:
                self._expect(len(batch.tokens) == len(batch.rows), "pull: tokens are not aligned with rows")
                self._expect(given.isdisjoint(batch.tokens), "pull: a token came twice")
                given.update(batch.tokens)

        def settle(outcomes: Sequence[Outcome], items: Sequence[object]) -> None:
            self._expect(len(outcomes) == len(items), f"settle: {len(outcomes)} outcomes for {len(items)} rows")
            self.seen.update(f"message.{o.state.name}" for o in outcomes)

        def extend(deadlines: Sequence[float | None], tokens: Sequence[object], seconds: float) -> None:
            del seconds
            self._expect(len(deadlines) == len(tokens), f"extend: {len(deadlines)} deadlines for {len(tokens)} rows")

        def commit(outcomes: Mapping[int, Outcome], positions: Mapping[int, Position]) -> None:
            self._expect(outcomes.keys() == positions.keys(), "commit: the outcomes are not of the partitions that were named")
            self.seen.update(f"record.{o.state.name}" for o in outcomes.values())

        self._guard(source, {"pull": pull, "settle": settle, "extend": extend, "commit": commit, "seek": lambda *_: None})

    def sender(self, sender: Any, *_: object) -> None:
        """A result per row; what failed says why."""

        def send(results: Sequence[SendResult], rows: Sequence[object]) -> None:
            self._expect(len(results) == len(rows), f"send: {len(results)} results for {len(rows)} rows")
            stored = {"ACCEPTED", "DUPLICATE"}
            self._expect(
                all((r.error is None) == (r.state.name in stored) for r in results), "send: error and state do not fit together"
            )
            self.seen.update(f"Sent.{r.state.name}" for r in results)

        self._guard(sender, {"send": send})
