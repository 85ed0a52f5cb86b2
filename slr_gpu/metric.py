"""The geometry that a layer's inputs give its weights: ``||M||_G^2 = ||Xc Mᵀ||^2 + rho ||M||^2``.

In: a `ResponseProblem`. Out: one of two forms of the same metric, which the problem chooses by its
size (`slr_gpu.problem`), with the same operations on points F, each of which stands for a weight M:

    `Metric`      G = Xcᵀ Xc + rho I = L Lᵀ is formed, F = M L ;
    `RowMetric`   only K = Xc Xcᵀ + rho I (P, P) is, F = [M, M Xcᵀ] .

The second is for many columns m and fewer rows P (DESIGN 2, consequence 3). It needs no G because
``Xc G⁻¹ = K⁻¹ Xc``, and because for a set S of columns with K_S = X_S X_Sᵀ + rho I

    H = rho (I + X_cᵀ K_S⁻¹ X_c) ,      G_cs G_ss⁻¹ = X_cᵀ K_S⁻¹ X_S

are the Schur complement of S and the weights with which S stands in for the other columns.
Sums and differences of points are the points of sums and differences, so solvers need not know
which of the two they work with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .ops import NumpyOps
from .penalties import leading_vectors, low_rank_projection, outer

if TYPE_CHECKING:
    from .problem import ResponseProblem

Array = Any


class Metric:
    """A Cholesky factor of the Gram matrix, with its columns in a chosen order.

    With ``G = L Lᵀ`` and F = M L, ``||M||_G = ||F||_F``. The factor of the leading columns is the
    leading block of L, and the Schur complement of a leading set S is ``L_cc L_ccᵀ``: one
    factorisation answers for every leading set (DESIGN 2, consequence 2).
    """

    def __init__(self, ops: NumpyOps, G: Array, order: Array | None = None) -> None:
        self.ops, self.order, self._G = ops, order, G

    @cached_property
    def L(self) -> Array:
        """The factor, made when a point is first asked for."""
        G = self._G if self.order is None else self._G[self.order].take(self.order, axis=1)
        return self.ops.cholesky(G)

    def leading(self, width: int) -> Metric:
        """The metric of the first columns: the leading block of L."""
        other = copy.copy(self)
        other.L, other._G = self.L[:width, :width], None
        return other

    def whiten(self, rhs: Array) -> Array:
        """``F = rhs L^-T`` of right-hand sides (n, m) in the problem's column order."""
        rhs = rhs if self.order is None else rhs[:, self.order]
        return self.ops.solve_triangular(self.L, rhs.T).T

    def weight(self, F: Array) -> Array:
        """``M = F L^-1``, in the problem's column order."""
        width = F.shape[1]
        M = self.ops.solve_triangular(self.L[:width, :width], F.T, transposed=True).T
        if self.order is None:
            return M
        result = self.ops.xp.empty_like(M)
        result[:, self.order] = M
        return result

    def point(self, M: Array) -> Array:
        """F of a weight (n, m)."""
        return (M if self.order is None else M[:, self.order]) @ self.L

    def target(self, problem: ResponseProblem) -> Array:
        """F of the unrestricted minimiser of the linear problem."""
        return self.whiten(problem.start_rhs)

    def sweep(
        self, problem: ResponseProblem, F: Array, M: Array, bias: Array, residual: Callable
    ) -> tuple[Array, Array, Array]:
        """`ResponseProblem.residuals` at the point F of M: loss, ``Rᵀ Xc``, mean of R."""
        return problem.residuals(M, bias, residual)

    def step(self, problem: ResponseProblem, F: Array, M: Array, correlation: Array) -> Array:
        """``(Rᵀ Xc + rho (W - M)) G⁻¹`` as a point, from what `sweep` returned at M."""
        return self.whiten(correlation + problem.rho * (problem.W - M))

    def project(
        self, F: Array, kept: int, k: int, *, vectors: bool = True
    ) -> tuple[Array, Array, Array | None]:
        """Nearest ``(A on S) + (rank k elsewhere)`` to F, S being the first `kept` columns.

        Parameters
        ----------
        F : array
        kept, k : int
        vectors : bool
            Whether U is wanted.

        Returns
        -------
        F, M, U : array, (n, m), (n, m), (n, k)
            The projection as a point and as a weight (DESIGN 2, consequence 2).
        """
        low_rank, U = low_rank_projection(self.ops, F[:, kept:], k, vectors=vectors)
        F = self.ops.xp.concatenate([F[:, :kept], low_rank], axis=1)
        return F, self.weight(F), U

    def missed(self, problem: ResponseProblem, F: Array) -> float:
        """Linear error, times P, at a projection F of the `target`."""
        return problem.linear_energy - float(self.ops.xp.sum(F**2))

    def explained(self, problem: ResponseProblem) -> Explained:
        """What leading columns explain of the linear problem."""
        return Explained(problem, self.target(problem))

    def increments(
        self, problem: ResponseProblem, X: Array, widths: list[int]
    ) -> Iterator[tuple[Array, Array]]:
        """What more columns add, from one width to the next, beginning with none.

        Parameters
        ----------
        X : array, (p, m)
            Other rows, in the problem's coordinates and column order.
        widths : list of int
            Ascending; of the columns in the metric's order.

        Yields
        ------
        responses : array, (p, n)
            How the responses on X change, of the linear minimiser on these columns alone.
        gram : float64 array, (n, n)
            ``T_c H T_cᵀ``: what the added columns explain.
        """
        F, H = self.target(problem), self.whiten(X.astype("float64")).astype(X.dtype)
        for low, high in pairwise([0, *widths]):
            part = F[:, low:high]
            yield H[:, low:high] @ part.astype(X.dtype).T, part @ part.T

    def product(self, problem: ResponseProblem, N: Array) -> Array:
        """``N G``."""
        return N @ problem.scatter + problem.rho * N

    def lacking(
        self,
        problem: ResponseProblem,
        N: Array,
        view: ResponseProblem,
        M: Array,
        across: Array | None,
    ) -> Array:
        """``(T - N) G`` (n, m) for the minimiser T of the linear problem.

        Parameters
        ----------
        N : array, (n, m)
            A weight.
        view : ResponseProblem
            The problem in a basis.
        M : array
            The same weight in that basis.
        across : array or None
            `ResponseProblem.across` of that basis.
        """
        return problem.start_correlation - M @ across + problem.rho * (problem.W - N)


