"""Models rewritten for deployment compute the same; channels are put in order where they may be."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_entries import random_entries
from test_layers import random_decomposition
from torch import nn

from slr_gpu.adapters import adapter_for
from slr_gpu.channel_orders import fold_orders
from slr_gpu.fold import for_deployment
from slr_gpu.pieces import Select

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {
    1: (nn.MaxPool1d, nn.AvgPool1d),
    2: (nn.MaxPool2d, nn.AvgPool2d),
    3: (nn.MaxPool3d, nn.AvgPool3d),
}


def decomposed(rng, layer, form, s, k, r=None):
    n, c = layer.weight.shape[:2]
    kernel = tuple(layer.weight.shape[2:])
    if form == "entries":
        return adapter_for(layer).build(layer, random_entries(rng, n, c, kernel, s, k)[0])
    return adapter_for(layer).build(layer, random_decomposition(rng, n, c, kernel, form, s, k, r))


def gathers(model):
    """Selections that are not one slice."""
    return sum(isinstance(m, Select) and len(m.slices) != 1 for m in model.modules())


def assert_same(model, x):
    before = copy.deepcopy(model.state_dict())
    deployed = for_deployment(model)
    with torch.no_grad():
        wanted, got = model(x), deployed(x)
    if isinstance(wanted, tuple):
        wanted, got = (torch.cat([y.flatten() for y in outputs]) for outputs in (wanted, got))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)
    return deployed


def random_norm(norm):
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize("seed", range(12))
def test_random_chains_of_convolutions(seed):
    """conv (dense or decomposed) -> (BN) -> activation -> (pooling) -> channels, several times."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    dims = 1 + seed % 3
    layers, channels, readers = [CONVS[dims](2, 6, 3, padding=1)], 6, 0
    for _ in range(3):
        if rng.random() < 0.5:
            layers.append(random_norm(NORMS[dims](channels)))
        layers.append([nn.ReLU(inplace=True), nn.GELU(), nn.Tanh()][rng.integers(3)])
        if rng.random() < 0.3:
            layers.append(POOLS[dims][rng.integers(2)](2, 1))
        n = int(rng.integers(4, 9))
        layer = CONVS[dims](channels, n, 3, padding=1)
        form = ["channels", "channels", "columns", "rotated"][rng.integers(4)]
        k = int(rng.integers(0, 3))
        s = int(rng.integers(1, channels - 1))
        layers.append(
            decomposed(rng, layer, form, s, k, channels - 1 if form == "rotated" else None)
        )
        readers += form == "channels"
        channels = n
    model = nn.Sequential(*layers).eval()
    deployed = assert_same(model, torch.randn(2, 2, *(9, 8, 7)[:dims]))
    for module in deployed.modules():
        if getattr(module, "form", "") == "channels":
            assert gathers(module) == 0


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("shape", [(5, 6), (5, 4, 6)])
def test_chains_of_linear_layers(k, shape):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = nn.Sequential(
        nn.Linear(6, 12),
        nn.ReLU(),
        decomposed(rng, nn.Linear(12, 40), "columns", 4, k),
        nn.Dropout(),
        nn.SiLU(),
        decomposed(rng, nn.Linear(40, 7), "columns", 9, k),
    ).eval()
    deployed = assert_same(model, torch.randn(shape))
    assert gathers(model) and not gathers(deployed)
    if not k:  # neurons that nobody reads are gone
        assert deployed[0].out_features == 4 and deployed[2].A.weight.shape == (9, 4)
    else:  # few zeros in V are cheaper than a second slice, many are not
        assert deployed[2].V.in_features == 12 and deployed[5].V.in_features == 31


def test_channels_that_single_columns_do_not_read_are_not_computed():
    rng = np.random.default_rng(0)
    reader = decomposed(rng, nn.Conv2d(8, 5, 3), "columns", 4, 0)
    read = {column // 9 for column in reader.kept}
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), reader).eval()
    deployed = assert_same(model, torch.randn(2, 2, 9, 9))
    assert deployed[0].out_channels == len(read) < 8


