"""What workers do for jobs, each step going on where one that was killed stopped.

In: a `Place` and jobs. Out: files in the folder of results, and what was found out:

    open      which jobs of an analysis are done, which cannot be, what memory the others need
    analyse   analyses/<model>/<digest>/analysis.json, shared by all budgets
    plan      the plan of a latency budget, found by timing
    fit       <job>/model.safetensors, plan.json, report.json, and last job.json, the sign that
              they are whole and of which model, data, settings and budget
    export    the files asked for
    measure   latency/<model>.json: the exported models of a model side by side

While a job is at work its pieces are in <job>/checkpoint.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..analysis import Analysis
from ..batches import run_model
from ..carry_out import carry_out
from ..checkpoint import Store, as_stored, changes, fingerprint
from ..cli_inputs import calibration_data, import_object, load_model
from ..compress import make_plan
from ..errors import InputError, ModelError, SLRError, complain
from ..export import export_model
from ..layer_seconds import LatencyTarget
from ..output_loss import choose_loss, mean_loss
from ..plan import Plan
from ..prepare import Prepared
from ..report import Report
from ..result import Result, load
from ..runtime import bench
from ..sensitivity import judging_batches, measure
from ..storage import load_json, save_json
from .devices import Meter, needed_bytes
from .folders import (
    CHECKPOINT,
    MARKER,
    SCHEMA,
    Place,
    export_settings,
    missing_steps,
    not_exported,
    onnx_file,
    read_marker,
)
from .job import Job, ModelSource


@dataclass
class Opened:
    """What is left to do for the jobs of one analysis.

    Attributes
    ----------
    facts : dict
        Of the model, the data and the settings of layers.
    needed : int
        Bytes of device memory that suit the jobs.
    analysed : bool
    accuracy : float or None
        Of the dense model.
    totals : dict of str to float
        What the dense model costs.
    missing : dict of str to set of str
        By job: "fit", "export".
    refused : dict of str to str
        By job: why it cannot be done.
    """

    facts: dict[str, Any]
    needed: int
    analysed: bool
    accuracy: float | None
    totals: dict[str, float]
    missing: dict[str, set[str]]
    refused: dict[str, str]


def open_jobs(place: Place, jobs: list[Job]) -> Opened:
    """Look at the jobs of one analysis; on the CPU."""
    first = jobs[0]
    prepared, facts = _prepare(first, "cpu")
    missing, refused = {}, {}
    for job in jobs:
        try:
            missing[job.name] = missing_steps(place, job, prepared, facts)
        except SLRError as error:
            refused[job.name] = str(error)
    accuracy = None
    needed, totals = needed_bytes(prepared), dict(prepared.totals)
    store = place.analysis(first, facts)
    if first.model.eval is not None:
        known = store.load_json("dense")
        if known is None or known["eval"] != first.model.eval:
            value = _evaluate(first.model, prepared.source)
            known = {"eval": first.model.eval, "accuracy": value}
            store.save_json("dense", known)
        accuracy = known["accuracy"]
    analysed = store.path("analysis", ".json").exists()
    return Opened(facts, needed, analysed, accuracy, totals, missing, refused)


def analyse(place: Place, job: Job, facts: dict[str, Any]) -> dict[str, Any]:
    """Make the analysis that a job shares with others; what it took."""
    store, settings = place.analysis(job, facts), job.settings
    began, layers = time.perf_counter(), store.part("layers")
    with Meter(place.gpu) as meter:
        prepared = _prepare_again(job, place.device, facts)
        analysis = measure(prepared, settings.allocation, settings.loss, None, layers)
    analysis.save(store.path("analysis", ".json"))
    shutil.rmtree(layers.folder, ignore_errors=True)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "joules": meter.joules, "peak_bytes": meter.peak_bytes}


def plan(place: Place, job: Job, facts: dict[str, Any]) -> None:
    """Find the plan of a latency budget; nothing else may run meanwhile."""
    store = place.pieces(job, facts)
    if store.load_json("plan") is None:
        prepared = _prepare_again(job, place.device, facts)
        analysis = _load_analysis(place, job, facts)
        found = make_plan(prepared, analysis, job.keep, job.settings.latency)
        store.save_json("plan", found.as_dict())


def fit(place: Place, job: Job, facts: dict[str, Any]) -> dict[str, Any]:
    """Make, save and judge the compressed model of a job; what its marker says."""
    folder = place.job(job)
    marker = read_marker(folder)
    model = None
    if marker is None:
        with Meter(place.gpu) as meter:
            marker, model = _fit(place, job, facts)
        if not marker["resumed"]:  # else some of it was used before
            marker["joules"], marker["peak_bytes"] = meter.joules, meter.peak_bytes
        save_json(folder / MARKER, marker)
    Store(folder / CHECKPOINT).clear()
    if job.model.eval != marker["accuracy"]["eval"]:
        value = None
        if job.model.eval is not None:
            value = _evaluate(job.model, model or load(folder, _factory(job.model)))
        marker["accuracy"] = {"eval": job.model.eval, "value": value}
        save_json(folder / MARKER, marker)
    return marker


def export(place: Place, job: Job, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the files that a finished job lacks; what its marker says then."""
    folder, settings = place.job(job), job.settings
    marker = load_json(folder / MARKER)
    prepared = _prepare_again(job, "cpu", facts)
    result = Result(
        load(folder, _factory(job.model)),
        Report.from_dict(load_json(folder / "report.json")),
        load_json(folder / "plan.json"),
        prepared.example,
    )
    for name in not_exported(place, job, marker):
        exported = result.export(folder / name, runtime=settings.runtime, threads=settings.threads)
        marker["exports"][name] = export_settings(job) | {"error": exported.error}
        result.save_report(folder)
        save_json(folder / MARKER, marker)
    return marker


