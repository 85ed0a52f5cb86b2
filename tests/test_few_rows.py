"""Fewer rows than columns: never worse than the SVD of the weight, which needs no data."""

from __future__ import annotations

import math

import numpy as np
import pytest

import slr_gpu
from slr_gpu import LayerIO
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem
from slr_gpu.ridge import strength

OPS = NumpyOps()
UNSEEN = 1000


def draw(rng, kind, rows, m):
    """Inputs without structure, with decaying correlations, or of 20 hidden sources."""
    if kind == "white":
        return rng.normal(size=(rows, m))
    if kind == "correlated":
        mix = rng.normal(size=(m, m)) * 0.95 ** np.arange(m)[:, None]
        return np.maximum(rng.normal(size=(rows, m)) @ mix, 0)
    return rng.normal(size=(rows, 20)) @ rng.normal(size=(20, m)) + 0.3 * rng.normal(size=(rows, m))


def layer(seed, kind, shape, rows, activation="relu"):
    """A layer whose weight has decaying singular values, and rows that no fit sees."""
    rng = np.random.default_rng(seed)
    n, channels, taps = shape
    m = channels * taps
    U, sigma, V = np.linalg.svd(rng.normal(size=(n, m)) / m**0.5, full_matrices=False)
    weight = (U * sigma * 0.93 ** np.arange(len(sigma))) @ V
    inputs = draw(rng, kind, rows + UNSEEN, m)
    weight = weight.reshape((n, channels, taps) if taps > 1 else (n, m))
    bias = 0.1 * rng.normal(size=n)
    return LayerIO(weight, bias, inputs[:rows], activation=activation), inputs[rows:]


def unseen_error(layer_io, inputs, decomposition):
    def response(weight, bias):
        return layer_io.activation.value(OPS, inputs @ weight.T + bias)

    wanted = response(layer_io.weight, layer_io.bias)
    missed = response(decomposition.to_dense(), decomposition.bias) - wanted
    return float((missed**2).sum() / (wanted**2).sum())


def svd_of_the_weight(layer_io, keep):
    n, m = layer_io.weight.shape
    U, sigma, V = np.linalg.svd(layer_io.weight, full_matrices=False)
    k = int(keep * n * m / (n + m))
    return (U[:, :k] * sigma[:k]) @ V[:k]


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("kind", ["white", "correlated", "hidden sources"])
def test_never_worse_than_the_svd_of_the_weight(kind, activation):
    ratios = []
    for shape in ((32, 120, 1), (24, 40, 3), (64, 300, 1)):
        for rows in (4, 12, 30, 100):
            for seed in range(2):
                layer_io, inputs = layer(seed, kind, shape, rows, activation)
                fitted = slr_gpu.fit(layer_io, keep=0.25)
                held = layer_io.split(0.1)[1]
                wanted = layer_io.targets[held]
                weight = svd_of_the_weight(layer_io, 0.25)
                before = layer_io.inputs[held] @ weight.T + layer_io.bias
                plain = ((layer_io.activation.value(OPS, before) - wanted) ** 2).sum()
                assert fitted.held_out_error <= plain / (wanted**2).sum() * (1 + 1e-9)
                baseline = slr_gpu.fit(layer_io, keep=0.25, solver=slr_gpu.WeightSVD())
                assert fitted.parameters <= baseline.parameters + sum(layer_io.weight.shape)
                ratios.append(
                    unseen_error(layer_io, inputs, fitted)
                    / unseen_error(layer_io, inputs, baseline)
                )
    # A handful of rows can deceive; they may not often, nor by much.
    assert np.mean(np.array(ratios) > 1.001) <= 0.1
    assert max(ratios) < 1.25
    # Where inputs have structure, a tenth as many rows as columns already help.
    assert np.mean(ratios) < {"white": 1.01, "correlated": 0.9, "hidden sources": 0.75}[kind]


def test_ridge_is_infinite_without_structure_and_small_with_it():
    found = {
        kind: strength(ResponseProblem(layer(0, kind, (64, 300, 1), 100)[0], ops=OPS), 12)
        for kind in ("white", "hidden sources")
    }
    assert math.isinf(found["white"])
    assert found["hidden sources"] <= 0.1


def test_the_svd_of_the_weight_is_named_where_it_is_used():
    layer_io, _ = layer(0, "white", (64, 300, 1), 30)
    fitted = slr_gpu.fit(layer_io, keep=0.25)
    assert any("fewer rows than columns" in note for note in fitted.notes)
    np.testing.assert_allclose(fitted.to_dense(), svd_of_the_weight(layer_io, 0.25), atol=1e-9)


def test_a_ridge_that_was_asked_for_is_kept():
    layer_io, _ = layer(0, "white", (64, 300, 1), 30)
    fitted = slr_gpu.fit(layer_io, keep=0.25, ridge=1e-3)
    assert not any("fewer rows" in note for note in fitted.notes)


def test_folds_hold_every_sample_out_once():
    rng = np.random.default_rng(0)
    for count, ids in ((23, None), (60, np.repeat(np.arange(12), 5)), (3, None)):
        layer_io = LayerIO(np.ones((2, 3)), None, rng.normal(size=(count, 3)), sample_ids=ids)
        held = [layer_io.split(0.2, fold)[1] for fold in range(5)]
        np.testing.assert_array_equal(np.sort(np.concatenate(held)), np.arange(count))
        for fold, rows in enumerate(held):
            np.testing.assert_array_equal(
                np.setdiff1d(np.arange(count), rows), layer_io.split(0.2, fold)[0]
            )
