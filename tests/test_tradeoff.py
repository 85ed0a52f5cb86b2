"""Trade-off curves: every point against its weight, applied to the held-out rows by hand."""

from __future__ import annotations

import numpy as np
import pytest

from slr_gpu import LayerIO
from slr_gpu.decomposition import Structure
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem
from slr_gpu.tradeoff import TradeOff


def layer(kernel=(3, 3), c=5, n=7, rows=400, activation="relu"):
    rng = np.random.default_rng(0)
    m = c * int(np.prod(kernel, dtype=int))
    mix = rng.normal(size=(m, m)) * 0.8 ** np.arange(m)
    inputs = rng.normal(size=(rows, m)) @ mix + 0.3
    return LayerIO(
        rng.normal(size=(n, m)), rng.normal(size=n), inputs, activation=activation,
        kernel_size=kernel,
    )  # fmt: skip


def problem_of(arrays, held_out=0.1):
    return ResponseProblem(arrays, ops=NumpyOps(), ridge=1e-3, held_out=held_out)


def error_by_hand(arrays, rows, M, bias):
    Y = np.maximum(arrays.inputs[rows] @ arrays.weight.T + arrays.bias, 0)
    Z = arrays.inputs[rows] @ M.T + bias
    return np.sum((Y - np.maximum(Z, 0)) ** 2) / np.sum(Y**2)


@pytest.mark.parametrize(
    "form,kernel",
    [("auto", (3, 3)), ("auto", ()), ("columns", (3,)), ("channels", (3, 3)), ("spatial", (3, 3))],
)
def test_points_are_the_errors_of_their_weights(form, kernel):
    arrays = layer(kernel)
    tradeoff = TradeOff(problem_of(arrays), form)
    points = tradeoff.points()
    held = arrays.split(0.1)[1]
    assert len({point.structure for point in points}) == len(points) >= 20
    for point in points[:: max(1, len(points) // 12)]:
        M, bias = tradeoff.weight(point.structure)
        assert point.error == pytest.approx(
            error_by_hand(arrays, held, M, bias), rel=1e-6, abs=1e-9
        )
        s, k, r = point.structure.s, point.structure.k, point.structure.r
        # The weight is what its structure says: rank within the basis and beside A.
        channels, taps = (5, int(np.prod(kernel, dtype=int)))
        over_channels = M.reshape(-1, channels, taps).transpose(0, 2, 1).reshape(-1, channels)
        if point.structure.form == "rotated":
            assert np.linalg.matrix_rank(over_channels, tol=1e-8) <= r
        group = {"columns": 1}.get(point.structure.form, taps)
        if point.structure.form in ("columns", "channels"):
            ranks = np.linalg.matrix_rank(M, tol=1e-8)
            assert ranks <= s * group + k


@pytest.mark.parametrize("kernel", [(), (3,)])
def test_more_outputs_than_columns(kernel):
    """The same errors, without a matrix over outputs times outputs."""
    arrays = layer(kernel, c=4, n=60)
    rng = np.random.default_rng(1)
    wanted = arrays.responses + 0.3 * rng.normal(size=arrays.responses.shape)
    arrays = LayerIO(
        arrays.weight, arrays.bias, arrays.inputs, linear_targets=wanted, kernel_size=kernel
    )
    tradeoff = TradeOff(problem_of(arrays))
    held = arrays.split(0.1)[1]
    Y = arrays.targets[held]
    points = tradeoff.points()
    for point in points:
        M, bias = tradeoff.weight(point.structure)
        assert M.shape == arrays.weight.shape
        miss = np.maximum(arrays.inputs[held] @ M.T + bias, 0) - Y
        assert point.error == pytest.approx(np.sum(miss**2) / np.sum(Y**2), rel=1e-6)
    assert max(point.structure.k for point in points) <= arrays.weight.shape[1]


def test_whole_layers_are_exact_and_more_is_better():
    arrays = layer()
    points = TradeOff(problem_of(arrays)).points()
    errors = {(p.structure.r, p.structure.s, p.structure.k): p.error for p in points}
    # The ridge pulls to the original weight, which is exact.
    assert errors[5, 5, 0] < 1e-10
    assert errors[5, 0, 7] < 1e-10
    assert errors[1, 0, 1] > 0.05


def test_linear_errors_are_the_closed_form_ones():
    """With fitted rows as judges and no activation: the closed-form linear error of the curve."""
    arrays = layer(activation="identity")
    problem = problem_of(arrays, held_out=0.0)
    tradeoff = TradeOff(problem)
    Z = arrays.inputs @ arrays.weight.T + arrays.bias
    for structure in (Structure("rotated", 1, 2, 3), Structure("rotated", 0, 3, 3)):
        points = {point.structure: point for point in tradeoff.points()}
        if structure not in points:
            continue
        M, bias = tradeoff.weight(structure)
        by_hand = np.sum((Z - arrays.inputs @ M.T - bias) ** 2) / np.sum(Z**2)
        assert points[structure].error == pytest.approx(by_hand, rel=1e-6)


def test_what_cannot_be_afforded_is_left_out():
    arrays = layer()
    tradeoff = TradeOff(problem_of(arrays))
    points = tradeoff.points(lambda structure: structure.cost(7, 5, 9) <= 100)
    assert points and all(p.structure.cost(7, 5, 9) <= 100 for p in points)


def test_multiples():
    arrays = layer((3, 3), c=24, n=32, rows=900)
    points = TradeOff(problem_of(arrays), multiple=4).points()
    for point in points:
        for size in (point.structure.r, point.structure.s, point.structure.k):
            assert size in (0, 1, 2) or size % 4 == 0


def test_sizes_come_in_blocks_of_channels():
    arrays = layer((3, 3), c=20, n=24)
    points = TradeOff(problem_of(arrays), "rotated", multiple=8).points()
    whole, parts = {0, 8, 16, 24}, {1, 2, 4}
    assert {point.structure.r for point in points} <= whole | parts
    assert {point.structure.k for point in points} <= whole | parts
    assert {p.structure.s for p in points if p.structure.s < p.structure.r} <= whole
    assert {8, 16} <= {p.structure.r for p in points} and any(p.structure.r < 8 for p in points)
