"""`where`: one SQL expression over the columns of a message, run by a DuckDB that can reach nothing else."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from broker_nb.errors import BrokerError, ErrorKind, one_line
from broker_nb.frames.jsontypes import EXACT, JSON_TEXT, unify

MEMORY = "512MB"
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
    "memory_limit": MEMORY,
    "temp_directory": "",
    "threads": "1",  # rows come back in order, and the other cores belong to the read
}
_QUOTED_OR_BOUND = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|\{\{\s*(\w+)\s*\}\}")
_UNKNOWN_COLUMN = re.compile(r'Referenced column "([^"]*)" not found')
_NUMBERS = (pa.int64(), pa.float64())


class Where:
    """A checked expression. True keeps a row; false and unknown (SQL's NULL) drop it, and all three are counted.

    For use by one thread at a time, never the event loop's.

    Parameters
    ----------
    text
        A SQL expression; `{{name}}` is bound to a parameter, never put in as text.
    params
        The parameters; a list works with `in`.
    zone
        The IANA name of the zone of times that name none.

    Raises
    ------
    BrokerError
        INVALID, one line: no or several expressions, a subquery, a window, an aggregate, a parameter without a value.

    Attributes
    ----------
    true, false, unknown
        Rows counted so far.
    clashes
        Column -> values of another type than its first ones; for the expression they were missing.
    """

    def __init__(self, text: str, params: Mapping[str, Any] | None = None, zone: str = "UTC") -> None:
        self.text = text
        self.true = self.false = self.unknown = 0
        self.clashes: Counter[str] = Counter()
        self._types: dict[str, Any] = {}
        self._seen: set[str] = set()
        self._db = duckdb.connect(":memory:", config=_SETTINGS)
        self._sql = f"SELECT (\n{_bind(text)}\n) AS keep FROM batch"  # noqa: S608 - SQL is what a person gives; `_parsed` checks it
        found = self._parsed()
        self._columns = [_column(node["column_names"]) for node in found if node["class"] == "COLUMN_REF"]
        names = {node["identifier"] for node in found if node["class"] == "PARAMETER"}
        if missing := sorted(names - set(params or ())):
            raise _bad(text, f"{{{{{missing[0]}}}}} has no value; pass params={{'{missing[0]}': ...}}")
        self._params = {name: (params or {})[name] for name in names}
        try:
            self._db.execute("SET TimeZone = $zone", {"zone": zone})
        except duckdb.Error:
            raise BrokerError(ErrorKind.INVALID, zone, f"'{zone}' is not a time zone; use a name like Europe/Zagreb") from None
        self._db.execute("SET lock_configuration = true")

    def _parsed(self) -> list[dict[str, Any]]:
        """Every node of the expression, after a check that it is one expression and nothing else."""
        if not self.text.strip():
            raise _bad(self.text, "it is empty")
        try:
            statements = self._db.extract_statements(self._sql)
        except duckdb.Error as error:
            hint = '; offset is a reserved word of SQL, write "offset" in double quotes' if 'near "offset"' in str(error) else ""
            raise _bad(self.text, _said(error) + hint) from None
        (parsed,) = self._db.execute("SELECT json_serialize_sql($s::VARCHAR)", {"s": self._sql}).fetchall()[0]
        tree: dict[str, Any] = json.loads(parsed)
        node: dict[str, Any] = {"type": "none"}
        if len(statements) == 1 and not tree["error"]:
            node = tree["statements"][0]["node"]
        found = list(_nodes(node.get("select_list", [])))
        plain = node["type"] == "SELECT_NODE" and len(node["select_list"]) == 1 and not node["modifiers"]
        if not plain or node["from_table"]["type"] != "BASE_TABLE":
            raise _bad(self.text, "write one condition")
        if odd := {n["class"] for n in found} & {"SUBQUERY", "WINDOW", "STAR"}:
            raise _bad(self.text, f"it looks at one message at a time, so no {', '.join(sorted(odd)).lower()}")
        return found

    @property
    def never(self) -> list[str]:
        """Fields that the expression names and no message had."""
        return [c for c in dict.fromkeys(self._columns) if c.lower().startswith("value_") and c.lower() not in self._seen]

    def check(self, columns: Mapping[str, Any]) -> None:
        """Find out before the read what can be found out: columns that do not exist, aggregates. Fields may come later."""
        try:
            self._run({name: pa.nulls(0, kind) for name, kind in columns.items()}, 0, open_fields=True)
        except BrokerError:
            if not self.never:
                raise

    def matches(self, columns: Mapping[str, Any], rows: int, *, open_fields: bool = True) -> Any:
        """Which of the rows are kept: an Arrow boolean without nulls.

        Parameters
        ----------
        columns
            Name -> Arrow column; None for one that these rows lack, though others have it.
        open_fields
            A `value_` column that is not there is a field that no message had so far, and not an error.
        """
        keep = self._run(columns, rows, open_fields=open_fields)
        self.true += (true := pc.sum(keep).as_py() or 0)
        self.unknown += keep.null_count
        self.false += rows - true - keep.null_count
        return keep.fill_null(False)

    def select(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The rows of a frame that match."""
        keep = self.matches({str(name): frame[name] for name in frame.columns}, len(frame), open_fields=False)
        kept: pd.DataFrame = frame.loc[keep.to_numpy(zero_copy_only=False)]
        return kept

    def _run(self, columns: Mapping[str, Any], rows: int, *, open_fields: bool) -> Any:
        spelled = defaultdict(list)
        for name in columns:
            spelled[name.lower()].append(name)
        given: dict[str, Any] = {"rows of the batch": pa.nulls(rows)}
        for asked in dict.fromkeys(self._columns):
            names = spelled[asked.lower()]
            if len(names) > 1:
                raise _bad(self.text, f"{' and '.join(names)} differ by case only, which SQL cannot tell apart; rename one first")
            if names:
                given[names[0]] = self._conformed(names[0], columns[names[0]], rows)
            elif open_fields and asked.lower().startswith("value_"):
                given[asked] = self._conformed(asked, None, rows)
        keep = self._ask(pa.table(given), columns)
        if len(keep) != rows:
            raise _bad(self.text, "it looks at one message at a time, so no aggregate and no unnest")
        if pa.types.is_null(keep.type):
            return pa.nulls(rows, pa.bool_())
        if keep.type != pa.bool_():
            raise _bad(self.text, f"it must be true or false, not {keep.type}; compare it with something")
        return keep

    def _ask(self, batch: Any, columns: Mapping[str, Any]) -> Any:
        self._db.register("batch", batch)
        try:
            return self._db.sql(self._sql, params=self._params or None).to_arrow_table().column("keep").combine_chunks()
        except duckdb.ConversionException as error:
            raise _bad(self.text, f"{_said(error)}; try_cast gives unknown instead") from None
        except duckdb.OutOfMemoryException:
            raise _bad(self.text, f"it takes more than {MEMORY} of memory") from None
        except duckdb.Error as error:
            if unknown := _UNKNOWN_COLUMN.search(str(error)):
                near = difflib.get_close_matches(unknown[1], columns, n=3, cutoff=0.4)
                there = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(columns)}"
                raise _bad(self.text, f"there is no column {unknown[1]}; {there}") from None
            raise _bad(self.text, _said(error)) from None
        finally:
            self._db.unregister("batch")

    def _conformed(self, name: str, column: Any, rows: int) -> Any:
        """The column in the type that it had first, so that the expression means the same from the first row to the last."""
        known = self._types.get(name.lower(), pa.null())
        if isinstance(column, pd.Series):
            column = pa.array(column, from_pandas=True)
        if column is None or pa.types.is_null(column.type):
            return pa.nulls(rows, known)
        self._seen.add(name.lower())
        if column.type == JSON_TEXT:
            column = self._majority(name, column, known)
        both = unify(known, column.type)
        if both == JSON_TEXT:
            self.clashes[name] += rows - column.null_count
            return pa.nulls(rows, known)
        self._types[name.lower()] = both
        # Of numbers each batch keeps its own kind: they compare alike, and int64 must not become float.
        return column if column.type in _NUMBERS or column.type == both else column.cast(both)

    def _majority(self, name: str, column: Any, known: Any) -> Any:
        """A field of several types as the most frequent one, or as the one known already; the others are missing."""
        values = [None if text is None else json.loads(text) for text in column.storage.to_pylist()]
        kinds = Counter(_kind(value) for value in values if value is not None)
        kind = kinds.most_common(1)[0][0] if pa.types.is_null(known) else known
        if kind is None:  # objects and lists: compared as JSON text
            return column.storage
        kept = [value if _kind(value) == kind else None for value in values]
        self.clashes[name] += kept.count(None) - values.count(None)
        if kind in _NUMBERS:
            kind = pa.float64() if any(isinstance(value, float) for value in kept) else pa.int64()
        return pa.array(kept, kind)


