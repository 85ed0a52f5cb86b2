"""The plot of a benchmark: latencies by model and runtime, and accuracy against latency.

In: a `BenchResult`. Out: a PNG.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BackendError, complain
from ..storage import write_atomically
from .timing import quartiles

if TYPE_CHECKING:
    from .result import BenchResult


def draw(result: BenchResult, path: str | Path) -> None:
    """Write the PNG, atomically; BackendError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError(
            complain("no matplotlib", "matplotlib for plots", "pip install 'slr_gpu[plot]'")
        ) from error
    panels = 2 if result.accuracy else 1
    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _bars(result, axes[0])
    if result.accuracy:
        _tradeoff(result, axes[1])
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _bars(result: BenchResult, axis: Any) -> None:
    width = 0.8 / len(result.models)
    for index, model in enumerate(result.models):
        rows = [row for row in result.latencies if row.model == model]
        low, middle, high = 1e3 * np.array([quartiles(row.seconds) for row in rows]).T
        x = np.array([result.runtimes.index(row.runtime) for row in rows])
        x = x + (index - (len(result.models) - 1) / 2) * width
        spread = (middle - low, high - middle)
        axis.bar(x, middle, 0.95 * width, yerr=spread, capsize=3, label=model)
        for row, position, top in zip(rows, x, high, strict=True):
            text = "" if row.speedup is None else f"{row.speedup.value:.2f}x"
            text = text if row.agrees else "outputs differ"
            axis.annotate(text, (position, top), (0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(range(len(result.runtimes)), result.runtimes)
    axis.set_ylabel("latency, ms (median, quartiles)")
    axis.margins(y=0.1)
    axis.set_title(f"{result.environment['cpu']}, threads: {result.environment['threads']}")
    axis.title.set_fontsize(9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def _tradeoff(result: BenchResult, axis: Any) -> None:
    for model in result.models:
        row = result.fastest(model)
        low, middle, high = (1e3 * value for value in quartiles(row.seconds))
        spread = [[middle - low], [high - middle]]
        axis.errorbar(middle, result.accuracy[model], xerr=spread, fmt="o", capsize=3)
        axis.annotate(
            f"{model} ({row.runtime})",
            (middle, result.accuracy[model]),
            (0, 8),
            textcoords="offset points",
            ha="center",
        )
    axis.margins(0.5, 0.25)
    axis.set_xlabel("latency in the fastest runtime, ms")
    axis.set_ylabel("accuracy")
    axis.spines[["top", "right"]].set_visible(False)
