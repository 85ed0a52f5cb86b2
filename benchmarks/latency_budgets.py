"""Predicted against measured latency of whole models under latency budgets.

In: nothing; networks with random weights and random smooth inputs, for latency does not depend on
what weights are. Out, for each network and budget: the fraction of the dense model's latency that
was asked for, that the cost model predicted, and that the exported model took in the runtime, as a
table and as JSON.

    python -m benchmarks.latency_budgets --out benchmarks/results/latency_budgets.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import slr_gpu
from benchmarks.models import resnet18, vgg16, waveform
from benchmarks.store import machine
from slr_gpu.storage import save_json

app = typer.Typer(add_completion=False)

MODELS = {
    "vgg16": (vgg16, (1, 32, 32)),
    "resnet18": (resnet18, (1, 32, 32)),
    "waveform": (waveform, (1, 1024)),
}


def network(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network, its normalisations set to what its inputs need, and inputs for it."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, noise = make(), torch.randn(300, *shape)
    pool = F.avg_pool2d if len(shape) == 3 else F.avg_pool1d
    inputs = pool(noise, 5, 1, 2)
    inputs = inputs / inputs.std() + 0.2 * noise
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in inputs.split(100):
            model(batch)
    return model.eval(), inputs


@app.command()
def main(
    model: Annotated[list[str], typer.Option(help="Repeat for several.")] = list(MODELS),
    keep: Annotated[list[float], typer.Option(help="Of the latency; repeat.")] = [0.4, 0.25],
    runtime: str = "onnxruntime",
    threads: int = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compress each network to each budget and compare."""
    table = Table("model", "asked", "predicted", "measured", "dense", "apart", "wall")
    runs: list[dict[str, Any]] = []
    for name in model:
        original, inputs = network(name)
        for fraction in keep:
            began = time.perf_counter()
            result = slr_gpu.compress(
                original,
                inputs,
                {"latency": fraction},
                samples=3000,
                latency=slr_gpu.LatencyTarget(runtime, threads),
            )
            found, seconds = result.report.latency, time.perf_counter() - began
            # The runtime's threads, not those of torch that `machine` names.
            facts = {"model": name, "asked": fraction, "runtime": runtime, "threads": threads}
            runs.append({**machine(), **facts, **found, "seconds": seconds})
            table.add_row(
                name,
                f"{fraction:g}",
                f"{found['predicted']:.4f}",
                f"{found['ratio']:.4f}",
                f"{1e3 * found['dense_s']:.2f} ms",
                f"{100 * (found['predicted'] / found['ratio'] - 1):+.1f} %",
                f"{seconds:.0f} s",
            )
            if out is not None:
                save_json(out, {"runs": runs})
    Console(width=120).print(table)


if __name__ == "__main__":
    app()
