"""The verbs of one connection, written once, as coroutines on the loop thread. `connection.py` gives them their two faces."""

from __future__ import annotations

import asyncio
import functools
import secrets
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Any

from broker_nb import settling
from broker_nb.backends import profile_from_url
from broker_nb.backends.driver import Effect, Kind
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.interfaces import Topic, TransactionalPublisher
from broker_nb.portable.client import Client
from broker_nb.portable.messages import MessageSubscription
from broker_nb.portable.ranges import parse_duration, parse_range
from broker_nb.portable.records import RecordSubscription

if TYPE_CHECKING:
    import pandas as pd

    from broker_nb.frames.results import Committed, Published, Settled
    from broker_nb.widgets.model import LiveModel

Subscription = MessageSubscription | RecordSubscription
Duration = str | float | timedelta
SECRET_WORDS = ("password", "secret", "token", "jaas", "private", "credential", "seed", "key.pem", "connection_string")


class Session:
    """One open connection.

    Everything that a person should read (a caption per read, one line per settlement) is put into `said`; the face that was called
    prints it on the caller's own thread.
    """

    zone: tzinfo | None = None
    """For clock times without a zone; None = this host's."""

    def __init__(self, client: Client, name: str, url: str) -> None:
        self.client = client
        self.name = name
        self.url = url
        self.said: deque[str] = deque(maxlen=1000)
        self._holders: dict[str, Subscription] = {}
        self.views: dict[str, LiveModel] = {}

    @classmethod
    async def open(
        cls, url: str, *, name: str | None, timeout: float, options: Mapping[str, Any] | None, read_only: bool
    ) -> Session:
        """Connect; see `connect`."""
        scheme, profile = profile_from_url(url)
        merged = {**profile.get("options", {}), **(options or {})}
        hidden = [str(v) for k, v in merged.items() if any(word in k.lower() for word in SECRET_WORDS)]
        name = name or (scheme if not profile.get("hosts") else f"{scheme}-{profile['hosts'][0]}")
        client = await Client.open(
            scheme, {**profile, "options": merged, "timeout": timeout}, name=name, secrets=hidden, read_only=read_only
        )
        return cls(client, name, url)

    def _zone(self) -> tzinfo:
        return self.zone or datetime.now().astimezone().tzinfo or UTC

    # -------------------------------------------------------------- look
    async def topics(self, pattern: str = "") -> pd.DataFrame:
        """What topics there are. Effect on the broker: none.

        Parameters
        ----------
        pattern
            Shell-style, for example "orders*"; everything by default. Internal topics are left out.

        Returns
        -------
        A row per topic: topic str, partitions Int32, messages Int64 (on a compacted or transactional log an upper bound), bytes
        Int64, oldest and newest datetime64[us, UTC], rate_1m float64 (messages per second over the last minute), kind str. What the
        broker does not tell without reading is missing.
        """
        from broker_nb.frames.catalogue import topics_frame

        topics = [e for e in await self.client.entities(pattern) if e.kind is not Kind.SUBSCRIPTION]
        return topics_frame(await self.client.summaries(topics))

    async def sample(
        self,
        topic: str,
        range: str = "-100",  # noqa: A002 - the word of the grammar
        *,
        limit: int = 1_000_000,
        max_bytes: int = 1 << 30,
        partitions: Collection[int] | None = None,
        decode: str = "auto",
        attributes: Sequence[str] = (),
        where: str | None = None,
        params: Mapping[str, Any] | None = None,
        as_: str = "pandas",
        isolation: str = "committed",
        allow: Collection[str] = (),
        timeout: float | None = None,
    ) -> pd.DataFrame:
        """Read part of a topic into a frame. Effect on the broker: none, or those named in `allow`.

        Parameters
        ----------
        range
            "-100" newest of the topic, "-100/p" per partition, "+100" oldest, "12..40" offsets (end excluded), "@22:10..22:20" times,
            "@-1h..", "..end". The end is fixed when the read begins.
        limit, max_bytes
            At most so many rows and bytes of body; a cut is said and makes `complete` false. With `where`, rows that match.
        partitions
            Only these.
        decode
            "auto", "json" or "none": whether bodies become `value_<field>` columns.
        attributes
            Names that become `attr_<name>` columns.
        where, params
            SQL condition over the columns; `{{name}}` is bound from `params`.
        as_
            "pandas", "arrow" or "polars".
        isolation
            "committed": rows of open and aborted transactions are left out; "uncommitted": all are shown.
        allow
            Effects to accept where the broker cannot look without them, for example ["creates_subscription"].
        timeout
            Seconds for the whole read; None = until it is complete.

        Returns
        -------
        The frame of docs/design.md: topic, partition, offset, id, publish_time, key, key_text, attr_*, value_*, decode_error,
        delivery_count, ingestion_time, attributes, data. `df.attrs["complete"]` is True, False or "unknown"; `report(df)` says all.

        Raises
        ------
        BrokerError
            NOT_FOUND (the topic is not created), INVALID (range, where, partition), UNSUPPORTED (effects not allowed).
        """
        from broker_nb.frames.read import read_look

        if isolation not in ("committed", "uncommitted"):
            text = f'isolation={isolation!r}: say "committed" or "uncommitted"'
            raise BrokerError(ErrorKind.INVALID, "isolation", text)
        asked = parse_range(range, self._zone())
        look = await self.client.look(
            topic,
            asked,
            want=settling.LOOK_COLUMNS,
            committed_only=isolation == "committed",
            allow=[effect(a) for a in allow],
            partitions=partitions,
        )
        frame: pd.DataFrame
        frame, caption = await read_look(
            look,
            topic,
            limit=limit,
            max_bytes=max_bytes,
            decode=decode,
            attributes=attributes,
            where=where,
            params=params,
            zone=getattr(self._zone(), "key", "UTC"),
            as_=as_,
            timeout=timeout,
        )
        self.said.append(caption)
        return frame

    # -------------------------------------------------------------- take
    async def consume(
        self,
        topic: str,
        subscription: str | None = None,
        *,
        n: int = 100,
        timeout: float = 5.0,
        hold: Duration = "10m",
        create: bool = False,
        join: bool = False,
        start: str = "earliest",
        decode: str = "auto",
        attributes: Sequence[str] = (),
    ) -> pd.DataFrame:
        """Take up to `n` messages and hold them. Effect on the broker: they are leased to this session until settled.

        Parameters
        ----------
        subscription
            Consumer group, durable consumer or subscription. A Kafka group and an in-memory subscription come by being used.
        n, timeout
            Returns as soon as n are there, else after `timeout` seconds with what came (perhaps nothing: an empty frame).
        hold
            How long rows stay held for you ("30s", "10m", seconds); then they are given back. A log holds nothing: see `commit`.
        create, join
            Allow creating the subscription, and taking part beside live members.
        start
            "earliest" or "latest", for a subscription that has no position yet.

        Returns
        -------
        The frame of `sample` with a `lease` column, by which rows are settled.
        """
        from broker_nb.frames.read import read_taken

        if n < 1:
            raise BrokerError(ErrorKind.INVALID, "n", f"n={n}: ask for at least 1 message")
        seconds = parse_duration(hold)
        if subscription is None:
            raise BrokerError(
                ErrorKind.INVALID,
                topic,
                f'consume {topic}: name a subscription, for example subscription="debug"; sample looks without one',
            )
        opened = await self.client.subscribe(topic, subscription, hold=seconds, start=start, create=create, join=join)
        holder = self.holder(opened)
        taken = await opened.take(n, timeout=timeout)
        name = functools.partial(settling.lease_text, holder)
        frame: pd.DataFrame
        frame, counts = await read_taken(taken, topic, name, decode=decode, attributes=attributes)
        self.said.append(settling.taken_caption(opened, taken, counts, n, timeout, seconds))
        return frame

    def holder(self, subscription: Subscription) -> str:
        """What leases of that subscription begin with."""
        for holder, known in self._holders.items():
            if known is subscription:
                return holder
        holder = secrets.token_hex(2)
        while holder in self._holders:
            holder = secrets.token_hex(2)
        self._holders[holder] = subscription
        return holder

    async def held(self) -> pd.DataFrame:
        """What this connection holds now. Effect on the broker: none.

        Returns
        -------
        The frame of `consume`. Rows of a log (read and not committed) come without their bodies: those are in the frame that
        `consume` returned.
        """
        from broker_nb.frames.read import held_frame

        parts = settling.held_batches(self._holders)
        names = ", ".join(sub.name for sub in self._holders.values() if sub.held_count)
        frame: pd.DataFrame
        frame, caption = await held_frame(parts, names)
        self.said.append(caption)
        return frame

    async def ack(self, frame: Any = None, *, all: bool = False) -> Settled:  # noqa: A002 - the grammar's word
        """Settle rows as done. Effect on the broker: they do not come again.

        Parameters
        ----------
        frame
            Any frame with the `lease` column of what this session holds: filtered, sorted, saved and loaded again.
        all
            Instead of a frame: everything that this connection holds.

        Returns
        -------
        One line; `.frame` has lease str, outcome str, error str per row; `.ok`.
        """
        return await self._settle("ack", frame, all)

    async def nack(self, frame: Any = None, *, delay: Duration = 0, all: bool = False, final: bool = False) -> Settled:  # noqa: A002 - the grammar's word
        """Give rows back to come again. Effect on the broker: redelivery, to anybody on the subscription.

        Parameters
        ----------
        delay
            Until they come again ("30s", seconds), where the broker can delay.
        final
            Also rows whose next failed delivery would dead-letter or drop them.
        """
        return await self._settle("nack", frame, all, delay=parse_duration(delay), final=final)

    async def reject(self, frame: Any = None, *, reason: str = "", all: bool = False) -> Settled:  # noqa: A002 - the grammar's word
        """Settle rows as unusable. Effect on the broker: they do not come again; where it has dead letters, they go there.

        Parameters
        ----------
        reason
            Why, for whoever finds them; kept where the broker has a place for it.
        """
        return await self._settle("reject", frame, all, reason=reason)

    async def release(self, frame: Any = None, *, final: bool = False) -> Settled:
        """Give rows back unchanged; everything held when no frame is named. On a log: read them again.

        Effect on the broker: redelivery; where the broker counts it (`describe`), the delivery count rises.
        """
        return await self._settle("release", frame, frame is None, final=final)

    async def _settle(
        self, verb: str, frame: Any, everything: bool, *, delay: float = 0.0, reason: str = "", final: bool = False
    ) -> Settled:
        if (frame is None) is not everything:
            text = f"{verb}: name a frame with a lease column, or say all=True for everything you hold (not both)"
            raise BrokerError(ErrorKind.INVALID, verb, text)
        if frame is None:
            named = settling.everything(self._holders, logs=verb == "release")
        else:
            named = settling.named_leases(verb, frame, self._holders)
        if verb in ("nack", "release") and not final:
            settling.guard_last_delivery(verb, named)
        targets = named.by_subscription()
        parts = await asyncio.gather(
            *(settling.settle(verb, s, rows, delay=delay, reason=reason, whole=named.whole) for _, s, rows in targets)
        )
        result = settling.settled(verb, named, [(h, p) for (h, _, _), p in zip(targets, parts, strict=True)], delay)
        self.said.append(repr(result))
        return result

    async def commit(self, frame: Any) -> Committed:
        """Commit rows of a log. Effect on the broker: the group's position moves, never backwards.

        Per partition, the contiguous run of rows in `frame` from where the group stands is committed; a row that was read and is not
        in the frame stops it, and is named.
        """
        named = settling.named_leases("commit", frame, self._holders)
        result = await settling.commit(named)
        self.said.append(repr(result))
        return result

    # -------------------------------------------------------------- write
    async def publish(
        self, frame: Any, to: str, *, body: str = "data", column: str | None = None, dry_run: bool = False
    ) -> Published:
        """Publish every row of a frame as a message. Effect on the broker: they are stored in `to` (never created).

        Parameters
        ----------
        frame
            A pandas frame, or a list of OutboundMessage. Used are `key`, `attributes`, `partition` and the body's columns.
        body
            "data": the bytes of that column; refused when decoded `value_*` columns were edited. "value": the `value_*` columns,
            encoded as JSON.
        column
            Instead: the column that is the body.
        dry_run
            Check everything and send nothing.

        Returns
        -------
        One line; `.frame` has state str, id str, partition Int32, offset Int64, error str per row; `.ok` when all were accepted.
        """
        from broker_nb.frames.publish import publish_frame

        result = await publish_frame(self.client, frame, to, body=body, column=column, dry_run=dry_run, said=self.said.append)
        self.said.append(repr(result))
        return result

    # -------------------------------------------------------------- the abstraction itself
    async def subscribe(
        self,
        topic: str,
        subscription: str,
        *,
        hold: Duration = "10m",
        create: bool = False,
        join: bool = False,
        start: str = "earliest",
    ) -> Subscription:
        """The subscription as an object to pull from (`next_message` or `next_record`, `next_batch`); parameters as in `consume`."""
        seconds = parse_duration(hold)
        return await self.client.subscribe(topic, subscription, hold=seconds, create=create, join=join, start=start)

    async def topic(self, name: str) -> Topic:
        """A publisher for one topic (`publish`, `batch_publish`); NOT_FOUND when it is not there."""
        return await self.client.topic(name)

    async def transactional_publisher(self, transactional_id: str, *, timeout: float = 60.0) -> TransactionalPublisher:
        """A publisher whose messages become visible together: `async with publisher.transaction(): ...`; UNSUPPORTED without."""
        return await self.client.transactional_publisher(transactional_id, timeout)

    async def close(self) -> None:
        """Give back what is held and disconnect. Idempotent; deletes nothing durable."""
        held = sum(s.held_count for s in self.client.subscriptions.values() if isinstance(s, MessageSubscription))
        was_open = self.client.is_open
        for view in list(self.views.values()):
            await view.close()
        await self.client.close()
        if was_open:
            self.said.append(f"{self.name} | closed" + (f" | {held} held messages were given back" if held else ""))


def effect(name: str) -> Effect:
    """An effect by the name that a person gives it in `allow`."""
    try:
        return Effect[name.upper().replace("-", "_")]
    except KeyError:
        known = ", ".join(e.name.lower() for e in Effect)
        raise BrokerError(ErrorKind.INVALID, name, f"allow={name!r} is no effect; there are: {known}") from None
