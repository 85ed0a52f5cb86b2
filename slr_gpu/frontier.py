"""Every batch carried forward through a model, from the inputs of one layer to the next one's.

In: a model whose layers may be replaced meanwhile, batches, and the layers whose inputs are wanted.
Out: these inputs, batch by batch. A traced model runs each layer once: what is still needed of a
batch waits in memory, or beyond a limit on disk (`slr_gpu.spill`). Where torch.fx cannot trace the
model, it is run again from the start for each layer, up to that layer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .batches import Batch, Batches, Layout, as_argument, first_samples, run_model, tidy
from .graph import hooks, set_module, tensors_in
from .spill import Spill, Waiting


class _Reached(BaseException):
    """Ends a forward pass once the wanted layer has been reached, whatever the model catches."""


class _State(NamedTuple):
    """What is still needed of a batch: tensors of the model itself, and all the rest."""

    own: dict[fx.Node, Any]
    nodes: list[fx.Node]
    waiting: Waiting


def first_input(args: tuple, kwargs: dict) -> Any:
    """What a layer is called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def _gives(layout: Layout, arguments: list[str]) -> bool:
    """Whether batches have a tensor for each argument of a traced model, in their order."""
    if None in layout.shapes:
        return False
    if layout.names:
        return list(layout.names) == arguments
    return len(layout.shapes) == len(arguments) or any(name.startswith("*") for name in arguments)


def _computes(graph: fx.Graph, model: nn.Module, batch: Batch) -> bool:
    """Whether a trace gives what the model does.

    A trace takes no branch that asks whether something is a tensor, and enters no autocast.
    """
    parameter = next(model.parameters())
    with torch.no_grad():
        wanted = run_model(model, batch)
        arguments = [as_argument(item, parameter) for item in batch]
        got = fx.Interpreter(model, graph=graph).run(*arguments)
    pairs = zip(tensors_in(wanted), tensors_in(got), strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True) for a, b in pairs)


