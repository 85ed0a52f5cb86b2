"""The command line: ``slr-gpu demo | compress | analyze | allocate | apply | batch | bench | doctor``.

In: arguments. Out: tables on standard output, files in a folder, exit status 1 with one clear
message when the input cannot be worked with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from .cli_inputs import (
    calibration_data,
    clear_errors,
    import_object,
    label_models,
    load_data,
    load_model,
    make_refinement,
    make_solver,
    parse_bytes,
    parse_keep,
    parse_shapes,
)
from .cli_options import (
    Allocation,
    Asymmetric,
    BatchSize,
    Data,
    Device,
    Export,
    Form,
    Ignore,
    Keep,
    KeepEnds,
    Loss,
    MemoryLimit,
    Model,
    Objective,
    Out,
    Picture,
    Refine,
    RefineEpochs,
    Resume,
    Runtime,
    Samples,
    Seed,
    Solver,
    SpillDir,
    Threads,
    Weights,
)
from .errors import InputError, complain
from .parallel import ranks

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Compress trained networks to column-sparse plus low-rank layers.",
)


@app.command()
def compress(
    model: Model,
    data: Data,
    keep: Keep,
    out: Out,
    weights: Weights = None,
    form: Form = "auto",
    solver: Solver = "majorize",
    objective: Objective = "activation",
    allocation: Allocation = None,
    loss: Loss = "auto",
    samples: Samples = 15_000,
    batch_size: BatchSize = 100,
    ignore: Ignore = [],
    keep_ends: KeepEnds = True,
    asymmetric: Asymmetric = True,
    seed: Seed = 0,
    refine: Refine = False,
    refine_epochs: RefineEpochs = None,
    resume: Resume = False,
    device: Device = "cpu",
    spill_dir: SpillDir = None,
    memory_limit: MemoryLimit = None,
    export: Export = [],
    runtime: Runtime = "auto",
    threads: Threads = 1,
) -> None:
    """Compress a model on unlabelled calibration data."""
    with clear_errors():
        from .compress import compress as run

        _check_export(export, runtime, threads)
        budget, chosen = parse_keep(keep), make_solver(solver)
        with ranks(device) as group:
            result = run(
                load_model(model, weights),
                calibration_data(data),
                budget,
                form=form,
                solver=chosen,
                objective=objective,
                allocation=allocation,
                loss=loss,
                samples=samples,
                batch_size=batch_size,
                ignore=ignore,
                keep_ends=keep_ends,
                asymmetric=asymmetric,
                seed=seed,
                refine=make_refinement(refine, refine_epochs),
                checkpoint=out / _CHECKPOINT,
                resume=resume,
                device=device,
                spill_dir=spill_dir,
                memory_limit=parse_bytes(memory_limit),
                group=group,
            )
        if group.rank == 0:
            _write(result, out, export, runtime, threads)


@app.command()
def analyze(
    model: Model,
    data: Data,
    out: Out,
    keep: Annotated[
        str | None,
        typer.Option(help="Also write a plan for this budget; for one of latency, time layers."),
    ] = None,
    weights: Weights = None,
    form: Form = "auto",
    solver: Solver = "majorize",
    objective: Objective = "activation",
    allocation: Allocation = None,
    loss: Loss = "auto",
    samples: Samples = 15_000,
    batch_size: BatchSize = 100,
    ignore: Ignore = [],
    keep_ends: KeepEnds = True,
    asymmetric: Asymmetric = True,
    seed: Seed = 0,
    device: Device = "cpu",
    spill_dir: SpillDir = None,
    memory_limit: MemoryLimit = None,
    picture: Picture = None,
) -> None:
    """Measure what each layer loses at what cost: analysis.json, and plan.json with --keep."""
    with clear_errors():
        from .budget import check_keep
        from .checkpoint import Store
        from .layer_seconds import LatencyTarget
        from .sensitivity import analyze as run

        budget = {} if keep is None else check_keep(parse_keep(keep))
        if budget:
            _check_plan_file(out / "plan.json", picture)
        elif picture is not None:
            raise InputError(complain("--picture without --keep", "a plan to draw", "Add --keep."))
        with ranks(device) as group:
            analysis = run(
                load_model(model, weights),
                calibration_data(data),
                allocation=allocation or "output",
                form=form,
                solver=make_solver(solver),
                objective=objective,
                loss=loss,
                samples=samples,
                batch_size=batch_size,
                ignore=tuple(ignore),
                keep_ends=keep_ends,
                asymmetric=asymmetric,
                seed=seed,
                latency=LatencyTarget() if "latency" in budget else None,
                cache=out / _ANALYSIS,
                device=device,
                spill_dir=spill_dir,
                memory_limit=parse_bytes(memory_limit),
                group=group,
            )
        if group.rank:
            return
        analysis.save(out / "analysis.json")
        Store.clear_named(out / _ANALYSIS)
        Console().print(f"written to {out}: analysis.json")
        if budget:
            _write_plan(analysis.allocate(budget), out / "plan.json", picture)


@app.command()
def allocate(
    analysis: Annotated[Path, typer.Argument(help="analysis.json.")],
    keep: Keep,
    out: Annotated[Path, typer.Option(help="Where to write the plan.")],
    allocation: Allocation = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="With FLOPs: part of the loss to give up for less work, 0 for none."),
    ] = None,
    picture: Picture = None,
) -> None:
    """Spend a budget by an analysis: a plan that can be edited."""
    with clear_errors():
        from .analysis import TOLERANCE, Analysis

        budget = parse_keep(keep)
        _check_plan_file(out, picture)
        tolerance = TOLERANCE if tolerance is None else tolerance
        _write_plan(Analysis.load(analysis).allocate(budget, allocation, tolerance), out, picture)


@app.command()
def apply(
    model: Model,
    data: Data,
    plan: Annotated[Path, typer.Option(help="plan.json, as written or edited.")],
    out: Out,
    weights: Weights = None,
    loss: Loss = "auto",
    refine: Refine = False,
    refine_epochs: RefineEpochs = None,
    resume: Resume = False,
    device: Device = "cpu",
    spill_dir: SpillDir = None,
    memory_limit: MemoryLimit = None,
    export: Export = [],
    runtime: Runtime = "auto",
    threads: Threads = 1,
) -> None:
    """Carry out a plan."""
    with clear_errors():
        from .compress import apply as run
        from .plan import Plan

        _check_export(export, runtime, threads)
        with ranks(device) as group:
            result = run(
                load_model(model, weights),
                calibration_data(data),
                Plan.load(plan),
                loss=loss,
                refine=make_refinement(refine, refine_epochs),
                checkpoint=out / _CHECKPOINT,
                resume=resume,
                device=device,
                spill_dir=spill_dir,
                memory_limit=parse_bytes(memory_limit),
                group=group,
            )
        if group.rank == 0:
            _write(result, out, export, runtime, threads)


# Folders of finished pieces inside the folder of the result.
_CHECKPOINT = "checkpoint"
_ANALYSIS = "analysis-checkpoint"


def _check_export(export: list[str], runtime: str, threads: int) -> None:
    """Refuse files that cannot be written, and runtimes that do not work, before any work."""
    from .export import check_target
    from .runtime.layer_timing import check_runtime
    from .runtime.timing import check_threads

    check_threads(threads)
    if runtime not in ("auto", "none"):
        check_runtime(runtime)
    for name in export:
        check_target(name)


def _write(result: Any, out: Path, export: list[str], runtime: str, threads: int) -> None:
    """Save a result, and only when all is written forget the pieces it was made of."""
    from .checkpoint import Store

    result.save(out)
    result.report.print()
    Console().print(f"written to {out}: model.safetensors, plan.json, report.json")
    for name in export:
        chosen_runtime = None if runtime == "none" else runtime
        exported = result.export(out / name, runtime=chosen_runtime, threads=threads)
        Console().print(exported.table())
        Console().print(f"written to {out}: {name}, relative error {exported.error:.1e}")
    if export:
        result.save_report(out)  # once more, with the graphs that were chosen
    Store(out / _CHECKPOINT).clear()


def _check_plan_file(path: Path, picture: Path | None) -> None:
    """Refuse places for a plan that are taken, and pictures of no known kind, before any work."""
    from .plan_plot import check_picture
    from .storage import load_json

    if picture is not None:
        check_picture(picture)
    if path.is_dir():
        raise InputError(complain(f"{path}, a folder", "the name of a file", "Add plan.json."))
    if path.exists() and "folded" in load_json(path):
        raise InputError(
            complain(
                f"{path}, which belongs to a compressed model", "another file", "Change --out."
            )
        )


def _write_plan(plan: Any, path: Path, picture: Path | None) -> None:
    plan.save(path)
    plan.print()
    Console().print(f"written: {path}")
    if picture is not None:
        plan.plot(picture)
        Console().print(f"written: {picture}")


class _WithSchema(TyperCommand):
    """A command whose help ends with what its file looks like."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from .batch import jobs

        super().format_help(ctx, formatter)
        formatter.write(f"{jobs.__doc__}")


