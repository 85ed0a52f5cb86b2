"""Fashion-MNIST as arrays, as network inputs, and the figures of merit on it.

In: the four IDX files of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747). Out:
images and labels as NumPy arrays, normalised inputs as a tensor, calibration images drawn from
the training set only, and for a model its logits, accuracy, and comparison with the original:
mean KL(original || new) = mean_i sum_c p_ic (log p_ic - log q_ic), in nats.
"""

from __future__ import annotations

import gzip
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from slr_gpu.errors import InputError, complain

DEFAULT_ROOTS = (Path("/usr/share/datasets/fashion-mnist"),)
FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
GET_DATA = (
    "Install Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), "
    "or give the folder that holds the files with --data."
)

# Mean and standard deviation of the training pixels in [0, 1], zero padding to 32x32 included.
PIXEL_MEAN = 0.2190
PIXEL_STD = 0.3318
INPUT_SIZE = 32


def _read_idx(path: Path, axes: int) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes: magic 00 00 08 axes, sizes, values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            complain(f"{path}, which cannot be read ({error})", "a gzipped IDX file", GET_DATA)
        ) from error
    header = 4 + 4 * axes
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
    if content[:4] != bytes((0, 0, 8, axes)) or len(content) - header != np.prod(shape):
        raise InputError(
            complain(
                f"{path} of {len(content)} bytes that start with {content[:4].hex(' ')}",
                f"an IDX file of unsigned bytes with {axes} axes, as long as its header says",
                GET_DATA,
            )
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def fashion_mnist(
    root: str | Path | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read Fashion-MNIST from its gzipped IDX files.

    Parameters
    ----------
    root : str or Path, optional
        Folder with the four files. By default the first of `DEFAULT_ROOTS` that has them.

    Returns
    -------
    train_images, train_labels, test_images, test_labels : np.ndarray
        uint8, of shapes (60000, 28, 28), (60000,), (10000, 28, 28) and (10000,).

    Raises
    ------
    InputError
        If files are missing, damaged, or do not belong together.
    """
    roots = DEFAULT_ROOTS if root is None else (Path(root),)
    missing = {folder: [f for f in FILES if not (folder / f).is_file()] for folder in roots}
    folder = next((folder for folder in roots if not missing[folder]), None)
    if folder is None:
        got = "; ".join(f"{where} without {', '.join(files)}" for where, files in missing.items())
        raise InputError(complain(got, f"a folder with {', '.join(FILES)}", GET_DATA))

    train_images, train_labels, test_images, test_labels = (
        _read_idx(folder / name, axes=3 if "images" in name else 1) for name in FILES
    )
    for name, images, labels in (
        ("training", train_images, train_labels),
        ("test", test_images, test_labels),
    ):
        if len(images) != len(labels) or images.shape[1:] != (28, 28):
            raise InputError(
                complain(
                    f"{name} images of shape {images.shape} and {len(labels)} labels in {folder}",
                    "28x28 images with one label each",
                    GET_DATA,
                )
            )
    return train_images, train_labels, test_images, test_labels


def to_inputs(images: np.ndarray) -> torch.Tensor:
    """Turn grey images into what the network reads.

    Parameters
    ----------
    images : np.ndarray
        (N, height, width) uint8, height and width even and at most 32.

    Returns
    -------
    torch.Tensor
        (N, 1, 32, 32) float32: zero-padded equally on all sides, then (pixel / 255 - mean) /
        standard deviation. The padding comes first, so it gets the value of a black pixel.
    """
    images = np.asarray(images)
    if (
        images.ndim != 3
        or images.dtype != np.uint8
        or any(size > INPUT_SIZE or size % 2 for size in images.shape[1:])
    ):
        raise InputError(
            complain(
                f"images of shape {images.shape} and type {images.dtype}",
                f"(N, height, width) uint8 with even sides of at most {INPUT_SIZE}",
                "Pass the arrays that fashion_mnist() returns.",
            )
        )
    top, left = ((INPUT_SIZE - size) // 2 for size in images.shape[1:])
    inputs = torch.zeros(len(images), 1, INPUT_SIZE, INPUT_SIZE)
    inputs[:, 0, top : INPUT_SIZE - top, left : INPUT_SIZE - left] = torch.tensor(images)
    return inputs.div_(255).sub_(PIXEL_MEAN).div_(PIXEL_STD)


def calibration_images(train_images: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Draw calibration images without replacement.

    Parameters
    ----------
    train_images : np.ndarray
        (N, 28, 28). Training images only: a choice made on test images spoils the test.
    count : int
        How many, 1 <= count <= N.
    seed : int
        The same seed draws the same images in the same order.

    Returns
    -------
    np.ndarray
        (count, 28, 28), a copy.
    """
    if not 1 <= count <= len(train_images):
        raise InputError(
            complain(
                f"count = {count}",
                f"1 to {len(train_images)}",
                "Ask for no more calibration images than there are training images.",
            )
        )
    return train_images[np.random.default_rng(seed).choice(len(train_images), count, replace=False)]


def show_progress(items: Iterable, description: str, total: int, after_s: float = 2.0) -> Iterator:
    """Yield the items; show a bar on standard error once they have taken `after_s` seconds."""
    console = Console(stderr=True)
    progress = Progress(console=console, transient=True)
    task = progress.add_task(description, total=total)
    begin, shown = time.perf_counter(), False
    try:
        for item in items:
            yield item
            progress.advance(task)
            # On a pipe there is nothing to animate, and rich would print empty lines.
            if not shown and console.is_terminal and time.perf_counter() - begin > after_s:
                progress.start()
                shown = True
    finally:
        if shown:
            progress.stop()


@torch.inference_mode()
def predict(model: nn.Module, inputs: torch.Tensor, batch_size: int = 500) -> torch.Tensor:
    """Logits (N, classes) of a model in evaluation mode, on the CPU.

    The batches go to the device of the model's parameters; the modes of all modules are as
    before when this returns or raises.
    """
    parameter = next(model.parameters(), None)
    device = inputs.device if parameter is None else parameter.device
    modes = [(module, module.training) for module in model.modules()]
    batches = inputs.split(batch_size)
    try:
        model.eval()
        progress = show_progress(batches, "evaluating", total=len(batches))
        return torch.cat([model(batch.to(device)).cpu() for batch in progress])
    finally:
        for module, training in modes:
            module.training = training


def accuracy(
    model: nn.Module, inputs: torch.Tensor, labels: np.ndarray, batch_size: int = 500
) -> float:
    """Share of inputs, 0 to 1, whose largest logit is at the label (N,)."""
    return _agreement(predict(model, inputs, batch_size).argmax(1), torch.as_tensor(labels))


@dataclass(frozen=True)
class Comparison:
    """How a changed network answers, beside the original one.

    Attributes
    ----------
    accuracy : float
        Share of inputs, 0 to 1, that the new network labels correctly.
    agreement : float
        Share of inputs, 0 to 1, on which both networks predict the same class.
    kl : float
        Mean KL(original || new) of the predicted distributions, in nats.
    """

    accuracy: float
    agreement: float
    kl: float


def compare(
    original_logits: torch.Tensor, new_logits: torch.Tensor, labels: np.ndarray
) -> Comparison:
    """Compare the logits (N, classes) of two networks on the same inputs, with labels (N,)."""
    labels = torch.as_tensor(labels)
    if original_logits.shape != new_logits.shape or len(labels) != len(new_logits):
        raise InputError(
            complain(
                f"logits of shapes {tuple(original_logits.shape)} and {tuple(new_logits.shape)} "
                f"with {len(labels)} labels",
                "equal shapes (N, classes) and N labels",
                "Run both networks on the same inputs.",
            )
        )
    # float64, because the divergence of two nearly equal networks is a small difference.
    log_p = original_logits.double().log_softmax(1)
    log_q = new_logits.double().log_softmax(1)
    prediction = new_logits.argmax(1)
    return Comparison(
        accuracy=_agreement(prediction, labels),
        agreement=_agreement(prediction, original_logits.argmax(1)),
        kl=(log_p.exp() * (log_p - log_q)).sum(1).mean().item(),
    )


def _agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first == second).double().mean().item()
