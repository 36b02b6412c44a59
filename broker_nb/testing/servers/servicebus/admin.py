"""The stand-in's administration over HTTP, as the vendor's administration clients speak it (Atom and XML), and a way in for tests.

`/$stand-in` is no part of Service Bus: GET tells what is stored, POST `{"fault": {...}}`, `{"clear": true}` or `{"expire": PATH}`.
"""

from __future__ import annotations

import json
import re
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from broker_nb.testing.servers.servicebus.access import Denied
from broker_nb.testing.servers.servicebus.rules import BadRule, Rule
from broker_nb.testing.servers.servicebus.store import SCHEDULED, Queue, Topic

if TYPE_CHECKING:
    from broker_nb.testing.servers.servicebus.broker import StandIn

ATOM, SERVICE_BUS = "http://www.w3.org/2005/Atom", "http://schemas.microsoft.com/netservices/2010/10/servicebus/connect"
COUNTS = "http://schemas.microsoft.com/netservices/2011/06/servicebus"
INSTANCE = "http://www.w3.org/2001/XMLSchema-instance"
NEVER_S = 10_675_199 * 86400  # the service's "does not expire"
SETTINGS = {
    "LockDuration": "lock_s",
    "RequiresSession": "sessions",
    "DefaultMessageTimeToLive": "ttl_s",
    "DeadLetteringOnMessageExpiration": "dead_letter_expired",
    "DuplicateDetectionHistoryTimeWindow": "duplicates_s",
    "MaxDeliveryCount": "max_deliveries",
    "EnablePartitioning": "partitioned",
    "MaxMessageSizeInKilobytes": "max_message_bytes",
    "ForwardDeadLetteredMessagesTo": "forward_dead_to",
}


class Answer(Exception):
    """Ends a request with a status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class Administration:
    """Requests on entities, by method and path."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in, self._store = stand_in, stand_in.store

    def get(self, path: str, skip: int, top: int) -> str:
        """An entity, or a list of them."""
        parts = path.lower().split("/")
        if path == "$namespaceinfo":
            return _entry(
                "namespace", "NamespaceInfo", "<MessagingSKU>Standard</MessagingSKU><NamespaceType>Messaging</NamespaceType>"
            )
        if parts[0] == "$resources":
            if parts[1] == "topics":
                return _feed([_topic(topic) for topic in self._store.topics.values()][skip:][:top])
            return _feed([_queue(q) for q in self._store.queues.values() if _is_queue(q)][skip:][:top])
        if parts[-1] == "subscriptions":
            topic = self._topic("/".join(parts[:-1]))
            return _feed([_queue(q) for q in topic.subscriptions.values()][skip:][:top])
        if parts[-1] == "rules":
            return _feed([_rule(rule) for rule in self._queue("/".join(parts[:-1])).rules.values()][skip:][:top])
        if path.lower() in self._store.topics:
            return _topic(self._store.topics[path.lower()])
        if path.lower() in self._store.queues:
            return _queue(self._store.queues[path.lower()])
        return _feed([])  # so the service says that an entity is not there

    def put(self, path: str, body: bytes) -> str:
        """Make an entity; one that is there stays as it is."""
        tree = ET.fromstring(body)  # noqa: S314 - from the tests of this machine
        wanted = next(e for e in tree.iter() if e.tag.startswith(f"{{{SERVICE_BUS}}}"))
        kind = wanted.tag.rpartition("}")[2]
        given = {e.tag.rpartition("}")[2]: (e.text or "") for e in wanted}
        parent, _, name = path.rpartition("/")
        if path.lower() in self._store.queues or path.lower() in self._store.topics:
            raise Answer(409, f"SubCode=40900. Conflict: the entity '{path}' exists.")
        if kind == "TopicDescription":
            return _topic(self._store.add_topic(path, _settings(given)))
        if kind == "SubscriptionDescription":
            topic = self._topic(parent.rpartition("/")[0])
            return _queue(self._store.add_subscription(topic.path, name, _settings(given)))
        if kind == "RuleDescription":
            queue = self._queue(parent.rpartition("/")[0])
            queue.rules[name] = _parsed(name, wanted)
            return _rule(queue.rules[name])
        return _queue(self._store.add_queue(path, _settings(given)))

    def delete(self, path: str) -> str:
        """Remove an entity or a rule."""
        parent, _, name = path.rpartition("/")
        if parent.lower().endswith("/rules"):
            if self._queue(parent.rpartition("/")[0]).rules.pop(name, None) is None:
                raise Answer(404, f"the rule '{name}' could not be found.")
        elif not self._store.remove(path):
            raise Answer(404, f"SubCode=40400. Not Found. The Operation doesn't exist: '{path}'.")
        return ""

    def _topic(self, path: str) -> Topic:
        if (topic := self._store.topics.get(path.lower())) is None:
            raise Answer(404, f"SubCode=40400. Not Found: '{path}'.")
        return topic

    def _queue(self, path: str) -> Queue:
        if (queue := self._store.queues.get(path.lower())) is None:
            raise Answer(404, f"SubCode=40400. Not Found: '{path}'.")
        return queue

    # -------------------------------------------------------------- for tests
    def tell(self) -> str:
        """Everything that a look must not change."""
        found = {
            q.path: [[m.seq, m.count, m.state, m.lock is not None] for m in q.messages.values()] + [sorted(q.sessions), *q.rules]
            for q in self._store.queues.values()
        }
        return json.dumps(found | {t.path: sorted(t.subscriptions) for t in self._store.topics.values()})

    def act(self, body: bytes) -> str:
        """Do what a test asks for."""
        asked = json.loads(body)
        if "fault" in asked:
            self._stand_in.faults.add(asked["fault"])
        if asked.get("clear"):
            self._stand_in.faults.clear()
        for path, queue in self._store.queues.items():
            if "expire" in asked and path.startswith(asked["expire"].lower()):
                queue.expire()
                queue.tick(time.time())
        return "{}"


