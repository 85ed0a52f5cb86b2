"""A file of jobs: every model with every budget and every setting, checked before anything runs.

In: a TOML file. Out: a `Batch` of `Job`; or one `InputError` that lists all that is wrong with it.
Paths are relative to the folder of the file, in which modules are looked for too:

    out = "results"              # folder of the results, one folder a job; required
    measure = true               # export all models and time them side by side; or a table:
                                 # {runtime = "onnxruntime", threads = 1, time_limit_s = 60}
    [defaults]                   # settings of all jobs, see below

    [[models]]                   # one or more
    name = "vgg"
    model = "networks:vgg"       # pkg.module:factory, which gives the same model at every call
    weights = "vgg.safetensors"  # optional
    data = "calib.npy"           # or .npz, a folder of .npy files, or pkg.module:loader
    eval = "networks:accuracy"   # optional, function(model) -> float, for the summary alone

    [[budgets]]                  # one or more
    name = "quarter"
    keep = {flops = 0.25}        # params, flops, latency, or several

    [[settings]]                 # optional; by default one that is not named
    name = "refined"
    refine = true

    [[exclude]]                  # optional: combinations to leave out, by one or more names
    model = "vgg"
    settings = "refined"

A setting is an option of `slr_gpu.compress`: form, objective, asymmetric, allocation, samples,
held_out, ridge, ignore, overrides, keep_ends, multiple, batch_size, seed, loss; ``solver`` is a
name or a table with a name and options, ``refine`` true or a table of `slr_gpu.Refinement`,
``latency`` a table of `slr_gpu.LatencyTarget`. ``export`` lists .onnx and .pt2 files for the
folder of a job; ``runtime`` and ``threads`` say where their layers are timed ("auto", "none" or
a runtime).
"""

from __future__ import annotations

import itertools
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from ..analysis import check_allocation, check_latency
from ..budget import check_keep
from ..cli_inputs import import_function, import_object, make_solver
from ..errors import InputError, SLRError, complain
from ..export import check_target
from ..fit import fit
from ..layer_io import LayerIO
from ..layer_seconds import LatencyTarget
from ..output_loss import LOSSES
from ..refine import Refinement
from ..runtime.layer_timing import check_runtime
from ..runtime.timing import check_threads
from ..sample_files import SampleFiles, load_array
from ..sensitivity import check_solver
from ..settings import Settings
from ..solvers import Solver
from .job import Batch, Job, JobSettings, ModelSource
from .schema import Errors, of_table

# Names in the folder of results that no job may have.
RESERVED = ("analyses", "latency", "summary.json", "summary.png", "lock")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
_MODEL = {"name": str, "model": str, "weights": str, "data": str, "eval": str}
_BUDGET = {"name": str, "keep": dict}
_EXCLUDE = {"model": str, "budget": str, "settings": str}
_SETTINGS = {
    "form": str,
    "solver": (str, dict),
    "objective": str,
    "asymmetric": bool,
    "samples": int,
    "held_out": float,
    "ridge": (float, str),
    "ignore": list[str],
    "overrides": dict,
    "keep_ends": bool,
    "multiple": int,
    "batch_size": int,
    "seed": int,
    "allocation": str,
    "loss": str,
    "refine": (bool, dict),
    "latency": dict,
    "export": list[str],
    "runtime": str,
    "threads": int,
}
_TOP = {
    "out": str,
    "measure": (bool, dict),
    "defaults": dict,
    "models": list,
    "budgets": list,
    "settings": list,
    "exclude": list,
}


