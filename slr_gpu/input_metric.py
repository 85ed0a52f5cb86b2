"""The metric of what matrices read, in which steps of training are as long as what they change.

In: a model, some of its parameters and batches. Out: for each weight of a convolution or a linear
layer roots of the second moments of its inputs,

    S = E[x xᵀ] + rho I,    x: a row of inputs, of convolutions im2col; rho: a fraction of its mean
                                diagonal.

A step dW changes what the layer returns by ``dW x``, on average ``||dW S^1/2||``: in ``W S^1/2`` all
directions count by that. Behind a ReLU most of x is its mean, so that in W itself they differ by
orders of magnitude. It is the factor of the inputs in K-FAC (Martens and Grosse 2015), and the
metric in which layers are fitted (`slr_gpu.metric`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .adapters import adapter_for
from .batches import Batches, run_model
from .frontier import first_input
from .graph import hooks
from .parallel import Group

# rho: what inputs are not excited by grows thirtyfold at most.
DAMPING = 1e-3
# Of more columns than these the eigendecomposition takes longer than it saves.
WIDEST = 2500
# Samples that tell the moments, and positions of each.
SAMPLES, POSITIONS = 1000, 64


class Roots(NamedTuple):
    """``S^1/2`` and ``S^-1/2`` (m, m), in the dtype of the weight."""

    root: Tensor
    inverse: Tensor


def input_roots(
    model: nn.Module, parameters: list[nn.Parameter], batches: Batches, group: Group
) -> list[Roots | None]:
    """Roots of the second moments of what parameters read.

    Parameters
    ----------
    model : nn.Module
    parameters : list of nn.Parameter
    batches : Batches
        Of this rank; some of them are run.

    Returns
    -------
    list of Roots or None
        None for what is no weight of a convolution or linear layer, is never used or reads more
        than `WIDEST` columns.
    """
    numbers = {id(p): number for number, p in enumerate(parameters)}
    moments: dict[int, np.ndarray] = {}
    with hooks() as handles, torch.no_grad():
        for layer in model.modules():
            number = numbers.get(id(getattr(layer, "weight", None)))
            if number is None or adapter_for(layer) is None:
                continue
            m = layer.weight[0].numel()
            if m <= WIDEST and getattr(layer, "groups", 1) == 1:
                # One row more: how many rows they are of.
                note = _Notes(moments.setdefault(number, np.zeros((m + 1, m))))
                handles.append(layer.register_forward_hook(note, with_kwargs=True))
        for batch in batches.subset(_some(batches, SAMPLES // group.size)):
            run_model(model, batch)
    found: list[Roots | None] = [None] * len(parameters)
    for number in sorted(moments):
        (total,) = group.sum((moments.pop(number),))
        if total[-1, 0]:
            found[number] = _roots(total[:-1] / total[-1, 0], parameters[number])
    return found


def _some(batches: Batches, samples: int) -> list[int]:
    """Evenly spread batches of at least so many samples, if there are."""
    of_all = sum(batches.sizes[number] for number in batches.numbers)
    step = max(1, math.floor(of_all / max(samples, 1)))
    return list(batches.numbers)[::step]


class _Notes:
    """A forward hook that adds up the second moments of the rows that a layer reads."""

    def __init__(self, total: np.ndarray) -> None:
        self.total = total
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> None:
        adapter = adapter_for(layer)
        x, y = (adapter.batched(layer, t.detach()) for t in (first_input(args, kwargs), y))
        count = adapter.positions(layer, y)
        positions = torch.randperm(count, generator=self.generator)[:POSITIONS]
        samples = torch.arange(len(x)).repeat_interleave(len(positions))
        positions = positions.repeat(len(x))
        rows = adapter.input_rows(layer, x, samples.to(x.device), positions.to(x.device)).float()
        self.total[:-1] += (rows.mT @ rows).double().cpu().numpy()
        self.total[-1] += len(rows)


def _roots(moments: np.ndarray, like: Tensor) -> Roots:
    S = torch.from_numpy(moments).to(like.device)
    diagonal = S.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    values, Q = torch.linalg.eigh(S)
    # None is below the damping but by rounding.
    values = values.clamp_min(0.5 * DAMPING * float(diagonal.mean()))
    return Roots(
        *(((Q * power) @ Q.mT).to(like.dtype) for power in (values.sqrt(), values.rsqrt()))
    )
