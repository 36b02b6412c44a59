"""Write the documentation that comes from the code and from the last `make test`: `make docs`. What it writes is committed."""

from __future__ import annotations

import collections
import dataclasses
import enum
import importlib.metadata
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from broker_nb import backends
from broker_nb.backends.driver import Capabilities
from broker_nb.errors import BrokerError
from broker_nb.testing.harness import Harness, Missing
from broker_nb.testing.servers.cache import locked
from broker_nb.testing.suites import ALL

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "build" / "conformance.json"  # of the last `make test`
MARKS = "<!-- made by `make docs` -->\n", "<!-- end of what `make docs` made -->\n"
NAMES = {
    "inmem": "embedded (`demo`, `inmem://`)",
    "kafka": "Kafka",
    "nats": "NATS JetStream",
    "pubsub": "Google Pub/Sub",
    "servicebus": "Azure Service Bus",
    "pulsar": "Apache Pulsar",
}
STATES = {"pass": "pass", "notyet": "not yet", "never": "never", "fail": "FAILED"}
WORDS = {
    "families": "taken as",
    "slice_s": "longest wait of one call, in seconds",
    "concurrent_settle": "settling while a pull waits",
    "settle_before_pull": "rows must be settled before the next pull",
    "confirmed_settle": "settlements are confirmed",
    "release_delay": "`nack` with a delay per row",
    "reject": "`reject`",
    "implicit_subscriptions": "a subscription comes by being used",
    "keys": "keys",
    "binary_keys": "keys of any bytes",
    "null_key_is_not_empty": "null and empty key apart",
    "null_data": "null and empty body apart",
    "attribute_types": "types of attribute values",
    "null_attributes": "null attribute values",
    "repeated_attributes": "repeated attribute names",
    "transactions": "transactions",
    "look": "looks without any effect",
    "order": "order of messages without a key",
    "numbered": "one number for a row's place",
    "aged_out": "rows that go during a look are noticed",
    "messages": "messages settled one by one",
    "records": "a group's position in a log",
}
Results: TypeAlias = dict[str, dict[str, dict[str, dict[str, str]]]]


class Unproven(Exception):
    """The last conformance run does not show what a page would say."""


# ------------------------------------------------------------------ what there is
def drivers() -> dict[str, Capabilities]:
    """Scheme -> capabilities, of this package's backends."""
    found = {}
    for scheme in backends.schemes():
        try:
            driver = backends.load(scheme)
        except BrokerError as error:
            raise SystemExit(f"the pages need every client: {error}") from error
        if scheme != "demo" and driver.__module__.startswith("broker_nb."):  # that is inmem with something in it
            found[scheme] = driver.capabilities
    return found


def missing(scheme: str, *features: str) -> Missing | None:
    """The first of `features` that a backend lacks, as the conformance suite sees it."""
    harness = type("Harness", (Harness,), {"scheme": scheme})
    return next((gap for gap in map(harness.missing, features) if gap), None)


# ------------------------------------------------------------------ the README's table
class Row(NamedTuple):
    """What a person asks of a broker, the features that it takes, and the conformance cases that prove it."""

    asks: str
    needs: tuple[str, ...]
    proofs: tuple[str, ...]
    detail: Callable[[Capabilities], Iterable[str]] = lambda _: ()


def _keys(able: Capabilities) -> Iterable[str]:
    yield "any bytes" if able.binary_keys else "text"
    if able.null_key_is_not_empty:
        yield "null and empty apart"


def _headers(able: Capabilities) -> Iterable[str]:
    yield f"values of {cell(able.attribute_types)}"
    yield from (
        word for word, there in (("null values", able.null_attributes), ("repeated names", able.repeated_attributes)) if there
    )


ROWS = (
    Row(
        "`topics`, `sample`: look without any effect",
        ("look",),
        ("Looking nothing_changes", "Looking a_missing_topic_is_not_made"),
    ),
    Row("newest / oldest N, times, `where` in SQL", ("look",), ("Tails times",)),
    Row("ranges of offsets: `12..40`", ("look", "numbered"), ("Tails a_range_inside_a_batch",)),
    Row(
        "a look proves that it is complete, or says why not",
        ("look", "proven_end", "aged_out"),
        ("Tails the_end_is_fixed_at_the_start", "Tails a_dying_broker", "Tails rows_that_aged_out", "Tails stopped_early"),
    ),
    Row(
        "`consume` + `ack` / `nack` / `release`: messages settled one by one",
        ("messages",),
        ("Messages first_settlement_wins", "Messages two_nacked_come_again", "Messages what_was_not_acked_comes_again"),
    ),
    Row("what you hold stays yours while you think", ("messages",), ("Messages the_lease_is_kept_meanwhile",)),
    Row("`nack` with a delay", ("messages", "release_delay"), ("Messages a_delayed_nack",)),
    Row("`reject`: never to come again", ("messages", "reject"), ("Messages rejected_comes_no_more",)),
    Row("`consume` + `commit`: a group's position in a log", ("records",), ("Records what_was_not_acked_comes_again",)),
    Row("`publish` a frame, a result per row, order per key", (), ("Publishing twelve_sends_at_once", "Ends refused")),
    Row("keys", ("keys",), ("Publishing what_the_broker_can_tell_apart",), _keys),
    Row("null and empty bodies apart", ("null_data",), ("Publishing what_the_broker_can_tell_apart",)),
    Row("headers", (), ("Publishing attribute_types", "Publishing awkward_attributes"), _headers),
    Row("transactions in Python", ("transactions",), ()),
)


