"""Results that survive a killed run: one JSON file a benchmark, one record a piece of work.

In: keys (contender, layer, keep), the settings a piece of work depends on, and its results. Out: a
file that is whole at every moment, and records that a later run finds again. A record counts only
if its fingerprint, a hash of those settings, is the one asked for; others are computed anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from slr_gpu.runtime.measure import cpu_name
from slr_gpu.storage import load_json, save_json


def fingerprint(**settings: Any) -> str:
    """Twelve hexadecimal digits that change with any of the settings."""
    text = json.dumps(settings, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key(*parts: Any) -> str:
    """One piece of work by name: ``"ADMM, columns | conv3-1 | 0.25"``."""
    return " | ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)


def machine() -> dict[str, Any]:
    """What a reader of timings must know."""
    return {
        "processor": cpu_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def peak_gib() -> float:
    """The most memory that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def plain(value: Any) -> Any:
    """JSON values: numbers that are not finite become null, tuples lists."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Store:
    """The records of one benchmark.

    Parameters
    ----------
    path : Path
        Read if it is there; written, atomically, after every record.

    Attributes
    ----------
    records : dict of str to dict
    summary : dict
        What the last complete report said.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = load_json(path) if path.exists() else {}
        self.records: dict[str, dict[str, Any]] = content.get("records", {})
        self.summary: dict[str, Any] = content.get("summary", {})

    def get(self, key: str, fingerprint: str) -> dict[str, Any] | None:
        """The record, if there is one of these settings that did not fail."""
        record = self.records.get(key)
        if record is None or record["fingerprint"] != fingerprint or record.get("failed"):
            return None
        return record

    def put(self, key: str, fingerprint: str, record: dict[str, Any]) -> dict[str, Any]:
        """Keep a record and write the file."""
        self.records[key] = {"fingerprint": fingerprint, **machine(), **plain(record)}
        self._save()
        return self.records[key]

    def get_or_make(
        self, key: str, fingerprint: str, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The record, computed first where it is not there yet."""
        return self.get(key, fingerprint) or self.put(key, fingerprint, make())

    def summarize(self, summary: dict[str, Any]) -> None:
        """Keep a summary and write the file."""
        self.summary = plain(summary)
        self._save()

    def _save(self) -> None:
        save_json(self.path, {"summary": self.summary, "records": self.records})


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, and one line on standard error for each piece of work that is done.

    Yields
    ------
    done : callable
        ``done(line)`` after each piece.
    """
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # On a pipe there is nothing to animate, and rich would print empty lines.
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(description, total=total)
    finished = 0

    def done(line: str) -> None:
        nonlocal finished
        finished += 1
        bar.advance(task)
        console.print(f"{description} {finished}/{total}: {line}", soft_wrap=True, markup=False)

    with bar:
        yield done