def _kind(value: Any) -> Any:
    """The Arrow type that stands for a JSON value in comparisons; None where there is none."""
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int | float):
        return pa.float64() if abs(value) < EXACT else None
    return pa.string() if isinstance(value, str) else None


def _bind(text: str) -> str:
    """`{{name}}` as `$name`, outside of quotes."""

    def replace(match: re.Match[str]) -> str:
        if match[1]:
            return f"${match[1]}"
        if re.search(r"\{\{\s*\w+\s*\}\}", match[0]):
            raise _bad(text, f"{match[0]} is plain text; leave the quotes out, {{{{name}}}} is bound as a value")
        return match[0]

    return _QUOTED_OR_BOUND.sub(replace, text)


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        if "class" in tree:
            yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for part in tree:
            yield from _nodes(part)


def _column(path: list[str]) -> str:
    return path[1] if len(path) > 1 and path[0] == "batch" else path[0]


def _said(error: duckdb.Error) -> str:
    """The first line of what DuckDB says, without its own name for the kind of error."""
    return one_line(str(error).split("\n", 1)[0].partition("Error: ")[2] or str(error), 200)


def _bad(text: str, why: str) -> BrokerError:
    return BrokerError(ErrorKind.INVALID, "where", f"where {one_line(text, 120)}: {why}")
