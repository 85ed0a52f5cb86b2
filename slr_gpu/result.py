"""A compressed model and its files.

In: what `compress` made, or a folder. Out: the folder, or the model again. ``plan.json`` says how to
rebuild the modules, ``model.safetensors`` holds their weights, ``report.json`` what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from .adapters import build_from_plan
from .errors import InputError, complain
from .graph import LayerSite, fold_batch_norm, set_module
from .report import Report
from .storage import load_json, save_json, write_atomically

PLAN_SCHEMA = 1


@dataclass
class Result:
    """What `compress` returns.

    Attributes
    ----------
    model : nn.Module
        The compressed copy, in the modes (train or eval) of the original.
    report : Report
    plan : dict
        How to rebuild the modules: JSON values only.
    """

    model: nn.Module
    report: Report
    plan: dict[str, Any]

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors``, ``plan.json`` and ``report.json``, each atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            folder / "model.safetensors", lambda path: save_model(self.model, str(path))
        )
        save_json(folder / "report.json", self.report.as_dict())
        save_json(folder / "plan.json", self.plan)


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
    if not isinstance(plan, dict) or plan.get("schema") != PLAN_SCHEMA:
        raise InputError(
            complain(
                f"{folder / 'plan.json'} with another schema",
                f"schema {PLAN_SCHEMA}",
                "Compress again with this version of slr_gpu.",
            )
        )
    model = model_factory().eval()
    try:
        for entry in plan["folded"]:
            site = LayerSite(entry["layer"], batch_norm=entry["batch_norm"])
            fold_batch_norm(model, site)
        for entry in plan["layers"]:
            dense = model.get_submodule(entry["name"])
            module = build_from_plan(entry["type"], entry["arguments"])
            set_module(model, entry["name"], module.to(dense.weight.dtype))
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
