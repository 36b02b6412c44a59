"""Rules of a subscription: SQL and correlation filters, and actions.

Of the SQL: AND OR NOT, comparisons, IN, LIKE ... ESCAPE, IS [NOT] NULL, EXISTS(name), + - * / %, parentheses, @parameters; SET and
REMOVE as actions. Null makes a comparison unknown, and only true lets a message through.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from broker_nb.testing.servers.servicebus.amqp import Parts

SYSTEM = {"messageid": 0, "to": 2, "label": 3, "subject": 3, "replyto": 4, "correlationid": 5, "contenttype": 6}
SYSTEM |= {"sessionid": 10, "replytosessionid": 12}
Value: TypeAlias = Callable[[Parts], Any]

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)|(?P<text>'(?:[^']|'')*')|(?P<quoted>\[(?:[^\]]|\]\])*\]|"(?:[^"]|"")*")"""
    r"""|(?P<word>@?[A-Za-z_][\w.$-]*)|(?P<sign><>|!=|<=|>=|[=<>+\-*/%(),;]))"""
)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "<>": operator.ne,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "%": operator.mod,
}


class BadRule(ValueError):
    """A filter or an action that cannot be understood."""


class Rule:
    """A named filter, with an action or without; `sql` or `correlation` is given."""

    def __init__(
        self,
        name: str,
        sql: str | None = None,
        correlation: Mapping[str, Any] | None = None,
        action: str | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.sql, self.correlation, self.action = name, sql, correlation, action
        self.parameters = dict(parameters or {})
        self._filter = _Parser(sql, self.parameters).condition() if sql is not None else _correlation(correlation or {})
        self._steps = _Parser(action, {}).steps() if action else []

    def matches(self, parts: Parts) -> bool:
        """Whether the filter lets a message through."""
        try:
            return self._filter(parts) is True
        except (TypeError, ZeroDivisionError):  # values that cannot be compared
            return False

    def applied(self, parts: Parts) -> Parts:
        """The message as the action leaves it."""
        for step in self._steps:
            step(parts)
        return parts


def _read(parts: Parts, name: str) -> Any:
    scope, dot, rest = name.partition(".")
    if dot and scope.lower() == "sys":
        return parts.field(SYSTEM[rest.lower()]) if rest.lower() in SYSTEM else None
    return parts.application.get(rest if dot and scope.lower() == "user" else name)


def _correlation(wanted: Mapping[str, Any]) -> Value:
    """Every named property equals; names of the system's properties, and `properties` for the application's."""
    system = {k.replace("-", "").replace("_", "").lower(): v for k, v in wanted.items() if k != "properties"}
    own = dict(wanted.get("properties") or {})

    def matches(parts: Parts) -> bool:
        return all(parts.field(SYSTEM[k]) == v for k, v in system.items()) and all(
            k in parts.application and parts.application[k] == v for k, v in own.items()
        )

    if unknown := set(system) - set(SYSTEM):
        raise BadRule(f"a correlation filter has no {sorted(unknown)[0]}")
    return matches


class _Parser:
    """Recursive descent; each method makes the function that computes what it parsed."""

    def __init__(self, text: str, parameters: Mapping[str, Any]) -> None:
        self._text, self._parameters = text, parameters
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while text[at:].strip():
            found = _TOKEN.match(text, at)
            if found is None or found.lastgroup is None:
                raise BadRule(f"not understood: {text[at : at + 20]!r}")
            self._tokens.append((found.lastgroup, found[found.lastgroup]))
            at = found.end()
        self._at = 0

    def condition(self) -> Value:
        """A whole filter."""
        made = self._any()
        if self._at < len(self._tokens):
            raise BadRule(f"not understood: {self._tokens[self._at][1]!r} in {self._text!r}")
        return made

    def steps(self) -> list[Callable[[Parts], None]]:
        """A whole action."""
        made: list[Callable[[Parts], None]] = []
        while self._at < len(self._tokens):
            if self._word("set"):
                name = self._name()
                self._expect("=")
                made.append(_setter(name, self._sum()))
            elif self._word("remove"):
                made.append(_remover(self._name()))
            elif not self._sign(";"):
                raise BadRule(f"not understood: {self._tokens[self._at][1]!r} in {self._text!r}")
        return made

    # -------------------------------------------------------------- tokens
    def _word(self, word: str) -> bool:
        there = self._at < len(self._tokens) and self._tokens[self._at][0] == "word" and self._tokens[self._at][1].lower() == word
        self._at += there
        return there

    def _sign(self, *signs: str) -> str:
        if self._at < len(self._tokens) and self._tokens[self._at][0] == "sign" and self._tokens[self._at][1] in signs:
            self._at += 1
            return self._tokens[self._at - 1][1]
        return ""

    def _expect(self, sign: str) -> None:
        if not self._sign(sign):
            raise BadRule(f"{sign!r} is missing in {self._text!r}")

    def _name(self) -> str:
        kind, text = self._tokens[self._at] if self._at < len(self._tokens) else ("", "")
        self._at += 1
        if kind == "quoted":
            return text[1:-1].replace(text[-1] * 2, text[-1])
        if kind != "word":
            raise BadRule(f"a name is missing in {self._text!r}")
        return text

    # -------------------------------------------------------------- conditions
    def _any(self) -> Value:
        made = self._all()
        while self._word("or"):
            made = _or(made, self._all())
        return made

    def _all(self) -> Value:
        made = self._not()
        while self._word("and"):
            made = _and(made, self._not())
        return made

    def _not(self) -> Value:
        if self._word("not"):
            made = self._not()
            return lambda parts: None if (value := made(parts)) is None else not value
        return self._comparison()

    def _comparison(self) -> Value:
        if self._word("exists"):
            self._expect("(")
            name = self._name()
            self._expect(")")
            return lambda parts: _read(parts, name) is not None
        left = self._sum()
        if sign := self._sign(*_COMPARE):
            return _both(_COMPARE[sign], left, self._sum())
        if self._word("is"):
            wanted = not self._word("not")
            if not self._word("null"):
                raise BadRule(f"NULL is missing in {self._text!r}")
            return lambda parts: (left(parts) is None) is wanted
        negated = self._word("not")
        made = left
        if self._word("in"):
            made = self._in(left)
        elif self._word("like"):
            made = self._like(left)
        elif negated:
            raise BadRule(f"IN or LIKE is missing in {self._text!r}")
        return (lambda parts: None if (value := made(parts)) is None else not value) if negated else made

    def _in(self, left: Value) -> Value:
        self._expect("(")
        options = [self._sum()]
        while self._sign(","):
            options.append(self._sum())
        self._expect(")")
        return lambda parts: None if (value := left(parts)) is None else value in [option(parts) for option in options]

    def _like(self, left: Value) -> Value:
        pattern = self._sum()
        escape = self._sum() if self._word("escape") else None

        def like(parts: Parts) -> bool | None:
            value, wanted = left(parts), pattern(parts)
            mark = escape(parts) if escape else None
            if value is None or wanted is None:
                return None
            found, i = "", 0
            while i < len(wanted):
                if wanted[i] == mark and i + 1 < len(wanted):
                    i += 1
                    found += re.escape(wanted[i])
                else:
                    found += {"%": ".*", "_": "."}.get(wanted[i], re.escape(wanted[i]))
                i += 1
            return re.fullmatch(found, value, re.DOTALL) is not None

        return like

    # -------------------------------------------------------------- values
    def _sum(self) -> Value:
        made = self._product()
        while sign := self._sign("+", "-"):
            made = _both(_ARITHMETIC[sign], made, self._product())
        return made

    def _product(self) -> Value:
        made = self._single()
        while sign := self._sign("*", "/", "%"):
            made = _both(_ARITHMETIC[sign], made, self._single())
        return made

    def _single(self) -> Value:
        if self._sign("-"):
            of = self._single()
            return lambda parts: None if (value := of(parts)) is None else -value
        if self._sign("("):
            made = self._any()
            self._expect(")")
            return made
        kind, text = self._tokens[self._at] if self._at < len(self._tokens) else ("", "")
        if kind == "number":
            self._at += 1
            number = float(text) if re.search(r"[.eE]", text) else int(text)
            return lambda _: number
        if kind == "text":
            self._at += 1
            return lambda _: text[1:-1].replace("''", "'")
        for word, constant in (("true", True), ("false", False), ("null", None)):
            if kind == "word" and self._word(word):
                return lambda _, constant=constant: constant  # type: ignore[misc] # bound now
        name = self._name()
        if kind == "word" and name.startswith("@"):
            return lambda _: self._parameters.get(name)
        return lambda parts: _read(parts, name)


def _both(how: Callable[[Any, Any], Any], left: Value, right: Value) -> Value:
    def compute(parts: Parts) -> Any:
        one, other = left(parts), right(parts)
        return None if one is None or other is None else how(one, other)

    return compute


def _and(left: Value, right: Value) -> Value:
    def compute(parts: Parts) -> Any:
        values = (left(parts), right(parts))
        return False if False in values else None if None in values else True

    return compute


def _or(left: Value, right: Value) -> Value:
    def compute(parts: Parts) -> Any:
        values = (left(parts), right(parts))
        return True if True in values else None if None in values else False

    return compute


def _setter(name: str, value: Value) -> Callable[[Parts], None]:
    scope, dot, rest = name.partition(".")
    if dot and scope.lower() == "sys":
        raise BadRule(f"the stand-in sets application properties only, not {name}")
    key = rest if dot and scope.lower() == "user" else name
    return lambda parts: parts.set_application({**parts.application, key: value(parts)})


def _remover(name: str) -> Callable[[Parts], None]:
    key = name.partition(".")[2] if name.lower().startswith("user.") else name
    return lambda parts: parts.set_application({k: v for k, v in parts.application.items() if k != key})
