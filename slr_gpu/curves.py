"""How small the error of a layer can be at a given cost: closed-form curves over (form, r, s, k).

In: a `ResponseProblem` and a `LayerBudget`. Out: `Candidate`s, best first, each with everything a
solver needs to start (DESIGN 2 and 3). With F = T L the whitened target of the linear problem in
the rotated basis, in the order of the basis, one factorisation answers for every r and s:

    error(r, s, k) = E_0 - ||F[:, :r taps]||^2 + sum_{i > k} lambda_i(F_c F_cᵀ),
    F_c = F[:, s taps : r taps],

because the factor of leading columns is the leading block of L, and its trailing block is the
factor of the Schur complement.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .decomposition import Structure
from .errors import BudgetError, complain
from .layer_budget import LayerBudget, largest_basis
from .problem import ResponseProblem, ordered_metric
from .streamed import ESTIMATE_ROWS
from .support import SupportSearch, group_size

Array = Any

# A form without a basis is searched only if a rough estimate of its error is below so many times
# the error of the rotated form.
SCREEN = 1.2
# Below this relative error a layer is as good as exact, and no other form is searched.
NEGLIGIBLE = 1e-4


@dataclass(frozen=True, eq=False)
class Candidate:
    """A structure at its closed-form best.

    Attributes
    ----------
    structure : Structure
    error : float
        Linear error relative to the energy of the centred responses.
    problem : ResponseProblem
        In the coordinates of the structure's basis.
    support : array or None
        Kept columns, for the forms without a basis.
    """

    structure: Structure
    error: float
    problem: ResponseProblem
    support: Array | None = None


def rotation(problem: ResponseProblem, weight: Array) -> Array:
    """An orthogonal basis (groups, groups) of the input channels, by what a weight responds to.

    The rows span, for every r, the best r-dimensional input projection of the weight over
    channels in the metric of the channel Gram (taps averaged): with C = R Rᵀ the mean over taps
    of G's channel blocks and W (n * taps, c), the leading right singular vectors of W R, brought
    back by R^-T and orthonormalised in order.
    """
    xp = problem.ops.xp
    c, taps = problem.groups, problem.taps
    R = xp.linalg.cholesky(problem.channel_gram)
    over_channels = weight.reshape(-1, c, taps).transpose(0, 2, 1).reshape(-1, c)
    weighted = over_channels @ R
    right = xp.linalg.eigh(weighted.T @ weighted)[1][:, ::-1]
    rows = problem.ops.solve_triangular(R, right, transposed=True)  # columns: R^-T v
    Q = xp.linalg.qr(rows)[0]
    Q = Q * xp.sign(Q[xp.argmax(xp.abs(Q), axis=0), xp.arange(c)])
    return Q.T


def rotated(problem: ResponseProblem, rows: int) -> ResponseProblem:
    """The problem in its best basis of so many rows.

    The original weight chooses the rows; within them the regression of the wanted responses on
    the actual inputs, which differs when a compressed prefix distorts these, sets the order.
    """
    wide = problem.in_basis(rotation(problem, problem.W)[:rows])
    return wide.in_basis(rotation(wide, wide.target))


class RotatedCurve:
    """Errors of the rotated form over (r, s, k), from one factorisation.

    Parameters
    ----------
    problem : ResponseProblem
        In a basis whose rows are in order, see `rotated`.
    """

    def __init__(self, problem: ResponseProblem) -> None:
        self.problem = problem
        self.explained = problem.metric.explained(problem)
        self._spectra: dict[tuple[int, int], Any] = {}

    def spectrum(self, r: int, s: int) -> Any:
        """Eigenvalues of ``F_c F_cᵀ``, descending."""
        if (r, s) not in self._spectra:
            taps = self.problem.taps
            self._spectra[r, s] = self.explained.spectrum(s * taps, r * taps)
        return self._spectra[r, s]

    def error(self, structure: Structure) -> float:
        """Linear error of a structure, relative to the energy of the responses."""
        r, s, k = structure.r, structure.s, structure.k
        tail = float(self.spectrum(r, s)[k:].sum()) if r > s else 0.0
        energy = self.problem.linear_energy
        explained = self.explained.energy(r * self.problem.taps)
        return (energy - explained + tail) / max(energy, 1e-30)

    def best(
        self,
        budget: LayerBudget,
        *,
        grid: int = 8,
        splits: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    ) -> list[tuple[float, Structure]]:
        """Structures within the budget by error: a coarse grid over (r, s / r), then refinement.

        k is always the largest that fits. Returned best first; among them are the best with
        s = 0 (Tucker-2) and the best with k = 0 (an input projection alone), where they fit.
        `splits` are the s / r to start from; one alone is not refined.
        """
        found: dict[tuple[int, int], tuple[float, Structure]] = {}
        largest = min(largest_basis(budget), self.problem.groups)
        unit = budget.unit("rotated")

        def look(r: float, s: float) -> None:
            r = min(max(int(round(r)), 1), largest)
            r = max(r - r % unit, 1)
            s = min(max(int(round(s)), 0), r)
            s -= s % unit
            if (r, s) in found:
                return
            k = budget.largest_rank("rotated", s, r)
            if k == 0:  # nothing reads the others
                r = s
            if k >= 0 and r > 0:
                structure = Structure("rotated", s, k, r)
                found[r, s] = (self.error(structure), structure)

        for i in range(grid):
            r = largest * ((i + 1) / grid) ** 1.5
            for share in splits:
                look(r, share * r)
        if not found:
            return []
        step_r, step_s = largest / (2 * grid), 0.125
        while step_r >= max(1.0, unit / 2) and step_s > 0.02:
            best = min(found.values(), key=lambda pair: pair[0])[1]
            r, s = best.r, best.s
            for dr in (-step_r, 0.0, step_r):
                for ds in (-step_s, 0.0, step_s) if len(splits) > 1 else (0.0,):
                    look(r + dr, (s / r + ds) * (r + dr))
            step_r, step_s = step_r / 2, step_s / 2
        return sorted(found.values(), key=lambda pair: pair[0])


def candidates(
    problem: ResponseProblem,
    budget: LayerBudget,
    *,
    form: str = "auto",
    shares: tuple[float, ...] = (0.0, 0.4, 0.65, 0.85, 1.0),
    rounds: int = 4,
) -> list[Candidate]:
    """The best structures within a budget by their linear error, best first.

    Parameters
    ----------
    problem : ResponseProblem
        In the layer's own coordinates.
    budget : LayerBudget
    form : {"auto", "columns", "channels", "rotated", "spatial"}
        ``auto`` takes the best of the first three; linear layers have no ``rotated``, and their
        channels are their columns.
    shares : tuple of float
        Shares of the budget to spend on A that are tried for the forms without a basis;
        ``(0.0,)`` leaves A out of the forms with one, too.
    rounds : int
        Exchange rounds of the support.

    Raises
    ------
    BudgetError
        When nothing fits; the message names the smallest keep that would.
    """
    found: list[Candidate] = []
    spatial = problem.taps > 1
    if form in ("auto", "rotated") and spatial:
        found += _rotated(problem, budget, shares)
    if form == "spatial":
        budget = replace(budget, kernel_size=problem.layer_io.kernel_size)
        found += _spatial(problem, budget, shares)
    # On single-tap layers channels are columns.
    others = [f for f in ("columns", "channels") if form in ("auto", f)]
    if form == "auto" and not spatial:
        others = ["columns"]
    if found and others:
        others = _promising(problem, budget, others, found[0])
    for other in others:
        found += _supported(problem, budget, other, shares, rounds)
    if not found:
        raise BudgetError(
            complain(
                f"a budget of {budget.weights:.0f} weights for a layer"
                f" ({budget.n}, {budget.channels}, {budget.taps} taps)",
                f"keep of at least {budget.smallest(form):.3g} (form={form!r})",
                "Raise keep, or leave the layer out.",
            )
        )
    return sorted(found, key=lambda candidate: candidate.error)


def _promising(
    problem: ResponseProblem, budget: LayerBudget, forms: list[str], rival: Candidate
) -> list[str]:
    """Forms without a basis whose rough held-out error is near that of a rival's closed form.

    Rough: at a usual split, with a support grown in one batch on a few thousand rows and V taken
    from the original weight, so that no (m, m) matrix is factorised.
    """
    if not problem.held.rows:
        return forms
    to_beat = held_out_error(rival)
    if to_beat < NEGLIGIBLE:
        return []
    thin = problem.thinned(ESTIMATE_ROWS)
    promising = []
    for form in forms:
        search = SupportSearch(thin, group_size(form, thin.taps), exact=False)
        structure = _split(search, budget, form, 0.7)
        if structure is None:
            continue
        M = search.weight(search.grow(structure.s, structure.k, steps=1))
        if problem.held_out_error(M, problem.linear_bias(M)) < SCREEN * to_beat:
            promising.append(form)
    return promising


def held_out_error(candidate: Candidate) -> float:
    """Held-out error, after the activation, of a candidate's closed form."""
    problem = candidate.problem
    _, M = _closed_form(problem, candidate.structure, candidate.support)
    return float(problem.held_out_error(M, problem.linear_bias(M)))


