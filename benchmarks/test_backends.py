"""How fast the backends are, each beside a rival that is timed in the same run.

In: nothing; the arrays are drawn here. Out, in ``extra_info``: the device's name, threads, the
seconds of both sides (median, least, most) and ``times_as_fast``, rival over ours, with the
objective or the error of both. The rival is timed before every round of ours, so that the two
alternate. Run with ``pytest benchmarks/ --benchmark-only``; what needs a CUDA device is
skipped where no kernel runs on one, and no figure of a device is kept in this file.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from plain_torch import plain_majorize
from threadpoolctl import threadpool_limits

import slr_gpu
from slr_gpu import activations
from slr_gpu.decomposition import Structure
from slr_gpu.ops import NumpyOps, get_ops, why_not_cuda
from slr_gpu.problem import ResponseProblem

Call = Callable[[], Any]
Clock = Callable[[Call], tuple[Any, float]]

GIGABYTE = 10**9
# A quarter of the weights of a layer with 256 outputs and 256 channels of 3x3 taps.
SIZES = {"r": 80, "s": 32, "k": 80}
ITERATIONS = 8
RIDGE = 1e-3


@pytest.fixture(scope="module")
def cuda() -> NumpyOps:
    """The operations on the current CUDA device; skips, and says why, where there is none."""
    reason = why_not_cuda()
    if reason is not None:
        pytest.skip(f"no CUDA device: {reason}")
    return get_ops("cuda")


@pytest.fixture
def threads():
    """Two threads for NumPy's BLAS and for torch, or one where torch was told to use one."""
    before = torch.get_num_threads()
    count = min(2, before)
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield count
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def conv_layer() -> slr_gpu.LayerIO:
    """A layer of n = 256, m = 2304, P = 18 000, with correlated, non-negative inputs."""
    rng = np.random.default_rng(0)
    channels, taps, rows = 256, 9, 18_000
    mix = (
        rng.standard_normal((96, channels), dtype="f4") * 0.95 ** np.arange(96, dtype="f4")[:, None]
    )
    smooth = np.exp(-0.4 * np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))))
    spread = np.linalg.cholesky(smooth).T.astype("f4")
    field = rng.standard_normal((rows, 96, taps), dtype="f4") @ spread
    inputs = np.maximum(np.einsum("plt,lc->pct", field, mix, optimize=True), 0)
    weight = rng.normal(size=(256, channels, 3, 3)) / 48
    return slr_gpu.LayerIO(weight.astype("f4"), None, inputs.reshape(rows, -1))


def device_name(ops: NumpyOps) -> str:
    """The name that the driver gives the device, or ``"cpu"``."""
    if ops.device == "cpu":
        return "cpu"
    runtime = ops.xp.cuda.runtime
    return runtime.getDeviceProperties(ops.xp.cuda.Device().id)["name"].decode()


def need_memory(cuda: NumpyOps, gigabytes: float) -> None:
    """Skip unless so much memory of the device is free."""
    cuda.xp.get_default_memory_pool().free_all_blocks()
    torch.cuda.empty_cache()
    free, _ = cuda.xp.cuda.runtime.memGetInfo()
    if free < gigabytes * GIGABYTE:
        pytest.skip(f"{free / GIGABYTE:.1f} GB free on {device_name(cuda)}, {gigabytes} needed")


def wall_clock(ops: NumpyOps) -> Clock:
    """Time a call by the host's clock, waiting for the device before and after."""

    def clock(call: Call) -> tuple[Any, float]:
        ops.synchronize()
        began = time.perf_counter()
        result = call()
        ops.synchronize()
        return result, time.perf_counter() - began

    return clock


def event_clock(cuda: NumpyOps, calls: int) -> Clock:
    """Time short calls by CUDA events around so many in a row, which hides what a launch takes."""

    def clock(call: Call) -> tuple[Any, float]:
        start, end = cuda.xp.cuda.Event(), cuda.xp.cuda.Event()
        result = call()  # the device is still busy with it when the first event is queued
        start.record()
        for _ in range(calls):
            result = call()
        end.record()
        end.synchronize()
        return result, cuda.xp.cuda.get_elapsed_time(start, end) / 1e3 / calls

    return clock


