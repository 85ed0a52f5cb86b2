"""Measure what each layer loses at what cost, and what that does to the model's output.

In: a model and unlabelled calibration data. Out: an `Analysis`. Layer by layer, all on inputs from
the original: the errors of closed forms over a grid (`slr_gpu.tradeoff`), and the loss of the
model's output on held-out samples when this layer alone is replaced by one of three of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .analysis import Analysis, LayerAnalysis, check_allocation
from .batches import Batches, run_model
from .capture import full_precision, layer_parts, response_energies
from .checkpoint import Store, check_ranks, fingerprint
from .errors import InputError, ModelError, complain
from .frontier import Frontier
from .graph import set_module
from .knapsack import undominated
from .latency import add_latency
from .layer_io import held_out_samples
from .layer_seconds import LatencyTarget
from .output_loss import choose_loss, mean_loss
from .parallel import ALONE, Group
from .prepare import Prepared
from .problem import ResponseProblem
from .progress import progress_bar
from .settings import Settings
from .shares import pca_energies
from .tradeoff import Point, TradeOff

# Shares of a dense layer's weights at which its effect on the output is measured.
PROBED = (0.05, 0.15, 0.4)
# Points kept beside the best ones: another resource may prefer them.
SLACK = 1.3
# Held-out samples that judge outputs, at most.
JUDGES = 500


@torch.inference_mode(False)  # whatever the caller's mode
def analyze(
    model: nn.Module,
    calibration_data: Any,
    *,
    allocation: str = "output",
    loss: str = "auto",
    eval_fn: Callable[[nn.Module], float] | None = None,
    latency: LatencyTarget | None = None,
    cache: str | Path | None = None,
    device: str = "cpu",
    spill_dir: str | Path | None = None,
    memory_limit: float | None = None,
    progress: bool = True,
    group: Group = ALONE,
    **settings: Any,
) -> Analysis:
    """Measure how each layer trades its error for its cost; the first step of `compress`.

    Parameters
    ----------
    model, calibration_data
        See `slr_gpu.compress`.
    allocation : {"output", "response", "pca_energy", "uniform"}
        What will be asked of the analysis; less is measured for the later ones.
    loss : {"auto", "kl", "mse"}
        How outputs are compared; see `slr_gpu.output_loss`.
    eval_fn : callable, optional
        ``eval_fn(model) -> float``, higher is better: measured instead of `loss`. It is given a
        copy in float32, on the device of the fits.
    latency : LatencyTarget, optional
        Also time layers there, so that plans can be made for latency budgets.
    cache : path, optional
        Folder in which finished layers wait; the same model, data and settings are not measured
        again. Not used with an `eval_fn`, which cannot be told from another one.
    device, spill_dir, memory_limit, progress, group
        See `slr_gpu.compress`.
    **settings
        Of `slr_gpu.settings.Settings`, all explained in `slr_gpu.compress`: form, solver,
        objective, samples, held_out, ridge, ignore, overrides, keep_ends, multiple, batch_size,
        seed, asymmetric.

    Returns
    -------
    Analysis
        ``analysis.allocate(keep={"flops": 0.25})`` makes a plan of it.

    Raises
    ------
    InputError, BudgetError, ModelError, BackendError
        See `slr_gpu.compress`.
    """
    check_allocation(allocation)
    prepared = Prepared(
        model,
        calibration_data,
        Settings(**settings),
        device,
        group,
        spill_dir=spill_dir,
        memory_limit=memory_limit,
    )
    facts = {"allocation": allocation, "loss": loss}
    check_ranks(prepared, facts)
    store = None
    if cache is not None and eval_fn is None:
        store = Store.named(cache, fingerprint(prepared) | facts, group)
    analysis = measure(prepared, allocation, loss, eval_fn, store, progress)
    if latency is not None:
        analysis = group.first(lambda: add_latency(prepared, analysis, latency))
    return analysis


def measure(
    prepared: Prepared,
    allocation: str,
    loss: str = "auto",
    eval_fn: Callable[[nn.Module], float] | None = None,
    store: Store | None = None,
    progress: bool = True,
) -> Analysis:
    """What `analyze` does, for a model that is prepared."""
    analysis = Analysis(
        prepared.settings.as_dict(),
        [LayerAnalysis(cost) for cost in prepared.costs.values()],
        dict(prepared.totals),
        {name: o["keep"] for name, o in prepared.options.items() if "keep" in o},
        allocation,
    )
    curves = allocation in ("response", "output")
    check_solver(prepared.settings, allocation)
    if allocation == "uniform":
        return analysis
    count = len(prepared.chosen)
    group = prepared.group
    bar = progress_bar("original responses", 2 * count, show=progress and group.rank == 0)
    with bar as advance, full_precision(), prepared.spill as spill:
        references = prepared.references(
            lambda samples: advance(count * samples / prepared.sample_count)
        )
        if not curves:
            for layer in analysis.layers:
                targets = references.linear_targets[layer.cost.name]
                layer.energies = pca_energies(targets, layer.cost.groups, group).tolist()
            return analysis
        judge = None
        if allocation == "output":
            judge = _Judge(prepared, loss, eval_fn)
            analysis.loss = judge.loss
        names = [site.name for site in prepared.chosen]
        frontier = Frontier(prepared.original, prepared.batches, names, spill)
        for layer, site in zip(analysis.layers, prepared.chosen, strict=True):
            advance(0, description=f"analysing {site.name}")
            done = None if store is None else store.load_json(site.name)
            if done is None:
                _measure(prepared, layer, frontier, judge)
                if store is not None:
                    store.save_json(site.name, layer.as_dict())
            else:
                measured = LayerAnalysis.from_dict(done)
                layer.points, layer.effects = measured.points, measured.effects
            advance(1)
    return analysis


def check_solver(settings: Settings, allocation: str) -> None:
    """InputError for an allocation by structures with a solver that chooses its own."""
    if allocation in ("response", "output") and not settings.solver.takes_structures:
        raise InputError(
            complain(
                f"allocation={allocation!r} with the solver {settings.solver.name}",
                "uniform or pca_energy: this solver chooses its own structures",
                "Leave allocation out.",
            )
        )


def _measure(
    prepared: Prepared, layer: LayerAnalysis, frontier: Frontier, judge: _Judge | None
) -> None:
    """Fill in the curve of a layer and what it does to the output."""
    name, settings = layer.cost.name, prepared.settings
    site, module = prepared.sites[name], prepared.original.get_submodule(name)
    references = prepared.references()
    inputs = frontier.inputs(name, references.calls(name))
    ridge = 1e-3 if settings.ridge == "auto" else settings.ridge
    problems = [
        ResponseProblem(part, ops=prepared.ops, ridge=ridge, held_out=settings.held_out)
        for part in layer_parts(module, site, references, prepared.sampler, inputs)
    ]
    resources = tuple(prepared.totals)

    def affordable(structure) -> bool:
        return any(layer.cost.cost(structure, r) < layer.cost.dense(r) for r in resources)

    energies = response_energies(references, site, layer.cost.groups, prepared.group)
    # Narrow layers: no basis is affordable.
    for form in dict.fromkeys((prepared.form(name), "columns")):
        tradeoffs = [TradeOff(problem, form, settings.multiple) for problem in problems]
        points = _mean_points([tradeoff.points(affordable) for tradeoff in tradeoffs], energies)
        if points:
            break
    costs = np.array([[layer.cost.cost(p.structure, r) for r in resources] for p in points])
    errors = np.array([point.error for point in points])
    layer.points = [points[i] for i in undominated(errors, costs, SLACK)]
    if judge is not None:
        for point in _probed(layer):
            parts = [tradeoff.weight(point.structure) for tradeoff in tradeoffs]
            xp = prepared.ops.xp
            weight, bias = (xp.concatenate(arrays) for arrays in zip(*parts, strict=True))
            replaced = _replaced(module, weight, bias)
            layer.effects.append((point.error, judge(name, replaced)))


def _mean_points(points: list[list[Point]], energies: list[float]) -> list[Point]:
    """Points of a layer from those of its groups, whose grids are one: mean errors by energy."""
    if len(points) == 1 or not points[0]:
        return points[0]
    errors = [[point.error for point in group] for group in points]
    errors = np.average(errors, axis=0, weights=energies)
    return [Point(p.structure, float(e)) for p, e in zip(points[0], errors, strict=True)]


def _probed(layer: LayerAnalysis) -> list[Point]:
    """The best points at the costs of `PROBED`, by weights."""
    found: list[Point] = []
    costs = np.array([layer.cost.cost(point.structure, "params") for point in layer.points])
    errors = np.array([point.error for point in layer.points])
    for share in PROBED:
        limit = max(share * layer.cost.weights, costs.min())
        best = layer.points[int(np.argmin(np.where(costs <= limit, errors, np.inf)))]
        if best not in found:
            found.append(best)
    return found


def _replaced(layer: nn.Module, weight: Any, bias: Any) -> nn.Module:
    """A copy of a layer with another weight (n, m) and bias (n,)."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        tensors = [torch.as_tensor(array).to(layer.weight) for array in (weight, bias)]
        other.weight = nn.Parameter(tensors[0].reshape(layer.weight.shape))
        other.bias = nn.Parameter(tensors[1])
    return other


