"""Single entries plus low rank by greedy bilateral smoothing (Yu, Liu, Wang and Tao 2017).

In: a `ResponseProblem`, how many entries S may have and the rank of U V. Out: a `Decomposition`
of the form ``entries``, with W ~ M = S + U V and S anywhere. The layer's responses are
reconstructed, ``||Zc - Xc Mᵀ||^2 + rho ||M - W||^2 = const + ||T - M||_G^2`` with T the
unrestricted minimiser, by alternating over

    U    = orthonormal columns of (T - S) G Vᵀ,   V = Uᵀ (T - S)        (QR only)
    S    = the entries that save most, found by thresholding, then least squares on them

while the rank grows greedily along the directions in which most of the residual is left. Before
that the same alternation runs smoothed: M is a third variable, tied to S + U V by a penalty that
grows from weak to strong, so that entries are chosen gradually and with what the others can make
up for. To look through the activation, T is moved to the minimiser of its majoriser
(`slr_gpu.solvers.majorize`) in every later iteration. No decomposition but QR and Cholesky is used.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any, ClassVar

from ..curves import Candidate
from ..decomposition import Decomposition, Status, Structure
from ..errors import BudgetError, InputError, complain
from ..layer_budget import LayerBudget, named_keep
from ..problem import TINY, ResponseProblem
from .base import Solver, check_counts, check_tolerance
from .bilateral import (
    BilateralState,
    alternate,
    empty_state,
    exchange,
    grow,
    place_low_rank,
    refine,
    smooth,
    stiffness,
    threshold,
)
from .majorize import FLATTER, HELD_OUT_GAIN, MajorizeState, assemble

Array = Any

# Shares of the budget for U V that are tried first, and smoothed iterations of each trial.
SHARES, TRIAL = (0.0, 0.2, 0.5, 0.8), 10
NOTE = "single entries: parameters count values, not indices; multiply-adds are dense"


@dataclass(frozen=True)
class Grebsmo(Solver):
    """Settings of the solver.

    Attributes
    ----------
    smoothing : int
        Smoothed iterations on the linear problem, to begin with; none is the plain alternation.
    iterations : int
        Iterations on the linear problem after that, at most.
    rounds : int
        Iterations that look through the activation, at most; none for a linear objective.
    rank : int or None
        Rank of U V; None splits the budget so that the error is least. 0 is connection pruning
        with reconstruction, which the paper's model contains.
    rank_steps : int
        In about so many steps the rank grows; it stops early when the error does.
    inner : int
        Conjugate-gradient steps for S on its support, in every iteration.
    convex : bool
        Descend the convex surrogate l_c instead of the true loss.
    tolerance : float
        Stop when an iteration lowers the objective by less than this fraction.
    patience : int
        Stop looking through the activation after so many rounds without a lower held-out error.
    indices : bool
        Count an index for every entry against the budget, since an entry that may stand anywhere
        is stored with its place. False counts values alone, as the paper does.
    seed : int
        Of the sketch along which the rank grows.

    References
    ----------
    Yu, Liu, Wang and Tao 2017, "On compressing deep models by low rank and sparse decomposition",
    CVPR: the model and the reconstruction of feature maps. Zhou and Tao 2013,
    "Greedy bilateral sketch, completion and smoothing", AISTATS: the alternation and the growth
    of the rank. Added here, because a threshold alone ignores that inputs are correlated: the
    growing penalty (as Meng et al. 2024, "ALPS", prune entries), the exchange of entries and
    the conjugate gradients.
    """

    smoothing: int = 30
    iterations: int = 10
    rounds: int = 8
    rank: int | None = None
    rank_steps: int = 4
    inner: int = 4
    convex: bool = True
    tolerance: float = 1e-3
    patience: int = 2
    indices: bool = True
    seed: int = 0
    name: ClassVar[str] = "grebsmo"
    forms: ClassVar[tuple[str, ...]] = ("entries",)
    chooses_support: ClassVar[bool] = True
    takes_structures: ClassVar[bool] = False
    tunes_ridge: ClassVar[bool] = False

    def __post_init__(self) -> None:
        lowest = {"smoothing": 0, "iterations": 0, "rounds": 0, "rank_steps": 1, "inner": 1}
        lowest |= {"patience": 1, "seed": 0} | ({} if self.rank is None else {"rank": 0})
        check_counts(self, **lowest)
        check_tolerance(self)

    # -- choosing the split ------------------------------------------------------------------

    def candidates(
        self, problem: ResponseProblem, budget: LayerBudget, form: str
    ) -> list[Candidate]:
        """The structure that spends the budget, split between S and U V as the error is least.

        Short runs on the whole problem judge the splits: an iteration costs the same for few rows
        as for many, and the Gram matrix is needed anyway.

        Raises
        ------
        BudgetError
            When nothing fits, or not the rank that was set.
        """
        most = budget.largest_rank("entries", 0)
        if self.rank is not None:
            most_entries = _entries(budget, self.rank, self._price)
            if self.rank > most or (not self.rank and not most_entries):
                raise BudgetError(
                    complain(
                        f"rank={self.rank} in a budget of {budget.weights:.0f} weights",
                        f"a rank in [0, {max(most, 0)}] that leaves something to keep",
                        "Set rank=None, or raise keep.",
                    )
                )
            structure = Structure("entries", most_entries, self.rank)
            return [Candidate(structure, float("nan"), problem)]
        shares = {int(share * most) for share in SHARES} | {most}
        ranks = {k - k % budget.unit("entries") for k in shares if k >= 0}
        structures = _within(budget, ranks, most, self._price)
        if not structures:
            smallest = named_keep(self._price * budget.smallest("entries"))
            raise BudgetError(
                complain(
                    f"a budget of {budget.weights:.0f} weights for a layer ({budget.n},"
                    f" {budget.channels}, {budget.taps} taps)",
                    f"keep of at least {smallest} (form='entries')",
                    "Raise keep, or leave the layer out.",
                )
            )
        if len(structures) == 1:
            return [Candidate(structures[0], float("nan"), problem)]
        stiff = stiffness(problem)
        tried = self._try(problem, structures, stiff)
        # Once more between the best and its neighbours.
        known = [structure.k for structure in tried]
        place = known.index(min(tried, key=tried.get).k)
        middles = {(known[place] + k) // 2 for k in known[max(place - 1, 0) : place + 2]}
        middles = {k - k % budget.unit("entries") for k in middles} - set(known)
        tried |= self._try(problem, _within(budget, middles, most, self._price), stiff)
        best = min(tried, key=tried.get)
        return [Candidate(best, tried[best], problem)]

    @property
    def _price(self) -> int:
        """Numbers that one entry costs."""
        return 2 if self.indices else 1

    def _try(
        self, problem: ResponseProblem, structures: list[Structure], stiff: Array
    ) -> dict[Structure, float]:
        """Relative linear errors of structures after a short run."""
        errors: dict[Structure, float] = {}
        if not structures:
            return errors
        settings = {"rank_steps": 1, "seed": self.seed, "stiff": stiff}
        states = smooth(problem, structures, TRIAL, **settings)
        for structure, state in zip(structures, states, strict=True):
            refine(problem, state, self.inner)
            errors[structure] = _linear_loss(problem, state) / max(problem.linear_energy, TINY)
        return errors

    # -- the linear problem ------------------------------------------------------------------

    def start(self, problem: ResponseProblem, structure: Structure) -> BilateralState:
        """The smoothed iterations; S and U V zero where there are none."""
        _check_structure(problem, structure)
        if not self.smoothing:
            return empty_state(problem, structure)
        settings = {"rank_steps": self.rank_steps, "seed": self.seed}
        return smooth(problem, [structure], self.smoothing, **settings)[0]

    def step(
        self, problem: ResponseProblem, state: BilateralState, structure: Structure
    ) -> BilateralState:
        """One alternation over the rank, U V and S; ``||T - M||_G`` never increases."""
        state, k = copy.copy(state), state.U.shape[1]
        if k < structure.k:
            covariance = (state.T - state.S) @ (state.rhs - state.SG).T
            more = min(-(-structure.k // self.rank_steps), structure.k - k)
            U = grow(problem.ops, state.U, covariance, more, self.seed + k)
            state.growing = U.shape[1] > k
            place_low_rank(problem, state, U)
        alternate(problem, state)
        if structure.s and not state.mask.any():
            threshold(problem, state, structure.s)
        if structure.s:
            refine(problem, state, self.inner)
            exchange(problem, state, self.inner)
        state.bias = problem.linear_bias(state.M)
        return state

    # -- through the activation ----------------------------------------------------------------

    def evaluate(self, problem: ResponseProblem, state: BilateralState) -> None:
        """Fill in the objective and the masked residual at the state's (M, bias)."""
        convex = self.convex and problem.activation.has_convex_surrogate
        M = state.M
        loss, state.RtX, state.R_mean = problem.sweep(M, state.bias, convex=convex)
        pull = problem.ops.xp.sum((M - problem.W) ** 2)
        state.objective = float(loss + problem.rho / problem.rows * pull)

    def round(
        self, problem: ResponseProblem, state: BilateralState, structure: Structure
    ) -> BilateralState:
        """One majorisation and one alternation on its target; the objective never increases.

        As in `Majorize.steps`: flatter majorisers are tried while the objective keeps falling, and
        steeper ones where the activation's curvature is no bound. `state` must be evaluated.
        """
        xp, bound = problem.ops.xp, problem.activation.curvature
        M = state.M
        gradient = state.RtX + min(1.0, bound) * problem.rho * (problem.W - M)
        shift = problem.metric.weight(problem.metric.whiten(gradient))
        curvature = state.curvature
        while curvature <= 256 * bound:
            new = copy.copy(state)
            new.T, new.curvature = M + shift / curvature, curvature
            new.residual = gradient / curvature
            new.rhs = new.residual + state.SG + state.U @ (state.V @ problem.G)
            new.error = float(xp.sum((new.T - M) * new.residual))
            new = self.step(problem, new, structure)
            new.bias = state.bias + state.R_mean / curvature - (new.M - M) @ problem.x_mean
            self.evaluate(problem, new)
            if new.objective <= state.objective:
                new.curvature = max(curvature * FLATTER, new.flattest)
                return new
            state.flattest = min(curvature / FLATTER**2, bound)
            curvature = bound if curvature < bound else 2 * curvature
        return state

    # -- the whole run -------------------------------------------------------------------------

    def solve(
        self,
        problem: ResponseProblem,
        structure: Structure,
        support: Array | None = None,
    ) -> Decomposition:
        """Alternate on the linear problem, then look through the activation.

        Parameters
        ----------
        problem : ResponseProblem
            In the layer's own coordinates.
        structure : Structure
            Of the form ``entries``.
        support : None
            The solver chooses its entries.

        Returns
        -------
        Decomposition
            ``history`` holds the linear objective of every iteration for a linear fit; otherwise
            the objective after the activation, from the end of the linear iterations on.
        """
        if support is not None:
            raise InputError(
                complain("a support for grebsmo", "None", "It chooses single entries itself.")
            )
        began = time.perf_counter()
        state, history = self.start(problem, structure), []
        status, linear = Status.ITERATION_LIMIT, problem.activation.is_identity

        def record(iteration: int) -> float:
            error = float(problem.held_out_error(state.M, state.bias))
            history.append(
                {
                    "iteration": iteration,
                    "objective": state.objective,
                    "held_out_error": error,
                    "rank": state.U.shape[1],
                    "groups": int(state.mask.sum()),
                    "seconds": time.perf_counter() - began,
                }
            )
            return error

        for iteration in range(self.iterations):
            before, state = state.error, self.step(problem, state, structure)
            state.objective = _linear_loss(problem, state) / problem.rows
            if linear:
                record(iteration + 1)
            done = state.U.shape[1] == structure.k or not state.growing
            if done and before - state.error <= self.tolerance * before:
                status = Status.CONVERGED
                break
        best = state
        if not linear and self.rounds:
            status = Status.ITERATION_LIMIT
            self.evaluate(problem, state)
            best_error, since = record(0), 0
            for iteration in range(self.rounds):
                before, state = state.objective, self.round(problem, state, structure)
                error = record(iteration + 1)
                since = since + 1 if error >= best_error * (1 - HELD_OUT_GAIN) else 0
                if not error >= best_error:
                    best, best_error = state, error
                if before - state.objective <= self.tolerance * before:
                    status = Status.CONVERGED
                    break
                if since >= self.patience:
                    status = Status.HELD_OUT_STOP
                    break
        return _decomposition(problem, best, status, history)


