"""A model rewritten in place so that every layer is a plain module that is called.

In: a copy of the user's model in eval mode. Out: the same function, without what hides weights
from those who watch and replace modules, and a note for each module changed:

    weight_norm, spectral_norm, pruning masks, any parametrization   ->  the weight they give
    nn.MultiheadAttention, whose projections are one bare parameter  ->  `Attention`
    Conv1D of the package transformers, a transposed linear layer    ->  `nn.Linear`

`slr_gpu.compress` and `slr_gpu.load` both do it first, so that names agree.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .attention import Attention, splittable
from .graph import set_module


def lower(model: nn.Module) -> dict[str, str]:
    """Rewrite a model in place.

    Parameters
    ----------
    model : nn.Module
        In eval mode.

    Returns
    -------
    dict of str to str
        What was done, by the name of the module that it was done to.
    """
    notes: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        removed = list(_remove_parametrizations(module))
        if removed:
            notes[name] = f"{', '.join(removed)} removed"
        if isinstance(module, nn.TransformerEncoder):
            # Nested tensors skip the layers of the first block.
            module.use_nested_tensor = False
    for name, module in list(model.named_modules()):
        if splittable(module):
            set_module(model, name, Attention(module))
            notes[name] = "taken out of MultiheadAttention"
        elif type(module).__name__ == "Conv1D" and type(module).__module__.startswith(
            "transformers"
        ):
            set_module(model, name, _linear(module))
    return notes


def _linear(module: nn.Module) -> nn.Linear:
    """The linear layer that has a weight (m, n) as it is."""
    m, n = module.weight.shape
    layer = nn.Linear(m, n, device="meta")
    layer.weight = nn.Parameter(module.weight.detach().T.contiguous())
    layer.bias = module.bias
    return layer.train(module.training)


def non_leaf_tensors(model: nn.Module) -> dict[int, Tensor]:
    """A memo for `copy.deepcopy`, which refuses tensors that carry a graph.

    The older weight_norm, spectral_norm and pruning leave such a tensor on the module; it is
    computed anew by every call.
    """
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }


def _remove_parametrizations(module: nn.Module) -> Iterator[str]:
    """Make the tensors that are computed from others plain parameters; the names of the ways."""
    if parametrize.is_parametrized(module):
        # Its class was made for it, is shared by its copies, and loses a property below.
        made = type(module)
        module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
        for tensor in list(module.parametrizations):
            chain = [type(step).__name__.lstrip("_") for step in module.parametrizations[tensor]]
            stored = list(module.parametrizations[tensor].parameters(recurse=False))
            parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
            value = getattr(module, tensor)
            if stored and not isinstance(value, nn.Parameter):  # torch: a buffer if frozen
                delattr(module, tensor)
                setattr(module, tensor, nn.Parameter(value.detach(), requires_grad=False))
            yield "+".join(chain)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
            yield "weight_norm"
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
            yield "spectral_norm"
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
            yield "pruning"
