"""What follows each layer of a model: found by watching one batch go through it.

In: a model and the arguments of one call. Out: for every convolution and linear layer a
`LayerSite`: each of its uses, which BatchNorm can be folded into it, which activation its response
passes, and why it is left as it is where it is. Modules are watched by hooks and functions
(``F.relu``, ``x.relu()``) by a `TorchFunctionMode`, so that it works for any `nn.Module`, whatever
its control flow. A module of the user's own that has no weights is asked: it is called on a range
of numbers, and taken for the activation that gives the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import activations
from .adapters import adapter_for
from .errors import InputError
from .ops import NumpyOps

# Modules and functions that hand their input on unchanged in eval mode, or in another shape.
_PASS_MODULES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Flatten,
    nn.Unflatten,
)
_PASS_FUNCTIONS = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous", "clone", "float", "to"),
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute"),
}
# Elementwise activations of torch that `activations` has no record of.
_UNKNOWN = {
    *("ELU", "CELU", "SELU", "PReLU", "RReLU", "Mish", "Softplus", "Softsign", "Threshold"),
    *("Hardsigmoid", "LogSigmoid", "Tanhshrink", "Hardshrink", "Softshrink"),
}
_UNKNOWN_FUNCTIONS = {name.lower() for name in _UNKNOWN}
_BATCH_NORMS = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


_SIZES = ("size", "dim", "__len__", "numel", "stride")


@dataclass
class LayerSite:
    """Where a layer stands in its model.

    Attributes
    ----------
    name : str
    calls : int
        How often it ran in one forward pass.
    order : int
        Position in the order of execution, of the first call.
    activation : str
        Name for `slr_gpu.activations.get`; ``identity`` when something else follows.
    batch_norm : str or None
        Name of the BatchNorm that directly follows and can be folded in.
    shapes : list of pairs of tuple of int
        Input and output shapes of every call, batch included.
    note : str
        What should be said about it.
    dense : str
        Why it cannot be compressed; empty when it can.
    batch_axis : int
        Of its input and output; not 0 for linear layers on (steps, samples, features).
    """

    name: str
    calls: int = 0
    order: int = -1
    activation: str = "identity"
    batch_norm: str | None = None
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    note: str = ""
    dense: str = ""
    batch_axis: int = 0

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the first call."""
        return self.shapes[0][0]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the first call."""
        return self.shapes[0][1]


@dataclass
class _Operation:
    """One recorded step: a leaf module's call or a function outside leaf modules."""

    module: nn.Module | None
    name: str
    args: tuple
    kwargs: dict
    users: list[int] = field(default_factory=list)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


