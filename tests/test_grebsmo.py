"""Grebsmo against planted answers, least squares row by row, and its own promises."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import slr_gpu
from slr_gpu import activations
from slr_gpu.decomposition import Structure
from slr_gpu.layer_io import LayerIO
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem
from slr_gpu.solvers import bilateral, grebsmo
from slr_gpu.solvers.grebsmo import Grebsmo

OPS, IDENTITY = NumpyOps(), activations.get("identity")


def inputs(rng, P, m, correlation=0.4):
    mix = np.eye(m) + correlation * rng.normal(size=(m, m)) / np.sqrt(m)
    return np.maximum(rng.normal(size=(P, m)) @ mix + 0.3, 0)


def layer(n=12, m=20, P=400, activation="relu", seed=0, k=2, s=24):
    """A layer whose weight is s large entries plus rank k."""
    rng = np.random.default_rng(seed)
    S = np.zeros(n * m)
    S[rng.permutation(n * m)[:s]] = rng.choice([-1, 1], size=s) * rng.uniform(2, 4, size=s)
    W = S.reshape(n, m) + rng.normal(size=(n, k)) @ rng.normal(size=(k, m)) / 2
    io = LayerIO(W, rng.normal(size=n) * 0.3, inputs(rng, P, m), activation=activation)
    return io, S.reshape(n, m)


def problem_of(io, **settings):
    return ResponseProblem(io, ops=OPS, **{"ridge": 1e-9, "held_out": 0.0} | settings)


def linear_objective(io, M, bias, rows, ridge):
    """Loss of the responses before the activation, with nothing but the definition."""
    X = io.inputs[rows].astype(float)
    Z = X @ io.weight.T + io.bias
    return np.sum((Z - X @ M.T - bias) ** 2) / len(X) + ridge * np.sum((M - io.weight) ** 2) / len(
        X
    )


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("seed", range(3))
def test_planted_weight_is_recovered(activation, seed):
    io, S = layer(activation=activation, seed=seed)
    solver = Grebsmo(iterations=150, tolerance=0.0)
    d = solver.solve(problem_of(io), Structure("entries", np.count_nonzero(S), 2))
    found = d.to_dense() - d.U @ d.V
    assert d.error < 1e-5
    np.testing.assert_array_equal(np.abs(found) > 0.5, S != 0)
    np.testing.assert_allclose(d.to_dense(), io.weight, atol=2e-2)


@pytest.mark.parametrize("s,k", [(60, 3), (0, 4), (90, 0)])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
@pytest.mark.parametrize("smoothing", [0, 20])
def test_linear_objective_falls_and_is_what_it_says(s, k, ridge, smoothing):
    io, _ = layer(n=16, m=30, seed=3, k=12, s=200)
    problem = problem_of(io, ridge=ridge, activation=IDENTITY)
    structure = Structure("entries", s, k)
    d = Grebsmo(smoothing=smoothing, tolerance=0.0, iterations=15).solve(problem, structure)
    values = np.array([entry["objective"] for entry in d.history])
    assert len(values) >= 4 and np.all(np.diff(values) <= 1e-9 * values[:-1])
    if not smoothing:  # then there is little left to gain
        assert values[-1] < 0.95 * values[0]
    expected = linear_objective(io, d.to_dense(), d.bias, slice(None), problem.rho)
    assert values[-1] == pytest.approx(expected, rel=1e-6)
    assert d.structure == structure
    assert all(entry["groups"] == s for entry in d.history)
    assert [entry["iteration"] for entry in d.history] == list(range(1, len(values) + 1))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.2)", "gelu"])
@pytest.mark.parametrize("convex", [True, False])
def test_objective_after_the_activation_falls(activation, convex):
    io, _ = layer(n=16, m=30, seed=4, activation=activation, k=12, s=200)
    solver = Grebsmo(convex=convex, tolerance=0.0, rounds=8)
    problem = problem_of(io, ridge=1e-3)
    d = solver.solve(problem, Structure("entries", 60, 2))
    values = np.array([entry["objective"] for entry in d.history])
    assert len(values) == 9 and np.all(np.diff(values) <= 1e-9 * values[:-1])
    assert values[-1] < 0.98 * values[0]
    M = d.to_dense()
    convex = convex and problem.activation.has_convex_surrogate
    expected = problem.objective(M, d.bias, convex=convex)
    expected += problem.rho * np.sum((M - io.weight) ** 2) / problem.rows
    assert values[-1] == pytest.approx(expected, rel=1e-6)


def test_bias_is_stationary_after_the_activation():
    io, _ = layer(n=16, m=30, seed=4, k=12, s=200)
    problem = problem_of(io, ridge=1e-3)
    solver, structure = Grebsmo(), Structure("entries", 60, 2)
    state = solver.start(problem, structure)
    solver.evaluate(problem, state)
    # Of most outputs: those that are hardly ever active move slowly.
    first = np.median(np.abs(state.R_mean))
    for _ in range(40):
        state = solver.round(problem, state, structure)
    assert np.median(np.abs(state.R_mean)) < 0.1 * first


def test_looking_through_the_activation_pays():
    io, _ = layer(n=16, m=30, P=800, seed=5, k=12, s=200)
    settings = {"keep": 0.25, "held_out": 0.0, "solver": Grebsmo(rank=2, indices=False)}
    errors = {name: slr_gpu.fit(io, objective=name, **settings).error
              for name in ("linear", "activation")}  # fmt: skip
    assert errors["activation"] < 0.95 * errors["linear"]


def test_pruning_is_least_squares_row_by_row():
    """At rank 0 every row of S is the least-squares solution on its own support."""
    io, _ = layer(n=8, m=24, P=300, seed=6, k=8, s=100, activation="identity")
    problem = problem_of(io, ridge=1e-9)
    solver = Grebsmo(rank=0, iterations=200, inner=8, tolerance=0.0)
    d = solver.solve(problem, Structure("entries", 60, 0))
    S, X = d.to_dense(), io.inputs
    targets = X @ io.weight.T + io.bias
    for row in range(8):
        kept = np.flatnonzero(S[row])
        design = np.hstack([X[:, kept], np.ones((len(X), 1))])
        truth = np.linalg.lstsq(design, targets[:, row], rcond=None)[0]
        np.testing.assert_allclose(S[row, kept], truth[:-1], atol=1e-5)
        assert d.bias[row] == pytest.approx(truth[-1], abs=1e-5)


def best_of_magnitude(io, s):
    """Magnitude pruning of single entries: as it is, and with least squares on its support."""
    W, X = io.weight, io.inputs
    kept = np.zeros(W.size, dtype=bool)
    kept[np.argsort(-np.abs(W), axis=None)[:s]] = True
    kept = kept.reshape(W.shape)
    Z = X @ W.T + io.bias
    plain = np.sum((Z - X @ (W * kept).T - io.bias) ** 2)
    fitted = 0.0
    for row, columns in enumerate(kept):
        design = np.hstack([X[:, columns], np.ones((len(X), 1))])
        solution = np.linalg.lstsq(design, Z[:, row], rcond=None)[0]
        fitted += np.sum((Z[:, row] - design @ solution) ** 2)
    return plain / np.sum(Z**2), fitted / np.sum(Z**2)


@pytest.mark.parametrize("seed", range(3))
def test_pruning_beats_magnitude_at_equal_count(seed):
    io, _ = layer(n=16, m=40, P=600, seed=seed, k=16, s=100, activation="identity")
    d = Grebsmo(rank=0).solve(problem_of(io), Structure("entries", 200, 0))
    plain, fitted = best_of_magnitude(io, 200)
    assert np.count_nonzero(d.A) == 200
    assert d.error < 0.95 * fitted < fitted < plain


def test_smoothing_finds_better_entries():
    """The growing penalty is worth its price where inputs are correlated."""
    io, _ = layer(n=24, m=60, P=900, seed=9, k=12, s=300)
    errors = [
        Grebsmo(smoothing=smoothing, iterations=30)
        .solve(problem_of(io, activation=IDENTITY), Structure("entries", 250, 3))
        .error
        for smoothing in (0, 30)
    ]
    assert errors[1] < 0.97 * errors[0]


def test_low_rank_alone_is_the_best_weight_of_that_rank():
    """The alternation ends where the SVD of the responses does."""
    io, _ = layer(n=14, m=22, seed=7, k=14, s=0, activation="identity")
    problem = problem_of(io)
    d = Grebsmo(iterations=100, tolerance=0.0).solve(problem, Structure("entries", 0, 3))
    X = io.inputs - io.inputs.mean(axis=0)
    tail = np.linalg.svd(X @ io.weight.T, compute_uv=False)[3:]
    reached = linear_objective(io, d.to_dense(), d.bias, slice(None), 0.0) * len(X)
    assert reached == pytest.approx(np.sum(tail**2), rel=1e-4)


def test_rank_grows_no_further_than_it_helps():
    io, _ = layer(n=14, m=22, seed=8, k=2, s=0, activation="identity")
    d = Grebsmo(rank_steps=4).solve(problem_of(io), Structure("entries", 0, 8))
    ranks = [entry["rank"] for entry in d.history]
    assert ranks[0] == 2 and d.rank <= 4 and d.error < 1e-8


def test_split_is_at_least_as_good_as_either_end():
    io, _ = layer(n=24, m=60, P=900, seed=9, k=3, s=150)
    errors = {
        rank: slr_gpu.fit(io, keep=0.3, objective="linear", solver=Grebsmo(rank=rank)).error
        for rank in (None, 0, 5)
    }
    assert errors[None] <= 1.02 * min(errors.values())
    assert errors[None] < 0.9 * errors[0]


@pytest.mark.parametrize("keep", [0.08, 0.25, 0.6])
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_budget_is_spent_to_the_last_entry(keep, rank):
    io, _ = layer(n=24, m=30, seed=10, k=8, s=300)
    settings = {"rank": rank, "iterations": 4, "rounds": 2}
    d = slr_gpu.fit(io, keep=keep, solver=Grebsmo(**settings, indices=False))
    assert d.form == "entries" and d.parameters - 24 == int(keep * 24 * 30)
    counted = slr_gpu.fit(io, keep=keep, solver=Grebsmo(**settings))
    entries, low_rank = counted.structure.s, counted.rank * (24 + 30)
    assert 0 <= int(keep * 24 * 30) - low_rank - 2 * entries <= 1 or not entries
    assert d.activation == "relu" and rank in (None, d.rank)


def test_same_seed_same_bits():
    io, _ = layer(n=16, m=30, seed=11, k=12, s=100)
    one, two, other = (
        slr_gpu.fit(io, keep=0.3, solver=Grebsmo(rank=3, seed=seed)).to_dense()
        for seed in (5, 5, 6)
    )
    assert one.tobytes() == two.tobytes() and one.tobytes() != other.tobytes()


def test_wide_layer_with_few_rows():
    io, _ = layer(n=6, m=50, P=20, seed=12, k=4, s=60)
    d = slr_gpu.fit(io, keep=0.4, solver=Grebsmo())
    assert np.isfinite(d.error) and d.parameters - 6 <= 120


def test_requests_that_cannot_be_met():
    io, _ = layer()
    with pytest.raises(slr_gpu.BudgetError, match="rank=9 .* rank in"):
        slr_gpu.fit(io, keep=0.2, solver=Grebsmo(rank=9))
    with pytest.raises(slr_gpu.BudgetError, match="one of auto, entries"):
        slr_gpu.fit(io, keep=0.2, form="columns", solver=Grebsmo())
    with pytest.raises(slr_gpu.BudgetError, match="keep of at least"):
        slr_gpu.fit(io, keep=1e-3, solver=Grebsmo())
    with pytest.raises(slr_gpu.InputError, match="sizes of the form"):
        slr_gpu.fit(io, columns=3, solver=Grebsmo())
    for structure in (Structure("columns", 3, 1), Structure("entries", -1, 1),
                      Structure("entries", 3, 99)):  # fmt: skip
        with pytest.raises(slr_gpu.InputError, match="entries with s in"):
            Grebsmo().solve(problem_of(io), structure)


@pytest.mark.parametrize(
    "bad",
    [{"rank": -1}, {"rank": 1.5}, {"smoothing": -1}, {"iterations": 2.5}, {"rank_steps": 0},
     {"inner": 0}, {"rounds": -1}, {"patience": 0}, {"seed": -1}, {"tolerance": float("nan")}],
    ids=str,
)  # fmt: skip
def test_bad_settings(bad):
    with pytest.raises(slr_gpu.InputError, match=f"got {next(iter(bad))}=.*; expected"):
        Grebsmo(**bad)


@pytest.mark.parametrize("module", [bilateral, grebsmo])
def test_it_is_free_of_singular_value_decompositions(module):
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, (ast.Attribute, ast.Name))
    }
    assert not names & {"svd", "svt", "eigh", "eig", "eigvalsh", "low_rank_projection"}


def test_refine_ends_at_least_squares_and_keeps_its_books():
    io, _ = layer(n=8, m=24, P=300, seed=13, k=8, s=100)
    problem = problem_of(io, ridge=1e-3)
    state = bilateral.empty_state(problem, Structure("entries", 70, 0))
    bilateral.threshold(problem, state, 70)
    started = state.error
    bilateral.refine(problem, state, 100)
    rest = state.T - state.M
    np.testing.assert_allclose(state.SG, state.S @ problem.G, atol=1e-8)
    np.testing.assert_allclose(state.residual, rest @ problem.G, atol=1e-6)
    assert state.error == pytest.approx(np.sum(rest * (rest @ problem.G)), rel=1e-9)
    assert state.error < started
    for row in range(8):
        kept = np.flatnonzero(state.mask[row])
        truth = np.linalg.solve(problem.G[np.ix_(kept, kept)], problem.start_rhs[row, kept])
        np.testing.assert_allclose(state.S[row, kept], truth, atol=1e-8)
        assert not state.S[row, ~state.mask[row]].any()


def test_stiffness_lies_between_its_bounds():
    problem = problem_of(layer(seed=14)[0], ridge=1e-3)
    alone, together = np.diagonal(problem.G), 1 / np.diagonal(np.linalg.inv(problem.G))
    found = bilateral.stiffness(problem)
    assert np.all(found <= alone * (1 + 1e-9)) and np.all(found >= together * (1 - 1e-9))


def test_growth_finds_the_leading_directions():
    rng = np.random.default_rng(15)
    Q = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    covariance = (Q * np.r_[[100.0, 50.0, 30.0], np.full(17, 0.01)]) @ Q.T
    U = bilateral.grow(OPS, Q[:, 1:2], covariance, 2, seed=0)
    np.testing.assert_allclose(U.T @ U, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(U @ U.T, Q[:, :3] @ Q[:, :3].T, atol=1e-4)
    exhausted = Q[:, :3] @ Q[:, :3].T
    assert bilateral.grow(OPS, Q[:, :3], exhausted, 2, seed=0).shape == (20, 3)


@pytest.mark.parametrize("count", [0, 1, 5, 11, 12])
def test_largest_with_ties(count):
    scores = np.array([[3.0, 1.0, 2.0, 2.0], [2.0, 5.0, 0.0, 2.0], [1.0, 2.0, 4.0, 0.0]])
    mask = bilateral.largest(np, scores, count)
    expected = np.argsort(-scores.ravel(), kind="stable")[:count]
    np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(expected))
