"""What the stand-in stores: queues with their locks, sessions and dead letters, and topics that copy to subscriptions."""

from __future__ import annotations

import copy
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from broker_nb.testing.servers.servicebus.amqp import Parts, milliseconds, small
from broker_nb.testing.servers.servicebus.rules import Rule

ACTIVE, DEFERRED, SCHEDULED = 0, 1, 2
PARTITIONS = 16
_BELOW = 48  # bits of a sequence number below its partition
DEFAULTS: dict[str, Any] = {
    "lock_s": 30,
    "max_deliveries": 10,
    "sessions": False,
    "ttl_s": None,
    "dead_letter_expired": False,
    "duplicates_s": None,
    "partitioned": False,
    "max_message_bytes": 256 * 1024,
    "forward_dead_to": None,  # a queue
}


class Refused(Exception):
    """What the broker answers instead: an AMQP condition and a text."""

    def __init__(self, condition: str, text: str) -> None:
        super().__init__(text)
        self.condition, self.text = condition, text


class Stored:
    """One message in one queue."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.seq = 0
        self.first_seq = 0  # in the queue that it was sent to
        self.enqueued = 0.0
        self.expires: float | None = None
        self.due = 0.0
        self.count = 0
        self.state = ACTIVE
        self.lock: uuid.UUID | None = None
        self.until = 0.0
        self.owner: object = None
        self.source = ""  # of a dead letter

    @property
    def session(self) -> str | None:
        """Its session id."""
        session: str | None = self.parts.field(10)
        return session

    def encoded(self, token: uuid.UUID | None = None) -> bytes:
        """As it goes out; with its lock's token in it where it goes out as an answer."""
        marks: dict[str, Any] = {
            "x-opt-sequence-number": self.seq,
            "x-opt-enqueue-sequence-number": self.first_seq,
            "x-opt-enqueued-time": milliseconds(self.enqueued),
            "x-opt-message-state": small(self.state),
        }
        if self.lock is not None:
            marks["x-opt-locked-until"] = milliseconds(self.until)
        if self.source:
            marks["x-opt-deadletter-source"] = self.source
        return self.parts.encoded(self.count, marks, {"x-opt-lock-token": token} if token else None)


