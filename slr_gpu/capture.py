"""From a model and calibration batches to the `LayerIO` of one layer after another.

In: the original model (BatchNorms folded), its partly compressed copy and batches. Out: sampled
rows. Targets come from one pass through the original. Inputs come from the copy (*asymmetric*:
the layers already compressed are in front of them) by a `Frontier`, which carries every batch
forward through the traced graph and so runs each layer once; where torch.fx cannot trace the
model, the copy is run again from the start for each layer, up to that layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .adapters import adapter_for
from .errors import InputError, ModelError, complain
from .graph import LayerSite, hooks, set_module
from .layer_io import LayerIO
from .ops import NumpyOps

Batch = tuple[Any, ...]


def first_tensor(batch: Batch) -> Tensor:
    return next(item for item in batch if isinstance(item, Tensor))


def as_batches(data: Any, model: nn.Module, batch_size: int) -> list[Batch]:
    """Calibration data as a list of argument tuples.

    Parameters
    ----------
    data : array, tensor or iterable of batches
        One array (N, ...) is cut into batches. A batch is a tensor, or a sequence whose leading
        items are the model's arguments; what follows them (labels) is dropped.

    Raises
    ------
    InputError
        No data, a single sample, or NaN or Inf in it.
    """
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    if isinstance(data, Tensor):
        batches: list[Batch] = [(part,) for part in data.split(batch_size)] if len(data) else []
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        arguments = _argument_count(model)
        batches = []
        for batch in data:
            items = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
            items = tuple(
                torch.from_numpy(i) if isinstance(i, np.ndarray) else i for i in items[:arguments]
            )
            if not any(isinstance(item, Tensor) for item in items):
                raise InputError(
                    complain(
                        f"a batch of {type(batch).__name__}",
                        "a tensor, or a tuple that starts with the model's arguments",
                        "Yield tensors.",
                    )
                )
            batches.append(items)
    else:
        raise InputError(
            complain(
                f"calibration_data of {type(data).__name__}",
                "a tensor, an array or an iterable of batches",
                "Pass inputs, e.g. a tensor (N, ...).",
            )
        )
    count = sum(len(first_tensor(batch)) for batch in batches)
    if count < 2:
        raise InputError(
            complain(f"{count} calibration sample(s)", "at least 2", "Some hundreds are usual.")
        )
    for number, batch in enumerate(batches):
        for item in batch:
            if isinstance(item, Tensor) and item.is_floating_point():
                if not torch.isfinite(item).all():
                    raise InputError(
                        complain(
                            f"NaN or Inf in calibration batch {number}",
                            "finite inputs",
                            "Check the calibration data.",
                        )
                    )
    return batches


def _argument_count(model: nn.Module) -> int:
    """How many positional arguments a model's forward takes without defaults, at least one."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return 1
    needed = [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    return max(1, len(needed))


def run_model(model: nn.Module, batch: Batch, number: int = 0) -> Any:
    """Call the model on a batch; `ModelError` with the batch's number if it raises."""
    parameter = next(model.parameters(), None)
    if parameter is not None:
        batch = tuple(_to(item, parameter) for item in batch)
    try:
        return model(*batch)
    except _Reached:
        raise
    except Exception as error:
        shape = tuple(first_tensor(batch).shape)
        raise ModelError(
            complain(
                f"{type(error).__name__} from the model on calibration batch {number} of shape"
                f" {shape}: {error}",
                "a model that runs on the calibration data",
                "Call model(batch) yourself to see it.",
            )
        ) from error


def _to(item: Any, like: Tensor) -> Any:
    if not isinstance(item, Tensor):
        return item
    return item.to(like.device, like.dtype if item.is_floating_point() else None)


class _Reached(Exception):
    """Ends a forward pass once the wanted layer has been reached."""


class Sampler:
    """Which output positions of which samples are used, the same for every pass.

    Parameters
    ----------
    rows : int
        About so many rows a layer in total.
    samples : int
        Calibration samples in all batches.
    seed : int
    """

    def __init__(self, rows: int, samples: int, seed: int) -> None:
        self.rows, self.samples, self.seed = rows, samples, seed

    def per_sample(self, positions: int) -> int:
        return min(positions, max(1, round(self.rows / self.samples)))

    def pick(
        self, order: int, batch: int, batch_size: int, positions: int
    ) -> tuple[Tensor, Tensor]:
        """(sample, position), each (rows,), without repetition within a sample."""
        count = self.per_sample(positions)
        seed = np.random.SeedSequence([self.seed, order, batch]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        if count == positions:
            position = torch.arange(positions).repeat(batch_size)
        else:
            keys = torch.rand(batch_size, positions, generator=generator)
            position = keys.topk(count, dim=1).indices.sort(dim=1).values.reshape(-1)
        return torch.arange(batch_size).repeat_interleave(count), position


@dataclass
class References:
    """What one pass through the original leaves for each layer.

    Attributes
    ----------
    linear_targets, inputs : dict of str to array
        Sampled rows; inputs only where asked for. NumPy arrays, or torch tensors on the device.
    resident : bool
        Whether rows stay on the device of the model.
    positions : dict of str to list of int
        Output positions a sample, batch by batch (they may vary with the length of the inputs).
    """

    linear_targets: dict[str, Any]
    inputs: dict[str, Any]
    positions: dict[str, list[int]]
    resident: bool = False

    def release(self, name: str) -> None:
        """Forget a layer's rows."""
        self.linear_targets.pop(name)
        self.inputs.pop(name, None)


def _joined(rows: list[Tensor], resident: bool) -> Any:
    """All rows (P, width) in float32: a tensor where they are, or a host array."""
    rows = [part.detach().float() for part in rows]
    return torch.cat(rows) if resident else torch.cat([part.cpu() for part in rows]).numpy()


@contextmanager
def full_precision() -> Iterator[None]:
    """Products and convolutions of float32 without TF32, whose ten bits would be fitted to."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def record_references(
    model: nn.Module,
    batches: list[Batch],
    sites: list[LayerSite],
    sampler: Sampler,
    *,
    with_inputs: bool = False,
    ops: NumpyOps | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> References:
    """Responses before the activation (and inputs) of all layers, sampled, in one pass.

    Parameters
    ----------
    model : nn.Module
        The original, BatchNorms folded.
    with_inputs : bool
        Also keep the layers' inputs in the original, for symmetric fits.
    ops : NumpyOps, optional
        Where the fits will run: rows stay there where it is a device that has room for all.
    advance : callable
        Told how many samples have gone through, for a progress bar.
    """
    outputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    inputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    positions: dict[str, list[int]] = {site.name: [] for site in sites}
    number = 0
    resident = _stays(model, sites, sampler, with_inputs, ops)

    def kept(rows: Tensor) -> Tensor:
        # Taken now: an in-place activation may write over the response.
        return rows.clone() if resident else rows.cpu().clone()

    def collect(site: LayerSite, layer: nn.Module) -> Callable:
        adapter = adapter_for(layer)

        def hook(module, args, output):
            positions[site.name].append(adapter.positions(layer, output))
            where = sampler.pick(site.order, number, len(output), positions[site.name][-1])
            outputs[site.name].append(kept(adapter.output_rows(layer, output, *where)))
            if with_inputs:
                inputs[site.name].append(kept(adapter.input_rows(layer, args[0], *where)))

        return hook

    with hooks() as handles, torch.no_grad():
        for site in sites:
            layer = model.get_submodule(site.name)
            handles.append(layer.register_forward_hook(collect(site, layer)))
        for number, batch in enumerate(batches):
            run_model(model, batch, number)
            advance(len(first_tensor(batch)))
    return References(
        {name: _joined(rows, resident) for name, rows in outputs.items()},
        {name: _joined(rows, resident) for name, rows in inputs.items() if rows},
        positions,
        resident,
    )


def _stays(
    model: nn.Module,
    sites: list[LayerSite],
    sampler: Sampler,
    with_inputs: bool,
    ops: NumpyOps | None,
) -> bool:
    """Whether the rows of all layers may stay on the device that they are made on."""
    if ops is None or next(model.parameters()).device.type == "cpu" or ops.device == "cpu":
        return False
    weights = [model.get_submodule(site.name).weight for site in sites]
    widths = [len(w) + (w[0].numel() if with_inputs else 0) for w in weights]
    # And the inputs of one layer beside them.
    widths.append(max(w[0].numel() for w in weights))
    return ops.memory.fits(4 * sampler.rows * sum(widths))


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class Frontier:
    """Inputs of one layer after another in a model whose earlier layers may have been replaced.

    Parameters
    ----------
    model : nn.Module
        Modules are looked up in it at every step, so replaced ones are used.
    batches : list
    names : list of str
        The layers whose inputs will be asked for, in the order of execution.

    Attributes
    ----------
    traced : bool
        Whether torch.fx could follow the model and met each of the layers once. If not, the model
        is run from the start for each layer.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], names: list[str]) -> None:
        self.model, self.batches = model, batches
        self._nodes: list[fx.Node] = []
        try:
            graph = fx.Tracer().trace(model)
            found = [n.target for n in graph.nodes if n.op == "call_module" and n.target in names]
            self.traced = found == names
        except Exception:
            # Whatever the model does that torch.fx cannot follow, running it still works.
            self.traced = False
        if self.traced:
            self._nodes = list(graph.nodes)
            self._last_use = {
                node: max((self._nodes.index(user) for user in node.users), default=-1)
                for node in self._nodes
            }
            self._position = 0
            self._interpreters = [self._start(graph, batch) for batch in batches]

    def _start(self, graph: fx.Graph, batch: Batch) -> fx.Interpreter:
        interpreter = fx.Interpreter(self.model, garbage_collect_values=False, graph=graph)
        parameter = next(self.model.parameters())
        interpreter.args_iter = iter([_to(item, parameter) for item in batch])
        return interpreter

    def inputs(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(batch number, input of the layer) for every batch; layers in execution order."""
        if not self.traced:
            yield from self._rerun(name)
            return
        target = next(
            i for i, n in enumerate(self._nodes) if n.op == "call_module" and n.target == name
        )
        if target < self._position:
            raise ValueError(f"{name} was passed: ask for layers in the order of execution")
        begin, self._position = self._position, target
        for number, interpreter in enumerate(self._interpreters):
            with torch.no_grad():
                for index in range(begin, target):
                    self._run(interpreter, index)
            node = self._nodes[target]
            source = node.args[0] if node.args else next(iter(node.kwargs.values()))
            yield number, interpreter.env[source]

    def outputs(self, name: str, module: nn.Module) -> Iterator[Any]:
        """What the model returns for every batch with a module in the place of a layer.

        Parameters
        ----------
        name : str
            The layer whose inputs were asked for last; the model itself is not changed.
        """
        if not self.traced:
            layer = self.model.get_submodule(name)
            set_module(self.model, name, module)
            try:
                with torch.no_grad():
                    for number, batch in enumerate(self.batches):
                        yield run_model(self.model, batch, number)
            finally:
                set_module(self.model, name, layer)
            return
        node = self._nodes[self._position]
        source = node.args[0] if node.args else next(iter(node.kwargs.values()))
        for interpreter in self._interpreters:
            kept = interpreter.env
            # Copies: what follows may write in place, and the batch goes on from here later.
            interpreter.env = {n: _cloned(value) for n, value in kept.items()}
            try:
                with torch.no_grad():
                    interpreter.env[node] = module(interpreter.env[source])
                    for index in range(self._position + 1, len(self._nodes) - 1):
                        self._run(interpreter, index)
                    result = interpreter.run_node(self._nodes[-1])
            finally:
                interpreter.env = kept
            yield result

    def _run(self, interpreter: fx.Interpreter, index: int) -> None:
        node = self._nodes[index]
        interpreter.env[node] = interpreter.run_node(node)
        for source in node.all_input_nodes:
            if self._last_use[source] <= index:
                interpreter.env.pop(source, None)

    def _rerun(self, name: str) -> Iterator[tuple[int, Tensor]]:
        caught: list[Tensor] = []

        def stop(module, args, kwargs):
            caught.append(args[0] if args else next(iter(kwargs.values())))
            raise _Reached

        for number, batch in enumerate(self.batches):
            with hooks() as handles, torch.no_grad():
                layer = self.model.get_submodule(name)
                handles.append(layer.register_forward_pre_hook(stop, with_kwargs=True))
                try:
                    run_model(self.model, batch, number)
                except _Reached:
                    pass
            yield number, caught.pop()


def layer_io(
    layer: nn.Module,
    site: LayerSite,
    references: References,
    sampler: Sampler,
    inputs: Iterable[tuple[int, Tensor]] | None,
    batch_sizes: list[int],
) -> LayerIO:
    """The `LayerIO` of one layer.

    Parameters
    ----------
    inputs : iterable of (batch number, tensor), or None
        From `Frontier.inputs`; None takes the original's inputs (symmetric).
    """
    adapter = adapter_for(layer)
    positions = references.positions[site.name]
    if inputs is None:
        X = references.inputs[site.name]
    else:
        rows = []
        for number, x in inputs:
            where = sampler.pick(site.order, number, len(x), positions[number])
            rows.append(adapter.input_rows(layer, x, *where))
        X = _joined(rows, references.resident)
    per_sample = [sampler.per_sample(count) for count in positions]
    return LayerIO(
        layer.weight,
        layer.bias,
        X,
        activation=site.activation,
        kernel_size=adapter.kernel_size(layer),
        linear_targets=references.linear_targets[site.name],
        sample_ids=np.repeat(np.arange(sum(batch_sizes)), np.repeat(per_sample, batch_sizes)),
    )
