"""A compressed model rewritten for deployment: the same function in the operations runtimes fuse.

In: a model with decomposed layers, and which graph each of them takes. Out: a copy. The graphs:

    rotated, spatial   split: ``U(V(P_c x)) + A(P_s x)``, the basis as two convolutions, no slice;
                       sliced: one basis, then two slices
    columns            gather: A on shifted channels, one 1x1; kernel: A as a dense kernel with
                       zeros; V has such a kernel in both
    channels           sliced, where the layer before can hand channels over in that order
    entries            kernel: a dense kernel, scattered once here instead of in every call
    linear layers      sliced; widened: V reads all of x, with zeros on S
    all of them        dense: multiplied out, a layer of the original's shape

A slice of channels makes ONNX Runtime leave its blocked memory layout and come back; two
convolutions that together have the basis' rows do the same arithmetic and stay in it. Where they
would fill more blocks of channels than one (16 wide in ONNX Runtime and OpenVINO), the slice is the
first choice. Which graph is the fastest on a machine is measured by `slr_gpu.deploy`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .channel_orders import fold_orders
from .graph import set_module
from .layer_budget import BLOCK
from .layers import SLRConvNd, SLRLinear
from .pieces import CONVS, ScatteredWeight, SparseKernelConv

WIDEN = 16  # zeros may be this part of a linear layer's weights
DENSE = "dense"


def deployable(model: nn.Module) -> nn.Module:
    """A copy of a model as it is deployed: on the CPU, in float32 and eval mode."""
    return copy.deepcopy(model).cpu().float().eval()


@torch.no_grad()
def for_deployment(model: nn.Module, graphs: Mapping[str, str] | None = None) -> nn.Module:
    """A copy of a model in eval mode that computes the same with fewer and plainer operations.

    Parameters
    ----------
    model : nn.Module
    graphs : dict of str to str, optional
        By name of a decomposed layer, one of its `graphs_of`; the first of them by default.
    """
    model = copy.deepcopy(model)
    for name, module in decomposed_layers(model).items():
        graph = (graphs or {}).get(name) or graphs_of(module)[0]
        if graph == DENSE:
            set_module(model, name, multiplied_out(module))
        else:
            _rewrite(module, graph)
    fold_orders(model)
    return model


def decomposed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decomposed layers of a model by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (SLRConvNd, SLRLinear))
    }


def graphs_of(module: nn.Module) -> tuple[str, ...]:
    """The graphs that a decomposed layer can take, the one of first choice first."""
    if isinstance(module, SLRLinear):
        if not (module.kept and module.rank):
            return ("sliced", DENSE)
        zeros, weights = len(module.kept) * module.rank, sum(p.numel() for p in module.parameters())
        few = WIDEN * zeros <= weights
        return ("widened", "sliced", DENSE) if few else ("sliced", "widened", DENSE)
    if module.form == "columns" and module.kept:
        # Without V, one dense kernel is the layer multiplied out.
        return ("gather", "kernel", DENSE) if module.rank else ("gather", DENSE)
    if module.form in ("columns", "entries"):
        return ("kernel", DENSE)
    if module.basis_rows is None or not (module.kept and module.rank):
        return ("sliced", DENSE)
    s, r = len(module.kept), module.basis_rows
    few = _blocks(s) + _blocks(r - s) <= _blocks(r)
    return ("split", "sliced", DENSE) if few else ("sliced", "split", DENSE)


def _rewrite(module: nn.Module, graph: str) -> None:
    """Let a decomposed layer compute by a graph, in place."""
    for name, part in list(module.named_children()):
        if isinstance(part, SparseKernelConv):
            setattr(module, name, _layer(part.dense(), None, **part.settings))
        elif isinstance(part, ScatteredWeight):
            setattr(module, name, _dense_entries(part))
    if graph == "widened":
        _widen(module)
    elif graph == "kernel" and module.form == "columns" and module.kept:
        flat = module.A.weight.flatten(1)
        weight = _scattered(flat, module.gather.columns, module)
        module.A = _layer(weight, module.A.bias, stride=module.stride, dilation=module.dilation)
        module.gather = nn.Identity()
    elif getattr(module, "basis_rows", None) is not None:
        _split_basis(module, graph)


# -- multiplied out --------------------------------------------------------------------------------


@torch.no_grad()
def multiplied_out(module: nn.Module) -> nn.Module:
    """The convolution or linear layer that a decomposed layer stands for.

    Products are summed in float64.
    """
    weight = copy.deepcopy(module).double().dense().to(module.bias.dtype)
    if isinstance(module, SLRLinear):
        return _layer(weight, module.bias)
    return _layer(
        weight,
        module.bias,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        padding_mode=module.padding_mode,
    )


def _scattered(flat: Tensor, columns: list[int], module: SLRConvNd) -> Tensor:
    """A kernel with these columns (n, len(columns)) and zeros elsewhere."""
    width = module.in_channels * math.prod(module.kernel_size)
    weight = flat.new_zeros(len(flat), width).index_copy(1, torch.tensor(columns), flat)
    return weight.reshape(len(flat), module.in_channels, *module.kernel_size)


# -- parts -----------------------------------------------------------------------------------------


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


def _dense_entries(module: ScatteredWeight) -> nn.Module:
    layer = _layer(module.dense(), module.bias, **module.settings)
    if any(module.pad):
        mode = {"reflect": "Reflection", "replicate": "Replication", "circular": "Circular"}
        pad = getattr(nn, f"{mode[module.mode]}Pad{len(module.shape) - 2}d")(module.pad)
        return nn.Sequential(pad, layer)
    return layer


def _widen(module: SLRLinear) -> None:
    """Let V read all of x, with zeros on S: a few products more, no gather of the many others."""
    kept = set(module.kept)
    rest = torch.tensor([i for i in range(module.in_features) if i not in kept], dtype=torch.int64)
    weight = module.V.weight.new_zeros(module.rank, module.in_features)
    module.V = _layer(weight.index_copy(1, rest, module.V.weight), None)
    module.select_V = nn.Identity()


def _blocks(channels: int) -> int:
    return -(-channels // BLOCK)


def _split_basis(module: SLRConvNd, graph: str) -> None:
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
    elif graph == "split":
        for name in used:
            setattr(module, name, _layer(rows[name], None, **settings))
        module.basis = nn.Identity()