def _split(search: SupportSearch, budget: LayerBudget, form: str, share: float) -> Structure | None:
    """The structure that spends this share of the budget on A; None when nothing fits."""
    s = min(int(share * budget.weights / (budget.n * search.size)), search.groups)
    s -= s % budget.unit(form)
    k = budget.largest_rank(form, s)
    return None if k < 0 or (k == 0 and s == 0) else Structure(form, s, k)


def _rotated(
    problem: ResponseProblem, budget: LayerBudget, shares: tuple[float, ...]
) -> list[Candidate]:
    splits = {} if any(shares) else {"splits": (0.0,)}
    largest = largest_basis(budget)
    if not largest:
        return []
    # The best r is mostly far below the largest: look there first, it costs a quarter.
    rows = largest if largest < 16 else largest // 2
    curve = RotatedCurve(rotated(problem, rows))
    ranked = curve.best(budget, **splits)
    if not ranked or ranked[0][1].r > 0.9 * rows:
        curve = RotatedCurve(rotated(problem, largest))
        ranked = curve.best(budget, **splits)
    chosen = ranked[:1]
    chosen += [pair for pair in ranked if pair[1].s == 0][:1]
    chosen += [pair for pair in ranked if pair[1].k == 0][:1]
    unique = dict((pair[1], pair) for pair in chosen).values()
    close = [pair for pair in unique if pair[0] <= 1.1 * ranked[0][0]]
    return [refine_basis(curve.problem, structure) for _, structure in close]


