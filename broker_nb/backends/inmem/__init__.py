"""The inmem backend."""
