"""Decomposed layers as ordinary modules.

In: a layer of the user's model and a `Decomposition`. Out: a module made of stock operations that
computes ``(A + U V) E x + b`` (DESIGN 4), so that the model trains, saves and exports as any other:

    rotated    h = P x (1x1);  U(V(h[:, s:])) + A(h[:, :s])
    channels   U(V(x[:, C])) + A(x[:, S])
    columns    A on gathered shifts of x (one 1x1), V a full kernel that is zero on S
    spatial    as rotated, with P of kh x 1 filters and 1 x kw kernels in V and A
    entries    U(V(x)) + A(x), A's stored entries put into a dense kernel first

Which module replaces which layer is said in `slr_gpu.adapters`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .decomposition import Decomposition
from .pieces import CONVS, ColumnGather, ScatteredWeight, Select, SparseKernelConv

_FACTS = {
    getattr(Tensor, name).__get__
    for name in ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_sparse", "is_meta")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex}


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class _DenseWeight(Tensor):
    """The dense weight of a decomposed layer, computed where its values are needed.

    Models look at a weight besides calling its layer, mostly for its dtype or device.
    """

    @staticmethod
    def __new__(cls, layer: Decomposed) -> _DenseWeight:
        nothing = torch.empty((), dtype=layer.bias.dtype, device=layer.bias.device)
        return nothing.expand(layer.dense_shape).as_subclass(cls)

    def __init__(self, layer: Decomposed) -> None:
        self._layer = layer

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(
            lambda x: x._layer.dense() if isinstance(x, cls) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


class Decomposed(nn.Module):
    """A layer whose weight is not stored as such."""

    @property
    def weight(self) -> Tensor:
        """The dense weight that the parts stand for, of the shape that the layer's own had."""
        return _DenseWeight(self)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def bias(self) -> Tensor:
        return (self.U if self.rank else self.A).bias

    def dense(self) -> Tensor:
        raise NotImplementedError

    def _response(self, x: Tensor) -> Tensor:
        """Of parts that select whole channels of x, or single weights."""
        parts = []
        if self.rank:
            parts.append(self.U(self.V(self.select_V(x))))
        if self.kept:
            parts.append(self.A(self.select_A(x)))
        if self.entries:
            parts.append(self.A(x))
        return _sum(parts)

    def _joined(self, width: int, rest: int) -> Tensor:
        """``A + U V`` (n, width) from factors with `rest` trailing numbers a column."""
        n = len(self.bias)
        kept = torch.tensor(self.kept, dtype=torch.int64, device=self.bias.device)
        mask = torch.ones(width, dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
        M = self.bias.new_zeros(n, width, rest)
        if self.rank:
            V = self.V.weight.reshape(self.rank, -1, rest)
            UV = torch.einsum("nk,kcr->ncr", self.U.weight.reshape(n, self.rank), V)
            M = M.index_copy(1, mask.nonzero().flatten(), UV)
        if self.kept:
            M = M.index_copy(1, kept, self._kept_weight().reshape(n, -1, rest))
        if self.entries:
            M = M + self.A.dense().reshape(M.shape)
        return M

    def _kept_weight(self) -> Tensor:
        """A's weight in the order of `kept`."""
        return self.A.weight


class SLRConvNd(Decomposed):
    """A convolution as column-sparse plus low-rank.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size, stride, dilation : tuple of int
    padding : tuple of int or str
    padding_mode : str
    form : {"columns", "channels", "rotated", "entries", "spatial"}
    kept : list of int
        Kept im2col columns (``columns``), channels (``channels``) or ``range(s)`` (the forms with
        a basis).
    rank : int
    basis_rows : int or None
    entries : int
        Stored entries of A (``entries``, where `kept` is empty).
    """

    dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        *,
        form: str,
        kept: list[int],
        rank: int,
        basis_rows: int | None = None,
        entries: int = 0,
        stride: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | str | None = None,
        dilation: tuple[int, ...] | None = None,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        ones = (1,) * self.dims
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = tuple(kernel_size)
        self.stride, self.dilation = tuple(stride or ones), tuple(dilation or ones)
        self.padding = padding if isinstance(padding, str) else tuple(padding or (0,) * self.dims)
        self.padding_mode = padding_mode
        self.form, self.kept, self.rank = form, list(kept), rank
        self.basis_rows, self.entries = basis_rows, entries
        Conv = CONVS[self.dims]
        settings = {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "padding_mode": padding_mode,
        }
        width = in_channels if basis_rows is None else basis_rows
        rest = sorted(set(range(width * self._group)) - set(self.kept))
        if form == "rotated":
            self.basis = Conv(in_channels, basis_rows, 1, bias=False)
        if form == "spatial":
            first, settings = self._split(settings)
            self.basis = Conv(in_channels, basis_rows, bias=False, **first)
        if form == "columns":
            self._columns_parts(rest)
        else:
            if self.kept:
                self.select_A = Select(self.kept, -self.dims - 1)
                self.A = Conv(len(self.kept), out_channels, bias=not rank, **settings)
            if entries:
                shape = (out_channels, in_channels, *self.kernel_size)
                where = {name: settings[name] for name in settings if name != "kernel_size"}
                self.A = ScatteredWeight(shape, entries, bias=not rank, **where)
            if rank:
                select = Select(rest, -self.dims - 1)
                self.select_V = nn.Identity() if form == "entries" else select
                self.V = Conv(len(rest), rank, bias=False, **settings)
        if rank:
            self.U = Conv(rank, out_channels, 1)

    @property
    def _group(self) -> int:
        return math.prod(self.kernel_size) if self.form == "columns" else 1

    def _split(self, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of a convolution along the first axis, and of one along the others after it.

        Padding may wait until its own axis is worked on, because every other line is treated
        alike: copies stay copies, and zeros stay zeros without a bias.
        """
        first, others = dict(settings), dict(settings)
        for name, neutral in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            if not isinstance(settings[name], str):
                first[name] = (settings[name][0], *(neutral,) * (self.dims - 1))
                others[name] = (neutral, *settings[name][1:])
        return first, others

    def _columns_parts(self, rest: list[int]) -> None:
        Conv = CONVS[self.dims]
        # Padded by hand, once for both parts.
        reference = Conv(
            1,
            1,
            self.kernel_size,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
        )
        self.pad = tuple(reference._reversed_padding_repeated_twice)
        if self.kept:
            self.gather = ColumnGather(self.kept, self.kernel_size, self.stride, self.dilation)
            self.A = Conv(len(self.kept), self.out_channels, 1, bias=not self.rank)
        if self.rank:
            shape = (self.rank, self.in_channels, *self.kernel_size)
            settings = {"stride": self.stride, "dilation": self.dilation}
            self.V = SparseKernelConv(rest, shape, settings)

    def forward(self, input: Tensor) -> Tensor:  # as torch's own layers call it
        if self.form != "columns":
            return self._response(input if self.basis_rows is None else self.basis(input))
        x, parts = input, []
        if any(self.pad):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self.pad, mode=mode)
        if self.rank:
            parts.append(self.U(self.V(x)))
        if self.kept:
            parts.append(self.A(self.gather(x)))
        return _sum(parts)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def dense(self) -> Tensor:
        shape, taps = self.dense_shape, math.prod(self.kernel_size)
        if self.form == "columns":
            return self._joined(self.in_channels * taps, 1).reshape(shape)
        if self.basis_rows is None:
            return self._joined(self.in_channels, taps).reshape(shape)
        first = self.kernel_size[0] if self.form == "spatial" else 1
        M = self._joined(self.basis_rows, taps // first)
        basis = self.basis.weight.reshape(self.basis_rows, self.in_channels, first)
        return torch.einsum("nrt,rcf->ncft", M, basis).reshape(shape)

    def _kept_weight(self) -> Tensor:
        if self.form != "columns":
            return self.A.weight
        order = torch.from_numpy(self._by_taps()).to(self.A.weight.device)
        return self.A.weight.flatten(1).index_copy(1, order, self.A.weight.flatten(1))

    def _by_taps(self) -> np.ndarray:
        """Kept columns, numbered as they ascend, in the order of the gather."""
        return np.searchsorted(self.kept, self.gather.columns)

    def extra_repr(self) -> str:
        basis = "" if self.basis_rows is None else f", r={self.basis_rows}"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size},"
            f" form={self.form}{basis}, s={self.entries or len(self.kept)}, k={self.rank}"
        )

    def plan(self) -> dict[str, Any]:
        """The arguments that rebuild this module (JSON)."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "form": self.form,
            "kept": self.kept,
            "rank": self.rank,
            "basis_rows": self.basis_rows,
            "entries": self.entries,
            "stride": list(self.stride),
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "dilation": list(self.dilation),
            "padding_mode": self.padding_mode,
        }

    @torch.no_grad()
    def assign(self, decomposition: Decomposition) -> None:
        """Copy the factors in."""
        d, k = decomposition, self.kernel_size
        k = (1, *k[1:]) if self.form == "spatial" else k
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(d, name)))
            for name in ("A", "U", "V", "bias")
        }
        n, one = self.out_channels, (1,) * self.dims
        last = self.U if self.rank else self.A
        last.bias.copy_(tensors["bias"])
        if self.rank:
            self.U.weight.copy_(tensors["U"].reshape(n, self.rank, *one))
            V = tensors["V"]
            self.V.weight.copy_(V if self.form == "columns" else V.reshape(self.rank, -1, *k))
        if self.entries:
            self.A.assign(d)
        if self.kept:
            if self.form == "columns":
                order = torch.from_numpy(self._by_taps())
                self.A.weight.copy_(tensors["A"][:, order].reshape(n, -1, *one))
            else:
                self.A.weight.copy_(tensors["A"].reshape(n, len(self.kept), *k))
        if d.basis is not None:
            basis = torch.from_numpy(np.ascontiguousarray(d.basis))
            self.basis.weight.copy_(basis.reshape(self.basis.weight.shape))


