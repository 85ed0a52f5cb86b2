"""Channels handed over in the order in which their reader wants them.

In: a model in eval mode whose decomposed layers read channels by index. Out: the same function, with
slices. A layer of the form ``channels`` (a linear layer: ``columns``) reads its kept channels S and
the others C apart; where the graph allows, the layers that make these channels have their rows put
into the order (S, C), so that both are slices, and rows that nobody reads are dropped. Activations,
pooling, BatchNorm and depthwise convolutions may stand between. All makers that meet in a sum get
one order, the parts of a concatenation one each, and a flattened map moves in blocks of positions;
other readers of the same channels have the columns of their weights moved along.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from .channel_spaces import Spaces, wanted
from .layers import SLRConvNd, SLRLinear
from .pieces import ColumnGather, Select


@torch.no_grad()
def fold_orders(model: nn.Module) -> list[str]:
    """Put channels into the order that their readers want, in place.

    Returns
    -------
    list of str
        Names of the layers that now find their channels in order. Empty where torch.fx cannot
        trace the model: it then keeps its gathers.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception:
        # Whatever the model does that torch.fx cannot follow, its gathers still work.
        return []
    spaces = Spaces(model, graph)
    orders: dict[int, list[int]] = {}
    folded = []
    for reader in spaces.readers:
        kept = set(wanted(reader.module)[0])
        found = len(orders)
        for start, space in reader.layout.parts() if kept and not reader.layout.flat else ():
            root = space.root
            if not root.fixed and root.read and id(root) not in orders:
                first = [i for i in range(space.size) if start + i in kept]
                order = first + sorted(root.read.difference(first))
                if order != list(range(space.size)):
                    orders[id(root)] = order
        if len(orders) > found:
            folded.append(reader.name)
    for root in (space.root for space in spaces.all):
        # Nobody asks for an order: what nobody reads goes all the same.
        if not root.fixed and 0 < len(root.read) < root.size:
            orders.setdefault(id(root), sorted(root.read))
    for space in spaces.all:
        if id(space.root) in orders:
            _reorder(space.maker, torch.tensor(orders[id(space.root)]))
    for uses, move in ((spaces.passed, _reorder), (spaces.readers, _read_in_order)):
        for use in uses:
            if any(id(space.root) in orders for space in use.layout.spaces):
                move(use.module, use.order(orders))
    return folded


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (SLRConvNd, SLRLinear)) or super().is_leaf_module(module, name)


def _reorder(module: nn.Module, order: Tensor) -> None:
    """Put the output channels of a layer, or the channels of a BatchNorm, into an order."""
    if isinstance(module, (SLRConvNd, SLRLinear)):
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
    if getattr(module, "groups", 1) > 1:
        module.groups = module.in_channels = len(order)
    for name in ("out_channels", "out_features", "num_features"):
        if hasattr(module, name):
            setattr(module, name, len(order))


def _take_columns(module: nn.Module, order: Tensor) -> None:
    """Let a convolution or linear layer read its inputs in an order, some of them left out."""
    if isinstance(module, nn.Sequential):
        module = module[-1]
    module.weight = nn.Parameter(module.weight[:, order])
    setattr(module, "in_features" if hasattr(module, "in_features") else "in_channels", len(order))


def _read_in_order(reader: nn.Module, order: Tensor) -> None:
    """Let a layer find input ``order[i]`` at place i."""
    place = {channel: position for position, channel in enumerate(order.tolist())}
    if not isinstance(reader, (SLRConvNd, SLRLinear)):
        _take_columns(reader, order)
        return
    by_index = isinstance(reader, SLRLinear) or reader.form == "channels"
    if by_index and reader.kept:
        dim = reader.select_A.dim
        kept, others = wanted(reader)
        places = [place[channel] for channel in kept]
        reader.select_A = Select(places, dim)
        if not reader.rank and len(kept) == len(order):  # all of them, in another's order perhaps
            reader.select_A = nn.Identity()
            _take_columns(reader.A, torch.tensor(places).argsort())
        if reader.rank and not isinstance(reader.select_V, nn.Identity):
            reader.select_V = Select([place[channel] for channel in others], dim)
            return
    elif not by_index and isinstance(getattr(reader, "gather", None), ColumnGather):
        taps = math.prod(reader.kernel_size)
        columns = [place[column // taps] * taps + column % taps for column in reader.kept]
        reader.gather = ColumnGather(columns, reader.kernel_size, reader.stride, reader.dilation)
    for module in _first_layers(reader):
        _take_columns(module, order)


def _first_layers(reader: nn.Module) -> list[nn.Module]:
    """The layers of a decomposed one that read all of its input."""
    basis = getattr(reader, "basis", None)
    if basis is not None and not isinstance(basis, nn.Identity):
        return [basis]
    if basis is not None:  # split between the parts
        return [m for m in (reader._modules.get(n) for n in ("select_A", "select_V")) if m]
    # As a dense kernel, A reads all channels too.
    whole = reader.entries or isinstance(getattr(reader, "gather", None), nn.Identity)
    first = [reader.A] if whole else []
    return [*first, reader.V] if reader.rank else first
