"""The broker in memory: state (`log`, `subscriptions`, `broker`), the driver over it, and the demo filled with made-up orders."""