def _decomposition(
    problem: ResponseProblem, state: BilateralState, status: Status, history: list[dict[str, Any]]
) -> Decomposition:
    """The `Decomposition` of a state, on the host, in the dtype of the data."""
    ops, xp = problem.ops, problem.ops.xp
    carrier = MajorizeState(problem.metric, 0, None, state.M, state.bias, state.U, 1.0)
    structure = Structure("entries", 0, state.U.shape[1])
    result = assemble(problem, structure, carrier, status, history)
    columns = xp.flatnonzero((state.S != 0).any(axis=0))
    dtype = result.U.dtype
    return result.replace(
        columns=ops.to_numpy(columns),
        A=ops.to_numpy(state.S[:, columns].astype(dtype)),
        V=ops.to_numpy(state.V.astype(dtype)),
        notes=(*result.notes, NOTE),
    )


def _linear_loss(problem: ResponseProblem, state: BilateralState) -> float:
    """``||Zc - Xc Mᵀ||^2 + rho ||M - W||^2`` of a state whose target is the linear problem's."""
    xp = problem.ops.xp
    return problem.linear_energy - float(xp.sum(state.T * state.rhs)) + state.error


def _entries(budget: LayerBudget, k: int, price: int) -> int:
    """Most entries that fit beside rank k: 0 where multiply-adds are counted and not all fit."""
    left = min(limit.weights - budget.cost(Structure("entries", 0, k), limit)
               for limit in budget.limits)  # fmt: skip
    s = max(min(int(left) // price, budget.n * budget.channels * budget.taps), 0)
    return s if budget.fits(Structure("entries", s, k)) else 0


def _within(budget: LayerBudget, ranks: set[int], most: int, price: int) -> list[Structure]:
    """Structures of these ranks, and all entries beside them; low rank alone only at its most."""
    structures = [Structure("entries", _entries(budget, k, price), k) for k in sorted(ranks)]
    return [s for s in structures if s.s or (s.k and s.k == most)]


def _check_structure(problem: ResponseProblem, structure: Structure) -> None:
    if structure.form != "entries" or not (
        0 <= structure.s <= problem.n * problem.width
        and 0 <= structure.k <= min(problem.n, problem.width)
    ):
        raise InputError(
            complain(
                f"the structure {structure} for grebsmo",
                f"entries with s in [0, {problem.n * problem.width}] and k in"
                f" [0, {min(problem.n, problem.width)}]",
                "Ask with form='entries'.",
            )
        )
