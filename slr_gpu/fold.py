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
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import activations
from .graph import set_module
from .layers import (
    CONVS,
    SLRLinear,
    _ColumnGather,
    _ScatteredWeight,
    _Select,
    _SLRConvNd,
    _SparseKernelConv,
)

BLOCK = 16
WIDEN = 16  # zeros may be this part of a linear layer's weights
# Their names as modules and as functions, without case and underscores.
_ELEMENTWISE = {
    name.replace("_", "").lower()
    for name in (*activations.TORCH_MODULES, *activations.TORCH_FUNCTIONS)
} | {"identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous"}


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


# -- orders of channels --------------------------------------------------------------------------


@torch.no_grad()
def fold_orders(model: nn.Module) -> list[str]:
    """Give channels the order that their reader wants, in place, in the layer that makes them.

    A layer of the form ``channels`` (a linear layer: ``columns``) reads kept and other channels by
    index. Where they come straight from one convolution or linear layer (activations, pooling and
    BatchNorm may stand between, and nobody else looks at them), the rows of that layer are put
    into the order (kept, others), and the reader takes two slices. Rows that nobody reads go.

    Returns
    -------
    list of str
        Names of the layers that now read slices. Empty where torch.fx cannot trace the model: it
        then keeps its gathers.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:
        # Whatever the model does that torch.fx cannot follow, its gathers still work.
        return []
    chains = _Chains(model, graph)
    folded = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        reader = model.get_submodule(node.target)
        order = _wanted_order(reader)
        if order is None:
            continue
        makers = chains.before(node, reader)
        if makers:
            for module in makers:
                _reorder(module, torch.tensor(order))
            _read_in_order(reader, order)
            folded.append(node.target)
    return folded


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (_SLRConvNd, SLRLinear)) or super().is_leaf_module(module, name)


class _Chains:
    """What makes a layer's input, if nothing else depends on the order of its channels."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model = model
        called = [model.get_submodule(n.target) for n in graph.nodes if n.op == "call_module"]
        self._calls = Counter(id(module) for module in called)
        modules = {id(module): module for module in model.modules()}.values()
        self._owners = Counter(id(p) for m in modules for p in m.parameters(recurse=False))
        for node in graph.nodes:
            if node.op == "get_attr":
                owner, _, name = node.target.rpartition(".")
                self._owners[id(getattr(model.get_submodule(owner), name))] += 1

    def before(self, node: fx.Node, reader: nn.Module) -> list[nn.Module]:
        """The layer that makes the channels, after the BatchNorms on the way; or nothing."""
        dims = getattr(reader, "dims", 0)
        found: list[nn.Module] = []
        if not self._own(reader):
            return []
        while len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
            if len(node.users) != 1:
                return []
            if node.op in ("call_function", "call_method"):
                if not _passes(getattr(node.target, "__name__", str(node.target)), dims):
                    return []
                continue
            if node.op != "call_module":
                return []
            module = self.model.get_submodule(node.target)
            if _makes(module, dims):
                return [*found, module] if self._own(module) else []
            if dims and type(module).__name__ == f"BatchNorm{dims}d" and self._own(module):
                found.append(module)
            elif not _passes(type(module).__name__, dims) or _hooked(module):
                return []
        return []

    def _own(self, module: nn.Module) -> bool:
        """Whether the module is called once and its weights are nobody else's."""
        alone = all(self._owners[id(p)] == 1 for p in module.parameters())
        return self._calls[id(module)] == 1 and alone and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _passes(name: str, dims: int) -> bool:
    """Whether a module or function treats all channels alike and apart."""
    name = name.replace("_", "").lower()
    pools = [f"{kind}pool{dims}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg")]
    return name in _ELEMENTWISE or (dims > 0 and name in pools)


def _makes(module: nn.Module, dims: int) -> bool:
    if dims == 0:
        return type(module) in (nn.Linear, SLRLinear)
    plain = type(module) is CONVS[dims] and module.groups == 1
    return plain or (isinstance(module, _SLRConvNd) and module.dims == dims)


def _wanted_order(reader: nn.Module) -> list[int] | None:
    """Channels as the reader wants to find them, those it does not read left out."""
    if isinstance(reader, SLRLinear):
        width, kept = reader.in_features, reader.kept
    elif isinstance(reader, _SLRConvNd) and reader.form == "channels":
        width, kept = reader.in_channels, reader.kept
    elif isinstance(reader, _SLRConvNd) and reader.form == "columns" and not reader.rank:
        width = reader.in_channels
        kept = sorted({column // math.prod(reader.kernel_size) for column in reader.kept})
    else:
        return None
    rest = sorted(set(range(width)) - set(kept)) if reader.rank else []
    order = kept + rest
    # Nothing to gain from no kept channels, nor from an order that is there already.
    return order if kept and order != list(range(width)) else None


def _reorder(module: nn.Module, order: Tensor) -> None:
    """Put the output channels of a layer, or the channels of a BatchNorm, into an order."""
    if isinstance(module, (_SLRConvNd, SLRLinear)):
        for name in ("U", "A"):
            if hasattr(module, name):
                _reorder(getattr(module, name), order)
        return
    if isinstance(module, nn.Sequential):
        _reorder(module[-1], order)
        return
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter[order]))
    for name, buffer in list(module.named_buffers()):
        if buffer.ndim:
            setattr(module, name, buffer[order])
    for name in ("out_channels", "out_features", "num_features"):
        if hasattr(module, name):
            setattr(module, name, len(order))


def _read_in_order(reader: nn.Module, order: list[int]) -> None:
    if isinstance(reader, _SLRConvNd) and reader.form == "columns":
        taps = math.prod(reader.kernel_size)
        place = {channel: position for position, channel in enumerate(order)}
        columns = [place[column // taps] * taps + column % taps for column in reader.kept]
        settings = (reader.kernel_size, reader.stride, reader.dilation)
        reader.gather = _ColumnGather(columns, *settings)
        return
    s, dim = len(reader.kept), reader.select_A.dim
    reader.select_A = _Select(list(range(s)), dim) if reader.rank else nn.Identity()
    if reader.rank and isinstance(reader.select_V, nn.Identity):
        reader.V.weight.copy_(reader.V.weight[:, order])
    elif reader.rank:
        reader.select_V = _Select(list(range(s, len(order))), dim)
