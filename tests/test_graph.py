"""What follows a layer, on models written in every style."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from slr_gpu.graph import find_sites, fold_batch_norm


class Functional(nn.Module):
    """Functions, methods, in-place operations and data-dependent control flow."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(4, 4, 3, padding=1)
        self.d = nn.Conv2d(4, 4, 1)
        self.e = nn.Linear(4, 4)
        self.f = nn.Linear(4, 4)
        self.g = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = self.b(x).relu_()
        skip = self.c(x)
        x = F.relu(skip + x)
        if float(x.sum()) > -1:  # torch.fx cannot trace this
            x = F.leaky_relu(self.d(x), 0.2)
        x = x.mean((2, 3))
        x = F.gelu(self.e(x), approximate="tanh")
        x = torch.clamp(self.f(x), min=0)
        return F.dropout(self.g(x), training=False).sigmoid()


def sites_of(model, x):
    model.eval()
    with torch.no_grad():
        return find_sites(model, lambda: model(x))


def test_activations_are_found_by_execution():
    sites = sites_of(Functional(), torch.randn(2, 3, 5, 5))
    found = {name: site.activation for name, site in sites.items()}
    assert found == {
        "a": "relu",
        "b": "relu",
        "c": "identity",
        "d": "leaky_relu(0.2)",
        "e": "gelu_tanh",
        "f": "identity",
        "g": "sigmoid",
        "unused": "identity",
    }
    assert sites["unused"].calls == 0 and list(sites)[-1] == "unused"


@pytest.mark.parametrize(
    "module,name",
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "clamp(0,6)"),
        (nn.Hardtanh(-2, 2), "clamp(-2,2)"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.Hardswish(), "hardswish"),
        (nn.Tanh(), "tanh"),
        (nn.MaxPool2d(2), "identity"),
        (nn.ELU(), "identity"),
    ],
)
def test_activation_modules(module, name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), module)
    site = sites_of(model, torch.randn(2, 3, 6, 6))["0"]
    assert site.activation == name and site.batch_norm == "1"


def test_response_used_twice_is_identity():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.a(x)
            return self.bn(y) + F.relu(y)

    site = sites_of(Twice(), torch.randn(4, 3))["a"]
    assert site.activation == "identity" and site.batch_norm is None


class Reads(nn.Module):
    """The second layer's response goes through a ReLU, and `also` of it is returned too."""

    def __init__(self, also):
        super().__init__()
        self.a, self.b, self.c, self.also = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), also

    def forward(self, x):
        h = self.b(F.relu(self.a(x)))
        return self.c(torch.relu(h)), self.also(h)


@pytest.mark.parametrize("also", [lambda h: h, lambda h: h.T, lambda h: [{"h": h.mT}]])
def test_what_is_returned_or_transposed_is_used(also):
    site = sites_of(Reads(also), torch.randn(3, 4))["b"]
    assert site.activation == "identity" and "more than once" in site.note


def test_reading_a_shape_is_no_use():
    for also in (len, torch.numel, lambda h: h.shape, lambda h: (h.device, h.size(0), h.ndim)):
        assert sites_of(Reads(also), torch.randn(3, 4))["b"].activation == "relu"


def test_a_norm_is_not_folded_into_a_response_that_is_returned():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            h = self.a(x)
            return self.norm(h), h

    assert sites_of(Both(), torch.randn(3, 4))["a"].batch_norm is None


@pytest.mark.parametrize(
    "function,name",
    [(torch.relu, "relu"), (F.gelu, "gelu"), (lambda input: F.relu6(input=input), "clamp(0,6)")],
)
def test_activations_called_by_name(function, name):
    class Named(Functional):
        def forward(self, x):
            return self.b(function(input=self.a(x)))

    assert sites_of(Named(), torch.randn(2, 3, 5, 5))["a"].activation == name


def test_a_module_of_two_tensors_is_no_activation():
    class AddReLU(nn.Module):
        def forward(self, x, skip=0.0):
            return torch.relu(x + skip)

    class Residual(nn.Module):
        def __init__(self, *more):
            super().__init__()
            self.a, self.act, self.more = nn.Linear(4, 4), AddReLU(), more

        def forward(self, x):
            return self.act(self.a(x), *self.more)

    for more, name in (((), "relu"), ((torch.ones(4),), "identity"), ((0.5,), "identity")):
        assert sites_of(Residual(*more), torch.randn(3, 4))["a"].activation == name


class Swish(nn.Module):
    """The user's own, with a module inside."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(x)


class Clip(nn.Module):
    def forward(self, x):
        return torch.minimum(torch.relu(x), torch.tensor(6.0))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1, 1) > 0.5) if self.training else x


class Centre(nn.Module):
    """Of one tensor to one of its shape, but not elementwise."""

    def forward(self, x):
        return torch.relu(x - x.mean(1, keepdim=True))


@pytest.mark.parametrize(
    "modules,name,note",
    [
        ([Swish()], "silu", ""),
        ([Clip()], "clamp(0,6)", ""),
        ([DropPath(), nn.ReLU()], "relu", ""),
        ([QuickGELU()], "identity", "QuickGELU is not supported"),
        ([Centre()], "identity", "Centre is not supported"),
        ([nn.ELU()], "identity", "ELU is not supported"),
        ([nn.PReLU()], "identity", "PReLU is not supported"),
        ([nn.Flatten(), nn.SiLU()], "silu", ""),
    ],
)
def test_modules_of_the_users_own_are_asked(modules, name, note):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *modules)
    site = sites_of(model, torch.randn(2, 3, 6, 6))["0"]
    assert site.activation == name
    assert note in site.note if note else not site.note


def test_shapes_may_change_before_the_activation():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x):
            x = F.gelu(self.a(x).transpose(1, 2).contiguous())
            return F.elu(self.b(x).flatten(1))

    sites = sites_of(Turned(), torch.randn(2, 3, 6))
    assert sites["a"].activation == "gelu" and sites["b"].note.startswith("elu is not supported")


@pytest.mark.parametrize(
    "layers,folded,activation",
    [
        ([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()], "1", "relu"),
        ([nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU()], "1", "relu"),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)], None, "relu"),
        ([nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU()], None, "relu"),
        (
            [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()],
            None,
            "identity",
        ),
        ([nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()], None, "identity"),
        ([nn.Conv2d(3, 4, 3), nn.Dropout2d(), nn.BatchNorm2d(4), nn.ReLU()], None, "identity"),
    ],
)
def test_places_of_a_norm(layers, folded, activation):
    model = nn.Sequential(*layers)
    site = next(iter(sites_of(model, torch.randn(2, 3, 6, 6)).values()))
    assert site.batch_norm == folded and site.activation == activation


def test_shared_module_is_counted():
    shared = nn.Linear(3, 3)
    sites = sites_of(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(4, 3))
    assert list(sites) == ["0"] and sites["0"].calls == 2


def test_folding_keeps_the_function_and_shared_norms_are_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 6, 6)
    site = sites_of(model, x)["0"]
    before = model(x)
    fold_batch_norm(model, site)
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    assert isinstance(model[1], nn.Identity)
    norm = nn.BatchNorm2d(3)
    twice = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm)
    assert all(site.batch_norm is None for site in sites_of(twice, x).values())


def test_hooks_are_removed_after_an_error():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            self.a(x)
            raise ValueError("broken")

    model = Broken().eval()
    with pytest.raises(ValueError, match="broken"):
        find_sites(model, lambda: model(torch.randn(2, 3)))
    assert not model.a._forward_hooks and not model.a._forward_pre_hooks
