"""The subjects by which deliveries are acknowledged, and saying something there that the server confirms."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple

from broker_nb.backends.jetstream.client import Answer, Wire, message
from broker_nb.errors import BrokerError, ErrorKind

PREFIX = "$JS.ACK."


class Delivery(NamedTuple):
    """What the subject for its acknowledgement tells about a delivery."""

    tries: int  # 1 for the first one
    sequence: int
    time_ns: int


def delivery(reply: str) -> Delivery:
    """Take `$JS.ACK.<stream>.<consumer>.<tries>.<sequence>.<consumer's>.<time>.<pending>` apart.

    Newer servers may put domain and account before the stream, and a random word at the end.
    """
    parts = reply.split(".")
    at = 4 if len(parts) == 9 else 6
    return Delivery(int(parts[at]), int(parts[at + 1]), int(parts[at + 3]))


class Heard(NamedTuple):
    """The server's answer, or why there is none; when it came (time.monotonic()), and whether anything was said at all."""

    answer: Answer | BrokerError
    at: float
    said: bool


async def confirm(wire: Wire, consumer: str, said: Sequence[tuple[str, bytes]], wait: float) -> list[Heard]:
    """Say something about deliveries, each (its subject, words), and wait until the server has heard it; aligned."""
    if not said:
        return []
    text = f"{consumer}: the server did not confirm in time"
    late = wire.host.error(ErrorKind.TIMEOUT, consumer, text, retryable=True)
    heard = [Heard(late, 0.0, True)] * len(said)
    waiting = set(range(len(said)))
    written, done = False, asyncio.Event()

    def take(answer: Answer) -> None:
        i = int(answer.subject)
        heard[i] = Heard(answer, time.monotonic(), True)
        waiting.discard(i)
        if not waiting:
            done.set()

    def cut(error: BrokerError) -> None:
        for i in waiting:
            heard[i] = Heard(error, time.monotonic(), written)
        done.set()

    inbox = wire.inbox(take, cut, PREFIX)
    try:
        await wire.write(message(token, f"{inbox.subject}.{i}", b"", words) for i, (token, words) in enumerate(said))
        written = True
        async with asyncio.timeout(wait):
            await done.wait()
    except TimeoutError:
        pass  # told by every answer that is still missing
    except BrokerError as error:  # nothing was sent
        cut(error)
    finally:
        await wire.forget(inbox)
    return heard
