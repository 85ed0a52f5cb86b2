"""What every layer loses at what cost, and how a budget for the whole model is spent on it.

In: for each layer its costs, the points of its trade-off curve (`slr_gpu.tradeoff`) and what a few
of them do to the model's output. Out: a `Plan` for any budget, in milliseconds: one option x_l for
every layer so that

    sum_l loss_l(error_l(x_l))  is least,  with  sum_l cost_l(x_l) <= budget  for every resource.

Where FLOPs are asked for, since time is meant, the choice of the least work (`LayerCost.work`) is
taken of all whose sum is within a tolerance of the least: runtimes also spend time on reading and
writing the maps between the parts of a layer. A latency budget has that in its costs, and one of
parameters does not ask for it.

For `response` the loss is the error of the layer's response itself. For `output` it is
sqrt(error * effect), where the effect on the model's output is a power law between the measured
points (straight lines in logarithms). Effects are measured with one layer compressed at a time, so
they do not see that later layers must also make up for earlier ones; the geometric mean with the
error, which counts all layers alike, meets that half-way.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .budget import LayerCost, check_keep, check_reachable, fixed, remaining
from .decomposition import Structure
from .errors import InputError, complain
from .knapsack import choose, undominated
from .plan import LayerPlan, Plan
from .shares import pca_energy, uniform
from .storage import load_json, save_json
from .tradeoff import Point

ANALYSIS_SCHEMA = 1
ALLOCATIONS = ("uniform", "pca_energy", "response", "output")
# What a plan's loss may exceed the least by, for a plan of less work. On the VGG-16 at a quarter of
# its FLOPs 0.08 is worth 3 to 4 % of speed and costs an eighth to a quarter more KL on images not
# seen: what asking for so many FLOPs less would, too.
TOLERANCE = 0.08
# Exponents of the power laws outside the measured points, and the least loss that counts as one.
SLOPES = (0.5, 2.0)
LEAST_LOSS = 1e-9


@dataclass
class LayerAnalysis:
    """One layer.

    Attributes
    ----------
    cost : LayerCost
    points : list of Point
        Its trade-off curve; empty where the allocation does not need one.
    effects : list of (float, float)
        Errors of the layer, and the loss of the model's output with this layer alone at them.
    energies : list of float
        Eigenvalues of the covariance of its responses; see `slr_gpu.shares`.
    """

    cost: LayerCost
    points: list[Point] = field(default_factory=list)
    effects: list[tuple[float, float]] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        cost = {name: getattr(self.cost, name) for name in self.cost.__dataclass_fields__}
        points = [
            [p.structure.form, p.structure.r, p.structure.s, p.structure.k, p.error]
            for p in self.points
        ]
        return {"cost": cost, "points": points, "effects": self.effects, "energies": self.energies}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> LayerAnalysis:
        cost = dict(value["cost"])
        cost.update({name: tuple(cost[name]) for name in ("kernel_size", "seconds")})
        points = [
            Point(Structure(form, s, k, r), error) for form, r, s, k, error in value["points"]
        ]
        effects = [(error, loss) for error, loss in value["effects"]]
        return cls(LayerCost(**cost), points, effects, value["energies"])


def predicted_effect(effects: list[tuple[float, float]], errors: np.ndarray) -> np.ndarray:
    """Loss of the model at errors of one layer, alone, from the losses at a few.

    Straight lines in logarithms through the measured points, made monotone, and beyond them with
    the nearest slope, kept within `SLOPES`.

    Parameters
    ----------
    effects : list of (float, float)
        At least one (error, loss).
    errors : array

    Returns
    -------
    array
        0 where the error is 0.
    """
    points = np.array(sorted(effects), dtype=float)
    x = np.log(np.maximum(points[:, 0], 1e-12))
    y = np.log(np.maximum.accumulate(np.maximum(points[:, 1], LEAST_LOSS)))
    first = last = 1.0
    if len(x) > 1:
        slopes = np.diff(y) / np.maximum(np.diff(x), 1e-9)
        first, last = np.clip(slopes[[0, -1]], *SLOPES)
    where = np.log(np.maximum(errors, 1e-30))
    loss = np.interp(where, x, y)
    loss = np.where(where < x[0], y[0] + first * (where - x[0]), loss)
    loss = np.where(where > x[-1], y[-1] + last * (where - x[-1]), loss)
    return np.where(errors > 0, np.exp(loss), 0.0)


@dataclass
class Analysis:
    """What `analyze` measured; serves any number of budgets.

    Attributes
    ----------
    settings : dict
        JSON values of the `Settings` it was made with.
    layers : list of LayerAnalysis
        All that may be compressed, in the order of execution.
    totals : dict of str to float
        Cost of the whole dense model.
    overrides : dict of str to float
        Fractions that the user set for single layers.
    measured : str
        The most informed allocation that it can serve; see `ALLOCATIONS`.
    loss : str
        What `effects` are: ``"kl"``, ``"mse"`` or ``"eval_fn"``.
    latency : dict
        Where seconds were measured; empty if they were not.
    """

    settings: dict[str, Any]
    layers: list[LayerAnalysis]
    totals: dict[str, float]
    overrides: dict[str, float] = field(default_factory=dict)
    measured: str = "output"
    loss: str = ""
    latency: dict[str, Any] = field(default_factory=dict)

    def allocate(
        self,
        keep: dict[str, float],
        allocation: str | None = None,
        tolerance: float = TOLERANCE,
    ) -> Plan:
        """Spend a budget.

        Parameters
        ----------
        keep : dict of str to float
            See `slr_gpu.compress`.
        allocation : {"output", "response", "pca_energy", "uniform"}, optional
            By default the one that the analysis was made for.
        tolerance : float
            By what fraction a plan's predicted loss may exceed the least at the same FLOPs, for
            less work: multiply-adds, and maps handed from part to part. 0 spends all of the FLOPs
            on the least loss. `response` and `output` use it, and only where `keep` names FLOPs
            and no latency.

        Returns
        -------
        Plan

        Raises
        ------
        InputError
            For an allocation that needs what was not measured, or a tolerance below 0.
        BudgetError
            When the budget cannot be reached; names the smallest that can be.
        """
        keep = check_keep(keep)
        allocation = check_allocation(allocation or self.measured)
        if not isinstance(tolerance, numbers.Real) or not 0 <= tolerance < math.inf:
            raise InputError(
                complain(f"tolerance={tolerance!r}", "a fraction >= 0", f"{TOLERANCE} is usual.")
            )
        costs = [layer.cost for layer in self.layers]
        if "latency" in keep and not self.latency:
            raise InputError(
                complain(
                    "a latency budget for an analysis without seconds",
                    "one made with latency=LatencyTarget(...)",
                    "Analyze again with it.",
                )
            )
        check_latency(keep, allocation)
        if allocation == "uniform":
            budgets = uniform(keep, costs, self.overrides, self.totals)
        elif allocation == "pca_energy":
            self._need(allocation, all(layer.energies for layer in self.layers))
            energies = {layer.cost.name: np.array(layer.energies) for layer in self.layers}
            budgets = pca_energy(keep, costs, self.overrides, self.totals, energies=energies)
        else:
            self._need(allocation, all(layer.points for layer in self.layers))
            if allocation == "output":
                self._need(allocation, all(layer.effects for layer in self.layers))
            return self._best(keep, allocation, tolerance)
        layers = []
        for cost in costs:
            # Of all groups together; a `LayerBudget` is that of one.
            weights = [cost.groups * limit.weights for limit in budgets[cost.name].limits]
            limits = dict(zip(keep, weights, strict=True))
            share = {name: min(1.0, value / cost.weights) for name, value in limits.items()}
            layers.append(LayerPlan(cost.name, "auto", limits=limits, share=share))
        return Plan(keep, allocation, self.settings, layers)

    def _need(self, allocation: str, there: bool) -> None:
        if not there:
            raise InputError(
                complain(
                    f"allocation={allocation!r} of an analysis made for {self.measured!r}",
                    f"one made with allocation={allocation!r}",
                    "Analyze again.",
                )
            )

    def _best(self, keep: dict[str, float], allocation: str, tolerance: float) -> Plan:
        resources = list(keep)
        options = [self._options(layer, resources, allocation) for layer in self.layers]
        costs = [layer.cost for layer in self.layers]
        smallest = {
            name: float(sum(option.costs[:, number].min() for option in options))
            for number, name in enumerate(resources)
        }
        check_reachable(keep, costs, self.totals, smallest)
        left = remaining(keep, costs, self.totals)
        limits = np.array([left[name] for name in resources])
        chosen = choose([o.losses for o in options], [o.costs for o in options], limits)
        if chosen is not None and tolerance and "flops" in keep and "latency" not in keep:
            chosen = _plainer(options, limits, chosen, tolerance)
        if chosen is None:
            raise InputError(
                complain(
                    f"keep={keep}, which can be met one by one but not together",
                    "budgets that go together",
                    "Raise one of them.",
                )
            )
        layers, spent = [], {name: fixed(name, costs, self.totals) for name in self.totals}
        for layer, option, index in zip(self.layers, options, chosen, strict=True):
            point = option.points[index]
            structure = None if point is None else point.structure
            cost = {name: layer.cost.cost(structure, name) for name in self.totals}
            for name, value in cost.items():
                spent[name] += value
            sizes = {}
            if structure is not None:
                sizes = {"r": structure.r, "s": structure.s, "k": structure.k}
            layers.append(
                LayerPlan(
                    layer.cost.name,
                    "dense" if structure is None else structure.form,
                    **sizes,
                    error=0.0 if point is None else point.error,
                    loss=float(option.losses[index]),
                    share={name: value / layer.cost.dense(name) for name, value in cost.items()},
                )
            )
        achieved = {name: value / self.totals[name] for name, value in spent.items()}
        return Plan(keep, allocation, self.settings, layers, achieved)

    def _options(self, layer: LayerAnalysis, resources: list[str], allocation: str) -> _Options:
        """What the layer may become: points that no other beats, and dense."""
        points: list[Point | None] = [*layer.points, None]
        errors = np.array([0.0 if point is None else point.error for point in points])
        losses = errors
        if allocation == "output":
            losses = np.sqrt(errors * predicted_effect(layer.effects, errors))
        structures = [None if point is None else point.structure for point in points]
        costs = np.array([[layer.cost.cost(s, name) for name in resources] for s in structures])
        work = np.array([layer.cost.work(structure) for structure in structures])
        kept = undominated(losses, np.column_stack([costs, work]))
        if layer.cost.name in self.overrides:
            fraction = self.overrides[layer.cost.name]
            limit = np.array([fraction * layer.cost.dense(name) for name in resources])
            fitting = [i for i in kept if np.all(costs[i] <= limit)]
            if not fitting:
                raise InputError(
                    complain(
                        f"overrides of {layer.cost.name!r} with keep={fraction:g}",
                        f"at least {float((costs / limit).max(axis=1).min()) * fraction:.4f}",
                        "Raise it.",
                    )
                )
            kept = np.array([min(fitting, key=lambda i: losses[i])])
        return _Options([points[i] for i in kept], losses[kept], costs[kept], work[kept])

    # -- on disk ---------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": ANALYSIS_SCHEMA,
            "measured": self.measured,
            "loss": self.loss,
            "totals": self.totals,
            "overrides": self.overrides,
            "latency": self.latency,
            "settings": self.settings,
            "layers": [layer.as_dict() for layer in self.layers],
        }

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically."""
        save_json(path, self.as_dict())

    @classmethod
    def load(cls, path: str | Path) -> Analysis:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            When it is missing, broken or of another schema.
        """
        value = load_json(path)
        if not isinstance(value, dict) or value.pop("schema", None) != ANALYSIS_SCHEMA:
            raise InputError(
                complain(
                    f"{path} of another schema",
                    f"an analysis of schema {ANALYSIS_SCHEMA}",
                    "Analyze again with this version of slr_gpu.",
                )
            )
        try:
            layers = [LayerAnalysis.from_dict(layer) for layer in value.pop("layers")]
            return cls(layers=layers, **value)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                complain(
                    f"{path}: {type(error).__name__}: {error}",
                    "an analysis as analyze wrote it",
                    "Analyze again.",
                )
            ) from error


@dataclass
class _Options:
    points: list[Point | None]  # None for dense
    losses: np.ndarray
    costs: np.ndarray
    work: np.ndarray


def _plainer(
    options: list[_Options], limits: np.ndarray, chosen: list[int], tolerance: float
) -> list[int]:
    """A choice of less work whose loss is nearly that of the chosen one, within the limits."""
    loss = sum(o.losses[index] for o, index in zip(options, chosen, strict=True))
    costs = [np.column_stack([o.costs, o.losses]) for o in options]
    limits = np.append(limits, (1 + tolerance) * loss)
    return choose([o.work for o in options], costs, limits, start=chosen)


def check_allocation(name: str) -> str:
    """The name, if there is such an allocation; else InputError."""
    if name not in ALLOCATIONS:
        raise InputError(
            complain(f"allocation={name!r}", f"one of {', '.join(ALLOCATIONS)}", "Check the name.")
        )
    return name


def check_latency(keep: dict[str, float], allocation: str) -> None:
    """InputError for a latency budget with an allocation by weights."""
    if "latency" in keep and allocation in ("uniform", "pca_energy"):
        raise InputError(
            complain(
                f"a latency budget with allocation={allocation!r}",
                "output or response",
                "Seconds are not proportional to weights.",
            )
        )