def measure_latency(
    place: Place, jobs: list[Job], facts: dict[str, Any], target: LatencyTarget
) -> dict[str, Any]:
    """Time the exported models of one model beside the dense one; nothing else may run.

    Returns
    -------
    dict of label to dict
        Of every job, and of ``dense``: seconds (median and quartiles), speed-up with its interval.
    """
    folder, name = place.out / "latency", jobs[0].model.name
    files = {job.name: place.job(job) / onnx_file(job) for job in jobs}
    record = folder / f"{name}.json"
    key = {"model": facts["model"], "target": target.as_dict()}
    key["files"] = {label: _digest(path) for label, path in files.items()}
    if record.exists():
        known = load_json(record)
        if known["of"] == key:
            return known["latency"]
    prepared = _prepare_again(jobs[0], "cpu", facts)
    dense = folder / f"{name}.onnx"
    export_model(prepared.source, dense, prepared.example)
    found = bench(
        {"dense": dense, **files},
        prepared.example,
        runtimes=[target.runtime],
        threads=target.threads,
        time_limit_s=target.time_limit_s,
    )
    rows = {row["model"]: row for row in found.as_dict()["latencies"]}
    names = ("runtime", "median_s", "q1_s", "q3_s", "speedup", "agrees")
    latency = {
        label: {key: row[key] for key in names} | {"threads": target.threads}
        for label, row in rows.items()
    }
    save_json(record, {"of": key, "latency": latency, "bench": found.as_dict()})
    return latency


TASKS: dict[str, Callable[..., Any]] = {
    "open": open_jobs,
    "analyse": analyse,
    "plan": plan,
    "fit": fit,
    "export": export,
    "measure": measure_latency,
}


def _prepare(job: Job, device: str) -> tuple[Prepared, dict[str, Any]]:
    source = job.model
    weights = None if source.weights is None else Path(source.weights)
    model = load_model(source.model, weights)
    prepared = Prepared(model, calibration_data(source.data), job.settings.prepared, device)
    facts = fingerprint(prepared)
    del facts["device"]  # any will do to go on
    return prepared, facts


def _prepare_again(job: Job, device: str, facts: dict[str, Any]) -> Prepared:
    prepared, now = _prepare(job, device)
    changed = changes(as_stored(facts), as_stored(now))
    if changed:
        raise InputError(
            complain(
                f"at another call, of {job.model.model} or {job.model.data}: {'; '.join(changed)}",
                "the same model and data at every call",
                "Name weights, and seed what is random.",
            )
        )
    return prepared


def _fit(place: Place, job: Job, facts: dict[str, Any]) -> tuple[dict[str, Any], nn.Module]:
    began, folder, settings = time.perf_counter(), place.job(job), job.settings
    resumed = (folder / CHECKPOINT / "layers").exists()
    prepared = _prepare_again(job, place.device, facts)
    store = place.pieces(job, facts)
    known = store.load_json("plan")
    if known is None:
        planned = _load_analysis(place, job, facts).allocate(job.keep)
        store.save_json("plan", planned.as_dict())
    else:
        planned = Plan.from_dict(known)
    result = carry_out(prepared, planned, settings.loss, settings.refinement, store, True)
    result.report.seconds = time.perf_counter() - began
    result.save(folder)
    marker = {
        "schema": SCHEMA,
        "job": job.name,
        "facts": as_stored(facts | job.facts()),
        "achieved": result.report.achieved,
        "flops": result.report.flops_kept,
        "output": _output_loss(prepared, result.model, settings.loss),
        "accuracy": {"eval": None, "value": None},
        "seconds": result.report.seconds,
        "resumed": resumed,
        "device": prepared.ops.device,
        "threads": place.threads,
        "joules": None,
        "peak_bytes": None,
        "exports": {},
    }
    return marker, result.model


def _output_loss(prepared: Prepared, model: nn.Module, loss: str) -> dict[str, Any] | None:
    """How far outputs are from the original's on samples that no layer was fitted on."""
    original = prepared.original.cpu()
    modes = {module: module.training for module in model.modules()}
    model.eval()
    batches = judging_batches(prepared)
    with torch.no_grad():
        try:
            name = choose_loss(loss, run_model(original, prepared.few_samples))
        except ModelError:
            return None  # nothing that can be compared
        wanted = [run_model(original, batch) for batch in batches]
        value = mean_loss(name, wanted, (run_model(model, batch) for batch in batches))
    for module, training in modes.items():
        module.training = training
    return {"loss": name, "value": value}


def _evaluate(source: ModelSource, model: nn.Module) -> float:
    value = float(import_object(source.eval, "eval")(model.eval()))
    if not math.isfinite(value):
        raise InputError(complain(f"{value} from {source.eval}", "a finite number", "Check it."))
    return value


def _factory(source: ModelSource) -> Callable[[], nn.Module]:
    return import_object(source.model, "model")


def _load_analysis(place: Place, job: Job, facts: dict[str, Any]) -> Analysis:
    return Analysis.load(place.analysis(job, facts).path("analysis", ".json"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
