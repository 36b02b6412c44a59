"""What a backend supplies to be tested, and how its capabilities choose the cases.

A backend's own test file is a subclass of `Harness`, a fixture that makes one, and the suites:

    class MyHarness(Harness): ...

    @pytest.fixture(scope="module")
    def harness(my_server_url): return MyHarness(my_server_url)

    globals().update(suites(MyHarness))  # or one by one: class TestTails(Tails, on=MyHarness): ...

with `pytest_plugins = ["broker_nb.testing.plugin"]` in its conftest. A case that a backend cannot pass is not collected; it is reported
as `never` or `notyet` with the reason from `Capabilities`, and a missing reason is a failure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import pytest

from broker_nb.backends import load
from broker_nb.backends.driver import Capabilities, Family
from broker_nb.portable.client import Client

if TYPE_CHECKING:
    from broker_nb.testing.bench import Bench

FAMILIES = {"messages": Family.MESSAGE, "records": Family.RECORD}


class OtherTransaction(Protocol):
    """A transaction of a producer that has nothing to do with the driver under test. Blocking."""

    def send(self, topic: str, bodies: Sequence[bytes]) -> None: ...

    def commit(self) -> None: ...

    def abort(self) -> None: ...


class Missing(NamedTuple):
    """Why a case does not apply. `state` is "never" (the broker cannot) or "notyet"."""

    state: str
    reason: str


class Harness:
    """One real server, seen from outside the driver under test.

    Its methods block and are called on threads of their own. Those that the base class does not implement are optional: a backend
    that leaves one out says why in `never` or `notyet`, under the method's name.
    """

    scheme: ClassVar[str]
    profile: Mapping[str, Any]
    redelivery_s: ClassVar[float] = 5.0
    """Seconds within which a row that was given back comes again."""
    awkward: ClassVar[int] = 30
    """How many of 36 awkward attributes have to pass: 18 texts as names, the same as values."""
    never: ClassVar[Mapping[str, str]] = {}
    notyet: ClassVar[Mapping[str, str]] = {}
    """What there is none of: a hook, a wish of `make_topic`, a state ("Stop.UNPROVEN", "message.SENT"), "look" (without an effect, on
    any topic), "order" (of messages without a key), "numbered" (rows of a partition count up by one), "order_after_nack" (of an
    ordered subscription). Capabilities tell about themselves.
    """

    @classmethod
    def backend(cls) -> str:
        """What the report calls it."""
        return cls.scheme

    @classmethod
    def capabilities(cls) -> Capabilities:
        """What the driver claims."""
        return load(cls.scheme).capabilities

    async def open(self) -> Client:
        """A new connection by the driver under test."""
        return await Client.open(self.scheme, self.profile)

    def make_topic(self, partitions: int, **wishes: Any) -> str:
        """Make a new topic on the server, ready to use; its name.

        A broker without partitions makes one, and says so in `never` under "partitions". Wishes: `ordered` (per key, also for family
        MESSAGE), `ack_deadline` (seconds), `dead_letter` (name of a topic), `max_message_bytes`, `compacted` (may be given to
        `compact`), `look_effects` (looking has some), `unconfirmed` (settlements are only sent, where others are confirmed),
        `subscriptions` (names of those that the case opens, where they have to be there before something is sent).
        """
        raise NotImplementedError

    def native(self, topic: str) -> Mapping[str, Any]:
        """Options for a new subscription, where `ack_deadline` and the like are wishes about it and not about the topic."""
        del topic
        return {}

    def subscription(self, topic: str, name: str) -> str:
        """The subscription to use as `name`: one made with the topic, where a new one would get only what is sent from then on, or the
        only one there is.
        """
        del topic
        return name

    def snapshot(self) -> object:
        """Everything that a look must not change: topics, ends, groups, positions, members, delivery counts."""
        raise NotImplementedError

    # -------------------------------------------------------------- optional
    def begin(self) -> OtherTransaction:
        """Open a transaction."""
        raise NotImplementedError

    def delete_before(self, topic: str, offsets: Mapping[int, int]) -> None:
        """Let rows below the offset of each partition age out."""
        raise NotImplementedError

    def compact(self, topic: str) -> None:
        """Append a row with body b"last" and a key of its own, and leave only the newest row of each key before it."""
        raise NotImplementedError

    def expire(self, topic: str) -> None:
        """Let the leases on a topic that was made with the wish `ack_deadline=1` run out."""
        raise NotImplementedError

    def break_reads(self) -> None:
        """Let every look from now on fail, as if the broker died, until `mend`."""
        raise NotImplementedError

    def mend(self) -> None:
        """End what `break_reads` or `provoke` began. Called after each case."""

    def provoke(self, state: str, topic: str) -> None:
        """Let the next settlement ("message.RETRY"), commit ("record.RETRY"), send ("Sent.UNKNOWN") or read ("Stop.UNPROVEN") end so."""
        raise NotImplementedError

    # -------------------------------------------------------------- choosing
    @classmethod
    def missing(cls, feature: str) -> Missing | None:
        """Why a feature is not there; None when it is.

        A feature is a family ("messages", "records"), a field of Capabilities, a hook of the harness, a wish, or a state.
        """
        able = cls.capabilities()
        told = [(c.never, "never") for c in (able, cls)] + [(c.notyet, "notyet") for c in (able, cls)]
        for reasons, state in told:
            if feature in reasons:
                return Missing(state, reasons[feature])
        if feature in FAMILIES:
            there = FAMILIES[feature] in able.families
        elif feature in Capabilities.__dataclass_fields__:
            there = bool(getattr(able, feature))
        elif hasattr(Harness, feature):
            there = getattr(cls, feature) is not getattr(Harness, feature)
        else:
            there = True
        return None if there else Missing("never", "")


def case(*needs: str, seconds: float = 30.0) -> Callable[[Callable[[Any, Bench], Coroutine[Any, Any, None]]], Any]:
    """Make an async method a case: run on the loop thread within `seconds`, where the backend has what it needs."""

    def decorate(body: Callable[[Any, Bench], Coroutine[Any, Any, None]]) -> Any:
        @functools.wraps(body)
        def run(self: Suite, bench: Bench) -> None:
            bench.run(body(self, bench), seconds)

        run.needs = needs  # type: ignore[attr-defined] # read by Suite
        return pytest.mark.timeout(seconds + 60)(run)

    return decorate


class Suite:
    """Cases on one theme. `class TestX(Some, on=MyHarness)` chooses those that apply to a backend."""

    on: ClassVar[type[Harness]]
    family: ClassVar[Family | None] = None
    """How the suite's subscriptions settle; None: as the backend can."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What every case of the suite needs."""
    missing: ClassVar[dict[str, Missing]]

    def __init_subclass__(cls, on: type[Harness] | None = None) -> None:
        super().__init_subclass__()
        if on is None:
            return
        cls.on, cls.missing = on, {}
        for name in [n for n in dir(cls) if hasattr(getattr(cls, n), "needs") and n.startswith("test_")]:
            family = cls.family.value if cls.family else ""
            gaps = (on.missing(feature.format(family=family)) for feature in (*cls.needs, *getattr(cls, name).needs))
            if (gap := next((gap for gap in gaps if gap is not None), None)) is not None:
                cls.missing[name] = gap
                setattr(cls, name, None)

    def test_what_does_not_apply(self, record_property: Callable[[str, object], None]) -> None:
        """Every case that is left out has its reason."""
        for name, (state, reason) in self.missing.items():
            record_property("conformance", [self.on.backend(), title(type(self)), name, state, reason])
        assert not [name for name, (_, reason) in self.missing.items() if not reason], "say why in Capabilities or in the harness"


def title(suite: type[Suite]) -> str:
    """The shipped suite that a test class took its cases from."""
    return next(c.__name__ for c in suite.__mro__ if "on" not in vars(c) and issubclass(c, Suite))
