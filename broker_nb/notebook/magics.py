"""`%broker` and `%%broker`: a call of the connection per line, and one line per error."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import pandas as pd
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import Magics, line_cell_magic, magics_class, needs_local_scope, no_var_expand
from traitlets import Bool, Int, Unicode, observe

from broker_nb import connection
from broker_nb.backends import has_secret
from broker_nb.backends.driver import Entity, Kind
from broker_nb.connection import Connection
from broker_nb.errors import BrokerError, ErrorKind, one_line
from broker_nb.frames.results import Result
from broker_nb.frames.where import Where
from broker_nb.notebook import manual
from broker_nb.notebook.completer import BrokerCompleter
from broker_nb.notebook.grammar import Body, Call, Expr, parse, python_line, usage_error
from broker_nb.portable.loop import shared_loop

log = logging.getLogger("broker_nb")

_VERBS = ("topics", "sample", "consume", "live", "held", "ack", "nack", "reject", "release", "commit", "publish")
_PASSWORD = re.compile(r"://.*:.*@")
_ADVICE = (
    "a password in a cell is already in IPython's history and in this notebook: change it, then pass it from the environment: "
    'options = {"sasl.password": os.environ["..."]} in Python, then %broker connect kafka://host:9092 --options {{options}}'
)


@magics_class
class BrokerMagics(Magics):
    """The magic of one shell: its current connection, its settings and what it has shown."""

    timezone = Unicode("", help="Zone of clock times in ranges and captions, as Europe/Zagreb; empty: this host's.").tag(
        config=True
    )
    tracebacks = Bool(False, help="Show whole tracebacks of errors instead of one line.").tag(config=True)
    limit = Int(None, allow_none=True, help="Most rows that sample reads when the line does not say; None: its own default.").tag(
        config=True
    )

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell=shell)
        self._ip: Any = shell  # IPython types every part of its shell as one that may be missing
        self.functions: dict[str, Callable[..., Any]] = {
            "connect": connection.connect,
            "use": self.use,
            **{verb: getattr(Connection, verb) for verb in _VERBS},
            "connections": self.connections,
            "close": self.close,
            "help": self.help,
        }
        self.verbs = {verb: inspect.signature(function) for verb, function in self.functions.items()}
        self.completer = BrokerCompleter(
            self.verbs, lambda: [each.name for each in connection.connections()], lambda: self._topics.get(self._name(), ())
        )
        self.opened: list[Connection] = []
        self._topics: dict[str, list[str]] = {}  # by connection, as far as they were listed
        self._chosen: Connection | None = None
        self._shown: set[str] = set()

    @observe("timezone")
    def _zone_changed(self, change: Any) -> None:
        # Not a validator: traitlets would keep the refused value in the shell's configuration, and refuse it again for ever.
        try:
            connection.set_timezone(_zone(change.new))
        except BrokerError as error:
            connection.set_timezone(None)
            _print(str(error))

    @line_cell_magic
    @no_var_expand
    @needs_local_scope
    def broker(self, line: str, cell: str | None = None, local_ns: Mapping[str, Any] | None = None) -> object:
        """Look into, take from and write to a message broker; `%broker help` lists the verbs."""
        # Not `@output_can_be_silenced`: it tokenises line and cell as Python after the call, and fails on `it's {` when that
        # message has just been published.
        silent = cell is None and line.rstrip().endswith(";")
        try:
            result = self._run(line.rstrip()[:-1] if silent else line, cell, local_ns or {})
        except BrokerError as error:
            text = str(error)
            if not self.tracebacks:  # IPython asks the exception how to show itself; the cell counts as failed all the same
                vars(error)["_render_traceback_"] = lambda: [text]
            raise
        return None if silent else result

    # -------------------------------------------------------------- verbs of the notebook itself
    def use(self, name: str) -> None:
        """Choose the open connection that %broker works on."""
        self._chosen = self._named(name)
        self.say(f"{name}: {self._chosen.about}")

    def connections(self) -> pd.DataFrame:
        """The open connections: name, about, url, and which is current."""
        found = connection.connections()
        current = self.current() if len(found) == 1 or self._chosen in found else None
        return pd.DataFrame(
            {
                "name": pd.Series([each.name for each in found], dtype="str"),
                "current": pd.Series([each is current for each in found], dtype="bool"),
                "about": pd.Series([each.about for each in found], dtype="str"),
                "url": pd.Series([each.url for each in found], dtype="str"),
            }
        )

    def close(self, name: str | None = None) -> None:
        """Close a connection, the current one by default. What is held is given back; nothing durable is deleted."""
        (self._named(name) if name else self.current()).close()

    def help(self, verb: str | None = None) -> None:
        """What there is, or one verb in full."""
        if verb and verb not in self.functions:
            parse(verb, self.verbs)  # raises, with the nearest name
        _print(manual.page(verb, self.functions[verb]) if verb else manual.overview(self.functions))

    # -------------------------------------------------------------- running a line
    def say(self, line: str) -> None:
        """Show one line in the cell that is running; names in it may be anybody's, so it is made plain text first."""
        self._shown.add(line)
        _print(one_line(line, 4000))

    def current(self) -> Connection:
        """The connection that the verbs work on: the one chosen, or the only one.

        Raises
        ------
        BrokerError
            CLOSED when there is none, INVALID when there are several and none was chosen.
        """
        found = connection.connections()
        if self._chosen in found:
            return self._chosen
        if not found:
            text = "no connection is open: %broker connect demo (a broker in this kernel) or %broker connect kafka://host:9092"
            raise BrokerError(ErrorKind.CLOSED, "", text)
        if len(found) > 1:
            raise usage_error("use", f"{len(found)} connections are open; choose one: %broker use NAME, of {_names()}")
        return found[0]

    def _name(self) -> str:
        try:
            return self.current().name
        except BrokerError:  # none, or none chosen: nothing to complete
            return ""

    def _named(self, name: str) -> Connection:
        for each in connection.connections():
            if each.name == name:
                return each
        raise BrokerError(ErrorKind.NOT_FOUND, name, f"no open connection is called {name!r}; there are: {_names()}")

    def _run(self, line: str, cell: str | None, local_ns: Mapping[str, Any]) -> object:
        if "connect" in line.split()[:4] and _PASSWORD.search(line):  # first, so that no other error repeats it
            raise usage_error("connect", _ADVICE)
        call = parse(line, self.verbs, cell)
        if call.verb == "connect":
            _refuse_secrets(call)
        _zone(self.timezone)  # better no answer than one for another zone
        if call.verb == "sample" and self.limit is not None and "limit" not in call.kwargs:
            call = replace(call, kwargs={**call.kwargs, "limit": self.limit})
        if call.python:
            _print(_python(call))
            return None
        result = self._call(call, {**self._ip.user_ns, **local_ns})
        if call.output:
            self._ip.user_ns[call.output] = result
        return None if call.output else result

    def _call(self, call: Call, names: Mapping[str, Any]) -> object:
        args = [_value(call.verb, value, names) for value in call.args]
        kwargs = {name: _value(call.verb, value, names) for name, value in call.kwargs.items()}
        if call.where is not None:
            args[0] = self._chosen_rows(call, args[0], names)
        function = self.functions[call.verb]
        result = function(self.current(), *args, **kwargs) if call.verb in _VERBS else function(*args, **kwargs)
        if isinstance(result, Connection):
            self._connected(result, call)
        elif call.verb == "topics":
            known = self._topics.get(self._name(), [])
            self._topics[self._name()] = list(dict.fromkeys([*known, *result["topic"]]))
        return result

    def _chosen_rows(self, call: Call, frame: object, names: Mapping[str, Any]) -> pd.DataFrame:
        if not isinstance(frame, pd.DataFrame):
            raise usage_error(call.verb, f"{call.verb}: where works on a pandas frame, not on a {type(frame).__name__}")
        params = {name: _value(call.verb, value, names) for name, value in (call.params or {}).items()}
        return Where(call.where or "", params, self.timezone or "UTC").select(frame)

    def _connected(self, opened: Connection, call: Call) -> None:
        self._chosen = opened
        self.opened.append(opened)
        read_only = " | read-only" * (call.kwargs.get("read_only") is True)
        self.say(f"{opened.name}: {opened.about}{read_only}. Next: %broker topics   (or: {_python(call)})")
        self._shown.add(repr(opened))
        self._topics[opened.name] = []
        listing = shared_loop().submit(opened._session.client.entities())
        listing.add_done_callback(lambda done: self._listed(opened.name, done))

    def _listed(self, name: str, listing: Future[list[Entity]]) -> None:
        """On the loop thread, after `connect`: names for the completer, which does without them when they do not come."""
        if listing.cancelled() or (error := listing.exception()):
            log.debug("%s: no names for completion: %s", name, "cancelled" if listing.cancelled() else error)
        else:
            self._topics[name] = [each.name for each in listing.result() if each.kind is not Kind.SUBSCRIPTION]

    def show(self, result: object) -> None:
        """Show a one-line result that is a cell's value, unless its line was shown when it came about."""
        if repr(result) not in self._shown:
            self.say(repr(result))

    # -------------------------------------------------------------- loading
    def load(self) -> None:
        """Put the magic, its completer and its captions into the shell."""
        self._ip.register_magics(self)
        self._ip.Completer.custom_matchers.append(self.completer.matcher)
        self._ip.events.register("pre_run_cell", self._forget_shown)
        for kind in (Connection, Result):
            self._ip.display_formatter.ipython_display_formatter.for_type(kind, self.show)
        connection.set_captions(self.say)

    def unload(self) -> None:
        """Take out what `load` put in, and close the connections that the magic opened and that hold nothing."""
        connection.set_captions(None)
        connection.set_timezone(None)
        for kind in (Connection, Result):
            self._ip.display_formatter.ipython_display_formatter.pop(kind)
        self._ip.events.unregister("pre_run_cell", self._forget_shown)
        self._ip.Completer.custom_matchers.remove(self.completer.matcher)
        self._ip.configurables.remove(self)
        manager = self._ip.magics_manager
        del manager.registry["BrokerMagics"], manager.magics["line"]["broker"], manager.magics["cell"]["broker"]
        for each in self.opened:
            if each.is_open and (held := len(each.held())):
                self.say(f"{each.name}: left open, because it holds {held} messages; broker_nb.connections() lists it")
            elif each.is_open:
                each.close()
                self.say(f"{each.name}: closed")

    def _forget_shown(self, *_: object) -> None:
        self._shown.clear()


