"""Error curves against explicit solutions, budgets, and the bases."""

from __future__ import annotations

import re

import numpy as np
import pytest

from slr_gpu import BudgetError, LayerBudget, LayerIO, Structure
from slr_gpu.basis import _Point, _Slope, linear_fit, refined, rotated
from slr_gpu.curves import Candidate, RotatedCurve, candidates, held_out_error
from slr_gpu.layer_budget import largest_basis
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem
from slr_gpu.solvers.majorize import Majorize


def conv_problem(seed=0, n=10, c=8, taps=4, rows=400, latent=5, **settings):
    """Inputs with a few strong channel directions, targets from a distorted prefix."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(latent, c))
    X = np.einsum("plt,lc->pct", rng.normal(size=(rows, latent, taps)), mix)
    X = (X + 0.1 * rng.normal(size=X.shape)).reshape(rows, -1)
    W = rng.normal(size=(n, c * taps))
    noisy = X + 0.05 * rng.normal(size=X.shape)
    io = LayerIO(W, rng.normal(size=n), noisy, kernel_size=(taps,), linear_targets=X @ W.T)
    return ResponseProblem(io, ops=NumpyOps(), **{"ridge": 1e-4, "held_out": 0.0, **settings})


def linear_objective(problem, M):
    """``||Zc - Xc Mᵀ||^2 + rho ||W - M||^2`` in plain arrays."""
    Z = problem.samples.Z - problem.z_mean
    return np.sum((Z - problem.samples.X @ M.T) ** 2) + problem.rho * np.sum((problem.W - M) ** 2)


def test_curve_equals_the_error_of_the_closed_form():
    problem = rotated(conv_problem(), 8)
    curve = RotatedCurve(problem)
    for r, s, k in ((8, 0, 3), (6, 2, 4), (5, 5, 0), (4, 1, 10), (3, 0, 1)):
        view = problem.truncated(r)
        structure = Structure("rotated", s, k, r)
        M = Majorize(iterations=0).start(view, structure).M
        full = np.zeros((problem.n, problem.width))
        full[:, : r * problem.taps] = M
        expected = linear_objective(problem, full) / problem.linear_energy
        assert curve.error(structure) == pytest.approx(expected, rel=1e-9)


def test_errors_fall_with_every_resource():
    curve = RotatedCurve(rotated(conv_problem(), 8))
    for r, s, k in ((4, 1, 2), (5, 2, 3)):
        error = curve.error(Structure("rotated", s, k, r))
        for bigger in ((r + 1, s, k), (r, s + 1, k), (r, s, k + 1)):
            structure = Structure("rotated", bigger[1], bigger[2], bigger[0])
            assert curve.error(structure) <= error + 1e-12


def test_no_row_is_left_out_where_all_cost_little(monkeypatch):
    assert rotated(conv_problem(), 3).groups == 8
    monkeypatch.setattr("slr_gpu.basis.CHEAP", 20)
    assert rotated(conv_problem(), 3).groups == 5
    assert rotated(conv_problem(), 7).groups == 7
    monkeypatch.setattr("slr_gpu.basis.CHEAP", 3)  # less than the taps of a channel
    assert rotated(conv_problem(), 0).groups == 1


def test_truncated_problem_is_the_problem_in_fewer_rows():
    problem = rotated(conv_problem(), 8)
    view, explicit = problem.truncated(5), conv_problem().in_basis(problem.basis[:5])
    for name in ("G", "W", "x_mean", "start_rhs", "basis"):
        np.testing.assert_allclose(getattr(view, name), getattr(explicit, name), atol=1e-9)
    np.testing.assert_allclose(view.samples.X, explicit.samples.X, atol=1e-9)
    np.testing.assert_allclose(view.metric.L @ view.metric.L.T, explicit.G, atol=1e-8)


def test_basis_is_orthonormal_and_finds_the_latent_channels():
    problem = rotated(conv_problem(latent=3, seed=1), 8)
    np.testing.assert_allclose(problem.basis @ problem.basis.T, np.eye(8), atol=1e-10)
    curve = RotatedCurve(problem)
    three = curve.error(Structure("rotated", 3, 0, 3))
    assert three < 0.05 < curve.error(Structure("rotated", 2, 0, 2))


def test_refined_basis_is_better_and_a_generic_optimiser_finds_no_better_one_nearby():
    from scipy.optimize import minimize

    problem = conv_problem(n=4, c=4, taps=2, latent=4, rows=100)
    wide = rotated(problem, 4)
    structure = Structure("rotated", 1, 1, 2)
    start = RotatedCurve(wide).error(structure)
    found, least = refined(wide, structure, iterations=200, tolerance=0.0)

    def error(flat):
        basis = np.linalg.qr(flat.reshape(2, 4).T)[0].T
        view = problem.in_basis(basis)
        M = Majorize(iterations=0).start(view, structure).M
        dense = np.einsum("nrt,rc->nct", M.reshape(4, 2, 2), basis).reshape(4, -1)
        return linear_objective(problem, dense) / problem.linear_energy

    assert error(found.basis) == pytest.approx(least, rel=1e-6)
    assert least < 0.99 * start
    nearby = minimize(error, found.basis.ravel(), method="BFGS").fun
    assert least <= (1 + 1e-5) * nearby


@pytest.mark.parametrize("by_rows", [False, True])
def test_slope_of_a_basis_is_that_of_finite_differences(by_rows):
    problem = conv_problem(n=5, c=6, taps=3, rows=60, by_rows=by_rows)
    structure, rng = Structure("rotated", 1, 2, 4), np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(6, 4)))[0].T
    direction, length = rng.normal(size=(4, 6)), 1e-5

    def loss(moved):
        # Any rows with the same nested spans give the same loss: orthonormal ones, here.
        view = problem.in_basis(np.linalg.qr(moved.T)[0].T)
        return linear_fit(view, structure)[0] * problem.linear_energy

    slope = _Slope(problem, _Point(problem, basis, structure)).gradient
    ahead, behind = (loss(basis + sign * length * direction) for sign in (1, -1))
    assert 2 * np.sum(slope * direction) == pytest.approx((ahead - behind) / (2 * length), rel=1e-5)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(("rows", "helps"), [(70, False), (400, True)])
def test_a_refined_basis_has_no_larger_held_out_error(rows, helps, by_rows):
    settings = {"held_out": 0.3, "by_rows": by_rows}
    problem = conv_problem(n=6, c=12, taps=3, rows=rows, latent=12, **settings)
    ordered, structure = rotated(problem, 12), Structure("rotated", 2, 2, 6)
    errors = []
    for iterations in (0, 1, 50):
        view, _ = refined(ordered, structure, iterations=iterations, tolerance=0.0)
        errors.append(held_out_error(Candidate(structure, 0.0, view)))
        assert "across" not in view.__dict__
    assert errors[0] >= errors[1] >= errors[2]
    assert (errors[0] > errors[2]) is helps


@pytest.mark.parametrize("form", ["auto", "columns", "channels", "rotated"])
def test_candidates_fit_every_limit(form):
    problem = conv_problem()
    budget = LayerBudget(10, 8, 4, ((1.0, 120.0), (3.0, 130.0)))
    found = candidates(problem, budget, form=form)
    assert found == sorted(found, key=lambda candidate: candidate.error)
    for candidate in found:
        assert budget.fits(candidate.structure)


def test_largest_rank_is_the_largest():
    budget = LayerBudget(10, 8, 4, ((1.0, 150.0), (2.0, 170.0)))
    for form, s, r in (("columns", 3, None), ("channels", 1, None), ("rotated", 2, 5)):
        k = budget.largest_rank(form, s, r)
        assert budget.fits(Structure(form, s, k, r))
        assert not budget.fits(Structure(form, s, k + 1, r))
    assert budget.largest_rank("columns", 30, None) == -1
    assert budget.largest_rank("rotated", 0, largest_basis(budget)) >= 1


@pytest.mark.parametrize("form", ["auto", "columns", "channels", "rotated"])
def test_unreachable_budget_names_the_smallest(form):
    problem, shape = conv_problem(), (10, 8, 4)
    smallest = LayerBudget(*shape, ((1.0, 1.0),)).smallest(form)
    with pytest.raises(BudgetError, match="keep of at least") as caught:
        candidates(problem, LayerBudget(*shape, ((1.0, smallest * 320 - 1),)), form=form)
    named = float(re.search("at least ([0-9.]+)", str(caught.value))[1])
    assert smallest <= named < 1.01 * smallest
    assert candidates(problem, LayerBudget(*shape, ((1.0, smallest * 320),)), form=form)
