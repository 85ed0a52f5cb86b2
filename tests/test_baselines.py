"""The baselines against numpy's SVD, brute force, lstsq and planted channels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import slr_gpu
from slr_gpu import ChannelPruning, LayerBudget, LayerIO, Magnitude, WeightSVD, WhitenedSVD
from slr_gpu.decomposition import Structure
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem
from slr_gpu.solvers.baselines import lasso_path

OPS = NumpyOps()


def layer(n=10, c=6, taps=4, P=300, activation="relu", seed=0):
    rng = np.random.default_rng(seed)
    m = c * taps
    X = np.maximum(rng.normal(size=(P, m)) @ (np.eye(m) + 0.3 * rng.normal(size=(m, m))), 0)
    kernel = {"kernel_size": (taps,)} if taps > 1 else {}
    return LayerIO(rng.normal(size=(n, m)), rng.normal(size=n), X, activation=activation, **kernel)


def error_of(io, M, bias):
    relu = (lambda z: np.maximum(z, 0)) if io.activation.name == "relu" else (lambda z: z)
    return np.sum((relu(io.inputs @ M.T + bias) - io.targets) ** 2) / np.sum(io.targets**2)


def linear_error(io, M, bias):
    return np.sum((io.inputs @ (M - io.weight).T + bias - io.bias) ** 2)


def test_weight_svd_is_numpys():
    io = layer()
    d = slr_gpu.fit(io, keep=0.5, solver=WeightSVD(), held_out=0.0)
    assert d.structure == Structure("columns", 0, 3)
    U, sigma, V = np.linalg.svd(io.weight)
    best = (U[:, :3] * sigma[:3]) @ V[:3]
    np.testing.assert_allclose(d.to_dense(), best, atol=1e-10)
    np.testing.assert_array_equal(d.bias, io.bias)
    assert d.error == pytest.approx(error_of(io, best, io.bias), rel=1e-9)


@pytest.mark.parametrize("k", [1, 4])
def test_whitened_svd_has_the_least_linear_error(k):
    io = layer(seed=1)
    d = slr_gpu.fit(io, rank=k, solver=WhitenedSVD(), ridge=1e-9, held_out=0.0)
    X = io.inputs - io.inputs.mean(axis=0)
    reached = linear_error(io, d.to_dense(), d.bias)
    tail = np.linalg.svd(X @ io.weight.T, compute_uv=False)[k:]
    assert reached == pytest.approx(np.sum(tail**2), rel=1e-6)
    rng = np.random.default_rng(2)
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            U, V = (f + scale * rng.normal(size=f.shape) for f in (d.U, d.V))
            M = U @ V
            bias = io.bias + (io.weight - M) @ io.inputs.mean(axis=0)
            assert linear_error(io, M, bias) >= reached * (1 - 1e-9)


def test_diagonal_scaling_weighs_columns_by_their_inputs():
    io = layer(seed=3)
    io.inputs[:, ::2] *= 20
    io = LayerIO(io.weight, io.bias, io.inputs, kernel_size=(4,))
    d = slr_gpu.fit(io, rank=4, solver=WhitenedSVD(scaling="diagonal"), ridge=1e-9, held_out=0.0)
    scale = io.inputs.std(axis=0)
    U, sigma, V = np.linalg.svd(io.weight * scale)
    expected = (U[:, :4] * sigma[:4]) @ V[:4] / scale
    np.testing.assert_allclose(d.to_dense(), expected, atol=1e-6)
    plain, full = (
        slr_gpu.fit(io, rank=4, solver=solver, ridge=1e-9, held_out=0.0)
        for solver in (WeightSVD(), WhitenedSVD())
    )
    linear = [linear_error(io, r.to_dense(), r.bias) for r in (full, d, plain)]
    assert linear == sorted(linear)
    # The bias makes up for the mean of what was cut off.
    residual = io.inputs @ (d.to_dense() - io.weight).T + d.bias - io.bias
    np.testing.assert_allclose(residual.mean(axis=0), 0, atol=1e-9)


@pytest.mark.parametrize("form,size", [("columns", 1), ("channels", 4)])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_magnitude_keeps_the_largest(form, size, reconstruct):
    io = layer(seed=4)
    solver = Magnitude(reconstruct=reconstruct)
    d = slr_gpu.fit(io, keep=0.5, form=form, solver=solver, ridge=1e-9, held_out=0.0)
    norms = np.linalg.norm(io.weight.reshape(10, -1, size), axis=(0, 2))
    groups = np.sort(np.argsort(-norms)[: 12 // size])
    expected = (groups[:, None] * size + np.arange(size)).ravel()
    np.testing.assert_array_equal(d.columns, expected)
    assert d.rank == 0 and d.structure == Structure(form, 12 // size, 0)
    if not reconstruct:
        np.testing.assert_array_equal(d.A, io.weight[:, expected])
        np.testing.assert_array_equal(d.bias, io.bias)
        return
    design = np.hstack([io.inputs[:, expected], np.ones((len(io.inputs), 1))])
    wanted = io.inputs @ io.weight.T + io.bias
    truth = np.linalg.lstsq(design, wanted, rcond=None)[0]
    np.testing.assert_allclose(d.A, truth[:-1].T, atol=1e-6)
    np.testing.assert_allclose(d.bias, truth[-1], atol=1e-6)


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_channel_pruning_selects_the_planted_channels(taps, seed):
    """The others see inputs too, but hardly any weight."""
    rng = np.random.default_rng(seed)
    io = layer(n=12, c=10, taps=taps, seed=seed)
    kept = np.sort(rng.permutation(10)[:4])
    W = 0.01 * io.weight.reshape(12, 10, taps)
    W[:, kept] *= 100
    # A large weight on an input that hardly varies must not be mistaken for one that matters.
    trap = np.setdiff1d(np.arange(10), kept)[0]
    W[:, trap] *= 1000
    X = io.inputs.reshape(-1, 10, taps).copy()
    X[:, trap] *= 1e-4
    kernel = {"kernel_size": (taps,)} if taps > 1 else {}
    io = LayerIO(W.reshape(12, -1), io.bias, X.reshape(len(X), -1), **kernel)
    d = slr_gpu.fit(io, channels=4, solver=ChannelPruning(), held_out=0.0)
    np.testing.assert_array_equal(d.columns[::taps] // taps, kept)
    assert d.error < 0.01
    by_norm = slr_gpu.fit(io, channels=4, solver=Magnitude(reconstruct=True), held_out=0.0)
    assert trap in by_norm.columns // taps and d.error < 0.5 * by_norm.error


def test_channel_quadratic_is_the_response_error():
    io = layer(c=5, taps=3, activation="identity", seed=9)
    problem = ResponseProblem(io, ops=OPS, ridge=1e-12, held_out=0.0)
    Q, q, lengths = ChannelPruning().quadratic(problem)
    X = io.inputs - io.inputs.mean(axis=0)
    Z = X @ io.weight.T
    for beta in np.random.default_rng(10).normal(size=(5, 5)):
        M = io.weight * np.repeat(beta / lengths, 3)
        error = np.sum((Z - X @ M.T) ** 2)
        assert beta @ Q @ beta - 2 * q @ beta + np.sum(Z**2) == pytest.approx(error, rel=1e-6)


def test_channel_pruning_is_near_the_best_subset():
    io = layer(c=7, taps=2, activation="identity", seed=5)
    X = io.inputs - io.inputs.mean(axis=0)

    def cost(channels):
        columns = (np.asarray(channels)[:, None] * 2 + np.arange(2)).ravel()
        return np.linalg.lstsq(X[:, columns], X @ io.weight.T, rcond=None)[1].sum()

    costs = sorted(cost(channels) for channels in itertools.combinations(range(7), 4))
    d = slr_gpu.fit(io, channels=4, solver=ChannelPruning(), held_out=0.0, ridge=1e-9)
    found = cost(d.columns[::2] // 2)
    assert found == pytest.approx(linear_error(io, d.to_dense(), d.bias), rel=1e-6)
    assert found <= costs[len(costs) // 4]


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_lasso_path_ends_at_a_solution_with_that_many(count):
    """Optimality: |gradient| = penalty where beta is not zero, <= penalty elsewhere."""
    rng = np.random.default_rng(6)
    B = rng.normal(size=(40, 12))
    Q, q = B.T @ B, B.T @ (B @ rng.normal(size=12) + rng.normal(size=40))
    beta = lasso_path(OPS, Q, q, count)
    kept = beta != 0
    assert kept.sum() >= count and kept.sum() <= count + 1
    slope = q - Q @ beta
    penalty = np.abs(slope[kept]).mean()
    np.testing.assert_allclose(slope[kept], penalty * np.sign(beta[kept]), rtol=1e-3, atol=1e-3)
    assert np.all(np.abs(slope[~kept]) <= penalty * (1 + 1e-3) + 1e-3)


ALL = [Magnitude(), Magnitude(reconstruct=True), WeightSVD(), WhitenedSVD(),
       WhitenedSVD(scaling="diagonal"), ChannelPruning()]  # fmt: skip


@pytest.mark.parametrize("solver", ALL, ids=str)
@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_budget_is_met_with_less_than_one_group_to_spare(solver, keep):
    io = layer(n=12, c=10, seed=7)
    d = slr_gpu.fit(io, keep=keep, solver=solver)
    n, m = io.weight.shape
    step = n * 4 if d.form == "channels" else n + m if d.rank else n
    spent = d.parameters - n
    assert spent <= keep * n * m
    assert spent > keep * n * m - step or d.rank == min(n, m)
    assert d.error == pytest.approx(
        error_of_rows(io, d, io.split(0.1)[0]), rel=1e-9, abs=1e-12
    ) and d.held_out_error == pytest.approx(
        error_of_rows(io, d, io.split(0.1)[1]), rel=1e-9, abs=1e-12
    )


def error_of_rows(io, d, rows):
    part = LayerIO(io.weight, io.bias, io.inputs[rows], kernel_size=io.kernel_size)
    return error_of(part, d.to_dense(), d.bias)


def test_data_helps():
    io = layer(n=30, c=10, P=2000, seed=8)
    held = {str(solver): slr_gpu.fit(io, keep=0.4, solver=solver).held_out_error for solver in ALL}
    assert held[str(WhitenedSVD())] < held[str(WeightSVD())]
    assert held[str(Magnitude(reconstruct=True))] < held[str(Magnitude())]
    assert held[str(ChannelPruning())] < held[str(Magnitude())]


@pytest.mark.parametrize("solver", [ChannelPruning(), Magnitude()], ids=str)
def test_budgets_of_less_than_a_multiple_of_groups(solver):
    """Sizes are rounded down to a multiple; below the first, to a half of it and so on."""
    io = layer(n=64, c=10, taps=9)
    budget = LayerBudget(64, 10, 9, ((1.0, 0.5 * io.weight.size),), multiple=16)
    assert budget.unit("columns") == 8
    d = slr_gpu.fit(io, budget=budget, solver=solver)
    assert len(d.columns) == {"channels": 4 * 9, "columns": 40}[d.form]


def test_what_they_refuse():
    io = layer()
    with pytest.raises(slr_gpu.BudgetError, match="one of auto, channels"):
        slr_gpu.fit(io, keep=0.5, form="columns", solver=ChannelPruning())
    with pytest.raises(slr_gpu.BudgetError, match="one of auto, columns"):
        slr_gpu.fit(io, keep=0.5, form="rotated", solver=WeightSVD())
    for solver in ALL:
        with pytest.raises(slr_gpu.BudgetError, match="keep of at least"):
            slr_gpu.fit(io, keep=0.01, solver=solver)
    with pytest.raises(slr_gpu.InputError, match="diagonal"):
        WhitenedSVD(scaling="half")
    problem = ResponseProblem(io, ops=OPS)
    for solver, structure in (
        (Magnitude(), Structure("columns", 3, 1)),
        (Magnitude(), Structure("rotated", 3, 0, 4)),
        (WeightSVD(), Structure("columns", 3, 1)),
        (WhitenedSVD(), Structure("channels", 0, 1)),
        (ChannelPruning(), Structure("channels", 7, 0)),
        (ChannelPruning(), Structure("columns", 2, 0)),
    ):
        with pytest.raises(slr_gpu.InputError, match="alone"):
            solver.solve(problem, structure)