def _spatial(
    problem: ResponseProblem, budget: LayerBudget, shares: tuple[float, ...]
) -> list[Candidate]:
    """`_rotated`, with channels as the spatial form counts them."""
    found = _rotated(problem.regrouped(), budget.regrouped(), shares)
    return [
        replace(candidate, structure=replace(candidate.structure, form="spatial"))
        for candidate in found
    ]


def refine_basis(problem: ResponseProblem, structure: Structure, *, rounds: int = 2) -> Candidate:
    """Alternate between the closed form in a basis and the best basis for its factors.

    For fixed factors M' = A + U V the basis P minimises ``||(M' (P ⊗ I) - T) L||^2``, a linear
    least-squares problem in P (r, c), solved by conjugate gradients preconditioned by the
    Kronecker product of ``M' M'ᵀ`` and the channel Gram.

    Parameters
    ----------
    problem : ResponseProblem
        In a basis wider than r, ordered; the new one is sought within it.
    structure : Structure
        Rotated.
    """
    xp = problem.ops.xp
    view = problem.truncated(structure.r)
    basis = xp.eye(structure.r, problem.groups)
    error, M = _closed_form(view, structure)
    for _ in range(rounds if structure.r < problem.groups else 0):
        trial_basis = _best_basis(problem, M.reshape(problem.n, structure.r, -1), basis)
        trial = problem.in_basis(trial_basis)
        trial_error, trial_M = _closed_form(trial, structure)
        if trial_error >= error:
            break
        view, basis, error, M = trial, trial_basis, trial_error, trial_M
    return Candidate(structure, error, view)


