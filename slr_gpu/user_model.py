"""The user's model: what is refused of it, the copy that is worked on, and the way back.

In: a model as it comes, in any mode, dtype and on any device. Out: a copy in eval mode that is
fitted in float32; after compression the copy as the user's was. The model itself is never changed.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from .batches import Batch, first_samples, run_model
from .errors import InputError, ModelError, complain
from .lowering import non_leaf_tensors
from .output_loss import tensors_of


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be compressed whatever the data is.

    Raises
    ------
    InputError
        Without modules in Python, or with weights that have no shapes or are not finite.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            complain(f"model of {type(model).__name__}", "an nn.Module", "Build it first.")
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                complain(
                    f"a TorchScript module, {name or 'the model itself'}",
                    "modules in Python, whose layers can be watched and replaced",
                    "Build the model from its classes and load the weights.",
                )
            )
    buffers = dict(model.named_buffers())
    for name, tensor in [*model.named_parameters(), *buffers.items()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise InputError(
                complain(
                    f"{name}, which has no shape yet",
                    "a model whose lazy layers have seen a batch",
                    "Call it once, or load its weights.",
                )
            )
        if not tensor.is_floating_point():
            continue
        # Buffers may hold infinities: masks of attention do.
        tensor = tensor.detach()
        bad = tensor.isnan() if name in buffers else ~tensor.isfinite()
        if bad.any():
            raise InputError(
                complain(f"NaN or Inf in {name}", "finite weights", "Check the checkpoint.")
            )


def working_copy(model: nn.Module, batch: Batch) -> nn.Module:
    """Copy a model that was checked, without the hooks that watch it.

    Parameters
    ----------
    model : nn.Module
    batch : Batch
        Shows whether hooks only watch.

    Returns
    -------
    nn.Module
        In eval mode, with parameters of four bytes or more.

    Raises
    ------
    InputError
        For hooks that change outputs.
    ModelError
        Where it cannot be copied.
    """
    work = _copy(model)
    _drop_hooks(work, batch)
    return work


def restore(work: nn.Module, model: nn.Module) -> nn.Module:
    """Give a compressed copy the device, the dtypes and the modes of the user's model.

    Parameters
    ----------
    work : nn.Module
        Made by `working_copy`, layers replaced; changed in place.
    model : nn.Module

    Returns
    -------
    nn.Module
        ``work``.
    """
    work.to(next(model.parameters()).device)
    originals = dict(model.named_modules())
    for name, module in work.named_modules():
        while name not in originals:  # inside a replaced layer
            name = name.rpartition(".")[0]
        module.training = originals[name].training
        own = {**dict(originals[name].named_parameters()), **dict(originals[name].named_buffers())}
        usual = next((t.dtype for t in own.values() if t.is_floating_point()), torch.float32)
        for kind in (module.named_parameters, module.named_buffers):
            for key, tensor in kind(recurse=False):
                dtype = own[key].dtype if key in own else usual
                if tensor.is_floating_point() and dtype.itemsize < 4:
                    tensor.data = tensor.data.to(dtype)
    return work


def _copy(model: nn.Module) -> nn.Module:
    try:
        work = copy.deepcopy(model, non_leaf_tensors(model))
    except Exception as error:
        raise ModelError(
            complain(
                f"{type(error).__name__} while copying the model: {error}",
                "a model that copy.deepcopy can copy",
                "Remove what cannot be copied (open files, hooks on closures, non-leaf tensors).",
            )
        ) from error
    if any(p.is_floating_point() and p.element_size() < 4 for p in work.parameters()):
        work = work.float()  # fitted in float32, handed back in the model's own dtypes
    return work.eval()


def _drop_hooks(work: nn.Module, batch: Batch) -> None:
    """What watches the user's model stays with it; what changes its output is no mere watcher.

    Hooks before a forward may be part of the function (spectral_norm) and stay with the copy too.
    """
    hooked = [name or "the model itself" for name, m in work.named_modules() if m._forward_hooks]

    def answer() -> list[torch.Tensor]:
        with torch.no_grad():
            return tensors_of(run_model(work, first_samples(batch, 1)))

    before = answer() if hooked else []
    for module in work.modules():
        module._forward_hooks.clear()
        module._backward_hooks.clear()
    after = answer() if hooked else []
    if [t.shape for t in before] != [t.shape for t in after] or any(
        float((a - b).norm()) > 1e-4 * float(a.norm()) for a, b in zip(before, after, strict=True)
    ):
        raise InputError(
            complain(
                f"forward hooks that change what the model returns, of {', '.join(hooked)}",
                "hooks that only watch: those stay behind",
                "Put what they do into the forward of a module.",
            )
        )