class _Recorder(TorchFunctionMode):
    """Records operations and which operation made each tensor that a later one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.depth = 0  # inside a leaf module
        self._maker: dict[int, int] = {}
        self._alive: list[Tensor] = []  # ids stay unique only while the tensors live

    def begin(self, inputs: Any, operation: _Operation) -> int:
        index = len(self.operations)
        for tensor in tensors_in(inputs):
            if id(tensor) in self._maker:
                self.operations[self._maker[id(tensor)]].users.append(index)
        self.operations.append(operation)
        return index

    def end(self, index: int, outputs: Any) -> None:
        for tensor in tensors_in(outputs):
            self._maker[id(tensor)] = index
            self._alive.append(tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if self.depth:
            return func(*args, **kwargs)
        self.depth += 1
        try:
            result = func(*args, **kwargs)
        finally:
            self.depth -= 1
        # Reading a size, a shape or a device does not use the values; x.T does.
        if name in _SIZES or (name == "__get__" and not any(True for _ in tensors_in(result))):
            return result
        self.end(self.begin((args, kwargs), _Operation(None, name, args, kwargs)), result)
        return result


@contextmanager
def hooks() -> Iterator[list]:
    """A list for hook handles; all of them are removed on the way out, whatever happens."""
    handles: list = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def find_sites(model: nn.Module, call: Any) -> dict[str, LayerSite]:
    """Watch one forward pass.

    Parameters
    ----------
    model : nn.Module
        In eval mode; unchanged on return.
    call : callable
        Runs the model on one batch, without gradients, and returns its outputs.

    Returns
    -------
    dict of str to LayerSite
        Every layer of a type that can be compressed, in the order of execution; those that
        never ran come last, with ``calls == 0``.
    """
    sites = {name: LayerSite(name) for name, m in model.named_modules() if adapter_for(m)}
    recorder = _Recorder()
    uses: dict[str, list[int]] = {}  # operations of each module
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[tuple[int, tuple[int, ...]]] = []

    def enter(module, args, kwargs):
        if recorder.depth == 0:
            operation = _Operation(module, names[id(module)], args, kwargs)
            index = recorder.begin((args, kwargs), operation)
            uses.setdefault(names[id(module)], []).append(index)
        else:
            index = -1
        stack.append((index, next((tuple(t.shape) for t in tensors_in((args, kwargs))), ())))
        recorder.depth += 1

    def leave(module, args, kwargs, output):
        recorder.depth -= 1
        index, input_shape = stack.pop()
        if index >= 0:
            recorder.end(index, output)
            if names[id(module)] in sites:
                output_shape = next((tuple(t.shape) for t in tensors_in(output)), ())
                sites[names[id(module)]].shapes.append((input_shape, output_shape))

    with hooks() as handles:
        for module in model.modules():
            if _is_leaf(module):
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
        with recorder:
            outputs = call()
        recorder.begin(outputs, _Operation(None, "output", (outputs,), {}))

    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for site in sites.values():
        layer = model.get_submodule(site.name)
        site.calls = len(site.shapes)
        tied = any(owners[id(parameter)] > 1 for parameter in layer.parameters())
        reached = any(0 not in output for _, output in site.shapes)
        site.dense = (
            ("" if reached else "not reached by the first calibration sample")
            or ("its weight is used by another module too" if tied else "")
            or adapter_for(layer).unsupported(layer)
            or ""
        )
        if site.calls:
            site.order = uses[site.name][0]
            _Follower(model, recorder.operations, uses).fill(site, may_fold=not tied)
    return dict(sorted(sites.items(), key=lambda item: (item[1].calls == 0, item[1].order)))


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is one step: it has no modules inside, or is the user's and weightless."""
    if not any(True for _ in module.children()):
        return True
    return _is_weightless(module)


def _is_weightless(module: nn.Module) -> bool:
    """Whether a module is the user's own and a function of its inputs alone."""
    own = not type(module).__module__.startswith("torch.nn")
    return own and not any(
        True for tensors in (module.parameters(), module.buffers()) for _ in tensors
    )


