"""How capture grows with the number of calibration images: seconds, peak memory, bytes on disk.

In: VGG-16's checkpoint and Fashion-MNIST. Out, for each number of images: the wall and processor
seconds of the original's responses of all layers and of every layer's rows through the `Frontier`
(or with `--fit` of a whole `compress`), the process's peak memory (`resource.getrusage`), and the
ratio of the seconds to those of the first number. Each number has a process of its own:

    python -m benchmarks.capture_growth every --weights vgg16.safetensors
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import slr_gpu
from benchmarks.data import calibration_images, fashion_mnist, to_inputs
from benchmarks.models import load_weights, vgg16
from benchmarks.store import peak_gib
from slr_gpu.capture import full_precision, layer_parts
from slr_gpu.cli_inputs import parse_bytes
from slr_gpu.frontier import Frontier
from slr_gpu.prepare import Prepared
from slr_gpu.settings import Settings

app = typer.Typer(add_completion=False)

BATCH = 100

_Weights = Annotated[Path, typer.Option(help="Checkpoint of VGG-16.")]
_Data = Annotated[Path | None, typer.Option(help="Folder of the IDX files.")]
_Streamed = Annotated[
    bool, typer.Option("--streamed", help="Images from a generator, made anew in every pass.")
]
_Fit = Annotated[bool, typer.Option("--fit", help="A whole compress to 0.25 of the FLOPs.")]
_Samples = Annotated[int, typer.Option(help="Input rows sampled a layer.")]
_SpillDir = Annotated[Path | None, typer.Option(help="See slr-gpu compress.")]
_MemoryLimit = Annotated[str | None, typer.Option(help="See slr-gpu compress.")]
_Threads = Annotated[int, typer.Option(help="Threads of torch.")]


def capture(prepared: Prepared) -> dict[str, Any]:
    """The rows of all layers, each replaced by itself, one layer after another."""
    began = time.perf_counter()
    with full_precision(), prepared.spill as spill:
        references = prepared.references()
        middle = time.perf_counter()
        names = [site.name for site in prepared.chosen]
        frontier = Frontier(prepared.work, prepared.batches, names, spill)
        rows = 0
        for site in prepared.chosen:
            inputs = frontier.inputs(site.name, references.calls(site.name))
            layer = prepared.work.get_submodule(site.name)
            [part] = layer_parts(layer, site, references, prepared.sampler, inputs)
            rows = max(rows, len(part.inputs))
            references.release(site.name)
    return {
        "references_seconds": middle - began,
        "frontier_seconds": time.perf_counter() - middle,
        "spilled_gib": prepared.spill.written / 2**30,
        "rows": rows,
    }


@app.command()
def one(
    images: int,
    weights: _Weights,
    data: _Data = None,
    streamed: _Streamed = False,
    fit: _Fit = False,
    samples: _Samples = 15_000,
    spill_dir: _SpillDir = None,
    memory_limit: _MemoryLimit = None,
    threads: _Threads = 2,
) -> None:
    """Capture here and print what it took as JSON."""
    torch.set_num_threads(threads)
    pixels = calibration_images(fashion_mnist(data)[0], images)
    model = load_weights(vgg16(), weights)

    def batches():
        for start in range(0, images, BATCH):
            yield to_inputs(pixels[start : start + BATCH])

    source = batches if streamed else to_inputs(pixels)
    room = {"spill_dir": spill_dir, "memory_limit": parse_bytes(memory_limit)}
    began, cpu = time.perf_counter(), time.process_time()
    if fit:
        slr_gpu.compress(model, source, {"flops": 0.25}, samples=samples, batch_size=BATCH, **room)
        facts = {}
    else:
        facts = capture(
            Prepared(model, source, Settings(samples=samples, batch_size=BATCH), "cpu", **room)
        )
    entry = {
        "images": images,
        "streamed": streamed,
        "fit": fit,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_gib": peak_gib(),
        "samples": samples,
        "memory_limit": memory_limit,
        "threads": threads,
        **facts,
    }
    print(json.dumps(entry))


@app.command()
def every(
    weights: _Weights,
    images: Annotated[list[int], typer.Option(help="Repeat it, the smallest number first.")] = [
        2_000,
        20_000,
    ],
    data: _Data = None,
    streamed: _Streamed = False,
    fit: _Fit = False,
    samples: _Samples = 15_000,
    spill_dir: _SpillDir = None,
    memory_limit: _MemoryLimit = None,
    threads: _Threads = 2,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Capture each number of images in a process of its own, and compare."""
    options = [f"--weights={weights}", f"--samples={samples}", f"--threads={threads}"]
    options += [f"--data={data}"] if data else []
    options += [f"--spill-dir={spill_dir}"] if spill_dir else []
    options += [f"--memory-limit={memory_limit}"] if memory_limit else []
    options += ["--streamed"] if streamed else []
    options += ["--fit"] if fit else []
    entries: list[dict[str, Any]] = []
    for count in images:
        command = [sys.executable, "-m", "benchmarks.capture_growth", "one", str(count), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        entry = json.loads(done.stdout.splitlines()[-1])
        for name in ("seconds", "cpu_seconds"):
            first = entries[0] if entries else entry
            entry[f"{name}_ratio"] = entry[name] / first[name]
        entry["images_ratio"] = count / images[0]
        entries.append(entry)
        Console(width=140).print(_table(entries[-1:]))
        if out is not None:  # after each: a run that is cut short leaves what it has
            out.write_text(json.dumps(entries, indent=2) + "\n")


def _table(entries: list[dict[str, Any]]) -> Table:
    table = Table(title="Whole compress" if entries[0]["fit"] else "Capture of all layers")
    columns = (
        "images",
        "times as many",
        "seconds",
        "ratio",
        "CPU seconds",
        "ratio",
        "peak",
        "disk",
    )
    for title in columns:
        table.add_column(title, justify="right")
    for entry in entries:
        spilled = entry.get("spilled_gib")
        table.add_row(
            str(entry["images"]),
            f"{entry['images_ratio']:.2f}",
            f"{entry['seconds']:.1f}",
            f"{entry['seconds_ratio']:.2f}",
            f"{entry['cpu_seconds']:.1f}",
            f"{entry['cpu_seconds_ratio']:.2f}",
            f"{entry['peak_gib']:.2f} GiB",
            "" if spilled is None else f"{spilled:.2f} GiB written",
        )
    return table


if __name__ == "__main__":
    app()
