"""Render the documentation that comes from the code into build/docs: `make docs`."""

from __future__ import annotations

import dataclasses
import enum
import pathlib

from broker_nb import backends
from broker_nb.backends.driver import Capabilities
from broker_nb.errors import BrokerError

TARGET = pathlib.Path(__file__).parent.parent / "build" / "docs"


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
            return "<br>".join(f"{name}: {reason}" for name, reason in value.items()).replace("|", "\\|")
    return str(value)


def capabilities() -> str:
    """What each installed backend can do at best, as a Markdown table with a column per scheme."""
    columns = {}
    for scheme in backends.schemes():
        try:
            columns[scheme] = backends.load(scheme).capabilities
        except BrokerError as error:  # its client is not installed here
            print(f"left out: {error}")
    lines = ["# What each backend can do at best", "", f"| | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for field in dataclasses.fields(Capabilities):
        values = " | ".join(cell(getattr(each, field.name)) for each in columns.values())
        lines.append(f"| {field.name} | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write every page and say where."""
    TARGET.mkdir(parents=True, exist_ok=True)
    page = TARGET / "capabilities.md"
    page.write_text(capabilities(), "utf-8")
    print(page)


if __name__ == "__main__":
    main()
