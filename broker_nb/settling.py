"""From the `lease` column of a frame to deliveries and back to one line for a person."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from broker_nb.backends.driver import COLUMNS, Batch
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.messages import MessageSubscription, Settling
from broker_nb.portable.pulling import Taken
from broker_nb.portable.records import Committed as Stand
from broker_nb.portable.records import PlaceCodec, RecordSubscription

if TYPE_CHECKING:
    from broker_nb.frames.results import Committed, Settled

Subscription = MessageSubscription | RecordSubscription

LOOK_COLUMNS = COLUMNS
FINAL = "; say final=True if that is meant"
_LEASE = re.compile(r"([0-9a-f]{4})-(\d+)")
_DONE = {"ack": "acked", "nack": "nacked", "release": "released", "reject": "rejected"}


def lease_text(holder: str, serial: int) -> str:
    """How a delivery is named in a frame: unique per delivery, so that an old frame never settles a newer delivery."""
    return f"{holder}-{serial:05d}"


@dataclass(slots=True)
class Named:
    """Deliveries that a frame names, by the holder of their subscription."""

    holders: Mapping[str, Subscription]
    serials: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    rows: int = 0  # rows of the frame, duplicates included
    whole: bool = False  # everything held, rather than a frame

    def by_subscription(self) -> list[tuple[str, Subscription, list[int]]]:
        """Holder, subscription and deliveries."""
        return [(holder, self.holders[holder], serials) for holder, serials in self.serials.items()]

    @property
    def count(self) -> int:
        """Deliveries named, each once."""
        return sum(map(len, self.serials.values()))


def everything(holders: Mapping[str, Subscription], *, logs: bool) -> Named:
    """All that is held now; rows read from logs too when `logs`."""
    named = Named(holders, whole=True)
    for holder, subscription in holders.items():
        if isinstance(subscription, MessageSubscription):
            serials = [d.serial for d in subscription.held()]
        else:
            serials = subscription.held_serials() if logs else []
        if serials:
            named.serials[holder] = serials
    named.rows = named.count
    return named


def named_leases(verb: str, frame: Any, holders: Mapping[str, Subscription]) -> Named:
    """The deliveries in the `lease` column of a pandas, polars or Arrow frame.

    Raises
    ------
    BrokerError
        INVALID when there is no such column, a row has no lease, or a lease belongs to another session: then nothing was settled.
    """
    names = getattr(frame, "column_names", None) or getattr(frame, "columns", None)
    if names is None:
        text = f"{verb}: a frame with a lease column is needed, not {type(frame).__name__}; pass what consume returned, or conn.held()"
        raise BrokerError(ErrorKind.INVALID, verb, text)
    if "lease" not in list(names):
        raise BrokerError(ErrorKind.INVALID, verb, f"{verb}: this frame has no 'lease' column; keep it, or pass conn.held()")
    column = frame["lease"]
    values = column.to_pylist() if hasattr(column, "to_pylist") else column.to_list()
    named = Named(holders, rows=len(values))
    foreign: Counter[str] = Counter()
    for value in dict.fromkeys(values):
        match = _LEASE.fullmatch(value) if isinstance(value, str) else None
        if match is None:
            raise BrokerError(
                ErrorKind.INVALID, verb, f"{verb}: {value!r} is no lease; drop rows without one (frame.dropna(subset='lease'))"
            )
        holder, serial = match[1], int(match[2])
        if holder in holders:
            named.serials[holder].append(serial)
        else:
            foreign[holder] += 1
    if foreign:
        theirs, ours = ", ".join(f"{h}-*" for h in foreign), ", ".join(holders) or "none yet"
        text = (
            f"{verb}: leases {theirs} belong to another session (this is {ours}); "
            f"those messages are redelivered when their leases end; nothing was settled"
        )
        raise BrokerError(ErrorKind.LEASE_LOST, verb, text)
    return named


def held_batches(holders: Mapping[str, Subscription]) -> list[tuple[Batch, list[str]]]:
    """Everything held now as batches, with the lease of each row. Of a log's rows only the places are still known."""
    made: list[tuple[Batch, list[str]]] = []
    for holder, subscription in holders.items():
        if isinstance(subscription, MessageSubscription):
            held = subscription.held()
            for codec, deliveries in itertools.groupby(held, key=lambda d: d.codec):
                group = list(deliveries)
                made.append((Batch(codec, [d.row for d in group]), [lease_text(holder, d.serial) for d in group]))
        elif serials := subscription.held_serials():
            topic = subscription.name.split("/")[0]
            rows = [(topic, *subscription.place(serial)) for serial in serials]
            made.append((Batch(PlaceCodec(), rows), [lease_text(holder, s) for s in serials]))
    return made


