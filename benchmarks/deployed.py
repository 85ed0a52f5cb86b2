"""What compression is worth in the runtimes: the exported VGG-16, dense and compressed, side by side.

In: a checkpoint (made by `benchmarks.train_fashion_mnist`) and the data set. Out: for every system,
budget of FLOPs, input size, runtime and number of threads the speed-up over the dense network in the
same runtime, and the accuracy it costs; tables, JSON and a PNG. Two inputs: the whole network on
Fashion-MNIST (32x32), and its convolutions alone on maps of 224x224, where they take as long as those
of the ImageNet network. Batch 1, float32.

    python -m benchmarks.deployed speed --weights vgg16_fashion_mnist.safetensors
    python -m benchmarks.deployed int8 --weights vgg16_fashion_mnist.safetensors

Compressed networks wait in `--cache`; a system and budget whose speed is stored is measured again
only with `--again`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import slr_gpu
from benchmarks.contenders import Contender
from benchmarks.store import Store, key, progress
from benchmarks.vgg_layers import VGG, Setting, default_cache
from slr_gpu.curves import Candidate, candidates
from slr_gpu.deploy import choose_graphs
from slr_gpu.export import export_model
from slr_gpu.flops import count_flops
from slr_gpu.report import Report
from slr_gpu.support import SupportSearch

RESULTS = Path(__file__).parent / "results"
RUNTIMES = ("onnxruntime", "openvino")
SIZES = (32, 224)
OURS = "slr_gpu"
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)  # points of accuracy, in the picture
SPEEDUPS = (1, 2, 5, 10, 20, 50)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.split("\n\n")[0])

Weights = Annotated[Path, typer.Option(help="Checkpoint of the VGG-16.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the IDX files.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Cache = Annotated[Path, typer.Option(help="Folder of compressed networks.")]
Keeps = Annotated[list[float], typer.Option("--keep", help="Fractions of the FLOPs.")]


@dataclass(frozen=True)
class Tucker2(slr_gpu.Majorize):
    """The rotated form without A: input projection, core, output projection."""

    def candidates(self, problem: Any, budget: Any, form: str) -> list[Candidate]:
        kind = "rotated" if problem.taps > 1 else "columns"
        return candidates(problem, budget, form=kind, shares=(0.0,))


@dataclass(frozen=True)
class PaperColumns(slr_gpu.Majorize):
    """Single columns and U V, A with two thirds of the budget, a support grown on few rows."""

    def candidates(self, problem: Any, budget: Any, form: str) -> list[Candidate]:
        thin = problem.thinned(2048)
        search = SupportSearch(thin, 1, exact=False)
        s = int(0.65 * budget.weights / problem.n)
        s -= s % budget.unit("columns")
        structure = slr_gpu.Structure("columns", s, budget.largest_rank("columns", s))
        return [Candidate(structure, 0.0, problem, search.grow(s, structure.k, steps=1).columns)]


UNIFORM = f"{OURS}, uniform"
SYSTEMS = {
    OURS: Contender(OURS, lambda: slr_gpu.Majorize(), "auto"),
    UNIFORM: Contender(UNIFORM, lambda: slr_gpu.Majorize(), "auto"),
    "Tucker-2": Contender("Tucker-2", lambda: Tucker2(), "auto"),
    "U V alone": Contender("U V alone", lambda: slr_gpu.WhitenedSVD(), "columns"),
    "channel pruning": Contender("channel pruning", lambda: slr_gpu.ChannelPruning(), "channels"),
    "columns + U V": Contender("columns + U V", lambda: PaperColumns(), "columns"),
}


@app.command()
def speed(
    weights: Weights,
    data: Data = None,
    out: Out = RESULTS,
    cache: Cache = default_cache(),
    keep: Keeps = [0.25, 0.1],
    system: Annotated[list[str], typer.Option(help="Only these.")] = list(SYSTEMS),
    size: Annotated[list[int], typer.Option(help="32, 224 or both.")] = list(SIZES),
    threads: Annotated[list[int], typer.Option(help="Of the runtimes.")] = [1, 2],
    multiple: Annotated[int, typer.Option(help="See slr_gpu.compress.")] = 16,
    time_limit: Annotated[float, typer.Option(help="Seconds a table.")] = 30.0,
    again: Annotated[bool, typer.Option("--again", help="Measure what is stored too.")] = False,
) -> None:
    """Latency in every runtime, and accuracy."""
    torch.set_num_threads(2)
    vgg = VGG(Setting(weights, data, cache=cache))
    store = Store(out / "deployed_speed.json")
    names = [(label, fraction) for fraction in keep for label in system]
    quality = {}
    with progress("compressed", len(names)) as done:
        for label, fraction in names:
            quality[label, fraction] = _quality(vgg, store, label, fraction, multiple)
            done(f"{label} at {fraction:g}: {quality[label, fraction]['drop']:.2f} points")
    runs = [(pixels, runtime) for pixels in size for runtime in RUNTIMES]
    records = {}
    with progress("measured", len(runs)) as done:
        for pixels, runtime in runs:
            mark = vgg.fingerprint(systems=system, keep=keep, multiple=multiple, threads=threads)
            name = key(f"{pixels}x{pixels}", runtime)
            record = None if again else store.get(name, mark)
            if record is None:
                record = _measure(vgg, names, pixels, runtime, threads, multiple, time_limit)
                record = store.put(name, mark, record)
            for count, measured in record["by_threads"].items():
                records[pixels, runtime, int(count)] = {**record, **measured}
            done(name)
    _report(records, quality, Console(width=150))
    _plot(records, quality, out / "deployed_speed.png")


def _compressed(vgg: VGG, label: str, fraction: float, multiple: int) -> tuple[nn.Module, Report]:
    options = {"multiple": multiple} | ({"allocation": "output"} if label == OURS else {})
    return vgg.compressed({"flops": fraction}, SYSTEMS[label], True, **options)


def _quality(vgg: VGG, store: Store, label: str, fraction: float, multiple: int) -> dict[str, Any]:
    """Accuracy on the test images, and what is left of parameters and FLOPs."""
    mark = vgg.fingerprint(system=SYSTEMS[label], multiple=multiple)

    def make() -> dict[str, Any]:
        model, report = _compressed(vgg, label, fraction, multiple)
        found = vgg.compare_branches([], {"": (0, vgg.chain(model))})[""]
        return {
            "asked": fraction,
            "achieved": report.achieved,
            "accuracy": found.accuracy,
            "drop": vgg.drop(found),
            "agreement": found.agreement,
            "kl": found.kl,
            "layers": {row.name: row.structure for row in report.layers if row.compressed},
        }

    return store.get_or_make(key(label, fraction, "quality"), mark, make)


def _network(model: nn.Module, pixels: int) -> tuple[nn.Module, torch.Tensor]:
    """What is exported, and an input of it: at 224x224 the convolutions alone."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, pixels, pixels, generator=generator)
    return (model if pixels == 32 else model.features), x


