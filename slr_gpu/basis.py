"""The input basis of the rotated form: which mixtures of input channels a layer reads (DESIGN 2).

In: a `ResponseProblem`. Out: the same problem in coordinates X' = X (P ⊗ I)ᵀ, P (r, channels) with
orthonormal rows. `rotated` orders all directions at once, from the weight in the metric of the
channel Gram; `refined` then moves the chosen ones to where the structure that is to live in them
loses least,

    min_P  e(P) ,   e(P) = min_{A, U, V} ||(A + U V)(P ⊗ I) - T||_G^2 ,

by variable projection: the inner minimum is a closed form, and at it the derivative of e is the
partial derivative in P alone (Golub and Pereyra 1973).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from .decomposition import Structure
from .problem import TINY, ResponseProblem, ordered_metric
from .samples import to_basis

Array = Any

# Up to so many columns no row of a basis is left out of a search to save time.
CHEAP = 1152
# Halvings of a step that does not lower the error.
HALVINGS = 3


def rotation(problem: ResponseProblem, weight: Array) -> Array:
    """An orthogonal basis (groups, groups) of the input channels, by what a weight responds to.

    The rows span, for every r, the best r-dimensional input projection of the weight over
    channels in the metric of the channel Gram (taps averaged): with C = R Rᵀ the mean over taps
    of G's channel blocks and W (n * taps, c), the leading right singular vectors of W R, brought
    back by R^-T and orthonormalised in order.
    """
    xp = problem.ops.xp
    c, taps = problem.groups, problem.taps
    R = problem.ops.cholesky(problem.channel_gram)
    over_channels = weight.reshape(-1, c, taps).transpose(0, 2, 1).reshape(-1, c)
    weighted = over_channels @ R
    right = xp.linalg.eigh(weighted.T @ weighted)[1][:, ::-1]
    rows = problem.ops.solve_triangular(R, right, transposed=True)  # columns: R^-T v
    Q = xp.linalg.qr(rows)[0]
    Q = Q * xp.sign(Q[xp.argmax(xp.abs(Q), axis=0), xp.arange(c)])
    return Q.T


def rotated(problem: ResponseProblem, rows: int) -> ResponseProblem:
    """The problem in its best basis of so many rows, or more where they cost little.

    The original weight chooses the rows; within them the regression of the wanted responses on
    the actual inputs, which differs when a compressed prefix distorts these, sets the order.
    """
    rows = min(max(rows, CHEAP // problem.taps, 1), problem.groups)
    wide = problem.in_basis(rotation(problem, problem.W)[:rows])
    return wide.in_basis(rotation(wide, wide.target))


def linear_fit(
    problem: ResponseProblem, structure: Structure, support: Array | None = None
) -> tuple[float, Array]:
    """Relative linear error and weight (n, m) of a structure's closed form."""
    metric, kept = ordered_metric(problem, structure, support)
    F, M, _ = metric.project(metric.target(problem), kept, structure.k, vectors=False)
    return metric.missed(problem, F) / max(problem.linear_energy, TINY), M


def refined(
    problem: ResponseProblem,
    structure: Structure,
    *,
    iterations: int = 12,
    tolerance: float = 1e-3,
) -> tuple[ResponseProblem, float]:
    """The problem in the basis, near its leading rows, that suits a structure best.

    Quasi-Newton steps (BFGS with a memory of one pair, Nocedal and Wright 2006, section 7.2) on
    e(P). The inverse Hessian they start from is that of the fit of P to the factors M' found:
    the Kronecker product of ``(M' M'ᵀ)⁻¹`` over the rows and the inverse channel Gram.

    Parameters
    ----------
    problem : ResponseProblem
        `rotated`; the new basis is sought within its rows.
    structure : Structure
        Rotated or spatial.
    iterations : int
        At most this many.
    tolerance : float
        Stop when an iteration lowers the error by less than this fraction. A rise of the held-out
        error ends it, too, and is not kept.

    Returns
    -------
    problem : ResponseProblem
        In a basis of r rows.
    error : float
        Linear error there, relative to the energy of the centred responses.
    """
    xp = problem.ops.xp
    best = now = _Point(problem, xp.eye(structure.r, problem.groups), structure)
    last = None  # the last change of the basis and of the gradient, in the rows of now
    for _ in range(iterations if structure.r < problem.groups else 0):
        slope = _Slope(problem, now)
        direction = slope.direction(last)
        if direction is None:  # the basis is exact already
            break
        for _ in range(HALVINGS):
            # Rows in order: A on the first s absorbs what this mixes into the later ones.
            Q, R = xp.linalg.qr((now.basis + direction).T)
            new = _Point(problem, Q.T, structure)
            if new.error < now.error:
                break
            direction = direction / 2
        else:
            if last is None:
                break
            last = None  # what was learned of the curvature misleads
            continue
        gained = now.error - new.error
        now = new
        # The new rows are R^-T (P + change): changes follow them, gradients their inverse.
        last = xp.linalg.solve(R.T, direction), R @ slope.gradient
        if now.held_out_error >= best.held_out_error:  # false without held-out rows
            break
        best = now
        if gained <= tolerance * now.error:
            break
    return best.view, best.error


