"""What came of all jobs: a table, ``summary.json`` and a picture of quality against cost.

In: jobs and what their workers found. Out: a `Summary`. Latencies are those measured side by side
where that was asked, FLOPs otherwise; quality is the user's accuracy, or how far outputs are from
the original's on held-out samples. What was not measured is null.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from ..errors import BackendError, complain
from ..storage import save_json, write_atomically
from .job import Job

SCHEMA = 1


@dataclass
class Outcome:
    """One job.

    Attributes
    ----------
    name, model, budget, settings : str
    keep : dict of str to float
        Asked for.
    status : str
        ``"done"``, ``"failed"`` or ``"pending"``.
    reason : str
        Of a failure.
    notes : list of str
    achieved : dict of str to float
        Fractions of the model's parameters and FLOPs.
    flops : int or None
        Of one sample.
    accuracy : float or None
        What the user's function gave.
    output : dict or None
        ``loss`` and ``value``: distance of the outputs from the original's on held-out samples.
    latency : dict or None
        See `slr_gpu.batch.work.measure_latency`.
    seconds, joules, peak_bytes : float or None
        Of the fit, where it was made in one go; the latter two of its device and all on it.
    device : str
    threads : int or None
    """

    name: str
    model: str
    budget: str
    settings: str
    keep: dict[str, float]
    status: str = "pending"
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    achieved: dict[str, float] = field(default_factory=dict)
    flops: int | None = None
    accuracy: float | None = None
    output: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    seconds: float | None = None
    joules: float | None = None
    peak_bytes: int | None = None
    device: str = ""
    threads: int | None = None

    @classmethod
    def of(cls, job: Job) -> Outcome:
        return cls(job.name, job.model.name, job.budget, job.settings.name, dict(job.keep))

    def learn(self, marker: dict[str, Any]) -> None:
        """Take what a finished job's marker says."""
        for name in ("achieved", "flops", "output", "joules", "peak_bytes", "device", "threads"):
            setattr(self, name, marker[name])
        self.accuracy = marker["accuracy"]["value"]
        self.seconds = None if marker["resumed"] else marker["seconds"]

    @property
    def line(self) -> str:
        """How it ended, in one line."""
        if self.status != "done":
            return f"{self.name}: {self.status}" + (f", {self.reason}" if self.reason else "")
        kept = ", ".join(f"{name} {share:.2%}" for name, share in self.achieved.items())
        return f"{self.name}: done, kept {kept}"


