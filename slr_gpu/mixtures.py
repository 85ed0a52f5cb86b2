"""Batches of an epoch of the refinement, and what the original answers.

In: calibration batches and the original network. Out: for each epoch shuffled batches of samples or
of mixtures of two, each with what the network returns for it and what some of its layers read on
the way. The network answers for any input, so mixtures are further calibration data (Beyer et al.
2022, "a good teacher is patient and consistent"). They are

    x = a x_i + (1 - a) x_j     sums, a uniform in [0, 1] (Zhang et al. 2018, "mixup"), or
    x_i with a box of x_j       of images, 1 - a of their volume (Yun et al. 2019, "CutMix").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batch, Batches, run_model
from .frontier import first_input
from .graph import hooks
from .output_loss import tensors_of

# Values a sample of what a layer reads, at most, for that to be kept.
LARGEST_FEATURE = 2**14

# What a model returned, and what some of its layers read.
Answer = tuple[Any, list[Tensor]]


def answer_of(model: nn.Module, batch: Batch, late: list[str]) -> Answer:
    """Call a model; also the small first inputs of these modules, in the order of their calls."""
    read: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_input(args, kwargs)
        if x.numel() <= LARGEST_FEATURE * len(x):
            read.append(x)

    with hooks() as handles:
        for name in late:
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        return run_model(model, batch), read


class Mixtures:
    """Calibration samples and mixtures of them, each with what the original returns for it.

    Batches come in `sets`, the first without mixtures, then sums and, where there are images, boxes
    by turns; an epoch goes through one of them. Samples are shuffled across batches where all have
    one shape; else batches are. Data that is read anew in every pass goes through in parts that fit
    the limit, each shuffled in itself.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Batches,
        sets: int,
        batch_size: int,
        seed: int = 0,
        late: list[str] | None = None,
        limit: float = math.inf,
    ) -> None:
        self.original, self.batches = original, batches
        self.batch_size, self.seed = batch_size, seed
        self.late = late or []
        layout = next(iter(batches.layouts))
        named = any(layout.names for layout in batches.layouts)
        self.joins = len(batches.layouts) == 1 and None not in layout.shapes and not named
        mixes = all(isinstance(i, Tensor) and i.is_floating_point() for i in batches.first)
        self.sets = sets if mixes and not named else 1
        # Neighbouring batches, as many each; of one part there are up to four copies in memory.
        count = math.ceil(4 * batches.nbytes / max(limit, 1))
        count = 1 if batches.held else min(len(batches), count)
        self.parts = [p.tolist() for p in np.array_split(np.asarray(batches.numbers), count)]
        self._whole = self._read(self.parts[0]) if batches.held else None
        self._wanted: dict[tuple[int, int, int], Answer] = {}
        self._room = limit

    def __len__(self) -> int:
        """Batches an epoch."""
        return sum(self._steps(part) for part in self.parts)

    def _steps(self, part: list[int]) -> int:
        if not self.joins:
            return len(part)
        samples = sum(self.batches.sizes[number] for number in part)
        return max(1, samples // self.batch_size)

    def of_epoch(self, epoch: int) -> Iterator[tuple[Batch, Answer]]:
        """Batches of an epoch with the original's answers; the same whenever they are asked for."""
        turn = epoch % self.sets
        shuffle, mixing = self._generator(self.sets + epoch), self._generator(turn)
        for place, part in enumerate(self.parts):
            batches = self._of_set(turn, part, mixing)
            for number in torch.randperm(len(batches), generator=shuffle).tolist():
                yield batches[number], self._answer((turn, place, number), batches[number])

    def _answer(self, key: tuple[int, int, int], batch: Batch) -> Answer:
        """What the original makes of a batch, remembered while there is room."""
        if key in self._wanted:
            return self._wanted[key]
        with torch.no_grad():
            answer = answer_of(self.original, batch, self.late)
        size = sum(t.nbytes for t in [*tensors_of(answer[0]), *answer[1]])
        if size <= self._room:
            self._room -= size
            self._wanted[key] = answer
        return answer

    def _of_set(self, turn: int, part: list[int], generator: torch.Generator) -> list[Batch]:
        batches = self._read(part) if self._whole is None else self._whole
        if self.joins:
            joined, steps = batches[0], self._steps(part)
            order = torch.randperm(len(joined[0]), generator=generator)
            size = min(self.batch_size, len(order))
            rows = order[: steps * size].split(size)
            batches = [tuple(item[r] for item in joined) for r in rows]
        if turn == 0:
            return batches
        boxes = turn % 2 == 0 and all(item.ndim > 3 for item in batches[0])
        return [_mixed(batch, boxes, generator) for batch in batches]

    def _read(self, part: list[int]) -> list[Batch]:
        """Batches of a part; a single one of all samples where they can be joined."""
        batches = list(self.batches.subset(part))
        if not self.joins:
            return batches
        return [tuple(torch.cat(items) for items in zip(*batches, strict=True))]

    def _generator(self, number: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))


def _mixed(batch: Batch, boxes: bool, generator: torch.Generator) -> Batch:
    """Every sample mixed with another of the batch, all items alike."""
    count = len(batch[0])
    share = torch.rand(count, generator=generator)
    partner = torch.randperm(count, generator=generator)
    axes = max(item.ndim for item in batch) - 2 if boxes else 0
    corners = torch.rand(axes, count, generator=generator)
    mixed = []
    for item in batch:
        own = share.reshape(-1, *(1,) * (item.ndim - 1))
        if boxes:
            own = 1 - _box(1 - share, corners, item.shape[2:])
        own, partners = own.to(item), partner.to(item.device)
        mixed.append(own * item + (1 - own) * item[partners])
    return tuple(mixed)


def _box(share: Tensor, corners: Tensor, sides: tuple[int, ...]) -> Tensor:
    """1 inside a box in each image, else 0, (N, 1, *sides).

    Its sides are in the proportions of the image's, its volume is a share of it but for rounding;
    corners in [0, 1) say where it lies, along each axis.
    """
    inside = torch.ones(len(share), *(1,) * (1 + len(sides)))
    for axis, side in enumerate(sides):
        length = (side * share ** (1 / len(sides))).round()
        start = (corners[axis] * (side + 1 - length)).floor()
        place = torch.arange(side)
        within = (place >= start[:, None]) & (place < (start + length)[:, None])
        after = len(sides) - 1 - axis
        inside = inside * within.reshape(len(share), *(1,) * (1 + axis), side, *(1,) * after)
    return inside
