"""Messages that are settled one by one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from broker_nb.backends.driver import Entity, Family, Kind
from broker_nb.errors import ErrorKind, Lost
from broker_nb.messages import Message, OutboundMessage
from broker_nb.portable.messages import MessageSubscription
from broker_nb.testing.bench import Bench, Reader, bodies, finish, in_any_order, numbered, refusal
from broker_nb.testing.delivery import Delivery
from broker_nb.testing.harness import case


class Messages(Delivery):
    """A topic with a queue subscription."""

    family = Family.MESSAGE
    needs = ("messages",)

    @case()
    async def test_two_nacked_come_again(self, bench: Bench) -> None:
        """Two nacked after everything was received: both come again within the redelivery bound, counted where the broker counts."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(5))
        reader = await bench.reader(topic)
        first = await messages(reader, 5)
        for message in first[1:3]:
            await message.nack()
        for message in (first[0], *first[3:]):
            await message.ack()
        again = await messages(reader, 2, bench.harness.redelivery_s)
        assert {m.id for m in again} == {m.id for m in first[1:3]}
        assert {m.delivery_count for m in again} in ({2}, {None})
        await finish(again)
        assert await reader.rest() == []

    @case()
    async def test_first_settlement_wins(self, bench: Bench) -> None:
        """Ack twice, and nack after ack: no error, and it does not come again; an unacked third does."""
        topic, name = await bench.topic(), bench.name("sub")
        await bench.publish(topic, numbered(3))
        reader = await bench.reader(topic, name)
        twice, both, _ = await messages(reader, 3)
        await asyncio.gather(twice.ack(), twice.ack())
        await twice.ack()
        await both.ack()
        await both.nack()
        await reader.close()
        again = await bench.reader(topic, name)
        assert bodies(await again.read(1)) == numbered(3)[2:]
        assert await again.rest() == []

    @case()
    async def test_settled_in_batches(self, bench: Bench) -> None:
        """72 messages settled in twelve batches of six at the same time: each settlement is confirmed, and none comes again."""
        topic, name = await bench.topic(), bench.name("sub")
        await bench.publish(topic, numbered(72))
        reader = await bench.reader(topic, name)
        opened = reader.opened
        assert isinstance(opened, MessageSubscription)
        await messages(reader, 72)
        serials = [d.serial for d in opened.held()]
        results = await asyncio.gather(*(opened.settle(serials[i : i + 6], "ack") for i in range(0, 72, 6)))
        good = "settled" if bench.capabilities.confirmed_settle else "sent"
        assert [[r.state for r in batch] for batch in results] == [[good] * 6] * 12
        await reader.close()
        assert await (await bench.reader(topic, name)).rest() == []

    @case()
    async def test_nacked_come_again_to_a_new_session(self, bench: Bench) -> None:
        """A, B, D acked, C and E nacked, then a new session: C and E come again."""
        topic, name = await bench.topic(), bench.name("sub")
        await bench.publish(topic, [b"A", b"B", b"C", b"D", b"E"])
        first = await bench.reader(topic, name)
        for message in await messages(first, 5):
            await (message.nack() if message.data in (b"C", b"E") else message.ack())
        await first.close()
        again = await bench.reader(topic, name)
        assert in_any_order(await again.read(2, bench.harness.redelivery_s)) == [b"C", b"E"]
        assert await again.rest() == []

    @case(seconds=60)
    async def test_going_on_after_many_nacks(self, bench: Bench) -> None:
        """Three sessions that nack a hundred times each; then a normal one gets all fifty messages."""
        topic, name = await bench.topic(), bench.name("sub")
        await bench.publish(topic, numbered(50))
        for _ in range(3):
            reader = await bench.reader(topic, name)
            nacked = 0
            while nacked < 100:
                batch = await messages(reader, 25)
                await asyncio.gather(*(message.nack() for message in batch))
                nacked += len(batch)
            await reader.close()
        assert in_any_order(await (await bench.reader(topic, name)).read(50)) == numbered(50)

    @case("ordered", "order_after_nack")
    async def test_nothing_overtakes_an_unacked_one(self, bench: Bench) -> None:
        """On an ordered subscription a nacked message comes again before the next of its key, and other keys go on."""
        topic = await bench.topic(ordered=True)
        await bench.publish(topic, [OutboundMessage(b"%d" % i, b"a" if i < 3 else b"b") for i in range(6)])
        reader = await bench.reader(topic)
        seen: dict[bytes | None, list[bytes | None]] = {b"a": [], b"b": []}
        while sum(map(len, seen.values())) < 8:
            (message,) = await messages(reader, 1, bench.harness.redelivery_s)
            seen[message.key].append(message.data)
            again = seen[message.key].count(message.data) == 1 and message.data in (b"0", b"4")
            await (message.nack() if again else message.ack())
        assert seen == {b"a": [b"0", b"0", b"1", b"2"], b"b": [b"3", b"4", b"4", b"5"]}

    @case("release_delay")
    async def test_a_delayed_nack(self, bench: Bench) -> None:
        """A message nacked with a delay of one second does not come earlier, and comes soon after."""
        topic = await bench.topic()
        await bench.publish(topic, [b"later"])
        reader = await bench.reader(topic)
        (message,) = await messages(reader, 1)
        began = time.monotonic()
        await message.nack(1.0)
        assert bodies(await reader.read(1, 1 + bench.harness.redelivery_s)) == [b"later"]
        assert time.monotonic() - began >= 0.9

    @case("reject")
    async def test_rejected_comes_no_more(self, bench: Bench) -> None:
        """A rejected message is confirmed to be settled, and comes to nobody on the subscription any more; the others do."""
        wishes: dict[str, Any] = {} if bench.harness.missing("dead_letter") else {"dead_letter": await bench.topic()}
        topic, name = await bench.topic(**wishes), bench.name("sub")
        await bench.publish(topic, [b"bad", b"good"])
        reader = await bench.reader(topic, name)
        bad, _ = await messages(reader, 2)
        await bad.reject("unreadable")
        await reader.close()
        again = await bench.reader(topic, name)
        assert bodies(await again.read(1, bench.harness.redelivery_s)) == [b"good"]
        assert await again.rest() == []

    @case("reject", "dead_letter")
    async def test_rejected_is_dead_lettered(self, bench: Bench) -> None:
        """A rejected message is in the dead-letter queue, body and key unchanged, and comes no more."""
        dead = await bench.topic()
        topic = await bench.topic(dead_letter=dead)
        buried = await bench.reader(dead)
        await bench.publish(topic, [OutboundMessage(b"bad", b"key"), b"good"])
        reader = await bench.reader(topic)
        bad, good = await messages(reader, 2)
        await bad.reject("unreadable")
        await good.ack()
        (found,) = await buried.read(1, bench.harness.redelivery_s)
        assert (found.data, found.key) == (b"bad", b"key")
        assert await reader.rest() == []

    @case("expire")
    async def test_a_lease_that_ran_out(self, bench: Bench) -> None:
        """A message whose lease ran out says so when it is acked, and comes again."""
        topic = await bench.topic(ack_deadline=1)
        await bench.publish(topic, [b"slow"])
        reader = await bench.reader(topic)
        (message,) = await messages(reader, 1)
        assert message.lease_expires is not None
        await asyncio.to_thread(bench.harness.expire, topic)
        error = await refusal(message.ack())
        assert isinstance(error, Lost)
        assert error.kind is ErrorKind.LEASE_LOST
        assert bodies(await reader.read(1, bench.harness.redelivery_s)) == [b"slow"]

    @case()
    async def test_the_lease_is_kept_meanwhile(self, bench: Bench) -> None:
        """A message held for three times its lease of a second is still ours: it is acked, and comes to nobody else."""
        topic, name = await bench.topic(ack_deadline=1), bench.name("sub")
        terms = (await bench.client.facts(Entity(Kind.TOPIC, topic))).lease
        assert terms is not None
        await bench.publish(topic, [b"held"])
        reader = await bench.reader(topic, name)
        (message,) = await messages(reader, 1)
        other = await bench.reader(topic, name, client=await bench.connect())
        came = await other.batch(3.0)
        if terms.seconds is None or terms.renewable:
            assert came == []
            await message.ack()


async def messages(reader: Reader, count: int, seconds: float = 20.0) -> list[Message]:
    """So many messages, not settled."""
    found = [item for item in await reader.read(count, seconds, done=False) if isinstance(item, Message)]
    assert len(found) == count
    return found
