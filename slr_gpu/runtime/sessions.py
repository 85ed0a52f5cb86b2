"""CPU inference sessions of the stock runtimes behind one small interface.

In: a `ModelSource`, arrays to run it on and a number of threads. Out: a `Session` with ``run``
and ``profile``. All compute in float32 with every graph optimisation, for the very shapes given.
A runtime is added by writing one class and naming it in `RUNTIMES`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .model_files import ONNX, TORCH, ModelSource

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class LayerTime:
    """One node of the runtime's optimised graph: median seconds of a call."""

    name: str
    type: str
    seconds: float


class Session:
    """A model loaded by a runtime.

    Parameters
    ----------
    source : ModelSource
        Of the class's format.
    inputs : tuple of array
        In the order of ``source.inputs``; their shapes are the ones to optimise for.
    threads : int
    profiling : bool
        Open it for `profile` instead of for timing.

    Attributes
    ----------
    name, format, package, extra : str
        Of the runtime: what it is called, the format it takes, the package it comes in and the
        extra of slr_gpu that installs it.
    profiles : bool
        Whether it can tell the time of single nodes.
    """

    name = ""
    format = ""
    package = ""
    extra = ""
    profiles = False

    def __init__(
        self, source: ModelSource, inputs: Arrays, threads: int, *, profiling: bool = False
    ) -> None:
        raise NotImplementedError

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        """The model's outputs."""
        raise NotImplementedError

    def profile(self, inputs: Arrays, calls: int = 10) -> list[LayerTime]:
        """Time of each node, the slowest first; empty when the runtime has no profiler."""
        return []

    @classmethod
    def why_not(cls) -> str | None:
        """Why the runtime cannot be used here, or None."""
        try:
            importlib.import_module(cls.package)
        except ImportError:
            return f"not installed: pip install 'slr_gpu[{cls.extra}]'"
        return None

    @classmethod
    def version(cls) -> str:
        """Of the package."""
        return importlib.metadata.version(cls.package)


class PyTorchEager(Session):
    """The module as it is. Threads are those of the process: see `torch_threads`."""

    name = "pytorch"
    format = TORCH
    package = "torch"

    def __init__(
        self, source: ModelSource, inputs: Arrays, threads: int, *, profiling: bool = False
    ) -> None:
        self._module = source.module

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        with torch.inference_mode():
            return _flatten(self._module(*map(torch.from_numpy, inputs)))


class PyTorchCompiled(PyTorchEager):
    """The module through torch.compile, which needs a C++ compiler."""

    name = "torch.compile"

    def __init__(
        self, source: ModelSource, inputs: Arrays, threads: int, *, profiling: bool = False
    ) -> None:
        self._module = torch.compile(source.module, dynamic=False)
        self.run(inputs)

    @classmethod
    def why_not(cls) -> str | None:
        compilers = [os.environ.get("CXX"), "g++", "clang++"]
        if any(shutil.which(name) for name in compilers if name):
            return None
        return "not available: no C++ compiler, install g++ or clang++"


class OnnxRuntime(Session):
    """ONNX Runtime's CPU provider: sequential, all graph optimisations."""

    name = "onnxruntime"
    format = ONNX
    package = "onnxruntime"
    extra = "onnx"
    profiles = True

    def __init__(
        self, source: ModelSource, inputs: Arrays, threads: int, *, profiling: bool = False
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        # Idle sessions must not spin while another one is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for spec, array in zip(source.inputs, inputs, strict=True):
            for declared, size in zip(spec.shape or (), array.shape, strict=False):
                if isinstance(declared, str):
                    options.add_free_dimension_override_by_name(declared, size)
        self._folder = None
        if profiling:
            self._folder = tempfile.TemporaryDirectory()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._folder.name) / "profile")
        self._session = onnxruntime.InferenceSession(
            str(source.path), options, providers=["CPUExecutionProvider"]
        )
        self._names = [spec.name for spec in source.inputs]

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        return self._session.run(None, dict(zip(self._names, inputs, strict=True)))

    def profile(self, inputs: Arrays, calls: int = 10) -> list[LayerTime]:
        for _ in range(calls + 1):
            self.run(inputs)
        events = json.loads(Path(self._session.end_profiling()).read_text())
        self._folder.cleanup()
        times = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
                times[key, event["args"].get("node_index")].append(event["dur"] * 1e-6)
        return _slowest_first({key: values[1:] for (key, _), values in times.items()})


class OpenVINO(Session):
    """OpenVINO's CPU plugin: one stream, latency hint, float32."""

    name = "openvino"
    format = ONNX
    package = "openvino"
    extra = "onnx"
    profiles = True

    def __init__(
        self, source: ModelSource, inputs: Arrays, threads: int, *, profiling: bool = False
    ) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(str(source.path))
        names = [spec.name for spec in source.inputs]
        model.reshape({name: list(a.shape) for name, a in zip(names, inputs, strict=True)})
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            # Without the hint it computes in bfloat16 where the CPU can.
            "INFERENCE_PRECISION_HINT": "f32",
            # The process is pinned as a whole; the plugin would choose CPUs of its own.
            "ENABLE_CPU_PINNING": False,
            "PERF_COUNT": profiling,
        }
        self._request = core.compile_model(model, "CPU", properties).create_infer_request()
        self._names = names

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        feed = dict(zip(self._names, inputs, strict=True))
        return list(self._request.infer(feed, share_inputs=True).values())

    def profile(self, inputs: Arrays, calls: int = 10) -> list[LayerTime]:
        times = defaultdict(list)
        for count in range(calls + 1):
            self.run(inputs)
            for node in self._request.profiling_info if count else ():
                if node.status == node.Status.EXECUTED:
                    key = (node.node_name, f"{node.node_type} {node.exec_type}")
                    times[key].append(node.real_time.total_seconds())
        return _slowest_first(times)


RUNTIMES: dict[str, type[Session]] = {
    runtime.name: runtime for runtime in (PyTorchEager, PyTorchCompiled, OnnxRuntime, OpenVINO)
}


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let PyTorch use so many threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


def _flatten(outputs: Any) -> list[np.ndarray]:
    if isinstance(outputs, torch.Tensor):
        return [outputs.numpy()]
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    return [array for item in outputs if item is not None for array in _flatten(item)]


def _slowest_first(times: Mapping[tuple[str, str], list[float]]) -> list[LayerTime]:
    layers = [LayerTime(*key, float(np.median(values))) for key, values in times.items() if values]
    return sorted(layers, key=lambda layer: -layer.seconds)