class Functional(nn.Module):
    """Functions and methods instead of modules."""

    def __init__(self, reader):
        super().__init__()
        self.maker, self.reader = nn.Conv2d(2, 8, 3), reader

    def forward(self, x):
        return self.reader(F.max_pool2d(F.relu(self.maker(x)).relu(), 2).contiguous())


class ByKeyword(Functional):
    def forward(self, x):
        y = F.relu(input=torch.cat(dim=1, tensors=[self.maker(input=x)]))
        return self.reader(F.max_pool2d(kernel_size=2, input=y))


class ReadTwice(Functional):
    def forward(self, x):
        y = F.relu(self.maker(x))
        return self.reader(y).mean((2, 3)) + y.mean((1, 2, 3))[:, None]


class TwoReaders(Functional):
    """The other reader's columns move along."""

    def __init__(self, reader):
        super().__init__(reader)
        self.other = nn.Conv2d(8, 5, 3)

    def forward(self, x):
        y = F.relu(self.maker(x))
        return self.reader(y) + self.other(y)


class Sum(Functional):
    def __init__(self, reader):
        super().__init__(reader)
        self.second, self.third = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = random_norm(nn.BatchNorm2d(8))

    def forward(self, x):
        y = F.relu(self.maker(x)) + self.second(x)
        y = y + self.norm(self.third(y))
        return self.reader(F.relu(y, inplace=True) / 2)


class Gate(Functional):
    """Squeeze and excite, then a depthwise convolution."""

    def __init__(self, reader):
        super().__init__(reader)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x):
        y = self.maker(x)
        gate = torch.sigmoid(self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()))
        return self.reader(self.depthwise(y * gate))


class SumWithWhatIsSeen(Sum):
    def forward(self, x):
        y, z = self.maker(x), self.second(x)
        return self.reader(y + z) + z.amax(1, keepdim=True)[..., 1:-1, 1:-1]


class SumOverBroadcast(Sum):
    def forward(self, x):
        return self.reader(self.maker(x) + x.mean((1, 2, 3), keepdim=True))


class Watched(Sum):
    def forward(self, x):
        y = self.maker(x)
        return self.reader(y), y


class CalledTwice(Functional):
    def forward(self, x):
        return self.reader(self.maker(x)) + self.reader(torch.tanh(self.maker(2 * x)))


class Mixing(Functional):
    """Softmax over channels keeps its meaning, a running sum over them does not."""

    def forward(self, x):
        return self.reader(self.maker(x).cumsum(1))


class WeightReadElsewhere(Functional):
    def forward(self, x):
        return self.reader(self.maker(x)) + self.maker.weight.sum((1, 2, 3))[:5, None, None]


class Untraceable(Functional):
    def forward(self, x):
        return self.reader(self.maker(x)) if bool(x.sum() < 1e9) else x


@pytest.mark.parametrize(
    "Model,folded",
    [
        (Functional, True),
        (ByKeyword, True),
        (TwoReaders, True),
        (Sum, True),
        (Gate, True),
        (ReadTwice, False),
        (SumWithWhatIsSeen, False),
        (SumOverBroadcast, False),
        (Watched, False),
        (CalledTwice, False),
        (Mixing, False),
        (WeightReadElsewhere, False),
        (Untraceable, False),
    ],
)
def test_where_the_order_may_change(Model, folded):
    torch.manual_seed(0)
    reader = decomposed(np.random.default_rng(0), nn.Conv2d(8, 5, 3), "channels", 3, 2)
    reader.select_A, reader.select_V = Select([1, 4, 6], 1), Select([0, 2, 3, 5, 7], 1)
    reader.kept = [1, 4, 6]
    model = Model(reader).eval()
    deployed = assert_same(model, torch.randn(2, 2, 12, 12))
    assert gathers(model) and (gathers(deployed) == 0) == folded
    assert fold_orders(copy.deepcopy(model)) == (["reader"] if folded else [])


