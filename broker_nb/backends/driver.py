"""What a broker backend supplies. The doc comments are the contract; `broker_nb.testing` is its test.

A driver is five small things: a codec (client object -> values), a catalogue, a browser (look), a source (take), a
sender (write), and, where the broker has it, a transaction. Everything else is written once, in `broker_nb.portable`.

Rules for every method here
    loop            Called on the connection's loop thread and never blocks it for more than 10 ms. A blocking client sits on
                    `host.lane()`: one daemon thread per client object that is not thread-safe.
    one at a time   Never two calls in flight on one handle (Browser, Source, Sender, Transaction), except `close()`, which may
                    come in the middle of a slice. With `Capabilities.concurrent_settle`, settle and extend may run beside pull,
                    never beside each other.
    slices          `wait` (seconds) never exceeds `Capabilities.slice_s`. Return as soon as one row is there; never wait to fill up.
                    Counting, ageing and bounding batches is done above.
    cancelling      The portable layer never cancels a driver call; it lets the slice end. A call cancelled all the same loses
                    nothing: rows taken and not returned stay in the handle and come with the next call.
    retention       After a call the driver keeps only what settling needs. Rows belong to the caller.
    errors          Only BrokerError (made by `host.error`), with the entity's name in it. Failures of single rows are outcomes, not
                    exceptions: a batch call raises only when no row of it was attempted. No retries beyond the client's own.
    effects         Only the methods named for it change the broker. Nothing creates a topic, subscription, group, consumer or cursor
                    unless its doc comment says so. Nothing durable is ever deleted.

Standard library only.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, TypeVar

from broker_nb.errors import BrokerError, ErrorKind
from broker_nb.messages import Attribute

T = TypeVar("T")

Position: TypeAlias = tuple[int, ...]
"""A place in one partition of a log: "the first row at or after this". Ordered as tuples are, and JSON-able.
The place after row p is `p + (0,)`, or any tuple between p and the next row. kafka and inmem (offset,), jetstream
(stream sequence,), pulsar (ledger, entry, batch index), servicebus (sequence number,). Brokers without places: ()."""

Token: TypeAlias = Hashable
"""By which one delivered row is settled. Unique per delivery, meaningless after close, and no larger than the row's own handle."""

NO_PARTITION = -1