# ------------------------------------------------------------------ XML
def _is_queue(queue: Queue) -> bool:
    return queue.dead is not None and "/subscriptions/" not in queue.path.lower()


def _entry(title: str, kind: str, inner: str, created: float = 0.0) -> str:
    at = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (
        f'<entry xmlns="{ATOM}"><id>stand-in</id><title type="text">{escape(title)}</title><published>{at}</published>'
        f'<updated>{at}</updated><content type="application/xml"><{kind} xmlns="{SERVICE_BUS}" xmlns:i="{INSTANCE}">'
        f"{inner}</{kind}></content></entry>"
    )


def _feed(entries: Sequence[str]) -> str:
    return f'<feed xmlns="{ATOM}"><title type="text">feed</title><id>stand-in</id>{"".join(entries)}</feed>'


def _elements(settings: dict[str, Any], names: Iterable[str]) -> str:
    made = []
    for name in names:
        value = settings[SETTINGS[name]]
        if name == "ForwardDeadLetteredMessagesTo" and value is None:
            continue
        if name in ("LockDuration", "DefaultMessageTimeToLive", "DuplicateDetectionHistoryTimeWindow"):
            seconds = (600 if name.startswith("Dup") else NEVER_S) if value is None else value
            value = f"PT{seconds:g}S" if seconds < NEVER_S else "P10675199DT2H48M5.4775807S"
        elif isinstance(value, bool):
            value = str(value).lower()
        elif name == "MaxMessageSizeInKilobytes":
            value = value // 1024
        made.append(f"<{name}>{value}</{name}>")
    if "DuplicateDetectionHistoryTimeWindow" in names:
        made.append(f"<RequiresDuplicateDetection>{str(bool(settings['duplicates_s'])).lower()}</RequiresDuplicateDetection>")
    return "".join(made)


def _queue(queue: Queue) -> str:
    kind = "QueueDescription" if _is_queue(queue) else "SubscriptionDescription"
    names = (
        list(SETTINGS) if _is_queue(queue) else [n for n in SETTINGS if n[:3] not in ("Dup", "Ena") and n[:10] != "MaxMessage"]
    )
    dead = queue.dead.messages.values() if queue.dead else ()
    states = [m.state for m in queue.messages.values()]
    total = len(states) + len(dead)
    size = sum(m.parts.size for m in queue.messages.values())
    inner = _elements(queue.settings, names) + f"<MessageCount>{total}</MessageCount>" + _details(states, len(dead))
    inner += f"<SizeInBytes>{size}</SizeInBytes>" if _is_queue(queue) else ""
    inner += "<Status>Active</Status>" + _times(queue.created, queue.updated)
    return _entry(queue.path if _is_queue(queue) else queue.path.rpartition("/")[2], kind, inner, queue.created)


def _details(states: Sequence[int], dead: int) -> str:
    told = {
        "ActiveMessageCount": len(states) - states.count(SCHEDULED),
        "DeadLetterMessageCount": dead,
        "ScheduledMessageCount": states.count(SCHEDULED),
        "TransferMessageCount": 0,
        "TransferDeadLetterMessageCount": 0,
    }
    inner = "".join(f"<d:{name}>{count}</d:{name}>" for name, count in told.items())
    return f'<CountDetails xmlns:d="{COUNTS}">{inner}</CountDetails>'


def _times(created: float, updated: float) -> str:
    return "".join(
        f"<{name}>{datetime.fromtimestamp(at, UTC).strftime('%Y-%m-%dT%H:%M:%S.%fZ')}</{name}>"
        for name, at in (("CreatedAt", created), ("UpdatedAt", updated), ("AccessedAt", updated))
    )


