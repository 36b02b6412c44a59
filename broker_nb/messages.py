"""The values that a person handles: what is sent, what is taken one by one, what is read from a log.

Standard library only. Nothing here talks to a broker; settling goes through callables that the portable layer puts in.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeAlias, overload

from broker_nb.errors import BrokerError, ErrorKind

AttributeValue: TypeAlias = str | bytes | int | float | bool | datetime | uuid.UUID | None
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Attribute(NamedTuple):
    """One attribute (header, property) of a message.

    `value` is in canonical bytes (text as UTF-8, numbers and times as text); `type` is "" where the broker has one type only,
    else "str", "bytes", "int", "float", "bool", "datetime" or "uuid".
    """

    name: str
    value: bytes | None
    type: str = ""


class Attributes(Sequence[Attribute]):
    """The attributes of one message: ordered, names may repeat.

    >>> a = Attributes.of([("trace", "ab12"), ("trace", "cd34")])
    >>> a.text("trace"), a.all("trace"), "x" in a.names
    ('cd34', [b'ab12', b'cd34'], False)
    """

    __slots__ = ("_items",)

    def __init__(self, items: Iterable[Attribute] = ()) -> None:
        self._items = tuple(items)

    @classmethod
    def of(cls, given: Attributes | Mapping[str, AttributeValue] | Iterable[tuple[str, AttributeValue]] | None) -> Attributes:
        """From a mapping, from (name, value) pairs, or from attributes, which keep their types.

        Raises
        ------
        BrokerError
            INVALID, naming the attribute, where a name is not text or a value has a type that no broker knows.
        """
        if given is None:
            return cls()
        if isinstance(given, Attributes):
            return given
        pairs: object = given.items() if isinstance(given, Mapping) else given
        if not isinstance(pairs, Iterable):
            raise BrokerError(ErrorKind.INVALID, "attributes", f"attributes {given!r}: give a mapping or (name, value) pairs")
        return cls(map(_from_pair, pairs))

    @overload
    def __getitem__(self, index: int) -> Attribute: ...
    @overload
    def __getitem__(self, index: slice) -> Attributes: ...
    def __getitem__(self, index: int | slice) -> Attribute | Attributes:
        return Attributes(self._items[index]) if isinstance(index, slice) else self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Attribute]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        return tuple(other) == self._items if isinstance(other, Attributes | tuple | list) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return f"Attributes({list(self._items)!r})"

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in order, repeats kept."""
        return tuple(a.name for a in self._items)

    def all(self, name: str) -> list[bytes | None]:
        """Every value under `name`, in order."""
        return [a.value for a in self._items if a.name == name]

    def text(self, name: str) -> str | None:
        """The last value under `name` as text (undecodable bytes replaced); None when it is absent or null."""
        values = self.all(name)
        last = values[-1] if values else None
        return None if last is None else last.decode("utf-8", "replace")


def _from_pair(pair: object) -> Attribute:
    if isinstance(pair, Attribute):
        return pair
    if isinstance(pair, tuple | list) and len(pair) == 2:
        return make_attribute(*pair)
    raise BrokerError(ErrorKind.INVALID, "attributes", f"attribute {pair!r} is not a (name, value) pair")


def make_attribute(name: object, value: object = None) -> Attribute:
    """One attribute out of a Python value; nothing is formatted silently: the type stays beside the bytes."""
    if not isinstance(name, str):
        raise BrokerError(ErrorKind.INVALID, repr(name), f"attribute name {name!r} is not text; use a str")
    match value:
        case None:
            return Attribute(name, None)
        case str():
            return Attribute(name, value.encode("utf-8", "surrogatepass"), "str")
        case bytes() | bytearray() | memoryview():
            return Attribute(name, bytes(value), "bytes")
        case bool():
            return Attribute(name, b"true" if value else b"false", "bool")
        case int():
            return Attribute(name, b"%d" % value, "int")
        case float():
            return Attribute(name, repr(value).encode(), "float")
        case datetime():
            if value.tzinfo is None:
                raise BrokerError(ErrorKind.INVALID, name, f"attribute {name!r}: the datetime has no time zone; add one (UTC?)")
            return Attribute(name, value.isoformat().encode(), "datetime")
        case uuid.UUID():
            return Attribute(name, str(value).encode(), "uuid")
    raise BrokerError(
        ErrorKind.INVALID,
        name,
        f"attribute {name!r}: a {type(value).__name__} cannot be an attribute; make it str or bytes first",
    )


