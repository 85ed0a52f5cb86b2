"""The joint refinement: what it lowers, what it leaves alone, and outputs compared by hand."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import slr_gpu
from slr_gpu.batches import Batches
from slr_gpu.capture import layer_parts
from slr_gpu.mixtures import Mixtures, answer_of
from slr_gpu.output_loss import choose_loss, mean_loss, output_loss
from slr_gpu.prepare import Prepared
from slr_gpu.refine import _terms, _weighted
from slr_gpu.sensitivity import held_out_batches
from slr_gpu.settings import Settings
from slr_gpu.training import Trainer


def network(outputs=5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(108, outputs),
    ).eval()


@pytest.fixture(scope="module")
def data():
    coarse = torch.randn(200, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_held_out_loss_falls_and_so_does_that_on_new_samples(data, loss):
    model = network()
    new = nn.functional.interpolate(torch.randn(300, 2, 3, 3), scale_factor=2, mode="bilinear")
    run = {"allocation": "uniform", "loss": loss, "progress": False}
    plain = slr_gpu.compress(model, data, {"flops": 0.25}, **run)
    refine = slr_gpu.Refinement(epochs=12, rate=3e-3, batch_size=20)
    refined = slr_gpu.compress(model, data, {"flops": 0.25}, refine=refine, **run)
    facts = refined.report.refinement
    assert facts["loss"] == loss and facts["kept"] and facts["after"] < facts["before"]
    held = data[9::10]
    with torch.no_grad():
        wanted = [model(held)]
        losses = [
            mean_loss(loss, wanted, [r.model(held)], temperature=3.0) for r in (plain, refined)
        ]
        unseen = [mean_loss(loss, [model(new)], [r.model(new)]) for r in (plain, refined)]
    assert losses == pytest.approx([facts["before"], facts["after"]], rel=1e-5)
    assert unseen[1] < unseen[0]
    # Only what was compressed has moved.
    for name in ("0.weight", "7.weight"):
        assert torch.equal(model.state_dict()[name], refined.model.state_dict()[name])
    assert all(p.requires_grad and p.grad is None for p in refined.model.parameters())
    assert "refined together" in str(refined.report)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_does_not_matter(data, mode):
    refine = slr_gpu.Refinement(epochs=12, rate=3e-3, batch_size=20)
    run = {"allocation": "uniform", "refine": refine, "progress": False}
    wanted = slr_gpu.compress(network(), data, {"flops": 0.25}, **run)
    with mode():
        model, inputs = network(), data.clone()  # of inference tensors
        got = slr_gpu.compress(model, inputs, {"flops": 0.25}, **run)
    assert got.report.refinement["kept"]
    for name, value in got.model.state_dict().items():
        assert torch.equal(value, wanted.model.state_dict()[name])
    got.model(data).sum().backward()  # it trains as any other


def test_steps_are_in_proportion_to_what_outputs_are_off(data, monkeypatch):
    rates, model = [], network()
    held = data[9::10]

    def noting(parameters, rate, group):
        rates.append(rate)
        return Trainer(parameters, rate, group)

    monkeypatch.setattr("slr_gpu.refine.Trainer", noting)
    run = {"allocation": "uniform", "progress": False}
    refine = slr_gpu.Refinement(epochs=1, rate=0.01)
    off = []
    for keep in (0.85, 0.25):
        plain = slr_gpu.compress(model, data, {"flops": keep}, **run)
        slr_gpu.compress(model, data, {"flops": keep}, refine=refine, **run)
        with torch.no_grad():
            wanted = model(held)
            off.append(float((plain.model(held) - wanted).norm() / wanted.norm()))
    assert off[0] < 0.05 < off[1]
    assert rates == pytest.approx([0.01 * off[0] / 0.05, 0.01], rel=0.05)


@pytest.mark.parametrize("epochs,uses,sets", [(6, 2, 3), (5, 2, 3), (2, 3, 1)])
def test_a_set_of_inputs_serves_so_many_epochs(data, monkeypatch, epochs, uses, sets):
    seen = []
    plain = Mixtures.of_epoch

    def noting(self, epoch):
        for batch, target in plain(self, epoch):
            seen.append(round(float(batch[0].double().sum()), 6))
            yield batch, target

    monkeypatch.setattr(Mixtures, "of_epoch", noting)
    refine = slr_gpu.Refinement(epochs=epochs, uses=uses, batch_size=60)
    run = {"allocation": "uniform", "progress": False}
    slr_gpu.compress(network(), data, {"flops": 0.3}, refine=refine, **run)
    assert len(seen) == 3 * epochs
    assert len(set(seen)) == 3 * sets


def test_batches_that_pass_by_all_compressed_layers(data):
    class Skipping(nn.Sequential):
        def forward(self, x):
            first, middle, last = self
            h = first(x).relu()
            return last((middle(h).relu() if x.shape[-1] == 6 else h).mean((2, 3)))

    torch.manual_seed(0)
    model = Skipping(
        nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)
    )
    batches = [data[:40], data[40:80, ..., :4], data[80:120], data[120:160, ..., :4]]
    run = {"allocation": "uniform", "progress": False, "held_out": 0.2}
    refine = slr_gpu.Refinement(epochs=4)
    result = slr_gpu.compress(model, batches, {"flops": 0.6}, refine=refine, **run)
    facts = result.report.refinement
    assert facts["kept"] and facts["after"] < facts["before"]


def test_a_refinement_that_does_not_help_is_dropped(data):
    run = {"allocation": "uniform", "progress": False}
    plain = slr_gpu.compress(network(), data, {"flops": 0.3}, **run)
    wild = slr_gpu.Refinement(epochs=1, rate=3.0)
    kept = slr_gpu.compress(network(), data, {"flops": 0.3}, refine=wild, **run)
    assert not kept.report.refinement["kept"]
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, kept.model.state_dict()[name])
    assert "dropped" in str(kept.report)


def test_refinement_goes_on_from_its_last_epoch(data, tmp_path, monkeypatch):
    run = {"allocation": "uniform", "progress": False}
    settings = slr_gpu.Refinement(epochs=4, batch_size=40)
    whole = slr_gpu.compress(network(), data, {"flops": 0.3}, refine=settings, **run)
    plain, notes = Trainer.note, []

    def cut_short(self, error):
        plain(self, error)
        notes.append(error)
        if len(notes) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "note", cut_short)
    run |= {"refine": settings, "checkpoint": tmp_path / "pieces"}
    with pytest.raises(KeyboardInterrupt):
        slr_gpu.compress(network(), data, {"flops": 0.3}, **run)
    again = slr_gpu.compress(network(), data, {"flops": 0.3}, resume=True, **run)
    assert len(notes) == 5  # two epochs were on disk, the third was done again
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])


class Viewing(nn.Module):
    """Reads its convolutions' output in the order of one layout only."""

    def __init__(self):
        super().__init__()
        *self.convolutions, _, self.last = network()
        self.convolutions = nn.Sequential(*self.convolutions)

    def forward(self, x):
        return self.last(self.convolutions(x).view(len(x), -1))


