"""The one grammar of `%broker`, and its Python spelling.

    %broker VERB POSITIONALS --option value ... [where SQL-to-end-of-line]

What a verb takes is read off the signature of the function behind it, so the magic and Python never differ: an option is a
keyword with `-` for `_`. A range (`-100`, `-100/p`, `+5`, `@-1h..`, `12..40`) is known by its look before any option is. `where`
is a bare word that takes the rest of the line raw. `{{name}}` is the user's variable: bound to the SQL, or the value itself.

No IPython here, and no look into anybody's namespace: a name comes out as `Expr`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.ranges import is_range

_INT = re.compile(r"[+-]?\d[\d_]*")
_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(\.\d*)?[eE][+-]?\d+)")
_NAME = re.compile(r"\{\{\s*([^\W\d]\w*)\s*\}\}")
_CLOSES = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, slots=True)
class Expr:
    """A Python expression of the user, not yet evaluated."""

    text: str


@dataclass(frozen=True, slots=True)
class Body:
    """The cell's body, as the one message to publish."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed line: `verb(*args, **kwargs)`, where any argument may be an `Expr`, and a frame a `Body`.

    `where` and `params` are set only for a verb that takes a frame and no `where` of its own: they choose the frame's rows.
    """

    verb: str
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    where: str | None = None
    params: Mapping[str, Expr] | None = None
    python: bool = False
    output: str | None = None


class Word(NamedTuple):
    """One word of the line. `text` is without its quotes; `bare` means that there were none."""

    raw: str
    text: str
    bare: bool
    end: int


def usage_error(verb: str, text: str) -> BrokerError:
    """A line that cannot be understood, as the error that is shown for it."""
    return BrokerError(ErrorKind.INVALID, verb, text)


def words(line: str) -> Iterator[Word]:
    """Split at blanks outside of quotes and brackets. Inside brackets everything stays as it is: it is a Python expression."""
    at = 0
    while at < len(line):
        if line[at].isspace():
            at += 1
            continue
        start, text, quote, open_, bare = at, "", "", "", True
        while at < len(line) and (quote or open_ or not line[at].isspace()):
            char = line[at]
            if quote:
                if char == "\\" and open_:
                    text, at, char = text + char, at + 1, line[at + 1 : at + 2]
                closing = char == quote
                quote = "" if closing else quote
                text += char if open_ or not closing else ""
            elif char in "'\"":
                quote, bare = char, bare and bool(open_)
                text += char if open_ else ""
            else:
                if char in _CLOSES:
                    open_ += _CLOSES[char]
                elif open_.endswith(char):
                    open_ = open_[: -len(char)]
                text += char
            at += 1
        if quote or open_:
            raise usage_error("", f"%broker: a {quote or open_[-1]} is missing to close what begins at character {start + 1}")
        yield Word(line[start:at], text, bare, at)


class Option:
    """One parameter of a verb: how it is spelt on the line and what its words become."""

    def __init__(self, parameter: inspect.Parameter) -> None:
        self.name = parameter.name
        self.flag = "--" + parameter.name.rstrip("_").replace("_", "-")
        self.default = parameter.default
        self.required = parameter.default is inspect.Parameter.empty
        self.positional = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        given = parameter.annotation
        self.annotation = given if isinstance(given, str) else inspect.formatannotation(given)
        outer = re.sub(r"\[.*\]", "", self.annotation)  # Sequence[str] | None -> Sequence | None
        self._types = {part.strip().rpartition(".")[2] for part in outer.split("|")} - {"None"}

    @property
    def is_switch(self) -> bool:
        """Whether the option stands alone on the line."""
        return self._types == {"bool"}

    def value(self, verb: str, word: str) -> object:
        """What a word means for this parameter."""
        if name := _NAME.fullmatch(word):
            return Expr(name[1])
        if "{{" in word:
            raise usage_error(verb, f"{verb}: {word}: only a plain name between {{{{ and }}}}, and nothing around it")
        if self.name == "frame":
            return Expr(word)
        if self._types & {"Sequence", "Collection", "Iterable", "tuple", "list", "frozenset", "set"}:
            parts = [part for part in (piece.strip() for piece in word.split(",")) if part]
            return [_scalar(part) for part in parts] if "int" in self.annotation else parts
        if self._types & {"Mapping", "dict"}:
            pairs = [piece.partition("=") for piece in word.split(",")]
            if not all(key and equals for key, equals, _ in pairs):
                raise usage_error(verb, f"{verb}: {self.flag} takes name=value,name=value or {{{{a_dict}}}}")
            return {key.strip(): text for key, _, text in pairs}
        if self._types <= {"str", "Literal"}:
            return word
        value = _scalar(word)
        if isinstance(value, str) and self._types <= {"int", "float", "bool"}:
            raise usage_error(verb, f"{verb}: {self.flag} takes {self.annotation.replace(' | ', ' or ')}, not {word!r}")
        return value


def options(signature: inspect.Signature) -> dict[str, Option]:
    """The parameters of a verb by name; `self` and what takes any keyword, for Python alone, left out."""
    taken = signature.parameters.values()
    return {each.name: Option(each) for each in taken if each.name != "self" and each.kind is not each.VAR_KEYWORD}


def usage(verb: str, signature: inspect.Signature) -> str:
    """The verb's line, as help shows it."""
    parts = ["%broker", verb]
    for option in options(signature).values():
        if option.name in ("where", "params"):
            continue
        spelt = option.name.upper() if option.positional else option.flag if option.is_switch else f"{option.flag} ..."
        parts.append(spelt if option.required else f"[{spelt}]")
    if {"where", "frame"} & signature.parameters.keys():
        parts.append("[where SQL]")
    return " ".join(parts)


