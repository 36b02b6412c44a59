"""Completion of `%broker` lines: verbs, options and the names of topics. Never asks a broker: it answers from what was seen."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher

from broker_nb.notebook.grammar import options

_LINE = re.compile(r"\s*(?:[\w, .\[\]]+=\s*)?%{1,2}broker\s+(?P<rest>.*)", re.DOTALL)


class BrokerCompleter:
    """A matcher (API v2) for IPython.

    Parameters
    ----------
    verbs
        The signature behind each verb.
    connections, topics
        What is known by now: the names of the open connections, and of the current one's topics.
    """

    def __init__(
        self,
        verbs: Mapping[str, inspect.Signature],
        connections: Callable[[], Iterable[str]],
        topics: Callable[[], Iterable[str]],
    ) -> None:
        self.verbs = verbs
        self.connections = connections
        self.topics = topics

        @context_matcher(identifier="broker_nb", priority=200)  # type: ignore[untyped-decorator]  # IPython's own has no types
        def matcher(context: CompletionContext) -> SimpleMatcherResult:
            return self._match(context)

        self.matcher = matcher

    def _match(self, context: CompletionContext) -> SimpleMatcherResult:
        found = _LINE.fullmatch(context.text_until_cursor)
        if not found:
            return SimpleMatcherResult(completions=[])
        rest = found["rest"]
        done = rest.split()
        word = "" if not rest or rest[-1].isspace() else done.pop()
        kind, names = self._candidates(done, word)
        return SimpleMatcherResult(
            completions=[SimpleCompletion(name, type=kind) for name in names if name.startswith(word)],
            matched_fragment=word,  # IPython's own token ends at a delimiter such as `=`
            suppress=True,  # counts only where there is a completion
        )

    def _candidates(self, done: list[str], word: str) -> tuple[str, Iterable[str]]:
        if not done:
            return "verb", self.verbs
        if done[0] not in self.verbs or "where" in done:
            return "", ()
        takes = options(self.verbs[done[0]])
        if word.startswith("-"):
            return "option", [option.flag for option in takes.values() if option.name not in ("where", "params", "frame")]
        if done[0] == "help":
            return "verb", self.verbs
        if done[0] in ("use", "close"):
            return "connection", self.connections()
        before = takes.get(done[-1].removeprefix("--").replace("-", "_")) if done[-1].startswith("--") else None
        if (before and before.name in ("to", "topic")) or (len(done) == 1 and "topic" in takes):
            return "topic", self.topics()
        return "", ()
