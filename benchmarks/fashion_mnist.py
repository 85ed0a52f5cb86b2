"""Accuracy on Fashion-MNIST after compression with unlabelled calibration images only.

In: a checkpoint (made by `benchmarks.train_fashion_mnist`) and the data set. Out: for each budget
and allocation the test accuracy before and after, agreement, KL divergence, fractions kept, measured
speed-up of the exported model (one thread, batch of one, float32), wall time, peak memory, as a
table and as JSON. Test images are used for nothing else.
"""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import slr_gpu
from benchmarks.data import calibration_images, compare, fashion_mnist, predict, to_inputs
from benchmarks.models import load_weights
from benchmarks.store import machine, peak_gib
from benchmarks.train_fashion_mnist import find_factory
from slr_gpu.analysis import TOLERANCE
from slr_gpu.cli_inputs import make_refinement, parse_keep
from slr_gpu.cli_options import Refine, RefineEpochs
from slr_gpu.export import export_model

app = typer.Typer(add_completion=False)

# Budgets of each model, and what they may cost in points.
TARGETS = {
    "benchmarks.models:vgg16": {
        "flops=0.25": 0.10,
        "flops=0.1": 0.35,
        "flops=0.05": 0.80,
        "params=0.067": 0.10,
        "latency=0.25": 0.15,
    },
    "benchmarks.models:resnet18": {"flops=0.5": 0.10, "flops=0.25": 0.50},
}


@dataclass(frozen=True)
class Run:
    """One compression and what came of it; the fields of a line of the JSON file."""

    keep: dict[str, float]
    allocation: str
    tolerance: float | None
    refined: bool
    achieved: dict[str, float]
    accuracy_before: float
    accuracy_after: float
    drop_points: float
    agreement: float
    kl: float
    seconds: float
    peak_gib: float
    refinement: dict[str, Any]
    latency: dict[str, Any]
    speed: dict[str, dict[str, Any]]


