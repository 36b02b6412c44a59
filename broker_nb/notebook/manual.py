"""The text of `%broker help`, made from the signatures and docstrings of the functions behind the verbs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from broker_nb.notebook.grammar import usage

_RULES = """\
a range     -100 newest of the topic, -100/p newest of each partition, +100 oldest, 12..40 offsets, @22:10..22:20 times, @-1h..
where       takes the rest of the line as SQL: where value_status = 'failed' and value_id in {{ids}}
{{name}}    your variable: bound in the SQL, the value itself as an option; a frame is named bare: %broker ack held
%%broker    the cell's body is the where, or for publish the message; -o NAME keeps the result
--python    prints the same as Python instead of running it; %broker help VERB shows one verb"""


def overview(verbs: Mapping[str, Callable[..., Any]]) -> str:
    """One line per verb, then the rules of the grammar."""
    lines = [f"%broker {verb:<12}{_doc(function).splitlines()[0]}" for verb, function in verbs.items()]
    return "\n".join([*lines, "", _RULES])


def page(verb: str, function: Callable[..., Any]) -> str:
    """One verb: its line, what the function's own docstring says, and its Python with the defaults."""
    signature = inspect.signature(function)
    bare = [each.replace(annotation=each.empty) for name, each in signature.parameters.items() if name != "self"]
    plain = signature.replace(parameters=bare, return_annotation=signature.empty)
    return f"{usage(verb, signature)}\n\n{_doc(function)}\n\nin Python: {verb}{plain}"


def _doc(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function) or "(not described)"
