"""The whole model: capture, fit, replace, layer by layer, shallow to deep.

In: a model, unlabelled calibration data and a budget. Out: a `Result` with the smaller model.
The user's model is copied, never changed. Layer l is fitted to the original's responses (Y) on
inputs that come through the layers already replaced (X), so that it corrects their errors
(asymmetric; Zhang et al. 2015, section 3.3).
"""

from __future__ import annotations

import copy
import fnmatch
import math
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .adapters import adapter_for
from .budget import ALLOCATIONS, LayerCost, check_keep, pca_energies, pca_energy, uniform
from .capture import (
    Batch,
    Frontier,
    Sampler,
    as_batches,
    first_tensor,
    full_precision,
    layer_io,
    record_references,
    run_model,
)
from .decomposition import is_separable
from .errors import InputError, ModelError, complain
from .fit import fit
from .graph import LayerSite, find_sites, fold_batch_norm, set_module
from .layer_budget import check_form
from .ops import get_ops
from .progress import progress_bar
from .report import LayerReport, Report
from .result import PLAN_SCHEMA, Result
from .solvers import Majorize, Solver

_OVERRIDES = ("keep", "form")


def compress(
    model: nn.Module,
    calibration_data: Any,
    keep: dict[str, float],
    *,
    form: str = "auto",
    solver: Solver | None = None,
    objective: str = "activation",
    asymmetric: bool = True,
    allocation: str = "uniform",
    samples: int = 15_000,
    held_out: float = 0.1,
    ridge: float | str = "auto",
    ignore: tuple[str, ...] | list[str] = (),
    overrides: dict[str, dict[str, Any]] | None = None,
    keep_ends: bool = True,
    multiple: int = 1,
    batch_size: int = 100,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
) -> Result:
    """Compress a model on unlabelled calibration data.

    Parameters
    ----------
    model : nn.Module
        Copied; neither its weights, modes nor hooks change.
    calibration_data : tensor, array or iterable of batches
        See `slr_gpu.capture.as_batches`. Labels are not used.
    keep : dict
        Fractions of the whole model to keep: ``{"params": 0.25}``, ``{"flops": 0.25}`` or both,
        and then both hold.
    form, solver, objective, held_out, ridge, device
        See `slr_gpu.fit`.
    asymmetric : bool
        Fit each layer on inputs from the compressed prefix; False takes the original's inputs.
    allocation : {"uniform", "pca_energy"}
        How the budget is shared out: the same fraction for every layer, or by the ranks that keep
        the most PCA energy (Zhang et al. 2015).
    samples : int
        About so many input rows a layer are sampled (im2col rows for convolutions).
    ignore : sequence of str
        Names of layers, or patterns such as ``"classifier.*"``, to leave dense.
    overrides : dict of str to dict
        For single layers, by name or pattern: ``{"keep": 0.5}``, ``{"form": "channels"}``.
    keep_ends : bool
        Leave the first and the last layer dense.
    multiple : int
        Make r, s (in channels) and k multiples of this in wide layers.
    batch_size : int
        Into which an array of calibration inputs is cut.
    seed : int
        Of the choice of rows.
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    Result

    Raises
    ------
    InputError, BudgetError
        For arguments that cannot be worked with, before any work is done.
    ModelError
        When the model cannot be copied or fails on the calibration data.
    BackendError
        When the device does not work.
    """
    began = time.perf_counter()
    keep = check_keep(keep)
    solver = Majorize() if solver is None else solver
    if not isinstance(solver, Solver):
        raise InputError(
            complain(f"solver={solver!r}", "an instance of a solver", "For example Majorize().")
        )
    check_form(form, spatial=True, known=solver.forms)
    for name, value in (("samples", samples), ("batch_size", batch_size), ("multiple", multiple)):
        if not isinstance(value, int) or value < 1:
            raise InputError(complain(f"{name}={value!r}", "an integer >= 1", "Raise it."))
    if allocation not in ALLOCATIONS:
        raise InputError(
            complain(
                f"allocation={allocation!r}", f"one of {', '.join(ALLOCATIONS)}", "Check the name."
            )
        )
    if not isinstance(model, nn.Module):
        raise InputError(
            complain(f"model of {type(model).__name__}", "an nn.Module", "Build it first.")
        )
    ops = get_ops(device)
    batches = as_batches(calibration_data, model, batch_size)
    _check_weights(model)
    work = _copy(model)
    if ops.device != "cpu":
        work.to(ops.device)
    with torch.no_grad():
        sites = find_sites(work, lambda: run_model(work, _first_sample(batches[0])))
    for site in sites.values():
        if site.batch_norm is not None and adapter_for(work.get_submodule(site.name)):
            fold_batch_norm(work, site)
    original = copy.deepcopy(work)
    reasons = _reasons(work, sites, ignore, keep_ends)
    names = [name for name in sites if name not in reasons]
    options = _overrides(overrides or {}, names, solver.forms)
    chosen = [site for name, site in sites.items() if name not in reasons]
    if not chosen:
        raise InputError(
            complain(
                "a model without a layer to compress: "
                + ("; ".join(f"{n}: {r}" for n, r in reasons.items()) or "no layers"),
                "at least one convolution or linear layer",
                "Check ignore=, or pass keep_ends=False.",
            )
        )
    request = (
        keep,
        [_cost(site, work.get_submodule(site.name)) for site in chosen],
        {name: option["keep"] for name, option in options.items() if "keep" in option},
        _totals(work, _first_sample(batches[0]), chosen),
        multiple,
    )
    budgets = uniform(*request)  # whatever the allocation: whether the budget can be met
    batch_sizes = [len(first_tensor(batch)) for batch in batches]
    sample_count = sum(batch_sizes)
    sampler = Sampler(samples, sample_count, seed)
    layers: dict[str, LayerReport] = {}
    plan_layers = []
    # The original takes about as long as fitting all layers: a bar in samples, then in layers.
    bar = progress_bar("original responses", 2 * sample_count, show=progress)
    with bar as advance, full_precision():
        references = record_references(
            original,
            batches,
            chosen,
            sampler,
            with_inputs=not asymmetric,
            ops=ops,
            advance=advance,
        )
        names = [site.name for site in chosen]
        if allocation == "pca_energy":
            energies = {name: pca_energies(references.linear_targets[name]) for name in names}
            budgets = pca_energy(*request, energies=energies)
        frontier = Frontier(work, batches, names) if asymmetric else None
        for site in chosen:
            advance(0, description=f"fitting {site.name}")
            layer_began = time.perf_counter()
            layer = work.get_submodule(site.name)
            arrays = layer_io(
                layer,
                site,
                references,
                sampler,
                frontier.inputs(site.name) if frontier else None,
                batch_sizes,
            )
            decomposition = fit(
                arrays,
                budget=budgets[site.name],
                form=_form_for(layer, options.get(site.name, {}).get("form", form)),
                solver=solver,
                objective=objective,
                ridge=ridge,
                held_out=held_out,
                device=ops.device,
            )
            references.release(site.name)
            module = adapter_for(layer).build(layer, decomposition)
            set_module(work, site.name, module)
            plan_layers.append(
                {
                    "name": site.name,
                    "type": type(module).__name__,
                    "arguments": module.plan(),
                    "activation": site.activation,
                }
            )
            notes = [*decomposition.notes, *([site.note] if site.note else [])]
            layers[site.name] = LayerReport(
                site.name,
                type(layer).__name__,
                _shape(layer),
                decomposition.status.value,
                structure=str(decomposition.structure),
                activation=decomposition.activation,
                error=decomposition.held_out_error,
                seconds=time.perf_counter() - layer_began,
                notes=notes,
            )
            advance(sample_count / len(chosen))
    report = _report(keep, original, work, _first_sample(batches[0]), sites, layers, reasons)
    report.settings = {
        "form": form,
        "solver": solver.name,
        "objective": objective,
        "asymmetric": asymmetric,
        "allocation": allocation,
        "samples": samples,
        "calibration_samples": sample_count,
        "seed": seed,
        "device": ops.device,
    }
    plan = {
        "schema": PLAN_SCHEMA,
        "keep": keep,
        "layers": plan_layers,
        "folded": [
            {"layer": site.name, "batch_norm": site.batch_norm}
            for site in sites.values()
            if site.batch_norm is not None
        ],
        "settings": report.settings,
    }
    _restore(work, model)
    report.seconds = time.perf_counter() - began
    return Result(work, report, plan, _example(batches[0]))