class Concatenated(nn.Module):
    """Branches of several widths, a norm over all of them, and two readers."""

    def __init__(self, reader, other):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3), nn.Conv2d(2, 4, 3)
        self.norm, self.pool = random_norm(nn.BatchNorm2d(10)), nn.MaxPool2d(2)
        self.reader, self.other = reader, other

    def forward(self, x):
        y = self.pool(F.relu(self.norm(torch.cat([self.first(x), self.second(x)], 1))))
        return self.reader(y).mean((2, 3)) + self.other(y).mean((2, 3))


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_of_a_concatenation_have_orders_of_their_own(seed):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    readers = [decomposed(rng, nn.Conv2d(10, 5, 3), "channels", 4, k) for k in (2, 0)]
    model = Concatenated(*readers).eval()
    deployed = assert_same(model, torch.randn(2, 2, 12, 12))
    runs = deployed.reader.select_A.slices
    assert len(runs) <= 2 and sum(length for _, length in runs) == 4


def test_a_part_of_a_concatenation_that_nobody_reads_stays():
    rng = np.random.default_rng(0)
    n, c, kernel = 5, 10, (3, 3)
    found = random_decomposition(rng, n, c, kernel, "channels", 2, 0)
    reader = adapter_for(nn.Conv2d(c, n, 3)).build(
        nn.Conv2d(c, n, 3), found.replace(columns=np.r_[9:18, 27:36])
    )
    model = Concatenated(reader, copy.deepcopy(reader)).eval()
    model.norm = nn.Identity()
    deployed = assert_same(model, torch.randn(2, 2, 12, 12))
    assert deployed.first.out_channels == 2 and deployed.second.out_channels == 4


def test_a_layer_that_keeps_all_channels_follows_the_order_of_another():
    rng = np.random.default_rng(0)
    model = TwoReaders(decomposed(rng, nn.Conv2d(8, 5, 3), "channels", 3, 2))
    model.other = decomposed(rng, nn.Conv2d(8, 5, 3), "channels", 8, 0)
    assert not gathers(assert_same(model.eval(), torch.randn(2, 2, 12, 12)))


class Flattened(nn.Module):
    def __init__(self, how, rank):
        super().__init__()
        rng = np.random.default_rng(3)
        self.maker, self.how = nn.Conv2d(2, 8, 3), how
        features = 8 if how == "mean" else 8 * 16
        # Reads single features of few channels: the other channels need not be computed.
        self.reader = decomposed(rng, nn.Linear(features, 5), "columns", 3, rank)

    def forward(self, x):
        y = F.relu(self.maker(x))
        if self.how == "mean":
            y = y.mean([2, 3])
        elif self.how == "flatten":
            y = torch.flatten(y, 1)
        elif self.how == "method":
            y = y.flatten(start_dim=1)
        elif self.how == "keywords":
            y = torch.flatten(end_dim=-1, start_dim=1, input=y)
        elif self.how == "list":
            y = torch.reshape(y, [y.shape[0], -1])
        else:
            y = y.view(y.size(0), -1) if self.how == "size" else y.reshape(y.shape[0], -1)
        return self.reader(y)


