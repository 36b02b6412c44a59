"""The kafka backend, on confluent-kafka: see `driver.py`."""