def _measure(
    vgg: VGG,
    names: list[tuple[str, float]],
    pixels: int,
    runtime: str,
    threads: list[int],
    multiple: int,
    time_limit: float,
) -> dict[str, Any]:
    """All networks in one runtime, in one interleaved run for each number of threads."""
    with tempfile.TemporaryDirectory() as folder:
        dense, x = _network(vgg.source, pixels)
        models, graphs, ideal = {"dense": Path(folder) / "dense.onnx"}, {}, {}
        export_model(dense, models["dense"], x)
        for label, fraction in names:
            name = key(label, fraction)
            model = _network(_compressed(vgg, label, fraction, multiple)[0], pixels)[0]
            chosen = choose_graphs(model, x, runtime=runtime, time_limit_s=5, progress=False)
            graphs[name] = {layer.name: layer.graph for layer in chosen}
            models[name] = Path(folder) / f"{len(models)}.onnx"
            export_model(model, models[name], x, graphs[name])
            ideal[name] = count_flops(dense, (x,))[0] / count_flops(model, (x,))[0]
        by_threads = {}
        for count in threads:
            result = slr_gpu.bench(
                models, x[:1], runtimes=[runtime], threads=count, time_limit_s=time_limit
            )
            rows = result.as_dict()
            for row in rows["latencies"]:
                row.pop("samples_s")
                row.pop("layers")
            by_threads[count] = {
                "latencies": {row.pop("model"): row for row in rows["latencies"]},
                "environment": rows["environment"],
                "rounds_s": rows["seconds"],
            }
    return {
        "pixels": pixels,
        "runtime": runtime,
        "ideal": ideal,
        "graphs": graphs,
        "by_threads": by_threads,
    }


def _report(
    records: dict[tuple[int, str, int], dict[str, Any]],
    quality: dict[tuple[str, float], dict[str, Any]],
    console: Console,
) -> None:
    for (pixels, runtime, threads), record in records.items():
        dense = record["latencies"]["dense"]
        table = Table(
            title=f"{pixels}x{pixels}, {runtime}, {threads} thread(s),"
            f" dense {1e3 * dense['median_s']:.2f} ms"
        )
        for title in ("system", "FLOPs kept", "ms", "speed-up (95 %)", "of ideal", "points lost"):
            table.add_column(title, justify="left" if title == "system" else "right")
        for (label, fraction), facts in quality.items():
            name = key(label, fraction)
            row, ideal = record["latencies"][name], record["ideal"][name]
            gain = row["speedup"]
            table.add_row(
                name,
                f"{1 / ideal:.3f}",
                f"{1e3 * row['median_s']:.2f}",
                f"{gain['ratio']:.2f} ({gain['low']:.2f}-{gain['high']:.2f})",
                f"{gain['ratio'] / ideal:.2f}",
                f"{facts['drop']:.2f}",
            )
        console.print(table)


