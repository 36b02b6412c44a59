from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

import pytest

from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.notebook.grammar import Body, Call, Expr, parse, python_line, usage, words

Duration = str | float | timedelta


class Verbs:
    def topics(self, pattern: str = "") -> None: ...

    def sample(
        self,
        topic: str,
        range: str = "-100",  # noqa: A002 (the word of the grammar)
        *,
        limit: int = 1_000_000,
        partitions: Collection[int] | None = None,
        attributes: Sequence[str] = (),
        where: str | None = None,
        params: Mapping[str, Any] | None = None,
        as_: str = "pandas",
        timeout: float | None = None,
    ) -> None: ...

    def consume(
        self, topic: str, subscription: str | None = None, *, n: int = 100, hold: Duration = "10m", create: bool = False
    ) -> None: ...

    def ack(self, frame: Any = None, *, all: bool = False) -> None: ...  # noqa: A002 (the word of the grammar)

    def nack(self, frame: Any = None, *, delay: Duration = 0, all: bool = False) -> None: ...  # noqa: A002 (as above)

    def reject(self, frame: Any = None, *, reason: str = "", all: bool = False) -> None: ...  # noqa: A002 (as above)

    def commit(self, frame: Any) -> None: ...

    def publish(self, frame: Any, to: str, *, body: str = "data", dry_run: bool = False) -> None: ...

    def connect(self, url: str, *, options: Mapping[str, Any] | None = None, **settings: Any) -> None: ...


VERBS = {name: inspect.signature(function) for name, function in vars(Verbs).items() if not name.startswith("_")}


def read(line: str, body: str | None = None) -> Call:
    return parse(line, VERBS, body)


@pytest.mark.parametrize(
    ("line", "python"),
    [
        ("topics", "conn.topics()"),
        ("topics ord[ab]*", 'conn.topics("ord[ab]*")'),
        (
            "sample orders @22:10.. --limit 5000 where value_status = 'failed'",
            """conn.sample("orders", "@22:10..", limit=5000, where="value_status = 'failed'")""",
        ),
        ("sample orders -100", 'conn.sample("orders", "-100")'),
        ("sample orders -100/p", 'conn.sample("orders", "-100/p")'),
        ("sample orders +5", 'conn.sample("orders", "+5")'),
        ("sample orders 12..40", 'conn.sample("orders", "12..40")'),
        ("sample orders @-1h..-30m", 'conn.sample("orders", "@-1h..-30m")'),
        ("sample orders ..end", 'conn.sample("orders", "..end")'),
        ("sample --limit 5 orders -15m", 'conn.sample("orders", "-15m", limit=5)'),
        ("sample --limit=5 -100 orders", 'conn.sample("orders", "-100", limit=5)'),
        ("sample 'my orders' '@2026-11-22 21:00..'", 'conn.sample("my orders", "@2026-11-22 21:00..")'),
        ("sample 'a..b'", 'conn.sample("a..b")'),  # quoted: a name, not a range
        ("sample --topic orders -5", 'conn.sample(topic="orders", range="-5")'),
        ("sample orders --timeout 1.5 --as arrow", 'conn.sample("orders", timeout=1.5, as_="arrow")'),
        ("sample orders --attributes a.b,c", 'conn.sample("orders", attributes=["a.b", "c"])'),
        ("sample orders --partitions 0,2", 'conn.sample("orders", partitions=[0, 2])'),
        ("sample orders --limit {{n}}", 'conn.sample("orders", limit=n)'),
        ("sample {{ topic }}", "conn.sample(topic)"),
        ("sample orders where", None),
        ("consume orders debug --n 100 --hold 10m --create", 'conn.consume("orders", "debug", n=100, hold="10m", create=True)'),
        ("consume orders --subscription 007", 'conn.consume("orders", subscription="007")'),
        ("consume orders --create=false", 'conn.consume("orders", create=False)'),
        ("ack --all", "conn.ack(all=True)"),
        ("ack held", "conn.ack(held)"),
        ('ack held[held.value_status == "it\'s ok"]', 'conn.ack(held[held.value_status == "it\'s ok"])'),
        ("ack held.query('a > 1 and b in (1, 2)')", "conn.ack(held.query('a > 1 and b in (1, 2)'))"),
        ("nack bad --delay 30s", 'conn.nack(bad, delay="30s")'),
        ("nack bad --delay 1.5", "conn.nack(bad, delay=1.5)"),
        ("reject bad --reason 42", 'conn.reject(bad, reason="42")'),
        ("reject bad --reason 'it is where it was'", 'conn.reject(bad, reason="it is where it was")'),
        ("reject --all --reason {{why}}", "conn.reject(all=True, reason=why)"),
        ("publish df --to orders --dry-run", 'conn.publish(df, to="orders", dry_run=True)'),
        ("publish df orders", 'conn.publish(df, "orders")'),
        (
            "connect kafka://h:1 --options acks=1,linger.ms=5",
            'conn.connect("kafka://h:1", options={"acks": "1", "linger.ms": "5"})',
        ),
        ("topics -o found", "found = conn.topics()"),
        ("-o found topics 'größe'", 'found = conn.topics("größe")'),
    ],
)
def test_a_line_is_the_python_it_says(line: str, python: str | None) -> None:
    if python is None:
        with pytest.raises(BrokerError, match="where what"):
            read(line)
    else:
        assert python_line(read(line)) == python
        ast.parse(python)


