"""The multiple-choice knapsack: against all choices there are, and against its own bound."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import LinearConstraint, milp

from slr_gpu.knapsack import choose, undominated


def instance(seed, layers, options, resources):
    """Curves that fall with cost, layers of very different sizes; the first option is cheapest."""
    rng = np.random.default_rng(seed)
    costs, losses = [], []
    for _ in range(layers):
        size = rng.lognormal(0, 1, resources)
        costs.append(np.sort(rng.uniform(0.01, 1, (options, resources)), axis=0) * size)
        share = costs[-1].mean(axis=1) / costs[-1].mean(axis=1)[-1]
        losses.append(rng.lognormal(0, 1.5) * np.exp(-6 * share * rng.uniform(0.7, 1.3, options)))
    return losses, costs


def spent(costs, chosen):
    return sum(cost[option] for cost, option in zip(costs, chosen, strict=True))


def value(losses, chosen):
    return sum(loss[option] for loss, option in zip(losses, chosen, strict=True))


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("fraction", [0.15, 0.3, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_near_the_best_of_all_choices(seed, fraction, resources):
    losses, costs = instance(seed, 5, 7, resources)
    limits = fraction * sum(cost[-1] for cost in costs)
    chosen = choose(losses, costs, limits)
    fitting = [
        c
        for c in itertools.product(range(7), repeat=5)
        if np.all(spent(costs, c) <= limits * (1 + 1e-12))
    ]
    if not fitting:
        assert chosen is None
        return
    best = min(value(losses, c) for c in fitting)
    assert np.all(spent(costs, chosen) <= limits * (1 + 1e-9))
    # Five layers cannot split a budget finely: what one layer's neighbouring options differ by.
    assert best <= value(losses, chosen) * (1 + 1e-12)
    assert value(losses, chosen) <= 1.3 * best


@pytest.mark.parametrize("resources", [1, 2, 3])
def test_two_hundred_layers_are_near_the_bound(resources):
    losses, costs = instance(7, 200, 40, resources)
    limits = 0.25 * sum(cost[-1] for cost in costs)
    chosen = choose(losses, costs, limits)
    assert np.all(spent(costs, chosen) <= limits * (1 + 1e-9))
    # The linear relaxation, formulated anew, bounds every choice from below.
    count = 200 * 40
    one_each = np.kron(np.eye(200), np.ones(40))
    bound = milp(
        np.concatenate(losses),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(np.concatenate(costs).T, -np.inf, limits),
        ],
        bounds=(0, 1),
        integrality=np.zeros(count),
    ).fun
    assert bound * (1 - 1e-9) <= value(losses, chosen) <= 1.003 * bound


def test_more_budget_is_never_worse_and_none_is_refused():
    losses, costs = instance(3, 20, 15, 2)
    total = sum(cost[-1] for cost in costs)
    values = [value(losses, choose(losses, costs, f * total)) for f in (0.1, 0.2, 0.4, 0.8, 1.0)]
    assert all(later <= before * (1 + 1e-9) for before, later in itertools.pairwise(values))
    assert values[-1] == pytest.approx(sum(loss.min() for loss in losses))
    least = sum(cost[0] for cost in costs)
    assert choose(losses, costs, 0.999 * least) is None
    assert choose(losses, costs, least) is not None


def test_a_start_is_kept_where_no_bound_is_found(monkeypatch):
    module = sys.modules["slr_gpu.knapsack"]
    monkeypatch.setattr(module, "linprog", lambda *a, **k: SimpleNamespace(status=4))
    losses, costs = [np.array([3.0, 2.0, 0.0])], [np.array([[1.0], [2.0], [3.0]])]
    assert choose(losses, costs, np.array([2.0]), start=[0]) == [1]
    assert choose(losses, costs, np.array([2.0])) is None


def test_undominated_options():
    rng = np.random.default_rng(0)
    losses, costs = rng.uniform(size=60), rng.uniform(size=(60, 2))
    kept = set(undominated(losses, costs).tolist())
    for i in range(60):
        beaten = any(
            losses[j] <= losses[i] and np.all(costs[j] <= costs[i]) for j in range(60) if j != i
        )
        assert beaten != (i in kept)
    loose = set(undominated(losses, costs, slack=2.0).tolist())
    assert kept < loose
    one = undominated(losses, costs[:, :1])
    assert np.all(np.diff(losses[one]) < 0) and np.all(np.diff(costs[one, 0]) > 0)
