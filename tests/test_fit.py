"""`fit`: each way to ask, each form, what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

import slr_gpu
from slr_gpu import LayerBudget, LayerIO


def image_like_rows(rng, rows, channels, taps=9, latent=None):
    """im2col-like rows: correlated channels and taps."""
    latent = latent or channels
    mix = rng.normal(size=(latent, channels)) * (0.7 ** np.arange(latent))[:, None]
    smooth = np.exp(-0.3 * np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))))
    field = rng.normal(size=(rows, latent, taps)) @ np.linalg.cholesky(smooth).T
    return np.maximum(np.einsum("plt,lc->pct", field, mix), 0).reshape(rows, -1)


@pytest.fixture(scope="module")
def conv_io():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(24, 16, 3, 3)) / 12
    inputs = image_like_rows(rng, 1500, 16)
    return LayerIO(weight.astype("f4"), rng.normal(size=24).astype("f4"), inputs.astype("f4"))


@pytest.mark.parametrize("form", ["auto", "columns", "channels", "rotated"])
@pytest.mark.parametrize("keep", [0.1, 0.3])
def test_keep_is_kept_and_better_than_svd_of_the_weight(conv_io, form, keep):
    d = slr_gpu.fit(conv_io, keep=keep, form=form)
    n, m = conv_io.weight.shape
    assert d.parameters - n <= keep * n * m
    if form != "auto":
        assert d.form == form
    k = int(keep * n * m / (n + m))
    U, sigma, V = np.linalg.svd(conv_io.weight, full_matrices=False)
    svd = (U[:, :k] * sigma[:k]) @ V[:k]
    _, held = conv_io.split(0.1)
    X, Y = conv_io.inputs[held], conv_io.targets[held]

    def error(weight, bias):
        return float(((np.maximum(X @ weight.T + bias, 0) - Y) ** 2).sum() / (Y**2).sum())

    assert error(d.to_dense(), d.bias) == pytest.approx(d.held_out_error, rel=1e-3)
    assert d.held_out_error < error(svd, conv_io.bias)


def test_auto_is_the_best_form(conv_io):
    errors = {
        form: slr_gpu.fit(conv_io, keep=0.2, form=form).held_out_error
        for form in ("auto", "columns", "channels", "rotated")
    }
    assert errors["auto"] <= min(errors.values()) * 1.05


def test_sizes_are_exact(conv_io):
    d = slr_gpu.fit(conv_io, columns=20, rank=3)
    assert (d.form, len(d.columns), d.rank) == ("columns", 20, 3)
    d = slr_gpu.fit(conv_io, channels=4, rank=2)
    assert (d.form, len(d.columns), d.rank) == ("channels", 36, 2)
    assert np.array_equal(
        d.columns.reshape(-1, 9) // 9 * 0 + d.columns.reshape(-1, 9)[:, :1] + np.arange(9),
        d.columns.reshape(-1, 9),
    )
    d = slr_gpu.fit(conv_io, basis_rows=6, channels=2, rank=5)
    assert (d.basis.shape, len(d.columns), d.rank) == ((6, 16), 18, 5)
    np.testing.assert_allclose(d.basis @ d.basis.T, np.eye(6), atol=1e-5)
    with_zero = slr_gpu.fit(conv_io, columns=30)
    assert with_zero.rank == 0


@pytest.mark.parametrize("solver", [slr_gpu.Majorize(), slr_gpu.ADMM()])
def test_solvers_take_the_same_budget(conv_io, solver):
    d = slr_gpu.fit(conv_io, keep=0.3, form="columns", solver=solver)
    assert d.parameters - 24 <= 0.3 * conv_io.weight.size
    assert d.held_out_error < 0.2


def test_penalties(conv_io):
    loose = slr_gpu.fit(conv_io, lambda1=0.02, lambda2=0.02, relative=True)
    tight = slr_gpu.fit(conv_io, lambda1=0.3, lambda2=0.3, relative=True)
    assert tight.parameters < loose.parameters <= conv_io.weight.size + 24 * 200
    assert loose.held_out_error < tight.held_out_error


def test_linear_objective_is_worse_after_the_activation(conv_io):
    linear = slr_gpu.fit(conv_io, keep=0.1, objective="linear", held_out=0.0)
    activation = slr_gpu.fit(conv_io, keep=0.1, held_out=0.0)
    X, Y = conv_io.inputs, conv_io.targets

    def error(d):
        return float(((np.maximum(X @ d.to_dense().T + d.bias, 0) - Y) ** 2).sum())

    assert error(activation) < error(linear)


def test_linear_layer_and_smooth_activation():
    rng = np.random.default_rng(1)
    W = rng.normal(size=(20, 30)) * 0.3
    X = rng.normal(size=(800, 30)) @ np.diag(0.85 ** np.arange(30))
    io = LayerIO(W, rng.normal(size=20), X, activation="gelu")
    d = slr_gpu.fit(io, keep=0.4)
    assert d.parameters - 20 <= 0.4 * 600 and d.held_out_error < 0.05


@pytest.mark.parametrize("solver", slr_gpu.solvers.SOLVERS.values(), ids=slr_gpu.solvers.SOLVERS)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.1)", "sigmoid"])
@pytest.mark.parametrize("value", [0.0, 50.0])
def test_weights_on_inputs_that_never_vary_stay_what_they_were(solver, activation, value):
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(17, 20, 3)).astype("f4"), rng.normal(size=17).astype("f4")
    inputs = np.full((400, 60), value, "f4")
    layer_io = LayerIO(weight, bias, inputs, activation=activation)
    ways = [{"keep": 0.5}, {"rank": 0}, {"rank": 14}]
    for asked in ways if solver().takes_structures else ways[:1]:
        d = slr_gpu.fit(layer_io, solver=solver(), **asked)
        assert np.abs(d.to_dense()).max() < 2 * np.abs(weight).max()


def test_budget_of_another_cost(conv_io):
    limit = 0.25 * conv_io.weight.size
    budget = LayerBudget(24, 16, 9, ((1.0, limit), (4.0, limit)))
    d = slr_gpu.fit(conv_io, budget=budget)
    for weight in (1.0, 4.0):
        assert d.structure.cost(24, 16, 9, weight) <= limit


def test_the_least_keep_that_is_named_is_reached():
    rng = np.random.default_rng(1)
    for n, c, taps in ((7, 3, 9), (31, 17, 1), (20, 6, 4)):
        inputs = rng.normal(size=(200, c * taps))
        layer_io = LayerIO(rng.normal(size=(n, c, taps)), None, inputs)
        solvers = [solver() for solver in slr_gpu.solvers.SOLVERS.values()]
        for solver in (*solvers, slr_gpu.Grebsmo(indices=False)):
            with pytest.raises(slr_gpu.BudgetError, match="at least") as error:
                slr_gpu.fit(layer_io, keep=1e-4, solver=solver)
            named = float(re.search(r"at least ([0-9.]+\d)", str(error.value))[1])
            d = slr_gpu.fit(layer_io, keep=named, solver=solver)
            assert 0 < d.parameters - n <= named * n * c * taps
            with pytest.raises(slr_gpu.BudgetError):
                slr_gpu.fit(layer_io, keep=0.99 * named, solver=solver)


def test_penalties_group_columns_or_channels(conv_io):
    strong = {"lambda1": 0.2, "lambda2": 0.9}
    by_channel = slr_gpu.ADMM(group="channel")
    for form, solver, expected in (
        ("auto", None, "columns"),
        ("channels", None, "channels"),
        ("auto", by_channel, "channels"),
        ("columns", by_channel, "columns"),
    ):
        assert slr_gpu.fit(conv_io, form=form, solver=solver, **strong).form == expected


def test_sizes_of_numpys_integers_are_saved(conv_io, tmp_path):
    d = slr_gpu.fit(conv_io, columns=np.int64(20), rank=np.int32(3))
    d.save(tmp_path / "layer.safetensors")
    assert slr_gpu.Decomposition.load(tmp_path / "layer.safetensors").structure == d.structure


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12])
def test_scale_of_the_data_does_not_matter(conv_io, scale):
    """Energies of 1e-30 and less were taken for none, and errors of 100 % for exact."""
    inputs = conv_io.inputs.astype("f8")
    for solver in (slr_gpu.Majorize(), slr_gpu.WhitenedSVD()):
        plain, scaled = (
            slr_gpu.fit(
                LayerIO(conv_io.weight, unit * conv_io.bias.astype("f8"), unit * inputs),
                keep=0.2, solver=solver,
            )
            for unit in (1.0, scale)
        )  # fmt: skip
        assert scaled.structure == plain.structure
        assert scaled.held_out_error == pytest.approx(plain.held_out_error, rel=1e-3)


def test_a_layer_that_is_exactly_of_low_rank_is_fitted():
    """Its errors are rounding, of either sign: what is below zero is near itself too."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        n, c, latent, rank = rng.integers((10, 3, 1, 1), (25, 12, 8, 3))
        inputs = rng.normal(size=(60, 4, latent)) @ rng.normal(size=(latent, c))
        weight = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, c * 4))
        layer_io = LayerIO(weight.reshape(n, c, 4), None, inputs.swapaxes(1, 2).reshape(60, -1))
        d = slr_gpu.fit(layer_io, keep=0.9, form="rotated", ridge=1e-10)
        assert d.error < 1e-9


