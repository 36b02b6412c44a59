"""Settling, committing and publishing many at once, and the transaction block."""

import asyncio
import random

import pytest
from scripted import (
    BROKEN,
    DENIED,
    ids,
    message,
    record,
    run,
    until,
)

from broker_nb.adapters import (
    ack_all,
    commit_highest_offsets,
    group_batch_by,
    nack_all,
    simple_publisher_parallelization,
    transaction,
)
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import OutboundMessage, Published


# ------------------------------------------------------------------ settling many
def test_settling_many_tries_all_and_raises_the_first():
    async def main():
        log = []
        lost = BrokerError(ErrorKind.LEASE_LOST, "2", "message 2: no longer held")
        also = BrokerError(ErrorKind.LEASE_LOST, "4", "message 4: no longer held")
        with pytest.raises(BrokerError, match="message 2") as e:
            await ack_all(message(1, log), message(2, fail=lost), message(3, log), message(4, fail=also))
        assert log == [("ack", 1), ("ack", 3)]
        assert "message 4" in e.value.__notes__[0]
        await ack_all()
        await nack_all()

    run(main())


def test_commit_highest_offsets_by_topic_and_partition():
    """Partition 0 exists in both topics, offset 0 counts, and the order given does not matter (defect 6)."""

    async def main():
        log = []
        rows = [
            record(n, log, partition=p, topic=t) for t in ("a", "b") for p in (0, 1) for n in ((3, 9, 5) if t == "a" else (0,))
        ]
        await commit_highest_offsets(rows)
        await commit_highest_offsets([])
        return sorted(log)

    assert run(main()) == [(True, "a", 0, 9), (True, "a", 1, 9), (True, "b", 0, 0), (True, "b", 1, 0)]


def test_group_batch_by_keeps_null_and_empty_apart():
    groups = group_batch_by([record(n, key=k) for n, k in enumerate([None, b"", b"a", None, b""])], lambda r: r.key)
    assert {k: ids(v) for k, v in groups.items()} == {None: [0, 3], b"": [1, 4], b"a": [2]}
    assert list(groups) == [None, b"", b"a"]


# ------------------------------------------------------------------ publishing many
class FakeTopic:
    def __init__(self, fail=None):
        self.sent, self.fail, self.running, self.most = [], fail or {}, 0, 0
        self.rng = random.Random(3)  # noqa: S311 - a fixed seed, no secret

    async def publish(self, m):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for _ in range(self.rng.randrange(4)):
                await asyncio.sleep(0)
            if m.data in self.fail:
                raise self.fail[m.data]
            self.sent.append(m)
            return Published("accepted", id=m.data.decode())
        finally:
            self.running -= 1


def test_publishing_many_is_bounded_keeps_order_per_key_and_aligns_results():
    topic = FakeTopic()
    out = [OutboundMessage(str(n).encode(), key=[None, b"", b"a", b"b"][n % 4]) for n in range(400)]
    results = run(simple_publisher_parallelization(topic, *out, concurrency=7))
    assert [r.id for r in results] == [str(n) for n in range(400)]
    assert 3 < topic.most <= 7
    for key in (b"", b"a", b"b"):
        order = [int(m.data) for m in topic.sent if m.key == key]
        assert order == sorted(order)
        assert len(order) == 100


@pytest.mark.parametrize(("error", "state"), [(DENIED(), "refused"), (BROKEN(), "unknown")])
def test_the_first_error_keeps_back_what_was_not_sent(error, state):
    topic = FakeTopic(fail={b"5": error})
    out = [OutboundMessage(str(n).encode(), key=b"k") for n in range(10)]
    results = run(simple_publisher_parallelization(topic, *out))
    assert [r.state for r in results] == ["accepted"] * 5 + [state] + ["refused"] * 4
    assert results[5].error is error
    assert all("not sent" in str(r.error) and not r.ok for r in results[6:])
    assert [m.data for m in topic.sent] == [b"0", b"1", b"2", b"3", b"4"]


def test_what_is_under_way_at_the_first_error_is_waited_for():
    async def main():
        release = asyncio.Event()

        class Topic:
            async def publish(self, m):
                if m.data == b"bad":
                    release.set()
                    raise DENIED()
                await release.wait()
                await asyncio.sleep(0.01)
                return Published("accepted")

        out = [OutboundMessage(b"slow"), OutboundMessage(b"bad"), OutboundMessage(b"late")]
        return await simple_publisher_parallelization(Topic(), *out, concurrency=2)

    assert [r.state for r in run(main())] == ["accepted", "refused", "refused"]


def test_publishing_nothing_is_nothing_and_a_bug_is_raised():
    assert run(simple_publisher_parallelization(FakeTopic())) == []
    with pytest.raises(ZeroDivisionError):
        run(
            simple_publisher_parallelization(
                FakeTopic(fail={b"1": ZeroDivisionError()}), OutboundMessage(b"1"), OutboundMessage(b"2")
            )
        )
    with pytest.raises(BrokerError, match="concurrency=0"):
        run(simple_publisher_parallelization(FakeTopic(), OutboundMessage(b"1"), concurrency=0))


def test_cancelling_a_publish_of_many_cancels_what_is_under_way():
    async def main():
        class Topic:
            cancelled = 0

            async def publish(self, m):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise

        topic = Topic()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await simple_publisher_parallelization(topic, *[OutboundMessage(b"x")] * 50, concurrency=5)
        assert topic.cancelled == 5

    run(main())


# ------------------------------------------------------------------ the transaction block
class FakeTransactional:
    def __init__(self, commits=True, abort_fails=None):
        self.calls, self.commits, self.abort_fails = [], commits, abort_fails

    async def begin(self):
        self.calls.append("begin")

    async def commit(self):
        self.calls.append("commit")
        return self.commits

    async def abort(self):
        self.calls.append("abort")
        if self.abort_fails:
            raise self.abort_fails
        return False


def test_a_transaction_commits_or_aborts_and_tells():
    async def main(publisher, error=None):
        async with transaction(publisher):
            if error:
                raise error

    good, bad, lost = FakeTransactional(), FakeTransactional(), FakeTransactional(commits=False)
    run(main(good))
    assert good.calls == ["begin", "commit"]
    with pytest.raises(ValueError, match="mine"):
        run(main(bad, ValueError("mine")))
    assert bad.calls == ["begin", "abort"]
    with pytest.raises(BrokerError, match="aborted the transaction") as e:
        run(main(lost))
    assert e.value.kind is ErrorKind.CONFLICT
    with pytest.raises(ValueError, match="mine") as mine:
        run(main(FakeTransactional(abort_fails=BROKEN()), ValueError("mine")))
    assert "not aborted" in mine.value.__notes__[0]


def test_a_cancelled_transaction_is_aborted():
    async def main():
        publisher = FakeTransactional()
        task = asyncio.ensure_future(wait_in(publisher))
        await until(lambda: publisher.calls)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return publisher.calls

    async def wait_in(publisher):
        async with transaction(publisher):
            await asyncio.Event().wait()

    assert run(main()) == ["begin", "abort"]
