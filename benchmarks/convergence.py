"""The true loss against seconds, solver by solver, on one layer at one structure.

In: a layer's arrays, s columns and rank k. Out: for each solver the curve of

    f(M, b) = (1/P) sum (Y - r(X Mᵀ + b))^2 ,   relative to ||Y||^2 / P,

on the fitted rows: the same quantity for all, without the ridge and without any surrogate. Every
iterate is judged by the weight that it would hand over: for ADMM, whose M has no structure, A + B.
The clock stands still while it is judged, and runs for all else: Gram matrix, factorisation,
search of the support, iterations. Each solver gets a fresh problem, so that nobody profits from
what another has computed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import slr_gpu
from benchmarks.store import Store, key, progress
from benchmarks.vgg_layers import VGG
from slr_gpu.decomposition import Structure
from slr_gpu.layer_budget import LayerBudget
from slr_gpu.ops import get_ops
from slr_gpu.problem import ResponseProblem
from slr_gpu.support import select_support

RIDGE = 1e-3
# What Majorize may take of ADMM's time to reach ADMM's loss.
LIMIT = 0.1


class Clock:
    """Seconds that can be stopped."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, time.perf_counter()

    def stop(self) -> float:
        self.seconds += time.perf_counter() - self._since
        return self.seconds

    def go_on(self) -> None:
        self._since = time.perf_counter()


def weight_of(problem: ResponseProblem, state: Any) -> tuple[Any, Any]:
    """The weight and bias that an iterate would hand over."""
    if not (hasattr(state, "A") and hasattr(state, "B")):
        return state.M, state.bias
    weight = state.A + state.B
    return weight, state.bias + (state.M - weight) @ problem.x_mean


def traced(solver: Any, clock: Clock, curve: list[dict[str, float]]) -> Any:
    """The same solver, noting seconds and true loss after each of its steps."""

    def note(problem: ResponseProblem, states: Sequence[Any]) -> None:
        seconds = clock.stop()
        for state in states:
            loss = float(problem.relative_error(*weight_of(problem, state)))
            curve.append({"seconds": seconds, "loss": loss})
        clock.go_on()

    class Traced(type(solver)):
        def step(self, problem: ResponseProblem, *arguments: Any, **settings: Any) -> Any:
            state = super().step(problem, *arguments, **settings)
            note(problem, [state])
            return state

        def steps(self, problem: ResponseProblem, *arguments: Any, **settings: Any) -> Any:
            states = super().steps(problem, *arguments, **settings)
            note(problem, states)
            return states

    fields = dataclasses.fields(solver)
    return Traced(**{field.name: getattr(solver, field.name) for field in fields})


@dataclasses.dataclass(frozen=True)
class Entry:
    """A solver and the structure that it gets."""

    label: str
    solver: Any
    low_rank_only: bool = False


def entries(quick: bool = False) -> list[Entry]:
    """Who takes part: ADMM as published first, ours last."""
    admm = {"refit": False} | ({"iterations": 10} if quick else {})
    long = {"iterations": 10 if quick else 40, "tolerance": 1e-5, "patience": 10**6}
    return [
        Entry("ADMM, gradient", slr_gpu.ADMM(m_step="gradient", **admm)),
        Entry("ADMM, majorize", slr_gpu.ADMM(m_step="majorize", **admm)),
        Entry("ADMM, proximal", slr_gpu.ADMM(scheme="proximal", **admm)),
        Entry("Zhang", slr_gpu.Zhang(), low_rank_only=True),
        Entry("Majorize, U V alone", slr_gpu.Majorize(**long), low_rank_only=True),
        Entry("Majorize", slr_gpu.Majorize(**long)),
        Entry("Majorize, true loss", slr_gpu.Majorize(convex=False, **long)),
    ]


def structures(layer_io: slr_gpu.LayerIO, keep: float) -> dict[bool, Structure]:
    """Columns form: the split of the budget between A and U V that `fit` takes, and U V alone."""
    n, m = layer_io.weight.shape
    budget = LayerBudget(n, layer_io.channels, layer_io.taps, ((1.0, keep * n * m),))
    chosen = slr_gpu.Majorize().choose(_problem(layer_io), budget, "columns").structure
    return {False: chosen, True: Structure("columns", 0, budget.largest_rank("columns", 0))}


def _problem(layer_io: slr_gpu.LayerIO) -> ResponseProblem:
    return ResponseProblem(layer_io, ops=get_ops("cpu"), ridge=RIDGE)


def trace(layer_io: slr_gpu.LayerIO, entry: Entry, structure: Structure) -> dict[str, Any]:
    """Run one solver.

    Returns
    -------
    dict
        ``curve``: seconds and loss after each step, the first entry being the start where the
        solver has one of the structure asked for; ``loss``, ``seconds``: of the decomposition
        that it hands over; ``refitted``: what a refit makes of ADMM's.
    """
    problem = _problem(layer_io)
    curve: list[dict[str, float]] = []
    clock = Clock()
    solver = traced(entry.solver, clock, curve)
    refitted = None
    if isinstance(solver, slr_gpu.ADMM):
        state, status, history = solver.iterate(problem, structure)
        fitted = solver.finish(problem, state, structure, status, history)
        seconds = clock.stop()
        clock.go_on()
        again = dataclasses.replace(solver, refit=True)
        better = again.finish(problem, state, structure, status, history)
        refitted = {"loss": better.error, "seconds": clock.stop(), "iterations": len(history)}
    else:
        support = None
        if not solver.chooses_support:
            support, _ = select_support(problem, structure)
        if isinstance(solver, slr_gpu.Majorize):
            # The closed form it starts from has the structure already.
            start = solver.start(problem, structure, support)
            at = clock.stop()
            loss = float(problem.relative_error(start.M, start.bias))
            curve.append({"seconds": at, "loss": loss})
            clock.go_on()
        fitted = solver.solve(problem, structure, support)
        seconds = clock.stop()
    return {
        "label": entry.label,
        "structure": str(fitted.structure),
        "curve": curve,
        "loss": fitted.error,
        "held_out_error": fitted.held_out_error,
        "seconds": seconds,
        "status": fitted.status.value,
        "refitted": refitted,
    }