def _topic(topic: Topic) -> str:
    names = ["DefaultMessageTimeToLive", "DuplicateDetectionHistoryTimeWindow", "EnablePartitioning", "MaxMessageSizeInKilobytes"]
    inner = _elements(topic.settings, names) + f"<SizeInBytes>0</SizeInBytes><SubscriptionCount>{len(topic.subscriptions)}"
    inner += "</SubscriptionCount><Status>Active</Status>" + _details([], 0) + _times(topic.created, topic.updated)
    return _entry(topic.path, "TopicDescription", inner, topic.created)


def _settings(given: dict[str, str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, text in given.items():
        if (key := SETTINGS.get(name)) is None:
            continue
        if name == "ForwardDeadLetteredMessagesTo":
            settings[key] = urlsplit(text).path.strip("/")
        elif text in ("true", "false"):
            settings[key] = text == "true"
        elif text.startswith("P"):
            settings[key] = seconds(text)
        else:
            settings[key] = int(text) * (1024 if name == "MaxMessageSizeInKilobytes" else 1)
    if given.get("RequiresDuplicateDetection") != "true":
        settings.pop("duplicates_s", None)
    else:
        settings.setdefault("duplicates_s", 600)
    return settings


def seconds(text: str) -> float | None:
    """An ISO 8601 duration without years and months; None for one that never ends."""
    found = re.fullmatch(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:([\d.]+)S)?)?", text)
    if found is None:
        raise Answer(400, f"SubCode=40000. Bad Request: the duration {text!r}.")
    days, hours, minutes, rest = (float(part or 0) for part in found.groups())
    whole = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    return whole if whole < NEVER_S else None


def _rule(rule: Rule) -> str:
    if rule.sql is not None:
        kind = {"1=1": "TrueFilter", "1=0": "FalseFilter"}.get(rule.sql.replace(" ", ""), "SqlFilter")
        inner = f'<Filter i:type="{kind}"><SqlExpression>{escape(rule.sql)}</SqlExpression></Filter>'
    else:
        wanted = {"".join(w.capitalize() for w in re.split("[-_]", k)): v for k, v in (rule.correlation or {}).items()}
        fields = "".join(f"<{k}>{escape(str(v))}</{k}>" for k, v in wanted.items() if k != "Properties")
        inner = f'<Filter i:type="CorrelationFilter">{fields}</Filter>'
    action = (
        f'<Action i:type="SqlRuleAction"><SqlExpression>{escape(rule.action)}</SqlExpression></Action>' if rule.action else ""
    )
    return _entry(
        rule.name, "RuleDescription", inner + (action or '<Action i:type="EmptyRuleAction"/>') + f"<Name>{rule.name}</Name>"
    )


def _parsed(name: str, wanted: ET.Element) -> Rule:
    def tag(element: ET.Element) -> str:
        return element.tag.rpartition("}")[2]

    found = {tag(e): e for e in wanted}
    fields = {tag(e): e for e in found["Filter"]}
    action = next((e.text for e in found.get("Action", ET.Element("none")) if tag(e) == "SqlExpression"), None)
    try:
        if "SqlExpression" in fields:
            return Rule(name, sql=fields["SqlExpression"].text or "", action=action)
        correlation: dict[str, Any] = {k: e.text for k, e in fields.items() if k != "Properties"}
        pairs = [list(pair) for pair in fields.get("Properties", ET.Element("none"))]
        correlation["properties"] = {pair[0].text or "": pair[1].text for pair in pairs}
        return Rule(name, correlation=correlation, action=action)
    except BadRule as error:
        raise Answer(400, f"SubCode=40000. Bad Request: the rule is not understood: {error}") from error


# ------------------------------------------------------------------ HTTP
def serve(port: int, stand_in: StandIn) -> None:
    """Answer on `port` of 127.0.0.1, on threads, until the process ends."""
    administration = Administration(stand_in)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> tuple[int, str]:
            url = urlsplit(self.path)
            path, query = unquote(url.path).strip("/"), parse_qs(url.query)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with stand_in.lock:
                if path == "$stand-in":
                    return 200, administration.act(body) if self.command == "POST" else administration.tell()
                try:
                    grant = stand_in.access.grant(self.headers.get("Authorization", ""), "")
                    if not grant.covers(path.lower(), "Manage"):
                        raise Answer(401, "SubCode=40100. Unauthorized: the 'Manage' claim is required.")
                    if self.command == "GET":
                        return 200, administration.get(
                            path, *(int(query.get(k, [v])[0]) for k, v in (("$skip", "0"), ("$top", "100")))
                        )
                    if self.command == "PUT":
                        return 201, administration.put(path, body)
                    return 200, administration.delete(path)
                except Denied as denied:
                    return 401, f"<Error><Code>401</Code><Detail>{escape(str(denied))}</Detail></Error>"
                except Answer as answer:
                    return answer.status, f"<Error><Code>{answer.status}</Code><Detail>{escape(answer.text)}</Detail></Error>"

        def do_GET(self) -> None:
            status, text = self._answer()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml; charset=utf-8")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - the library's names

        def log_message(self, *_: object) -> None:
            """Nothing: tests ask for thousands of things."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, name="administration", daemon=True).start()
