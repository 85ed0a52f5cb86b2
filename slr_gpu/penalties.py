"""The two penalties of Ma et al. 2018 and their hard-budget counterparts.

In: a weight-shaped array (n, m). Out: the value of the penalty, its prox, its hard threshold, and
the weight at which it wins altogether:

    ColumnSparse   ||A||_{2,1} = sum_g ||A_g||_F   prox: group soft threshold (their eq. 10)
    LowRank        ||B||_*     = sum_i sigma_i(B)  prox: singular value threshold (their eq. 12)

with g over groups of neighbouring columns: one column each in the paper, the kh * kw columns of a
channel for whole channels. A penalty of weight w keeps its variable at zero as long as w is at
least the dual norm of the gradient there; `critical_weight` is that number, so users can give
weights as fractions of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import InputError, complain
from .ops import NumpyOps

if TYPE_CHECKING:
    from .problem import ResponseProblem

Array = Any


# Columns that are taken to float64 at once.
CHUNK = 4096


def outer(ops: NumpyOps, A: Array) -> Array:
    """``A Aᵀ`` in float64."""
    if A.dtype == "float64":
        return A @ A.T
    total = ops.xp.zeros((len(A), len(A)))
    for start in range(0, A.shape[1], CHUNK):
        part = A[:, start : start + CHUNK].astype("float64")
        total += part @ part.T
    return total


def leading_vectors(ops: NumpyOps, gram: Array, k: int) -> Array:
    """Eigenvectors (n, k) of the largest eigenvalues of a symmetric matrix (n, n)."""
    return _signed(ops.xp, ops.xp.linalg.eigh(gram)[1][:, ::-1][:, :k])


def _signed(xp: Any, U: Array) -> Array:
    """Orthonormal columns with signs that do not depend on where they were computed."""
    return U * xp.sign(U[xp.argmax(xp.abs(U), axis=0), xp.arange(U.shape[1])])


def low_rank_projection(
    ops: NumpyOps, F: Array, k: int, *, vectors: bool = True
) -> tuple[Array, Array | None]:
    """Best rank-k approximation of F (n, w): ``(U Uᵀ F, U)``, U from the smaller Gram matrix.

    Without `vectors`, U may be None: it costs something where n > w.
    """
    xp = ops.xp
    n, width = F.shape
    k = min(k, n, width)
    if k == 0:
        return xp.zeros_like(F), xp.zeros((n, 0), dtype=F.dtype)
    if n <= width:
        U = leading_vectors(ops, outer(ops, F), k).astype(F.dtype, copy=False)
    else:
        right = leading_vectors(ops, outer(ops, F.T), k).astype(F.dtype, copy=False)
        if not vectors:
            return (F @ right) @ right.T, None
        U = _signed(xp, xp.linalg.qr(F @ right)[0])
    return U @ (U.T @ F), U


def gradient_at_zero(problem: ResponseProblem, *, convex: bool = True) -> Array:
    """Gradient in M of f(M, b) at M = 0 with the bias that is optimal there.

    ``-(2/P) Rᵀ Xc`` with R the masked residual of the constant response b. The bias starts at the
    mean target, which for ReLU, clamps and identity on l_c already is optimal, and is improved by
    minimising the majoriser of curvature c, ``b += mean(R) / c``, which never increases f.

    Parameters
    ----------
    problem : ResponseProblem
    convex : bool
        Of the surrogate l_c where the activation has one, else of the true loss.

    Returns
    -------
    float64 array, (n, m)
    """
    xp, activation = problem.ops.xp, problem.activation
    convex = convex and activation.has_convex_surrogate
    M = xp.zeros((problem.n, problem.width))
    (total,) = problem.sum_over_rows(lambda X, Y, Z: (Y.sum(axis=0, dtype="float64"),), wants="Y")
    bias = total / problem.rows
    RtX = M
    for _ in range(100):
        _, RtX, R_mean = problem.sweep(M, bias, convex=convex)
        if float(xp.max(xp.abs(R_mean))) <= 1e-7 * problem.target_energy**0.5:
            break
        bias = bias + R_mean / activation.curvature
    return -2.0 / problem.rows * RtX


def _check_count(name: str, count: int) -> None:
    if count < 0:
        raise InputError(complain(f"{name}={count}", "a count >= 0", "Pass 0 for none."))


@dataclass(frozen=True)
class ColumnSparse:
    """Sparsity over groups of neighbouring columns.

    Attributes
    ----------
    group_size : int
        Columns a group; divides m. 1 for single columns, kh * kw for input channels.
    """

    group_size: int = 1

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise InputError(
                complain(f"group_size={self.group_size}", "at least 1", "Use 1 for single columns.")
            )

    def norms(self, ops: Any, A: Array) -> Array:
        """Frobenius norm of every group, (m // group_size,)."""
        if A.shape[1] % self.group_size:
            raise InputError(
                complain(
                    f"{A.shape[1]} columns in groups of {self.group_size}",
                    "a group_size that divides the columns",
                    "Use the number of kernel taps, or 1.",
                )
            )
        squares = ops.xp.square(A).sum(axis=0).reshape(-1, self.group_size)
        return ops.xp.sqrt(squares.sum(axis=1))

    def value(self, ops: Any, A: Array) -> float:
        """``||A||_{2,1}``."""
        return float(self.norms(ops, A).sum())

    def prox(self, ops: Any, C: Array, tau: float) -> Array:
        """``argmin_A tau ||A||_{2,1} + 1/2 ||A - C||_F^2`` (Ma et al. 2018, eq. 10)."""
        return ops.column_shrink(C[None], tau, self.group_size)[0][0]

    def hard(self, ops: Any, C: Array, s: int, allowed: Array | None = None) -> Array:
        """Nearest array with at most s groups that are not zero (problem (2) of the paper).

        Parameters
        ----------
        C : array, (n, m)
        s : int
        allowed : bool array, (m // group_size,), optional
            Groups that may be kept.
        """
        _check_count("s", s)
        xp = ops.xp
        norms = self.norms(ops, C)
        if allowed is not None:
            norms = xp.where(allowed, norms, 0)
        # Of equal norms the leftmost group stays: the same input gives the same support.
        kept = xp.argsort(-norms, kind="stable")[:s]
        mask = xp.zeros(len(norms), dtype=bool)
        mask[kept] = norms[kept] > 0
        return xp.where(xp.repeat(mask, self.group_size)[None], C, 0)

    def critical_weight(self, problem: ResponseProblem, *, convex: bool = True) -> float:
        """The smallest lambda1 for which A = 0 is optimal, given B = 0.

        ``max_g ||(grad f(0, b*))_g||_F``, the dual (l2,inf) norm of the gradient of
        f(M, b) = (1/P) sum loss(Y, X Mᵀ + b) at M = 0 with its optimal bias b*: zero minimises
        f + lambda1 ||.||_{2,1} exactly when -grad f is in lambda1 times the unit dual ball.
        """
        return float(self.norms(problem.ops, gradient_at_zero(problem, convex=convex)).max())


@dataclass(frozen=True)
class LowRank:
    """Low rank through the singular values."""

    def value(self, ops: Any, B: Array) -> float:
        """``||B||_*``, the sum of the singular values."""
        return float(ops.xp.linalg.svd(B, compute_uv=False).sum())

    def prox(self, ops: Any, C: Array, tau: float) -> Array:
        """``argmin_B tau ||B||_* + 1/2 ||B - C||_F^2`` (Ma et al. 2018, eq. 12)."""
        return ops.svt(C[None], tau)[0][0]

    def hard(self, ops: Any, C: Array, k: int) -> Array:
        """Nearest array of rank at most k (Eckart and Young 1936)."""
        _check_count("k", k)
        return low_rank_projection(ops, C, k)[0]

    def critical_weight(self, problem: ResponseProblem, *, convex: bool = True) -> float:
        """The smallest lambda2 for which B = 0 is optimal, given A = 0.

        ``sigma_max(grad f(0, b*))``, the dual (spectral) norm of the gradient of
        f(M, b) = (1/P) sum loss(Y, X Mᵀ + b) at M = 0 with its optimal bias b*. With both
        lambda1 and lambda2 at least critical, A = B = 0 solves problem (3) on l_c.
        """
        gradient = gradient_at_zero(problem, convex=convex)
        return float(problem.ops.xp.linalg.svd(gradient, compute_uv=False)[0])
