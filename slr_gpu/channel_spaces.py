"""Which channels of a model are the same: the spaces that its graph falls into.

In: a model in eval mode and its torch.fx graph. Out: `Spaces`: for each layer that mixes channels
the *space* of those it makes, joined where values meet (in a sum), side by side in a concatenation,
in blocks after flattening; and for each layer that reads channels, or has a parameter for each,
which they are. A space whose channels meet anything else (an output, a softmax, a shared weight)
is fixed: nobody may move its channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import activations
from .layers import SLRConvNd, SLRLinear
from .pieces import CONVS

# Names of modules and functions, without case and underscores.
_ELEMENTWISE = {
    name.replace("_", "").lower()
    for name in (*activations.TORCH_MODULES, *activations.TORCH_FUNCTIONS)
} | {"identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "contiguous"}
_JOINING = {"add", "iadd", "sub", "isub", "mul", "imul", "truediv", "maximum", "minimum"}


@dataclass
class Space:
    """The channels that one layer makes, and what holds for all that are joined with them."""

    maker: nn.Module
    size: int
    fixed: bool = False
    read: set[int] = field(default_factory=set)
    joined: Space | None = None

    @property
    def root(self) -> Space:
        return self if self.joined is None else self.joined.root


@dataclass(frozen=True)
class Layout:
    """What stands along the channels of a tensor: spaces, one after another.

    `dims` is the number of spatial dimensions, 0 where the channels come last; `flat` where each
    channel owns a block of neighbouring features, as after flattening a map.
    """

    spaces: tuple[Space, ...]
    dims: int
    flat: bool = False

    @property
    def size(self) -> int:
        return sum(space.size for space in self.spaces)

    def parts(self) -> Iterator[tuple[int, Space]]:
        """Spaces and where they start."""
        start = 0
        for space in self.spaces:
            yield start, space
            start += space.size

    def fix(self) -> None:
        """Keep the order."""
        for space in self.spaces:
            space.root.fixed = True

    def flattened(self, start: int, end: int) -> Layout | None:
        whole = start == 1 and end in (-1, 1 + self.dims) and self.dims and not self.flat
        return Layout(self.spaces, 0, flat=True) if whole else None

    def averaged(self, dim: Any, keepdim: bool = False) -> Layout | None:
        spatial = {d % (2 + self.dims) for d in dim} if isinstance(dim, (tuple, list)) else set()
        if not self.dims or spatial != set(range(2, 2 + self.dims)):
            return None
        return self if keepdim else Layout(self.spaces, 0)


@dataclass(frozen=True, eq=False)
class Use:
    """A layer that has a parameter, or a column of its weight, for each channel of a layout."""

    name: str
    module: nn.Module
    layout: Layout

    @property
    def block(self) -> int:
        """Features a channel: more than one after flattening a map."""
        return _width(self.module) // self.layout.size if self.layout.flat else 1

    def note_reading(self) -> None:
        """Tell the spaces which of their channels are read here."""
        kept, others = wanted(self.module)
        read = {i // self.block for i in (*kept, *others)}
        roots = Counter(id(space.root) for space in self.layout.spaces)
        for start, space in self.layout.parts():
            space.root.read |= {i for i in range(space.size) if start + i in read}
            # Twice in one reader: no order serves both places.
            space.root.fixed |= roots[id(space.root)] > 1

    def order(self, orders: dict[int, list[int]]) -> Tensor:
        """Old places of the inputs in their new order."""
        channels = [
            start + i
            for start, space in self.layout.parts()
            for i in orders.get(id(space.root), range(space.size))
        ]
        return torch.tensor([i * self.block + j for i in channels for j in range(self.block)])


class Spaces:
    """The spaces of a traced model, and who passes them on and reads them.

    Attributes
    ----------
    all : list of Space
    passed, readers : list of Use
        BatchNorms and depthwise convolutions; convolutions and linear layers.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.model = model
        self.all: list[Space] = []
        self.passed: list[Use] = []
        self.readers: list[Use] = []
        called = [model.get_submodule(n.target) for n in graph.nodes if n.op == "call_module"]
        self._calls = Counter(id(module) for module in called)
        modules = {id(module): module for module in model.modules()}.values()
        self._owners = Counter(id(p) for m in modules for p in m.parameters(recurse=False))
        for node in graph.nodes:
            if node.op == "get_attr":
                owner, _, name = node.target.rpartition(".")
                self._owners[id(getattr(model.get_submodule(owner), name))] += 1
        self._layouts: dict[fx.Node, Layout] = {}
        for node in graph.nodes:
            if _asks_batch_size(node):
                continue
            layout = self._follow(node)
            if layout is not None:
                self._layouts[node] = layout
                continue
            # Somebody looks at these channels who may depend on their order.
            for source in node.all_input_nodes:
                if source in self._layouts:
                    self._layouts[source].fix()
        for use in self.readers:
            use.note_reading()

    def _follow(self, node: fx.Node) -> Layout | None:
        """The layout of a node's value; None where the node's inputs must keep their order."""
        if node.op == "call_module":
            return self._module(node)
        if node.op in ("call_function", "call_method"):
            return self._function(node)
        return None

    def _module(self, node: fx.Node) -> Layout | None:
        module = self.model.get_submodule(node.target)
        inputs = node.all_input_nodes
        x = self._layouts.get(inputs[0]) if len(inputs) == 1 else None
        if _hooked(module):
            return None
        dims = _dims(module)
        if dims is not None:
            if len(inputs) != 1 or not self._own(module):
                return None
            if x is not None:
                fits = x.dims == dims and _width(module) % x.size == 0
                self.readers.append(Use(node.target, module, x)) if fits else x.fix()
            self.all.append(Space(module, _outputs(module)))
            return Layout((self.all[-1],), dims)
        if x is None:
            return None
        name = type(module).__name__
        if x.dims and (name == f"BatchNorm{x.dims}d" or _is_depthwise(module, x.dims)):
            if not self._own(module):
                return None
            self.passed.append(Use(node.target, module, x))
            return x
        if isinstance(module, nn.Flatten):
            return x.flattened(module.start_dim, module.end_dim)
        return x if _passes(name, x.dims) else None

    def _function(self, node: fx.Node) -> Layout | None:
        name = getattr(node.target, "__name__", str(node.target)).strip("_")
        inputs = [self._layouts.get(source) for source in node.all_input_nodes]
        if name in ("cat", "concat") and all(inputs):
            given = _given(node, "tensors", "dim")
            if not isinstance(given.get("tensors"), (tuple, list)):
                return None
            parts = [self._layouts[part] for part in given["tensors"]]
            return _concatenated(parts, given.get("dim", 0))
        if name in _JOINING and len(inputs) == 2 and all(inputs):
            return _joined(*inputs)
        source = _given(node, "input").get("input")
        x = self._layouts.get(source) if isinstance(source, fx.Node) else None
        if name in ("view", "reshape") and x is not None:
            shape = node.args[1:]
            shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
            # (N, -1), where N may be another node.
            return x.flattened(1, -1) if len(shape) == 2 and shape[1] == -1 else None
        if x is None or len(inputs) > 1:
            return None
        if name == "flatten":
            given = _given(node, "input", "start_dim", "end_dim")
            return x.flattened(given.get("start_dim", 0), given.get("end_dim", -1))
        if name == "mean":
            given = _given(node, "input", "dim", "keepdim")
            return x.averaged(given.get("dim"), given.get("keepdim", False))
        return x if name in _JOINING or _passes(name, x.dims) else None

    def _own(self, module: nn.Module) -> bool:
        """Whether the module is called once and its weights are nobody else's."""
        alone = all(self._owners[id(p)] == 1 for p in module.parameters())
        return self._calls[id(module)] == 1 and alone


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """Arguments of a call by name; these are the names of the first ones."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _joined(a: Layout, b: Layout) -> Layout | None:
    """Of values that meet element by element."""
    sizes = [[space.size for space in layout.spaces] for layout in (a, b)]
    if (a.dims, a.flat, sizes[0]) != (b.dims, b.flat, sizes[1]):
        return None
    for left, right in zip(a.spaces, b.spaces, strict=True):
        keep, gone = left.root, right.root
        if keep is not gone:
            keep.fixed |= gone.fixed
            gone.joined = keep
    return a


def _concatenated(parts: list[Layout], dim: Any) -> Layout | None:
    dims = parts[0].dims
    along = (1, -1 - dims) if dims else (-1,)
    alike = all(part.dims == dims and not part.flat for part in parts)
    if dim not in along or not alike:
        return None
    return Layout(tuple(space for part in parts for space in part.spaces), dims)


def _asks_batch_size(node: fx.Node) -> bool:
    """``x.size(0)``, ``x.shape`` and ``x.shape[0]``: nothing of the channels."""
    if node.op == "call_method" and node.target == "size":
        return node.args[1:] == (0,)
    if node.op == "call_function" and node.target is getattr:
        indices = [user.args[1:] for user in node.users]
        return node.args[1] == "shape" and all(index == (0,) for index in indices)
    return False


def _hooked(module: nn.Module) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def _passes(name: str, dims: int) -> bool:
    """Whether a module or function treats all channels alike and apart."""
    name = name.replace("_", "").lower()
    pools = [f"{kind}pool{dims}d" for kind in ("max", "avg", "adaptivemax", "adaptiveavg")]
    return name in _ELEMENTWISE or (dims > 0 and name in pools)


def _dims(module: nn.Module) -> int | None:
    """Spatial dimensions of a layer that mixes channels, 0 for linear ones; None for others."""
    if isinstance(module, SLRConvNd):
        return module.dims
    if type(module) in (nn.Linear, SLRLinear):
        return 0
    dims = next((d for d, conv in CONVS.items() if type(module) is conv), None)
    return dims if dims is not None and module.groups == 1 else None


def _is_depthwise(module: nn.Module, dims: int) -> bool:
    plain = type(module) is CONVS[dims]
    return plain and module.groups == module.in_channels == module.out_channels


def _outputs(module: nn.Module) -> int:
    return module.out_features if _dims(module) == 0 else module.out_channels


def _width(module: nn.Module) -> int:
    return module.in_features if _dims(module) == 0 else module.in_channels


def wanted(reader: nn.Module) -> tuple[list[int], list[int]]:
    """Channels that a reader takes by themselves, and the others that it reads."""
    every = list(range(_width(reader)))
    if isinstance(reader, SLRLinear) and not reader.entries:
        kept = reader.kept
    elif isinstance(reader, SLRConvNd) and reader.form == "channels":
        kept = reader.kept
    elif isinstance(reader, SLRConvNd) and reader.form == "columns" and not reader.rank:
        # Only as a gather; the dense kernel of such a layer is the layer multiplied out.
        kept = sorted({column // math.prod(reader.kernel_size) for column in reader.kept})
    else:
        return [], every
    return kept, sorted(set(every).difference(kept)) if reader.rank else []
