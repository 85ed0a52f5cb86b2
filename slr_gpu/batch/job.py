"""One job: a model, a budget and settings.

In: what a file of jobs says, checked (`slr_gpu.batch.jobs`). Out: values that workers can be sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..layer_seconds import LatencyTarget
from ..refine import Refinement
from ..settings import Settings


@dataclass(frozen=True)
class ModelSource:
    """Where a model and its data come from; paths are absolute."""

    name: str
    model: str
    data: str
    weights: str | None = None
    eval: str | None = None


@dataclass(frozen=True)
class JobSettings:
    """What is done to a model, whatever the budget.

    Attributes
    ----------
    name : str
        Empty where the file has no settings.
    prepared : Settings
    allocation, loss : str
    refinement : Refinement or None
    latency : LatencyTarget
    export : tuple of str
        Names of files.
    runtime : str or None
        Where layers of exported files are timed; see `Result.export`.
    threads : int
    """

    name: str
    prepared: Settings
    allocation: str
    loss: str = "auto"
    refinement: Refinement | None = None
    latency: LatencyTarget = field(default_factory=LatencyTarget)
    export: tuple[str, ...] = ()
    runtime: str | None = "auto"
    threads: int = 1


@dataclass(frozen=True)
class Job:
    """One model, one budget, one setting: one folder of that name."""

    model: ModelSource
    budget: str
    keep: dict[str, float]
    settings: JobSettings

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.model.name, self.budget, self.settings.name)))

    @property
    def analysis(self) -> str:
        """Jobs for which this is the same share one analysis."""
        s = self.settings
        return repr((self.model.name, s.prepared, s.allocation, s.loss))

    def facts(self) -> dict[str, Any]:
        """What decides the result beside the model, the data and the settings of layers."""
        s = self.settings
        return {
            "keep": self.keep,
            "allocation": s.allocation,
            "loss": s.loss,
            "refine": None if s.refinement is None else s.refinement.as_dict(),
            "latency": s.latency.as_dict() if "latency" in self.keep else None,
        }


@dataclass(frozen=True)
class Batch:
    """A checked file.

    Attributes
    ----------
    out : Path
    folder : Path
        Of the file.
    jobs : list of Job
    measure : LatencyTarget or None
        Where exported models are timed side by side.
    """

    out: Path
    folder: Path
    jobs: list[Job]
    measure: LatencyTarget | None = None
