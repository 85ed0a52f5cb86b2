"""Whether a written model computes what the PyTorch model computes.

In: a function that runs the file, one that runs the model, and a few inputs. Out: the largest
relative error, ``max |got - wanted| / max |wanted|`` of each output, on these inputs and on random
ones of the same mean and spread, each with two batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from .errors import InputError, ModelError, complain

TOLERANCE = 1e-4
BATCH_SIZES = (1, 3)  # neither is the one that models are captured with

Runner = Callable[[tuple[Any, ...]], list[Tensor]]


def as_arguments(inputs: Any) -> tuple[Any, ...]:
    """The model's arguments as a tuple, on the CPU, floating point in float32."""
    items = tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)
    items = tuple(torch.from_numpy(i) if isinstance(i, np.ndarray) else i for i in items)
    items = tuple(i.detach().cpu() if isinstance(i, Tensor) else i for i in items)
    batch = next((i for i in items if isinstance(i, Tensor) and i.ndim), None)
    if batch is None or not len(batch):
        raise InputError(
            complain(
                f"inputs of {type(inputs).__name__} without a sample",
                "a tensor (N, ...) or a tuple of the model's arguments",
                "Pass inputs= with at least one sample.",
            )
        )
    return tuple(i.float() if isinstance(i, Tensor) and i.is_floating_point() else i for i in items)


def batched(arguments: tuple[Any, ...]) -> list[bool]:
    """Which arguments have the samples along their leading dimension."""
    size = next(len(i) for i in arguments if isinstance(i, Tensor) and i.ndim)
    return [isinstance(i, Tensor) and i.ndim > 0 and len(i) == size for i in arguments]


def resize(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The same arguments with `count` samples, repeated or cut."""
    return tuple(
        item[torch.arange(count) % len(item)] if samples else item
        for item, samples in zip(arguments, batched(arguments), strict=True)
    )


def random_like(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Normal values of the same mean and spread; of integers, the values there are, shuffled."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for item in arguments:
        if isinstance(item, Tensor) and item.is_floating_point():
            noise = torch.randn(item.shape, generator=generator)
            spread = item.std() if item.numel() > 1 else item.new_ones(())
            item = item.mean() + spread * noise
        elif isinstance(item, Tensor):
            order = torch.randperm(item.numel(), generator=generator)
            item = item.reshape(-1)[order].reshape(item.shape)
        items.append(item)
    return tuple(items)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def runner_of(model: Callable[..., Any]) -> Runner:
    """Run a module."""
    return lambda arguments: _tensors(model(*arguments))


def pt2_runner(path: Path) -> Runner:
    """Run a file of torch.export."""
    with path.open("rb") as file:
        return runner_of(torch.export.load(file).module())


def onnx_runner(path: Path) -> Runner:
    """Run a file in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(arguments: tuple[Any, ...]) -> list[Tensor]:
        tensors = [item.numpy() for item in arguments if isinstance(item, Tensor)]
        outputs = session.run(None, dict(zip(names, tensors, strict=True)))
        return [torch.from_numpy(np.asarray(output)) for output in outputs]

    return run


def compare(
    load: Callable[[], Runner], expected: Runner, arguments: tuple[Any, ...], name: str
) -> float:
    """The largest relative error over both kinds of inputs and both batch sizes.

    Raises
    ------
    ModelError
        When what `load` gives fails, or differs by more than `TOLERANCE`.
    """
    worst, actual = 0.0, None
    for kind, of in (("calibration", lambda a: a), ("random", random_like)):
        for size in BATCH_SIZES:
            inputs = of(resize(arguments, size))
            wanted = expected(inputs)
            what = f"{name} on {kind} inputs, batch {size}"
            try:
                actual = actual or load()
                got = actual(inputs)
            except Exception as error:
                raise ModelError(
                    complain(
                        f"{type(error).__name__} from {what}: {first_line(error)}",
                        "a file that runs",
                        "Nothing was written; see whether the batch is a free dimension of the"
                        " model.",
                    )
                ) from error
            error = relative_error(got, wanted)
            if not error <= TOLERANCE:
                raise ModelError(
                    complain(
                        f"a relative error of {error:.2e} from {what}",
                        f"PyTorch's outputs within {TOLERANCE:g}",
                        "Nothing was written; the model computes something that the format does"
                        " not carry over.",
                    )
                )
            worst = max(worst, error)
    return worst


def relative_error(outputs: list[Any], reference: list[Any]) -> float:
    """Largest ``max|a - b| / max|b|`` over arrays or tensors; infinite when their shapes differ.

    The same infinity or NaN in the same place counts as equal.
    """
    if [tuple(a.shape) for a in outputs] != [tuple(b.shape) for b in reference]:
        return float("inf")
    worst = 0.0
    for pair in zip(outputs, reference, strict=True):
        a, b = (
            t.detach().double().numpy() if isinstance(t, Tensor) else np.asarray(t, np.float64)
            for t in pair
        )
        differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        if not differ.any():
            continue
        difference = np.abs(a[differ] - b[differ]).max()
        error = difference / max(np.abs(b[np.isfinite(b)]).max(initial=0.0), 1e-30)
        worst = max(worst, float(error) if np.isfinite(error) else float("inf"))
    return worst


def first_line(error: BaseException) -> str:
    """What an exception says first."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
