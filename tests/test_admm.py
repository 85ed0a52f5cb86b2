"""ADMM: optimality conditions, an independent solver, hard budgets, the convergent extension."""

from dataclasses import replace

import cvxpy
import numpy as np
import pytest

from slr_gpu.decomposition import Status, Structure
from slr_gpu.errors import InputError
from slr_gpu.layer_io import LayerIO
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem
from slr_gpu.solvers.admm import ADMM
from slr_gpu.solvers.majorize import Majorize
from slr_gpu.solvers.refit import decompose
from slr_gpu.solvers.splitting import largest_eigenvalue

OPS = NumpyOps()
VARIANTS = {
    "majorize": {},
    "gradient": {"m_step": "gradient"},
    "inner": {"inner": 3},
    "relaxed": {"relaxation": 1.6},
    "balanced": {"balance": True},
    "proximal": {"scheme": "proximal"},
    "proximal gradient": {"scheme": "proximal", "m_step": "gradient"},
}


def make(n=4, m=6, P=40, activation="relu", *, seed=0, kernel=(), held_out=0.0, W=None, **more):
    rng = np.random.default_rng(seed)
    mix = np.eye(m) + 0.5 * rng.normal(size=(m, m))
    X = np.maximum(rng.normal(size=(P, m)) @ mix + 0.3, 0)
    W = rng.normal(size=(n, m)) if W is None else W
    layer_io = LayerIO(
        W, 0.3 * rng.normal(size=n), X, activation=activation, kernel_size=kernel, **more
    )
    return ResponseProblem(layer_io, ops=OPS, ridge=1e-6, held_out=held_out)


def feasible_objective(problem, state):
    """The surrogate objective of (3) at A, B and M = A + B."""
    M = state.A + state.B
    bias = state.bias + (state.M - M) @ problem.x_mean
    (l1, l2), setting = state.setting.weights, state.setting
    loss = problem.objective(M, bias, convex=setting.convex)
    sparse, low_rank = setting.sparse.value(OPS, state.A), setting.low_rank.value(OPS, state.B)
    return loss + l1 * sparse + l2 * low_rank


def by_cvxpy(problem, l1, l2, size=1):
    """Problem (3) on l_c for ReLU or identity, by a generic conic solver."""
    n, m = problem.W.shape
    A, B, b = cvxpy.Variable((n, m)), cvxpy.Variable((n, m)), cvxpy.Variable((1, n))
    Z = (problem.samples.X + problem.x_mean) @ (A + B).T + np.ones((problem.rows, 1)) @ b
    positive = np.ones_like(problem.samples.Y)
    if not problem.activation.is_identity:
        positive = (problem.samples.Y > 0).astype(float)
    loss = cvxpy.sum_squares(cvxpy.multiply(positive, problem.samples.Y - Z))
    loss += cvxpy.sum_squares(cvxpy.multiply(1 - positive, cvxpy.pos(Z)))
    sparse = sum(cvxpy.norm(A[:, g : g + size], "fro") for g in range(0, m, size))
    whole = cvxpy.Problem(cvxpy.Minimize(loss / problem.rows + l1 * sparse + l2 * cvxpy.normNuc(B)))
    return whole.solve(solver=cvxpy.CLARABEL)


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_a_generic_solver(variant, activation):
    problem = make(activation=activation)
    solver = ADMM(lambda1=0.2, lambda2=0.2, iterations=3000, tolerance=1e-6, **VARIANTS[variant])
    state, status, _ = solver.iterate(problem)
    assert status is Status.CONVERGED
    expected = by_cvxpy(problem, *state.setting.weights)
    assert feasible_objective(problem, state) == pytest.approx(expected, rel=1e-4)