def readme() -> str:
    """What works where, with the reasons below."""
    reasons: list[str] = []

    def answer(row: Row, scheme: str, able: Capabilities) -> str:
        gap = missing(scheme, *row.needs)
        if gap is None:
            return ": ".join(["yes", *filter(None, ["; ".join(row.detail(able))])])
        said = "no" if gap.state == "never" else "not yet"
        if not gap.reason:
            return said
        if gap.reason not in reasons:
            reasons.append(gap.reason)
        return f"{said} ({reasons.index(gap.reason) + 1})"

    known = drivers()
    rows = [[row.asks, *(answer(row, *each) for each in known.items())] for row in ROWS]
    notes = "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))
    return f"{table(['', *(NAMES.get(scheme, scheme) for scheme in known)], rows)}\n{notes}"


def prove(results: Results) -> None:
    """Raise `Unproven` where the README says yes and the conformance run does not show it."""
    for scheme in drivers():
        for row in ROWS:
            if missing(scheme, *row.needs) is None:
                for suite, name in (proof.split() for proof in row.proofs):
                    state = results.get(scheme, {}).get(suite, {}).get(f"test_{name}", {}).get("state", "not run")
                    if state != "pass":
                        raise Unproven(f"README: {scheme}: {row.asks}: {suite} {name}: {state}")


def between(text: str) -> tuple[str, str, str]:
    """What is before, between and after the marks."""
    before, begin, rest = text.partition(MARKS[0])
    made, end, after = rest.partition(MARKS[1])
    return before + begin, made, end + after


# ------------------------------------------------------------------ pages
def capabilities() -> str:
    """What each backend can do at best."""
    known = drivers()
    shown = [field.name for field in dataclasses.fields(Capabilities) if field.name in WORDS]
    rows = [[WORDS[name], *(cell(getattr(able, name)) for able in known.values())] for name in shown]
    gaps = [
        [NAMES.get(scheme, scheme), WORDS.get(feature, feature), STATES[state], reason]
        for scheme, able in known.items()
        for state in ("notyet", "never")
        for feature, reason in getattr(able, state).items()
    ]
    since = [[NAMES.get(scheme, scheme), *each] for scheme, able in known.items() for each in able.server_min.items()]
    return (
        "# What each backend can do at best\n\nThe constants of each driver (`Capabilities` in `broker_nb/backends/driver.py`), on its best "
        "server. What one topic or\nsubscription can do is asked of the connected server, and what you are told comes from there.\n\n"
        + table(["", *(NAMES.get(scheme, scheme) for scheme in known)], rows)
        + "\n## What is missing, and why\n\n"
        + table(["backend", "what", "when", "why"], gaps)
        + "\n## What needs a newer server\n\nOn an older one it is done in another way, or refused by name.\n\n"
        + table(["backend", "what", "since"], since)
    )


