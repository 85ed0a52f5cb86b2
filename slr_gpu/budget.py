"""From one number for the whole model to a budget for each layer.

In: what every layer costs and which of them may be compressed. Out: a `LayerBudget` a layer. For
now the spending is uniform: every compressed layer keeps the same fraction, chosen so that the
total, layers that stay dense included, is what was asked.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from .curves import LayerBudget, Limit
from .errors import BudgetError, InputError, complain

RESOURCES = ("params", "flops")


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs when dense.

    Attributes
    ----------
    name : str
    n, channels, taps : int
    output_positions, input_positions : int
        Per sample; a linear layer has as many as rows.
    """

    name: str
    n: int
    channels: int
    taps: int
    output_positions: int
    input_positions: int

    @property
    def weights(self) -> int:
        return self.n * self.channels * self.taps

    def dense(self, resource: str) -> float:
        """Weights, or multiply-adds per sample."""
        return self.weights * (1 if resource == "params" else self.output_positions)

    def basis_weight(self, resource: str) -> float:
        return 1.0 if resource == "params" else self.input_positions / self.output_positions


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


def uniform(
    keep: dict[str, float],
    layers: list[LayerCost],
    overrides: dict[str, float],
    totals: dict[str, float],
    multiple: int = 1,
) -> dict[str, LayerBudget]:
    """The same fraction for every layer, so that the total is what was asked.

    Parameters
    ----------
    keep : dict of str to float
        Fractions of the whole model, all of which must hold.
    layers : list of LayerCost
        Those that are compressed. All else (layers left dense, biases, norms) is paid first.
    overrides : dict of str to float
        Fractions that the user set for single layers.
    totals : dict of str to float
        Parameters, and multiply-adds per sample, of the whole dense model.

    Raises
    ------
    BudgetError
        When even the smallest decompositions are over the budget; the message names the
        smallest fraction that can be had.
    """
    limits: dict[str, list[Limit]] = {layer.name: [] for layer in layers}
    for resource, fraction in keep.items():
        total = totals[resource]
        fixed = total - sum(layer.dense(resource) for layer in layers)
        available = fraction * total - fixed
        floors = {layer.name: overrides.get(layer.name, _smallest(layer)) for layer in layers}
        smallest = sum(floors[layer.name] * layer.dense(resource) for layer in layers)
        if smallest > available:
            raise BudgetError(
                complain(
                    f"keep={{{resource!r}: {fraction:g}}}",
                    f"at least {(fixed + smallest) / total:.4f} for this model, of which what"
                    f" stays dense takes {fixed / total:.4f}",
                    "Raise it, or leave fewer layers dense (keep_ends, ignore, overrides).",
                )
            )
        share = _water_level(available, layers, floors, overrides, resource)
        for layer in layers:
            kept = overrides.get(layer.name, max(share, floors[layer.name]))
            limits[layer.name].append(
                Limit(
                    layer.basis_weight(resource),
                    min(kept, 1.0) * layer.weights,
                    full_kernel=resource == "flops",
                )
            )
    return {
        layer.name: LayerBudget(
            layer.n, layer.channels, layer.taps, tuple(limits[layer.name]), multiple
        )
        for layer in layers
    }


def _smallest(layer: LayerCost) -> float:
    """Smallest fraction of a layer that a structure reaches (a rank-one part without a basis)."""
    return min(1.0, (layer.n + layer.channels * layer.taps) / layer.weights)


def _water_level(
    available: float,
    layers: list[LayerCost],
    floors: dict[str, float],
    overrides: dict[str, float],
    resource: str,
) -> float:
    """The common fraction f with ``sum max(f, floor) * dense`` equal to what is available."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        spent = sum(
            (overrides[layer.name] if layer.name in overrides else max(middle, floors[layer.name]))
            * layer.dense(resource)
            for layer in layers
        )
        low, high = (middle, high) if spent <= available else (low, middle)
    return low
