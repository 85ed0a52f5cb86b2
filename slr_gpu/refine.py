"""All compressed layers trained together towards the original's outputs, without labels.

In: the compressed copy, the original and calibration batches. Out: the same copy with better
factors, or as it was. They are trained (`slr_gpu.training`) on samples and mixtures of them
(`slr_gpu.mixtures`) to lower the loss of `slr_gpu.output_loss`. What the last layers read is to
stay as well (Romero et al. 2015, "FitNets"): a thousand values a sample say more than ten scores,

    loss(y, y') / a_0 + 1/L sum_l ||h_l - h'_l||^2 / a_l,      h_l: inputs of layer l,

where all a are what these terms are on held-out samples at first. The weights of the epoch with the
least loss on held-out samples are kept, if it is less than before.

Several ranks each train on their own samples and average their gradients, so that all keep the same
weights; which samples a batch holds, and so what comes out, depends on how many ranks there are.
"""

from __future__ import annotations

import itertools
import math
import numbers
import time
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from .batches import Batches, first_tensor, run_model
from .capture import full_precision
from .checkpoint import Store
from .errors import InputError, complain
from .mixtures import Answer, Mixtures, answer_of
from .output_loss import choose_loss, mean_loss, output_loss
from .parallel import Group
from .prepare import Prepared
from .progress import progress_bar
from .sensitivity import held_out_batches
from .training import Trainer, channels_last, only_these_train

# An error that is none; and a relative error of the outputs, from which on steps are the largest.
# On VGG-16 steps in proportion to it served at a quarter of the FLOPs and at a twentieth alike.
NOTHING = 1e-12
FAR = 0.05


@dataclass(frozen=True)
class Refinement:
    """Settings of the joint refinement.

    Attributes
    ----------
    epochs : int
        Passes over the calibration data. More of them pay: at a twentieth of the FLOPs of VGG-16
        200 left a KL of 0.0097 on unseen images where 60 left 0.0116, and at 0.067 of its
        parameters 0.0005 of the 0.0014 before any.
    rate : float
        Largest step of a tensor, as a fraction of its root mean square. In proportion smaller
        where outputs are less than a twentieth off at first: what is near wants small steps.
    temperature : float
        Of the loss where it is `kl` (`slr_gpu.output_loss`). Above 1 confident answers have
        something to teach too, and held-out samples judge by more than the few that are in doubt:
        at a quarter of the FLOPs of VGG-16 20 epochs at 3 or 8 left four fifths of the KL on unseen
        images, at 1 nine tenths.
    features : int
        Inputs of so many layers, the last ones to run, are compared too; not those of more than
        16 384 values a sample, which say little more and would have to be kept.
    uses : int
        Epochs that a set of inputs serves. The sets take turns: the samples as they are, then
        mixtures of two of them, where inputs are floating-point numbers: sums, or of images also
        boxes of one in the other. What is seen often is learnt by heart: after 200 epochs of 30
        sets the KL of a VGG-16 on new mixtures of the same images was 1.7 (sums) and 2.7 times
        (boxes) that on those trained on. With as many as `epochs` there are no mixtures. Sets that
        serve these epochs one after another, so that the answers of one alone are kept, left 5 and
        11 % more KL after 20 epochs at a twentieth of the FLOPs.
    batch_size : int
    seed : int
    """

    epochs: int = 60
    rate: float = 1.5e-3
    temperature: float = 3.0
    features: int = 3
    uses: int = 2
    batch_size: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (
            ("epochs", 1),
            ("features", 0),
            ("uses", 1),
            ("batch_size", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < lowest:
                raise InputError(
                    complain(f"{name}={value!r} of the refinement", f"an integer >= {lowest}", "")
                )
        for name, usual in (("rate", "1.5e-3"), ("temperature", "3")):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
                raise InputError(
                    complain(
                        f"{name}={value!r} of the refinement",
                        "a finite number > 0",
                        f"{usual} is usual.",
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
        ``loss``, its value on held-out samples at the temperature of the settings ``before`` and
        ``after``, ``kept``, ``seconds`` and the settings.
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
            wanted, got = (answer_of(model, batch, late) for model in (original, work))
            off, size = output_loss("mse", wanted[0], got[0])
            terms = _terms(loss, wanted, got, settings.temperature)
            rows.append([float(off) / max(float(size), NOTHING), *map(float, terms)])
            if held.held:  # made anew where inputs are read anew
                outputs.append(wanted[0])
    rows = [row for of_rank in group.objects(rows) for row in of_rank]
    off, *first_terms = (sum(column) / len(rows) for column in zip(*rows, strict=False))
    parameters = [p for name in names for p in work.get_submodule(name).parameters()]
    trainer = Trainer(parameters, settings.rate * min(1.0, off**0.5 / FAR), group)
    # A step sees as many samples as on one rank.
    own = max(1, settings.batch_size // group.size)
    sets = math.ceil(settings.epochs / settings.uses)
    batches = Mixtures(original, fitted, sets, own, settings.seed, late, prepared.spill.limit)
    in_epoch = min(group.objects(len(batches)))
    steps = settings.epochs * in_epoch

    def judge() -> float:
        right, inputs = outputs, held
        if not held.held:
            once, inputs = itertools.tee(held)
            right = (run_model(original, batch) for batch in once)
        answers = (run_model(work, batch) for batch in inputs)
        return mean_loss(loss, right, answers, group, settings.temperature)

    before = trainer.best = judge()
    bar = progress_bar("refining all layers", steps, show=progress)
    layout = channels_last(work, prepared.few_samples)
    with bar as advance, full_precision(), layout, only_these_train(work, parameters):
        first = 0 if store is None else trainer.load(store)
        advance(first * in_epoch)
        for epoch in range(first, settings.epochs):
            for number, (batch, target) in enumerate(islice(batches.of_epoch(epoch), in_epoch)):
                answer = answer_of(work, batch, late)
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


def _terms(loss: str, wanted: Answer, got: Answer, temperature: float) -> list[Tensor]:
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
