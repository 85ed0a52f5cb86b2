"""Majorise and project: hard budgets, monotone, one cached factorisation (DESIGN 3.3).

In: a `ResponseProblem`, a `Structure` and (for the forms without a basis) a support. Out: a
`Decomposition`. The masked residual R of the current iterate gives a quadratic with the fixed
metric G that lies above the loss and touches it at M_k; its unrestricted minimiser is

    T = M_k + (1/c) (Rᵀ Xc + min(1, c) rho (W - M_k)) G⁻¹ ,

with c the activation's curvature bound, and the next iterate is the projection of T onto
{A on S} + {rank k} in the metric G: with F = T L, keep F on S and replace the rest by its best
rank-k approximation. So f(M) + (rho/P) ||M - W||^2 never increases where c is a bound and no target
is out of the activation's range; elsewhere only steps that do not increase it are taken.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from ..decomposition import Decomposition, Status, Structure
from ..metric import Metric, RowMetric
from ..penalties import low_rank_projection
from ..problem import ResponseProblem, ordered_metric
from .base import Solver, check_counts, check_tolerance

Array = Any

# Factor by which a majoriser is flattened after a step that lowered the objective.
FLATTER = 0.7
# Relative fall of the held-out error that counts as progress.
HELD_OUT_GAIN = 2e-3


@dataclass
class MajorizeState:
    """One iterate: its point F of the metric, the weight M, its bias, U, and the sweep there.

    `correlation` and `R_mean` are what `Metric.sweep` returned at (M, bias). `objective` and
    `held_out_error` are scalars on the device until they have been read.
    """

    metric: Metric | RowMetric
    kept: int
    F: Array
    M: Array
    bias: Array
    U: Array
    curvature: float
    flattest: float = 0.0
    momentum: tuple[Array, Array] | None = None  # last change of F and of the centred bias
    age: int = 0  # steps since the momentum was dropped
    objective: float | Array = float("inf")
    held_out_error: float | Array = float("nan")
    correlation: Array = None
    R_mean: Array = None

    def give_up(self, bound: float) -> None:
        """After an attempt from here that failed: drop the momentum, or else be steeper."""
        if self.momentum is not None:
            self.momentum, self.age = None, 0
            return
        # A flat majoriser that failed once is not tried again.
        self.flattest = min(self.curvature / FLATTER**2, bound)
        self.curvature = bound if self.curvature < bound else 2 * self.curvature


@dataclass(frozen=True)
class Majorize(Solver):
    """Settings of the solver.

    Attributes
    ----------
    iterations : int
        At most this many; 0 gives the closed-form minimiser of the linear problem.
    convex : bool
        Descend the convex surrogate l_c, which measures better, instead of the true loss.
    tolerance : float
        Stop when an iteration lowers the objective by less than this fraction.
    patience : int
        Stop after this many iterations in which the held-out error did not fall by more than
        0.2 %; the best iterate is kept.
    """

    iterations: int = 20
    convex: bool = True
    tolerance: float = 1e-3
    patience: int = 2
    name: ClassVar[str] = "majorize"
    yields: ClassVar[bool] = True
    forms: ClassVar[tuple[str, ...]] = ("columns", "channels", "rotated", "spatial")

    def __post_init__(self) -> None:
        check_counts(self, iterations=0, patience=1)
        check_tolerance(self)

    def start(
        self, problem: ResponseProblem, structure: Structure, support: Array | None = None
    ) -> MajorizeState:
        """Closed-form minimiser of the linear problem on the given support."""
        metric, kept = ordered_metric(problem, structure, support)
        return closed_form(problem, metric, kept, structure.k)

    def evaluate(self, problem: ResponseProblem, state: MajorizeState) -> None:
        """Fill in the objective, the masked residual and the held-out error at (M, bias)."""
        convex = self.convex and problem.activation.has_convex_surrogate
        loss, state.correlation, state.R_mean = state.metric.sweep(
            problem, state.F, state.M, state.bias, problem.masked(convex)
        )
        pull = problem.ops.xp.sum((state.M - problem.W) ** 2, dtype="float64")
        state.objective = loss + problem.rho / problem.rows * pull
        state.held_out_error = problem.held_out_error(state.M, state.bias)

    def attempt(
        self, problem: ResponseProblem, state: MajorizeState, structure: Structure
    ) -> MajorizeState:
        """One majorisation with the state's curvature and momentum; nothing is read.

        The momentum is Nesterov's share age / (age + 3) of the last change.
        """
        curvature = state.curvature
        centred = state.bias + problem.at_mean(state.M)
        # The pull has a curvature of its own, 1: below that it would overshoot where no data is.
        pull = min(1.0, problem.activation.curvature)
        step = pull * state.metric.step(problem, state.F, state.M, state.correlation / pull)
        F, new_centred = state.F + step / curvature, centred + state.R_mean / curvature
        if state.momentum is not None:
            share = state.age / (state.age + 3)
            F = F + share * state.momentum[0]
            new_centred = new_centred + share * state.momentum[1]
        new = MajorizeState(state.metric, state.kept, None, None, None, None, curvature)
        place(new, F, structure.k)
        new.bias = new_centred - problem.at_mean(new.M)
        new.momentum, new.age = (new.F - state.F, new_centred - centred), state.age + 1
        new.flattest = state.flattest
        new.curvature = max(curvature * FLATTER, new.flattest)
        self.evaluate(problem, new)
        return new

    def steps(
        self, problem: ResponseProblem, state: MajorizeState, structure: Structure, count: int = 1
    ) -> list[MajorizeState]:
        """At most `count` iterations that lower the objective, and at least one.

        Where few responses are active the loss is much flatter than its majoriser, so flatter
        ones are tried, with momentum, while the objective keeps falling. All `count` attempts are
        queued before their objectives are read, at once; from the first that failed on they are
        void, and the momentum, then the flatness is given up. At the activation's own curvature
        and without momentum an attempt counts as it is (for proven bounds), or the curvature rises
        until the objective falls; if it never does, the old state is returned.

        Parameters
        ----------
        state : MajorizeState
            Evaluated.
        """
        bound = problem.activation.curvature
        read(problem, [state])
        while state.curvature <= 256 * bound:
            queued = [state]
            for _ in range(count):
                queued.append(self.attempt(problem, queued[-1], structure))
            read(problem, queued[1:])
            good = 0
            for old, new in pairwise(queued):
                at_bound = old.curvature == bound and old.momentum is None
                proven = problem.proven and at_bound
                if not (proven or new.objective <= old.objective):
                    break
                good += 1
            if good < count:
                queued[good].give_up(bound)
            if good:
                return queued[1 : good + 1]
        return [state]

    def solve(
        self,
        problem: ResponseProblem,
        structure: Structure,
        support: Array | None = None,
        start: MajorizeState | None = None,
    ) -> Decomposition:
        """Run to convergence, the held-out stop or the iteration limit.

        Parameters
        ----------
        problem : ResponseProblem
            In the coordinates of the basis when the form is rotated.
        structure : Structure
        support : int array, optional
            Kept columns, for the forms without a basis.
        start : MajorizeState, optional
            Where to begin; by default `start`.
        """
        began = time.perf_counter()
        state = self.start(problem, structure, support) if start is None else start
        first = best = state
        history, status, since = [], Status.CLOSED_FORM, 0
        if self.iterations and not (problem.activation.is_identity and start is None):
            self.evaluate(problem, state)
            read(problem, [state])
            status = Status.ITERATION_LIMIT
        while status is Status.ITERATION_LIMIT and len(history) < self.iterations:
            count = min(problem.ops.ahead, self.iterations - len(history))
            for new in self.steps(problem, state, structure, count):
                previous, state, error = state, new, new.held_out_error
                history.append(
                    {
                        "iteration": len(history) + 1,
                        "objective": state.objective,
                        "held_out_error": error,
                        "rank": state.U.shape[1],
                        "groups": structure.s,
                        "seconds": time.perf_counter() - began,
                    }
                )
                # Comparisons with NaN are false: without held-out rows the last iterate is kept.
                since = since + 1 if error >= best.held_out_error * (1 - HELD_OUT_GAIN) else 0
                if not error >= best.held_out_error:
                    best = state
                if previous.objective - state.objective <= self.tolerance * previous.objective:
                    status = Status.CONVERGED
                elif since >= self.patience:
                    status = Status.HELD_OUT_STOP
                if status is not Status.ITERATION_LIMIT:
                    break
        result = assemble(problem, structure, best, status, history)
        if history and not problem.activation.exact:
            note = looked_through(problem, first, best)
            result = result.replace(notes=(*result.notes, note))
        return result


def looked_through(problem: ResponseProblem, first: MajorizeState, best: MajorizeState) -> str:
    """What an activation without proven descent did to the error of the linear fit."""
    name = problem.activation.name
    if best is first:
        return f"linear fit: looking through {name} did not help"
    if not problem.held.rows:
        return f"fitted through {name}"
    errors = f"{best.held_out_error:.4g} instead of {first.held_out_error:.4g}"
    return f"fitted through {name}: held-out error {errors} of the linear fit"


def read(problem: ResponseProblem, states: list[MajorizeState]) -> None:
    """Bring objectives and held-out errors to the host, all at once."""
    values = problem.ops.read([v for s in states for v in (s.objective, s.held_out_error)])
    for state, objective, error in zip(states, values[::2], values[1::2], strict=True):
        state.objective, state.held_out_error = objective, error


def place(state: MajorizeState, F: Array, k: int) -> None:
    """Put a state at the projection of F."""
    state.F, state.M, state.U = state.metric.project(F, state.kept, k)


def closed_form(
    problem: ResponseProblem, metric: Metric | RowMetric, kept: int, k: int
) -> MajorizeState:
    """Minimiser of the linear problem over A on the metric's first columns plus rank k."""
    state = MajorizeState(metric, kept, None, None, None, None, problem.activation.curvature)
    place(state, metric.target(problem), k)
    state.bias = problem.linear_bias(state.M)
    return state