# ------------------------------------------------------------------ what is known about a backend and about an entity
class Family(enum.Enum):
    """How deliveries are settled."""

    MESSAGE = "message"  # one by one
    RECORD = "record"  # a position per partition is committed


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the driver with its client can do at best, on the best server: constants.

    They choose conformance cases and render the documentation. What a *given* entity can do is in `Facts`, and what a person is
    told always comes from there.
    """

    families: frozenset[Family]
    slice_s: float  # longest `wait` that leaves the handle responsive, seconds
    concurrent_settle: bool = False
    settle_before_pull: bool = False  # every row of a pull is settled before that handle's next pull
    confirmed_settle: bool = True  # CONFIRMED is possible; False: SENT is the best
    release_delay: bool = False  # Settlement.delay is honoured per row
    reject: bool = False
    implicit_subscriptions: bool = False  # a subscription comes by being used: `facts` of a new name answers as for a fresh one
    keys: bool = True
    binary_keys: bool = False
    null_key_is_not_empty: bool = False
    null_data: bool = False
    attribute_types: frozenset[type] = frozenset({str})
    null_attributes: bool = False
    repeated_attributes: bool = False
    transactions: bool = False
    server_min: Mapping[str, str] = field(
        default_factory=dict
    )  # feature -> oldest server version, checked against the connected one
    notyet: Mapping[str, str] = field(default_factory=dict)  # feature -> why (an issue of the client, a missing call)
    never: Mapping[str, str] = field(default_factory=dict)  # feature -> why the broker cannot


class Effect(enum.Enum):
    """What a look would cost. None of them: nothing that a second client could observe after `close()`."""

    CREATES_SUBSCRIPTION = "a temporary subscription on the topic"
    LOCKS_SESSION = "a session is locked while looking"
    COUNTS_DELIVERY = "delivery counts are raised"
    JOINS_GROUP = "a member joins the group"
    CREATES_TOPIC = "the broker may create the topic if it is not there"


class Proof(enum.Enum):
    """How the end of a bounded look is known."""

    POSITION = "the broker proves that the position was passed"
    DRY = "the broker had no more to show when asked"
    NONE = "only silence: completeness cannot be known"


@dataclass(frozen=True, slots=True)
class LookPlan:
    """Whether an entity can be looked at, and what that costs."""

    possible: bool
    effects: frozenset[Effect] = frozenset()
    proof: Proof = Proof.POSITION
    end_is_fixed: bool = True  # the end can be known before reading
    sorted_times: bool = False  # index times never decrease within a partition (set by the server)
    reason: str = ""  # why not possible, or what the person should know; one line


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """How long rows stay held. `seconds` None: not timed, as long as the handle lives."""

    seconds: float | None
    renewable: bool
    return_counts: bool  # giving a row back (or losing it) raises its delivery count
    max_deliveries: int | None  # beyond this the broker dead-letters or stops delivering; None = unlimited or unknown


@dataclass(frozen=True, slots=True)
class Dedupe:
    """A repeated send with the same DedupeId is dropped by the broker, within these limits."""

    window_s: float | None  # None = no time limit known
    ordered: bool  # ids must ascend in send order per partition (pulsar)
    replaces_message_id: bool  # the id takes the place of the message's own (servicebus)


class Kind(enum.Enum):
    """What sort of thing a name on the broker is."""

    TOPIC = "topic"
    QUEUE = "queue"
    SUBSCRIPTION = "subscription"  # consumer group, share group and durable consumer too
    DEAD_LETTER = "dead-letter queue"


@dataclass(frozen=True, slots=True)
class Entity:
    """A named thing on the broker."""

    kind: Kind
    name: str  # as the broker spells it
    parent: str | None = None  # topic of a subscription, source of a dead-letter queue


@dataclass(frozen=True, slots=True)
class Facts:
    """What holds for one entity, on this server, now."""

    entity: Entity
    partitions: tuple[int, ...]
    look: LookPlan
    families: frozenset[Family] = frozenset()  # how it can be taken from; for a topic: by a new subscription
    lease: LeaseTerms | None = None  # family MESSAGE
    dedupe: Dedupe | None = None
    ordered: bool = False
    members: int | None = None  # live consumers besides us; None = cannot be known
    max_message_bytes: int | None = None
    dead_letter: Entity | None = None
    details: Mapping[str, Any] = field(default_factory=dict)  # broker-specific, for describe(); no secrets


@dataclass(frozen=True, slots=True)
class Summary:
    """One line of the catalogue. None = the broker does not tell without reading."""

    entity: Entity
    partitions: int
    messages: int | None  # on a compacted or transactional log an upper bound
    bytes: int | None = None
    oldest_ns: int | None = None
    newest_ns: int | None = None
    last_minute: int | None = None  # rows of the last 60 s
    kind: str = ""  # "log", "queue", "log + queue"


@dataclass(frozen=True, slots=True)
class Backlog:
    """How far one subscription is, per partition."""

    partition: int
    committed: Position | None
    end: Position | None
    waiting: int | None  # None = the broker does not tell
    held: int | None = None


# ------------------------------------------------------------------ rows
class Envelope(NamedTuple):
    """One row, broker-neutral. Built only when a person asks for a Message or a Record."""

    topic: str
    partition: int
    position: Position
    id: str  # stable over redelivery: what a journal may key on
    key: bytes | None
    data: bytes | None
    attributes: Sequence[Attribute]
    publish_time_ns: int | None
    time_is: str  # who set publish_time: "server", "producer", "event"
    delivery_count: int | None
    native: object


Column: TypeAlias = Sequence[Any] | Any
"""One value per row (a list, a numpy array), or a scalar that holds for every row, or an object with `__arrow_c_array__`."""

COLUMNS = frozenset({"topic", "partition", "offset", "id", "key", "data", "attributes", "publish_time_ns", "delivery_count"})


class Codec(Protocol):
    """Client objects -> values. Pure, re-entrant, without I/O; called on worker threads, never on the loop."""

    def columns(self, rows: Sequence[Any], want: frozenset[str]) -> Mapping[str, Column]:
        """The wanted columns out of COLUMNS, each one list comprehension over the client's own objects.

        `offset` is the first number of the position (None where there are no places). `id` may be left out where it is
        f"{partition}:{offset}". `attributes` is per row a sequence of
        (name, bytes | None) or (name, bytes | None, type), in order, repeats kept; None when the row has none. An unwanted column
        costs nothing. Agrees with `envelope` row by row.
        """
        ...

    def envelope(self, row: Any) -> Envelope: ...

    def places(self, rows: Sequence[Any]) -> Sequence[tuple[int, Position]]:
        """Partition and position of each row, cheaply; for commits and for counting rows per partition."""
        ...

    def size(self, row: Any) -> int:
        """Payload bytes, cheaply; for byte bounds and reports."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """What one pull or read hands over. `tokens` is None for looks and records, else aligned with `rows`."""

    codec: Codec
    rows: Sequence[Any]
    tokens: Sequence[Token] | None = None
    leased_until: float | None = None  # time.monotonic(), the earliest of the batch; None = not timed
    digests: Sequence[Any] = ()  # what a look's `digest` made of its rows, piece by piece; `rows` is then empty


Digest: TypeAlias = Callable[[Batch], Any]
"""What a reader makes of rows that it does not need afterwards."""


# ------------------------------------------------------------------ services from the portable layer
@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened by itself.

    kind: "reconnecting", "reconnected", "revoked" (partitions), "lost" (tokens), "failed" (error; the handle is dead).
    """

    kind: str
    partitions: frozenset[int] = frozenset()
    tokens: frozenset[Token] = frozenset()
    error: BrokerError | None = None
    handle: object = None  # the Source or Browser it happened to; None = the connection


