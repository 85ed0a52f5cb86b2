"""Zhang's solver: both steps against brute force, the penalised objective, planted layers."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from device_double import DoubleOps, counts
from test_backends_gpu import layer as layer_io

import slr_gpu
from slr_gpu import LayerIO, Majorize, Status, Structure, Zhang, activations
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem
from slr_gpu.solvers.zhang import z_step

OPS = NumpyOps()
EXACT = ["identity", "relu", "leaky_relu(0.2)", "leaky_relu(0)", "relu6", "clamp(-1,0.5)"]
SMOOTH = ["gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "hardswish"]
GRID = np.linspace(-12, 12, 24_001)


def layer(seed=0, n=20, channels=12, taps=9, rows=800, activation="relu", **settings):
    """A convolution on correlated, rectified im2col rows, half of its responses inactive."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(channels, channels)) * (0.7 ** np.arange(channels))[:, None]
    smooth = np.exp(-0.3 * np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))))
    field = rng.normal(size=(rows, channels, taps)) @ np.linalg.cholesky(smooth).T
    X = np.maximum(np.einsum("plt,lc->pct", field, mix), 0).reshape(rows, -1)
    W = rng.normal(size=(n, channels * taps)) / 4
    b = rng.normal(size=n) - 1
    return LayerIO(W, b, X, activation=activation, kernel_size=(taps,), **settings)


def on_grid(activation, before, y, penalty):
    """Objective of the z-step at every grid point, (grid, elements)."""
    value = activation.value(OPS, GRID)[:, None]
    return (y - value) ** 2 + penalty * (GRID[:, None] - before) ** 2


def elements(rng, activation, count=400):
    before = rng.normal(size=count) * 2.5
    return before, activation.value(OPS, rng.normal(size=count) * 2.5)


@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", EXACT)
def test_z_step_is_the_grid_minimiser(name, penalty):
    activation = activations.get(name)
    before, y = elements(np.random.default_rng(1), activation)
    z = z_step(OPS, activation, before[None], y[None], penalty)[0]
    grid = on_grid(activation, before, y, penalty)
    reached = (y - activation.value(OPS, z)) ** 2 + penalty * (z - before) ** 2
    spacing = GRID[1] - GRID[0]
    assert np.all(reached <= grid.min(axis=0) + 1e-12)
    assert np.all(grid.min(axis=0) - reached <= 2 * (2 + penalty) * spacing)
    # Where no second minimum comes near, z itself agrees.
    best = GRID[grid.argmin(axis=0)]
    apart = np.abs(GRID[:, None] - best) > 3 * spacing
    unique = np.where(apart, grid, np.inf).min(axis=0) > grid.min(axis=0) * (1 + 1e-9) + 1e-9
    assert unique.sum() > 300
    rival = np.abs(z - best) > 1.5 * spacing
    assert not np.any(rival & unique & (np.abs(reached - grid.min(axis=0)) > 1e-6))


def test_z_step_of_relu_is_the_papers():
    rng = np.random.default_rng(2)
    before, y = elements(rng, activations.get("relu"))
    for penalty in (0.01, 1.0):
        first = np.minimum(0, before)
        second = np.maximum(0, (penalty * before + y) / (penalty + 1))
        costs = [(y - np.maximum(z, 0)) ** 2 + penalty * (z - before) ** 2 for z in (first, second)]
        expected = np.where(costs[0] < costs[1], first, second)
        z = z_step(OPS, activations.get("relu"), before[None], y[None], penalty)[0]
        np.testing.assert_allclose(z, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", [0.01, 1.0])
@pytest.mark.parametrize("name", SMOOTH)
def test_z_step_of_smooth_activations_goes_down_to_near_the_minimum(name, penalty):
    activation = activations.get(name)
    before, y = elements(np.random.default_rng(3), activation)
    z = z_step(OPS, activation, before[None], y[None], penalty)[0]
    start = (y - activation.value(OPS, before)) ** 2
    reached = (y - activation.value(OPS, z)) ** 2 + penalty * (z - before) ** 2
    least = on_grid(activation, before, y, penalty).min(axis=0)
    assert np.all(reached <= start + 1e-12)
    assert np.sum(reached - least) < 0.03 * np.sum(start - least)


def make_problem(io, **settings):
    return ResponseProblem(io, ops=OPS, **{"held_out": 0.0, "ridge": 1e-4, **settings})


def penalised(io, activation, z, M, bias, penalty, rho, W):
    """The penalised objective with the ridge, from the rows themselves."""
    fit = np.sum((io.targets - activation.value(OPS, z)) ** 2)
    tie = np.sum((z - io.inputs @ M.T - bias) ** 2) + rho * np.sum((M - W) ** 2)
    return fit + penalty * tie


def test_m_step_is_reduced_rank_regression_of_z():
    """Against the classical solution: least squares on rows with the ridge's, then an SVD."""
    rng = np.random.default_rng(4)
    clean = layer(rows=600)
    noisy = clean.inputs + 0.1 * rng.normal(size=clean.inputs.shape)
    io = LayerIO(
        clean.weight,
        clean.bias,
        noisy,
        kernel_size=(9,),
        linear_targets=clean.inputs @ clean.weight.T + clean.bias,
    )
    problem, solver, structure = make_problem(io), Zhang(), Structure("columns", 0, 4)
    state = solver.start(problem, structure)
    for penalty in (0.01, 1.0):
        solver.evaluate(problem, state, penalty)
        before = io.inputs @ state.M.T + state.bias
        z = z_step(OPS, io.activation, before, io.targets, penalty)
        state = solver.step(problem, state, structure)
        X = io.inputs - io.inputs.mean(axis=0)
        rows = np.vstack([X, np.sqrt(problem.rho) * np.eye(X.shape[1])])
        wanted = np.vstack([z - z.mean(axis=0), np.sqrt(problem.rho) * io.weight.T])
        full = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        right = np.linalg.svd(rows @ full, full_matrices=False)[2][:4]
        expected = (full @ right.T @ right).T
        np.testing.assert_allclose(state.M, expected, atol=1e-7)
        expected_bias = z.mean(axis=0) - expected @ io.inputs.mean(axis=0)
        np.testing.assert_allclose(state.bias, expected_bias, atol=1e-7)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.2)", "relu6", "gelu"])
