"""Builds kernels/*.cu for the CPU and launches them in place of CuPy.

In: kernel texts. Out: a shared library made by g++ from those very texts and cuda_host.hpp, and
`HostOps`: CupyOps, all of its Python included (checks, launch geometry, workspaces), with NumPy
arrays and these launches.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy
import scipy

from slr_gpu import activations
from slr_gpu.ops.cupy_ops import CupyOps
from slr_gpu.ops.launch import activation_defines, kernel_names, kernel_source

HERE = Path(__file__).parent
KERNELS = ("column_shrink", "svt", "masked_gradient")
# Beside names(): other parameters, so that limits and slopes are seen to be passed on.
ACTIVATIONS = (*activations.names(), "leaky_relu(0.2)", "clamp(0.5,2)")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")
SHARED_LIMIT = 226 * 1024  # of sm_90


def compiler() -> str | None:
    """The C++ compiler to use, or None."""
    return shutil.which("g++") or shutil.which("clang++")


@dataclass(frozen=True)
class Unit:
    """A text to build: what `_launcher` is asked for, and the names to make in it."""

    name: str
    defines: str
    text: str
    names: tuple[str, ...]


def unit(name: str, activation: str | None = None, dtypes=("float32", "float64")) -> Unit:
    """A kernel as it ships."""
    defines = "" if activation is None else activation_defines(activations.get(activation))
    names = dict.fromkeys(n for dtype in dtypes for n in kernel_names(name, dtype))
    return Unit(name, defines, kernel_source(name, defines), tuple(names))


def shipped() -> list[Unit]:
    """Every kernel, and masked_gradient once for each activation."""
    return [
        unit("column_shrink"),
        unit("svt"),
        *(unit("masked_gradient", name) for name in ACTIVATIONS),
    ]


def build(units: list[Unit], directory: Path, flags=("-O1",)) -> Path:
    """Compile the texts, each in a namespace, to ``directory/kernels.so``."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = ['#include "cuda_host.hpp"']
    for i, each in enumerate(units):
        (directory / f"unit{i}.cu").write_text(each.text, encoding="utf-8")
        lines.append(f'namespace unit{i} {{\n#include "unit{i}.cu"\n}}')
        macros = ("THREADS", "MAX_THREADS", "FULL_WARP", "ACT_VALUE", "ACT_SLOPE", "ACT_LINEAR")
        lines += [f"#undef {macro}" for macro in macros]
    lines.append("const std::vector<host::Kernel> host::kernels = {")
    for i, each in enumerate(units):
        lines += [f'host::entry<&unit{i}::{n}>("{i}:{n}"),' for n in each.names]
    lines.append("};")
    main, library = directory / "main.cpp", directory / "kernels.so"
    main.write_text("\n".join(lines), encoding="utf-8")
    command = [compiler(), "-std=c++17", "-fPIC", "-shared", "-w", "-fno-strict-aliasing"]
    command += ["-U_FORTIFY_SOURCE", f"-I{HERE}", *flags, str(main), "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[:4000]}")
    return library


def numbers(units: list[Unit]) -> dict[tuple[str, str], int]:
    """The index of each unit, by what `_launcher` is asked for."""
    return {(each.name, each.defines): i for i, each in enumerate(units)}


class HostOps(CupyOps):
    """CupyOps on NumPy arrays, its kernels run by cuda_host.hpp.

    Parameters
    ----------
    library : Path
        From `build`.
    numbers : dict
        Which unit of the library stands for which kernel, from `numbers`.
    seed : int
        Order in which the threads of a block run; 0 is reversed.
    """

    def __init__(self, library: Path, numbers: dict, seed: int = 0):
        self.xp, self.scipy, self.device = numpy, scipy, "cpu"
        self.seed = seed
        self._library = ctypes.CDLL(str(library))
        self._library.host_launch.restype = ctypes.c_char_p
        self._numbers = numbers

    def asarray(self, array, dtype=None):
        return numpy.asarray(array, dtype=dtype)

    def to_numpy(self, array):
        return numpy.asarray(array)

    def synchronize(self):
        pass

    def _at(self, array):
        return contextlib.nullcontext()

    def _addresses(self, *arrays):
        return [array.ctypes.data for array in arrays if array is not None]

    def _shared_limit(self):
        return SHARED_LIMIT

    def _launcher(self, name, defines=""):
        number = self._numbers[name, defines]

        def launch(expression, blocks, threads, arguments, shared=0):
            values = [_by_value(argument) for argument in arguments]
            pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
            sizes = (ctypes.c_size_t * len(values))(*(v.itemsize for v in values))
            error = self._library.host_launch(
                f"{number}:{expression}".encode(), ctypes.c_uint(blocks), ctypes.c_uint(threads),
                ctypes.c_size_t(shared), pointers, sizes, len(values), ctypes.c_uint(self.seed),
            )  # fmt: skip
            if error is not None:
                raise RuntimeError(f"{name}.cu, {expression}: {error.decode()}")

        return launch


def _by_value(argument) -> numpy.ndarray:
    """A kernel argument as CUDA takes it: the number itself, or an array's address."""
    if isinstance(argument, numpy.ndarray):
        assert argument.flags.c_contiguous, "a kernel was given an array with gaps"
        return numpy.array(argument.ctypes.data, dtype=numpy.uint64)
    return numpy.array(0, numpy.uint64) if argument is None else numpy.array(argument)
