"""The whole model: what comes out, what stays untouched, what is refused."""

from __future__ import annotations

import copy
import json
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slr_gpu
from slr_gpu.calibration import as_batches
from slr_gpu.capture import Sampler, record_references
from slr_gpu.flops import count_flops
from slr_gpu.frontier import Frontier
from slr_gpu.graph import find_sites


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 4),
    )


@pytest.fixture
def model():
    model = small_network().eval()
    model[3].running_mean.normal_()
    return model


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(120, 2, 4, 4, generator=generator)
    return F.interpolate(coarse, scale_factor=2, mode="bilinear")


def snapshot(model):
    return (
        copy.deepcopy(model.state_dict()),
        {name: m.training for name, m in model.named_modules()},
        {
            name: len(m._forward_hooks) + len(m._forward_pre_hooks)
            for name, m in model.named_modules()
        },
    )


def assert_unchanged(model, before):
    state, modes, hooks = before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    after = snapshot(model)
    assert after[1:] == (modes, hooks)


def test_compress_end_to_end(model, data, tmp_path):
    model[2].train()
    model[0].register_forward_hook(lambda *a: None)
    before = snapshot(model)
    result = slr_gpu.compress(model, data, {"params": 0.5, "flops": 0.5}, progress=False)
    assert_unchanged(model, before)
    # Modes come back as they were; the user's hooks stay with the user's model.
    assert result.model[2].training and not result.model[6].training
    assert not result.model[0]._forward_hooks
    report = result.report
    assert [layer.name for layer in report.layers if layer.compressed] == ["2", "6", "9"]
    assert {layer.reason for layer in report.layers if not layer.compressed} == {
        "first layer",
        "last layer",
    }
    # Counts of the report against the modules themselves and torch's own counter.
    assert report.params_kept == sum(p.numel() for p in result.model.parameters())
    assert report.flops_kept == count_flops(result.model.eval(), (data[:1],))[0]
    assert report.achieved["flops"] <= 0.5 and report.achieved["params"] <= 0.5
    assert sum(layer.flops for layer in report.layers) == report.flops
    held = [layer.error for layer in report.layers if layer.compressed]
    assert all(0 <= error < 0.5 for error in held)
    # A save and a load give the same bits.
    result.model.eval()
    result.save(tmp_path / "out")
    loaded = slr_gpu.load(tmp_path / "out", small_network)
    assert torch.equal(loaded(data), result.model(data))
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["achieved"] == report.achieved
    assert "kept" in str(report)


def test_same_seed_same_bits(model, data):
    first, second = (
        slr_gpu.compress(model, data, {"flops": 0.4}, seed=3, samples=400, progress=False)
        for _ in range(2)
    )
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


def test_compressed_model_is_made_of_its_decompositions(model, data, monkeypatch):
    module = sys.modules["slr_gpu.carry_out"]
    kept = {}

    def remember(layer_io, **settings):
        result = slr_gpu.fit(layer_io, **settings)
        kept[len(kept)] = result
        return result

    monkeypatch.setattr(module, "fit", remember)
    result = slr_gpu.compress(model, data, {"params": 0.5}, allocation="uniform", progress=False)
    dense = copy.deepcopy(model).eval()
    with torch.no_grad():
        for decomposition, index in zip(kept.values(), (2, 6, 9), strict=True):
            layer = dense[index]
            layer.weight.copy_(
                torch.from_numpy(decomposition.to_dense()).reshape(layer.weight.shape)
            )
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
            layer.bias.copy_(torch.from_numpy(decomposition.bias))
        dense[3] = nn.Identity()
        expected = dense(data)
    torch.testing.assert_close(result.model.eval()(data), expected, rtol=1e-4, atol=1e-4)


def test_asymmetric_inputs_do_better():
    """Errors add up over eight layers; only asymmetric fits see and correct them."""
    errors = {True: 0.0, False: 0.0}
    for seed in range(8):
        torch.manual_seed(seed)
        layers = []
        for _ in range(8):
            linear = nn.Linear(24, 24)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            layers += [linear, nn.ReLU()]
        model = nn.Sequential(*layers).eval()
        mix = torch.randn(24, 24) * 0.8 ** torch.arange(24)
        data, held_out = torch.randn(1500, 24) @ mix, torch.randn(500, 24) @ mix
        for asymmetric in errors:
            run = {"asymmetric": asymmetric, "allocation": "uniform", "progress": False}
            result = slr_gpu.compress(model, data, {"params": 0.4}, **run)
            with torch.no_grad():
                wanted = model(held_out)
                error = (result.model(held_out) - wanted).square().sum() / wanted.square().sum()
            errors[asymmetric] += float(error)
    assert errors[True] < 0.9 * errors[False]


