"""The whole model: what to do to each layer, then fit and replace, shallow to deep.

In: a model, unlabelled calibration data and a budget. Out: a `Result` with the smaller model.
`compress` is `analyze`, `Analysis.allocate` and `apply`; each can be called alone. The user's model
is copied, never changed. Layer l is fitted to the original's responses (Y) on inputs that come
through the layers already replaced (X), so that it corrects their errors (asymmetric; Zhang et al.
2015, section 3.3).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import adapter_for
from .analysis import Analysis, check_allocation
from .budget import check_keep, check_reachable
from .capture import full_precision, layer_parts, response_energies
from .checkpoint import Store, check_ranks, fingerprint
from .decomposition import Decomposition, Structure
from .errors import InputError, complain
from .fit import fit
from .frontier import Frontier
from .graph import LayerSite, set_module
from .grouped import summarise
from .latency import add_latency, allocate_measured, measured_latency
from .layer_budget import BLOCK
from .layer_io import LayerIO
from .layer_seconds import LatencyTarget
from .parallel import ALONE, Group
from .plan import LayerPlan, Plan
from .prepare import Prepared, Settings, count_flops
from .progress import progress_bar
from .refine import Refinement, refine_model
from .report import LayerReport, Report
from .result import Result
from .runtime.layer_timing import check_runtime
from .sensitivity import measure
from .shares import uniform
from .solvers import Solver
from .user_model import restore


def compress(
    model: nn.Module,
    calibration_data: Any,
    keep: dict[str, float],
    *,
    form: str = "auto",
    solver: Solver | None = None,
    objective: str = "activation",
    asymmetric: bool = True,
    allocation: str | None = None,
    samples: int = 15_000,
    held_out: float = 0.1,
    ridge: float | str = "auto",
    ignore: tuple[str, ...] | list[str] = (),
    overrides: dict[str, dict[str, Any]] | None = None,
    keep_ends: bool = True,
    multiple: int = BLOCK,
    batch_size: int = 100,
    seed: int = 0,
    loss: str = "auto",
    eval_fn: Callable[[nn.Module], float] | None = None,
    latency: LatencyTarget | None = None,
    refine: bool | Refinement = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    spill_dir: str | Path | None = None,
    memory_limit: float | None = None,
    progress: bool = True,
    group: Group = ALONE,
) -> Result:
    """Compress a model on unlabelled calibration data.

    Parameters
    ----------
    model : nn.Module
        Copied; neither its weights, modes nor hooks change.
    calibration_data : tensor, array, iterable of batches, Dataset, DataLoader, path or callable
        See `slr_gpu.calibration.as_batches`. Labels are not used.
    keep : dict
        Fractions of the whole model to keep: ``{"params": 0.25}``, ``{"flops": 0.25}``,
        ``{"latency": 0.25}`` or several of them, and then all hold.
    form, solver, objective, held_out, ridge, device
        See `slr_gpu.fit`.
    asymmetric : bool
        Fit each layer on inputs from the compressed prefix; False takes the original's inputs.
    allocation : {"output", "response", "pca_energy", "uniform"}
        How the budget is shared out: by what the layers' errors do to the model's output, measured;
        by the least sum of their errors; by the ranks that keep the most PCA energy (Zhang et al.
        2015); the same fraction for every layer. By default ``output``, or ``uniform`` for solvers
        that choose their own structures.
    samples : int
        About so many input rows a layer are sampled (im2col rows for convolutions).
    ignore : sequence of str
        Names of layers, or patterns such as ``"classifier.*"``, to leave dense.
    overrides : dict of str to dict
        For single layers, by name or pattern: ``{"keep": 0.5}``, ``{"form": "channels"}``.
    keep_ends : bool
        Leave the first and the last layer dense.
    multiple : int
        Make r, s (in channels) and k multiples of this where the budget allows: by default of the
        blocks of channels that CPU runtimes work in. 1 gives the least error at a number of
        parameters.
    batch_size : int
        Into which an array of calibration inputs is cut.
    seed : int
        Of the choice of rows.
    loss, eval_fn
        How outputs are judged; see `slr_gpu.analyze`.
    latency : LatencyTarget, optional
        Where a latency budget holds: by default in ONNX Runtime on one thread, batch of one.
    refine : bool or Refinement
        After the layers, train all of them together towards the original's outputs; kept if the
        loss on held-out samples falls.
    checkpoint : path, optional
        Folder for finished pieces. Delete it once the result is saved.
    resume : bool
        Go on with what is in `checkpoint`, if it belongs to the same model, data and settings. An
        `eval_fn` must be the same one; that is not checked.
    spill_dir : path, optional
        Existing folder for activations that wait and take more than `memory_limit`; what is written
        there is removed. By default the system's folder for temporary files.
    memory_limit : int, optional
        Bytes of activations that wait in memory, and of calibration data held there, which is
        otherwise read in every pass. By default a quarter of the memory that is available, for
        activations at most 1 GiB. The result is the same to the bit, but with `refine` and data
        that is not held, whose samples are shuffled in parts.
    progress : bool
        Show a bar on a terminal.
    group : Group
        Ranks that share the work, see `slr_gpu.ranks`. All are given the same calibration data, in
        the same order, and each works on its share of the batches; all return the same result,
        which without `refine` does not depend on how many they are, but for rounding; that may
        settle a choice between columns that are as good as each other. Rank 0 alone writes the
        checkpoint, calls `eval_fn` and measures latencies.

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
    options = {} if solver is None else {"solver": solver}
    settings = Settings(
        form=form,
        objective=objective,
        asymmetric=asymmetric,
        samples=samples,
        held_out=held_out,
        ridge=ridge,
        ignore=ignore,
        overrides=overrides or {},
        keep_ends=keep_ends,
        multiple=multiple,
        batch_size=batch_size,
        seed=seed,
        **options,
    )
    if allocation is None:
        allocation = "output" if settings.solver.takes_structures else "uniform"
    check_allocation(allocation)
    refinement = Refinement.of(refine)
    if "latency" in keep:
        latency = latency or LatencyTarget()
        check_runtime(latency.runtime)
    prepared = Prepared(
        model,
        calibration_data,
        settings,
        device,
        group,
        spill_dir=spill_dir,
        memory_limit=memory_limit,
    )
    facts = {
        "keep": keep,
        "allocation": allocation,
        "loss": loss,
        "eval_fn": eval_fn is not None,
        "latency": None if latency is None else latency.as_dict(),
        "refine": None if refinement is None else refinement.as_dict(),
    }
    check_ranks(prepared, facts)
    check_budget(prepared, keep, allocation)
    store = _open(prepared, checkpoint, facts, resume)
    done = None if store is None else store.load_json("plan")
    if done is None:
        part = None if store is None else store.part("analysis")
        analysis = measure(prepared, allocation, loss, eval_fn, part, progress)
        plan = group.first(lambda: make_plan(prepared, analysis, keep, latency))
        if store is not None:
            store.save_json("plan", plan.as_dict())
    else:
        plan = Plan.from_dict(done)
    result = carry_out(prepared, plan, loss, refinement, store, progress)
    if latency is not None:
        result.report.latency = group.first(
            lambda: measured_latency(prepared, result.model, latency)
        )
        result.report.latency["predicted"] = plan.achieved.get("latency")
    result.report.seconds = time.perf_counter() - began
    return result


