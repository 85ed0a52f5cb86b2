"""Decomposed modules against torch's own layers and against the dense weight they stand for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slr_gpu.adapters import adapter_for, build_from_plan
from slr_gpu.decomposition import Decomposition

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUNCTIONAL = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def random_decomposition(rng, n, c, kernel, form, s, k, r=None):
    taps = int(np.prod(kernel))
    width = (c if r is None else r) * taps
    if form == "columns":
        columns = np.sort(rng.choice(width, s, replace=False))
    elif form == "channels":
        kept = np.sort(rng.choice(c, s, replace=False))
        columns = (kept[:, None] * taps + np.arange(taps)).reshape(-1)
    else:
        columns = np.arange(s * taps)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return Decomposition(
        form,
        columns.astype(np.int64),
        normal(n, len(columns)),
        normal(n, k),
        normal(k, width - len(columns)),
        normal(n),
        c,
        tuple(kernel),
        basis=None if r is None else normal(r, c),
    )


CASES = [
    (dims, form, s, k, stride, padding, dilation, mode)
    for dims, (form, s, k), (stride, padding, dilation, mode) in itertools.product(
        (1, 2, 3),
        (
            ("columns", 5, 2),
            ("columns", 0, 3),
            ("columns", 7, 0),
            ("channels", 2, 2),
            ("channels", 0, 2),
            ("channels", 3, 0),
            ("rotated", 2, 2),
            ("rotated", 0, 3),
            ("rotated", 4, 0),
        ),
        ((1, 1, 1, "zeros"), (2, 0, 1, "zeros"), (1, 2, 2, "zeros"), (2, 1, 1, "reflect")),
    )
]


@pytest.mark.parametrize("dims,form,s,k,stride,padding,dilation,mode", CASES)
def test_conv_module_equals_dense_weight(dims, form, s, k, stride, padding, dilation, mode):
    rng = np.random.default_rng(dims)
    n, c, kernel = 6, 5, (3, 2, 3)[:dims]
    layer = CONVS[dims](
        c, n, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode
    )
    d = random_decomposition(rng, n, c, kernel, form, s, k, r=4 if form == "rotated" else None)
    module = adapter_for(layer).build(layer, d)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(d.to_dense()).reshape(layer.weight.shape))
        layer.bias.copy_(torch.from_numpy(d.bias))
    x = torch.randn(2, c, *(9, 8, 7)[:dims], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.dense(), layer.weight, rtol=1e-4, atol=1e-5)
    assert torch.equal(module.bias, layer.bias)
    rebuilt = build_from_plan(type(module).__name__, module.plan())
    rebuilt.load_state_dict(module.state_dict())
    assert torch.equal(rebuilt(x), module(x))
    assert sum(p.numel() for p in module.parameters()) == d.parameters


@pytest.mark.parametrize("s,k", [(3, 2), (0, 2), (4, 0), (5, 1)])
def test_linear_module_equals_dense_weight(s, k):
    rng = np.random.default_rng(0)
    layer = nn.Linear(8, 6)
    d = random_decomposition(rng, 6, 8, (), "columns", s, k)
    module = adapter_for(layer).build(layer, d)
    x = torch.randn(2, 3, 8)
    expected = F.linear(x, torch.from_numpy(d.to_dense()), torch.from_numpy(d.bias))
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.dense(), torch.from_numpy(d.to_dense()))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "stride,padding,dilation,mode",
    [
        (1, 1, 1, "zeros"),
        (2, 0, 1, "zeros"),
        (1, 2, 2, "zeros"),
        (1, "same", 2, "zeros"),
        (2, 1, 1, "circular"),
        (1, 2, 1, "replicate"),
    ],
)
def test_im2col_rows_times_weights_equal_convolution(dims, stride, padding, dilation, mode):
    torch.manual_seed(0)
    kernel = (3, 2, 3)[:dims]
    layer = CONVS[dims](
        4, 5, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode
    )
    adapter = adapter_for(layer)
    x = torch.randn(3, 4, *(8, 7, 9)[:dims])
    y = layer(x)
    positions = adapter.positions(layer, y)
    sample = torch.arange(3).repeat_interleave(positions)
    position = torch.arange(positions).repeat(3)
    rows = adapter.input_rows(layer, x, sample, position)
    responses = rows @ layer.weight.reshape(5, -1).T + layer.bias
    torch.testing.assert_close(
        responses, adapter.output_rows(layer, y, sample, position), rtol=1e-5, atol=1e-5
    )


def test_linear_rows_equal_linear():
    layer = nn.Linear(7, 5)
    adapter = adapter_for(layer)
    for shape in ((6, 7), (6, 4, 7), (6, 2, 3, 7)):
        x = torch.randn(shape)
        y = layer(x)
        positions = adapter.positions(layer, y)
        sample = torch.arange(6).repeat_interleave(positions)
        position = torch.arange(positions).repeat(6)
        rows = adapter.input_rows(layer, x, sample, position)
        expected = adapter.output_rows(layer, y, sample, position)
        torch.testing.assert_close(F.linear(rows, layer.weight, layer.bias), expected)


def test_depthwise_convolution_says_why_not():
    layer = nn.Conv2d(8, 16, 3, groups=8)
    assert "depthwise convolution (groups=8)" in adapter_for(layer).unsupported(layer)
    assert adapter_for(layer).unsupported(nn.Conv2d(8, 8, 3, groups=4)) is None


def test_subclasses_that_compute_the_same_are_replaced():
    class Same(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3, padding=1)

    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean(), self.bias)

    assert adapter_for(Same(4)) is adapter_for(nn.Conv2d(4, 4, 3))
    assert adapter_for(Standardised(4, 4, 3)) is None
    assert adapter_for(nn.MultiheadAttention(4, 2).out_proj) is None


def test_module_trains():
    rng = np.random.default_rng(0)
    layer = nn.Conv2d(5, 6, 3, padding=1)
    for form, s, k, r in (("rotated", 2, 2, 4), ("columns", 6, 2, None), ("channels", 2, 2, None)):
        module = adapter_for(layer).build(
            layer, random_decomposition(rng, 6, 5, (3, 3), form, s, k, r)
        )
        module(torch.randn(1, 5, 6, 6)).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_weight_is_computed_only_where_its_values_are_needed(monkeypatch):
    d = random_decomposition(np.random.default_rng(0), 6, 8, (), "columns", 3, 2)
    module = adapter_for(nn.Linear(8, 6)).build(nn.Linear(8, 6), d)
    asked = []
    dense = type(module).dense
    monkeypatch.setattr(type(module), "dense", lambda self: asked.append(1) or dense(self))
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.shape, weight.ndim) == (torch.float32, (6, 8), 2)
    assert weight.device.type == "cpu" and weight.size(0) == 6 and not asked
    x = torch.randn(4, 8)
    torch.testing.assert_close(F.linear(x, module.weight, module.bias), module(x))
    assert asked
    module.weight.square().sum().backward()
    assert module.U.weight.grad.abs().sum() > 0
