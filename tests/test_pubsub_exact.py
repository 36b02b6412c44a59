"""What becomes of single messages with exactly-once delivery, which only the stand-in says."""

import asyncio
import time

import pytest
from grpc import StatusCode
from pubsub_bed import of, on, pulled, taking, verdicts
from pubsub_standin import StandIn

from broker_nb.backends.driver import Settled, Verdict
from broker_nb.errors import BrokerError, ErrorKind


@pytest.fixture
def standin():
    with StandIn() as server:
        server.topic("orders")
        server.queue = server.subscription("debug", "orders", enable_exactly_once_delivery=True)
        server.put("orders", b"1", b"2", b"3")
        yield server


def with_three(standin, body):
    async def go(opened):
        source = await opened.subscribe(of("orders", "debug"), taking())
        _, tokens = await pulled(source, 3)
        return await body(source, tokens)

    return on(standin.url, go)


def test_the_one_that_is_lost_is_told_and_the_others_are_done(standin):
    """Those beside it are asked again: the answer does not say that they are done."""

    async def body(source, tokens):
        message, _ = standin.queue.leased.pop(tokens[1])
        standin.queue.ready.append(message)  # it went to somebody else
        first = await source.settle(verdicts(tokens))
        assert [o.state for o in first] == [Settled.RETRY, Settled.LOST, Settled.RETRY]
        assert first[1].error.kind is ErrorKind.LEASE_LOST
        again = await source.settle(verdicts([tokens[0], tokens[2]]))
        assert [o.state for o in again] == [Settled.CONFIRMED] * 2

    with_three(standin, body)
    assert [m.data for m in standin.queue.ready] == [b"2"]


@pytest.mark.parametrize(
    ("trouble", "state"),
    [
        ("TRANSIENT_FAILURE_INVALID_ACK_ID", Settled.RETRY),
        ("PERMANENT_FAILURE_INVALID_ACK_ID", Settled.LOST),
        ("PERMANENT_FAILURE_OTHER", Settled.REFUSED),
    ],
)
@pytest.mark.parametrize("verdict", [Verdict.ACK, Verdict.RELEASE])
def test_what_may_be_wrong_with_one(standin, trouble, state, verdict):
    async def body(source, tokens):
        standin.trouble = {tokens[0]: trouble}
        (outcome,) = await source.settle(verdicts(tokens[:1], verdict))
        assert outcome.state is state
        assert outcome.error is not None
        if state is Settled.RETRY:
            assert [o.state for o in await source.settle(verdicts(tokens, verdict))] == [Settled.CONFIRMED] * 3

    with_three(standin, body)


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (StatusCode.UNAVAILABLE, Settled.RETRY),
        (StatusCode.DEADLINE_EXCEEDED, Settled.RETRY),
        (StatusCode.RESOURCE_EXHAUSTED, Settled.RETRY),
        (StatusCode.INTERNAL, Settled.RETRY),
        (StatusCode.ABORTED, Settled.RETRY),
        (StatusCode.PERMISSION_DENIED, Settled.REFUSED),
        (StatusCode.FAILED_PRECONDITION, Settled.REFUSED),
        (StatusCode.UNAUTHENTICATED, Settled.REFUSED),
    ],
)
def test_a_call_that_fails_as_a_whole(standin, code, state):
    async def body(source, tokens):
        standin.failures["Acknowledge"] = [(code, "no")]
        outcomes = await source.settle(verdicts(tokens))
        assert [o.state for o in outcomes] == [state] * 3
        assert all("debug" in str(o.error) for o in outcomes)
        assert [o.state for o in await source.settle(verdicts(tokens))] == [Settled.CONFIRMED] * 3, "nothing was lost by it"

    with_three(standin, body)


def test_a_pull_while_leases_are_extended(standin):
    """It forgets what is over, and nothing else."""

    async def go(opened):
        source = await opened.subscribe(of("orders", "debug"), taking(max_held=3))
        _, tokens = await pulled(source, 3)
        real = standin.modify_ack_deadline

        def slow(asked, context):
            standin.changed.wait(0.2)
            return real(asked, context)

        standin.modify_ack_deadline = slow
        extending = asyncio.ensure_future(source.extend(tokens, 30))
        await asyncio.sleep(0.05)
        with pytest.raises(BrokerError) as caught:
            await source.pull(1, 1, 0)
        assert caught.value.kind is ErrorKind.NO_CREDIT
        deadlines = await extending
        assert [source._pulls.until[token] for token in tokens] == deadlines
        assert min(deadlines) > time.monotonic() + 20

    on(standin.url, go)


def test_extending(standin):
    async def body(source, tokens):
        standin.trouble = {tokens[0]: "PERMANENT_FAILURE_INVALID_ACK_ID"}
        gone, *kept = await source.extend(tokens, 30)
        assert gone is None
        assert None not in kept
        standin.failures["ModifyAckDeadline"] = [(StatusCode.UNAVAILABLE, "no")]
        with pytest.raises(BrokerError) as caught:
            await source.extend(tokens[1:], 30)
        assert caught.value.retryable
        assert None not in await source.extend(tokens[1:], 30)

    with_three(standin, body)
