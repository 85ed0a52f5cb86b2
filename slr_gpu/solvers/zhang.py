"""Low rank through the activation by splitting (Zhang, Zou, He and Sun 2015).

In: a `ResponseProblem` and a rank k. Out: a `Decomposition` with A empty. Responses before the
activation become variables z of their own, tied to the layer's by a penalty that grows
(arXiv 1505.06798, section 3.2):

    minimise  sum ||y - r(z)||^2 + lambda ||z - M x - b||^2   over z, b and M of rank k.

Alternate: every z has a closed form; M is the reduced-rank regression of z on x, here with the
ridge of the problem, in the metric of its inputs where the paper takes a GSVD. With
R = z - M_k x - b_k its unrestricted solution is ``T = M_k + (Rᵀ Xc + rho (W - M_k)) G⁻¹``, and M
the projection of T onto rank k. Inputs from a compressed prefix make it their asymmetric problem
(section 3.3), the spatial form their 3-d decomposition (section 3.5). As published, the last
iterate is returned.
"""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from ..activations import Activation
from ..curves import Candidate, candidates
from ..decomposition import Decomposition, Status, Structure
from ..errors import BudgetError, InputError, complain
from ..layer_budget import LayerBudget, named_keep
from ..metric import Metric, RowMetric
from ..ops import NumpyOps
from ..problem import ResponseProblem, ordered_metric
from .base import Solver, check_tolerance
from .majorize import MajorizeState, assemble, closed_form

Array = Any

# Safeguarded Gauss-Newton steps of the z-step where it has no closed form.
SMOOTH_STEPS = 6


@dataclass
class ZhangState:
    """One iterate: its point F of the metric, M, bias, U, and what `Zhang.evaluate` found there.

    `correlation` and `R_mean` are those of `Metric.sweep` for R = z - M x - b, `objective` and
    `held_out_error` scalars on the device until they have been read.
    """

    metric: Metric | RowMetric
    F: Array
    M: Array
    bias: Array
    U: Array
    correlation: Array = None
    R_mean: Array = None
    objective: float | Array = float("inf")
    held_out_error: float | Array = float("nan")


@dataclass(frozen=True)
class Zhang(Solver):
    """Settings of the solver.

    Attributes
    ----------
    penalties : tuple of float
        lambda, phase by phase.
    iterations : tuple of int
        At most so many in each phase.
    tolerance : float
        A phase ends when an iteration changes M by less than this fraction.
    """

    penalties: tuple[float, ...] = (0.01, 1.0)
    iterations: tuple[int, ...] = (25, 25)
    tolerance: float = 1e-4
    name: ClassVar[str] = "zhang"
    forms: ClassVar[tuple[str, ...]] = ("columns", "spatial")
    takes_structures: ClassVar[bool] = False

    def __post_init__(self) -> None:
        good = all(0 < p < math.inf for p in self.penalties) and all(
            isinstance(count, numbers.Integral) and count >= 0 for count in self.iterations
        )
        if len(self.penalties) != len(self.iterations) or not good:
            raise InputError(
                complain(
                    f"penalties={self.penalties}, iterations={self.iterations}",
                    "as many numbers of iterations as finite penalties > 0",
                    "penalties=(0.01, 1.0), iterations=(25, 25) is the paper's.",
                )
            )
        check_tolerance(self)

    def candidates(
        self, problem: ResponseProblem, budget: LayerBudget, form: str
    ) -> list[Candidate]:
        """The largest rank that fits; for the spatial form the best (r, k)."""
        form = "columns" if form == "auto" else form
        if form == "columns" and budget.largest_rank(form, 0) < 1:
            n, m = problem.n, problem.width
            raise BudgetError(
                complain(
                    f"a budget of {budget.weights:.0f} weights for low rank alone",
                    f"keep of at least {named_keep((n + m) / (n * m))}",
                    "Raise keep, or leave the layer out.",
                )
            )
        return candidates(problem, budget, form=form, shares=(0.0,))

    def start(
        self, problem: ResponseProblem, structure: Structure, support: Array | None = None
    ) -> ZhangState:
        """Closed-form minimiser of the linear problem."""
        if structure.s:
            raise InputError(
                complain(f"{structure} for zhang", "s = 0", "It fits low rank alone; use Majorize.")
            )
        support = problem.ops.xp.arange(0) if support is None else support
        metric, _ = ordered_metric(problem, structure, support)
        first = closed_form(problem, metric, 0, structure.k)
        return ZhangState(metric, first.F, first.M, first.bias, first.U)

    def evaluate(self, problem: ResponseProblem, state: ZhangState, penalty: float) -> None:
        """The z-step at (M, bias), in one pass: fill in R's sums, the objective, the error."""
        ops, xp, activation = problem.ops, problem.ops.xp, problem.activation

        def residual(Z, Y, b):
            before = Z + b
            error = xp.square(Y - activation.value(ops, before)).sum(dtype="float64")
            return z_step(ops, activation, before, Y, penalty) - before, error

        loss, state.correlation, state.R_mean = state.metric.sweep(
            problem, state.F, state.M, state.bias, residual
        )
        pull = xp.sum(xp.square(state.M - problem.W), dtype="float64")
        state.objective = loss + problem.rho / problem.rows * pull
        state.held_out_error = problem.held_out_error(state.M, state.bias)

    def step(self, problem: ResponseProblem, state: ZhangState, structure: Structure) -> ZhangState:
        """Reduced-rank regression on the z of an evaluated state."""
        moved = state.F + state.metric.step(problem, state.F, state.M, state.correlation)
        F, M, U = state.metric.project(moved, 0, structure.k)
        bias = state.bias + state.R_mean - problem.at_mean(M - state.M)
        return ZhangState(state.metric, F, M, bias, U)

    def phase(
        self,
        problem: ResponseProblem,
        state: ZhangState,
        structure: Structure,
        penalty: float,
        count: int,
    ) -> Iterator[tuple[ZhangState, float]]:
        """The iterates at one penalty, and how much M changed, relative to it.

        Their numbers are read several iterations at a time.
        """
        ops, xp = problem.ops, problem.ops.xp
        norm = xp.linalg.norm
        self.evaluate(problem, state, penalty)
        for done in range(0, count, ops.ahead):
            queued = [state]
            for _ in range(min(ops.ahead, count - done)):
                queued.append(self.step(problem, queued[-1], structure))
                self.evaluate(problem, queued[-1], penalty)
            values = [
                value
                for old, new in pairwise(queued)
                for value in (
                    new.objective,
                    new.held_out_error,
                    norm(new.M - old.M) / xp.maximum(norm(new.M), 1e-300),
                )
            ]
            values = ops.read(values)
            for number, new in enumerate(queued[1:]):
                new.objective, new.held_out_error, moved = values[3 * number : 3 * number + 3]
                yield new, moved
            state = queued[-1]

    def solve(
        self,
        problem: ResponseProblem,
        structure: Structure,
        support: Array | None = None,
    ) -> Decomposition:
        """Run all phases.

        Parameters
        ----------
        problem : ResponseProblem
            In the coordinates of the basis for the spatial form.
        structure : Structure
            With s = 0.
        support : int array, optional
            Empty.

        Returns
        -------
        Decomposition
            ``CONVERGED`` when the last phase ended by the tolerance. Objectives in `history` are
            the true loss plus the ridge, per sample.
        """
        began = time.perf_counter()
        state, history, status = self.start(problem, structure, support), [], Status.CLOSED_FORM
        phases = [] if problem.activation.is_identity else zip(self.penalties, self.iterations)
        for penalty, count in phases:
            if not count:
                continue
            status = Status.ITERATION_LIMIT
            for new, moved in self.phase(problem, state, structure, penalty, count):
                state = new
                history.append(
                    {
                        "iteration": len(history) + 1,
                        "objective": state.objective,
                        "held_out_error": state.held_out_error,
                        "rank": state.U.shape[1],
                        "groups": 0,
                        "seconds": time.perf_counter() - began,
                        "lambda": penalty,
                    }
                )
                if moved <= self.tolerance:
                    status = Status.CONVERGED
                    break
        carrier = MajorizeState(state.metric, 0, state.F, state.M, state.bias, state.U, 1.0)
        result = assemble(problem, structure, carrier, status, history)
        if history and not problem.activation.pieces:
            note = f"z-step for {problem.activation.name}: {SMOOTH_STEPS} Gauss-Newton steps"
            result = result.replace(notes=(*result.notes, note))
        return result


