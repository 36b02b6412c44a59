"""The conformance suites on the broker in memory."""

from __future__ import annotations

import pytest
from inmem_bed import InmemHarness

from broker_nb.testing.suites import suites

pytestmark = pytest.mark.xdist_group("conformance-inmem")


@pytest.fixture(scope="module")
def harness() -> InmemHarness:
    return InmemHarness()


globals().update(suites(InmemHarness))