def read_jobs(path: str | Path) -> Batch:
    """Read and check a file of jobs.

    Raises
    ------
    InputError
        Lists everything that is wrong.
    """
    path = Path(path)
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            complain(f"{path}: {error}", "a TOML file of jobs", "See slr-gpu batch --help.")
        ) from error
    errors = Errors()
    folder = path.resolve().parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    top = errors.typed("file", value, _TOP, ("out", "models", "budgets"))
    measure = _measurement(top.get("measure", False), errors)
    models = _named(top.get("models", []), "models", errors, lambda *x: _model(*x, folder))
    budgets = _named(top.get("budgets", []), "budgets", errors, _budget)
    defaults = errors.typed("defaults", top.get("defaults", {}), _SETTINGS)
    settings = {"": _settings("", defaults, "defaults", errors, measure)}
    if top.get("settings"):
        settings = _named(
            top["settings"],
            "settings",
            errors,
            lambda name, table, where, errors: _settings(
                name, defaults | table, where, errors, measure
            ),
            _SETTINGS,
        )
    for kind in ("models", "budgets"):
        if kind in top and not top[kind]:
            errors.add("file", f"no {kind}", "one or more", f"Add [[{kind}]].")
    skipped = []
    known = {"model": models, "budget": budgets, "settings": settings}
    for number, table in enumerate(top.get("exclude", []), 1):
        where = f"exclude {number}"
        rule = errors.typed(where, table, _EXCLUDE)
        if table == {}:
            errors.add(where, "no names", "one or more of model, budget, settings", "Add one.")
        for kind, name in rule.items():
            if name not in known[kind]:
                names = ", ".join(n for n in known[kind] if n and n[0] != "\0") or "nothing"
                errors.add(where, f"{kind} = {name!r}", f"one of {names}", "Check the name.")
        skipped.append(rule)
    jobs = []
    for (m, model), (b, keep), (s, chosen) in itertools.product(
        models.items(), budgets.items(), settings.items()
    ):
        names = {"model": m, "budget": b, "settings": s}
        if any(rule.items() <= names.items() for rule in skipped if rule):
            continue
        if model is None or keep is None or chosen is None:
            continue
        job = Job(model, b, keep, chosen)
        with errors.at(f"job {job.name!r}"):
            check_latency(keep, chosen.allocation)
            if "latency" in keep:
                check_runtime(chosen.latency.runtime)
        jobs.append(job)
    names = [job.name for job in jobs]
    for name in sorted({n for n in names if names.count(n) > 1 or n in RESERVED}):
        errors.add("jobs", f"the name {name!r} twice or reserved", "others", "Rename a part.")
    if not jobs and not errors.messages:
        errors.add("file", "no jobs that are not excluded", "one or more", "Exclude less.")
    if errors.messages:
        listed = "\n".join(f"  {message}" for message in errors.messages)
        count = len(errors.messages)
        raise InputError(f"{path}: {count} error{'s' if count > 1 else ''}\n{listed}")
    return Batch(folder / top["out"], folder, jobs, measure)


