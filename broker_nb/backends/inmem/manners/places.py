"""The places of rows, as another broker numbers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker_nb.backends.driver import Codec, Column, Envelope, Position


@dataclass(frozen=True, slots=True)
class Places:
    """How an offset is written as a position.

    Parameters
    ----------
    sizes
        How many rows one step of each number is, the last one 1: (1,) is the offset itself, () is a broker without places.
    """

    sizes: tuple[int, ...]

    def of(self, offset: int) -> Position:
        """The place of a row."""
        numbers = []
        for size in self.sizes:
            number, offset = divmod(offset, size)
            numbers.append(number)
        return tuple(numbers)

    def offset(self, position: Position) -> int:
        """The first offset at or after a place."""
        return sum(n * size for n, size in zip(position, self.sizes, strict=False)) + (len(position) > len(self.sizes))

    def batch(self, offset: int) -> range:
        """The offsets of the rows that were stored together with one: those whose places differ in the last number only."""
        size = self.sizes[-2]
        return range(offset // size * size, offset // size * size + size)

    def codec(self, plain: Codec) -> Codec:
        """A codec that tells these places."""
        return plain if self == ONE_NUMBER else PlacedCodec(plain, self)


ONE_NUMBER = Places((1,))
NO_PLACES = Places(())


class PlacedCodec:
    """Rows with the places of another broker."""

    def __init__(self, plain: Codec, places: Places) -> None:
        self._plain, self._places = plain, places

    def columns(self, rows: Sequence[Any], want: frozenset[str]) -> Mapping[str, Column]:
        columns = dict(self._plain.columns(rows, want))
        if "offset" in want:
            columns["offset"] = [position[0] if position else None for _, position in self.places(rows)]
        if "id" in want:
            columns["id"] = [f"{partition}:{offset}" for partition, (offset,) in self._plain.places(rows)]
        return columns

    def envelope(self, row: Any) -> Envelope:
        envelope = self._plain.envelope(row)
        return envelope._replace(position=self._places.of(envelope.position[0]))

    def places(self, rows: Sequence[Any]) -> Sequence[tuple[int, Position]]:
        return [(partition, self._places.of(offset)) for partition, (offset,) in self._plain.places(rows)]

    def size(self, row: Any) -> int:
        return self._plain.size(row)