def guard_last_delivery(verb: str, named: Named) -> None:
    """Ask before rows are given back whose next failed delivery would exhaust them."""
    for _, subscription, serials in named.by_subscription():
        if not isinstance(subscription, MessageSubscription):
            continue
        terms = subscription.terms
        if not terms.return_counts or terms.max_deliveries is None:
            continue
        last = [s for s in serials if (subscription.delivery_count(s) or 0) >= terms.max_deliveries]
        if last:
            text = (
                f"{verb} {subscription.name}: {len(last)} of {len(serials)} rows are at delivery {terms.max_deliveries} of "
                f"{terms.max_deliveries}: giving them back dead-letters or drops them{FINAL}"
            )
            raise BrokerError(ErrorKind.CONFLICT, subscription.name, text)


async def settle(
    verb: str, subscription: Subscription, serials: Sequence[int], *, delay: float, reason: str, whole: bool
) -> list[Settling]:
    """Settle on one subscription. A log has one such verb: releasing everything, which reads it again."""
    if isinstance(subscription, MessageSubscription):
        return await subscription.settle(serials, verb, delay=delay, reason=reason)
    if verb == "release" and whole:
        await subscription.rewind()
        return [Settling(serial, "settled") for serial in serials]
    hints = {
        "release": "release() without a frame reads everything uncommitted again",
        "reject": "conn.publish(frame, to=...) puts the rows aside, then conn.commit(frame)",
    }
    raise BrokerError(
        ErrorKind.UNSUPPORTED,
        subscription.name,
        f"{verb} {subscription.name}: this is a log: commit works per partition, up to a position; {hints.get(verb, 'conn.commit(frame)')}",
    )


def settled(verb: str, named: Named, parts: Sequence[tuple[str, list[Settling]]], delay: float) -> Settled:
    """The result of settling: one line and a row per delivery. `parts` are (holder, results)."""
    from broker_nb.frames.results import Settled

    rows = [
        (lease_text(holder, s.serial), _DONE[verb] if s.state in ("settled", "sent") else s.state, s.text or None)
        for holder, results in parts
        for s in results
    ]
    return Settled(_settled_line(verb, named, [s for _, results in parts for s in results], delay), rows)


def _settled_line(verb: str, named: Named, results: Sequence[Settling], delay: float) -> str:
    states = Counter("settled" if s.state == "sent" else s.state for s in results)
    names = ", ".join(sub.name for _, sub, _ in named.by_subscription()) or "nothing held"
    done, already, lost = states["settled"], states["already"], [s for s in results if s.state == "lost"]
    counts = [f"{done:,} {_DONE[verb]}"] if verb != "nack" else [f"{done:,} back" + (f" in {delay:g} s" if delay else " now")]
    if verb == "reject" and done:
        buried = {sub.facts.dead_letter for _, sub, _ in named.by_subscription()}
        to = ", ".join(sorted(each.name for each in buried if each is not None))
        counts[0] += f" to {to}" if to else " (no dead letters are kept here: they do not come again)"
    if already:
        first = next(s for s in results if s.state == "already")
        counts.append(f"{already:,} already settled ({first.text})")
    if lost:
        leases = [lease_text(h, s) for h, ss in named.serials.items() for s in ss if s in {x.serial for x in lost}]
        more = f" and {len(leases) - 5} more" if len(leases) > 5 else ""
        counts.append(f"{len(lost):,} lost ({lost[0].text}): {' '.join(leases[:5])}{more}")
    for state, word in (
        ("refused", "refused by the broker"),
        ("retry", "not settled, try again"),
        ("foreign", "never delivered here"),
    ):
        if states[state]:
            text = next(s.text for s in results if s.state == state)
            counts.append(f"{states[state]:,} {word} ({text})")
    line = [f"{verb} {names}", ", ".join(counts)]
    if any(s.state == "sent" for s in results):
        line[-1] += " (sent; this broker does not confirm)"
    if named.rows != named.count:
        line.append(f"{named.rows:,} rows name {named.count:,} leases")
    if held := sum(sub.held_count for _, sub, _ in named.by_subscription()):
        line.append(f"{held:,} still held (%broker held)")
    return " | ".join(line)


