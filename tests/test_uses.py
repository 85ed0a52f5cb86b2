"""Layers that are called several times, or not always, or not on the batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slr_gpu
from slr_gpu.batches import Batches, run_model
from slr_gpu.calibration import as_batches
from slr_gpu.capture import Sampler, layer_parts, record_references
from slr_gpu.frontier import Frontier
from slr_gpu.graph import find_sites
from slr_gpu.prepare import Prepared
from slr_gpu.settings import Settings


def sites_of(model, *inputs):
    with torch.no_grad():
        return find_sites(model, lambda: model(*inputs))


def parts_of(model, name, data, *, rows=10**6, asymmetric=True, work=None):
    """What `compress` would fit a layer of `model` on, its copy being `work`."""
    batches = as_batches(data, model, 10)
    sites = sites_of(model, *[x[:1] for x in batches.first]).values()
    sites = [site for site in sites if site.calls]
    sampler = Sampler(rows, [len(batch[0]) for batch in batches], 0)
    references = record_references(model, batches, sites, sampler, with_inputs=True)
    site = next(site for site in sites if site.name == name)
    work = model if work is None else work
    frontier = Frontier(work, batches, [site.name for site in sites])
    inputs = frontier.inputs(name, references.calls(name)) if asymmetric else None
    return layer_parts(work.get_submodule(name), site, references, sampler, inputs)


class Shared(nn.Module):
    """One convolution at two scales, each time followed by its BatchNorm and ReLU."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.conv(x)))
        x = F.relu(self.norm(self.conv(F.max_pool2d(x, 2))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Shared().eval()
    model.norm.running_mean.normal_()
    return model


DATA = torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def test_rows_of_all_uses(model):
    """Every row times the weights is the response that the layer gave there."""
    for asymmetric in (True, False):
        (part,) = parts_of(model, "conv", DATA, asymmetric=asymmetric)
        assert len(part.inputs) == 40 * (64 + 16)
        np.testing.assert_allclose(part.responses, part.linear_targets, atol=1e-5)
        assert np.array_equal(np.unique(part.sample_ids), np.arange(40))


def test_rows_of_all_uses_are_shared_out(model):
    (part,) = parts_of(model, "conv", DATA, rows=800)
    assert len(part.inputs) == 800
    assert np.array_equal(np.bincount(part.sample_ids), np.full(40, 20))


def test_later_uses_see_what_was_compressed_before(model):
    work = copy.deepcopy(model)
    with torch.no_grad():
        work.stem.weight.mul_(0.5)
    (part,) = parts_of(model, "conv", DATA, work=work)
    caught = []
    work.conv.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    with torch.no_grad():
        work(DATA)
    centre = part.inputs.reshape(len(part.inputs), 6, 9)[:, :, 4].sum()
    assert centre == pytest.approx(float(sum(x.sum() for x in caught)), rel=1e-4)


def test_shared_layer_is_compressed_once(model, tmp_path):
    result = slr_gpu.compress(model, DATA, {"flops": 0.6}, progress=False)
    row = next(row for row in result.report.layers if row.name == "conv")
    assert row.compressed and row.activation == "relu"
    assert any("called 2 times" in note for note in row.notes)
    assert result.report.achieved["flops"] <= 0.6
    assert isinstance(result.model.norm, nn.Identity)
    result.save(tmp_path)
    again = slr_gpu.load(tmp_path, Shared)
    assert torch.equal(again(DATA), result.model(DATA))
    expected = model(DATA)
    assert (result.model(DATA) - expected).norm() < 0.5 * expected.norm()


def test_different_followers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.a(F.relu(self.norm(self.a(x))))

    site = sites_of(Net().eval(), torch.randn(2, 4))["a"]
    assert site.calls == 2 and site.batch_norm is None and site.activation == "identity"


def test_tied_weights_stay_and_are_listed():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.out = nn.Linear(8, 20, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, tokens):
            return self.out(F.gelu(self.b(F.gelu(self.a(self.embedding(tokens))))))

    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (30, 5))
    settings = {"keep_ends": False, "allocation": "uniform", "progress": False}
    result = slr_gpu.compress(Tied().eval(), tokens, {"params": 0.9}, **settings)
    rows = {row.name: row for row in result.report.layers}
    assert "used by another module" in rows["out"].reason
    assert rows["a"].compressed and result.report.achieved["params"] <= 0.9
    assert result.model.out.weight is result.model.embedding.weight


class Branching(nn.Module):
    """Skips, repeats and loops, as the values of the batch have it; nothing for torch.fx."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.never, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        positive = bool((x.mean() > 0).item())
        x = F.relu(self.a(x))
        if positive:
            x = F.relu(self.b(x))
        for _ in range(1 + 2 * positive):
            x = F.relu(self.c(x))
        if bool((x < -1).any()):
            x = self.never(x)
        return self.head(x)


def branching():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    offsets = (3.0, -3.0, 3.0, -3.0, -3.0)
    data = [torch.randn(10, 4, generator=generator) + offset for offset in offsets]
    return Branching().eval(), data


def test_layers_that_some_batches_skip_or_repeat():
    model, data = branching()
    (part,) = parts_of(model, "b", data)
    assert len(part.inputs) == 20 and set(part.sample_ids) == {*range(10), *range(20, 30)}
    np.testing.assert_allclose(part.responses, part.linear_targets, atol=1e-5)
    (part,) = parts_of(model, "c", data)
    assert len(part.inputs) == 3 * 20 + 30
    np.testing.assert_allclose(part.responses, part.linear_targets, atol=1e-5)
    assert np.all(np.diff(part.sample_ids) >= 0)


def test_control_flow_on_values_is_compressed():
    model, data = branching()
    run = {"allocation": "uniform", "progress": False}
    result = slr_gpu.compress(model, data, {"params": 0.9}, **run)
    rows = {row.name: row for row in result.report.layers}
    assert "not reached" in rows["never"].reason
    assert rows["b"].compressed and rows["c"].compressed
    for batch in data:
        result.model(batch)


def test_another_path_after_compression_is_matched_or_said():
    model, data = branching()
    work = copy.deepcopy(model)
    work.forward = lambda x: work.head(F.relu(work.c(F.relu(work.a(x)))))  # never b, c once
    (part,) = parts_of(model, "c", data, work=work)
    assert len(part.inputs) == 50  # the first use by each batch
    with pytest.raises(slr_gpu.ModelError, match="asymmetric=False"):
        parts_of(model, "b", data, work=work)


class Folded(nn.Module):
    """A video network: frames are folded into the batch, then rejoined."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.c, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        n, frames = x.shape[:2]
        x = F.relu(self.b(F.relu(self.a(x.flatten(0, 1)))))
        x = F.relu(self.c(x.mean((2, 3)).unflatten(0, (n, frames)).transpose(0, 1)))
        return self.head(x.mean(0))


def test_a_leading_dimension_that_is_not_the_batch():
    torch.manual_seed(0)
    model, data = Folded().eval(), torch.randn(20, 3, 2, 6, 6)
    (part,) = parts_of(model, "b", data)
    assert np.array_equal(part.sample_ids, np.repeat(np.arange(20), 3 * 36))
    np.testing.assert_allclose(part.responses, part.linear_targets, atol=1e-5)
    (part,) = parts_of(model, "b", data, rows=200)
    assert np.array_equal(part.sample_ids, np.repeat(np.arange(20), 10))
    # (frames, samples, channels)
    prepared = Prepared(model, data, Settings(batch_size=10, asymmetric=False), "cpu")
    site, references = prepared.sites["c"], prepared.references()
    (part,) = layer_parts(prepared.original.c, site, references, prepared.sampler, None)
    assert np.array_equal(part.sample_ids, np.repeat(np.arange(20), 3))
    np.testing.assert_allclose(part.responses, part.linear_targets, atol=1e-5)
    result = slr_gpu.compress(model, data, {"flops": 0.6}, progress=False)
    assert result.report.achieved["flops"] <= 0.6
    assert result.report.flops == sum(row.flops for row in result.report.layers)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_samples_are_known_whatever_their_dimension(asymmetric):
    """One function in two layouts: the same samples are held out, so the fits are the same."""

    class Steps(nn.Module):
        def __init__(self, first):
            super().__init__()
            torch.manual_seed(0)
            self.first = first
            self.a, self.b, self.c = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 3)

        def forward(self, x):
            x = x if self.first else x.transpose(0, 1)
            x = self.c(F.relu(self.b(F.relu(self.a(x)))))
            return x.mean(1 if self.first else 0)

    # Rows of a sample are alike.
    data = torch.randn(60, 1, 8) + 0.1 * torch.randn(60, 12, 8)
    found = []
    for first in (True, False):
        result = slr_gpu.compress(
            Steps(first).eval(), data, {"params": 0.7}, asymmetric=asymmetric, progress=False
        )
        found.append({row.name: row.error for row in result.report.layers if row.compressed})
    assert found[0] and found[1] == pytest.approx(found[0], rel=1e-4)


