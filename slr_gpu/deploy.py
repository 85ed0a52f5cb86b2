"""The fastest graph for each decomposed layer, by measurement, and never one slower than dense.

In: a compressed model, one example and the runtime that will execute it. Out: for every decomposed
layer the graph to export (`slr_gpu.fold.graphs_of`). All graphs of a layer compute the same function,
so the choice costs no accuracy; one of them is the layer multiplied out, which takes as long as the
original did. Each is timed at the shape of the layer's real input with a batch of one; convolutions
between two of 1x1 and few channels: what stands in a model gets its input in the runtime's own memory
layout and has to leave its output in it, which costs a gather of channels more than the layer may save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from .equivalence import as_arguments, resize
from .export import flush_denormals
from .fold import DENSE, decomposed_layers, deployable, for_deployment, graphs_of
from .frontier import first_input
from .graph import hooks
from .layer_budget import BLOCK
from .layers import SLRLinear
from .pieces import CONVS
from .progress import progress_bar
from .runtime.layer_timing import Case, check_runtime, time_layers
from .runtime.timing import bootstrap

# The graph of first choice stays unless another one is faster by more.
MARGIN = 1.02
# At the ends of what is timed: a block of runtimes' layouts, and little work.
END_CHANNELS = BLOCK


@dataclass(frozen=True)
class LayerGraph:
    """How a decomposed layer is deployed.

    Attributes
    ----------
    name : str
    graph : str
        Of `slr_gpu.fold.graphs_of`.
    seconds : dict of str to float
        Median seconds a call of each graph.
    runtime : str
    """

    name: str
    graph: str
    seconds: dict[str, float]
    runtime: str

    @property
    def speedup(self) -> float:
        """Over the dense layer, the small convolutions around both included."""
        return self.seconds[DENSE] / self.seconds[self.graph]

    def __str__(self) -> str:
        if self.graph == DENSE:
            others = min(s for graph, s in self.seconds.items() if graph != DENSE)
            return (
                f"dense: {1e3 * self.seconds[DENSE]:.3g} ms in {self.runtime}, not"
                f" {1e3 * others:.3g} ms"
            )
        return f"{self.graph}, {self.speedup:.2f}x in {self.runtime}"


def choose_graphs(
    model: nn.Module,
    inputs: Any,
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    time_limit_s: float = 30.0,
    seed: int = 0,
    progress: bool = True,
) -> list[LayerGraph]:
    """Time the graphs of every decomposed layer and choose the fastest.

    Parameters
    ----------
    model : nn.Module
        Not changed. Computed with in eval mode and float32.
    inputs : tensor, array or tuple of arguments
        See `slr_gpu.export.export_model`.
    runtime, threads, time_limit_s, seed
        See `slr_gpu.runtime.layer_timing.time_layers`.
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    list of LayerGraph
        In the order of the model's modules; without the layers that this input does not reach.

    Raises
    ------
    InputError, BackendError
        For a runtime that does not exist or does not work here.
    """
    check_runtime(runtime)
    example = resize(as_arguments(inputs), 1)
    model = deployable(model)
    layers = decomposed_layers(model)
    rounds = max((len(graphs_of(layer)) for layer in layers.values()), default=0)
    cases: dict[tuple[str, str], Case] = {}
    for number in range(rounds):
        # One whole model with the i-th graph of each layer: channels come in folded orders.
        graphs = {name: graphs_of(layer)[number:] for name, layer in layers.items()}
        graphs = {name: left[0] for name, left in graphs.items() if left}
        deployed = flush_denormals(for_deployment(model, graphs))
        shapes = _shapes(deployed, example, list(graphs))
        for name, graph in graphs.items():
            if name in shapes:
                cases[name, graph] = _within(deployed.get_submodule(name), *shapes[name])
    if not cases:
        return []
    # Layers alike in everything but their weights are timed once.
    kinds = {key: f"{module!r} {shape}" for key, (module, shape) in cases.items()}
    unique = {kind: cases[key] for key, kind in kinds.items()}
    pairs = {(kinds[name, graphs_of(layers[name])[0]], kinds[name, graph]) for name, graph in cases}
    ratios = sorted(pair for pair in pairs if pair[0] != pair[1])
    with progress_bar(f"layers in {runtime}", time_limit_s, show=progress) as advance:
        timings = time_layers(
            unique,
            ratios,
            runtime=runtime,
            threads=threads,
            time_limit_s=time_limit_s,
            seed=seed,
            advance=advance,
        )
    found = []
    for name, layer in layers.items():
        seconds = {
            graph: timings.seconds[kinds[name, graph]]
            for graph in graphs_of(layer)
            if (name, graph) in cases
        }
        if seconds:
            medians = {graph: bootstrap(values).value for graph, values in seconds.items()}
            found.append(LayerGraph(name, _fastest(seconds, seed), medians, runtime))
    return found


def _fastest(seconds: dict[str, Any], seed: int) -> str:
    """The first graph, or the one that is faster beyond doubt, by the most."""
    first = next(iter(seconds))
    gains = {
        graph: bootstrap(seconds[first] / values, seed=seed)
        for graph, values in seconds.items()
        if graph != first
    }
    sure = {graph: gain.value for graph, gain in gains.items() if gain.low > MARGIN}
    return max(sure, key=lambda graph: sure[graph], default=first)


class Within(nn.Module):
    """A layer as it stands in a model, between others."""

    def __init__(self, before: nn.Module, layer: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


def _within(layer: nn.Module, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Case:
    """What is timed for a layer of these shapes; linear layers by themselves."""
    if isinstance(layer, (nn.Linear, SLRLinear)):
        return layer, inputs
    conv = CONVS[len(inputs) - 2]
    ends = conv(END_CHANNELS, inputs[1], 1), conv(outputs[1], END_CHANNELS, 1)
    return Within(ends[0], layer, ends[1]).eval(), (inputs[0], END_CHANNELS, *inputs[2:])


def _shapes(
    model: nn.Module, example: tuple[Any, ...], names: Sequence[str]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the inputs and outputs of modules in one call."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    with hooks() as handles, torch.no_grad():
        for name in names:

            def note(module, args, kwargs, output, name=name):
                found = tuple(first_input(args, kwargs).shape), tuple(output.shape)
                shapes.setdefault(name, found)

            layer = model.get_submodule(name)
            handles.append(layer.register_forward_hook(note, with_kwargs=True))
        model(*example)
    return shapes


def table(graphs: Sequence[LayerGraph]) -> Table:
    """A rich renderable: a line a layer."""
    rows = Table(header_style="bold", pad_edge=False, box=None)
    for title, justify in (("layer", "left"), ("graph", "left"), ("ms", "right")):
        rows.add_column(title, justify=justify)
    for title in ("dense ms", "speed-up"):
        rows.add_column(title, justify="right")
    for item in graphs:
        rows.add_row(
            item.name,
            item.graph,
            f"{1e3 * item.seconds[item.graph]:.3g}",
            f"{1e3 * item.seconds[DENSE]:.3g}",
            f"{item.speedup:.2f}x",
        )
    return rows
