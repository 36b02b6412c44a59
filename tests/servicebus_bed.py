"""A Service Bus seen from outside the driver: by the vendor's clients, and by the stand-in's own way in for tests."""

from __future__ import annotations

import json
import urllib.request
import uuid
from datetime import timedelta
from urllib.parse import parse_qs, urlsplit

from azure.servicebus import ServiceBusClient, ServiceBusMessage
from azure.servicebus.management import ServiceBusAdministrationClient

from broker_nb.backends.servicebus.catalogue import PlainHttp

KEY = "SharedAccessKeyName=RootManageSharedAccessKey;SharedAccessKey=SAS_KEY_VALUE"


class Bed:
    """One namespace: a stand-in or an emulator by its URL, or the cloud by a connection string."""

    def __init__(self, url: str) -> None:
        if url.startswith("servicebus://Endpoint="):  # from the environment: a namespace of the cloud
            self.connection_string = url.removeprefix("servicebus://")
            self.options, self.hosts, self.stand_in, transport = {"connection_string": self.connection_string}, [], "", None
        else:
            parts, query = urlsplit(url), parse_qs(urlsplit(url).query)
            port = int(query.get("administration_port", ["5300"])[0])
            self.connection_string = f"Endpoint=sb://{parts.netloc};{KEY};UseDevelopmentEmulator=true"
            self.options = {name: values[0] for name, values in query.items()}
            self.hosts, self.stand_in, transport = [parts.netloc], f"http://127.0.0.1:{port}/$stand-in", PlainHttp(port)
        self.profile = {"hosts": self.hosts, "options": self.options}
        given = {"transport": transport} if transport else {}
        self.administration = ServiceBusAdministrationClient.from_connection_string(self.connection_string, **given)

    def ask(self, **what: object) -> dict:
        """Have the stand-in do something, or (with nothing) tell what is in it."""
        body = json.dumps(what).encode() if what else None
        with urllib.request.urlopen(urllib.request.Request(self.stand_in, data=body), timeout=10) as answer:  # noqa: S310 - loopback
            return json.load(answer)

    def queue(self, **settings: object) -> str:
        """A new queue; its name."""
        name = f"queue-{uuid.uuid4().hex}"
        if isinstance(lock := settings.get("lock_duration"), int | float):
            settings["lock_duration"] = timedelta(seconds=lock)
        self.administration.create_queue(name, **settings)
        return name

    def topic(self, *subscriptions: str, settings: dict | None = None, **given: object) -> str:
        """A new topic with subscriptions that get everything; its name."""
        name = f"topic-{uuid.uuid4().hex}"
        self.administration.create_topic(name, **(settings or {}))
        for subscription in subscriptions:
            self.administration.create_subscription(name, subscription, **given)
        return name

    def client(self, **options: object) -> ServiceBusClient:
        """The vendor's own client."""
        return ServiceBusClient.from_connection_string(self.connection_string, retry_total=0, **options)

    def send(self, name: str, *bodies: bytes, **given: object) -> None:
        """By the vendor's own client."""
        with self.client() as client, client.get_queue_sender(name) as sender:
            sender.send_messages([ServiceBusMessage(body, **given) for body in bodies])
