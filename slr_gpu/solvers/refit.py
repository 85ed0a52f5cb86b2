"""From the weight that a solver found to the `Decomposition` that is kept.

In: a weight M (n, m), a support S and a rank. Out: a `Decomposition` with M taken whole on S and
U V on the complement alone (DESIGN 2, consequence 1), by default after minimising the objective
over that structure. Shrinkage biases what survives a soft threshold; the refit removes the bias.
"""

from __future__ import annotations

from typing import Any

from ..decomposition import Decomposition, Status, Structure
from ..problem import ResponseProblem, metric_of
from .majorize import Majorize, assemble, closed_form, state_of

Array = Any


def decompose(
    problem: ResponseProblem,
    structure: Structure,
    groups: Array,
    M: Array,
    bias: Array,
    status: Status,
    history: list[dict[str, Any]],
    *,
    convex: bool,
    refit: bool,
) -> Decomposition:
    """Build the decomposition of a weight, and refit it where that helps.

    The refit is `Majorize` from the better of M and the closed form on the same support. It
    descends the objective of the run and is dropped where the true loss on the fitted rows comes
    out higher than before it.

    Parameters
    ----------
    problem : ResponseProblem
    structure : Structure
    groups : bool array
        Groups of columns (columns, channels, rotated channels) that A keeps.
    M, bias : array, (n, m), (n,)
        Outside S, the nearest weight of rank k replaces M.
    status, history
        Of the run that found M.
    convex : bool
        Whether the objective is the surrogate l_c.
    refit : bool
    """
    ops, xp = problem.ops, problem.ops.xp
    columns = xp.flatnonzero(xp.repeat(groups, problem.width // len(groups)))
    metric, kept = metric_of(problem, columns)
    state = state_of(problem, metric, kept, structure.k, M, bias)
    for _ in range(3):
        R_mean = problem.sweep(state.M, state.bias, convex=convex)[2]
        state.bias = state.bias + R_mean / problem.activation.curvature
    result = assemble(problem, structure, state, status, history)
    if refit:
        closed = closed_form(problem, metric, kept, structure.k)
        start = min((state, closed), key=lambda s: problem.objective(s.M, s.bias, convex=convex))
        refitted = Majorize(convex=convex).solve(problem, structure, start=start)
        history = history + [entry | {"phase": "refit"} for entry in refitted.history]
        note = f"error {result.error:.4g} before the refit, {refitted.error:.4g} after"
        if refitted.error <= result.error:
            result = refitted.replace(status=status)
        else:
            note += " (not used)"
        result = result.replace(history=history, notes=(*problem.notes, note))
    if status is Status.DIVERGED:
        note = "the iteration diverged; built from its last usable iterate"
        result = result.replace(notes=(*result.notes, note))
    if problem.basis is not None:
        # The rows of a basis may be ordered freely: put the channels that A reads first.
        order = ops.to_numpy(xp.concatenate([xp.flatnonzero(groups), xp.flatnonzero(~groups)]))
        first = ops.to_numpy(xp.arange(len(columns)))
        result = result.replace(columns=first, basis=result.basis[order])
    return result
