"""The shipped CUDA sources, executed on the CPU thread by thread, and tests of that net itself.

In: kernels/*.cu, compiled as C++ against cuda_host.hpp. Checked: all the cases of
kernel_cases.py; that results depend neither on the run nor on the order of the threads; that
broken copies of each kernel fail; that no access leaves an array (AddressSanitizer, UBSan).
"""

import dataclasses
import json
import os
import subprocess
import sys

import cuda_host
import numpy as np
import pytest
from kernel_cases import CASES
from kernel_checks import same_bits

from slr_gpu import activations
from slr_gpu.errors import InputError
from slr_gpu.ops.launch import activation_defines, slabs, virtual_width

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no C++ compiler (g++)")

UNITS = cuda_host.shipped()


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return cuda_host.build(UNITS, tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def ops(library):
    return cuda_host.HostOps(library, cuda_host.numbers(UNITS))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(ops, case):
    case.run(ops)


def test_every_activation_has_cases():
    assert all(any(f"gradient-{n}-" in case.name for case in CASES) for n in activations.names())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_do_not_depend_on_the_order_of_threads(library, dtype):
    M, B = np.random.default_rng(0).standard_normal((2, 2, 20, 36)).astype(dtype)
    relu = activations.get("relu")
    results = []
    for seed in range(3):
        ops = cuda_host.HostOps(library, cuda_host.numbers(UNITS), seed)
        results.append(
            (
                *ops.column_shrink(M, 10.0, 9, low_rank=B),
                *ops.svt(M, 2.0),
                *ops.masked_gradient(M, B, relu, bias=B[:, 0].copy()),
            )
        )
    same_bits(results[0], results[1])
    same_bits(results[0], results[2])


def test_arrays_with_gaps_are_copied(ops):
    M = np.random.default_rng(0).standard_normal((2, 12, 8)).swapaxes(1, 2)
    same_bits(ops.column_shrink(M, 2.0), ops.column_shrink(M.copy(), 2.0))
    same_bits(ops.svt(M, 2.0), ops.svt(M.copy(), 2.0))
    relu = activations.get("relu")
    bias = np.ones((12, 2)).T
    same_bits(
        ops.masked_gradient(M, M, relu, bias=bias),
        ops.masked_gradient(M.copy(), M.copy(), relu, bias=bias.copy()),
    )


def test_bad_operands_are_refused(ops):
    M, relu = np.zeros((1, 4, 6), np.float32), activations.get("relu")
    for call, message in (
        (lambda: ops.svt(M[0], 1.0), "three axes"),
        (lambda: ops.svt(M.astype(np.float16), 1.0), "float32 or float64"),
        (lambda: ops.svt(M.tolist(), 1.0), "ops.asarray"),
        (lambda: ops.svt(M, np.zeros(2)), "1 or 1"),
        (lambda: ops.column_shrink(M, 1.0, 4), "divisor"),
        (lambda: ops.column_shrink(M, 1.0, low_rank=M[:, :2]), "same shape"),
        (lambda: ops.column_shrink(M, 1.0, dual=M.astype(np.float64)), "dtype"),
        (lambda: ops.masked_gradient(M, M[:, :, :3], relu), "same shape"),
        (lambda: ops.masked_gradient(M, M, relu, bias=M[0]), "bias"),
        (lambda: ops.masked_gradient(M, M, activations.get("gelu"), convex=True), "surrogate"),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 1000, 10**6])
@pytest.mark.parametrize("others", [1, 3, 10**4])
def test_slabs_cover_the_rows_and_none_is_empty(rows, others):
    count, height = slabs(rows, others, least=8)
    assert (count - 1) * height < rows <= count * height


@pytest.mark.parametrize(("n", "vec"), [(1, 4), (10, 4), (33, 2), (512, 4), (1000, 1), (5001, 4)])
def test_virtual_rows_hold_whole_rows_and_packs(n, vec):
    width = virtual_width(n, vec)
    assert width % n == width % vec == 0


# Broken copies: (kernel, what breaks, the text, its replacement, the cases that must see it).
BROKEN = [
    ("column_shrink", "scale of the next group", "norm[(at.column + v) / group_size]",
     "norm[(at.column + v + 1) / group_size]", "shrink-3x33x36"),
    ("column_shrink", "first row of a slab left out", "at.row = at.slab * rows + threadIdx.x",
     "at.row = at.slab * rows + 1 + threadIdx.x", "shrink-3x31x33"),
    ("column_shrink", "no barrier in the sum", "        __syncthreads();\n        if (threadIdx.x",
     "        if (threadIdx.x", "shrink-3x33x36"),
    ("column_shrink", "half the lanes summed", "__shfl_xor_sync(FULL_WARP, sum, offset)",
     "__shfl_xor_sync(FULL_WARP, sum, offset / 2)", "shrink-3x33x36"),
    ("column_shrink", "wrong mask", "__ballot_sync(FULL_WARP,", "__ballot_sync(0x7fffffffu,",
     "shrink-3x33x36"),
    ("masked_gradient", "bias of the next output", "(column + v) % n", "(column + v + 1) % n",
     "gradient-relu-3x33x31"),
    ("masked_gradient", "no barrier in the sum", "        __syncthreads();\n", "",
     "gradient-relu-3x33x31"),
    ("masked_gradient", "half the block summed", "int half = THREADS / 2", "int half = THREADS / 4",
     "gradient-relu-3x33x31"),
    ("masked_gradient", "only some threads reach the barrier", "    loss = block_sum(loss);",
     "    if (column >= width) return;\n    loss = block_sum(loss);", "gradient-relu-3x33x31"),
    ("svt", "pairs that overlap", "(round + rounds - pair) % rounds",
     "(round + pair + 1) % rounds", "threshold-random-3x9x7"),
    ("svt", "pairs that never meet", "pair < players / 2", "pair + 1 < players / 2",
     "threshold-random-3x9x7"),
    ("svt", "no barrier between rounds", "            }\n            __syncthreads();",
     "            }", "threshold-random-1x33x31"),
    ("svt", "flag cleared before all have read it", "        __syncthreads();  // all have",
     "        // all have", "threshold-random-3x9x7"),
    ("svt", "half the warp summed", "int offset = 16; offset > 0; offset /= 2) {\n        value",
     "int offset = 8; offset > 0; offset /= 2) {\n        value", "threshold-random-1x33x31"),
    ("svt", "wrong mask", "__shfl_xor_sync(FULL_WARP, value", "__shfl_xor_sync(0xffffu, value",
     "threshold-random-3x9x7"),
    ("svt", "singular values of a neighbour", "sigma[position] = value", "sigma[j] = value",
     "threshold-random-3x9x7"),
]  # fmt: skip


