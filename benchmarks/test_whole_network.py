"""Time of `slr_gpu.compress` on a whole network, beside the same algorithm in plain PyTorch.

In: networks with random weights, made here. Out, in ``extra_info``: the seconds of both, and how far
the logits of both compressed networks are from the original's on inputs that neither has seen. The
rival is given the structures that ours has found, so it does not search. On a CUDA device: the
VGG-16 of the other benchmarks with 3000 images; on the CPU: a small network.
"""

from __future__ import annotations

import pytest
import torch
from plain_torch import plain_compress
from test_backends import alternate, device_name, wall_clock
from torch import nn

import slr_gpu
from benchmarks.models import vgg16
from slr_gpu.graph import find_sites, fold_batch_norm
from slr_gpu.ops import NumpyOps, get_ops, why_not_cuda

RIDGE, ITERATIONS, BATCH = 1e-3, 8, 100


def small() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 48), (48, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def images(count: int) -> torch.Tensor:
    """Noise in which neighbouring pixels are alike."""
    return nn.functional.avg_pool2d(torch.randn(count, 1, 32, 32), 3, 1, 1) * 3


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """Modules without children, in order."""
    return {name: m for name, m in model.named_modules() if not list(m.children())}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compress_against_plain_torch(benchmark, device):
    """Convolutions to a quarter of their weights each."""
    if device == "cuda" and (reason := why_not_cuda()):
        pytest.skip(f"no CUDA device: {reason}")
    torch.manual_seed(0)
    model = (small() if device == "cpu" else vgg16()).eval().to(device)
    inputs = images(300 if device == "cpu" else 3000)
    names = [n for n, m in leaves(model).items() if isinstance(m, nn.Conv2d)][1:]
    dense = [n for n, m in leaves(model).items() if isinstance(m, nn.Linear)]
    solver = slr_gpu.Majorize(iterations=ITERATIONS, tolerance=0.0)

    def ours() -> slr_gpu.Result:
        return slr_gpu.compress(
            model,
            inputs,
            {"params": 0.5},
            overrides={name: {"keep": 0.25} for name in names},
            ignore=dense,
            keep_ends=True,
            allocation="uniform",
            form="rotated",
            solver=solver,
            ridge=RIDGE,
            held_out=0.0,
            batch_size=BATCH,
            device=device,
            progress=False,
        )

    with torch.no_grad():
        for site in find_sites(model, lambda: model(inputs[:1].to(device))).values():
            if site.batch_norm is not None:
                fold_batch_norm(model, site)
    chain = list(leaves(model).items())
    arguments = {entry["name"]: entry["arguments"] for entry in ours().plan["layers"]}
    sizes = {
        position: (a["basis_rows"], len(a["kept"]), a["rank"])
        for position, (name, _) in enumerate(chain)
        if (a := arguments.get(name))
    }

    def plain() -> nn.Sequential:
        modules = [module for _, module in chain]
        options = {"rows": 15_000, "batch": BATCH, "iterations": ITERATIONS, "ridge": RIDGE}
        return nn.Sequential(*plain_compress(modules, inputs.to(device), sizes, **options))

    ops = get_ops(device) if device == "cuda" else NumpyOps()
    result, rival, _ = alternate(
        benchmark,
        ours,
        plain,
        clock=wall_clock(ops),
        rounds=3,
        device=device_name(ops),
        layers=len(sizes),
        against="plain PyTorch, without the search for structures",
    )
    unseen = images(200).to(device)
    with torch.no_grad():
        truth, ours_logits, rival_logits = (m(unseen) for m in (model, result.model, rival))
    scale = (truth - truth.mean(0)).norm()
    errors = [float((logits - truth).norm() / scale) for logits in (ours_logits, rival_logits)]
    benchmark.extra_info.update(error=errors[0], plain_error=errors[1])
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
