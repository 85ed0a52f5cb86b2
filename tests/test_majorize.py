"""Majorize, support selection and Decomposition against brute force and planted answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slr_gpu import activations
from slr_gpu.decomposition import Decomposition, Structure
from slr_gpu.errors import InputError
from slr_gpu.layer_io import LayerIO
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem, metric_of
from slr_gpu.solvers.majorize import Majorize, state_of
from slr_gpu.support import SupportSearch, select_support

OPS = NumpyOps()


def make(W, X, activation="relu", *, targets=None, ridge=1e-9, held_out=0.0, seed=0, **more):
    bias = np.random.default_rng(seed).normal(size=len(W)) * 0.3
    layer_io = LayerIO(
        W, bias, X, activation=activation, targets=targets, linear_targets=targets, **more
    )
    return ResponseProblem(layer_io, ops=OPS, ridge=ridge, held_out=held_out)


def random_problem(n, m, P, activation, seed, **more):
    rng = np.random.default_rng(seed)
    mix = np.eye(m) + 0.5 * rng.normal(size=(m, m))
    X = np.maximum(rng.normal(size=(P, m)) @ mix + 0.3, 0)
    return make(rng.normal(size=(n, m)), X, activation, seed=seed, **more)


def linear_objective(problem, M, bias):
    """``||Z - X Mᵀ - b||^2 + rho ||M - W||^2`` of an identity problem."""
    loss = problem.rows * problem.objective(M, bias)
    return loss + problem.rho * np.sum((M - problem.W) ** 2)


def descent(problem, structure, support, convex, steps=6):
    solver = Majorize(convex=convex)
    state = solver.start(problem, structure, support)
    solver.evaluate(problem, state)
    values = [state.objective]
    for _ in range(steps):
        state = solver.steps(problem, state, structure)[-1]
        values.append(state.objective)
    return np.array(values), state


ACTIVATIONS = ["identity", "relu", "relu6", "clamp(-0.5,1)", "leaky_relu(0.2)", "gelu", "silu",
               "gelu_tanh", "tanh", "sigmoid", "hardswish"]  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 8), m=st.integers(1, 12), P=st.integers(2, 60),
    activation=st.sampled_from(ACTIVATIONS), convex=st.booleans(), seed=st.integers(0, 10_000),
    data=st.data(),
)  # fmt: skip
def test_objective_never_increases(n, m, P, activation, convex, seed, data):
    s, k = data.draw(st.integers(0, m)), data.draw(st.integers(0, min(n, m)))
    ridge = data.draw(st.sampled_from([1e-9, 1e-3, 1.0]))
    problem = random_problem(n, m, P, activation, seed, ridge=ridge)
    # Away from W, so that the pull of the ridge matters.
    problem.W = problem.W + 1
    support = np.random.default_rng(seed).permutation(m)[:s]
    values, state = descent(problem, Structure("columns", s, k), support, convex)
    assert np.all(np.isfinite(values))
    assert np.all(np.diff(values) <= 1e-9 * np.abs(values[:-1]) + 1e-14)
    # The objective is what it says, of a weight that has the structure.
    convex = convex and problem.activation.has_convex_surrogate
    expected = problem.objective(state.M, state.bias, convex=convex)
    expected += problem.rho / problem.rows * np.sum((state.M - problem.W) ** 2)
    assert values[-1] == pytest.approx(expected, rel=1e-9, abs=1e-14)
    rest = np.delete(state.M, support, axis=1)
    if rest.size:
        assert np.linalg.matrix_rank(rest, tol=1e-7 * (1 + np.abs(rest).max())) <= k


@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.2)", "gelu"])
@pytest.mark.parametrize("convex", [True, False])
def test_iterations_improve_on_the_closed_form(activation, convex):
    problem = random_problem(8, 16, 300, activation, 3)
    values, _ = descent(problem, Structure("columns", 4, 2), np.arange(4), convex, steps=10)
    assert values[-1] < 0.97 * values[0]


@pytest.mark.parametrize("s, k", [(0, 1), (2, 1), (3, 2), (5, 0), (0, 3)])
def test_closed_form_beats_any_feasible_weight(s, k):
    problem = random_problem(4, 7, 40, "identity", 4, ridge=1e-3)
    support = np.array([5, 1, 3, 0, 6])[:s]
    solver, structure = Majorize(iterations=0), Structure("columns", s, k)
    best = solver.start(problem, structure, support)
    reached = linear_objective(problem, best.M, best.bias)
    rng, complement = np.random.default_rng(5), np.setdiff1d(np.arange(7), support)
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(100):
            U = best.U + scale * rng.normal(size=best.U.shape)
            V = best.U.T @ best.M[:, complement]
            M = best.M + scale * rng.normal(size=best.M.shape)
            M[:, complement] = U @ (V + scale * rng.normal(size=V.shape))
            bias = best.bias + scale * rng.normal(size=4)
            assert linear_objective(problem, M, bias) >= reached * (1 - 1e-12)


@pytest.mark.parametrize("s, k", [(0, 1), (2, 1), (3, 2)])
def test_closed_form_equals_alternating_least_squares(s, k):
    """Alternate over [A, V, b] and [A, U, b] with numpy's lstsq, from several starts."""
    rng = np.random.default_rng(6)
    problem = random_problem(4, 6, 50, "identity", 6, targets=rng.normal(size=(50, 4)))
    support, complement = np.arange(s), np.arange(s, 6)
    state = Majorize().start(problem, Structure("columns", s, k), support)
    X, Y, ones = (problem.samples.X + problem.x_mean), problem.samples.Y, np.ones((50, 1))
    best = np.inf
    for _ in range(6):
        U = rng.normal(size=(4, k))
        for _ in range(400):
            # V and A at fixed U: vec is one least-squares problem over all outputs.
            left = np.hstack([X[:, support], ones])
            design = np.hstack([np.kron(left, np.eye(4)), np.kron(X[:, complement], U)])
            v = np.linalg.lstsq(design, Y.ravel(), rcond=None)[0][-k * (6 - s) :]
            V = v.reshape(6 - s, k).T
            inputs = np.hstack([left, X[:, complement] @ V.T])
            solution = np.linalg.lstsq(inputs, Y, rcond=None)[0]
            U = solution[-k:].T
        best = min(best, np.sum((Y - inputs @ solution) ** 2))
    reached = problem.rows * problem.objective(state.M, state.bias)
    assert reached == pytest.approx(best, rel=1e-6)


