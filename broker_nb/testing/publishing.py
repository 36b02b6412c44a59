"""Publishing: what is accepted arrives byte by byte, what cannot be stored is refused and says why."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from datetime import UTC, datetime

from broker_nb.errors import ErrorKind
from broker_nb.messages import Attributes, AttributeValue, OutboundMessage, make_attribute
from broker_nb.testing.bench import Bench, Item, bodies, in_any_order, numbered, refusal
from broker_nb.testing.harness import Suite, case

AWKWARD = (
    "a/b",
    "../../etc/passwd",
    "..",
    "a b",
    " lead and trail ",
    'quo"te',
    "apostro'phe",
    "back\\slash",
    "semi;colon, comma: colon",
    "percent%20 and + plus",
    "<b>&amp;</b>",
    "{'json': [1]}",
    "tab\tline\nfeed\r",
    "żółć",
    "日本語",
    "🦆 and \u200d joiner",
    "\u202egnp.exe",
    "".join(map(chr, range(128))),
)
"""18 texts that somebody once forgot to escape."""

VALUES: tuple[AttributeValue, ...] = (
    "text",
    b"\xff\x00bytes",
    7,
    0.1,
    math.inf,
    True,
    datetime(2026, 11, 22, 22, 10, 0, 123000, UTC),  # a millisecond is what a broker keeps that keeps times
    uuid.UUID(int=2**127 + 1),
)


class Publishing(Suite):
    """Written by the driver, read back by the driver."""

    @case()
    async def test_twelve_sends_at_once(self, bench: Bench) -> None:
        """Twelve concurrent sends of six messages each: a result per message, in order, and all 72 arrive."""
        topic = await bench.topic()
        publisher = await bench.client.topic(topic)
        parts = [numbered(6, f"{i:02}-") for i in range(12)]
        results = await asyncio.gather(*(publisher.batch_publish(*map(OutboundMessage, part)) for part in parts))
        assert [[r.state for r in batch] for batch in results] == [["accepted"] * 6] * 12
        got = await (await bench.reader(topic)).read(72)
        assert in_any_order(got) == sorted(body for part in parts for body in part)
        placed = {body: r.id for part, batch in zip(parts, results, strict=True) for body, r in zip(part, batch, strict=True)}
        assert all(placed[item.data or b""] in (None, item.id) for item in got)

    @case()
    async def test_awkward_attributes(self, bench: Bench) -> None:
        """18 awkward strings as name and as value of an attribute: byte-identical, or refused with the reason before it is sent."""
        topic = await bench.topic()
        publisher = await bench.client.topic(topic)
        wanted = [OutboundMessage(b"%d" % i, None, {text: "value"}) for i, text in enumerate(AWKWARD)]
        wanted += [OutboundMessage(b"%d" % (100 + i), None, {"name": text}) for i, text in enumerate(AWKWARD)]
        results = await publisher.batch_publish(*wanted)
        refused = [r for r in results if not r.ok]
        assert {r.state for r in refused} <= {"refused"}
        assert all(r.error is not None and r.error.kind is ErrorKind.INVALID and topic in str(r.error) for r in refused)
        assert sum(r.ok for r in results) >= bench.harness.awkward, "only NUL and the like may be beyond a broker"
        expected = {
            m.data: m.attributes.names + tuple(a.value for a in m.attributes)
            for m, r in zip(wanted, results, strict=True)
            if r.ok
        }
        got = await (await bench.reader(topic)).read(len(expected))
        assert {m.data: m.attributes.names + tuple(a.value for a in m.attributes) for m in got} == expected

    @case()
    async def test_attribute_types(self, bench: Bench) -> None:
        """A value of each type: where the broker has the type it comes back with it, else it is refused, never formatted silently."""
        topic = await bench.topic()
        publisher = await bench.client.topic(topic)
        attributes = [make_attribute("name", value) for value in VALUES]
        results = await publisher.batch_publish(*(OutboundMessage(a.value, None, Attributes([a])) for a in attributes))
        typed = len(bench.capabilities.attribute_types - {str, bytes}) > 0
        for value, result in zip(VALUES, results, strict=True):
            able = type(value) in bench.capabilities.attribute_types
            assert result.state == ("accepted" if able else "refused"), f"{type(value).__name__}: {result}"
        sent = {a for a, r in zip(attributes, results, strict=True) if r.ok}
        got = await (await bench.reader(topic)).read(len(sent))
        found = {a for m in got for a in m.attributes}
        assert {(a.value, a.type) for a in found} == {(a.value, a.type if typed else "") for a in sent}

    @case()
    async def test_what_the_broker_can_tell_apart(self, bench: Bench) -> None:
        """Null and empty body, null and empty key, binary key, null and repeated attributes: each round trips, or is refused."""
        able, topic = bench.capabilities, await bench.topic()
        publisher = await bench.client.topic(topic)
        tried = {
            "null body": (
                OutboundMessage(None, b"first", {"case": "null body"}),
                able.null_data,
            ),  # a key of its own: it may be refused
            "empty body": (OutboundMessage(b"", b"key", {"case": "empty body"}), True),
            "no key": (OutboundMessage(b"x", None, {"case": "no key"}), True),
            "key": (OutboundMessage(b"x", b"text", {"case": "key"}), able.keys),
            "empty key": (OutboundMessage(b"x", b"", {"case": "empty key"}), able.null_key_is_not_empty),
            "binary key": (OutboundMessage(b"x", b"\x00\xff\xfe", {"case": "binary key"}), able.binary_keys),
            "null attribute": (OutboundMessage(b"x", None, [("case", "null attribute"), ("a", None)]), able.null_attributes),
            "repeated": (
                OutboundMessage(b"x", None, [("case", "repeated"), ("a", "1"), ("b", "2"), ("a", "3")]),
                able.repeated_attributes,
            ),
            "none": (OutboundMessage(b"no attributes"), True),
        }
        results = await publisher.batch_publish(*(message for message, _ in tried.values()))
        states = {name: r.state for name, r in zip(tried, results, strict=True)}
        assert states == {name: "accepted" if ok else "refused" for name, (_, ok) in tried.items()}
        expected = [m for (m, _), r in zip(tried.values(), results, strict=True) if r.ok]
        got = await (await bench.reader(topic)).read(len(expected))

        def told(message: Item | OutboundMessage) -> tuple[object, ...]:
            return message.data, message.key, tuple((a.name, a.value) for a in message.attributes)

        assert sorted(map(told, got), key=repr) == sorted(map(told, expected), key=repr)

    @case()
    async def test_bodies_are_bytes(self, bench: Bench) -> None:
        """Invalid UTF-8, all 256 bytes, NULs, a lone line feed and half a megabyte: byte-identical."""
        sent = [b"\xff\xfe\xfd", bytes(range(256)), b"\0" * 10, b"\n", b"\xc3\x28", bytes(range(256)) * 2048]
        topic = await bench.topic()
        await bench.publish(topic, sent)
        assert in_any_order(await (await bench.reader(topic)).read(len(sent))) == sorted(sent)

    @case("max_message_bytes")
    async def test_a_message_that_is_too_large(self, bench: Bench) -> None:
        """One that is too large is refused and says so, later ones of its key are held back, the others are sent."""
        topic = await bench.topic(max_message_bytes=5000)
        publisher = await bench.client.topic(topic)
        large, small = bytes(20_000), b"small"
        results = await publisher.batch_publish(
            *(OutboundMessage(body, key) for body, key in ((small, b"a"), (large, b"a"), (small, b"a"), (small, b"b")))
        )
        assert [r.state for r in results] == ["accepted", "refused", "refused", "accepted"]
        assert [m.key for m in await (await bench.reader(topic)).read(2)] in ([b"a", b"b"], [b"b", b"a"])

    @case()
    async def test_closed_publisher(self, bench: Bench) -> None:
        """Publishing after close is an error that says so; a second close is fine; a new publisher works."""
        topic = await bench.topic()
        publisher = await bench.publisher(topic)
        assert (await publisher.publish(OutboundMessage(b"1"))).ok
        await asyncio.gather(publisher.close(), publisher.close())
        assert (await refusal(publisher.publish(OutboundMessage(b"2")))).kind is ErrorKind.CLOSED
        await bench.publish(topic, [b"3"])
        assert bodies(await (await bench.reader(topic)).read(2)) == [b"1", b"3"]

    @case()
    async def test_missing_topic(self, bench: Bench) -> None:
        """Publishing to a topic that is not there is NOT_FOUND at once, names it, and does not make it."""
        before, missing = await bench.snapshot(), bench.name("missing")
        began = time.monotonic()
        error = await refusal(bench.client.topic(missing))
        assert time.monotonic() - began < 5
        assert error.kind is ErrorKind.NOT_FOUND
        assert missing in str(error)
        assert await bench.snapshot() == before

    @case()
    async def test_closed_connection(self, bench: Bench) -> None:
        """After close everything is an error that says so; a second close is fine."""
        topic, client = await bench.topic(), await bench.connect()
        publisher = await client.topic(topic)
        await asyncio.gather(client.close(), client.close())
        for call in (
            client.entities(),
            client.topic(topic),
            client.subscribe(topic, "s"),
            publisher.publish(OutboundMessage(b"x")),
        ):
            assert (await refusal(call)).kind is ErrorKind.CLOSED
