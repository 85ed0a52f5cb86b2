"""The kernels on a CUDA device, where there is one, and the parity of the two backends.

In: the cases of kernel_cases.py through CupyOps. A device counts when it runs a kernel
(`slr_gpu.ops.why_not_cuda`); otherwise the gpu-marked tests are skipped and say why. The other
tests need neither a device nor CuPy.
"""

import inspect
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from kernel_cases import CASES
from kernel_checks import close, same_bits

from slr_gpu import activations
from slr_gpu import ops as backends
from slr_gpu.errors import BackendError, InputError
from slr_gpu.ops import pool
from slr_gpu.ops.cupy_ops import CupyOps
from slr_gpu.ops.launch import jacobi_shared, kernel_source, pack
from slr_gpu.ops.numpy_ops import NumpyOps

HOT = {"column_shrink", "svt", "masked_gradient"}
TRANSFER = {"asarray", "to_numpy", "synchronize"}
# What the library of the device does better than products alone.
LIBRARY = {"cholesky", "solve_triangular"}
OVERRIDDEN = HOT | TRANSFER | LIBRARY


@pytest.fixture(scope="session")
def cuda():
    reason = backends.why_not_cuda()
    if reason is not None:
        pytest.skip(f"no CUDA device: {reason}")
    return backends.get_ops("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(cuda, case):
    case.run(cuda)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64, 64), (64, 128, 128), (8, 300, 64), (4, 512, 512)])
def test_svt_of_real_sizes(cuda, shape):
    M = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    U, sigma, Vt = np.linalg.svd(M.astype(np.float64), full_matrices=False)
    tau = float(np.median(sigma))
    X, values, rank = cuda.svt(cuda.asarray(M), tau)
    close(cuda.to_numpy(X), (U * np.maximum(sigma - tau, 0)[:, None]) @ Vt, 1e-5, "X")
    close(cuda.to_numpy(values), sigma, 1e-5, "sigma")
    assert np.abs(cuda.to_numpy(rank) - (sigma > tau).sum(axis=1)).max() <= 1


@pytest.mark.gpu
def test_large_arrays_give_the_same_bits_twice(cuda):
    rng = cuda.xp.random.default_rng(0)
    Z, Y = (rng.standard_normal((2, 40_000, 513), dtype=np.float32) for _ in range(2))
    relu = activations.get("relu")
    first, second = (cuda.masked_gradient(Z, Y, relu) for _ in range(2))
    same_bits([cuda.to_numpy(x) for x in first], [cuda.to_numpy(x) for x in second])
    want = NumpyOps().masked_gradient(cuda.to_numpy(Z), cuda.to_numpy(Y), relu)
    close(cuda.to_numpy(first[1]), want[1], 1e-6, "loss")
    first, second = (cuda.column_shrink(Z, 200.0, 27) for _ in range(2))
    same_bits([cuda.to_numpy(x) for x in first], [cuda.to_numpy(x) for x in second])


@pytest.mark.gpu
def test_torch_tensors_share_memory(cuda):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device")
    tensor = torch.ones((1, 4, 8), device=cuda.device)
    array = cuda.asarray(tensor)
    assert array.data.ptr == tensor.data_ptr()
    assert torch.from_dlpack(array).data_ptr() == tensor.data_ptr()
    before = torch.cuda.memory_allocated(cuda.device)
    kept = cuda.xp.empty(1 << 20, dtype=np.float32)
    assert torch.cuda.memory_allocated(cuda.device) >= before + kept.nbytes
    np.testing.assert_array_equal(cuda.to_numpy(cuda.asarray(torch.ones(3).bfloat16())), 1)


@pytest.mark.gpu
def test_the_current_stream_is_used(cuda):
    M = cuda.asarray(np.random.default_rng(0).standard_normal((1, 64, 96)))
    want = cuda.to_numpy(cuda.column_shrink(M, 5.0)[0])
    cuda.synchronize()
    stream = cuda.xp.cuda.Stream(non_blocking=True)
    with stream:
        A = cuda.column_shrink(M, 5.0)[0]
        cuda.synchronize()
    np.testing.assert_array_equal(cuda.to_numpy(A), want)