def test_layers_that_the_first_sample_leaves_empty():
    class Some(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.d = nn.Linear(8, 8)

        def forward(self, x):
            x = F.relu(self.d(F.relu(self.a(x))))
            return self.c(F.relu(self.b(x[:0]))).sum(0) + self.c(x)

    torch.manual_seed(0)
    settings = {"allocation": "uniform", "progress": False, "keep_ends": False}
    result = slr_gpu.compress(Some(), torch.randn(40, 4), {"flops": 0.9}, **settings)
    rows = {row.name: row for row in result.report.layers}
    assert rows["b"].reason == "not reached by the first calibration sample"
    assert rows["d"].compressed and rows["c"].reason != rows["b"].reason


def test_masks_and_choices_among_the_outputs_are_compared_too():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

        def forward(self, x):
            y = self.b(F.relu(self.a(x)))
            return {"y": y, "positive": y > 0, "choice": y.argmax(1)}

    batches = Batches.of([(torch.randn(20, 8),)])
    assert Frontier(Chosen().eval(), batches, ["a", "b"]).traced


@pytest.mark.parametrize("kind", ["branch", "autocast"])
def test_traces_of_another_function_are_not_followed(kind):
    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            if kind == "branch":
                x = 3 * x + 1 if isinstance(x, torch.Tensor) else x
                return self.c(F.relu(self.b(F.relu(self.a(x)))))
            with torch.autocast("cpu", torch.bfloat16):
                x = self.b(F.relu(self.a(x)))
            return self.c(F.relu(x.float()))

    torch.manual_seed(0)
    model, data = Told().eval(), torch.randn(60, 8)
    assert not Frontier(model, Batches.of([(data,)]), ["a", "b", "c"]).traced
    (part,) = parts_of(model, "b", data)
    np.testing.assert_allclose(part.responses, part.linear_targets, atol=2e-2)


def test_single_samples_in_a_loop():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 6, 3, padding=1)
            self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            rows = [F.relu(self.b(F.relu(self.a(sample)))) for sample in x]
            return torch.stack([self.d(F.relu(self.c(row.mean(-1)))) for row in rows])

    torch.manual_seed(0)
    model, data = Loop().eval(), torch.randn(20, 2, 9)
    (part,) = parts_of(model, "b", data)
    assert len(part.inputs) == 20 * 9
    np.testing.assert_allclose(part.responses, part.linear_targets, atol=1e-5)
    run = {"allocation": "uniform", "progress": False}
    result = slr_gpu.compress(model, data, {"flops": 0.7}, **run)
    assert {row.name for row in result.report.layers if row.compressed} == {"b", "c"}
    result.model(data)