def test_squares_that_overflow_are_named():
    rng = np.random.default_rng(2)
    layer_io = LayerIO(rng.normal(size=(4, 6)), None, 1e160 * rng.normal(size=(100, 6)))
    with np.errstate(over="ignore"), pytest.raises(slr_gpu.InputError, match="overflow float64"):
        slr_gpu.fit(layer_io, rank=2)


def test_same_call_same_bits(conv_io):
    a, b = slr_gpu.fit(conv_io, keep=0.2), slr_gpu.fit(conv_io, keep=0.2)
    assert np.array_equal(a.to_dense(), b.to_dense())


@pytest.mark.parametrize(
    "settings,match",
    [
        ({}, "no budget"),
        ({"keep": 0}, "in \\(0, 1\\]"),
        ({"keep": 1.2}, "in \\(0, 1\\]"),
        ({"keep": 1e-4}, "keep of at least"),
        ({"keep": 0.3, "rank": 2}, "exactly one"),
        ({"columns": 2, "channels": 2}, "one of them"),
        ({"columns": 10_000}, "integer in"),
        ({"rank": -1}, "integer in"),
        ({"lambda1": 0.1}, "number >= 0"),
        ({"keep": 0.3, "form": "diagonal"}, "one of auto"),
        ({"keep": 0.3, "objective": "cubic"}, "activation"),
        ({"keep": 0.3, "ridge": 0.0}, "positive"),
        ({"keep": 0.3, "held_out": 0.9}, "fraction in"),
        ({"keep": 0.3, "device": "tpu"}, "cuda"),
        ({"basis_rows": 4, "columns": 3}, "basis"),
        ({"keep": 0.3, "budget": LayerBudget(24, 16, 9, ((1.0, 900.0),))}, "keep and budget"),
        ({"budget": LayerBudget(24, 9, 16, ((1.0, 900.0),))}, "24 outputs, 16 channels and 9 taps"),
        ({"keep": 0.3, "solver": slr_gpu.Majorize}, "an instance of a solver"),
        ({"lambda1": 0.1, "lambda2": 0.1, "form": "rotated"}, "'columns' or 'channels'"),
        ({"lambda1": np.inf, "lambda2": 0.1, "relative": False}, "finite"),
    ],
)
def test_bad_requests(conv_io, settings, match):
    with pytest.raises(slr_gpu.InputError, match=match):
        slr_gpu.fit(conv_io, **settings)
