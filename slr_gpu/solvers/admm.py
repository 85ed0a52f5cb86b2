"""ADMM for column-sparse plus low-rank, after Ma et al. 2018 (arXiv 1807.10119, eqs. 6-12).

In: a `ResponseProblem` and either penalties (problem (3) of the paper) or a `Structure` with hard
budgets (problem (2)). Out: a `Decomposition`. With f(M, b) = (1/P) sum loss(Y, X Mᵀ + b),

    minimise  f(M, b) + lambda1 ||A||_{2,1} + lambda2 ||B||_*   subject to  A + B = M

by Algorithm 1, with D the dual variable (the paper's Lambda):

    A <- group soft threshold of M - B - D/t at lambda1/t       (10)
    B <- singular value threshold of M - A - D/t at lambda2/t   (12)
    M, b <- argmin f(M, b) + t/2 ||M - A - B - D/t||^2          (8)
    D <- D + t (A + B - M)

With hard budgets the thresholds keep the s largest groups and the k largest singular values and t
grows. The bias is an unpenalised column of ones, handled exactly by centring: with
z = M (x - mean x) + beta the curvature of f in M and in beta separates.

Problem (3) is NOT convex, although the paper says so: for y = 1, f(z) = (1 - max(z, 0))^2 has
f(0) = 1 > (f(-1) + f(1)) / 2 = 1/2. The upper bound l_c of DESIGN 3.1, (y - z)^2 where y > 0 and
max(z, 0)^2 where y = 0, IS convex with a 2-Lipschitz derivative; it is what ``convex=True``
minimises, and the only case to which convergence theory applies.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy

from ..decomposition import Decomposition, Status, Structure
from ..errors import InputError, complain
from ..penalties import ColumnSparse, LowRank
from ..problem import ResponseProblem
from .base import Solver, check_counts, check_tolerance
from .refit import decompose
from .splitting import (
    READ,
    ADMMState,
    Setting,
    allowed_groups,
    found_structure,
    largest_eigenvalue,
    low_rank_step,
    measured,
    norm,
    sparse_step,
    weight_step,
)

Array = Any

# Iterations between two changes of t, each of which costs a factorisation.
EVERY = 5

CHOICES = {
    "m_step": ("majorize", "gradient"),
    "scheme": ("gauss_seidel", "proximal"),
    "group": ("column", "channel"),
}


@dataclass(frozen=True)
class ADMM(Solver):
    """Settings of the solver.

    Attributes
    ----------
    lambda1, lambda2 : float
        Weights of the two penalties; ignored with hard budgets.
    relative : bool
        The weights are fractions of the critical weights (`slr_gpu.penalties`), in [0, 1].
    convex : bool
        Minimise the surrogate l_c; False for the true loss, as published.
    m_step : {"majorize", "gradient"}
        ``gradient``: accelerated gradient (Beck and Teboulle 2009) with a step from a power
        iteration, as published. ``majorize``: exact minimiser of the majoriser of f (DESIGN 3.3)
        plus the coupling, ``M (2c/P G + t I) = 2c/P M_k G + 2/P Rᵀ Xc + t (A + B + D/t)``.
    inner : int, optional
        Gradient or majoriser steps an M-step, each two GEMMs over the samples. By default 5 of
        the gradient and 1 of the majoriser; always 1 in the proximal scheme.
    scheme : {"gauss_seidel", "proximal"}
        ``gauss_seidel`` is Algorithm 1; three blocks in turn have no general guarantee (Chen, He,
        Ye and Yuan 2016). ``proximal`` treats (A, B) as one block, with the proximal term
        1/2 ||.||_Q^2, Q = 2t I - t [I I; I I] >= 0, under which A and B separate (thresholds at
        lambda / 2t around ``A - (A + B - M + D/t)/2``, likewise B), and takes one M-step with the
        proximal metric S: (2c/P) G or L I. This is a two-block semi-proximal ADMM (Fazel, Pong,
        Sun and Tseng 2013, theorem B.1; linearised smooth part: Li, Sun and Toh 2016). It
        converges to a solution of (3) from any start for every fixed t > 0 **if** f is convex
        with curvature at most S: l_c of identity, relu and clamps with targets in their range.
        In the metric H = diag(Q, S + t I, I/t) the iteration is then nonexpansive, so
        ``lyapunov`` = ||w_{k+1} - w_k||_H^2, w = (A, B, M, bias, D), never increases (He and Yuan
        2015), nor does the distance to any solution. Not covered: hard budgets, the true loss,
        iterations at which t changes.
    t : float, optional
        Penalty parameter, the first one with hard budgets. By default 0.3 of the mean curvature
        of f, ``2c trace(G) / (P m)``, with penalties and 0.01 of it with hard budgets: larger
        values fix the support before the data has spoken.
    growth : (float, float)
        Hard budgets: t grows by a factor between these an iteration (taken every fifth), the
        larger the more the support still changes (3BASiL).
    relaxation : float
        Over-relaxation in [1, 2), ``gauss_seidel`` only (Boyd et al. 2011, 3.4.3).
    balance : bool
        Penalties: keep the relative residuals within a factor 10 by doubling or halving t
        (Boyd et al. 2011, 3.4.1), in the first half of the iterations only, so that t ends fixed.
    iterations : int
    tolerance : float
        Stop when both residuals are below it (Boyd et al. 2011, 3.3), relative to the iterates.
        With hard budgets the primal residual and a support that has settled are enough where a
        refit follows, since that minimises over the structure anyway.
    group : {"column", "channel"}
        Groups of A where no structure names them.
    refit : bool
        Keep support and rank and minimise the objective with `Majorize`.
    """

    lambda1: float = 0.1
    lambda2: float = 0.1
    relative: bool = True
    convex: bool = True
    m_step: str = "majorize"
    inner: int | None = None
    scheme: str = "gauss_seidel"
    t: float | None = None
    growth: tuple[float, float] = (1.02, 1.1)
    relaxation: float = 1.0
    balance: bool = False
    iterations: int = 200
    tolerance: float = 1e-3
    group: str = "column"
    refit: bool = True
    name: ClassVar[str] = "admm"
    chooses_support: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                got = f"{name}={getattr(self, name)!r}"
                raise InputError(complain(got, f"one of {known}", f"Use {known[0]!r}."))
        check_counts(self, iterations=1, **({} if self.inner is None else {"inner": 1}))
        check_tolerance(self)
        top = 1.0 if self.relative else sys.float_info.max
        proximal = self.scheme == "proximal"
        low, high = self.growth
        for name, value, good, expected in (
            (
                "lambda1",
                self.lambda1,
                0 <= self.lambda1 <= top,
                "a finite weight >= 0, <= 1 if relative",
            ),
            (
                "lambda2",
                self.lambda2,
                0 <= self.lambda2 <= top,
                "a finite weight >= 0, <= 1 if relative",
            ),
            ("t", self.t, self.t is None or 0 < self.t < math.inf, "a positive number or None"),
            ("growth", self.growth, 1 <= low <= high < 2, "1 <= low <= high < 2"),
            ("relaxation", self.relaxation, 1 <= self.relaxation < 2, "a factor in [1, 2)"),
            ("relaxation", self.relaxation, self.relaxation == 1 or not proximal, "1 if proximal"),
            ("inner", self.inner, self.inner in (None, 1) or not proximal, "1 if proximal"),
        ):
            if not good:
                raise InputError(complain(f"{name}={value}", expected, "The default is usual."))

    def with_penalties(self, lambda1: float, lambda2: float, *, relative: bool = True) -> ADMM:
        """The same settings with other penalties."""
        return replace(self, lambda1=lambda1, lambda2=lambda2, relative=relative)

    def start(
        self,
        problem: ResponseProblem,
        structure: Structure | None = None,
        support: Array | None = None,
    ) -> ADMMState:
        """The original weight as M, nothing in A and B, the gradient as dual variable."""
        xp, activation = problem.ops.xp, problem.activation
        convex = self.convex and activation.has_convex_surrogate
        if structure is not None:
            form = structure.form
        elif problem.basis is not None:
            form = "rotated"
        else:
            form = "columns" if self.group == "column" else "channels"
        size = problem.taps if form != "columns" else 1
        sparse, low_rank = ColumnSparse(size), LowRank()
        weights = budgets = None
        if structure is None:
            weights = (self.lambda1, self.lambda2)
            if self.relative:
                critical = [p.critical_weight(problem, convex=convex) for p in (sparse, low_rank)]
                weights = tuple(w * c for w, c in zip(weights, critical, strict=True))
        else:
            budgets = (structure.s, structure.k)
            if not (0 <= structure.s * size <= problem.width and 0 <= structure.k):
                raise InputError(
                    complain(
                        f"{structure} for {problem.width // size} groups",
                        "0 <= s <= groups and k >= 0",
                        "Ask for fewer.",
                    )
                )
        loss, RtX, R_mean = problem.sweep(problem.W, problem.bias, convex=convex)
        at_zero = problem.objective(xp.zeros_like(problem.W), problem.bias, convex=convex)
        curvature = 2 * activation.curvature / problem.rows
        WG = problem.W @ problem.G
        gradient = curvature * math.sqrt(float(xp.mean(WG**2)))
        setting = Setting(
            sparse,
            low_rank,
            weights,
            budgets,
            allowed_groups(problem, structure, support, size),
            convex,
            curvature * largest_eigenvalue(problem.ops, problem.G),
            (math.sqrt(float(xp.mean(problem.W**2))), gradient),
            1e6 * (float(loss) + at_zero + problem.target_energy),
        )
        t = self.t
        if t is None:
            share = 0.3 if structure is None else 0.01
            t = share * curvature * float(xp.trace(problem.G)) / problem.width
        zero = xp.zeros_like(problem.W)
        dual = -2 / problem.rows * RtX
        swept = (loss, RtX, R_mean, WG)
        return ADMMState(setting, zero, zero, problem.W, problem.bias, dual, t, *swept)

    def step(self, problem: ResponseProblem, state: ADMMState) -> ADMMState:
        """One iteration of Algorithm 1, or of its convergent extension."""
        setting, t = state.setting, state.t
        A, B, M, dual = state.A, state.B, state.M, state.dual
        if self.scheme == "proximal":
            pull = 0.5 * (A + B - M + dual / t)
            new_A = sparse_step(problem, setting, A - pull, 2 * t)
            new_B, rank = low_rank_step(problem, setting, B - pull, 2 * t)
        else:
            new_A = sparse_step(problem, setting, M - B - dual / t, t)
            new_B, rank = low_rank_step(problem, setting, M - new_A - dual / t, t)
        total = new_A + new_B
        if self.relaxation != 1:
            total = self.relaxation * total + (1 - self.relaxation) * M
        new = replace(state, A=new_A, B=new_B, rank=rank)
        inner = self.inner
        if inner is None:
            inner = 5 if self.m_step == "gradient" and self.scheme != "proximal" else 1
        new = weight_step(
            problem, new, total + dual / t, majorize=self.m_step == "majorize", inner=inner
        )
        new_dual = dual + t * (total - new.M)
        kept = setting.sparse.norms(problem.ops, new_A) > 0
        before = setting.sparse.norms(problem.ops, A) > 0
        changed = (kept & ~before).sum()
        return measured(
            problem,
            state,
            replace(new, dual=new_dual, groups=kept.sum(), changed=changed),
            proximal=self.scheme == "proximal",
            majorized=self.m_step == "majorize",
            relaxation=self.relaxation,
            tolerance=self.tolerance,
        )

    def _next_t(self, ops: Any, state: ADMMState, iteration: int, first_t: float) -> Any:
        """The penalty parameter of the next iteration; a number stays the same object."""
        xp = ops.xp
        if iteration % EVERY != EVERY - 1:
            return state.t
        if state.setting.budgets is not None:
            low, high = self.growth
            share = xp.minimum(1.0, 10 * state.changed / max(state.setting.budgets[0], 1))
            return xp.minimum(state.t * (low + (high - low) * share) ** EVERY, 1e6 * first_t)
        if self.balance and 2 * iteration < self.iterations:
            primal = state.primal_residual / xp.maximum(state.primal_tolerance, 1e-300)
            dual = state.dual_residual / xp.maximum(state.dual_tolerance, 1e-300)
            factor = xp.where(primal > 10 * dual, 2.0, xp.where(dual > 10 * primal, 0.5, 1.0))
            return state.t * factor
        return state.t

    def iterate(
        self,
        problem: ResponseProblem,
        structure: Structure | None = None,
        support: Array | None = None,
    ) -> tuple[ADMMState, Status, list[dict[str, Any]]]:
        """Run the iteration alone: the last usable iterate, how it ended, and its history.

        On a device several iterations are queued before their numbers are read; those that come
        after the last one are dropped.
        """
        began, ops = time.perf_counter(), problem.ops
        state = self.start(problem, structure, support)
        first_t, history, still = state.t, [], 0
        names = ["objective", "primal_residual", "dual_residual", "rank", "groups", "t"]
        names += ["lyapunov"] if self.scheme == "proximal" else []
        while len(history) < self.iterations:
            queued, following = [], state
            for ahead in range(min(ops.ahead, self.iterations - len(history))):
                with numpy.errstate(over="ignore", invalid="ignore"):
                    new = self.step(problem, following)
                    queued.append(new)
                    t = self._next_t(ops, new, len(history) + ahead, first_t)
                following = replace(new, t=t)
            values = ops.read([getattr(new, name) for new in queued for name in READ])
            for i, new in enumerate(queued):
                numbers = dict(zip(READ, values[i * len(READ) : (i + 1) * len(READ)], strict=True))
                finite = math.isfinite(numbers["primal_residual"])
                if not (finite and numbers["loss"] <= state.setting.ceiling):
                    return state, Status.DIVERGED, history
                numbers |= {name: int(numbers[name]) for name in ("rank", "groups", "changed")}
                # t itself stays the object that the factor was made for.
                state = replace(new, **{name: numbers[name] for name in READ if name != "t"})
                entry = {"iteration": len(history) + 1, "phase": "admm"}
                entry |= {name: numbers[name] for name in names}
                history.append(entry | {"seconds": time.perf_counter() - began})
                still = 0 if numbers["changed"] else still + 1
                primal = numbers["primal_residual"] <= numbers["primal_tolerance"]
                dual = numbers["dual_residual"] <= numbers["dual_tolerance"]
                if structure is None:
                    done = primal and dual
                else:
                    done = primal and still >= 10 and (dual or self.refit)
                if done:
                    return state, Status.CONVERGED, history
            state = replace(state, t=following.t)
        return state, Status.ITERATION_LIMIT, history

    def solve(
        self,
        problem: ResponseProblem,
        structure: Structure | None = None,
        support: Array | None = None,
        *,
        form: str | None = None,
    ) -> Decomposition:
        """Run to the residuals' tolerance or the iteration limit, then refit.

        Parameters
        ----------
        problem : ResponseProblem
            In the coordinates of the basis for the rotated form.
        structure : Structure, optional
            Hard budgets: at most s groups in A and rank k in U V. Without it, the penalties
            decide both.
        support : int array, optional
            Columns that A may use; by default all. In the rotated form with a structure, the
            first s channels.
        form : {"columns", "channels"}, optional
            With penalties: the groups of A, instead of the setting `group`.

        Returns
        -------
        Decomposition
            With U V on the complement of S only: A_S takes what B has there.
        """
        if form is not None:
            group = "channel" if form == "channels" else "column"
            return replace(self, group=group).solve(problem, structure, support)
        state, status, history = self.iterate(problem, structure, support)
        return self.finish(problem, state, structure, status, history)

    def finish(
        self,
        problem: ResponseProblem,
        state: ADMMState,
        structure: Structure | None,
        status: Status,
        history: list[dict[str, Any]],
    ) -> Decomposition:
        """The decomposition that an iterate stands for, refitted where the settings say so."""
        weight = state.A + state.B
        if state.primal_residual > 1e3 * norm(problem.ops, state.M, problem.W):
            # The thresholds ran away from M, which is still a usable weight.
            weight, status = state.M, Status.DIVERGED
        bias = state.bias + (state.M - weight) @ problem.x_mean
        structure, groups = found_structure(problem, state, structure)
        return decompose(
            problem,
            structure,
            groups,
            weight,
            bias,
            status,
            history,
            convex=state.setting.convex,
            refit=self.refit,
        )
