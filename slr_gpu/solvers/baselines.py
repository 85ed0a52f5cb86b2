"""What everybody tries first: magnitude pruning, truncated SVDs, channel pruning.

In: a `ResponseProblem` and a budget, all of which goes to one part, A or U V. Out: a
`Decomposition`. They are linear methods, some without data, which the others must beat on equal
terms: the errors they report are measured after the activation, as for every solver.

    Magnitude        A = W on the columns (or channels) of largest norm
    WeightSVD        U V = the nearest matrix of rank k to W
    WhitenedSVD      U V R = the nearest matrix of rank k to T R, for R Rᵀ = G or its diagonal
    ChannelPruning   A = least squares on channels that a LASSO on the responses selects
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..curves import Candidate
from ..decomposition import Decomposition, Status, Structure
from ..errors import BudgetError, InputError, complain
from ..layer_budget import LayerBudget, named_keep, round_down
from ..penalties import ColumnSparse, low_rank_projection
from ..problem import ResponseProblem, columns_first, metric_of
from ..support import group_size
from .base import Solver
from .majorize import MajorizeState, assemble, closed_form

Array = Any

# The LASSO's penalty: where it starts, relative to the one at which everything vanishes, by what it
# grows, and bisections after that.
FIRST_PENALTY, PENALTY_GROWTH, BISECTIONS = 1e-4, 1.6, 12
# Proximal gradient steps for each, and the relative change at which they end.
LASSO_STEPS, LASSO_TOLERANCE = 300, 1e-6


class _OnePart(Solver):
    """A solver that spends the whole budget on A alone or on U V alone."""

    low_rank: ClassVar[bool]
    chooses_support: ClassVar[bool] = True
    takes_structures: ClassVar[bool] = False
    tunes_ridge = False

    def candidates(
        self, problem: ResponseProblem, budget: LayerBudget, form: str
    ) -> list[Candidate]:
        """The largest structure within the budget."""
        form = self.forms[0] if form == "auto" else form
        if self.low_rank:
            structure = Structure(form, 0, budget.largest_rank(form, 0))
        else:
            structure = Structure(form, _most_groups(budget, form), 0)
        if structure.s + structure.k < 1:
            n, m = budget.n, budget.channels * budget.taps
            smallest = (n + m if self.low_rank else n * group_size(form, budget.taps)) / (n * m)
            raise BudgetError(
                complain(
                    f"a budget of {budget.weights:.0f} weights for a layer ({n},"
                    f" {budget.channels}, {budget.taps} taps)",
                    f"keep of at least {named_keep(smallest)} for {self.name}",
                    "Raise keep, or leave the layer out.",
                )
            )
        return [Candidate(structure, float("nan"), problem, self.select(problem, structure))]

    def select(self, problem: ResponseProblem, structure: Structure) -> Array:
        """The columns to keep; none for a low-rank part alone."""
        return problem.ops.xp.arange(0)

    def check(self, problem: ResponseProblem, structure: Structure) -> None:
        """InputError for a structure with another part, or of a form that is not fitted."""
        limit = min(problem.n, problem.width)
        part, other = (structure.k, structure.s) if self.low_rank else (structure.s, structure.k)
        if not self.low_rank and structure.form in self.forms:
            limit = problem.width // group_size(structure.form, problem.taps)
        if structure.form not in self.forms or other or not 0 <= part <= limit:
            expected = "k" if self.low_rank else "s"
            raise InputError(
                complain(
                    f"the structure {structure} for {self.name}",
                    f"{' or '.join(self.forms)} with {expected} alone, at most {limit}",
                    "Ask with keep=, or use another solver.",
                )
            )


@dataclass(frozen=True)
class _ColumnOrder:
    """The order of columns where nothing was factorised."""

    order: Array


def _as_is(problem: ResponseProblem, structure: Structure, columns: Array, M: Array, bias: Array,
           U: Array) -> Decomposition:  # fmt: skip
    """The decomposition of a weight that is A on `columns` and ``U Uᵀ M`` elsewhere."""
    order = _ColumnOrder(columns_first(problem, columns))
    state = MajorizeState(order, len(columns), None, M, bias, U, 1.0)
    return assemble(problem, structure, state, Status.CLOSED_FORM, [])


def _reconstructed(problem: ResponseProblem, structure: Structure, columns: Array) -> Decomposition:
    """Least squares for the linear responses: A on `columns`, rank k elsewhere."""
    metric, kept = metric_of(problem, columns)
    state = closed_form(problem, metric, kept, structure.k)
    return assemble(problem, structure, state, Status.CLOSED_FORM, [])


def _most_groups(budget: LayerBudget, form: str) -> int:
    """Most columns or channels that fit alone."""
    low, high = 0, budget.channels * budget.taps // group_size(form, budget.taps)
    while low < high:
        middle = (low + high + 1) // 2
        if budget.fits(Structure(form, middle, 0)):
            low = middle
        else:
            high = middle - 1
    return round_down(low, budget.unit(form))


def _columns_of(problem: ResponseProblem, structure: Structure, scores: Array) -> Array:
    """The columns of the s groups with the largest scores; of equal ones the first."""
    xp = problem.ops.xp
    groups = xp.sort(xp.argsort(-scores, kind="stable")[: structure.s])
    size = group_size(structure.form, problem.taps)
    return (groups[:, None] * size + xp.arange(size)[None]).reshape(-1)


@dataclass(frozen=True)
class Magnitude(_OnePart):
    """Keep the columns, or the input channels, of largest norm.

    Attributes
    ----------
    reconstruct : bool
        Fit what is kept to the responses by least squares. Otherwise weights and bias stay as
        they were, and no data is used.
    """

    reconstruct: bool = False
    name: ClassVar[str] = "magnitude"
    forms: ClassVar[tuple[str, ...]] = ("columns", "channels")
    low_rank: ClassVar[bool] = False

    @property
    def tunes_ridge(self) -> bool:
        return self.reconstruct

    def select(self, problem: ResponseProblem, structure: Structure) -> Array:
        """The groups of columns of W with the largest Frobenius norm."""
        size = group_size(structure.form, problem.taps)
        norms = ColumnSparse(size).norms(problem.ops, problem.W)
        return _columns_of(problem, structure, norms)

    def solve(
        self, problem: ResponseProblem, structure: Structure, support: Array | None = None
    ) -> Decomposition:
        """Keep these columns, by default those of largest norm."""
        self.check(problem, structure)
        xp = problem.ops.xp
        columns = self.select(problem, structure) if support is None else support
        if self.reconstruct:
            return _reconstructed(problem, structure, columns)
        M = xp.zeros_like(problem.W)
        M[:, columns] = problem.W[:, columns]
        return _as_is(problem, structure, columns, M, problem.bias, xp.zeros((problem.n, 0)))


@dataclass(frozen=True)
class WeightSVD(_OnePart):
    """The nearest weight of rank k, whatever the data (Eckart and Young 1936); bias kept."""

    name: ClassVar[str] = "weight-svd"
    forms: ClassVar[tuple[str, ...]] = ("columns",)
    low_rank: ClassVar[bool] = True

    def solve(
        self, problem: ResponseProblem, structure: Structure, support: Array | None = None
    ) -> Decomposition:
        """Truncate the singular values of W."""
        self.check(problem, structure)
        M, U = low_rank_projection(problem.ops, problem.W, structure.k)
        return _as_is(problem, structure, problem.ops.xp.arange(0), M, problem.bias, U)


@dataclass(frozen=True)
class WhitenedSVD(_OnePart):
    """Truncated SVD of a weight that is scaled by what the inputs look like.

    Attributes
    ----------
    scaling : {"full", "diagonal"}
        ``full`` minimises the error of the linear responses over rank k: SVD in the metric of G,
        through its Cholesky factor (SVD-LLM, Wang et al. 2024), of the weight that fits the
        wanted responses best on the actual inputs. ``diagonal`` only scales each column of the
        original weight by the root mean square of its centred input (ASVD, Yuan et al. 2023,
        with the scale of the activations in place of their mean modulus). The bias is the best.
    """

    scaling: str = "full"
    name: ClassVar[str] = "whitened-svd"
    forms: ClassVar[tuple[str, ...]] = ("columns",)
    low_rank: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scaling not in ("full", "diagonal"):
            raise InputError(
                complain(f"scaling={self.scaling!r}", "'full' or 'diagonal'", "Check the spelling.")
            )

    @property
    def tunes_ridge(self) -> bool:
        return self.scaling == "full"

    def solve(
        self, problem: ResponseProblem, structure: Structure, support: Array | None = None
    ) -> Decomposition:
        """Truncate the singular values of the scaled weight."""
        self.check(problem, structure)
        ops, xp = problem.ops, problem.ops.xp
        if self.scaling == "full":
            return _reconstructed(problem, structure, xp.arange(0))
        (squares,) = problem.sum_over_rows(lambda X, Y, Z: (xp.square(X).sum(axis=0),), wants="X")
        scale = xp.sqrt(squares + problem.rho)[None]
        scaled, U = low_rank_projection(ops, problem.W * scale, structure.k)
        M = scaled / scale
        return _as_is(problem, structure, xp.arange(0), M, problem.linear_bias(M), U)


@dataclass(frozen=True)
class ChannelPruning(_OnePart):
    """Input channels chosen by a LASSO on the responses, then least squares.

    With beta_g the weight of channel g in ``Zc ~ sum_g beta_g Xc_g W_gᵀ``, every W_g scaled to
    unit norm, the penalty on ``||beta||_1`` grows until as many are not zero as were asked for.
    As in the authors' experiments the channels are chosen first and reconstructed once. On
    linear layers a channel is a column.

    References
    ----------
    He, Zhang and Sun 2017, "Channel pruning for accelerating very deep neural networks", ICCV,
    eqs. (1) to (4).
    """

    name: ClassVar[str] = "channel-pruning"
    forms: ClassVar[tuple[str, ...]] = ("channels",)
    low_rank: ClassVar[bool] = False
    tunes_ridge: ClassVar[bool] = True

    def select(self, problem: ResponseProblem, structure: Structure) -> Array:
        """The channels of a LASSO path, at the penalty that leaves s of them."""
        Q, q, lengths = self.quadratic(problem)
        beta = lasso_path(problem.ops, Q, q, structure.s)
        # Channels that an exact tie or the path's end leaves to fill up go by their own gain.
        xp = problem.ops.xp
        alone = xp.abs(q) / xp.maximum(xp.sqrt(xp.diagonal(Q)), 1e-300)
        scores = xp.abs(beta) + 1e-9 * alone / max(float(alone.max()), 1e-300)
        return _columns_of(problem, structure, xp.where(lengths > 0, scores, -1))

    def quadratic(self, problem: ResponseProblem) -> tuple[Array, Array, Array]:
        """Q, q of ``betaᵀ Q beta - 2 qᵀ beta`` and the norms of the channels' weights."""
        xp, taps = problem.ops.xp, problem.taps
        lengths = ColumnSparse(taps).norms(problem.ops, problem.W)
        scaled = problem.W / xp.repeat(xp.maximum(lengths, 1e-300), taps)[None]
        products = (scaled.T @ scaled) * problem.G
        Q = products.reshape(problem.groups, taps, problem.groups, taps).sum(axis=(1, 3))
        q = (scaled * problem.start_rhs).sum(axis=0).reshape(-1, taps).sum(axis=1)
        return Q, q, lengths

    def solve(
        self, problem: ResponseProblem, structure: Structure, support: Array | None = None
    ) -> Decomposition:
        """Reconstruct from these channels, by default those that the LASSO selects."""
        self.check(problem, structure)
        columns = self.select(problem, structure) if support is None else support
        return _reconstructed(problem, structure, columns)


