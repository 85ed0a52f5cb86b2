"""One adapter a layer type: what capture and compression need to know of it.

In: a layer of the user's model, its input and output, and a `Decomposition`. Out: rows of im2col
inputs and of responses, and the module of `slr_gpu.layers` that replaces the layer. A layer type is
added by writing its adapter and listing it in `ADAPTERS`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decomposition import Decomposition
from .layers import CONVS, SLRConv1d, SLRConv2d, SLRConv3d, SLRLinear


class _Adapter:
    """What capture and compression need to know of one layer type.

    Attributes
    ----------
    source : type
        The module class that is replaced (exactly this class, not subclasses).
    target : type
        The module class that replaces it.
    """

    source: type[nn.Module]
    target: type[nn.Module]

    def unsupported(self, layer: nn.Module) -> str | None:
        """Why the layer is left as it is, or None."""
        return None

    def kernel_size(self, layer: nn.Module) -> tuple[int, ...]:
        raise NotImplementedError

    def positions(self, layer: nn.Module, tensor: Tensor) -> int:
        """Positions of one sample's input or output tensor."""
        raise NotImplementedError

    def spatial_positions(self, layer: nn.Module, x: Tensor, y: Tensor) -> int:
        """Positions of one sample after the layer's first axis is worked on and the others not."""
        return self.positions(layer, x)

    def input_rows(self, layer: nn.Module, x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        """Rows (P, m) of the layer's input at the given output positions of the given samples."""
        raise NotImplementedError

    def output_rows(self, layer: nn.Module, y: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        """Rows (P, n) of the layer's output."""
        raise NotImplementedError

    def arguments(self, layer: nn.Module, decomposition: Decomposition) -> dict[str, Any]:
        """Arguments of `target`."""
        raise NotImplementedError

    def build(self, layer: nn.Module, decomposition: Decomposition) -> nn.Module:
        """The module that replaces `layer`, on its device and in its dtype."""
        module = self.target(**self.arguments(layer, decomposition))
        module.assign(decomposition)
        module.train(layer.training)
        return module.to(device=layer.weight.device, dtype=layer.weight.dtype)


class _ConvAdapter(_Adapter):
    def __init__(self, dims: int) -> None:
        self.dims, self.source = dims, CONVS[dims]
        self.target = (SLRConv1d, SLRConv2d, SLRConv3d)[dims - 1]

    def unsupported(self, layer: nn.Module) -> str | None:
        return f"grouped convolution (groups={layer.groups})" if layer.groups != 1 else None

    def kernel_size(self, layer: nn.Module) -> tuple[int, ...]:
        return tuple(layer.kernel_size)

    def positions(self, layer: nn.Module, tensor: Tensor) -> int:
        return math.prod(tensor.shape[-self.dims :])

    def spatial_positions(self, layer: nn.Module, x: Tensor, y: Tensor) -> int:
        return y.shape[-self.dims] * math.prod(x.shape[-self.dims :][1:])

    def input_rows(self, layer: nn.Module, x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        pad = layer._reversed_padding_repeated_twice
        x = F.pad(x, tuple(pad), mode=mode) if any(pad) else x
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        size = [
            (x.shape[2 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
            for d in range(self.dims)
        ]
        steps = x.stride()
        # A view of all patches; indexing copies the sampled ones only.
        patches = x.as_strided(
            (x.shape[0], x.shape[1], *size, *kernel),
            (
                steps[0],
                steps[1],
                *(steps[2 + d] * stride[d] for d in range(self.dims)),
                *(steps[2 + d] * dilation[d] for d in range(self.dims)),
            ),
            x.storage_offset(),
        )
        where = torch.unravel_index(position, tuple(size))
        return patches[(sample, slice(None), *where)].reshape(len(sample), -1)

    def output_rows(self, layer: nn.Module, y: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        where = torch.unravel_index(position, tuple(y.shape[2:]))
        return y[(sample, slice(None), *where)]

    def arguments(self, layer: nn.Module, decomposition: Decomposition) -> dict[str, Any]:
        d = decomposition
        kept = d.columns
        if d.form == "entries":
            kept = kept[:0]
        elif d.form != "columns":
            kept = kept[:: d.taps] // d.taps
        return {
            "in_channels": layer.in_channels,
            "out_channels": layer.out_channels,
            "kernel_size": layer.kernel_size,
            "form": d.form,
            "kept": kept.tolist(),
            "rank": d.rank,
            "basis_rows": None if d.basis is None else len(d.basis),
            "entries": d.structure.s if d.form == "entries" else 0,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "padding_mode": layer.padding_mode,
        }


class _LinearAdapter(_Adapter):
    source, target = nn.Linear, SLRLinear

    def kernel_size(self, layer: nn.Module) -> tuple[int, ...]:
        return ()

    def positions(self, layer: nn.Module, tensor: Tensor) -> int:
        return math.prod(tensor.shape[1:-1]) if tensor.ndim > 1 else 1

    def input_rows(self, layer: nn.Module, x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1, x.shape[-1])[sample, position]

    output_rows = input_rows

    def arguments(self, layer: nn.Module, decomposition: Decomposition) -> dict[str, Any]:
        d = decomposition
        return {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "kept": [] if d.form == "entries" else d.columns.tolist(),
            "rank": d.rank,
            "entries": d.structure.s if d.form == "entries" else 0,
        }


ADAPTERS: tuple[_Adapter, ...] = (
    _ConvAdapter(1),
    _ConvAdapter(2),
    _ConvAdapter(3),
    _LinearAdapter(),
)


def adapter_for(layer: nn.Module) -> _Adapter | None:
    """The adapter of a layer's type, None for types that are not compressed."""
    return next((adapter for adapter in ADAPTERS if type(layer) is adapter.source), None)


def build_from_plan(type_name: str, arguments: dict[str, Any]) -> nn.Module:
    """An empty decomposed module from what `plan` returned."""
    targets = {adapter.target.__name__: adapter.target for adapter in ADAPTERS}
    return targets[type_name](**arguments)
