"""Response errors of single VGG-16 layers by method, on images that calibration never saw.

In: the checkpoint and the data set. Out: for conv1-2, conv2-2 and conv3-2 at 10 % and 25 % of their
weights, ``||Y - relu(Z)||^2 / ||Y||^2`` of truncated SVD of the weight, low rank in the Gram
metric, and every form of `slr_gpu.fit`, linear and after the activation. Inputs are symmetric (the
original's), as single layers are compared.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import slr_gpu
from benchmarks.data import calibration_images, fashion_mnist, to_inputs
from benchmarks.models import load_weights, vgg16
from slr_gpu.capture import Sampler, as_batches, layer_io, record_references
from slr_gpu.graph import find_sites, fold_batch_norm

LAYERS = {"conv1-2": "features.3", "conv2-2": "features.10", "conv3-2": "features.17"}
FORMS = ("columns", "channels", "rotated", "auto")

app = typer.Typer(add_completion=False)


def capture(weights: Path, data: Path | None, images: int, samples: int) -> dict:
    """A `LayerIO` of each layer, with the original's inputs."""
    model = load_weights(vgg16(), weights).eval()
    inputs = to_inputs(calibration_images(fashion_mnist(data)[0], images, 0))
    batches = as_batches(inputs, model, 100)
    with torch.no_grad():
        sites = find_sites(model, lambda: model(inputs[:1]))
    for site in sites.values():
        if site.batch_norm:
            fold_batch_norm(model, site)
    chosen = [sites[name] for name in LAYERS.values()]
    sampler = Sampler(samples, images, 0)
    references = record_references(model, batches, chosen, sampler, with_inputs=True)
    sizes = [len(batch[0]) for batch in batches]
    return {
        label: layer_io(model.get_submodule(name), sites[name], references, sampler, None, sizes)
        for label, name in LAYERS.items()
    }


def low_rank(arrays: slr_gpu.LayerIO, keep: float) -> slr_gpu.Decomposition:
    """The best U V in the Gram metric, linear."""
    n, m = arrays.weight.shape
    settings = {"objective": "linear", "solver": slr_gpu.Majorize(iterations=0)}
    return slr_gpu.fit(arrays, columns=0, rank=int(keep * n * m / (n + m)), **settings)


def weight_svd_error(arrays: slr_gpu.LayerIO, keep: float) -> float:
    """Held-out error of the truncated SVD of the weight."""
    n, m = arrays.weight.shape
    k = int(keep * n * m / (n + m))
    U, sigma, V = np.linalg.svd(arrays.weight, full_matrices=False)
    _, held = arrays.split(0.1)
    Z = arrays.inputs[held] @ ((U[:, :k] * sigma[:k]) @ V[:k]).T + arrays.bias
    Y = arrays.targets[held]
    return float(np.square(Y - np.maximum(Z, 0)).sum() / np.square(Y).sum())


@app.command()
def main(
    weights: Annotated[Path, typer.Option(help="Checkpoint of the VGG-16.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the IDX files.")] = None,
    images: Annotated[int, typer.Option(help="Calibration images.")] = 3000,
    samples: Annotated[int, typer.Option(help="Rows sampled a layer.")] = 20_000,
    out: Annotated[Path | None, typer.Option(help="Where to write the results (JSON).")] = None,
) -> None:
    """Print the table."""
    captured = capture(weights, data, images, samples)
    table = Table(title="held-out error after the activation (seconds)")
    titles = ["layer, kept", "SVD of W", "low rank, linear"]
    titles += [f"{form}{suffix}" for form in FORMS for suffix in (", linear", "")]
    for title in titles:
        table.add_column(title, justify="right")
    results = []
    linear = {"objective": "linear", "solver": slr_gpu.Majorize(iterations=0)}
    for label, arrays in captured.items():
        for keep in (0.1, 0.25):
            row = {"layer": label, "keep": keep, "SVD of W": weight_svd_error(arrays, keep)}
            row["low rank, linear"] = low_rank(arrays, keep).held_out_error
            cells = [f"{row['SVD of W']:.4f}", f"{row['low rank, linear']:.4f}"]
            for form in FORMS:
                for suffix, settings in ((", linear", linear), ("", {})):
                    began = time.perf_counter()
                    fitted = slr_gpu.fit(arrays, keep=keep, form=form, **settings)
                    seconds = time.perf_counter() - began
                    row[form + suffix] = fitted.held_out_error
                    row[f"{form}{suffix}, seconds"] = seconds
                    row[f"{form}{suffix}, structure"] = str(fitted.structure)
                    cells.append(f"{fitted.held_out_error:.4f} ({seconds:.1f})")
            results.append(row)
            table.add_row(f"{label}, {keep:.0%}", *cells)
    Console(width=200).print(table)
    if out is not None:
        out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    app()