class Frontier:
    """Inputs of one layer after another in a model whose earlier layers may have been replaced.

    Parameters
    ----------
    model : nn.Module
        Modules are looked up in it at every step, so replaced ones are used.
    batches : Batches
    names : list of str
        The layers whose inputs will be asked for, in the order of execution.
    spill : Spill, optional
        Where batches wait between two layers; in memory without one.

    Attributes
    ----------
    traced : bool
        Whether torch.fx could follow the model, met the layers in this order and recorded what the
        model computes. If not, the model is run from the start for each layer; in any case for
        those that are called several times.
    """

    def __init__(
        self, model: nn.Module, batches: Batches, names: list[str], spill: Spill | None = None
    ) -> None:
        self.model, self.batches = model, batches
        self._spill = Spill(limit=math.inf) if spill is None else spill
        calls: Counter[str] = Counter()
        try:
            graph = fx.Tracer().trace(model)
            found = [n.target for n in graph.nodes if n.op == "call_module" and n.target in names]
            calls = Counter(found)
            # A trace took every argument for a tensor that is given.
            arguments = [node.target for node in graph.nodes if node.op == "placeholder"]
            given = all(_gives(layout, arguments) for layout in batches.layouts)
            in_order = given and list(dict.fromkeys(found)) == names
            self.traced = in_order and _computes(graph, model, first_samples(batches.first, 2))
        except Exception:
            # Whatever the model does that torch.fx cannot follow, running it still works.
            self.traced = False
        self._shared = {name for name in names if calls[name] > 1}
        if self.traced:
            self._nodes = list(graph.nodes)
            places = {node: place for place, node in enumerate(self._nodes)}
            self._last_use = {
                node: max((places[user] for user in node.users), default=-1) for node in self._nodes
            }
            self._position = 0
            self._interpreter = fx.Interpreter(model, garbage_collect_values=False, graph=graph)
            # By the number of a batch, once batches have entered.
            self._states: dict[int, _State] = {}

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
        begin, target = self._position, self._place(name)
        if target < begin:
            raise ValueError(f"{name} was passed: ask for layers in the order of execution")
        self._position = target
        source = first_input(self._nodes[target].args, self._nodes[target].kwargs)
        if not self._states:
            parameter = next(self.model.parameters())
            for number, batch in self.batches.numbered():
                arguments = [as_argument(item, parameter) for item in batch]
                yield number, self._moved(number, {}, begin, target, arguments)[source]
            return
        for number in list(self._states):
            if begin < target:
                env = self._env(number, self._spill.take)
                env = self._moved(number, env, begin, target)
            else:
                env = self._env(number, self._spill.peek)
            x = env[source]
            del env  # may be on disk now
            yield number, x
            del x

    def reach(self, name: str) -> None:
        """Carry all batches to a layer, if they are still in front of it."""
        if self.traced and name not in self._shared and self._place(name) > self._position:
            for _ in self.inputs(name):
                pass

    def outputs(self, name: str, module: nn.Module) -> Iterator[Any]:
        """What the model returns for every batch with a module in the place of a layer.

        Parameters
        ----------
        name : str
            The layer that was reached, or whose inputs were asked for, last; the model itself is
            not changed.
        """
        if not self.traced or name in self._shared:
            layer = self.model.get_submodule(name)
            set_module(self.model, name, module)
            try:
                with torch.no_grad():
                    for number, batch in self.batches.numbered():
                        yield run_model(self.model, batch, number)
            finally:
                set_module(self.model, name, layer)
            return
        node = self._nodes[self._position]
        source = first_input(node.args, node.kwargs)
        for number in self._states:
            # A copy: what follows may write in place, and the batch goes on from here later.
            env = self._env(number, self._spill.copied)
            with torch.no_grad():
                env[node] = module(env[source])
                self._run(env, self._position + 1, len(self._nodes) - 1)
                self._interpreter.env = env
                result = self._interpreter.run_node(self._nodes[-1])
            self._interpreter.env = env = {}
            yield result
            del result

    # -- traced: batches that wait ---------------------------------------------------------------

    def _place(self, name: str) -> int:
        nodes = enumerate(self._nodes)
        return next(i for i, node in nodes if node.op == "call_module" and node.target == name)

    def _moved(
        self,
        number: int,
        env: dict[fx.Node, Any],
        begin: int,
        end: int,
        arguments: list[Any] | None = None,
    ) -> dict[fx.Node, Any]:
        """Run the nodes from one to another on a batch, which then waits."""
        if arguments is not None:
            self._interpreter.args_iter = iter(arguments)
        with torch.no_grad():
            self._run(env, begin, end)
        own = {node: value for node, value in env.items() if node.op == "get_attr"}
        nodes = [node for node in env if node not in own]
        waiting = self._spill.put([env[node] for node in nodes], alike=len(self.batches))
        self._states[number] = _State(own, nodes, waiting)
        tidy(number)
        return env

    def _env(self, number: int, get: Callable[[Waiting], list[Any]]) -> dict[fx.Node, Any]:
        own, nodes, waiting = self._states[number]
        return own | dict(zip(nodes, get(waiting), strict=True))

    def _run(self, env: dict[fx.Node, Any], begin: int, end: int) -> None:
        self._interpreter.env = env
        try:
            for index in range(begin, end):
                node = self._nodes[index]
                env[node] = self._interpreter.run_node(node)
                for source in node.all_input_nodes:
                    if self._last_use[source] <= index:
                        env.pop(source, None)
        finally:
            self._interpreter.env = {}

    # -- not traced: from the start --------------------------------------------------------------

    def _rerun(self, name: str, calls: Mapping[int, int] | None) -> Iterator[tuple[int, Tensor]]:
        for number, batch in self.batches.numbered():
            for x in self._caught(
                number, batch, name, 1 if calls is None else calls.get(number, 0)
            ):
                yield number, x

    def _caught(self, number: int, batch: Batch, name: str, wanted: int) -> list[Tensor]:
        """The inputs of the first calls of a layer."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
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
        return caught
