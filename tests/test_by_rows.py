"""Problems with more columns than a Gram matrix may have: the same answers from the rows alone."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import slr_gpu
from slr_gpu import LayerIO, problem
from slr_gpu.decomposition import Structure
from slr_gpu.errors import InputError
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem, metric_of
from slr_gpu.support import SupportSearch
from slr_gpu.tradeoff import TradeOff

OPS = NumpyOps()


def layer(seed=0, *, n=12, channels=30, taps=4, rows=90, dtype="f8", activation="relu", noise=0.1):
    """A layer with fewer rows than columns, whose inputs a compressed prefix has distorted."""
    rng = np.random.default_rng(seed)
    m = channels * taps
    mix = rng.normal(size=(m, m)) * 0.9 ** np.arange(m)[:, None]
    clean = rng.normal(size=(rows, m)) @ mix + rng.normal(size=m)
    weight = rng.normal(size=(n, channels, taps) if taps > 1 else (n, m)) / m**0.5
    bias = rng.normal(size=n)
    before = clean @ weight.reshape(n, m).T + bias
    inputs = clean + noise * rng.normal(size=clean.shape)
    arrays = (a.astype(dtype) for a in (weight, bias, inputs))
    return LayerIO(*arrays, activation=activation, linear_targets=before.astype(dtype))


@pytest.fixture
def by_rows(monkeypatch):
    """Switch every problem of more than 85 columns that is made from now on to its rows."""
    return lambda: monkeypatch.setattr(problem, "WIDEST", 85)


def both(by_rows, layer_io, **settings):
    direct = ResponseProblem(layer_io, ops=OPS, **settings)
    direct.metric  # noqa: B018  (formed before the switch)
    by_rows()
    rows = ResponseProblem(layer_io, ops=OPS, **settings)
    assert rows.by_rows and not direct.by_rows
    return direct, rows


@pytest.mark.parametrize("kept", [0, 1, 17, 118, 120])
def test_projection_is_that_of_the_gram_matrix(by_rows, kept):
    problems = both(by_rows, layer(), ridge=1e-3)
    support = np.sort(np.random.default_rng(1).permutation(120)[:kept])
    found = []
    for view in problems:
        metric, count = metric_of(view, support)
        F, M, U = metric.project(metric.target(view), count, 2)
        np.testing.assert_allclose(metric.point(M), F, atol=1e-8)
        np.testing.assert_allclose(metric.weight(F), M, atol=1e-8)
        found.append((M, U, metric.missed(view, F)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kept", [0, 17])
def test_a_step_is_that_of_the_gram_matrix(by_rows, kept):
    rng = np.random.default_rng(2)
    start = rng.normal(size=(12, 120)) / 10
    steps = []
    for view in both(by_rows, layer(), ridge=1e-3):
        metric, _ = metric_of(view, np.arange(kept) * 3)
        F = metric.point(start)
        loss, correlation, mean = metric.sweep(view, F, start, view.bias, view.masked(True))
        step = metric.weight(metric.step(view, F, start, correlation))
        steps.append((step, float(loss), mean))
    for one, other in zip(*steps, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", [1, 4])
def test_scores_of_supports_are_those_of_the_gram_matrix(by_rows, size):
    direct, rows = (SupportSearch(p, size) for p in both(by_rows, layer(), ridge=1e-3))
    for groups in ([], [0], [1, 5, 6, 20], range(120 // size)):
        groups = np.array(list(groups), dtype=int)
        one, other = direct.evaluate(groups, 3), rows.evaluate(groups, 3)
        assert other.error == pytest.approx(one.error, rel=1e-8)
        outside = np.setdiff1d(np.arange(120 // size), groups)
        gains = direct.gains(one)[outside], rows.gains(other)[outside]
        # The floor under the blocks of the Schur complement is a thousandth of the ridge.
        np.testing.assert_allclose(gains[1], gains[0], rtol=1e-6)
        if len(groups):
            np.testing.assert_allclose(rows.costs(other), direct.costs(one), rtol=1e-6)
            np.testing.assert_allclose(rows.weight(other), direct.weight(one), atol=1e-9)


def test_curves_are_those_of_the_gram_matrix(by_rows):
    from slr_gpu.basis import rotated
    from slr_gpu.curves import RotatedCurve

    direct, rows = (RotatedCurve(rotated(p, 25)) for p in both(by_rows, layer(), ridge=1e-3))
    for r, s, k in ((25, 0, 3), (25, 7, 4), (25, 25, 0), (5, 2, 1), (1, 0, 1), (9, 9, 0)):
        structure = Structure("rotated", s, k, r)
        assert rows.error(structure) == pytest.approx(direct.error(structure), rel=1e-7)


@pytest.mark.parametrize("form", ["rotated", "columns", "channels"])
def test_trade_offs_are_those_of_the_gram_matrix(by_rows, form):
    direct, rows = (
        {p.structure: p.error for p in TradeOff(view, form).points()}
        for view in both(by_rows, layer(), ridge=1e-3)
    )
    assert rows.keys() == direct.keys() and len(rows) > 20
    for structure, error in direct.items():
        assert rows[structure] == pytest.approx(error, rel=1e-5, abs=1e-9)


# Rows of small layers are worked on in float64 whatever they are; the form by rows is up to 1e-3 off
# in float32, the direct one, whose products over rows are formed in float64, 1e-5.
@pytest.mark.parametrize(
    ("dtype", "precise", "rel"), [("f8", 1e9, 1e-5), ("f4", 1e9, 1e-5), ("f4", 0, 1.5e-3)]
)
@pytest.mark.parametrize(
    ("taps", "asked", "solver"),
    [
        (4, {"keep": 0.25}, None),
        (4, {"keep": 0.1}, None),
        (4, {"keep": 0.25, "form": "rotated"}, None),
        (4, {"keep": 0.25, "form": "channels"}, None),
        (4, {"keep": 0.25, "form": "columns"}, None),
        (4, {"basis_rows": 20, "channels": 5, "rank": 3}, None),
        # Narrow enough for a Gram matrix, but with fewer rows still.
        (4, {"basis_rows": 21, "channels": 5, "rank": 3}, None),
        (4, {"basis_rows": 21, "channels": 5, "rank": 3}, slr_gpu.ADMM()),
        (1, {"keep": 0.25}, None),
        (1, {"columns": 10, "rank": 2}, None),
        (1, {"keep": 0.25}, slr_gpu.Zhang()),
        (1, {"keep": 0.25}, slr_gpu.WhitenedSVD()),
        (1, {"keep": 0.25}, slr_gpu.Magnitude(reconstruct=True)),
    ],
)
def test_fits_reach_the_objective_of_the_gram_matrix(
    by_rows, monkeypatch, dtype, precise, rel, taps, asked, solver
):
    monkeypatch.setattr(problem, "PRECISE_RESPONSES", precise)
    layer_io = layer(taps=taps, channels=120 // taps, dtype=dtype)
    direct = slr_gpu.fit(layer_io, solver=solver, **asked)
    by_rows()
    rows = slr_gpu.fit(layer_io, solver=solver, **asked)
    assert rows.structure == direct.structure
    # Of rounding in the slopes, quasi-Newton steps of a basis make a little more.
    rel *= 4 if "basis_rows" in asked else 1
    assert rows.error == pytest.approx(direct.error, rel=rel)
    assert rows.held_out_error == pytest.approx(direct.held_out_error, rel=rel)
    if direct.history:
        assert len(rows.history) == len(direct.history)
        objectives = [fitted.history[-1]["objective"] for fitted in (rows, direct)]
        assert objectives[0] == pytest.approx(objectives[1], rel=rel)


@pytest.mark.parametrize("solver", [slr_gpu.ADMM(), slr_gpu.Grebsmo(), slr_gpu.ChannelPruning()])
def test_solvers_that_need_the_gram_matrix_say_so(by_rows, solver):
    by_rows()
    with pytest.raises(InputError, match="Use Majorize"):
        slr_gpu.fit(layer(taps=1, channels=120), keep=0.3, solver=solver)


def test_rows_beyond_the_most_are_left_out_and_named(by_rows, monkeypatch):
    by_rows()
    monkeypatch.setattr(problem, "MOST_ROWS", 40)
    fitted = slr_gpu.fit(layer(rows=200), keep=0.25)
    assert any("rows: 120 columns" in note for note in fitted.notes)


WIDE = """
import json, resource, sys
import numpy as np, slr_gpu
n, m, taps, rows = map(int, sys.argv[1:])
rng = np.random.default_rng(0)
mix = rng.standard_normal((24, m), dtype="f4") * 0.9 ** np.arange(24, dtype="f4")[:, None]
inputs = rng.standard_normal((rows, 24), dtype="f4") @ mix
inputs += 0.1 * rng.standard_normal(inputs.shape, dtype="f4")
weight = rng.standard_normal((n, m // taps, taps) if taps > 1 else (n, m), dtype="f4") / m**0.5
layer_io = slr_gpu.LayerIO(weight, None, inputs)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fitted = slr_gpu.fit(layer_io, keep=0.2)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
svd = slr_gpu.fit(layer_io, keep=0.2, solver=slr_gpu.WeightSVD())
print(json.dumps([(after - before) / 2**20, fitted.held_out_error, svd.held_out_error]))
"""


@pytest.mark.parametrize("shape", [(32, 12_000, 1), (32, 12_000, 25), (12_000, 32, 1)])
def test_what_does_not_fit_is_never_formed(shape):
    """A Gram matrix or a covariance of the outputs would take 1.2 GB alone."""
    command = [sys.executable, "-c", WIDE, *map(str, shape), "120"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    gibibytes, error, svd = json.loads(done.stdout)
    assert gibibytes < 0.5
    assert error < 0.5 * svd
