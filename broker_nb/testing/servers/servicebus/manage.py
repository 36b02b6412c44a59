"""The `$management` node of an entity, and faults that tests ask for."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, TypeAlias

from proton import UNDESCRIBED, Array, Data, Described, symbol

from broker_nb.testing.servers.servicebus.amqp import Parts, milliseconds
from broker_nb.testing.servers.servicebus.rules import BadRule, Rule
from broker_nb.testing.servers.servicebus.store import DEFERRED, SCHEDULED, Queue, Refused, Store, Stored

Answer: TypeAlias = tuple[int, Any, str, str]  # code, body, condition, description
CODES = {"com.microsoft:message-lock-lost": 410, "com.microsoft:session-lock-lost": 410, "com.microsoft:message-not-found": 404}
CODES |= {"amqp:not-found": 404, "com.microsoft:server-busy": 503, "amqp:unauthorized-access": 401, "amqp:not-allowed": 400}
VERDICTS = {"completed": "complete", "abandoned": "abandon", "defered": "defer", "suspended": "dead"}
NO_CONTENT: Answer = (204, None, "", "No Content")
_SQL, _TRUE, _FALSE = "com.microsoft:sql-filter:list", "com.microsoft:true-filter:list", "com.microsoft:false-filter:list"
_CORRELATION = "com.microsoft:correlation-filter:list"


class Faults:
    """What goes wrong next, by operation ("send", "settle", "attach", "peek-message", ...) and entity."""

    def __init__(self) -> None:
        self._next: list[dict[str, Any]] = []

    def add(self, fault: dict[str, Any]) -> None:
        """`on`, `entity` ("" = any), `condition` ("" = no answer at all), `times`."""
        self._next.append({"entity": "", "condition": "", "times": 1, **fault})

    def clear(self) -> None:
        """Nothing more goes wrong."""
        self._next.clear()

    def _take(self, operation: str, entity: str, *, silent: bool) -> str | None:
        for fault in self._next:
            there = fault["on"] == operation and fault["entity"].lower() in ("", entity)
            if there and silent is not bool(fault["condition"]) and fault["times"] > 0:
                fault["times"] -= 1
                return str(fault["condition"])
        return None

    def raise_for(self, operation: str, entity: str) -> None:
        """Refuse, if that was asked for."""
        if condition := self._take(operation, entity, silent=False):
            raise Refused(condition, f"'{entity}' was told to answer {condition}.")

    def silent(self, operation: str, entity: str) -> bool:
        """Whether to give no answer."""
        return self._take(operation, entity, silent=True) is not None


class Management:
    """Answers requests to `<entity>/$management`."""

    def __init__(self, store: Store, faults: Faults) -> None:
        self._store, self._faults = store, faults

    def answer(self, path: str, operation: str, body: dict[str, Any]) -> Answer:
        """What to answer to an operation on an entity."""
        act = getattr(self, f"_{operation.replace('-', '_')}", None)
        if act is None:
            return 501, None, "amqp:not-implemented", f"The stand-in has no operation {operation}."
        try:
            self._faults.raise_for(operation, path)
            entity = self._store.queues.get(path) or self._store.topics.get(path)
            if entity is None:
                raise Refused("amqp:not-found", f"The messaging entity '{path}' could not be found.")
            answer: Answer = act(entity, body)
        except Refused as refused:
            return CODES.get(refused.condition, 500), None, refused.condition, refused.text
        return answer

    # -------------------------------------------------------------- messages
    def _peek_message(self, queue: Queue, body: dict[str, Any]) -> Answer:
        found = queue.peek(body["from-sequence-number"], body["message-count"], body.get("session-id"))
        return (200, {"messages": [{"message": m.encoded()} for m in found]}, "", "OK") if found else NO_CONTENT

    def _renew_lock(self, queue: Queue, body: dict[str, Any]) -> Answer:
        held = [self._held(queue, token) for token in body["lock-tokens"]]
        for message in held:
            message.until = time.time() + queue.settings["lock_s"]
        return 200, {"expirations": Array(UNDESCRIBED, Data.TIMESTAMP, *[int(m.until * 1000) for m in held])}, "", "OK"

    def _held(self, queue: Queue, token: object) -> Stored:
        message = queue.locked.get(uuid.UUID(str(token)))
        if message is None:
            raise Refused("com.microsoft:message-lock-lost", "The lock supplied is invalid.")
        return message

    def _update_disposition(self, queue: Queue, body: dict[str, Any]) -> Answer:
        self._faults.raise_for("settle", queue.path.lower())
        verdict = VERDICTS[body["disposition-status"]]
        for token in body["lock-tokens"]:
            reason, text = body.get("deadletter-reason"), body.get("deadletter-description")
            queue.settle(uuid.UUID(str(token)), verdict, reason, text)
        return 200, None, "", "OK"

    def _receive_by_sequence_number(self, queue: Queue, body: dict[str, Any]) -> Answer:
        found = [queue.messages.get(number) for number in body["sequence-numbers"]]
        deferred = [m for m in found if m is not None and m.state == DEFERRED]
        if len(deferred) < len(found):
            raise Refused(
                "com.microsoft:message-not-found", "Failed to lock one or more specified messages: not there, or not deferred."
            )
        answer = []
        for message in deferred:
            if message.lock is not None:
                raise Refused("com.microsoft:message-lock-lost", "A deferred message is locked already.")
            if body["receiver-settle-mode"] == 0:
                answer.append({"message": message.encoded(), "lock-token": uuid.uuid4()})
                queue.drop(message)
            else:
                token = queue.take(message, None)
                answer.append({"message": message.encoded(token), "lock-token": token})
        return 200, {"messages": answer}, "", "OK"

    def _schedule_message(self, entity: Any, body: dict[str, Any]) -> Answer:
        numbers = [entity.put(Parts(bytes(each["message"]))) for each in body["messages"]]
        return 200, {"sequence-numbers": Array(UNDESCRIBED, Data.LONG, *numbers)}, "", "OK"

    def _cancel_scheduled_message(self, queue: Queue, body: dict[str, Any]) -> Answer:
        found = [queue.messages.get(number) for number in body["sequence-numbers"]]
        scheduled = [m for m in found if m is not None and m.state == SCHEDULED]
        if len(scheduled) < len(found):
            raise Refused("com.microsoft:message-not-found", "A message is not there, or not scheduled.")
        for message in scheduled:
            queue.drop(message)
        return 200, None, "", "OK"

    # -------------------------------------------------------------- sessions
    def _renew_session_lock(self, queue: Queue, body: dict[str, Any]) -> Answer:
        session = body["session-id"]
        if session not in queue.sessions:
            raise Refused("com.microsoft:session-lock-lost", f"The lock on session '{session}' has expired.")
        owner, _ = queue.sessions[session]
        return 200, {"expiration": milliseconds(queue.lock_session(session, owner))}, "", "OK"

    def _get_session_state(self, queue: Queue, body: dict[str, Any]) -> Answer:
        return 200, {"session-state": queue.states.get(body["session-id"])}, "", "OK"

    def _set_session_state(self, queue: Queue, body: dict[str, Any]) -> Answer:
        queue.states[body["session-id"]] = body.get("session-state")
        return 200, None, "", "OK"

    def _get_message_sessions(self, queue: Queue, body: dict[str, Any]) -> Answer:
        there = sorted({m.session for m in queue.messages.values() if m.session is not None})
        page = there[body.get("skip", 0) :][: body.get("top", 100)]
        if not page:
            return NO_CONTENT
        return 200, {"skip": body.get("skip", 0) + len(page), "sessions-ids": Array(UNDESCRIBED, Data.STRING, *page)}, "", "OK"

    # -------------------------------------------------------------- rules
    def _add_rule(self, queue: Queue, body: dict[str, Any]) -> Answer:
        name, given = str(body["rule-name"]), body["rule-description"]
        given = {str(k): v for k, v in given.items()}
        if name in queue.rules:
            raise Refused("com.microsoft:entity-already-exists", f"The rule '{name}' exists.")
        try:
            queue.rules[name] = _rule(name, given)
        except (BadRule, KeyError) as error:
            raise Refused("com.microsoft:argument-error", f"The rule '{name}' is not understood: {error}") from error
        return 200, None, "", "OK"

    def _remove_rule(self, queue: Queue, body: dict[str, Any]) -> Answer:
        if queue.rules.pop(str(body["rule-name"]), None) is None:
            raise Refused("amqp:not-found", f"The rule '{body['rule-name']}' does not exist.")
        return 200, None, "", "OK"

    def _enumerate_rules(self, queue: Queue, body: dict[str, Any]) -> Answer:
        page = list(queue.rules.values())[body.get("skip", 0) :][: body.get("top", 100)]
        if not page:
            return NO_CONTENT
        return 200, {"rules": [{"rule-description": described(rule)} for rule in page]}, "", "OK"


def _rule(name: str, given: dict[str, Any]) -> Rule:
    action = {str(k): v for k, v in (given.get("sql-rule-action") or {}).items()}
    sql = {str(k): v for k, v in (given.get("sql-filter") or {}).items()}
    if sql:
        return Rule(name, sql=sql["expression"], action=action.get("expression"))
    correlation = {str(k): v for k, v in (given.get("correlation-filter") or {}).items() if v is not None}
    return Rule(name, correlation=correlation, action=action.get("expression"))


def described(rule: Rule) -> Any:
    """A rule as the wire has it."""
    if rule.sql is not None:
        named = {"1=1": _TRUE, "1=0": _FALSE}.get(rule.sql.replace(" ", ""))
        what = Described(symbol(named), []) if named else Described(symbol(_SQL), [rule.sql, None])
    else:
        wanted = {k.replace("_", "-"): v for k, v in (rule.correlation or {}).items()}
        order: Sequence[str] = ("correlation-id", "message-id", "to", "reply-to", "label", "session-id", "reply-to-session-id")
        fields = [wanted.get(key) for key in (*order, "content-type")]
        what = Described(symbol(_CORRELATION), [*fields, wanted.get("properties") or {}])
    action = Described(symbol("com.microsoft:sql-rule-action:list"), [rule.action, None]) if rule.action else None
    empty = Described(symbol("com.microsoft:empty-rule-action:list"), [])
    body = [what, action or empty, rule.name, milliseconds(time.time())]
    return Described(symbol("com.microsoft:rule-description:list"), body)