def alternate(
    benchmark: Any, ours: Call, rival: Call, *, clock: Clock, rounds: int, **facts: Any
) -> tuple[Any, Any, float]:
    """Time two calls in turn and record both.

    Parameters
    ----------
    benchmark : fixture
        Times `ours` as well, the waiting for the device included.
    ours, rival : callable
        Without arguments. Each is called once before, to compile and allocate.
    clock : callable
        Returns a call's result and its seconds.
    rounds : int
    **facts
        For ``extra_info``.

    Returns
    -------
    ours, rival : the results of the last round
    times_as_fast : float
        Median seconds of the rival over those of ours.
    """
    calls = {"ours": ours, "rival": rival}
    seconds: dict[str, list[float]] = {"ours": [], "rival": []}
    results: dict[str, Any] = {}

    def run(name: str) -> None:
        results.pop(name, None)  # its memory is for the next one
        results[name], elapsed = clock(calls[name])
        seconds[name].append(elapsed)

    def run_rival() -> None:
        run("rival")

    for call in calls.values():
        clock(call)
    benchmark.pedantic(run, args=("ours",), setup=run_rival, rounds=rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    times_as_fast = medians["rival"] / medians["ours"]
    benchmark.extra_info.update(
        facts,
        times_as_fast=times_as_fast,
        **{
            f"{name}_seconds": {"median": medians[name], "least": min(each), "most": max(each)}
            for name, each in seconds.items()
        },
    )
    return results["ours"], results["rival"], times_as_fast


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fit_against_plain_torch(benchmark, conv_layer, threads, device, request):
    """A whole fit of given sizes, from host arrays to host arrays, at equal objective."""
    ops = request.getfixturevalue("cuda") if device == "cuda" else NumpyOps()
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} has no CUDA device to run the rival on")
    solver = slr_gpu.Majorize(iterations=ITERATIONS, tolerance=0.0)
    names = ("weight", "bias", "inputs", "targets")
    host = [torch.from_numpy(getattr(conv_layer, name)) for name in names]

    def ours() -> slr_gpu.Decomposition:
        return slr_gpu.fit(
            conv_layer,
            basis_rows=SIZES["r"],
            channels=SIZES["s"],
            rank=SIZES["k"],
            ridge=RIDGE,
            held_out=0.0,
            solver=solver,
            device=device,
        )

    def plain() -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        arrays = [array.to(device) for array in host]
        weight, bias, history = plain_majorize(
            *arrays, None, conv_layer.taps, **SIZES, iterations=ITERATIONS, ridge=RIDGE
        )
        return weight.cpu(), bias.cpu(), history

    fitted, (_, _, history), _ = alternate(
        benchmark,
        ours,
        plain,
        clock=wall_clock(ops),
        rounds=5,
        device=device_name(ops),
        threads=threads,
        structure=str(Structure("rotated", SIZES["s"], SIZES["k"], SIZES["r"])),
        iterations=ITERATIONS,
        against="plain PyTorch",
    )
    objective, plain_objective = fitted.history[-1]["objective"], history[-1]
    benchmark.extra_info.update(objective=objective, plain_objective=plain_objective)
    assert len(fitted.history) == len(history) == ITERATIONS
    assert objective == pytest.approx(plain_objective, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ["column_shrink", "column_shrink_fused", "masked_gradient"])
