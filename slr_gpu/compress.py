"""The whole model: checked, analysed, its budget spent, and the plan carried out.

In: a model, unlabelled calibration data and a budget. Out: a `Result` with the smaller model.
`compress` is `analyze`, `Analysis.allocate` and `apply`; each can be called alone. The user's model
is copied, never changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .analysis import Analysis, check_allocation
from .budget import check_keep, check_reachable
from .carry_out import carry_out
from .checkpoint import Store, check_ranks, fingerprint
from .errors import InputError, complain
from .latency import add_latency, allocate_measured, measured_latency
from .layer_budget import BLOCK
from .layer_seconds import LatencyTarget
from .parallel import ALONE, Group
from .plan import Plan
from .prepare import Prepared
from .refine import Refinement
from .result import Result
from .runtime.layer_timing import check_runtime
from .sensitivity import measure
from .settings import Settings
from .shares import uniform
from .solvers import Solver


@torch.inference_mode(False)  # whatever the caller's mode
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
        Folder for finished pieces, with nothing else in it. Delete it once the result is saved.
    resume : bool
        Go on with what is in `checkpoint`, if it is of the same version, model, data and settings.
        An `eval_fn` must be the same one; that is not checked.
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


@torch.inference_mode(False)  # whatever the caller's mode
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
