"""The embedded broker filled with made-up orders: what `connect("demo")` opens. The same orders every time, ending now."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from broker_nb.backends.driver import Family, Outbound, Verdict
from broker_nb.backends.inmem.broker import InmemBroker
from broker_nb.backends.inmem.driver import InmemDriver
from broker_nb.backends.inmem.subscriptions import Consumer, Queue
from broker_nb.messages import Attribute

ORDERS, PAYMENTS, DEAD = 12_000, 8_000, 37
FIRST_ID = 2**53 + 1  # what a float cannot hold
_HOUR_NS = 3600 * 10**9
_CURRENCIES = ("EUR", "USD", "GBP", "CHF")
_FAILURES = (
    ("UnknownCurrency", "currency ''"),
    ("SocketTimeout", "connect timed out after 3000 ms"),
    ("OutOfStock", "item 4711 out of stock"),
)
_UNDECODABLE = {ORDERS - 789: b"\xff\xfe\x00order", ORDERS - 267: b'{"order_id": 90071992547'}
_NO_STATUS = {ORDERS - 910, ORDERS - 650, ORDERS - 390, ORDERS - 130}
_lock = threading.Lock()


class DemoDriver(InmemDriver):
    """A connection to the demo."""

    scheme: ClassVar[str] = "demo"
    most_names: ClassVar[int] = 0

    @classmethod
    async def find(cls, name: str) -> InmemBroker:
        return await asyncio.to_thread(demo_broker)  # filling it takes a moment, and the loop goes on

    @property
    def about(self) -> str:
        return f"embedded broker in this kernel, {len(self.broker.topics)} topics with made-up orders"


def demo_broker() -> InmemBroker:
    """The process's demo, filled when first asked for."""
    broker = InmemBroker.get("demo")
    with _lock:
        if "orders" not in broker.topics:
            fill(broker)
    return broker


def fill(broker: InmemBroker) -> None:
    """Make the demo's topics on a broker: `orders`, `orders.dlq` (a log only) and `payments`, and the subscription `debug`."""
    now = broker.clock.time_ns()
    broker.create_topic("orders.dlq", families=[Family.RECORD])
    broker.create_topic("orders", partitions=3, subscriptions=["debug"], dead_letter="orders.dlq")
    broker.create_topic("payments", partitions=2)
    failed = [i for i in range(ORDERS) if _failure(i) is not None]
    broker.publish("orders", _timed(now, 1, (_order(i) for i in range(ORDERS)), ORDERS))
    broker.publish("orders.dlq", _timed(now, 37, (_dead(i) for i in failed[-DEAD:]), DEAD))
    broker.publish("payments", _timed(now, 1, (_payment(i) for i in range(PAYMENTS)), PAYMENTS))
    _deliver_once(broker, rows=3)


def _timed(now: int, shift: int, rows: Iterable[Outbound], count: int) -> Iterator[Outbound]:
    """Evenly over the last hour, the newest just now."""
    step = _HOUR_NS // count
    first = now - step * (count - 1) - shift * 1_000_000
    for i, row in enumerate(rows):
        yield row._replace(time_ns=first + i * step)


def _failure(i: int) -> tuple[str, str] | None:
    """Class and message of what went wrong with an order; None: it is fine, or says nothing."""
    if i % 23 != (ORDERS - 1000 + 17) % 23 or i in _UNDECODABLE or i in _NO_STATUS:
        return None
    return _FAILURES[0 if i % 3 else 1 + i % 2]


def _order(i: int) -> Outbound:
    key = b"cust-%d" % (i * 7919 % 41)
    trace = tuple(Attribute("trace", b"%04x" % ((i * n + 0xAB12) % 65536), "str") for n in (31, 57))
    return Outbound(_UNDECODABLE.get(i) or _json(_document(i)), key, trace)


def _document(i: int) -> dict[str, Any]:
    failure = _failure(i)
    document: dict[str, Any] = {"order_id": FIRST_ID + i}
    if i not in _NO_STATUS:
        document["status"] = "ok" if failure is None else "failed"
    if failure is not None:
        document["reason"] = failure[1]
    document["currency"] = "" if failure == _FAILURES[0] else _CURRENCIES[i % 4]
    document["amount"] = (i * 37 % 20_000 + 199) / 100
    document["items"] = [{"sku": f"A-{(i + n) % 97}", "n": 1 + (i + n) % 3} for n in range(1 + i % 2)]
    return document


def _dead(i: int) -> Outbound:
    order = _order(i)
    failure = _failure(i)
    assert failure is not None, "only failed orders are dead letters"  # noqa: S101 - chosen so
    notes = {"error.class": failure[0], "error.message": failure[1], "origin.topic": "orders"}
    added = tuple(Attribute(name, value.encode(), "str") for name, value in notes.items())
    return order._replace(attributes=(*order.attributes, *added))


def _payment(i: int) -> Outbound:
    document = {
        "payment_id": f"pay-{i:06d}",
        "order_id": FIRST_ID + i,
        "status": "declined" if i % 29 == 5 else "settled",
        "currency": _CURRENCIES[i % 4],
        "amount": (i * 37 % 20_000 + 199) / 100,
    }
    return Outbound(_json(document), b"cust-%d" % (i * 7919 % 41))


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _deliver_once(broker: InmemBroker, rows: int) -> None:
    """Somebody already took the first rows of orders/debug and gave them back, so that a second delivery is to be seen."""
    with broker.lock:
        queue = broker.topic("orders").subscriptions["debug"]
        assert isinstance(queue, Queue), "made as one above"  # noqa: S101 - for the type checker
        consumer = Consumer(rows, lambda tokens: None)
        leased = queue.take(consumer, rows, 1 << 20)
        for token in leased.tokens if leased is not None else ():
            queue.settle(consumer, token, Verdict.RELEASE, 0.0, "")
