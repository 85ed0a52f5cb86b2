"""The linear problem on a set S of columns: what it leaves, and how other columns relate to it.

In: a `ResponseProblem` and columns. Out: the matrices from which `slr_gpu.support` scores groups of
columns, with T = rhs G⁻¹ the unrestricted minimiser and H the Schur complement of S,

    T_c H T_cᵀ ,    T_c H ,    the blocks H_gg ,    A on S alone ,    (G_ss⁻¹)_gg ,

in one of the two forms that a problem has (`slr_gpu.metric`). From G, nothing larger than S is
factorised:

    T_c H T_cᵀ = T G Tᵀ - rhs_s G_ss⁻¹ rhs_sᵀ ,      T_c H = rhs_c - rhs_s G_ss⁻¹ G_sc .

From the rows, with K_S = X_S X_Sᵀ + rho I, D = Zc - X_S W_Sᵀ and B = K_S⁻¹ D, nothing has more rows
than the data:

    what S leaves is rho (W_c W_cᵀ + Dᵀ B) ,         T_c H = rho (Bᵀ X_c + W_c) ,
    H = rho (I + X_cᵀ K_S⁻¹ X_c) ,                   G_ss⁻¹ = (I - X_Sᵀ K_S⁻¹ X_S) / rho .
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .metric import factor, solve_both
from .penalties import CHUNK, outer

if TYPE_CHECKING:
    from .problem import ResponseProblem
    from .support import Support

Array = Any


class Solved(NamedTuple):
    """The problem on S alone.

    Attributes
    ----------
    L : array
        Cholesky factor of G_ss, or of K_S.
    half : array
        ``L⁻¹ rhs_sᵀ``, or ``L⁻¹ D``.
    left : float
        Linear error, times P, of the best A on S.
    rest : array, (n, n)
        ``T_c H T_cᵀ``, what the other columns could still explain.
    """

    L: Array
    half: Array
    left: float
    rest: Array


class GramSubsets:
    """Subsets from the Gram matrix.

    Parameters
    ----------
    problem : ResponseProblem
    size : int
        Neighbouring columns a group.
    exact : bool
        False takes the original weight for T, which it nearly is: no factorisation of G.
    """

    def __init__(self, problem: ResponseProblem, size: int, exact: bool) -> None:
        self.problem, self.size, self.G = problem, size, problem.G
        self.groups = problem.width // size
        self.rhs = problem.start_rhs
        if not exact:
            self.target = problem.W
        elif problem.n <= problem.width:
            self.target = problem.target
        else:
            # Turning the outputs changes nothing, and leaves no more of them than columns.
            self.rhs = problem.ops.xp.linalg.qr(self.rhs, mode="r")
            self.target = problem.metric.weight(problem.metric.whiten(self.rhs))
        gram = self.target @ self.rhs.T
        self.target_gram = (gram + gram.T) / 2  # T G Tᵀ

    def solve(self, columns: Array) -> Solved:
        """The problem on these columns alone."""
        ops, xp = self.problem.ops, self.problem.ops.xp
        rhs = self.rhs[:, columns]
        L, half, rest = xp.zeros((0, 0)), xp.zeros((0, len(rhs))), self.target_gram
        if len(columns):
            L = ops.cholesky(self.G[columns].take(columns, axis=1))
            half = ops.solve_triangular(L, rhs.T)
            rest = rest - half.T @ half
        return Solved(L, half, self.problem.linear_energy - float(xp.sum(half**2)), rest)

    def coupling(self, support: Support) -> tuple[Array, Array]:
        """``T_c H`` (n, m) and the blocks H_gg (groups, size, size); both vanish on S."""
        ops, xp = self.problem.ops, self.problem.ops.xp
        index = xp.arange(self.problem.width).reshape(self.groups, self.size)
        blocks, correlation = self.G[index[:, :, None], index[:, None, :]], self.rhs
        if len(support.columns):
            cross = ops.solve_triangular(support.solved.L, self.G[support.columns])
            correlation = correlation - support.solved.half.T @ cross
            blocks = blocks - _blocks(xp, cross, self.size)
        return correlation, blocks

    def alone(self, support: Support) -> Array:
        """The best A on S without U V, (n, |S|); beside it A differs in what U reaches."""
        solved = support.solved
        return self.problem.ops.solve_triangular(solved.L, solved.half, transposed=True).T

    def weight(self, support: Support) -> Array:
        """The weight (n, m) of a support: ``U Uᵀ T`` outside it, the best A on it."""
        M = support.U @ (support.U.T @ self.target)
        if len(support.columns):
            M[:, support.columns] = 0
            rhs = self.rhs[:, support.columns] - M @ self.G[:, support.columns]
            M[:, support.columns] = solve_both(self.problem.ops, support.solved.L, rhs.T).T
        return M

    def inverse_blocks(self, support: Support) -> Array:
        """``(G_ss⁻¹)_gg`` for the groups of S, (|S| / size, size, size)."""
        ops = self.problem.ops
        return _blocks(ops.xp, ops.triangular_inverse(support.solved.L), self.size)


class RowSubsets:
    """Subsets from inner products of rows; T is always the minimiser."""

    def __init__(self, problem: ResponseProblem, size: int) -> None:
        self.problem, self.size = problem, size
        self.groups = problem.width // size
        ops, self.X, self.W = problem.ops, problem.samples.X, problem.W
        self.F = problem.metric.target(problem)
        self.weight_gram = outer(ops, self.W)
        D = (problem.centred_responses - problem.weight_responses).astype("float64")
        half = ops.solve_triangular(problem.metric.L, D)
        self.least = problem.rho * (half.T @ half)  # what all columns leave

    def solve(self, columns: Array) -> Solved:
        problem = self.problem
        ops, xp, rho = problem.ops, problem.ops.xp, problem.rho
        if len(columns) == problem.width:
            gram, D, rest = problem.row_gram, problem.weight_responses, 0.0
        else:
            X, W = self.X[:, columns], self.W[:, columns]
            gram, D, rest = outer(ops, X), X @ W.T, self.weight_gram - outer(ops, W)
        L = factor(ops, gram, rho)
        half = ops.solve_triangular(L, (problem.centred_responses - D).astype("float64"))
        left = rho * (rest + half.T @ half)
        return Solved(L, half, float(xp.trace(left)), left - self.least)

    def coupling(self, support: Support) -> tuple[Array, Array]:
        problem, (L, half, _, _) = self.problem, support.solved
        xp, dtype = problem.ops.xp, self.X.dtype
        B = problem.ops.solve_triangular(L, half, transposed=True)
        correlation = problem.rho * (B.astype(dtype).T @ self.X + self.W)
        blocks = problem.rho * (xp.eye(self.size) + self._products(L, self.X))
        return correlation, blocks

    def alone(self, support: Support) -> Array:
        solved, columns = support.solved, support.columns
        B = self.problem.ops.solve_triangular(solved.L, solved.half, transposed=True)
        return self.W[:, columns] + B.astype(self.X.dtype).T @ self.X[:, columns]

    def weight(self, support: Support) -> Array:
        ops, dtype = self.problem.ops, self.X.dtype
        m, columns, U = self.problem.width, support.columns, support.U.astype(dtype)
        M = U @ (U.T @ self.F[:, :m])
        X, T = self.X[:, columns], self.F[:, columns]
        outside = self.F[:, m:].T - X @ T.T
        outside = outside - (outside @ U) @ U.T
        B = solve_both(ops, support.solved.L, outside.astype("float64"))
        M[:, columns] = T + B.astype(dtype).T @ X
        return M

    def inverse_blocks(self, support: Support) -> Array:
        xp = self.problem.ops.xp
        products = self._products(support.solved.L, self.X[:, support.columns])
        return (xp.eye(self.size) - products) / self.problem.rho

    def _products(self, L: Array, X: Array) -> Array:
        """``X_gᵀ K_S⁻¹ X_g`` for groups of columns (groups, size, size)."""
        ops, step = self.problem.ops, max(1, CHUNK // self.size) * self.size
        parts = [
            _blocks(
                ops.xp,
                ops.solve_triangular(L, X[:, start : start + step].astype("float64")),
                self.size,
            )
            for start in range(0, X.shape[1], step)
        ]
        return ops.xp.concatenate(parts)


def _blocks(xp: Any, A: Array, size: int) -> Array:
    """``A_gᵀ A_g`` for groups of `size` neighbouring columns of A, (groups, size, size)."""
    if size == 1:
        return xp.einsum("sg,sg->g", A, A)[:, None, None]
    grouped = A.reshape(len(A), -1, size).transpose(1, 2, 0)
    return xp.matmul(grouped, grouped.transpose(0, 2, 1))
