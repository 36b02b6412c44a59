"""The pubsub backend, on google-cloud-pubsub's asynchronous gapic clients: see `driver.py`."""