class Explained:
    """What sets of leading columns explain, from the whitened target F of the linear problem."""

    def __init__(self, problem: ResponseProblem, F: Array) -> None:
        xp = problem.ops.xp
        self.ops, self.F = problem.ops, F
        squares = xp.square(F).sum(axis=0)
        self._energies = self.ops.to_numpy(xp.concatenate([xp.zeros(1), xp.cumsum(squares)]))

    def energy(self, width: int) -> float:
        """Linear energy that the first columns explain, times P."""
        return float(self._energies[width])

    def spectrum(self, start: int, end: int) -> Array:
        """Eigenvalues of ``T_c H T_cᵀ``, descending, on the host.

        S are the columns before `start`, T that of the columns before `end`.
        """
        part = self.F[:, start:end]
        return spectrum(self.ops, part @ part.T if len(part) <= end - start else part.T @ part)


class RowMetric:
    """The metric from inner products of rows.

    Parameters
    ----------
    problem : ResponseProblem
    order : int array, (m,), optional
        The columns in the order in which `project` counts them.
    """

    def __init__(self, problem: ResponseProblem, order: Array | None = None) -> None:
        self.ops, self.order, self.rho = problem.ops, order, problem.rho
        self.X, self.gram = problem.samples.X, problem.row_gram
        self.L = factor(self.ops, self.gram, self.rho)
        self._first: tuple[int, Array] | None = None  # the last `kept`, and its factor

    def weight(self, F: Array) -> Array:
        return F[:, : self.X.shape[1]]

    def point(self, M: Array) -> Array:
        M = M.astype(self.X.dtype, copy=False)
        return self.ops.xp.concatenate([M, M @ self.X.T], axis=1)

    def _responses(self, F: Array) -> Array:
        """``Xc Mᵀ`` (P, n)."""
        return F[:, self.X.shape[1] :].T

    def _pulled(self, N: Array, responses: Array, R: Array) -> Array:
        """``(Rᵀ Xc + rho N) G⁻¹ = N + (R - Xc Nᵀ)ᵀ K⁻¹ Xc``, given the responses ``Xc Nᵀ``."""
        B = solve_both(self.ops, self.L, (R - responses).astype("float64"))
        dtype = self.X.dtype
        M = B.astype(dtype).T @ self.X
        M += N
        moved = responses + self.gram @ B
        return self.ops.xp.concatenate([M, moved.T.astype(dtype)], axis=1)

    def target(self, problem: ResponseProblem) -> Array:
        return self._pulled(problem.W, problem.weight_responses, problem.centred_responses)

    def sweep(
        self, problem: ResponseProblem, F: Array, M: Array, bias: Array, residual: Callable
    ) -> tuple[Array, Array, Array]:
        """As `Metric.sweep`, but with R (P, n), less its mean, for ``Rᵀ Xc``."""
        samples = problem.samples
        R, loss = residual(self._responses(F), samples.Y, problem.centred_bias(M, bias))
        mean = R.mean(axis=0, dtype="float64")
        # Xc is centred, but only to rounding, which K⁻¹ would make much of.
        R -= mean.astype(R.dtype)
        return loss / problem.rows, R, mean

    def step(self, problem: ResponseProblem, F: Array, M: Array, correlation: Array) -> Array:
        responses = problem.weight_responses - self._responses(F)
        return self._pulled(problem.W - M, responses, correlation)

    def project(
        self, F: Array, kept: int, k: int, *, vectors: bool = True
    ) -> tuple[Array, Array, Array | None]:
        xp, m, dtype = self.ops.xp, self.X.shape[1], self.X.dtype
        S = slice(0, kept) if self.order is None else self.order[:kept]
        T, responses = F[:, :m], self._responses(F)
        X_S, T_S = self.X[:, S], T[:, S]
        rest = T.copy()
        rest[:, S] = 0
        # Responses to the columns outside S, and what S cannot stand in for of them.
        outside = responses - X_S @ T_S.T if kept else responses
        L = self._factor_of(kept, X_S)
        left = self.ops.solve_triangular(L, outside.astype("float64"))
        k = min(k, len(T), m - kept)
        U = leading_vectors(self.ops, self.rho * (outer(self.ops, rest) + left.T @ left), k)
        narrow = U.astype(dtype)
        M = xp.empty_like(F)
        M[:, :m] = narrow @ (narrow.T @ rest)
        # A takes over on S what U V leaves of the responses.
        outside = outside - (outside @ narrow) @ narrow.T
        B = solve_both(self.ops, L, outside.astype("float64"))
        if kept:
            M[:, S] = T_S + B.astype(dtype).T @ X_S
        M[:, m:] = (responses - self.rho * B).T
        return M, M[:, :m], U

    def _factor_of(self, kept: int, X_S: Array) -> Array:
        """Cholesky factor of K_S."""
        if self._first is None or self._first[0] != kept:
            self._first = kept, factor(self.ops, outer(self.ops, X_S), self.rho)
        return self._first[1]

    def missed(self, problem: ResponseProblem, F: Array) -> float:
        xp, pulled = self.ops.xp, self.weight(F) - problem.W
        error = problem.centred_responses - self._responses(F)
        pull = float(xp.square(pulled, out=pulled).sum(dtype="float64")) + problem.cut_energy
        return float(xp.square(error).sum(dtype="float64")) + self.rho * pull

    def explained(self, problem: ResponseProblem) -> RowExplained:
        return RowExplained(problem)

    def increments(
        self, problem: ResponseProblem, X: Array, widths: list[int]
    ) -> Iterator[tuple[Array, Array]]:
        found = RowExplained(problem, self.order)
        X = X if self.order is None else X[:, self.order]
        for low, high in pairwise([0, *widths]):
            added = found.responses(X, high) - found.responses(X, low)
            yield added, found.left(low) - found.left(high)

    def product(self, problem: ResponseProblem, N: Array) -> Array:
        N = N.astype(self.X.dtype, copy=False)
        return (N @ self.X.T) @ self.X + self.rho * N

    def lacking(
        self,
        problem: ResponseProblem,
        N: Array,
        view: ResponseProblem,
        M: Array,
        across: Array | None,
    ) -> Array:
        R = problem.centred_responses - view.samples.X @ M.astype(self.X.dtype, copy=False).T
        return R.astype(self.X.dtype).T @ self.X + self.rho * (problem.W - N)


