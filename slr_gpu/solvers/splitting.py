"""The parts of an `ADMM` iteration: its state, its steps, and its residuals.

In: an iterate. Out: the next A, B and M, and how far from optimal they are. With A + B = M the
constraint, D its dual variable and t the penalty parameter, an iterate is optimal for
min f(M, b) + g(A) + h(B) when

    A + B - M = 0,    grad f(M, b) = (D, 0),    -D in dg(A),    -D in dh(B).

What is missing in the first is the primal residual, in the other three the dual residual (Boyd,
Parikh, Chu, Peleato and Eckstein 2011, section 3.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ..decomposition import Structure
from ..metric import factor, solve_both
from ..penalties import ColumnSparse, LowRank
from ..problem import ResponseProblem

Array = Any


@dataclass(frozen=True, eq=False)
class Setting:
    """What does not change during a run.

    Attributes
    ----------
    sparse, low_rank : ColumnSparse, LowRank
    weights : (lambda1, lambda2), or None with hard budgets
    budgets : (s, k), or None with penalties
    allowed : bool array, (groups,)
        Groups that A may use.
    convex : bool
        Whether f is the surrogate l_c.
    lipschitz : float
        Bound on the curvature of f in M.
    scale : (float, float)
        Root mean square of the weight and of the dual variable: units of absolute tolerances.
    ceiling : float
        A loss above this counts as divergence.
    """

    sparse: ColumnSparse
    low_rank: LowRank
    weights: tuple[float, float] | None
    budgets: tuple[int, int] | None
    allowed: Array
    convex: bool
    lipschitz: float
    scale: tuple[float, float]
    ceiling: float


# What is read of an iterate, all at once.
READ = (
    "loss",
    "objective",
    "primal_residual",
    "dual_residual",
    "primal_tolerance",
    "dual_tolerance",
    "lyapunov",
    "t",
    "rank",
    "groups",
    "changed",
)


@dataclass(frozen=True, eq=False)
class ADMMState:
    """One iterate, evaluated: the sweep at (M, bias) is part of it, and MG = M G where M-steps
    are those of the majoriser.

    Its numbers (`READ`) are scalars on the device.
    """

    setting: Setting
    A: Array
    B: Array
    M: Array
    bias: Array
    dual: Array
    t: float | Array
    loss: float | Array = math.inf
    RtX: Array = None
    R_mean: Array = None
    MG: Array = None
    objective: float | Array = math.inf
    primal_residual: float | Array = math.inf
    dual_residual: float | Array = math.inf
    primal_tolerance: float | Array = 0.0
    dual_tolerance: float | Array = 0.0
    lyapunov: float | Array = math.inf
    rank: int | Array = 0
    groups: int | Array = 0
    changed: int | Array = 0
    factor: tuple[float | Array, Array] | None = None


def norm(ops: Any, *arrays: Array) -> Array:
    """Euclidean norm of several arrays taken as one vector; a scalar on the device."""
    return ops.xp.sqrt(sum(ops.xp.vdot(a, a) for a in arrays))


def measured(
    problem: ResponseProblem,
    old: ADMMState,
    new: ADMMState,
    *,
    proximal: bool,
    majorized: bool,
    relaxation: float,
    tolerance: float,
) -> ADMMState:
    """The new iterate with its objective, residuals and tolerances; proximal, its Lyapunov quantity.

    The loss of an iterate that is not `plausible` is infinite.

    The objective is f(M, b) + lambda1 ||A||_{2,1} + lambda2 ||B||_*, at iterates that meet the
    constraint only in the limit; f alone with hard budgets.
    """
    ops, setting, t = problem.ops, new.setting, new.t
    xp = ops.xp
    usable = plausible(ops, new.M) & plausible(ops, new.dual) & plausible(ops, new.RtX)
    loss = xp.where(usable & xp.isfinite(new.loss), new.loss, math.inf)
    total = new.A + new.B
    move_B, move_M = new.B - old.B, new.M - old.M
    gradient = -2 / problem.rows * new.RtX
    lyapunov = math.inf
    if proximal:
        move_A = new.A - old.A
        in_A, in_B = t * (move_M + move_A - move_B), t * (move_M + move_B - move_A)
        curvature = 2 * problem.activation.curvature
        if majorized:
            metric = curvature / problem.rows * xp.sum((new.MG - old.MG) * move_M)
        else:
            metric = setting.lipschitz * norm(ops, move_M) ** 2
        lyapunov = (
            t * norm(ops, move_A - move_B) ** 2
            + t * norm(ops, move_M) ** 2
            + metric
            + curvature * norm(ops, new.bias - old.bias + move_M @ problem.x_mean) ** 2
            + norm(ops, new.dual - old.dual) ** 2 / t
        )
    else:
        in_A, in_B = t * (move_M - move_B), t * move_M
        if relaxation != 1:
            extra = (1 - relaxation) * t * (total - old.M)
            in_A, in_B = in_A + extra, in_B + extra
    objective = loss
    if setting.weights is not None:
        # No factorisation is asked to work on what is not finite.
        B = xp.where(plausible(ops, new.B), new.B, 0)
        objective = objective + setting.weights[0] * setting.sparse.norms(ops, new.A).sum()
        objective = objective + setting.weights[1] * xp.linalg.svd(B, compute_uv=False).sum()
    size = 1e-3 * math.sqrt(total.size)
    length = xp.maximum(norm(ops, total), norm(ops, new.M))
    return replace(
        new,
        loss=loss,
        objective=objective,
        primal_residual=norm(ops, total - new.M),
        dual_residual=norm(ops, in_A, in_B, gradient - new.dual, 2 * new.R_mean),
        primal_tolerance=tolerance * (size * setting.scale[0] + length),
        dual_tolerance=tolerance * (size * setting.scale[1] + norm(ops, new.dual)),
        lyapunov=lyapunov,
    )


def plausible(ops: Any, array: Array) -> Array:
    """Whether squares of the entries can be worked with: neither NaN nor near overflow."""
    return ops.xp.max(ops.xp.abs(array)) < 1e100


def sparse_step(problem: ResponseProblem, setting: Setting, C: Array, tau: float | Array) -> Array:
    """A from what is left for it: group soft threshold at lambda1 / tau, or the s largest.

    NaN when C is not `plausible`, and so for B: no factorisation is asked to work on that.
    """
    ops, xp, sparse = problem.ops, problem.ops.xp, setting.sparse
    good = plausible(ops, C)
    C = xp.where(good, C, 0)
    if setting.budgets is not None:
        A = sparse.hard(ops, C, setting.budgets[0], setting.allowed)
    else:
        A = sparse.prox(ops, C, setting.weights[0] / tau)
        A = A * xp.repeat(setting.allowed, sparse.group_size)[None]
    return xp.where(good, A, math.nan)


def low_rank_step(
    problem: ResponseProblem, setting: Setting, C: Array, tau: float | Array
) -> tuple[Array, int | Array]:
    """B from what is left for it, and its rank: SVT at lambda2 / tau, or rank k."""
    ops, xp = problem.ops, problem.ops.xp
    good = plausible(ops, C)
    C = xp.where(good, C, 0)
    if setting.budgets is not None:
        rank = min(setting.budgets[1], *C.shape)
        B = setting.low_rank.hard(ops, C, rank)
    else:
        (B,), _, (rank,) = ops.svt(C[None], setting.weights[1] / tau)
    return xp.where(good, B, math.nan), rank


def weight_step(
    problem: ResponseProblem, state: ADMMState, goal: Array, *, majorize: bool, inner: int
) -> ADMMState:
    """``argmin f(M, b) + t/2 ||M - goal||^2``, approximately, from the state's (M, b).

    `inner` steps: of the majoriser, or of the accelerated gradient method (Beck and Teboulle
    2009) with steps 1 / (L + t) in M and 1 / 2c in the bias at the column means.
    """
    xp, t = problem.ops.xp, state.t
    c, P = problem.activation.curvature, problem.rows
    known = state.factor
    if majorize and (known is None or known[0] is not t):
        known = (t, factor(problem.ops, 2 * c / P * problem.G, t))
    # y is the extrapolated point, at which the sweep is known.
    M, beta = state.M, state.bias + state.M @ problem.x_mean
    y, y_beta, RtX, R_mean, loss = M, beta, state.RtX, state.R_mean, state.loss
    MG = state.MG
    theta = 1.0
    for remaining in range(inner - 1, -1, -1):
        if majorize:
            rhs = 2 * c / P * MG + 2 / P * RtX + t * goal
            # In the order of the other arrays: sums of arrays of two orders are slow.
            new_M = xp.ascontiguousarray(solve_both(problem.ops, known[1], rhs.T).T)
            # What was solved, 2c/P M G + t M = rhs, tells M G without the product.
            MG = P / (2 * c) * (rhs - t * new_M)
        else:
            L = state.setting.lipschitz
            new_M, MG = (L * y + 2 / P * RtX + t * goal) / (L + t), None
        new_beta = y_beta + R_mean / c
        momentum = 0.0
        if remaining and not majorize:
            following = (1 + math.sqrt(1 + 4 * theta * theta)) / 2
            momentum, theta = (theta - 1) / following, following
        y, y_beta = new_M + momentum * (new_M - M), new_beta + momentum * (new_beta - beta)
        M, beta = new_M, new_beta
        loss, RtX, R_mean = problem.sweep(
            y, y_beta - y @ problem.x_mean, convex=state.setting.convex
        )
    bias = beta - M @ problem.x_mean
    return replace(state, M=M, bias=bias, loss=loss, RtX=RtX, R_mean=R_mean, MG=MG, factor=known)


def allowed_groups(
    problem: ResponseProblem, structure: Structure | None, support: Array | None, size: int
) -> Array:
    """Mask over groups: those of `support`; the leading s in a basis with hard budgets; or all."""
    xp = problem.ops.xp
    groups = problem.width // size
    if structure is not None and problem.basis is not None:
        return xp.arange(groups) < structure.s
    if support is None:
        return xp.ones(groups, dtype=bool)
    mask = xp.zeros(problem.width, dtype=bool)
    mask[xp.asarray(support, dtype=xp.int64)] = True
    return mask.reshape(groups, size).all(axis=1)


def largest_eigenvalue(ops: Any, G: Array, *, rounds: int = 100) -> float:
    """Bound on the largest eigenvalue of a positive semidefinite G, by power iteration.

    The iteration approaches from below, so its end is raised by a twentieth, and never above the
    trace, which is a bound by itself.
    """
    xp = ops.xp
    trace = float(xp.trace(G))
    # Start from the heaviest column, which is seldom orthogonal to the leading eigenvector.
    v = G[:, int(xp.argmax(xp.diagonal(G)))]
    value = 0.0
    for _ in range(rounds):
        length = math.sqrt(float(v @ v))
        if not length > 0:
            break
        v = G @ (v / length)
        previous, value = value, math.sqrt(float(v @ v))
        if abs(value - previous) <= 1e-4 * value:
            break
    return min(1.05 * value, trace) if value > 0 else trace


def found_structure(
    problem: ResponseProblem, state: ADMMState, structure: Structure | None
) -> tuple[Structure, Array]:
    """The structure of an iterate and the groups that its A keeps.

    With hard budgets the structure is the one asked for; in a basis A reads all its channels.
    """
    xp, sparse = problem.ops.xp, state.setting.sparse
    groups = sparse.norms(problem.ops, state.A) > 0
    if structure is not None:
        return structure, state.setting.allowed if structure.form == "rotated" else groups
    rest = state.B[:, ~xp.repeat(groups, sparse.group_size)]
    rank = 0
    if rest.size and int(state.rank):
        sigma = xp.linalg.svd(rest, compute_uv=False)
        rank = min(int((sigma > 1e-9 * norm(problem.ops, state.B)).sum()), int(state.rank))
    form, r = "columns" if sparse.group_size == 1 else "channels", None
    if problem.basis is not None:
        form, r = "rotated", len(problem.basis)
    return Structure(form, int(groups.sum()), rank, r), groups