def test_penalised_objective_never_rises_within_a_phase(activation):
    io = layer(rows=500, activation=activation)
    problem, solver, structure = make_problem(io), Zhang(), Structure("columns", 0, 3)
    state = solver.start(problem, structure)
    for penalty in (0.01, 1.0):
        last = np.inf
        for _ in range(8):
            solver.evaluate(problem, state, penalty)
            z = z_step(OPS, io.activation, io.inputs @ state.M.T + state.bias, io.targets, penalty)
            state = solver.step(problem, state, structure)
            facts = (penalty, problem.rho, io.weight)
            now = penalised(io, io.activation, z, state.M, state.bias, *facts)
            # A smooth z-step does not start from the z before: it may lose a little.
            assert now <= last * (1 + (1e-10 if io.activation.pieces else 1e-2))
            last = now


def test_history_is_the_true_objective_and_the_last_iterate_is_returned():
    io = layer(rows=600)
    problem = make_problem(io, held_out=0.2)
    d = Zhang(iterations=(3, 4), tolerance=0.0).solve(problem, Structure("columns", 0, 5))
    assert d.status is Status.ITERATION_LIMIT and d.rank == 5 and d.A.size == 0
    assert [entry["lambda"] for entry in d.history] == [0.01] * 3 + [1.0] * 4
    fitted, held = io.split(0.2)
    M = d.to_dense()

    def loss(rows):
        response = np.maximum(io.inputs[rows] @ M.T + d.bias, 0)
        return np.sum((io.targets[rows] - response) ** 2)

    ridge = problem.rho * np.sum((M - io.weight) ** 2)
    last = d.history[-1]
    assert last["objective"] == pytest.approx((loss(fitted) + ridge) / len(fitted), rel=1e-6)
    expected = loss(held) / np.sum(io.targets[held] ** 2)
    assert last["held_out_error"] == pytest.approx(expected, rel=1e-6)
    assert d.held_out_error == pytest.approx(expected, rel=1e-6)


def after_activation(io, d, rows):
    response = io.activation.value(OPS, io.inputs[rows] @ d.to_dense().T + d.bias)
    return np.sum((io.targets[rows] - response) ** 2) / np.sum(io.targets[rows] ** 2)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu(0.1)", "gelu"])
@pytest.mark.parametrize("rank", [2, 5])
def test_better_after_the_activation_than_the_linear_closed_form(activation, rank):
    io = layer(5, activation=activation)
    _, held = io.split(0.1)
    linear = slr_gpu.fit(io, rank=rank, solver=Majorize(iterations=0), objective="linear")
    through = slr_gpu.fit(io, rank=rank, solver=Zhang())
    assert through.rank == rank == linear.rank
    assert after_activation(io, through, held) < 0.95 * after_activation(io, linear, held)
    assert bool(through.notes) == (activation == "gelu")


def test_planted_low_rank_layer_is_found_through_the_relu():
    """Targets of a layer of rank 3 that the linear problem, which aims at W's, cannot see."""
    rng = np.random.default_rng(6)
    X = rng.normal(size=(3000, 15))
    planted = rng.normal(size=(10, 3)) @ rng.normal(size=(3, 15)) / 2
    bias = rng.normal(size=10)
    W = planted + 0.15 * rng.normal(size=planted.shape)
    io = LayerIO(W, bias, X, np.maximum(X @ planted.T + bias, 0))
    problem = make_problem(io, ridge=1e-8)
    solver = Zhang(iterations=(25, 100), tolerance=1e-6)
    d = solver.solve(problem, Structure("columns", 0, 3))
    start = solver.start(problem, Structure("columns", 0, 3))
    assert d.error < 1e-4 < 1e-2 * problem.relative_error(start.M, start.bias)
    np.testing.assert_allclose(d.to_dense(), planted, atol=0.05)


