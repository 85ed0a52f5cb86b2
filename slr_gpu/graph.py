"""What follows each layer of a model: found by watching one batch go through it.

In: a model and the arguments of one call. Out: for every convolution and linear layer a
`LayerSite`: how often it runs, which BatchNorm can be folded into it and which activation its
response passes. Modules are watched by hooks and functions (``F.relu``, ``x.relu()``) by a
`TorchFunctionMode`, so that it works for any `nn.Module`, whatever its control flow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import activations
from .adapters import adapter_for
from .errors import InputError

# Modules and functions that hand their input on unchanged in eval mode.
_PASS_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_PASS_FUNCTIONS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous")
_BATCH_NORMS = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


@dataclass
class LayerSite:
    """Where a layer stands in its model.

    Attributes
    ----------
    name : str
    calls : int
        How often it ran in one forward pass.
    order : int
        Position in the order of execution.
    activation : str
        Name for `slr_gpu.activations.get`; ``identity`` when something else follows.
    batch_norm : str or None
        Name of the BatchNorm that directly follows and can be folded in.
    input_shape, output_shape : tuple of int
        Of the first call, batch included.
    note : str
        What should be said about it.
    """

    name: str
    calls: int = 0
    order: int = -1
    activation: str = "identity"
    batch_norm: str | None = None
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    note: str = ""


@dataclass
class _Operation:
    """One recorded step: a leaf module's call or a function outside leaf modules."""

    kind: str
    module: nn.Module | None
    name: str
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    users: list[int] = field(default_factory=list)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


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
        for tensor in _tensors(inputs):
            if id(tensor) in self._maker:
                self.operations[self._maker[id(tensor)]].users.append(index)
        self.operations.append(operation)
        return index

    def end(self, index: int, outputs: Any) -> None:
        for tensor in _tensors(outputs):
            self._maker[id(tensor)] = index
            self._alive.append(tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        # Reading an attribute (shape, device) does not use the values.
        if self.depth or name in ("__get__", "size", "dim", "__len__", "numel", "stride"):
            return func(*args, **kwargs)
        self.depth += 1
        try:
            index = self.begin((args, kwargs), _Operation("function", None, name, args, kwargs))
            result = func(*args, **kwargs)
        finally:
            self.depth -= 1
        self.end(index, result)
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
        Runs the model on one batch, without gradients.

    Returns
    -------
    dict of str to LayerSite
        Every layer of a type that can be compressed, in the order of execution; those that
        never ran come last, with ``calls == 0``.
    """
    sites = {name: LayerSite(name) for name, m in model.named_modules() if adapter_for(m)}
    recorder = _Recorder()
    module_operation: dict[int, list[int]] = {}
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[int] = []

    def enter(module, args, kwargs):
        if recorder.depth == 0:
            operation = _Operation("module", module, names[id(module)])
            stack.append(recorder.begin((args, kwargs), operation))
            module_operation.setdefault(id(module), []).append(stack[-1])
            site = sites.get(names[id(module)])
            if site is not None and not site.calls:
                site.input_shape = next((tuple(t.shape) for t in _tensors(args)), ())
        else:
            stack.append(-1)
        recorder.depth += 1

    def leave(module, args, kwargs, output):
        recorder.depth -= 1
        index = stack.pop()
        if index >= 0:
            recorder.end(index, output)
            site = sites.get(names[id(module)])
            if site is not None:
                if not site.calls:
                    site.order = index
                    site.output_shape = next((tuple(t.shape) for t in _tensors(output)), ())
                site.calls += 1

    with hooks() as handles:
        for module in model.modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(module.register_forward_hook(leave, with_kwargs=True))
        with recorder:
            call()

    for site in sites.values():
        if site.calls == 1:
            _follow(site, recorder.operations, model, names, module_operation)
    return dict(sorted(sites.items(), key=lambda item: (item[1].calls == 0, item[1].order)))


def _follow(
    site: LayerSite,
    operations: list[_Operation],
    model: nn.Module,
    names: dict[int, str],
    module_operation: dict[int, list[int]],
) -> None:
    """Fill in the BatchNorm and the activation that a layer's output meets."""
    current = site.order
    layer = model.get_submodule(site.name)
    while True:
        users = sorted(set(operations[current].users))
        if len(users) != 1:
            if len(users) > 1:
                site.note = "its response is used more than once"
            return
        operation = operations[users[0]]
        module = operation.module
        if module is not None:
            norm = _BATCH_NORMS[type(layer)]
            if type(module) is norm and current == site.order and module.track_running_stats:
                # A BatchNorm1d after a linear layer on (N, L, C) normalises L, not C.
                fits = module.num_features == layer.weight.shape[0] and (
                    not isinstance(layer, nn.Linear) or len(site.output_shape) == 2
                )
                if fits and len(module_operation[id(module)]) == 1:
                    site.batch_norm = names[id(module)]
                    current = users[0]
                    continue
            if isinstance(module, _PASS_MODULES):
                current = users[0]
                continue
            namer = activations.TORCH_MODULES.get(type(module).__name__)
            if namer is not None and type(module).__module__.startswith("torch.nn"):
                site.activation = _known(namer(module), site)
            return
        if operation.name in _PASS_FUNCTIONS:
            current = users[0]
            continue
        namer = activations.TORCH_FUNCTIONS.get(operation.name)
        if namer is not None:
            site.activation = _known(namer(*operation.args, **operation.kwargs), site)
        return


def _known(name: str, site: LayerSite) -> str:
    """The name if `activations.get` takes it, else identity with a note."""
    try:
        return activations.get(name).name
    except InputError:
        site.note = f"{name} is not supported; fitted before the activation"
        return "identity"


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
