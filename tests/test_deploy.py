"""Graphs of decomposed layers: the same function, and the fastest of them as measured."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_entries import random_entries
from test_layers import random_decomposition
from test_spatial import random_decomposition as random_spatial
from torch import nn

import slr_gpu
from slr_gpu import deploy
from slr_gpu.adapters import adapter_for
from slr_gpu.deploy import END_CHANNELS, _shapes, choose_graphs
from slr_gpu.export import modules_to_onnx
from slr_gpu.fold import DENSE, decomposed_layers, for_deployment, graphs_of, multiplied_out
from slr_gpu.layers import SLRLinear
from slr_gpu.mixtures import answer_of
from slr_gpu.runtime.layer_timing import time_layers
from slr_gpu.runtime.timing import Timings

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FORMS = [
    ("columns", 9, 2, None),
    ("columns", 6, 0, None),
    ("columns", 0, 2, None),
    ("channels", 3, 2, None),
    ("channels", 3, 0, None),
    ("rotated", 3, 3, 6),
    ("rotated", 0, 3, 6),
    ("rotated", 3, 0, 6),
    ("spatial", 3, 2, 6),
    ("entries", 11, 2, None),
    ("entries", 11, 0, None),
]
SETTINGS = [
    {},
    {"stride": 2, "dilation": 2, "padding": 2},
    {"padding": "same", "padding_mode": "reflect"},
]


def need_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'slr_gpu[onnx]'")


def decomposed(layer, form, s, k, r=None, seed=0):
    """The layer replaced by random factors of a form."""
    rng = np.random.default_rng(seed)
    n, c = layer.weight.shape[:2]
    kernel = tuple(layer.weight.shape[2:])
    if form == "entries":
        decomposition = random_entries(rng, n, c, kernel, s, k)[0]
    elif form == "spatial":
        decomposition = random_spatial(rng, n, c, kernel, s, k, r)
    else:
        decomposition = random_decomposition(rng, n, c, kernel, form, s, k, r)
    return adapter_for(layer).build(layer, decomposition).eval()


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form,s,k,r", FORMS)
def test_multiplied_out_convolutions(dims, settings, form, s, k, r):
    if form == "spatial" and dims == 1:
        pytest.skip("one axis cannot be split")
    torch.manual_seed(0)
    layer = decomposed(CONVS[dims](7, 5, 3, **settings), form, s, k, r)
    dense = multiplied_out(layer)
    assert type(dense) is CONVS[dims]
    x = torch.randn(2, 7, *(9, 8, 7)[:dims])
    with torch.no_grad():
        assert_close(dense(x), layer(x))


@pytest.mark.parametrize("form,s,k", [("columns", 4, 2), ("columns", 4, 0), ("columns", 0, 3)])
def test_multiplied_out_linear_layers(form, s, k):
    layer = decomposed(nn.Linear(9, 6), form, s, k)
    x = torch.randn(3, 4, 9)
    with torch.no_grad():
        assert_close(multiplied_out(layer)(x), layer(x))


def network(seed=0):
    """Every form behind another one, with channels to put in order."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU()]
    for form, s, k, r in FORMS:
        layer = decomposed(nn.Conv2d(8, 8, 3, padding=1), form, s, k, r, seed)
        layers += [layer, nn.Tanh()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for s, k in ((3, 2), (3, 0), (1, 4)):
        layers += [decomposed(nn.Linear(8, 8), "columns", s, k, seed=seed), nn.Tanh()]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("seed", range(12))
def test_any_choice_of_graphs_computes_the_same(seed):
    model = network(seed).double()  # deep, so that rounding alone would be seen in float32
    rng = np.random.default_rng(seed)
    layers = decomposed_layers(model)
    graphs = {name: str(rng.choice(graphs_of(layer))) for name, layer in layers.items()}
    deployed = for_deployment(model, graphs)
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(deployed(x), model(x))
    for name, graph in graphs.items():
        plain = type(deployed.get_submodule(name)) in (nn.Conv2d, nn.Linear)
        assert plain == (graph == DENSE)


def test_all_graphs_of_all_forms_are_reached():
    found = set(
        itertools.chain.from_iterable(map(graphs_of, decomposed_layers(network()).values()))
    )
    assert found == {"split", "sliced", "gather", "kernel", "widened", DENSE}


# -- choosing ------------------------------------------------------------------------------------


def invented(speeds, noise=0.0, seen=None):
    """A stand-in for `time_layers`: seconds by the type or the size of a module."""

    def time(cases, ratios, **settings):
        rng = np.random.default_rng(0)
        seconds = {}
        for key, (module, shape) in cases.items():
            if seen is not None:
                seen.append((key, shape))
            base = speeds(getattr(module, "layer", module))
            seconds[key] = base * (1 + noise * rng.standard_normal(21))
        return Timings(seconds, dict.fromkeys(cases, 1), True, 1.0)

    return time


def is_dense(module):
    return type(module) in CONVS.values() or type(module) is nn.Linear


def chosen(model, monkeypatch, speeds, **options):
    monkeypatch.setattr(deploy, "time_layers", invented(speeds, **options))
    return choose_graphs(model, torch.randn(3, 2, 8, 8), runtime="pytorch", progress=False)


def test_the_faster_graph_is_taken(monkeypatch):
    model = network()
    slow = chosen(model, monkeypatch, lambda m: 1.0 if is_dense(m) else 1.2)
    assert {layer.graph for layer in slow} == {DENSE}
    assert all("dense: 1e+03 ms in pytorch, not 1.2e+03 ms" == str(layer) for layer in slow)
    fast = chosen(model, monkeypatch, lambda m: 1.0 if is_dense(m) else 0.5)
    first = {name: graphs_of(layer)[0] for name, layer in decomposed_layers(model).items()}
    assert {layer.name: layer.graph for layer in fast} == first
    assert all(layer.speedup == pytest.approx(2) for layer in fast)


def test_a_difference_within_the_noise_changes_nothing(monkeypatch):
    model = network()
    first = {name: graphs_of(layer)[0] for name, layer in decomposed_layers(model).items()}
    for gain, noise in ((0.99, 0.0), (0.9, 1.0)):
        found = chosen(model, monkeypatch, lambda m, g=gain: g if is_dense(m) else 1.0, noise=noise)
        assert {layer.name: layer.graph for layer in found} == first


def test_layers_alike_are_timed_once_and_at_their_own_shapes(monkeypatch):
    torch.manual_seed(0)
    pair = [decomposed(nn.Conv2d(8, 8, 3, padding=1), "rotated", 3, 3, 6, seed) for seed in (1, 2)]
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), *pair, nn.MaxPool2d(2), pair[0]).eval()
    model[4] = decomposed(nn.Conv2d(8, 8, 3, padding=1), "rotated", 3, 3, 6, 3)
    seen = []
    found = chosen(model, monkeypatch, lambda m: 1.0, seen=seen)
    assert [layer.name for layer in found] == ["1", "2", "4"]
    shapes = sorted(shape for _, shape in seen)
    assert shapes == 3 * [(1, END_CHANNELS, 4, 4)] + 3 * [(1, END_CHANNELS, 8, 8)]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_are_timed_between_others(dims, monkeypatch):
    """As they stand in a model: what they read and leave is in the runtime's layout."""
    model = decomposed(CONVS[dims](8, 5, 3, stride=2), "channels", 3, 2).eval()
    seen = []

    def time(cases, ratios, **settings):
        seen.extend(cases.values())
        return invented(lambda m: 1.0)(cases, ratios)

    monkeypatch.setattr(deploy, "time_layers", time)
    inputs = torch.randn(3, 8, *(9,) * dims)
    choose_graphs(nn.Sequential(model), inputs, runtime="pytorch", progress=False)
    assert len(seen) == 2
    for module, shape in seen:
        assert module(torch.randn(shape)).shape == (1, END_CHANNELS, *(4,) * dims)
        assert module.layer(torch.randn(1, 8, *(9,) * dims)).shape == (1, 5, *(4,) * dims)


