"""What layers alone cost in seconds, in a runtime on this machine.

In: a prepared model, its analysis, a runtime. Out: for every layer coefficients from which
`LayerCost.cost` knows the seconds of any structure. For each shape of layer a dozen of its best
structures are built and timed beside the dense layer (`slr_gpu.runtime.layer_timing`); between them
seconds are linear in the multiply-adds of the parts, in the values they hand on and in which parts
there are (non-negative least squares of relative errors). Timings are kept in a folder by machine,
runtime and threads.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from torch import nn

from .adapters import adapter_for
from .analysis import Analysis, LayerAnalysis
from .decomposition import Decomposition, Structure, grouping
from .errors import InputError, complain
from .fold import deployable, for_deployment
from .prepare import Prepared
from .runtime.layer_timing import Case, time_layers
from .runtime.measure import cpu_name
from .runtime.timing import check_threads
from .storage import load_json, save_json

# Structures timed a shape of layer.
TIMED = 14
# Of the files of timings.
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
        check_threads(self.threads)
        if not self.time_limit_s > 0:
            raise InputError(
                complain(f"time_limit_s={self.time_limit_s!r}", "a number > 0", "Raise it.")
            )

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


def add_layer_seconds(prepared: Prepared, analysis: Analysis, target: LatencyTarget) -> None:
    """Give the layers of an analysis the seconds they take alone, weights in the cache."""
    kinds: dict[str, list[LayerAnalysis]] = {}
    for layer in analysis.layers:
        kinds.setdefault(_kind(prepared, layer.cost.name), []).append(layer)
    for kind, layers in kinds.items():
        timed = _timed(prepared, kind, layers, target)
        for layer in layers:
            layer.cost = replace(layer.cost, seconds=_coefficients(layer, timed))


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
        module = random_layer(dense, structure)
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


def random_layer(dense: nn.Module, structure: Structure) -> nn.Module:
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
