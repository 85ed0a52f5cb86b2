"""The spatial form: kh x 1 filters, then 1 x kw kernels, against torch, loops and counters."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import slr_gpu
from slr_gpu import LayerBudget, LayerIO, Majorize, Structure, Zhang
from slr_gpu.adapters import adapter_for, build_from_plan
from slr_gpu.curves import candidates
from slr_gpu.decomposition import Decomposition
from slr_gpu.flops import count_flops
from slr_gpu.layer_budget import Limit
from slr_gpu.ops import NumpyOps
from slr_gpu.problem import ResponseProblem

CONVS = {2: nn.Conv2d, 3: nn.Conv3d}


def random_decomposition(rng, n, c, kernel, s, k, r):
    rest = int(np.prod(kernel[1:]))

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return Decomposition(
        "spatial",
        np.arange(s * rest),
        normal(n, s * rest),
        normal(n, k),
        normal(k, (r - s) * rest),
        normal(n),
        c,
        tuple(kernel),
        basis=normal(r, c * kernel[0]),
    )


def test_to_dense_is_the_composition_of_the_filters():
    rng = np.random.default_rng(0)
    n, c, (kh, kw), s, k, r = 3, 2, (3, 2), 1, 2, 4
    d = random_decomposition(rng, n, c, (kh, kw), s, k, r)
    P, A = d.basis.reshape(r, c, kh), d.A.reshape(n, s, kw)
    V = d.V.reshape(k, r - s, kw)
    expected = np.zeros((n, c, kh, kw))
    for o, i, y, x in itertools.product(range(n), range(c), range(kh), range(kw)):
        for j in range(r):
            tail = A[o, j, x] if j < s else sum(d.U[o, q] * V[q, j - s, x] for q in range(k))
            expected[o, i, y, x] += tail * P[j, i, y]
    np.testing.assert_allclose(d.to_dense(), expected.reshape(n, -1), rtol=1e-5, atol=1e-5)
    assert d.structure == Structure("spatial", s, k, r)
    assert d.parameters == r * c * kh + s * n * kw + k * (n + (r - s) * kw) + n


GEOMETRY = {
    "plain": {},
    "same": {"padding": "same", "dilation": 2},
    "uneven": {"stride": (2, 1, 3), "padding": (1, 2, 0), "dilation": (1, 2, 1)},
    "reflect": {"stride": (1, 2, 1), "padding": (2, 1, 1), "padding_mode": "reflect"},
    "circular": {"padding": (1, 2, 1), "dilation": (2, 1, 1), "padding_mode": "circular"},
    "replicate": {"stride": 2, "padding": 1, "padding_mode": "replicate"},
}


@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("s,k", [(2, 2), (0, 3), (4, 0)])
@pytest.mark.parametrize("dims", [2, 3])
def test_module_equals_dense_convolution(dims, s, k, geometry):
    rng = np.random.default_rng(dims)
    n, c, kernel = 6, 5, (3, 2, 3)[:dims]
    settings = {
        name: value[:dims] if isinstance(value, tuple) else value
        for name, value in GEOMETRY[geometry].items()
    }
    layer = CONVS[dims](c, n, kernel, **settings)
    d = random_decomposition(rng, n, c, kernel, s, k, r=4)
    module = adapter_for(layer).build(layer, d)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(d.to_dense()).reshape(layer.weight.shape))
        layer.bias.copy_(torch.from_numpy(d.bias))
    x = torch.randn(2, c, *(9, 8, 7)[:dims], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-4)
    rebuilt = build_from_plan(type(module).__name__, module.plan())
    rebuilt.load_state_dict(module.state_dict())
    assert torch.equal(rebuilt(x), module(x))
    assert sum(p.numel() for p in module.parameters()) == d.parameters


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("stride,padding", [((1, 1, 1), 1), ((2, 1, 2), 0), ((1, 3, 1), 2)])
def test_costs_are_those_that_torch_counts(dims, stride, padding):
    rng = np.random.default_rng(1)
    n, c, kernel, s, k, r = 6, 5, (3, 2, 3)[:dims], 1, 3, 4
    layer = CONVS[dims](c, n, kernel, stride=stride[:dims], padding=padding)
    x = torch.randn(1, c, *(12, 11, 10)[:dims])
    adapter = adapter_for(layer)
    module = adapter.build(layer, random_decomposition(rng, n, c, kernel, s, k, r))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = module(x)
    positions = adapter.positions(layer, y)
    weight = adapter.spatial_positions(layer, x, y) / positions
    budget = LayerBudget(n, c, int(np.prod(kernel)), ((1.0, 1e9),), kernel_size=kernel)
    structure = Structure("spatial", s, k, r)
    multiplies = budget.cost(structure, Limit(9.0, 1e9, full_kernel=True, spatial_weight=weight))
    assert multiplies * positions == pytest.approx(counter.get_total_flops() / 2)
    weights = budget.cost(structure, Limit(1.0, 1e9))
    assert weights == sum(p.numel() for p in module.parameters()) - n


def rows_of(rng, rows, c, kernel):
    """Rows with correlated channels and neighbouring taps."""
    mix = rng.normal(size=(c, c)) * (0.8 ** np.arange(c))[:, None]
    field = np.einsum("pltu,lc->pctu", rng.normal(size=(rows, c, *kernel)), mix)
    return np.maximum(field + np.roll(field, 1, axis=2), 0).reshape(rows, -1)


def planted(seed=2, n=12, c=6, kernel=(3, 3), r=5, k=4, rows=900, extra=0.0):
    """A layer whose weight is a spatial decomposition, up to a full-rank part."""
    rng = np.random.default_rng(seed)
    W = random_decomposition(rng, n, c, kernel, 0, k, r).to_dense() / 10
    W = W + extra * rng.normal(size=W.shape)
    return LayerIO(W, rng.normal(size=n), rows_of(rng, rows, c, kernel), kernel_size=kernel)


@pytest.mark.parametrize("solver", [Majorize(), Zhang()])
def test_planted_filters_are_found(solver):
    io = planted()
    sizes = {"basis_rows": 5, "rank": 4, "ridge": 1e-7}
    d = slr_gpu.fit(io, form="spatial", solver=solver, **sizes)
    assert d.structure == Structure("spatial", 0, 4, 5) and d.basis.shape == (5, 18)
    assert d.held_out_error < 1e-6
    np.testing.assert_allclose(d.basis @ d.basis.T, np.eye(5), atol=1e-6)
    # Low rank alone, at the same rank, is also exact; one filter fewer is not.
    fewer = slr_gpu.fit(io, form="spatial", solver=solver, **{**sizes, "basis_rows": 4})
    assert fewer.held_out_error > 1e-3


@pytest.mark.parametrize("solver", [Majorize(), Zhang()])
@pytest.mark.parametrize("keep", [0.15, 0.35])
def test_fit_within_the_budget(solver, keep, tmp_path):
    io = planted(3, extra=0.05)
    d = slr_gpu.fit(io, keep=keep, form="spatial", solver=solver)
    assert d.form == "spatial" and d.parameters - 12 <= keep * io.weight.size
    if solver.name == "zhang":
        assert d.structure.s == 0
    _, held = io.split(0.1)
    response = np.maximum(io.inputs[held] @ d.to_dense().T + d.bias, 0)
    error = np.sum((response - io.targets[held]) ** 2) / np.sum(io.targets[held] ** 2)
    assert error == pytest.approx(d.held_out_error, rel=1e-6) and error < 0.3
    d.save(tmp_path / "layer.safetensors")
    loaded = Decomposition.load(tmp_path / "layer.safetensors")
    assert loaded.structure == d.structure
    assert np.array_equal(loaded.to_dense(), d.to_dense())


def test_curve_error_is_that_of_the_dense_weight():
    """The closed form's reported error, from the rows and in the layer's own coordinates."""
    io = planted(4, extra=0.1)
    problem = ResponseProblem(io, ops=NumpyOps(), held_out=0.0, ridge=1e-3)
    budget = LayerBudget(12, 6, 9, ((1.0, 0.3 * io.weight.size),))
    found = candidates(problem, budget, form="spatial")
    assert [c.error for c in found] == sorted(c.error for c in found)
    best = found[0]
    M = Majorize(iterations=0).solve(best.problem, best.structure).to_dense()
    X = io.inputs - io.inputs.mean(axis=0)
    Z = X @ io.weight.T
    ridge = problem.rho * np.sum(io.weight**2)
    error = np.sum((Z - X @ M.T) ** 2) + problem.rho * np.sum((io.weight - M) ** 2)
    assert best.error == pytest.approx(error / (np.sum(Z**2) + ridge), rel=1e-5)


def test_search_spends_what_the_vertical_filters_cost():
    io = planted(4, extra=0.1)
    problem = ResponseProblem(io, ops=NumpyOps(), held_out=0.0)
    limit = 0.3 * io.weight.size
    for basis_weight, spatial_weight in ((40.0, 1.5), (0.1, 3.0)):
        limits = (Limit(basis_weight, limit, True, spatial_weight),)
        budget = LayerBudget(12, 6, 9, limits, kernel_size=(3, 3))
        best = candidates(problem, budget, form="spatial")[0].structure
        s, k, r = best.s, best.k, best.r
        spent = spatial_weight * r * 18 + s * 3 * 12 + k * (12 + (r - s) * 3)
        assert 0.8 * limit < spent <= limit


def test_regrouped_channel_gram():
    """Mean over kw of the blocks of a channel and a kernel row, whatever was computed before."""
    io = planted(6)
    problem = ResponseProblem(io, ops=NumpyOps(), held_out=0.0, ridge=1e-2)
    assert problem.channel_gram.shape == (6, 6)
    X = (io.inputs - io.inputs.mean(axis=0)).reshape(-1, 6, 3, 3)
    expected = np.einsum("pcyx,pdzx->cydz", X, X).reshape(18, 18) / 3 + problem.rho * np.eye(18)
    for _ in range(2):
        np.testing.assert_allclose(problem.regrouped().channel_gram, expected, rtol=1e-9, atol=1e-9)
        problem.scatter  # noqa: B018  (the second way to compute it)


def test_auto_does_not_search_it():
    io = planted(extra=0.01)
    assert slr_gpu.fit(io, keep=0.3).form != "spatial"


def test_smallest_budget():
    io = planted(5, extra=0.05)
    n, m = io.weight.shape
    smallest = LayerBudget(n, 6, 9, ((1.0, 1.0),), kernel_size=(3, 3)).smallest("spatial")
    assert smallest == pytest.approx((6 * 3 + 3 + n) / (n * m))
    for solver in (Majorize(), Zhang()):
        d = slr_gpu.fit(io, keep=smallest * (1 + 1e-9), form="spatial", solver=solver)
        assert d.structure == Structure("spatial", 0, 1, 1)
        with pytest.raises(slr_gpu.BudgetError, match="at least [0-9.]+") as caught:
            slr_gpu.fit(io, keep=0.98 * smallest, form="spatial", solver=solver)
        named = float(re.search("at least ([0-9.]+)", str(caught.value))[1])
        assert smallest <= named < 1.01 * smallest


@pytest.mark.parametrize("kernel", [(), (3,), (1, 3), (3, 1), (2, 1, 1)])
def test_kernels_that_cannot_be_split_are_refused(kernel):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(50, 4 * int(np.prod(kernel, dtype=int))))
    io = LayerIO(rng.normal(size=(5, X.shape[1])), None, X, kernel_size=kernel)
    for solver in (None, Zhang()):
        with pytest.raises(slr_gpu.BudgetError, match="along its first axis"):
            slr_gpu.fit(io, keep=0.5, form="spatial", solver=solver)


def test_a_solver_without_it_says_so():
    with pytest.raises(slr_gpu.BudgetError, match="one of auto, columns, channels, rotated"):
        slr_gpu.fit(planted(), keep=0.3, form="spatial", solver=slr_gpu.ADMM())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, stride=(1, 2)),
        nn.ReLU(),
        nn.Conv2d(12, 12, 1),
        nn.ReLU(),
        nn.Conv2d(12, 12, (3, 5), padding=(0, 2), dilation=(2, 1)),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, 4),
    ).eval()


@pytest.mark.parametrize("solver", [None, Zhang()])
def test_compress_end_to_end(solver, tmp_path):
    model = network()
    coarse = torch.randn(80, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    data = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    keep = {"flops": 0.5, "params": 0.7}
    result = slr_gpu.compress(
        model, data, keep, form="spatial", solver=solver, samples=1500, progress=False
    )
    rows = {row.name: row for row in result.report.layers if row.compressed}
    assert rows["2"].structure.startswith("spatial") and rows["6"].structure.startswith("spatial")
    assert rows["4"].structure.startswith("columns")  # a 1x1 kernel has nothing to split
    assert result.report.flops_kept == count_flops(result.model, (data[:1],))[0]
    used = {name: result.report.achieved[name] / fraction for name, fraction in keep.items()}
    # One budget is spent; the other cannot be as well.
    assert 0.8 < max(used.values()) <= 1, used
    assert all(0 <= row.error < 0.6 for row in rows.values())
    result.save(tmp_path / "out")
    loaded = slr_gpu.load(tmp_path / "out", network)
    assert torch.equal(loaded(data), result.model(data))
