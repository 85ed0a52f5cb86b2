"""A compressed model rewritten for deployment: the same function in the operations runtimes fuse.

In: a model with decomposed layers. Out: a copy whose decomposed layers compute

    columns, entries   with plain dense kernels, scattered once here instead of in every call
    rotated, spatial   ``U(V(P_c x)) + A(P_s x)``: the basis as two convolutions, no slice between
    channels           on slices, where the layer before can hand channels over in that order
    linear layers      as channels; V reads all of x, with zeros on S, where that is cheap

A slice of channels makes ONNX Runtime leave its blocked memory layout and come back; two
convolutions that together have the basis' rows do the same arithmetic and stay in it. Where they
would fill more blocks of channels than one (16 wide in ONNX Runtime and OpenVINO), the slice stays.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .channel_orders import fold_orders
from .graph import set_module
from .layers import CONVS, SLRLinear, _ScatteredWeight, _SLRConvNd, _SparseKernelConv

BLOCK = 16
WIDEN = 16  # zeros may be this part of a linear layer's weights


@torch.no_grad()
def for_deployment(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode that computes the same with fewer and plainer operations."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, _SparseKernelConv):
            set_module(model, name, _dense_kernel(module))
        elif isinstance(module, _ScatteredWeight):
            set_module(model, name, _dense_entries(module))
        elif isinstance(module, _SLRConvNd) and module.basis_rows is not None:
            _split_basis(module)
        elif isinstance(module, SLRLinear) and module.kept and module.rank:
            _widen(module)
    fold_orders(model)
    return model


def _layer(weight: Tensor, bias: Tensor | None, **settings: Any) -> nn.Module:
    """A convolution, or a linear layer for a matrix, with these weights."""
    n, c = weight.shape[:2]
    if weight.ndim == 2:
        layer: nn.Module = nn.Linear(c, n, bias=bias is not None)
    else:
        kernel_size = tuple(weight.shape[2:])
        conv = CONVS[weight.ndim - 2]
        layer = conv(c, n, kernel_size, bias=bias is not None, **settings)
    layer = layer.to(weight.dtype)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer.eval()


def _dense_kernel(module: _SparseKernelConv) -> nn.Module:
    n, *rest = module.full_shape
    flat = module.weight.new_zeros(n, torch.Size(rest).numel())
    kernel = flat.index_copy(1, module.columns, module.weight).reshape(module.full_shape)
    return _layer(kernel, None, **module.settings)


def _dense_entries(module: _ScatteredWeight) -> nn.Module:
    flat = module.weight.new_zeros(torch.Size(module.shape).numel())
    weight = flat.index_copy(0, module.index, module.weight).reshape(module.shape)
    layer = _layer(weight, module.bias, **module.settings)
    if any(module.pad):
        mode = {"reflect": "Reflection", "replicate": "Replication", "circular": "Circular"}
        pad = getattr(nn, f"{mode[module.mode]}Pad{weight.ndim - 2}d")(module.pad)
        return nn.Sequential(pad, layer)
    return layer


def _widen(module: SLRLinear) -> None:
    """Let V read all of x, with zeros on S: a few products more, no gather of the many others."""
    s, k = len(module.kept), module.rank
    if WIDEN * s * k > sum(parameter.numel() for parameter in module.parameters()):
        return
    kept = set(module.kept)
    rest = torch.tensor([i for i in range(module.in_features) if i not in kept], dtype=torch.int64)
    weight = module.V.weight.new_zeros(k, module.in_features)
    module.V = _layer(weight.index_copy(1, rest, module.V.weight), None)
    module.select_V = nn.Identity()


def _blocks(channels: int) -> int:
    return -(-channels // BLOCK)


def _split_basis(module: _SLRConvNd) -> None:
    """Give each part its own rows of the basis."""
    basis, s = module.basis, len(module.kept)
    settings = {
        "stride": basis.stride,
        "padding": basis.padding,
        "dilation": basis.dilation,
        "padding_mode": basis.padding_mode,
    }
    rows = {"select_A": basis.weight[:s], "select_V": basis.weight[s:]}
    used = [name for name in rows if hasattr(module, name)]
    if len(used) == 1:
        module.basis = _layer(rows[used[0]], None, **settings)
        setattr(module, used[0], nn.Identity())
    elif _blocks(s) + _blocks(module.basis_rows - s) <= _blocks(module.basis_rows):
        for name in used:
            setattr(module, name, _layer(rows[name], None, **settings))
        module.basis = nn.Identity()
