"""What a driver gets from us: lanes, a place to report events, and errors free of secrets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from broker_nb.backends.driver import Event
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.lane import LaneThread

log = logging.getLogger("broker_nb")


class ConnectionHost:
    """The Host of one connection. Made on the loop thread; `emit` may be called from any thread."""

    def __init__(self, name: str, secrets: Iterable[str] = ()) -> None:
        self.name = name
        self._secrets = sorted((s for s in secrets if s), key=len, reverse=True)
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Callable[[Event], None]] = []
        self._lanes: list[LaneThread] = []

    def lane(self, name: str) -> LaneThread:
        """A new daemon thread for one client object; ended with the connection at the latest."""
        lane = LaneThread(name)
        self._lanes.append(lane)
        return lane

    def error(self, kind: ErrorKind, entity: str, cause: BaseException | str, *, retryable: bool = False) -> BrokerError:
        """A BrokerError whose text is one line and free of the profile's secrets."""
        text = str(cause) or type(cause).__name__
        for secret in self._secrets:
            text = text.replace(secret, "***")
        if entity and entity not in text:
            text = f"{entity}: {text}"
        error = BrokerError(kind, entity, text, retryable=retryable)
        if isinstance(cause, BaseException):
            error.__cause__ = cause
        return error

    def listen(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Have every event handed to `listener` on the loop thread; the result ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def emit(self, event: Event) -> None:
        """Report something that happened by itself."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tell, event)

    def _tell(self, event: Event) -> None:
        log.info("%s: %s %s", self.name, event.kind, event.error or "")
        for listener in tuple(self._listeners):
            listener(event)

    def close(self) -> None:
        """End the lanes."""
        for lane in self._lanes:
            lane.close()
