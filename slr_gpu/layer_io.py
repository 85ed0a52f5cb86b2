"""The arrays around one layer: its weight, rows of its input and the responses wanted for them.

In: plain arrays (NumPy, CuPy or torch). Out: checked arrays in one layout (DESIGN 2):
``weight (n, m)``, ``inputs (P, m)``, ``targets (P, n)``; for a convolution m = c * prod(kernel)
with input channel c owning neighbouring columns, and a row of inputs is one im2col row. Rows that
do not fit in memory come as blocks that can be visited again and again (`slr_gpu.blocks`).
"""

from __future__ import annotations

import json
import numbers
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from . import activations
from .blocks import Blocks, float_kind
from .errors import InputError, complain
from .ops import NumpyOps, get_ops, why_not_cuda
from .parallel import ALONE, Group
from .shards import ROLES
from .storage import load_arrays, save_arrays

Array = Any


def _ops_for(array: Any) -> NumpyOps:
    """The operations of the device that holds an array; the CPU's where none are to be had."""
    if getattr(array, "is_cuda", False):  # torch
        index = array.device.index
    elif hasattr(array, "__cuda_array_interface__"):
        index = array.device.id
    else:
        return NumpyOps()
    return get_ops(f"cuda:{index}") if why_not_cuda(index) is None else NumpyOps()


def _floating(ops: NumpyOps, name: str, array: Any) -> Array:
    """To an array of float32 or float64 without NaN or Inf, on the device of `ops`."""
    xp, array = ops.xp, ops.asarray(array)
    if array.dtype.kind not in "fiub":
        raise InputError(
            complain(f"{name} of dtype {array.dtype}", "real numbers", "Convert it to float32.")
        )
    array = array.astype(float_kind(array.dtype), copy=False)
    # A sum is finite only if no entry is NaN or Inf; the exact test runs only if it is not.
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(array.sum(dtype=np.float64))
    if not np.isfinite(total) and not bool(xp.isfinite(array).all()):
        rows = ops.to_numpy(xp.argwhere(~xp.isfinite(array)))
        raise InputError(
            complain(
                f"{len(rows)} NaN or Inf in {name}, the first at index {tuple(rows[0].tolist())}",
                "finite numbers",
                "Check the weights and the calibration data.",
            )
        )
    return array


def _checked_kernel(kernel_size: Any) -> tuple[int, ...]:
    """A kernel size as a tuple of integers."""
    sizes = tuple(kernel_size) if isinstance(kernel_size, Iterable) else (kernel_size,)
    if not all(isinstance(k, numbers.Integral) and k >= 1 for k in sizes):
        raise InputError(
            complain(
                f"kernel_size={kernel_size!r}", "integers >= 1", "Pass the layer's own kernel_size."
            )
        )
    return tuple(int(k) for k in sizes)


def held_out_samples(count: int, held_out: float, fold: int = 0) -> np.ndarray:
    """Which of so many samples judge and are not fitted on, bool (count,): evenly spread ones.

    Other folds hold others out; ``round(1 / held_out)`` of them hold each one out once.
    """
    if held_out == 0 or count < 2:
        return np.zeros(count, bool)
    step = max(2, round(1 / held_out))
    return np.arange(count) % step == min(step, count) - 1 - fold