def test_inputs_by_name_and_what_is_no_sample():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, tokens, mask=None, scale=1.0):
            x = self.embedding(tokens)
            if mask is not None:
                x = mask @ x
            return self.c(input=F.relu(self.b(input=F.relu(self.a(input=x * scale)))))

    torch.manual_seed(0)
    model, mask = Masked().eval(), torch.ones(5, 5).tril()
    tokens = torch.randint(0, 10, (30, 5))
    data = [{"tokens": tokens[:20], "mask": mask}, {"mask": mask, "tokens": tokens[20:]}]
    for asymmetric in (True, False):
        settings = {"asymmetric": asymmetric, "progress": False}
        result = slr_gpu.compress(model, data, {"params": 0.85}, **settings)
        assert [row.name for row in result.report.layers if row.compressed] == ["b"]
    with pytest.raises(slr_gpu.InputError, match="labels"):
        slr_gpu.compress(model, [{"tokens": tokens, "labels": tokens}], {"params": 0.8})


def test_what_must_be_passed_by_name():
    """Decorated forwards that look for names, and arguments that only have one."""

    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x, shift=None, *, scale):
            x = F.relu(self.a(x * scale))
            if shift is not None:  # a trace would take this way
                x = x + shift
            return self.c(F.relu(self.b(x)))

    torch.manual_seed(0)
    model, x = ByName().eval(), torch.randn(40, 4)
    result = slr_gpu.compress(model, [{"scale": 2.0, "x": x}], {"params": 0.9}, progress=False)
    assert [row.name for row in result.report.layers if row.compressed] == ["b"]
    result.model(x, scale=2.0)
    assert result.example == ()  # it has no positional form


def test_defaults_are_not_traced_over():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x, shift=None):
            x = F.relu(self.a(x))
            x = x if shift is None else x + shift
            return self.c(F.relu(self.b(x)))

    torch.manual_seed(0)
    model, x = Optional().eval(), torch.randn(40, 4)
    (part,) = parts_of(model, "b", x)
    np.testing.assert_allclose(part.responses, part.linear_targets, atol=1e-5)
    slr_gpu.compress(model, x, {"params": 0.9}, progress=False)


def test_a_layer_that_sees_a_constant_stays():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.position = nn.Linear(8, 8)

        def forward(self, x):
            x = F.relu(self.a(x)) + self.position(torch.ones(1, 8))
            return self.c(F.relu(self.b(x)))

    torch.manual_seed(0)
    data = torch.randn(40, 4)
    result = slr_gpu.compress(Positions().eval(), data, {"params": 0.9}, progress=False)
    rows = {row.name: row for row in result.report.layers}
    assert rows["position"].reason == "its input is the same for all samples"
    assert rows["b"].compressed and result.report.achieved["params"] <= 0.9


def test_a_model_that_writes_over_its_inputs():
    class Normalise(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x.sub_(3.0))))))

    torch.manual_seed(0)
    data = torch.randn(40, 4)
    before = data.clone()
    slr_gpu.compress(Normalise().eval(), data, {"params": 0.9}, progress=False)
    assert torch.equal(data, before)
    run_model(Normalise(), (data,))
    assert torch.equal(data, before)
