"""The form of single entries: counts, disk, modules against the dense weight, whole models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slr_gpu
from slr_gpu.adapters import adapter_for, build_from_plan
from slr_gpu.decomposition import Decomposition, Structure

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def random_entries(rng, n, c, kernel, s, k):
    """A random decomposition with exactly s entries, and the dense S it was made from."""
    m = c * int(np.prod(kernel, dtype=int))
    S = np.zeros(n * m, dtype=np.float32)
    S[rng.permutation(n * m)[:s]] = rng.uniform(1, 2, size=s)
    S = S.reshape(n, m)
    columns = np.flatnonzero(S.any(axis=0))
    U, V, bias = (rng.normal(size=shape).astype("f4") for shape in ((n, k), (k, m), (n,)))
    return Decomposition("entries", columns, S[:, columns], U, V, bias, c, tuple(kernel)), S


def test_counts_and_dense_weight():
    d, S = random_entries(np.random.default_rng(0), 5, 4, (3,), 17, 2)
    assert d.structure == Structure("entries", 17, 2)
    assert d.parameters == 17 + 2 * (5 + 12) + 5
    assert d.parameters == d.structure.cost(5, 4, 3) + 5
    np.testing.assert_array_equal(d.complement, np.arange(12))
    np.testing.assert_allclose(d.to_dense(), S + d.U @ d.V, atol=1e-6)
    assert str(d.structure) == "entries s=17 k=2"


def test_stock_runtimes_skip_no_zeros():
    for taps in (1, 9):
        dense = 8 * 4 * taps
        assert Structure("entries", 3, 0).cost(8, 4, taps, full_kernel=True) == dense
        low_rank = 2 * (8 + 4 * taps)
        assert Structure("entries", 0, 2).cost(8, 4, taps, full_kernel=True) == low_rank
        assert Structure("entries", 3, 2).cost(8, 4, taps, full_kernel=True) == dense + low_rank


def test_save_and_load_are_bit_for_bit(tmp_path):
    d, _ = random_entries(np.random.default_rng(1), 6, 5, (3, 3), 40, 1)
    d.save(tmp_path / "layer.safetensors")
    loaded = Decomposition.load(tmp_path / "layer.safetensors")
    assert loaded.structure == d.structure and loaded.parameters == d.parameters
    assert loaded.to_dense().tobytes() == d.to_dense().tobytes()


def test_v_must_read_all_columns():
    d, _ = random_entries(np.random.default_rng(2), 5, 6, (), 4, 2)
    with pytest.raises(slr_gpu.InputError, match=r"V of shape \(2, \d\); expected \(2, 6\)"):
        d.replace(V=d.V[:, : 6 - len(d.columns)])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("s,k", [(30, 2), (11, 0), (0, 3)])
@pytest.mark.parametrize(
    "stride,padding,dilation,mode",
    [
        (1, 0, 1, "zeros"),
        (2, 1, 1, "zeros"),
        (1, 2, 2, "zeros"),
        (1, "same", 1, "zeros"),
        (2, 1, 1, "reflect"),
        (1, "same", 2, "circular"),
    ],
)
def test_conv_module_equals_dense_weight(dims, s, k, stride, padding, dilation, mode):
    rng, n, c, kernel = np.random.default_rng(dims), 6, 5, (3, 2, 3)[:dims]
    layer = CONVS[dims](
        c, n, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode
    )
    d, _ = random_entries(rng, n, c, kernel, s, k)
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


@pytest.mark.parametrize("s,k", [(9, 2), (12, 0), (0, 3)])
def test_linear_module_equals_dense_weight(s, k):
    d, _ = random_entries(np.random.default_rng(3), 6, 8, (), s, k)
    layer = nn.Linear(8, 6)
    module = adapter_for(layer).build(layer, d)
    x = torch.randn(2, 3, 8)
    expected = F.linear(x, torch.from_numpy(d.to_dense()), torch.from_numpy(d.bias))
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    rebuilt = build_from_plan(type(module).__name__, module.plan())
    rebuilt.load_state_dict(module.state_dict())
    assert torch.equal(rebuilt(x), module(x))
    assert sum(p.numel() for p in module.parameters()) == d.parameters


def test_training_keeps_the_zeros():
    d, S = random_entries(np.random.default_rng(4), 6, 5, (3, 3), 20, 0)
    layer = nn.Conv2d(5, 6, 3)
    module = adapter_for(layer).build(layer, d)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(2, 5, 6, 6)).square().mean().backward()
    optimizer.step()
    # Responses to unit inputs read the trained kernel off, tap by tap.
    taps = torch.eye(45).reshape(45, 5, 3, 3)
    with torch.no_grad():
        trained = (module(taps).reshape(45, 6) - module.A.bias).T.numpy()
    assert not np.allclose(trained, S, atol=1e-3)
    np.testing.assert_allclose(trained[S == 0], 0, atol=1e-6)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


def test_whole_model(tmp_path):
    model = network().eval()
    data = torch.randn(150, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    result = slr_gpu.compress(
        model, data, keep={"params": 0.3}, solver=slr_gpu.Grebsmo(), samples=600, progress=False
    )
    layers = [layer for layer in result.report.layers if layer.compressed]
    assert [layer.name for layer in layers] == ["2", "5"]
    stored = 0
    for layer in layers:
        module = result.model.get_submodule(layer.name)
        assert layer.structure.startswith("entries") and module.entries > 0
        assert any("not indices" in note for note in layer.notes)
        # What the report counts are the numbers of the parts that are not zero.
        count = sum(int((p != 0).sum()) for p in module.parameters())
        assert layer.params_kept == count
        stored += count
    ends = sum(p.numel() for i in (0, 7) for p in model[i].parameters())
    assert result.report.params_kept == stored + ends
    assert result.report.achieved["params"] <= 0.3
    # No multiply-adds are saved, and the report does not claim any.
    assert result.report.achieved["flops"] >= 1
    result.save(tmp_path / "out")
    loaded = slr_gpu.load(tmp_path / "out", network)
    assert torch.equal(loaded(data), result.model.eval()(data))


def test_a_budget_of_multiply_adds_leaves_low_rank_alone():
    rng = np.random.default_rng(5)
    io = slr_gpu.LayerIO(rng.normal(size=(12, 20)), rng.normal(size=12), rng.normal(size=(300, 20)))
    budget = slr_gpu.LayerBudget(12, 20, 1, ((1.0, 120.0, True),))
    d = slr_gpu.fit(io, budget=budget, solver=slr_gpu.Grebsmo())
    assert d.structure == Structure("entries", 0, 3)
    assert d.structure.cost(12, 20, 1, full_kernel=True) <= 120


def test_other_solvers_refuse_the_form():
    rng = np.random.default_rng(6)
    io = slr_gpu.LayerIO(rng.normal(size=(6, 8)), None, rng.normal(size=(60, 8)))
    for solver in (None, slr_gpu.ADMM(), slr_gpu.WeightSVD()):
        with pytest.raises(slr_gpu.BudgetError, match="entries"):
            slr_gpu.fit(io, keep=0.5, form="entries", solver=solver)
