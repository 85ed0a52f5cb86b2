"""How strongly a layer is pulled to its original weight: decided on held-out rows.

In: a `ResponseProblem`. Out: the ridge rho, as a fraction of the mean diagonal of the Gram matrix,
with which closed forms have the least held-out error. With more rows than columns a few ridges
are tried on the chosen structure. With fewer, what the rows say about most directions is noise, and
a structure chosen with too weak a ridge is lost already: there the ridge is decided first, by low
rank alone, between weak ones and one so strong that only the original weight counts, its truncated
SVD with its own bias. A few hundred rows are cross-validated, so that all of them judge.
"""

from __future__ import annotations

import math
from typing import Any

import numpy

from .curves import Candidate, held_out_error
from .penalties import low_rank_projection
from .problem import ResponseProblem

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
    """The ridge for few rows; infinite where the SVD of the weight alone does as well.

    As well: the best finite ridge must be better on average over the folds by more than the
    standard error of that average.

    Parameters
    ----------
    problem : ResponseProblem
        In the layer's own coordinates.
    k : int
        Rank of the closed forms that are compared.
    """
    views = [problem.as_by_rows()]
    if problem.rows <= FEW:
        settings = {"held_out": 1 / FOLDS, "activation": problem.activation, "by_rows": True}
        folds = (
            ResponseProblem(problem.layer_io, ops=problem.ops, fold=fold, **settings)
            for fold in range(FOLDS)
        )
        views = [view for view in folds if view.held.rows]
    finite = numpy.array([[_low_rank_loss(view, k, r) for r in STRENGTHS] for view in views])
    best = int(finite.sum(axis=0).argmin())
    gained = numpy.array([_weight_svd_loss(view, k) for view in views]) - finite[:, best]
    doubt = gained.std(ddof=1) * len(gained) ** 0.5 if len(gained) > 1 else 0.0
    return STRENGTHS[best] if gained.sum() > doubt else math.inf


def _low_rank_loss(problem: ResponseProblem, k: int, ridge: float) -> float:
    """Squared held-out error of the closed form of low rank alone."""
    problem = problem.with_ridge(ridge)
    metric = problem.metric
    M = metric.project(metric.target(problem), 0, k, vectors=False)[1]
    return float(problem.held_out_error(M)) * problem.held_energy


def _weight_svd_loss(problem: ResponseProblem, k: int) -> float:
    """Squared held-out error of the truncated SVD of the weight."""
    M = low_rank_projection(problem.ops, problem.W, k)[0]
    return float(problem.held_out_error(M, problem.bias)) * problem.held_energy


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
