"""The conformance suites on the broker in memory with the manners of a Kafka share group."""

from __future__ import annotations

from typing import Any

import pytest
from inmem_bed import InmemHarness, MannerHarness

from broker_nb.backends.inmem.manners import SHARE
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-inmem")


class ShareLike(MannerHarness):
    manner = SHARE
    never = InmemHarness.never | {
        "break_reads": "a broker that dies is the same for every manner: it is on the broker in memory itself",
        "ordered": "a share group hands out records of a key side by side",
        "dead_letter": "a rejected record is archived, and goes nowhere",
        "Sent.DUPLICATE": "an idempotent producer drops duplicates without telling",
    }

    def make_topic(self, partitions: int, **wishes: Any) -> str:
        return super().make_topic(partitions, max_deliveries=20, **wishes)  # a case gives rows back often


@pytest.fixture(scope="module")
def harness() -> ShareLike:
    return ShareLike()


globals().update(suites(ShareLike))
del TestIdle  # noqa: F821 - a minute of silence is the same for every manner: it is on the broker in memory itself
