"""Taking where something goes wrong: leases that cannot be kept, commits that fail, sources that die, brokers that do not answer."""

import asyncio
import logging
import uuid
from dataclasses import replace

import pytest
from test_taking import CAPABILITIES, Fake, bodies, log, queue, run, until

from broker_nb.backends.driver import Event, Family, Outbound, Outcome, Settled
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable import leases, messages, records, subscription
from broker_nb.portable.client import Client
from broker_nb.portable.messages import MessageSubscription

GONE = BrokerError(ErrorKind.UNREACHABLE, "t", "t: no answer from the broker", retryable=True)
DENIED = BrokerError(ErrorKind.PERMISSION, "t", "t: you may not settle on it")


@pytest.fixture
def broker():
    broker = InmemBroker.get(uuid.uuid4().hex)
    broker.create_topic("t")
    return broker


def connect(broker, like=None):
    return Client.open("inmem", {"hosts": [broker.name], "options": {"like": like} if like else {}})


class Unextendable(Fake):
    """`outcomes` are for extend, too: an error is raised."""

    async def extend(self, tokens, seconds):
        if self.outcomes and isinstance(self.outcomes[0], BrokerError):
            self.extended.append(("failed", len(tokens)))
            raise self.outcomes.pop(0)
        return await super().extend(tokens, seconds)


# ------------------------------------------------------------------ leases
def test_a_lease_whose_extension_failed_is_extended_when_the_broker_answers(monkeypatch, caplog):
    monkeypatch.setattr(leases, "RETRY_S", 0.02)

    async def go():
        source = Unextendable(rows=[b"1"], lease=1.0, outcomes=[GONE, GONE])
        sub = queue(source, seconds=1.0)
        await sub.take(1, timeout=1)
        await until(lambda: len(source.extended) >= 3)
        assert [what for what, _ in source.extended[:2]] == ["failed"] * 2
        assert (await sub.settle([1], "ack"))[0].state == "settled"

    run(go())
    assert "t/s: 1 rows could not be kept: t: no answer from the broker" in caplog.text


@pytest.mark.parametrize("error", [GONE, DENIED])
def test_a_lease_that_ended_because_it_could_not_be_extended_is_lost_by_name(monkeypatch, error):
    monkeypatch.setattr(leases, "RETRY_S", 0.02)

    async def go():
        source = Unextendable(rows=[b"1", b"2"], lease=0.4, outcomes=[error] * 100)
        sub = queue(source, seconds=0.4)
        await sub.take(2, timeout=1)
        await until(lambda: sub.held_count == 0)
        assert [r.state for r in await sub.settle([1, 2], "ack")] == ["lost", "lost"]
        assert source.settled == []

    run(go())


def test_a_row_that_is_not_given_back_when_its_time_is_up_is_tried_again(monkeypatch):
    monkeypatch.setattr(leases, "RETRY_S", 0.02)
    monkeypatch.setattr(messages, "RETRIES_S", ())

    async def go():
        source = Fake(rows=[b"1"], outcomes=[Settled.REFUSED, Settled.RETRY])
        sub = queue(source, hold=0.05)
        await sub.take(1, timeout=1)
        await until(lambda: sub.held_count == 0)
        assert len(source.settled) == 3

    run(go())


def test_the_broker_takes_a_row_away_while_its_settlement_is_under_way():
    async def go():
        source = Fake(rows=[b"1"], outcomes=[Settled.RETRY])
        sub = queue(source)
        (taken,) = await sub.take(1, timeout=1)
        settling = asyncio.ensure_future(sub.settle([1], "ack"))
        await asyncio.sleep(0)
        sub.on_event(Event("lost", tokens=frozenset(taken.batch.tokens)))
        assert (await settling)[0].state == "lost"
        assert (await sub.settle([1], "ack"))[0].state == "lost"
        assert source.settled == []  # nothing is said about a delivery that is somebody else's now
        assert sub.held_count == 0

    run(go())


