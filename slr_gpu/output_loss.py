"""How far a changed model's output is from the original's, without labels.

In: what both return for the same batch. Out: a sum and a count, for a mean over batches:

    kl    sum_i sum_c p_ic (log p_ic - log q_ic)   of rows of class scores (N, C), in nats
    mse   ||y - y'||^2 / ||y||^2                   of anything else, all tensors of the output
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import InputError, ModelError, complain
from .graph import tensors_in
from .parallel import ALONE, Group

LOSSES = ("kl", "mse")


def tensors_of(output: Any) -> list[Tensor]:
    """All floating-point tensors in what a model returned, in order."""
    return [t for t in tensors_in(output) if t.is_floating_point()]


def choose_loss(name: str, output: Any) -> str:
    """``"auto"`` is ``kl`` for class scores, else ``mse``.

    Scores are one matrix (N, C) of two columns or more, unless its rows have unit length, as
    embeddings do: their softmax would be nearly flat whatever happens to them.

    Raises
    ------
    InputError
        For another name.
    ModelError
        When the model returns no floating-point tensor.
    """
    found = tensors_of(output)
    if not found:
        raise ModelError(
            complain(
                f"a model that returns {type(output).__name__}",
                "tensors of floating-point numbers",
                "Its output cannot be compared; use allocation='uniform' and refine=False.",
            )
        )
    if name == "auto":
        scores = len(found) == 1 and found[0].ndim == 2 and found[0].shape[1] > 1
        return "kl" if scores and not _unit_rows(found[0]) else "mse"
    if name not in LOSSES:
        raise InputError(
            complain(f"loss={name!r}", f"one of auto, {', '.join(LOSSES)}", "Check the name.")
        )
    return name


def _unit_rows(matrix: Tensor) -> bool:
    lengths = matrix.detach().double().norm(dim=1)
    return len(lengths) > 0 and bool(((lengths - 1).abs() < 1e-3).all())


def output_loss(
    loss: str, wanted: Any, got: Any, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A sum over the batch and what to divide it by; differentiable in `got`.

    Parameters
    ----------
    loss : {"kl", "mse"}
    wanted, got : what the original and the changed model return
    temperature : float
        Scores are divided by it before `kl`, which is multiplied by its square so that gradients
        keep their size (Hinton, Vinyals and Dean 2015, section 2). `mse` does not use it.
    """
    wanted, got = tensors_of(wanted), tensors_of(got)
    if loss == "kl":
        log_p, log_q = ((t[0].double() / temperature).log_softmax(1) for t in (wanted, got))
        p = log_p.exp()
        # Classes that are ruled out, by a score of -inf, have no share in either.
        total = temperature**2 * torch.where(p > 0, p * (log_p - log_q), 0.0).sum()
        return total, torch.tensor(float(len(log_p)), dtype=torch.float64)
    # So have infinite values that are the same.
    changes = (torch.where(w == g, 0.0, w - g) for w, g in zip(wanted, got, strict=True))
    total = sum(change.double().square().sum() for change in changes)
    return total, sum(w.double()[~w.isinf()].square().sum() for w in wanted)


def mean_loss(
    loss: str,
    wanted: Iterable[Any],
    got: Iterable[Any],
    group: Group = ALONE,
    temperature: float = 1.0,
) -> float:
    """The mean over all ranks' batches: one output of the original's for each of the other's."""
    total = count = 0.0
    with torch.no_grad():
        for reference, output in zip(wanted, got, strict=True):
            part, size = output_loss(loss, reference, output, temperature)
            total, count = total + float(part), count + float(size)
    total, count = (float(x) for x in group.sum((np.array(total), np.array(count))))
    return max(total, 0.0) / max(count, 1e-30)
