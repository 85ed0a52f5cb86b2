"""The moves of greedy bilateral smoothing: entries and low rank against one quadratic.

In: a `ResponseProblem` and a target T with ``rhs = T G``. Out: a `BilateralState`, S + U V with
few entries in S, brought nearer to the minimum of ``||T - S - U V||_G^2`` by

    place_low_rank    V = Uᵀ (T - S), best for the columns of an orthonormal U
    grow              U with more columns, along the leading directions of what is left
    threshold         S = the entries of T - U V that matter most
    refine            S = least squares on the entries it has
    exchange          S with the entries swapped that cost least for those that gain most
    smooth            all of it under a penalty that grows from weak to strong

each of which, but the last, never increases it. Nothing is decomposed but by QR and Cholesky.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy

from ..decomposition import Structure
from ..metric import factor, solve_both
from ..problem import TINY, ResponseProblem

Array = Any

# Penalty of the smoothed iterations, first and last, relative to the diagonal of G.
FIRST, LAST = 0.005, 4.0
# Share of a residual below which the rank does not grow.
NOTHING = 1e-10


@dataclass
class BilateralState:
    """One iterate, and the target of the least-squares problem that it is to solve.

    Attributes
    ----------
    T, rhs : array, (n, m)
        Target and ``T G``.
    stiffness : array, (m,)
        What an entry's square costs, see `stiffness`.
    S, SG : array, (n, m)
        Sparse part and its product with G.
    mask : bool array, (n, m)
        Where S may differ from zero.
    U, V : array, (n, k), (k, m)
    residual : array, (n, m)
        ``(T - S - U V) G``.
    error : float
        ``||T - S - U V||_G^2``.
    exchanged : int
        Entries that were last exchanged with success.
    growing : bool
        Whether the last attempt to raise the rank found something left.
    bias : array, (n,)
    curvature, flattest, objective, RtX, R_mean
        Of the activation's majoriser and of the sweep at (M, bias), as in `MajorizeState`.
    """

    T: Array
    rhs: Array
    stiffness: Array
    S: Array
    SG: Array
    mask: Array
    U: Array
    V: Array
    residual: Array
    error: float
    exchanged: int
    growing: bool = True
    bias: Array = None
    curvature: float = 1.0
    flattest: float = 0.0
    objective: float = float("inf")
    RtX: Array = None
    R_mean: Array = None

    @property
    def M(self) -> Array:
        return self.S + self.U @ self.V


def empty_state(
    problem: ResponseProblem, structure: Structure, stiff: Array | None = None
) -> BilateralState:
    """S and U V zero, the target that of the linear problem; `stiff` if it is known."""
    xp, n, m = problem.ops.xp, problem.n, problem.width
    T, rhs = problem.target, problem.start_rhs
    zeros = xp.zeros((n, m))
    return BilateralState(
        T=T,
        rhs=rhs,
        stiffness=stiffness(problem) if stiff is None else stiff,
        S=zeros,
        SG=zeros,
        mask=zeros.astype(bool),
        U=xp.zeros((n, 0)),
        V=xp.zeros((0, m)),
        residual=rhs,
        error=float(xp.sum(T * rhs)),
        exchanged=max(structure.s // 50, 1),
        bias=problem.z_mean,
        curvature=problem.activation.curvature,
    )


def stiffness(problem: ResponseProblem) -> Array:
    """What an entry's square costs, by column (m,): between two bounds.

    Alone, an entry costs ``G_jj`` times its square; where all other entries of its row make up for
    it, ``1 / (G^-1)_jj``, the saliency of optimal brain surgery. Only some of them can: this is
    the geometric mean.
    """
    xp = problem.ops.xp
    inverse = problem.ops.triangular_inverse(problem.metric.L)
    return xp.sqrt(xp.diagonal(problem.G) / xp.einsum("ij,ij->j", inverse, inverse))


# -- the low-rank part ---------------------------------------------------------------------------


def grow(ops: Any, U: Array, covariance: Array, count: int, seed: int) -> Array:
    """Orthonormal columns U (n, k) and `count` more, along what is largest outside them.

    Parameters
    ----------
    U : array, (n, k)
    covariance : array, (n, n)
        ``E Eᵀ`` of the matrix that ``U Uᵀ E`` approximates.
    count : int
    seed : int
        Of the sketch that a few products turn towards the leading directions (Zhou and Tao 2013).

    Returns
    -------
    array, (n, k + count)
        U itself when nothing is left.
    """
    xp = ops.xp
    left = covariance - U @ (U.T @ covariance)
    if count < 1 or not float(xp.trace(left)) > NOTHING * float(xp.trace(covariance)):
        return U
    # Drawn on the host: the same on every device.
    normal = numpy.random.RandomState(seed).standard_normal((len(U), count))
    sketch = ops.asarray(normal, xp.float64)
    for _ in range(3):
        sketch = xp.linalg.qr(left @ sketch)[0]
    return xp.linalg.qr(xp.concatenate([U, sketch], axis=1))[0]


def place_low_rank(problem: ResponseProblem, state: BilateralState, U: Array) -> None:
    """The best V for the orthonormal columns of U."""
    xp = problem.ops.xp
    rest, rest_G = state.T - state.S, state.rhs - state.SG
    state.U, state.V = U, U.T @ rest
    state.residual = rest_G - U @ (U.T @ rest_G)
    state.error = float(xp.sum(rest * state.residual))


def alternate(problem: ResponseProblem, state: BilateralState) -> None:
    """The best U for V, then the best V for U."""
    if state.U.shape[1]:
        product = (state.rhs - state.SG) @ state.V.T
        place_low_rank(problem, state, problem.ops.xp.linalg.qr(product)[0])


# -- the sparse part -----------------------------------------------------------------------------


def place_sparse(problem: ResponseProblem, state: BilateralState, S: Array) -> None:
    """Another S at the same U V."""
    xp = problem.ops.xp
    state.S, state.SG = S, S @ problem.G
    state.residual = state.rhs - state.SG - state.U @ (state.V @ problem.G)
    state.error = float(xp.sum((state.T - state.M) * state.residual))


def threshold(problem: ResponseProblem, state: BilateralState, s: int) -> None:
    """Keep the s entries of T - U V that would cost most to lose."""
    xp = problem.ops.xp
    rest = state.T - state.U @ state.V
    state.mask = largest(xp, rest**2 * state.stiffness[None], s)
    place_sparse(problem, state, xp.where(state.mask, rest, 0))


def refine(problem: ResponseProblem, state: BilateralState, steps: int) -> None:
    """Least squares for S on its support: conjugate gradients for all rows at once.

    Every row has its own support and its own step, so this is n independent solves whose products
    with G are one GEMM. The preconditioner is the diagonal of G.
    """
    xp, G = problem.ops.xp, problem.G
    inverse = 1 / xp.diagonal(G)[None]

    def rowwise(a, b):
        return xp.einsum("ij,ij->i", a, b)[:, None]

    def quotient(a, b):
        return xp.where(b > TINY, a / xp.maximum(b, TINY), 0)

    S, SG, residual = state.S, state.SG, state.residual
    gradient = xp.where(state.mask, residual, 0)
    direction = gradient * inverse
    power, saved = rowwise(gradient, direction), 0.0
    for _ in range(steps):
        moved = direction @ G
        step = quotient(power, rowwise(direction, moved))
        S, SG, residual = S + step * direction, SG + step * moved, residual - step * moved
        saved = saved + xp.sum(step * power)
        gradient = xp.where(state.mask, residual, 0)
        scaled = gradient * inverse
        previous, power = power, rowwise(gradient, scaled)
        direction = scaled + quotient(power, previous) * direction
    state.S, state.SG, state.residual = S, SG, residual
    state.error = state.error - float(saved)


def exchange(problem: ResponseProblem, state: BilateralState, steps: int) -> None:
    """Swap the entries that matter least for those that would save most, if that pays.

    At most twice as many as paid the last time; a quarter of them after every failure.
    """
    xp = problem.ops.xp
    costs = xp.where(state.mask, state.S**2 * state.stiffness[None], xp.inf).ravel()
    gains = xp.where(state.mask, -xp.inf, state.residual**2 / state.stiffness[None]).ravel()
    kept = int(state.mask.sum())
    most = min(kept, state.mask.size - kept, 2 * state.exchanged)
    if not most:
        return
    drop, add = smallest(xp, costs, most), smallest(xp, -gains, most)
    count = int(xp.sum(gains[add] > costs[drop]))
    while count:
        trial = copy.copy(state)
        mask = state.mask.ravel().copy()
        mask[drop[:count]], mask[add[:count]] = False, True
        trial.mask, trial.exchanged = mask.reshape(state.mask.shape), count
        place_sparse(problem, trial, xp.where(trial.mask, state.S, 0))
        refine(problem, trial, steps)
        if trial.error < state.error:
            state.__dict__.update(trial.__dict__)
            return
        count //= 4
    state.exchanged = max(state.exchanged // 4, 1)


def smallest(xp: Any, values: Array, count: int) -> Array:
    """Indices of the smallest values (w,), ascending; of equal ones the first."""
    if 0 < count < len(values):
        limit = xp.partition(values, count - 1)[count - 1]
        near = xp.flatnonzero(values <= limit)
    else:
        near = xp.arange(len(values))
    return near[xp.argsort(values[near], kind="stable")][:count]


def largest(xp: Any, scores: Array, count: int) -> Array:
    """Mask of the largest scores; of equal ones the first in memory order."""
    mask = xp.zeros(scores.size, dtype=bool)
    mask[smallest(xp, -scores.ravel(), count)] = True
    return mask.reshape(scores.shape)


# -- all of it, gradually ------------------------------------------------------------------------


def smooth(
    problem: ResponseProblem,
    structures: list[Structure],
    steps: int,
    *,
    rank_steps: int,
    seed: int,
    stiff: Array | None = None,
) -> list[BilateralState]:
    """States after alternating under a penalty that grows, on the linear problem.

    With D the diagonal of G and Lambda the dual of M = S + U V,

        M = (rhs + (t (S + U V) - Lambda) D) (G + t D)^-1 ,    Lambda += t (M - S - U V) ,

    and S and U V by threshold and bilateral alternation of M + Lambda / t in the metric D. All
    structures share the factorisations.
    """
    xp = problem.ops.xp
    stiff = stiffness(problem) if stiff is None else stiff
    states = [empty_state(problem, structure, stiff) for structure in structures]
    D = xp.diagonal(problem.G)[None]
    root = xp.sqrt(D)
    M = [problem.target] * len(states)
    dual = [xp.zeros_like(problem.target)] * len(states)
    for step in range(steps):
        t = FIRST * (LAST / FIRST) ** (step / max(steps - 1, 1))
        L = factor(problem.ops, problem.G, t * D[0])
        for i, (state, structure) in enumerate(zip(states, structures, strict=True)):
            wanted = M[i] + dual[i] / t
            rest = wanted - state.U @ state.V
            state.mask = largest(xp, xp.square(rest * root), structure.s)
            state.S = xp.where(state.mask, rest, 0)
            scaled = (wanted - state.S) * root
            k = state.U.shape[1]
            if structure.k:
                covariance = scaled @ scaled.T
                more = min(-(-structure.k // rank_steps), structure.k - k)
                state.U = grow(problem.ops, state.U, covariance, more, seed + k)
                state.U = xp.linalg.qr(covariance @ state.U)[0]
                state.V = (state.U.T @ scaled) / root
            both = state.M
            right = problem.start_rhs + (t * both - dual[i]) * D
            M[i] = xp.ascontiguousarray(solve_both(problem.ops, L, right.T).T)
            dual[i] = dual[i] + t * (M[i] - both)
    for state in states:
        place_sparse(problem, state, state.S)
        if state.U.shape[1]:
            place_low_rank(problem, state, state.U)
        state.bias = problem.linear_bias(state.M)
    return states