@pytest.mark.parametrize(("make", "last"), [(network, True), (Viewing, False)])
def test_kernels_train_with_their_channels_last_where_the_model_allows(
    data, monkeypatch, make, last
):
    plain, laid = Trainer.note, []

    def look(self, error):
        plain(self, error)
        laid.append(not all(p.is_contiguous() for p in self.parameters))

    monkeypatch.setattr(Trainer, "note", look)
    # Not the form of single columns, whose gathers return the usual layout.
    run = {"allocation": "uniform", "form": "rotated", "progress": False}
    settings = slr_gpu.Refinement(epochs=12, rate=3e-3, batch_size=20)
    found = slr_gpu.compress(make().eval(), data, {"flops": 0.4}, refine=settings, **run)
    assert laid == [last] * 12
    assert found.report.refinement["kept"]
    assert all(p.is_contiguous() for p in found.model.parameters())


@pytest.mark.parametrize("samples", [60, 15_000])
def test_no_layer_is_fitted_on_samples_that_judge(data, samples):
    """Neither where a sample has one row, nor where only some samples have any."""
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.ReLU())
    model = nn.Sequential(*layers, nn.Linear(16, 4)).eval()
    images = data.reshape(len(data), -1)[:, :64].reshape(-1, 1, 8, 8)
    settings = Settings(samples=samples, keep_ends=False, asymmetric=False)
    prepared = Prepared(model, images, settings, "cpu")
    judging = torch.cat([x for (x,) in held_out_batches(prepared.batches, 0.1)[1]])
    assert len(judging) == len(images) // 10
    judges = {x.numpy().tobytes() for x in judging}
    references = prepared.references()
    assert len(prepared.chosen) == 3
    for site in prepared.chosen:
        layer = model.get_submodule(site.name)
        (layer_io,) = layer_parts(layer, site, references, prepared.sampler, None)
        held = layer_io.split(0.1)[1]
        judged = [images[i].numpy().tobytes() in judges for i in layer_io.sample_ids]
        np.testing.assert_array_equal(np.flatnonzero(judged), held)
        assert len(held) > 0


def test_mixtures_are_between_two_samples_and_come_again():
    data = torch.randn(40, 3)
    model = nn.Linear(3, 2)
    batches = Mixtures(model, Batches.of([(data[:25],), (data[25:],)]), sets=2, batch_size=10)
    plain = torch.cat([batch for (batch,), _ in batches.of_epoch(0)])
    assert torch.equal(plain.sort(0).values, data.sort(0).values)
    mixed = [(batch, wanted) for (batch,), (wanted, _) in batches.of_epoch(1)]
    again = [batch for (batch,), _ in batches.of_epoch(3)]
    assert {tuple(x.flatten().tolist()) for x, _ in mixed} == {
        tuple(x.flatten().tolist()) for x in again
    }
    for batch, wanted in mixed:
        torch.testing.assert_close(wanted, model(batch))
        for x in batch:
            # On the segment between two of the samples: the triangle's inequality is an equality.
            through = torch.cdist(data, x[None]) + torch.cdist(data, x[None]).T
            gap = (through - torch.cdist(data, data)).fill_diagonal_(1).min()
            nearest = torch.cdist(data, x[None]).min()
            assert min(float(gap), float(nearest)) < 1e-4


