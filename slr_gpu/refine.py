"""All compressed layers trained together towards the original's outputs, without labels.

In: the compressed copy, the original and calibration batches. Out: the same copy with better
factors, or as it was. Adam (Kingma and Ba 2015) on the loss of `slr_gpu.output_loss`, each
tensor's step a fraction of its root mean square, so that factors of different scale move alike;
the rate rises briefly and falls as half a cosine. What the last layers read is to stay as well
(Romero et al. 2015, "FitNets"): a thousand values a sample say more than ten scores do,

    loss(y, y') / a_0 + 1/L sum_l ||h_l - h'_l||^2 / a_l,      h_l: inputs of layer l,

where all a are what these terms are on held-out samples at first.

Inputs are mixed in pairs, x = a x_i + (1 - a) x_j: the original answers for any input, so mixtures
are further calibration data (Beyer et al. 2022, "a good teacher is patient and consistent"). The
weights of the epoch with the least loss on held-out samples are kept, if it is less than before.

Several ranks each train on their own samples and average their gradients, so that all keep the same
weights; which samples a batch holds, and so what comes out, depends on how many ranks there are.
"""

from __future__ import annotations

import itertools
import math
import numbers
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batch, Batches, first_tensor, run_model
from .capture import full_precision
from .checkpoint import Store
from .errors import InputError, complain
from .frontier import first_input
from .graph import hooks
from .output_loss import choose_loss, mean_loss, output_loss, tensors_of
from .parallel import ALONE, Group
from .prepare import Prepared
from .progress import progress_bar
from .sensitivity import held_out_batches

# Values a sample of an input that is compared, at most; and an error that is none.
LARGEST_FEATURE = 2**14
NOTHING = 1e-12


