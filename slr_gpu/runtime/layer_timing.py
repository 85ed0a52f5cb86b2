"""Latency of single layers in a stock runtime, many side by side.

In: modules of one input each, and the shapes of these inputs. Out: seconds a call, one number a
module and round, interleaved as whole models are (`slr_gpu.runtime.timing`). All modules pass
torch's exporter together, which takes about as long for fifty as for one, and are cut apart again.

A layer alone pays for bringing its input into the runtime's own memory layout and its output back,
which inside a model it does not: of modules of one input and output shape that compute in one layout
differences are right, ratios too near to one. `slr_gpu.deploy` times convolutions between others.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..errors import BackendError, InputError, complain
from ..export import modules_to_onnx
from .model_files import ONNX, TORCH, ModelSource, open_source
from .sessions import RUNTIMES, torch_threads
from .timing import Timings, interleave, pinned

# Weights of the modules that pass the exporter at once.
GROUP_BYTES = 2**29
# Short: inside a model a layer does not find its weights in the nearest cache either.
BLOCK_S = 1e-3

Case = tuple[nn.Module, tuple[int, ...]]  # a module and the shape of its input


def time_layers(
    cases: Mapping[Hashable, Case],
    ratios: list[tuple[Hashable, Hashable]],
    *,
    runtime: str = "onnxruntime",
    threads: int = 1,
    precision: float = 0.03,
    time_limit_s: float = 30.0,
    block_s: float = BLOCK_S,
    seed: int = 0,
    advance: Callable[..., None] | None = None,
) -> Timings:
    """Time modules in turn.

    Parameters
    ----------
    cases : dict of key to (nn.Module, shape)
        Modules in eval mode, float32, on the CPU; each is called with one random tensor (shape).
    ratios : list of (key, key)
        Pairs whose ratio must become known to `precision`; see `interleave`.
    runtime : str
        Of `slr_gpu.runtime.sessions.RUNTIMES`.
    threads : int
    precision, time_limit_s, block_s, seed, advance
        See `interleave`.

    Returns
    -------
    Timings
        Seconds a call by key.

    Raises
    ------
    InputError
        For a runtime of another name.
    BackendError
        When the runtime does not work here.
    """
    check_runtime(runtime)
    kind = RUNTIMES[runtime]
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder, torch_threads(threads):
        sources = _sources(cases, kind.format, Path(folder))
        calls = {}
        for key, source in sources.items():
            arrays = (rng.standard_normal(cases[key][1]).astype(np.float32),)
            session = kind(source, arrays, threads)
            calls[key] = functools.partial(session.run, arrays)
        with pinned(threads):
            return interleave(
                calls,
                ratios,
                precision=precision,
                time_limit_s=time_limit_s,
                block_s=block_s,
                seed=seed,
                advance=advance,
            )


def check_runtime(runtime: str) -> None:
    """Whether layers can be timed in a runtime; costs nothing, so ask before working.

    Raises
    ------
    InputError, BackendError
        See `time_layers`.
    """
    if runtime not in RUNTIMES:
        raise InputError(
            complain(f"runtime {runtime!r}", f"one of {', '.join(RUNTIMES)}", "Check the name.")
        )
    reason = RUNTIMES[runtime].why_not()
    if reason is not None:
        raise BackendError(complain(f"runtime {runtime!r}, {reason}", "a working one", ""))


def _sources(
    cases: Mapping[Hashable, Case], kind: str, folder: Path
) -> dict[Hashable, ModelSource]:
    if kind == TORCH:
        return {key: open_source(module) for key, (module, _) in cases.items()}
    assert kind == ONNX
    sources = {}
    for group in _groups(cases):
        contents = modules_to_onnx([(cases[key][0], torch.zeros(cases[key][1])) for key in group])
        for key, content in zip(group, contents, strict=True):
            path = folder / f"{len(sources)}.onnx"
            path.write_bytes(content)
            sources[key] = open_source(path)
    return sources


def _groups(cases: Mapping[Hashable, Case]) -> Iterator[list[Hashable]]:
    """Keys in groups that fit into one file."""
    group: list[Hashable] = []
    total = 0
    for key, (module, _) in cases.items():
        size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        if group and total + size > GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(key)
        total += size
    if group:
        yield group
