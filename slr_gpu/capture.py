"""From a model and calibration batches to the `LayerIO` of one layer after another.

In: the original model (BatchNorms folded), its partly compressed copy and batches. Out: sampled
rows. Targets come from one pass through the original. Inputs come from the copy (*asymmetric*:
the layers already compressed are in front of them) by a `Frontier`, which carries every batch
forward through the traced graph and so runs each layer once; where torch.fx cannot trace the
model, the copy is run again from the start for each layer, up to that layer. A layer that is
called several times is fitted on the rows of all its uses.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from . import activations
from .adapters import adapter_for
from .errors import InputError, ModelError, complain
from .graph import LayerSite, hooks, set_module
from .grouped import split
from .layer_io import LayerIO
from .ops import NumpyOps
from .parallel import ALONE, Group

Batch = tuple[Any, ...]


class Named(tuple):
    """A batch whose items are passed by name; many models take some of theirs only so."""

    names: tuple[str, ...]

    def __new__(cls, names: Iterable[str], items: Iterable[Any]) -> Named:
        self = super().__new__(cls, items)
        self.names = tuple(names)
        return self


def mapped(function: Callable[[Any], Any], batch: Batch) -> Batch:
    """A batch of the same kind, with a function applied to each item."""
    items = tuple(function(item) for item in batch)
    return Named(batch.names, items) if isinstance(batch, Named) else items


def by_position(model: nn.Module, batch: Batch) -> Batch:
    """A batch as positional arguments, with the defaults of those before the last one named.

    Empty where the model takes one of them by name alone.
    """
    if not isinstance(batch, Named):
        return batch
    bound = inspect.signature(model.forward).bind(**dict(zip(batch.names, batch, strict=True)))
    bound.apply_defaults()
    places = list(bound.arguments)
    last = max(places.index(name) for name in batch.names if name in places)
    return bound.args[: last + 1] if not set(batch.names) & set(bound.kwargs) else ()


def first_tensor(batch: Batch) -> Tensor:
    return next(item for item in batch if isinstance(item, Tensor) and item.ndim)


def first_samples(batch: Batch, count: int) -> Batch:
    """The arguments for the first samples of a batch."""
    return of_samples(lambda tensor: tensor[:count], batch)


def of_samples(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """A batch with a function applied to each tensor that has an entry a sample.

    What is no tensor, or not as long as the batch (a mask between positions), stays as it is.
    """
    size = len(first_tensor(batch))

    def applied(item: Any) -> Any:
        samples = isinstance(item, Tensor) and item.ndim and len(item) == size
        return function(item) if samples else item

    return mapped(applied, batch)


def as_batches(data: Any, model: nn.Module, batch_size: int) -> list[Batch]:
    """Calibration data as a list of argument tuples.

    Parameters
    ----------
    data : array, tensor or iterable of batches
        One array (N, ...) is cut into batches. A batch is a tensor, a sequence whose leading
        items are the model's arguments (what follows them, labels, is dropped), or a dict of
        arguments by name.

    Raises
    ------
    InputError
        No data, or a single sample.
    """
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    if isinstance(data, Tensor):
        batches: list[Batch] = [(part,) for part in data.split(batch_size)] if len(data) else []
    elif isinstance(data, Iterable) and not isinstance(data, (str, bytes, dict)):
        batches = []
        for batch in data:
            items = mapped(
                lambda item: torch.from_numpy(item) if isinstance(item, np.ndarray) else item,
                _arguments(model, batch),
            )
            if not any(isinstance(item, Tensor) and item.ndim for item in items):
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
    return batches


def check_finite(batches: list[Batch], first: int = 0) -> None:
    """InputError for NaN or Inf in batches, the first of which has this number."""
    for number, batch in enumerate(batches, first):
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


def _arguments(model: nn.Module, batch: Any) -> Batch:
    """The model's arguments in what a loader yields."""
    if isinstance(batch, Mapping):
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(**batch)
        except TypeError as error:
            raise InputError(
                complain(
                    f"a batch of {type(batch).__name__} with {', '.join(map(str, batch))}: {error}",
                    f"arguments of forward{signature}",
                    "Name all that it needs, and leave the others out.",
                )
            ) from error
        # The first argument comes first: its length is that of the batch.
        order = sorted(batch, key=lambda name: [*bound.arguments, name].index(name))
        return Named(order, [batch[name] for name in order])
    items = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
    return items[: _argument_count(model)]


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
        batch = mapped(lambda item: _to(item, parameter), batch)
    try:
        if isinstance(batch, Named):
            return model(**dict(zip(batch.names, batch, strict=True)))
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
    """A copy on the model's device and in its dtype: the model may write over its inputs."""
    if not isinstance(item, Tensor):
        return item
    return item.to(like.device, like.dtype if item.is_floating_point() else None, copy=True)


