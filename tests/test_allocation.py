"""Ranks by PCA energy: against all ranks there are, within the budget, and end to end."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import slr_gpu
from slr_gpu import Zhang
from slr_gpu.budget import LayerCost
from slr_gpu.cli import app
from slr_gpu.shares import pca_energies, pca_energy, select_ranks, uniform


def instance(seed):
    """Three layers of different shapes, prices and spectra."""
    rng = np.random.default_rng(seed)
    layers = [
        LayerCost("a", 9, 4, 9, 64, 64, (3, 3)),
        LayerCost("b", 14, 8, 4, 16, 64, (2, 2)),
        LayerCost("c", 10, 30, 1, 1, 1),
    ]
    decay = rng.uniform(0.4, 0.95, size=3)
    energies = {
        layer.name: rng.uniform(0.5, 1.5) * rate ** np.arange(layer.n)
        for layer, rate in zip(layers, decay, strict=True)
    }
    return layers, energies


def totals_of(layers):
    return {r: sum(layer.dense(r) for layer in layers) for r in ("params", "flops")}


def price(layer, k, resource):
    positions = layer.output_positions if resource == "flops" else 1
    return k * (layer.n + layer.channels * layer.taps) * positions


@pytest.mark.parametrize("resource", ["params", "flops"])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_near_the_best_product(seed, fraction, resource):
    layers, energies = instance(seed)
    budget = fraction * totals_of(layers)[resource]
    # A rank is either removed or not: the greedy one may leave up to the dearest of them unspent.
    dearest = max(price(layer, 1, resource) for layer in layers)

    def product(ranks):
        return np.prod([energies[x.name][:k].sum() for x, k in zip(layers, ranks, strict=True)])

    def best(budget):
        ranges = [range(1, 1 + int(x.weights // price(x, 1, "params"))) for x in layers]
        fitting = (
            ranks
            for ranks in itertools.product(*ranges)
            if sum(price(x, k, resource) for x, k in zip(layers, ranks, strict=True)) <= budget
        )
        return max(product(ranks) for ranks in fitting)

    ranks = select_ranks(layers, energies, budget, resource)
    spent = sum(price(layer, ranks[layer.name], resource) for layer in layers)
    assert spent <= budget
    reached = product([ranks[layer.name] for layer in layers])
    assert reached <= best(budget) * (1 + 1e-12)
    assert reached >= 0.97 * best(budget - dearest)
    assert reached >= 0.85 * best(budget)


def test_ranks_go_where_the_energy_is():
    """Of two equal layers the one with the flat spectrum keeps more."""
    layers = [LayerCost(name, 16, 8, 9, 10, 10, (3, 3)) for name in ("flat", "steep")]
    energies = {"flat": np.full(16, 1.0), "steep": 0.5 ** np.arange(16)}
    dense = totals_of(layers)["params"]
    ranks = select_ranks(layers, energies, 0.5 * dense, "params")
    assert ranks["flat"] > 2 * ranks["steep"] >= 2
    # The scale of a layer's responses does not matter, only shares of their energy do.
    scaled = {"flat": 1e-6 * energies["flat"], "steep": 1e6 * energies["steep"]}
    assert select_ranks(layers, scaled, 0.5 * dense, "params") == ranks


@pytest.mark.parametrize("keep", [{"flops": 0.4}, {"params": 0.5}, {"flops": 0.6, "params": 0.4}])
def test_budgets_of_all_layers_are_within_the_total(keep):
    layers, energies = instance(0)
    totals = {name: 1.2 * total for name, total in totals_of(layers).items()}  # a fifth is fixed
    budgets = pca_energy(keep, layers, {}, totals, energies=energies)
    assert [type(b) for b in budgets.values()] == [slr_gpu.LayerBudget] * 3
    for number, (resource, fraction) in enumerate(keep.items()):
        fixed = totals[resource] - totals_of(layers)[resource]
        spent = sum(
            budgets[layer.name].limits[number].weights * layer.dense(resource) / layer.weights
            for layer in layers
        )
        available = fraction * totals[resource] - fixed
        dearest = max(price(layer, 1, resource) for layer in layers)
        assert available - dearest < spent <= available
        for layer in layers:
            limit = budgets[layer.name].limits[number]
            k = budgets[layer.name].largest_rank("columns", 0)
            assert k >= 1 and price(layer, k, "params") <= limit.weights


def test_overrides_are_kept_and_paid_first():
    layers, energies = instance(1)
    keep, totals = {"params": 0.5}, totals_of(layers)
    budgets = pca_energy(keep, layers, {"b": 0.9}, totals, energies=energies)
    assert budgets["b"].weights == pytest.approx(0.9 * layers[1].weights)
    assert sum(budget.weights for budget in budgets.values()) <= 0.5 * totals["params"]
    # What is left for the others is spent on them.
    step = max(price(layer, 1, "params") for layer in layers)
    assert sum(budget.weights for budget in budgets.values()) > 0.5 * totals["params"] - step


def test_a_budget_that_cannot_be_met_names_the_smallest():
    layers, energies = instance(2)
    totals = totals_of(layers)
    least = sum(price(layer, 1, "flops") for layer in layers) / totals["flops"]
    named = f"{math.ceil(1e4 * least) / 1e4:.4f}"  # rounded up, so that it can be had
    uniform({"flops": float(named)}, layers, {}, totals)
    with pytest.raises(slr_gpu.BudgetError, match=f"at least {named}"):
        pca_energy({"flops": 0.9 * least}, layers, {}, totals, energies=energies)
    with pytest.raises(slr_gpu.BudgetError, match=f"at least {named}"):
        uniform({"flops": 0.9 * least}, layers, {}, totals)
    budgets = pca_energy({"flops": 1.0001 * least}, layers, {}, totals, energies=energies)
    assert {b.largest_rank("columns", 0) for b in budgets.values()} == {1}


def test_layers_without_any_energy():
    layers, energies = instance(3)
    energies["a"] = np.zeros(layers[0].n)
    ranks = select_ranks(layers, energies, 0.4 * totals_of(layers)["flops"], "flops")
    assert ranks["a"] == 1


def test_energies_are_the_planted_variances():
    rng = np.random.default_rng(4)
    Q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    variances = np.array([5.0, 3.0, 1.0, 0.5, 0.1, 0.0])
    scores = np.linalg.qr(rng.normal(size=(400, 6)))[0]
    scores -= scores.mean(axis=0)
    scores = np.linalg.qr(scores)[0] * np.sqrt(400)  # uncorrelated, mean 0, variance 1
    responses = (scores * np.sqrt(variances)) @ Q.T + rng.normal(size=6) * 100
    np.testing.assert_allclose(pca_energies(responses), variances, atol=1e-9)
    np.testing.assert_allclose(pca_energies(responses.astype("f4")), variances, atol=1e-3)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    ).eval()


@pytest.fixture(scope="module")
def data():
    coarse = torch.randn(80, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, scale_factor=2, mode="bilinear")


@pytest.mark.parametrize("keep", [{"flops": 0.4}, {"flops": 0.5, "params": 0.3}])
def test_compress_with_selected_ranks(data, keep):
    model = network()
    run = {"solver": Zhang(), "samples": 1000, "multiple": 1, "progress": False}
    selected = slr_gpu.compress(model, data, keep, allocation="pca_energy", **run).report
    same = slr_gpu.compress(model, data, keep, **run).report
    reached = [selected.achieved[resource] / fraction for resource, fraction in keep.items()]
    assert 0.8 < max(reached) <= 1  # the scarcest resource is spent, none exceeded
    assert selected.settings["allocation"] == "pca_energy"
    shares = [row.flops_kept / row.flops for row in selected.layers if row.compressed]
    before = [row.flops_kept / row.flops for row in same.layers if row.compressed]
    assert np.ptp(shares) > 2 * np.ptp(before)


def test_compress_refuses_unknown_allocations(data):
    with pytest.raises(slr_gpu.InputError, match="one of uniform, pca_energy"):
        slr_gpu.compress(network(), data, {"flops": 0.5}, allocation="random", progress=False)
    with pytest.raises(slr_gpu.BudgetError, match="at least 0"):
        slr_gpu.compress(network(), data, {"flops": 0.001}, allocation="pca_energy", progress=False)


def test_command_line(tmp_path, monkeypatch):
    (tmp_path / "allocation_model.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(16, 16), nn.ReLU())])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    np.save("calib.npy", np.random.default_rng(0).normal(size=(200, 16)))
    options = ["--model", "allocation_model:make", "--data", "calib.npy", "--keep", "params=0.8"]
    options += ["--out", "out", "--allocation"]
    done = CliRunner().invoke(app, ["compress", *options, "pca_energy"])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["allocation"] == "pca_energy"
    assert report["achieved"]["params"] <= 0.8
    done = CliRunner().invoke(app, ["compress", *options, "random"])
    assert done.exit_code == 1 and "one of uniform, pca_energy" in done.output.replace("\n", " ")
