"""What is installed, which backends work, and how to get the rest.

In: nothing. Out: tables on standard output.
"""

from __future__ import annotations

import importlib.metadata
import platform

import numpy as np
from rich.console import Console
from rich.table import Table

from .errors import BackendError
from .fit import fit
from .layer_io import LayerIO
from .ops import why_not_cuda
from .program import release


def run() -> None:
    """Print the packages and try the backends."""
    console = Console()
    console.print(f"slr_gpu {release()}, Python {platform.python_version()}, {platform.machine()}")
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
    rng = np.random.default_rng(0)
    try:
        fit(LayerIO(rng.normal(size=(6, 8)), None, rng.normal(size=(64, 8))), keep=0.5)
    except BackendError as error:
        return str(error)
    return None
