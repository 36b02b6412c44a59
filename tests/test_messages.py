import pickle
import uuid
from datetime import UTC, datetime

import pytest

from broker_nb.errors import BrokerError, ErrorKind, Lost, NotFound, Refused, Unavailable, one_line
from broker_nb.messages import Attribute, Attributes, Message, OutboundMessage, Published, Record

ASCII = "".join(map(chr, range(128)))
AWKWARD = [
    "",
    "/",
    "../x",
    "a/b\\c",
    "'quoted'",
    '"',
    "äöü",
    "日本語",
    "🙂",
    "\u202egnp",
    ASCII,
    " ",
    "a=b&c",
    "%20",
    "{{x}}",
    "\x00",
    "--",
    "null",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_stays_as_it_is(text):
    attributes = Attributes.of({text: text})
    assert attributes == [Attribute(text, text.encode(), "str")]
    assert attributes.text(text) == text


@pytest.mark.parametrize(
    ("value", "data", "kind"),
    [
        (None, None, ""),
        ("", b"", "str"),
        (b"", b"", "bytes"),
        (b"\xff\x00", b"\xff\x00", "bytes"),
        (True, b"true", "bool"),
        (2**63, b"9223372036854775808", "int"),
        (-(2**53) - 1, b"-9007199254740993", "int"),
        (0.1, b"0.1", "float"),
        (datetime(2026, 1, 2, tzinfo=UTC), b"2026-01-02T00:00:00+00:00", "datetime"),
        (uuid.UUID(int=1), b"00000000-0000-0000-0000-000000000001", "uuid"),
    ],
)
def test_a_value_keeps_its_type_beside_its_bytes(value, data, kind):
    assert Attributes.of({"a": value}) == [Attribute("a", data, kind)]


@pytest.mark.parametrize("value", [[1], {"x": 1}, object(), 1j, datetime(2026, 1, 2)])
def test_a_value_that_cannot_be_an_attribute_is_named(value):
    with pytest.raises(Refused, match="'colour'") as e:
        OutboundMessage(b"", attributes={"colour": value})
    assert e.value.kind is ErrorKind.INVALID


@pytest.mark.parametrize("wrong", ["ab", b"ab", 5, [("a",)], [("a", 1, 2)], ["ab"], [None], {1: "x"}, [(None, "x")]])
def test_attributes_of_the_wrong_form_are_one_clear_error(wrong):
    with pytest.raises(BrokerError, match="attribute") as e:
        Attributes.of(wrong)
    assert e.value.kind is ErrorKind.INVALID


def test_a_null_attribute_is_null_and_not_empty_nor_missing():
    attributes = Attributes.of([("a", None), ("b", "")])
    assert attributes.all("a") == [None]
    assert attributes.text("a") is None
    assert attributes.text("b") == ""
    assert attributes.all("c") == []


def test_repeats_stay_in_order_and_the_last_is_the_text():
    attributes = Attributes.of([("t", "1"), ("u", "x"), ("t", b"\xff2")])
    assert attributes.names == ("t", "u", "t")
    assert attributes.all("t") == [b"1", b"\xff2"]
    assert attributes.text("t") == "\ufffd2"
    assert attributes[1:].names == ("u", "t")


def test_attributes_that_came_from_a_broker_keep_their_types():
    given = [Attribute("n", b"1", "int"), Attribute("t", b"x", "")]
    assert Attributes.of(given) == given
    assert OutboundMessage(b"", attributes=Attributes(given)).attributes == given
    assert hash(Attributes(given)) == hash(Attributes.of(given))


def test_null_and_empty_stay_apart_in_data_and_key():
    assert OutboundMessage(None).data is None
    assert OutboundMessage(b"").data == b""
    assert OutboundMessage(b"", key=b"").key == b""
    assert OutboundMessage(b"").key is None


@pytest.mark.parametrize("what", ["data", "key"])
@pytest.mark.parametrize("wrong", ["text", 5, bytearray(b"x"), ["x"]])
def test_bodies_and_keys_are_bytes(what, wrong):
    with pytest.raises(BrokerError, match=f"{what} must be bytes"):
        OutboundMessage(**({"data": b""} | {what: wrong}))


def test_a_large_message_does_not_fill_the_screen():
    assert len(repr(OutboundMessage(b"x" * 1_000_000))) < 100
    assert repr(OutboundMessage(None)) == "OutboundMessage(null, key=None, 0 attributes)"


@pytest.mark.parametrize(
    ("nanoseconds", "expected"),
    [
        (None, None),
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (1_700_000_000_123_456_789, datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC)),
        (-1, datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
        (2**63 - 1, datetime(2262, 4, 11, 23, 47, 16, 854775, tzinfo=UTC)),
        (10**21, None),
        (-(10**21), None),
    ],
)
def test_publish_time(nanoseconds, expected):
    async def mark(upto): ...

    row = Record("t", "0:0", None, None, Attributes(), nanoseconds, None, 0, 0, datetime.now(UTC), mark)
    assert row.publish_time == expected


def test_each_verb_reaches_the_broker_with_what_was_said():
    import asyncio

    calls = []

    async def settle(*said):
        calls.append(said)

    async def mark(upto):
        calls.append(upto)

    async def main():
        now = datetime.now(UTC)
        m = Message("t", "1", None, None, Attributes(), None, None, None, now, settle, lambda: now)
        await m.ack()
        await m.nack(delay=2.5)
        await m.reject("bad json")
        assert m.lease_expires == now
        r = Record("t", "0:0", None, None, Attributes(), None, None, 0, 0, now, mark)
        await r.ack()
        await r.commit_to()

    asyncio.run(main())
    assert calls == [("ack", 0.0, ""), ("nack", 2.5, ""), ("reject", 0.0, "bad json"), False, True]


@pytest.mark.parametrize(("state", "ok"), [("accepted", True), ("duplicate", True), ("refused", False), ("unknown", False)])
def test_published_is_ok_only_when_the_broker_has_it(state, ok):
    assert Published(state).ok is ok


@pytest.mark.parametrize("kind", ErrorKind)
def test_an_error_survives_pickling_with_its_class(kind):
    error = BrokerError(kind, "orders", "text", retryable=True)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(again), again.kind, again.entity, str(again), again.retryable) == (type(error), kind, "orders", "text", True)


def test_errors_have_their_classes():
    classes = {kind: type(BrokerError(kind, "e", "t")) for kind in ErrorKind}
    assert classes[ErrorKind.NOT_FOUND] is NotFound
    assert classes[ErrorKind.CLOSED] is Refused
    assert classes[ErrorKind.THROTTLED] is Unavailable
    assert classes[ErrorKind.LEASE_LOST] is Lost
    assert classes[ErrorKind.UNKNOWN] is BrokerError


def test_an_error_is_one_line_without_controls():
    assert one_line("a\r\nb\x1b[31mc\u202ed\t") == "a b [31mc d"
    assert len(one_line("x" * 10_000)) == 600