class Queue:
    """A queue, a subscription, or the dead-letter sub-queue of one."""

    def __init__(self, path: str, settings: dict[str, Any], dead: Queue | None) -> None:
        self.path = path
        self.dead = dead
        self.created = self.updated = time.time()
        self.settings = {**DEFAULTS, **settings}
        self.messages: dict[int, Stored] = {}
        self.locked: dict[uuid.UUID, Stored] = {}
        self.sessions: dict[str, tuple[object, float]] = {}  # who holds it, until when
        self.states: dict[str, bytes | None] = {}
        self.rules: dict[str, Rule] = {}
        self._seen: dict[str, float] = {}
        self._numbers = [0] * PARTITIONS
        self._turn = 0
        self.changed: Callable[[Queue], None] = lambda _: None
        self.forward: Callable[[str, Parts], object] = lambda *_: None

    # -------------------------------------------------------------- in
    def put(self, parts: Parts) -> int:
        """Store a message, or drop it as a duplicate; its sequence number, 0 for a duplicate."""
        if self.settings["sessions"] and parts.field(10) is None:
            raise Refused("amqp:not-allowed", f"'{self.path}' requires a session: the message has no session id")
        now = time.time()
        if (window := self.settings["duplicates_s"]) and (identity := parts.field(0)) is not None:
            self._seen = {k: t for k, t in self._seen.items() if t > now - window}
            if str(identity) in self._seen:
                return 0
            self._seen[str(identity)] = now
        message = Stored(parts)
        due = parts.annotations.get("x-opt-scheduled-enqueue-time")
        if due is not None and due / 1000 > now:
            message.state, message.due = SCHEDULED, due / 1000
        return self._add(message, now)

    def _add(self, message: Stored, now: float) -> int:
        message.seq = self._number(message.parts)
        message.first_seq = message.first_seq or message.seq
        message.enqueued = now
        lives = [s for s in (message.parts.ttl_s, self.settings["ttl_s"]) if s is not None]
        message.expires = now + min(lives) if lives and self.dead is not None else None
        self.messages[message.seq] = message
        self.changed(self)
        return message.seq

    def _number(self, parts: Parts) -> int:
        partition = 0
        if self.settings["partitioned"]:
            key = parts.annotations.get("x-opt-partition-key") or parts.field(10)
            partition = zlib.crc32(str(key).encode()) % PARTITIONS if key is not None else self._turn % PARTITIONS
            self._turn += 1
        self._numbers[partition] += 1
        return partition << _BELOW | self._numbers[partition]

    # -------------------------------------------------------------- out
    def next(self, session: str | None) -> Stored | None:
        """The oldest message that may be delivered, of that session in a queue with sessions."""
        ready = (m for m in self.messages.values() if m.state == ACTIVE and m.lock is None)
        if self.settings["sessions"]:
            ready = (m for m in ready if m.session == session)
        return next(ready, None) if not self.settings["partitioned"] else min(ready, key=lambda m: m.enqueued, default=None)

    def take(self, message: Stored, owner: object) -> uuid.UUID:
        """Lock a message for `owner`; the lock's token."""
        message.lock, message.owner = uuid.uuid4(), owner
        held = self.sessions.get(message.session or "")
        message.until = held[1] if held and self.settings["sessions"] else time.time() + self.settings["lock_s"]
        self.locked[message.lock] = message
        return message.lock

    def drop(self, message: Stored) -> None:
        """It is gone."""
        self._unlock(message)
        self.messages.pop(message.seq, None)

    def _unlock(self, message: Stored) -> None:
        if message.lock is not None:
            self.locked.pop(message.lock, None)
        message.lock = message.owner = None

    def give_back(self, message: Stored, *, count: bool) -> None:
        """Make it available again; after too many deliveries it is dead-lettered."""
        self._unlock(message)
        message.count += count
        if count and self.dead is not None and message.count >= self.settings["max_deliveries"]:
            text = f"Message could not be consumed after {message.count} delivery attempts."
            self.bury(message, "MaxDeliveryCountExceeded", text)
        self.changed(self)

    def bury(self, message: Stored, reason: str | None, text: str | None) -> None:
        """Move it to the dead-letter sub-queue; in that one, drop it."""
        self.drop(message)
        if self.dead is None:
            return
        added = {"DeadLetterReason": reason, "DeadLetterErrorDescription": text}
        message.parts = copy.copy(message.parts)  # other subscriptions have the same
        message.parts.set_application({**message.parts.application, **{k: v for k, v in added.items() if v}})
        message.state, message.source = ACTIVE, self.path
        if self.settings["forward_dead_to"]:
            self.forward(self.settings["forward_dead_to"], message.parts)
        else:
            self.dead._add(message, time.time())

    def settle(self, token: uuid.UUID, verdict: str, reason: str | None = None, text: str | None = None) -> None:
        """What a client decided about a lock: complete, abandon, release, defer or dead."""
        message = self.locked.get(token)
        if message is None and self.settings["sessions"]:
            raise Refused("com.microsoft:session-lock-lost", "The session lock has expired, or the message was settled.")
        if message is None:
            raise Refused(
                "com.microsoft:message-lock-lost", "The lock supplied is invalid: it expired, or the message was settled."
            )
        if verdict == "complete":
            self.drop(message)
        elif verdict == "defer":
            self._unlock(message)
            message.state = DEFERRED
        elif verdict == "dead":
            self.bury(message, reason, text)
        else:
            self.give_back(message, count=verdict == "abandon")
        self.changed(self)

    # -------------------------------------------------------------- sessions
    def waiting_sessions(self) -> Iterable[str]:
        """Sessions with something to deliver that nobody holds, oldest message first."""
        for m in self.messages.values():
            if m.session is not None and m.state == ACTIVE and m.lock is None and m.session not in self.sessions:
                yield m.session

    def lock_session(self, session: str, owner: object) -> float:
        """Hold a session, or hold it longer; until when."""
        until: float = time.time() + self.settings["lock_s"]
        self.sessions[session] = (owner, until)
        for m in self.locked.values():
            if m.session == session:
                m.until = until
        return until

    def free_session(self, session: str) -> None:
        """Give it up with everything that is locked in it."""
        self.sessions.pop(session, None)
        for m in [m for m in self.locked.values() if m.session == session]:
            self.give_back(m, count=True)

    # -------------------------------------------------------------- time
    def tick(self, now: float) -> list[object]:
        """Let due messages come, and locks and messages expire; the owners of sessions that were lost."""
        for m in list(self.messages.values()):
            if m.state == SCHEDULED and m.due <= now:  # as if it were sent now: it gets a new number
                del self.messages[m.seq]
                m.state, m.first_seq = ACTIVE, 0
                self._add(m, now)
            if m.lock is not None and m.until <= now and not self.settings["sessions"]:
                self.give_back(m, count=True)
            if m.expires is not None and m.expires <= now and m.lock is None and m.state != SCHEDULED:
                if self.settings["dead_letter_expired"]:
                    self.bury(m, "TTLExpiredException", "The message expired and was dead lettered.")
                else:
                    self.drop(m)
        over = [(s, owner) for s, (owner, until) in self.sessions.items() if until <= now]
        for session, _ in over:
            self.free_session(session)
        return [owner for _, owner in over]

    def expire(self) -> None:
        """Let every lock run out now."""
        for m in self.locked.values():
            m.until = 0.0
        self.sessions = {s: (owner, 0.0) for s, (owner, _) in self.sessions.items()}

    def peek(self, start: int, count: int, session: str | None) -> list[Stored]:
        """Messages from a sequence number on, in any state, of one partition."""
        found = (m for m in self.messages.values() if m.seq >= start and m.seq >> _BELOW == start >> _BELOW)
        return sorted((m for m in found if session in (None, m.session)), key=lambda m: m.seq)[:count]


