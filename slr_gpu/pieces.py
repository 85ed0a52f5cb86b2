"""What decomposed layers are made of beside stock layers: channels and columns picked, sparse weights.

In: which channels, im2col columns or single entries a part reads or stores. Out: small modules of
stock operations, which runtimes execute and autograd goes through.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decomposition import Decomposition

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# More runs of neighbours than these are gathered by index.
MOST_SLICES = 4


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """(start, length) of each run of neighbours, in order."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs


class Select(nn.Module):
    """Pick entries along a dimension: a few slices where they are neighbours, else a gather."""

    def __init__(self, indices: list[int], dim: int) -> None:
        super().__init__()
        self.dim, self.slices = dim, _runs(indices)
        if not 0 < len(self.slices) <= MOST_SLICES:
            self.slices = []
            index = torch.tensor(indices, dtype=torch.int64)
            self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.slices:
            return x.index_select(self.dim, self.index)
        parts = [x.narrow(self.dim, start, length) for start, length in self.slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


class ColumnGather(nn.Module):
    """The im2col columns S of x as channels, at the positions where the kernel is applied."""

    def __init__(
        self,
        columns: list[int],
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.stride, self.dilation, self.kernel_size = stride, dilation, kernel_size
        taps, self.channel_dim = math.prod(kernel_size), -len(kernel_size) - 1
        # In the order in which they are handed over: tap by tap.
        self.columns: list[int] = []
        self.offsets, selects = [], []
        for tap, offset in enumerate(np.ndindex(*kernel_size)):
            found = [c for c in columns if c % taps == tap]
            if found:
                self.columns += found
                self.offsets.append(offset)
                selects.append(Select([c // taps for c in found], self.channel_dim))
        self.selects = nn.ModuleList(selects)

    def forward(self, padded: Tensor) -> Tensor:
        dims = range(len(self.kernel_size))
        before = padded.ndim - len(dims)
        size = [
            (padded.shape[before + d] - self.dilation[d] * (self.kernel_size[d] - 1) - 1)
            // self.stride[d]
            + 1
            for d in dims
        ]
        parts = []
        for offset, select in zip(self.offsets, self.selects, strict=True):
            window: list[Any] = [slice(None)] * before
            for d in dims:
                start = offset[d] * self.dilation[d]
                stop = start + (size[d] - 1) * self.stride[d] + 1
                window.append(slice(start, stop, self.stride[d]))
            parts.append(select(padded[tuple(window)]))
        return torch.cat(parts, self.channel_dim)


class SparseKernelConv(nn.Module):
    """A convolution whose kernel is stored on some im2col columns and zero on the others."""

    def __init__(self, columns: list[int], full_shape: tuple[int, ...], settings: dict) -> None:
        super().__init__()
        self.full_shape, self.settings = full_shape, settings
        self.weight = nn.Parameter(torch.empty(full_shape[0], len(columns)))
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def dense(self) -> Tensor:
        """The kernel with zeros between the columns."""
        flat = self.weight.new_zeros(self.full_shape[0], math.prod(self.full_shape[1:]))
        return flat.index_copy(1, self.columns, self.weight).reshape(self.full_shape)

    def forward(self, padded: Tensor) -> Tensor:
        return _FUNCTIONS[len(self.full_shape) - 2](padded, self.dense(), **self.settings)


class ScatteredWeight(nn.Module):
    """A dense convolution or linear layer whose weight is stored as its entries that are not zero.

    Only those are parameters, so training leaves the others at zero. The operation itself is
    dense: stock runtimes skip no zeros.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        entries: int,
        *,
        bias: bool,
        padding_mode: str = "zeros",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.shape, self.settings = tuple(shape), settings
        self.weight = nn.Parameter(torch.empty(entries))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None
        # Where the entries go in the flat weight: part of the state, a plan should stay short.
        self.register_buffer("index", torch.zeros(entries, dtype=torch.int64))
        self.pad, self.mode = (), padding_mode
        if padding_mode != "zeros":
            Conv = CONVS[len(shape) - 2]
            reference = Conv(1, 1, shape[2:], padding_mode=padding_mode, **settings)
            self.pad = tuple(reference._reversed_padding_repeated_twice)
            self.settings = {**settings, "padding": 0}

    def dense(self) -> Tensor:
        """The weight with zeros between the entries."""
        flat = self.weight.new_zeros(math.prod(self.shape))
        return flat.index_copy(0, self.index, self.weight).reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dense()
        if len(self.shape) == 2:
            return F.linear(x, weight, self.bias)
        if any(self.pad):
            x = F.pad(x, self.pad, mode=self.mode)
        return _FUNCTIONS[len(self.shape) - 2](x, weight, self.bias, **self.settings)

    @torch.no_grad()
    def assign(self, decomposition: Decomposition) -> None:
        """Copy the entries of A in."""
        d = decomposition
        rows, kept = np.nonzero(d.A)
        self.index.copy_(torch.from_numpy(rows * d.width + d.columns[kept]))
        self.weight.copy_(torch.from_numpy(d.A[rows, kept]))