def test_channel_groups_agree_with_a_generic_solver():
    problem = make(kernel=(2,))
    solver = ADMM(lambda1=0.15, lambda2=0.3, iterations=3000, tolerance=1e-6, group="channel")
    state, _, _ = solver.iterate(problem)
    expected = by_cvxpy(problem, *state.setting.weights, size=2)
    assert feasible_objective(problem, state) == pytest.approx(expected, rel=1e-4)
    one = solver.solve(problem)
    other = ADMM(iterations=3000, tolerance=1e-6).with_penalties(0.15, 0.3)
    other = other.solve(problem, form="channels")
    assert one.form == other.form == "channels"
    np.testing.assert_array_equal(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("activation", ["relu", "identity", "clamp(-0.5,1)"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_optimality_conditions(variant, activation):
    """KKT of (3) on l_c, from a gradient taken afresh at the feasible point."""
    problem = make(n=5, m=8, P=120, activation=activation, seed=4)
    solver = ADMM(lambda1=0.25, lambda2=0.2, iterations=5000, tolerance=1e-7, **VARIANTS[variant])
    state, status, _ = solver.iterate(problem)
    assert status is Status.CONVERGED
    l1, l2 = state.setting.weights
    M = state.A + state.B
    np.testing.assert_allclose(M, state.M, atol=1e-5)
    _, RtX, R_mean = problem.sweep(M, state.bias, convex=True)
    G = -2 / problem.rows * RtX
    np.testing.assert_allclose(R_mean, 0, atol=1e-5)
    norms = np.linalg.norm(state.A, axis=0)
    kept = norms > 0
    assert 0 < kept.sum() < 8
    np.testing.assert_allclose(G[:, kept], -l1 * state.A[:, kept] / norms[kept], atol=1e-4 * l1)
    assert np.all(np.linalg.norm(G[:, ~kept], axis=0) <= l1 * (1 + 1e-4))
    left, sigma, right = np.linalg.svd(state.B)
    k = state.rank
    assert 0 < k < 5 and sigma[k] < 1e-9
    # -G = l2 (U Vᵀ + W) with W orthogonal to both, of spectral norm at most 1.
    rotated = left.T @ -G @ right.T
    np.testing.assert_allclose(rotated[:k, :k], l2 * np.eye(k), atol=1e-4 * l2)
    np.testing.assert_allclose(rotated[:k, k:], 0, atol=1e-4 * l2)
    np.testing.assert_allclose(rotated[k:, :k], 0, atol=1e-4 * l2)
    assert np.linalg.norm(rotated[k:, k:], 2) <= l2 * (1 + 1e-4)


@pytest.mark.parametrize("m_step", ["majorize", "gradient"])
@pytest.mark.parametrize("activation", ["relu", "identity", "clamp(-0.5,1)"])
@pytest.mark.parametrize("seed", range(4))
def test_proximal_scheme_is_nonexpansive(m_step, activation, seed):
    """Both quantities of its theory: successive differences, and the distance to a solution."""
    rng = np.random.default_rng(seed)
    n, m, P = rng.integers(1, 7), rng.integers(2, 10), rng.integers(10, 80)
    problem = make(n, m, P, activation, seed=seed + 10)
    t = 10 ** rng.uniform(-1, 1)
    solver = ADMM(lambda1=0.1, lambda2=0.1, scheme="proximal", m_step=m_step, t=t)
    states = [solver.start(problem)]
    for _ in range(400):
        states.append(solver.step(problem, states[-1]))
    values = np.array([s.lyapunov for s in states[1:]])
    floor = 1e-13 * values[0]
    assert np.all(np.diff(values) <= 1e-9 * values[:-1] + floor)
    # An averaged iteration: squared differences fall faster than 1 / iteration.
    assert values[-1] <= 0.05 * values[0]

    for _ in range(3000):
        states[-1] = solver.step(problem, states[-1])
        if states[-1].lyapunov <= 1e-20 * values[0]:
            break
    end = states.pop()
    if m_step == "majorize":
        S = 2 / problem.rows * problem.G
    else:
        S = end.setting.lipschitz * np.eye(problem.width)

    def distance(s):
        dM = s.M - end.M
        dbeta = s.bias - end.bias + dM @ problem.x_mean
        split = t * np.sum((s.A - end.A - s.B + end.B) ** 2)
        metric = np.sum((dM @ (S + t * np.eye(problem.width))) * dM)
        return split + metric + 2 * np.sum(dbeta**2) + np.sum((s.dual - end.dual) ** 2) / t

    distances = np.array([distance(s) for s in states[:200]])
    assert np.all(np.diff(distances) <= 1e-6 * distances[0])


def test_history_and_residuals_mean_what_they_say():
    problem = make(n=5, m=8, P=100, seed=3)
    solver = ADMM(iterations=40, tolerance=0.0, scheme="proximal")
    state, status, history = solver.iterate(problem)
    assert status is Status.ITERATION_LIMIT and len(history) == 40
    apart = np.linalg.norm(state.A + state.B - state.M)
    np.testing.assert_allclose(history[-1]["primal_residual"], apart, rtol=1e-12)
    assert history[-1]["primal_residual"] < history[0]["primal_residual"]
    assert set(history[0]) == {"iteration", "phase", "objective", "primal_residual", "rank",
                               "dual_residual", "groups", "t", "lyapunov", "seconds"}  # fmt: skip
    assert history[-1]["groups"] == np.count_nonzero(np.linalg.norm(state.A, axis=0))
    assert history[-1]["rank"] == np.linalg.matrix_rank(state.B)
    seconds = [entry["seconds"] for entry in history]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("options", [{}, {"relaxation": 1.5}, {"scheme": "proximal"}], ids=str)
def test_dual_residual_is_what_is_missing_in_the_conditions(options):
    """With every column kept and B of full rank the subdifferentials are single points."""
    problem = make(n=5, m=8, P=100, seed=4)
    solver = ADMM(lambda1=0.05, lambda2=0.002, **options)
    state = solver.start(problem)
    for iteration in range(30):
        state = solver.step(problem, state)
        if iteration < 1 or state.groups < 8 or state.rank < 5:
            continue
        l1, l2 = state.setting.weights
        left, _, right = np.linalg.svd(state.B, full_matrices=False)
        _, RtX, R_mean = problem.sweep(state.M, state.bias, convex=True)
        missing = (
            state.dual + l1 * state.A / np.linalg.norm(state.A, axis=0),
            state.dual + l2 * left @ right,
            state.dual + 2 / problem.rows * RtX,
            2 * R_mean,
        )
        expected = np.sqrt(sum(np.sum(part**2) for part in missing))
        assert state.dual_residual == pytest.approx(expected, rel=1e-6)
        return
    pytest.fail("no iterate with every column and full rank")


def test_critical_weights_leave_nothing_and_zero_weights_leave_all():
    problem = make(n=5, m=8, P=100, seed=5)
    nothing = ADMM(lambda1=1.0, lambda2=1.0, iterations=3000, tolerance=1e-5).solve(problem)
    assert nothing.structure == Structure("columns", 0, 0)
    np.testing.assert_allclose(nothing.bias, problem.samples.Y.mean(axis=0), atol=1e-3)
    everything = ADMM(lambda1=0.0, lambda2=0.0).solve(problem)
    assert everything.error < 1e-4


@pytest.mark.parametrize("scheme", ["gauss_seidel", "proximal"])
@pytest.mark.parametrize("m_step", ["majorize", "gradient"])
@pytest.mark.parametrize(
    "structure", [Structure("columns", 3, 2), Structure("channels", 2, 1),
                  Structure("columns", 0, 2), Structure("columns", 4, 0)], ids=str
)  # fmt: skip
def test_hard_budgets_are_met_exactly(structure, m_step, scheme):
    problem = make(n=5, m=12, P=150, kernel=(2,), seed=6)
    for refit in (False, True):
        result = ADMM(m_step=m_step, scheme=scheme, refit=refit).solve(problem, structure)
        assert result.structure == structure
        width = 2 if structure.form == "channels" else 1
        assert len(result.columns) == structure.s * width
        assert np.array_equal(result.columns // width * width % width, result.columns * 0)
        rest = result.to_dense()[:, result.complement]
        assert np.linalg.matrix_rank(rest, tol=1e-8) <= structure.k
        assert problem.relative_error(result.to_dense(), result.bias) == pytest.approx(result.error)


def test_growing_penalty_and_given_support():
    problem = make(n=5, m=12, P=150, seed=7)
    structure = Structure("columns", 3, 1)
    result = ADMM().solve(problem, structure, support=np.array([1, 7, 9]))
    np.testing.assert_array_equal(result.columns, [1, 7, 9])
    t = np.array([e["t"] for e in result.history if e["phase"] == "admm"])
    growth = t[5:] / t[:-5]
    assert np.all((growth >= 1.02**5 - 1e-9) & (growth <= 1.1**5 + 1e-9))
    penalties = ADMM(lambda1=0.01, lambda2=0.5).solve(problem, support=np.array([1, 7, 9]))
    assert set(penalties.columns) <= {1, 7, 9} and len(penalties.columns)


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_planted_weight_is_recovered(activation, convex):
    rng = np.random.default_rng(8)
    A = np.zeros((8, 14))
    A[:, [2, 5, 11]] = 3 * rng.normal(size=(8, 3))
    W = A + rng.normal(size=(8, 2)) @ rng.normal(size=(2, 14))
    problem = make(8, 14, 400, activation, W=W, seed=9)
    result = ADMM(convex=convex).solve(problem, Structure("columns", 3, 2))
    np.testing.assert_array_equal(result.columns, [2, 5, 11])
    assert result.error < 1e-9
    np.testing.assert_allclose(result.to_dense(), W, atol=1e-3)


ACTIVATIONS = ["identity", "relu", "relu6", "leaky_relu(0.2)", "gelu", "tanh", "sigmoid"]


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("structure", [None, Structure("columns", 4, 2)], ids=str)
def test_refit_never_worsens_the_true_objective(activation, structure, convex):
    for seed in range(3):
        problem = make(6, 12, 200, activation, seed=seed, held_out=0.2)
        settings = {"iterations": 60, "lambda1": 0.2, "lambda2": 0.2}
        solver = ADMM(convex=convex, **settings)
        end = solver.iterate(problem, structure)
        before, after = (
            replace(solver, refit=refit).finish(problem, end[0], structure, *end[1:])
            for refit in (False, True)
        )
        assert after.error <= before.error * (1 + 1e-12)
        np.testing.assert_array_equal(after.columns, before.columns)
        assert after.rank == before.rank
        assert "refit" in after.notes[0] and after.history[-1]["phase"] == "refit"
    assert after.error < 0.9 * before.error or structure is not None


def test_a_refit_that_raises_the_true_loss_is_not_used():
    """From a minimiser of the true loss, descending the surrogate can only make it worse."""
    problem, structure = make(6, 12, 200, seed=3), Structure("columns", 3, 1)
    best = Majorize(iterations=300, convex=False, tolerance=1e-9).solve(
        problem, structure, np.array([0, 4, 7])
    )
    groups = np.isin(np.arange(12), best.columns)
    arguments = (problem, structure, groups, best.to_dense(), best.bias, best.status, [])
    plain = decompose(*arguments, convex=True, refit=False)
    result = decompose(*arguments, convex=True, refit=True)
    assert result.error == plain.error and "(not used)" in result.notes[0]
    np.testing.assert_array_equal(result.A, plain.A)


def test_rotated_form_keeps_leading_channels():
    problem = make(6, 15, 300, kernel=(3,), seed=10)
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0][:4]
    turned = problem.in_basis(basis)
    hard = ADMM().solve(turned, Structure("rotated", 2, 2, 4))
    assert hard.structure == Structure("rotated", 2, 2, 4)
    np.testing.assert_array_equal(hard.columns, np.arange(6))
    np.testing.assert_array_equal(hard.basis, basis)
    soft = ADMM(lambda1=0.25, lambda2=0.2).solve(turned)
    s = soft.structure.s
    assert soft.form == "rotated" and 0 < s < 4
    np.testing.assert_array_equal(soft.columns, np.arange(3 * s))
    assert not np.array_equal(soft.basis, basis)
    for result in (hard, soft):
        dense = problem.relative_error(result.to_dense(), result.bias)
        assert dense == pytest.approx(result.error)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("structure", [None, Structure("columns", 3, 1)], ids=str)
@pytest.mark.parametrize("scheme", ["gauss_seidel", "proximal"])
@pytest.mark.parametrize("t", [1e-300, 1e-100, 1e-20, 1e20, 1e300])
def test_a_hopeless_penalty_parameter_never_gives_nan(t, scheme, structure):
    problem = make(4, 8, 60, seed=11, targets=np.random.default_rng(11).random((60, 4)))
    result = ADMM(t=t, scheme=scheme, iterations=30).solve(problem, structure)
    assert np.isfinite(result.to_dense()).all() and np.isfinite(result.error)
    if t in (1e-300, 1e300):
        assert result.status is Status.DIVERGED
        assert "diverged" in result.notes[-1]


@pytest.mark.parametrize("structure", [None, Structure("columns", 3, 1)], ids=str)
def test_constant_inputs(structure):
    layer_io = LayerIO(np.ones((3, 6)), None, np.full((20, 6), 1.5, np.float32))
    problem = ResponseProblem(layer_io, ops=OPS)
    result = ADMM(iterations=30).solve(problem, structure)
    assert result.error < 1e-6 and np.isfinite(result.to_dense()).all()


def test_same_problem_same_bits():
    one, other = (ADMM().solve(make(seed=12), Structure("columns", 2, 1)) for _ in range(2))
    assert one.to_dense().tobytes() == other.to_dense().tobytes()


def test_power_iteration_bounds_the_largest_eigenvalue():
    rng = np.random.default_rng(13)
    for m in (1, 2, 10, 50):
        F = rng.normal(size=(2 * m, m)) * np.linspace(0.1, 2, m)
        G = F.T @ F
        top = np.linalg.eigvalsh(G)[-1]
        assert top * (1 - 1e-12) <= largest_eigenvalue(OPS, G) <= 1.06 * top
    assert largest_eigenvalue(OPS, np.zeros((3, 3))) == 0


@pytest.mark.parametrize(
    "bad",
    [{"m_step": "newton"}, {"scheme": "jacobi"}, {"group": "row"}, {"lambda1": -1.0},
     {"lambda1": 2.0}, {"lambda2": float("nan")}, {"t": 0.0}, {"growth": (1.1, 1.0)},
     {"relaxation": 2.0}, {"relaxation": 1.5, "scheme": "proximal"}, {"inner": 0},
     {"inner": 2, "scheme": "proximal"}, {"iterations": 0}, {"tolerance": -1.0},
     {"iterations": 2.5}, {"inner": 1.5}, {"tolerance": float("nan")}, {"tolerance": "small"},
     {"lambda1": float("inf"), "relative": False}],
    ids=str,
)  # fmt: skip
def test_bad_settings(bad):
    with pytest.raises(InputError, match="got .*; expected"):
        ADMM(**bad)


def test_a_structure_that_is_too_large():
    with pytest.raises(InputError, match="groups"):
        ADMM().solve(make(), Structure("columns", 7, 1))