@pytest.mark.parametrize("how", ["mean", "flatten", "method", "keywords", "list", "size", "shape"])
@pytest.mark.parametrize("rank", [0, 2])
def test_channels_of_a_flattened_map(how, rank):
    model = Flattened(how, rank).eval()
    deployed = assert_same(model, torch.randn(3, 2, 6, 6))
    block = 1 if how == "mean" else 16
    read = 8 if rank else len({feature // block for feature in model.reader.kept})
    assert deployed.maker.out_channels == read
    if how == "mean":
        assert gathers(model) and not gathers(deployed)


def test_flattening_the_batch_and_the_channels():
    """What is read then are columns of the map, as many as make blocks of the channels."""
    torch.manual_seed(0)
    reader = decomposed(np.random.default_rng(3), nn.Linear(16, 5), "columns", 3, 0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.maker, self.reader = nn.Conv2d(2, 8, 3), reader

        def forward(self, x):
            return self.reader(F.relu(self.maker(x)).flatten(end_dim=1))

    assert_same(Model().eval(), torch.randn(3, 2, 18, 18))


@pytest.mark.parametrize("seed", range(30))
def test_random_graphs(seed):
    """Readers of every form behind random sums, concatenations, norms and depthwise layers."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = RandomGraph(rng).eval()
    assert_same(model, torch.randn(2, 3, 8, 8))


class RandomGraph(nn.Module):
    """Maps of one size; each step reads maps made before."""

    def __init__(self, rng, steps=7):
        super().__init__()
        self.steps, self.layers = [], nn.ModuleList()
        widths = [3]
        for _ in range(steps):
            kind = rng.choice(["conv", "conv", "slr", "slr", "sum", "cat", "norm", "depthwise"])
            a = int(rng.integers(max(len(widths) - 3, 0), len(widths)))
            alike = [i for i, width in enumerate(widths) if width == widths[a] and i != a]
            if kind == "sum" and not alike:
                kind = "slr"
            b = int(rng.choice(alike)) if kind == "sum" else int(rng.integers(len(widths)))
            c, n = widths[a], int(rng.choice([4, 6, 8]))
            layer = nn.Identity()
            if kind in ("conv", "slr"):
                layer = nn.Conv2d(c, n, 3, padding=1)
                form = str(rng.choice(["channels", "channels", "columns", "rotated", "entries"]))
                if kind == "slr":
                    r = c - 1 if form == "rotated" else None
                    k = int(rng.integers(0 if form != "rotated" else 1, 3))
                    layer = decomposed(rng, layer, form, int(rng.integers(1, c - 1)), k, r)
            elif kind == "norm":
                layer = random_norm(nn.BatchNorm2d(c))
            elif kind == "depthwise":
                layer = nn.Conv2d(c, c, 3, padding=1, groups=c)
            self.steps.append((str(kind), a, b))
            self.layers.append(layer)
            widths.append({"sum": c, "cat": c + widths[b], "norm": c, "depthwise": c}.get(kind, n))
        self.last = nn.Conv2d(widths[-1], 2, 1)

    def forward(self, x):
        maps = [x]
        for (kind, a, b), layer in zip(self.steps, self.layers, strict=True):
            if kind == "sum":
                y = maps[a] + maps[b]
            elif kind == "cat":
                y = torch.cat([maps[a], maps[b]], dim=1)
            else:
                y = layer(maps[a])
            maps.append(torch.tanh(y))
        return self.last(maps[-1])


def test_what_is_watched_or_shared_keeps_its_order():
    rng = np.random.default_rng(0)
    reader = decomposed(rng, nn.Linear(8, 5), "columns", 3, 2)
    watched = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), reader).eval()
    watched[0].register_forward_hook(lambda *arguments: None)
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), reader).eval()
    tied[0].weight = tied[2].weight
    grouped = nn.Sequential(
        nn.Conv1d(8, 8, 1, groups=2), decomposed(rng, nn.Conv1d(8, 5, 1), "channels", 3, 2)
    ).eval()
    pooled = nn.Sequential(nn.Linear(8, 9), nn.AvgPool1d(2, 1), reader).eval()
    for model, x in (
        (watched, torch.randn(3, 8)),
        (tied, torch.randn(3, 8)),
        (grouped, torch.randn(3, 8, 4)),
        (pooled, torch.randn(3, 2, 8)),
    ):
        assert gathers(assert_same(model, x))