class Lane(Protocol):
    """One daemon thread that owns one client object which only one thread may touch."""

    async def run(self, fn: Callable[..., T], *args: Any) -> T: ...

    def idle(self, fn: Callable[[], object], every: float) -> None:
        """Call fn on the thread whenever nothing else ran for `every` seconds (to stay a member while a person thinks)."""
        ...

    def close(self) -> None:
        """Let the thread end after what is queued. Idempotent."""
        ...


class Host(Protocol):
    """Services for a driver. `emit` may be called from any thread."""

    def lane(self, name: str) -> Lane: ...

    def emit(self, event: Event) -> None: ...

    def error(self, kind: ErrorKind, entity: str, cause: BaseException | str, *, retryable: bool = False) -> BrokerError:
        """A BrokerError whose text is one line and free of the profile's secrets."""
        ...


# ------------------------------------------------------------------ look
@dataclass(frozen=True, slots=True)
class Piece:
    """Half-open range of one partition. end None = follow for ever (tail)."""

    partition: int
    start: Position
    end: Position | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where one partition begins and ends.

    `end` is one past the last row visible at the asked isolation; where LookPlan.end_is_fixed is False, as far as is known, or None.
    `high` is the end with open transactions included: what is beyond `end` is held back. `runs`, where a place is more than one number,
    tells rows that count up by its last one: (first place, how many).
    """

    partition: int
    low: Position
    end: Position | None
    high: Position | None = None
    runs: Sequence[tuple[Position, int]] = ()


class Stop(enum.Enum):
    """Why a partition gives no more although its end was not reached."""

    DRY = "nothing more to show now"
    HELD_BACK = "an open transaction holds the rest back"
    AGED_OUT = "the range is no longer there"
    UNPROVEN = "silence; the broker cannot tell"


@dataclass(frozen=True, slots=True)
class Step:
    """What one `Browser.read` found."""

    batch: Batch | None
    reached: Mapping[int, Position]  # proven by the broker: every visible row below was handed out
    stopped: Mapping[int, Stop] = field(default_factory=dict)
    skipped: int = 0  # rows seen and not shown (control, aborted), where the client tells


class Browser(Protocol):
    """A look over fixed pieces. Its effects are exactly those that Facts.look announced, undone by `close`."""

    async def read(self, max_rows: int, max_bytes: int, wait: float) -> Step:
        """Next rows of any piece, in order within a partition, never at or beyond a piece's end.

        An empty Step with unchanged `reached` means "not yet". `reached` comes from the broker (end-of-partition event, a later
        row, an empty page), never from counting. `max_bytes` may be exceeded by one client fetch.
        """
        ...

    async def close(self) -> None: ...


# ------------------------------------------------------------------ take
class Verdict(enum.Enum):
    """What is to become of a held row."""

    ACK = "done"
    RELEASE = "give back"
    REJECT = "dead-letter, term, archive"


@dataclass(frozen=True, slots=True)
class Settlement:
    """One row's verdict."""

    token: Token
    verdict: Verdict
    delay: float = 0.0  # seconds; RELEASE only, where Capabilities.release_delay
    reason: str = ""  # REJECT only, where the broker stores one


