"""The folder of results: where what lies, and what of it is whole.

In: a `Place` and jobs. Out: paths, `Store` objects, and the steps that a job still needs. The
marker in the folder of a job is written last, and says what its result was made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import FACTS, PROGRAM, Store, as_stored, changes
from ..compress import check_budget
from ..errors import InputError, complain
from ..prepare import Prepared
from ..storage import load_json
from .job import Job

MARKER = "job.json"
# What `Result.save` writes.
FILES = ("model.safetensors", "plan.json", "report.json")
CHECKPOINT = "checkpoint"
SCHEMA = 1


@dataclass(frozen=True)
class Place:
    """Where a worker works.

    Attributes
    ----------
    out : Path
        Folder of all results.
    folder : Path
        In which modules are looked for.
    device : str
        ``"cpu"``, or ``"cuda"`` where the worker sees one device only.
    gpu : str or None
        The UUID of that.
    threads : int
        Of the CPU.
    force : bool
        Make jobs anew whose folder holds the result of other facts.
    """

    out: Path
    folder: Path
    device: str = "cpu"
    gpu: str | None = None
    threads: int = 1
    force: bool = False

    def job(self, job: Job) -> Path:
        return self.out / job.name

    def analysis(self, job: Job, facts: dict[str, Any]) -> Store:
        more = {"allocation": job.settings.allocation, "loss": job.settings.loss}
        return Store.named(self.out / "analyses" / job.model.name, facts | more)

    def pieces(self, job: Job, facts: dict[str, Any]) -> Store:
        """Of a job at work."""
        return Store.open(self.job(job) / CHECKPOINT, facts | job.facts(), resume=True)


def missing_steps(place: Place, job: Job, prepared: Prepared, facts: dict[str, Any]) -> set[str]:
    """The steps that a job still needs; an error if it cannot be done."""
    folder = place.job(job)
    for name in (MARKER, *FILES):  # of a run that was killed while it wrote
        for path in folder.glob(f".{name}.*"):
            path.unlink()
    marker, begun = read_marker(folder), folder / CHECKPOINT / FACTS
    before, now = None, as_stored(facts | job.facts())
    if marker is not None:
        # A finished result stays one where the program is another now; pieces of two are not mixed.
        before = marker["facts"] | {PROGRAM: now[PROGRAM]}
    elif begun.exists():
        before = load_json(begun)
    changed = [] if before is None else changes(before, now)
    if changed and not place.force:
        raise InputError(
            complain(
                f"a result of another run in {folder}: {'; '.join(changed)}",
                "the same version, model, data, settings and budget",
                "Undo the changes, name another job or out, or make it anew with --force.",
            )
        )
    if changed:
        for name in {} if marker is None else marker["exports"]:
            (folder / name).unlink(missing_ok=True)
        (folder / MARKER).unlink(missing_ok=True)
        Store(folder / CHECKPOINT).clear()
        marker = None
    if marker is None:
        check_budget(prepared, job.keep, job.settings.allocation)
        return {"fit", "export"} if job.settings.export else {"fit"}
    return {"export"} if not_exported(place, job, marker) else set()


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What the folder of a finished job says; None where anything is missing."""
    path = folder / MARKER
    if not all((folder / name).exists() for name in (MARKER, *FILES)):
        return None
    marker = load_json(path)
    if not isinstance(marker, dict) or marker.get("schema") != SCHEMA:
        raise InputError(
            complain(f"{path} of another schema", f"schema {SCHEMA}", "Remove the folder.")
        )
    return marker


def not_exported(place: Place, job: Job, marker: dict[str, Any]) -> list[str]:
    """Files that a finished job lacks, or has of other settings."""

    def same(name: str) -> bool:
        made = export_settings(job).items() <= marker["exports"].get(name, {}).items()
        return made and (place.job(job) / name).exists()

    return [name for name in job.settings.export if not same(name)]


def export_settings(job: Job) -> dict[str, Any]:
    """What exported files depend on beside the model."""
    return {"runtime": job.settings.runtime, "threads": job.settings.threads}


def onnx_file(job: Job) -> str:
    """The exported file of a job that is timed."""
    return next(name for name in job.settings.export if name.endswith(".onnx"))