def state_of(
    problem: ResponseProblem,
    metric: Metric | RowMetric,
    kept: int,
    k: int,
    M: Array,
    bias: Array,
) -> MajorizeState:
    """The state of a given weight: as it is on S, its nearest rank-k part on the complement.

    Nearest in the Frobenius norm, so a weight that already is of rank k there is not changed.
    """
    xp = problem.ops.xp
    order = xp.arange(problem.width) if metric.order is None else metric.order
    low_rank, U = low_rank_projection(problem.ops, M[:, order[kept:]], k)
    ordered = xp.concatenate([M[:, order[:kept]], low_rank], axis=1)
    result = xp.empty_like(M)
    result[:, order] = ordered
    curvature = problem.activation.curvature
    return MajorizeState(metric, kept, metric.point(result), result, bias, U, curvature)


def assemble(
    problem: ResponseProblem,
    structure: Structure,
    state: MajorizeState,
    status: Status,
    history: list[dict[str, Any]],
) -> Decomposition:
    """The `Decomposition` of a state, on the host, in the dtype of the data."""
    ops, layer_io = problem.ops, problem.layer_io
    dtype = layer_io.dtype
    order = state.metric.order
    if order is None:
        order = ops.xp.arange(problem.width)
    columns, complement = order[: state.kept], order[state.kept :]
    host = {
        "columns": columns,
        "A": state.M[:, columns].astype(dtype),
        "U": state.U.astype(dtype),
        "V": (state.U.T @ state.M[:, complement]).astype(dtype),
        "bias": state.bias.astype(dtype),
        "basis": None if problem.basis is None else problem.basis.astype(dtype),
    }
    return Decomposition(
        structure.form,
        **{name: None if a is None else ops.to_numpy(a) for name, a in host.items()},
        channels=layer_io.channels,
        kernel_size=layer_io.kernel_size,
        activation=problem.activation.name,
        error=problem.relative_error(state.M, state.bias),
        held_out_error=float(problem.held_out_error(state.M, state.bias)),
        status=status,
        history=history,
        notes=problem.notes,
    )