class Untraceable(nn.Module):
    """Data-dependent control flow and two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 16)
        self.c, self.d = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x, scale):
        x = torch.relu(self.a(x) * scale)
        if bool((x.sum() > -1).item()):
            x = torch.relu(self.b(x))
        return self.d(torch.relu(self.c(x)))


def test_untraceable_model_with_two_inputs():
    torch.manual_seed(0)
    model = Untraceable().eval()
    data = [(torch.randn(40, 6), torch.ones(40, 1)) for _ in range(3)]
    result = slr_gpu.compress(model, data, {"params": 0.6}, progress=False)
    assert {layer.name for layer in result.report.layers if layer.compressed} == {"b", "c"}
    result.model(*data[0])


def test_inputs_of_varying_length():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    ).eval()
    data = [torch.randn(20, length, 6) for length in (3, 7, 5)]
    result = slr_gpu.compress(model, data, {"params": 0.6}, samples=200, progress=False)
    assert [layer.name for layer in result.report.layers if layer.compressed] == ["2"]


class Block(nn.Module):
    """Residual sum, concatenation and a strided shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.a, self.norm = nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.b, self.shortcut = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, stride=2)
        self.c, self.head = nn.Conv2d(16, 12, 3), nn.Linear(12, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.norm(self.a(x)))
        y = F.relu(self.b(y) + self.shortcut(x))
        z = F.silu(self.c(torch.cat([y, y * 2], 1)))
        return self.head(z.mean((2, 3)))


@pytest.mark.parametrize("keep", [{"flops": 0.5}, {"params": 0.5}, {"flops": 0.6, "params": 0.5}])
def test_branches_strides_and_budgets(data, keep):
    torch.manual_seed(0)
    model = Block().eval()
    for allocation in ("uniform", "output"):
        run = {"allocation": allocation, "progress": False}
        report = slr_gpu.compress(model, data, keep, **run).report
        left = {x.name: x.reason for x in report.layers if x.name not in ("stem", "head")}
        assert list(left) == ["a", "b", "shortcut", "c"]
        assert set(left.values()) <= (
            {""} if allocation == "uniform" else {"", "dense in the plan"}
        )
        for resource, fraction in keep.items():
            assert report.achieved[resource] <= fraction


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims):
    torch.manual_seed(0)
    Conv = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    model = nn.Sequential(
        Conv(2, 8, 3, padding=1),
        nn.ReLU(),
        Conv(8, 8, 3, padding=2, dilation=2),
        nn.LeakyReLU(),
        Conv(8, 4, 3),
    ).eval()
    x = torch.randn(40, 2, *(7,) * dims)
    result = slr_gpu.compress(model, x, {"flops": 0.8}, keep_ends=False, progress=False)
    assert result.model(x).shape == model(x).shape
    assert result.report.achieved["flops"] <= 0.8


def test_frontier_equals_rerun(model, data):
    """Carrying batches forward gives the inputs that running from the start gives."""
    model.eval()
    batches = as_batches(data, model, 50)
    names = ["0", "2", "6", "9", "11"]
    carried, rerun = Frontier(model, batches, names), Frontier(model, batches, names)
    assert carried.traced
    rerun.traced = False
    for name in names:
        for (_, x), (_, y) in zip(carried.inputs(name), rerun.inputs(name), strict=True):
            assert torch.equal(x, y)


def test_references_are_the_responses_before_in_place_activations(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True)).eval()
    batches = as_batches(data, model, 64)
    with torch.no_grad():
        sites = find_sites(model, lambda: model(data[:1]))
    references = record_references(
        model, batches, list(sites.values()), Sampler(120 * 64, [64, 56], 0), with_inputs=True
    )
    with torch.no_grad():
        expected = model[0](data).flatten(2).transpose(1, 2).reshape(-1, 3)
    np.testing.assert_allclose(references.linear_targets["0"], expected, rtol=1e-5, atol=1e-6)
    assert (references.linear_targets["0"] < 0).any()


