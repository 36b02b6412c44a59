"""Real brokers started on this machine, without Docker."""
