"""From the name of a selection to the selection.

expression:  both ("or" both)*
both:        one ("and" one)*
one:         "not" one | "(" expression ")" | word [":" value ("," value)*] ["(" expression ")"]
value:       text | field "=" text
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from hf_rmt.theory import selection as s

_KINDS = (s.Group, s.Rank, s.Top, s.Bottom, s.Mass, s.Outliers, s.Bulk, s.Significant, s.Overlapping, s.Random)
_MAKERS: dict[str, Callable[..., s.Selection]] = {"decile": s.Decile, **{cls.word: cls for cls in _KINDS}}
_TOKEN = re.compile(r"\s*([()]|[^\s()]+)")


def parse_selection(text: str) -> s.Selection:
    """The selection of a name: ``"decile:10"``, ``"mass:0.8,end=top"``, ``"not (bulk or rank:5)"``.

    Raises:
        ValueError: no such selection, or a value out of range; the message has the text.
    """
    reader = _Reader(text)
    try:
        found = reader.expression()
        reader.done()
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot read the selection {text!r}: {error}") from error
    return found


class _Reader:
    """Reads one expression from the left."""

    def __init__(self, text: str):
        self.tokens = _TOKEN.findall(text)

    def next_is(self, token: str) -> bool:
        """Take the next token if it is this one."""
        if self.tokens[:1] != [token]:
            return False
        self.tokens.pop(0)
        return True

    def done(self) -> None:
        """Raise if anything is left."""
        if self.tokens:
            raise ValueError(f"nothing is expected at {self.tokens[0]!r}; join selections by or, and, not")

    def expression(self) -> s.Selection:
        found = self._both()
        while self.next_is("or"):
            found = found | self._both()
        return found

    def _both(self) -> s.Selection:
        found = self._one()
        while self.next_is("and"):
            found = found & self._one()
        return found

    def _one(self) -> s.Selection:
        if self.next_is("not"):
            return s.Not(self._one())
        if self.next_is("("):
            return self._closed()
        if not self.tokens or self.tokens[0] in ("or", "and", ")"):
            raise ValueError("a selection is missing")
        word, _, arguments = self.tokens.pop(0).partition(":")
        inner = self._closed() if self.next_is("(") else None
        return _made(word, arguments.split(",") if arguments else [], inner)

    def _closed(self) -> s.Selection:
        found = self.expression()
        if not self.next_is(")"):
            raise ValueError("a bracket is not closed")
        return found


def _made(word: str, arguments: list[str], inner: s.Selection | None) -> s.Selection:
    positional = [_value(text) for text in arguments if "=" not in text]
    named = {key: _value(value) for key, _, value in (text.partition("=") for text in arguments if "=" in text)}
    if word not in _MAKERS:
        raise ValueError(f"there is no {word!r}; there are {', '.join(_MAKERS)}")
    if word == "random" and inner is None:
        raise ValueError("a random selection says in brackets what it is like, as random:0(decile:3)")
    if word != "random" and inner is not None:
        raise ValueError(f"{word!r} takes no brackets")
    maker = _MAKERS[word] if inner is None else partial(s.Random, inner)
    takes, bare = signature(maker), getattr(_MAKERS[word], "bare", 1)
    try:
        takes.bind(*positional, **named)
        fits = len(positional) <= bare
    except TypeError:
        fits = False
    if not fits:
        names = list(takes.parameters)
        by_name = f"; all but the first {bare} by name, as {names[-1]}=..." if len(names) > bare else ""
        raise ValueError(f"{word} takes {', '.join(names)}{by_name}")
    return maker(*positional, **named)


def _value(text: str) -> Any:
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