def test_bandwidth(benchmark, cuda, operation):
    """Share of the copy bandwidth on float32 arrays of 1 GB.

    Counted is what has to go through the device's memory: `column_shrink` reads its inputs twice
    (for the norms, then to scale) and writes A, `masked_gradient` reads Z and Y and writes R, a
    copy reads one array and writes another.
    """
    need_memory(cuda, 8)
    rng = cuda.xp.random.default_rng(0)
    columns = 512 if operation == "masked_gradient" else 4608
    shape = (1, GIGABYTE // (4 * columns), columns)
    first, second = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    other = cuda.xp.empty_like(first)
    if operation == "masked_gradient":
        bias = rng.standard_normal((1, columns), dtype=np.float32)
        relu, moved = activations.get("relu"), 3

        def ours():
            return cuda.masked_gradient(first, second, relu, bias=bias, convex=True)

    else:
        fused, moved = {}, 2 + 1
        if operation == "column_shrink_fused":
            third = rng.standard_normal(shape, dtype=np.float32)
            fused, moved = {"low_rank": second, "dual": third, "t": 2.0}, 2 * 3 + 1
        tau = float(cuda.column_shrink(first, 0.0, 9, **fused)[1].mean())

        def ours():
            return cuda.column_shrink(first, tau, 9, **fused)

    def copy() -> None:
        cuda.xp.copyto(other, first)

    _, _, times_as_fast = alternate(
        benchmark,
        ours,
        copy,
        clock=event_clock(cuda, calls=10),
        rounds=10,
        device=device_name(cuda),
        array_bytes=first.nbytes,
        against="copy of one array",
    )
    copied = 2 * first.nbytes / benchmark.extra_info["rival_seconds"]["median"]
    benchmark.extra_info.update(
        bytes_moved=moved * first.nbytes,
        copy_bytes_a_second=copied,
        share_of_copy_bandwidth=moved / 2 * times_as_fast,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128, 512])
def test_svt_against_a_loop(benchmark, cuda, size):
    """64 float32 matrices, against the library's SVD of one after another (no product after it)."""
    xp = cuda.xp
    rng = xp.random.default_rng(0)
    M = rng.standard_normal((64, size, size), dtype=np.float32)
    U, sigma, Vt = xp.linalg.svd(M.astype(np.float64), full_matrices=False)
    tau = float(xp.median(sigma))
    truth = (U * xp.maximum(sigma - tau, 0)[:, None, :]) @ Vt

    def loop() -> list[Any]:
        return [xp.linalg.svd(matrix, full_matrices=False) for matrix in M]

    (X, values, _), _, _ = alternate(
        benchmark,
        lambda: cuda.svt(M, tau),
        loop,
        clock=wall_clock(cuda),
        rounds=5,
        device=device_name(cuda),
        batch=64,
        against="loop over cupy.linalg.svd",
    )
    error = float(xp.linalg.norm(X - truth) / xp.linalg.norm(truth))
    sigma_error = float(xp.abs(values - sigma).max() / sigma.max())
    benchmark.extra_info.update(relative_error=error, singular_value_error=sigma_error)
    assert max(error, sigma_error) <= 1e-5


@pytest.mark.gpu
def test_iteration_against_its_products(benchmark, cuda):
    """One `Majorize` iteration at n = 512, m = 4608, P = 200 000 against its two GEMMs alone.

    The GEMMs are each one call on the whole arrays. Takes about 9 GB of the host's memory.
    """
    need_memory(cuda, 16)
    xp, n, m, rows = cuda.xp, 512, 4608, 200_000
    rng = xp.random.default_rng(0)
    X = xp.maximum(rng.standard_normal((rows, m), dtype=np.float32), 0)
    W = rng.standard_normal((n, m), dtype=np.float32) / 48
    Z = X @ W.T
    weight, inputs, targets, linear_targets = (
        cuda.to_numpy(array) for array in (W, X, xp.maximum(Z, 0), Z)
    )
    layer_io = slr_gpu.LayerIO(weight, None, inputs, targets, linear_targets=linear_targets)
    del X, W, Z
    need_memory(cuda, 12)
    problem = ResponseProblem(layer_io, ops=cuda, ridge=RIDGE, held_out=0.0)
    solver, structure = slr_gpu.Majorize(), Structure("columns", m // 4, n // 4)
    state = solver.start(problem, structure, xp.arange(0, m, 4))
    solver.evaluate(problem, state)
    Mt = state.M.astype(np.float32).T

    def products():
        return (problem.samples.X @ Mt).T @ problem.samples.X

    new, _, times_as_fast = alternate(
        benchmark,
        lambda: solver.attempt(problem, state, structure),
        products,
        clock=wall_clock(cuda),
        rounds=5,
        device=device_name(cuda),
        structure=str(structure),
        against="its two GEMMs",
    )
    benchmark.extra_info.update(
        times_of_its_products=1 / times_as_fast,
        objective_before=float(state.objective),
        objective_after=float(new.objective),
    )
    assert float(new.objective) < float(state.objective)
