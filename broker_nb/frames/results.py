"""What became of rows that were sent or settled: one line for a person, a frame with a row each for everything else."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from broker_nb.backends.driver import NO_PARTITION, SendResult, Sent
from broker_nb.frames.schema import TEXT, to_pandas


class Result:
    """One line as its repr, and a frame."""

    def __init__(self, line: str) -> None:
        self.line = line

    def __repr__(self) -> str:
        return self.line

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """A row per message, message order kept."""
        return to_pandas({name: pa.chunked_array([pa.array(values, kind)]) for name, kind, values in self._columns()})

    @property
    def ok(self) -> bool:
        """Whether every row was accepted, settled or committed."""
        raise NotImplementedError

    def _columns(self) -> Sequence[tuple[str, Any, Sequence[Any]]]:
        raise NotImplementedError


class Published(Result):
    """What became of the rows of a publish.

    `.frame`: state str ("accepted", "duplicate", "refused", "unknown"; "checked" after a dry run), id str, partition Int32,
    offset Int64, error str. `.ok`: every row is stored.
    """

    def __init__(self, line: str, results: Sequence[SendResult], *, dry_run: bool = False) -> None:
        super().__init__(line)
        self.results = results
        self._dry_run = dry_run

    @property
    def ok(self) -> bool:
        good = (Sent.ACCEPTED, Sent.DUPLICATE)
        return not self._dry_run and all(r.state in good for r in self.results)

    def _columns(self) -> Sequence[tuple[str, Any, Sequence[Any]]]:
        words = {state: state.name.lower() for state in Sent}
        if self._dry_run:
            words[Sent.ACCEPTED] = "checked"
        return [
            ("state", TEXT, [words[r.state] for r in self.results]),
            ("id", TEXT, [r.id for r in self.results]),
            ("partition", pa.int32(), [None if r.partition == NO_PARTITION else r.partition for r in self.results]),
            ("offset", pa.int64(), [r.position[0] if r.position else None for r in self.results]),
            ("error", TEXT, [None if r.error is None else str(r.error) for r in self.results]),
        ]


def sent_counts(results: Sequence[SendResult]) -> str:
    """Counts of the states that occur, each with its first reason: `94 accepted, 2 refused (...)`."""
    states = [r.state for r in results]
    parts = []
    for state in Sent:
        if count := states.count(state):  # a Counter would call the members' hash, which is slow, per row
            first = next((r.error for r in results if r.state is state and r.error is not None), None)
            parts.append(f"{count:,} {state.name.lower()}" + (f" ({first})" if first else ""))
    return ", ".join(parts) or "no rows"


class Settled(Result):
    """What became of the rows that were to be settled.

    `.frame`: lease str, outcome str ("acked", "nacked", "released", "already", "lost", "refused", "retry", "foreign"), error str.
    `.ok`: every row was settled, now or before.
    """

    def __init__(self, line: str, rows: Sequence[tuple[str, str, str | None]]) -> None:
        super().__init__(line)
        self._rows = rows

    @property
    def ok(self) -> bool:
        return not any(outcome in ("lost", "refused", "retry", "foreign") for _, outcome, _ in self._rows)

    def _columns(self) -> Sequence[tuple[str, Any, Sequence[Any]]]:
        names = ("lease", "outcome", "error")
        return [(name, TEXT, [row[i] for row in self._rows]) for i, name in enumerate(names)]


class Committed(Result):
    """Where the partitions of a group stand after a commit.

    `.frame`: subscription str, partition Int32, committed Int64 (the last row that is done), open Int64 (the first that is not),
    waiting Int64 (rows read and not done), error str. `.ok`: every partition was committed.
    """

    def __init__(self, line: str, rows: Sequence[tuple[str, int, int | None, int | None, int, str | None]]) -> None:
        super().__init__(line)
        self._rows = rows

    @property
    def ok(self) -> bool:
        return not any(row[-1] for row in self._rows)

    def _columns(self) -> Sequence[tuple[str, Any, Sequence[Any]]]:
        kinds = (
            ("subscription", TEXT),
            ("partition", pa.int32()),
            ("committed", pa.int64()),
            ("open", pa.int64()),
            ("waiting", pa.int64()),
            ("error", TEXT),
        )
        return [(name, kind, [row[i] for row in self._rows]) for i, (name, kind) in enumerate(kinds)]