# -- preparation ------------------------------------------------------------------------------


def _copy(model: nn.Module) -> nn.Module:
    try:
        work = copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            complain(
                f"{type(error).__name__} while copying the model: {error}",
                "a model that copy.deepcopy can copy",
                "Remove what cannot be copied (open files, hooks on closures, non-leaf tensors).",
            )
        ) from error
    # What watches the user's model stays with it. Hooks before a forward may be part of the
    # function (spectral_norm) and stay with the copy too.
    for module in work.modules():
        module._forward_hooks.clear()
        module._backward_hooks.clear()
    parameter = next(work.parameters(), None)
    if parameter is not None and parameter.element_size() < 4:
        work = work.float()  # fitted in float32, handed back in the model's own dtype
    return work.eval()


def _restore(work: nn.Module, model: nn.Module) -> None:
    """Give the compressed copy the device, the dtype and the modes of the user's model."""
    parameter = next(model.parameters())
    work.to(parameter.device)
    if parameter.element_size() < 4:
        work.to(parameter.dtype)
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in work.named_modules():
        while name not in modes:  # inside a replaced layer
            name = name.rpartition(".")[0]
        module.training = modes[name]


def _check_weights(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(
                complain(f"NaN or Inf in {name}", "finite weights", "Check the checkpoint.")
            )


def _first_sample(batch: Batch) -> Batch:
    return tuple(item[:1] if isinstance(item, torch.Tensor) else item for item in batch)


def _example(batch: Batch) -> Batch:
    """Two samples, so that exporting need not take a batch of one for a constant."""
    return tuple(
        item[:2].detach().cpu().clone() if isinstance(item, torch.Tensor) else item
        for item in batch
    )


def _match(pattern: str, names: list[str], what: str) -> list[str]:
    found = fnmatch.filter(names, pattern)
    if not found:
        raise InputError(
            complain(f"{what}={pattern!r}", f"a name or pattern of {', '.join(names)}", "Check it.")
        )
    return found


def _reasons(
    model: nn.Module, sites: dict[str, LayerSite], ignore: Any, keep_ends: bool
) -> dict[str, str]:
    """Why layers stay dense, by name."""
    reasons: dict[str, str] = {}
    names = list(sites)
    for pattern in [ignore] if isinstance(ignore, str) else ignore:
        for name in _match(pattern, names, "ignore"):
            reasons[name] = "ignored by name"
    ran = [name for name, site in sites.items() if site.calls]
    for name, site in sites.items():
        layer = model.get_submodule(name)
        if not site.calls:
            reasons.setdefault(name, "not reached by the calibration data")
        elif site.calls > 1:
            reasons.setdefault(name, f"called {site.calls} times in one pass")
        elif adapter_for(layer).unsupported(layer):
            reasons.setdefault(name, adapter_for(layer).unsupported(layer))
    if keep_ends and ran:
        reasons.setdefault(ran[0], "first layer")
        reasons.setdefault(ran[-1], "last layer")
    return reasons


def _overrides(
    overrides: dict[str, dict[str, Any]], names: list[str], forms: tuple[str, ...]
) -> dict[str, dict]:
    options: dict[str, dict[str, Any]] = {}
    for pattern, option in overrides.items():
        if not isinstance(option, dict) or set(option) - set(_OVERRIDES):
            raise InputError(
                complain(
                    f"overrides[{pattern!r}]={option!r}",
                    f"a dict with {' or '.join(_OVERRIDES)}",
                    "For example {'keep': 0.5}.",
                )
            )
        fraction = option.get("keep", 1.0)
        if not 0 < fraction <= 1:
            raise InputError(
                complain(f"overrides[{pattern!r}] keep={fraction}", "a fraction in (0, 1]", "")
            )
        check_form(option.get("form", "auto"), spatial=True, known=forms)
        for name in _match(pattern, names, "overrides"):
            options.setdefault(name, {}).update(option)
    return options


def _form_for(layer: nn.Module, form: str) -> str:
    """The form asked for, or ``auto`` where it does not apply (by the layer's kernel)."""
    kernel_size = adapter_for(layer).kernel_size(layer)
    applies = {"rotated": math.prod(kernel_size) > 1, "spatial": is_separable(kernel_size)}
    return form if applies.get(form, True) else "auto"


def _cost(site: LayerSite, layer: nn.Module) -> LayerCost:
    adapter = adapter_for(layer)
    taps = math.prod(adapter.kernel_size(layer))
    n = len(layer.weight)
    x, y = (torch.empty(s, device="meta") for s in (site.input_shape, site.output_shape))
    return LayerCost(
        site.name,
        n,
        layer.weight[0].numel() // taps,
        taps,
        adapter.positions(layer, y),
        adapter.positions(layer, x),
        adapter.kernel_size(layer),
        adapter.spatial_positions(layer, x, y),
    )


def _totals(model: nn.Module, batch: Batch, chosen: list[LayerSite]) -> dict[str, float]:
    """What the whole model costs, with the biases that its compressed layers will have."""
    added = [model.get_submodule(site.name) for site in chosen]
    biases = sum(len(layer.weight) for layer in added if layer.bias is None)
    return {
        "params": sum(p.numel() for p in model.parameters()) + biases,
        "flops": count_flops(model, batch)[0] / 2,
    }


# -- counting ----------------------------------------------------------------------------------


def _shape(layer: nn.Module) -> str:
    return "x".join(str(size) for size in layer.weight.shape)


def count_flops(model: nn.Module, batch: Batch) -> tuple[int, dict[str, int]]:
    """FLOPs of one call, in total and by module, as torch counts them."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        run_model(model, batch)
    root = type(model).__name__
    by_module = {
        name.removeprefix(f"{root}.") if name != root else "": sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
    }
    return counter.get_total_flops(), by_module


def _report(
    keep: dict[str, float],
    original: nn.Module,
    work: nn.Module,
    batch: Batch,
    sites: dict[str, LayerSite],
    layers: dict[str, LayerReport],
    reasons: dict[str, str],
) -> Report:
    flops, by_module = count_flops(original, batch)
    flops_kept, kept_by_module = count_flops(work, batch)
    rows = []
    for name in sites:
        before, after = original.get_submodule(name), work.get_submodule(name)
        row = layers.get(name)
        if row is None:
            row = LayerReport(name, type(before).__name__, _shape(before), "dense", reasons[name])
        row.params = sum(p.numel() for p in before.parameters())
        row.params_kept = sum(p.numel() for p in after.parameters())
        row.flops = by_module.get(name, 0)
        row.flops_kept = kept_by_module.get(name, 0)
        rows.append(row)
    listed = set(sites)
    for name, module in original.named_modules():
        weight = getattr(module, "weight", None)
        if name not in listed and isinstance(weight, nn.Parameter) and weight.ndim >= 2:
            count = sum(p.numel() for p in module.parameters(recurse=False))
            spent = by_module.get(name, 0)
            rows.append(
                LayerReport(
                    name,
                    type(module).__name__,
                    _shape(module),
                    "dense",
                    f"{type(module).__name__} is not compressed",
                    params=count,
                    params_kept=count,
                    flops=spent,
                    flops_kept=spent,
                )
            )
    return Report(
        keep,
        sum(p.numel() for p in original.parameters()),
        sum(p.numel() for p in work.parameters()),
        flops,
        flops_kept,
        0.0,
        rows,
    )
