"""The conformance suites on the broker in memory with the manners of Apache Pulsar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from inmem_bed import InmemHarness, MannerHarness

from broker_nb.backends.inmem.manners import PULSAR
from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-inmem")


class PulsarLike(MannerHarness):
    manner = PULSAR
    never = {name: why for name, why in InmemHarness.never.items() if name not in ("message.SENT", "record.SENT")} | {
        "break_reads": "a broker that dies is the same for every manner: it is on the broker in memory itself",
        "begin": "the client has no transactions",
        "expire": "a message is held as long as its consumer lives",
        "record.CONFIRMED": "the client offers no receipt of an ack",
        "record.REFUSED": "a broker stores any position; the handle punishes one beyond what was read",
        "message.CONFIRMED": "the client offers no receipt of an ack",
        "Stop.HELD_BACK": "the client has no transactions",
    }

    def native(self, topic: str) -> Mapping[str, Any]:
        return {"negative_ack_redelivery_delay_ms": 50}


@pytest.fixture(scope="module")
def harness() -> PulsarLike:
    return PulsarLike()


globals().update(suites(PulsarLike))
del TestIdle  # noqa: F821 - a minute of silence is the same for every manner: it is on the broker in memory itself
