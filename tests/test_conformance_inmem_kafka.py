"""The conformance suites on the broker in memory with the manners of Kafka."""

from __future__ import annotations

import pytest
from inmem_bed import InmemHarness, MannerHarness

from broker_nb.backends.inmem.manners import KAFKA
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-inmem")


class KafkaLike(MannerHarness):
    manner = KAFKA
    never = InmemHarness.never | {
        "Sent.DUPLICATE": "an idempotent producer drops duplicates without telling",
        "record.REFUSED": "a broker stores any position; the handle punishes one beyond what was read",
    }


@pytest.fixture(scope="module")
def harness() -> KafkaLike:
    return KafkaLike()


globals().update(suites(KafkaLike))
