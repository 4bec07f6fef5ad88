"""A progress bar that names what is at work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(wanted: bool | None, total: int | None, finished: int = 0) -> Iterator[Callable[[str, int], None]]:
    """Gives ``advance(name, steps)`` while a bar is shown on the standard error stream.

    Args:
        wanted: show it; None shows it on a terminal or in a notebook.
        total: number of steps; None if it is not known.
        finished: steps done before.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shown = wanted if wanted is not None else console.is_terminal or console.is_jupyter
    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=total, completed=finished)
        yield lambda name, steps: bar.update(task, advance=steps, description=name)
