"""Batches of a model's arguments, and a numbered set of them that can be gone through again.

In: tuples of arguments, positional or `Named`, as `slr_gpu.calibration` reads them. Out: `Batches`,
held in memory or read anew in every pass; the numbers and sizes of all are known, so that a subset
or some of the samples can be taken. `run_model` calls a model on one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from .errors import ModelError, complain
from .ops import NumpyOps

Batch = tuple[Any, ...]

# Batches after which memory that is held but not used is handed back.
TIDY_EVERY = 10


class Named(tuple):
    """A batch whose items are passed by name; many models take some of theirs only so."""

    names: tuple[str, ...]

    def __new__(cls, names: Iterable[str], items: Iterable[Any]) -> Named:
        self = super().__new__(cls, items)
        self.names = tuple(names)
        return self


def mapped(function: Callable[[Any], Any], batch: Batch) -> Batch:
    """A batch of the same kind, with a function applied to each item."""
    items = tuple(function(item) for item in batch)
    return Named(batch.names, items) if isinstance(batch, Named) else items


def by_position(model: nn.Module, batch: Batch) -> Batch:
    """A batch as positional arguments, with the defaults of those before the last one named.

    Empty where the model takes one of them by name alone.
    """
    if not isinstance(batch, Named):
        return batch
    bound = inspect.signature(model.forward).bind(**dict(zip(batch.names, batch, strict=True)))
    bound.apply_defaults()
    places = list(bound.arguments)
    last = max(places.index(name) for name in batch.names if name in places)
    return bound.args[: last + 1] if not set(batch.names) & set(bound.kwargs) else ()


def first_tensor(batch: Batch) -> Tensor:
    return next(item for item in batch if isinstance(item, Tensor) and item.ndim)


def first_samples(batch: Batch, count: int) -> Batch:
    """The arguments for the first samples of a batch."""
    return of_samples(lambda tensor: tensor[:count], batch)


def of_samples(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """A batch with a function applied to each tensor that has an entry a sample.

    What is no tensor, or not as long as the batch (a mask between positions), stays as it is.
    """
    size = len(first_tensor(batch))

    def applied(item: Any) -> Any:
        samples = isinstance(item, Tensor) and item.ndim and len(item) == size
        return function(item) if samples else item

    return mapped(applied, batch)


def bytes_of(batch: Batch) -> int:
    """Bytes of the tensors of a batch."""
    return sum(item.nbytes for item in batch if isinstance(item, Tensor))


class Layout(NamedTuple):
    """What the batches of one kind have in common.

    Attributes
    ----------
    names : tuple of str
        Empty where arguments go by position.
    shapes : tuple of (tuple of int or None)
        Of each item without its first dimension; None for what is no tensor or has no dimensions.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...] | None, ...]

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        shapes = (
            tuple(item.shape[1:]) if isinstance(item, Tensor) and item.ndim else None
            for item in batch
        )
        return cls(batch.names if isinstance(batch, Named) else (), tuple(shapes))


@dataclass(frozen=True)
class Batches:
    """Batches by number, gone through in ascending order as often as is wanted.

    Attributes
    ----------
    sizes : sequence of int
        Samples in each batch, of all of them whether they are in this subset or not.
    numbers : sequence of int
        The batches that this subset goes through.
    layouts : frozenset of Layout
        All that occur.
    nbytes : int
        Of all batches together.
    first : tuple
        Batch 0.
    held : bool
        Whether they are in memory (or mapped into it), or made of such, not read in every pass.
    read : callable
        ``read(numbers)`` yields (number, batch) for ascending numbers.
    """

    sizes: Sequence[int]
    numbers: Sequence[int]
    layouts: frozenset[Layout]
    nbytes: int
    first: Batch
    held: bool
    read: Callable[[Sequence[int]], Iterator[tuple[int, Batch]]]

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Batches:
        """Batches that are in memory; at least one."""
        return cls(
            sizes=[len(first_tensor(batch)) for batch in batches],
            numbers=range(len(batches)),
            layouts=frozenset(map(Layout.of, batches)),
            nbytes=sum(map(bytes_of, batches)),
            first=batches[0],
            held=True,
            read=lambda numbers: ((number, batches[number]) for number in numbers),
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def numbered(self) -> Iterator[tuple[int, Batch]]:
        """(number, batch) of this subset."""
        return self.read(self.numbers)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self.numbered())

    def subset(self, numbers: Iterable[int]) -> Batches:
        """Some of the batches, by their numbers, which they keep; the others are let go of."""
        numbers = sorted(numbers)
        if not self.held:
            return replace(self, numbers=numbers)
        kept = dict(self.read(numbers))
        return replace(
            self, numbers=numbers, read=lambda some: ((number, kept[number]) for number in some)
        )

    def leading(self, samples: int) -> Batches:
        """The first batches with about so many samples."""
        kept, total = [], 0
        for number in self.numbers:
            if total >= samples:
                break
            kept.append(number)
            total += self.sizes[number]
        return self.subset(kept)

    def of_samples(self, masks: Mapping[int, Tensor]) -> Batches:
        """Some samples of some batches, which are numbered from 0 then.

        Parameters
        ----------
        masks : mapping of int to bool tensor
            By the number of a batch, one value a sample; batches of which nothing is kept may be
            missing.
        """
        kept = [n for n in self.numbers if n in masks and masks[n].any()]
        places = {number: place for place, number in enumerate(kept)}

        def read(numbers: Sequence[int]) -> Iterator[tuple[int, Batch]]:
            for number, batch in self.read([kept[place] for place in numbers]):
                mask = masks[number]
                chosen = of_samples(lambda tensor, m=mask: tensor[m.to(tensor.device)], batch)
                yield places[number], chosen

        sizes = [int(masks[number].sum()) for number in kept]
        return Batches(
            sizes=sizes,
            numbers=range(len(kept)),
            layouts=self.layouts,
            nbytes=self.nbytes * sum(sizes) // max(sum(self.sizes), 1),
            first=next(read([0]))[1] if kept else self.first,
            held=self.held,
            read=read,
        )


def tidy(number: int) -> None:
    """After a batch of this number: now and then hand back what its activations took."""
    if number % TIDY_EVERY == TIDY_EVERY - 1:
        NumpyOps.memory.release()


def run_model(model: nn.Module, batch: Batch, number: int = 0) -> Any:
    """Call the model on a batch; `ModelError` with the batch's number if it raises."""
    parameter = next(model.parameters(), None)
    if parameter is not None:
        batch = mapped(lambda item: as_argument(item, parameter), batch)
    try:
        if isinstance(batch, Named):
            return model(**dict(zip(batch.names, batch, strict=True)))
        return model(*batch)
    except Exception as error:
        shape = tuple(first_tensor(batch).shape)
        raise ModelError(
            complain(
                f"{type(error).__name__} from the model on calibration batch {number} of shape"
                f" {shape}: {error}",
                "a model that runs on the calibration data",
                "Call model(batch) yourself to see it.",
            )
        ) from error


def as_argument(item: Any, like: Tensor) -> Any:
    """A copy on the model's device and in its dtype: the model may write over its inputs."""
    if not isinstance(item, Tensor):
        return item
    return item.to(like.device, like.dtype if item.is_floating_point() else None, copy=True)