def lasso_path(ops: Any, Q: Array, q: Array, count: int) -> Array:
    """LASSO coefficients at about the largest penalty that leaves at least `count` of them.

    ``min betaᵀ Q beta / 2 - qᵀ beta + penalty ||beta||_1`` by accelerated proximal gradients
    (Beck and Teboulle 2009). The penalty grows until too few are left; then it is bisected.

    Parameters
    ----------
    ops : NumpyOps
    Q, q : array, (c, c), (c,)
        Q positive semi-definite.
    count : int

    Returns
    -------
    beta : array, (c,)
    """
    xp = ops.xp
    # Row sums bound the largest eigenvalue.
    bound = max(float(xp.abs(Q).sum(axis=1).max()), 1e-300)
    largest = float(xp.abs(q).max())
    beta = found = xp.zeros_like(q)
    if not largest or not count:
        return found
    low, high = None, FIRST_PENALTY * largest
    while True:
        beta = _lasso(xp, Q, q, high, bound, beta)
        kept = int((beta != 0).sum())
        if kept < count:
            break
        low, high, found = high, PENALTY_GROWTH * high, beta
    for _ in range(BISECTIONS if low else 0):
        middle = (low * high) ** 0.5
        beta = _lasso(xp, Q, q, middle, bound, found)
        kept = int((beta != 0).sum())
        if kept < count:
            high = middle
        else:
            low, found = middle, beta
        if kept == count:
            break
    return found if low else beta


def _lasso(xp: Any, Q: Array, q: Array, penalty: float, bound: float, beta: Array) -> Array:
    """One LASSO from a start, by FISTA with restarts."""
    point, momentum = beta, 1.0
    for _ in range(LASSO_STEPS):
        moved = point - (Q @ point - q) / bound
        new = xp.sign(moved) * xp.maximum(xp.abs(moved) - penalty / bound, 0)
        change = new - beta
        if float(xp.sum((point - new) * change)) > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        point = new + (momentum - 1) / following * change
        beta, momentum = new, following
        if float(xp.abs(change).max()) <= LASSO_TOLERANCE * float(xp.abs(new).max()):
            break
    return beta
