"""A NATS server with JetStream seen from outside our driver, and our driver on it."""

import asyncio
import json
import uuid

import nats

from broker_nb.backends.driver import COLUMNS, Entity, Family, Kind, Piece, TakeOptions
from broker_nb.backends.jetstream.driver import JetStreamDriver
from broker_nb.errors import BrokerError
from broker_nb.portable.host import ConnectionHost

ALL = 1 << 30
TAKE = TakeOptions(Family.MESSAGE, create=True)
FLEETING = ("ts", "last_active", "num_waiting", "cluster", "pause_remaining")


class Refused(Exception):
    pass


class Bed:
    """What an administrator and other people's programs do. Blocking; each call is a connection of its own."""

    def __init__(self, url, **options):
        self.url, self.options = url, options

    def run(self, call):
        """The result of `await call(connection)`."""

        async def connected():
            connection = await nats.connect(self.url, **self.options)
            try:
                return await call(connection)
            finally:
                await connection.close()

        return asyncio.run(connected())

    def api(self, call, **request):
        """JetStream's answer, as it is."""

        async def ask(connection):
            answer = await connection.request(f"$JS.API.{call}", json.dumps(request).encode() if request else b"", timeout=10)
            return json.loads(answer.data)

        answer = self.run(ask)
        if "error" in answer:
            raise Refused(answer["error"]["description"])
        return answer

    def stream(self, name=None, *, subjects=None, **config):
        name = name or f"s-{uuid.uuid4().hex[:12]}"
        config = {"allow_direct": True, "storage": "memory", "retention": "limits", "num_replicas": 1} | config
        self.api(f"STREAM.CREATE.{name}", name=name, subjects=[name] if subjects is None else subjects, **config)
        return name

    def consumer(self, stream, name=None, **config):
        name = name or f"c-{uuid.uuid4().hex[:12]}"
        config = {"durable_name": name, "ack_policy": "explicit", "deliver_policy": "all"} | config
        self.api(f"CONSUMER.DURABLE.CREATE.{stream}.{name}", stream_name=stream, config=config)
        return name

    def put(self, subject, *bodies, raw=b""):
        """Publish; `raw` are header lines as they are written on the wire."""

        async def publish(connection):
            waiting = []
            for body in bodies:
                if raw:
                    # Public API writes no repeated header, no space at its ends.
                    inbox = connection.new_inbox()
                    waiting.append((await connection.subscribe(inbox)).next_msg(10))
                    block = b"NATS/1.0\r\n" + raw + b"\r\n\r\n"
                    line = f"HPUB {subject} {inbox} {len(block)} {len(block) + len(body)}\r\n".encode()
                    await connection._send_command(line + block + body + b"\r\n")
                    await connection.flush()
                else:
                    waiting.append(connection.request(subject, body, timeout=10))
            answers = [json.loads(m.data) for m in await asyncio.gather(*waiting)]
            assert not [a for a in answers if "error" in a], answers
            return [a["seq"] for a in answers]

        return self.run(publish)

    def delete(self, stream, *sequences):
        for sequence in sequences:
            self.api(f"STREAM.MSG.DELETE.{stream}", seq=sequence)

    def state(self, stream):
        return self.api(f"STREAM.INFO.{stream}")["state"]

    def consumer_info(self, stream, name):
        return self.api(f"CONSUMER.INFO.{stream}.{name}")

    def streams(self):
        return set(self.api("STREAM.NAMES").get("streams") or ())

    def snapshot(self, *names):
        """Streams (those of other tests too, unless named) and consumers as the server knows them, but for the time of asking."""
        streams = [self.api(f"STREAM.INFO.{name}") for name in names] or self.api("STREAM.LIST").get("streams") or []
        consumers = {s["config"]["name"]: self.api(f"CONSUMER.LIST.{s['config']['name']}")["consumers"] for s in streams}
        return steady(streams), steady(consumers)


def steady(value):
    """Without what changes by itself."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in FLEETING}
    return [steady(v) for v in value] if isinstance(value, list) else value


class Connection:
    """Our driver with its host, and what it told."""

    def __init__(self, driver, host):
        self.driver, self.host, self.events, self.news = driver, host, [], asyncio.Event()
        host.listen(self._tell)

    def _tell(self, event):
        self.events.append(event)
        self.news.set()

    async def until(self, kind):
        """Wait for an event of the connection."""
        while kind not in [event.kind for event in self.events]:
            self.news.clear()
            await self.news.wait()

    @classmethod
    async def open(cls, url, *, timeout=5.0, hosts=None, secrets=(), **options):
        host = ConnectionHost("nats", secrets)
        profile = {"hosts": hosts or [url.removeprefix("nats://")], "timeout": timeout, "options": options}
        return cls(await JetStreamDriver.open(profile, host), host)

    async def close(self):
        await self.driver.close()
        self.host.close()

    async def look(self, topic, start=None, end=None, seconds=10, rows=ALL, bytes_=ALL):
        """Rows and steps of a look, to its end."""
        entity = Entity(Kind.TOPIC, topic)
        (bounds,) = await self.driver.bounds(entity, True)
        piece = Piece(0, bounds.low if start is None else (start,), bounds.end if end is None else (end,))
        browser = await self.driver.browse(entity, [piece], COLUMNS, True, frozenset())
        try:
            return await read(browser, piece, seconds, rows, bytes_)
        finally:
            await browser.close()

    async def source(self, topic, name, **options):
        return await self.driver.subscribe(Entity(Kind.SUBSCRIPTION, name, topic), TakeOptions(Family.MESSAGE, **options))

    async def sender(self, topic):
        return await self.driver.sender(Entity(Kind.TOPIC, topic), {})


async def until_it_fails(call, seconds=10):
    """The BrokerError in which a call ends that is made again and again."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                await call()
            except BrokerError as error:
                return error


async def read(browser, piece, seconds=10, rows=ALL, bytes_=ALL):
    """Envelopes and steps, until the piece's end is proved or it stopped."""
    found, steps = [], []
    async with asyncio.timeout(seconds):
        while True:
            step = await browser.read(rows, bytes_, 0.2)
            steps.append(step)
            if step.batch:
                found += map(step.batch.codec.envelope, step.batch.rows)
            if step.stopped or (piece.end is not None and step.reached.get(0, ()) >= piece.end):
                return found, steps


async def take(source, count, seconds=10, most=ALL):
    """So many rows: (envelope, token) each."""
    found = []
    async with asyncio.timeout(seconds):
        while len(found) < count:
            batch = await source.pull(min(most, count - len(found)), ALL, 0.2)
            if batch:
                found += zip(map(batch.codec.envelope, batch.rows), batch.tokens, strict=True)
    return found


def on(bed, body, within=30, **profile):
    """Run `await body(connection)` with our driver."""

    async def go():
        async with asyncio.timeout(within):
            opened = await Connection.open(bed.url, **profile)
            try:
                return await body(opened)
            finally:
                await opened.close()

    return asyncio.run(go())
