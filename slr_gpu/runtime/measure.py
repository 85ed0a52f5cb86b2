"""How much faster a compressed model is, measured in the stock CPU runtimes.

In: models (the first is the baseline) and what they are fed. Out: a `BenchResult`. Every runtime
runs every model it can; all of them are timed in turn, in one process, on the same CPUs. The
outputs of the runtimes are compared first: a session that computes something else gets no
speed-up.
"""

from __future__ import annotations

import functools
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendError, InputError, ModelError, complain
from ..progress import progress_bar
from ..storage import check_folder
from .model_files import ModelSource, open_source
from .model_inputs import common_inputs, make_inputs
from .opening import Key, Runner, Sources, choose_runtimes, open_sessions
from .result import BenchResult, Latency
from .sessions import RUNTIMES, Arrays, LayerTime, one_line, torch_threads
from .timing import Timings, bootstrap, check_threads, interleave, pinned


def bench(
    models: Mapping[str, Any],
    inputs: Any = None,
    *,
    runtimes: Sequence[str] | None = None,
    threads: int = 1,
    batch: int = 1,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    time_limit_s: float = 60.0,
    precision: float = 0.03,
    eval_fn: Callable[[Callable[[Any], Any]], float] | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> BenchResult:
    """Measure the latency of models side by side.

    Parameters
    ----------
    models : dict of label to path or nn.Module
        ``.onnx`` and ``.pt2`` files or modules; the first is the baseline. A list holds the same
        model in several formats, for example ``["dense.onnx", module]``.
    inputs : array, tensor, sequence of them or dict by name, optional
        The first `batch` samples are used; random inputs of the declared shapes by default.
    runtimes : sequence of str, optional
        Of `slr_gpu.runtime.sessions.RUNTIMES`; by default all that are installed and take the models.
    threads : int
        Of every runtime; the process is pinned to as many CPUs where the system can.
    batch : int
        First size of inputs that leave it free.
    shapes : dict of name to tuple, optional
        Of inputs with other free sizes, or of modules.
    time_limit_s : float
        For the timing; opening the models comes on top.
    precision : float
        Stop when the 95 % interval of each speed-up in the same runtime is narrower, relative to
        the speed-up.
    eval_fn : callable, optional
        ``eval_fn(run) -> float``, the accuracy of a model, where ``run(inputs)`` takes any number
        of samples and gives the outputs: an array, or a list for several outputs.
    out : path, optional
        Folder for ``bench.json`` and ``bench.png``.
    seed : int
        Of the order of the runs and of random inputs.
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    BenchResult

    Raises
    ------
    InputError
        For models or arguments that cannot be worked with, before anything is timed.
    BackendError
        When a runtime asked for by name does not work, or none does.
    ModelError
        When `eval_fn` fails.
    """
    _check_numbers(threads, batch, time_limit_s, precision)
    sources = _open_sources(models)
    chosen, skipped = choose_runtimes(runtimes, sources)
    specs = common_inputs([item for formats in sources.values() for item in formats.values()])
    arrays = make_inputs(specs, inputs, shapes=shapes, batch=batch, seed=seed)
    if out is not None:
        check_folder(out)
    environment = _environment(threads)
    baseline = next(iter(sources))
    accuracy = {}
    with torch_threads(threads):
        environment["torch_threads"] = torch.get_num_threads()
        total = len(sources) * len(chosen)
        with progress_bar("opening models", total, show=progress) as advance:
            sessions, agreement, failed = open_sessions(
                sources, chosen, arrays, threads, strict=runtimes is not None, advance=advance
            )
        with progress_bar("accuracy", len(sources), show=progress) as advance:
            for model in sources if eval_fn is not None else ():
                keys = [key for key in sessions if key[0] == model]
                key = min(keys, key=lambda key: not agreement[key][1])
                runner = Runner(sessions[key], arrays, specs, advance=advance)
                accuracy[model] = _evaluate(eval_fn, runner, model)
                advance()
        ratios = [
            ((baseline, runtime), (model, runtime))
            for model, runtime in sessions
            if model != baseline and (baseline, runtime) in sessions
        ]
        with (
            progress_bar("timing", time_limit_s, show=progress) as advance,
            pinned(threads) as cpus,
        ):
            environment["cpus"] = cpus
            timings = interleave(
                {key: functools.partial(item.run, arrays) for key, item in sessions.items()},
                ratios,
                precision=precision,
                time_limit_s=time_limit_s,
                seed=seed,
                advance=advance,
            )
        layers, notes = _profile(sources, list(sessions), arrays, threads, progress=progress)
    result = BenchResult(
        baseline,
        _rows(timings, ratios, agreement, layers, seed),
        skipped + failed,
        precision,
        timings.converged,
        accuracy,
        environment,
        [
            {"name": spec.name, "shape": list(array.shape), "dtype": str(array.dtype)}
            for spec, array in zip(specs, arrays, strict=True)
        ],
        {
            "models": {
                label: [source.name for source in formats.values()]
                for label, formats in sources.items()
            },
            "runtimes": {runtime.name: runtime.version() for runtime in chosen},
            "batch": batch,
            "time_limit_s": time_limit_s,
            "data": "random" if inputs is None else "given",
            "seed": seed,
        },
        notes,
        timings.wall_s,
    )
    if out is not None:
        _write(result, Path(out))
    return result


# -- before the timing -------------------------------------------------------------------------


def _check_numbers(threads: int, batch: int, time_limit_s: float, precision: float) -> None:
    if not isinstance(batch, int) or batch < 1:
        raise InputError(complain(f"batch={batch!r}", "an integer >= 1", "Raise it."))
    for name, value in (("time_limit_s", time_limit_s), ("precision", precision)):
        if not math.isfinite(value) or value <= 0:
            raise InputError(complain(f"{name}={value!r}", "a number > 0", "Raise it."))
    check_threads(threads)


def _open_sources(models: Mapping[str, Any]) -> Sources:
    if not isinstance(models, Mapping) or not models:
        raise InputError(
            complain(
                f"models of {type(models).__name__}",
                "a dict of label to model, the baseline first",
                "For example {'dense': 'dense.onnx', 'compressed': 'compressed.onnx'}.",
            )
        )
    sources: Sources = {}
    for label, value in models.items():
        formats: dict[str, ModelSource] = {}
        for item in value if isinstance(value, (list, tuple)) else (value,):
            source = open_source(item)
            if source.format in formats:
                raise InputError(
                    complain(
                        f"{formats[source.format].name} and {source.name} for {label!r}",
                        "one model in each format",
                        "Give them labels of their own.",
                    )
                )
            formats[source.format] = source
        sources[str(label)] = formats
    return sources


def _environment(threads: int) -> dict[str, Any]:
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "load_average": load,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """The processor as it calls itself, with its vectors: virtual machines hide the rest."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _evaluate(eval_fn: Callable[[Any], float], runner: Runner, model: str) -> float:
    try:
        value = float(eval_fn(runner))
    # The user's function: anything.
    except Exception as error:
        raise ModelError(
            complain(
                f"{one_line(error)} in eval_fn on {model}",
                "eval_fn(run) to return a number",
                "run(inputs) takes arrays of samples, the batch first.",
            )
        ) from error
    if not math.isfinite(value):
        raise ModelError(complain(f"eval_fn {value} on {model}", "a finite number", "Check it."))
    return value


# -- after the timing --------------------------------------------------------------------------


def _profile(
    sources: Sources, keys: list[Key], arrays: Arrays, threads: int, *, progress: bool
) -> tuple[dict[Key, list[LayerTime]], list[str]]:
    """Time of the nodes, in sessions apart: profiling costs time. And what could not be profiled."""
    keys = [key for key in keys if RUNTIMES[key[1]].profiles]
    layers, notes = {}, []
    with progress_bar("profiling", len(keys), show=progress) as advance:
        for model, name in keys:
            runtime = RUNTIMES[name]
            try:
                session = runtime(sources[model][runtime.format], arrays, threads, profiling=True)
                layers[model, name] = session.profile(arrays)
            except Exception as error:  # noqa: BLE001  (what is measured is not lost by it)
                notes.append(f"no times of {model}'s nodes in {name}: {one_line(error)}")
            advance()
    return layers, notes


def _rows(
    timings: Timings,
    ratios: list[tuple[Key, Key]],
    agreement: Mapping[Key, tuple[float | None, bool]],
    layers: Mapping[Key, list[LayerTime]],
    seed: int,
) -> list[Latency]:
    rows = {
        key: Latency(*key, seconds, timings.calls[key], *agreement[key], layers=layers.get(key, []))
        for key, seconds in timings.seconds.items()
    }
    for reference, key in ratios:
        if rows[reference].agrees and rows[key].agrees:
            rows[key].speedup = bootstrap(rows[reference].seconds / rows[key].seconds, seed=seed)
    return list(rows.values())


def _write(result: BenchResult, folder: Path) -> None:
    try:
        result.plot(folder / "bench.png")
        result.written.append("bench.png")
    except BackendError as error:
        result.notes.append(f"no bench.png: {error}")
    result.save(folder / "bench.json")
    result.written.append("bench.json")
