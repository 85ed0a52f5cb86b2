"""Fine-tuning of a compressed network, and its speed beside the dense one, in plain PyTorch.

In: a network of stock operations, labelled training images, limits on epochs and minutes. Out: the
same network, trained in place by AdamW (Loshchilov and Hutter 2019) under a cosine learning rate
that is a function of whichever limit is nearer, and how many steps that were. BatchNorms are
folded and dropout stays off, so the network runs in evaluation mode throughout.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.train_fashion_mnist import flip_and_shift
from slr_gpu.errors import InputError, complain


@dataclass(frozen=True)
class Tuning:
    """Settings of the fine-tuning.

    Attributes
    ----------
    epochs : int
        Over the training images; 0 for none.
    minutes : float
        Stop after this long, even within an epoch.
    lr : float
        First learning rate.
    images : int, optional
        Training images, the first so many; by default all.
    """

    epochs: int = 5
    minutes: float = 60.0
    lr: float = 1e-4
    images: int | None = None
    batch_size: int = 128
    label_smoothing: float = 0.05
    seed: int = 0


def learning_rate(first: float, share: float) -> float:
    """Half a cosine from the first rate to zero; `share` of the work done, 0 to 1."""
    return 0.5 * first * (1 + math.cos(math.pi * min(share, 1.0)))


def fine_tune(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    tuning: Tuning,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> dict[str, Any]:
    """Train a model in place.

    Parameters
    ----------
    inputs, labels : Tensor, (N, c, h, w) and (N,)
    on_step : callable
        Told the step, how many there would be in all, and the loss.

    Returns
    -------
    dict
        Steps and epochs done, seconds, first and last mean loss, and the settings.

    Raises
    ------
    InputError
        When the loss stops being finite.
    """
    count = len(inputs)
    size = min(tuning.batch_size, count)
    per_epoch = count // size
    steps = tuning.epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), tuning.lr, weight_decay=1e-4)
    losses: list[float] = []
    began = time.perf_counter()
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tuning.seed)
        for step in range(steps):
            if step % per_epoch == 0:
                batches = torch.randperm(count)[: per_epoch * size].split(size)
            late = (time.perf_counter() - began) / (60 * tuning.minutes)
            if late >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(tuning.lr, max(step / steps, late))
            rows = batches[step % per_epoch]
            logits = model(flip_and_shift(inputs[rows]))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=tuning.label_smoothing)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise InputError(
                    complain(
                        f"loss {losses[-1]} in step {step + 1} of the fine-tuning",
                        "a finite loss",
                        f"Lower the learning rate ({tuning.lr}).",
                    )
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            on_step(step + 1, steps, losses[-1])
    few = max(1, len(losses) // 20)
    return {
        "steps": len(losses),
        "epochs": len(losses) / max(per_epoch, 1),
        "seconds": time.perf_counter() - began,
        "first_loss": statistics.fmean(losses[:few]) if losses else None,
        "last_loss": statistics.fmean(losses[-few:]) if losses else None,
        "settings": asdict(tuning),
    }


@torch.inference_mode()
def speed_up(
    dense: nn.Module,
    compressed: nn.Module,
    inputs: Tensor,
    *,
    seconds: float = 20.0,
    least: int = 7,
    most: int = 200,
) -> dict[str, Any]:
    """Times of two networks on the same inputs, taken in turns on one thread of torch.

    Returns
    -------
    dict
        Milliseconds (median and quartiles) of both, and the median and quartiles of the ratio
        dense over compressed of neighbouring runs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: tuple[list[float], list[float]] = ([], [])
    try:
        for model in (dense, compressed):
            model(inputs)
        began = time.perf_counter()
        while len(times[0]) < least or (
            time.perf_counter() - began < seconds and len(times[0]) < most
        ):
            for model, taken in zip((dense, compressed), times, strict=True):
                start = time.perf_counter()
                model(inputs)
                taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    return {
        "batch": len(inputs),
        "rounds": len(ratios),
        "dense_ms": _quartiles([1e3 * t for t in times[0]]),
        "compressed_ms": _quartiles([1e3 * t for t in times[1]]),
        "speed_up": _quartiles(ratios),
    }


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
