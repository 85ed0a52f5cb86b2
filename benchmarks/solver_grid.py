"""All solvers on all layers of the VGG-16 at several budgets, on equal terms.

In: `LayerIO`s with the original's inputs, and the table of contenders. Out: one record a cell
(contender, layer, keep): ``||Y - r(Z)||^2 / ||Y||^2`` on rows never fitted, seconds, iterations
and structure; tables, a plot, and a summary that says on how many cells the reference is best or
within one percent of the best, and by which factor (geometric mean) each contender's error is
above its own. Where a contender finds a support by itself, the greedy support of the very same
size is fitted beside it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import slr_gpu
from benchmarks.contenders import CONTENDERS, REFERENCE, UNCOUNTED, Contender
from benchmarks.store import Store, key, progress
from benchmarks.vgg_layers import VGG
from slr_gpu.errors import SLRError

CLOSE = 1.01
# Errors below it are rounding: no ratio is made of them.
FLOOR = 1e-9
# One contender's failure must not cost the hours of the others: it is stored, and tried again by
# the next run.
FAILURES = (SLRError, ValueError, ArithmeticError, LookupError, MemoryError)


def run(
    vgg: VGG,
    store: Store,
    contenders: Sequence[Contender],
    labels: Sequence[str],
    keeps: Sequence[float],
) -> list[dict[str, Any]]:
    """Compute the cells that the store lacks; the records of all cells asked for."""
    records = []
    with progress("grid", _count(vgg, contenders, labels, keeps)) as done:
        for slow in (False, True):
            for label in labels:
                taps = math.prod(vgg.original.get_submodule(vgg.layers[label]).weight.shape[2:])
                layer_io = None
                for keep in keeps:
                    for contender in contenders:
                        if contender.slow is not slow or not contender.applies(taps):
                            continue
                        name = key(contender.label, label, keep)
                        mark = vgg.fingerprint(
                            solver=contender.solver(vgg.setting.quick),
                            form=contender.form,
                            low_rank_only=contender.low_rank_only,
                        )
                        record = store.get(name, mark)
                        if record is None:
                            # Captured and read only when a cell of the layer is missing.
                            layer_io = layer_io or vgg.layer_io(label)
                            cell = {"contender": contender.label, "layer": label, "keep": keep}
                            cell |= measure(contender, layer_io, keep, vgg.setting.quick)
                            record = store.put(name, mark, cell)
                        records.append(record)
                        done(f"{name}: {_result(record)}")
    return records


def _count(vgg, contenders, labels, keeps) -> int:
    taps = [vgg.original.get_submodule(vgg.layers[label]).weight[0, 0].numel() for label in labels]
    return len(keeps) * sum(c.applies(t) for c in contenders for t in taps)


def _result(record: dict[str, Any]) -> str:
    if record.get("failed"):
        return record["failed"].splitlines()[0]
    return f"{record['error']:.4g} in {record['seconds']:.1f} s, {record['structure']}"


def measure(
    contender: Contender, layer_io: slr_gpu.LayerIO, keep: float, quick: bool = False
) -> dict[str, Any]:
    """One cell; ``{"failed": why}`` where the contender has no answer."""
    began = time.perf_counter()
    try:
        fitted = contender.fit(layer_io, keep, quick)
    except FAILURES as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - began
    n, m = layer_io.weight.shape
    cell = {
        "error": fitted.held_out_error,
        "fitted_error": fitted.error,
        "seconds": seconds,
        "iterations": len(fitted.history),
        "structure": str(fitted.structure),
        "status": fitted.status.value,
        "kept": (fitted.parameters - n) / (n * m),
    }
    if contender.against_greedy and len(fitted.columns):
        cell["greedy"] = _greedy(layer_io, fitted)
    return cell


def _greedy(layer_io: slr_gpu.LayerIO, fitted: slr_gpu.Decomposition) -> dict[str, Any]:
    """`Majorize` on the greedy support with as many groups and the same rank."""
    structure = fitted.structure
    greedy = slr_gpu.fit(layer_io, **{structure.form: structure.s}, rank=structure.k)
    shared = len(np.intersect1d(greedy.columns, fitted.columns))
    return {
        "error": greedy.held_out_error,
        "shared": shared / len(fitted.columns),
    }


def in_order(
    records: Iterable[dict[str, Any]], labels: Sequence[str], keeps: Sequence[float]
) -> list[dict[str, Any]]:
    """Stored records of these layers and budgets, as the tables list them."""
    names = [contender.label for contender in CONTENDERS]
    chosen = [
        r
        for r in records
        if r["layer"] in labels and r["keep"] in keeps and r["contender"] in names
    ]
    order = {"contender": names, "layer": list(labels), "keep": list(keeps)}
    return sorted(chosen, key=lambda r: [values.index(r[k]) for k, values in order.items()])


# -- summary -----------------------------------------------------------------------------------


def geometric_mean(values: Iterable[float]) -> float:
    """NaN for no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def ratio(error: float, reference: float) -> float:
    return max(error, FLOOR) / max(reference, FLOOR)


def by_cell(records: Iterable[dict[str, Any]]) -> dict[tuple[str, float], dict[str, float]]:
    """Errors by (layer, keep), then by contender; cells that failed are left out."""
    cells: dict[tuple[str, float], dict[str, float]] = {}
    for record in records:
        if not record.get("failed") and record["error"] is not None:
            errors = cells.setdefault((record["layer"], record["keep"]), {})
            errors[record["contender"]] = record["error"]
    return cells


