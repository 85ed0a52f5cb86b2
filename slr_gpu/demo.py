"""The demonstration: train a small network on bundled digits, compress it, compare.

In: nothing but scikit-learn's 1797 handwritten digits. Out: the table of layers and the test
accuracies before and after. Calibration uses training images without labels; test images are
used for the accuracies alone.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from .compress import compress
from .errors import BackendError, complain
from .progress import progress_bar

EPOCHS = 8


def network() -> nn.Sequential:
    """A small convolutional network for 1x16x16 images."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 96, 3, padding=1, bias=False),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96 * 16, 96),
        nn.ReLU(),
        nn.Linear(96, 10),
    )


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, labels, test images, labels; images (N, 1, 16, 16) in [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BackendError(
            complain("no scikit-learn", "its bundled digits", "Run pip install 'slr_gpu[demo]'.")
        ) from error
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1297], order[1297:]
    return images[train], labels[train], images[test], labels[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> None:
    """A few epochs of SGD with a one-cycle schedule."""
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * (len(images) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    model.train()
    with progress_bar("training on digits", steps) as advance:
        for _ in range(EPOCHS):
            order = torch.randperm(len(images), generator=generator)
            for batch in order[: len(order) // 64 * 64].split(64):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance()
    model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images labelled correctly."""
    return float((model(images).argmax(1) == labels).float().mean())


def run(keep: float = 0.25, seed: int = 0) -> None:
    """Train, compress, print."""
    console = Console()
    images, labels, test_images, test_labels = digits(seed)
    torch.manual_seed(seed)
    model = network()
    began = time.perf_counter()
    train(model, images, labels, seed)
    before = accuracy(model, test_images, test_labels)
    console.print(f"trained on {len(images)} digits in {time.perf_counter() - began:.1f} s\n")
    result = compress(model, images, {"flops": keep}, seed=seed)
    result.report.print(console)
    after = accuracy(result.model.eval(), test_images, test_labels)
    console.print(
        f"\naccuracy on {len(test_images)} digits never seen: {before:.2%} before,"
        f" {after:.2%} after, no labels and no fine-tuning"
    )
