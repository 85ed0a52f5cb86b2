"""What a model costs, what its layers cost in every form, and what a request leaves for them.

In: shapes of layers, `keep` as asked. Out: costs by resource, and what all layers that are
compressed may cost together. This is the one place that knows the resources:

    params    stored weights; biases and whatever stays dense are paid first
    flops     multiply-adds of one sample
    latency   seconds of one call in a runtime on this machine, see `slr_gpu.latency`

`slr_gpu.shares` and `slr_gpu.analysis` hand the budget out to the layers.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from .decomposition import Structure
from .errors import BudgetError, InputError, complain
from .layer_budget import LayerBudget, Limit

RESOURCES = ("params", "flops", "latency")
# Reading or writing one value of a map takes a core as long as so many multiply-adds: from 10 where
# maps fit the caches to 35 where they do not (1x1 against 3x3 convolutions of the VGG-16 at 224x224
# in OpenVINO, one AVX-512 core).
MULTIPLY_ADDS_A_VALUE = 10


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs when dense.

    Attributes
    ----------
    name : str
    n, channels, taps : int
        Of one group of a grouped convolution.
    output_positions, input_positions : int
        Per sample, of all uses together; a linear layer has as many as rows.
    kernel_size : tuple of int
    spatial_positions : int, optional
        Positions after the first axis of the kernel is worked on and the others not; by default
        the input's.
    groups : int
        All of which have the same structure or budget.
    added_bias : int
        Parameters of the bias that a decomposed layer has and the dense one lacks.
    seconds : tuple of float
        Of the dense layer, then of each of its `parts`; empty if not measured.
    """

    name: str
    n: int
    channels: int
    taps: int
    output_positions: int
    input_positions: int
    kernel_size: tuple[int, ...] = ()
    spatial_positions: int | None = None
    groups: int = 1
    added_bias: int = 0
    seconds: tuple[float, ...] = ()

    @property
    def weights(self) -> int:
        return self.groups * self.n * self.channels * self.taps

    @property
    def compressible(self) -> bool:
        """Whether a rank-one part, with a bias, is smaller than the layer."""
        return self.low_rank(1) + self.added_bias < self.weights

    def dense(self, resource: str) -> float:
        """Weights, multiply-adds per sample, or seconds."""
        if resource == "latency":
            return self._measured()[0]
        return self.weights * (1 if resource == "params" else self.output_positions)

    def basis_weight(self, resource: str) -> float:
        return 1.0 if resource == "params" else self.input_positions / self.output_positions

    def limit(self, resource: str, weights: float) -> Limit:
        """The limit of so many weights, or multiply-adds per output position, for each group."""
        positions = self.spatial_positions or self.input_positions
        flops = resource == "flops"
        return Limit(
            self.basis_weight(resource),
            weights / self.groups,
            full_kernel=flops,
            spatial_weight=positions / self.output_positions if flops else 1.0,
        )

    def budget(self, weights: dict[str, float], multiple: int = 1) -> LayerBudget:
        """The budget of each group for so many weights by resource, as `limit` counts them."""
        limits = tuple(self.limit(resource, value) for resource, value in weights.items())
        return LayerBudget(self.n, self.channels, self.taps, limits, multiple, self.kernel_size)

    def cost(self, structure: Structure | None, resource: str) -> float:
        """Weights, multiply-adds per sample, or seconds of a structure; None stands for dense."""
        if structure is None:
            return self.dense(resource)
        if resource == "latency":
            dense, *coefficients = self._measured()
            parts = self.parts(structure)
            # A layer that is slower than dense is deployed multiplied out.
            return min(dense, sum(c * x for c, x in zip(coefficients, parts, strict=True)))
        budget = self.budget({resource: 0.0})
        cost = self.groups * budget.cost(structure, budget.limits[0])
        return cost + self.added_bias if resource == "params" else cost * self.output_positions

    def parts(self, structure: Structure) -> tuple[float, ...]:
        """What the seconds of a structure are linear in, per sample.

        Millions of multiply-adds of the basis, V, U and A, millions of values handed on between
        them, whether there are two parts to add, one, and millions of weights.
        """
        budget = self.budget({})
        channels, taps = budget.shape(structure.form)
        r, s, k = structure.r, structure.s, structure.k
        width = (channels if r is None else r) * taps
        kept = s * (1 if structure.form == "columns" else taps)
        spatial = structure.form == "spatial"
        before = (self.spatial_positions if spatial else None) or self.input_positions
        whole_kernel = structure.form == "columns" and taps > 1
        parts = (
            0 if r is None else r * channels * before,
            k * (width - (0 if whole_kernel else kept)) * self.output_positions,
            self.n * k * self.output_positions,
            self.n * kept * self.output_positions,
            (r or 0) * before + k * self.output_positions,
        )
        parts = tuple(self.groups * part / 1e6 for part in parts)
        weights = self.cost(structure, "params") / 1e6
        return (*parts, float(s > 0 and k > 0), 1.0, weights)

    def work(self, structure: Structure | None) -> float:
        """Multiply-adds per sample, and what it costs to read and write maps, in multiply-adds."""
        inputs, outputs = self.channels * self.input_positions, self.n * self.output_positions
        moved = inputs + outputs
        if structure is not None:
            r, s, k = structure.r, structure.s, structure.k
            read = self.channels if r is None else r
            moved = 0 if r is None else inputs + r * self.input_positions
            # V and A read what they need of the basis' output; U writes, A adds to that.
            if k:
                moved += (read - (s if r is not None else 0)) * self.input_positions
                moved += 2 * k * self.output_positions + outputs
            if s:
                whole = structure.form == "columns"
                moved += (read if whole else s) * self.input_positions
                moved += (2 if k else 1) * outputs
        return self.cost(structure, "flops") + MULTIPLY_ADDS_A_VALUE * self.groups * moved

    def _measured(self) -> tuple[float, ...]:
        if not self.seconds:
            raise InputError(
                complain(
                    f"a latency budget, but no seconds of layer {self.name!r}",
                    "an analysis with latency=LatencyTarget(...)",
                    "Analyze again with it.",
                )
            )
        return self.seconds

    def smallest(self, resource: str, form: str = "auto") -> float:
        """The cost of the cheapest structure of a form, or of the dense layer.

        ``auto`` is what `TradeOff` takes it for.
        """
        if form == "auto":
            form = "rotated" if self.taps > 1 else "columns"
        structures = [*self.budget({}).least(form), None]
        return min(self.cost(structure, resource) for structure in structures)

    def low_rank(self, k: int) -> int:
        """Weights of U V of rank k, at most those of the dense layer."""
        return min(self.groups * k * (self.n + self.channels * self.taps), self.weights)