def summarize(
    records: Sequence[dict[str, Any]], reference: str = REFERENCE, *, equal_cost: bool = False
) -> dict[str, Any]:
    """How the reference does against all others.

    Parameters
    ----------
    equal_cost : bool
        Leave out the contenders that store more than is counted: entries without their places.

    Returns
    -------
    dict
        ``cells``: those with the reference and at least one other; ``best_or_close``: where its
        error is at most 1.01 times the least; ``worst``: the largest ratio to the least error,
        with its cell; ``mean_ratio``: by contender, the geometric mean of error over the
        reference's; ``supports``: by contender, its own support against the greedy one.
    """
    if equal_cost:
        records = [r for r in records if r["contender"] not in UNCOUNTED]
    cells = by_cell(records)
    judged = {c: e for c, e in cells.items() if reference in e and len(e) > 1}
    worst = {"ratio": math.nan}
    ratios: dict[str, list[float]] = {}
    close = 0
    for (layer, keep), errors in judged.items():
        winner = min(errors, key=errors.__getitem__)
        behind = ratio(errors[reference], errors[winner])
        close += behind <= CLOSE
        if not behind <= worst["ratio"]:
            worst = {"ratio": behind, "layer": layer, "keep": keep, "best": winner}
        for contender, error in errors.items():
            ratios.setdefault(contender, []).append(ratio(error, errors[reference]))
    return {
        "reference": reference,
        "against": "contenders of equal cost" if equal_cost else "all contenders",
        "cells": len(judged),
        "best_or_close": close,
        "worst": worst,
        "mean_ratio": {name: geometric_mean(values) for name, values in ratios.items()},
        "supports": _supports(records),
    }


def _supports(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    pairs: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("greedy") and record["error"] is not None:
            pairs.setdefault(record["contender"], []).append(record)
    return {
        name: {
            "cells": len(found),
            "lower_error": sum(r["error"] < r["greedy"]["error"] for r in found),
            "mean_ratio": geometric_mean(ratio(r["error"], r["greedy"]["error"]) for r in found),
            "shared": sum(r["greedy"]["shared"] for r in found) / len(found),
        }
        for name, found in pairs.items()
    }


# -- tables and plot -----------------------------------------------------------------------------


def report(
    records: Sequence[dict[str, Any]], summaries: Sequence[dict[str, Any]], console: Console
) -> None:
    """Print a table a budget with the best in bold, and what the summaries say."""
    cells = by_cell(records)
    labels = list(dict.fromkeys(record["layer"] for record in records))
    contenders = list(dict.fromkeys(record["contender"] for record in records))
    for keep in dict.fromkeys(record["keep"] for record in records):
        table = Table(title=f"held-out error after the activation, {keep:.0%} of the weights")
        table.add_column("contender", no_wrap=True)
        for label in labels:
            table.add_column(label, justify="right", no_wrap=True)
        table.add_column("seconds", justify="right", no_wrap=True)
        for contender in contenders:
            row = []
            for label in labels:
                errors = cells.get((label, keep), {})
                error = errors.get(contender)
                best = error is not None and error <= min(errors.values())
                style = "[bold]" if best else ""
                row.append("-" if error is None else f"{style}{error:.3g}")
            seconds = [
                r.get("seconds", 0.0)
                for r in records
                if r["contender"] == contender and r["keep"] == keep
            ]
            table.add_row(contender, *row, f"{sum(seconds):.0f}")
        console.print(table)
    for record in records:
        if record.get("failed"):
            where = key(record["contender"], record["layer"], record["keep"])
            console.print(f"no result: {where}: {record['failed']}", markup=False)
    for summary in summaries:
        worst = summary["worst"]
        if summary["cells"]:
            console.print(
                f"{summary['reference']} against {summary['against']}: best or within 1 % on "
                f"{summary['best_or_close']} of {summary['cells']} cells; worst ratio "
                f"{worst['ratio']:.3f} ({worst['layer']}, keep {worst['keep']:g}, "
                f"best: {worst['best']})"
            )
    summary = summaries[0]
    if summary["mean_ratio"]:
        table = Table(title=f"error over that of {summary['reference']}, geometric mean")
        table.add_column("contender")
        table.add_column("ratio", justify="right")
        for name, value in summary["mean_ratio"].items():
            table.add_row(name, f"{value:.3f}")
        console.print(table)
    for name, pair in summary["supports"].items():
        console.print(
            f"{name}: its own support against the greedy one, same sizes: error ratio "
            f"{pair['mean_ratio']:.3f} (lower on {pair['lower_error']} of {pair['cells']}), "
            f"{pair['shared']:.0%} of the support shared"
        )


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Errors by layer, one panel a budget, one line a contender."""
    from matplotlib.figure import Figure

    cells = by_cell(records)
    labels = list(dict.fromkeys(record["layer"] for record in records))
    contenders = list(dict.fromkeys(record["contender"] for record in records))
    keeps = list(dict.fromkeys(record["keep"] for record in records))
    figure = Figure(figsize=(12, 1 + 3.6 * len(keeps)), layout="constrained")
    markers = "osv^D<>pPX*hd8"
    for panel, keep in zip(figure.subplots(len(keeps), squeeze=False)[:, 0], keeps, strict=True):
        for index, contender in enumerate(contenders):
            found = [cells.get((label, keep), {}).get(contender) for label in labels]
            panel.plot(
                labels,
                [math.nan if error is None else max(error, FLOOR) for error in found],
                color=f"C{index % 10}",
                linestyle="-" if index < 10 else "--",
                marker=markers[index % len(markers)],
                markersize=4,
                linewidth=2.2 if contender == REFERENCE else 1,
                zorder=3 if contender == REFERENCE else 2,
                label=contender,
            )
        panel.set_yscale("log")
        panel.set_title(f"{keep:.0%} of the weights kept")
        panel.set_ylabel("held-out error")
        panel.grid(which="both", alpha=0.25)
    handles, names = panel.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
