"""Penalties: proxes and hard thresholds against generic minimisers, critical weights by search."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from slr_gpu.errors import InputError
from slr_gpu.layer_io import LayerIO
from slr_gpu.ops import NumpyOps
from slr_gpu.penalties import ColumnSparse, LowRank, gradient_at_zero
from slr_gpu.problem import ResponseProblem

OPS = NumpyOps()


def brute_force_prox(penalty, C, tau, seeds=3):
    """Minimise tau * penalty(A) + 1/2 ||A - C||^2 with a method that needs no gradients."""

    def value(a):
        A = a.reshape(C.shape)
        return tau * penalty.value(OPS, A) + 0.5 * np.sum((A - C) ** 2)

    best = None
    for seed in range(seeds):
        start = C + 0.1 * np.random.default_rng(seed).normal(size=C.shape)
        found = minimize(
            value, start.ravel(), method="Powell", options={"xtol": 1e-9, "ftol": 1e-13}
        )
        if best is None or found.fun < best.fun:
            best = found
    return best.x.reshape(C.shape), best.fun, value


@pytest.mark.parametrize("tau", [0.2, 1.0, 50.0])
@pytest.mark.parametrize(
    "penalty", [ColumnSparse(1), ColumnSparse(2), LowRank()], ids=["columns", "pairs", "low rank"]
)
def test_prox_minimises_its_objective(penalty, tau):
    C = np.random.default_rng(1).normal(size=(2, 4))
    expected, reached, value = brute_force_prox(penalty, C, tau)
    A = penalty.prox(OPS, C, tau)
    # The objective is 1-strongly convex: this bound holds at its minimiser and nowhere else.
    assert 0.5 * np.sum((A - expected) ** 2) <= reached - value(A.ravel()) + 1e-9


def test_values_are_those_of_the_norms():
    A = np.array([[3.0, 0.0, 1.0, 0.0], [4.0, 0.0, 0.0, 1.0]])
    assert ColumnSparse(1).value(OPS, A) == pytest.approx(5 + 0 + 1 + 1)
    assert ColumnSparse(2).value(OPS, A) == pytest.approx(5 + np.sqrt(2))
    assert LowRank().value(OPS, np.diag([3.0, -2.0])) == pytest.approx(5)


@pytest.mark.parametrize("size, s", [(1, 2), (2, 1), (3, 2), (2, 0), (1, 6)])
def test_hard_threshold_is_the_nearest_of_all_supports(size, s):
    C = np.random.default_rng(2).normal(size=(3, 6))
    best = np.inf
    for kept in itertools.combinations(range(6 // size), min(s, 6 // size)):
        A = np.zeros_like(C)
        for g in kept:
            A[:, g * size : (g + 1) * size] = C[:, g * size : (g + 1) * size]
        best = min(best, np.sum((A - C) ** 2))
    A = ColumnSparse(size).hard(OPS, C, s)
    assert np.sum((A - C) ** 2) == pytest.approx(best, abs=1e-12)
    assert np.count_nonzero(ColumnSparse(size).norms(OPS, A)) <= s


def test_hard_threshold_stays_on_allowed_groups():
    C = np.array([[5.0, 4.0, 3.0, 2.0]])
    A = ColumnSparse(1).hard(OPS, C, 2, np.array([False, True, False, True]))
    np.testing.assert_array_equal(A, [[0, 4, 0, 2]])
    A = ColumnSparse(1).hard(OPS, C, 3, np.array([False, True, False, False]))
    np.testing.assert_array_equal(A, [[0, 4, 0, 0]])


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
@pytest.mark.parametrize("k", [0, 1, 3, 9])
def test_rank_threshold_is_eckart_young(shape, k):
    C = np.random.default_rng(3).normal(size=shape)
    sigma = np.linalg.svd(C, compute_uv=False)
    B = LowRank().hard(OPS, C, k)
    assert np.linalg.matrix_rank(B, tol=1e-9) == min(k, 4)
    assert np.sum((B - C) ** 2) == pytest.approx(np.sum(sigma[k:] ** 2), abs=1e-10)


def small_problem(activation, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(60, 4)) + 0.5
    layer_io = LayerIO(rng.normal(size=(3, 4)), rng.normal(size=3), X, activation=activation)
    return ResponseProblem(layer_io, ops=OPS, held_out=0.0, ridge=1e-6)


def minimum_with_one_penalty(problem, penalty, weight):
    """Proximal gradient on f(M, b) + weight * penalty(M), from the original weight."""
    L = 2 * np.linalg.eigvalsh(problem.G)[-1] / problem.rows
    M, beta = problem.W, problem.bias + problem.W @ problem.x_mean
    for _ in range(1500):
        bias = beta - M @ problem.x_mean
        _, RtX, R_mean = problem.sweep(M, bias, convex=True)
        M = penalty.prox(OPS, M + 2 / problem.rows / L * RtX, weight / L)
        beta = beta + R_mean
    return M


@pytest.mark.parametrize("activation", ["identity", "relu", "clamp(-1,1)"])
@pytest.mark.parametrize("penalty", [ColumnSparse(1), ColumnSparse(2), LowRank()])
def test_critical_weight_is_where_zero_begins(activation, penalty):
    problem = small_problem(activation)
    critical = penalty.critical_weight(problem)
    assert np.abs(minimum_with_one_penalty(problem, penalty, 1.01 * critical)).max() == 0
    assert np.abs(minimum_with_one_penalty(problem, penalty, 0.9 * critical)).max() > 1e-3


@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.3)", "gelu", "sigmoid"])
@pytest.mark.parametrize("convex", [True, False])
def test_gradient_at_zero_has_the_best_bias(activation, convex):
    """Its bias cannot be improved, and its gradient is that of f in M, by finite differences."""
    problem = small_problem(activation, seed=1)
    convex = convex and problem.activation.has_convex_surrogate
    zero = np.zeros((3, 4))
    found = minimize(
        lambda b: problem.objective(zero, b, convex=convex),
        problem.samples.Y.mean(axis=0),
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-14, "maxiter": 4000},
    )
    gradient = gradient_at_zero(problem, convex=convex)
    step = 1e-5
    for i, j in ((0, 0), (1, 3), (2, 1)):
        moved = zero.copy()
        moved[i, j] = step
        # Around x_mean, so that the bias stays the best one to first order.
        up = problem.objective(moved, found.x - moved @ problem.x_mean, convex=convex)
        down = problem.objective(-moved, found.x + moved @ problem.x_mean, convex=convex)
        assert (up - down) / (2 * step) == pytest.approx(gradient[i, j], abs=2e-3)


def test_bad_arguments_are_input_errors():
    for call in (
        lambda: ColumnSparse(0),
        lambda: ColumnSparse(4).norms(OPS, np.ones((2, 6))),
        lambda: ColumnSparse(1).hard(OPS, np.ones((2, 6)), -1),
        lambda: LowRank().hard(OPS, np.ones((2, 6)), -1),
    ):
        with pytest.raises(InputError, match="got .*; expected"):
            call()