class OutboundMessage:
    """A message to publish.

    Parameters
    ----------
    data
        The body, as bytes; None is a null body, where the broker has one.
    key
        Groups messages for ordering; not unique. None (no key) and b"" (an empty key) are different things.
    attributes
        A mapping, (name, value) pairs or `Attributes`; names may repeat in pairs.
    """

    __slots__ = ("attributes", "data", "key")

    def __init__(
        self,
        data: bytes | None,
        key: bytes | None = None,
        attributes: Attributes | Mapping[str, AttributeValue] | Iterable[tuple[str, AttributeValue]] | None = None,
    ) -> None:
        for what, value in (("data", data), ("key", key)):
            if value is not None and not isinstance(value, bytes):
                raise BrokerError(
                    ErrorKind.INVALID, what, f"{what} must be bytes or None, not {type(value).__name__}; encode it first"
                )
        self.data, self.key, self.attributes = data, key, Attributes.of(attributes)

    def __repr__(self) -> str:
        size = "null" if self.data is None else f"{len(self.data)} B"
        return f"OutboundMessage({size}, key={self.key!r}, {len(self.attributes)} attributes)"


@dataclass(frozen=True, slots=True)
class Published:
    """What became of one message that was published.

    `state` is "accepted", "duplicate", "refused" or "unknown" (may or may not be stored).
    """

    state: str
    id: str | None = None
    partition: int | None = None
    offset: int | None = None
    error: BrokerError | None = None

    @property
    def ok(self) -> bool:
        """Whether the broker has the message."""
        return self.state in ("accepted", "duplicate")


@dataclass(frozen=True, slots=True, eq=False)
class _Received:
    """What a message and a record have in common."""

    topic: str
    id: str
    key: bytes | None
    data: bytes | None
    attributes: Attributes
    publish_time_ns: int | None
    native: object

    @property
    def publish_time(self) -> datetime | None:
        """When it was published, UTC, in microseconds; None when unknown or outside the years 1-9999."""
        if self.publish_time_ns is None:
            return None
        try:
            return _EPOCH + timedelta(microseconds=self.publish_time_ns // 1000)
        except OverflowError:
            return None


@dataclass(frozen=True, slots=True, eq=False)
class Message(_Received):
    """A message held by this session until it is settled or its lease runs out. Settling touches no other message."""

    delivery_count: int | None
    ingestion_time: datetime
    _settle: Callable[[str, float, str], Awaitable[None]]
    _lease: Callable[[], datetime | None]

    @property
    def lease_expires(self) -> datetime | None:
        """Until when it is held (UTC), extensions included; None when the lease is not timed."""
        return self._lease()

    async def ack(self) -> None:
        """Done. The first settlement of a message wins, later ones do nothing.

        Raises
        ------
        BrokerError
            LEASE_LOST when it was no longer held; the broker's own error when it refused.
        """
        await self._settle("ack", 0.0, "")

    async def nack(self, delay: float = 0.0) -> None:
        """Give it back, to come again after `delay` seconds where the broker can delay."""
        await self._settle("nack", delay, "")

    async def reject(self, reason: str = "") -> None:
        """Never deliver it again: dead-letter, term or archive, as the broker has it."""
        await self._settle("reject", 0.0, reason)


@dataclass(frozen=True, slots=True, eq=False)
class Record(_Received):
    """A row of a log, read as a member of a group. It cannot be given back one by one."""

    partition: int
    offset: int
    ingestion_time: datetime
    _mark: Callable[[bool], Awaitable[None]]
    position: tuple[int, ...] = ()  # the whole place, of which `offset` is the first number; () = that alone

    async def ack(self) -> None:
        """Mark it as done; what is committed is the contiguous run of done records from where the group stands."""
        await self._mark(False)

    async def commit_to(self) -> None:
        """Commit everything in its partition up to and with this record. Never moves the group backwards."""
        await self._mark(True)
