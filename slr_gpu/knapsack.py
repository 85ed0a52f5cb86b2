"""One option of every layer, so that the total loss is least and no total cost is over its limit.

In: losses and costs of the options of each layer, and limits. Out: which option each layer takes:
the multiple-choice knapsack

    minimise  sum_l loss[l][x_l]   subject to   sum_l cost[l][x_l] <= limit   (for every resource).

Its linear relaxation (Sinha and Zoltners 1979) splits at most as many layers as there are
resources. Those, and the layers for which it nearly chose otherwise, are chosen exactly among their
options of small reduced cost (the "core" of Balas and Zemel 1980), and what is left of the limits
is spent by the best exchanges of single options.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_diag, csr_matrix, vstack

# Layers and options of each that are tried in all combinations.
CORE = (4, 24)


def choose(
    losses: list[np.ndarray],
    costs: list[np.ndarray],
    limits: np.ndarray,
    start: list[int] | None = None,
) -> list[int] | None:
    """The option of each layer.

    Parameters
    ----------
    losses : list of array, (options,)
    costs : list of array, (options, resources)
    limits : array, (resources,)
    start : list of int, optional
        A choice within the limits: what is returned is no worse.

    Returns
    -------
    list of int, or None
        None when no choice is within the limits.
    """
    limits = np.asarray(limits, dtype=float)
    unit = np.where(limits > 0, limits, 1.0)
    costs = [np.asarray(cost, dtype=float) / unit for cost in costs]
    limits = limits / unit
    losses = [np.asarray(loss, dtype=float) for loss in losses]
    scale = max(max(float(np.abs(loss).max()) for loss in losses), 1e-300)
    sizes = [len(loss) for loss in losses]
    one_each = block_diag([np.ones((1, size)) for size in sizes], format="csr")
    relaxed = linprog(
        np.concatenate(losses) / scale,
        A_ub=vstack([csr_matrix(np.concatenate(costs).T)]),
        b_ub=limits,
        A_eq=one_each,
        b_eq=np.ones(len(sizes)),
        bounds=(0, 1),
        method="highs-ds",
    )
    if relaxed.status != 0:
        return None if start is None else _exchange(losses, costs, limits, list(start))
    prices = -relaxed.ineqlin.marginals
    reduced = [loss / scale + cost @ prices for loss, cost in zip(losses, costs, strict=True)]
    shares = np.split(relaxed.x, np.cumsum(sizes)[:-1])
    chosen = [int(np.argmax(share)) for share in shares]
    split = [layer for layer, share in enumerate(shares) if share.max() < 1 - 1e-9]
    starts = [_round(losses, costs, limits, reduced, chosen, split), start]
    found = [_exchange(losses, costs, limits, list(first)) for first in starts if first is not None]
    return min(found, key=lambda options: _total(losses, options), default=None)


def _total(losses: list[np.ndarray], chosen: list[int]) -> float:
    return sum(float(loss[option]) for loss, option in zip(losses, chosen, strict=True))


def _round(
    losses: list[np.ndarray],
    costs: list[np.ndarray],
    limits: np.ndarray,
    reduced: list[np.ndarray],
    chosen: list[int],
    split: list[int],
) -> list[int] | None:
    """The best options of the core's layers beside the chosen ones of the others."""
    layers, options = CORE
    # How far each layer is from another choice; split layers are at it.
    doubt = {
        layer: float(np.partition(values, 1)[1] - values.min())
        for layer, values in enumerate(reduced)
        if len(values) > 1 and layer not in split
    }
    core = split + sorted(doubt, key=doubt.__getitem__)[: max(0, layers - len(split))]
    total = sum(
        (costs[layer][chosen[layer]] for layer in range(len(chosen)) if layer not in core),
        np.zeros_like(limits),
    )[None]
    loss, picks = np.zeros(1), np.zeros((1, 0), dtype=int)
    for layer in core:
        near = np.argsort(reduced[layer], kind="stable")[:options]
        near = np.union1d(near, [np.argmin(costs[layer].sum(axis=1))])
        total = (total[:, None] + costs[layer][near]).reshape(-1, len(limits))
        loss = (loss[:, None] + losses[layer][near]).reshape(-1)
        picks = np.concatenate(
            [np.repeat(picks, len(near), axis=0), np.tile(near, len(picks))[:, None]], axis=1
        )
        fits = np.all(total <= limits * (1 + 1e-12), axis=1)
        total, loss, picks = total[fits], loss[fits], picks[fits]
    if not len(loss):
        return _cheapest(costs, limits)
    for layer, option in zip(core, picks[np.argmin(loss)], strict=True):
        chosen[layer] = int(option)
    return chosen


def _cheapest(costs: list[np.ndarray], limits: np.ndarray) -> list[int] | None:
    """The cheapest option of every layer, by the sum of its shares of the limits, if it fits."""
    chosen = [int(np.argmin(cost.sum(axis=1))) for cost in costs]
    total = sum(cost[option] for cost, option in zip(costs, chosen, strict=True))
    return chosen if np.all(total <= limits * (1 + 1e-12)) else None


def _exchange(
    losses: list[np.ndarray], costs: list[np.ndarray], limits: np.ndarray, chosen: list[int]
) -> list[int]:
    """Exchange single options while that lowers the loss within the limits."""
    total = sum(cost[option] for cost, option in zip(costs, chosen, strict=True))
    while True:
        best = (0.0, -1, -1)
        for layer, option in enumerate(chosen):
            rest = limits * (1 + 1e-12) - (total - costs[layer][option])
            fits = np.all(costs[layer] <= rest, axis=1)
            if not fits.any():
                continue
            other = int(np.argmin(np.where(fits, losses[layer], np.inf)))
            gain = losses[layer][option] - losses[layer][other]
            if gain > best[0] * (1 + 1e-12):
                best = (gain, layer, other)
        gain, layer, other = best
        if layer < 0:
            return chosen
        total = total - costs[layer][chosen[layer]] + costs[layer][other]
        chosen[layer] = other


def undominated(losses: np.ndarray, costs: np.ndarray, slack: float = 1.0) -> np.ndarray:
    """Options that no other beats in all costs and in loss.

    Parameters
    ----------
    losses : array, (options,)
    costs : array, (options, resources)
    slack : float
        Above 1, also those whose loss is at most so many times that of the best one that costs no
        more.

    Returns
    -------
    int array
        By the first cost, ascending. With one resource and without slack losses fall strictly.
    """
    kept: list[int] = []
    for index in np.lexsort((losses, *costs.T[::-1])):
        rivals = np.array(kept, dtype=int)
        cheaper = np.all(costs[rivals] <= costs[index], axis=1)
        best = losses[rivals[cheaper]].min(initial=np.inf)
        if losses[index] < best or (slack > 1 and losses[index] <= slack * best):
            kept.append(int(index))
    return np.array(kept, dtype=int)