class _Judge:
    """The loss of the model with one layer replaced, on held-out samples.

    Parameters
    ----------
    prepared : Prepared
    loss : str
    eval_fn : callable, optional
        What falls instead, on a model of its own.
    """

    def __init__(
        self, prepared: Prepared, loss: str, eval_fn: Callable[[nn.Module], float] | None
    ) -> None:
        self.model, self.eval_fn, self.group = prepared.original, eval_fn, prepared.group
        if eval_fn is not None:
            self.loss, self.before = "eval_fn", self._evaluated()
            return
        names = [site.name for site in prepared.chosen]
        judges = judging_batches(prepared)
        self.frontier = Frontier(self.model, judges, names, prepared.spill)
        with torch.no_grad(), self.group.together():
            self.wanted = [run_model(self.model, batch) for batch in judges]
            some = run_model(self.model, prepared.few_samples)
        self.loss = choose_loss(loss, some)

    def _evaluated(self) -> float:
        return self.group.first(lambda: float(self.eval_fn(self.model)))

    def __call__(self, name: str, replaced: nn.Module) -> float:
        value = self._loss(name, replaced)
        if not math.isfinite(value):
            raise ModelError(
                complain(
                    f"{self.loss} of {value} with {name} compressed",
                    "a finite number",
                    "Check what the model returns, and eval_fn; allocation='response' needs neither.",
                )
            )
        return value

    def _loss(self, name: str, replaced: nn.Module) -> float:
        if self.eval_fn is not None:
            layer = self.model.get_submodule(name)
            set_module(self.model, name, replaced)
            try:
                return self.before - self._evaluated()
            finally:
                set_module(self.model, name, layer)
        self.frontier.reach(name)
        outputs = self.frontier.outputs(name, replaced)
        return mean_loss(self.loss, self.wanted, outputs, self.group)


def judging_batches(prepared: Prepared) -> Batches:
    """This rank's held-out samples, at most about `JUDGES` on all, on which models are compared."""
    held = held_out_batches(prepared.batches, prepared.settings.held_out)[1]
    before, _ = prepared.group.span(sum(held.sizes[number] for number in held.numbers))
    return held.leading(JUDGES - before)


def held_out_batches(batches: Batches, held_out: float) -> tuple[Batches, Batches]:
    """Batches of the samples that layers are fitted on, and of those that judge.

    The same samples as `LayerIO.split` holds out. All samples are in both where none are.
    """
    chosen = torch.from_numpy(held_out_samples(sum(batches.sizes), held_out))
    if not chosen.any():
        return batches, batches
    masks = dict(enumerate(chosen.split(list(batches.sizes))))
    fitted = batches.of_samples({number: ~mask for number, mask in masks.items()})
    return fitted, batches.of_samples(masks)