@pytest.mark.parametrize("what", ["lost", "settled", "asked"])
def test_what_happens_between_two_tries_of_a_settlement_stands(monkeypatch, what):
    monkeypatch.setattr(messages, "RETRIES_S", (0.3, 0.3))  # long enough to act in between

    async def go():
        source = Fake(rows=[b"1", b"2"], outcomes=[Settled.RETRY])
        sub = queue(source)
        (taken,) = await sub.take(2, timeout=1)
        settling = asyncio.ensure_future(sub.settle([1, 2], "ack"))
        await until(lambda: source.settled and sub.delivery(1).state is messages.State.HELD)
        if what == "lost":
            sub.on_event(Event("lost", tokens=frozenset(taken.batch.tokens[:1])))
            states = [r.state for r in await settling]
            assert states == ["lost", "settled"]
        elif what == "settled":
            assert (await sub.settle([1], "nack"))[0].state == "settled"
            first, second = await settling
            assert (first.state, first.text[:9], second.state) == ("already", "nack won ", "settled")
        else:
            source.outcomes = [Settled.RETRY]
            nacking = asyncio.ensure_future(sub.settle([1], "nack"))
            results = [*await settling, *await nacking]
            assert [r.state for r in results] in (["already", "settled", "settled"], ["settled", "settled", "already"])
        assert sub.held_count == 0

    run(go())


# ------------------------------------------------------------------ bounds
def test_without_a_time_out_it_does_not_wait_for_more_than_came():
    async def go():
        assert bodies(await queue(Fake(rows=[b"1", b"2"])).take(5, timeout=None)) == [b"1", b"2"]

    run(go())


def test_rows_beyond_those_asked_for_come_first_next_time():
    async def go():
        class Generous(Fake):
            async def pull(self, max_rows, max_bytes, wait):
                return await super().pull(3, max_bytes, wait)

        sub = queue(Generous(rows=[b"1", b"2", b"3"]))
        assert bodies(await sub.take(1, timeout=1)) == [b"1"]
        assert sub.held_count == 3
        assert bodies(await sub.take(2, timeout=1)) == [b"2", b"3"]

    run(go())


def test_settled_rows_are_forgotten_one_day_and_held_ones_never(monkeypatch):
    for module in (messages, records, subscription):
        monkeypatch.setattr(module, "MAX_KNOWN", 10)

    async def go():
        source = Fake(rows=[b"%d" % i for i in range(60)])
        sub = queue(source)
        for _ in range(30):
            (taken,) = await sub.take(1, timeout=1)
            await sub.settle(taken.serials, "ack")
        await sub.take(30, timeout=1)
        assert len(sub._known) < 45
        assert [d.serial for d in sub.held()] == list(range(31, 61))
        first, never = await sub.settle([1, 99], "nack")
        assert (first.state, first.text) == ("already", "settled or lost long ago")
        assert never.state == "foreign"
        assert sub.delivery_count(1) is sub.delivery_count(99) is None

    run(go())


# ------------------------------------------------------------------ ends
def test_a_source_that_dies_ends_its_subscription_and_a_new_one_may_be_opened(broker):
    broker.publish("t", [Outbound(b"1")])

    async def go():
        client = await connect(broker)
        taken = await client.subscribe("t", "s")
        source = taken._handles[0].source
        client.host.emit(Event("failed", error=DENIED, handle=object()))  # another one's
        assert (await taken.next_message(1)).data == b"1"
        client.host.emit(Event("failed", error=DENIED, handle=source))
        await until(lambda: taken.failed)
        with pytest.raises(BrokerError, match="you may not settle"):
            await taken.next_message(1)
        again = await client.subscribe("t", "s")
        assert again is not taken
        assert (await again.next_message(1)).data == b"1"
        await client.close()

    run(go())


def test_closing_does_not_wait_for_a_broker_that_takes_nothing_back(monkeypatch, caplog):
    monkeypatch.setattr(messages, "CLOSE_S", 0.05)

    async def go():
        class Silent(Fake):
            async def settle(self, items):
                await asyncio.sleep(1)
                return await super().settle(items)

        source = Silent(rows=[b"1"])
        sub = queue(source)
        await sub.take(1, timeout=1)
        await sub.close()
        assert source.closed == 1
        await until(lambda: source.settled)

    run(go())
    assert "t/s: the broker did not take rows back in 0.05 s; it will when their lease ends" in caplog.text


def test_a_log_has_no_messages():
    async def go():
        with pytest.raises(BrokerError, match="t/g is a log: its rows are committed, not acked one by one"):
            MessageSubscription("t/g", CAPABILITIES, log(Fake()).facts, None, 60)

    run(go())


