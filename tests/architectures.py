"""Small versions of the networks that users bring, written as their originals are.

`ARCHITECTURES` names a function for each, which makes the network with random weights, and the
shapes of its inputs. Widths are a tenth of the originals', structure is not: concatenation,
residual sums, bottlenecks, strides, groups, squeeze and excitation, attention, gates.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(c: int, n: int, k: int, stride: int = 1, groups: int = 1, act: type | None = nn.ReLU):
    """Convolution, BatchNorm and activation, as most of them write it."""
    layers = [
        nn.Conv2d(c, n, k, stride, k // 2, groups=groups, bias=False),
        nn.BatchNorm2d(n),
    ]
    return nn.Sequential(*layers, *([act(inplace=True)] if act is not None else []))


# -- chains ------------------------------------------------------------------------------------


class AlexNet(nn.Module):
    """Two groups in three convolutions, local response normalisation, as in 2012."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(5),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(16, 32, 5, padding=2, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(48, 48, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(48, 32, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(288, 64),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(64, 64),
            nn.ReLU(inplace=True),
            nn.Linear(64, 10),
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    c = 3
    for n in (12, 12, "M", 24, 24, "M", 32, 32, 32, "M"):
        if n == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(c, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(inplace=True)]
            c = n
    head = [nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, *head)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(40, 64),
        nn.Tanh(),
        nn.BatchNorm1d(64),
        nn.Linear(64, 64),
        nn.LeakyReLU(0.1),
        nn.Linear(64, 64),
        nn.Sigmoid(),
        nn.Linear(64, 5),
    )


class Pitch(nn.Module):
    """One-dimensional: long kernels on raw sound, dilated weight-normalised blocks after them."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv1d(1, 16, 32, 4, 14),
            nn.ReLU(),
            nn.BatchNorm1d(16),
            nn.MaxPool1d(2),
            nn.Conv1d(16, 24, 16, padding="same"),
            nn.ReLU(),
            nn.BatchNorm1d(24),
            nn.Dropout(0.25),
        )
        norm = nn.utils.parametrizations.weight_norm
        self.blocks = nn.ModuleList(
            norm(nn.Conv1d(24, 24, 3, padding=d, dilation=d)) for d in (1, 2, 4)
        )
        self.head = nn.Conv1d(24, 12, 1)

    def forward(self, x):
        x = self.front(x)
        for block in self.blocks:
            x = x + F.leaky_relu(block(x), 0.1)
        return torch.sigmoid(self.head(x).mean(-1))


class Volumes(nn.Module):
    """Three-dimensional, with a (2 + 1)-dimensional block."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.b = nn.Conv3d(8, 12, (1, 3, 3), padding=(0, 1, 1))
        self.c = nn.Conv3d(12, 16, (3, 1, 1), padding=(1, 0, 0))
        self.d, self.head = nn.Conv3d(16, 16, 3, 2, 1), nn.Linear(16, 4)

    def forward(self, x):
        x = F.max_pool3d(F.relu(self.norm(self.a(x))), 2)
        x = F.relu(self.d(F.relu(self.c(F.relu(self.b(x))))))
        return self.head(x.mean((2, 3, 4)))


# -- branches ----------------------------------------------------------------------------------


