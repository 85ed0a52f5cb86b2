"""The response problem: gradient, centring, ridge and change of basis against other routes."""

import numpy as np
import pytest
import scipy.linalg

from slr_gpu import activations
from slr_gpu.decomposition import Structure
from slr_gpu.errors import InputError
from slr_gpu.layer_io import LayerIO
from slr_gpu.ops import NumpyOps
from slr_gpu.penalties import low_rank_projection
from slr_gpu.problem import Metric, ResponseProblem, metric_of
from slr_gpu.solvers.majorize import Majorize, closed_form

OPS = NumpyOps()


def make(activation="relu", *, n=3, c=2, kernel=(2,), rows=50, ridge=1e-8, held_out=0.0, **more):
    rng = np.random.default_rng(5)
    m = c * int(np.prod(kernel, dtype=int))
    X = rng.normal(size=(rows, m)) + np.linspace(-1, 1, m)
    layer_io = LayerIO(
        rng.normal(size=(n, m)), rng.normal(size=n), X, activation=activation,
        kernel_size=kernel, **more,
    )  # fmt: skip
    return ResponseProblem(layer_io, ops=OPS, ridge=ridge, held_out=held_out)


@pytest.mark.parametrize("convex", [False, True])
@pytest.mark.parametrize("name", activations.names())
def test_gradient_against_finite_differences(name, convex):
    problem = make(name)
    if convex and not problem.activation.has_convex_surrogate:
        pytest.skip("no convex surrogate")
    rng = np.random.default_rng(6)
    M, bias = rng.normal(size=(3, 4)), rng.normal(size=3)
    loss, RtX, R_mean = problem.sweep(M, bias, convex=convex)
    h = 1e-6
    for _ in range(5):
        dM, db = rng.normal(size=M.shape), rng.normal(size=3)
        up = problem.objective(M + h * dM, bias + h * db, convex=convex)
        down = problem.objective(M - h * dM, bias - h * db, convex=convex)
        # RtX is centred: the gradient in M at a fixed bias adds the mean back.
        gradient = -2 * (RtX / problem.rows + np.outer(R_mean, problem.x_mean))
        expected = np.sum(gradient * dM) - 2 * np.sum(R_mean * db)
        assert (up - down) / (2 * h) == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert loss == problem.objective(M, bias, convex=convex)


def test_objective_is_the_mean_squared_error_after_the_activation():
    problem = make("relu")
    M, bias = problem.W + 0.3, problem.bias - 0.2
    Z = (problem.samples.X + problem.x_mean) @ M.T + bias
    expected = np.sum((problem.samples.Y - np.maximum(Z, 0)) ** 2) / problem.rows
    assert problem.objective(M, bias) == pytest.approx(expected, rel=1e-13)
    assert problem.relative_error(M, bias) == pytest.approx(
        expected * problem.rows / np.sum(problem.samples.Y**2)
    )


def test_centring_equals_an_appended_column_of_ones():
    rng = np.random.default_rng(7)
    targets = rng.normal(size=(50, 3))
    problem = make("identity", targets=targets, linear_targets=targets)
    augmented = np.hstack([(problem.samples.X + problem.x_mean), np.ones((50, 1))])
    expected = np.linalg.lstsq(augmented, targets, rcond=None)[0].T
    metric, kept = metric_of(problem, np.arange(4))
    state = closed_form(problem, metric, kept, 0)
    np.testing.assert_allclose(state.M, expected[:, :4], atol=1e-6)
    np.testing.assert_allclose(state.bias, expected[:, 4], atol=1e-6)


def test_ridge_pulls_dead_directions_to_the_original_weight():
    rng = np.random.default_rng(8)
    X = rng.normal(size=(40, 6))
    X[:, 2], X[:, 4] = 0.0, 3.0  # never excited; constant
    targets = rng.normal(size=(40, 3))
    W = rng.normal(size=(3, 6))
    layer_io = LayerIO(W, None, X, targets, "identity", linear_targets=targets)
    problem = ResponseProblem(layer_io, ops=OPS, held_out=0.0, ridge=1e-6)
    M = problem.metric.weight(problem.metric.whiten(problem.start_rhs))
    np.testing.assert_allclose(M[:, [2, 4]], W[:, [2, 4]], atol=1e-8)
    assert np.abs(M[:, [0, 1]] - W[:, [0, 1]]).max() > 0.05


