"""Decompose one layer: choose a structure within the budget, then minimise the response error.

In: a `LayerIO` and what is asked for, as a budget (problem (2) of Ma et al. 2018) or as penalties
(problem (3)). Out: a `Decomposition`. The structure comes from the closed-form curves of
`slr_gpu.curves` and from held-out rows; the factors from a solver.
"""

from __future__ import annotations

import hashlib
import math
import numbers
from typing import Any

from . import activations
from .basis import rotated
from .curves import Candidate, refined_candidate
from .decomposition import Decomposition, Structure, grouping
from .errors import InputError, complain
from .layer_budget import LayerBudget, check_form
from .layer_io import LayerIO
from .ops import get_ops
from .problem import TINY, ResponseProblem
from .ridge import NEAR, STRENGTHS, USUAL, best_ridge, has_few_rows, strength
from .solvers import ADMM, Majorize, Solver, WeightSVD
from .support import select_support

Array = Any

# Ranks that computed something else from the same sums.
_DRIFTED = "Use machines of one kind with the same libraries and the same number of threads."
FEW_ROWS_NOTE = (
    "fewer rows than columns: the truncated SVD of the weight does best on rows held out"
)


def fit(
    layer_io: LayerIO,
    *,
    keep: float | None = None,
    columns: int | None = None,
    channels: int | None = None,
    basis_rows: int | None = None,
    rank: int | None = None,
    lambda1: float | None = None,
    lambda2: float | None = None,
    relative: bool = False,
    budget: LayerBudget | None = None,
    form: str = "auto",
    solver: Solver | None = None,
    objective: str = "activation",
    ridge: float | str = "auto",
    held_out: float = 0.1,
    device: str | None = None,
) -> Decomposition:
    """Replace a layer's weight by a column-sparse part A plus a low-rank part U V.

    Ask in one of three ways:

    - ``keep=0.25``: this fraction of the layer's weights; the split between A and U V (and the
      basis) is chosen, see `form`.
    - ``columns=`` or ``channels=`` and ``rank=``: problem (2), exactly these. With
      ``basis_rows=``, `channels` counts rotated channels (of ``form="spatial"``, if asked).
    - ``lambda1=`` and ``lambda2=``: problem (3), penalties on ``||A||_{2,1}`` and ``||B||_*``,
      solved by `ADMM`.

    Parameters
    ----------
    layer_io : LayerIO
    keep : float
        In (0, 1].
    columns, channels, rank, basis_rows : int
        Kept columns, or kept input channels; rank of U V; rows of the input basis.
    lambda1, lambda2 : float
        Penalties; with ``relative=True`` fractions of the critical weights, above which A or B
        vanishes.
    budget : LayerBudget
        Instead of `keep`, where costs are not plain parameters.
    form : {"auto", "columns", "channels", "rotated", "entries", "spatial"}
        See `Structure`. ``auto`` keeps the one of the first three with the least held-out error;
        not every solver has the last two.
    solver : Solver, optional
        Any of `slr_gpu.solvers`. Defaults to `Majorize` for budgets and `ADMM` for penalties.
    objective : {"activation", "linear"}
        Whether errors count after the layer's activation or before it.
    ridge : float or "auto"
        Pull towards the original weight, as a fraction of the mean diagonal of the Gram matrix;
        ``auto`` chooses on held-out rows. With fewer rows than columns, `Majorize` then returns
        the truncated SVD of the weight where that does better on them.
    held_out : float
        Fraction of rows that is never fitted and decides between structures.
    device : str
        ``"cpu"``, ``"cuda"``, ``"cuda:<index>"`` or ``"auto"``. By default where the arrays of
        `layer_io` are. In a group of ranks ``"cuda"`` is the GPU of this rank.

    Returns
    -------
    Decomposition

    Raises
    ------
    InputError
        For arguments out of range or that do not go together.
    BudgetError
        When no structure fits the budget.
    BackendError
        When the device does not work.

    References
    ----------
    Ma et al. 2018, arXiv 1807.10119, problems (2) and (3).
    """
    group = layer_io.group
    group.check_same(
        lambda: {
            **_layer_facts(layer_io),
            "sizes": repr((keep, columns, channels, basis_rows, rank, budget, form)),
            "penalties": repr((lambda1, lambda2, relative)),
            "solver": repr(solver),
            "settings": repr((objective, ridge, held_out)),
        }
    )
    request = _check_request(
        layer_io, keep, columns, channels, basis_rows, rank, lambda1, lambda2, budget, form
    )
    check_objective(objective)
    if solver is None:
        solver = ADMM() if request == "penalties" else Majorize()
    check_solver(solver)
    if request == "sizes":  # NumPy's integers too; what is made of them is written as JSON
        sizes = (columns, channels, basis_rows, rank)
        columns, channels, basis_rows, rank = (None if s is None else int(s) for s in sizes)
    activation = activations.get("identity") if objective == "linear" else None
    problem = ResponseProblem(
        layer_io,
        ops=layer_io.ops if device is None else get_ops(group.place(device)),
        ridge=1e-3 if ridge == "auto" else ridge,
        held_out=held_out,
        activation=activation,
    )
    if request == "penalties":
        return group.broadcast(_fit_penalties(problem, solver, lambda1, lambda2, relative, form))
    if request == "budget" and budget is None:
        n, m = layer_io.weight.shape
        budget = LayerBudget(n, layer_io.channels, layer_io.taps, ((1.0, keep * n * m),))
    ridges = USUAL if ridge == "auto" and problem.held.rows and solver.tunes_ridge else ()
    plain = None
    if ridges and has_few_rows(problem):
        equal = rank or 1 if budget is None else budget.largest_rank("columns", 0)
        first = strength(problem, max(equal, 1))
        if budget is not None and equal > 0 and solver.yields and form in ("auto", "columns"):
            plain = WeightSVD().solve(problem, Structure("columns", 0, equal))
            plain = plain.replace(notes=(*plain.notes, FEW_ROWS_NOTE))
            if math.isinf(first):
                return group.broadcast(plain)
        first = min(first, STRENGTHS[-1])
        problem, ridges = problem.with_ridge(first), tuple(first * factor for factor in NEAR)
    if request == "sizes":
        chosen = _sized(problem, solver, columns, channels, basis_rows, rank, form)
    else:
        chosen = solver.choose(problem, budget, form)
    if ridges:
        chosen = best_ridge(chosen, ridges)
    support = None if solver.chooses_support else chosen.support
    group.check_same(lambda: {"structure": str(chosen.structure)}, _DRIFTED)
    found = solver.solve(chosen.problem, chosen.structure, support)
    if plain and plain.held_out_error < found.held_out_error:
        found = plain
    # Of rounding in what each rank computes for itself, nothing stays.
    return group.broadcast(found)