@app.command()
def main(
    weights: Annotated[Path, typer.Option(help="Checkpoint of the model.")],
    model: Annotated[str, typer.Option(help="pkg.module:factory")] = "benchmarks.models:vgg16",
    data: Annotated[Path | None, typer.Option(help="Folder of the IDX files.")] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="flops=0.25, or 0.25 for parameters and FLOPs alike."),
    ] = None,
    allocation: Annotated[
        list[str], typer.Option(help="uniform, pca_energy, response or output; repeat to compare.")
    ] = ["output"],
    refine: Refine = False,
    refine_epochs: RefineEpochs = None,
    images: Annotated[int, typer.Option(help="Calibration images.")] = 3000,
    samples: Annotated[int, typer.Option(help="Input rows sampled a layer.")] = 15_000,
    form: Annotated[str, typer.Option(help="Form of the layers.")] = "auto",
    multiple: Annotated[int, typer.Option(help="r, s and k in blocks of so many channels.")] = 16,
    tolerance: Annotated[
        float, typer.Option(help="With FLOPs: part of the loss to give up for less work.")
    ] = TOLERANCE,
    seed: Annotated[int, typer.Option(help="Of the calibration images and rows.")] = 0,
    symmetric: Annotated[bool, typer.Option(help="Inputs from the original network.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
    test_images: Annotated[int, typer.Option(help="Test images, the first so many.")] = 10_000,
    save: Annotated[Path | None, typer.Option(help="Folder for the compressed models.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for the analysis.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the results (JSON).")] = None,
    runtime: Annotated[
        list[str], typer.Option(help="Where the exported models are timed; repeat.")
    ] = ["onnxruntime"],
    verbose: Annotated[bool, typer.Option(help="Print the table of layers.")] = False,
) -> None:
    """Compress at several budgets and print what it costs in accuracy."""
    torch.set_num_threads(threads)
    console = Console(width=140)
    targets = TARGETS.get(model, {})
    if not (keep or targets):
        raise typer.BadParameter("no usual budgets of this model: give --keep")
    budgets = [_budget(text) for text in keep or targets]
    train_images, _, test, labels = fashion_mnist(data)
    inputs, labels = to_inputs(test[:test_images]), labels[:test_images]
    calibration = to_inputs(calibration_images(train_images, images, seed))
    original = load_weights(find_factory(model)(), weights)
    refinement = make_refinement(refine, refine_epochs)
    settings = {
        "form": form,
        "samples": samples,
        "asymmetric": not symmetric,
        "seed": seed,
        "multiple": multiple,
    }
    logits = predict(original, inputs, batch_size=50)
    before = compare(logits, logits, labels)
    runs: list[Run] = []

    @functools.cache
    def analysis(name: str) -> slr_gpu.Analysis:
        began = time.perf_counter()
        found = slr_gpu.analyze(original, calibration, allocation=name, cache=cache, **settings)
        console.print(f"{name}: analysed in {time.perf_counter() - began:.0f} s")
        return found

    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        export_model(original, dense, (calibration[:1],))
        for name, budget in itertools.product(allocation, budgets):
            plan = None
            if "latency" not in budget:  # met by measuring, so not from the analysis alone
                plan = analysis(name).allocate(budget, tolerance=tolerance)
            began = time.perf_counter()
            if plan is None:
                result = slr_gpu.compress(
                    original, calibration, budget, allocation=name, refine=refinement, **settings
                )
            else:
                result = slr_gpu.apply(original, calibration, plan, refine=refinement)
            seconds = time.perf_counter() - began
            after = compare(logits, predict(result.model, inputs, batch_size=50), labels)
            runs.append(
                Run(
                    budget,
                    name,
                    tolerance if plan is not None and "flops" in budget else None,
                    bool(refinement),
                    result.report.achieved,
                    before.accuracy,
                    after.accuracy,
                    100 * (before.accuracy - after.accuracy),
                    after.agreement,
                    after.kl,
                    seconds,
                    peak_gib(),
                    result.report.refinement,
                    result.report.latency,
                    _speed(dense, result, calibration[:1], runtime),
                )
            )
            if verbose:
                result.report.print(console)
            if save is not None:
                result.save(save / f"{name}-{_text(budget)}-seed{seed}")
            # Written after each: a run that is cut short leaves what it has.
            if out is not None:
                facts = {
                    "model": model,
                    "images": images,
                    "test_images": len(labels),
                    **machine(),
                }
                lines = [asdict(run) | settings | facts for run in runs]
                out.write_text(json.dumps(lines, indent=2) + "\n")
            console.print(_table(runs[-1:], targets))
    if len(runs) > 1:
        console.print(_table(runs, targets))


def _speed(
    dense: Path, result: slr_gpu.Result, example: torch.Tensor, runtimes: list[str]
) -> dict[str, dict[str, Any]]:
    """Latency beside the dense model's of the compressed one, exported next to it, by runtime."""
    found = {}
    files = {"dense": dense, "compressed": dense.with_name("compressed.onnx")}
    for name in runtimes:
        result.export(files["compressed"], runtime=name)
        timed = slr_gpu.bench(files, (example,), runtimes=[name], threads=1)
        rows = {row["model"]: row for row in timed.as_dict()["latencies"]}
        found[name] = {
            "dense_s": rows["dense"]["median_s"],
            "compressed_s": rows["compressed"]["median_s"],
            "speedup": rows["compressed"]["speedup"],
        }
    return found


def _budget(text: str) -> dict[str, float]:
    if "=" in text:
        return parse_keep(text)
    return {"params": float(text), "flops": float(text)}


def _text(budget: dict[str, float]) -> str:
    return ",".join(f"{name}={fraction:g}" for name, fraction in budget.items())


def _table(runs: list[Run], targets: dict[str, float]) -> Table:
    table = Table(title="Fashion-MNIST test set, no labels")
    for title in (
        "allocation",
        "asked",
        "params",
        "FLOPs",
        "speed-up",
        "accuracy",
        "drop",
        "at most",
        "agreement",
        "KL",
        "wall",
        "peak",
    ):
        table.add_column(title, justify="right")
    for run in runs:
        asked = _text(run.keep)
        table.add_row(
            run.allocation + (", refined" if run.refined else ""),
            asked,
            f"{run.achieved['params']:.4f}",
            f"{run.achieved['flops']:.4f}",
            ", ".join(f"{found['speedup']['ratio']:.2f}x" for found in run.speed.values()),
            f"{run.accuracy_before:.4f} -> {run.accuracy_after:.4f}",
            f"{run.drop_points:.2f}",
            f"{targets[asked]:.2f}" if asked in targets else "",
            f"{run.agreement:.4f}",
            f"{run.kl:.5f}",
            f"{run.seconds:.0f} s",
            f"{run.peak_gib:.1f} GiB",
        )
    return table


if __name__ == "__main__":
    app()
