from __future__ import annotations

import _thread
import ast
import inspect
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import nbformat
import pandas as pd
import pytest
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

import broker_nb
from broker_nb import connection
from broker_nb.notebook.grammar import options
from broker_nb.notebook.magics import BrokerMagics, load_ipython_extension
from broker_nb.session import Session


class Shell:
    def __init__(self, ip: InteractiveShell) -> None:
        self.ip: Any = ip
        self.error: BaseException | None = None

    def run(self, source: str) -> str:
        """Run a cell that works; what it showed."""
        shown = self.fail(source, None)
        assert self.error is None, shown
        return shown

    def fail(self, source: str, kind: type[BaseException] | None = broker_nb.BrokerError) -> str:
        """Run a cell that fails; what it showed."""
        with capture_output(display=False) as captured:
            result = self.ip.run_cell(source, store_history=True)
        self.error = result.error_before_exec or result.error_in_exec
        assert kind is None or isinstance(self.error, kind), captured.stdout
        return captured.stdout + captured.stderr

    def __getitem__(self, name: str) -> Any:
        return self.ip.user_ns[name]

    @property
    def magics(self) -> BrokerMagics:
        return self.ip.magics_manager.registry["BrokerMagics"]


@pytest.fixture(scope="module")
def ip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InteractiveShell]:
    folder = str(tmp_path_factory.mktemp("ipython"))
    quiet = Config(HistoryManager={"enabled": False}, InteractiveShell={"colors": "nocolor"}, IPCompleter={"use_jedi": False})
    interrupt = signal.getsignal(signal.SIGINT)
    yield InteractiveShell.instance(config=quiet, ipython_dir=folder)
    InteractiveShell.clear_instance()
    signal.signal(signal.SIGINT, interrupt)


@pytest.fixture
def shell(ip: InteractiveShell) -> Iterator[Shell]:
    shell = Shell(ip)
    assert shell.run("%load_ext broker_nb") == ""
    yield shell
    shell.run("%config BrokerMagics.tracebacks = False\n%config BrokerMagics.limit = None\n%config BrokerMagics.timezone = ''")
    for each in broker_nb.connections():
        each.close()
    if "broker_nb" in ip.extension_manager.loaded:
        shell.run("%unload_ext broker_nb")
    ip.reset()


@pytest.fixture
def demo(shell: Shell) -> Shell:
    shell.run("conn = %broker connect demo")
    return shell


# ------------------------------------------------------------------ the first five minutes
def test_connect_says_what_it_is_and_what_is_next(shell: Shell) -> None:
    shown = shell.run("%broker connect demo")
    assert shown.splitlines()[0] == (
        "demo: embedded broker in this kernel, 3 topics with made-up orders. Next: %broker topics   "
        '(or: conn = broker_nb.connect("demo"))'
    )
    assert "<demo" not in shown  # the connection is the value, and was shown already


def test_the_transcript(demo: Shell) -> None:
    demo.run("found = %broker topics")
    assert set(demo["found"]["topic"]) == {"orders", "orders.dlq", "payments"}
    caption = demo.run("df = %broker sample orders -1000")
    assert caption.startswith("sample orders -1000 | complete | 1,000 of 12,000 messages")
    assert caption.count("\n") == 1
    assert len(demo["df"]) == 1000
    assert demo["df"].attrs["complete"] is True
    demo.run("held = %broker consume orders --subscription debug --n 100 --hold 10m")
    assert len(demo["held"]) == 100
    ok = int((demo["held"]["value_status"] == "ok").sum())
    assert f"{ok} acked" in demo.run("%broker ack held where value_status = 'ok'")
    assert len(demo.run("bad = held[held.value_status != 'ok']\nleft = %broker held").splitlines()) == 1
    assert set(demo["left"]["lease"]) == set(demo["bad"]["lease"])
    assert "back in 30 s" in demo.run("%broker nack bad --delay 30s")
    assert "already settled" in demo.run("%broker ack bad")
    assert "already settled" in demo.run("%broker reject bad --reason late")
    demo.run("more = %broker consume orders debug --n 5")
    assert "3 rejected to orders.dlq" in demo.run("%broker reject more[:3] --reason 'no such customer'")
    demo.run("left = list(more['lease'][3:])")
    assert "2 rejected to orders.dlq" in demo.run("%broker reject more --reason 'no such customer' where lease in {{left}}")
    demo.run("dead = %broker sample orders.dlq -5 --attributes error.message")
    assert set(demo["dead"]["attr_error_message"]) == {"no such customer"}
    assert "DRY RUN" in demo.run("%broker publish bad --to orders --body value --dry-run")


