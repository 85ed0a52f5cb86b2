"""Rows of a layer that pass by in blocks, as `Samples`.

In: a `LayerIO`, which rows are fitted and which are held out. Out: their `Samples`. Rows from
arrays are as `slr_gpu.samples` says. Of rows that pass by (`slr_gpu.blocks`) the fitted ones are
visited in every pass, cut into the blocks that a sum asks for; responses that the source does not
bring are computed on the way. What would otherwise cost passes of its own is kept in memory from
the first pass: held-out rows, and thinned fitted ones for rough estimates. So are all fitted rows
where there are fewer of them than columns, or where a problem works by rows: they take less
memory than the Gram matrix would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy

from .activations import Activation
from .blocks import Kept
from .layer_io import LayerIO
from .ops import NumpyOps
from .parallel import ALONE
from .samples import Samples

Array = Any

# Most bytes of held-out rows that are kept; of more, evenly spread ones judge.
KEPT_BYTES = 256 * 2**20
# About so many fitted rows are kept for rough estimates.
ESTIMATE_ROWS = 2048
# Rows between two gaps from which on they are copied as a run.
RUN = 64


class Roles:
    """What Y and Z of some rows are, from what is known of them.

    Parameters
    ----------
    layer_io : LayerIO
    linear : bool
        Whether the responses before the activation are aimed at, as Y too.
    """

    def __init__(self, layer_io: LayerIO, linear: bool) -> None:
        self.layer_io, self.linear = layer_io, linear
        self.activation: Activation = layer_io.activation

    def pair(
        self, ops: NumpyOps, own: Callable[[], Array], Y: Array, Z: Array, wants: str = "YZ"
    ) -> tuple[Array | None, Array | None]:
        """Y and Z on the device.

        Parameters
        ----------
        own : callable
            Makes the layer's own responses before the activation.
        Y, Z : array or None
            The responses wanted after and before it, where the source brings them.
        wants : str
            What is not wanted and not there is not made.
        """
        if self.linear:
            if Y is None or not self.activation.is_identity:
                Y = own() if Z is None else Z
            return Y, Y
        if Z is None and ("Z" in wants or Y is None):
            Z = own()
        return (self.activation.value(ops, Z) if Y is None else Y), Z

    def needed(self, wants: str) -> tuple[bool, bool, bool]:
        """Which of the source's X, Y, Z make up what is wanted."""
        _, has_Y, has_Z = self.layer_io.blocks.given
        if self.linear:
            takes_Y = has_Y and self.activation.is_identity
            Y, Z = takes_Y, has_Z and not takes_Y
            Y, Z = (Y and wants != "X"), (Z and wants != "X")
            return "X" in wants or not (takes_Y or has_Z), Y, Z
        Y = has_Y and "Y" in wants
        Z = has_Z and ("Z" in wants or ("Y" in wants and not has_Y))
        own = not has_Z and ("Z" in wants or ("Y" in wants and not has_Y))
        return "X" in wants or own, Y, Z