@dataclass(frozen=True)
class Refinement:
    """Settings of the joint refinement.

    Attributes
    ----------
    epochs : int
        Passes over the calibration data.
    rate : float
        Largest step of a tensor, as a fraction of its root mean square.
    temperature : float
        Of the training loss where it is `kl` (`slr_gpu.output_loss`); held-out samples are judged
        at 1. Above 1 confident answers have something to teach too.
    features : int
        Inputs of so many layers, the last ones to run, are compared too; not those of more than
        16 384 values a sample, which say little more and would have to be kept.
    copies : int
        Sets of inputs, each for every so many epochs: the samples as they are, then mixtures of
        them, where inputs are floating-point numbers. 1 is without mixtures.
    batch_size : int
    seed : int
    """

    epochs: int = 100
    rate: float = 2e-3
    temperature: float = 3.0
    features: int = 3
    copies: int = 30
    batch_size: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (
            ("epochs", 1),
            ("features", 0),
            ("copies", 1),
            ("batch_size", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise InputError(
                    complain(f"{name}={value!r} of the refinement", f"an integer >= {lowest}", "")
                )
        for name, usual in (("rate", "2e-3"), ("temperature", "3")):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not value > 0:
                raise InputError(
                    complain(
                        f"{name}={value!r} of the refinement", "a number > 0", f"{usual} is usual."
                    )
                )

    @classmethod
    def of(cls, value: bool | Refinement) -> Refinement | None:
        """``True`` is the default settings, ``False`` none."""
        if isinstance(value, Refinement):
            return value
        if not isinstance(value, bool):
            raise InputError(
                complain(
                    f"refine={value!r}", "True, False or a Refinement", "refine=True is usual."
                )
            )
        return cls() if value else None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def refine_model(
    prepared: Prepared,
    names: list[str],
    settings: Refinement,
    loss: str,
    store: Store | None,
    progress: bool,
) -> dict[str, Any]:
    """Refine the layers of these names in ``prepared.work``, in place.

    Parameters
    ----------
    loss : {"auto", "kl", "mse"}
    store : Store, optional
        Where the state after each epoch is written, and read from if it is there.

    Returns
    -------
    dict
        ``loss``, its value on held-out samples ``before`` and ``after``, ``kept``, ``seconds``.
    """
    began = time.perf_counter()
    work, original = prepared.work, prepared.original
    group = prepared.group
    fitted, held = held_out_batches(prepared.batches, prepared.settings.held_out)
    _check_fitted(group, fitted)
    ran = [name for name, site in prepared.sites.items() if site.calls]
    late = ran[max(0, len(ran) - settings.features) :]
    outputs, rows = [], []
    with torch.no_grad():
        loss = choose_loss(loss, run_model(original, prepared.few_samples))
        for batch in held:
            wanted, got = (_run(model, batch, late) for model in (original, work))
            rows.append(list(map(float, _terms(loss, wanted, got, settings.temperature))))
            if held.held:  # made anew where inputs are read anew
                outputs.append(wanted[0])
    rows = [row for of_rank in group.objects(rows) for row in of_rank]
    first_terms = [float(sum(column)) / len(rows) for column in zip(*rows, strict=False)]
    parameters = [p for name in names for p in work.get_submodule(name).parameters()]
    trainer = _Trainer(parameters, settings, group)
    # A step sees as many samples as on one rank.
    own = replace(settings, batch_size=max(1, settings.batch_size // group.size))
    batches = _Batches(original, fitted, own, late, prepared.spill.limit)
    in_epoch = min(group.objects(len(batches)))
    steps = settings.epochs * in_epoch

    def judge() -> float:
        if held.held:
            return mean_loss(loss, outputs, (run_model(work, batch) for batch in held), group)
        once, again = itertools.tee(held)
        right = (run_model(original, batch) for batch in once)
        return mean_loss(loss, right, (run_model(work, batch) for batch in again), group)

    before = trainer.best = judge()
    bar = progress_bar("refining all layers", steps, show=progress)
    layout = _channels_last(work, prepared.few_samples)
    with bar as advance, full_precision(), layout, _only_these_train(work, parameters):
        first = 0 if store is None else trainer.load(store)
        advance(first * in_epoch)
        for epoch in range(first, settings.epochs):
            for number, (batch, target) in enumerate(islice(batches.of_epoch(epoch), in_epoch)):
                answer = _run(work, batch, late)
                terms = _terms(loss, target, answer, settings.temperature)
                share = (epoch * in_epoch + number) / steps
                trainer.step(_weighted(terms, first_terms), share, len(first_tensor(batch)))
                advance(1)
            trainer.note(judge())
            if store is not None:
                trainer.save(store, epoch + 1)
    trainer.restore_best()
    return {
        "loss": loss,
        "before": before,
        "after": trainer.best,
        "kept": trainer.best < before,
        "seconds": time.perf_counter() - began,
        **settings.as_dict(),
    }


def _check_fitted(group: Group, fitted: Batches) -> None:
    with group.together():
        if not len(fitted):
            raise InputError(
                complain("no samples to train on", "some that are not held out", "Use fewer ranks.")
            )


# What a model returned, and what some of its layers read.
_Answer = tuple[Any, list[Tensor]]


def _run(model: nn.Module, batch: Batch, late: list[str]) -> _Answer:
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


def _terms(loss: str, wanted: _Answer, got: _Answer, temperature: float) -> list[Tensor]:
    """How far outputs are from each other, then what late layers read."""
    total, count = output_loss(loss, wanted[0], got[0], temperature)
    terms = [total / count]
    if len(wanted[1]) == len(got[1]):  # control flow may leave a layer out
        for h, other in zip(wanted[1], got[1], strict=True):
            h, other = h.double(), other.double()
            terms.append((h - other).square().sum() / h.square().sum().clamp_min(1e-30))
    return terms


def _weighted(terms: list[Tensor], first: list[float]) -> Tensor:
    """What is trained on: the first term and the mean of the others, relative to what they were."""
    # What was the same but for rounding stays so: nothing in front of that layer is trained.
    rest = [t / was for t, was in zip(terms[1:], first[1:], strict=False) if was > NOTHING]
    return terms[0] / max(first[0], NOTHING) + sum(rest) / max(len(rest), 1)


@contextmanager
def _only_these_train(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for some parameters alone; afterwards all is as it was."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, wanted in before:
            p.grad = None
            p.requires_grad_(wanted)


@contextmanager
def _channels_last(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Weights of 2-D convolutions with their channels last, in which CPUs train 1.7 times as fast.

    What convolutions return is laid out so too. A model whose code relies on the other layout (by
    ``view``, say) keeps it.
    """
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.is_contiguous() and not p.is_cuda]

    def lay(memory_format: torch.memory_format) -> None:
        for p in kernels:
            p.data = p.data.contiguous(memory_format=memory_format)

    lay(torch.channels_last)
    try:
        try:
            with torch.no_grad():
                run_model(model, batch)
        except RuntimeError:
            lay(torch.contiguous_format)
        yield
    finally:
        lay(torch.contiguous_format)


class _Trainer:
    """Adam on some parameters, the best values seen, and both on disk."""

    def __init__(
        self, parameters: list[nn.Parameter], settings: Refinement, group: Group = ALONE
    ) -> None:
        self.parameters, self.group = parameters, group
        self.best, self.best_values = math.inf, self._values()
        # A fraction of the root mean square of each tensor as it is now.
        self.scales = [settings.rate * float(p.detach().square().mean().sqrt()) for p in parameters]
        self.adam = torch.optim.Adam([{"params": [p]} for p in parameters], lr=settings.rate)

    def _values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def step(self, loss: Tensor, share: float, samples: int = 1) -> None:
        """One step on the mean loss of the samples of all ranks; `share` of all steps are done."""
        for group, scale in zip(self.adam.param_groups, self.scales, strict=True):
            group["lr"] = scale * schedule(share)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        if self.group.size > 1:
            self._average_gradients(samples)
        self.adam.step()

    def _average_gradients(self, samples: int) -> None:
        for p in self.parameters:
            if p.grad is None:  # control flow may leave a layer out
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.reshape(-1) for p in self.parameters]).double().cpu().numpy()
        total, count = self.group.sum((samples * flat, np.float64(samples)))
        parts = torch.from_numpy(total / count).split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            p.grad.copy_(part.reshape(p.shape))

    def note(self, error: float) -> None:
        """Remember the values if this error is the least so far; NaN is not."""
        if error < self.best:
            self.best, self.best_values = error, self._values()

    def restore_best(self) -> None:
        with torch.no_grad():
            for p, value in zip(self.parameters, self.best_values, strict=True):
                p.copy_(value)

    def save(self, store: Store, epochs: int) -> None:
        """Write all that the epochs to come depend on."""
        arrays = {}
        for number, (p, best) in enumerate(zip(self.parameters, self.best_values, strict=True)):
            state = self.adam.state[p]
            arrays[f"{number}.value"], arrays[f"{number}.best"] = p.detach(), best
            for name in ("step", "exp_avg", "exp_avg_sq"):
                arrays[f"{number}.{name}"] = state[name]
        store.save_arrays(
            "state",
            {name: tensor.cpu().numpy() for name, tensor in arrays.items()},
            {"epochs": str(epochs), "best": repr(self.best)},
        )

    def load(self, store: Store) -> int:
        """Read what `save` wrote; the number of epochs done, 0 where there is nothing."""
        found = store.load_arrays("state")
        if found is None:
            return 0
        arrays, facts = found
        for number, p in enumerate(self.parameters):
            tensors = {
                name: torch.from_numpy(arrays[f"{number}.{name}"])
                for name in ("value", "best", "step", "exp_avg", "exp_avg_sq")
            }
            with torch.no_grad():
                p.copy_(tensors.pop("value"))
            self.best_values[number] = tensors.pop("best").to(p)
            step = tensors.pop("step")
            # In the layout of the values, as Adam itself makes them: then bits do not depend on it.
            laid = {k: torch.empty_like(p.detach()).copy_(v) for k, v in tensors.items()}
            self.adam.state[p] = {"step": step, **laid}
        self.best = float(facts["best"])
        return int(facts["epochs"])


def schedule(share: float) -> float:
    """Rate at a share of all steps, of its largest: a short rise, then half a cosine."""
    return min(1.0, share / 0.05 + 0.05) * 0.5 * (1 + math.cos(math.pi * share))


class _Batches:
    """Calibration samples and mixtures of them, each with what the original returns for it.

    There are `copies` sets of batches, the first without mixtures; an epoch goes through one of
    them. Samples are shuffled across batches where all have one shape; else batches are. Data that
    is read anew in every pass goes through in parts that fit the limit, each shuffled in itself.
    """

    def __init__(
        self,
        original: nn.Module,
        batches: Batches,
        settings: Refinement,
        late: list[str] | None = None,
        limit: float = math.inf,
    ) -> None:
        self.original, self.batches, self.settings = original, batches, settings
        self.late = late or []
        layout = next(iter(batches.layouts))
        named = any(layout.names for layout in batches.layouts)
        self.joins = len(batches.layouts) == 1 and None not in layout.shapes and not named
        mixes = all(isinstance(i, Tensor) and i.is_floating_point() for i in batches.first)
        self.copies = settings.copies if mixes and not named else 1
        # Neighbouring batches, as many each; of one part there are up to four copies in memory.
        count = math.ceil(4 * batches.nbytes / max(limit, 1))
        count = 1 if batches.held else min(len(batches), count)
        self.parts = [p.tolist() for p in np.array_split(np.asarray(batches.numbers), count)]
        self._whole = self._read(self.parts[0]) if batches.held else None
        self._wanted: dict[tuple[int, int, int], _Answer] = {}
        self._room = limit

    def __len__(self) -> int:
        """Batches an epoch."""
        return sum(self._steps(part) for part in self.parts)

    def _steps(self, part: list[int]) -> int:
        if not self.joins:
            return len(part)
        samples = sum(self.batches.sizes[number] for number in part)
        return max(1, samples // self.settings.batch_size)

    def of_epoch(self, epoch: int) -> Iterator[tuple[Batch, _Answer]]:
        """Batches of an epoch with the original's answers; the same whenever they are asked for."""
        copy = epoch % self.copies
        shuffle, mixing = self._generator(self.copies + epoch), self._generator(copy)
        for place, part in enumerate(self.parts):
            batches = self._of_copy(copy, part, mixing)
            for number in torch.randperm(len(batches), generator=shuffle).tolist():
                yield batches[number], self._answer((copy, place, number), batches[number])

    def _answer(self, key: tuple[int, int, int], batch: Batch) -> _Answer:
        """What the original makes of a batch, remembered while there is room."""
        if key in self._wanted:
            return self._wanted[key]
        with torch.no_grad():
            answer = _run(self.original, batch, self.late)
        size = sum(t.nbytes for t in [*tensors_of(answer[0]), *answer[1]])
        if size <= self._room:
            self._room -= size
            self._wanted[key] = answer
        return answer

    def _of_copy(self, copy: int, part: list[int], generator: torch.Generator) -> list[Batch]:
        batches = self._read(part) if self._whole is None else self._whole
        if self.joins:
            joined, steps = batches[0], self._steps(part)
            order = torch.randperm(len(joined[0]), generator=generator)
            size = min(self.settings.batch_size, len(order))
            rows = order[: steps * size].split(size)
            batches = [tuple(item[r] for item in joined) for r in rows]
        return batches if copy == 0 else [self._mixed(batch, generator) for batch in batches]

    def _read(self, part: list[int]) -> list[Batch]:
        """Batches of a part; a single one of all samples where they can be joined."""
        batches = list(self.batches.subset(part))
        if not self.joins:
            return batches
        return [tuple(torch.cat(items) for items in zip(*batches, strict=True))]

    def _generator(self, number: int) -> torch.Generator:
        seed = np.random.SeedSequence([self.settings.seed, number]).generate_state(1)[0]
        return torch.Generator().manual_seed(int(seed))

    @staticmethod
    def _mixed(batch: Batch, generator: torch.Generator) -> Batch:
        """Every sample mixed with another of the batch."""
        count = len(batch[0])
        share = torch.rand(count, generator=generator)
        partner = torch.randperm(count, generator=generator)
        mixed = []
        for item in batch:
            a = share.to(item).reshape(-1, *(1,) * (item.ndim - 1))
            mixed.append(a * item + (1 - a) * item[partner.to(item.device)])
        return tuple(mixed)
