"""The command line: ``slr-gpu demo | compress | bench | doctor``.

In: arguments. Out: tables on standard output, files in a folder, exit status 1 with one clear
message when the input cannot be worked with.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .errors import BackendError, InputError, SLRError, complain

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Compress trained networks to column-sparse plus low-rank layers.",
)


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn this package's errors into one line and exit status 1."""
    try:
        yield
    except SLRError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _import(reference: str, option: str) -> Any:
    """The object that ``pkg.module:name`` names."""
    module_name, _, name = reference.partition(":")
    if not name:
        raise InputError(
            complain(f"{option} {reference!r}", "pkg.module:name", "For example models.vgg:make.")
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the user, as with python -m
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            complain(
                f"{option} {reference!r}: {error}",
                "a name that can be imported",
                "Run from the folder of the module, or install it.",
            )
        ) from error


def _parse_keep(text: str) -> dict[str, float]:
    """``flops=0.25,params=0.5`` as a dict."""
    keep = {}
    for part in text.split(","):
        resource, _, fraction = part.partition("=")
        try:
            keep[resource.strip()] = float(fraction)
        except ValueError as error:
            raise InputError(
                complain(f"--keep {text!r}", "flops=0.25 or params=0.25", "Join several by commas.")
            ) from error
    return keep


def _solver(name: str) -> Any:
    from .solvers import SOLVERS

    if name not in SOLVERS:
        raise InputError(
            complain(f"--solver {name}", f"one of {', '.join(SOLVERS)}", "Check the name.")
        )
    return SOLVERS[name]()


def _load_data(reference: str) -> Any:
    """Calibration data from a .npy or .npz file or from ``pkg.module:loader``."""
    import numpy as np

    if not reference.endswith((".npy", ".npz")):
        loader = _import(reference, "--data")
        return loader() if callable(loader) else loader
    try:
        data = np.load(reference, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            complain(f"--data {reference}: {error}", "a whole .npy or .npz file", "Check the path.")
        ) from error
    if reference.endswith(".npz"):
        data = data[data.files[0]]
    return data if data.dtype.kind in "iub" else data.astype(np.float32)


def _parse_shapes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    """``input=1x3x224x224``, several times, as a dict."""
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        parts = sizes.split("x")
        if not name or not all(part.isdigit() and int(part) for part in parts):
            raise InputError(
                complain(f"--shape {text!r}", "input=1x3x224x224", "Repeat it for several inputs.")
            )
        shapes[name] = tuple(map(int, parts))
    return shapes


def _label_models(paths: list[Path]) -> dict[str, list[Path]]:
    """Labels of model files; files that differ only in their ending are one model."""
    stems = list(dict.fromkeys(path.with_suffix("") for path in paths))
    names = [stem.name for stem in stems]
    return {
        stem.name if names.count(stem.name) == 1 else stem.as_posix(): [
            path for path in paths if path.with_suffix("") == stem
        ]
        for stem in stems
    }


def _load_model(reference: str, weights: Path | None) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = _import(reference, "--model")()
    if weights is not None:
        try:
            model.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(
                complain(
                    f"--weights {weights}: {error}",
                    "a safetensors file of this model's state_dict",
                    "Check the path and the model.",
                )
            ) from error
    return model


