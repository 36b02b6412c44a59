"""The manners of other brokers: `inmem://name?like=kafka` behaves as a client of that broker would.

So every branch of the portable layer is tested without a server, and a mistake that the broker in memory would forgive is caught: it
raises `Misuse` and is noted in `InmemBroker.misuses`. A manner is one `Manner`; where a broker has a way that none of these has, the
way becomes a field there and a branch in `handles`.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import datetime

from broker_nb.backends.driver import Capabilities, Dedupe, Effect, Family, LookPlan, Proof
from broker_nb.backends.inmem.manners.driver import MannerlyDriver, driver_with
from broker_nb.backends.inmem.manners.manner import Manner
from broker_nb.backends.inmem.manners.places import NO_PLACES, Places

KAFKA = Manner(
    name="kafka",
    able=Capabilities(
        families=frozenset({Family.RECORD}),
        slice_s=0.1,
        implicit_subscriptions=True,
        binary_keys=True,
        null_key_is_not_empty=True,
        null_data=True,
        attribute_types=frozenset({str, bytes}),
        null_attributes=True,
        repeated_attributes=True,
        notyet={
            "transactions": "publishing is idempotent, but in no transaction; issue 6",
            "messages": "on Kafka this takes share groups, which the client calls a preview; issue 6",
        },
        never={
            "nack": "a log has no single messages to give back; commit up to a position",
            "release_delay": "a log has no single messages to give back",
        },
    ),
    look=LookPlan(True),
    late_proof=True,
    producer_times=True,
    eager_groups=True,
)

JETSTREAM = Manner(
    name="jetstream",
    able=Capabilities(
        families=frozenset({Family.MESSAGE}),
        slice_s=0.2,
        concurrent_settle=True,
        release_delay=True,
        reject=True,
        null_key_is_not_empty=True,
        repeated_attributes=True,
        never={
            "records": "a consumer of a stream stores acks, not one position",
            "transactions": "JetStream has none over several streams or beside acks",
            "null_data": "a NATS message always has a body, perhaps an empty one",
            "null_attributes": "a NATS header always has a value, perhaps an empty one",
            "binary_keys": "keys are headers, which are text",
        },
    ),
    look=LookPlan(True, sorted_times=True),
    dedupe=Dedupe(window_s=120.0, ordered=False, replaces_message_id=False),
    header_lines=True,
    reject_is_final=True,
    fixed_lease=True,
)

SHARE = Manner(
    name="share",
    able=replace(
        KAFKA.able,
        families=frozenset({Family.MESSAGE}),
        settle_before_pull=True,
        reject=True,
        notyet={"transactions": KAFKA.able.notyet["transactions"]},
        never={
            "records": "a share group stores what became of each record, not a position",
            "release_delay": "a released record comes again at once",
        },
    ),
    look=LookPlan(True),
    late_proof=True,
    producer_times=True,
    archives=True,
    renewable=False,
    poll_rows=20,
    by_partition=True,
)

SERVICEBUS = Manner(
    name="servicebus",
    able=Capabilities(
        families=frozenset({Family.MESSAGE}),
        slice_s=0.2,
        reject=True,
        attribute_types=frozenset({str, bytes, int, float, bool, datetime, uuid.UUID}),
        null_attributes=True,
        notyet={
            "transactions": "the client offers none",
        },
        never={
            "members": "the broker does not tell who else receives",
            "proven_end": "Service Bus tells only that it had no more to show: how complete a look is stays unknown, and that is said",
            "records": "a queue has no positions to commit: messages are settled one by one",
            "release_delay": "an abandoned message comes again at once",
            "binary_keys": "a session id or partition key is text",
            "null_key_is_not_empty": "an empty session id or partition key does not exist",
            "null_data": "a message has a body, which may be empty",
            "repeated_attributes": "application properties have one value per name",
        },
    ),
    look=LookPlan(
        True,
        proof=Proof.DRY,
        end_is_fixed=False,
        sorted_times=True,
        reason="locked, deferred, scheduled and perhaps expired messages are shown too",
    ),
    fixed_lease=True,
)

PUBSUB = Manner(
    name="pubsub",
    able=Capabilities(
        families=frozenset({Family.MESSAGE}),
        slice_s=5.0,
        concurrent_settle=True,
        release_delay=True,
        never={
            "look": "only through a temporary subscription, where you allow that by name, and without proof of an end",
            "order": "messages without a key come in any order",
            "records": "Pub/Sub settles message by message and has no positions",
            "reject": "no call for it: a dead-letter policy takes what was nacked too often",
            "settle_before_pull": "messages of one pull may be settled at any time",
            "implicit_subscriptions": "a subscription is made by name",
            "binary_keys": "ordering keys are text",
            "null_key_is_not_empty": "an empty ordering key is none",
            "null_data": "a body is bytes, possibly none",
            "null_attributes": "attributes are text",
            "repeated_attributes": "attributes are a map",
            "transactions": "the broker has none",
        },
    ),
    look=LookPlan(
        True,
        effects=frozenset({Effect.CREATES_SUBSCRIPTION}),
        proof=Proof.NONE,
        end_is_fixed=False,
        sorted_times=True,
        reason="what comes is shown; only silence tells that there is no more",
    ),
    unordered=True,
    uncounted=True,
    places=NO_PLACES,
    confirmed_by="enable_exactly_once_delivery",
)

PULSAR = Manner(
    name="pulsar",
    able=Capabilities(
        families=frozenset({Family.MESSAGE, Family.RECORD}),
        slice_s=0.2,
        concurrent_settle=True,
        confirmed_settle=False,
        reject=True,
        null_data=True,
        never={
            "release_delay": "a subscription has one delay for all that is given back: negative_ack_redelivery_delay_ms",
            "null_attributes": "a property of a Pulsar message always has a value, perhaps an empty one",
            "repeated_attributes": "a Pulsar message has one property of each name",
            "null_key_is_not_empty": "the client cannot tell an empty key from none",
            "numbered": "a place is ledger, entry and index in a batch, not one number",
        },
        notyet={
            "transactions": "the Python client has none",
            "binary_keys": "the Python client sends keys as text",
            "aged_out": "rows that the broker drops while a look runs are not noticed; issue 6",
        },
    ),
    look=LookPlan(True),
    dedupe=Dedupe(window_s=None, ordered=True, replaces_message_id=False),
    producer_times=True,
    timed=False,
    places=Places((12, 3, 1)),  # ledger, entry, index in the batch
    delay_by="negative_ack_redelivery_delay_ms",
    delay_ms=60_000,
    single_by="batch_index_ack_enabled",
)

ALL = (KAFKA, JETSTREAM, SHARE, SERVICEBUS, PUBSUB, PULSAR)
MANNERS: dict[str, type[MannerlyDriver]] = {manner.name: driver_with(manner) for manner in ALL}