@pytest.mark.parametrize("value", [0.0, 2.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_inputs_do_not_break(value, dtype):
    rng = np.random.default_rng(9)
    layer_io = LayerIO(rng.normal(size=(3, 8)).astype(dtype), None, np.full((30, 8), value, dtype))
    problem = ResponseProblem(layer_io, ops=OPS, held_out=0.1)
    state = closed_form(problem, *metric_of(problem, np.array([1, 5])), 2)
    assert np.isfinite(state.M).all() and np.isfinite(state.bias).all()
    assert problem.relative_error(state.M, state.bias) < 1e-8


def test_with_ridge_equals_a_fresh_problem():
    changed, fresh = make(ridge=1e-3).with_ridge(0.2), make(ridge=0.2)
    for name in ("G", "start_rhs", "linear_energy", "rho"):
        np.testing.assert_allclose(getattr(changed, name), getattr(fresh, name), rtol=1e-12)


def test_in_basis_is_an_exact_change_of_variables():
    problem = make(c=5, kernel=(3,), held_out=0.2)
    basis = np.linalg.qr(np.random.default_rng(10).normal(size=(5, 5)))[0]
    E = np.kron(basis, np.eye(3))
    turned = problem.in_basis(basis)
    np.testing.assert_allclose(
        turned.samples.X + turned.x_mean, (problem.samples.X + problem.x_mean) @ E.T, atol=1e-12
    )
    np.testing.assert_allclose(turned.held.X, problem.held.X @ E.T, atol=1e-12)
    np.testing.assert_allclose(turned.G, E @ problem.G @ E.T, atol=1e-9)
    np.testing.assert_allclose(turned.start_rhs, problem.start_rhs @ E.T, atol=1e-9)
    M = np.random.default_rng(11).normal(size=(3, 15))
    for one, other in zip(
        turned.sweep(M, problem.bias, convex=True),
        problem.sweep(M @ E, problem.bias, convex=True),
        strict=True,
    ):
        expected = other @ E.T if np.ndim(other) == 2 else other
        np.testing.assert_allclose(one, expected, atol=1e-9)
    assert turned.held_out_error(M, problem.bias) == pytest.approx(
        problem.held_out_error(M @ E, problem.bias)
    )


def test_truncated_basis_keeps_the_energy_of_the_whole_problem():
    problem = make("identity", c=5, kernel=(3,))
    basis = np.linalg.qr(np.random.default_rng(12).normal(size=(5, 5)))[0][:2]
    turned = problem.in_basis(basis)
    assert (turned.width, turned.groups) == (6, 2)
    F = turned.metric.whiten(turned.start_rhs)
    # Of M in the basis, ridge included: what is left is energy less what F explains.
    left = turned.linear_energy - np.sum(F**2)
    M = turned.metric.weight(F) @ np.kron(basis, np.eye(3))
    bias = problem.linear_bias(M)
    direct = problem.rows * problem.objective(M, bias)
    direct += problem.rho * np.sum((M - problem.W) ** 2)
    assert left == pytest.approx(direct, rel=1e-9)


def test_metric_of_leading_columns_is_the_leading_block():
    problem = make(c=6, kernel=())
    metric = Metric(OPS, problem.G, np.array([3, 1, 0, 2, 4, 5]))
    M = np.random.default_rng(13).normal(size=(3, 6))
    F = metric.whiten(M @ problem.G)
    assert np.sum(F**2) == pytest.approx(np.trace(M @ problem.G @ M.T), rel=1e-10)
    np.testing.assert_allclose(metric.weight(F), M, atol=1e-9)
    order = np.array([3, 1, 0, 2, 4, 5])
    G = problem.G[order][:, order]
    schur = G[2:, 2:] - G[2:, :2] @ np.linalg.solve(G[:2, :2], G[:2, 2:])
    np.testing.assert_allclose(metric.L[2:, 2:] @ metric.L[2:, 2:].T, schur, atol=1e-9)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
@pytest.mark.parametrize("k", [0, 2, 20])
def test_low_rank_projection_is_the_truncated_svd(shape, k):
    F = np.random.default_rng(14).normal(size=shape)
    left, sigma, right = np.linalg.svd(F, full_matrices=False)
    low_rank, U = low_rank_projection(OPS, F, k)
    np.testing.assert_allclose(low_rank, (left[:, :k] * sigma[:k]) @ right[:k], atol=1e-10)
    np.testing.assert_allclose(U.T @ U, np.eye(U.shape[1]), atol=1e-10)


def test_linear_fit_through_another_activation_aims_before_it():
    layer_io = make("relu").layer_io
    linear = ResponseProblem(
        layer_io, ops=OPS, held_out=0.2, ridge=1e-8, activation=activations.get("identity")
    )
    assert linear.objective(linear.W, linear.bias) < 1e-20
    assert linear.held_out_error(linear.W, linear.bias) < 1e-20
    found = Majorize(iterations=0).start(linear, Structure("columns", 4, 0), np.arange(4))
    np.testing.assert_allclose(found.M, linear.W, atol=1e-7)


@pytest.mark.parametrize("bad", [{"ridge": 0.0}, {"ridge": -1.0}, {"held_out": 0.6}])
def test_bad_settings_are_input_errors(bad):
    with pytest.raises(InputError, match="got .*; expected"):
        make(**bad)


@pytest.mark.parametrize("size", [0, 1, 128, 129, 300, 1300])
def test_cholesky_factors_by_halves(size):
    X = np.random.default_rng(size).standard_normal((size, size))
    A = X @ X.T + np.eye(size)
    before = A.copy()
    L = NumpyOps().cholesky(A)
    assert not np.triu(L, 1).any() and (np.diagonal(L) > 0).all()
    np.testing.assert_array_equal(A, before)
    # The backward error of the factorisation (Higham 2002, theorem 10.3) holds entry by entry.
    assert (np.abs(L @ L.T - A) <= 1e-15 * max(size, 4) * (np.abs(L) @ np.abs(L.T))).all()
    np.testing.assert_allclose(L, np.linalg.cholesky(A), rtol=1e-7, atol=1e-9)


def test_cholesky_of_columns_that_are_nearly_the_same():
    X = np.random.default_rng(0).standard_normal((300, 400))
    X[:, 1::2] = X[:, ::2] + 1e-6 * X[:, 1::2]
    A = X.T @ X + 1e-9 * np.eye(400)
    L = NumpyOps().cholesky(A)
    assert (np.abs(L @ L.T - A) <= 1e-13 * (np.abs(L) @ np.abs(L.T))).all()


@pytest.mark.parametrize("place", [0, 127, 128, 299])
def test_what_is_not_positive_definite_has_no_factor(place):
    A = np.eye(300)
    A[place, place] = -1e-9
    with pytest.raises(InputError, match="Raise ridge"):
        NumpyOps().cholesky(A)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 400])
def test_triangular_solves_in_tiles(size, transposed):
    rng = np.random.default_rng(size)
    L = np.linalg.cholesky(np.eye(size) + (X := rng.standard_normal((size, size))) @ X.T)
    rhs = rng.standard_normal((3, size)).T
    found = NumpyOps().solve_triangular(L, rhs, transposed=transposed)
    residual = (L.T if transposed else L) @ found - rhs
    bound = 1e-15 * size * (np.abs(L.T if transposed else L) @ np.abs(found)).max(initial=0)
    assert np.abs(residual).max(initial=0) <= bound
    wanted = scipy.linalg.solve_triangular(L, rhs, lower=True, trans=int(transposed))
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("size", [0, 1, 128, 129, 512, 700, 1300])
def test_the_inverse_of_a_triangular_matrix(size):
    rng = np.random.default_rng(size)
    L = np.tril(rng.standard_normal((size, size)), -1) / 40 + np.diag(rng.uniform(1, 2, size))
    found = NumpyOps().triangular_inverse(L)
    wanted = scipy.linalg.solve_triangular(L, np.eye(size), lower=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert not np.triu(found, 1).any()