def check_objective(objective: str) -> None:
    """InputError for another name."""
    if objective not in ("activation", "linear"):
        raise InputError(
            complain(f"objective={objective!r}", "'activation' or 'linear'", "Check the spelling.")
        )


def check_solver(solver: Any) -> None:
    """InputError for what is no instance of a solver."""
    if not isinstance(solver, Solver):
        raise InputError(
            complain(f"solver={solver!r}", "an instance of a solver", "For example Majorize().")
        )


def _layer_facts(layer_io: LayerIO) -> dict[str, Any]:
    """What ranks must have in common of a layer."""
    digest = hashlib.sha256()
    for array in (layer_io.weight, layer_io.bias):
        digest.update(layer_io.ops.to_numpy(array).tobytes())
    return {
        "weight": digest.hexdigest(),
        "shape": list(layer_io.weight.shape),
        "dtype": str(layer_io.inputs.dtype),
        "activation": layer_io.activation.name,
        "kernel_size": list(layer_io.kernel_size),
        "sample_count": layer_io.sample_count,
        "targets": layer_io.linear_targets is None,
    }


def _fit_penalties(
    problem: ResponseProblem,
    solver: Solver,
    lambda1: float,
    lambda2: float,
    relative: bool,
    form: str,
) -> Decomposition:
    if not isinstance(solver, ADMM):
        raise InputError(
            complain(
                f"lambda1 and lambda2 with {type(solver).__name__}",
                "the ADMM solver for penalties",
                "Leave solver out, or ask with keep=.",
            )
        )
    solver = solver.with_penalties(lambda1, lambda2, relative=relative)
    if form not in ("auto", "columns", "channels"):
        raise InputError(
            complain(
                f"form={form!r} with penalties", "'columns' or 'channels'", "Or ask with keep=."
            )
        )
    return solver.solve(problem, form=None if form == "auto" else form)