class _Point:
    """The closed form in one basis."""

    def __init__(self, problem: ResponseProblem, basis: Array, structure: Structure) -> None:
        self.basis, self.across = basis, problem.across(basis)
        self.view = problem.in_basis(basis, self.across)
        error, self.M = linear_fit(self.view, structure)
        # Ranks differ in rounding, and must not in how often they sum over held-out rows.
        self.error = problem.layer_io.group.broadcast(error)

    @cached_property
    def held_out_error(self) -> float:
        return float(self.view.held_out_error(self.M))


class _Slope:
    """Half the gradient of e at a point, of basis P (r, c) and best factors M (n, r, taps)."""

    def __init__(self, problem: ResponseProblem, point: _Point) -> None:
        self.problem, self.xp = problem, problem.ops.xp
        r = len(point.basis)
        self.M = M = point.M.reshape(problem.n, r, -1)
        factors = self.xp.einsum("nrt,nst->rs", M, M, optimize=True)
        weak = 1e-6 * self.xp.trace(factors) / r + TINY
        self.factors = factors + weak * self.xp.eye(r)
        full = self._expand(point.basis)
        lacking = problem.metric.lacking(problem, full, point.view, point.M, point.across)
        self.gradient = -self._contract(lacking)

    def _expand(self, P: Array) -> Array:
        """``M (P ⊗ I)`` (n, m)."""
        n, _, taps = self.M.shape
        return to_basis(self.xp, self.M.reshape(n, -1).astype(P.dtype, copy=False), P.T, taps)

    def _contract(self, N: Array) -> Array:
        """The adjoint of `_expand`."""
        taps = self.M.shape[2]
        N = N.reshape(len(self.M), -1, taps)
        return self.xp.einsum("nrt,nct->rc", self.M, N, optimize=True)

    def _scaled(self, covector: Array) -> Array:
        solve = self.xp.linalg.solve
        return solve(self.problem.channel_gram, solve(self.factors, covector).T).T

    def direction(self, last: tuple[Array, Array] | None) -> Array | None:
        """Where to go from here, as far as a parabola would; None where there is no slope.

        Parameters
        ----------
        last : (change, gradient) or None
            What led here and the gradient where it began. Not read where e bends down.
        """
        if last is not None:
            change, bent = last[0], self.gradient - last[1]
            curvature = (change * bent).sum()
            if curvature > 0:
                return self._newton(change, bent, curvature)
        return self._steepest()

    def _steepest(self) -> Array | None:
        """Down the scaled gradient, twice as far as would be best for these very factors.

        They give way, so e is flatter.
        """
        direction = -self._scaled(self.gradient)
        fall = -(self.gradient * direction).sum()
        moved = self._expand(direction)
        bend = (self.problem.metric.product(self.problem, moved) * moved).sum()
        return 2 * fall / bend * direction if fall > 0 and bend > 0 else None

    def _newton(self, change: Array, bent: Array, curvature: Array) -> Array:
        """Minus the inverse Hessian, by the scaled one and one pair, times the gradient."""
        share = (change * self.gradient).sum() / curvature
        length = curvature / (bent * self._scaled(bent)).sum()
        direction = length * self._scaled(self.gradient - share * bent)
        direction = direction + (share - (bent * direction).sum() / curvature) * change
        return -direction
