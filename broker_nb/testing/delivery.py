"""What was sent arrives: the cases that hold for messages and for records alike."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import pytest

from broker_nb.backends.driver import Family
from broker_nb.errors import ErrorKind, Lost
from broker_nb.messages import OutboundMessage
from broker_nb.portable.client import Client
from broker_nb.testing.bench import QUIET_S, Bench, Item, Reader, bodies, finish, in_any_order, numbered, refusal, spread, until
from broker_nb.testing.harness import Suite, case

IDLE_S = 60.0


class Delivery(Suite):
    """Take it as `Messages` or as `Records`, which have the cases of their family besides."""

    @case()
    async def test_everything_sent_arrives_once(self, bench: Bench) -> None:
        """What was sent arrives exactly once, body, key and attributes unchanged, each under an id of its own."""
        topic = await bench.topic()
        sent = [OutboundMessage(b"{}" if i else b'{"a": 1}', b"key", {"n": str(i)}) for i in range(20)]
        published = await bench.publish(topic, sent)
        reader = await bench.reader(topic)
        got = await reader.read(20)
        assert [(m.data, m.key, m.attributes.text("n")) for m in got] == [(m.data, m.key, m.attributes.text("n")) for m in sent]
        assert len({m.id for m in got}) == 20
        assert "" not in {m.id for m in got}
        assert {p.id for p in published} - {None} <= {m.id for m in got}
        assert {m.topic for m in got} == {topic}
        assert all(m.publish_time is not None and abs(m.publish_time.timestamp() - time.time()) < 3600 for m in got)
        assert await reader.rest() == []

    @case()
    async def test_two_subscriptions_both_get_all(self, bench: Bench) -> None:
        """Two subscriptions of one topic each get every message."""
        names = [bench.name("sub"), bench.name("sub")]
        wishes: dict[str, Any] = {"subscriptions": names} if bench.family is Family.MESSAGE else {}
        topic = await bench.topic(**wishes)
        readers = [await bench.reader(topic, name) for name in names]
        await bench.publish(topic, numbered(30))
        for got in await asyncio.gather(*(reader.read(30) for reader in readers)):
            assert bodies(got) == numbered(30)

    @case()
    async def test_topics_do_not_mix(self, bench: Bench) -> None:
        """A hundred messages on each of two topics: every subscription gets its own hundred and nothing else."""
        topics = [await bench.topic(), await bench.topic()]
        readers = [await bench.reader(topic) for topic in topics]
        await asyncio.gather(*(bench.publish(t, numbered(100, t)) for t in topics))
        for topic, reader in zip(topics, readers, strict=True):
            assert bodies(await reader.read(100)) == numbered(100, topic)
            assert await reader.rest() == []

    @case(seconds=60)
    async def test_fifty_publishers_ten_subscribers(self, bench: Bench) -> None:
        """5,000 messages of 50 publishers, taken by 10 members of one subscription: none is missing."""
        topic, name = await bench.topic(partitions=10), bench.name("sub")
        clients = await asyncio.gather(*(bench.connect() for _ in range(10)))
        readers = await asyncio.gather(*(bench.reader(topic, name, client=client) for client in clients))
        publishers = await asyncio.gather(*(bench.publisher(topic) for _ in range(50)))
        wanted = numbered(5000)
        sending = [
            publisher.batch_publish(*map(OutboundMessage, part))
            for publisher, part in zip(publishers, spread(wanted, 50), strict=True)
        ]
        seen: set[bytes | None] = set()

        async def take(reader: Reader) -> None:
            while len(seen) < 5000:
                got = await reader.batch(0.2)
                seen.update(bodies(got))
                with contextlib.suppress(Lost):  # a partition that went to another member: its rows come again there
                    await finish(got)

        results, _ = await asyncio.gather(asyncio.gather(*sending), asyncio.gather(*map(take, readers)))
        assert all(r.ok for part in results for r in part)
        assert seen == set(wanted)

    @case(seconds=60)
    async def test_ten_topics_at_once(self, bench: Bench) -> None:
        """Ten topics, each with a subscription, written and read at the same time: each is complete."""
        topics = await asyncio.gather(*(bench.topic() for _ in range(10)))

        async def one(topic: str) -> list[Item]:
            reader = await bench.reader(topic)
            _, got = await asyncio.gather(bench.publish(topic, numbered(100, topic)), reader.read(100))
            return got

        for topic, got in zip(topics, await asyncio.gather(*map(one, topics)), strict=True):
            assert bodies(got) == numbered(100, topic)

    @case(seconds=60)
    async def test_five_sessions_one_after_the_other(self, bench: Bench) -> None:
        """5,000 messages read in five sessions with closes between, the last batch of each not settled: none is lost."""
        topic, name = await bench.topic(), bench.name("sub")
        await bench.publish(topic, numbered(5000))
        done: set[bytes | None] = set()
        for session in range(5):
            reader = await bench.reader(topic, name)
            left = 5000 - len(done) if session == 4 else 1000
            done.update(bodies(await reader.read(left)))
            if session < 4:
                assert len(await reader.read(10, done=False)) == 10
            await reader.close()
        assert done == set(numbered(5000))

    @case(seconds=60)
    async def test_ten_subscribers_opened_and_closed_at_once(self, bench: Bench) -> None:
        """Ten members come and go at the same time; then a new one gets everything."""
        topic, name = await bench.topic(partitions=3), bench.name("sub")
        await bench.publish(topic, numbered(100))
        clients = await asyncio.gather(*(bench.connect() for _ in range(10)))

        async def come_and_go(client: Client) -> None:
            await (await bench.reader(topic, name, client=client)).close()

        await asyncio.gather(*map(come_and_go, clients))
        reader = await bench.reader(topic, name)
        assert in_any_order(await reader.read(100)) == numbered(100)

    @case("ordered", seconds=60)
    async def test_order_per_key(self, bench: Bench) -> None:
        """1,000 messages of 16 keys over four partitions: each key's messages come in the order they were sent."""
        topic = await bench.topic(partitions=4, ordered=True)
        keys = [b"key%d" % (i % 16) for i in range(1000)]
        await bench.publish(topic, [OutboundMessage(b"%06d" % i, key) for i, key in enumerate(keys)])
        got = await (await bench.reader(topic)).read(1000, 50)
        for key in set(keys):
            assert bodies(m for m in got if m.key == key) == [b"%06d" % i for i in range(1000) if keys[i] == key]

    @case(seconds=60)
    async def test_publishers_closed_right_after(self, bench: Bench) -> None:
        """10,000 messages of 20 publishers that are closed while they send: all are accepted, and all arrive."""
        topic = await bench.topic()
        wanted = numbered(10_000)
        publishers = await asyncio.gather(*(bench.publisher(topic) for _ in range(20)))
        sending = [
            asyncio.ensure_future(publisher.batch_publish(*map(OutboundMessage, part)))
            for publisher, part in zip(publishers, spread(wanted, 20), strict=True)
        ]
        await asyncio.sleep(0)
        await asyncio.gather(*(publisher.close() for publisher in publishers))
        assert all(r.ok for part in await asyncio.gather(*sending) for r in part)
        assert in_any_order(await (await bench.reader(topic)).read(10_000)) == wanted

    @case()
    async def test_a_batch_of_exactly_n(self, bench: Bench) -> None:
        """With 75 messages there, a batch of 50 is 50, of 25 then 25, and then comes nothing."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(75))
        reader = await bench.reader(topic)
        for count in (50, 25):
            batch = await reader.batch(20, count=count, age=20)
            assert len(batch) == count
            await finish(batch)
        assert await reader.rest() == []

    @case()
    async def test_what_was_not_acked_comes_again(self, bench: Bench) -> None:
        """A, B, D acked, C and E not, then a new session: C and E come again, on a log also D, and nothing before C."""
        topic, name = await bench.topic(), bench.name("sub")
        await bench.publish(topic, [b"A", b"B", b"C", b"D", b"E"])
        first = await bench.reader(topic, name)
        for item in await first.read(5, done=False):
            if item.data in (b"A", b"B", b"D"):
                await item.ack()
        await first.close()
        expected = [b"C", b"D", b"E"] if bench.family is Family.RECORD else [b"C", b"E"]
        again = await bench.reader(topic, name)
        assert bodies(await again.read(len(expected))) == expected
        assert await again.rest() == []

    @case()
    async def test_half_of_it_unacked(self, bench: Bench) -> None:
        """Half is read and kept while the subscription may hold no more; once that is acked, the other half comes."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(60))
        reader = await bench.reader(topic, max_held=30)
        half = await reader.read(30, done=False)
        assert len(half) == 30
        if bench.family is Family.MESSAGE:
            error = await refusal(reader.batch(QUIET_S))
            assert error.kind is ErrorKind.NO_CREDIT
        await finish(half)
        assert in_any_order(half + await reader.read(30)) == numbered(60)

    @case()
    async def test_nothing_there_is_not_an_error(self, bench: Bench) -> None:
        """On an empty topic, one and many within a time-out are None and an empty list, in time; then it delivers."""
        topic = await bench.topic()
        reader = await bench.reader(topic)
        shapes = reader.shapes
        began = time.monotonic()
        assert await reader.one(0.3) is None
        assert await reader.opened.next_batch(0) == []
        assert await shapes.next_batch(0.3) == []
        assert time.monotonic() - began < 0.6 + bench.capabilities.slice_s + 2
        await bench.publish(topic, [b"now"])
        assert bodies(await reader.read(1)) == [b"now"]

    @case()
    async def test_cancelling_a_handler_settles_nothing(self, bench: Bench) -> None:
        """A receiver that is cancelled while its handler works: the message is neither acked nor lost."""
        topic, name = await bench.topic(), bench.name("sub")
        await bench.publish(topic, [b"slow"])
        reader = await bench.reader(topic, name)
        begun = asyncio.Event()

        async def handler(item: Item) -> None:
            begun.set()
            await asyncio.sleep(60)
            await item.ack()

        receiving = asyncio.ensure_future(reader.shapes.receive(handler))
        await begun.wait()
        receiving.cancel()
        assert isinstance((await asyncio.gather(receiving, return_exceptions=True))[0], asyncio.CancelledError)
        await reader.close()
        again = await bench.reader(topic, name)
        assert bodies(await again.read(1, bench.harness.redelivery_s)) == [b"slow"]

    @case()
    async def test_cancelled_calls(self, bench: Bench) -> None:
        """Publishing and taking by a cancelled task raise the cancellation; what was taken comes with the next call, and no task stays."""
        topic = await bench.topic()
        reader, publisher = await bench.reader(topic), await bench.client.topic(topic)
        assert await reader.rest() == []
        before = len(asyncio.all_tasks())
        sending = asyncio.ensure_future(publisher.publish(OutboundMessage(b"never")))
        sending.cancel()  # before its first step: nothing may be sent
        taking = [asyncio.ensure_future(reader.one(None)) for _ in range(3)]
        await asyncio.sleep(0.05)
        for task in taking:
            task.cancel()
        ended = await asyncio.gather(sending, *taking, return_exceptions=True)
        assert [type(e) for e in ended] == [asyncio.CancelledError] * 4
        await bench.publish(topic, numbered(10))
        assert bodies(await reader.read(10)) == numbered(10)
        await until(lambda: len(asyncio.all_tasks()) <= before + 1, bench.capabilities.slice_s + 2, "cancelled calls left tasks")
        assert await reader.rest() == []

    @case()
    async def test_closed_subscription(self, bench: Bench) -> None:
        """After close taking is an error that says so, also for a call that was waiting; a second close is fine."""
        topic = await bench.topic()
        reader = await bench.reader(topic)
        waiting = asyncio.ensure_future(reader.one(None))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await asyncio.gather(reader.opened.close(), reader.opened.close())
        assert time.monotonic() - began < bench.capabilities.slice_s + 2
        assert (await refusal(waiting)).kind is ErrorKind.CLOSED
        assert (await refusal(reader.opened.next_batch(1))).kind is ErrorKind.CLOSED

    @case()
    async def test_missing_topic(self, bench: Bench) -> None:
        """Taking from a topic that is not there is NOT_FOUND at once, names it, and does not make it."""
        before, missing = await bench.snapshot(), bench.name("missing")
        began = time.monotonic()
        error = await refusal(bench.reader(missing))
        assert time.monotonic() - began < 5
        assert error.kind is ErrorKind.NOT_FOUND
        assert missing in str(error)
        assert await bench.snapshot() == before

    @case("explicit_subscriptions")
    async def test_missing_subscription(self, bench: Bench) -> None:
        """Taking from a subscription that is not there is NOT_FOUND at once, names it, and does not make it."""
        topic, missing = await bench.topic(), bench.name("missing")
        before = await bench.snapshot()
        error = await refusal(bench.client.subscribe(topic, missing, family=bench.family))
        assert error.kind is ErrorKind.NOT_FOUND
        assert missing in str(error)
        assert await bench.snapshot() == before


class Idle(Suite):
    """A subscription on which nothing happens for a minute.

    Put it last in the module: the subscription is opened before the module's first case, and the minute runs meanwhile.
    """

    @pytest.mark.slow
    @case(seconds=IDLE_S + 30)
    async def test_a_silent_subscription_delivers_at_once(self, bench: Bench) -> None:
        """After a minute in which nothing came, the next message is there within two seconds."""
        silent = bench.silent
        assert silent is not None
        await asyncio.sleep(max(0.0, silent.since + IDLE_S - time.monotonic()))
        waiting = asyncio.ensure_future(silent.read(1, 5))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await bench.publish(silent.topic, [b"at last"])
        assert bodies(await waiting) == [b"at last"]
        assert time.monotonic() - began < 2
