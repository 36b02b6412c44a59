"""The verb `live`, as a coroutine on the loop thread like the verbs of `Session`."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from broker_nb import settling
from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.portable.messages import MessageSubscription
from broker_nb.portable.ranges import parse_duration
from broker_nb.session import Duration, Session, effect
from broker_nb.widgets import feeds
from broker_nb.widgets.model import LiveModel, view_name

MAX_HELD = 1000
"""What a subscription is opened for at least: others of this session may take from it too."""


async def live(
    self: Session,
    topic: str,
    subscription: str | None = None,
    *,
    hold: Duration = "10m",
    create: bool = False,
    join: bool = False,
    start: str = "earliest",
    max_held: int = 500,
    columns: Sequence[str] = (),
    allow: Collection[str] = (),
) -> LiveModel:
    """Show messages as they come, each with buttons to settle it. Effect on the broker: as `consume`; without a subscription none.

    Parameters
    ----------
    subscription
        As for `consume`. Left out, the topic is followed from now: nothing is taken, and there are no buttons.
    hold
        How long a row stays held for you; then it is given back.
    create, join, start
        As for `consume`.
    max_held
        Nothing more is taken while you hold so many.
    columns
        Fields of JSON bodies that get a column each, for example ["status", "order.id"].
    allow
        Without a subscription: effects to accept where the broker cannot look without them.

    Returns
    -------
    The view, which is shown at once: `view.frame()` is what it has, with the `lease` and the state of each row; `view.close()`
    gives back what it holds. Nothing is taken before a page shows it, nor after none has for a minute. Called again for the
    same subscription, the open view is shown once more, with the new `hold` and `max_held`.
    """
    columns, seconds = tuple([columns] if isinstance(columns, str) else columns), parse_duration(hold)
    if max_held < 1:
        raise BrokerError(ErrorKind.INVALID, "max_held", f"max_held={max_held}: hold at least 1 message")
    name = view_name(topic, subscription)
    known = self.views.get(name)
    if known is not None and (known.failed or not known.is_open):
        await known.close()  # to its end, so that what it held is there again
    elif known is not None:
        if known.columns != columns:
            text = f"live {name} is open with columns {list(known.columns)}; view.close() it first"
            raise BrokerError(ErrorKind.CONFLICT, name, text)
        known.max_held = max_held
        if subscription is not None:
            await self.client.subscribe(topic, subscription, hold=seconds)
        return known
    feed: feeds.Feed
    if subscription is None:
        effects = [effect(a) for a in allow]
        feed = feeds.TailFeed(await self.client.tail(topic, want=settling.LOOK_COLUMNS, allow=effects))
    else:
        key = (topic, subscription)
        fresh = key not in self.client.subscriptions
        opened = await self.client.subscribe(
            *key, hold=seconds, start=start, create=create, join=join, max_held=max(MAX_HELD, max_held)
        )
        if isinstance(opened, MessageSubscription):
            feed = feeds.MessageFeed(self.client, key, self.holder(opened), opened, fresh=fresh)
        else:
            feed = feeds.RecordFeed(self.client, key, self.holder(opened), opened, fresh=fresh)
    view = self.views[name] = LiveModel(topic, subscription, feed, columns=columns, max_held=max_held)
    deaf = self.client.host.listen(view.on_event)
    view.on_end += [lambda line: deaf(), lambda line: self.views.pop(name, None)]
    return view
