"""The conformance suites on the broker in memory with the manners of NATS JetStream."""

from __future__ import annotations

from typing import Any

import pytest
from inmem_bed import InmemHarness, MannerHarness

from broker_nb.backends.driver import Outbound
from broker_nb.backends.inmem.manners import JETSTREAM
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-inmem")


class JetStreamLike(MannerHarness):
    manner = JETSTREAM
    awkward = 23  # as on the real one
    never = {name: why for name, why in InmemHarness.never.items() if name != "explicit_subscriptions"} | {
        "partitions": "a stream is one log",
        "dead_letter": "a rejected message goes nowhere, and is delivered no more",
        "begin": "JetStream has no transactions over messages",
        "Stop.HELD_BACK": "nothing is held back without transactions",
    }

    def make_topic(self, partitions: int, **wishes: Any) -> str:
        topic = super().make_topic(1, **wishes)
        self.broker.publish(topic, [Outbound(b"")])
        self.broker.delete_records(topic, {0: 1})  # a stream counts from 1
        return topic


@pytest.fixture(scope="module")
def harness() -> JetStreamLike:
    return JetStreamLike()


globals().update(suites(JetStreamLike))