class Inception(nn.Module):
    def __init__(self, c: int, one: int, three: tuple, five: tuple, pool: int):
        super().__init__()
        self.one = conv(c, one, 1)
        self.three = nn.Sequential(conv(c, three[0], 1), conv(three[0], three[1], 3))
        self.five = nn.Sequential(conv(c, five[0], 1), conv(five[0], five[1], 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(c, pool, 1))

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class GoogLeNet(nn.Module):
    """Concatenated branches, and a second head that only training uses."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, 3, 2), conv(16, 16, 1), conv(16, 24, 3))
        self.a = Inception(24, 8, (12, 16), (4, 8), 8)
        self.b = Inception(40, 16, (12, 24), (4, 8), 8)
        self.auxiliary, self.head = nn.Linear(40, 10), nn.Linear(56, 10)

    def forward(self, x):
        x = self.a(self.stem(x))
        if self.training:
            return self.head(self.b(x).mean((2, 3))), self.auxiliary(x.mean((2, 3)))
        return self.head(F.max_pool2d(self.b(x), 2).mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, c: int, n: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, n, 3, stride, 1, bias=False), nn.BatchNorm2d(n)
        self.conv2, self.bn2 = nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.BatchNorm2d(n)
        self.relu = nn.ReLU(inplace=True)
        same = c == n and stride == 1
        self.downsample = None if same else conv(c, n, 1, stride, act=None)

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, c: int, n: int, stride: int, groups: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, n, 1, bias=False), nn.BatchNorm2d(n)
        self.conv2 = nn.Conv2d(n, n, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(n)
        self.conv3, self.bn3 = nn.Conv2d(n, 2 * n, 1, bias=False), nn.BatchNorm2d(2 * n)
        self.relu = nn.ReLU(inplace=True)
        same = c == 2 * n and stride == 1
        self.downsample = None if same else conv(c, 2 * n, 1, stride, act=None)

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


def _resnet(*blocks: nn.Module, width: int) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(conv(3, 16, 3), *blocks, *head)


def resnet18() -> nn.Module:
    blocks = [BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 32, 1)]
    return _resnet(*blocks, width=32)


def resnet50() -> nn.Module:
    blocks = [Bottleneck(16, 16, 1), Bottleneck(32, 16, 1), Bottleneck(32, 24, 2)]
    return _resnet(*blocks, width=48)


def resnext50() -> nn.Module:
    blocks = [Bottleneck(16, 32, 1, groups=4), Bottleneck(64, 32, 2, groups=4)]
    return _resnet(*blocks, width=64)


class DenseLayer(nn.Module):
    """BatchNorm and ReLU come first."""

    def __init__(self, c: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]):
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.first = nn.ModuleList(DenseLayer(16 + 8 * i, 8) for i in range(3))
        self.transition = nn.Sequential(
            nn.BatchNorm2d(40), nn.ReLU(inplace=True), nn.Conv2d(40, 20, 1), nn.AvgPool2d(2)
        )
        self.second = nn.ModuleList(DenseLayer(20 + 8 * i, 8) for i in range(2))
        self.norm, self.head = nn.BatchNorm2d(36), nn.Linear(36, 10)

    def forward(self, x):
        x = self.stem(x)
        for block, transition in ((self.first, self.transition), (self.second, nn.Identity())):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = transition(torch.cat(features, 1))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class UNet(nn.Module):
    """Skips over concatenation, transposed convolutions upwards."""

    def __init__(self):
        super().__init__()
        self.down1 = nn.Sequential(conv(2, 12, 3), conv(12, 12, 3))
        self.down2 = nn.Sequential(conv(12, 24, 3), conv(24, 24, 3))
        self.middle = nn.Sequential(conv(24, 32, 3), conv(32, 32, 3))
        self.up2, self.up1 = nn.ConvTranspose2d(32, 24, 2, 2), nn.ConvTranspose2d(24, 12, 2, 2)
        self.merge2, self.merge1 = conv(48, 24, 3), conv(24, 12, 3)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.middle(F.max_pool2d(b, 2))
        x = self.merge2(torch.cat([self.up2(x), b], 1))
        return self.out(self.merge1(torch.cat([self.up1(x), a], 1)))


# -- depthwise ---------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, squeezed: int, act: type, gate: type):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(c, squeezed, 1), nn.Conv2d(squeezed, c, 1)
        self.act, self.gate = act(), gate()

    def forward(self, x):
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    def __init__(self, c, n, expand, stride, act, gate=None):
        super().__init__()
        wide = c * expand
        squeeze = [] if gate is None else [SqueezeExcite(wide, 8, nn.ReLU, gate)]
        self.layers = nn.Sequential(
            conv(c, wide, 1, act=act),
            conv(wide, wide, 3, stride, groups=wide, act=act),
            *squeeze,
            conv(wide, n, 1, act=None),
        )
        self.residual = stride == 1 and c == n

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


def _mobile(act: type, gate: type | None) -> nn.Module:
    return nn.Sequential(
        conv(3, 12, 3, 2, act=act),
        InvertedResidual(12, 12, 4, 1, act, gate),
        InvertedResidual(12, 16, 4, 2, act, gate),
        InvertedResidual(16, 16, 4, 1, act, gate),
        conv(16, 48, 1, act=act),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


def mobilenet_v2() -> nn.Module:
    return _mobile(nn.ReLU6, None)


def mobilenet_v3() -> nn.Module:
    return _mobile(nn.Hardswish, nn.Hardsigmoid)


def efficientnet() -> nn.Module:
    return _mobile(nn.SiLU, nn.Sigmoid)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth: nothing when not training."""

    def forward(self, x):
        return x


class ConvNeXtBlock(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, c)
        self.gamma, self.drop_path = nn.Parameter(0.5 * torch.ones(c)), DropPath()

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 4, 4),
        LayerNorm2d(16),
        ConvNeXtBlock(16),
        LayerNorm2d(16),
        nn.Conv2d(16, 24, 2, 2),
        ConvNeXtBlock(24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(24),
        nn.Linear(24, 10),
    )


# -- attention ---------------------------------------------------------------------------------