def _named(
    tables: list,
    kind: str,
    errors: Errors,
    make: Callable[[str, dict, str, Errors], Any],
    types: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What is made of a list of tables, by their names; None for those that have errors."""
    types = {"name": str, **(types or (_MODEL if kind == "models" else _BUDGET))}
    made: dict[str, Any] = {}
    for number, table in enumerate(tables, 1):
        name = table.get("name") if isinstance(table, dict) else None
        where = f"{kind} {number}" + (f" ({name!r})" if isinstance(name, str) else "")
        before = len(errors.messages)
        required = ("name", *{"models": ("model", "data"), "budgets": ("keep",)}.get(kind, ()))
        good = errors.typed(where, table, types, required)
        name = good.pop("name", None)
        if name is not None and not _NAME.fullmatch(name):
            errors.add(where, f"name = {name!r}", "letters, digits and _.+=-", "Rename it.")
        if name in made:
            errors.add(where, f"name = {name!r} twice", "names that differ", "Rename one.")
        result = make(name or "", good, where, errors)
        made[name or f"\0{number}"] = result if len(errors.messages) == before else None
    return made


def _model(name: str, table: dict, where: str, errors: Errors, folder: Path) -> ModelSource:
    for key in ("model", "eval"):
        if key in table:
            with errors.at(where):
                import_function(table[key], key)
    if "weights" in table:
        table["weights"] = str(folder / table["weights"])
        try:
            with safe_open(table["weights"], framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            what = f"weights = {table['weights']!r}: {error}"
            errors.add(where, what, "a safetensors file", "Check the path.")
    if "data" in table:
        data = table["data"]
        if data and (folder / data).exists() or data.endswith((".npy", ".npz")):
            table["data"] = str(folder / data)
            with errors.at(where):
                # That files can be read, and those of a folder fit each other.
                check = load_array if data.endswith(".npz") else SampleFiles
                check(folder / data)
        else:
            with errors.at(where):
                import_object(data, "data")
    return ModelSource(name, **{"model": "", "data": "", **table})


def _budget(name: str, table: dict, where: str, errors: Errors) -> dict[str, float] | None:
    keep = None
    if "keep" in table:
        with errors.at(where):
            keep = check_keep(table["keep"])
    return keep


def _measurement(value: bool | dict, errors: Errors) -> LatencyTarget | None:
    if value is False:
        return None
    with errors.at("measure"):
        measure = of_table(LatencyTarget, {} if value is True else value)
        check_target("model.onnx")
        check_runtime(measure.runtime)
        return measure
    return None


def _settings(
    name: str, table: dict, where: str, errors: Errors, measure: LatencyTarget | None
) -> JobSettings | None:
    """The settings of one name, each part checked by what it is for."""
    table, before = dict(table), len(errors.messages)
    options: dict[str, Any] = {}
    with errors.at(f"{where}, refine"):
        refine = table.pop("refine", False)
        if isinstance(refine, dict):
            refine = of_table(Refinement, refine)
        options["refinement"] = Refinement.of(refine)
    with errors.at(f"{where}, latency"):
        options["latency"] = of_table(LatencyTarget, table.pop("latency", {}))
    with errors.at(f"{where}, solver"):
        solver = table.pop("solver", "majorize")
        solver = {"name": solver} if isinstance(solver, str) else dict(solver)
        known = make_solver(str(solver.pop("name", "")))
        solver = of_table(type(known), solver)
    export = table.pop("export", [])
    if measure is not None and not any(file.endswith(".onnx") for file in export):
        export = [*export, "model.onnx"]
    for file in export:
        with errors.at(f"{where}, export"):
            check_target(file)
            if not _NAME.fullmatch(file):
                errors.add(where, f"export of {file!r}", "the name of a file", "Rename it.")
    options["export"] = tuple(dict.fromkeys(export))
    runtime = table.pop("runtime", "auto")
    options["runtime"] = None if runtime == "none" else runtime
    if runtime not in ("auto", "none"):
        with errors.at(f"{where}, runtime"):
            check_runtime(runtime)
    options["threads"] = table.pop("threads", 1)
    with errors.at(f"{where}, threads"):
        check_threads(options["threads"])
    options["loss"] = table.pop("loss", "auto")
    if options["loss"] not in ("auto", *LOSSES):
        names = ", ".join(("auto", *LOSSES))
        errors.add(where, f"loss = {options['loss']!r}", f"one of {names}", "Check the name.")
    allocation = table.pop("allocation", None)
    if len(errors.messages) > before:
        return None
    with errors.at(where):
        prepared = _prepared(solver, table)
        if allocation is None:
            allocation = "output" if prepared.solver.takes_structures else "uniform"
        check_solver(prepared, check_allocation(allocation))
        return JobSettings(name, prepared, allocation, **options)
    return None


def _prepared(solver: Solver, table: dict) -> Settings:
    """The settings of layers, tried on a tiny one: some values only the fit looks at."""
    try:
        rng = np.random.default_rng(table.get("seed", 0))
        arrays = LayerIO(rng.normal(size=(6, 8)), None, rng.normal(size=(64, 8)))
        settings = Settings(solver=solver, **table)
        how = {name: getattr(settings, name) for name in ("objective", "held_out", "ridge")}
        fit(arrays, keep=0.5, solver=solver, **how)
    except (TypeError, ValueError) as error:
        if isinstance(error, SLRError):
            raise
        raise InputError(
            complain(f"settings that fail ({error})", "those of slr_gpu.compress", "Check them.")
        ) from error
    return settings
