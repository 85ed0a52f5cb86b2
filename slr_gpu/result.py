"""A compressed model and its files.

In: what `compress` made, or a folder. Out: the folder, or the model again. ``plan.json`` says how to
rebuild the modules, ``model.safetensors`` holds their weights, ``report.json`` what was measured.
`Result.export` writes the model for other runtimes, each layer by the graph that is fastest there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from .adapters import build_from_plan
from .deploy import LayerGraph, choose_graphs, table
from .errors import InputError, complain
from .export import check_target, export_model, flush_denormals, has_denormals
from .graph import LayerSite, fold_batch_norm, set_module
from .lowering import lower
from .plan import check_schema
from .report import Report
from .runtime.timing import check_threads
from .storage import load_json, save_json, write_atomically


@dataclass(frozen=True)
class Exported:
    """A written file.

    Attributes
    ----------
    path : Path
    error : float
        Largest relative error of the file's outputs.
    layers : list of LayerGraph
        How the decomposed layers are computed, and how long each takes; empty if not measured.
    """

    path: Path
    error: float
    layers: list[LayerGraph]

    def table(self) -> Table:
        """A rich renderable: a line a layer."""
        return table(self.layers)


@dataclass
class Result:
    """What `compress` returns.

    Attributes
    ----------
    model : nn.Module
        The compressed copy, in the modes (train or eval) of the original.
    report : Report
    plan : dict
        A `Plan` as JSON values, and how to rebuild the modules.
    example : tuple
        Arguments of one call on a few calibration samples, for `export`.
    """

    model: nn.Module
    report: Report
    plan: dict[str, Any]
    example: tuple[Any, ...] = ()

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors``, ``plan.json`` and ``report.json``, each atomically.

        Denormal weights are written as zeros.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.model
        if has_denormals(model):
            model = flush_denormals(copy.deepcopy(model))
        write_atomically(folder / "model.safetensors", lambda path: save_model(model, str(path)))
        self.save_report(folder)
        save_json(folder / "plan.json", self.plan)

    def save_report(self, folder: str | Path) -> None:
        """Write ``report.json``, atomically."""
        save_json(Path(folder) / "report.json", self.report.as_dict())

    def export(
        self,
        path: str | Path,
        inputs: Any = None,
        *,
        runtime: str | None = "auto",
        threads: int = 1,
        progress: bool = True,
    ) -> Exported:
        """Write one file that stock runtimes execute, checked against `model` before it appears.

        Every decomposed layer is first timed in the runtime, by each of the graphs that compute
        it, the dense one among them, and takes the fastest: no layer runs slower than it did. What
        they are is noted in `report`.

        Parameters
        ----------
        path : path
            ``.onnx`` (ONNX Runtime, OpenVINO; needs the extra ``onnx``) or ``.pt2``
            (`torch.export`). Weights are float32, whatever the dtype of the model; the batch
            dimension is free, the others are those of `inputs`.
        inputs : tensor, array or tuple of arguments, optional
            One sample or more; `example` if not given.
        runtime : str or None
            Where layers are timed, ``"onnxruntime"``, ``"openvino"`` or ``"pytorch"``. ``"auto"``
            is the first of them for ``.onnx``, the last for ``.pt2``; None times nothing and
            takes the graphs of first choice, the same on every machine.
        threads : int
            Of the runtime.
        progress : bool
            Show a bar on a terminal.

        Returns
        -------
        Exported

        Raises
        ------
        InputError, BackendError, ModelError
            See `slr_gpu.export.export_model`; nothing is written then.
        """
        check_target(path)
        check_threads(threads)
        path = Path(path)
        inputs = self.example if inputs is None else inputs
        if runtime == "auto":
            runtime = "onnxruntime" if path.suffix == ".onnx" else "pytorch"
        layers = []
        if runtime is not None:
            layers = choose_graphs(
                self.model, inputs, runtime=runtime, threads=threads, progress=progress
            )
        graphs = {layer.name: layer.graph for layer in layers}
        error = export_model(self.model, path, inputs, graphs)
        for layer in layers:
            self.report.note_deployment(layer.name, str(layer))
        return Exported(path, error, layers)


def load(folder: str | Path, model_factory: Callable[[], nn.Module]) -> nn.Module:
    """Restore what `Result.save` wrote.

    Parameters
    ----------
    folder : path
    model_factory : callable
        Makes the original, dense model (its weights do not matter).

    Returns
    -------
    nn.Module
        In eval mode.

    Raises
    ------
    InputError
        When files are missing or broken, or do not belong to the factory's model.
    """
    folder = Path(folder)
    plan = load_json(folder / "plan.json")
    check_schema(plan, str(folder / "plan.json"))
    model = model_factory().eval()
    lower(model)
    try:
        for entry in plan["folded"]:
            site = LayerSite(entry["layer"], batch_norm=entry["batch_norm"])
            fold_batch_norm(model, site)
        for entry in plan["layers"]:
            if "type" not in entry:  # dense in the plan
                continue
            dense = model.get_submodule(entry["name"])
            module = build_from_plan(entry["type"], entry["arguments"])
            set_module(model, entry["name"], module.to(dense.weight))
        load_model(model, str(folder / "model.safetensors"), strict=True)
    except (AttributeError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise InputError(
            complain(
                f"{folder}: {type(error).__name__}: {error}",
                "the files of a compressed model and the factory of its original",
                "Check the folder and the factory.",
            )
        ) from error
    return model.eval()