@pytest.mark.parametrize("sides", [(12, 12), (5, 16), (6, 7, 8)])
def test_images_are_mixed_by_boxes_too(sides):
    count = 60
    images = torch.arange(count).reshape(-1, 1, *(1,) * len(sides)).expand(-1, 2, *sides).float()
    batches = Mixtures(nn.Identity(), Batches.of([(images, images)]), sets=3, batch_size=20)
    batches._answer = lambda key, batch: None  # what a model makes of them is not the matter
    shares = []
    for (batch, other), _ in batches.of_epoch(2):
        assert torch.equal(batch, other)
        for x in batch:
            assert torch.equal(x[0], x[1])
            values, sizes = x[0].unique(return_counts=True)
            assert len(values) <= 2 and set(values.tolist()) <= set(range(count))
            boxes = []
            for value in values:
                where = (x[0] == value).nonzero()
                low, high = where.amin(0), where.amax(0) + 1
                boxes.append(math.prod((high - low).tolist()) == len(where))
            assert any(boxes)  # one of the two fills a box
            shares.append(1 - float(sizes.max()) / math.prod(sides))
    assert len(shares) == count
    # The smaller part of a uniform share is a quarter on average, 0.02 its standard deviation.
    assert abs(sum(shares) / count - 0.25) < 0.09
    (sums, _), _ = next(batches.of_epoch(1))
    assert all(len(x.unique()) == 1 for x in sums)
    assert bool((sums != sums.round()).any())


@torch.no_grad()
def test_what_late_layers_read_is_compared(data, monkeypatch):
    model = network()
    answers = [
        answer_of(model, (data[:7],), ["4", "7"]),
        answer_of(model, (data[7:14],), ["4", "7"]),
    ]
    first, second = ([model[:4](x), model[:7](x)] for x in (data[:7], data[7:14]))
    for (output, read), x, expected in zip(answers, (data[:7], data[7:14]), (first, second)):
        torch.testing.assert_close(output, model(x))
        torch.testing.assert_close(read, expected)
    by_hand = sum(float(((a - b) ** 2).sum() / (a**2).sum()) for a, b in zip(first, second))
    terms = [float(term) for term in _terms("mse", *answers, 1.0)]
    assert terms[0] == pytest.approx(mean_loss("mse", [answers[0][0]], [answers[1][0]]))
    assert sum(terms[1:]) == pytest.approx(by_hand, rel=1e-5)
    assert float(_weighted(terms, terms)) == pytest.approx(2.0)
    # What nothing trained is in front of has no weight, however small its rounding was.
    assert float(_weighted(terms, [terms[0], 1e-16, terms[2]])) == pytest.approx(2.0)
    monkeypatch.setattr("slr_gpu.mixtures.LARGEST_FEATURE", 108)
    assert [h.shape[1:] for h in answer_of(model, (data[:7],), ["4", "7"])[1]] == [(108,)]
    assert not model[4]._forward_pre_hooks


def test_softened_scores():
    wanted, got = torch.tensor([[4.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    p, q = torch.tensor([4 / 3, 0.0]).softmax(0), torch.tensor([2 / 3, 0.0]).softmax(0)
    soft = output_loss("kl", wanted, got, 3.0)[0]
    assert float(soft) == pytest.approx(9 * float((p * (p / q).log()).sum()), rel=1e-5)


def test_outputs_compared_by_hand():
    wanted, got = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p, q = wanted[0].exp() / wanted[0].exp().sum(), got[0].exp() / got[0].exp().sum()
    by_hand = float((p * (p / q).log()).sum()) / 2
    assert mean_loss("kl", [wanted], [got]) == pytest.approx(by_hand, rel=1e-6)
    assert mean_loss("mse", [wanted], [got]) == pytest.approx(1 / 5)
    several = {"a": wanted, "b": [got, torch.tensor([3])]}
    assert mean_loss("mse", [several], [copy.deepcopy(several)]) == 0
    assert choose_loss("auto", wanted) == "kl"
    assert choose_loss("auto", torch.nn.functional.normalize(wanted)) == "mse"
    assert choose_loss("auto", several) == choose_loss("auto", torch.ones(2, 1)) == "mse"
    with pytest.raises(slr_gpu.ModelError, match="floating-point"):
        choose_loss("auto", torch.tensor([1]))
    with pytest.raises(slr_gpu.InputError, match="one of auto"):
        choose_loss("accuracy", wanted)


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"epochs": 0}, "epochs"),
        ({"features": -1}, "features"),
        ({"temperature": 0}, "temperature"),
        ({"rate": 0}, "rate"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"uses": 0}, "uses"),
        ({"seed": -1}, "seed"),
        ({"temperature": float("inf")}, "finite"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(slr_gpu.InputError, match=match):
        slr_gpu.Refinement(**settings)


def test_refine_of_another_kind_is_refused_first(data):
    with pytest.raises(slr_gpu.InputError, match="True, False or a Refinement"):
        slr_gpu.compress(network(), data, {"flops": 0.3}, refine="yes", progress=False)