def test_one_line_results_are_shown_once(demo: Shell) -> None:
    demo.run("held = %broker consume orders debug --n 3")
    assert demo.run("%broker ack held[:1]").count("1 acked") == 1
    assert demo.run("conn.ack(held[1:2])").count("1 acked") == 1
    assert demo.run("last = %broker ack held[2:]").count("1 acked") == 1
    assert demo.run("last").count("1 acked") == 1  # in a later cell it is a value as any other
    assert demo["last"].ok is True
    assert demo.run("conn.ack(held)\nNone").count("already settled") == 1  # not the cell's value, and shown all the same


def test_a_frame_is_the_value_of_the_cell(demo: Shell) -> None:
    assert "[3 rows x " in demo.run("%broker sample orders -3")
    assert demo.run("%broker sample orders -3;").count("\n") == 1  # the caption alone


# ------------------------------------------------------------------ names, bodies, outputs
def test_names_come_from_the_user(demo: Shell) -> None:
    demo.run("topic, n, wanted = 'orders', 7, ['failed']\ndf = %broker sample {{topic}} -500 --limit {{n}}")
    assert len(demo["df"]) == 7
    demo.run("df = %broker sample orders -500 where value_status in {{wanted}}")
    assert set(demo["df"]["value_status"]) == {"failed"}
    demo.run(
        "def f():\n    status = 'failed'\n    x = %broker sample orders -500 where value_status = {{status}}\n    return x\ny = f()"
    )
    assert set(demo["y"]["value_status"]) == {"failed"}
    demo.run("for k in (1, 2):\n    z = %broker sample orders -9 --limit {{k}}")
    assert len(demo["z"]) == 2


def test_the_cell_body_is_the_where_and_o_names_the_result(demo: Shell) -> None:
    shown = demo.run("%%broker -o df sample orders -500\nvalue_status = 'failed'\n  or value_status = 'it''s'\n")
    assert shown.count("\n") == 1
    assert set(demo["df"]["value_status"]) == {"failed"}


@pytest.mark.parametrize("body", ['{"a": 1}', "it's {", "first\n\n  second\n", "100 % $HOME {x} {{y}} 💥"])
def test_the_cell_body_is_the_message(demo: Shell, body: str) -> None:
    shown = demo.run(f"%%broker publish --to payments\n{body}\n")
    assert shown.count("1 accepted") == 1
    last = broker_nb.connections()[0].sample("payments", "-1/p", decode="none")
    assert body.encode() in list(last["data"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("ack nope", "no variable 'nope'"),
        ("ack held.nope", "has no attribute 'nope'"),
        ("ack held[", "missing"),
        ("ack held+", "SyntaxError"),
        ("ack 'held held'", "not str"),
        ("ack 5", "frame with a lease column"),
        ("ack 5 where a = 1", "pandas frame"),
        ("ack df", "no 'lease' column"),
        ("ack held where nope = 1", "no column nope"),
        ("ack held where value_status =", "where value_status ="),
        ("ack", "`%broker ack --all` acks everything you hold; or name a frame"),
        ("nack held --delay soon", "soon"),
        ("reject", "`%broker reject --all` rejects everything you hold; or name a frame"),
        ("reject held --reason", "--reason needs a value"),
        ("reject held --delay 5s", "no option --delay"),
        ("sample ordrs", "ordrs"),
        ("sample orders @nonsense..", "nonsense"),
        ("sample orders --decode xml", "xml"),
        ("sample orders where value_status = {{nope}}", "no variable 'nope'"),
        ("sample orders where value_status = '{{says}}'", "no variable 'says'"),
        ("consume orders", "subscription"),
        ("consume nope debug", "nope"),
        ("publish df --to nope", "nope"),
        ("publish nope --to orders", "no variable 'nope'"),
        ("use prod", "'prod'"),
        ("close prod", "'prod'"),
        ("help smaple", "nearest: sample"),
        ("connect gopher://x", "gopher"),
        ("connect kafka://127.0.0.1:1 --timeout 1", "127.0.0.1:1"),
    ],
)
def test_an_error_is_one_line_and_the_connection_lives(demo: Shell, line: str, says: str) -> None:
    demo.run("df = conn.sample('orders', '-5')\nheld = conn.consume('orders', 'debug', n=5)")
    shown = demo.fail(f"%broker {line}")
    assert says in shown
    assert len(shown.splitlines()) == 1, shown
    assert len(demo["conn"].held()) == 5  # nothing was settled or lost
    demo.run("%broker use demo\n%broker sample orders -1")