def split_samples(
    layer_io: LayerIO,
    ops: NumpyOps,
    fitted: Array,
    held: Array,
    dtype: Any,
    *,
    linear: bool,
    whole: bool,
) -> tuple[Samples, Callable[[], Samples], Array]:
    """The rows to fit on and those that are held out.

    Parameters
    ----------
    fitted, held : int array
        Numbers of rows, ascending.
    dtype : dtype
        Of the samples.
    linear : bool
        Whether responses before the activation are aimed at; held-out rows judge after it.
    whole : bool
        Whether the fitted rows are needed all at once.

    Returns
    -------
    samples : Samples
    held : callable
        Makes those of the held-out rows; to be called after the first pass over the others.
    judging : int array
        The held-out rows that it will have.
    """
    blocks = layer_io.blocks
    if blocks is None:
        roles = Roles(layer_io, linear)
        Y, Z = roles.pair(
            layer_io.ops, lambda: layer_io.responses, layer_io.targets, layer_io.linear_targets
        )
        group = layer_io.group
        samples = Samples(ops, layer_io.inputs, Y, Z, fitted, dtype, group)

        def held_samples() -> Samples:
            return Samples(ops, layer_io.inputs, layer_io.targets, None, held, dtype, group)

        return samples, held_samples, held
    bytes_a_row = sum(layer_io.weight.shape) * dtype.itemsize
    held = held[:: max(1, -(-len(held) * bytes_a_row // KEPT_BYTES))]
    if whole or len(fitted) < layer_io.weight.shape[1]:
        kept = blocks.gather(fitted, held)
        samples = _resident(layer_io, ops, kept[0], dtype, linear)
        return samples, lambda: _resident(layer_io, ops, kept[1], dtype, False, judging=True), held
    samples = StreamedSamples(layer_io, ops, fitted, dtype, linear, Kept(held))

    def kept_samples() -> Samples:
        arrays = samples.held.arrays
        samples.held = None  # they are copied, to the device or to where they will be centred
        return _resident(layer_io, ops, arrays, dtype, False, judging=True)

    return samples, kept_samples, held


def _resident(
    layer_io: LayerIO,
    ops: NumpyOps,
    arrays: tuple,
    dtype: Any,
    linear: bool,
    *,
    judging: bool = False,
) -> Samples:
    """Samples of rows that were kept."""
    X, Y, Z = arrays
    host = NumpyOps()

    def own() -> Array:
        return X @ layer_io.weight.T + layer_io.bias

    Y, Z = Roles(layer_io, linear).pair(host, own, Y, Z, "Y" if judging else "YZ")
    index = numpy.arange(len(X))
    return Samples(ops, X, Y, None if judging else Z, index, dtype)


class StreamedSamples(Samples):
    """Fitted rows that pass by.

    Parameters
    ----------
    layer_io : LayerIO
        With blocks.
    ops : NumpyOps
    index : int array
        The rows that count, ascending.
    dtype : dtype
        Of the samples.
    linear : bool
        See `Roles`.
    held : Kept
        Other rows, to be kept when they first pass by.
    """

    def __init__(
        self,
        layer_io: LayerIO,
        ops: NumpyOps,
        index: Array,
        dtype: Any,
        linear: bool,
        held: Kept,
    ) -> None:
        self.ops, self.rows, self.dtype = ops, len(index), dtype
        self.group, self._first, self._count = ALONE, 0, len(index)
        self.layer_io, self.held, self._index = layer_io, held, index
        self.resident, self._mean, self._source = False, None, None
        self._sizes: dict[tuple[int, int], int] = {}
        self._roles = Roles(layer_io, linear)
        self._step = max(1, -(-len(index) // ESTIMATE_ROWS))
        self._thin = Kept(index[:: self._step])
        self._keeping = (held, self._thin)
        self._weight = ops.asarray(layer_io.weight, self.dtype).T
        self._bias = ops.asarray(layer_io.bias, ops.xp.float64)

    @property
    def rough_means(self) -> tuple[Array, Array]:
        """Means over all rows, held-out ones included."""
        ops, (x_mean, y_mean, z_mean) = self.ops, self.layer_io.blocks.means
        x_mean = ops.asarray(x_mean)

        def own() -> Array:
            return x_mean @ self._weight.astype("float64") + self._bias

        given = [None if mean is None else ops.asarray(mean) for mean in (y_mean, z_mean)]
        return x_mean, self._roles.pair(ops, own, *given)[1]

    def centre(self, mean: Array) -> None:
        """Subtract these column means (m,) from X instead of any before."""
        self._mean = self.ops.to_numpy(mean.astype(self.dtype))

    def thinned(self, step: int) -> Samples:
        """Every step-th row, in memory; without a pass for the step that is kept."""
        if self._source is not None:
            source, basis, taps = self._source
            return source.thinned(step).turned(basis, taps)
        if step == self._step and self._thin.arrays[0] is not None:
            arrays = self._thin.arrays
        else:
            (arrays,) = self.layer_io.blocks.gather(self._index[::step])
        samples = _resident(self.layer_io, self.ops, arrays, self.dtype, self._roles.linear)
        samples.centre(self.ops.asarray(self._mean))
        return samples

    @property
    def Y(self) -> Array:
        return self._gathered("Y")

    @property
    def Z(self) -> Array:
        return self._gathered("Z")

    def _bytes_a_row(self) -> int:
        outputs, inputs = self.layer_io.weight.shape
        return (2 * inputs + 4 * outputs) * self.dtype.itemsize

    def _blocks(self, first: int, size: int, wants: str = "XYZ") -> Iterator[tuple]:
        needed = self._roles.needed(wants)
        for block in self.ops.memory.carry(self._cuts(first, size, needed), size):
            count, parts = len(block[0]), iter(block)
            X, Y, Z = (next(parts) if need else None for need in needed)

            def own(X=X) -> Array:
                offset = self._bias
                if self._mean is not None:
                    offset = offset + self.ops.asarray(self._mean) @ self._weight
                return X @ self._weight + offset.astype(self.dtype)

            if wants != "X":
                Y, Z = self._roles.pair(self.ops, own, Y, Z, wants)
            yield count, self._in_basis(X) if "X" in wants else None, Y, Z

    def _cuts(self, first: int, size: int, needed: tuple[bool, ...]) -> Iterator[tuple[Array, ...]]:
        """The rows from the `first` on in cuts of `size`, centred, in one buffer."""
        index = self._index[first:]
        size = min(size, len(index))
        buffers, filled = None, 0
        means = [mean for mean, need in zip((self._mean, None, None), needed, strict=True) if need]
        for start, arrays in self.layer_io.blocks:
            for kept in self._keeping:
                kept.take(start, arrays)
            low, high = numpy.searchsorted(index, [start, start + len(arrays[0])])
            taken = [array for array, need in zip(arrays, needed, strict=True) if need]
            if buffers is None:
                buffers = [numpy.empty((size, a.shape[1]), self.dtype) for a in taken]
            while low < high:
                count = min(high - low, size - filled)
                rows = index[low : low + count] - start
                gaps = numpy.flatnonzero(numpy.diff(rows) > 1)
                if len(gaps) * RUN <= count:  # long runs one by one, without a gather
                    count = int(gaps[0]) + 1 if len(gaps) else count
                    rows = slice(rows[0], rows[0] + count)
                place = slice(filled, filled + count)
                for buffer, array, mean in zip(buffers, taken, means, strict=True):
                    if mean is None:
                        buffer[place] = array[rows]
                    else:
                        numpy.subtract(array[rows], mean, out=buffer[place])
                filled, low = filled + count, low + count
                if filled == size:
                    yield tuple(buffers)
                    filled = 0
        # What was kept is whole now.
        self._keeping = ()
        if filled:
            yield tuple(buffer[:filled] for buffer in buffers)