def test_v_on_the_complement_gives_the_same_function():
    """What U V does on S, A takes: same weight with |S| k fewer numbers."""
    rng = np.random.default_rng(7)
    problem = random_problem(5, 8, 60, "relu", 7)
    support = np.array([1, 4, 6])
    A, U, V = np.zeros((5, 8)), rng.normal(size=(5, 2)), rng.normal(size=(2, 8))
    A[:, support] = rng.normal(size=(5, 3))
    full, bias = A + U @ V, rng.normal(size=5)
    structure = Structure("columns", 3, 2)
    start = state_of(problem, *metric_of(problem, support), 2, full, bias)
    result = Majorize(iterations=0).solve(problem, structure, start=start)
    assert result.V.shape == (2, 5) and result.structure == structure
    np.testing.assert_allclose(result.to_dense(), full, atol=1e-12)
    np.testing.assert_allclose(
        (problem.samples.X + problem.x_mean) @ result.to_dense().T,
        (problem.samples.X + problem.x_mean) @ A.T
        + ((problem.samples.X + problem.x_mean) @ V.T) @ U.T,
        atol=1e-11,
    )
    assert result.parameters == structure.cost(5, 8, 1) + 5


def planted(activation, *, columns, k, n=8, m=14, P=400, seed=8, size=1):
    rng = np.random.default_rng(seed)
    A = np.zeros((n, m))
    columns = (np.asarray(columns)[:, None] * size + np.arange(size)).ravel()
    A[:, columns] = 2 * rng.normal(size=(n, len(columns)))
    W = A + rng.normal(size=(n, k)) @ rng.normal(size=(k, m))
    X = rng.normal(size=(P, m)) @ (np.eye(m) + 0.2 * rng.normal(size=(m, m)))
    kernel = {"kernel_size": (size,)} if size > 1 else {}
    return make(W, X, activation, **kernel), columns


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_planted_weight_is_recovered(activation):
    problem, columns = planted(activation, columns=[2, 5, 11], k=2)
    structure = Structure("columns", 3, 2)
    support, _ = select_support(problem, structure)
    np.testing.assert_array_equal(support, columns)
    result = Majorize().solve(problem, structure, support)
    np.testing.assert_allclose(result.to_dense(), problem.W, atol=1e-5)
    np.testing.assert_allclose(result.bias, problem.bias, atol=1e-5)
    assert result.error < 1e-10


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form, size", [("columns", 1), ("channels", 2)])
def test_select_support_finds_planted_columns(form, size, seed):
    groups = np.sort(np.random.default_rng(seed).permutation(64 // size)[: 10 // size])
    problem, columns = planted(
        "identity", columns=groups, k=4, n=32, m=64, P=300, size=size, seed=seed
    )
    support, error = select_support(problem, Structure(form, len(groups), 4))
    np.testing.assert_array_equal(support, columns)
    assert error <= 1e-6 * problem.linear_energy


def test_reported_support_error_is_that_of_the_closed_form():
    problem = random_problem(6, 12, 100, "identity", 9, ridge=1e-2)
    structure = Structure("columns", 4, 2)
    support, error = select_support(problem, structure)
    state = Majorize().start(problem, structure, support)
    assert error == pytest.approx(linear_objective(problem, state.M, state.bias), rel=1e-9)


@pytest.mark.parametrize("size", [1, 2])
def test_gains_and_costs_are_those_of_one_exchange(size):
    """At k = 0 the score of one group is exact: compare with solving again without or with it."""
    search = SupportSearch(random_problem(4, 8, 60, "identity", 10), size)
    groups = np.array([0, 2])
    support = search.evaluate(groups, 0)
    gains, costs = search.gains(support), search.costs(support)
    assert np.all(np.isneginf(gains[groups]))
    for g in np.setdiff1d(np.arange(8 // size), groups):
        with_it = search.evaluate(np.sort(np.append(groups, g)), 0)
        assert gains[g] == pytest.approx(support.error - with_it.error, rel=1e-6)
    for i, cost in enumerate(costs):
        without = search.evaluate(np.delete(groups, i), 0)
        assert cost == pytest.approx(without.error - support.error, rel=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_costs_beside_low_rank_are_those_at_fixed_columns_of_U(size):
    """Least squares on augmented rows, of what U does not reach, with and without each group."""
    problem = random_problem(5, 12, 80, "identity", 10, ridge=1e-2)
    search = SupportSearch(problem, size)
    support = search.evaluate(np.array([0, 2, 3]), 2)
    assert support.U.shape == (5, 2)
    # Z = X Wᵀ + b here, so rows and ridge together ask for X Aᵀ = X Wᵀ and A = W.
    (gram,) = problem.sum_over_rows(lambda X, Y, Z: (X.T @ X,), wants="X")
    rows = np.linalg.cholesky(gram + problem.rho * np.eye(12)).T
    wanted = rows @ ((np.eye(5) - support.U @ support.U.T) @ problem.W).T

    def error(groups):
        columns = (groups[:, None] * size + np.arange(size)).ravel()
        found = np.linalg.lstsq(rows[:, columns], wanted, rcond=None)[0]
        return np.sum((wanted - rows[:, columns] @ found) ** 2)

    for i, cost in enumerate(search.costs(support)):
        more = error(np.delete(support.groups, i)) - error(support.groups)
        assert cost == pytest.approx(more, rel=1e-6)


def rotated_result(dtype=np.float64):
    rng = np.random.default_rng(11)
    X = rng.normal(size=(80, 15)).astype(dtype)
    problem = make(rng.normal(size=(4, 15)).astype(dtype), X, kernel_size=(3,), held_out=0.2)
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0][:4]
    return problem, Majorize().solve(problem.in_basis(basis), Structure("rotated", 1, 2, 4))


def test_to_dense_with_a_basis_is_the_kronecker_product():
    problem, result = rotated_result()
    M = np.zeros((4, 12))
    M[:, :3], M[:, 3:] = result.A, result.U @ result.V
    expected = M @ np.kron(result.basis, np.eye(3))
    np.testing.assert_allclose(result.to_dense(), expected, atol=1e-12)
    np.testing.assert_array_equal(result.columns, [0, 1, 2])
    assert problem.relative_error(expected, result.bias) == pytest.approx(result.error)
    assert problem.held_out_error(expected, result.bias) == pytest.approx(result.held_out_error)


def test_float32_data_gives_float32_factors():
    result = rotated_result(np.float32)[1]
    for name in ("A", "U", "V", "bias", "basis"):
        assert getattr(result, name).dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_save_and_load_are_bit_for_bit(tmp_path, dtype):
    result = rotated_result(dtype)[1].replace(notes=("a note",))
    result.save(tmp_path / "layer.safetensors")
    loaded = Decomposition.load(tmp_path / "layer.safetensors")
    for name in ("columns", "A", "U", "V", "bias", "basis"):
        one, other = getattr(result, name), getattr(loaded, name)
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
    for name in ("form", "kernel_size", "error", "status", "history", "notes", "structure"):
        assert getattr(result, name) == getattr(loaded, name)
    assert result.to_dense().tobytes() == loaded.to_dense().tobytes()


def test_broken_files_are_input_errors(tmp_path):
    path = tmp_path / "layer.safetensors"
    with pytest.raises(InputError, match="expected"):
        Decomposition.load(path)
    rotated_result()[1].save(path)
    whole = path.read_bytes()
    for broken in (b"", whole[:50], whole[:-8], b"\0" * 32 + whole[32:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="expected"):
            Decomposition.load(path)
    LayerIO(np.ones((2, 3)), None, np.ones((4, 3))).save(path)
    with pytest.raises(InputError, match="kind"):
        Decomposition.load(path)


def test_factors_that_do_not_fit_are_input_errors():
    good = {"columns": np.array([0, 2]), "A": np.ones((3, 2)), "U": np.ones((3, 1)),
            "V": np.ones((1, 3)), "bias": np.ones(3)}  # fmt: skip
    assert Decomposition("columns", **good, channels=5).rank == 1
    for change in ({"A": np.ones((3, 3))}, {"V": np.ones((1, 5))}, {"bias": np.ones(4)},
                   {"columns": np.array([2, 0])}, {"columns": np.array([0, 5])}):  # fmt: skip
        with pytest.raises(InputError, match="got .*; expected"):
            Decomposition("columns", **(good | change), channels=5)


@pytest.mark.parametrize("bad", [{"iterations": -1}, {"iterations": 1.5}, {"patience": 0},
                                 {"tolerance": -1e-3}], ids=str)  # fmt: skip
def test_bad_settings(bad):
    with pytest.raises(InputError, match=f"got {next(iter(bad))}=.*; expected"):
        Majorize(**bad)


@pytest.mark.parametrize("activation", ["relu", "relu6", "clamp(-0.5,1)", "leaky_relu(0.2)"])
def test_descent_with_targets_that_no_response_reaches(activation):
    """The mask leaves residuals out that such targets would bring back: c = 1 is no bound there."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        targets = 3 * rng.normal(size=(60, 5)) - 1
        X = np.maximum(rng.normal(size=(60, 8)), 0)
        problem = make(rng.normal(size=(5, 8)), X, activation, targets=targets, seed=seed)
        structure = Structure("columns", 2, 2)
        values, _ = descent(problem, structure, np.arange(2), False, steps=12)
        assert np.all(np.diff(values) <= 1e-12 * values[0]), (seed, values)


def test_targets_within_the_range_need_no_safeguard():
    rng = np.random.default_rng(0)
    W, X = rng.normal(size=(5, 8)), rng.normal(size=(60, 8))
    assert make(W, X).proven and make(W, X, targets=np.abs(rng.normal(size=(60, 5)))).proven
    assert not make(W, X, targets=rng.normal(size=(60, 5))).proven
    assert not make(W, X, "gelu").proven
    assert make(W, X, "identity", targets=rng.normal(size=(60, 5))).proven
    for name, ends in (("relu", (0, np.inf)), ("relu6", (0, 6)), ("clamp(-0.5,1)", (-0.5, 1)),
                       ("identity", (-np.inf, np.inf)), ("clamp(-2,1)", (-2, 1))):  # fmt: skip
        assert activations.get(name).range == ends


def test_held_out_rows_choose_the_iterate():
    problem = random_problem(8, 30, 60, "relu", 12, held_out=0.3)
    result = Majorize(iterations=30, tolerance=0.0, patience=3).solve(
        problem, Structure("columns", 12, 3), np.arange(12)
    )
    assert result.held_out_error <= min(e["held_out_error"] for e in result.history)
    assert [e["iteration"] for e in result.history] == list(range(1, len(result.history) + 1))


def test_every_activation_is_tried():
    assert {name.split("(")[0] for name in ACTIVATIONS} == set(activations.names())