# ------------------------------------------------------------------ logs
@pytest.mark.parametrize("like", [None, "kafka"])
def test_a_commit_that_failed_is_told_and_comes_with_the_next_one(broker, like):
    broker.publish("t", [Outbound(b"%d" % i) for i in range(4)])

    async def go():
        client = await connect(broker, like)
        taken = await client.subscribe("t", "g", family=Family.RECORD)
        rows = await taken.next_batch(1, count=4)
        broker.fail_next("commit", Settled.RETRY)
        with pytest.raises(BrokerError, match="partition 0 was not committed; try again") as caught:
            await rows[0].ack()
        assert caught.value.retryable
        (line,) = await client.backlog("t", "g")
        assert line.committed is None
        await rows[1].ack()
        (line,) = await client.backlog("t", "g")
        assert line.committed == (2,)
        broker.fail_next("commit", GONE)
        with pytest.raises(BrokerError, match="no answer"):
            await rows[2].ack()
        await rows[2].ack()  # the same row again is enough
        (line,) = await client.backlog("t", "g")
        assert line.committed == (3,)
        await client.close()
        assert broker.misuses == []

    run(go())


def test_a_refused_commit_says_why_and_one_without_a_reason_too():
    async def go():
        class Refusing(Fake):
            async def commit(self, positions):
                return {p: Outcome(Settled.REFUSED) for p in positions}

        sub = log(Refusing(rows=[b"0"]))
        await sub.take(1, timeout=1)
        (stand,) = await sub.commit([1])
        assert str(stand.error) == "t/g: partition 0 was not committed (not done, will not work)"
        assert stand.position is None

    run(go())


def test_a_row_of_a_log_that_was_never_delivered_is_refused_and_one_that_is_forgotten_is_done(monkeypatch):
    for module in (records, subscription):
        monkeypatch.setattr(module, "MAX_KNOWN", 10)

    async def go():
        source = Fake(rows=[b"%d" % i for i in range(30)])
        sub = log(source)
        for i in range(30):
            await sub.take(1, timeout=1)
            if i < 25:
                await sub.commit([i + 1])
        assert len(sub._places) < 25
        assert sub.held_serials() == list(range(26, 31))
        assert sub.standing(1) == "committed"
        assert await sub.commit([1]) == []
        with pytest.raises(BrokerError, match="row 99 was never delivered to this session"):
            await sub.commit([26, 99])
        assert sub.held_serials() == list(range(26, 31))

    run(go())


def test_a_revocation_voids_only_the_partitions_that_it_names():
    async def go():
        class Places(Fake):
            async def pull(self, max_rows, max_bytes, wait):
                batch = await super().pull(max_rows, max_bytes, wait)
                return batch and replace(batch, codec=TwoPartitions())

        class TwoPartitions:
            def size(self, row):
                return len(row)

            def places(self, rows):
                return [(int(row) % 2, (int(row),)) for row in rows]

        source = Places(rows=[b"%d" % i for i in range(6)])
        sub = log(source)
        await sub.take(6, timeout=1)
        sub.on_event(Event("revoked", partitions=frozenset({1, 7}), handle=object()))  # another member's
        assert len(sub.held_serials()) == 6
        sub.on_event(Event("revoked", partitions=frozenset({1, 7}), handle=source))
        assert [sub.standing(s) for s in (1, 2)] == ["open", "void"]
        stands = {stand.partition: stand for stand in await sub.commit([1, 2])}
        assert stands[0].position == (0, 0)
        assert stands[1].error.kind is ErrorKind.LEASE_LOST
        assert source.committed == [{0: (0, 0)}]

    run(go())


def test_a_commit_that_waits_for_its_turn_heeds_a_revocation():
    async def go():
        source = Fake(rows=[b"0", b"1"])
        sub = log(source)
        await sub.take(2, timeout=1)
        source.gate = asyncio.Event()
        pulling = asyncio.ensure_future(sub.take(1, timeout=None))
        await until(lambda: sub._handles[0].pulls._busy)
        committing = asyncio.ensure_future(sub.commit([1]))
        await until(lambda: sub._handles[0].pulls._urgent)
        sub.on_event(Event("revoked", partitions=frozenset({0}), handle=source))
        source.gate.set()
        (stand,) = await committing
        assert stand.error.kind is ErrorKind.LEASE_LOST
        assert source.committed == []
        pulling.cancel()
        await asyncio.gather(pulling, return_exceptions=True)

    run(go())