def test_options_by_name(model, data):
    result = slr_gpu.compress(
        model,
        data,
        {"params": 0.6},
        ignore=["9"],
        keep_ends=False,
        allocation="uniform",
        progress=False,
        overrides={"2": {"keep": 0.3, "form": "channels"}},
    )
    rows = {layer.name: layer for layer in result.report.layers}
    assert rows["9"].reason == "ignored by name" and rows["0"].compressed
    assert rows["2"].structure.startswith("channels")
    assert rows["2"].params_kept <= 0.3 * rows["2"].params + 16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_model_comes_back_in_its_dtype(model, data, dtype, tmp_path):
    """Fitted in float32, whatever the model is in: nearly the fits of a float model."""
    reference = slr_gpu.compress(model, data, {"params": 0.5}, progress=False)
    result = slr_gpu.compress(model.to(dtype), data, {"params": 0.5}, progress=False)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    got, expected = result.model(data.to(dtype)).float(), model(data.to(dtype)).float()
    error = reference.model(data) - expected
    assert (got - expected).norm() < 1.2 * error.norm() + 0.02 * expected.norm()
    result.save(tmp_path)
    loaded = slr_gpu.load(tmp_path, lambda: small_network().to(dtype))
    assert torch.equal(loaded(data.to(dtype)), result.model(data.to(dtype)))


def test_mixed_precision_comes_back_as_it_was(model, data):
    model[2:9].bfloat16()  # float32 before and behind

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x):
            for layer in self.layers:
                weight = next(layer.parameters(), None)
                x = x if weight is None else x.to(weight.dtype)
                x = layer(x)
            return x

    result = slr_gpu.compress(Mixed().eval(), data, {"params": 0.5}, progress=False)
    kinds = {n: p.dtype for n, p in result.model.named_parameters()}
    assert kinds["layers.0.weight"] == torch.float32
    assert {kinds[n] for n in kinds if n.startswith("layers.2.")} == {torch.bfloat16}
    assert {kinds[n] for n in kinds if n.startswith("layers.9.")} == {torch.float32}
    result.model(data)


def test_frozen_models_and_buffers_come_back_as_they_were(model, data, tmp_path):
    model.half().requires_grad_(False).register_buffer("scale", torch.tensor([1.0001]))
    result = slr_gpu.compress(model, data, {"params": 0.5}, refine=True, progress=False)
    assert not any(parameter.requires_grad for parameter in result.model.parameters())
    assert torch.equal(result.model.scale, torch.tensor([1.0001]))
    assert {p.dtype for p in result.model.parameters()} == {torch.float16}


@pytest.mark.filterwarnings("ignore:.*non-meta parameter")
def test_load_builds_where_the_factory_does(model, data, tmp_path):
    slr_gpu.compress(model, data, {"params": 0.5}, progress=False).save(tmp_path)
    loaded = slr_gpu.load(tmp_path, lambda: small_network().to("meta"))
    assert {p.device.type for p in loaded.parameters()} == {"meta"}


def test_masks_of_infinities_and_classes_ruled_out():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 4)
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf, 0.0]))

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x))))) + self.mask

    torch.manual_seed(0)
    model, data = Masked().eval(), torch.randn(60, 8)
    for loss in ("kl", "mse"):
        run = {"loss": loss, "refine": slr_gpu.Refinement(epochs=2), "progress": False}
        result = slr_gpu.compress(model, data, {"params": 0.8}, **run)
        assert result.report.achieved["params"] <= 0.8
        assert 0 < result.report.refinement["before"] < 1
        assert all(p.isfinite().all() for p in result.model.parameters())
    model.mask[0] = torch.nan
    with pytest.raises(slr_gpu.InputError, match="NaN or Inf in mask"):
        slr_gpu.compress(model, data, {"params": 0.8}, progress=False)


