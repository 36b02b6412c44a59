"""Look into, take from, settle, publish to and replay any message broker from a notebook.

>>> import broker_nb
>>> conn = broker_nb.connect("demo")
>>> df = conn.sample("orders", "-100")
>>> conn.close()

Importing this package loads no client, no pandas and no pyarrow; they come with the first call that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from broker_nb._version import __version__
from broker_nb.errors import BrokerError, ErrorKind, Lost, NotFound, Refused, Unavailable

if TYPE_CHECKING:
    from broker_nb.connection import AioConnection, Connection, connect, connections
    from broker_nb.frames.report import ReadReport, report
    from broker_nb.messages import Attribute, Attributes, Message, OutboundMessage, Record

_LAZY = {
    "AioConnection": "broker_nb.connection",
    "Connection": "broker_nb.connection",
    "connect": "broker_nb.connection",
    "connections": "broker_nb.connection",
    "ReadReport": "broker_nb.frames.report",
    "report": "broker_nb.frames.report",
    "Attribute": "broker_nb.messages",
    "Attributes": "broker_nb.messages",
    "Message": "broker_nb.messages",
    "OutboundMessage": "broker_nb.messages",
    "Record": "broker_nb.messages",
}

__all__ = [
    "AioConnection",
    "Attribute",
    "Attributes",
    "BrokerError",
    "Connection",
    "ErrorKind",
    "Lost",
    "Message",
    "NotFound",
    "OutboundMessage",
    "ReadReport",
    "Record",
    "Refused",
    "Unavailable",
    "__version__",
    "connect",
    "connections",
    "report",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'broker_nb' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(shell: Any) -> None:
    """`%load_ext broker_nb`: the `%broker` magic."""
    from broker_nb.notebook.magics import load_ipython_extension

    load_ipython_extension(shell)


def unload_ipython_extension(shell: Any) -> None:
    """`%unload_ext broker_nb`."""
    from broker_nb.notebook.magics import unload_ipython_extension

    unload_ipython_extension(shell)