def apply(
    model: nn.Module,
    calibration_data: Any,
    plan: Plan,
    *,
    loss: str = "auto",
    refine: bool | Refinement = False,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    spill_dir: str | Path | None = None,
    memory_limit: float | None = None,
    progress: bool = True,
    group: Group = ALONE,
) -> Result:
    """Carry out a plan, perhaps an edited one.

    Parameters
    ----------
    plan : Plan
        Its settings are those of the analysis; layers that may be compressed and are not in it
        stay dense.
    model, calibration_data, loss, refine, checkpoint, resume, device, spill_dir, memory_limit, group
        See `compress`.
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    Result

    Raises
    ------
    InputError
        When the plan does not fit the model, before any work is done; and see `compress`.
    """
    began = time.perf_counter()
    refinement = Refinement.of(refine)
    settings = Settings.from_dict(plan.settings)
    prepared = Prepared(
        model,
        calibration_data,
        settings,
        device,
        group,
        spill_dir=spill_dir,
        memory_limit=memory_limit,
    )
    facts = {
        "plan": plan.as_dict()["layers"],
        "loss": loss,
        "refine": None if refinement is None else refinement.as_dict(),
    }
    check_ranks(prepared, facts)
    _check_plan(prepared, plan)
    store = _open(prepared, checkpoint, facts, resume)
    result = carry_out(prepared, plan, loss, refinement, store, progress)
    result.report.seconds = time.perf_counter() - began
    return result


def _open(
    prepared: Prepared, checkpoint: str | Path | None, facts: dict[str, Any], resume: bool
) -> Store | None:
    if checkpoint is None:
        if resume:
            raise InputError(
                complain("resume without checkpoint", "checkpoint=<folder>", "Name the folder.")
            )
        return None
    facts = fingerprint(prepared) | facts
    return Store.open(checkpoint, facts, resume=resume, group=prepared.group)