def test_flops_of_a_module_with_two_names():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            shared = nn.Linear(16, 16)
            self.f = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), shared)
            self.g = nn.Sequential(shared, nn.ReLU(), nn.Linear(16, 3))

        def forward(self, x):
            return self.g(F.relu(self.f(x)))

    torch.manual_seed(0)
    run = {"allocation": "uniform", "progress": False}
    report = slr_gpu.compress(Shared(), torch.randn(40, 4), {"flops": 0.8}, **run).report
    rows = {row.name: row for row in report.layers}
    assert rows["f.2"].flops == 2 * 2 * 16 * 16  # called twice
    assert sum(row.flops for row in report.layers) == report.flops
    assert sum(row.flops_kept for row in report.layers) == report.flops_kept


def test_channels_last(model, data, tmp_path):
    """The same fits as for a contiguous model, and kernels that stay channels last."""
    plain = slr_gpu.compress(model, data, {"params": 0.5}, progress=False)
    last = {"memory_format": torch.channels_last}
    result = slr_gpu.compress(model.to(**last), data.to(**last), {"params": 0.5}, progress=False)
    torch.testing.assert_close(result.model(data), plain.model(data), rtol=1e-2, atol=1e-3)
    kernels = [m.weight for m in result.model.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(**last) for w in kernels)
    assert result.model[:2](data.to(**last)).is_contiguous(**last)
    result.save(tmp_path)
    loaded = slr_gpu.load(tmp_path, small_network)
    torch.testing.assert_close(loaded(data), result.model(data), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "norms",
    ["conv relu norm", "norm conv relu", "conv norm relu", "conv relu norm dropout"],
)
def test_norms_in_every_place(norms, data):
    torch.manual_seed(0)
    kinds = {
        "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
        "norm": lambda: nn.BatchNorm2d(8),
        "relu": nn.ReLU,
        "dropout": nn.Dropout2d,
    }
    block = [kinds[kind]() for _ in range(2) for kind in norms.split()]
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), *block, nn.Conv2d(8, 3, 1))
    model(data)  # running statistics
    model.eval()
    result = slr_gpu.compress(model, data, {"params": 0.7}, progress=False)
    rows = [row for row in result.report.layers if row.compressed]
    assert [row.activation for row in rows] == ["relu", "relu"]
    expected = model(data)
    assert (result.model(data) - expected).norm() < 0.3 * expected.norm()


class WithLayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.c, self.drop = nn.Linear(16, 4), nn.Dropout()

    def forward(self, x):
        return self.c(F.gelu(self.drop(self.b(self.norm(self.a(x))))))


def test_layer_norm_and_dropout():
    torch.manual_seed(0)
    data = torch.randn(100, 3, 8)
    result = slr_gpu.compress(WithLayerNorm().eval(), data, {"params": 0.8}, progress=False)
    assert [r.activation for r in result.report.layers if r.compressed] == ["gelu"]


def test_unsupported_layers_are_listed(data):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    ).eval()
    report = slr_gpu.compress(model, data, {"flops": 0.8}, progress=False).report
    assert report.achieved["flops"] <= 0.8  # of all FLOPs, the transposed convolution's included
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "groups=8" in reasons["2"] and "ConvTranspose2d" in reasons["4"]
    assert reasons["5"] == ""


