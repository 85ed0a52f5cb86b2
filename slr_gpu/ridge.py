"""How strongly a layer is pulled to its original weight: decided on held-out rows.

In: a `ResponseProblem`. Out: the ridge rho, as a fraction of the mean diagonal of the Gram matrix,
with which closed forms have the least held-out error. With more rows than columns a few ridges
are tried on the chosen structure. With fewer, what the rows say about most directions is noise, and a
structure chosen with too weak a ridge is lost already: there the ridge is decided first, by low
rank alone, between weak ones and one so strong that only the original weight counts, its truncated
SVD with its own bias. A few hundred rows are cross-validated, so that all of them judge.
"""

from __future__ import annotations

from typing import Any

from .curves import Candidate, held_out_error
from .penalties import low_rank_projection
from .problem import ResponseProblem, project

Array = Any

# Ridges for a structure that is chosen already.
USUAL = (1e-4, 1e-3, 1e-2, 1e-1)
# Ridges between which fewer rows than columns decide, and by what the structure may still move it.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
NEAR = (0.1, 1.0, 10.0)
# Up to so many rows are cross-validated, in so many folds.
FEW, FOLDS = 512, 5


def has_few_rows(problem: ResponseProblem) -> bool:
    """Whether there are fewer rows than columns, some of them held out."""
    return 0 < problem.held.rows and problem.rows < problem.width


def strength(problem: ResponseProblem, k: int) -> float:
    """The ridge for few rows; infinite where the SVD of the weight alone does best.

    Parameters
    ----------
    problem : ResponseProblem
        In the layer's own coordinates.
    k : int
        Rank of the closed forms that are compared.
    """
    ops = problem.ops
    few = problem.rows <= FEW
    totals = dict.fromkeys((*STRENGTHS, float("inf")), 0.0)
    for fold in range(FOLDS if few else 1):
        view = problem.as_by_rows()
        if few:
            view = ResponseProblem(
                problem.layer_io,
                ops=ops,
                held_out=1 / FOLDS,
                activation=problem.activation,
                fold=fold,
                by_rows=True,
            )
            if not view.held.rows:  # fewer samples than folds
                continue
        energy = view.held_energy
        for ridge in STRENGTHS:
            metric = view.with_ridge(ridge).metric
            M = project(metric, metric.target(view), 0, k)[1]
            totals[ridge] += float(view.held_out_error(M, view.linear_bias(M))) * energy
        M = low_rank_projection(ops, view.W, k)[0]
        totals[float("inf")] += float(view.held_out_error(M, view.bias)) * energy
    return min(totals, key=totals.get)


def best_ridge(chosen: Candidate, ridges: tuple[float, ...]) -> Candidate:
    """The same candidate with the ridge whose closed form has the least held-out error."""
    best, least = chosen, float("inf")
    for ridge in ridges:
        view = Candidate(
            chosen.structure, chosen.error, chosen.problem.with_ridge(ridge), chosen.support
        )
        error = held_out_error(view)
        if error < least:
            best, least = view, error
    return best