class ViT(nn.Module):
    """`nn.MultiheadAttention` in blocks that normalise first, a class token, learned positions."""

    def __init__(self, width: int = 32, patches: int = 16):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, patches + 1, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                OrderedDict(
                    norm1=nn.LayerNorm(width),
                    attention=nn.MultiheadAttention(width, 4, batch_first=True),
                    norm2=nn.LayerNorm(width),
                    mlp=nn.Sequential(
                        nn.Linear(width, 2 * width),
                        nn.GELU(),
                        nn.Dropout(0.1),
                        nn.Linear(2 * width, width),
                    ),
                )
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            y = block["norm1"](x)
            x = x + block["attention"](y, y, y, need_weights=False)[0]
            x = x + block["mlp"](block["norm2"](x))
        return self.head(self.norm(x)[:, 0])


class BertLayer(nn.Module):
    """Separate projections, and normalisation after each sum."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.attention_out, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width)
        self.intermediate = nn.Linear(width, 2 * width)
        self.output, self.norm2 = nn.Linear(2 * width, width), nn.LayerNorm(width)
        self.heads, self.dropout = heads, nn.Dropout(0.1)

    def forward(self, x, mask):
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(-2, -1)) / q.shape[-1] ** 0.5 + mask
        context = (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.dropout(self.attention_out(context)))
        return self.norm2(x + self.dropout(self.output(F.gelu(self.intermediate(x)))))


class Bert(nn.Module):
    """Two inputs; a masked-word head whose weight is the embedding's."""

    def __init__(self, words: int = 50, width: int = 32, length: int = 12):
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BertLayer(width, 4) for _ in range(2))
        self.transform, self.decoder = nn.Linear(width, width), nn.Linear(width, words)
        self.decoder.weight = self.words.weight
        self.register_buffer("ids", torch.arange(length)[None], persistent=False)

    def forward(self, tokens, attention_mask):
        x = self.norm(self.words(tokens) + self.positions(self.ids[:, : tokens.shape[1]]))
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        for layer in self.layers:
            x = layer(x, mask)
        return self.decoder(F.gelu(self.transform(x)))


class Encoder(nn.Module):
    """torch's own encoder, which would fuse its layers away, on rows of sound features."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.project = nn.Linear(20, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 6)

    def forward(self, x):
        return self.head(self.encoder(self.project(x)).mean(1))


# -- the list ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """A network and the inputs that it takes.

    Attributes
    ----------
    make : callable
    shape : tuple of int
        Of one sample: channels first, then smooth axes; of a matrix, steps first.
    keep : float
        Fraction of the FLOPs that is asked for.
    words : int
        For inputs of words with a mask: the size of the vocabulary.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 16, 16)
    keep: float = 0.6
    words: int = 0


ARCHITECTURES = {
    "AlexNet": Architecture(AlexNet, (3, 32, 32)),
    "VGG": Architecture(vgg, (3, 24, 24)),
    "GoogLeNet": Architecture(GoogLeNet),
    "ResNet-18": Architecture(resnet18),
    "ResNet-50": Architecture(resnet50),
    "ResNeXt": Architecture(resnext50),
    "DenseNet": Architecture(DenseNet),
    "MobileNetV2": Architecture(mobilenet_v2, keep=0.75),
    "MobileNetV3": Architecture(mobilenet_v3, keep=0.75),
    "EfficientNet": Architecture(efficientnet, keep=0.75),
    "ConvNeXt": Architecture(convnext, keep=0.75),
    "U-Net": Architecture(UNet, (2, 16, 16)),
    "1-D pitch network": Architecture(Pitch, (1, 256)),
    "3-D convolutions": Architecture(Volumes, (1, 8, 8, 8)),
    "MLP": Architecture(mlp, (40,)),
    "ViT": Architecture(ViT, keep=0.7),
    "BERT": Architecture(Bert, (12,), keep=0.75, words=50),
    "nn.TransformerEncoder": Architecture(Encoder, (10, 20), keep=0.7),
}


def calibration(name: str, count: int = 96, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs that are alike where real ones are: smooth along their axes, or of low rank."""
    architecture = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(seed)
    if architecture.words:
        size = (count, *architecture.shape)
        tokens = torch.randint(0, architecture.words, size, generator=generator)
        lengths = torch.randint(4, size[1] + 1, (count, 1), generator=generator)
        return tokens, (torch.arange(size[1])[None] < lengths).to(torch.int64)
    x = torch.randn(count, *architecture.shape, generator=generator)
    if len(architecture.shape) <= 1 or name == "nn.TransformerEncoder":
        width = architecture.shape[-1]
        mix = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
        return (x @ (mix * 0.85 ** torch.arange(width)),)
    pools = {2: F.avg_pool1d, 3: F.avg_pool2d, 4: F.avg_pool3d}
    smooth = pools[len(architecture.shape)](x, 5, 1, 2)
    return (smooth / smooth.std() + 0.2 * x,)


def make(name: str, seed: int = 0) -> nn.Module:
    """A network with random weights, its running statistics those of its inputs, in eval mode."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name].make()
    with torch.no_grad():
        for _ in range(2):
            model.train()(*calibration(name))
    return model.eval()