def test_a_model_without_decomposed_layers_needs_no_choice():
    assert choose_graphs(nn.Linear(3, 2), torch.randn(2, 3), runtime="pytorch") == []


def test_a_wrong_runtime_is_an_error_before_any_work(tmp_path):
    with pytest.raises(slr_gpu.InputError, match="runtime 'tensorrt'; expected one of pytorch"):
        choose_graphs(None, None, runtime="tensorrt")


# -- measuring -----------------------------------------------------------------------------------


def test_modules_exported_together_compute_each_its_own():
    need_onnx()
    import onnxruntime

    torch.manual_seed(0)
    shared = nn.Conv2d(3, 4, 3)
    modules = [shared, nn.Linear(5, 2), nn.Sequential(shared, nn.ReLU()), nn.Conv1d(2, 3, 2)]
    inputs = [torch.randn(shape) for shape in ((1, 3, 6, 6), (1, 5), (1, 3, 6, 6), (1, 2, 7))]
    contents = modules_to_onnx(list(zip(modules, inputs, strict=True)))
    for module, x, content in zip(modules, inputs, contents, strict=True):
        session = onnxruntime.InferenceSession(content)
        (entry,) = session.get_inputs()
        (got,) = session.run(None, {entry.name: x.numpy()})
        with torch.no_grad():
            assert_close(torch.from_numpy(got), module(x))