class Settled(enum.Enum):
    """What became of a settlement."""

    CONFIRMED = "the broker said so"
    SENT = "handed to the broker, which does not confirm"
    LOST = "the lease was gone; the row went or will go to someone else"
    RETRY = "not done, may be tried again"
    REFUSED = "not done, will not work"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The fate of one settlement."""

    state: Settled
    error: BrokerError | None = None


class Source(Protocol):
    """Takes rows from one subscription (family MESSAGE) or as a member of one group (family RECORD).

    Opening it may create the subscription only if TakeOptions.create is set, or where `Capabilities.implicit_subscriptions`.
    """

    async def pull(self, max_rows: int, max_bytes: int, wait: float) -> Batch | None:
        """At most max_rows rows are locked on return, unless the client cannot bound it: the surplus then stays in the handle, comes
        out first next time, and counts as held. NO_CREDIT is raised, instead of None, when nothing comes because our own unsettled
        rows use up the broker's limit (max_ack_pending, share-group locks, flow control).
        """
        ...

    async def settle(self, items: Sequence[Settlement]) -> Sequence[Outcome]:
        """MESSAGE. One outcome per item, in order; each token at most once (first-wins is kept above). Waits for the broker's answer
        where it gives one. No side effect on other rows.
        """
        ...

    async def extend(self, tokens: Sequence[Token], seconds: float) -> Sequence[float | None]:
        """MESSAGE, timed and renewable. The new time.monotonic() deadline per row, None = lost. No row is shortened."""
        ...

    async def commit(self, positions: Mapping[int, Position]) -> Mapping[int, Outcome]:
        """RECORD. Store "everything below is done" per partition. Positions come contiguous and ascending, of partitions that were
        not revoked; a revoked one is LOST.
        """
        ...

    async def seek(self, positions: Mapping[int, Position]) -> None:
        """RECORD. Continue reading from there (to give rows back, and after an error)."""
        ...

    async def close(self) -> None:
        """Leaves group or link within 2 s, whatever is in flight. Every row was settled or released before. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class TakeOptions:
    """How a subscription is opened."""

    family: Family
    start: str = "earliest"  # only for a subscription that has no position yet: "earliest" or "latest"
    max_held: int = 1000  # upper bound for prefetch and for the broker's own limit
    create: bool = False
    session: str | None = None
    native: Mapping[str, Any] = field(default_factory=dict)  # client options by the client's own names


# ------------------------------------------------------------------ write
class DedupeId(NamedTuple):
    """Which row of which run: what a broker de-duplicates by."""

    run: str
    seq: int  # from 1, ascending in send order

    @property
    def text(self) -> str:
        return f"{self.run}:{self.seq}"


class Outbound(NamedTuple):
    """One row to send. A tuple, because two hundred thousand frozen dataclasses cost as much as sending them."""

    data: bytes | None
    key: bytes | None = None
    attributes: Sequence[Attribute] = ()
    partition: int = NO_PARTITION
    time_ns: int | None = None  # where the broker lets a producer set it
    dedupe: DedupeId | None = None
    native: Mapping[str, Any] | None = None  # e.g. session_id, deliver_at, message_id