def z_step(ops: NumpyOps, activation: Activation, before: Array, Y: Array, penalty: float) -> Array:
    """``argmin_z (y - r(z))^2 + lambda (z - zhat)^2``, elementwise.

    On a piece where r(z) = a z + d the minimiser is ``(a (y - d) + lambda zhat) / (a^2 + lambda)``,
    clipped to the piece; the best piece wins. For ReLU these are ``min(0, zhat)`` and
    ``max(0, (lambda zhat + y) / (lambda + 1))``, the paper's z_0 and z_1. Smooth ones have no
    closed form: Gauss-Newton steps that never raise an element's objective.

    Parameters
    ----------
    before : array, (P, n)
        zhat, responses of the layer before the activation.
    Y : array, (P, n)
    penalty : float
        lambda > 0.
    """
    xp = ops.xp
    if not activation.pieces:
        return _descend(ops, activation, before, Y, penalty)
    best = best_cost = None
    for low, high, slope, offset in activation.pieces:
        z = (slope * (Y - offset) + penalty * before) / (slope**2 + penalty)
        z = xp.clip(z, low, high)
        cost = xp.square(Y - (slope * z + offset)) + penalty * xp.square(z - before)
        if best is None:
            best, best_cost = z, cost
        else:
            best = xp.where(cost < best_cost, z, best)
            best_cost = xp.minimum(cost, best_cost)
    return best


def _descend(
    ops: NumpyOps, activation: Activation, before: Array, Y: Array, penalty: float
) -> Array:
    """Safeguarded Gauss-Newton; a step that would raise an element's objective is cut instead.

    From the best of zhat, 0 and y: where zhat is in a flat tail no slope leads out of it.
    """
    xp = ops.xp
    z, error = before, Y - activation.value(ops, before)
    cost, length = xp.square(error), xp.ones_like(before)
    for other in (xp.zeros_like(before), Y):
        other_error = Y - activation.value(ops, other)
        other_cost = xp.square(other_error) + penalty * xp.square(other - before)
        better = other_cost < cost
        z, error = xp.where(better, other, z), xp.where(better, other_error, error)
        cost = xp.where(better, other_cost, cost)
    for _ in range(SMOOTH_STEPS):
        slope = activation.slope(ops, z)
        step = (slope * error + penalty * (before - z)) / (xp.square(slope) + penalty)
        trial = z + length * step
        trial_error = Y - activation.value(ops, trial)
        trial_cost = xp.square(trial_error) + penalty * xp.square(trial - before)
        better = trial_cost <= cost
        z, error = xp.where(better, trial, z), xp.where(better, trial_error, error)
        cost = xp.where(better, trial_cost, cost)
        length = xp.where(better, xp.minimum(2 * length, 1), length / 4)
    return z