def run(vgg: VGG, store: Store, label: str, keep: float) -> list[dict[str, Any]]:
    """Traces of all entries, those that the store lacks computed now."""
    records, layer_io, sizes = [], None, None
    table = entries(vgg.setting.quick)
    with progress("convergence", len(table)) as done:
        for entry in table:
            name = key(entry.label, label, keep)
            mark = vgg.fingerprint(solver=entry.solver, ridge=RIDGE)
            record = store.get(name, mark)
            if record is None:
                if layer_io is None:
                    layer_io = vgg.layer_io(label)
                    sizes = structures(layer_io, keep)
                structure = sizes[entry.low_rank_only]
                record = store.put(name, mark, trace(layer_io, entry, structure))
            records.append(record)
            done(f"{name}: loss {record['loss']:.4f} in {record['seconds']:.1f} s")
    return records


def reach(curve: Sequence[dict[str, float]], loss: float) -> float | None:
    """Seconds after which a curve is at a loss or below it; None if it never is."""
    return next((point["seconds"] for point in curve if point["loss"] <= loss), None)


def settled(curve: Sequence[dict[str, float]], loss: float) -> float | None:
    """Seconds after which a curve stays within a thousandth of a loss, or below it."""
    late = None
    for point in reversed(curve):
        if not point["loss"] <= 1.001 * loss:
            break
        late = point["seconds"]
    return late


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How soon Majorize has what each ADMM ends with.

    The ratio is to all of ADMM's seconds. Beside it stands the ratio to the seconds after which
    ADMM's curve no longer changes by a thousandth, as if it had known when to stop.

    Returns
    -------
    dict
        By ADMM variant, then by variant of `Majorize`: seconds of both, their ratio, and whether
        it is within `LIMIT`.
    """
    ours = [r for r in records if r["label"] in ("Majorize", "Majorize, true loss")]
    summary: dict[str, dict[str, Any]] = {}
    for rival in records:
        if not rival["label"].startswith("ADMM"):
            continue
        done = settled(rival["curve"], rival["loss"]) or rival["seconds"]
        summary[rival["label"]] = {}
        for record in ours:
            needed = reach(record["curve"], rival["loss"])
            summary[rival["label"]][record["label"]] = {
                "rival_loss": rival["loss"],
                "rival_seconds": rival["seconds"],
                "rival_settled": done,
                "seconds": needed,
                "ratio": None if needed is None else needed / rival["seconds"],
                "ratio_settled": None if needed is None else needed / done,
                "within_limit": needed is not None and needed <= LIMIT * rival["seconds"],
            }
    return summary


def report(
    records: Sequence[dict[str, Any]], summary: dict[str, dict[str, Any]], console: Console
) -> None:
    """Where each solver ends, and the ratios."""
    table = Table(title="true loss on the fitted rows, relative to the responses")
    for title in ("solver", "structure", "loss", "held out", "steps", "seconds", "after a refit"):
        table.add_column(title, justify="left" if title in ("solver", "structure") else "right")
    for r in records:
        again = r["refitted"]
        table.add_row(
            r["label"],
            r["structure"],
            f"{r['loss']:.5f}",
            f"{r['held_out_error']:.5f}",
            str(len(r["curve"])),
            f"{r['seconds']:.1f}",
            f"{again['loss']:.5f} at {again['seconds']:.1f} s" if again else "",
        )
    console.print(table)
    for rival, by_ours in summary.items():
        for label, found in by_ours.items():
            if found["seconds"] is None:
                text = f"never reaches its loss of {found['rival_loss']:.5f}"
            else:
                verdict = "within" if found["within_limit"] else "ABOVE"
                text = (
                    f"reaches its loss of {found['rival_loss']:.5f} in {found['seconds']:.2f} s of "
                    f"its {found['rival_seconds']:.1f} s: ratio {found['ratio']:.3f}, {verdict} "
                    f"the limit of {LIMIT} (over the time until it settled: "
                    f"{found['ratio_settled']:.3f})"
                )
            console.print(f"{label} against {rival}: {text}", highlight=False)


def plot(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Loss against seconds, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    panel = figure.subplots()
    for index, record in enumerate(records):
        points = [(p["seconds"], p["loss"]) for p in record["curve"] if p["loss"] is not None]
        points.append((record["seconds"], record["loss"]))
        panel.plot(*zip(*points, strict=True), ".-", color=f"C{index}", label=record["label"])
        if record["refitted"]:
            again = record["refitted"]
            panel.plot(again["seconds"], again["loss"], "*", color=f"C{index}", markersize=12)
    panel.set_title(title)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("seconds (stars: ADMM after a refit)")
    panel.set_ylabel("true loss, relative")
    panel.grid(which="both", alpha=0.25)
    panel.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
