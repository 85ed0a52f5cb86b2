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

Of more than `WIDEST` columns no Gram matrix is formed: the problem works `by_rows`, in the other
form of the same metric (`slr_gpu.metric`), on at most `MOST_ROWS` rows.
"""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable
from functools import cached_property
from typing import Any

from .activations import Activation
from .decomposition import Structure, grouping
from .errors import InputError, complain
from .layer_io import LayerIO
from .metric import Metric, RowMetric
from .ops import NumpyOps
from .penalties import outer
from .samples import Samples, to_basis
from .streamed import ESTIMATE_ROWS, split_samples

Array = Any

# The Gram matrix is added up in float64 after each block: fewer, larger ones.
GRAM_BLOCK = 16384
# Gram matrices of so many multiply-adds are formed in float64, which takes half a second then: what
# float32 leaves of rounding differs with the blocks that rows are cut into, and with the ranks that
# hold them, and the small eigenvalues of G make much of it.
PRECISE = 2e10
# Rows of a layer whose responses take so many multiply-adds are worked on in float64 altogether. In
# float32 a last bit that falls otherwise on other ranks is 1e-6 of a gradient, for residuals are
# small beside responses; the layers behind see it, and of two nearly equal columns take the other.
PRECISE_RESPONSES = 1e9
# The most columns whose Gram matrix is formed: that, its ridge and its factor take 3 GB then.
WIDEST = 11_000
# The most rows that a problem by rows is fitted on: its solves grow with their square.
MOST_ROWS = 2048
# The unit of what has none: energies that are zero.
TINY = 1e-300
# Rounding of targets at the ends of the activation's range, relative to them.
ROUNDING = 1e-6
# Cached attributes that belong to one choice of coordinates and rows.
_COORDINATES = (
    "scatter",
    "G",
    "metric",
    "channel_scatter",
    "channel_gram",
    "start_correlation",
    "target",
    "row_gram",
    "weight_responses",
    "centred_responses",
)


def check_shares(ridge: float, held_out: float) -> None:
    """InputError for a ridge or a share of held-out rows out of range."""
    if not isinstance(held_out, numbers.Real) or not 0 <= held_out <= 0.5:
        raise InputError(
            complain(f"held_out={held_out!r}", "a fraction in [0, 0.5]", "0.1 is usual.")
        )
    if not isinstance(ridge, numbers.Real) or not 0 < ridge < math.inf:
        raise InputError(
            complain(f"ridge={ridge!r}", "a positive fraction", "1e-3 is usual; 1e-6 is small.")
        )


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
    fold : int
        Which rows are held out, see `LayerIO.split`.
    by_rows : bool
        Work by rows even where the Gram matrix could be formed.

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
    by_rows : bool
        Whether the metric is that of the rows, and W in the dtype of the data.
    proven : bool
        Whether the activation's curvature bounds the loss: targets are then in its range.
    notes : tuple of str
        For the report.
    """

    def __init__(
        self,
        layer_io: LayerIO,
        *,
        ops: NumpyOps,
        ridge: float = 1e-3,
        held_out: float = 0.1,
        activation: Activation | None = None,
        fold: int = 0,
        by_rows: bool = False,
    ) -> None:
        check_shares(ridge, held_out)
        self.ops, self.layer_io = ops, layer_io
        self.channels, self.taps = layer_io.channels, layer_io.taps
        self.activation = layer_io.activation if activation is None else activation
        self.basis: Array | None = None
        fitted, held = layer_io.split(held_out, fold)
        group = layer_io.group
        before, total = group.span(len(fitted))
        if total < 2:
            raise InputError(
                complain(f"{total} row(s) to fit on", "at least 2", "Pass more, or held_out=0.")
            )
        xp, (n, m) = ops.xp, layer_io.weight.shape
        small = total * n * m <= PRECISE_RESPONSES
        dtype = xp.dtype("float64") if small else layer_io.dtype
        self.by_rows, self.notes = by_rows or m > WIDEST, ()
        if self.by_rows and total > MOST_ROWS:
            step = -(-total // MOST_ROWS)
            fitted = fitted[-before % step :: step]
            self.notes = (f"fitted on {-(-total // step)} of {total} rows: {m} columns",)
        self.W = ops.asarray(layer_io.weight, dtype if self.by_rows else xp.float64)
        self.bias = ops.asarray(layer_io.bias, xp.float64)
        # A linear fit aims at the response before the activation, held-out stays after it.
        self.samples, make_held, judging = split_samples(
            layer_io,
            ops,
            fitted,
            held,
            dtype,
            linear=self.activation.is_identity,
            whole=self.by_rows,
        )
        if len(judging) < len(held):
            self.notes += (f"judged on {len(judging)} of {len(held)} held-out rows",)
        energy = self._centre()
        self.held = make_held()
        self.held.centre(self.x_mean)
        if self.by_rows:
            self.samples = self.samples.gathered()
        self.rho = ridge * self._ridge_unit
        self._energies = (energy, self._weight_energy())

    def _centre(self) -> float:
        """Centre the inputs, set what tells the scales of the problem, and return ``||Zc||^2``.

        Centring comes before squaring: nearly constant inputs would leave only rounding after it.
        That takes a pass for the means and another for the squares. Where means are known roughly
        beforehand, one pass does: with d the mean of what they leave,
        ``sum (x - d)^2 = sum x^2 - P d^2`` then loses nothing. A convolution's `channel_scatter`,
        with which most fits begin, is taken along in that pass.
        """
        xp, samples, rough = self.ops.xp, self.samples, self.samples.rough_means
        dtype = samples.dtype

        def squares(*arrays):
            return tuple(xp.square(array).sum(dtype="float64") for array in arrays)

        def means(X, Y, Z):
            return X.sum(axis=0, dtype="float64"), Z.sum(axis=0, dtype="float64")

        if rough is None:
            sums = samples.sum(means, block=GRAM_BLOCK, wants="XZ")
            self.x_mean, self.z_mean = (total / self.rows for total in sums)
            samples.centre(self.x_mean)
            z_mean = self.z_mean.astype(dtype)
            energy, wanted, outside = samples.sum(
                lambda X, Y, Z: (*squares(Z - z_mean, Y), self._outside(Y)),
                block=GRAM_BLOCK,
                wants="YZ",
            )
        else:
            x_rough, z_rough = (mean.astype(dtype) for mean in rough)

            def everything(X, Y, Z):
                product = (self._channel_product(X - x_rough),) if self.taps > 1 else ()
                return *squares(Z - z_rough, Y), self._outside(Y), *means(X, Y, Z), *product

            sums = samples.sum(everything, block=GRAM_BLOCK)
            energy, wanted, outside, x_sum, z_sum, *product = sums
            self.x_mean, self.z_mean = x_sum / self.rows, z_sum / self.rows
            samples.centre(self.x_mean)
            x_left, z_left = self.x_mean - x_rough, self.z_mean - z_rough
            energy = energy - self.rows * (z_left @ z_left)
            for total in product:
                by_taps = x_left.reshape(-1, self.taps)
                self.channel_scatter = total - self.rows * (by_taps @ by_taps.T)
        # The mean diagonal of the Gram matrix: some thousand rows tell it.
        some = samples.thinned(-(-self.rows // ESTIMATE_ROWS))
        (inputs,) = some.sum(lambda X, Y, Z: squares(X), wants="X")
        # Inputs that vary by less than their rounding have no scale to tell; zeros have none at all.
        spread = float(inputs) / some.rows / self.width
        rounding = float(xp.finfo(dtype).eps) ** 2 * float(xp.square(self.x_mean).mean())
        self._ridge_unit = (max(spread, rounding) or 1.0) * self.rows
        self.target_energy = max(float(wanted) / self.rows, TINY)
        self.proven = self.activation.exact and not float(outside)
        if not all(map(math.isfinite, (float(energy), self.target_energy, self._ridge_unit))):
            raise InputError(
                complain(
                    f"inputs or responses whose squares overflow {dtype}",
                    "numbers of a usual size",
                    "Scale them.",
                )
            )
        return max(float(energy), 0.0)

    def _outside(self, Y: Array) -> Array:
        """How many targets no response can reach."""
        low, high = (
            end + side * ROUNDING * abs(end) if math.isfinite(end) else end
            for side, end in zip((-1, 1), self.activation.range, strict=True)
        )
        return ((Y < low) | (Y > high)).sum(dtype="float64")

    def _weight_energy(self) -> float:
        """``||W||^2``."""
        return float(self.ops.xp.einsum("nm,nm->", self.W, self.W, dtype="float64"))

    @cached_property
    def scatter(self) -> Array:
        """``Xcᵀ Xc`` (m, m), float64.

        Raises
        ------
        InputError
            For more than `WIDEST` columns.
        """
        if self.width > WIDEST:
            gigabytes = 3 * 8 * self.width**2 / 1e9
            raise InputError(
                complain(
                    f"a layer of {self.width} columns for a solver that works with their Gram"
                    f" matrix ({gigabytes:.0f} GB with its factor)",
                    f"at most {WIDEST} columns",
                    "Use Majorize, Zhang or WhitenedSVD.",
                )
            )
        if "start_correlation" in self.__dict__:
            (scatter,) = self._products(lambda X, Y, Z: (X.T @ X,), "X")
            return scatter
        # Whoever needs one needs the other: one pass for both.
        scatter, self.start_correlation = self._products(lambda X, Y, Z: (X.T @ X, Z.T @ X), "XZ")
        return scatter

    def _products(self, function: Callable[..., tuple[Array, ...]], wants: str) -> tuple:
        """Sums of products of rows, in the large blocks that suit them."""
        small = self.rows * self.width**2 <= PRECISE
        dtype = self.ops.xp.dtype("float64") if small else self.samples.dtype

        def products(*arrays):
            return function(*(None if a is None else a.astype(dtype, copy=False) for a in arrays))

        return self.samples.sum(products, block=GRAM_BLOCK, largest=GRAM_BLOCK, wants=wants)

    @cached_property
    def G(self) -> Array:
        """``Xcᵀ Xc + rho I`` (m, m), float64."""
        diagonal = self.ops.xp.arange(self.width)
        G = self.scatter.copy()
        G[diagonal, diagonal] += self.rho
        return G

    @cached_property
    def channel_scatter(self) -> Array:
        """Sum over taps of the scatter's diagonal channel blocks (c, c)."""
        if "scatter" not in self.__dict__:  # no (m, m) matrix is formed for it
            return self._products(lambda X, Y, Z: (self._channel_product(X),), "X")[0]
        blocks = self.scatter.reshape(self.groups, self.taps, self.groups, self.taps)
        return self.ops.xp.einsum("itjt->ij", blocks)

    def _channel_product(self, X: Array) -> Array:
        """`channel_scatter` of a block of rows."""
        rows = X.reshape(-1, self.groups, self.taps).transpose(0, 2, 1).reshape(-1, self.groups)
        return rows.T @ rows

    @cached_property
    def channel_gram(self) -> Array:
        """Mean over taps of G's diagonal channel blocks (c, c)."""
        return self.channel_scatter / self.taps + self.rho * self.ops.xp.eye(self.groups)

    def with_ridge(self, ridge: float) -> ResponseProblem:
        """The same problem with another ridge, sharing the arrays over samples."""
        # Computed once, then shared.
        if self.by_rows:
            self.row_gram, self.weight_responses  # noqa: B018
        else:
            self.scatter, self.start_correlation  # noqa: B018
        other = self._without("G", "metric", "target", "channel_gram")
        other.rho = ridge * self._ridge_unit
        return other

    def as_by_rows(self) -> ResponseProblem:
        """The same problem by rows."""
        if self.by_rows:
            return self
        other = self._without("metric")
        other.by_rows, other.W = True, self.W.astype(self.samples.dtype)
        other.samples = self.samples.gathered()
        return other

    def thinned(self, rows: int) -> ResponseProblem:
        """A problem on about so many of the fitted rows, evenly spread, for rough estimates."""
        step = -(-self.rows // rows)
        if step == 1:
            return self
        other = self._without(*_COORDINATES, "target_energy")
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
    def metric(self) -> Metric | RowMetric:
        """The metric in the problem's own column order."""
        return self.ordered_metric(None)

    def ordered_metric(self, order: Array | None) -> Metric | RowMetric:
        """The metric with columns in some order, in the form that suits the problem's size."""
        return RowMetric(self, order) if self.by_rows else Metric(self.ops, self.G, order)

    # -- the linear problem ------------------------------------------------------------------

    @cached_property
    def start_correlation(self) -> Array:
        """``D = Zcᵀ Xc`` (n, m), float64."""
        return self._products(lambda X, Y, Z: (Z.T @ X,), "XZ")[0]

    @property
    def start_rhs(self) -> Array:
        """Right-hand side of the linear problem, ``D + rho W``."""
        return self.start_correlation + self.rho * self.W

    @cached_property
    def target(self) -> Array:
        """Unrestricted minimiser ``T = rhs G⁻¹`` (n, m) of the linear problem."""
        return self.metric.weight(self.metric.target(self))

    @property
    def linear_energy(self) -> float:
        """``||Zc||^2 + rho ||W||^2``: the linear objective of M = 0, times P.

        In the coordinates of a basis still that of the whole problem, so that what the basis
        cuts off counts as error.
        """
        response, weight = self._energies
        return response + self.rho * weight

    @property
    def cut_energy(self) -> float:
        """``||W||^2`` outside the coordinates of a basis, which counts as error too."""
        return 0.0 if self.basis is None else self._energies[1] - self._weight_energy()

    # -- the same by rows ----------------------------------------------------------------------

    @cached_property
    def row_gram(self) -> Array:
        """``Xc Xcᵀ`` (P, P), float64."""
        return outer(self.ops, self.samples.X)

    @cached_property
    def weight_responses(self) -> Array:
        """``Xc Wᵀ`` (P, n)."""
        return self.samples.X @ self.W.T

    @cached_property
    def centred_responses(self) -> Array:
        """``Zc`` (P, n)."""
        return self.samples.Z - self.z_mean.astype(self.samples.dtype)

    def linear_bias(self, M: Array) -> Array:
        """The best bias of M before the activation."""
        return self.z_mean - self.at_mean(M)

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
        return self.residuals(M, bias, self.masked(convex), gradient=gradient)

    def masked(self, convex: bool) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
        """The function of `residuals` that the masked residual is."""

        def residual(Z, Y, b):
            R, loss = self.ops.masked_gradient(
                Z[None], Y[None], self.activation, bias=b, convex=convex
            )
            return R[0], loss[0]

        return residual

    def residuals(
        self,
        M: Array,
        bias: Array,
        residual: Callable[[Array, Array, Array], tuple[Array, Array]],
        *,
        gradient: bool = True,
    ) -> tuple[Array, Array | None, Array | None]:
        """`sweep` with any residual.

        Parameters
        ----------
        residual : callable
            Of a block's ``Xc Mᵀ`` (p, n), Y (p, n) and the bias (1, n) that goes with centred
            inputs. Returns R (p, n) and a loss.
        """
        Mt, b = M.astype(self.samples.dtype, copy=False).T, self.centred_bias(M, bias)

        def block(X, Y, Z):
            R, loss = residual(X @ Mt, Y, b)
            return (loss, R.T @ X, R.sum(axis=0, dtype="float64")) if gradient else (loss,)

        loss, *rest = self.samples.sum(block, wants="XY")
        RtX, total = rest or (None, None)
        return loss / self.rows, RtX, None if total is None else total / self.rows

    def sum_over_rows(
        self, function: Callable[[Array, Array, Array], tuple[Array, ...]], wants: str = "XYZ"
    ) -> tuple[Array, ...]:
        """Sum what a function returns for every block of the fitted rows, in float64.

        Parameters
        ----------
        function : callable
            Of a block's rows (X, Y, Z): centred inputs (p, m) in the problem's coordinates,
            responses wanted after (p, n) and before (p, n) the activation. Returns arrays.
        wants : str
            Which of X, Y and Z it looks at.
        """
        return self.samples.sum(function, wants=wants)

    def at_mean(self, M: Array) -> Array:
        """``M x_mean`` (n,), the response of M to the mean input; M is not copied to float64."""
        return (M @ self.x_mean.astype(M.dtype, copy=False)).astype("float64", copy=False)

    def centred_bias(self, M: Array, bias: Array) -> Array:
        """The bias that goes with centred inputs, (1, n), in the dtype of the data."""
        return (bias + self.at_mean(M)).astype(self.samples.dtype)[None]

    def objective(self, M: Array, bias: Array, *, convex: bool = False) -> float:
        """``f(M, bias)``, the loss per sample without the ridge."""
        return float(self.sweep(M, bias, convex=convex, gradient=False)[0])

    @cached_property
    def target_energy(self) -> float:
        """``||Y||^2 / P``, the unit of relative errors."""
        return max(self._energy(self.samples) / self.rows, TINY)

    def _energy(self, samples: Samples) -> float:
        """``||Y||^2`` of some rows."""
        square = self.ops.xp.square
        (energy,) = samples.sum(lambda X, Y, Z: (square(Y).sum(dtype="float64"),), wants="Y")
        return float(energy)

    def relative_error(self, M: Array, bias: Array) -> float:
        """``||Y - r(Z)||^2 / ||Y||^2`` on the fitted rows."""
        return self.objective(M, bias) / self.target_energy

    def held_out_error(self, M: Array, bias: Array | None = None) -> Array:
        """``||Y - r(Z)||^2 / ||Y||^2`` on the held-out rows, after the layer's own activation.

        A scalar on the device, NaN without held-out rows. The bias is `linear_bias` by default.
        """
        if not self.held.rows:
            return self.ops.xp.full((), float("nan"))
        bias = self.linear_bias(M) if bias is None else bias
        Mt, b = M.astype(self.held.dtype, copy=False).T, self.centred_bias(M, bias)
        activation = self.layer_io.activation

        def squares(X, Y, Z):
            loss = self.ops.masked_gradient((X @ Mt)[None], Y[None], activation, bias=b)[1]
            return (loss[0],)

        return self.held.sum(squares)[0] / self.held_energy

    @cached_property
    def held_energy(self) -> float:
        """``||Y||^2`` of the held-out rows."""
        return max(self._energy(self.held), TINY)

    # -- coordinates -----------------------------------------------------------------------------

    def across(self, basis: Array) -> Array | None:
        """``E Xcᵀ Xc`` (r taps, m) of a basis (r, groups); None by rows, where it is not formed."""
        if self.by_rows:
            return None
        return to_basis(self.ops.xp, self.scatter, basis, self.taps).T

    def in_basis(self, basis: Array, across: Array | None = None) -> ResponseProblem:
        """The same problem in the coordinates X' = X Eᵀ (DESIGN 2).

        Parameters
        ----------
        basis : array, (r, groups)
            Orthonormal rows, so that the ridge stays a multiple of the identity. Applied after
            the basis that the problem already has.
        across : array, optional
            What `across` gives, where it is known.
        """
        other = self._without(*_COORDINATES)

        def turned(array):
            return to_basis(self.ops.xp, array, basis, self.taps)

        other.W, other.x_mean = turned(self.W), turned(self.x_mean[None])[0]
        other.basis = basis if self.basis is None else basis @ self.basis
        other.samples = self.samples.turned(basis, self.taps)
        other.held = self.held.turned(basis, self.taps)
        other.by_rows = self.by_rows and other.width > other.rows
        if across is None and "scatter" in self.__dict__:
            across = turned(self.scatter).T
        if across is not None:
            other.scatter = turned(across)
            other.start_correlation = turned(self.start_correlation)
        return other

    def regrouped(self) -> ResponseProblem:
        """The same problem with channels as the spatial form counts them, see `grouping`."""
        other = self._without("channel_scatter", "channel_gram")
        kernel_size = self.layer_io.kernel_size
        other.channels, other.taps = grouping("spatial", self.channels, kernel_size)
        return other

    def in_outputs(self, frame: Array) -> ResponseProblem:
        """The linear problem for the coordinates ``Qᵀ M`` of its solutions.

        Parameters
        ----------
        frame : array, (n, r)
            Q, orthonormal columns that span those of the right-hand sides: no solution, however
            restricted, then reaches outside them. Rows of samples keep all n outputs.
        """
        self.scatter  # noqa: B018  with it, changes of basis turn the sums and not the rows
        other = self._without("target")
        other.W = frame.T @ self.W
        other.start_correlation = frame.T @ self.start_correlation
        return other

    def truncated(self, r: int) -> ResponseProblem:
        """The first r channels of a problem that is in a basis; its factorisation is shared."""
        width = r * self.taps
        other = self._without(*_COORDINATES)
        other.W, other.x_mean = self.W[:, :width], self.x_mean[:width]
        other.samples, other.held = self.samples.leading(r), self.held.leading(r)
        other.basis = self.basis[:r]
        other.by_rows = self.by_rows and width > other.rows
        if not self.by_rows:
            other.scatter = self.scatter[:width, :width]
            other.start_correlation = self.start_correlation[:, :width]
            other.metric = self.metric.leading(width)
        return other


def ordered_metric(
    problem: ResponseProblem, structure: Structure, support: Array | None
) -> tuple[Metric | RowMetric, int]:
    """A metric whose first columns are the support, and how many those are."""
    if structure.r is not None:
        return problem.metric, structure.s * problem.taps
    return metric_of(problem, support)


def metric_of(problem: ResponseProblem, support: Array) -> tuple[Metric | RowMetric, int]:
    """A metric whose first columns are these, and how many those are."""
    return problem.ordered_metric(columns_first(problem, support)), len(support)


def columns_first(problem: ResponseProblem, support: Array) -> Array:
    """All columns: those of a support, ascending, then the others."""
    xp = problem.ops.xp
    mask = xp.zeros(problem.width, dtype=bool)
    mask[xp.asarray(support, dtype=xp.int64)] = True
    return xp.concatenate([xp.flatnonzero(mask), xp.flatnonzero(~mask)])
