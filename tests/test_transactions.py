"""Transactions through the connection, on the broker in memory."""

import asyncio
import uuid

import pytest

import broker_nb
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import OutboundMessage


@pytest.fixture
def conn():
    broker = InmemBroker.get(uuid.uuid4().hex)
    broker.create_topic("t")
    with broker_nb.connect(f"inmem://{broker.name}", name=broker.name) as opened:
        yield opened


def bodies(conn, **options):
    return conn.sample("t", "..end", **options)["data"].tolist()


def test_what_is_sent_becomes_visible_together(conn):
    async def go():
        publisher = await conn.aio.transactional_publisher("tx")
        topic = await publisher.topic("t")
        async with publisher.transaction():
            await topic.publish(OutboundMessage(b"1"))
            results = await topic.batch_publish(OutboundMessage(b"2"), OutboundMessage(b"3"))
            hidden = await conn.aio.sample("t", "..end")
        return results, hidden

    results, hidden = asyncio.run(go())
    assert [r.ok for r in results] == [True, True]
    assert len(hidden) == 0
    assert hidden.attrs["complete"] is False
    assert bodies(conn) == [b"1", b"2", b"3"]


def test_an_exception_takes_everything_back(conn):
    async def go():
        publisher = await conn.aio.transactional_publisher("tx")
        topic = await publisher.topic("t")
        async with publisher.transaction():
            await topic.publish(OutboundMessage(b"1"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(go())
    assert bodies(conn) == []
    assert bodies(conn, isolation="uncommitted") == [b"1"]


def test_a_later_holder_of_the_id_fences_the_earlier(conn):
    async def go():
        one, two = [await conn.aio.transactional_publisher("tx") for _ in range(2)]
        await one.begin()
        await (await one.topic("t")).publish(OutboundMessage(b"1"))
        await two.begin()
        with pytest.raises(BrokerError) as caught:
            await (await one.topic("t")).publish(OutboundMessage(b"2"))
        await two.close()
        return caught.value.kind

    assert asyncio.run(go()) is ErrorKind.FENCED
    assert bodies(conn) == []


def test_wrong_order_is_one_line_each(conn):
    async def go():
        publisher = await conn.aio.transactional_publisher("tx")
        topic = await publisher.topic("t")
        for call in (publisher.commit, publisher.abort, lambda: topic.publish(OutboundMessage(b""))):
            with pytest.raises(BrokerError, match="tx: no transaction is open"):
                await call()
        await publisher.begin()
        with pytest.raises(BrokerError, match="tx: a transaction is open"):
            await publisher.begin()
        assert await publisher.abort() is False
        await publisher.close()

    asyncio.run(go())
