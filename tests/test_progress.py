from __future__ import annotations

import io

import pytest
import rich.console

from hf_rmt.progress import progress_bar


@pytest.fixture
def shown(monkeypatch) -> io.StringIO:
    """What a terminal would show."""
    stream, make = io.StringIO(), rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda **_: make(file=stream, force_terminal=True, width=120))
    return stream


def test_it_names_what_is_at_work_brackets_included(shown: io.StringIO) -> None:
    with progress_bar(None, 4, finished=1) as advance:
        advance("h.0.attn.c_attn[query]", 1)
    assert "c_attn[query]" in shown.getvalue() and "2/4" in shown.getvalue()


def test_it_can_be_left_out(shown: io.StringIO) -> None:
    with progress_bar(False, 4) as advance:
        advance("name", 1)
    assert shown.getvalue() == ""