class RowExplained:
    """`Explained` from the rows.

    With the first columns alone, the linear problem leaves of ``||Zc||^2 + rho ||W||^2``

        rho (W_c W_cᵀ + Dᵀ K_S⁻¹ D) ,    D = Zc - X_S W_Sᵀ ,

    as an (n, n) matrix; what more columns explain is the difference of two of these.
    """

    # Sums over rows are kept at so many sizes; those between start from the one before.
    STOPS = 16

    def __init__(self, problem: ResponseProblem, order: Array | None = None) -> None:
        self.problem, self.X, self.W = problem, problem.samples.X, problem.W
        if order is not None:
            self.X, self.W = self.X[:, order], self.W[:, order]
        self._left: dict[int, Array] = {}
        self._sums: dict[int, tuple[Array, Array]] = {}

    def _sum(self, width: int) -> tuple[Array, Array]:
        """``X_S X_Sᵀ`` and ``Zc - X_S W_Sᵀ`` of the first columns."""
        problem, xp = self.problem, self.problem.ops.xp
        if width == 0:
            return xp.zeros((problem.rows, problem.rows)), problem.centred_responses
        if width not in self._sums:
            unit = max(1, -(-problem.width // self.STOPS))
            start = (width - 1) // unit * unit
            gram, D = self._sum(start)
            X = self.X[:, start:width]
            sums = gram + outer(problem.ops, X), D - X @ self.W[:, start:width].T
            if width % unit and width != problem.width:
                return sums
            self._sums[width] = sums
        return self._sums[width]

    def left(self, width: int) -> Array:
        """What the first columns leave, (n, n)."""
        if width not in self._left:
            problem, ops = self.problem, self.problem.ops
            gram, D = self._sum(width)
            half = ops.solve_triangular(factor(ops, gram, problem.rho), D.astype("float64"))
            rest = outer(ops, self.W[:, width:])
            self._left[width] = problem.rho * (rest + half.T @ half)
        return self._left[width]

    def responses(self, X: Array, width: int) -> Array:
        """Responses (p, n) of the minimiser on the first columns alone to other rows."""
        ops, (gram, D) = self.problem.ops, self._sum(width)
        B = solve_both(ops, factor(ops, gram, self.problem.rho), D.astype("float64"))
        part = X[:, :width]
        across = part @ self.X[:, :width].T
        return part @ self.W[:, :width].T + across @ B.astype(X.dtype)

    def energy(self, width: int) -> float:
        return float(self.problem.ops.xp.trace(self.left(0) - self.left(width)))

    def spectrum(self, start: int, end: int) -> Array:
        return spectrum(self.problem.ops, self.left(start) - self.left(end))


def spectrum(ops: NumpyOps, gram: Array) -> Array:
    """Eigenvalues of a positive semi-definite matrix, descending, on the host."""
    if not len(gram):
        return ops.to_numpy(ops.xp.zeros(0))
    return ops.to_numpy(ops.xp.linalg.eigvalsh(gram))[::-1].clip(min=0)


def factor(ops: NumpyOps, gram: Array, rho: float | Array) -> Array:
    """Lower Cholesky factor of ``gram + rho I``, or of ``gram + diag(rho)``."""
    diagonal = ops.xp.arange(len(gram))
    system = gram.copy()
    system[diagonal, diagonal] += rho
    return ops.cholesky(system)


def solve_both(ops: NumpyOps, L: Array, rhs: Array) -> Array:
    """``(L Lᵀ)⁻¹ rhs``."""
    return ops.solve_triangular(L, ops.solve_triangular(L, rhs), transposed=True)
