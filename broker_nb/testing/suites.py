"""Every conformance suite, for a backend's test module: `globals().update(suites(MyHarness))`."""

from __future__ import annotations

from broker_nb.testing.contract import Contract
from broker_nb.testing.delivery import Idle
from broker_nb.testing.groups import Records
from broker_nb.testing.harness import Harness, Suite
from broker_nb.testing.looking import Looking
from broker_nb.testing.publishing import Publishing
from broker_nb.testing.settling import Messages
from broker_nb.testing.states import Ends, MessageStates, RecordStates
from broker_nb.testing.tails import Tails

ALL: tuple[type[Suite], ...] = (
    Messages,
    Records,
    Publishing,
    Tails,
    Looking,
    Contract,
    Ends,
    MessageStates,
    RecordStates,
    Idle,
)


def suites(on: type[Harness]) -> dict[str, type[Suite]]:
    """A test class per suite, with the cases that apply to a backend; the slow one comes last."""
    return {
        f"Test{suite.__name__}": type(f"Test{suite.__name__}", (suite,), {"__module__": on.__module__}, on=on) for suite in ALL
    }