class Sent(enum.Enum):
    """What became of a row that was sent."""

    ACCEPTED = "stored by the broker"
    DUPLICATE = "the broker already had it"
    REFUSED = "not stored"
    UNKNOWN = "may or may not be stored (time-out, connection lost)"


class SendResult(NamedTuple):
    """The fate of one row."""

    state: Sent
    id: str | None = None
    partition: int = NO_PARTITION
    position: Position | None = None
    error: BrokerError | None = None


class Sender(Protocol):
    """Writes to one topic."""

    def check(self, row: Outbound) -> str | None:
        """Without I/O: one line why this row can never be sent (attribute type, size, key), or None. Called before the first send."""
        ...

    async def send(self, rows: Sequence[Outbound]) -> Sequence[SendResult]:
        """Returns when the fate of every row is known, results aligned. Rows of equal key (and of equal partition) are stored in
        order; after a REFUSED or UNKNOWN row the later rows of that key are REFUSED, not sent. Splits by the broker's batch size. The
        client's own idempotence is always on. Never creates the topic: a missing one is NOT_FOUND.
        """
        ...

    async def close(self) -> None: ...


class Transaction(Protocol):
    """One open transaction of one transactional id. Opening fences any earlier holder of the id."""

    async def send(self, topic: str, rows: Sequence[Outbound]) -> Sequence[SendResult]: ...

    async def commit_positions(self, source: Source, positions: Mapping[int, Position]) -> None: ...

    async def commit(self) -> bool:
        """True: committed. False: aborted instead (rebalance, fenced). TIMEOUT is raised when unknown: call again to find out."""
        ...

    async def abort(self) -> bool: ...


# ------------------------------------------------------------------ the driver
class Driver(Protocol):
    """One connection."""

    capabilities: ClassVar[Capabilities]
    requires: ClassVar[tuple[str, str]]  # (importable module, extra): the only ImportError turned into an install line

    @classmethod
    async def open(cls, profile: Mapping[str, Any], host: Host) -> Driver:
        """Connects and authenticates within profile["timeout"] seconds, or raises UNREACHABLE / AUTH. Creates nothing."""
        ...

    async def close(self) -> None: ...

    @property
    def about(self) -> str:
        """Server and version in a few words, for the connection's first line."""
        ...

    # catalogue: read-only, safe to call beside everything
    def entities(self, pattern: str = "") -> AsyncIterator[Entity]:
        """Topics and queues whose name matches the shell-style pattern ("" = all), internal ones left out; then subscriptions."""
        ...

    async def summaries(self, topics: Sequence[Entity]) -> Sequence[Summary]:
        """A line per topic, aligned, in as few round trips as the broker allows."""
        ...

    async def facts(self, entity: Entity) -> Facts:
        """NOT_FOUND if it is not there, without creating it. One or two round trips; cached above for 30 s."""
        ...

    async def backlog(self, entity: Entity) -> Sequence[Backlog]: ...

    # look
    async def bounds(self, topic: Entity, committed_only: bool) -> Sequence[Bounds]: ...

    async def locate(self, topic: Entity, times_ns: Mapping[int, int]) -> Mapping[int, Position | None]:
        """Per partition the first position whose index time is at or after the given one; None = none such."""
        ...

    async def browse(
        self,
        topic: Entity,
        pieces: Sequence[Piece],
        want: frozenset[str],
        committed_only: bool,
        allow: frozenset[Effect],
        digest: Digest | None = None,
    ) -> Browser:
        """UNSUPPORTED when Facts.look.effects is not covered by `allow`. `want` names the columns that will be asked for.

        A driver with a lane calls `digest` on it with each client fetch, while the rows are warm in the processor's cache and nobody
        else wants the interpreter, and hands over the results as `Batch.digests`. One on the loop ignores it.
        """
        ...

    # take and write
    async def subscribe(self, subscription: Entity, options: TakeOptions) -> Source: ...

    async def sender(self, topic: Entity, native: Mapping[str, Any]) -> Sender: ...

    async def begin(self, transactional_id: str, timeout_s: float) -> Transaction: ...