@app.command()
def compress(
    model: Annotated[str, typer.Option(help="pkg.module:factory that makes the model.")],
    data: Annotated[str, typer.Option(help="calib.npy, calib.npz or pkg.module:loader.")],
    keep: Annotated[str, typer.Option(help="For example flops=0.25 or flops=0.25,params=0.5.")],
    out: Annotated[Path, typer.Option(help="Folder for the result.")],
    weights: Annotated[Path | None, typer.Option(help="safetensors file of its weights.")] = None,
    form: Annotated[str, typer.Option(help="auto, or a form of the solver.")] = "auto",
    solver: Annotated[str, typer.Option(help="majorize, or one of the rivals.")] = "majorize",
    objective: Annotated[str, typer.Option(help="activation or linear.")] = "activation",
    allocation: Annotated[str, typer.Option(help="uniform or pca_energy.")] = "uniform",
    samples: Annotated[int, typer.Option(help="Input rows sampled a layer.")] = 15_000,
    ignore: Annotated[list[str], typer.Option(help="Layers to leave dense.")] = [],
    keep_ends: Annotated[bool, typer.Option(help="Leave the first and last layer dense.")] = True,
    asymmetric: Annotated[bool, typer.Option(help="Fit on the compressed prefix's inputs.")] = True,
    seed: Annotated[int, typer.Option(help="Of the choice of rows.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:<index> or auto.")] = "cpu",
    export: Annotated[
        list[str], typer.Option(help="Also write this .onnx or .pt2 file into the folder.")
    ] = [],
    runtime: Annotated[
        str, typer.Option(help="Where exported layers are timed: auto, none or a runtime.")
    ] = "auto",
    threads: Annotated[int, typer.Option(help="Of that runtime.")] = 1,
) -> None:
    """Compress a model on unlabelled calibration data."""
    with _clear_errors():
        from .compress import compress as run
        from .export import check_target
        from .runtime.layer_timing import check_runtime

        if runtime not in ("auto", "none"):
            check_runtime(runtime)

        for name in export:
            check_target(name)
        budget, chosen = _parse_keep(keep), _solver(solver)
        result = run(
            _load_model(model, weights),
            _load_data(data),
            budget,
            form=form,
            solver=chosen,
            objective=objective,
            allocation=allocation,
            samples=samples,
            ignore=ignore,
            keep_ends=keep_ends,
            asymmetric=asymmetric,
            seed=seed,
            device=device,
        )
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
    with _clear_errors():
        from .runtime import bench as run

        result = run(
            _label_models(models),
            None if data is None else _load_data(data),
            runtimes=runtime or None,
            threads=threads,
            batch=batch,
            shapes=_parse_shapes(shape),
            time_limit_s=time_limit,
            precision=precision,
            eval_fn=None if eval is None else _import(eval, "--eval"),
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
    with _clear_errors():
        from . import demo as job

        job.run(keep, seed)


@app.command()
def doctor() -> None:
    """Say what is installed, which backends work, and how to get the rest."""
    from .ops import why_not_cuda

    console = Console()
    console.print(
        f"slr_gpu {importlib.metadata.version('slr_gpu')}, Python {platform.python_version()},"
        f" {platform.machine()}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("package", "version", "for", "how to get it"):
        table.add_column(title)
    for package, purpose, extra in (
        ("numpy", "CPU backend", ""),
        ("scipy", "CPU backend", ""),
        ("torch", "models", ""),
        ("safetensors", "files", ""),
        ("cupy-cuda13x", "GPU backend, CUDA 13", "cuda13"),
        ("cupy-cuda12x", "GPU backend, CUDA 12", "cuda12"),
        ("nvidia-ml-py", "GPU memory", "cuda13"),
        ("onnx", "export", "onnx"),
        ("onnxruntime", "deployment", "onnx"),
        ("openvino", "deployment", "onnx"),
        ("matplotlib", "plots", "plot"),
        ("scikit-learn", "demo", "demo"),
    ):
        try:
            version, remedy = importlib.metadata.version(package), ""
        except importlib.metadata.PackageNotFoundError:
            version = "-"
            remedy = f"pip install 'slr_gpu\\[{extra}]'" if extra else "reinstall slr_gpu"
        table.add_row(package, version, purpose, remedy)
    console.print(table)
    for name, check in (("cpu", _check_cpu), ("cuda", why_not_cuda)):
        problem = check()
        console.print(f"backend {name}: " + ("works" if problem is None else f"no ({problem})"))


def _check_cpu() -> str | None:
    """Fit a tiny layer; what went wrong, or None."""
    import numpy as np

    from .fit import fit
    from .layer_io import LayerIO

    rng = np.random.default_rng(0)
    try:
        fit(LayerIO(rng.normal(size=(6, 8)), None, rng.normal(size=(64, 8))), keep=0.5)
    except BackendError as error:
        return str(error)
    return None


if __name__ == "__main__":
    app()
