"""The conformance suites on the broker in memory with the manners of Google Pub/Sub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from inmem_bed import MannerHarness

from broker_nb.backends.inmem.manners import PUBSUB
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-inmem")


class PubsubLike(MannerHarness):
    manner = PUBSUB
    never = {  # noqa: RUF012 - never changed
        "break_reads": "a broker that dies is the same for every manner: it is on the broker in memory itself",
        "partitions": "a topic has none",
        "begin": "the broker has no transactions",
        "dead_letter": "no call for it: a dead-letter policy takes what was nacked too often",
        "Stop.DRY": "the service does not tell that there is nothing more",
        "Stop.HELD_BACK": "the broker has no transactions",
        "Stop.AGED_OUT": "the service does not tell what is no longer there",
        "Sent.DUPLICATE": "the service keeps no ids of what was sent",
    }

    def __init__(self) -> None:
        super().__init__()
        self.unconfirmed: set[str] = set()

    def make_topic(self, partitions: int, *, unconfirmed: bool = False, look_effects: bool = False, **wishes: Any) -> str:
        topic = super().make_topic(1, **wishes)
        if unconfirmed:
            self.unconfirmed.add(topic)
        return topic

    def native(self, topic: str) -> Mapping[str, Any]:
        return {"enable_exactly_once_delivery": topic not in self.unconfirmed}

    def provoke(self, state: str, topic: str) -> None:
        if state != "Stop.UNPROVEN":  # which is how every look ends
            super().provoke(state, topic)


@pytest.fixture(scope="module")
def harness() -> PubsubLike:
    return PubsubLike()


globals().update(suites(PubsubLike))
del TestIdle  # noqa: F821 - a minute of silence is the same for every manner: it is on the broker in memory itself