class _Follower:
    """Fills in the BatchNorm and the activation that a layer's response meets.

    Parameters
    ----------
    model : nn.Module
    operations : list of _Operation
    uses : dict of str to list of int
        The operations of each module, by its name.
    """

    def __init__(
        self, model: nn.Module, operations: list[_Operation], uses: dict[str, list[int]]
    ) -> None:
        self.model, self.operations, self.uses = model, operations, uses

    def fill(self, site: LayerSite, may_fold: bool) -> None:
        """Set ``batch_norm``, ``activation`` and ``note`` to what all uses agree on."""
        found = [self._follow(site, use, may_fold) for use in self.uses[site.name]]
        norms = {norm for norm, _, _ in found}
        if len(norms) > 1:
            found = [self._follow(site, use, False) for use in self.uses[site.name]]
        elif norms:
            site.batch_norm = norms.pop()
        site.activation, site.note = found[0][1:]
        if len({activation for _, activation, _ in found}) > 1:
            site.activation = "identity"
            site.note = "different activations follow its uses; fitted before them"
        if site.calls > 1:
            calls = f"called {site.calls} times, fitted on the inputs of all"
            site.note = f"{calls}; {site.note}" if site.note else calls

    def _follow(self, site: LayerSite, use: int, may_fold: bool) -> tuple[str | None, str, str]:
        """BatchNorm, activation and note of one use."""
        norm, current = None, use
        while True:
            users = sorted(set(self.operations[current].users))
            if len(users) != 1:
                return norm, "identity", "its response is used more than once" if users else ""
            operation = self.operations[users[0]]
            if may_fold and current == use and self._folds(site, operation):
                norm, current = operation.name, users[0]
            elif isinstance(operation.module, _PASS_MODULES) or (
                operation.module is None and operation.name in _PASS_FUNCTIONS
            ):
                current = users[0]
            else:
                activation, note = self._activation(operation, site.output_shape)
                if activation is None:
                    current = users[0]
                    continue
                return norm, activation, note

    def _folds(self, site: LayerSite, operation: _Operation) -> bool:
        module, layer = operation.module, self.model.get_submodule(site.name)
        kind = _BATCH_NORMS[adapter_for(layer).source]
        if type(module) not in (kind, nn.SyncBatchNorm) or not module.track_running_stats:
            return False
        # A BatchNorm1d after a linear layer on (N, L, C) normalises L, not C.
        flat = not isinstance(layer, nn.Linear) or all(len(y) == 2 for _, y in site.shapes)
        # Other layers must not need it.
        alone = len(self.uses[operation.name]) == site.calls
        return flat and alone and module.num_features == layer.weight.shape[0]

    def _activation(self, operation: _Operation, shape: tuple[int, ...]) -> tuple[str | None, str]:
        """What an operation is to the fit, and a note; None when it hands its input on."""
        module = operation.module
        if module is None:
            namer = activations.TORCH_FUNCTIONS.get(operation.name)
            if namer is not None:
                kwargs = dict(operation.kwargs)
                first = [kwargs.pop("input")] if "input" in kwargs else []
                return _known(namer(*first, *operation.args, **kwargs))
            return _unknown(operation.name, operation.name in _UNKNOWN_FUNCTIONS)
        kind = type(module).__name__
        if _is_weightless(module):
            if len(operation.args) + len(operation.kwargs) > 1:  # of more than the response
                return _unknown(kind, False)
            name = _probe(module, shape)
            if not name:
                return _unknown(kind, name is not None)
            return (None if name == "identity" else name), ""
        namer = activations.TORCH_MODULES.get(kind)
        if namer is not None and type(module).__module__.startswith("torch.nn"):
            return _known(namer(module))
        return _unknown(kind, kind in _UNKNOWN)


def _unknown(name: str, is_activation: bool) -> tuple[str, str]:
    return "identity", f"{name} is not supported; fitted before it" if is_activation else ""


def _known(name: str) -> tuple[str, str]:
    """The name if `activations.get` takes it, else identity with a note."""
    try:
        return activations.get(name).name, ""
    except InputError:
        return _unknown(name, True)


@torch.no_grad()
def _probe(module: nn.Module, shape: tuple[int, ...]) -> str | None:
    """The activation that a module computes on tensors of a shape.

    Empty when it gives such a tensor, but by no activation that is known; None when it does not.
    """
    x = torch.linspace(-8, 8, 64).reshape(64, *(1,) * (len(shape) - 1))
    # Another range in each position of a sample, so that what mixes them is found out.
    x = (x + torch.linspace(-1, 1, max(1, int(np.prod(shape[1:])))).reshape(1, *shape[1:])).float()
    try:
        y = module(x.clone())
    except Exception:
        return None  # other arguments, another dtype, ...: no elementwise function of one tensor
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for name in activations.names():
        wanted = activations.get(name).value(NumpyOps(), x.numpy())
        if np.allclose(y.numpy(), wanted, rtol=1e-4, atol=1e-5):
            return activations.get(name).name
    return ""


def fold_batch_norm(model: nn.Module, site: LayerSite) -> None:
    """Fold ``site.batch_norm`` into its layer, in place; an Identity stays in its place."""
    layer = model.get_submodule(site.name)
    norm = model.get_submodule(site.batch_norm)
    if isinstance(layer, nn.Linear):
        fused = torch.nn.utils.fusion.fuse_linear_bn_eval(layer, norm)
    else:
        fused = torch.nn.utils.fusion.fuse_conv_bn_eval(layer, norm)
    set_module(model, site.name, fused)
    set_module(model, site.batch_norm, nn.Identity())


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, under every name the old one has."""
    old = model.get_submodule(name)
    for path, candidate in list(model.named_modules(remove_duplicate=False)):
        if candidate is old:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