@pytest.mark.parametrize("objective,activation", [("linear", "relu"), ("activation", "identity")])
def test_without_an_activation_one_step_is_exact(objective, activation):
    io = layer(7, activation=activation)
    d = slr_gpu.fit(io, rank=4, solver=Zhang(), objective=objective)
    reference = slr_gpu.fit(io, rank=4, solver=Majorize(), objective=objective)
    assert d.status is Status.CLOSED_FORM and not d.history
    np.testing.assert_allclose(d.to_dense(), reference.to_dense(), atol=1e-9)


def test_keep_spends_the_budget_on_rank_alone():
    io = layer(8)
    d = slr_gpu.fit(io, keep=0.3, solver=Zhang())
    n, m = io.weight.shape
    assert d.structure == Structure("columns", 0, int(0.3 * n * m / (n + m)))
    assert d.parameters - n <= 0.3 * n * m


def test_a_loose_tolerance_converges():
    d = slr_gpu.fit(layer(9), rank=4, solver=Zhang(tolerance=0.05))
    assert d.status is Status.CONVERGED and len(d.history) < 50


def test_refusals():
    io = layer(10, rows=200)
    with pytest.raises(slr_gpu.BudgetError, match="one of auto, columns, spatial"):
        slr_gpu.fit(io, keep=0.3, form="channels", solver=Zhang())
    with pytest.raises(slr_gpu.InputError, match="low rank alone"):
        slr_gpu.fit(io, columns=3, rank=2, solver=Zhang())
    smallest = (20 + 108) / (20 * 108)
    with pytest.raises(slr_gpu.BudgetError, match=f"keep of at least {smallest:.3g}"):
        slr_gpu.fit(io, keep=0.9 * smallest, solver=Zhang())
    assert slr_gpu.fit(io, keep=1.01 * smallest, solver=Zhang()).rank == 1
    with pytest.raises(slr_gpu.InputError, match="as many"):
        Zhang(penalties=(1.0,))
    with pytest.raises(slr_gpu.InputError, match="> 0"):
        Zhang(penalties=(0.0, 1.0))
    for bad in ({"penalties": (0.01, np.inf)}, {"iterations": (25, -1)}, {"iterations": (2.5, 25)},
                {"tolerance": -1.0}):  # fmt: skip
        with pytest.raises(slr_gpu.InputError, match="got .*; expected"):
            Zhang(**bad)


def test_pieces_are_the_activation():
    """Every record's pieces cover the real line and give its value; smooth ones have none."""
    for name in EXACT:
        activation = activations.get(name)
        edges = [activation.pieces[0].low, *(piece.high for piece in activation.pieces)]
        assert edges[0] == -np.inf and edges[-1] == np.inf
        assert all(p.low == edge for p, edge in zip(activation.pieces, edges, strict=False))
        for piece in activation.pieces:
            z = GRID[(GRID >= piece.low) & (GRID <= piece.high)]
            np.testing.assert_allclose(
                piece.slope * z + piece.offset, activation.value(OPS, z), atol=1e-12
            )
    assert not any(activations.get(name).pieces for name in SMOOTH)


@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu"])
@pytest.mark.parametrize("form", ["columns", "spatial"])
def test_the_same_on_a_device(monkeypatch, form, activation):
    """On a stand-in that refuses host arrays and reads its results several iterations late."""
    io = layer_io(activation)
    request = {"keep": 0.3, "form": form, "solver": Zhang(iterations=(6, 9), tolerance=0.02)}
    ours = slr_gpu.fit(io, **request)
    monkeypatch.setattr(sys.modules["slr_gpu.fit"], "get_ops", lambda device: DoubleOps())
    theirs = slr_gpu.fit(io, device="cuda", **request)
    assert theirs.structure == ours.structure and theirs.status is ours.status
    assert [e["lambda"] for e in theirs.history] == [e["lambda"] for e in ours.history]
    assert theirs.held_out_error == pytest.approx(ours.held_out_error, rel=1e-8)
    np.testing.assert_allclose(theirs.to_dense(), ours.to_dense(), rtol=1e-5, atol=1e-8)


def test_results_are_waited_for_once_in_several_iterations():
    ops = DoubleOps()
    problem = ResponseProblem(layer_io("relu"), ops=ops, held_out=0.1)
    structure, solver = Structure("columns", 0, 4), Zhang()
    state = solver.start(problem, structure)
    list(solver.phase(problem, state, structure, 1.0, 1))  # fills what is computed once
    before = counts["waits"]
    list(solver.phase(problem, state, structure, 1.0, 3 * ops.ahead))
    assert ops.ahead > 1 and counts["waits"] - before == 3
