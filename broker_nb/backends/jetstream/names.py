"""What a topic's name stands for: a stream, or the rows of some subjects in the stream that holds them."""

from __future__ import annotations

import asyncio
import re
from typing import Any, NamedTuple

from broker_nb.backends.jetstream.client import Wire
from broker_nb.backends.jetstream.errors import NO_STREAM, Refusal, failure, missing
from broker_nb.errors import ErrorKind

_NAME = re.compile(r"[^\s.*>/\\\x00-\x20\x7f]{1,255}")
_TOKEN = re.compile(r"[^\s.\x00-\x20\x7f]+")
_WORDS = ("stream:", "subject:")


class Place(NamedTuple):
    """Where a topic's rows are."""

    name: str  # as it was asked for
    stream: str
    subject: str  # filter, wildcards included; "" = all of the stream

    @property
    def filter(self) -> str:
        """The filter as the server takes it for all."""
        return self.subject or ">"


def is_name(text: str) -> bool:
    """Whether a stream or a consumer can be called so."""
    return _NAME.fullmatch(text) is not None and _encodes(text)


def is_subject(text: str, *, wildcards: bool) -> bool:
    """Whether rows can be on such a subject, or matched by it."""
    tokens = text.split(".")
    if len(text) > 1000 or not _encodes(text) or not all(map(_TOKEN.fullmatch, tokens)):
        return False
    wild = [i for i, token in enumerate(tokens) if "*" in token or ">" in token]
    if not wildcards:
        return not wild
    return all(tokens[i] == "*" or (tokens[i] == ">" and i == len(tokens) - 1) for i in wild)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Names:
    """Names of topics, resolved; what was found is kept until it is gone."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._known: dict[str, tuple[Place, object]] = {}  # with the subjects that the stream had then

    async def find(self, name: str) -> tuple[Place, dict[str, Any]]:
        """The place of a topic, and the server's information about its stream.

        Raises
        ------
        BrokerError
            NOT_FOUND; INVALID for a name that can be neither; CONFLICT where it is both a stream and a subject, or several
            streams hold the subjects.
        """
        try:
            if (known := self._known.pop(name, None)) is not None:
                place, subjects = known
                info = await self._info(place.stream)
            if known is None or info["config"].get("subjects") != subjects:  # they may be another stream's by now
                place, info = await self._resolve(name)
        except Refusal as refusal:
            raise failure(self._wire.host, name, refusal) from refusal
        self._known[name] = place, info["config"].get("subjects")
        return place, info

    async def _info(self, stream: str) -> dict[str, Any]:
        return await self._wire.api(f"STREAM.INFO.{stream}", stream)

    async def _resolve(self, name: str) -> tuple[Place, dict[str, Any]]:
        word = next((w for w in _WORDS if name.startswith(w)), "")
        bare = name.removeprefix(word)
        may_be_stream = word != "subject:" and is_name(bare)
        may_be_subject = word != "stream:" and is_subject(bare, wildcards=True)
        if not (may_be_stream or may_be_subject):
            text = f"{name!r} can be neither a stream nor a subject: no spaces, no empty parts between dots, * and > only alone"
            raise self._wire.host.error(ErrorKind.INVALID, name, text)
        info, holders = await asyncio.gather(
            self._stream(bare if may_be_stream else ""), self._holders(bare if may_be_subject else "")
        )
        same = info is not None and holders == [bare] == info["config"].get("subjects")  # both words mean the same rows
        if info is not None and (same or not holders):
            return Place(name, bare, ""), info
        if info is not None:
            text = f"{name} is a stream, and a subject in stream {', '.join(holders)}: write stream:{bare} or subject:{bare}"
            raise self._wire.host.error(ErrorKind.CONFLICT, name, text)
        if not holders:
            raise missing(self._wire.host, name, "no stream is called so, and none holds that subject")
        if len(holders) > 1:
            text = f"{name}: the streams {', '.join(sorted(holders))} hold such subjects; name one, for example stream:{min(holders)}"
            raise self._wire.host.error(ErrorKind.CONFLICT, name, text)
        return Place(name, holders[0], bare), await self._info(holders[0])

    async def _stream(self, name: str) -> dict[str, Any] | None:
        if not name:
            return None
        try:
            return await self._info(name)
        except Refusal as refusal:
            if refusal.number != NO_STREAM:
                raise
            return None

    async def _holders(self, subject: str) -> list[str]:
        if not subject:
            return []
        return list((await self._wire.api("STREAM.NAMES", subject, {"subject": subject})).get("streams") or ())


def consumer_name(wire: Wire, name: str) -> str:
    """`name`, if a consumer can have it."""
    if not is_name(name):
        text = f"{name!r} cannot be a consumer: no spaces, dots, slashes, * or >"
        raise wire.host.error(ErrorKind.INVALID, name, text)
    return name
