"""From the name of a selection to the selection.

expression:  both ("or" both)*
both:        one ("and" one)*
one:         "not" one | "(" expression ")" | word [":" value ("," value)*] ["(" expression ")"]
value:       text | field "=" text
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from hf_rmt.theory import selection as s

_WORDS: dict[str, type[s.Selection]] = {
    cls.word: cls
    for cls in (s.Group, s.Rank, s.Top, s.Bottom, s.Mass, s.Outliers, s.Bulk, s.Significant, s.Overlapping, s.Random)
}
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
    if word == "random":
        if inner is None:
            raise ValueError("a random selection says in brackets what it is like, as random:0(decile:3)")
        return s.Random(inner, *positional, **named)
    if inner is not None:
        raise ValueError(f"{word!r} takes no brackets")
    if word == "decile":
        return s.Decile(*positional, **named)
    if word not in _WORDS:
        raise ValueError(f"there is no {word!r}; there are decile, {', '.join(_WORDS)}")
    cls = _WORDS[word]
    if len(positional) > cls.bare or set(named) - {field.name for field in fields(cls)}:  # type: ignore[arg-type]
        allowed = ", ".join(field.name for field in fields(cls))  # type: ignore[arg-type]
        raise ValueError(
            f"{word} takes {allowed}; all but the first {cls.bare} by name, as {allowed.split(', ')[-1]}=..."
        )
    return cls(*positional, **named)


def _value(text: str) -> Any:
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
