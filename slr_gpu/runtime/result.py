"""What `bench` measured: rows, speed-ups, a table, JSON, a plot.

In: seconds a call of every model in every runtime. Out: a `BenchResult`. A time never stands
without its spread, a speed-up never without its interval and whether that became narrow enough.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..storage import save_json
from .plot import draw
from .sessions import LayerTime
from .timing import Interval, bootstrap, quartiles

SCHEMA = 1


@dataclass
class Latency:
    """One model in one runtime.

    Attributes
    ----------
    model, runtime : str
    seconds : array (rounds,)
        Mean seconds of a call, one number a round.
    calls : int
        Timed calls a round.
    output_error : float or None
        Largest relative difference from the outputs of the other runtimes, at least half of
        which are as near; None without another runtime.
    agrees : bool
        Whether that difference is rounding. Rows that do not agree get no speed-up.
    speedup : Interval or None
        The baseline in the same runtime over this.
    layers : list of LayerTime
        From the runtime's profiler, in a session apart; the slowest first.
    """

    model: str
    runtime: str
    seconds: np.ndarray
    calls: int
    output_error: float | None = None
    agrees: bool = True
    speedup: Interval | None = None
    layers: list[LayerTime] = field(default_factory=list)

    @property
    def median(self) -> float:
        return quartiles(self.seconds)[1]


@dataclass
class Headline:
    """A model in its fastest runtime against the baseline in the baseline's fastest runtime.

    Only runtimes count that ran both and whose outputs agree.
    """

    model: str
    runtime: str
    baseline_runtime: str
    speedup: Interval


@dataclass
class Skipped:
    """What was not measured, and why; `model` is empty when no model was."""

    model: str
    runtime: str
    reason: str


@dataclass
class BenchResult:
    """All measurements of one run.

    Attributes
    ----------
    baseline : str
    latencies : list of Latency
    skipped : list of Skipped
    accuracy : dict of str to float
        What ``eval_fn`` returned for each model.
    precision : float
        Asked for: width of the 95 % intervals relative to the ratios.
    converged : bool
        Whether all ratios in the same runtime reached it within the time limit.
    environment, settings : dict
    inputs : list of dict
        name, shape, dtype.
    notes : list of str
    seconds : float
        Wall time of the measurement.
    written : list of str
        Names of the files in the folder asked for.
    """

    baseline: str
    latencies: list[Latency]
    skipped: list[Skipped]
    precision: float
    converged: bool
    accuracy: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    written: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row.model for row in self.latencies))

    @property
    def runtimes(self) -> list[str]:
        return list(dict.fromkeys(row.runtime for row in self.latencies))

    @property
    def headlines(self) -> list[Headline]:
        """One for each model but the baseline, where a runtime runs both."""
        found = []
        for model in self.models:
            pairs = [self._pair(model, runtime) for runtime in self.runtimes]
            pairs = [pair for pair in pairs if pair is not None]
            if model == self.baseline or not pairs:
                continue
            baseline = min((pair[0] for pair in pairs), key=lambda row: row.median)
            fastest = min((pair[1] for pair in pairs), key=lambda row: row.median)
            speedup = bootstrap(baseline.seconds / fastest.seconds)
            found.append(Headline(model, fastest.runtime, baseline.runtime, speedup))
        return found

    def fastest(self, model: str) -> Latency:
        """The model's fastest row, of those whose outputs agree where there are any."""
        rows = [row for row in self.latencies if row.model == model]
        return min(rows, key=lambda row: (not row.agrees, row.median))

    def _pair(self, model: str, runtime: str) -> tuple[Latency, Latency] | None:
        rows = {row.model: row for row in self.latencies if row.runtime == runtime and row.agrees}
        return (rows[self.baseline], rows[model]) if {self.baseline, model} <= set(rows) else None

    # -- JSON ----------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; times in seconds."""
        rows = []
        for row in self.latencies:
            low, middle, high = quartiles(row.seconds)
            rows.append(
                {
                    "model": row.model,
                    "runtime": row.runtime,
                    "median_s": middle,
                    "q1_s": low,
                    "q3_s": high,
                    "rounds": len(row.seconds),
                    "calls_per_round": row.calls,
                    "output_error": _finite(row.output_error),
                    "agrees": row.agrees,
                    "speedup": self._speedup(row.speedup),
                    "layers": [asdict(layer) for layer in row.layers],
                    "samples_s": [float(f"{value:.5g}") for value in row.seconds],
                }
            )
        return {
            "schema": SCHEMA,
            "baseline": self.baseline,
            "converged": self.converged,
            "precision": self.precision,
            "headlines": [
                {
                    "model": item.model,
                    "runtime": item.runtime,
                    "baseline_runtime": item.baseline_runtime,
                    "speedup": self._speedup(item.speedup),
                }
                for item in self.headlines
            ],
            "latencies": rows,
            "skipped": [asdict(item) for item in self.skipped],
            "accuracy": self.accuracy,
            "inputs": self.inputs,
            "environment": self.environment,
            "settings": self.settings,
            "notes": self.notes,
            "seconds": self.seconds,
        }

    def _speedup(self, interval: Interval | None) -> dict[str, Any] | None:
        if interval is None:
            return None
        return {
            "ratio": interval.value,
            "low": interval.low,
            "high": interval.high,
            "converged": interval.width <= self.precision,
        }

    def save(self, path: str | Path) -> None:
        """Write the JSON, atomically."""
        save_json(path, self.as_dict())

    # -- table ---------------------------------------------------------------------------------

    def table(self, *, layers: bool = False, top: int = 10) -> Group:
        """A rich renderable: a line a model and runtime, headlines, what is missing, conditions.

        Parameters
        ----------
        layers : bool
            Add the slowest nodes of each.
        top : int
            How many of them.
        """
        table = _table("model", "runtime", "ms (quartiles)", "speed-up (95 %)", "outputs")
        if self.accuracy:
            table.add_column("accuracy", justify="right")
        for row in self.latencies:
            low, middle, high = (f"{1e3 * value:.3g}" for value in quartiles(row.seconds))
            ratio = "" if row.speedup is None else _ratio(row.speedup, self.precision)
            cells = [f"{middle} ({low}-{high})", ratio, _agreement(row)]
            if self.accuracy:
                cells.append(f"{self.accuracy[row.model]:.4g}")
            table.add_row(row.model, row.runtime, *cells)
        for item in self.skipped:
            table.add_row(item.model or "all", item.runtime, "-", style="dim")
        parts: list[Any] = [table, Text("\n".join(["", *self._lines()]))]
        for row in self.latencies if layers else ():
            if row.layers:
                parts += [Text(f"\n{row.model}, {row.runtime}"), _layer_table(row.layers, top)]
        return Group(*parts)

    def _lines(self) -> list[str]:
        lines = []
        for item in self.headlines:
            ratio = _ratio(item.speedup, self.precision)
            where = (
                f"both in {item.runtime}"
                if item.runtime == item.baseline_runtime
                else f"in {item.runtime}, {self.baseline} in {item.baseline_runtime}"
            )
            lines.append(
                f"{item.model}: {ratio} against {self.baseline} in the fastest runtime, {where}"
            )
        measured = {item.model for item in self.headlines} | {self.baseline}
        for model in self.models:
            if model not in measured:
                lines.append(f"{model}: no speed-up, no runtime gives agreeing outputs of both")
        if not self.converged:
            lines.append(
                f"time limit of {self.settings['time_limit_s']:g} s reached before all intervals"
                f" were {self.precision:.1%} wide; wider ones are marked ~"
            )
        for item in self.skipped:
            lines.append(f"{item.model or 'all models'} in {item.runtime}: {item.reason}")
        where = self.environment
        pinned = "not pinned"
        if where["cpus"] is not None:
            pinned = f"pinned to CPU {', '.join(map(str, where['cpus']))}"
        inputs = ", ".join(
            f"{item['name']} {'x'.join(map(str, item['shape']))} {item['dtype']}"
            for item in self.inputs
        )
        lines.append(
            f"{where['cpu']}; threads {where['threads']} ({pinned}; PyTorch"
            f" {where['torch_threads']}, OMP_NUM_THREADS {where['omp_num_threads']});"
            f" load average {where['load_average']} on {where['cpu_count']} CPUs"
        )
        rounds = len(self.latencies[0].seconds)
        lines.append(f"inputs {inputs}; {rounds} rounds in {self.seconds:.1f} s")
        return lines + self.notes

    def print(self, console: Console | None = None, *, layers: bool = False) -> None:
        """Print the table."""
        (console or Console()).print(self.table(layers=layers))

    def plot(self, path: str | Path) -> None:
        """Draw latencies, and accuracy against latency where it is known, into a PNG, atomically.

        Raises
        ------
        BackendError
            Without matplotlib.
        """
        draw(self, path)


def _table(*titles: str) -> Table:
    table = Table(header_style="bold", pad_edge=False, box=None)
    for index, title in enumerate(titles):
        table.add_column(
            title,
            justify="left" if index < 2 else "right",
            no_wrap=index >= 2 or title in ("model", "runtime"),
            overflow="fold",
        )
    return table


def _layer_table(layers: list[LayerTime], top: int) -> Table:
    table = _table("node", "type", "ms", "share")
    total = sum(layer.seconds for layer in layers) or 1.0
    for layer in layers[:top]:
        share = f"{layer.seconds / total:.1%}"
        table.add_row(Text(layer.name), Text(layer.type), f"{1e3 * layer.seconds:.4g}", share)
    return table


def _ratio(interval: Interval, precision: float) -> str:
    mark = "" if interval.width <= precision else "~"
    return f"{mark}{interval.value:.2f}x ({interval.low:.2f}-{interval.high:.2f})"


def _agreement(row: Latency) -> str:
    if row.output_error is None:
        return "not compared"
    return f"{'within' if row.agrees else 'DIFFER by'} {row.output_error:.0e}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
