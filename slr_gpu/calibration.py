"""Calibration data of any size and kind, read once and checked, as `Batches`.

In: what `as_batches` takes. Out: batches of the model's arguments. What is in memory already stays
there, and so does what fits the limit; the rest is read anew in every pass over it, and each batch
is compared with the CRC-32 that it had in the first. That pass also looks for NaN and Inf.
"""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .batches import Batch, Batches, Layout, Named, bytes_of, first_tensor, mapped
from .errors import InputError, complain
from .sample_files import SampleFiles, load_array
from .spill import check_limit, usual_limit

# Numbered batches of a source as it yields them; all of them, or those of some numbers.
_Read = Callable[[Sequence[int] | None], Iterator[tuple[int, Any]]]


def as_batches(
    data: Any, model: nn.Module, batch_size: int, memory_limit: float | None = None
) -> Batches:
    """Calibration data as batches of a model's arguments.

    Parameters
    ----------
    data : array, tensor, iterable of batches, Dataset, DataLoader, path or callable
        One array (N, ...), also a memory-mapped one or that of an ``.npz`` file, is cut into
        batches, and so are a Dataset with numbered samples and the arrays in a folder of ``.npy``
        files, one after another in the order of their names. A batch is a tensor, a sequence whose leading items are the model's
        arguments (what follows them, labels, is dropped), or a dict of arguments by name; an
        IterableDataset yields batches too. A callable without arguments returns any of these, or an
        iterator of batches, and then it is called again for each pass.
    memory_limit : int, optional
        Bytes up to which batches that an iterable, Dataset or file yields are held in memory, by
        default a quarter of what is available. Beyond it the source is read in every pass, and must
        yield the same each time.

    Raises
    ------
    InputError
        No data, a single sample, or NaN or Inf in it; a file that is cut short or unlike the
        others; an iterator that is too large to be held and cannot be started again. In later
        passes: a source that does not yield what it did.
    """
    limit = usual_limit() if memory_limit is None else check_limit(memory_limit)
    if callable(data) and not isinstance(data, (nn.Module, Dataset, Iterable)):
        made = _called(data)
        if not isinstance(made, Iterator):
            return as_batches(made, model, batch_size, memory_limit)
        ready = [made]
        return _Checked(_passes(lambda: ready.pop() if ready else data()), model).batches(limit)
    if isinstance(data, (str, Path)) and Path(data).suffix == ".npz":
        data = load_array(data)
    if isinstance(data, (np.ndarray, Tensor)):
        return _Checked(_passes(lambda: _cut(data, batch_size)), model).batches(float("inf"))
    if isinstance(data, (str, Path)):
        files = SampleFiles(data, batch_size)
        return _Checked(files.read, model, files.place).batches(limit)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return _Checked(_of_samples(data, batch_size), model).batches(limit)
    if isinstance(data, Iterable) and not isinstance(data, (bytes, dict, nn.Module)):
        in_memory = isinstance(data, (list, tuple))
        checked = _Checked(_passes(lambda: data), model, once=isinstance(data, Iterator))
        return checked.batches(float("inf") if in_memory else limit)
    raise InputError(
        complain(
            f"calibration_data of {type(data).__name__}",
            "a tensor, an array, an iterable of batches, a Dataset or a folder of .npy files",
            "Pass inputs, e.g. a tensor (N, ...).",
        )
    )


# -- sources -------------------------------------------------------------------------------------


def _called(function: Callable[[], Any]) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InputError(
            complain(
                f"calibration_data {getattr(function, '__name__', function)!r}: {error}",
                "a function without arguments that returns batches",
                "Bind its arguments, e.g. with functools.partial.",
            )
        ) from error
    return function()


def _cut(data: np.ndarray | Tensor, batch_size: int) -> Sequence[Tensor]:
    if isinstance(data, np.ndarray):
        data = _tensor(data)
    return data.split(batch_size) if data.ndim and len(data) else []