@pytest.mark.parametrize("runtime", ["pytorch", "onnxruntime", "openvino"])
def test_layers_are_timed_in_every_runtime(runtime, tmp_path):
    if runtime != "pytorch":
        need_onnx()
        pytest.importorskip(runtime, reason="needs it: pip install 'slr_gpu[onnx]'")
    cases = {
        "conv": (nn.Conv2d(3, 4, 3).eval(), (1, 3, 6, 6)),
        "linear": (nn.Linear(5, 2).eval(), (1, 5)),
    }
    timings = time_layers(cases, [("conv", "linear")], runtime=runtime, time_limit_s=0.2)
    assert set(timings.seconds) == set(cases)
    rounds = {len(seconds) for seconds in timings.seconds.values()}
    assert len(rounds) == 1 and rounds.pop() >= 3
    assert all(np.all(seconds > 0) for seconds in timings.seconds.values())


def test_export_says_how_each_layer_runs(monkeypatch, tmp_path):
    need_onnx()
    import onnx

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    )
    result = slr_gpu.compress(
        model,
        torch.randn(40, 2, 8, 8),
        {"params": 0.5},
        allocation="uniform",
        keep_ends=False,
        progress=False,
    )

    def speeds(module):
        return 1.0 if is_dense(module) else (2.0 if isinstance(module, SLRLinear) else 0.5)

    monkeypatch.setattr(deploy, "time_layers", invented(speeds))
    exported = result.export(tmp_path / "m.onnx", progress=False)
    assert exported.path == tmp_path / "m.onnx" and exported.error < 1e-5
    graphs = {layer.name: layer.graph for layer in exported.layers}
    assert graphs["5"] == DENSE and DENSE not in (graphs["0"], graphs["2"])
    weights = {tuple(t.dims) for t in onnx.load(exported.path).graph.initializer}
    assert (4, 128) in weights or (128, 4) in weights
    notes = {row.name: row.deployed for row in result.report.layers}
    assert notes["5"].startswith("dense: ") and notes["2"].endswith("2.00x in onnxruntime")
    assert "2.00x in onnxruntime" in str(result.report)
    plain = result.export(tmp_path / "again.onnx", runtime=None)
    assert plain.layers == [] and plain.error < 1e-5


def test_layers_that_are_called_by_name_are_seen():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 6, 3), nn.Linear(6, 4)

        def forward(self, x):
            return self.b(input=self.a(input=x).mean((2, 3)))

    model, x = ByName().eval(), torch.randn(1, 2, 5, 5)
    a, b = _shapes(model, (x,), ["a", "b"]).values()
    assert a == ((1, 2, 5, 5), (1, 6, 3, 3)) and b == ((1, 6), (1, 4))
    with torch.no_grad():
        output, read = answer_of(model, (x,), ["b"])
    assert torch.equal(model.b(read[0]), output)
