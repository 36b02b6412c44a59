"""The kafka backend."""
