"""The conformance suites on the broker in memory with the manners of Azure Service Bus."""

from __future__ import annotations

from typing import Any

import pytest
from inmem_bed import InmemHarness, MannerHarness

from broker_nb.backends.inmem.manners import SERVICEBUS
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-inmem")


class ServiceBusLike(MannerHarness):
    manner = SERVICEBUS
    never = {name: why for name, why in InmemHarness.never.items() if name != "explicit_subscriptions"} | {
        "break_reads": "a broker that dies is the same for every manner: it is on the broker in memory itself",
        "partitions": "how many partitions a partitioned entity has is the service's choice",
        "begin": "transactions of others are never seen before they are over",
        "Stop.HELD_BACK": "transactions of others are never seen before they are over",
        "Sent.DUPLICATE": "duplicate detection drops without telling",
    }

    def make_topic(self, partitions: int, **wishes: Any) -> str:
        return super().make_topic(1, max_deliveries=2000, **wishes)


@pytest.fixture(scope="module")
def harness() -> ServiceBusLike:
    return ServiceBusLike()


globals().update(suites(ServiceBusLike))
del TestIdle  # noqa: F821 - a minute of silence is the same for every manner: it is on the broker in memory itself