def raising(model, data, error, match, **settings):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        slr_gpu.compress(model, data, **{"keep": {"flops": 0.5}, "progress": False, **settings})
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"keep": {"flops": 0}}, "fraction in"),
        ({"keep": {"flops": 1.5}}, "fraction in"),
        ({"keep": {"flop": 0.5}}, "params or flops"),
        ({"keep": 0.5}, "params or flops"),
        ({"keep": {"flops": 0.001}}, "at least 0"),
        ({"ignore": ["no.such"]}, "no.such"),
        ({"overrides": {"no.such": {"keep": 0.5}}}, "no.such"),
        ({"overrides": {"2": {"size": 3}}}, "keep or form"),
        ({"form": "diagonal"}, "one of auto"),
        ({"ignore": ["*"]}, "without a layer"),
        ({"samples": 0}, "samples"),
        ({"objective": "after"}, "objective='after'"),
        ({"ridge": "strong"}, "ridge='strong'"),
        ({"ridge": 0}, "ridge=0"),
        ({"held_out": 0.9}, "held_out=0.9"),
        ({"overrides": {"2": {"keep": "0.5"}}}, "keep='0.5'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_settings(model, data, settings, match, monkeypatch):
    monkeypatch.setattr(sys.modules["slr_gpu.compress"], "measure", None)  # before any work
    raising(model, data, slr_gpu.InputError, match, **settings)


def test_hooks_that_change_the_model_do_not_get_lost(model, data):
    model[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    raising(model, data, slr_gpu.InputError, "hooks that change what the model returns, of 2;")
    model[2]._forward_hooks.clear()
    model.register_forward_hook(lambda module, inputs, output: (output, output))
    raising(model, data, slr_gpu.InputError, "of the model itself;")


def test_models_without_shapes(data):
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(slr_gpu.InputError, match=r"0\.weight, which has no shape"):
        slr_gpu.compress(lazy, data, {"flops": 0.5}, progress=False)


def test_weights_are_checked_before_data_is_read(model):
    def unread():
        raise AssertionError("data was read")

    with torch.no_grad():
        model[0].bias[0] = torch.nan
    with pytest.raises(slr_gpu.InputError, match=r"NaN or Inf in 0\.bias"):
        slr_gpu.compress(model, unread, {"flops": 0.5}, progress=False)


def test_models_whose_layers_cannot_be_watched(model, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(model)
    raising(scripted, data, slr_gpu.InputError, "TorchScript module, the model itself")
    mixed = nn.Sequential(scripted, nn.ReLU())
    raising(mixed, data, slr_gpu.InputError, "TorchScript module, 0")


def test_bad_data(model, data):
    for bad, match in (
        (data[:0], "at least 2"),
        (data[:1], "at least 2"),
        (torch.full_like(data, float("nan")), "NaN or Inf"),
        ("images", "images: .* a whole .npy"),
        ([{"x": data}], "a batch of dict"),
    ):
        raising(model, bad, slr_gpu.InputError, match)
    raising(model, data[:, :1], slr_gpu.ModelError, "batch 0")


def test_bad_weights(model, data):
    with torch.no_grad():
        model[6].weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(slr_gpu.InputError, match="6.weight"):
        slr_gpu.compress(model, data, {"flops": 0.5}, progress=False)


def test_constant_inputs_do_not_break(model):
    result = slr_gpu.compress(model, torch.ones(50, 2, 8, 8), {"flops": 0.5}, progress=False)
    assert torch.isfinite(result.model(torch.ones(2, 2, 8, 8))).all()


def test_load_refuses_other_models_and_broken_files(model, data, tmp_path):
    slr_gpu.compress(model, data, {"params": 0.5}, progress=False).save(tmp_path)
    with pytest.raises(slr_gpu.InputError, match="factory"):
        slr_gpu.load(tmp_path, lambda: nn.Sequential(nn.Linear(2, 2)))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(slr_gpu.InputError):
        slr_gpu.load(tmp_path, small_network)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(slr_gpu.InputError, match="schema"):
        slr_gpu.load(tmp_path, small_network)


@pytest.mark.parametrize("solver", slr_gpu.solvers.SOLVERS.values(), ids=slr_gpu.solvers.SOLVERS)
def test_every_solver_compresses_a_model(model, data, solver, tmp_path):
    keep = {"params": 0.6}
    result = slr_gpu.compress(model, data, keep, solver=solver(), samples=600, progress=False)
    assert result.report.achieved["params"] <= 0.6
    assert result.report.settings["solver"] == solver.name
    result.save(tmp_path)
    again = slr_gpu.load(tmp_path, small_network)
    with torch.no_grad():
        torch.testing.assert_close(again(data), result.model(data))


def test_what_is_no_solver_or_not_its_form_is_refused_first(model, data):
    before = snapshot(model)
    for settings, match in (
        ({"solver": slr_gpu.Zhang}, "an instance of a solver"),
        ({"solver": slr_gpu.Zhang(), "form": "rotated"}, "one of auto, columns, spatial"),
        ({"solver": slr_gpu.ADMM(), "overrides": {"2": {"form": "entries"}}}, "one of auto"),
    ):
        with pytest.raises(slr_gpu.SLRError, match=match):
            slr_gpu.compress(model, data, {"params": 0.6}, progress=False, **settings)
    assert_unchanged(model, before)