def activation_of(kernel):
    return "relu" if kernel == "masked_gradient" else None


@pytest.fixture(scope="session")
def broken(tmp_path_factory):
    """The broken copies, and last the three kernels as they ship."""
    units = []
    for kernel, _, old, new, _ in BROKEN:
        unit = cuda_host.unit(kernel, activation_of(kernel), ["float32"])
        assert unit.text.count(old) == 1, f"{kernel}.cu holds {old!r} not once"
        units.append(dataclasses.replace(unit, text=unit.text.replace(old, new)))
    units += [cuda_host.unit(k, activation_of(k), ["float32"]) for k in cuda_host.KERNELS]
    return cuda_host.build(units, tmp_path_factory.mktemp("broken")), units


def caught(broken, index, prefix):
    """Whether a case fails with that unit, for some order of the threads."""
    library, units = broken
    numbers = {(units[index].name, units[index].defines): index}
    for seed in range(3):
        ops = cuda_host.HostOps(library, numbers, seed)
        for case in CASES:
            if case.name.startswith(prefix) and case.name.endswith("float32"):
                try:
                    with np.errstate(all="ignore"):
                        case.run(ops)
                except (AssertionError, RuntimeError, np.linalg.LinAlgError):
                    return True
    return False


@pytest.mark.parametrize("index", range(len(BROKEN)), ids=[f"{b[0]}: {b[1]}" for b in BROKEN])
def test_broken_copy_fails(broken, index):
    kernel, _, _, _, prefix = BROKEN[index]
    assert caught(broken, index, prefix)
    shipped = len(BROKEN) + cuda_host.KERNELS.index(kernel)
    assert not caught(broken, shipped, prefix), "these cases fail with the kernel as it ships"


# Sanitizers ------------------------------------------------------------------------------------


def run_sanitized(tmp_path, units, prefix):
    """Build with sanitizers and run cases in a process of their own."""
    runtime = subprocess.run(
        [cuda_host.compiler(), "-print-file-name=libasan.so"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    if not os.path.isabs(runtime):
        pytest.skip("the compiler has no shared AddressSanitizer runtime (libasan.so)")
    library = cuda_host.build(units, tmp_path, ("-O1", *cuda_host.SANITIZE))
    numbers = [[n, d, i] for (n, d), i in cuda_host.numbers(units).items()]
    script = cuda_host.HERE / "sanitized.py"
    return subprocess.run(
        [sys.executable, str(script), str(library), json.dumps(numbers), prefix],
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_no_access_leaves_an_array(tmp_path):
    units = [cuda_host.unit(k, activation_of(k)) for k in cuda_host.KERNELS]
    result = run_sanitized(tmp_path, units, "shrink,threshold,gradient-relu-,gradient_empty")
    assert result.returncode == 0, result.stderr[-4000:]
    assert int(result.stdout.split()[-2]) > 100, result.stdout


@pytest.mark.parametrize(
    ("old", "new", "shape", "report"),
    [
        ("i < end; i += width", "i <= end; i += width", "1x1x1", "heap-buffer-overflow"),
        ("double sums[THREADS]", "double sums[THREADS - 1]", "1x1x1", "index 255 out of bounds"),
        ("(Z + batch * size + i)", "(Z + batch * size + i + 1)", "3x31x32", "misaligned address"),
    ],
    ids=["one element too far", "shared array too short", "loads not aligned"],
)
def test_sanitizers_see_a_bad_access(tmp_path, old, new, shape, report):
    unit = cuda_host.unit("masked_gradient", "relu", ["float32"])
    assert unit.text.count(old) == 1
    unit = dataclasses.replace(unit, text=unit.text.replace(old, new))
    result = run_sanitized(tmp_path, [unit], f"gradient-relu-{shape}-float32")
    assert result.returncode != 0
    assert report in result.stderr


def test_defines_carry_the_expressions():
    text = activation_defines(activations.get("clamp(0.5,2)"))
    assert "0.5" in text
    assert text.count("#define") == 3