@dataclass
class Summary:
    """All jobs.

    Attributes
    ----------
    jobs : list of Outcome
    dense : dict of str to dict
        By model: ``accuracy``, ``flops`` and ``latency`` of the dense one.
    analyses : list of dict
        Those made by this run: the jobs that share it, ``seconds``, ``joules``, ``peak_bytes``.
    failures : list of str
        Of measurements, which belong to no single job.
    notes : list of str
    """

    jobs: list[Outcome]
    dense: dict[str, dict[str, Any]] = field(default_factory=dict)
    analyses: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all is there that was asked for."""
        return not self.failures and all(job.status == "done" for job in self.jobs)

    def __getitem__(self, name: str) -> Outcome:
        return next(job for job in self.jobs if job.name == name)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema": SCHEMA, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        save_json(path, self.as_dict())

    def draw(self, path: Path) -> None:
        """Draw the picture with `plot`, or note why not."""
        try:
            self.plot(path)
        except BackendError as error:
            note = f"no {path.name}: {error}"
            self.notes += [] if note in self.notes else [note]

    def table(self) -> Group:
        """A rich renderable: a line a job, the dense models, what failed, what was not measured."""
        rows = {job.name: _row(job) for job in self.jobs}
        for model, dense in self.dense.items():
            speedup = None if dense["latency"] is None else "1"
            rows[f"{model}, dense"] = {
                "accuracy": _number(dense["accuracy"], ".4g"),
                "ms (quartiles)": _ms(dense["latency"]),
                "speed-up": speedup,
            }
        measured = {title for row in rows.values() for title, cell in row.items() if cell}
        table = Table(header_style="bold", pad_edge=False, box=None)
        widest = max(map(len, rows), default=0)
        table.add_column("job", overflow="fold", min_width=min(widest, 20))
        titles = [title for title in _TITLES if title in measured]
        for title in titles:
            table.add_column(title, justify="right", no_wrap=True)
        for name, row in rows.items():
            cells = [row.get(title) or "-" for title in titles] if row else []
            failed = "" if row else f" ({self[name].status})"
            table.add_row(name + failed, *cells)
        lines = [job.line for job in self.jobs if job.status == "failed"]
        lines += self.failures + [f"{job.name}: {n}" for job in self.jobs for n in job.notes]
        lines += self.notes
        absent = [what for title, what in _TITLES.items() if title not in measured]
        if absent:
            lines.append(f"not measured: {', '.join(absent)}")
        losses = sorted({job.output["loss"] for job in self.jobs if job.output})
        if losses:
            lines.append(f"output: {', '.join(losses)} against the dense model, held-out samples")
        return Group(table, Text("\n".join(["", *lines])))

    def print(self, console: Console | None = None) -> None:
        """Print the table."""
        (console or Console()).print(self.table())

    def plot(self, path: Path) -> None:
        """Draw quality against cost, a panel a model, into a PNG.

        Raises
        ------
        BackendError
            Without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise BackendError(
                complain("no matplotlib", "matplotlib for plots", "pip install 'slr_gpu[plot]'")
            ) from error
        models = list(dict.fromkeys(job.model for job in self.jobs))
        figure = Figure(figsize=(5 * len(models), 4), layout="constrained")
        axes = figure.subplots(1, len(models), squeeze=False)[0]
        for model, axis in zip(models, axes, strict=True):
            self._panel(model, axis)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))

    def _panel(self, model: str, axis: Any) -> None:
        jobs = [job for job in self.jobs if job.model == model and job.status == "done"]
        dense = self.dense.get(model, {})
        # One axis for all: what is not known of every job is not used.
        timed = bool(jobs) and all(job.latency is not None for job in jobs)
        judged = bool(jobs) and all(job.accuracy is not None for job in jobs)
        jobs = [job for job in jobs if judged or job.output is not None]

        def x(of: Any) -> float:
            return 1e3 * of["latency"]["median_s"] if timed else of["flops"] / 1e6

        def y(of: Any) -> float:
            return of["accuracy"] if judged else of["output"]["value"]

        for settings in dict.fromkeys(job.settings for job in jobs):
            chosen = [asdict(job) for job in jobs if job.settings == settings]
            chosen.sort(key=x)
            label = settings or None
            axis.plot([x(job) for job in chosen], [y(job) for job in chosen], "o-", label=label)
            for job in chosen:
                place = (x(job), y(job))
                axis.annotate(job["budget"], place, (4, 4), textcoords="offset points", size=8)
        if judged and dense.get("accuracy") is not None and (not timed or dense.get("latency")):
            axis.plot(x(dense), y(dense), "ks", label="dense")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
        names = sorted({job.output["loss"] for job in jobs if job.output})
        axis.set_xlabel("latency, ms" if timed else "FLOPs of one sample, millions")
        axis.set_ylabel("accuracy" if judged else f"output {'/'.join(names)} on held-out samples")
        axis.set_title(model)
        axis.margins(0.15)
        axis.spines[["top", "right"]].set_visible(False)


# Columns, and what to say where nothing of one was measured.
_TITLES = {
    "FLOPs": "FLOPs",
    "params": "parameters",
    "accuracy": "accuracy (no eval)",
    "output": "distance of the outputs",
    "ms (quartiles)": "latency (measure = true)",
    "speed-up": "speed-up",
    "s": "seconds",
    "J": "energy",
    "GiB": "peak memory",
}


def _row(job: Outcome) -> dict[str, str | None]:
    """Cells by title, None for what was not measured; none of a job that is not done."""
    if job.status != "done":
        return {}
    speedup = (job.latency or {}).get("speedup")
    gigabytes = None if job.peak_bytes is None else job.peak_bytes / 2**30
    return {
        "FLOPs": f"{job.achieved['flops']:.1%}".replace("%", " %"),
        "params": f"{job.achieved['params']:.1%}".replace("%", " %"),
        "accuracy": _number(job.accuracy, ".4g"),
        "output": _number(None if job.output is None else job.output["value"], ".3g"),
        "ms (quartiles)": _ms(job.latency),
        "speed-up": None if speedup is None else f"{speedup['ratio']:.2f}x",
        "s": _number(job.seconds, ".1f"),
        "J": _number(job.joules, ".0f"),
        "GiB": _number(gigabytes, ".2f"),
    }


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else f"{value:{form}}"


def _ms(latency: dict[str, Any] | None) -> str | None:
    if latency is None:
        return None
    low, middle, high = (f"{1e3 * latency[name]:.3g}" for name in ("q1_s", "median_s", "q3_s"))
    return f"{middle} ({low}-{high})"