@app.command(cls=_WithSchema)
def batch(
    jobs: Annotated[Path, typer.Argument(help="TOML file of jobs.")],
    device: Annotated[str, typer.Option(help="auto, cuda (a worker a GPU) or cpu.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="On the CPU; by default 1.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace results of other models, data or settings.")
    ] = False,
) -> None:
    """Do all jobs of a file, models x budgets x settings; run again, only what is missing."""
    with clear_errors():
        from .batch import run_batch

        summary = run_batch(jobs, device=device, workers=workers, force=force)
    summary.print()
    if not summary.ok:
        raise typer.Exit(1)


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help=".onnx or .pt2 files, the dense one first.")],
    threads: Annotated[int, typer.Option(help="Of every runtime.")] = 1,
    batch: Annotated[int, typer.Option(help="First size of inputs that leave it free.")] = 1,
    shape: Annotated[list[str], typer.Option(help="For example input=1x3x224x224.")] = [],
    runtime: Annotated[
        list[str], typer.Option(help="pytorch, torch.compile, onnxruntime or openvino; else all.")
    ] = [],
    time_limit: Annotated[float, typer.Option(help="Seconds for the timing.")] = 60.0,
    precision: Annotated[float, typer.Option(help="Relative width of the intervals.")] = 0.03,
    data: Annotated[
        str | None, typer.Option(help="calib.npy, calib.npz or pkg.module:loader; else random.")
    ] = None,
    eval: Annotated[
        str | None, typer.Option(help="pkg.module:function; function(run) gives the accuracy.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.png.")] = None,
    layers: Annotated[bool, typer.Option(help="Show the slowest nodes.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order of the runs and random inputs.")] = 0,
) -> None:
    """Measure the latency of models side by side in the stock CPU runtimes."""
    with clear_errors():
        from .runtime import bench as run

        result = run(
            label_models(models),
            None if data is None else load_data(data),
            runtimes=runtime or None,
            threads=threads,
            batch=batch,
            shapes=parse_shapes(shape),
            time_limit_s=time_limit,
            precision=precision,
            eval_fn=None if eval is None else import_object(eval, "--eval"),
            out=out,
            seed=seed,
        )
        result.print(layers=layers)
        if out is not None:
            Console().print(f"written to {out}: {', '.join(result.written)}")


@app.command()
def demo(
    keep: Annotated[float, typer.Option(help="Fraction of the FLOPs to keep.")] = 0.25,
    seed: Annotated[int, typer.Option(help="Of training and of the choice of rows.")] = 0,
) -> None:
    """Train a small network on scikit-learn's digits and compress it to a quarter of its FLOPs."""
    with clear_errors():
        from . import demo as job

        job.run(keep, seed)


@app.command()
def doctor() -> None:
    """Say what is installed, which backends work, and how to get the rest."""
    from . import doctor as job

    job.run()


if __name__ == "__main__":
    app()
