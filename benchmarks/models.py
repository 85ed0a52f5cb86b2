"""Networks that the benchmarks compress: plain definitions and their weights.

In: the number of classes and of input channels. Out: an untrained `nn.Sequential` whose
parameter names (`features.N`, `classifier.N`) are those of the stored checkpoints, and
`load_weights`, which fills such a network from a safetensors file.

`resnet18` is the network of He et al., *Deep residual learning for image recognition* (arXiv
1512.03385), at half of its widths and with a small stem, which a CPU trains in minutes.

`waveform` reads one channel of sound, as networks that estimate pitch do.

VGG-16 is the network of Simonyan and Zisserman, *Very deep convolutional networks for
large-scale image recognition* (arXiv 1409.1556, configuration D), in the form that is usual
for 32x32 images: batch normalisation after each convolution, and a small classifier on the
one remaining position.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from slr_gpu.errors import InputError, complain

POOL = "pool"
VGG16_FEATURES = (
    64, 64, POOL,
    128, 128, POOL,
    256, 256, 256, POOL,
    512, 512, 512, POOL,
    512, 512, 512, POOL,
)  # fmt: skip


def vgg16(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """VGG-16 with batch normalisation for images of 32x32 pixels.

    Parameters
    ----------
    num_classes : int
        Outputs of the last linear layer.
    in_channels : int
        Channels of the input images.

    Returns
    -------
    nn.Sequential
        Maps (N, in_channels, 32, 32) to logits (N, num_classes). 15.2 million parameters in
        13 convolutions (3x3, without bias, because the normalisation that follows has one)
        and 3 linear layers. In training mode, with PyTorch's default initialisation.
    """
    features: list[nn.Module] = []
    channels = in_channels
    for width in VGG16_FEATURES:
        if width == POOL:
            features.append(nn.MaxPool2d(2))
            continue
        features += [
            nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width

    # Five poolings leave one position of a 32x32 image, so the classifier reads `channels`.
    classifier = [
        nn.Flatten(),
        nn.Linear(channels, 512),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(512, num_classes),
    ]
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*features),
            classifier=nn.Sequential(*classifier),
        )
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            convolution = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18(num_classes: int = 10, in_channels: int = 1, width: int = 32) -> nn.Sequential:
    """ResNet-18 for images of 32x32 pixels: a 3x3 stem of stride 2, then stages of 2 blocks.

    Parameters
    ----------
    num_classes, in_channels : int
        Outputs of the last linear layer, channels of the input images.
    width : int
        Of the first stage; 64 in the paper.

    Returns
    -------
    nn.Sequential
        Maps (N, in_channels, 32, 32) to logits (N, num_classes). 2.8 million parameters and 35
        million multiply-adds an image at the default width, nearly all in 3x3 convolutions.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    channels = width
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            layers.append(BasicBlock(channels, width << stage, stride))
            channels = width << stage
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    return nn.Sequential(*layers, *head)


def waveform(num_classes: int = 360, in_channels: int = 1) -> nn.Sequential:
    """A 1-D convolutional network for frames of 1024 samples of sound.

    Returns
    -------
    nn.Sequential
        Maps (N, in_channels, 1024) to scores (N, num_classes): six convolutions of 512 to 3 taps,
        each with batch normalisation, ReLU and pooling, and a linear layer. 3.7 million parameters.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for width, taps, stride in (
        (128, 512, 4), (128, 31, 1), (128, 31, 1), (256, 15, 1), (256, 15, 1), (512, 3, 1),
    ):  # fmt: skip
        layers += [
            nn.Conv1d(channels, width, taps, stride, taps // 2, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.MaxPool1d(2),
        ]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4, num_classes))


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill a model from a safetensors file; every name and shape must match.

    Parameters
    ----------
    model : nn.Module
        Changed in place. Its own precision is kept: half-precision weights in the file
        become float32 in a float32 model.
    path : str or Path
        File with one tensor per entry of the model's `state_dict`. The counters
        `num_batches_tracked` of batch normalisation may be absent.

    Returns
    -------
    nn.Module
        The same model, in evaluation mode.

    Raises
    ------
    InputError
        If the file is missing, is not safetensors, or belongs to another network.
    """
    path = Path(path)
    make_one = "Make one with `python -m benchmarks.train_fashion_mnist --out FILE`."
    if not path.is_file():
        raise InputError(complain(f"no file at {path}", "a safetensors checkpoint", make_one))
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise InputError(
            complain(f"{path}, which does not parse ({error})", "a safetensors file", make_one)
        ) from error
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise InputError(
            complain(
                f"weights in {path} that do not fit the model ({error})",
                "the names and shapes of its state_dict",
                "Build the network that the file was saved from, with as many classes and "
                "input channels.",
            )
        ) from error
    return model.eval()
