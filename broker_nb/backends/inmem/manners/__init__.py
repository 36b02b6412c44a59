"""The manners of other brokers: `inmem://name?like=kafka` behaves as a client of that broker would.

So every branch of the portable layer is tested without a server, and a mistake that the broker in memory would forgive is caught: it
raises `Misuse` and is noted in `InmemBroker.misuses`. A manner is one `Manner`; where a broker has a way that none of these has, the
way becomes a field there and a branch in `handles`.
"""

from __future__ import annotations

from broker_nb.backends.driver import Capabilities, Dedupe, Family, LookPlan
from broker_nb.backends.inmem.manners.driver import MannerlyDriver, driver_with
from broker_nb.backends.inmem.manners.manner import Manner

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

MANNERS: dict[str, type[MannerlyDriver]] = {manner.name: driver_with(manner) for manner in (KAFKA, JETSTREAM)}
