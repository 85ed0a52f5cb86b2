"""What one layer may cost: limits on weights or multiply-adds, and which structures stay below them.

In: the shape of a layer and limits. Out: whether a `Structure` fits, the largest rank and basis that
do, and the smallest fraction that any structure reaches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from .decomposition import FORMS, Structure, grouping, is_separable
from .errors import BudgetError, complain

# Channels that CPU runtimes work on at once.
BLOCK = 16


class Limit(NamedTuple):
    """At most so many weights, or multiply-adds per output position; see `Structure.cost`."""

    basis_weight: float
    weights: float
    full_kernel: bool = False
    spatial_weight: float = 1.0  # `basis_weight` of a basis that takes the first kernel axis in


def round_down(size: int, unit: int) -> int:
    """To a multiple of the unit, or of half of it and so on where that is too large."""
    while unit > max(size, 1):
        unit //= 2
    return size - size % unit


def named_keep(fraction: float) -> str:
    """A smallest keep for people: three digits, and not below it."""
    unit = 10.0 ** (math.floor(math.log10(fraction)) - 2)
    return f"{math.ceil(fraction / unit - 1e-9) * unit:.3g}"


@dataclass(frozen=True)
class LayerBudget:
    """Costs that a layer may not exceed, all at once.

    Attributes
    ----------
    n, channels, taps : int
        Outputs, input channels and kernel taps of the layer.
    limits : tuple of Limit or of tuples
        What may be spent, by each way of counting.
    multiple : int
        r, s (channels) and k are multiples of this where the budget allows; see `unit`.
    kernel_size : tuple of int
        For the spatial form; by default the taps are not told apart.
    """

    n: int
    channels: int
    taps: int
    limits: tuple[Limit, ...]
    multiple: int = 1
    kernel_size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "limits", tuple(Limit(*limit) for limit in self.limits))

    @property
    def weights(self) -> float:
        """The tightest limit."""
        return min(limit.weights for limit in self.limits)

    def cost(self, structure: Structure, limit: Limit) -> float:
        """What a structure costs as a limit counts it."""
        spatial = structure.form == "spatial"
        weight = limit.spatial_weight if spatial else limit.basis_weight
        return structure.cost(self.n, *self.shape(structure.form), weight, limit.full_kernel)

    def shape(self, form: str) -> tuple[int, int]:
        """Input channels and taps as a form counts them."""
        return grouping(form, self.channels, self.kernel_size or (self.taps,))

    def regrouped(self) -> LayerBudget:
        """The budget of a rotated form that costs what the spatial form costs in this one."""
        limits = tuple(Limit(limit.spatial_weight, limit.weights) for limit in self.limits)
        return LayerBudget(self.n, *self.shape("spatial"), limits, self.multiple)

    def fits(self, structure: Structure) -> bool:
        return all(self.cost(structure, limit) <= limit.weights for limit in self.limits)

    def largest_rank(self, form: str, s: int, r: int | None = None) -> int:
        """Largest k within the budget; -1 when even k = 0 is over it."""
        empty, one = Structure(form, s, 0, r), Structure(form, s, 1, r)
        channels, taps = self.shape(form)
        width = (channels if r is None else r) * taps
        group = {"columns": 1, "entries": 0}.get(form, taps)
        rest = width - s * group
        k = min(self.n, rest)
        for limit in self.limits:
            fixed = self.cost(empty, limit)
            if fixed > limit.weights:
                return -1
            if rest:
                k = min(k, int((limit.weights - fixed) / (self.cost(one, limit) - fixed)))
        return k - k % self.unit(form) if rest else 0

    def unit(self, form: str) -> int:
        """What r, s (in channels or columns) and k are multiples of.

        `multiple`, since runtimes work in blocks of channels and a block begun costs nearly what a
        whole one does; halved in narrow layers and at small budgets, until the smallest low-rank
        part takes no more than half of what may be spent, so that there is still something to
        choose.
        """
        unit = self.multiple
        while unit > 1:
            smallest = Structure("columns", 0, unit)
            if form in ("rotated", "spatial"):
                smallest = Structure(form, 0, unit, unit)
            if all(2 * self.cost(smallest, limit) <= limit.weights for limit in self.limits):
                break
            unit //= 2
        return unit

    def allows(self, form: str) -> bool:
        """Whether any structure of a form fits."""
        return any(self.fits(structure) for structure in self.least(form))

    def least(self, form: str) -> list[Structure]:
        """The smallest structures of a form; none where it does not apply."""
        taps = self.taps
        least = {
            "columns": [Structure("columns", 1, 0)],
            "channels": [Structure("channels", 1, 0), Structure("channels", 0, 1)],
            "rotated": [Structure("rotated", 0, 1, 1)] if taps > 1 else [],
            "entries": [Structure("entries", 1, 0)],
            "spatial": [Structure("spatial", 0, 1, 1)] if is_separable(self.kernel_size) else [],
        }
        automatic = [form for form in least if form not in ("entries", "spatial")]
        names = automatic if form == "auto" else [form]
        return [structure for name in names for structure in least[name]]

    def smallest(self, form: str = "auto") -> float:
        """Smallest keep, as a fraction of the dense weights, that a form can reach."""
        dense = self.n * self.channels * self.taps
        costs = [s.cost(self.n, *self.shape(s.form)) for s in self.least(form)]
        return min(1.0, min(costs) / dense)


def largest_basis(budget: LayerBudget) -> int:
    """Largest r within the budget that leaves room for a part behind it; 0 when there is none."""
    rows = range(budget.channels, 0, -1)
    return next((r for r in rows if budget.largest_rank("rotated", 0, r) >= 1), 0)


def check_form(
    form: str,
    spatial: bool,
    known: tuple[str, ...] = FORMS,
    kernel_size: tuple[int, ...] | None = None,
) -> None:
    """BudgetError for a form that does not exist, that a solver lacks, or that does not apply."""
    unsplit = kernel_size is not None and not is_separable(kernel_size)
    if form == "spatial" and form in known and unsplit:
        raise BudgetError(
            complain(
                f"form='spatial' for a kernel of size {kernel_size}",
                "a convolution with several taps along its first axis and along the others",
                "Use form='auto'.",
            )
        )
    if form not in (*known, "auto"):
        raise BudgetError(
            complain(f"form={form!r}", f"one of auto, {', '.join(known)}", "Use form='auto'.")
        )
    if form == "rotated" and not spatial:
        raise BudgetError(
            complain(
                "form='rotated' for a layer without a spatial kernel",
                "a convolution with more than one tap",
                "Use form='auto'.",
            )
        )