class SLRConv1d(SLRConvNd):
    dims = 1


class SLRConv2d(SLRConvNd):
    dims = 2


class SLRConv3d(SLRConvNd):
    dims = 3


class SLRLinear(Decomposed):
    """A linear layer as column-sparse plus low-rank: ``A x[S] + U V x[C] + b``.

    Parameters
    ----------
    in_features, out_features : int
    kept : list of int
        Kept columns S.
    rank : int
    entries : int
        Instead of `kept`, stored entries of A anywhere; V then reads all of x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kept: list[int],
        rank: int,
        entries: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.kept, self.rank, self.entries = list(kept), rank, entries
        if entries:
            self.A = ScatteredWeight((out_features, in_features), entries, bias=not rank)
        if self.kept:
            self.select_A = Select(self.kept, -1)
            self.A = nn.Linear(len(self.kept), out_features, bias=not rank)
        if rank:
            rest = sorted(set(range(in_features)) - set(self.kept))
            self.select_V = Select(rest, -1) if self.kept else nn.Identity()
            self.V = nn.Linear(len(rest), rank, bias=False)
            self.U = nn.Linear(rank, out_features)

    def forward(self, input: Tensor) -> Tensor:  # as torch's own layers call it
        return self._response(input)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def dense(self) -> Tensor:
        return self._joined(self.in_features, 1).flatten(1)

    def extra_repr(self) -> str:
        kept = f"entries={self.entries}" if self.entries else f"s={len(self.kept)}"
        return f"{self.in_features}, {self.out_features}, {kept}, k={self.rank}"

    def plan(self) -> dict[str, Any]:
        """The arguments that rebuild this module (JSON)."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "kept": self.kept,
            "rank": self.rank,
            "entries": self.entries,
        }

    @torch.no_grad()
    def assign(self, decomposition: Decomposition) -> None:
        """Copy the factors in."""
        d = decomposition
        if self.entries:
            self.A.assign(d)
        (self.U if self.rank else self.A).bias.copy_(torch.from_numpy(d.bias))
        for name in (["U", "V"] if self.rank else []) + (["A"] if self.kept else []):
            factor = torch.from_numpy(np.ascontiguousarray(getattr(d, name)))
            getattr(self, name).weight.copy_(factor)
