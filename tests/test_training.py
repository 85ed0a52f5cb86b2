"""The optimiser of the refinement, against singular value decompositions and by what it reaches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slr_gpu.checkpoint import Store
from slr_gpu.training import Muon, Trainer, polar


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (9, 9), (1, 7)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_polar_factor(shape, scale):
    u, s, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, -1.5, len(s), dtype=torch.float64)
    factor = u.mT @ polar(scale * (u * s) @ vh) @ vh.mT
    values = factor.diagonal()
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    assert float((factor - values.diag()).abs().max()) < 1e-9


def test_polar_factor_of_lower_rank_and_of_nothing():
    low = torch.randn(20, 3) @ torch.randn(3, 30)
    values = torch.linalg.svdvals(polar(low))
    assert float(values[:3].min()) > 0.6 and float(values[3]) < 1e-3
    assert torch.equal(polar(torch.zeros(4, 5)), torch.zeros(4, 5))


def test_first_step_is_along_the_polar_factor():
    kernel = nn.Parameter(torch.randn(4, 3, 2, 2))
    before, gradient = kernel.detach().clone(), torch.randn(4, 3, 2, 2)
    kernel.grad = gradient.clone()
    Muon([kernel], lr=0.1).step()
    u, _, vh = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    step = (before - kernel.detach()).flatten(1)
    values = (u.mT @ step @ vh.mT).diagonal() / 0.1 / 12**0.5
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    # All singular values near 1: 4 of them in 48 entries, times sqrt(12).
    assert 0.06 < float(step.square().mean().sqrt()) < 0.13


def test_an_ill_conditioned_fit_gets_further_than_with_adam():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(20, 30, generator=generator)
    directions = torch.linalg.qr(torch.randn(30, 30, generator=generator)).Q
    x = directions * torch.logspace(0, -2, 30)[:, None]

    def reached(make):
        w = nn.Parameter(torch.zeros(20, 30))
        optimizer = make([w])
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 300)
            w.grad = None
            loss = ((w - wanted) @ x.mT).square().sum()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert reached(Muon) < 0.1 * reached(torch.optim.Adam)


def test_what_gets_no_gradient_stays_and_is_stored(tmp_path):
    def parameters():
        torch.manual_seed(0)
        return [nn.Parameter(t) for t in (torch.randn(3, 4), torch.randn(3), torch.ones(2, 2))]

    def step(trainer, share):
        w, b, _ = trainer.parameters
        trainer.step((w.square().sum() + (b - 1).square().sum()), share)

    store, whole = Store(tmp_path), Trainer(parameters(), 0.01)
    step(whole, 0.2)
    whole.save(store, 1)
    other = Trainer(parameters(), 0.01)
    assert other.load(store) == 1
    for trainer in (whole, other):
        step(trainer, 0.4)
    for p, again in zip(whole.parameters, other.parameters, strict=True):
        assert torch.equal(p, again)
    assert torch.equal(whole.parameters[2], torch.ones(2, 2))
    assert not torch.equal(whole.parameters[0], parameters()[0])