def _check_request(
    layer_io, keep, columns, channels, basis_rows, rank, lambda1, lambda2, budget, form
) -> str:
    """Which way was used: budget, sizes or penalties; InputError unless one, and in range."""
    n, m = layer_io.weight.shape
    c, taps = layer_io.channels, layer_io.taps
    check_form(form, taps > 1, kernel_size=layer_io.kernel_size)
    sizes = {"columns": columns, "channels": channels, "basis_rows": basis_rows, "rank": rank}
    ways = {
        "keep": keep is not None,
        "budget": budget is not None,
        "sizes": any(size is not None for size in sizes.values()),
        "penalties": lambda1 is not None or lambda2 is not None,
    }
    used = [name for name, asked in ways.items() if asked]
    if len(used) != 1:
        raise InputError(
            complain(
                " and ".join(used) or "no budget",
                "exactly one of keep=, budget=, columns=/channels=/rank=, lambda1=/lambda2=",
                "For example fit(layer_io, keep=0.25).",
            )
        )
    if budget is not None and (budget.n, budget.channels, budget.taps) != (n, c, taps):
        raise InputError(
            complain(
                f"a budget of a layer of {budget.n} outputs, {budget.channels} channels and"
                f" {budget.taps} taps",
                f"one of {n} outputs, {c} channels and {taps} taps",
                "Make it of this layer's sizes.",
            )
        )
    if keep is not None and not (isinstance(keep, numbers.Real) and 0 < keep <= 1):
        raise InputError(
            complain(f"keep={keep!r}", "a number in (0, 1]", "keep=0.25 leaves a quarter.")
        )
    if used[0] == "penalties":
        for name, value in (("lambda1", lambda1), ("lambda2", lambda2)):
            if not isinstance(value, numbers.Real) or not value >= 0:
                raise InputError(
                    complain(f"{name}={value!r}", "a number >= 0", "Give both penalties.")
                )
    if columns is not None and channels is not None:
        raise InputError(
            complain("columns and channels", "one of them", "Use form='columns' or 'channels'.")
        )
    c = grouping(form, c, layer_io.kernel_size)[0]
    limits = {"columns": m, "channels": c, "basis_rows": c, "rank": n}
    for name, value in sizes.items():
        lowest = 1 if name == "basis_rows" else 0
        if value is not None and not (
            isinstance(value, numbers.Integral) and lowest <= value <= limits[name]
        ):
            raise InputError(
                complain(
                    f"{name}={value!r}", f"an integer in [{lowest}, {limits[name]}]", "Lower it."
                )
            )
    if basis_rows is not None:
        if taps == 1 or columns is not None or (channels or 0) > basis_rows:
            raise InputError(
                complain(
                    f"basis_rows={basis_rows} with columns={columns}, channels={channels},"
                    f" {taps} tap(s)",
                    "a spatial kernel and channels <= basis_rows",
                    "A basis rotates input channels; leave columns out.",
                )
            )
    return "budget" if keep is not None else used[0]


def _sized(
    problem: ResponseProblem,
    solver: Solver,
    columns: int | None,
    channels: int | None,
    basis_rows: int | None,
    rank: int | None,
    form: str,
) -> Candidate:
    rank = rank or 0
    if not (basis_rows and form == "spatial"):
        form = "rotated" if basis_rows else "channels" if channels is not None else "columns"
    if form not in solver.forms:
        raise InputError(
            complain(
                f"sizes of the form {form!r} for {solver.name}",
                f"one of {', '.join(solver.forms)}",
                "Ask with keep=, or use another solver.",
            )
        )
    if basis_rows is not None:
        structure = Structure(form, channels or 0, rank, basis_rows)
        problem = problem.regrouped() if form == "spatial" else problem
        return refined_candidate(rotated(problem, 2 * basis_rows), structure)
    structure = Structure(form, (channels if channels is not None else columns) or 0, rank)
    support, error = select_support(problem, structure)
    return Candidate(structure, error / max(problem.linear_energy, TINY), problem, support)
