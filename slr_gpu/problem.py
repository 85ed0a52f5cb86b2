"""The approximation problem of one layer, in the metric of its inputs.

In: a `LayerIO`. Out: what every solver is made of. With M (n, m) and bias b,

    objective   f(M, b) = (1/P) sum loss(Y, X Mᵀ + b)            loss: `slr_gpu.activations`
    Gram        G = Xcᵀ Xc + rho I                               Xc: X less its column means
    rhs         D + rho W,  D = Zcᵀ Xc                           Z: responses before activation

The bias is the coefficient of a column of ones that is neither shrunk nor pruned; eliminating it
is the same as centring, which is what happens here, in float64. The ridge rho pulls M towards
the original W, so directions that the calibration data does not excite keep the weight that was
trained.

Weights are laid out as DESIGN 2 says: for a convolution m = c * prod(kernel), in PyTorch's memory
order, so that input channel c owns neighbouring columns. `in_basis` changes variables to rotated
and truncated input channels; all else then works in it unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from .activations import Activation
from .decomposition import Structure
from .errors import InputError, complain
from .layer_io import LayerIO
from .ops import NumpyOps
from .penalties import low_rank_projection

Array = Any

# Rows a block of the sweeps over samples: large enough for full GEMM speed, small enough that a
# block's responses stay near the cache.
BLOCK = 2048
# The Gram matrix is added up in float64 after each block: fewer, larger ones.
GRAM_BLOCK = 16384
# Cached attributes that belong to one choice of coordinates and rows.
_COORDINATES = (
    "Xc",
    "scatter",
    "G",
    "metric",
    "channel_gram",
    "start_correlation",
    "start_rhs",
    "target",
    "target_energy",
)


class Metric:
    """A Cholesky factor of the Gram matrix, with its columns in a chosen order.

    With ``G = L Lᵀ`` and F = M L, ``||M||_G = ||F||_F``. The factor of the leading columns is the
    leading block of L, and the Schur complement of a leading set S is ``L_cc L_ccᵀ``: one
    factorisation answers for every leading set (DESIGN 2, consequence 2).
    """

    def __init__(self, ops: NumpyOps, G: Array, order: Array | None = None) -> None:
        self.ops, self.order = ops, order
        self.L = ops.xp.linalg.cholesky(G if order is None else G[order][:, order])

    def leading(self, width: int) -> Metric:
        """The metric of the first columns: the leading block of L."""
        other = copy.copy(self)
        other.L = self.L[:width, :width]
        return other

    def whiten(self, rhs: Array) -> Array:
        """``F = rhs L^-T`` of right-hand sides (n, m) in the problem's column order."""
        rhs = rhs if self.order is None else rhs[:, self.order]
        solve = self.ops.scipy.linalg.solve_triangular
        return solve(self.L, rhs.T, lower=True, check_finite=False).T

    def unwhiten(self, F: Array) -> Array:
        """``M = F L^-1``, in the problem's column order."""
        width = F.shape[1]
        solve = self.ops.scipy.linalg.solve_triangular
        M = solve(self.L[:width, :width], F.T, lower=True, trans=1, check_finite=False).T
        if self.order is None:
            return M
        result = self.ops.xp.empty_like(M)
        result[:, self.order] = M
        return result


