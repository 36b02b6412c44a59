"""Pulling: one request open at a time, longer than the slices in which it is waited for, and nothing dropped on the way."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from google.api_core.exceptions import DeadlineExceeded, GoogleAPICallError
from google.auth.exceptions import GoogleAuthError
from google.pubsub_v1.types import PullRequest, PullResponse

from broker_nb.backends.pubsub.client import Clients, failure
from broker_nb.errors import ErrorKind

GROUP = 1000  # messages or ack ids in one request
_REQUEST_S = 30.0
LINGER_S = 1.0


class Pulls:
    """Requests for messages of one subscription.

    A request that is cut off after a slice takes messages away from everybody until their lease ends, and short ones come back empty
    although there are messages. So it is left open while slices follow each other, and given up `LINGER_S` after the last: who waits
    no longer must not be handed more.
    """

    def __init__(self, clients: Clients, path: str, name: str) -> None:
        self._clients, self._path, self._name = clients, path, name
        self.ready: deque[Any] = deque()  # what came and was not handed out
        self._request: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.closed = False

    def arrived(self, rows: list[Any]) -> None:
        """What came, when it comes."""
        self.ready.extend(rows)

    async def wait(self, rows: int, seconds: float) -> None:
        """Until something is ready, at most so long. Being cancelled here loses nothing."""
        if self._timer is not None:
            self._timer.cancel()
        if self._request is None:
            self._request = asyncio.ensure_future(self._ask(min(rows, GROUP)))
            self._request.add_done_callback(lambda task: task.cancelled() or task.exception())  # raised below, if anybody asks
        request = self._request
        try:
            await asyncio.wait({request}, timeout=seconds)
        finally:
            if not request.done():
                self._timer = asyncio.get_running_loop().call_later(LINGER_S, self.give_up)
        if request.done():
            self._request = None
            if not request.cancelled():
                request.result()
        self.check_open()

    def check_open(self) -> None:
        """Raise once it is closed."""
        if self.closed or self._clients.closed:
            raise self._clients.host.error(ErrorKind.CLOSED, self._name, f"{self._name}: closed; open it again")

    async def _ask(self, rows: int) -> None:
        request = PullRequest(subscription=self._path, max_messages=rows)
        try:
            answer = await self._clients.run(self._clients.subscriber.pull(request, retry=None, timeout=_REQUEST_S))
        except DeadlineExceeded:  # that is how the service says that nothing came
            return
        except (GoogleAPICallError, GoogleAuthError) as error:
            raise failure(self._clients.host, self._name, error) from error
        self.arrived([*PullResponse.pb(answer).received_messages])

    def give_up(self) -> None:
        """What is on its way just now comes again, when its lease ends."""
        if self._request is not None:
            self._request.cancel()
            self._request = None

    def close(self) -> None:
        """Ask for no more; whoever waits is told."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.give_up()
