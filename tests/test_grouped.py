"""Grouped convolutions: each group is a layer of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_layers import CONVS, random_decomposition
from torch import nn

import slr_gpu
from slr_gpu.adapters import adapter_for, build_from_plan
from slr_gpu.flops import count_flops
from slr_gpu.grouped import split, summarise


def decomposed(layer, forms):
    """The module of random decompositions, and `layer` with the dense weight they stand for."""
    rng = np.random.default_rng(0)
    n, c, kernel = layer.out_channels // layer.groups, layer.weight.shape[1], layer.kernel_size
    parts = []
    for group in range(layer.groups):
        form = forms[group % len(forms)]
        r = c if form == "rotated" else None
        parts.append(random_decomposition(rng, n, c, kernel, form, 1, 1 + group % 2, r))
    module = adapter_for(layer).build(layer, *parts)
    with torch.no_grad():
        dense = np.concatenate([part.to_dense() for part in parts])
        layer.weight.copy_(torch.from_numpy(dense).reshape(layer.weight.shape))
        layer.bias.copy_(torch.from_numpy(np.concatenate([part.bias for part in parts])))
    return module, parts


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "groups,stride,padding,dilation,mode",
    [(2, 1, 1, 1, "zeros"), (3, 2, 2, 2, "zeros"), (2, 1, "same", 1, "reflect")],
)
def test_module_equals_dense_weight(dims, groups, stride, padding, dilation, mode):
    layer = CONVS[dims](
        3 * groups,
        4 * groups,
        (3, 2, 3)[:dims],
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=mode,
        groups=groups,
    )
    module, parts = decomposed(layer, ("columns", "channels", "rotated"))
    x = torch.randn(2, 3 * groups, *(9, 8, 7)[:dims])
    torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module(x[0]), layer(x[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.dense(), layer.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(module.bias, layer.bias)
    rebuilt = build_from_plan(type(module).__name__, module.plan())
    rebuilt.load_state_dict(module.state_dict())
    assert torch.equal(rebuilt(x), module(x))
    assert sum(p.numel() for p in module.parameters()) == sum(d.parameters for d in parts)


def test_rows_of_each_group_times_its_weights_equal_the_convolution():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 9, 3, padding=1, groups=3)
    adapter, x = adapter_for(layer), torch.randn(4, 6, 5, 5)
    y = layer(x)
    where = torch.arange(4).repeat_interleave(25), torch.arange(25).repeat(4)
    with torch.no_grad():
        parts = split(
            3,
            layer.weight,
            layer.bias,
            adapter.input_rows(layer, x, *where).numpy(),
            adapter.output_rows(layer, y, *where).numpy(),
            activation="identity",
        )
    for part in parts:
        np.testing.assert_allclose(part.responses, part.linear_targets, atol=1e-5)


def test_summary_weights_errors_by_energy():
    rng = np.random.default_rng(0)
    parts = [
        slr_gpu.LayerIO(
            rng.normal(size=(3, 4)),
            None,
            rng.normal(size=(50, 4)),
            targets=scale * np.ones((50, 3)),
        )
        for scale in (1.0, 2.0)
    ]
    decompositions = [slr_gpu.fit(part, keep=0.9) for part in parts]
    errors = [d.held_out_error for d in decompositions]
    summary = summarise(decompositions, [1.0, 4.0])
    assert summary["error"] == pytest.approx((errors[0] + 4 * errors[1]) / 5)
    assert summary["structure"].count("x") >= 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=2, bias=False)
        self.after = nn.BatchNorm2d(24)
        self.mixed = nn.Conv2d(24, 12, 1, groups=3)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.after(self.grouped(x)))
        return self.head(torch.relu(self.mixed(x)).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Net().eval()
    model.after.running_mean.normal_()
    return model


DATA = torch.randn(60, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("keep", [{"params": 0.7}, {"flops": 0.6}])
@pytest.mark.parametrize("allocation", ["uniform", "pca_energy"])
def test_compress(model, keep, allocation, tmp_path):
    result = slr_gpu.compress(model, DATA, keep, allocation=allocation, progress=False)
    rows = {row.name: row for row in result.report.layers}
    assert rows["grouped"].compressed and rows["mixed"].compressed
    assert rows["grouped"].activation == "relu" and "x" in rows["grouped"].structure
    for resource, fraction in keep.items():
        assert result.report.achieved[resource] <= fraction
    flops, by_module = count_flops(result.model, (DATA[:1],))
    assert result.report.flops_kept == flops
    assert rows["grouped"].flops_kept == by_module["grouped"]
    parameters = sum(p.numel() for p in result.model.grouped.parameters())
    assert rows["grouped"].params_kept == parameters
    result.save(tmp_path)
    again = slr_gpu.load(tmp_path, Net)
    assert torch.equal(again(DATA), result.model(DATA))
    # Whatever is kept of a group stays in it: other groups' inputs do not matter to its outputs.
    x = torch.randn(1, 12, 8, 8)
    changed = x.clone()
    changed[:, 6:] += 1
    before, after = result.model.grouped(x), result.model.grouped(changed)
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before, after)


def test_keeping_everything_changes_nothing(model):
    result = slr_gpu.compress(model, DATA, {"params": 1.0}, progress=False)
    torch.testing.assert_close(result.model(DATA), model(DATA), rtol=1e-3, atol=1e-3)


def test_export(model, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    result = slr_gpu.compress(model, DATA, {"flops": 0.6}, progress=False)
    assert result.export(tmp_path / "grouped.onnx", runtime=None).error < 1e-4
