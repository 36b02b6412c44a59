"""The stand-in on the wire: AMQP connections, links, transfers and dispositions, by proton's low-level handler.

Not proton's MessagingHandler, which opens every link by itself and so breaks refusals and sessions that are waited for.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

from proton import Delivery, Endpoint, Event, Handler, Link, Message, int32, symbol

from broker_nb.testing.servers.servicebus import amqp, wire
from broker_nb.testing.servers.servicebus.access import Access, Denied, Grant, path_of
from broker_nb.testing.servers.servicebus.manage import Faults, Management
from broker_nb.testing.servers.servicebus.store import Queue, Refused, Store
from broker_nb.testing.servers.servicebus.wire import TRACKING

LOCKED_UNTIL = symbol("com.microsoft:locked-until-utc")
EPOCH_TICKS = 621355968000000000
TICK_S = 0.05
CREDIT = 1000
SLACK = 1024  # the Python client does not count the frame of a batch
ACCEPTED_CODE = 202
CBS, MANAGEMENT = "$cbs", "/$management"


class StandIn(Handler):  # type: ignore[misc] # proton has no types
    """A broker with the manners of Azure Service Bus. Everything happens under `lock`, which the administration shares."""

    def __init__(self, port: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.port = port
        self.lock = threading.RLock()
        self.store = Store(config)
        self.store.changed = self._mark
        self.faults = Faults()
        self.access = Access(config)
        self._management = Management(self.store, self.faults)
        self._links: dict[Queue, list[Link]] = {}
        self._waiting: list[tuple[Link, float]] = []  # session receivers that nothing is there for yet
        self._grants: dict[Any, list[Grant]] = {}  # by connection
        self._replies: dict[tuple[Any, str], Link] = {}
        self._changed: dict[Queue, None] = {}

    def _mark(self, queue: Queue) -> None:
        self._changed[queue] = None

    # -------------------------------------------------------------- connections
    def on_unhandled(self, method: str, *args: Any) -> None:
        """Nothing: proton's default prints."""

    def on_reactor_init(self, event: Event) -> None:
        event.container.listen(f"127.0.0.1:{self.port}")
        event.container.schedule(TICK_S, self)

    def on_timer_task(self, event: Event) -> None:
        with self.lock:
            now = time.time()
            for queue in list(self.store.queues.values()):
                for owner in queue.tick(now):
                    self._refuse(owner, "com.microsoft:session-lock-lost", f"The session lock on '{queue.path}' expired.")
            for link, deadline in list(self._waiting):
                if not self._lock_session(link) and deadline <= now:
                    self._waiting.remove((link, deadline))
                    self._refuse(link, "com.microsoft:timeout", "The request timed out: no session is available.")
            self._end_expired(now)
            self._pump()
        event.container.schedule(TICK_S, self)

    def on_connection_remote_open(self, event: Event) -> None:
        # Both filled, for clients that index past fields which AMQP lets a peer leave out.
        event.connection.container = "service-bus-stand-in"
        event.connection.properties = {symbol("product"): "broker_nb stand-in for Service Bus"}
        event.connection.open()

    def on_session_remote_open(self, event: Event) -> None:
        event.session.open()

    def on_session_remote_close(self, event: Event) -> None:
        event.session.close()

    def on_connection_remote_close(self, event: Event) -> None:
        self.on_transport_closed(event)
        event.connection.close()

    def on_transport_closed(self, event: Event) -> None:
        with self.lock:
            for links in list(self._links.values()):
                for link in [link for link in links if link.connection == event.connection]:
                    self._gone(link)
            self._waiting = [(link, at) for link, at in self._waiting if link.connection != event.connection]
            self._grants.pop(event.connection, None)
            self._replies = {key: link for key, link in self._replies.items() if key[0] != event.connection}
            self._pump()

    # -------------------------------------------------------------- links
    def on_link_remote_open(self, event: Event) -> None:
        link = event.link
        if hasattr(link, "path"):  # one that we closed before it was opened
            return
        link.source.copy(link.remote_source)
        link.target.copy(link.remote_target)
        terminus = link.remote_target if link.is_receiver else link.remote_source
        link.path, link.queue, link.session_id = path_of(terminus.address), None, None
        with self.lock:
            try:
                self._attach(link)
            except Refused as refused:
                self._refuse(link, refused.condition, refused.text)
            self._pump()

    def _attach(self, link: Link) -> None:
        path = link.path
        if path == CBS or path.endswith(MANAGEMENT):
            entity = path.removesuffix(MANAGEMENT)
            if path != CBS:
                self._known(entity)
                self._allowed(link, entity, "Listen", "Send")
            if link.is_sender:
                self._replies[link.connection, path] = link
            return self._open(link)
        self._known(path)
        self.faults.raise_for("attach", path)
        self._allowed(link, path, "Send" if link.is_receiver else "Listen")
        if link.is_receiver:
            return self._open(link)
        if (queue := self.store.queues.get(path)) is None:
            raise Refused("amqp:not-allowed", f"'{path}' is a topic: receive from a subscription of it.")
        return self._attach_receiver(link, queue)

    def _attach_receiver(self, link: Link, queue: Queue) -> None:
        with_session, wanted = wire.asked_session(link)
        if bool(queue.settings["sessions"]) != with_session:
            needs = "requires sessions" if queue.settings["sessions"] else "does not support sessions"
            raise Refused("amqp:not-allowed", f"The entity '{queue.path}' {needs}.")
        link.queue = queue
        if not with_session:
            return self._open(link)
        link.wanted = wanted
        if self._lock_session(link):
            return None
        if link.wanted is not None:
            text = f"The requested session '{link.wanted}' cannot be accepted. It may be locked by another receiver."
            raise Refused("com.microsoft:session-cannot-be-locked", text)
        wait = (link.remote_properties or {}).get(symbol("com.microsoft:timeout"), 60_000)
        self._waiting.append((link, time.time() + wait / 1000))
        return None

    def _known(self, path: str) -> None:
        if path not in self.store.queues and path not in self.store.topics:
            raise Refused("amqp:not-found", f"The messaging entity '{path}' could not be found.")

    def _allowed(self, link: Link, path: str, *rights: str) -> None:
        grants = self._grants.get(link.connection, [])
        if not any(grant.covers(path, right) for grant in grants for right in rights):
            claims = "' or '".join(rights)
            raise Refused("amqp:unauthorized-access", f"Unauthorized access. '{claims}' claim(s) are required on '{path}'.")

    def _end_expired(self, now: float) -> None:
        """Detach what hangs on tokens that ran out."""
        for connection, grants in self._grants.items():
            alive = [grant for grant in grants if grant.until > now]
            if len(alive) < len(grants):
                self._grants[connection] = alive
                for link in [k for links in self._links.values() for k in links if k.connection == connection]:
                    if not any(grant.covers(link.path, "Listen") for grant in alive):
                        self._refuse(link, "amqp:unauthorized-access", "ExpiredToken: the token of this link is expired.")

    def _lock_session(self, link: Link) -> bool:
        """Give a receiver its session, if one is free."""
        queue: Queue = link.queue
        session = link.wanted if link.wanted is not None else next(iter(queue.waiting_sessions()), None)
        if session is None or session in queue.sessions:
            return False
        self._waiting = [(waiting, at) for waiting, at in self._waiting if waiting != link]
        until, link.session_id = queue.lock_session(session, link), session
        wire.answer_session(link, session)
        link.properties = TRACKING | {LOCKED_UNTIL: int(until * 1e7) + EPOCH_TICKS}
        self._open(link)
        return True

    def _open(self, link: Link) -> None:
        link.snd_settle_mode, link.rcv_settle_mode = link.remote_snd_settle_mode, link.remote_rcv_settle_mode
        entity = self.store.queues.get(link.path) or self.store.topics.get(link.path)
        link.max_message_size = entity.settings["max_message_bytes"] if entity else 1 << 20
        link.properties = link.properties or TRACKING
        link.open()
        if link.is_receiver:
            link.flow(CREDIT)
        elif link.queue is not None:
            self._links.setdefault(link.queue, []).append(link)
            self._mark(link.queue)

    def _refuse(self, link: Any, condition: str, text: str) -> None:
        """End a link, or refuse it: attach with a null terminus, then detach."""
        if link.state & Endpoint.LOCAL_UNINIT:
            terminus = link.target if link.is_receiver else link.source
            terminus.type, terminus.address = 0, None
            link.properties = TRACKING
            link.open()
        link.condition = wire.condition(condition, text)
        link.close()
        self._gone(link)

    def _gone(self, link: Link) -> None:
        queue = getattr(link, "queue", None)
        if queue is None:
            return
        if link in self._links.get(queue, ()):
            self._links[queue].remove(link)
        for session in [s for s, (owner, _) in queue.sessions.items() if owner == link]:
            queue.free_session(session)
        self._waiting = [(waiting, at) for waiting, at in self._waiting if waiting != link]
        self._mark(queue)

    def on_link_remote_close(self, event: Event) -> None:
        with self.lock:
            self._gone(event.link)
            event.link.close()
            self._pump()

    def on_link_remote_detach(self, event: Event) -> None:
        with self.lock:
            self._gone(event.link)
            event.link.detach()
            self._pump()

    # -------------------------------------------------------------- out
    def on_link_flow(self, event: Event) -> None:
        if event.link.is_sender and getattr(event.link, "queue", None) is not None:
            with self.lock:
                self._mark(event.link.queue)
                self._pump()

    def _pump(self) -> None:
        """Deliver what can be delivered, receivers in turn."""
        while self._changed:
            queue = next(iter(self._changed))
            del self._changed[queue]
            links = [link for link in self._links.get(queue, ()) if link.state & Endpoint.LOCAL_ACTIVE]
            while ready := [link for link in links if link.credit > 0]:
                served = [link for link in ready if self._deliver(queue, link)]
                if not served:
                    break
            for link in links:
                if link.credit > 0 and link.drain_mode:
                    link.drained()

    def _deliver(self, queue: Queue, link: Link) -> bool:
        if (message := queue.next(link.session_id)) is None:
            return False
        settled = link.remote_snd_settle_mode == Link.SND_SETTLED
        token = uuid.uuid4() if settled else queue.take(message, link)
        delivery = link.delivery(token.bytes_le)
        link.stream(message.encoded())
        link.advance()
        if settled:
            delivery.settle()
            queue.drop(message)
        else:
            delivery.token = token  # delivery.tag reads back as text only
        return True

    # -------------------------------------------------------------- in
    def on_delivery(self, event: Event) -> None:
        delivery, link = event.delivery, event.link
        with self.lock:
            if link.is_receiver:
                self._receive(link, delivery)
            elif delivery.updated and hasattr(delivery, "token") and link.state & Endpoint.LOCAL_ACTIVE:
                self._settle(link.queue, delivery)
            self._pump()

    def _receive(self, link: Link, delivery: Delivery) -> None:
        if not delivery.readable or delivery.partial:
            return
        raw = bytes(link.recv(delivery.pending) or b"")  # a message may be empty
        link.advance()
        if not link.state & Endpoint.LOCAL_ACTIVE:
            delivery.settle()
            return
        link.flow(1)
        if link.path == CBS:
            self._accept(delivery)
            self._put_token(link, raw)
        elif link.path.endswith(MANAGEMENT):
            self._accept(delivery)
            self._manage(link, raw)
        else:
            self._publish(link, delivery, raw)

    def _accept(self, delivery: Delivery) -> None:
        delivery.update(Delivery.ACCEPTED)
        delivery.settle()

    def _publish(self, link: Link, delivery: Delivery, raw: bytes) -> None:
        entity = self.store.queues.get(link.path) or self.store.topics.get(link.path)
        if self.faults.silent("send", link.path):
            return
        try:
            if entity is None:
                raise Refused("amqp:not-found", f"The messaging entity '{link.path}' could not be found.")
            self.faults.raise_for("send", link.path)
            self._allowed(link, link.path, "Send")
            found, limit = wire.messages(raw), entity.settings["max_message_bytes"]
            if len(raw) > limit + SLACK * (len(found) > 1):
                text = f"The received message ({len(raw)} bytes) exceeds {limit} bytes."
                raise Refused("amqp:link:message-size-exceeded", text)
            for parts in found:
                entity.put(parts)
        except Refused as refused:
            delivery.local.condition = wire.condition(refused.condition, refused.text)
            delivery.update(Delivery.REJECTED)
            delivery.settle()
        else:
            self._accept(delivery)

    def _settle(self, queue: Queue, delivery: Delivery) -> None:
        remote, state = delivery.remote, delivery.remote_state
        asked, info = wire.verdict(delivery)
        if asked is None:
            return
        if self.faults.silent("settle", queue.path.lower()):
            return
        try:
            self.faults.raise_for("settle", queue.path.lower())
            queue.settle(delivery.token, asked, info.get("DeadLetterReason"), info.get("DeadLetterErrorDescription"))
        except Refused as refused:
            delivery.local.condition = wire.condition(refused.condition, refused.text)
            state = Delivery.REJECTED
        else:
            delivery.local.failed, delivery.local.undeliverable = remote.failed, remote.undeliverable
        if not delivery.settled:
            delivery.update(state)
        delivery.settle()

    # -------------------------------------------------------------- requests
    def _put_token(self, link: Link, raw: bytes) -> None:
        request = Message()
        request.decode(raw)
        token = request.body if isinstance(request.body, str) else bytes(request.body).decode()
        try:
            grant = self.access.grant(token, str(request.properties["name"]))
        except Denied as denied:
            code, text = 401, str(denied)
        else:
            code, text = ACCEPTED_CODE, "Accepted"
            self._grants.setdefault(link.connection, []).append(grant)
        self._reply(link, raw, {"status-code": int32(code), "status-description": text}, None)

    def _manage(self, link: Link, raw: bytes) -> None:
        request = Message()
        request.decode(raw)
        operation = str(request.properties["operation"]).rpartition(":")[2]
        body = {str(k): v for k, v in (amqp.own(request.body) or {}).items()}
        path = link.path.removesuffix(MANAGEMENT)
        if self.faults.silent(operation, path):
            return
        try:
            self._allowed(link, path, "Listen", "Send")
            code, answer, condition, text = self._management.answer(path, operation, body)
        except Refused as refused:
            code, answer, condition, text = 401, None, refused.condition, refused.text
        fields: dict[str, Any] = {"statusCode": int32(code), "statusDescription": text}
        if condition:
            fields["errorCondition"] = symbol(condition)
        self._reply(link, raw, fields, answer)

    def _reply(self, link: Link, raw: bytes, fields: dict[str, Any], body: Any) -> None:
        request = Message()
        request.decode(raw)
        if (out := self._replies.get((link.connection, link.path))) is None:
            return
        answer = Message(body=body, properties=fields, inferred=False)
        answer.correlation_id = request.id
        delivery = out.delivery(uuid.uuid4().bytes_le)
        out.stream(answer.encode())
        out.advance()
        delivery.settle()
