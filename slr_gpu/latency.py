"""What layers cost in seconds, in a runtime on this machine.

In: a prepared model, its analysis, a runtime. Out: for every layer coefficients from which
`LayerCost.cost` knows the seconds of any structure, and how long a planned model takes, measured.
For each shape of layer a dozen of its best structures are built and timed beside the dense layer
(`slr_gpu.runtime.layer_timing`); between them seconds are linear in the multiply-adds of the parts,
in the values they hand on and in which parts there are (non-negative least squares of relative
errors). Timings are kept in a folder by machine, runtime and threads.

A layer alone finds its weights in the cache; in a large model they come from memory every time.
So a whole model takes

    T(x) = sum_l (alpha t_l(x_l) + gamma w_l(x_l)) + beta,      w: weights,

with alpha = 1 for dense layers. Gamma and beta come from two whole models timed in turn before any
layer is fitted, the dense one and the one with the fewest FLOPs; alpha of compressed layers from
the model that was planned (all with random weights).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from .adapters import adapter_for
from .analysis import Analysis, LayerAnalysis
from .budget import fixed
from .decomposition import Decomposition, Structure, grouping
from .deploy import choose_graphs
from .errors import BudgetError, InputError, complain
from .fold import deployable, for_deployment
from .graph import set_module
from .plan import LayerPlan, Plan
from .prepare import Prepared
from .runtime import timing
from .runtime.layer_timing import Case, check_runtime, time_layers
from .runtime.measure import cpu_name
from .storage import load_json, save_json

# Structures timed a shape of layer.
TIMED = 14
# A budget is aimed at below its limit, so that the model is within it whenever it is timed again:
# from one export to the next its latency differs by some per cent. From `LEAST` to `MOST` of it
# a measured plan is taken as it is.
LEAST, AIM, MOST = 0.92, 0.95, 0.98
SCHEMA = 1


@dataclass(frozen=True)
class LatencyTarget:
    """Where a model will run.

    Attributes
    ----------
    runtime : str
        Of `slr_gpu.runtime.sessions.RUNTIMES`.
    threads : int
    cache : path, optional
        Folder of timings, by default ``slr_gpu`` in the user's cache folder.
    time_limit_s : float
        For timing all layers.
    """

    runtime: str = "onnxruntime"
    threads: int = 1
    cache: str | Path | None = None
    time_limit_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("threads", "time_limit_s"):
            value = getattr(self, name)
            if not value > 0:
                raise InputError(complain(f"{name}={value!r}", "a number > 0", "Raise it."))

    def as_dict(self) -> dict[str, Any]:
        """What decides the seconds, as JSON values."""
        return {"runtime": self.runtime, "threads": self.threads}

    def file(self, kind: str) -> Path:
        """Where the timings of a kind of layer are kept."""
        folder = self.cache
        if folder is None:
            folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "slr_gpu"
        package = self.runtime if self.runtime in ("onnxruntime", "openvino") else "torch"
        machine = [
            cpu_name(),
            platform.machine(),
            self.runtime,
            importlib.metadata.version(package),
            self.threads,
            SCHEMA,
            kind,
        ]
        return Path(folder) / f"{hashlib.sha256(repr(machine).encode()).hexdigest()[:24]}.json"


def add_latency(prepared: Prepared, analysis: Analysis, target: LatencyTarget) -> Analysis:
    """Give the layers of an analysis their seconds, and the whole model its own; returns it.

    Raises
    ------
    InputError, BackendError
        For a runtime that does not exist or does not work here, or a model of several inputs.
    """
    check_runtime(target.runtime)
    _single_input(prepared)
    kinds: dict[str, list[LayerAnalysis]] = {}
    for layer in analysis.layers:
        kinds.setdefault(_kind(prepared, layer.cost.name), []).append(layer)
    for kind, layers in kinds.items():
        timed = _timed(prepared, kind, layers, target)
        for layer in layers:
            layer.cost = replace(layer.cost, seconds=_coefficients(layer, timed))
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
            set_module(model, layer.name, _module(dense, layer.structure))
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
    # The one nearest below the limit, else the fastest.
    for limit in (MOST * keep["latency"], keep["latency"]):
        within = [pair for pair in found if pair[1]["ratio"] <= limit]
        if within:
            plan, measured = max(within, key=lambda pair: pair[1]["ratio"])
            break
    else:
        plan, measured = min(found, key=lambda pair: pair[1]["ratio"])
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


def _kind(prepared: Prepared, name: str) -> str:
    """Layers of one kind take equally long."""
    layer, site = prepared.original.get_submodule(name), prepared.sites[name]
    return f"{layer!r} {tuple(site.input_shape[1:])} {prepared.form(name)}"


def _timed(
    prepared: Prepared, kind: str, layers: list[LayerAnalysis], target: LatencyTarget
) -> dict[str, float]:
    """Seconds by structure (as text) and of ``dense``, timed or from the cache."""
    path = target.file(kind)
    if path.exists():
        return load_json(path)
    layer = layers[0]
    name = layer.cost.name
    dense = deployable(prepared.original.get_submodule(name))
    shape = (1, *prepared.sites[name].input_shape[1:])
    cases: dict[str, Case] = {"dense": (dense, shape)}
    for structure in _spread(layer):
        module = _module(dense, structure)
        deployed = for_deployment(nn.Sequential(module)).eval()
        cases[json.dumps([structure.form, structure.r, structure.s, structure.k])] = (
            deployed,
            shape,
        )
    timings = time_layers(
        cases,
        [("dense", key) for key in cases if key != "dense"],
        runtime=target.runtime,
        threads=target.threads,
        precision=0.05,
        time_limit_s=target.time_limit_s / max(len(prepared.chosen), 1),
    )
    seconds = {key: float(np.median(values)) for key, values in timings.seconds.items()}
    save_json(path, seconds)
    return seconds


def _spread(layer: LayerAnalysis) -> list[Structure]:
    """Structures that tell the parts' seconds apart, the best ones at spread costs among them.

    Half are the best at costs from the cheapest to the dense layer's; the others those of the
    curve that the ones before say least about: of the largest leverage x (XᵀX + eps)^-1 xᵀ, x
    being the parts of a structure by its multiply-adds, as relative errors are fitted.
    """
    structures = [point.structure for point in layer.points]
    costs = np.array([layer.cost.cost(structure, "flops") for structure in structures])
    errors = np.array([point.error for point in layer.points])
    found: list[int] = []
    limits = np.geomspace(costs.min(), layer.cost.dense("flops"), TIMED // 2 + 1)[1:]
    for limit in limits:
        best = int(np.argmin(np.where(costs <= limit, errors, np.inf)))
        if best not in found:
            found.append(best)
    parts = np.array([layer.cost.parts(structure)[:-1] for structure in structures])
    parts = parts / costs[:, None]
    parts = parts / np.maximum(np.abs(parts).max(axis=0), 1e-30)
    while len(found) < min(TIMED, len(structures)):
        X = parts[found]
        inverse = np.linalg.inv(X.T @ X + 1e-6 * np.eye(X.shape[1]))
        leverage = np.einsum("pi,ij,pj->p", parts, inverse, parts)
        leverage[found] = -np.inf
        found.append(int(np.argmax(leverage)))
    return [structures[index] for index in found]


def _coefficients(layer: LayerAnalysis, timed: dict[str, float]) -> tuple[float, ...]:
    """Seconds of the dense layer, then those of each of the `parts` of a structure."""
    rows, seconds = [], []
    for key, value in timed.items():
        if key != "dense":
            form, r, s, k = json.loads(key)
            rows.append(layer.cost.parts(Structure(form, s, k, r))[:-1])
            seconds.append(value)
    weighted = np.array(rows) / np.array(seconds)[:, None]
    found, _ = nnls(weighted, np.ones(len(rows)))
    # Alone, weights come from the cache.
    return (timed["dense"], *found.tolist(), 0.0)


def _module(dense: nn.Module, structure: Structure) -> nn.Module:
    """A decomposed layer of a structure, with random weights, in the place of a dense one."""
    rng = np.random.default_rng(0)
    adapter = adapter_for(dense)
    groups, kernel_size = adapter.groups(dense), adapter.kernel_size(dense)
    n = len(dense.weight) // groups
    taps = int(np.prod(kernel_size, dtype=int))
    channels = dense.weight[0].numel() // taps
    mixed, taps = grouping(structure.form, channels, kernel_size)
    r = structure.r
    basis = None if r is None else rng.normal(size=(r, mixed)).astype("f4")
    width = (mixed if r is None else r) * taps
    group = 1 if structure.form == "columns" else taps
    kept = np.arange(structure.s)
    if r is None:
        kept = np.sort(rng.permutation(width // group)[: structure.s])
    columns = (kept[:, None] * group + np.arange(group)).reshape(-1)

    def factor(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype("f4") / max(shape[-1], 1) ** 0.5

    decomposition = Decomposition(
        structure.form,
        columns,
        factor(n, len(columns)),
        factor(n, structure.k),
        factor(structure.k, width - len(columns)),
        np.zeros(n, "f4"),
        channels,
        kernel_size,
        basis,
    )
    return adapter.build(dense, *[decomposition] * groups)
