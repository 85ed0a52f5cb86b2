"""From one number for the whole model to what each layer may cost, by fixed rules.

In: what every layer costs and which of them may be compressed. Out: a `LayerBudget` a layer, so
that the total, layers that stay dense included, is what was asked; the solver then chooses each
layer's structure. `uniform` gives every layer the same fraction. `pca_energy` selects ranks k_l
(Zhang et al. 2015, section 3.4): with e_la the eigenvalues of the covariance of layer l's
responses before the activation,

    maximise  prod_l sum_{a <= k_l} e_la   subject to   sum_l cost_l(k_l) <= budget,

greedily. A layer's budget is the cost of its low-rank form, whichever form it then takes. Shares
by measured curves are in `slr_gpu.analysis`.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from .budget import LayerCost, check_reachable, remaining
from .layer_budget import LayerBudget, Limit
from .ops import NumpyOps
from .parallel import ALONE, Group


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
    for resource in keep:
        floors = {layer.name: overrides.get(layer.name, _smallest(layer)) for layer in layers}
        available = _available(keep, resource, layers, floors, totals)
        share = _water_level(available, layers, floors, overrides, resource)
        for layer in layers:
            kept = overrides.get(layer.name, max(share, floors[layer.name]))
            limits[layer.name].append(layer.limit(resource, min(kept, 1.0) * layer.weights))
    return _budgets(layers, limits, multiple)


def pca_energy(
    keep: dict[str, float],
    layers: list[LayerCost],
    overrides: dict[str, float],
    totals: dict[str, float],
    multiple: int = 1,
    *,
    energies: dict[str, Any],
) -> dict[str, LayerBudget]:
    """The ranks that keep the most PCA energy, greedily, each as the budget of its layer.

    From the largest rank that is no dearer than the dense layer, the rank with the smallest
    (relative loss of energy) / (cost saved) goes first, until the total is what was asked.

    Parameters
    ----------
    keep, layers, overrides, totals, multiple
        See `uniform`.
    energies : dict of str to array, (n,)
        Eigenvalues of the covariance of every layer's responses before the activation,
        descending; see `pca_energies`. Of grouped layers, the mean over the groups.

    Raises
    ------
    BudgetError
        See `uniform`.

    References
    ----------
    Zhang, Zou, He, Sun 2015, arXiv 1505.06798, section 3.4.
    """
    limits: dict[str, list[Limit]] = {layer.name: [] for layer in layers}
    free = [layer for layer in layers if layer.name not in overrides]
    for resource in keep:
        floors = {layer.name: overrides.get(layer.name, _smallest(layer)) for layer in layers}
        available = _available(keep, resource, layers, floors, totals)
        for layer in layers:
            available -= overrides.get(layer.name, 0.0) * layer.dense(resource)
        ranks = select_ranks(free, energies, available, resource)
        for layer in layers:
            fixed = overrides.get(layer.name)
            rank = ranks.get(layer.name)
            weights = layer.low_rank(rank) if fixed is None else min(fixed, 1.0) * layer.weights
            limits[layer.name].append(layer.limit(resource, weights))
    return _budgets(layers, limits, multiple)


def select_ranks(
    layers: list[LayerCost], energies: dict[str, Any], available: float, resource: str
) -> dict[str, int]:
    """Ranks within a total cost, at least 1 each; see `pca_energy`.

    Parameters
    ----------
    available : float
        Parameters, or multiply-adds per sample, for all of these layers.
    """
    ranks, positions, queue = {}, {}, []

    def cost(layer: LayerCost, k: int) -> float:
        return layer.low_rank(k) * positions[layer.name]

    def offer(number: int) -> None:
        """Put the layer's last rank up for removal."""
        layer = layers[number]
        k = ranks[layer.name]
        if k > 1:
            kept = np.asarray(energies[layer.name], dtype=float)[:k].clip(min=0)
            loss = kept[-1] / max(kept.sum(), 1e-30)
            saved = cost(layer, k) - cost(layer, k - 1)
            heapq.heappush(queue, (loss / saved, number))

    total = 0.0
    for number, layer in enumerate(layers):
        positions[layer.name] = layer.dense(resource) / layer.weights
        largest = layer.weights // layer.low_rank(1)
        ranks[layer.name] = max(1, min(largest, len(energies[layer.name])))
        total += cost(layer, ranks[layer.name])
        offer(number)
    while total > available and queue:
        number = heapq.heappop(queue)[1]
        layer = layers[number]
        k = ranks[layer.name]
        total -= cost(layer, k) - cost(layer, k - 1)
        ranks[layer.name] = k - 1
        offer(number)
    return ranks


def pca_energies(responses: Any, groups: int = 1, ranks: Group = ALONE) -> np.ndarray:
    """Eigenvalues of the covariance of responses (P, n) on any device, descending.

    Their mean (n / groups,) over groups of neighbouring responses; P rows on each of the ranks.
    """
    responses = NumpyOps().asarray(responses)
    rows = ranks.span(len(responses))[1]
    (total,) = ranks.sum((responses.sum(axis=0, dtype=np.float64),))
    centred = responses - (total / rows).astype(responses.dtype)
    energies = []
    for part in np.split(centred, groups, axis=1):
        (gram,) = ranks.sum(((part.T @ part).astype(np.float64),))
        energies.append(np.linalg.eigvalsh(gram / rows)[::-1].clip(min=0))
    return np.mean(energies, axis=0)


def _available(
    keep: dict[str, float],
    resource: str,
    layers: list[LayerCost],
    floors: dict[str, float],
    totals: dict[str, float],
) -> float:
    """What all of these layers may cost; BudgetError when their floors are over it."""
    smallest = sum(floors[layer.name] * layer.dense(resource) for layer in layers)
    biases = sum(layer.added_bias for layer in layers) if resource == "params" else 0
    keep = {resource: keep[resource]}
    check_reachable(keep, layers, totals, {resource: smallest + biases})
    return remaining(keep, layers, totals)[resource] - biases


def _budgets(
    layers: list[LayerCost], limits: dict[str, list[Limit]], multiple: int
) -> dict[str, LayerBudget]:
    return {
        layer.name: LayerBudget(
            layer.n,
            layer.channels,
            layer.taps,
            tuple(limits[layer.name]),
            multiple,
            layer.kernel_size,
        )
        for layer in layers
    }


def _smallest(layer: LayerCost) -> float:
    """Smallest fraction of a layer that a structure reaches (a rank-one part without a basis)."""
    return layer.low_rank(1) / layer.weights


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