def parse(line: str, verbs: Mapping[str, inspect.Signature], body: str | None = None) -> Call:
    """Understand a line, and the body of its cell where there is one.

    Raises
    ------
    BrokerError
        INVALID, one line with the nearest name or the verb's usage.
    """
    verb, output, python, where, at = "", None, False, None, 0
    takes: dict[str, Option] = {}
    given: dict[str, object] = {}
    in_place: list[str] = []
    todo = words(line)
    for word in todo:
        at = word.end
        if word.bare and word.raw == "where":
            where = line[at:].strip()
            break
        if word.bare and word.raw in ("-o", "--python"):
            python = python or word.raw == "--python"
            output = _output(next(todo, None)) if word.raw == "-o" else output
        elif not verb:
            verb, takes = word.text, options(_signature(word.text, verbs))
            if body is not None and "frame" in takes and "to" in takes:
                given["frame"], body = Body(body.removesuffix("\n")), None
        elif word.bare and word.raw.startswith("-") and not is_range(word.raw):
            name, value = _option(verb, word, todo, takes)
            if name in given:
                raise usage_error(verb, f"{verb}: {takes[name].flag} is given twice")
            given[name] = value
        else:
            option = _place(verb, word, takes, given)
            given[option.name] = option.value(verb, word.raw if option.name == "frame" else word.text)
            in_place.append(option.name)
    if not verb:
        raise usage_error("", f"%broker needs a verb: {' '.join(verbs)}")
    if body is not None and where is not None:
        raise usage_error(verb, f"{verb}: where stands on the line and in the cell's body; keep one")
    where = where if body is None else body.strip()
    if where == "":
        raise usage_error(verb, f"{verb}: where what? e.g. where value_status = 'failed'")
    return _call(verb, takes, given, in_place, where, python=python, output=output)


def python_line(call: Call, prefix: str = "conn.") -> str:
    """The Python that does the same."""
    lines, args = [], list(call.args)
    if call.where is not None:
        bound = f", {_literal(call.params)}" if call.params else ""
        lines = ["from broker_nb.frames.where import Where"]
        args[0] = Expr(f"Where({_literal(call.where)}{bound}).select({_literal(args[0])})")
    shown = [_literal(value) for value in args] + [f"{name}={_literal(value)}" for name, value in call.kwargs.items()]
    lines.append(f"{call.output} = " * bool(call.output) + f"{prefix}{call.verb}({', '.join(shown)})")
    return "\n".join(lines)


