"""What links and deliveries say, and how they are answered."""

from __future__ import annotations

import struct
from typing import Any

from proton import Condition, Delivery, Link, symbol

from broker_nb.testing.servers.servicebus import amqp
from broker_nb.testing.servers.servicebus.store import Refused

SESSION_FILTER = symbol("com.microsoft:session-filter")
TRACKING = {symbol("com.microsoft:tracking-id"): "stand-in"}


def condition(name: str, text: str) -> Condition:
    """An error with every field there: the Python client reads them without looking whether they are."""
    return Condition(name, text, TRACKING)


def messages(raw: bytes) -> list[amqp.Parts]:
    """The messages of a transfer."""
    try:
        return [amqp.Parts(item) for item in amqp.batch_items(amqp.sections(raw)) or [raw]]
    except (ValueError, IndexError, struct.error) as error:
        raise Refused("amqp:decode-error", f"The message is not understood: {error}.") from error


def verdict(delivery: Delivery) -> tuple[str | None, dict[str, Any]]:
    """What a client decided about a delivery (None: nothing yet), and what it says about a dead letter."""
    remote, state = delivery.remote, delivery.remote_state
    if state == Delivery.ACCEPTED:
        return "complete", {}
    if state == Delivery.RELEASED:
        return "release", {}
    if state == Delivery.MODIFIED:
        return "defer" if remote.undeliverable else "abandon", {}
    if state == Delivery.REJECTED:
        return "dead", {str(k): v for k, v in ((remote.condition.info if remote.condition else None) or {}).items()}
    return None, {}


def asked_session(link: Link) -> tuple[bool, str | None]:
    """Whether a receiver wants a session, and which; None = any."""
    filters = link.remote_source.filter
    filters.rewind()
    asked = (filters.get_object() if filters.next() else None) or {}
    wanted = asked.get(SESSION_FILTER)
    return SESSION_FILTER in asked, getattr(wanted, "value", wanted)


def answer_session(link: Link, session: str) -> None:
    """Tell a receiver which session it has; described, as the Go client insists."""
    answer = link.source.filter
    answer.clear()
    answer.put_map()
    answer.enter()
    answer.put_symbol(SESSION_FILTER)
    answer.put_described()
    answer.enter()
    answer.put_symbol(SESSION_FILTER)
    answer.put_string(session)
    answer.exit()
    answer.exit()
