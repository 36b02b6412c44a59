"""Every pull shape out of every other, and what programs that publish, take and settle write again and again.

Standard library only; works on anything that has the methods of `broker_nb.interfaces`.
"""

from broker_nb.adapters.publish import simple_publisher_parallelization, transaction
from broker_nb.adapters.pull import Messages, Records, fan_in_receivers
from broker_nb.adapters.settle import ack_all, commit_highest_offsets, group_batch_by, nack_all
from broker_nb.adapters.streams import BackOff, streamify

__all__ = [
    "BackOff",
    "Messages",
    "Records",
    "ack_all",
    "commit_highest_offsets",
    "fan_in_receivers",
    "group_batch_by",
    "nack_all",
    "simple_publisher_parallelization",
    "streamify",
    "transaction",
]