def _call(
    verb: str,
    takes: Mapping[str, Option],
    given: dict[str, object],
    in_place: list[str],
    where: str | None,
    *,
    python: bool,
    output: str | None,
) -> Call:
    params: Mapping[str, Expr] | None = None
    if where is not None:
        params = _bound(verb, where)
        if "where" in takes:
            given |= {"where": where} | ({"params": params} if params else {})
            where = params = None
        elif "frame" not in takes:
            raise usage_error(verb, f"{verb} takes no where; filter the frame that it returns")
        elif "frame" not in given:
            raise usage_error(verb, f"{verb}: where of what? name a frame: %broker {verb} held where ...")
    if {"frame", "all"} <= takes.keys() and not given.keys() & {"frame", "all"}:
        raise usage_error(verb, f"`%broker {verb} --all` {verb}s everything you hold; or name a frame")
    for option in takes.values():
        if option.required and option.name not in given:
            raise usage_error(verb, f"{verb}: {option.name.upper()} is missing; %broker help {verb}")
    leading = []
    for option in takes.values():  # what was given by place stays so, up to the first gap
        if (option.name != "frame" and option.name not in in_place) or option.name not in given:
            break
        leading.append(option.name)
    return Call(
        verb,
        tuple(given[name] for name in leading),
        {name: value for name, value in given.items() if name not in leading},
        where,
        params,
        python,
        output,
    )


def _signature(verb: str, verbs: Mapping[str, inspect.Signature]) -> inspect.Signature:
    if verb not in verbs:
        near = get_close_matches(verb, verbs, 1)
        raise usage_error(verb, f"%broker {verb}: no such verb; " + (f"nearest: {near[0]}" if near else " ".join(verbs)))
    return verbs[verb]


def _output(word: Word | None) -> str:
    if word is None or not word.raw.isidentifier():
        raise usage_error("", "%broker: -o takes the name of a variable")
    return word.raw


def _option(verb: str, word: Word, todo: Iterator[Word], takes: Mapping[str, Option]) -> tuple[str, object]:
    spelt, equals, text = word.text.partition("=")
    by_flag = {option.flag: option for option in takes.values()}
    option = by_flag.get(spelt)
    if option is None:
        near = get_close_matches("--" + spelt.lstrip("-"), by_flag, 1)
        raise usage_error(verb, f"{verb}: no option {spelt}; " + (f"nearest: {near[0]}" if near else f"%broker help {verb}"))
    if option.is_switch:
        value = _scalar(text) if equals else True
        if not isinstance(value, bool):
            raise usage_error(verb, f"{verb}: {spelt} is a switch: {spelt}, {spelt}=true or {spelt}=false")
        return option.name, value
    if not equals:
        following = next(todo, None)
        if following is None or (following.bare and (following.raw == "where" or following.raw.startswith("--"))):
            raise usage_error(verb, f"{verb}: {spelt} needs a value")
        text = following.raw if option.name == "frame" else following.text
    return option.name, option.value(verb, text)


def _place(verb: str, word: Word, takes: Mapping[str, Option], given: Mapping[str, object]) -> Option:
    places = [option for option in takes.values() if option.positional and option.name not in given]
    if word.bare and is_range(word.raw):
        places = [option for option in places if option.name == "range"]
        if not places:
            raise usage_error(verb, f"{verb}: no range here, or a second one: {word.raw}; %broker help {verb}")
    if not places:
        raise usage_error(verb, f"{verb}: one word too many: {word.raw!r}; %broker help {verb}")
    return places[0]


def _bound(verb: str, where: str) -> dict[str, Expr]:
    """The names that `{{name}}` binds; the SQL itself is looked at where it is run."""
    names = {}
    for part in re.findall(r"\{\{.*?\}\}", where):
        name = _NAME.fullmatch(part)
        if not name:
            raise usage_error(verb, f"{verb}: {part}: only a plain name between {{{{ and }}}}; assign the value to one first")
        names[name[1]] = Expr(name[1])
    return names


def _scalar(word: str) -> object:
    if word in ("true", "True", "false", "False"):
        return word in ("true", "True")
    if _INT.fullmatch(word):
        return int(word)
    return float(word) if _FLOAT.fullmatch(word) else word


def _literal(value: object) -> str:
    if isinstance(value, Expr):
        return value.text
    if isinstance(value, Body):
        return f'pandas.DataFrame({{"data": [{_literal(value.text)}]}})'
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)
