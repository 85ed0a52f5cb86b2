"""A plan carried out: layers fitted and replaced, shallow to deep, then all refined and reported.

In: a `Prepared` model and a `Plan`. Out: a `Result`. Layer l is fitted to the original's responses
(Y) on inputs that come through the layers already replaced (X), so that it corrects their errors
(asymmetric; Zhang et al. 2015, section 3.3). Each finished layer is in the store, if there is one,
and read from there when the work is done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from .adapters import adapter_for
from .capture import full_precision, layer_parts, response_energies
from .checkpoint import Store
from .decomposition import Decomposition, Structure
from .fit import fit
from .flops import count_flops
from .frontier import Frontier
from .graph import set_module
from .grouped import summarise
from .layer_io import LayerIO
from .plan import LayerPlan, Plan
from .prepare import Prepared
from .progress import progress_bar
from .refine import Refinement, refine_model
from .report import LayerReport, Report
from .result import Result
from .user_model import restore


def carry_out(
    prepared: Prepared,
    plan: Plan,
    loss: str,
    refinement: Refinement | None,
    store: Store | None,
    progress: bool,
) -> Result:
    """What `slr_gpu.apply` does, for a model that is prepared and whose ``work`` is not changed."""
    settings = prepared.settings
    planned = {layer.name: layer for layer in plan.layers if layer.form != "dense"}
    progress = progress and prepared.group.rank == 0
    rows, built = _replace_layers(prepared, planned, store, progress)
    report = _report(prepared, plan, rows)
    report.settings = {
        **settings.as_dict(),
        "solver": settings.solver.name,
        "allocation": plan.allocation,
        "calibration_samples": prepared.sample_count,
        "device": prepared.ops.device,
    }
    if refinement is not None:
        part = None if store is None else store.part("refinement")
        report.refinement = refine_model(prepared, list(planned), refinement, loss, part, progress)
    value = plan.as_dict()
    for layer in value["layers"]:
        layer.update(built.get(layer["name"], {}))
    value["folded"] = [
        {"layer": site.name, "batch_norm": site.batch_norm}
        for site in prepared.sites.values()
        if site.batch_norm is not None
    ]
    return Result(restore(prepared.work, prepared.source), report, value, prepared.example)


def _replace_layers(
    prepared: Prepared, planned: dict[str, LayerPlan], store: Store | None, progress: bool
) -> tuple[dict[str, LayerReport], dict[str, dict[str, Any]]]:
    """Replace the planned layers of ``prepared.work``.

    Returns
    -------
    rows : dict of str to LayerReport
    built : dict of str to dict
        What `slr_gpu.load` makes each module from.
    """
    work, count = prepared.work, prepared.sample_count
    chosen = [site for site in prepared.chosen if site.name in planned]
    rows, built = {}, {}
    # The original takes about as long as fitting all layers: a bar in samples, then in layers.
    bar = progress_bar("original responses", 2 * count, show=progress)
    with bar as advance, full_precision(), prepared.spill as spill:
        references = prepared.references(advance)
        frontier = None
        if prepared.settings.asymmetric:
            names = [site.name for site in chosen]
            frontier = Frontier(work, prepared.batches, names, spill)
        for site in chosen:
            advance(0, description=f"fitting {site.name}")
            began = time.perf_counter()
            layer = work.get_submodule(site.name)

            @cache  # not called where all groups of the layer are in the store
            def parts() -> list[LayerIO]:
                calls = references.calls(site.name)
                inputs = frontier.inputs(site.name, calls) if frontier else None
                return layer_parts(layer, site, references, prepared.sampler, inputs)

            decompositions = _decompose(prepared, planned[site.name], parts, store)
            energies = response_energies(references, site, len(decompositions), prepared.group)
            references.release(site.name)
            module = adapter_for(layer).build(layer, *decompositions)
            set_module(work, site.name, module)
            built[site.name] = {
                "type": type(module).__name__,
                "arguments": module.plan(),
                "activation": site.activation,
            }
            row = LayerReport(
                site.name,
                type(layer).__name__,
                _shape(layer.weight),
                seconds=time.perf_counter() - began,
                **summarise(decompositions, energies),
            )
            row.notes += prepared.notes(site.name)
            rows[site.name] = row
            advance(count / len(chosen))
    return rows, built


def _decompose(
    prepared: Prepared,
    planned: LayerPlan,
    parts: Callable[[], list[LayerIO]],
    store: Store | None,
) -> list[Decomposition]:
    """A decomposition of every group of a layer, from the store where it is there."""
    name, groups = planned.name, prepared.costs[planned.name].groups

    def fitted(group: int) -> Decomposition:
        return _fit(prepared, planned, parts()[group])

    if store is None:
        return [fitted(group) for group in range(groups)]
    pieces = [name] if groups == 1 else [f"{name}, group {group}" for group in range(groups)]
    layers = store.part("layers")
    return [
        layers.decomposition(piece, partial(fitted, group)) for group, piece in enumerate(pieces)
    ]


def _fit(prepared: Prepared, planned: LayerPlan, arrays: LayerIO) -> Decomposition:
    settings, structure = prepared.settings, planned.structure
    how = {
        "solver": settings.solver,
        "objective": settings.objective,
        "ridge": settings.ridge,
        "held_out": settings.held_out,
        "device": prepared.ops.device,
    }
    if structure is None:
        budget = prepared.costs[planned.name].budget(planned.limits, settings.multiple)
        form = prepared.form(planned.name, budget) if planned.form == "auto" else planned.form
        return fit(arrays, budget=budget, form=form, **how)
    return fit(arrays, form=structure.form, **_sizes(structure), **how)


def _sizes(structure: Structure) -> dict[str, int]:
    """A structure as `fit` is asked for it."""
    kept = "columns" if structure.form == "columns" else "channels"
    sizes = {kept: structure.s, "rank": structure.k}
    return sizes if structure.r is None else {**sizes, "basis_rows": structure.r}


def _shape(weight: torch.Tensor) -> str:
    return "x".join(str(size) for size in weight.shape)


def _report(prepared: Prepared, plan: Plan, layers: dict[str, LayerReport]) -> Report:
    original, work, sites = prepared.original, prepared.work, prepared.sites
    flops, by_module = prepared.dense_flops
    flops_kept, kept_by_module = count_flops(work, prepared.first_sample)
    rows = []
    for name in sites:
        before, after = original.get_submodule(name), work.get_submodule(name)
        row = layers.get(name)
        if row is None:
            kind, shape = type(before).__name__, _shape(before.weight)
            reason = prepared.reasons.get(name, "dense in the plan")
            row = LayerReport(name, kind, shape, "dense", reason)
            row.notes = prepared.notes(name)
        row.params = sum(p.numel() for p in before.parameters())
        row.params_kept = sum(p.numel() for p in after.parameters())
        row.flops = by_module.get(name, 0)
        row.flops_kept = kept_by_module.get(name, 0)
        rows.append(row)
    for name, module in original.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.ndim >= 2]
        if own and name not in sites:
            count = sum(p.numel() for p in module.parameters(recurse=False))
            inside = [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
            spent = by_module.get(name, 0) - sum(by_module.get(child, 0) for child in inside)
            what = "a bare parameter" if inside else type(module).__name__
            rows.append(
                LayerReport(
                    name or "(model)",
                    type(module).__name__,
                    _shape(max(own, key=torch.numel)),
                    "dense",
                    f"{what} is not compressed",
                    params=count,
                    params_kept=count,
                    flops=spent,
                    flops_kept=spent,
                )
            )
    return Report(
        plan.keep,
        sum(p.numel() for p in original.parameters()),
        sum(p.numel() for p in work.parameters()),
        flops,
        flops_kept,
        0.0,
        rows,
    )
