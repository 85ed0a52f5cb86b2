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
from collections.abc import Callable
from functools import cached_property
from typing import Any

from .activations import Activation
from .decomposition import Structure, grouping
from .errors import InputError, complain
from .layer_io import LayerIO
from .ops import NumpyOps
from .penalties import low_rank_projection
from .samples import Samples, to_basis

Array = Any

# The Gram matrix is added up in float64 after each block: fewer, larger ones.
GRAM_BLOCK = 16384
# Cached attributes that belong to one choice of coordinates and rows.
_COORDINATES = (
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
        return self.ops.solve_triangular(self.L, rhs.T).T

    def unwhiten(self, F: Array) -> Array:
        """``M = F L^-1``, in the problem's column order."""
        width = F.shape[1]
        M = self.ops.solve_triangular(self.L[:width, :width], F.T, transposed=True).T
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
    samples, held : Samples
        Fitted and held-out rows: inputs less `x_mean`, responses wanted after and before the
        activation (held-out ones only after it).
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
        dtype, xp = layer_io.inputs.dtype, ops.xp
        self.W = ops.asarray(layer_io.weight, xp.float64)
        self.bias = ops.asarray(layer_io.bias, xp.float64)
        Y, Z = layer_io.targets, layer_io.linear_targets
        if Z is None:
            Z = layer_io.responses
        if self.activation.is_identity:
            # A linear fit aims at the response before the activation, held-out stays after it.
            Y = Z = Y if layer_io.activation.is_identity else Z
        self.samples = Samples(ops, layer_io.inputs, Y, Z, fitted, dtype)
        self.held = Samples(ops, layer_io.inputs, layer_io.targets, None, held, dtype)
        # Centring before squaring: nearly constant inputs would leave only rounding after it.
        sums = self.samples.sum(
            lambda X, Y, Z: (X.sum(axis=0, dtype="float64"), Z.sum(axis=0, dtype="float64")),
            block=GRAM_BLOCK,
        )
        self.x_mean, self.z_mean = (total / self.rows for total in sums)
        self.samples.centre(self.x_mean)
        self.held.centre(self.x_mean)
        self._ridge_unit, energy = self._scales()
        self.rho = ridge * self._ridge_unit
        self._energies = (energy, float(xp.sum(self.W**2)))

    def _scales(self) -> tuple[float, float]:
        """Mean diagonal of ``Xcᵀ Xc``, from some thousand rows, and ``||Zc||^2``."""
        square, step = self.ops.xp.square, max(1, self.rows // 2048)
        z_mean = self.z_mean.astype(self.samples.dtype)

        def squares(X, Y, Z):
            some = X[::step]
            count = self.ops.xp.full((), len(some))
            return square(some).sum(dtype="float64"), count, square(Z - z_mean).sum(dtype="float64")

        inputs, count, energy = self.samples.sum(squares, block=GRAM_BLOCK)
        unit = float(inputs) / float(count) / self.width * self.rows
        return max(unit, 1e-30), float(energy)

    @cached_property
    def scatter(self) -> Array:
        """``Xcᵀ Xc`` (m, m), float64."""
        return self.samples.sum(lambda X, Y, Z: (X.T @ X,), block=GRAM_BLOCK, largest=GRAM_BLOCK)[0]

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
        if "scatter" in self.__dict__:
            blocks = self.scatter.reshape(groups, self.taps, groups, self.taps)
            total = xp.einsum("itjt->ij", blocks)
        else:

            def gram(X, Y, Z):
                taps_first = X.reshape(-1, groups, self.taps).transpose(0, 2, 1)
                rows = taps_first.reshape(-1, groups)
                return (rows.T @ rows,)

            (total,) = self.samples.sum(gram, block=GRAM_BLOCK, largest=GRAM_BLOCK)
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
        other.samples = self.samples.thinned(step)
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
        return self.samples.rows

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
        return self.samples.sum(lambda X, Y, Z: (Z.T @ X,), block=GRAM_BLOCK, largest=GRAM_BLOCK)[0]

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
    ) -> tuple[Array, Array | None, Array | None]:
        """One pass over the fitted rows: two GEMMs and the masked residual.

        Returns
        -------
        loss : float64 scalar, on the device
            ``f(M, bias)``, per sample.
        RtX : float64 array, (n, m), or None
            ``Rᵀ Xc`` of the masked residual; the gradient of f in M (at the best bias for a
            quadratic) is ``-2/P`` times this.
        R_mean : float64 array, (n,), or None
        """
        Mt, b = M.astype(self.samples.dtype).T, self._centred_bias(M, bias)

        def masked(X, Y, Z):
            R, loss = self.ops.masked_gradient(
                (X @ Mt)[None], Y[None], self.activation, bias=b, convex=convex
            )
            if not gradient:
                return (loss[0],)
            return loss[0], R[0].T @ X, R[0].sum(axis=0, dtype="float64")

        loss, *rest = self.samples.sum(masked)
        RtX, total = rest or (None, None)
        return loss / self.rows, RtX, None if total is None else total / self.rows

    def sum_over_rows(
        self, function: Callable[[Array, Array, Array], tuple[Array, ...]]
    ) -> tuple[Array, ...]:
        """Sum what a function returns for every block of the fitted rows, in float64.

        Parameters
        ----------
        function : callable
            Of a block's rows (X, Y, Z): centred inputs (p, m) in the problem's coordinates,
            responses wanted after (p, n) and before (p, n) the activation. Returns arrays.
        """
        return self.samples.sum(function)

    def _centred_bias(self, M: Array, bias: Array) -> Array:
        """The bias that goes with centred inputs, (1, n), in the dtype of the data."""
        return (bias + M @ self.x_mean).astype(self.samples.dtype)[None]

    def objective(self, M: Array, bias: Array, *, convex: bool = False) -> float:
        """``f(M, bias)``, the loss per sample without the ridge."""
        return float(self.sweep(M, bias, convex=convex, gradient=False)[0])

    @cached_property
    def target_energy(self) -> float:
        """``||Y||^2 / P``, the unit of relative errors."""
        return max(self._energy(self.samples) / self.rows, 1e-30)

    def _energy(self, samples: Samples) -> float:
        """``||Y||^2`` of some rows."""
        square = self.ops.xp.square
        return float(samples.sum(lambda X, Y, Z: (square(Y).sum(dtype="float64"),))[0])

    def relative_error(self, M: Array, bias: Array) -> float:
        """``||Y - r(Z)||^2 / ||Y||^2`` on the fitted rows."""
        return self.objective(M, bias) / self.target_energy

    def held_out_error(self, M: Array, bias: Array) -> Array:
        """``||Y - r(Z)||^2 / ||Y||^2`` on the held-out rows, after the layer's own activation.

        A scalar on the device, NaN without held-out rows.
        """
        if not self.held.rows:
            return self.ops.xp.full((), float("nan"))
        Mt, b = M.astype(self.held.dtype).T, self._centred_bias(M, bias)
        activation = self.layer_io.activation

        def squares(X, Y, Z):
            loss = self.ops.masked_gradient((X @ Mt)[None], Y[None], activation, bias=b)[1]
            return (loss[0],)

        return self.held.sum(squares)[0] / self._held_out_energy

    @cached_property
    def _held_out_energy(self) -> float:
        return max(self._energy(self.held), 1e-30)

    # -- coordinates -----------------------------------------------------------------------------

    def in_basis(self, basis: Array) -> ResponseProblem:
        """The same problem in the coordinates X' = X Eᵀ (DESIGN 2).

        Parameters
        ----------
        basis : array, (r, groups)
            Orthonormal rows, so that the ridge stays a multiple of the identity. Applied after
            the basis that the problem already has.
        """
        other = self._without(*_COORDINATES)

        def turned(array):
            return to_basis(self.ops.xp, array, basis, self.taps)

        other.W, other.x_mean = turned(self.W), turned(self.x_mean[None])[0]
        other.basis = basis if self.basis is None else basis @ self.basis
        other.samples = self.samples.turned(basis, self.taps)
        other.held = self.held.turned(basis, self.taps)
        if "scatter" in self.__dict__:
            other.scatter = turned(turned(self.scatter).T)
            other.start_correlation = turned(self.start_correlation)
        return other

    def regrouped(self) -> ResponseProblem:
        """The same problem with channels as the spatial form counts them, see `grouping`."""
        other = self._without("channel_gram")
        kernel_size = self.layer_io.kernel_size
        other.channels, other.taps = grouping("spatial", self.channels, kernel_size)
        return other

    def truncated(self, r: int) -> ResponseProblem:
        """The first r channels of a problem that is in a basis; its factorisation is shared."""
        width = r * self.taps
        other = self._without(*_COORDINATES)
        other.W, other.x_mean = self.W[:, :width], self.x_mean[:width]
        other.samples, other.held = self.samples.leading(r), self.held.leading(r)
        other.scatter = self.scatter[:width, :width]
        other.start_correlation = self.start_correlation[:, :width]
        other.metric = self.metric.leading(width)
        other.basis = self.basis[:r]
        return other


def ordered_metric(
    problem: ResponseProblem, structure: Structure, support: Array | None
) -> tuple[Metric, int]:
    """A metric whose first columns are the support, and how many those are."""
    if structure.r is not None:
        return problem.metric, structure.s * problem.taps
    return metric_of(problem, support)


def metric_of(problem: ResponseProblem, support: Array) -> tuple[Metric, int]:
    """A metric whose first columns are these, and how many those are."""
    return Metric(problem.ops, problem.G, columns_first(problem, support)), len(support)


def columns_first(problem: ResponseProblem, support: Array) -> Array:
    """All columns: those of a support, ascending, then the others."""
    xp = problem.ops.xp
    mask = xp.zeros(problem.width, dtype=bool)
    mask[xp.asarray(support, dtype=xp.int64)] = True
    return xp.concatenate([xp.flatnonzero(mask), xp.flatnonzero(~mask)])


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