class LayerIO:
    """One layer with calibration rows.

    Arrays stay where `inputs` are: in host memory, or on the CUDA device that holds them (CuPy
    arrays and torch tensors, without a copy) if CuPy works on it. Memory-mapped `inputs` (and
    targets beside them) that are too large for the machine's memory are visited in blocks, as with
    `from_blocks`.

    Parameters
    ----------
    weight : array, (n, m) or (n, c, *kernel)
    bias : array, (n,), or None
        None stands for zeros.
    inputs : array, (P, m)
    targets : array, (P, n), optional
        Responses wanted **after** the activation. Defaults to the layer's own,
        ``r(inputs @ weight.T + bias)``.
    activation : str or Activation
        See `slr_gpu.activations`.
    kernel_size : tuple of int, optional
        Spatial kernel; taken from a weight of more than two dimensions. None for linear layers.
    linear_targets : array, (P, n), optional
        Responses wanted **before** the activation, where known: the start of the after-activation
        fit. Defaults to ``inputs @ weight.T + bias``. Without `targets`, these define them.
    sample_ids : int array, (P,), optional
        Which calibration sample a row came from, ascending; held-out rows are split off by whole
        samples, since rows of one sample are alike. By default every row is its own sample.
    sample_count : int, optional
        How many samples there are, where `sample_ids` are numbers below it and some may have no row
        of this layer. Then the same samples are held out of all layers of a model.
    group : Group, optional
        The ranks of `slr_gpu.parallel` that the rows are spread over: these are this rank's, and
        `fit` is called on all ranks and returns the same on all.

    Attributes
    ----------
    blocks : Blocks or None
        The rows, where they are visited in blocks; then there are no `inputs` and `targets`.

    Raises
    ------
    InputError
        For shapes that do not fit, fewer than two rows, NaN or Inf.
    """

    def __init__(
        self,
        weight: Any,
        bias: Any,
        inputs: Any,
        targets: Any = None,
        activation: str | activations.Activation = "relu",
        kernel_size: tuple[int, ...] | None = None,
        *,
        linear_targets: Any = None,
        sample_ids: Any = None,
        sample_count: int | None = None,
        group: Group = ALONE,
    ) -> None:
        arrays = dict(zip(ROLES, (inputs, targets, linear_targets), strict=True))
        self._describe(weight, bias, activation, kernel_size, _ops_for(inputs), group)
        n, m = self.weight.shape
        alone = group.size == 1
        if alone and isinstance(inputs, np.memmap) and not self._may_be_read(inputs):
            self._visit(Blocks(arrays, m, n), sample_ids, sample_count)
            return
        with group.together():
            self.inputs = self._checked("inputs", inputs, (None, m))
        count = len(self.inputs)
        before, total = group.span(count)
        if total < 2:
            raise InputError(
                complain(
                    f"{total} calibration row(s)", "at least 2", "Pass more calibration inputs."
                )
            )
        with group.together():
            self.linear_targets = self._checked("linear_targets", linear_targets, (count, n))
            self.targets = self._checked("targets", targets, (count, n))
        if self.targets is None:
            response = self.linear_targets
            if response is None:
                response = self.responses
            self.targets = self.activation.value(self.ops, response)
        elif self.targets.dtype != self.inputs.dtype:
            self.targets = self.targets.astype(self.inputs.dtype)
        self.rows, self.dtype = count, self.inputs.dtype
        self._name_samples(sample_ids, sample_count, before)

    @classmethod
    def from_blocks(
        cls,
        weight: Any,
        bias: Any,
        blocks: Any,
        activation: str | activations.Activation = "relu",
        kernel_size: tuple[int, ...] | None = None,
        *,
        sample_ids: Any = None,
        show_progress: bool = True,
    ) -> LayerIO:
        """A layer with calibration rows that pass by in blocks and are not kept.

        Every solver then makes passes over the blocks, with the same result as from arrays. In
        memory are one block, what has the size of the Gram matrix, and bounded subsets of the rows:
        at most `slr_gpu.streamed.KEPT_BYTES` of the held-out ones (above that evenly spread ones
        of them judge, and a note says so) and 2048 of the others. Responses that the blocks do not
        bring are computed in every pass, which costs a product more.

        Parameters
        ----------
        weight, bias, activation, kernel_size, sample_ids
            As for `LayerIO`.
        blocks : iterable, function, Shards, or array(s)
            What can be iterated again and again and yields the same blocks each time: a list, an
            object with ``__iter__`` (a DataLoader that does not shuffle), a function without
            arguments that makes an iterator, `slr_gpu.open_shards` of a folder, a memory-mapped
            array, or a mapping of these by name. A block is ``inputs`` (p, m) or a tuple
            ``(inputs, targets)`` or ``(inputs, targets, linear_targets)`` with None for what is
            missing, or a mapping with these names, of any number of rows.
        show_progress : bool
            Whether passes longer than two seconds show a bar on a terminal.

        Raises
        ------
        InputError
            After one pass over the blocks: see `slr_gpu.blocks.Blocks`.
        """
        self = cls.__new__(cls)
        self._describe(weight, bias, activation, kernel_size, NumpyOps())
        n, m = self.weight.shape
        self._visit(Blocks(blocks, m, n, show_progress=show_progress), sample_ids)
        return self

    def _describe(
        self,
        weight: Any,
        bias: Any,
        activation: Any,
        kernel_size: Any,
        ops: NumpyOps,
        group: Group = ALONE,
    ) -> None:
        """The layer itself, checked."""
        self.ops, self.blocks, self.group = ops, None, group
        weight = _floating(self.ops, "weight", weight)
        if weight.ndim < 2:
            raise InputError(
                complain(
                    f"weight of shape {weight.shape}", "(n, m) or (n, c, *kernel)", "Reshape it."
                )
            )
        if kernel_size is None:
            kernel_size = weight.shape[2:]
        self.kernel_size = _checked_kernel(kernel_size)
        self.weight = weight.reshape(len(weight), -1)
        self.activation = activations.get(activation)
        n, m = self.weight.shape
        if min(n, m) == 0 or m % self.taps:
            raise InputError(
                complain(
                    f"weight {weight.shape} with kernel_size {self.kernel_size}",
                    "n >= 1 and m a multiple of the kernel's taps",
                    "Pass the layer's own kernel_size.",
                )
            )
        self.bias = (
            self.ops.xp.zeros(n, self.weight.dtype)
            if bias is None
            else self._checked("bias", bias, (n,))
        )

    def _may_be_read(self, inputs: np.memmap) -> bool:
        """Whether the rows, their responses and a copy of both fit in the machine's memory."""
        width = sum(self.weight.shape) + len(self.weight)
        return NumpyOps.memory.holds(2 * 4 * len(inputs) * width)

    def _visit(self, blocks: Blocks, sample_ids: Any, sample_count: int | None = None) -> None:
        self.blocks, self.rows, self.dtype = blocks, blocks.rows, blocks.dtype
        self._name_samples(sample_ids, sample_count)

    def _name_samples(self, sample_ids: Any, count: int | None, before: int = 0) -> None:
        if sample_ids is None:
            sample_ids = np.arange(before, before + self.rows)
        ids = np.asarray(self.ops.to_numpy(self.ops.asarray(sample_ids)))
        if ids.shape != (self.rows,) or ids.dtype.kind not in "iu" or np.any(ids[1:] < ids[:-1]):
            raise InputError(
                complain(
                    f"sample_ids of shape {ids.shape} and dtype {ids.dtype}",
                    f"integers ({self.rows},), ascending",
                    "Number the samples, and sort the rows by them.",
                )
            )
        self.sample_count, self.sample_ids = count, ids
        if count is not None and np.any((ids < 0) | (ids >= count)):
            raise InputError(
                complain(
                    f"sample_ids from {ids[0]} to {ids[-1]}",
                    f"numbers below sample_count={count}",
                    "Pass the number of all samples, or leave it out.",
                )
            )

    def __getattr__(self, name: str) -> Any:
        if name in (*ROLES, "responses"):
            raise AttributeError(
                complain(
                    f"{name} of a layer whose rows pass by in blocks",
                    "arrays in memory",
                    "Iterate over `blocks`, or make the LayerIO from arrays.",
                )
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _checked(self, name: str, array: Any, shape: tuple[int | None, ...]) -> Array | None:
        if array is None:
            return None
        array = _floating(self.ops, name, array)
        fits = array.ndim == len(shape) and all(
            want is None or want == got for want, got in zip(shape, array.shape, strict=True)
        )
        if not fits:
            want = "(" + ", ".join("P" if d is None else str(d) for d in shape) + ")"
            raise InputError(
                complain(f"{name} of shape {array.shape}", want, "One row is one sample.")
            )
        return array

    @property
    def taps(self) -> int:
        return int(np.prod(self.kernel_size, dtype=int))

    @property
    def channels(self) -> int:
        return self.weight.shape[1] // self.taps

    @cached_property
    def responses(self) -> Array:
        """The layer's own responses (P, n) to these inputs, before the activation."""
        return self.inputs @ self.weight.T + self.bias

    def __repr__(self) -> str:
        n, m = self.weight.shape
        return (
            f"LayerIO(n={n}, m={m}, rows={self.rows}, kernel_size={self.kernel_size},"
            f" activation={self.activation.name!r})"
        )

    def split(self, held_out: float, fold: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers to fit on and to hold out, by whole samples spread evenly over the data.

        Numbers of this rank's rows; which they are does not depend on how many ranks there are.

        Rows without samples of their own are taken in 64 neighbouring runs, because neighbours
        (positions of one image, frames of one sound) are often alike. Samples are counted anew
        where `sample_count` is not known, or all or none of those that have rows would be held out.
        For other folds see `held_out_samples`.
        """
        before, total = self.group.span(len(self.sample_ids))
        number, count = self.group.gather(self.sample_ids), self.sample_count
        held = 0 if count is None else held_out_samples(count, held_out)[number].sum()
        if not 0 < held < total:
            samples, number = np.unique(number, return_inverse=True)
            if len(samples) == total:
                number = number * min(64, total) // total
            count = int(number.max()) + 1
        own = number[before : before + len(self.sample_ids)]
        chosen = held_out_samples(count, held_out, fold)[own]
        return np.flatnonzero(~chosen), np.flatnonzero(chosen)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, atomically.

        Raises
        ------
        InputError
            For rows that pass by in blocks.
        """
        if self.blocks is not None:
            raise InputError(
                complain(
                    "a layer whose rows pass by in blocks",
                    "arrays in memory",
                    "Keep the files or the function that the blocks come from.",
                )
            )
        names = ("weight", "bias", "inputs", "targets", "linear_targets")
        arrays = {name: getattr(self, name) for name in names}
        host = {name: self.ops.to_numpy(a) for name, a in arrays.items() if a is not None}
        save_arrays(
            path,
            host | {"sample_ids": self.sample_ids},
            kind="layer_io",
            metadata={
                "activation": self.activation.name,
                "kernel_size": json.dumps(list(self.kernel_size)),
                "sample_count": json.dumps(self.sample_count),
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> LayerIO:
        """Read what `save` wrote; InputError when it is missing, cut short or another kind."""
        arrays, metadata = load_arrays(path, kind="layer_io")
        return cls(
            **arrays,
            activation=metadata["activation"],
            kernel_size=tuple(json.loads(metadata["kernel_size"])),
            sample_count=json.loads(metadata.get("sample_count", "null")),
        )
