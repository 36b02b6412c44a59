"""Render the documentation that comes from the code into build/docs: `make docs`."""

from __future__ import annotations

import collections
import dataclasses
import enum
import json
import pathlib

from broker_nb import backends
from broker_nb.backends.driver import Capabilities
from broker_nb.errors import BrokerError

BUILD = pathlib.Path(__file__).parent.parent / "build"
TARGET = BUILD / "docs"
RESULTS = BUILD / "conformance.json"  # of the last `make test`


def cell(value: object) -> str:
    """`value` as a cell of a Markdown table."""
    match value:
        case bool():
            return "yes" if value else "no"
        case enum.Enum():
            return str(value.value)
        case type():
            return value.__name__
        case frozenset():
            return ", ".join(sorted(map(cell, value))) or "none"
        case dict():
            return "<br>".join(f"{name}: {reason}" for name, reason in value.items())
    return str(value)


def capabilities() -> str:
    """What each installed backend can do at best, as a Markdown table with a column per scheme."""
    columns = {}
    for scheme in backends.schemes():
        try:
            columns[scheme] = backends.load(scheme).capabilities
        except BrokerError as error:  # its client is not installed here
            print(f"left out: {error}")
    rows = [
        [field.name, *(cell(getattr(each, field.name)) for each in columns.values())]
        for field in dataclasses.fields(Capabilities)
    ]
    return table("What each backend can do at best", ["", *columns], rows)


def conformance() -> str:
    """How many cases of each conformance suite passed on each backend, and which were not asked of it, with the reason."""
    results = json.loads(RESULTS.read_text("utf-8"))
    rows, reasons = [], []
    for suite in sorted({suite for suites in results.values() for suite in suites}):
        row = [suite]
        for backend, suites in results.items():
            cases = suites.get(suite, {})
            counts = collections.Counter(case["state"] for case in cases.values())
            row.append(", ".join(f"{count} {state}" for state, count in counts.items()))
            reasons += [[backend, f"{suite}: {name}", c["state"], c["says"]] for name, c in cases.items() if c["state"] != "pass"]
        rows.append(row)
    passed = table("Conformance cases passed", ["suite", *results], rows)
    return passed + "\n" + table("The others", ["backend", "case", "state", "why"], reasons)


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """A titled Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return f"# {title}\n\n" + "".join(f"| {' | '.join(each.replace('|', '/') for each in line)} |\n" for line in lines)


def main() -> None:
    """Write every page and say where."""
    TARGET.mkdir(parents=True, exist_ok=True)
    pages = {"capabilities.md": capabilities}
    if RESULTS.exists():
        pages["conformance.md"] = conformance
    else:
        print("left out: the conformance table; `make test` makes its results")
    for name, render in pages.items():
        (TARGET / name).write_text(render(), "utf-8")
        print(TARGET / name)


if __name__ == "__main__":
    main()
