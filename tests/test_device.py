"""Solvers on a stand-in for a device: nothing mixes with host arrays, nothing waits needlessly.

In: small layers; `device_double` in place of CuPy. Checked against the CPU's results.
"""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from device_double import DeviceArray, DoubleOps, Streams, counts
from test_backends_gpu import SIZES, layer

import slr_gpu
from slr_gpu.decomposition import Structure
from slr_gpu.ops import NumpyOps
from slr_gpu.ops.memory import DeviceMemory
from slr_gpu.problem import ResponseProblem
from slr_gpu.samples import Samples

SOLVERS = {
    "majorize": slr_gpu.Majorize(),
    "admm": slr_gpu.ADMM(iterations=30),
    "admm-proximal": slr_gpu.ADMM(scheme="proximal", iterations=30),
}


def fit_on(monkeypatch, ops, layer_io, **request):
    monkeypatch.setattr(sys.modules["slr_gpu.fit"], "get_ops", lambda device: ops)
    return slr_gpu.fit(layer_io, device="cuda", **request)


def same(ours, theirs, *, bits=True):
    """The same fit; where sums are cut otherwise, ties of a support may fall the other way."""
    if not bits and ours.form != "rotated":
        assert theirs.held_out_error == pytest.approx(ours.held_out_error, rel=0.05)
        return
    assert theirs.structure == ours.structure and theirs.status is ours.status
    assert len(theirs.history) == len(ours.history)
    np.testing.assert_array_equal(theirs.columns, ours.columns)
    assert theirs.held_out_error == pytest.approx(ours.held_out_error, rel=1e-9)
    np.testing.assert_allclose(theirs.to_dense(), ours.to_dense(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("form", SIZES)
def test_sizes_on_a_device(monkeypatch, form, solver, activation):
    layer_io = layer(activation)
    request = {**SIZES[form][0], "ridge": 1e-3, "solver": SOLVERS[solver]}
    ours = slr_gpu.fit(layer_io, **request)
    same(ours, fit_on(monkeypatch, DoubleOps(), layer_io, **request))


@pytest.mark.parametrize("form", ["auto", "columns", "channels", "rotated"])
def test_budget_on_a_device(monkeypatch, form):
    layer_io = layer("relu")
    ours = slr_gpu.fit(layer_io, keep=0.3, form=form)
    same(ours, fit_on(monkeypatch, DoubleOps(), layer_io, keep=0.3, form=form))


@pytest.mark.parametrize("form", ["columns", "rotated"])
def test_problems_by_rows_on_a_device(monkeypatch, form):
    monkeypatch.setattr("slr_gpu.problem.WIDEST", 60)
    monkeypatch.setattr("slr_gpu.problem.MOST_ROWS", 50)
    layer_io = layer("relu")
    ours = slr_gpu.fit(layer_io, keep=0.3, form=form)
    same(ours, fit_on(monkeypatch, DoubleOps(), layer_io, keep=0.3, form=form))


def test_penalties_on_a_device(monkeypatch):
    request = {"lambda1": 0.05, "lambda2": 0.05, "relative": True, "ridge": 1e-3}
    request["solver"] = slr_gpu.ADMM(balance=True, iterations=60)
    layer_io = layer("relu")
    ours = slr_gpu.fit(layer_io, **request)
    same(ours, fit_on(monkeypatch, DoubleOps(), layer_io, **request))


@pytest.mark.parametrize("objective", ["activation", "linear"])
@pytest.mark.parametrize("form", ["columns", "rotated"])
def test_rows_that_do_not_fit_stream_through_and_blocks_are_halved(monkeypatch, form, objective):
    layer_io = layer("relu")
    request = {"keep": 0.3, "form": form, "objective": objective}
    ours = slr_gpu.fit(layer_io, **request)
    ops = DoubleOps(rows=150)
    with pytest.warns(RuntimeWarning, match="blocks of"):
        theirs = fit_on(monkeypatch, ops, layer_io, **request)
    same(ours, theirs, bits=False)
    assert ops.memory.released and max(ops.memory.sizes) <= 150


@pytest.mark.parametrize("rows", [None, 200])
def test_rows_on_a_device_stay_there(monkeypatch, rows):
    """Or pass through it in blocks, where a second copy of them does not fit."""
    host, ops = layer("relu"), DoubleOps(rows)
    monkeypatch.setattr("slr_gpu.layer_io.why_not_cuda", lambda index: None)
    monkeypatch.setattr("slr_gpu.layer_io.get_ops", lambda device: ops)
    arrays = (host.weight, host.bias, host.inputs, host.targets)
    device = slr_gpu.LayerIO(
        *(ops.asarray(a) for a in arrays),
        kernel_size=(3, 3),
        linear_targets=ops.asarray(host.linear_targets),
    )
    assert all(isinstance(a, DeviceArray) for a in (device.inputs, device.targets, device.weight))
    request = {"keep": 0.3, "form": "rotated"}
    ours = slr_gpu.fit(host, **request)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        same(ours, fit_on(monkeypatch, ops, device, **request))
    # The CPU can be asked for all the same.
    monkeypatch.setattr(DeviceArray, "get", lambda self: self.host, raising=False)
    same(ours, fit_on(monkeypatch, NumpyOps(), device, **request))


def test_no_memory_even_for_a_small_block(monkeypatch):
    with pytest.warns(RuntimeWarning), pytest.raises(slr_gpu.BackendError, match="out of memory"):
        fit_on(monkeypatch, DoubleOps(rows=10), layer("relu"), keep=0.3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_results_are_waited_for_once_in_several_iterations(solver):
    ops = DoubleOps()
    problem = ResponseProblem(layer("relu"), ops=ops, held_out=0.1)
    structure, support = Structure("columns", 30, 4), ops.xp.arange(30)
    if solver == "majorize":
        iterating = SOLVERS[solver]
        state = iterating.start(problem, structure, support)
        iterating.evaluate(problem, state)
        iterating.steps(problem, state, structure, 4)  # fills what is computed once
        before = counts["waits"]
        iterating.steps(problem, state, structure, 4)
        # The state, and the four iterations (twice where an attempt failed).
        assert counts["waits"] - before <= 3
        return
    iterating = slr_gpu.ADMM(scheme=SOLVERS[solver].scheme, iterations=24, tolerance=0)
    state = iterating.start(problem, structure)
    iterating.iterate(problem, structure)
    before = counts["waits"]
    iterating.start(problem, structure)
    starting = counts["waits"] - before
    before = counts["waits"]
    iterating.iterate(problem, structure)
    assert counts["waits"] - before - starting == 24 / ops.ahead


def test_the_stand_in_refuses_host_arrays():
    device, host = DeviceArray(np.ones(3)), np.ones(3)
    for mix in (
        lambda: device + host,
        lambda: host + device,
        lambda: np.sqrt(device) + np.concatenate([device, host]),
        lambda: device[np.arange(2)],
        lambda: np.asarray(device),
        lambda: DoubleOps().xp.sum(host),
    ):
        with pytest.raises(TypeError):
            mix()


# Streaming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_never_read_before_they_are_there_or_after_they_are_gone(seed):
    """The copy stream and the compute stream get on in any order that their events allow."""
    rng = np.random.default_rng(seed)
    X, Y = rng.normal(size=(23, 3)), rng.normal(size=(23, 2))
    index = np.flatnonzero(rng.random(23) < 0.8)
    cupy = Streams(seed)
    seen = []
    for block in DeviceMemory(cupy, 0).stream((X, Y), index, 4):
        # Work on the block is queued; it reads the buffers when its turn comes.
        cupy.current.add(lambda block=block: seen.append([b.host.copy() for b in block]))
    np.testing.assert_array_equal(np.concatenate([b[0] for b in seen]), X[index])
    np.testing.assert_array_equal(np.concatenate([b[1] for b in seen]), Y[index])


def test_the_stand_in_for_streams_shows_a_missing_event(monkeypatch):
    """Without the wait for the last work on a buffer some order gives wrong rows."""
    from slr_gpu.ops import memory

    original = memory._Slot.fill

    def forgetful(self, arrays, rows, stream):
        monkeypatch.setattr(stream, "wait_event", lambda event: None, raising=False)
        original(self, arrays, rows, stream)

    monkeypatch.setattr(memory._Slot, "fill", forgetful)
    X = np.arange(40.0).reshape(20, 2)
    wrong = 0
    for seed in range(20):
        cupy, seen = Streams(seed), []
        for (block,) in DeviceMemory(cupy, 0).stream((X,), np.arange(20), 4):
            cupy.current.add(lambda block=block, seen=seen: seen.append(block.host.copy()))
        wrong += not np.array_equal(np.concatenate(seen), X)
    assert wrong


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_sums_do_not_depend_on_the_blocks(block):
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(200, 4)), rng.normal(size=(200, 3))
    samples = Samples(NumpyOps(), X, Y, Y, np.arange(0, 200, 2), X.dtype)
    samples.centre(np.ones(4))
    rows, gram = samples.sum(lambda X, Y, Z: (np.full((), len(X)), Y.T @ X), block=block)
    assert rows == 100
    np.testing.assert_allclose(gram, Y[::2].T @ (X[::2] - 1), atol=1e-12)


def test_memory_of_a_device_by_what_is_told(monkeypatch):
    memory = DeviceMemory(Streams(0), 0)
    monkeypatch.setattr(memory, "_free_on_device", lambda: 10**6)
    monkeypatch.setattr(memory, "_unused_in_pool", lambda: 10**6)
    assert memory.fits(10**6) and not memory.fits(10**6 + 1)
    assert memory.block_rows(2, 10**9, 1000) == 200
    assert memory.block_rows(2, 50, 1000) == 50
    assert memory.block_rows(300, 1000, 1000) == 300


def test_free_memory_by_nvml_and_by_the_runtime(monkeypatch):
    """Of the device with the same PCI address, whatever its number; the runtime's where NVML fails."""

    class NVMLError(Exception):
        pass

    asked = []
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: asked.append("shutdown"),
        nvmlDeviceGetHandleByPciBusId=asked.append,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=700),
    )
    cupy = Streams(0)

    class Device:
        def __init__(self, index):
            self.pci_bus_id = f"0000:{index}"

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    cupy.cuda.Device = Device
    free = 900
    cupy.cuda.runtime = SimpleNamespace(memGetInfo=lambda: (free, 1000))
    cupy.get_default_memory_pool = lambda: SimpleNamespace(free_bytes=lambda: 11)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert DeviceMemory(cupy, 3).free() == 711
    assert asked == ["0000:3", "shutdown"]
    free = 300  # of one instance of a device that is divided (MIG)
    assert DeviceMemory(cupy, 3).free() == 311

    def fails():
        raise NVMLError

    nvml.nvmlInit = fails
    assert DeviceMemory(cupy, 3).free() == 311
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert DeviceMemory(cupy, 3).free() == 311
