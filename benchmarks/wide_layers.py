"""Layers with so many columns or outputs that their Gram matrix or covariance does not fit.

In: nothing; the arrays are drawn here. Out, per layer: what was kept, the seconds of `slr_gpu.fit`
on host arrays, the process's peak memory (`resource.getrusage`), and the held-out error after the
activation beside that of the truncated SVD of the weight with as many numbers. Every layer is
fitted in a process of its own, so that the peak is its own:

    python -m benchmarks.wide_layers every --out wide_layers.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import slr_gpu
from benchmarks.store import machine, peak_gib

app = typer.Typer(add_completion=False)

ROWS = 2000


def convolution(channels: int, taps: int, outputs: int, rows: int) -> slr_gpu.LayerIO:
    """A 1-D convolution before a ReLU, on windows of correlated non-negative signals."""
    rng = np.random.default_rng(0)
    sources = min(channels // 4, 96)
    mix = rng.standard_normal((sources, channels), dtype="f4")
    mix *= 0.96 ** np.arange(sources, dtype="f4")[:, None]
    kernel = np.exp(-0.15 * np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))))
    smooth = np.linalg.cholesky(kernel).T.astype("f4")
    inputs = np.empty((rows, channels * taps), "f4")
    for row in inputs:
        field = rng.standard_normal((sources, taps), dtype="f4") @ smooth
        window = mix.T @ field + 0.3 * rng.standard_normal((channels, taps), dtype="f4")
        np.maximum(window.ravel(), 0, out=row)
    weight = rng.standard_normal((outputs, channels, taps), dtype="f4")
    weight *= kernel[taps // 2].astype("f4") / (channels * taps) ** 0.5
    return slr_gpu.LayerIO(weight, rng.standard_normal(outputs).astype("f4"), inputs)


def linear(outputs: int, columns: int, rows: int, activation: str) -> slr_gpu.LayerIO:
    """A linear layer on correlated inputs of heavy tails, some far larger than the others."""
    rng = np.random.default_rng(0)
    sources = min(columns, outputs, 512)
    mix = rng.standard_normal((sources, columns), dtype="f4")
    mix *= 0.99 ** np.arange(sources, dtype="f4")[:, None]
    inputs = rng.standard_t(4, size=(rows, sources)).astype("f4") @ mix
    inputs += rng.standard_normal(inputs.shape, dtype="f4")
    inputs *= np.exp(rng.standard_normal(columns)).astype("f4")
    weight = rng.standard_normal((outputs, columns), dtype="f4")
    weight /= columns**0.5 * np.sqrt((inputs**2).mean(axis=0, dtype="f8")).astype("f4")
    return slr_gpu.LayerIO(weight, None, inputs, activation=activation)


CASES = {
    "convolution, rotated": (lambda: convolution(1024, 64, 128, ROWS), {"form": "rotated"}),
    "convolution, auto": (lambda: convolution(1024, 64, 128, ROWS), {}),
    "convolution, columns": (lambda: convolution(1024, 64, 128, ROWS), {"form": "columns"}),
    "50257 inputs, identity": (lambda: linear(768, 50_257, ROWS, "identity"), {}),
    "50257 inputs, ReLU": (lambda: linear(768, 50_257, ROWS, "relu"), {}),
    "50257 outputs": (lambda: linear(50_257, 768, ROWS, "identity"), {}),
}


@app.command()
def one(name: str, keep: float = 0.25) -> None:
    """Fit one layer here and print what it took as JSON."""
    make, settings = CASES[name]
    layer_io = make()
    before, began, cpu = peak_gib(), time.perf_counter(), time.process_time()
    fitted = slr_gpu.fit(layer_io, keep=keep, **settings)
    seconds, peak = time.perf_counter() - began, peak_gib()
    cpu = time.process_time() - cpu
    svd = slr_gpu.fit(layer_io, keep=keep, solver=slr_gpu.WeightSVD())
    n, m = layer_io.weight.shape
    entry = {
        "layer": name,
        "n": n,
        "m": m,
        "rows": len(layer_io.inputs),
        "keep": keep,
        "kept": (fitted.parameters - n) / (n * m),
        "structure": str(fitted.structure),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_gib": peak,
        "peak_gib_before": before,
        "held_out_error": fitted.held_out_error,
        "weight_svd_held_out_error": svd.held_out_error,
        "iterations": len(fitted.history),
        "notes": list(fitted.notes),
        **machine(),
    }
    print(json.dumps(entry))


@app.command()
def every(
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    keep: float = 0.25,
) -> None:
    """Fit every layer in a process of its own."""
    entries = []
    for name in CASES:
        command = [sys.executable, "-m", "benchmarks.wide_layers", "one", name, f"--keep={keep}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        entries.append(json.loads(done.stdout))
        print(done.stdout, end="", flush=True)
    if out is not None:
        out.write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    app()
