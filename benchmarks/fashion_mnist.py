"""VGG-16 on Fashion-MNIST: accuracy after compression with unlabelled calibration images only.

In: a checkpoint (made by `benchmarks.train_fashion_mnist`) and the data set. Out: for each budget
the test accuracy before and after, agreement, KL divergence, wall time and peak memory, as a table
and as JSON. Test images are used for nothing else.
"""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import slr_gpu
from benchmarks.data import calibration_images, compare, fashion_mnist, predict, to_inputs
from benchmarks.models import load_weights, vgg16

app = typer.Typer(add_completion=False)


@app.command()
def main(
    weights: Annotated[Path, typer.Option(help="Checkpoint of the VGG-16.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the IDX files.")] = None,
    keep: Annotated[list[float], typer.Option(help="Fractions of params and FLOPs.")] = [
        0.25,
        0.10,
        0.05,
    ],
    images: Annotated[int, typer.Option(help="Calibration images.")] = 3000,
    samples: Annotated[int, typer.Option(help="Input rows sampled a layer.")] = 15_000,
    form: Annotated[str, typer.Option(help="Form of the layers.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of the calibration images and rows.")] = 0,
    symmetric: Annotated[bool, typer.Option(help="Inputs from the original network.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    test_images: Annotated[int, typer.Option(help="Test images, the first so many.")] = 10_000,
    out: Annotated[Path | None, typer.Option(help="Where to write the results (JSON).")] = None,
    verbose: Annotated[bool, typer.Option(help="Print the table of layers.")] = False,
) -> None:
    """Compress at several budgets and print what it costs in accuracy."""
    torch.set_num_threads(threads)
    console = Console()
    train_images, _, test, labels = fashion_mnist(data)
    inputs, labels = to_inputs(test[:test_images]), labels[:test_images]
    calibration = to_inputs(calibration_images(train_images, images, seed))
    model = load_weights(vgg16(), weights)
    logits = predict(model, inputs, batch_size=50)
    results = []
    table = Table(title="VGG-16, Fashion-MNIST test set, no labels, no fine-tuning")
    for title in (
        "asked",
        "params",
        "FLOPs",
        "accuracy",
        "drop",
        "agreement",
        "KL",
        "wall",
        "peak",
    ):
        table.add_column(title, justify="right")
    for fraction in keep:
        began = time.perf_counter()
        result = slr_gpu.compress(
            model,
            calibration,
            {"params": fraction, "flops": fraction},
            form=form,
            samples=samples,
            asymmetric=not symmetric,
            seed=seed,
        )
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if verbose:
            result.report.print(console)
        before = compare(logits, logits, labels)
        after = compare(logits, predict(result.model, inputs, batch_size=50), labels)
        achieved = result.report.achieved
        drop = 100 * (before.accuracy - after.accuracy)
        table.add_row(
            f"{fraction:g}",
            f"{achieved['params']:.4f}",
            f"{achieved['flops']:.4f}",
            f"{before.accuracy:.4f} -> {after.accuracy:.4f}",
            f"{drop:.2f}",
            f"{after.agreement:.4f}",
            f"{after.kl:.5f}",
            f"{seconds:.0f} s",
            f"{peak:.1f} GiB",
        )
        results.append(
            {
                "keep": fraction,
                "achieved": achieved,
                "accuracy_before": before.accuracy,
                "accuracy_after": after.accuracy,
                "drop_points": drop,
                "agreement": after.agreement,
                "kl": after.kl,
                "seconds": seconds,
                "peak_gib": peak,
                "images": images,
                "test_images": len(labels),
                "form": form,
                "seed": seed,
                "asymmetric": not symmetric,
                "threads": threads,
            }
        )
    console.print(table)
    if out is not None:
        out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    app()
