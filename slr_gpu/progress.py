"""Progress bars that appear on a terminal once the work has taken two seconds.

Where standard error is a file or a pipe, long work says a line a minute instead.

In: what is being done and how much of it there is. Out: a function to call as it gets done. A
process that works for another one hands its bars on with `reported_to`; `JobBars` shows those of
many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[..., None]
# Called with what is being done, how much of it is done and how much there is.
Listener = Callable[[str, float, float], None]

DELAY_S = 2.0
# Between two lines where nothing can be animated.
LINE_S = 60.0
# A listener hears of steps this far apart at most.
REPORTED_S = 0.1

_listeners: list[Listener] = []


@contextmanager
def progress_bar(description: str, total: float, *, show: bool = True) -> Iterator[Advance]:
    """A bar on standard error.

    Yields
    ------
    advance : callable
        ``advance(amount=1, description=None)``.
    """
    if _listeners:
        yield _reporter(_listeners[-1], description, total)
        return
    console = Console(stderr=True)
    bar = _progress(console)
    task = bar.add_task(description, total=total)
    began = said = time.perf_counter()
    started = False

    def advance(amount: float = 1, description: str | None = None) -> None:
        nonlocal started, said
        bar.update(task, advance=amount, description=description)
        now = time.perf_counter()
        if not show or started:
            return
        if console.is_terminal:
            if now - began > DELAY_S:
                bar.start()
                started = True
        elif now - said >= LINE_S:
            said = now
            console.print(_line(bar.tasks[0]), markup=False, highlight=False, soft_wrap=True)

    try:
        yield advance
    finally:
        if started:
            bar.stop()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _line(task: Task) -> str:
    """How far a task has come, in words."""
    times = [f"{timedelta(seconds=int(task.elapsed or 0))} elapsed"]
    if task.time_remaining is not None:
        times.append(f"{timedelta(seconds=int(task.time_remaining))} to go")
    return f"{task.description}: {task.percentage:.0f}%, {', '.join(times)}"


@contextmanager
def reported_to(listener: Listener) -> Iterator[None]:
    """Inside, bars are not drawn: the listener is told instead."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _reporter(listener: Listener, description: str, total: float) -> Advance:
    done, last, what = 0.0, -REPORTED_S, description

    def advance(amount: float = 1, description: str | None = None) -> None:
        nonlocal done, last, what
        done, what = done + amount, description or what
        now = time.perf_counter()
        if description is not None or now - last >= REPORTED_S or done >= total:
            last = now
            listener(what, done, total)

    advance(0, description)
    return advance


class JobBars:
    """A bar for each running job and one for all, on standard error.

    On a pipe there are only the lines that `finish` is given.

    Parameters
    ----------
    total : int
        Jobs.
    show : bool
    """

    def __init__(self, total: int, *, show: bool = True) -> None:
        console = Console(stderr=True, quiet=not show)
        self._progress = _progress(console)
        self._all = self._progress.add_task("all jobs", total=total)
        self._tasks: dict[Hashable, int] = {}
        self._show = show and console.is_terminal

    def __enter__(self) -> JobBars:
        if self._show:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._show:
            self._progress.stop()

    def update(self, key: Hashable, description: str, done: float = 0, total: float = 1) -> None:
        """Show how far a job has come."""
        description = escape(description)
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(description, total=total)
        self._progress.update(
            self._tasks[key], description=description, completed=done, total=total
        )

    def remove(self, key: Hashable) -> None:
        """Take away the bar of a job."""
        if key in self._tasks:
            self._progress.remove_task(self._tasks.pop(key))

    def finish(self, line: str) -> None:
        """Count one more job as finished and say how it ended."""
        self._progress.advance(self._all)
        self.say(line)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(escape(line), highlight=False, soft_wrap=True)