async def commit(named: Named) -> Committed:
    """Commit what a frame names, per partition, as far as it is contiguous."""
    from broker_nb.frames.results import Committed

    rows: list[tuple[str, Stand]] = []
    for _, subscription, serials in named.by_subscription():
        if isinstance(subscription, MessageSubscription):
            text = f"commit {subscription.name}: its messages are settled one by one; conn.ack(frame)"
            raise BrokerError(ErrorKind.UNSUPPORTED, subscription.name, text)
        rows.extend((subscription.name, stand) for stand in await subscription.commit(serials))
    lines = [_stand_line(name, stand) for name, stand in rows]
    return Committed(
        "commit | " + (" | ".join(lines) or "no rows were named"),
        [
            (
                name,
                s.partition,
                s.position[0] if s.position else None,
                s.open_at[0] if s.open_at else None,
                s.waiting,
                str(s.error) if s.error else None,
            )
            for name, s in rows
        ],
    )


def _stand_line(name: str, stand: Stand) -> str:
    where = f"{name.split('/')[0]}[{stand.partition}]"
    if stand.error is not None:
        return f"{where}: NOT committed: {stand.error}"
    to = f"committed to {stand.position[0]}" if stand.position else "nothing committed"
    if stand.open_at is None:
        return f"{where}: {to}"
    return f"{where}: {to}; {stand.open_at[0]} not in the selection, {stand.waiting - 1} after it wait"


def taken_caption(
    subscription: Subscription, taken: Iterable[Taken], counts: Mapping[int, int], n: int, timeout: float, hold: float
) -> str:
    """The one line of `consume`. `counts` is delivery count -> rows."""
    rows = sum(len(t.batch.rows) for t in taken)
    line = [f"consume {subscription.name}"]
    few = f"{rows:,} of {n:,} within {timeout:g} s" if rows < n else f"{rows:,}"
    if isinstance(subscription, RecordSubscription):
        line += [f"{few} read, nothing committed", "commit with conn.commit(frame)"]
        return " | ".join(line)
    until = datetime.fromtimestamp(datetime.now(UTC).timestamp() + hold, UTC)
    terms = subscription.terms
    if terms.seconds is None or terms.renewable:
        extended = "extended for you, at most" if terms.seconds is not None else "given back after"
        line.append(f"{few} held until {until:%H:%M:%S} UTC ({extended} {_short(hold)})")
    else:
        line.append(f"{few} held for {terms.seconds:g} s (this broker cannot extend; they are given back before that)")
    ordinals = {1: "first", 2: "second", 3: "third"}
    words = [f"{ordinals.get(k, f'{k}th')} {v:,}" for k, v in sorted(counts.items())]
    if words:
        words[0] = words[0].replace(" ", " delivery ")
        most = [f"dead-letter at {terms.max_deliveries}"] if terms.max_deliveries else []
        line.append(", ".join(words + most))
    if rows:
        line.append("release with %broker release")
    return " | ".join(line)


def _short(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "m")):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"
