"""The papers' systems on equal terms: VGG-16 on Fashion-MNIST, one command an experiment.

In: a checkpoint (made by `benchmarks.train_fashion_mnist`) and the data set. Out: JSON and PNG in
`--out`, and a table. Results are stored piece by piece; a run that was cut short goes on where it
was, and what is stored under the same settings is not computed again:

    python -m benchmarks.papers grid --weights vgg16_fashion_mnist.safetensors

Layers' arrays and compressed models wait in `--cache`. With `--quick` everything is small, for
trying the commands out, and goes to a folder in the cache unless `--out` says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from threadpoolctl import threadpool_limits

from benchmarks import contenders, convergence, paper_figures, paper_table, solver_grid
from benchmarks.fine_tuning import Tuning
from benchmarks.store import Store
from benchmarks.vgg_layers import VGG, Setting, default_cache
from slr_gpu.errors import InputError, SLRError, complain

RESULTS = Path(__file__).parent / "results"
QUICK_LAYERS = ("conv1-2", "conv2-1", "linear1")

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.split("\n\n")[0])

Weights = Annotated[Path, typer.Option(help="Checkpoint of the VGG-16.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the IDX files.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch and BLAS.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the results.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of captured arrays and models.")]
Quick = Annotated[bool, typer.Option("--quick", help="A small trial.")]
TestImages = Annotated[int, typer.Option(min=1, help="Test images, the first so many.")]
Layers = Annotated[list[str] | None, typer.Option("--layer", help="Only these layers.")]
Keeps = Annotated[list[float] | None, typer.Option("--keep", help="Only these budgets.")]


@dataclass(frozen=True)
class Session:
    """What every command works with."""

    vgg: VGG
    out: Path
    console: Console

    def store(self, name: str) -> Store:
        return Store(self.out / f"papers_{name}.json")

    def picture(self, name: str) -> Path:
        return self.out / f"papers_{name}.png"

    def layers(self, chosen: list[str] | None, quick: tuple[str, ...] = QUICK_LAYERS) -> list[str]:
        """The layers asked for, by default all of them."""
        known = list(self.vgg.layers)
        for label in chosen or ():
            if label not in known:
                raise InputError(
                    complain(f"--layer {label}", f"one of {', '.join(known)}", "Check the name.")
                )
        return chosen or (list(quick) if self.vgg.setting.quick else known)


@contextmanager
def session(
    weights: Path,
    data: Path | None,
    threads: int,
    out: Path | None,
    cache: Path | None,
    quick: bool,
    test_images: int = 10_000,
) -> Iterator[Session]:
    """Load the network, pin the threads; the package's errors become one line."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    torch.set_num_threads(threads)
    cache = cache or default_cache()
    sizes = {"test_images": test_images}
    if quick:
        sizes = {"images": 200, "samples": 1500, "test_images": 200}
    try:
        with threadpool_limits(threads):
            vgg = VGG(Setting(weights, data, cache=cache, quick=quick, **sizes))
            out = out or (cache / "quick" if quick else RESULTS)
            yield Session(vgg, out, console)
    except SLRError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


@app.command()
def grid(
    weights: Weights,
    data: Data = None,
    threads: Threads = 2,
    out: Out = None,
    cache: Cache = None,
    quick: Quick = False,
    layer: Layers = None,
    keep: Keeps = None,
    contender: Annotated[list[str] | None, typer.Option(help="Only these contenders.")] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Report all that is stored.")] = False,
) -> None:
    """All solvers on all layers at 10, 25 and 45 percent."""
    with session(weights, data, threads, out, cache, quick) as s:
        store = s.store("grid")
        keeps = keep or ([0.1, 0.25] if quick else [0.1, 0.25, 0.45])
        chosen = contenders.find(contender)
        if stored:
            records = solver_grid.in_order(store.records.values(), s.layers(layer), keeps)
        else:
            records = solver_grid.run(s.vgg, store, chosen, s.layers(layer), keeps)
        summaries = [solver_grid.summarize(records, equal_cost=only) for only in (True, False)]
        store.summarize({summary["against"]: summary for summary in summaries})
        solver_grid.report(records, summaries, s.console)
        solver_grid.plot(records, s.picture("grid"))


@app.command()
def figure2(
    weights: Weights,
    data: Data = None,
    threads: Threads = 2,
    out: Out = None,
    cache: Cache = None,
    quick: Quick = False,
    test_images: TestImages = 10_000,
    keep: Keeps = None,
    contender: Annotated[str, typer.Option(help="System: its label in the table.")] = (
        contenders.REFERENCE
    ),
) -> None:
    """Accuracy against the number of layers approximated, symmetric and asymmetric."""
    with session(weights, data, threads, out, cache, quick, test_images) as s:
        keeps = keep or ([0.25] if quick else [0.25, 0.1])
        (chosen,) = contenders.find([contender])
        records = paper_figures.prefixes(s.vgg, s.store("figure2"), chosen, keeps)
        paper_figures.report_prefixes(records, s.console)
        paper_figures.plot_prefixes(records, s.vgg.layers, s.picture("figure2"))


