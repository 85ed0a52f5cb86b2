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
from torch.nn.utils import parametrize

from .decomposition import Decomposition
from .grouped import SLRGroupedConv
from .layers import SLRConv1d, SLRConv2d, SLRConv3d, SLRLinear
from .pieces import CONVS


class _Adapter:
    """What capture and compression need to know of one layer type.

    Attributes
    ----------
    source : type
        The module class that is replaced; of its subclasses those that compute the same.
    target : type
        The module class that replaces it.
    """

    source: type[nn.Module]
    target: type[nn.Module]

    def replaces(self, layer: nn.Module) -> bool:
        """Whether a layer is of this type."""
        if not isinstance(layer, self.source) or parametrize.is_parametrized(layer):
            return False
        own = ("forward", "_conv_forward")
        same = all(getattr(type(layer), f, 0) is getattr(self.source, f, 0) for f in own)
        # nn.MultiheadAttention reads the weight of this one and never calls it.
        return same and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)

    def unsupported(self, layer: nn.Module) -> str | None:
        """Why the layer is left as it is, or None."""
        return None

    def groups(self, layer: nn.Module) -> int:
        """Of how many layers side by side, on channels of their own, the layer consists."""
        return 1

    def kernel_size(self, layer: nn.Module) -> tuple[int, ...]:
        raise NotImplementedError

    def batched(self, layer: nn.Module, tensor: Tensor, axis: int = 0) -> Tensor:
        """An input or output of the layer with a leading dimension, where it may lack one.

        Parameters
        ----------
        axis : int
            The dimension of the samples, which becomes the leading one.
        """
        raise NotImplementedError

    def positions(self, layer: nn.Module, tensor: Tensor) -> int:
        """Positions of one entry along the leading dimension of an input or output tensor."""
        raise NotImplementedError

    def spatial_positions(self, layer: nn.Module, x: Tensor, y: Tensor) -> int:
        """The same after the layer's first axis is worked on and the others not."""
        return self.positions(layer, x)

    def input_rows(self, layer: nn.Module, x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        """Rows (P, m) of the layer's input at the given output positions of the given samples.

        Of grouped layers all columns (P, m * groups).
        """
        raise NotImplementedError

    def output_rows(self, layer: nn.Module, y: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        """Rows (P, n) of the layer's output."""
        raise NotImplementedError

    def arguments(self, layer: nn.Module, decomposition: Decomposition) -> dict[str, Any]:
        """Arguments of `target`, for one group."""
        raise NotImplementedError

    def build(self, layer: nn.Module, *decompositions: Decomposition) -> nn.Module:
        """The module that replaces `layer`, on its device, in its dtype and memory format.

        Parameters
        ----------
        *decompositions : Decomposition
            One for each group.
        """
        parts = [self.arguments(layer, decomposition) for decomposition in decompositions]
        grouped = self.groups(layer) > 1
        module = SLRGroupedConv(self.dims, parts) if grouped else self.target(**parts[0])
        module.assign(*decompositions)
        module.train(layer.training).requires_grad_(layer.weight.requires_grad)
        return module.to(
            device=layer.weight.device,
            dtype=layer.weight.dtype,
            memory_format=_memory_format(layer.weight),
        )


class _ConvAdapter(_Adapter):
    def __init__(self, dims: int) -> None:
        self.dims, self.source = dims, CONVS[dims]
        self.target = (SLRConv1d, SLRConv2d, SLRConv3d)[dims - 1]

    def unsupported(self, layer: nn.Module) -> str | None:
        depthwise = layer.groups > 1 and layer.groups == layer.in_channels
        return f"depthwise convolution (groups={layer.groups})" if depthwise else None

    def groups(self, layer: nn.Module) -> int:
        return layer.groups

    def kernel_size(self, layer: nn.Module) -> tuple[int, ...]:
        return tuple(layer.kernel_size)

    def batched(self, layer: nn.Module, tensor: Tensor, axis: int = 0) -> Tensor:
        return tensor if tensor.ndim == self.dims + 2 else tensor.unsqueeze(0)

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
        # With a single tap columns are channels, and V need not be computed on those of A.
        form = "channels" if d.form == "columns" and d.taps == 1 else d.form
        kept = d.columns
        if form == "entries":
            kept = kept[:0]
        elif form != "columns":
            kept = kept[:: d.taps] // d.taps
        return {
            "in_channels": layer.in_channels // layer.groups,
            "out_channels": layer.out_channels // layer.groups,
            "kernel_size": layer.kernel_size,
            "form": form,
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

    def batched(self, layer: nn.Module, tensor: Tensor, axis: int = 0) -> Tensor:
        return tensor.movedim(axis, 0) if tensor.ndim > 1 else tensor.unsqueeze(0)

    def positions(self, layer: nn.Module, tensor: Tensor) -> int:
        return math.prod(tensor.shape[1:-1])

    def input_rows(self, layer: nn.Module, x: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        return x.reshape(len(x), self.positions(layer, x), x.shape[-1])[sample, position]

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
    return next((adapter for adapter in ADAPTERS if adapter.replaces(layer)), None)


def _memory_format(weight: Tensor) -> torch.memory_format:
    """The format of a weight: channels last, or as modules come."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(weight.ndim)
    if last and weight.is_contiguous(memory_format=last) and not weight.is_contiguous():
        return last
    return torch.preserve_format


def _targets() -> list[type[nn.Module]]:
    return [*(adapter.target for adapter in ADAPTERS), SLRGroupedConv]


def build_from_plan(type_name: str, arguments: dict[str, Any]) -> nn.Module:
    """An empty decomposed module from what `plan` returned."""
    targets = {module.__name__: module for module in _targets()}
    return targets[type_name](**arguments)