class _Reached(Exception):
    """Ends a forward pass once the wanted layer has been reached."""


class Use(NamedTuple):
    """One call of a layer while a batch went through the original.

    `leading` is the length of the first dimension of its output, mostly that of the batch, and
    `positions` how many outputs an entry along it has.
    """

    batch: int
    leading: int
    positions: int
    input_shape: tuple[int, ...]


class Sampler:
    """Which output positions of which samples are used, the same for every pass.

    Parameters
    ----------
    rows : int
        About so many rows a layer in total.
    batch_sizes : list of int
        Calibration samples in each batch, of all ranks.
    seed : int
    group : Group
        The ranks, each of which has its `Group.share` of the batches and counts them from 0.
    """

    def __init__(self, rows: int, batch_sizes: list[int], seed: int, group: Group = ALONE) -> None:
        self.rows, self.batch_sizes, self.seed, self.group = rows, batch_sizes, seed, group
        self._starts = np.cumsum([0, *batch_sizes])
        self._first = group.share(len(batch_sizes)).start

    def pick(self, site: LayerSite, use: Use, call: int) -> tuple[Tensor, Tensor, np.ndarray]:
        """Rows of one use, without repetition.

        Where the leading dimension is no multiple of the batch (regions of images, say), samples
        are taken to own neighbouring parts of it, as equal as can be.

        Parameters
        ----------
        call : int
            How many uses by this batch went before.

        Returns
        -------
        index, position : tensor, (rows,)
            Along the leading dimension, and among the positions of each of its entries.
        sample : int array, (rows,)
            Numbers of the calibration samples, ascending.
        """
        batch = self._first + use.batch
        batch_size = self.batch_sizes[batch]
        chunks = batch_size if use.leading % batch_size == 0 else 1
        positions = use.leading * use.positions // chunks  # of a chunk
        share = self.rows * batch_size / (sum(self.batch_sizes) * chunks * max(site.calls, 1))
        count = min(positions, max(1, round(share)))
        entropy = [self.seed, site.order, batch, *([call] if call else [])]
        seed = np.random.SeedSequence(entropy).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        if count == positions:
            position = torch.arange(positions).repeat(chunks)
        else:
            keys = torch.rand(chunks, positions, generator=generator)
            position = keys.topk(count, dim=1).indices.sort(dim=1).values.reshape(-1)
        flat = torch.arange(chunks).repeat_interleave(count) * positions + position
        index = flat // max(use.positions, 1)
        sample = self._starts[batch] + index.numpy() * batch_size // max(use.leading, 1)
        return index, flat % max(use.positions, 1), sample


@dataclass
class References:
    """What one pass through the original leaves for each layer.

    Attributes
    ----------
    linear_targets, inputs : dict of str to array
        Sampled rows; inputs only where asked for. NumPy arrays, or torch tensors on the device.
    resident : bool
        Whether rows stay on the device of the model.
    uses : dict of str to list of Use
        Every call, in the order of execution.
    """

    linear_targets: dict[str, Any]
    inputs: dict[str, Any]
    uses: dict[str, list[Use]]
    resident: bool = False

    def release(self, name: str) -> None:
        """Forget a layer's rows."""
        self.linear_targets.pop(name)
        self.inputs.pop(name, None)

    def calls(self, name: str) -> Counter[int]:
        """How often each batch used a layer."""
        return Counter(use.batch for use in self.uses[name])