def check_keep(keep: object) -> dict[str, float]:
    """The request as a dict of fractions.

    Raises
    ------
    InputError
        Unless it names params, flops or both with fractions in (0, 1].
    """
    if not isinstance(keep, dict) or not keep or set(keep) - set(RESOURCES):
        raise InputError(
            complain(
                f"keep={keep!r}",
                f"a dict with {' or '.join(RESOURCES)}",
                'For example keep={"flops": 0.25}.',
            )
        )
    for resource, fraction in keep.items():
        if not isinstance(fraction, numbers.Real) or not 0 < fraction <= 1:
            raise InputError(
                complain(
                    f"keep={{{resource!r}: {fraction!r}}}",
                    "a fraction in (0, 1]",
                    "0.25 leaves a quarter.",
                )
            )
    return {resource: float(fraction) for resource, fraction in keep.items()}


def remaining(
    keep: dict[str, float], layers: list[LayerCost], totals: dict[str, float]
) -> dict[str, float]:
    """What all of these layers may cost together, by resource; what stays dense is paid.

    Parameters
    ----------
    keep : dict of str to float
        Fractions of the whole model.
    layers : list of LayerCost
        Those that are compressed.
    totals : dict of str to float
        Cost of the whole dense model.
    """
    return {
        resource: fraction * totals[resource] - fixed(resource, layers, totals)
        for resource, fraction in keep.items()
    }


def fixed(resource: str, layers: list[LayerCost], totals: dict[str, float]) -> float:
    """The cost of all that is not in these layers."""
    return totals[resource] - sum(layer.dense(resource) for layer in layers)


def check_reachable(
    keep: dict[str, float],
    layers: list[LayerCost],
    totals: dict[str, float],
    smallest: dict[str, float],
) -> None:
    """Refuse a budget that even the cheapest structures exceed.

    Parameters
    ----------
    smallest : dict of str to float
        Least cost of all layers together, by resource.

    Raises
    ------
    BudgetError
        Names the smallest fraction that can be had.
    """
    for resource, left in remaining(keep, layers, totals).items():
        total = totals[resource]
        if smallest[resource] > left + 1e-9 * total:
            dense = fixed(resource, layers, totals)
            least = math.ceil(1e4 * (dense + smallest[resource]) / total - 1e-6) / 1e4
            raise BudgetError(
                complain(
                    f"keep={{{resource!r}: {keep[resource]:g}}}",
                    f"at least {least:.4f} for this model, of"
                    f" which what stays dense takes {dense / total:.4f}",
                    "Raise it, or leave fewer layers dense (keep_ends, ignore, overrides).",
                )
            )