def _tensor(array: np.ndarray) -> Tensor:
    """The same memory, also where that is a file opened for reading; nobody writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        backwards = any(stride < 0 for stride in array.strides)  # torch has no such tensors
        return torch.from_numpy(array.copy() if backwards else array)


def _passes(start: Callable[[], Iterable[Any]]) -> _Read:
    """A source that can only be gone through from its start."""

    def read(numbers: Sequence[int] | None) -> Iterator[tuple[int, Any]]:
        if numbers is None:
            yield from enumerate(start())
            return
        left = set(numbers)
        for number, batch in enumerate(start() if left else ()):
            if number in left:
                left.remove(number)
                yield number, batch
                if not left:
                    return

    return read


def _of_samples(data: Dataset, batch_size: int) -> _Read:
    """Numbered samples, collated as a DataLoader does."""
    try:
        count = len(data)
    except TypeError as error:
        raise InputError(
            complain(
                f"a {type(data).__name__} without a length",
                "a Dataset with __len__ and __getitem__, or an iterable of batches",
                "Wrap it in a DataLoader.",
            )
        ) from error

    def read(numbers: Sequence[int] | None) -> Iterator[tuple[int, Any]]:
        numbers = range(-(-count // batch_size)) if numbers is None else numbers
        samples = [
            list(range(number * batch_size, min((number + 1) * batch_size, count)))
            for number in numbers
        ]
        return zip(numbers, DataLoader(data, batch_sampler=samples), strict=True)

    return read


# -- what they yield -----------------------------------------------------------------------------


class _Checked:
    """A source whose batches are made arguments of a model, and checked.

    Parameters
    ----------
    read : callable
    model : nn.Module
    place : callable
        Where a sample comes from, to be said in a message.
    once : bool
        Whether the source cannot be read again.
    """

    def __init__(
        self,
        read: _Read,
        model: nn.Module,
        place: Callable[[int], str] = lambda sample: "",
        once: bool = False,
    ) -> None:
        self.source, self.model, self.place, self.once = read, model, place, once
        self.sizes: list[int] = []
        self.checksums: list[int] = []

    def batches(self, limit: float) -> Batches:
        """Read all once; hold them if they take no more bytes than the limit."""
        held: list[Batch] | None = []
        layouts, nbytes, first = set(), 0, None
        for number, raw in self.source(None):
            batch = _arguments(self.model, raw)
            self._check(batch, number)
            self.sizes.append(len(first_tensor(batch)))
            layouts.add(Layout.of(batch))
            nbytes += bytes_of(batch)
            first = batch if first is None else first
            if held is not None:
                held.append(batch)
            if nbytes > limit and self.once:
                raise InputError(
                    complain(
                        f"calibration batches of more than memory_limit={limit:.0f} bytes from an"
                        f" iterator ({type(raw).__name__} number {number}), which cannot be"
                        " started again",
                        "data that can be gone through several times",
                        "Pass the function that makes the iterator, a DataLoader, a Dataset or a"
                        " folder of .npy files, or raise memory_limit.",
                    )
                )
            if nbytes > limit:
                waiting, held = ([batch] if held is None else held), None
                self.checksums += map(_checksum, waiting)
        count = sum(self.sizes)
        if count < 2:
            raise InputError(
                complain(f"{count} calibration sample(s)", "at least 2", "Some hundreds are usual.")
            )
        if held is not None:
            return Batches.of(held)
        numbers = range(len(self.sizes))
        return Batches(self.sizes, numbers, frozenset(layouts), nbytes, first, False, self._again)

    def _again(self, numbers: Sequence[int]) -> Iterator[tuple[int, Batch]]:
        """Some batches once more; InputError where they are not what they were."""
        left = len(numbers)
        for number, raw in self.source(numbers):
            batch = _arguments(self.model, raw)
            if _checksum(batch) != self.checksums[number]:
                raise _changed(f"another batch {number}")
            left -= 1
            yield number, batch
        if left:
            raise _changed(f"no batch {numbers[-left]}")

    def _check(self, batch: Batch, number: int) -> None:
        for item in batch:
            if not isinstance(item, Tensor) or not item.is_floating_point():
                continue
            if not torch.isfinite(item).all():
                where = f"calibration batch {number}"
                if item.ndim and len(item) == len(first_tensor(batch)):
                    bad = ~torch.isfinite(item).reshape(len(item), -1).all(1)
                    row = int(bad.nonzero()[0])
                    sample = sum(self.sizes) + row
                    where += f", in its sample {row} (sample {sample} of all{self.place(sample)})"
                raise InputError(
                    complain(
                        f"NaN or Inf in {where}", "finite inputs", "Check the calibration data."
                    )
                )


def _changed(what: str) -> InputError:
    return InputError(
        complain(
            f"calibration data that yielded {what} when it was read again",
            "the same batches in every pass",
            "Read them in a fixed order without random changes (shuffle=False, no augmentation), or"
            " raise memory_limit so that they are read once and held.",
        )
    )


def _checksum(batch: Batch) -> int:
    """CRC-32 of the tensors of a batch with their shapes."""
    value = 0
    for item in batch:
        if isinstance(item, Tensor):
            value = zlib.crc32(f"{item.dtype} {tuple(item.shape)}".encode(), value)
            flat = item.detach().cpu().contiguous().reshape(-1)
            value = zlib.crc32(flat.view(torch.uint8).numpy(), value)
    return value


def _arguments(model: nn.Module, batch: Any) -> Batch:
    """The model's arguments in what a loader yields, arrays as tensors."""
    items = mapped(
        lambda item: _tensor(item) if isinstance(item, np.ndarray) else item,
        _leading(model, batch),
    )
    if not any(isinstance(item, Tensor) and item.ndim for item in items):
        raise InputError(
            complain(
                f"a batch of {type(batch).__name__}",
                "a tensor, or a tuple that starts with the model's arguments",
                "Yield tensors.",
            )
        )
    return items


def _leading(model: nn.Module, batch: Any) -> Batch:
    if isinstance(batch, Mapping):
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(**batch)
        except TypeError as error:
            raise InputError(
                complain(
                    f"a batch of {type(batch).__name__} with {', '.join(map(str, batch))}: {error}",
                    f"arguments of forward{signature}",
                    "Name all that it needs, and leave the others out.",
                )
            ) from error
        # The first argument comes first: its length is that of the batch.
        order = sorted(batch, key=lambda name: [*bound.arguments, name].index(name))
        return Named(order, [batch[name] for name in order])
    items = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
    return items[: _argument_count(model)]


def _argument_count(model: nn.Module) -> int:
    """How many positional arguments a model's forward takes without defaults, at least one."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return 1
    needed = [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    return max(1, len(needed))