def first_input(args: tuple, kwargs: dict) -> Tensor:
    """What a layer is called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


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
    uses: dict[str, list[Use]] = {site.name: [] for site in sites}
    number = 0
    resident = _stays(model, sites, sampler, with_inputs, ops)

    def kept(rows: Tensor) -> Tensor:
        # Taken now: an in-place activation may write over the response.
        return rows.clone() if resident else rows.cpu().clone()

    def collect(site: LayerSite, layer: nn.Module) -> Callable:
        adapter = adapter_for(layer)

        def hook(module, args, kwargs, output):
            x = adapter.batched(layer, first_input(args, kwargs))
            y = adapter.batched(layer, output)
            use = Use(number, len(y), adapter.positions(layer, y), tuple(x.shape))
            call = sum(other.batch == number for other in uses[site.name])
            uses[site.name].append(use)
            *where, _ = sampler.pick(site, use, call)
            outputs[site.name].append(kept(adapter.output_rows(layer, y, *where)))
            if with_inputs:
                inputs[site.name].append(kept(adapter.input_rows(layer, x, *where)))

        return hook

    with hooks() as handles, torch.no_grad():
        for site in sites:
            layer = model.get_submodule(site.name)
            handles.append(layer.register_forward_hook(collect(site, layer), with_kwargs=True))
        for number, batch in enumerate(batches):
            run_model(model, batch, number)
            advance(len(first_tensor(batch)))
    return References(
        {name: _joined(rows, resident) for name, rows in outputs.items() if rows},
        {name: _joined(rows, resident) for name, rows in inputs.items() if rows},
        uses,
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


def _gives(batch: Batch, arguments: list[str]) -> bool:
    """Whether a batch has a tensor for each argument of a traced model, in their order."""
    if not all(isinstance(item, Tensor) for item in batch):
        return False
    if isinstance(batch, Named):
        return list(batch.names) == arguments
    return len(batch) == len(arguments) or any(name.startswith("*") for name in arguments)


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
        Whether torch.fx could follow the model and met the layers in this order. If not, the model
        is run from the start for each layer; in any case for those that are called several times.
    """

    def __init__(self, model: nn.Module, batches: list[Batch], names: list[str]) -> None:
        self.model, self.batches = model, batches
        self._nodes: list[fx.Node] = []
        calls: Counter[str] = Counter()
        try:
            graph = fx.Tracer().trace(model)
            found = [n.target for n in graph.nodes if n.op == "call_module" and n.target in names]
            calls = Counter(found)
            # A trace took every argument for a tensor that is given.
            arguments = [node.target for node in graph.nodes if node.op == "placeholder"]
            given = all(_gives(batch, arguments) for batch in batches)
            self.traced = given and list(dict.fromkeys(found)) == names
        except Exception:
            # Whatever the model does that torch.fx cannot follow, running it still works.
            self.traced = False
        self._shared = {name for name in names if calls[name] > 1}
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

    def inputs(
        self, name: str, calls: Mapping[int, int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(batch number, input of the layer) for every batch; layers in execution order.

        Parameters
        ----------
        calls : mapping of int to int, optional
            How often each batch uses the layer, where that is known not to be once.
        """
        if not self.traced or name in self._shared:
            yield from self._rerun(name, calls)
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
            yield number, interpreter.env[first_input(node.args, node.kwargs)]

    def outputs(self, name: str, module: nn.Module) -> Iterator[Any]:
        """What the model returns for every batch with a module in the place of a layer.

        Parameters
        ----------
        name : str
            The layer whose inputs were asked for last; the model itself is not changed.
        """
        if not self.traced or name in self._shared:
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
        source = first_input(node.args, node.kwargs)
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

    def _rerun(self, name: str, calls: Mapping[int, int] | None) -> Iterator[tuple[int, Tensor]]:
        for number, batch in enumerate(self.batches):
            wanted = 1 if calls is None else calls.get(number, 0)
            caught: list[Tensor] = []

            def catch(module, args, kwargs, caught=caught, wanted=wanted):
                # Taken now: an in-place operation may write over it before the last call.
                x = first_input(args, kwargs)
                caught.append(x.clone() if wanted > 1 else x)
                if len(caught) == wanted:
                    raise _Reached

            if wanted:
                with hooks() as handles, torch.no_grad():
                    layer = self.model.get_submodule(name)
                    handles.append(layer.register_forward_pre_hook(catch, with_kwargs=True))
                    try:
                        run_model(self.model, batch, number)
                    except _Reached:
                        pass
            for x in caught:
                yield number, x


def layer_parts(
    layer: nn.Module,
    site: LayerSite,
    references: References,
    sampler: Sampler,
    inputs: Iterable[tuple[int, Tensor]] | None,
) -> list[LayerIO]:
    """The `LayerIO` of one layer, or of each group of a grouped one.

    Parameters
    ----------
    inputs : iterable of (batch number, tensor), or None
        From `Frontier.inputs`; None takes the original's inputs (symmetric).

    Raises
    ------
    ModelError
        When the layers compressed before make the model take another way, so that fewer than two
        rows of this layer can be compared.
    """
    adapter, uses = adapter_for(layer), references.uses[site.name]
    targets = references.linear_targets[site.name]
    picks, seen = [], Counter()
    for use in uses:
        picks.append(sampler.pick(site, use, seen[use.batch]))
        seen[use.batch] += 1
    samples = np.concatenate([sample for _, _, sample in picks])
    if inputs is None:
        X = references.inputs[site.name]
    else:
        rows = {
            number: adapter.input_rows(layer, x, *picks[number][:2])
            for number, x in _matched(uses, ((n, adapter.batched(layer, x)) for n, x in inputs))
        }
        kept = np.repeat([i in rows for i in range(len(uses))], [len(pick[2]) for pick in picks])
        counts = sampler.group.objects(int(kept.sum()))
        if sum(counts) < 2 or not all(counts):
            raise ModelError(
                complain(
                    f"a model that no longer calls {site.name} as before, once layers in front of"
                    " it are compressed",
                    "the same path through the model",
                    "Pass asymmetric=False.",
                )
            )
        X = _joined(list(rows.values()), references.resident)
        if not kept.all():
            targets, samples = targets[kept], samples[kept]
    if np.any(np.diff(samples) < 0):  # several uses: bring each sample's rows together
        order = np.argsort(samples, kind="stable")
        X, targets, samples = X[order], targets[order], samples[order]
    return split(
        adapter.groups(layer),
        layer.weight,
        layer.bias,
        X,
        targets,
        activation=site.activation,
        kernel_size=adapter.kernel_size(layer),
        sample_ids=samples,
        group=sampler.group,
    )


def response_energies(
    references: References, site: LayerSite, groups: int, ranks: Group = ALONE
) -> list[float]:
    """``||Y||^2`` of each group of a layer's responses after the activation, on all ranks."""
    if groups == 1:
        return [1.0]
    Z = torch.as_tensor(references.linear_targets[site.name]).cpu().numpy()
    Y = activations.get(site.activation).value(NumpyOps(), Z)
    own = np.array([(part**2).sum() for part in np.split(Y, groups, axis=1)])
    return (ranks.sum((own,))[0] + 1e-30).tolist()


def _matched(uses: list[Use], inputs: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """(number of the use, input) where the input is as it was in the original.

    Control flow that depends on values may call a layer more or less often, or on other shapes.
    """
    numbers: dict[int, list[int]] = {}
    for number, use in enumerate(uses):
        numbers.setdefault(use.batch, []).append(number)
    seen: Counter[int] = Counter()
    for batch, x in inputs:
        mine, call = numbers.get(batch, []), seen[batch]
        seen[batch] += 1
        if call < len(mine) and tuple(x.shape) == uses[mine[call]].input_shape:
            yield mine[call], x
