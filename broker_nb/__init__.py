"""Look into, take from, settle, publish to and replay any message broker from a notebook."""

from broker_nb._version import __version__

__all__ = ["__version__"]
