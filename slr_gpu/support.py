"""Which columns (or input channels) the sparse part A keeps.

In: a `ResponseProblem`, how many groups s and which rank k. Out: the kept columns. What is known of
a set S of columns comes from `slr_gpu.subsets`; with T the unrestricted minimiser of the linear
problem and H the Schur complement of S, the error of S beside U V of rank k is what A alone leaves,
less the k largest eigenvalues of ``T_c H T_cᵀ``. Groups are added in batches where they help most,
or dropped where they help least, then exchanged, by (at fixed U, one group at a time, both exact)

    gain of adding g:    || (I - U Uᵀ) (T_c H)_g H_gg^{-1/2} ||^2
    cost of dropping g:  || (I - U Uᵀ) A_g ((G_ss⁻¹)_gg)^{-1/2} ||^2 ,

the second being the saliency of optimal brain surgery, less what U absorbs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .decomposition import Structure
from .problem import ResponseProblem
from .subsets import GramSubsets, RowSubsets, Solved

Array = Any

# Of problems by rows: rows that choose a support, and the multiply-adds of one look at all columns
# above which few looks are taken.
SEARCH_ROWS = 1024
MANY = 4e9
# Share of the energy below which an eigenvalue is rounding.
NOTHING = 1e-12


@dataclass
class Support:
    """A support and what was computed with it."""

    groups: Array
    columns: Array
    error: float
    U: Array
    solved: Solved


class SupportSearch:
    """Supports of one problem for one group size.

    Parameters
    ----------
    problem : ResponseProblem
    size : int
        Columns a group: 1, or the kernel's taps for whole channels.
    exact : bool
        See `GramSubsets`; with False only `evaluate` and `grow` make sense.

    Attributes
    ----------
    problem : ResponseProblem
        On fewer rows where it is by rows.
    patient : bool
        Whether looks at all columns are cheap.
    """

    def __init__(self, problem: ResponseProblem, size: int, *, exact: bool = True) -> None:
        if problem.by_rows:
            problem = problem.thinned(SEARCH_ROWS)
            self.subsets = RowSubsets(problem, size)
        else:
            self.subsets = GramSubsets(problem, size, exact)
        self.problem, self.size = problem, size
        self.groups = problem.width // size
        self.patient = not problem.by_rows or problem.rows**2 * problem.width < MANY

    def evaluate(self, groups: Array, k: int) -> Support:
        """Linear error (times P) of the best A on `groups` with the best U V of rank k."""
        xp = self.problem.ops.xp
        columns = (groups[:, None] * self.size + xp.arange(self.size)[None]).reshape(-1)
        solved = self.subsets.solve(columns)
        if not k:
            return Support(groups, columns, solved.left, solved.rest[:, :0], solved)
        values, vectors = xp.linalg.eigh(solved.rest)
        values = values[::-1][:k].clip(min=0)
        # Directions in which nothing is left are noise.
        count = int((values > NOTHING * self.problem.linear_energy).sum())
        U = vectors[:, ::-1][:, :count]
        return Support(groups, columns, solved.left - float(values.sum()), U, solved)

    def gains(self, support: Support) -> Array:
        """What adding each group would save at fixed U; -inf inside the support."""
        xp = self.problem.ops.xp
        correlation, blocks = self.subsets.coupling(support)
        correlation = correlation - support.U @ (support.U.T @ correlation)
        # Inside the support H vanishes; the floor only keeps the inverse finite there.
        blocks = blocks + self.problem.rho * 1e-3 * xp.eye(self.size)
        gains = self._energy(correlation, blocks)
        gains[support.groups] = -xp.inf
        return gains

    def weight(self, support: Support) -> Array:
        """The weight (n, m) of a support: ``U Uᵀ T`` outside it, the best A on it."""
        return self.subsets.weight(support)

    def costs(self, support: Support) -> Array:
        """What dropping each group of the support would cost at fixed U."""
        A = self.subsets.alone(support)
        A = A - support.U @ (support.U.T @ A)
        return self._energy(A, self.subsets.inverse_blocks(support))

    def grow(self, s: int, k: int, steps: int) -> Support:
        """Add groups in `steps` batches."""
        xp = self.problem.ops.xp
        support = self.evaluate(xp.arange(0), k)
        for step in range(steps):
            count = s * (step + 1) // steps - len(support.groups)
            if count:
                added = xp.argsort(-self.gains(support), kind="stable")[:count]
                groups = xp.sort(xp.concatenate([support.groups, added]))
                support = self.evaluate(groups, k)
        return support

    def shrink(self, sizes: list[int], k: int) -> dict[int, Array]:
        """Drop groups from the full set in batches; the groups that are left at each size.

        Backward elimination beside U V of rank k. A batch is a share of what is left.
        """
        xp, share = self.problem.ops.xp, 0.25 if self.patient else 0.5
        support, left = self.evaluate(xp.arange(self.groups), k), {}
        for s in sorted(set(sizes), reverse=True):
            while len(support.groups) > s:
                count = max(s, len(support.groups) - max(1, int(share * len(support.groups))))
                kept = xp.argsort(-self.costs(support), kind="stable")[:count]
                support = self.evaluate(xp.sort(support.groups[kept]), k)
            left[s] = support.groups
        return left

    def starts(self, s: int, k: int, steps: int, shrunk: Array | None = None) -> list[Support]:
        """Supports to improve, best first: grown beside U V of rank k, grown without it, shrunk.

        A large A hides in the leading singular vectors at first, and is found without U V; a
        small one is found only beside it. Elimination sees how columns stand in for one another.

        Parameters
        ----------
        shrunk : int array, optional
            Groups from `shrink`; eliminated here by default.
        """
        found = [self.grow(s, k, steps)]
        if k and s:
            found.append(self.evaluate(self.grow(s, 0, steps).groups, k))
        if s:
            groups = self.shrink([s], k)[s] if shrunk is None else shrunk
            found.append(self.evaluate(groups, k))
        return sorted(found, key=lambda support: support.error)

    def swap(self, support: Support, k: int, tries: int = 4) -> Support | None:
        """One group replaced by another, with a lower error; None when none is found.

        The gains are those without the group that goes, of the few that cost least.
        """
        xp = self.problem.ops.xp
        for group in support.groups[xp.argsort(self.costs(support), kind="stable")[:tries]]:
            without = self.evaluate(support.groups[support.groups != group], k)
            gains = self.gains(without)
            gains[group] = -xp.inf
            groups = xp.concatenate([without.groups, xp.argmax(gains)[None]])
            trial = self.evaluate(xp.sort(groups), k)
            if trial.error < support.error:
                return trial
        return None

    def improved(self, starts: list[Support], k: int, rounds: int) -> Support:
        """The best support that exchanges lead to from any of some starts, then swaps."""
        ends = [self.exchange(start, k, rounds) for start in starts]
        best = min(ends, key=lambda support: support.error)
        for _ in range(rounds if 0 < len(best.groups) < self.groups else 0):
            better = self.swap(best, k)
            if better is None:
                break
            best = better
        return best

    def exchange(self, support: Support, k: int, rounds: int) -> Support:
        """Swap the groups that cost least for those that gain most, while the error falls."""
        xp = self.problem.ops.xp
        if not len(support.groups):
            return support
        most = max(1, len(support.groups) // 2)
        for _ in range(rounds):
            gains, costs = self.gains(support), self.costs(support)
            q = min(most, len(costs), self.groups - len(costs))
            add = xp.argsort(-gains, kind="stable")[:q]
            drop = xp.argsort(costs, kind="stable")[:q]
            q = int(xp.sum(gains[add] > costs[drop]))
            while q:
                mask = xp.zeros(self.groups, dtype=bool)
                mask[support.groups] = True
                mask[add[:q]] = True
                mask[support.groups[drop[:q]]] = False
                trial = self.evaluate(xp.flatnonzero(mask), k)
                if trial.error < support.error:
                    support, most = trial, q
                    break
                q //= 2
            if not q:
                break
        return support

    def _energy(self, B: Array, blocks: Array) -> Array:
        """``trace(B_g blocks_g⁻¹ B_gᵀ)`` for groups of columns of B."""
        xp = self.problem.ops.xp
        if self.size == 1:
            return xp.einsum("ng,ng->g", B, B) / blocks[:, 0, 0]
        grouped = B.reshape(len(B), -1, self.size).transpose(1, 0, 2)
        products = xp.matmul(grouped.transpose(0, 2, 1), grouped)
        return xp.einsum("gij,gji->g", xp.linalg.inv(blocks), products)


def group_size(form: str, taps: int) -> int:
    """Columns that A keeps or drops together."""
    return 1 if form == "columns" else taps


def select_support(
    problem: ResponseProblem, structure: Structure, *, steps: int = 4, rounds: int = 6
) -> tuple[Array, float]:
    """Choose S for a form without a basis.

    Parameters
    ----------
    problem : ResponseProblem
    structure : Structure
        ``form`` columns or channels, with s groups and rank k.
    steps, rounds : int
        Batches in which groups are added, and exchange rounds after that.

    Returns
    -------
    columns : int array
        Kept columns, ascending.
    error : float
        Error of the linear problem, times P.
    """
    search = SupportSearch(problem, group_size(structure.form, problem.taps))
    s = min(structure.s, search.groups)
    if search.patient:
        support = search.improved(search.starts(s, structure.k, steps), structure.k, rounds)
    else:
        support = search.evaluate(search.shrink([s], structure.k)[s], structure.k)
    return support.columns, support.error