# Without a device ------------------------------------------------------------------------------


def test_signatures_agree():
    for name in OVERRIDDEN:
        ours, theirs = (inspect.signature(getattr(c, name)) for c in (CupyOps, NumpyOps))
        assert ours == theirs, name


def test_exactly_the_hot_operations_and_the_transfer_are_overridden():
    def public(cls):
        return {n for n, v in vars(cls).items() if callable(v) and not n.startswith("_")}

    assert public(CupyOps) == OVERRIDDEN
    assert public(NumpyOps) >= OVERRIDDEN
    assert all(getattr(CupyOps, name).__doc__ for name in OVERRIDDEN)


def test_cupy_is_not_imported_with_the_backends():
    code = "import sys, slr_gpu.ops.cupy_ops; print('cupy' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_get_ops_by_name():
    assert type(backends.get_ops("cpu")) is NumpyOps
    for name in ("gpu", "cuda:x", "", None):
        with pytest.raises(InputError, match="auto"):
            backends.get_ops(name)


def test_cuda_without_a_device_names_the_extra(monkeypatch):
    monkeypatch.setattr(backends, "why_not_cuda", lambda index=None: "CuPy cannot be imported.")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(BackendError, match="CuPy cannot be imported") as caught:
            backends.get_ops(name)
        assert "slr_gpu[cuda13]" in str(caught.value)
        assert "slr_gpu[cuda12]" in str(caught.value)


def test_auto_falls_back_and_says_so_once(monkeypatch):
    monkeypatch.setattr(backends, "why_not_cuda", lambda index=None: "there is none, says a test.")
    with pytest.warns(UserWarning, match="runs on the CPU: there is none") as warnings:
        both = [backends.get_ops("auto") for _ in range(2)]
    assert [type(ops) for ops in both] == [NumpyOps, NumpyOps]
    assert len(warnings) == 1


def test_probe_names_a_reason_or_finds_a_device():
    reason = backends.why_not_cuda()
    assert reason is None or reason.endswith(".")
    assert backends._probe(np) == 144


def test_cupy_allocates_from_torch_once_torch_uses_cuda(monkeypatch):
    taken, allocators, active = [], [], [False]
    torch, cupy = SimpleNamespace(), SimpleNamespace()
    torch.cuda = SimpleNamespace(
        is_initialized=lambda: active[0],
        caching_allocator_alloc=lambda *arguments: taken.append(arguments) or 4096,
        caching_allocator_delete=taken.append,
    )
    cupy.cuda = SimpleNamespace(
        get_current_stream=lambda: SimpleNamespace(ptr=77),
        set_allocator=allocators.append,
        PythonFunctionAllocator=lambda take, give: SimpleNamespace(malloc=(take, give)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(pool, "_shared", False)
    pool.share_memory_pool(cupy)
    assert not allocators, "torch does not use CUDA yet"
    active[0] = True
    pool.share_memory_pool(cupy)
    pool.share_memory_pool(cupy)
    [(take, give)] = allocators
    assert take(512, 1) == 4096
    give(4096, 1)
    assert taken == [(512, 1, 77), 4096]


def test_missing_kernel_is_an_error():
    with pytest.raises(BackendError, match="Install slr_gpu again"):
        kernel_source("no_such_kernel")


def test_packs_need_alignment():
    assert pack(8, 4, [0, 16]) == 4
    assert pack(6, 4, [0, 16]) == 1
    assert pack(8, 4, [0, 4]) == 1
    assert pack(6, 8, [32]) == 2


def test_design_sizes_fit_in_shared_memory():
    assert jacobi_shared(64, 64, 4)[1] < 48 * 1024
    assert jacobi_shared(128, 128, 4)[1] < 160 * 1024