def _plot(
    records: dict[tuple[int, str, int], dict[str, Any]],
    quality: dict[tuple[str, float], dict[str, Any]],
    path: Path,
) -> None:
    """Accuracy lost against speed-up, a panel a run, a colour a system."""
    from matplotlib.figure import Figure

    columns = min(4, len(records))
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(4 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    labels = list(dict.fromkeys(label for label, _ in quality))
    for axis, ((pixels, runtime, threads), record) in zip(axes, records.items(), strict=False):
        for label in labels:
            fractions = [fraction for other, fraction in quality if other == label]
            gains = [
                record["latencies"][key(label, fraction)]["speedup"]["ratio"]
                for fraction in fractions
            ]
            drops = [max(quality[label, fraction]["drop"], TICKS[0]) for fraction in fractions]
            axis.plot(gains, drops, "o-", label=label)
        axis.set_title(f"{pixels}x{pixels}, {runtime}, {threads} thread(s)", fontsize=9)
        axis.set_xlabel("speed-up over dense")
        axis.set_xscale("log")
        axis.set_xticks(SPEEDUPS, map(str, SPEEDUPS))
        axis.set_yscale("log")
        axis.set_yticks(TICKS, map(str, TICKS))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy lost, points")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


# -- int8 on top ---------------------------------------------------------------------------------


@app.command()
def int8(
    weights: Weights,
    data: Data = None,
    out: Out = RESULTS,
    cache: Cache = default_cache(),
    keep: Keeps = [0.25, 0.1],
    images: Annotated[int, typer.Option(help="Calibration images of the quantiser.")] = 200,
    test_images: Annotated[int, typer.Option(help="The first so many.")] = 10_000,
    multiple: Annotated[int, typer.Option(help="See slr_gpu.compress.")] = 16,
) -> None:
    """ONNX Runtime's static quantisation of the exported networks: accuracy and latency."""
    vgg = VGG(Setting(weights, data, cache=cache, test_images=test_images))
    store = Store(out / "deployed_int8.json")
    table = Table(title="static quantisation in ONNX Runtime, 1 thread")
    for title in ("network", "float32", "int8", "points lost", "int8 over float32"):
        table.add_column(title, justify="left" if title == "network" else "right")
    for fraction in (None, *keep):
        name = "dense" if fraction is None else key(OURS, fraction)
        model = vgg.source if fraction is None else _compressed(vgg, OURS, fraction, multiple)[0]
        record = _quantised(vgg, model, images)
        store.put(name, vgg.fingerprint(images=images, multiple=multiple), record)
        table.add_row(
            name,
            f"{record['float32']:.4f}",
            f"{record['int8']:.4f}",
            f"{100 * (record['float32'] - record['int8']):.2f}",
            f"{record['speedup']['ratio']:.2f}x",
        )
    Console(width=120).print(table)


def _quantised(vgg: VGG, model: nn.Module, images: int) -> dict[str, Any]:
    inputs, labels = vgg.test
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{kind}.onnx" for kind in ("float32", "int8")}
        export_model(model, paths["float32"], vgg.calibration[:2])
        quantise(paths["float32"], paths["int8"], vgg.calibration[:images].numpy())

        def accuracy(run: Any) -> float:
            return float(np.mean(run(inputs.numpy()).argmax(1) == labels))

        result = slr_gpu.bench(
            paths,
            inputs[:50],
            batch=50,
            runtimes=["onnxruntime"],
            eval_fn=accuracy,
            time_limit_s=10,
        )
        # Latency is of single images; accuracy was taken in batches.
        single = slr_gpu.bench(paths, inputs[:1], runtimes=["onnxruntime"], time_limit_s=10)
    rows = {row["model"]: row for row in single.as_dict()["latencies"]}
    ratio = rows["float32"]["median_s"] / rows["int8"]["median_s"]
    return {
        **result.accuracy,
        "speedup": {"ratio": ratio},
        "median_s": {kind: row["median_s"] for kind, row in rows.items()},
        "environment": single.environment,
    }


def quantise(source: Path, target: Path, inputs: np.ndarray) -> None:
    """ONNX Runtime's static quantisation of a float32 file, calibrated on these inputs.

    Weights take seven bits on a CPU without VNNI: its sums of two products of eight bits overflow
    sixteen, which cost a compressed network 6 points of accuracy.
    """
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = InferenceSession(str(source)).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(inputs, max(1, len(inputs) // 10)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch}

    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    cpu = torch.cpu.get_capabilities()
    sums_fit = cpu["architecture"] != "x86_64" or cpu["avx512_vnni"] or cpu["avx_vnni"]
    quantize_static(
        str(prepared),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not sums_fit,
    )
    prepared.unlink()


if __name__ == "__main__":
    app()