def test_rewinding_what_is_all_committed_seeks_nothing():
    async def go():
        source = Fake(rows=[b"0"])
        sub = log(source)
        await sub.take(1, timeout=1)
        await sub.commit([1])
        assert await sub.rewind() == 0
        assert source.sought == []

    run(go())


def test_a_failing_source_is_asked_again_only_so_often(monkeypatch):
    monkeypatch.setattr("broker_nb.portable.pulling.BACKOFF_S", (0.001,) * 3)

    async def go():
        source = Fake(pull_errors=[GONE] * 4, rows=[b"1"])
        sub = queue(source)
        with pytest.raises(BrokerError, match="no answer"):
            await sub.take(1, timeout=5)
        assert bodies(await sub.take(1, timeout=5)) == [b"1"]

    run(go())


# ------------------------------------------------------------------ members
def test_live_members_are_not_joined_unasked_and_one_that_just_leaves_is_waited_for(broker):
    async def go():
        first, second = await connect(broker), await connect(broker)
        await first.subscribe("t", "g", family=Family.RECORD)
        with pytest.raises(BrokerError, match=r"t/g has 1 live member\(s\).*; take part with join=True") as caught:
            await second.subscribe("t", "g")
        assert caught.value.kind is ErrorKind.CONFLICT
        joined = await second.subscribe("t", "g", join=True)
        assert await second.subscribe("t", "g") is joined
        await second.unsubscribe("t", "g")
        coming = asyncio.ensure_future(second.subscribe("t", "g"))
        await asyncio.sleep(0.05)
        await first.close()
        assert (await coming).name == "t/g"
        await second.close()

    run(go())


# ------------------------------------------------------------------ the connection
def test_a_question_is_asked_again_while_a_cluster_elects_and_a_write_is_not(monkeypatch, broker):
    monkeypatch.setattr("broker_nb.portable.client.PAUSES_S", (0.001, 0.001))
    electing = BrokerError(ErrorKind.TRANSIENT, "t", "t: the cluster elects a leader", retryable=True)

    async def go():
        client = await connect(broker)
        for times, works in ((1, True), (2, True), (3, False)):
            broker.fail_next("entities", electing, times=times)
            if works:
                assert len(await client.entities()) == 1
            else:
                with pytest.raises(BrokerError, match="elects a leader"):
                    await client.entities()
        assert broker.faults == {}
        broker.fail_next("entities", DENIED)
        with pytest.raises(BrokerError, match="may not"):
            await client.entities()
        publisher = await client.topic("t")
        broker.fail_next("send", electing)
        with pytest.raises(BrokerError, match="elects a leader"):
            await publisher.send([Outbound(b"1")], [])
        assert broker.topic("t").logs[0].rows == []
        await client.close()

    run(go())


def test_closing_goes_on_past_a_step_that_fails_or_hangs(monkeypatch, caplog, broker):
    monkeypatch.setattr("broker_nb.portable.client.CLOSE_S", 0.05)

    async def go():
        client = await connect(broker)
        first, second = [await client.subscribe("t", name) for name in ("a", "b")]
        closed = []

        async def fails():
            raise GONE

        async def hangs():
            await asyncio.sleep(60)

        async def closes():
            closed.append(True)

        monkeypatch.setattr(first, "close", fails)
        monkeypatch.setattr(second, "close", hangs)
        monkeypatch.setattr(client.driver, "close", closes)
        await client.close()
        assert closed == [True]

    with caplog.at_level(logging.WARNING):
        run(go())
    assert "while closing: t: no answer from the broker" in caplog.text
    assert "while closing: no answer within 0.05 s" in caplog.text


def test_errors_name_their_entity_and_show_no_secret(broker):
    async def go():
        client = await Client.open("inmem", {"hosts": [broker.name]}, secrets=["hunter2", "hunter"])
        cause = ValueError("bad hunter2 and hunter")
        error = client.host.error(ErrorKind.AUTH, "t", cause)
        assert str(error) == "t: bad *** and ***"
        assert error.__cause__ is cause
        assert str(client.host.error(ErrorKind.TIMEOUT, "orders", TimeoutError())) == "orders: TimeoutError"
        heard = []
        forget = client.host.listen(heard.append)
        forget()
        forget()
        client.host.emit(Event("reconnecting"))
        await asyncio.sleep(0)
        assert heard == []
        await client.close()

    run(go())