def test_tracebacks_on_request(demo: Shell) -> None:
    assert len(demo.fail("%broker sample nope").splitlines()) == 1
    demo.run("%config BrokerMagics.tracebacks = True")
    assert demo.run("%config").count("BrokerMagics") == 1
    assert "Traceback" in demo.fail("%broker sample nope")


def test_errors_keep_their_kind(demo: Shell) -> None:
    demo.run("import broker_nb\ntry:\n    %broker sample nope\nexcept broker_nb.NotFound as e:\n    kind = e.kind")
    assert demo["kind"] is broker_nb.ErrorKind.NOT_FOUND


def test_a_failed_line_fails_the_notebook() -> None:
    cells = ["%load_ext broker_nb\n%broker connect demo", "%broker sample nope", "print('never')"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    with pytest.raises(CellExecutionError):
        NotebookClient(book, timeout=60, kernel_name="python3", store_widget_state=False).execute()
    (error,) = book.cells[1].outputs
    assert (error.output_type, error.ename, len(error.traceback)) == ("error", "NotFound", 1)
    assert "nope" in error.traceback[0]
    assert book.cells[2].outputs == []


def test_interrupt_passes_and_the_connection_lives(demo: Shell) -> None:
    demo.run("%broker consume payments debug --n 8000 --timeout 5;")
    began = time.monotonic()
    stop = threading.Timer(0.5, _thread.interrupt_main)
    stop.start()
    demo.fail("%broker consume payments debug --timeout 60", KeyboardInterrupt)
    stop.join()
    assert time.monotonic() - began < 5
    demo.run("%broker sample orders -1")


# ------------------------------------------------------------------ secrets
@pytest.mark.parametrize(
    "line",
    [
        "connect kafka://bob:hunter2@h:9092",
        "connect 'kafka://bob:hunter2 x@h:9092'",
        "connect kafka://bob:hunter2 x@h:9092",
        "connect kafka://bob:hunter2/@@h 'open",
        "-o c connect kafka://bob:hunter2@h",
        "connect --url kafka://bob:hunter2@h",
        "connect --python kafka://bob:hunter2@h",
        "connect kafka://h?sasl.password=hunter2",
        "connect kafka://h --options sasl.username=bob,sasl.password=hunter2",
    ],
)
def test_a_password_in_a_cell_is_refused_and_not_repeated(shell: Shell, line: str) -> None:
    shown = shell.fail(f"%broker {line}")
    assert "change it" in shown
    assert "environment" in shown
    assert "hunter2" not in shown
    assert broker_nb.connections() == []


# ------------------------------------------------------------------ connections
def test_several_connections(shell: Shell) -> None:
    assert "no connection is open" in shell.fail("%broker topics")
    shell.run("%broker connect demo --name a\n%broker connect demo --name b")
    assert "b" in shell.run("%broker --python use b")
    shell.run("found = %broker connections")
    assert list(shell["found"]["name"]) == ["a", "b"]
    assert list(shell["found"]["current"]) == [False, True]
    assert "a: embedded" in shell.run("%broker use a")
    assert "a | closed" in shell.run("%broker close")
    shell.run("%broker topics")  # the only one left
    shell.run("%broker connect demo --name c\n%broker close c\n%broker connect demo --name d\n%broker connect demo --name e")
    shell.run("%broker close e")
    assert "choose one" in shell.fail("%broker topics")
    shell.run("found = %broker connections")
    assert not shell["found"]["current"].any()


def test_a_connection_made_in_python_is_used(shell: Shell) -> None:
    shell.run("import broker_nb\nconn = broker_nb.connect('demo')\n%broker topics")


def test_read_only_is_said_and_kept(shell: Shell) -> None:
    assert "read-only" in shell.run("%broker connect demo --read-only")
    assert "read-only" in shell.fail("%%broker publish orders\nx\n")


# ------------------------------------------------------------------ python, help, signatures
def test_python_lines_run_nothing_and_are_python(shell: Shell) -> None:
    for line in ("connect demo", "topics", "sample orders", "consume orders x", "held", "nack h", "reject h", "release"):
        ast.parse(shell.run(f"%broker {line} --python"))
    for line in (
        "ack h where a = 1",
        "commit h",
        "publish h --to x",
        "use a",
        "connections",
        "close",
        "close a",
        "help",
        "help sample",
    ):
        ast.parse(shell.run(f"%broker --python {line}"))
    assert broker_nb.connections() == []
    ast.parse(shell.run("%%broker publish x --python\nit's {\n"))


@pytest.mark.parametrize(
    ("line", "result"),
    [
        ("sample --python orders +7 where value_status = 'ok'", "sample orders +7 | complete | 6 of"),
        ("consume --python orders debug --n 3", "consume orders/debug | 3 held"),
        ("ack --python held where value_status = 'ok' or value_status = 'failed'", "ack orders/debug | 5 acked"),
    ],
)
def test_the_python_line_works(demo: Shell, line: str, result: str) -> None:
    demo.run("held = conn.consume('orders', 'debug', n=5)")
    assert demo.run(demo.run(f"%broker {line}")).startswith(result)


def test_options_are_the_parameters(shell: Shell) -> None:
    for verb in ("topics", "sample", "consume", "live", "held", "ack", "nack", "reject", "release", "commit", "publish"):
        parameters = set(inspect.signature(getattr(broker_nb.Connection, verb)).parameters) - {"self"}
        assert set(options(shell.magics.verbs[verb])) == parameters
        shown = shell.run(f"%broker help {verb}")
        assert all(name in shown for name in parameters)
    assert all(f"%broker {verb}" in shell.run("%broker help") for verb in shell.magics.verbs)


def test_live_needs_a_page(demo: Shell) -> None:
    shown = demo.fail("%broker live orders --subscription debug")
    assert shown == "live: works in a notebook (JupyterLab, Notebook 7); here use consume, or sample to look\n"
    assert demo.run("%broker live --python orders --subscription debug --columns status,id").strip() == (
        'conn.live("orders", subscription="debug", columns=["status", "id"])'
    )


# ------------------------------------------------------------------ settings
def test_limit_and_timezone(demo: Shell) -> None:
    demo.run("%config BrokerMagics.limit = 4\ndf = %broker sample orders -100")
    assert len(demo["df"]) == 4
    assert demo["df"].attrs["complete"] is False
    demo.run("df = %broker sample orders -100 --limit 6")
    assert len(demo["df"]) == 6
    demo.run("%config BrokerMagics.timezone = 'Europe/Zagreb'")
    assert str(Session.zone) == "Europe/Zagreb"
    assert "'Europe/Nowhere' is not known" in demo.run("%config BrokerMagics.timezone = 'Europe/Nowhere'")
    assert "'Europe/Nowhere' is not known" in demo.fail("%broker sample orders @22:10..")
    demo.run("%config BrokerMagics.timezone = ''\n%broker sample orders -1")
    assert Session.zone is None


def test_captions_are_plain_text(shell: Shell) -> None:
    with capture_output() as captured:
        connection.captions("a\x1b[31m\u202e\r\nb")
    assert captured.stdout == "a [31m b\n"


# ------------------------------------------------------------------ loading
def test_loading_twice_changes_nothing(demo: Shell) -> None:
    magics = demo.magics
    assert "already loaded" in demo.run("%load_ext broker_nb")
    with capture_output() as captured:
        load_ipython_extension(demo.ip)
    assert captured.stdout == "broker_nb is loaded already; nothing was changed\n"
    assert demo.magics is magics
    assert demo.ip.Completer.custom_matchers.count(magics.completer.matcher) == 1
    demo.run("%broker sample orders -1")


def test_unloading_takes_everything_out(shell: Shell) -> None:
    shell.run("import broker_nb\nmine = broker_nb.connect('demo', name='mine')\n%broker connect demo --name idle")
    shell.run("busy = %broker connect demo --name busy\nheld = %broker consume orders debug --n 3")
    magics = shell.magics
    shown = shell.run("%unload_ext broker_nb")
    assert shown.splitlines() == [
        "idle: closed",
        "busy: left open, because it holds 3 messages; broker_nb.connections() lists it",
    ]
    assert [each.name for each in broker_nb.connections()] == ["mine", "busy"]
    assert len(shell["busy"].held()) == 3
    assert "not found" in shell.fail("%broker topics", Exception)
    assert magics not in shell.ip.configurables
    assert magics.completer.matcher not in shell.ip.Completer.custom_matchers
    assert shell.run("x = busy.ack(held)") == ""  # captions are back in the log
    shell.run("%load_ext broker_nb\n%broker use mine\n%broker sample orders -1")


# ------------------------------------------------------------------ completion
def complete(shell: Shell, text: str) -> list[str]:
    with provisionalcompleter():
        return [text[: c.start] + c.text for c in shell.ip.Completer.completions(text, len(text))]


def test_completion(demo: Shell) -> None:
    assert complete(demo, "%broker sam") == ["%broker sample"]
    assert complete(demo, "x = %broker con") == ["x = %broker connect", "x = %broker connections", "x = %broker consume"]
    deadline = time.monotonic() + 10
    while "%broker sample orders" not in complete(demo, "%broker sample ord"):  # listed in the background by connect
        assert time.monotonic() < deadline
    assert set(complete(demo, "%broker sample ord")) == {"%broker sample orders", "%broker sample orders.dlq"}
    assert complete(demo, "%broker sample orders.") == ["%broker sample orders.dlq"]
    assert complete(demo, "%%broker publish df --to pay") == ["%%broker publish df --to payments"]
    assert complete(demo, "%broker sample orders --li") == ["%broker sample orders --limit"]
    assert complete(demo, "%broker consume orders --") != []
    assert complete(demo, "%broker use d") == ["%broker use demo"]
    assert complete(demo, "%broker help he") == ["%broker help held", "%broker help help"]
    demo.run("held_rows = 1")
    assert complete(demo, "%broker ack held_r") == ["%broker ack held_rows"]  # IPython's own
    assert complete(demo, "prin") == ["print"]


def test_completion_asks_no_broker(demo: Shell) -> None:
    demo.run("%broker topics;\n%broker close")
    demo.run("%broker connect demo --name two\n%broker topics;")
    asked = []
    demo.magics.current()._session.client.driver.entities = lambda *_: asked.append(1)  # type: ignore[method-assign]  # a spy
    assert complete(demo, "%broker publish df --to pay") == ["%broker publish df --to payments"]
    assert asked == []


def test_broker_is_described(shell: Shell) -> None:
    assert isinstance(shell.magics.connections(), pd.DataFrame)
    assert "%broker help" in (BrokerMagics.broker.__doc__ or "")