def _closed_form(
    problem: ResponseProblem, structure: Structure, support: Array | None = None
) -> tuple[float, Array]:
    """Relative linear error and weight of the closed form."""
    metric, kept = ordered_metric(problem, structure, support)
    F, M, _ = metric.project(metric.target(problem), kept, structure.k, vectors=False)
    return metric.missed(problem, F) / max(problem.linear_energy, 1e-30), M


def _best_basis(problem: ResponseProblem, M: Array, basis: Array, steps: int = 5) -> Array:
    """Orthonormal rows spanning the best basis for the factors M (n, r, taps), near `basis`."""
    xp = problem.ops.xp
    n, r, taps = M.shape

    def expand(P):
        return xp.einsum("nrt,rc->nct", M, P, optimize=True).reshape(n, -1)

    def contract(N):
        return xp.einsum("nrt,nct->rc", M, N.reshape(n, -1, taps), optimize=True)

    factors = xp.einsum("nrt,nst->rs", M, M, optimize=True)
    factors = factors + (1e-6 * xp.trace(factors) / r + 1e-30) * xp.eye(r)

    def precondition(residual):
        return xp.linalg.solve(problem.channel_gram, xp.linalg.solve(factors, residual).T).T

    metric = problem.metric
    residual = contract(metric.lacking(problem, expand(basis)))
    direction = scaled = precondition(residual)
    power = xp.sum(residual * scaled)
    for _ in range(steps):
        if not power > 0:  # the basis is exact already
            break
        moved = contract(metric.product(problem, expand(direction)))
        step = power / xp.sum(direction * moved)
        basis, residual = basis + step * direction, residual - step * moved
        scaled = precondition(residual)
        previous, power = power, xp.sum(residual * scaled)
        direction = scaled + power / previous * direction
    # Rows in order: A on the first s absorbs what orthogonalisation mixes into the later ones.
    return xp.linalg.qr(basis.T)[0].T


def _supported(
    problem: ResponseProblem,
    budget: LayerBudget,
    form: str,
    shares: tuple[float, ...],
    rounds: int,
) -> list[Candidate]:
    """The two best splits between A and U V for a form without a basis.

    They are found without exchange rounds; only these two are then improved. Where looks at all
    columns are dear, one elimination is all the search, and the best split of it is returned.
    """
    search = SupportSearch(problem, group_size(form, problem.taps))
    splits = [_split(search, budget, form, share) for share in shares]
    structures = {split.s: split for split in splits if split is not None}
    if not structures:
        return []
    # One elimination passes all the sizes, at the rank of the middle one.
    ranks = [structures[s].k for s in sorted(structures)]
    shrunk = search.shrink(list(structures), ranks[len(ranks) // 2])
    if not search.patient:
        errors = {s: search.evaluate(shrunk[s], split.k).error for s, split in structures.items()}
        best = structures[min(errors, key=errors.get)]
        columns = search.evaluate(shrunk[best.s], best.k).columns
        # The search has seen few of the rows.
        return [Candidate(best, _closed_form(problem, best, columns)[0], problem, columns)]
    tried = [
        (search.starts(s, structure.k, 2, shrunk[s])[0].error, s)
        for s, structure in structures.items()
    ]
    found = []
    for _, s in sorted(tried)[:2]:
        k = structures[s].k
        # What has no A cannot be improved by another support.
        starts = search.starts(s, k, 4) if s else [search.evaluate(shrunk[s], k)]
        support = search.improved(starts, k, rounds)
        error = support.error / max(problem.linear_energy, 1e-30)
        found.append(Candidate(structures[s], error, problem, support.columns))
    return found


def best_candidate(found: list[Candidate]) -> Candidate:
    """The candidate with the least held-out error; of the first ones, where they are many.

    Held-out rows separate candidates whose linear errors are close; the rest cannot win.
    """
    if len(found) == 1 or not found[0].problem.held.rows:
        return found[0]
    # Inputs that hardly vary leave errors of rounding, which may be below zero.
    close = [c for c in found if c.error <= 1.25 * max(found[0].error, 0.0) + 1e-6]
    return min(close, key=held_out_error)
