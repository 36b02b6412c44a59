"""Publishing in slices where the broker fails in the middle, and by callers that are cancelled: the fate of every row is known."""

import asyncio

import pytest
from test_taking import run, until

from broker_nb.backends.driver import Outbound, SendResult, Sent
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import OutboundMessage
from broker_nb.portable import publish
from broker_nb.portable.publish import TopicPublisher
from broker_nb.portable.transactions import TransactionalTopic
from broker_nb.portable.turnstile import Turnstile

GONE = BrokerError(ErrorKind.UNREACHABLE, "t", "t: no answer from the broker", retryable=True)


class Sender:
    """Accepts rows but those whose body is b"bad"; a number is a call that raises."""

    def __init__(self, fails=(), gate=None):
        self.fails, self.gate, self.calls, self.closed = set(fails), gate, [], 0

    def check(self, row):
        return "a row that can never be sent" if row.data == b"never" else None

    async def send(self, rows):
        self.calls.append([row.data for row in rows])
        if self.gate is not None:
            await self.gate.wait()
        if len(self.calls) in self.fails:
            raise GONE
        return [SendResult(Sent.UNKNOWN, error=GONE) if row.data == b"bad" else SendResult(Sent.ACCEPTED) for row in rows]

    async def close(self):
        self.closed += 1


@pytest.fixture
def slices(monkeypatch):
    monkeypatch.setattr(publish, "SLICE_ROWS", 2)
    monkeypatch.setattr(publish, "CHECK_ROWS", 2)


def publisher(sender):
    async def open_sender():
        return sender

    return TopicPublisher("t", open_sender, lambda: None)


def rows(*bodies, key=None):
    return [Outbound(body, key) for body in bodies]


def states(results):
    return [r.state.name for r in results]


def test_a_slice_ends_after_so_many_rows_or_bytes(slices, monkeypatch):
    async def go():
        sender, results = Sender(), []
        monkeypatch.setattr(publish, "SLICE_BYTES", 10)
        await publisher(sender).send(rows(b"1", b"2", b"3" * 10, b"4", b"5", b"6"), results)
        assert sender.calls == [[b"1", b"2"], [b"3" * 10], [b"4", b"5"], [b"6"]]
        assert states(results) == ["ACCEPTED"] * 6

    run(go())


def test_nothing_is_nothing():
    async def go():
        sender = Sender()
        assert await publisher(sender).batch_publish() == []
        assert sender.calls == []

    run(go())


def test_a_failure_of_the_first_slice_is_an_error_and_of_a_later_one_the_fate_of_the_rest(slices):
    async def go():
        with pytest.raises(BrokerError, match="no answer"):
            await publisher(Sender(fails=[1])).batch_publish(OutboundMessage(b"1"))
        sender, results = Sender(fails=[2]), []
        await publisher(sender).send(rows(b"1", b"2", b"3", b"4", b"5"), results)
        assert states(results) == ["ACCEPTED", "ACCEPTED", "REFUSED", "REFUSED", "REFUSED"]
        assert {r.error for r in results[2:]} == {GONE}
        assert len(sender.calls) == 2

    run(go())


def test_a_key_that_stopped_in_one_slice_is_held_back_in_the_next_ones(slices):
    async def go():
        sender, results = Sender(), []
        sent = [
            *rows(b"1", b"bad", key=b"k"),
            *rows(b"2", key=b"k"),
            *rows(b"3", key=b"other"),
            *rows(b"4", key=b"k"),
            *rows(b"5"),
        ]
        await publisher(sender).send(sent, results)
        assert states(results) == ["ACCEPTED", "UNKNOWN", "REFUSED", "ACCEPTED", "REFUSED", "ACCEPTED"]
        assert str(results[2].error) == "t: an earlier row of key b'k' was not sent, so this one was held back"
        assert sender.calls == [[b"1", b"bad"], [b"3"], [b"5"]]

    run(go())


def test_a_slice_of_which_nothing_may_go_is_not_sent(slices):
    async def go():
        sender, results = Sender(), []
        await publisher(sender).send(rows(b"never", b"1", b"2", b"3", b"4", key=b"k"), results)
        assert states(results) == ["REFUSED"] * 5
        assert sender.calls == []

    run(go())


def test_one_that_is_not_accepted_raises():
    async def go():
        with pytest.raises(BrokerError, match="no answer"):
            await publisher(Sender()).publish(OutboundMessage(b"bad"))

        async def send(topic, sent):
            return [SendResult(Sent.UNKNOWN, error=GONE) for _ in sent]

        with pytest.raises(BrokerError, match="no answer"):
            await TransactionalTopic("t", send).publish(OutboundMessage(b"1"))

    run(go())


def test_a_cancelled_caller_learns_what_became_of_the_slice_under_way(slices):
    async def go():
        sender, results = Sender(gate=asyncio.Event()), []
        sending = asyncio.ensure_future(publisher(sender).send(rows(b"1", b"2", b"3", b"4"), results))
        await until(lambda: sender.calls)
        sending.cancel()
        await asyncio.sleep(0.01)
        assert not sending.done()
        sender.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert states(results) == ["ACCEPTED", "ACCEPTED"]
        assert sender.calls == [[b"1", b"2"]]

    run(go())


def test_a_publisher_that_was_never_used_closes_without_a_sender():
    async def go():
        sender = Sender()
        await publisher(sender).close()
        assert sender.closed == 0

    run(go())


def test_a_turn_that_comes_together_with_the_cancellation_is_passed_on():
    async def go():
        class Rude(Turnstile):
            def _next(self):
                super()._next()
                second.cancel()  # its turn has come, and it does not know yet

        turnstile, gate, done = Rude(), asyncio.Event(), []

        async def work(name):
            await gate.wait()
            done.append(name)

        first, second, third = [asyncio.ensure_future(turnstile.call(lambda name=name: work(name))) for name in "abc"]
        await until(lambda: len(turnstile._patient) == 2)
        gate.set()
        await asyncio.gather(first, third)
        assert second.cancelled()
        assert done == ["a", "c"]
        assert await turnstile.drained(0.1)

    run(go())
