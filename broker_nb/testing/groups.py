"""Records of a log, read as a member of a group."""

from __future__ import annotations

from broker_nb.backends.driver import Entity, Family, Kind
from broker_nb.messages import Record
from broker_nb.portable.records import RecordSubscription
from broker_nb.testing.bench import Bench, Item, bodies, finish, in_any_order, numbered
from broker_nb.testing.delivery import Delivery
from broker_nb.testing.harness import case


class Records(Delivery):
    """A topic with consumer groups."""

    family = Family.RECORD
    needs = ("records",)

    @case()
    async def test_a_new_group_gets_the_past_then_what_comes(self, bench: Bench) -> None:
        """A group that comes late gets all history in order, then live rows; one that starts at the end only the live ones."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(50))
        late, live = await bench.reader(topic), await bench.reader(topic, start="latest")
        assert bodies(await late.read(50)) == numbered(50)
        assert await live.rest(2.0) == []
        await bench.publish(topic, [b"live"])
        assert bodies(await late.read(1)) == bodies(await live.read(1)) == [b"live"]

    @case()
    async def test_groups_do_not_touch_each_other(self, bench: Bench) -> None:
        """Two groups on one topic each get all, whatever the other one commits."""
        topic = await bench.topic(partitions=2)
        one, other = await bench.reader(topic), await bench.reader(topic)
        await bench.publish(topic, numbered(40))
        assert in_any_order(await one.read(40)) == in_any_order(await other.read(40)) == numbered(40)

    @case("numbered")
    async def test_only_the_contiguous_prefix_is_committed(self, bench: Bench) -> None:
        """Rows acked out of order: the group's position is the first row that is not done, never beyond it, never back."""
        topic, name = await bench.topic(), bench.name("sub")
        await bench.publish(topic, numbered(5))
        reader = await bench.reader(topic, name)
        rows = await reader.read(5, done=False)

        async def committed() -> int | None:
            (line,) = await bench.client.backlog(topic, name)
            return None if line.committed is None else after(line.committed)

        places = []
        for index in (4, 1, 0, 3, 2, 0):
            await rows[index].ack()
            places.append(await committed())
        first = offset(rows[0])
        assert places == [None, None, first + 2, first + 2, first + 5, first + 5]
        await as_record(rows[1]).commit_to()
        assert await committed() == first + 5

    @case()
    async def test_read_again(self, bench: Bench) -> None:
        """What was read and not committed can be read again in the same session, and a committed row does not come."""
        topic = await bench.topic()
        await bench.publish(topic, numbered(10))
        reader = await bench.reader(topic)
        rows = await reader.read(10, done=False)
        await as_record(rows[3]).commit_to()
        assert isinstance(reader.opened, RecordSubscription)
        assert await reader.opened.rewind() == 6
        assert bodies(await reader.read(6)) == numbered(10)[4:]
        assert await reader.rest() == []

    @case()
    async def test_a_partition_each(self, bench: Bench) -> None:
        """Two members share two partitions; when one leaves, the other gets its rows too, and nothing that was committed."""
        topic, name = await bench.topic(partitions=2), bench.name("sub")
        first = await bench.reader(topic, name)
        assert await first.rest() == []
        second = await bench.reader(topic, name, client=await bench.connect())
        members: dict[bytes | None, str] = {}
        sent = 0
        while len(set(members.values())) < 2:  # each of them has read something
            await bench.publish(topic, numbered(20, f"{sent:03}-"))
            sent += 1
            for which, reader in (("first", first), ("second", second)):
                got = await reader.batch(1.0)
                members.update(dict.fromkeys(bodies(got), which))
                if which == "first":
                    await finish(got)
        uncommitted = {body for body, which in members.items() if which == "second"}
        await second.close()
        again: set[bytes | None] = set()
        while not uncommitted <= again:
            again.update(bodies(await first.read(20, 1.0)))

    @case("numbered")
    async def test_backlog(self, bench: Bench) -> None:
        """The backlog tells committed position, end and what waits, and asking for it changes nothing."""
        topic, name = await bench.topic(), bench.name("sub")
        await bench.publish(topic, numbered(10))
        reader = await bench.reader(topic, name)
        rows = await reader.read(4)
        before = await bench.snapshot()
        (line,) = await bench.client.backlog(topic, name)
        assert line.committed is not None
        assert after(line.committed) == offset(rows[-1]) + 1
        assert line.waiting == 6
        assert Entity(Kind.SUBSCRIPTION, name, topic) in await bench.client.entities()
        assert await bench.snapshot() == before


def as_record(item: Item) -> Record:
    """The item, of family RECORD."""
    assert isinstance(item, Record)
    return item


def offset(item: Item) -> int:
    """A record's offset."""
    return as_record(item).offset


def after(position: tuple[int, ...]) -> int:
    """The first number at or after a position."""
    return position[0] + (len(position) > 1)