def test_python_flag_and_output_stand_anywhere() -> None:
    for line in ("--python sample orders -o x", "sample --python orders -o x", "-o x sample orders --python"):
        call = read(line)
        assert (call.python, call.output, call.args) == (True, "x", ("orders",))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "needs a verb: topics sample"),
        ("smaple orders", "no such verb; nearest: sample"),
        ("zzz", "no such verb; topics sample"),
        ("sample", "TOPIC is missing"),
        ("sample -100", "TOPIC is missing"),
        ("sample orders -5 -6", "a second one: -6"),
        ("sample orders --limt 5", "no option --limt; nearest: --limit"),
        ("sample orders -limit 5", "no option -limit; nearest: --limit"),
        ("sample orders --limit", "--limit needs a value"),
        ("sample orders --limit --attributes a", "--limit needs a value"),
        ("sample orders --limit where a = 1", "--limit needs a value"),
        ("sample orders --limit many", "--limit takes int, not 'many'"),
        ("sample orders --limit 1 --limit 2", "--limit is given twice"),
        ("sample orders pre-{{x}}", "only a plain name"),
        ("sample orders where a = {{x.y}}", "only a plain name"),
        ("sample 'orders", "a ' is missing"),
        ("ack held[0", "a ] is missing"),
        ("topics a b", "one word too many: 'b'"),
        ("consume orders -100", "no range here"),
        ("consume orders where a = 1", "takes no where"),
        ("consume orders --create=maybe", "--create is a switch"),
        ("ack", "`%broker ack --all` acks everything you hold; or name a frame"),
        ("nack", "`%broker nack --all` nacks everything you hold; or name a frame"),
        ("ack --all where a = 1", "where of what"),
        ("commit", "FRAME is missing"),
        ("publish df", "TO is missing"),
        ("connect x --options a", "name=value"),
        ("topics -o 1x", "-o takes the name of a variable"),
        ("topics -o", "-o takes the name of a variable"),
    ],
)
def test_what_cannot_be_understood_is_one_line(line: str, says: str) -> None:
    with pytest.raises(BrokerError) as caught:
        read(line)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.kind is ErrorKind.INVALID


@pytest.mark.parametrize(
    "where", ["a > 5 and b < 3", "status='ok'", "a = '--limit 5'", "x = 'it''s' and \"odd name\" = 1", "a = 1 where b"]
)
def test_where_is_raw_to_the_end_of_the_line(where: str) -> None:
    assert read(f"sample orders where {where}").kwargs == {"where": where}


def test_where_binds_names_and_leaves_the_text_alone() -> None:
    call = read("sample orders where id in {{ids}} and t > {{ since }} and u = {{ids}}")
    assert call.kwargs["params"] == {"ids": Expr("ids"), "since": Expr("since")}
    assert "{{ids}}" in str(call.kwargs["where"])


def test_where_chooses_rows_of_a_frame() -> None:
    call = read("ack held where value_id in {{ids}}")
    assert (call.args, call.where, call.params) == ((Expr("held"),), "value_id in {{ids}}", {"ids": Expr("ids")})


def test_the_body_of_a_cell_is_the_where() -> None:
    assert read("sample orders", "a = 1\n  and b = 2\n").kwargs == {"where": "a = 1\n  and b = 2"}
    with pytest.raises(BrokerError, match="keep one"):
        read("sample orders where a = 1", "b = 2\n")


def test_the_body_of_a_cell_is_the_message_to_publish() -> None:
    for line in ("publish --to orders", "publish orders"):
        call = read(line, '{"a": "{{x}}"}\n\n')
        assert Body('{"a": "{{x}}"}\n') in (*call.args, *call.kwargs.values())
    ast.parse(python_line(call))


def test_words_keep_expressions_whole() -> None:
    assert [w.raw for w in words("a  b[c (d)] 'e f'g  h='i j'")] == ["a", "b[c (d)]", "'e f'g", "h='i j'"]
    assert [w.text for w in words("'e f'g")] == ["e fg"]


def test_usage_is_made_from_the_signature() -> None:
    assert usage("publish", VERBS["publish"]) == "%broker publish FRAME TO [--body ...] [--dry-run] [where SQL]"
    assert usage("connect", VERBS["connect"]) == "%broker connect URL [--options ...]"
    assert usage("sample", VERBS["sample"]).startswith("%broker sample TOPIC [RANGE] [--limit ...]")


def test_a_secret_is_not_repeated_by_an_error() -> None:
    for line in ("connect 'kafka://u:hunter2@h", "connect x --options sasl.password=hunter2,b"):
        with pytest.raises(BrokerError) as caught:
            read(line)
        assert "hunter2" not in str(caught.value)