class ResponseProblem:
    """Objective, gradient, Gram matrix and projections of one layer.

    Parameters
    ----------
    layer_io : LayerIO
    ops : NumpyOps
    ridge : float
        rho as a fraction of the mean diagonal of G, > 0.
    held_out : float
        Fraction of the rows, in [0, 0.5], that is never fitted and only judges.
    activation : Activation, optional
        Look through another activation than the layer's own (``identity`` for the linear
        objective); held-out errors are always after the layer's own.

    Attributes
    ----------
    Xc, Y, Z : array, (P, m), (P, n), (P, n)
        Fitted rows: inputs less `x_mean`, responses wanted after and before the activation.
    Xh, Yh : array
        Held-out rows; the inputs less the same mean.
    W, bias : float64 array, (n, m), (n,)
        The original weight, in the coordinates of this problem.
    x_mean, z_mean : float64 array, (m,), (n,)
    rho : float
        The ridge.
    basis : array, (r, c), or None
    """

    def __init__(
        self,
        layer_io: LayerIO,
        *,
        ops: NumpyOps,
        ridge: float = 1e-3,
        held_out: float = 0.1,
        activation: Activation | None = None,
    ) -> None:
        if not 0 <= held_out <= 0.5:
            raise InputError(
                complain(f"held_out={held_out}", "a fraction in [0, 0.5]", "0.1 is usual.")
            )
        if not ridge > 0:
            raise InputError(
                complain(f"ridge={ridge}", "a positive fraction", "1e-3 is usual; 1e-6 is small.")
            )
        self.ops, self.layer_io = ops, layer_io
        self.channels, self.taps = layer_io.channels, layer_io.taps
        self.activation = layer_io.activation if activation is None else activation
        self.basis: Array | None = None
        fitted, held = layer_io.split(held_out)
        if len(fitted) < 2:
            raise InputError(
                complain(
                    f"{len(fitted)} row(s) to fit on", "at least 2", "Pass more, or held_out=0."
                )
            )
        dtype = layer_io.inputs.dtype

        def rows(array, which):
            return ops.asarray(array[which], dtype)

        xp = ops.xp
        self.Xc, self.Xh = rows(layer_io.inputs, fitted), rows(layer_io.inputs, held)
        self.Y, self.Yh = rows(layer_io.targets, fitted), rows(layer_io.targets, held)
        self.W = ops.asarray(layer_io.weight, xp.float64)
        self.bias = ops.asarray(layer_io.bias, xp.float64)
        if layer_io.linear_targets is not None:
            self.Z = rows(layer_io.linear_targets, fitted)
        else:
            self.Z = self.Xc @ self.W.astype(dtype).T + self.bias.astype(dtype)
        if self.activation.is_identity:
            # A linear fit aims at the response before the activation, held-out stays after it.
            if layer_io.activation.is_identity:
                self.Z = self.Y
            self.Y = self.Z
        # Centred once, in place: these are copies. Centring before squaring, because nearly
        # constant inputs would leave only rounding after it.
        self.x_mean = self.Xc.mean(axis=0, dtype=xp.float64)
        self.z_mean = self.Z.mean(axis=0, dtype=xp.float64)
        mean = self.x_mean.astype(dtype)
        self.Xc -= mean
        self.Xh -= mean
        self._ridge_unit = max(self._mean_variance() * self.rows, 1e-30)
        self.rho = ridge * self._ridge_unit
        centred = float(xp.square(self.Z - self.z_mean.astype(dtype)).sum(dtype=xp.float64))
        self._energies = (centred, float(xp.sum(self.W**2)))

    def _mean_variance(self) -> float:
        """Mean variance of the inputs over columns, from at most about 2048 rows."""
        sample = self.Xc[:: max(1, self.rows // 2048)]
        return float(self.ops.xp.square(sample).mean(dtype=self.ops.xp.float64))

    def _blocks(self, size: int) -> Iterator[slice]:
        for start in range(0, self.rows, size):
            yield slice(start, start + size)

    def sum_over_rows(
        self, function: Callable[[Array, Array, Array], tuple[Array, ...]], block: int = BLOCK
    ) -> tuple[Array, ...]:
        """Sum what a function returns for every block of the fitted rows, in float64.

        Parameters
        ----------
        function : callable
            Of a block's rows (X, Y, Z): centred inputs (p, m) in the problem's coordinates,
            responses wanted after (p, n) and before (p, n) the activation. Returns arrays.
        block : int
            About so many rows at a time.
        """
        totals: tuple[Array, ...] = ()
        for rows in self._blocks(block):
            parts = function(self.Xc[rows], self.Y[rows], self.Z[rows])
            parts = tuple(part.astype(self.ops.xp.float64, copy=False) for part in parts)
            totals = tuple(t + p for t, p in zip(totals, parts, strict=True)) if totals else parts
        return totals

    @cached_property
    def scatter(self) -> Array:
        """``Xcᵀ Xc`` (m, m), float64."""
        scatter = self.ops.xp.zeros((self.width, self.width))
        for rows in self._blocks(GRAM_BLOCK):
            block = self.Xc[rows]
            scatter += block.T @ block
        return scatter

    @cached_property
    def G(self) -> Array:
        """``Xcᵀ Xc + rho I`` (m, m), float64."""
        diagonal = self.ops.xp.arange(self.width)
        G = self.scatter.copy()
        G[diagonal, diagonal] += self.rho
        return G

    @cached_property
    def channel_gram(self) -> Array:
        """Mean over taps of G's diagonal channel blocks (c, c): no (m, m) matrix is formed."""
        xp, groups = self.ops.xp, self.groups
        total = xp.zeros((groups, groups))
        if "scatter" in self.__dict__:
            blocks = self.scatter.reshape(groups, self.taps, groups, self.taps)
            total = xp.einsum("itjt->ij", blocks)
        else:
            for rows in self._blocks(GRAM_BLOCK):
                taps_first = self.Xc[rows].reshape(-1, groups, self.taps).transpose(0, 2, 1)
                block = taps_first.reshape(-1, groups)
                total += block.T @ block
        return total / self.taps + self.rho * xp.eye(groups)

    def with_ridge(self, ridge: float) -> ResponseProblem:
        """The same problem with another ridge, sharing the arrays over samples."""
        self.scatter, self.start_correlation  # noqa: B018  (computed once, then shared)
        other = self._without("G", "metric", "start_rhs", "target", "channel_gram")
        other.rho = ridge * self._ridge_unit
        return other

    def thinned(self, rows: int) -> ResponseProblem:
        """A problem on about so many of the fitted rows, evenly spread, for rough estimates."""
        step = -(-self.rows // rows)
        if step == 1:
            return self
        other = self._without(*_COORDINATES)
        other.Xc, other.Y, other.Z = self.Xc[::step], self.Y[::step], self.Z[::step]
        share = other.rows / self.rows
        other.rho, other._ridge_unit = self.rho * share, self._ridge_unit * share
        other._energies = (self._energies[0] * share, self._energies[1])
        return other

    def _without(self, *names: str) -> ResponseProblem:
        """A shallow copy that forgets these cached attributes."""
        other = copy.copy(self)
        for name in names:
            other.__dict__.pop(name, None)
        return other

    @property
    def rows(self) -> int:
        return len(self.Y)

    @property
    def n(self) -> int:
        return len(self.W)

    @property
    def width(self) -> int:
        """Columns m of the problem in its coordinates."""
        return self.W.shape[1]

    @property
    def groups(self) -> int:
        """Input channels of the problem in its coordinates."""
        return self.width // self.taps

    @cached_property
    def metric(self) -> Metric:
        """The factorisation of G in the problem's own column order."""
        return Metric(self.ops, self.G)

    # -- the linear problem ------------------------------------------------------------------

    @cached_property
    def start_correlation(self) -> Array:
        """``D = Zcᵀ Xc`` (n, m), float64."""
        D = self.ops.xp.zeros(self.W.shape)
        for rows in self._blocks(GRAM_BLOCK):
            D += self.Z[rows].T @ self.Xc[rows]
        return D

    @cached_property
    def start_rhs(self) -> Array:
        """Right-hand side of the linear problem, ``D + rho W``."""
        return self.start_correlation + self.rho * self.W

    @cached_property
    def target(self) -> Array:
        """Unrestricted minimiser ``T = rhs G⁻¹`` (n, m) of the linear problem."""
        return self.metric.unwhiten(self.metric.whiten(self.start_rhs))

    @property
    def linear_energy(self) -> float:
        """``||Zc||^2 + rho ||W||^2``: the linear objective of M = 0, times P.

        In the coordinates of a basis still that of the whole problem, so that what the basis
        cuts off counts as error.
        """
        response, weight = self._energies
        return response + self.rho * weight

    def linear_bias(self, M: Array) -> Array:
        """The best bias of M before the activation."""
        return self.z_mean - M @ self.x_mean

    # -- the problem after the activation ------------------------------------------------------

    def sweep(
        self, M: Array, bias: Array, *, convex: bool = False, gradient: bool = True
    ) -> tuple[float, Array | None, Array | None]:
        """One pass over the fitted rows: two GEMMs and the masked residual.

        Returns
        -------
        loss : float
            ``f(M, bias)``, per sample.
        RtX : float64 array, (n, m), or None
            ``Rᵀ Xc`` of the masked residual; the gradient of f in M (at the best bias for a
            quadratic) is ``-2/P`` times this.
        R_mean : float64 array, (n,), or None
        """
        xp = self.ops.xp
        dtype = self.Y.dtype
        Mt, b = M.astype(dtype).T, self._centred_bias(M, bias)
        loss = 0.0
        RtX = xp.zeros(M.shape) if gradient else None
        total = xp.zeros(len(M)) if gradient else None
        for rows in self._blocks(BLOCK):
            X, Y = self.Xc[rows], self.Y[rows]
            R, block_loss = self.ops.masked_gradient(
                (X @ Mt)[None], Y[None], self.activation, bias=b, convex=convex
            )
            loss = loss + block_loss[0]
            if gradient:
                RtX += R[0].T @ X
                total += R[0].sum(axis=0, dtype=xp.float64)
        if gradient:
            total = total / self.rows
        return float(loss) / self.rows, RtX, total

    def _centred_bias(self, M: Array, bias: Array) -> Array:
        """The bias that goes with centred inputs, (1, n), in the dtype of the data."""
        return (bias + M @ self.x_mean).astype(self.Y.dtype)[None]

    def objective(self, M: Array, bias: Array, *, convex: bool = False) -> float:
        """``f(M, bias)``, the loss per sample without the ridge."""
        return self.sweep(M, bias, convex=convex, gradient=False)[0]

    @cached_property
    def target_energy(self) -> float:
        """``||Y||^2 / P``, the unit of relative errors."""
        xp = self.ops.xp
        return max(float(xp.sum(xp.square(self.Y), dtype=xp.float64)) / self.rows, 1e-30)

    def relative_error(self, M: Array, bias: Array) -> float:
        """``||Y - r(Z)||^2 / ||Y||^2`` on the fitted rows."""
        return self.objective(M, bias) / self.target_energy

    def held_out_error(self, M: Array, bias: Array) -> float:
        """``||Y - r(Z)||^2 / ||Y||^2`` on the held-out rows, after the layer's own activation."""
        if not len(self.Xh):
            return float("nan")
        xp = self.ops.xp
        dtype = self.Y.dtype
        _, loss = self.ops.masked_gradient(
            (self.Xh @ M.astype(dtype).T)[None],
            self.Yh[None],
            self.layer_io.activation,
            bias=self._centred_bias(M, bias),
        )
        energy = float(xp.sum(xp.square(self.Yh), dtype=xp.float64))
        return float(loss[0]) / max(energy, 1e-30)

    # -- coordinates -----------------------------------------------------------------------------

    def to_basis(self, array: Array, basis: Array) -> Array:
        """``array Eᵀ`` for E = basis ⊗ I_taps and rows of m columns."""
        # Taps first for one large GEMM; a batch of (r, c) x (c, taps) products is far slower.
        P, (r, groups) = len(array), basis.shape
        taps_first = array.reshape(P, groups, self.taps).transpose(0, 2, 1)
        turned = taps_first.reshape(P * self.taps, groups) @ basis.astype(array.dtype).T
        return turned.reshape(P, self.taps, r).transpose(0, 2, 1).reshape(P, r * self.taps)

    def in_basis(self, basis: Array) -> ResponseProblem:
        """The same problem in the coordinates X' = X Eᵀ (DESIGN 2).

        Parameters
        ----------
        basis : array, (r, groups)
            Orthonormal rows, so that the ridge stays a multiple of the identity. Applied after
            the basis that the problem already has.
        """
        other = self._without(*_COORDINATES)
        other.W = self.to_basis(self.W, basis)
        other.x_mean = self.to_basis(self.x_mean[None], basis)[0]
        other.Xh = self.to_basis(self.Xh, basis)
        other.basis = basis if self.basis is None else basis @ self.basis
        if "Xc" in self.__dict__:
            other._unturned = (self.Xc, basis)
        else:  # never materialised: turn once, by the product
            other._unturned = (self._unturned[0], basis @ self._unturned[1])
        if "scatter" in self.__dict__:
            other.scatter = self.to_basis(self.to_basis(self.scatter, basis).T, basis)
            other.start_correlation = self.to_basis(self.start_correlation, basis)
        return other

    def truncated(self, r: int) -> ResponseProblem:
        """The first r channels of a problem that is in a basis; its factorisation is shared."""
        width = r * self.taps
        other = self._without(*_COORDINATES)
        other.W, other.x_mean = self.W[:, :width], self.x_mean[:width]
        other.Xh = self.Xh[:, :width]
        other.scatter = self.scatter[:width, :width]
        other.start_correlation = self.start_correlation[:, :width]
        other.metric = self.metric.leading(width)
        other.basis = self.basis[:r]
        other._unturned = (self._unturned[0], self._unturned[1][:r])
        return other

    @cached_property
    def Xc(self) -> Array:
        """Fitted inputs in the problem's coordinates; turned only when first needed."""
        source, basis = self._unturned
        return self.to_basis(source, basis)


def ordered_metric(
    problem: ResponseProblem, structure: Structure, support: Array | None
) -> tuple[Metric, int]:
    """A metric whose first columns are the support, and how many those are."""
    if structure.form == "rotated":
        return problem.metric, structure.s * problem.taps
    return metric_of(problem, support)


def metric_of(problem: ResponseProblem, support: Array) -> tuple[Metric, int]:
    """A metric whose first columns are these, and how many those are."""
    xp = problem.ops.xp
    mask = xp.zeros(problem.width, dtype=bool)
    mask[xp.asarray(support, dtype=xp.int64)] = True
    order = xp.concatenate([xp.flatnonzero(mask), xp.flatnonzero(~mask)])
    return Metric(problem.ops, problem.G, order), len(support)


def project(metric: Metric, F: Array, kept: int, k: int) -> tuple[Array, Array, Array]:
    """Nearest ``(A on S) + (rank k elsewhere)`` in the metric, S being its first columns.

    Parameters
    ----------
    metric : Metric
    F : array, (n, m)
        Whitened target.
    kept, k : int
        Columns in S; rank.

    Returns
    -------
    F, M, U : array, (n, m), (n, m), (n, k)
        The projection, whitened and not (DESIGN 2, consequence 2).
    """
    low_rank, U = low_rank_projection(metric.ops, F[:, kept:], k)
    F = metric.ops.xp.concatenate([F[:, :kept], low_rank], axis=1)
    return F, metric.unwhiten(F), U
