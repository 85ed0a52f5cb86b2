"""Three blocks in turn need not converge: a convex problem on which Gauss-Seidel ADMM never does.

Chen, He, Ye and Yuan (2016), "The direct extension of ADMM for multi-block convex minimization
problems is not necessarily convergent", find three lines in R^3 such that ADMM over three
variables, each confined to its line, diverges. Here the two penalties and the loss confine A, B
and M to three such lines near the solution of problem (3), times a fixed unit vector u of R^2:

    A  to u e1ᵀ: the other columns are zero, their subgradients strictly inside the unit ball;
    B  to u vᵀ: of rank one, its singular value small against lambda2 / t;
    M  to u wᵀ: the loss is flat along w (curvature 0.02 t), steep across (1e5 t).

What is asserted is one small convex problem with a known solution, not a verdict on `scheme`
in general: plain Gauss-Seidel repels from that solution, which a linearisation shows, and cycles
around it for good, while the proximal scheme with the same t reaches it.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from test_admm import by_cvxpy, feasible_objective
from threadpoolctl import threadpool_limits

from slr_gpu.decomposition import Status
from slr_gpu.layer_io import LayerIO
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem
from slr_gpu.solvers.admm import ADMM

OPS = NumpyOps()
U = np.array([3, 4]) / 5
E1 = np.array([1, 0, 0])
V = np.array([24, 7, 0]) / 25
W = np.array([12, 2, 3]) / np.sqrt(157)
LAMBDA1, LAMBDA2, T = V[0], 1.0, 1.0
STEEP, FLAT = 1e5, 0.02
A = 0.05 * np.outer(U, E1)
B = 0.02 * np.outer(U, V)

# The loss is its own majoriser, so even one step of the M-step is exact.
GAUSS_SEIDEL = {"plain": {}, "inner": {"inner": 3}, "relaxed": {"relaxation": 1.6}}


def constructed(activation):
    """The problem that A and B solve, whose loss is quadratic with the Hessian H of each row.

    With the certificate D = -lambda2 u vᵀ, the quadratic around N has gradient (A + B - N) H = D
    when N = A + B - D H⁻¹: that is the layer's own weight, and its bias makes every target of a
    ReLU positive, so that l_c is the same quadratic. The inputs have mean zero.
    """
    across = np.eye(3) - np.outer(W, W)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))
    X = signs @ (np.sqrt(STEEP / 2) * across + np.sqrt(FLAT / 2) * np.outer(W, W))
    inverse = across / STEEP + np.outer(W, W) / FLAT
    weight = A + B + LAMBDA2 * np.outer(U, V) @ inverse
    bias = 1 + np.abs(X @ weight.T).max(axis=0)
    layer_io = LayerIO(weight, bias, X, activation=activation)
    return ResponseProblem(layer_io, ops=OPS, ridge=1e-9, held_out=0.0)


def solver(**settings):
    """Neither a stop by tolerance nor a change of t, unless asked for."""
    settings = {"t": T, "tolerance": 0.0, "refit": False} | settings
    return ADMM(lambda1=LAMBDA1, lambda2=LAMBDA2, relative=False, **settings)


def optimum(problem):
    penalties = LAMBDA1 * np.linalg.norm(A, axis=0).sum() + LAMBDA2 * np.linalg.norm(B, "nuc")
    return problem.objective(A + B, problem.bias, convex=True) + penalties


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of steps on 2 x 3 arrays: waking BLAS threads would cost more than all of them."""
    with threadpool_limits(1):
        yield


@pytest.fixture(params=["identity", "relu"])
def problem(request):
    return constructed(request.param)


def test_the_solution_is_what_it_was_constructed_to_be(problem):
    """By its optimality conditions and by a generic solver."""
    _, RtX, R_mean = problem.sweep(A + B, problem.bias, convex=True)
    dual = -2 / problem.rows * RtX
    np.testing.assert_allclose(dual, -LAMBDA2 * np.outer(U, V), atol=1e-8)
    np.testing.assert_allclose(R_mean, 0, atol=1e-8)
    # The subgradient of the column norms: on the kept column exactly, elsewhere strictly inside.
    np.testing.assert_allclose(-dual[:, 0] / LAMBDA1, U, atol=1e-8)
    assert np.all(np.linalg.norm(dual[:, 1:], axis=0) < 0.3 * LAMBDA1)
    assert by_cvxpy(problem, LAMBDA1, LAMBDA2) == pytest.approx(optimum(problem), rel=1e-5)


