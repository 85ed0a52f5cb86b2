"""The rows of one layer, where they are computed on: resident, or passing through in blocks.

In: host or device arrays X (P, m), Y and Z (P, n), and which rows of them are wanted. Out: sums
over blocks of those rows on the device of the backend, X less its column means and in the
coordinates of an input basis (DESIGN 2). Rows stay on the device where it holds them; otherwise
they are copied block by block while the block before is worked on. Where even a block does not
fit, it is halved, and that is said.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy

from .errors import BackendError, complain
from .ops import NumpyOps
from .parallel import ALONE, Group

Array = Any

# Rows a block of the sweeps over samples: large enough for full GEMM speed and for huge pages, small
# enough that several blocks of responses are no burden.
BLOCK = 8192
# Most rows a block on a device.
LARGEST_BLOCK = 65_536
# A block that does not fit is halved down to this.
SMALLEST_BLOCK = 64


def to_basis(xp: Any, array: Array, basis: Array, taps: int) -> Array:
    """``array Eᵀ`` for E = basis ⊗ I_taps, basis (r, c), and rows of c * taps columns."""
    # Taps first for one large GEMM; a batch of (r, c) x (c, taps) products is far slower.
    P, (r, groups) = len(array), basis.shape
    taps_first = array.reshape(P, groups, taps).transpose(0, 2, 1)
    turned = taps_first.reshape(P * taps, groups) @ basis.astype(array.dtype).T
    return turned.reshape(P, taps, r).transpose(0, 2, 1).reshape(P, r * taps)


class Samples:
    """Rows (X, Y, Z) of a layer.

    Parameters
    ----------
    ops : NumpyOps
    X : array, (P, m)
    Y : array, (P, n)
        Responses wanted after the activation.
    Z : array, (P, n), or None
        Responses wanted before it.
    index : int array
        The rows of these that count, on the host.
    dtype : dtype
        Of the rows on the device.
    group : Group
        The ranks over which the rows are spread, each with its own.

    Attributes
    ----------
    rows : int
        On all ranks together.
    resident : bool
        Whether the rows stay on the device.
    rough_means : tuple of (array, array), or None
        Column means of X and Z that are known beforehand, of these and other rows.
    """

    rough_means: tuple[Array, Array] | None = None

    def __init__(
        self,
        ops: NumpyOps,
        X: Array,
        Y: Array,
        Z: Array | None,
        index: Array,
        dtype: Any,
        group: Group = ALONE,
    ) -> None:
        self.ops, self.dtype, self.group = ops, dtype, group
        # The number of the first row on this rank among all, and how many rows there are here.
        (self._first, self.rows), self._count = group.span(len(index)), len(index)
        self._mean: Array | None = None
        self._sizes: dict[tuple[int, int], int] = {}  # of blocks, asked for once
        self._source: tuple[Samples, Array, int] | None = None
        # Y and Z may be one array: then it is held, and copied, once.
        self._same = Z is Y
        arrays = (X, Y) if self._same or Z is None else (X, Y, Z)
        width = sum(array.shape[1] for array in arrays)
        # Twice: an input basis turns X into a second array.
        self.resident = ops.memory.fits(2 * len(index) * width * dtype.itemsize)
        if self.resident:
            kept = [self._taken(array, index) for array in arrays]
            self._arrays, self._index = tuple(kept), None
        else:
            self._arrays = tuple(self._on_host(array) for array in arrays)
            self._index = index

    def _taken(self, array: Array, index: Array) -> Array:
        """A copy of the rows, on the device."""
        if isinstance(array, numpy.ndarray):
            return self.ops.asarray(array[index], self.dtype)
        rows = self.ops.asarray(array)[self.ops.asarray(index)]
        return rows.astype(self.dtype, copy=False)

    def _on_host(self, array: Array) -> Array:
        if not isinstance(array, numpy.ndarray):
            array = self.ops.to_numpy(self.ops.asarray(array))
        return array.astype(self.dtype, copy=False)

    def centre(self, mean: Array) -> None:
        """Subtract the column means (m,) from X, once and for all."""
        mean = mean.astype(self.dtype)
        if self.resident:
            self._arrays[0][...] -= mean
        else:
            self._mean = mean

    def turned(self, basis: Array, taps: int) -> Samples:
        """The same rows with X Eᵀ for E = basis ⊗ I_taps, formed only when first needed."""
        other = copy.copy(self)
        other.__dict__.pop("X", None)
        if self._source is None or (self.resident and "X" in self.__dict__):
            other._source = (self, basis, taps)
        else:  # never formed: turn once, by the product
            source, first, _ = self._source
            other._source = (source, basis @ first, taps)
        return other

    def leading(self, channels: int) -> Samples:
        """The first channels of rows that are in a basis."""
        source, basis, taps = self._source
        other = copy.copy(self)
        other.__dict__.pop("X", None)
        other._source = (source, basis[:channels], taps)
        if "X" in self.__dict__:
            other.X = self.X[:, : channels * taps]
        return other

    def thinned(self, step: int) -> Samples:
        """Every step-th row."""
        other, start = copy.copy(self), -self._first % step
        other.__dict__.pop("X", None)
        if self._source is not None:
            source, basis, taps = self._source
            other._source = (source.thinned(step), basis, taps)
        if self.resident:
            other._arrays = tuple(array[start::step] for array in self._arrays)
            if self._source is None or "X" in self.__dict__:
                other.X = self.X[start::step]
        else:
            other._index = self._index[start::step]
        other._first, other.rows = (self._first + start) // step, -(-self.rows // step)
        other._count = len(range(start, self._count, step))
        return other

    def gathered(self) -> Samples:
        """The same rows, all of them on every rank."""
        if self.group.size == 1:
            return self
        own = (self.X, self.Y) if self._same else (self.X, self.Y, self.Z)
        X, Y, *rest = (self.group.gather(self.ops.to_numpy(array)) for array in own)
        return Samples(self.ops, X, Y, rest[0] if rest else Y, numpy.arange(len(X)), self.dtype)

    @cached_property
    def X(self) -> Array:
        """All inputs (P, m') of this rank at once, on the device."""
        if self._source is not None:
            source, basis, taps = self._source
            return to_basis(self.ops.xp, source.X, basis, taps)
        if self.resident:
            return self._arrays[0]
        return self._gathered("X")

    @property
    def Y(self) -> Array:
        """All responses (P, n) of this rank wanted after the activation, at once."""
        return self._whole(1)

    @property
    def Z(self) -> Array:
        """All responses (P, n) of this rank wanted before the activation, at once."""
        return self._whole(1 if self._same else 2)

    def _gathered(self, name: str) -> Array:
        """X, Y or Z of all rows, block by block."""
        place = 1 + "XYZ".index(name)
        parts = [block[place].copy() for block in self._blocks(0, BLOCK, name)]
        return self.ops.xp.concatenate(parts)

    def _whole(self, position: int) -> Array:
        if self.resident:
            return self._arrays[position]
        return self.ops.asarray(self._arrays[position][self._index], self.dtype)

    # -- sums ------------------------------------------------------------------------------------

    def sum(
        self,
        function: Callable[[Array, Array, Array | None], tuple[Array, ...]],
        *,
        block: int = BLOCK,
        largest: int = LARGEST_BLOCK,
        wants: str = "XYZ",
    ) -> tuple[Array, ...]:
        """Sum over blocks of rows what a function of (X, Y, Z) returns, in float64.

        Over the rows of all ranks: all must ask for the same sums in the same order.

        Parameters
        ----------
        function : callable
            Of a block's rows: X (p, m'), Y and Z (p, n). May be asked for a block again, in
            smaller parts, when memory runs out.
        block : int
            Rows a block on the CPU; on a device at least so many, as memory allows.
        largest : int
            At most so many.
        wants : str
            Which of X, Y and Z the function looks at; the others may be None.

        Raises
        ------
        BackendError
            When not even a small block fits.
        """
        memory = self.ops.memory
        if (block, largest) not in self._sizes:
            rows = memory.block_rows(block, largest, self._bytes_a_row())
            self._sizes[block, largest] = rows
        size = self._sizes[block, largest]
        totals: tuple[Array, ...] = ()
        done = 0
        while done < self._count:
            try:
                for count, X, Y, Z in self._blocks(done, size, wants):
                    parts = function(X, Y, Z)
                    if totals:
                        for total, part in zip(totals, parts, strict=True):
                            total += part
                    else:
                        totals = tuple(self.ops.xp.array(part, dtype="float64") for part in parts)
                    done += count
            except memory.errors as error:
                size = self._smaller(size, error)
        if not totals and self.rows:  # none on this rank: zeros of the right shapes
            parts = function(*self._nothing())
            totals = tuple(self.ops.xp.array(part, dtype="float64") for part in parts)
        return self.group.sum(totals, self.ops.xp)

    def _nothing(self) -> tuple[Array, Array, Array | None]:
        """A block of no rows."""
        width = self._arrays[0].shape[1]
        if self._source is not None:
            _, basis, taps = self._source
            width = len(basis) * taps
        empty = self.ops.xp.zeros((0, width), self.dtype)
        responses = (self.ops.asarray(array[:0], self.dtype) for array in self._arrays[1:])
        return self._triple(empty, *responses)[1:]

    def _bytes_a_row(self) -> int:
        """Inputs and responses, the inputs once more for a basis, Z of the iterate and R."""
        inputs, responses = self._arrays[0].shape[1], self._arrays[1].shape[1]
        return (2 * inputs + 4 * responses) * self.dtype.itemsize

    def _smaller(self, size: int, error: BaseException) -> int:
        size = min(size, self._count) // 2
        if size < SMALLEST_BLOCK:
            raise BackendError(
                complain(
                    f"out of memory on {self.ops.device} with blocks of {2 * size} rows",
                    "memory for a block and a few matrices of the size of the weight and its Gram",
                    "Free memory on the device, or use device='cpu'.",
                )
            ) from error
        self.ops.memory.release()
        message = f"out of memory on {self.ops.device}: going on with blocks of {size} rows"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        self._sizes = {limits: min(rows, size) for limits, rows in self._sizes.items()}
        return size

    def _blocks(self, first: int, size: int, wants: str = "XYZ") -> Iterator[tuple]:
        """Blocks from a row on: how many rows, X, Y and Z."""
        if self.resident:
            X = self.X
            for start in range(first, self._count, size):
                rows = slice(start, start + size)
                yield self._triple(X[rows], *(array[rows] for array in self._arrays[1:]))
            return
        for X, *responses in self.ops.memory.stream(self._arrays, self._index[first:], size):
            if self._mean is not None:
                X = X - self._mean
            yield self._triple(self._in_basis(X), *responses)

    def _in_basis(self, X: Array) -> Array:
        if self._source is None:
            return X
        _, basis, taps = self._source
        return to_basis(self.ops.xp, X, basis, taps)

    def _triple(self, X: Array, Y: Array, Z: Array | None = None) -> tuple:
        return len(X), X, Y, (Y if self._same else Z)
