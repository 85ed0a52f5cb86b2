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

from .basis import linear_fit, refined, rotated
from .decomposition import Structure
from .errors import BudgetError, complain
from .layer_budget import LayerBudget, largest_basis, named_keep, round_down
from .problem import TINY, ResponseProblem
from .streamed import ESTIMATE_ROWS
from .support import SupportSearch, group_size

Array = Any

# A form without a basis is searched only if a rough estimate of its error is below so many times
# the error of the rotated form.
SCREEN = 1.2
# Below this relative error a layer is as good as exact, and no other form is searched.
NEGLIGIBLE = 1e-4
# What sums leave of an error that is none, for the linear objective; of either sign.
ROUNDING = 1e-12


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
        return (energy - explained + tail) / max(energy, TINY)

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
                f"keep of at least {named_keep(budget.smallest(form))} (form={form!r})",
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
        if problem.held_out_error(M) < SCREEN * to_beat:
            promising.append(form)
    return promising


def held_out_error(candidate: Candidate) -> float:
    """Held-out error, after the activation, of a candidate's closed form."""
    problem = candidate.problem
    _, M = linear_fit(problem, candidate.structure, candidate.support)
    return float(problem.held_out_error(M))


def _split(search: SupportSearch, budget: LayerBudget, form: str, share: float) -> Structure | None:
    """The structure that spends this share of the budget on A; None when nothing fits."""
    s = min(int(share * budget.weights / (budget.n * search.size)), search.groups)
    s = round_down(s, budget.unit(form))
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
    curve = RotatedCurve(rotated(problem, largest // 2))
    ranked = curve.best(budget, **splits)
    rows = curve.problem.groups
    if rows < largest and (not ranked or ranked[0][1].r > 0.9 * rows):
        curve = RotatedCurve(rotated(problem, largest))
        ranked = curve.best(budget, **splits)
    chosen = ranked[:1]
    chosen += [pair for pair in ranked if pair[1].s == 0][:1]
    chosen += [pair for pair in ranked if pair[1].k == 0][:1]
    unique = dict((pair[1], pair) for pair in chosen).values()
    near = 1.1 * max(ranked[0][0], 0.0) + ROUNDING
    close = [pair for pair in unique if pair[0] <= near]
    return [refined_candidate(curve.problem, structure) for _, structure in close]


def refined_candidate(ordered: ResponseProblem, structure: Structure) -> Candidate:
    """A structure in the basis that suits it best, of a problem that is `rotated`."""
    view, error = refined(ordered, structure)
    return Candidate(structure, error, view)


def _spatial(
    problem: ResponseProblem, budget: LayerBudget, shares: tuple[float, ...]
) -> list[Candidate]:
    """`_rotated`, with channels as the spatial form counts them."""
    found = _rotated(problem.regrouped(), budget.regrouped(), shares)
    return [
        replace(candidate, structure=replace(candidate.structure, form="spatial"))
        for candidate in found
    ]


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
        return [Candidate(best, linear_fit(problem, best, columns)[0], problem, columns)]
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
        error = support.error / max(problem.linear_energy, TINY)
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