def at_solution(problem, run):
    state = run.start(problem)
    M, dual = A + B, -LAMBDA2 * np.outer(U, V)
    return replace(state, A=A, B=B, M=M, bias=problem.bias, dual=dual)


def spectral_radius(problem, run):
    """Of one step's derivative at the solution, by central differences."""
    solution = at_solution(problem, run)
    names = ("A", "B", "M", "bias", "dual")
    shapes = [getattr(solution, name).shape for name in names]
    ends = np.cumsum([np.prod(shape) for shape in shapes])

    def step(change):
        parts = np.split(change, ends[:-1])
        parts = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        moved = {n: getattr(solution, n) + part for n, part in zip(names, parts, strict=True)}
        loss, RtX, R_mean = problem.sweep(moved["M"], moved["bias"], convex=True)
        moved |= {"loss": loss, "RtX": RtX, "R_mean": R_mean, "MG": moved["M"] @ problem.G}
        new = run.step(problem, replace(solution, **moved))
        return np.concatenate([getattr(new, name).ravel() for name in names])

    change = 1e-6 * np.eye(ends[-1])
    columns = [(step(c) - step(-c)) / 2e-6 for c in change]
    return np.abs(np.linalg.eigvals(np.array(columns).T)).max()


def test_gauss_seidel_repels_from_the_solution(problem):
    """A fixed point of both schemes, but a linearly unstable one of Gauss-Seidel."""
    assert spectral_radius(problem, solver()) == pytest.approx(1.0189, abs=1e-3)
    assert spectral_radius(problem, solver(scheme="proximal")) < 1


@pytest.mark.parametrize(
    ("activation", "variant"), [("identity", "plain"), *(("relu", v) for v in GAUSS_SEIDEL)]
)
def test_gauss_seidel_cycles(activation, variant):
    """Neither the residual nor the gap to the optimum ever falls: what it does at 500 it does on.

    ``M = A + B`` is what leaves the solver, so that is where the objective is taken.
    """
    problem, run = constructed(activation), solver(**GAUSS_SEIDEL[variant])
    state, best = run.start(problem), optimum(problem)
    residuals, gaps = [], []
    for iteration in range(2000):
        state = run.step(problem, state)
        if iteration % 7 == 0:
            residuals.append(state.primal_residual / np.linalg.norm(A + B))
            gaps.append(feasible_objective(problem, state) / best - 1)
    for values in (residuals, gaps):
        early, late = values[500 // 7 : 1000 // 7], values[1500 // 7 :]
        assert min(values[500 // 7 :]) > 0.03
        assert np.median(late) > 0.8 * np.median(early)
    assert max(residuals[500 // 7 :]) < 1 and state.t == T


def test_gauss_seidel_does_not_claim_convergence():
    result = solver(tolerance=1e-3, iterations=1000).solve(constructed("relu"))
    assert result.status is Status.ITERATION_LIMIT


def test_proximal_converges_with_the_same_t(problem):
    run = solver(scheme="proximal", iterations=1200)
    state, _, history = run.iterate(problem)
    size = np.linalg.norm(A + B)
    assert state.primal_residual < 1e-8 * size and state.dual_residual < 1e-8 * LAMBDA2
    assert feasible_objective(problem, state) == pytest.approx(optimum(problem), rel=1e-8)
    for found, expected in ((state.A, A), (state.B, B), (state.M, A + B)):
        np.testing.assert_allclose(found, expected, atol=1e-6 * size)
    values = np.array([entry["lyapunov"] for entry in history])
    assert np.all(np.diff(values) <= 1e-9 * values[:-1] + 1e-13 * values[0])
    # With the usual tolerance it stops, near the optimum, in a fraction of the iterations.
    state, status, history = replace(run, tolerance=1e-4).iterate(problem)
    assert status is Status.CONVERGED and len(history) < 600
    assert feasible_objective(problem, state) == pytest.approx(optimum(problem), rel=1e-4)