def check_budget(prepared: Prepared, keep: dict[str, float], allocation: str) -> None:
    """Refuse what cannot be met before anything is measured."""
    costs = list(prepared.costs.values())
    if allocation in ("uniform", "pca_energy") and "latency" not in keep:
        fractions = {n: o["keep"] for n, o in prepared.options.items() if "keep" in o}
        uniform(keep, costs, fractions, prepared.totals)
        return
    keep = {name: fraction for name, fraction in keep.items() if name in prepared.totals}
    smallest = {
        resource: sum(cost.smallest(resource, prepared.form(cost.name)) for cost in costs)
        for resource in keep
    }
    check_reachable(keep, costs, prepared.totals, smallest)


def _check_plan(prepared: Prepared, plan: Plan) -> None:
    for layer in plan.layers:
        if layer.name not in prepared.costs:
            reason = prepared.reasons.get(layer.name, "no such layer")
            if layer.form == "dense":
                continue
            raise InputError(
                complain(
                    f"a plan for layer {layer.name!r} ({reason})",
                    f"layers that can be compressed: {', '.join(prepared.costs)}",
                    "Edit the plan.",
                )
            )
        layer.check(prepared.costs[layer.name], prepared.settings.solver.forms)


def make_plan(
    prepared: Prepared, analysis: Analysis, keep: dict[str, float], latency: LatencyTarget | None
) -> Plan:
    """Spend a budget by an analysis; for one of latency, layers and models are timed first."""
    if "latency" not in keep:
        return analysis.allocate(keep)
    add_latency(prepared, analysis, latency)
    return allocate_measured(prepared, analysis, keep, latency)[0]


def carry_out(
    prepared: Prepared,
    plan: Plan,
    loss: str,
    refinement: Refinement | None,
    store: Store | None,
    progress: bool,
) -> Result:
    """What `apply` does, for a model that is prepared and whose ``work`` is not changed yet."""
    work, settings = prepared.work, prepared.settings
    planned = {layer.name: layer for layer in plan.layers if layer.form != "dense"}
    chosen = [site for site in prepared.chosen if site.name in planned]
    rows: dict[str, LayerReport] = {}
    built: dict[str, dict[str, Any]] = {}
    count = prepared.sample_count
    progress = progress and prepared.group.rank == 0
    # The original takes about as long as fitting all layers: a bar in samples, then in layers.
    bar = progress_bar("original responses", 2 * count, show=progress)
    with bar as advance, full_precision(), prepared.spill as spill:
        references = prepared.references(advance)
        names = [site.name for site in chosen]
        frontier = None
        if settings.asymmetric:
            frontier = Frontier(work, prepared.batches, names, spill)
        for site in chosen:
            advance(0, description=f"fitting {site.name}")
            began = time.perf_counter()
            layer = work.get_submodule(site.name)

            groups = prepared.costs[site.name].groups

            @cache
            def parts(site: LayerSite = site, layer: nn.Module = layer) -> list[LayerIO]:
                calls = references.calls(site.name)
                inputs = frontier.inputs(site.name, calls) if frontier else None
                return layer_parts(layer, site, references, prepared.sampler, inputs)

            decompositions = []
            for group in range(groups):

                def fitted(name: str = site.name, group: int = group) -> Decomposition:
                    return _fit(prepared, planned[name], parts()[group])

                if store is None:
                    decompositions.append(fitted())
                else:
                    piece = site.name if groups == 1 else f"{site.name}, group {group}"
                    decompositions.append(store.part("layers").decomposition(piece, fitted))
            energies = response_energies(references, site, groups, prepared.group)
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
            advance(count / max(len(chosen), 1))
    reasons = dict(prepared.reasons)
    reasons.update({s.name: "dense in the plan" for s in prepared.chosen if s.name not in planned})
    report = _report(prepared, plan, rows, reasons)
    report.settings = {
        **settings.as_dict(),
        "solver": settings.solver.name,
        "allocation": plan.allocation,
        "calibration_samples": count,
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


def _report(
    prepared: Prepared, plan: Plan, layers: dict[str, LayerReport], reasons: dict[str, str]
) -> Report:
    original, work, batch = prepared.original, prepared.work, prepared.first_sample
    sites = prepared.sites
    flops, by_module = count_flops(original, batch)
    flops_kept, kept_by_module = count_flops(work, batch)
    rows = []
    for name in sites:
        before, after = original.get_submodule(name), work.get_submodule(name)
        row = layers.get(name)
        if row is None:
            kind, shape = type(before).__name__, _shape(before.weight)
            row = LayerReport(name, kind, shape, "dense", reasons[name])
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