@app.command()
def figure3(
    weights: Weights,
    data: Data = None,
    threads: Threads = 2,
    out: Out = None,
    cache: Cache = None,
    quick: Quick = False,
    test_images: TestImages = 10_000,
    layer: Layers = None,
    keep: Keeps = None,
    contender: Annotated[str, typer.Option(help="Solver: its label in the table.")] = (
        "Majorize, columns"
    ),
) -> None:
    """Linear against after-activation reconstruction, A + B and B alone, one layer at a time."""
    with session(weights, data, threads, out, cache, quick, test_images) as s:
        keeps = keep or ([0.25, 0.1] if quick else [0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05])
        layers = s.layers(layer or (["conv2-1"] if quick else ["conv2-1", "conv3-1"]))
        (chosen,) = contenders.find([contender])
        records = paper_figures.responses(s.vgg, s.store("figure3"), chosen, layers, keeps)
        paper_figures.report_responses(records, s.console)
        paper_figures.plot_responses(records, s.picture("figure3"))


@app.command()
def figure4(
    weights: Weights,
    data: Data = None,
    threads: Threads = 2,
    out: Out = None,
    cache: Cache = None,
    quick: Quick = False,
    layer: Annotated[str, typer.Option(help="Which layer.")] = "conv3-1",
    keep: Annotated[float, typer.Option(help="Of its weights.")] = 0.225,
    contender: Annotated[str, typer.Option(help="Solver: its label in the table.")] = (
        "Majorize, columns"
    ),
) -> None:
    """Pictures of A, U and V of one layer."""
    with session(weights, data, threads, out, cache, quick) as s:
        s.layers([layer])
        (chosen,) = contenders.find([contender])
        record = paper_figures.factors(
            s.vgg, s.store("figure4"), chosen, layer, keep, s.picture("figure4")
        )
        s.console.print(record)


@app.command()
def table1(
    weights: Weights,
    data: Data = None,
    threads: Threads = 2,
    out: Out = None,
    cache: Cache = None,
    quick: Quick = False,
    test_images: TestImages = 10_000,
    system: Annotated[
        list[str] | None, typer.Option(help="Labels of contenders; ADMM takes long.")
    ] = None,
    params: Annotated[float, typer.Option(help="Fraction of the parameters to keep.")] = 0.225,
    flops: Annotated[float | None, typer.Option(help="Of the FLOPs, as well.")] = None,
    epochs: Annotated[int, typer.Option(min=0, help="Of fine-tuning.")] = 5,
    minutes: Annotated[float, typer.Option(help="At most, for the fine-tuning.")] = 60.0,
    lr: Annotated[float, typer.Option(help="First learning rate of AdamW.")] = 1e-4,
) -> None:
    """Every layer's parts, then compression, speed-up and accuracy of the whole network."""
    with session(weights, data, threads, out, cache, quick, test_images) as s:
        keep = {"params": params} | ({} if flops is None else {"flops": flops})
        tuning = Tuning(epochs, minutes, lr)
        if quick:
            tuning = Tuning(1, 0.2, lr, images=1000)
        store = s.store("table1")
        for chosen in contenders.find(system or [contenders.REFERENCE]):
            result = paper_table.run(s.vgg, store, chosen, keep, tuning)
            paper_table.report(chosen.label, result, s.console)
            name = re.sub(r"\W+", "_", chosen.label.lower())
            paper_table.plot(chosen.label, result, s.picture(f"table1_{name}"))


@app.command("convergence")
def convergence_command(
    weights: Weights,
    data: Data = None,
    threads: Threads = 2,
    out: Out = None,
    cache: Cache = None,
    quick: Quick = False,
    layer: Annotated[str, typer.Option(help="Which layer.")] = "conv3-1",
    keep: Annotated[float, typer.Option(help="Budget that sets s and k.")] = 0.25,
) -> None:
    """True loss against seconds of the iterative solvers at one structure."""
    with session(weights, data, threads, out, cache, quick) as s:
        s.layers([layer])
        store = s.store("convergence")
        records = convergence.run(s.vgg, store, layer, keep)
        summary = convergence.summarize(records)
        store.summarize(summary)
        convergence.report(records, summary, s.console)
        title = f"{layer}, {keep:.0%} of its weights kept"
        convergence.plot(records, title, s.picture("convergence"))


if __name__ == "__main__":
    app()
