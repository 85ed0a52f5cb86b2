"""Train VGG-16 on Fashion-MNIST from scratch and save it as the benchmarks' checkpoint.

In: Fashion-MNIST. Out: a half-precision safetensors file that `models.load_weights` reads.
The recipe: 9 epochs of SGD with Nesterov momentum under a one-cycle learning rate (Smith and
Topin 2017, arXiv 1708.07120), random flips and shifts by up to 2 pixels, label smoothing 0.05.
A 2-core CPU takes hours for it, a GPU minutes:

    python -m benchmarks.train_fashion_mnist --out vgg16_fashion_mnist.safetensors

`train` is the loop alone, for other small networks and for fine-tuning.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.markup import escape
from safetensors.torch import save_file
from torch import nn

from benchmarks.data import accuracy, fashion_mnist, show_progress, to_inputs
from benchmarks.models import load_weights
from slr_gpu.errors import BackendError, InputError, SLRError, complain


@dataclass(frozen=True)
class Epoch:
    """Mean training loss (augmented inputs, training mode), its steps, and wall time."""

    loss: float
    step_losses: tuple[float, ...]
    seconds: float


def flip_and_shift(images: torch.Tensor, shift: int = 2) -> torch.Tensor:
    """Flip half of the images (N, c, h, w) left to right and shift each by up to `shift` pixels.

    What moves in repeats the border: background, wherever that surrounds the object.
    """
    count, _, height, width = images.shape
    device = images.device
    flipped = torch.rand(count, 1, 1, 1, device=device) < 0.5
    images = torch.where(flipped, images.flip(-1), images)
    padded = F.pad(images, (shift,) * 4, mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, c, dy, dx, h, w)
    dy, dx = torch.randint(2 * shift + 1, (2, count), device=device)
    return windows[torch.arange(count, device=device), :, dy, dx]


def train(
    model: nn.Module,
    inputs: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 128,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    label_smoothing: float = 0.05,
    augment: Callable[[torch.Tensor], torch.Tensor] | None = flip_and_shift,
    loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    seed: int = 0,
    on_epoch: Callable[[int, Epoch], None] | None = None,
) -> list[Epoch]:
    """Train a model in place by SGD with a one-cycle learning rate.

    Parameters
    ----------
    model : nn.Module
        Changed in place; trained on the device of its parameters, left in evaluation mode.
    inputs : torch.Tensor
        (N, ...) float. The last, incomplete batch of an epoch is left out.
    labels : torch.Tensor
        (N,) class indices, or whatever `loss_function` takes, with N along the first axis
        (for distillation: the original network's logits).
    epochs : int
        Passes over the inputs, >= 1.
    lr : float
        The largest learning rate of the cycle, > 0.
    batch_size, momentum, weight_decay, label_smoothing
        As in PyTorch; the momentum is Nesterov's and constant.
    augment : callable or None
        Applied to each batch of inputs on the model's device; None for none.
    loss_function : callable, optional
        (outputs, labels) -> scalar; by default cross-entropy with `label_smoothing`.
    seed : int
        Fixes order, augmentation and dropout. The caller's CPU generator is left as it was.
    on_epoch : callable, optional
        Called with the epoch's number, from 1, and its record.

    Returns
    -------
    list of Epoch

    Raises
    ------
    InputError
        If sizes or settings make no sense, or the loss stops being finite.
    """
    count = len(inputs)
    if count == 0 or len(labels) != count or epochs < 1 or batch_size < 1 or lr <= 0:
        raise InputError(
            complain(
                f"{count} inputs, {len(labels)} labels, epochs = {epochs}, "
                f"batch_size = {batch_size}, lr = {lr}",
                "as many labels as inputs, at least one of each, and positive settings",
                "Check the arguments of train().",
            )
        )
    batch_size = min(batch_size, count)
    steps = count // batch_size
    device = next(model.parameters()).device
    loss_function = loss_function or nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        # The schedule divides by the length of its phases, which is 0 in very short runs.
        optimizer, max_lr=lr, total_steps=max(epochs * steps, 4), cycle_momentum=False
    )  # fmt: skip

    history = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.train()
        for number in range(1, epochs + 1):
            begin = time.perf_counter()
            order = torch.randperm(count)[: steps * batch_size].split(batch_size)
            losses = []
            for rows in show_progress(order, f"epoch {number} of {epochs}", total=steps):
                batch, target = inputs[rows].to(device), labels[rows].to(device)
                loss = loss_function(model(augment(batch) if augment else batch), target)
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise InputError(
                        complain(
                            f"loss {losses[-1]} in step {len(losses)} of epoch {number}",
                            "a finite loss",
                            f"Lower the learning rate ({lr}) and check the inputs for NaN.",
                        )
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            record = Epoch(sum(losses) / steps, tuple(losses), time.perf_counter() - begin)
            history.append(record)
            if on_epoch:
                on_epoch(number, record)
    model.eval()
    return history


def save_weights(model: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Save a model in half precision; the file appears complete or not at all."""
    weights = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in model.state_dict().items()
        # Nothing reads this counter unless batch normalisation runs without momentum.
        if not name.endswith("num_batches_tracked")
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(weights, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def find_factory(name: str) -> Callable[[], nn.Module]:
    """Import the function that `pkg.module:factory` names."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            complain(
                f"--model {name} ({error})",
                "pkg.module:factory of a function without arguments that builds the network",
                "For example benchmarks.models:vgg16.",
            )
        ) from error


def check_writable(out: Path) -> None:
    """Make the folder of `out`; raise InputError if no file can be written there."""
    problem = f"--out {out}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem += f" ({error})"
    if out.is_dir() or not os.access(out.parent, os.W_OK) or not out.parent.is_dir():
        raise InputError(
            complain(problem, "a file name in a folder that can be written", "Choose another.")
        )


def main(
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes (safetensors).")],
    epochs: Annotated[int, typer.Option(min=1)] = 9,
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    lr: Annotated[float, typer.Option(help="Largest learning rate of the cycle.")] = 0.1,
    data: Annotated[Path | None, typer.Option(help="Folder with the IDX files.")] = None,
    seed: Annotated[int, typer.Option(help="For weights, order and augmentation.")] = 0,
    model: Annotated[str, typer.Option(help="pkg.module:factory")] = "benchmarks.models:vgg16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many images (a trial).")] = None,
) -> None:
    """Train a network on Fashion-MNIST and save it in half precision."""
    console = Console()
    try:
        # Whatever can fail for want of a file, folder or device fails before the hours of work.
        factory = find_factory(model)
        train_images, train_labels, test_images, test_labels = fashion_mnist(data)
        check_writable(out)
        if device != "cpu" and not torch.cuda.is_available():
            raise BackendError(
                complain(
                    f"--device {device} where torch {torch.__version__} finds no GPU",
                    "a device that torch can use",
                    "Install a CUDA build of torch and a driver, or leave --device out.",
                )
            )
        torch.manual_seed(seed)
        network = factory().to(device)

        train(
            network,
            to_inputs(train_images[:limit]),
            torch.tensor(train_labels[:limit], dtype=torch.long),
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            seed=seed,
            on_epoch=lambda number, epoch: console.print(
                f"epoch {number}: loss {epoch.loss:.4f}, {epoch.seconds:.0f} s"
            ),
        )
        save_weights(network, out, {"dataset": "Fashion-MNIST", "model": model, "seed": str(seed)})
        # Measure the file rather than the network in memory: rounding to half is part of it.
        load_weights(network, out)
        result = accuracy(network, to_inputs(test_images[:limit]), test_labels[:limit])
    except SLRError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    console.print(f"{escape(str(out))}: test accuracy {100 * result:.2f} %", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
