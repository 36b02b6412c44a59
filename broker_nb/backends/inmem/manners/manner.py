"""What makes a manner: its constants, the rules that a real client would punish, and the rows that it cannot carry."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from broker_nb.backends.driver import Capabilities, Dedupe, LookPlan, Outbound
from broker_nb.backends.inmem.manners.places import ONE_NUMBER, Places

_HEADER = re.compile(r"[!-9;-~]+")
_SETTLING = frozenset({"settle", "extend"})


@dataclass(frozen=True, slots=True)
class Manner:
    """How a connection to the broker in memory behaves, to be taken for one to another broker.

    The rest follows from `able`: what is refused, what may overlap, what is confirmed, whether a subscription comes by being used.
    """

    name: str
    able: Capabilities
    look: LookPlan
    dedupe: Dedupe | None = None
    late_proof: bool = False  # gaps at the end of a look are passed by a read of their own, after the last row
    producer_times: bool = False  # the client stamps every row, in milliseconds; else the server does
    eager_groups: bool = False  # a member gives up all its partitions at each rebalance
    header_lines: bool = False  # keys and attributes are lines: names of printable ASCII without blanks and colons
    reject_is_final: bool = False  # a rejected row goes nowhere
    archives: bool = False  # a row that is rejected or was delivered too often goes nowhere
    fixed_lease: bool = False  # extending begins the subscription's own lease anew, whatever time is asked for
    renewable: bool = True
    timed: bool = True  # else a row is held as long as its consumer lives
    uncounted: bool = False  # giving back is counted only where there is a dead-letter topic
    poll_rows: int = 0  # a pull brings that many rows at once, however few are asked for: the rest waits in the handle
    by_partition: bool = False  # the rows of a partition that are settled together fare alike
    unordered: bool = False  # rows come in any order
    places: Places = ONE_NUMBER
    confirmed_by: str = ""  # option of a subscription: only with it settlements are confirmed
    delay_by: str = ""  # option of a subscription: milliseconds after which what is given back comes again, the same for all
    delay_ms: int = 0  # without that option
    single_by: str = ""  # option of a subscription: only without it (False) a given-back row brings its whole batch again


class Misuse(AssertionError):
    """A rule of the driver contract was broken: a mistake in the caller, never something that a broker says."""


class Guard:
    """The rules for the calls of one handle.

    Parameters
    ----------
    entity
        For texts.
    misuses
        Where it is noted besides being raised: of a task in the background nobody may see the error.
    """

    def __init__(self, entity: str, able: Capabilities, misuses: list[str]) -> None:
        self._entity, self._able, self._misuses = entity, able, misuses
        self._running: list[str] = []

    def expect(self, holds: bool, rule: str) -> None:
        """Raise Misuse unless it holds."""
        if not holds:
            self._misuses.append(f"{self._entity}: {rule}")
            raise Misuse(self._misuses[-1])

    @contextmanager
    def call(self, name: str, wait: float = 0.0) -> Iterator[None]:
        """Around one call: the only one on its handle, and no longer than a slice."""
        beside = [other for other in self._running if not self._may_overlap(name, other)]
        self.expect(not beside, f"{name} while {', '.join(beside)} is in flight")
        self.expect(0 <= wait <= self._able.slice_s, f"{name} would wait {wait:g} s, and a slice is {self._able.slice_s:g} s")
        self._running.append(name)
        try:
            yield
        finally:
            self._running.remove(name)

    def _may_overlap(self, one: str, other: str) -> bool:
        both = {one, other}
        return self._able.concurrent_settle and "pull" in both and bool(both & _SETTLING)


def flaw(manner: Manner, row: Outbound) -> str | None:
    """Why the broker cannot store a row; None when it can."""
    able = manner.able
    if row.time_ns is not None and not manner.producer_times:
        return "the server sets the time; leave it out"
    if row.data is None and not able.null_data:
        return "there is no null body here; send an empty one"
    if row.key is not None:
        if not able.keys:
            return "there are no keys here; leave it out"
        if not row.key and not able.null_key_is_not_empty:
            return "an empty key is no key here; leave it out"
        if not able.binary_keys and not _is_text(row.key):
            return "a key is text here, and this one is not UTF-8"
    names = [attribute.name for attribute in row.attributes]
    if len(set(names)) < len(names) and not able.repeated_attributes:
        return "attributes cannot repeat here"
    types = {"", *(each.__name__.lower() for each in able.attribute_types)}
    for name, value, type_ in row.attributes:
        if value is None:
            if not able.null_attributes:
                return f"attribute {name!r} is null, and nothing is null here; leave it out"
        elif bytes not in able.attribute_types and not _is_text(value):
            return f"attribute {name!r} is not UTF-8, and attributes are text here"
        elif type_ not in {*types, "bytes"}:
            return f"attribute {name!r} is of type {type_}; make it a str first"
        if manner.header_lines and not _HEADER.fullmatch(name):
            return f"attribute {name!r} is no name of a header here: printable ASCII without blanks and colons"
    if manner.header_lines and any(
        b"\r" in text or b"\n" in text for text in (row.key, *(a.value for a in row.attributes)) if text
    ):
        return "a key or an attribute has a line break, which would end its header"
    return None


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True
