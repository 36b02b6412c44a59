"""The conformance suite that every backend passes, and the real servers it runs against."""