def load_ipython_extension(shell: InteractiveShell) -> None:
    """`%load_ext broker_nb`."""
    if "BrokerMagics" in shell.magics_manager.registry:
        _print("broker_nb is loaded already; nothing was changed")
        return
    BrokerMagics(shell).load()


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """`%unload_ext broker_nb`."""
    shell.magics_manager.registry["BrokerMagics"].unload()


def _print(text: str) -> None:
    print(text)  # noqa: T201 (showing is what a magic does)


def _names() -> str:
    return ", ".join(each.name for each in connection.connections()) or "none"


def _zone(name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name) if name else None
    except (ValueError, OSError, KeyError):
        text = f"timezone {one_line(name)!r} is not known; %config BrokerMagics.timezone = 'Europe/Zagreb', 'UTC', or '' for this host's"
        raise usage_error("timezone", text) from None


def _refuse_secrets(call: Call) -> None:
    options = call.kwargs.get("options")
    named = f"x://h?{urlencode(options)}" if isinstance(options, Mapping) else ""
    if any(isinstance(text, str) and has_secret(text) for text in (*call.args, *call.kwargs.values(), named) if text):
        raise usage_error("connect", _ADVICE)


def _python(call: Call) -> str:
    """The line as Python, also for the verbs that only the notebook has."""
    words = [*call.args, *call.kwargs.values()]
    named = f"{{c.name: c for c in broker_nb.connections()}}[{words[0]!r}]" if words else "conn"
    match call.verb:
        case "connect":
            return python_line(replace(call, output=call.output or "conn"), "broker_nb.")
        case "connections":
            return python_line(call, "broker_nb.")
        case "use":
            return f"conn = {named}"
        case "close":
            return f"{named}.close()"
        case "help":
            return f"help(conn.{words[0]})" if words else "help(conn)"
    return python_line(call)


def _value(verb: str, value: object, names: Mapping[str, Any]) -> object:
    if isinstance(value, Body):
        return pd.DataFrame({"data": [value.text]})
    if isinstance(value, Mapping):
        return {name: _value(verb, item, names) for name, item in value.items()}
    if not isinstance(value, Expr):
        return value
    try:
        # The line is the user's own code, as the rest of the cell is.
        return eval(value.text, {**names})  # noqa: S307 - see above
    except NameError as error:
        raise usage_error(verb, f"{verb}: there is no variable {error.name!r} here; assign it first") from error
    except Exception as error:
        raise usage_error(verb, f"{verb}: {value.text}: {type(error).__name__}: {error}") from error