class Topic:
    """Copies what is sent to every subscription whose rules want it."""

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, {**DEFAULTS, **settings}
        self.created = self.updated = time.time()
        self.subscriptions: dict[str, Queue] = {}
        self._filter = Queue(path, {"duplicates_s": self.settings["duplicates_s"]}, None)

    def put(self, parts: Parts) -> int:
        """Copy to subscriptions; the topic's own sequence number."""
        number = self._filter.put(parts)
        if number:
            self._filter.messages.clear()
            for subscription in self.subscriptions.values():
                matching = [rule for rule in subscription.rules.values() if rule.matches(parts)]
                copies = [rule for rule in matching if rule.action]
                for rule in copies:  # each rule with an action makes a copy of its own
                    subscription.put(rule.applied(copy.copy(parts)))
                if len(copies) < len(matching):
                    subscription.put(parts)
        return number


class Store:
    """Every entity by its path, lower case."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.queues: dict[str, Queue] = {}  # subscriptions and dead-letter sub-queues too
        self.topics: dict[str, Topic] = {}
        self.names: dict[str, str] = {}  # as they were spelt
        self.changed: Callable[[Queue], None] = lambda _: None
        for name, settings in config.get("queues", {}).items():
            self.add_queue(name, settings)
        for name, settings in config.get("topics", {}).items():
            self.add_topic(name, settings)
            for subscription, own in settings.get("subscriptions", {}).items():
                self.add_subscription(name, subscription, own)

    def add_queue(self, path: str, settings: dict[str, Any]) -> Queue:
        """A queue with its dead-letter sub-queue."""
        dead = Queue(f"{path}/$DeadLetterQueue", {"lock_s": settings.get("lock_s", 30)}, None)
        queue = Queue(path, settings, dead)
        for each in (queue, dead):
            each.changed = lambda changed: self.changed(changed)
            each.forward = lambda to, parts: self.queues[to.lower()].put(parts)
            self.queues[each.path.lower()] = each
        self.names[path.lower()] = path
        return queue

    def add_topic(self, path: str, settings: dict[str, Any]) -> Topic:
        """A topic without subscriptions."""
        topic = self.topics[path.lower()] = Topic(path, settings)
        self.names[path.lower()] = path
        return topic

    def add_subscription(self, topic: str, name: str, settings: dict[str, Any]) -> Queue:
        """A subscription that, without rules of its own, gets everything."""
        parent = self.topics[topic.lower()]
        inherited = {key: parent.settings[key] for key in ("partitioned", "max_message_bytes")}
        queue = self.add_queue(f"{parent.path}/Subscriptions/{name}", {**inherited, **settings})
        rules = settings.get("rules", {"$Default": {"sql": "1=1"}})
        queue.rules = {rule: Rule(rule, **given) for rule, given in rules.items()}
        parent.subscriptions[name.lower()] = queue
        return queue

    def remove(self, path: str) -> bool:
        """Delete an entity and what is below it; whether it was there."""
        below = [key for key in (*self.queues, *self.topics) if key == path.lower() or key.startswith(path.lower() + "/")]
        for key in below:
            self.queues.pop(key, None)
            self.topics.pop(key, None)
        topic, _, name = path.lower().partition("/subscriptions/")
        if name and topic in self.topics:
            self.topics[topic].subscriptions.pop(name, None)
        return bool(below)
