"""The `%broker` magic."""
