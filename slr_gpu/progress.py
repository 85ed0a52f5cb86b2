"""Progress bars that appear on a terminal once the work has taken two seconds.

In: what is being done and how much of it there is. Out: a function to call as it gets done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[..., None]

DELAY_S = 2.0


@contextmanager
def progress_bar(description: str, total: float, *, show: bool = True) -> Iterator[Advance]:
    """A bar on standard error.

    Yields
    ------
    advance : callable
        ``advance(amount=1, description=None)``.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(description, total=total)
    began, started = time.perf_counter(), False
    # On a pipe there is nothing to animate.
    show = show and console.is_terminal

    def advance(amount: float = 1, description: str | None = None) -> None:
        nonlocal started
        if description is None:
            bar.update(task, advance=amount)
        else:
            bar.update(task, advance=amount, description=description)
        if show and not started and time.perf_counter() - began > DELAY_S:
            bar.start()
            started = True

    try:
        yield advance
    finally:
        if started:
            bar.stop()
