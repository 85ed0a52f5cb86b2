"""The logic of the benchmarks: resuming, summaries, mixtures of two networks, fine-tuning."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import slr_gpu
from slr_gpu.errors import InputError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import convergence, fine_tuning, paper_table, solver_grid
from benchmarks.contenders import CONTENDERS, REFERENCE, UNCOUNTED, find
from benchmarks.models import vgg16
from benchmarks.store import Store, fingerprint, key
from benchmarks.vgg_layers import branch_logits, layer_labels, prefix_branches, single_branch


def record(contender, layer, keep, error, **more):
    return {"contender": contender, "layer": layer, "keep": keep, "error": error, **more}


# -- resuming ------------------------------------------------------------------------------------


def test_fingerprint_follows_settings_only():
    settings = {"solver": slr_gpu.Majorize(), "keep": 0.25}
    assert fingerprint(**settings) == fingerprint(keep=0.25, solver=slr_gpu.Majorize())
    assert fingerprint(**settings) != fingerprint(keep=0.25, solver=slr_gpu.Majorize(iterations=11))
    assert fingerprint(**settings) != fingerprint(keep=0.3, solver=slr_gpu.Majorize())


def test_key_names_a_cell():
    assert key("ADMM, columns", "conv3-1", 0.25) == "ADMM, columns | conv3-1 | 0.25"


def test_store_resumes_and_redoes_only_what_changed(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"error": float("nan"), "curve": (1.0, 2.0)}

    path = tmp_path / "results" / "grid.json"
    first = Store(path).get_or_make("cell", "one", make)
    assert first["error"] is None and first["curve"] == [1.0, 2.0]
    json.loads(path.read_text())
    assert Store(path).get_or_make("cell", "one", make) == first
    assert len(calls) == 1
    Store(path).get_or_make("cell", "two", make)
    assert len(calls) == 2
    assert Store(path).get("cell", "one") is None


def test_store_tries_failures_again(tmp_path):
    path = tmp_path / "grid.json"
    Store(path).put("cell", "one", {"failed": "BudgetError: too small"})
    assert Store(path).get("cell", "one") is None
    assert Store(path).records["cell"]["failed"]


# -- contenders ----------------------------------------------------------------------------------


def test_contenders_are_named_once_and_found():
    labels = [contender.label for contender in CONTENDERS]
    assert len(set(labels)) == len(labels) and REFERENCE in labels
    assert [c.label for c in find(["ADMM, columns", REFERENCE])] == [REFERENCE, "ADMM, columns"]
    assert UNCOUNTED < set(labels)
    with pytest.raises(InputError, match="Majorize, auto"):
        find(["nobody"])


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.label)
def test_contenders_stay_within_the_budget(contender):
    rng = np.random.default_rng(1)
    inputs = np.maximum(rng.normal(size=(300, 6)) @ rng.normal(size=(6, 72)), 0)
    weight = rng.normal(size=(12, 8, 3, 3))
    layer_io = slr_gpu.LayerIO(weight, None, inputs)
    cell = solver_grid.measure(contender, layer_io, 0.4, quick=True)
    assert "failed" not in cell
    assert cell["kept"] <= 0.4
    assert cell["error"] < 1.5


# -- summaries -----------------------------------------------------------------------------------


def test_summary_of_the_grid():
    records = [
        record(REFERENCE, "a", 0.1, 0.10),
        record("Zhang", "a", 0.1, 0.20),
        record("GreBsmo, values alone", "a", 0.1, 0.05),
        record(REFERENCE, "b", 0.1, 0.1009),
        record("Zhang", "b", 0.1, 0.10),
        record(REFERENCE, "c", 0.1, 0.3),
        record("Zhang", "c", 0.1, None, failed="ValueError: no"),
        record("Zhang", "d", 0.1, 0.3),
    ]
    summary = solver_grid.summarize(records)
    assert (summary["cells"], summary["best_or_close"]) == (2, 1)
    assert summary["worst"] == {
        "ratio": pytest.approx(2.0), "layer": "a", "keep": 0.1, "best": "GreBsmo, values alone"
    }  # fmt: skip
    expected = math.sqrt(2.0 * 0.10 / 0.1009)
    assert summary["mean_ratio"]["Zhang"] == pytest.approx(expected)
    assert summary["mean_ratio"][REFERENCE] == pytest.approx(1.0)
    equal = solver_grid.summarize(records, equal_cost=True)
    assert (equal["cells"], equal["best_or_close"]) == (2, 2)
    assert "GreBsmo, values alone" not in equal["mean_ratio"]


def test_summary_of_the_supports():
    greedy = {"error": 0.1, "shared": 0.5}
    records = [
        record("ADMM, columns", "a", 0.1, 0.2, greedy=greedy),
        record("ADMM, columns", "b", 0.1, 0.05, greedy=greedy),
        record("ADMM, columns", "c", 0.1, 0.3),
    ]
    found = solver_grid.summarize(records)["supports"]["ADMM, columns"]
    assert found == {
        "cells": 2, "lower_error": 1, "mean_ratio": pytest.approx(1.0), "shared": 0.5
    }  # fmt: skip


def test_summary_of_nothing():
    summary = solver_grid.summarize([])
    assert summary["cells"] == 0 and summary["mean_ratio"] == {}


def points(*losses):
    return [{"seconds": float(i + 1), "loss": loss} for i, loss in enumerate(losses)]


def test_when_a_curve_reaches_and_settles():
    curve = points(3.0, 0.9, 2.0, 1.0, 1.0)
    assert convergence.reach(curve, 1.0) == 2.0
    assert convergence.reach(curve, 0.5) is None
    assert convergence.settled(curve, 1.0) == 4.0
    assert convergence.settled(curve, 0.5) is None


def test_summary_of_convergence():
    records = [
        {"label": "ADMM, gradient", "curve": points(2.0, 1.0, 1.0), "loss": 1.0, "seconds": 20.0},
        {"label": "Majorize", "curve": points(0.9), "loss": 0.9, "seconds": 1.0},
        {"label": "Majorize, true loss", "curve": points(5.0), "loss": 5.0, "seconds": 1.0},
    ]
    found = convergence.summarize(records)["ADMM, gradient"]
    assert found["Majorize"]["ratio"] == pytest.approx(0.05) and found["Majorize"]["within_limit"]
    assert found["Majorize"]["ratio_settled"] == pytest.approx(0.5)
    assert found["Majorize, true loss"]["ratio"] is None
    assert not found["Majorize, true loss"]["within_limit"]


def test_traces_end_at_the_loss_that_is_handed_over():
    rng = np.random.default_rng(2)
    inputs = np.maximum(rng.normal(size=(400, 8)) @ rng.normal(size=(8, 36)), 0)
    layer_io = slr_gpu.LayerIO(rng.normal(size=(10, 4, 3, 3)), None, inputs)
    sizes = convergence.structures(layer_io, 0.5)
    for entry in convergence.entries(quick=True):
        found = convergence.trace(layer_io, entry, sizes[entry.low_rank_only])
        seconds = [point["seconds"] for point in found["curve"]]
        assert seconds == sorted(seconds) and seconds[-1] <= found["seconds"]
        losses = [point["loss"] for point in found["curve"]]
        # ADMM's A + B is cut to rank k outside S, and its bias refined, before it is handed over.
        if not entry.label.startswith("ADMM"):
            assert any(loss == pytest.approx(found["loss"], rel=1e-6) for loss in losses)
        if entry.label.startswith("Majorize"):
            assert len(losses) > 2


# -- mixtures of networks ------------------------------------------------------------------------


def chain(seed):
    torch.manual_seed(seed)
    return [
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 36, 5),
    ]  # fmt: skip


def test_prefixes_are_the_right_mixtures():
    original, compressed, positions = chain(0), chain(1), (2, 5)
    x = torch.randn(7, 1, 6, 6)
    # The first layer is dense in both, as in a compressed network.
    compressed[0] = original[0]
    found = branch_logits(compressed, prefix_branches(compressed, original, positions), x, batch=3)
    assert list(found) == ["0", "1", "2"]
    for j, logits in enumerate(found.values()):
        mixture = copy.deepcopy(original)
        for position in positions[:j]:
            mixture[position] = compressed[position]
        torch.testing.assert_close(logits, nn.Sequential(*mixture)(x))


def test_single_layers_are_the_right_mixtures():
    original, other = chain(0), chain(1)
    x = torch.randn(7, 1, 6, 6)
    branches = {str(p): single_branch(original, p, other[p]) for p in (0, 2, 5)}
    found = branch_logits(original, branches, x, batch=3)
    for position in (0, 2, 5):
        mixture = list(original)
        mixture[position] = other[position]
        torch.testing.assert_close(found[str(position)], nn.Sequential(*mixture)(x))


def test_layers_have_the_papers_names():
    model = vgg16()
    names = [f"features.{i}" for i in range(len(model.features))]
    names += [f"classifier.{i}" for i in range(len(model.classifier))]
    labels = layer_labels(model, names)
    assert len(labels) == 16
    assert labels["conv1-1"] == "features.0" and labels["conv3-1"] == "features.14"
    assert labels["conv5-3"] == "features.40" and labels["linear3"] == "classifier.7"


def test_parts_of_a_layer():
    layer = slr_gpu.layers.SLRLinear(10, 6, kept=[1, 4], rank=2)
    shares = paper_table.parts(layer, 60)
    assert shares == {"A": 12 / 60, "B": (2 * 8 + 6 * 2) / 60, "A+B": 40 / 60}


# -- fine-tuning ---------------------------------------------------------------------------------


def test_learning_rate_falls_to_zero():
    assert fine_tuning.learning_rate(0.1, 0.0) == pytest.approx(0.1)
    assert fine_tuning.learning_rate(0.1, 0.5) == pytest.approx(0.05)
    assert fine_tuning.learning_rate(0.1, 1.2) == pytest.approx(0.0)


def test_fine_tuning_counts_its_steps_and_keeps_to_its_minutes():
    x, y = torch.randn(40, 1, 6, 6), torch.randint(5, (40,))
    model = nn.Sequential(*chain(0))
    tuning = fine_tuning.Tuning(epochs=6, lr=5e-3, batch_size=8)
    facts = fine_tuning.fine_tune(model, x, y, tuning)
    assert (facts["steps"], facts["epochs"]) == (30, 6.0)
    assert facts["last_loss"] < facts["first_loss"]
    none = fine_tuning.fine_tune(model, x, y, fine_tuning.Tuning(minutes=0.0001, epochs=10_000))
    assert none["steps"] < 10_000


def test_speed_up_of_a_network_over_itself():
    model = nn.Sequential(*chain(0))
    found = fine_tuning.speed_up(model, model, torch.randn(4, 1, 6, 6), seconds=0.2)
    assert found["rounds"] >= 7 and 0.3 < found["speed_up"]["median"] < 3
