"""What a whole model takes in seconds, in a runtime on this machine, and budgets of it.

In: a prepared model, its analysis with the seconds of layers alone (`slr_gpu.layer_seconds`). Out:
seconds of a planned model as the knapsack needs them, measured ones, and plans within a budget.

A layer alone finds its weights in the cache; in a large model they come from memory every time.
So a whole model takes

    T(x) = sum_l (alpha t_l(x_l) + gamma w_l(x_l)) + beta,      w: weights,

with alpha = 1 for dense layers. Gamma and beta come from two whole models timed in turn before any
layer is fitted, the dense one and the one with the fewest FLOPs; alpha of compressed layers from
the model that was planned (all with random weights).
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from .analysis import Analysis
from .budget import fixed
from .deploy import choose_graphs
from .errors import BudgetError, InputError, complain
from .fold import deployable, for_deployment
from .graph import set_module
from .layer_seconds import LatencyTarget, add_layer_seconds, random_layer
from .plan import LayerPlan, Plan
from .prepare import Prepared
from .runtime import timing
from .runtime.layer_timing import Case, check_runtime, time_layers

# A budget is aimed at below its limit, so that the model is within it when it is timed again: on a
# shared machine its latency beside the dense model's moves by 5 to 20 % within minutes. From `LEAST`
# to `MOST` of the limit a measured plan is taken as it is.
LEAST, AIM, MOST = 0.92, 0.95, 0.98


def add_latency(prepared: Prepared, analysis: Analysis, target: LatencyTarget) -> Analysis:
    """Give the layers of an analysis their seconds, and the whole model its own; returns it.

    Raises
    ------
    InputError, BackendError
        For a runtime that does not exist or does not work here, or a model of several inputs.
    """
    check_runtime(target.runtime)
    _single_input(prepared)
    add_layer_seconds(prepared, analysis, target)
    analysis.latency = target.as_dict()
    cheapest = _cheapest(analysis)
    measured = measured_latency(prepared, planned_model(prepared, cheapest), target)
    analysis.totals["latency"] = measured["dense_s"]
    _correct(analysis, cheapest, measured["ratio"])
    return analysis


def _cheapest(analysis: Analysis) -> Plan:
    """The plan with the fewest FLOPs: nearly all of its seconds are beta."""
    layers = []
    for layer in analysis.layers:
        structures = [point.structure for point in layer.points]
        s = min(structures, key=lambda structure: layer.cost.cost(structure, "flops"))
        layers.append(LayerPlan(layer.cost.name, s.form, s.r, s.s, s.k))
    return Plan({}, "cheapest", analysis.settings, layers)


def _correct(analysis: Analysis, plan: Plan, ratio: float) -> None:
    """Find gamma from the dense model and a planned one, and put it into the layers' seconds.

    Parameters
    ----------
    ratio : float
        Measured seconds of the planned model over those of the dense one.
    """
    planned = [
        (layer.cost, item.structure)
        for layer, item in zip(analysis.layers, plan.layers, strict=True)
    ]
    missing = (1 - ratio) * analysis.totals["latency"] - sum(
        cost.cost(None, "latency") - cost.cost(structure, "latency") for cost, structure in planned
    )
    weights = sum(cost.weights - cost.cost(structure, "params") for cost, structure in planned)
    gamma = max(missing, 0.0) / max(weights / 1e6, 1e-12)
    for layer in analysis.layers:
        dense, *coefficients, _ = layer.cost.seconds  # alone: without gamma
        dense += gamma * layer.cost.weights / 1e6
        layer.cost = replace(layer.cost, seconds=(dense, *coefficients, gamma))


def _scale(analysis: Analysis, plan: Plan, ratio: float) -> None:
    """Multiply the seconds of compressed layers alone, so that those of a planned model are right.

    Parameters
    ----------
    ratio : float
        Measured seconds of the planned model over those of the dense one.
    """
    costs = [layer.cost for layer in analysis.layers]
    structures = [layer.structure for layer in plan.layers]
    predicted = fixed("latency", costs, analysis.totals)
    alone = 0.0
    for cost, structure in zip(costs, structures, strict=True):
        seconds = cost.cost(structure, "latency")
        predicted += seconds
        if seconds < cost.dense("latency"):  # else it is deployed dense
            alone += seconds - cost.seconds[-1] * cost.cost(structure, "params") / 1e6
    if alone <= 0:
        return
    alpha = 1 + (ratio * analysis.totals["latency"] - predicted) / alone
    alpha = min(max(alpha, 0.25), 4.0)
    for layer in analysis.layers:
        dense, *coefficients, gamma = layer.cost.seconds
        scaled = [alpha * value for value in coefficients]
        layer.cost = replace(layer.cost, seconds=(dense, *scaled, gamma))


def measured_latency(
    prepared: Prepared, model: nn.Module, target: LatencyTarget
) -> dict[str, float]:
    """Seconds of the original and of a compressed model as `Result.export` would write it.

    Timed in turn; and the median of their ratios.
    """
    example = _single_input(prepared)
    chosen = choose_graphs(
        model,
        torch.zeros(example),
        runtime=target.runtime,
        threads=target.threads,
        time_limit_s=target.time_limit_s / 6,
        progress=False,
    )
    graphs = {layer.name: layer.graph for layer in chosen}
    cases: dict[str, Case] = {
        "dense": (deployable(prepared.original), example),
        "compressed": (for_deployment(deployable(model), graphs), example),
    }
    timings = time_layers(
        cases,
        [("dense", "compressed")],
        runtime=target.runtime,
        threads=target.threads,
        time_limit_s=target.time_limit_s / 2,
        block_s=timing.BLOCK_S,
    )
    dense, compressed = timings.seconds["dense"], timings.seconds["compressed"]
    return {
        "dense_s": float(np.median(dense)),
        "compressed_s": float(np.median(compressed)),
        "ratio": float(np.median(compressed / dense)),
    }


def planned_model(prepared: Prepared, plan: Plan) -> nn.Module:
    """The model that a plan leads to, with random weights: it takes as long as the real one."""
    model = copy.deepcopy(prepared.original)
    for layer in plan.layers:
        if layer.structure is not None:
            dense = model.get_submodule(layer.name)
            set_module(model, layer.name, random_layer(dense, layer.structure))
    return model


def allocate_measured(
    prepared: Prepared,
    analysis: Analysis,
    keep: dict[str, float],
    target: LatencyTarget,
    tries: int = 4,
) -> tuple[Plan, dict[str, float]]:
    """A plan whose whole-model latency, measured, is within the budget.

    Each try corrects the seconds of the layers by what the last plan missed.

    Returns
    -------
    plan : Plan
    measured : dict
        See `measured_latency`, and the ratio that was ``predicted``; of the plan with random
        weights.
    """
    found: list[tuple[Plan, dict[str, float]]] = []
    for _ in range(tries):
        try:
            plan = _aimed(analysis, keep)
        except BudgetError:
            if not found:
                raise
            break  # a correction asked for more than there is: the best plan so far
        measured = measured_latency(prepared, planned_model(prepared, plan), target)
        measured["predicted"] = plan.achieved["latency"]
        found.append((plan, measured))
        ratio = measured["ratio"]
        if LEAST * keep["latency"] <= ratio <= MOST * keep["latency"]:
            break
        _scale(analysis, plan, ratio)

    def rank(pair: tuple[Plan, dict[str, float]]) -> tuple[int, float]:
        """The one nearest below the limit is best, else the fastest."""
        ratio = pair[1]["ratio"]
        within = sum(ratio <= share * keep["latency"] for share in (MOST, 1))
        return within, ratio if within else -ratio

    plan, measured = max(found, key=rank)
    plan.keep = keep
    return plan, measured


def _aimed(analysis: Analysis, keep: dict[str, float]) -> Plan:
    """The plan of a latency somewhat below the budget, or at it where there is none below."""
    try:
        return analysis.allocate(keep | {"latency": AIM * keep["latency"]})
    except BudgetError:
        return analysis.allocate(keep)


def _single_input(prepared: Prepared) -> tuple[int, ...]:
    batch = prepared.first_sample
    if len(batch) != 1 or not batch[0].is_floating_point():
        raise InputError(
            complain(
                "a latency budget for a model of several inputs or of whole numbers",
                "one floating-point tensor",
                "Ask for params or flops.",
            )
        )
    return tuple(batch[0].shape)