def conformance(results: Results) -> str:
    """Which cases of the conformance suites pass on which backend, and why others are not asked of it."""
    suites = [(suite, summary(suite.__doc__)) for suite in ALL if any(suite.__name__ in each for each in results.values())]
    counts = [
        [suite.__name__, says, *(count(each.get(suite.__name__, {})) for each in results.values())] for suite, says in suites
    ]
    parts = [
        f"# Conformance\n\n{of_what()}\n\nCases passed, of those that are asked of a backend; its capabilities choose them.\n",
        table(["suite", "about", *results], counts),
        "\n## Not asked of a backend, and why\n",
        table(["suite", "case", "backend", "when", "why"], list(others(results, [suite.__name__ for suite, _ in suites]))),
        "\n## The cases\n",
        *(f"\n### {suite.__name__}\n{says}\n\n{cases(suite.__name__, results)}" for suite, says in suites),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def of_what() -> str:
    """Which code was run, and against what."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    code = ("--", "broker_nb", "tests")
    changed = ", with changes that were not committed" if git("status", "--porcelain", *code) else ""
    if int(git("log", "-1", "--format=%ct", *code)) > RESULTS.stat().st_mtime:
        raise Unproven(f"{RESULTS.relative_to(ROOT)} is older than the code: run `make test` first")
    modules = (ROOT / "broker_nb" / "testing" / "servers" / "pubsub" / "go.mod").read_text("utf-8")
    pstest = modules.partition("go/pubsub/v2 v")[2].split()[0]
    against = [
        f"Apache Kafka {locked('kafka')['version']} with confluent-kafka {importlib.metadata.version('confluent-kafka')}",
        f"nats-server {locked('nats')['go'].partition('@v')[2]} with nats-py {importlib.metadata.version('nats-py')}",
        f"Apache Pulsar {locked('pulsar')['version']} with pulsar-client {importlib.metadata.version('pulsar-client')}",
        f"Google's pstest {pstest} with google-cloud-pubsub {importlib.metadata.version('google-cloud-pubsub')}",
        f"our stand-in for Service Bus with azure-servicebus {importlib.metadata.version('azure-servicebus')}",
    ]
    servers = ",\n".join(against)
    return f"From a run of these suites at {git('log', '-1', '--format=%h of %cs', *code)}{changed}, against\n{servers}."


def count(cases: Mapping[str, Mapping[str, str]]) -> str:
    """How many of the cases that were asked of a backend passed."""
    states = collections.Counter(case["state"] for case in cases.values())
    asked = states["pass"] + states["fail"]
    left_out = ", ".join(f"{states[state]} {STATES[state]}" for state in ("notyet", "never") if states[state])
    return "; ".join(filter(None, [f"{states['pass']} of {asked}" if asked else "", left_out])) or "not run"


def others(results: Results, suites: Iterable[str]) -> Iterable[list[str]]:
    """A row per case that did not pass and reason; one for a whole suite that is left out for one reason."""
    for suite in suites:
        backends_of: dict[tuple[str, str, str], list[str]] = {}  # (case, state, reason)
        for backend, each in results.items():
            found = {name: (STATES[c["state"]], c["says"]) for name, c in each.get(suite, {}).items() if c["state"] != "pass"}
            if len(found) == len(each.get(suite, {})) > 1 and len({*found.values()}) == 1:
                found = {"all": found.popitem()[1]}
            for name, why in found.items():
                backends_of.setdefault((plain(name), *why), []).append(backend)
        yield from ([suite, name, ", ".join(those), *why] for (name, *why), those in sorted(backends_of.items()))


def cases(suite: str, results: Results) -> str:
    """A row per case of one suite: what it shows, and its state on every backend."""
    names = sorted({name for each in results.values() for name in each.get(suite, {})})
    states = [[each.get(suite, {}).get(name, {}).get("state", "") for each in results.values()] for name in names]
    says = {name: summary(getattr(next(s for s in ALL if s.__name__ == suite), name).__doc__) for name in names}
    rows = [
        [f"{plain(name)}: {says[name]}", *(STATES.get(state, "not run") for state in of)]
        for name, of in zip(names, states, strict=True)
    ]
    return table(["case", *results], rows)


# ------------------------------------------------------------------ text
def plain(name: str) -> str:
    """The name of a case in words."""
    return name.removeprefix("test_").replace("_", " ")


def summary(doc: str | None) -> str:
    """The first line of a docstring."""
    return (doc or "").strip().partition("\n")[0]


def cell(value: object) -> str:
    """`value` as a cell of a Markdown table."""
    match value:
        case bool():
            return "yes" if value else "no"
        case enum.Enum():
            return str(value.value)
        case type():
            return {"str": "text", "UUID": "uuid"}.get(value.__name__, value.__name__)
        case frozenset():
            return ", ".join(sorted(map(cell, value))) or "none"
    return str(value)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(each.replace('|', '/') for each in line)} |\n" for line in lines)


def main() -> None:
    """Write every page; the exit status is 1 when the last conformance run does not show what they say."""
    (ROOT / "docs" / "capabilities.md").write_text(capabilities(), "utf-8")
    before, _, after = between((ROOT / "README.md").read_text("utf-8"))
    (ROOT / "README.md").write_text(before + readme() + after, "utf-8")
    try:
        if not RESULTS.exists():
            raise Unproven(f"there is no {RESULTS.relative_to(ROOT)}: run `make test` first")
        results: dict[str, Any] = json.loads(RESULTS.read_text("utf-8"))
        (ROOT / "docs" / "conformance.md").write_text(conformance(results), "utf-8")
        prove(results)
    except Unproven as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
