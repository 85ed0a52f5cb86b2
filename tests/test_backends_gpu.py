"""Whole results of `slr_gpu.fit` on a CUDA device against the CPU, and what happens without one.

In: small layers with float64 rows. A device counts when it runs a kernel
(`slr_gpu.ops.why_not_cuda`); otherwise the gpu-marked tests are skipped and say why. The other
tests pretend that there is none, and pass either way; `get_ops` by itself is tested in
test_kernels_gpu.py.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import slr_gpu
from slr_gpu import ops as backends
from slr_gpu.layer_io import LayerIO
from slr_gpu.ops import NumpyOps

# One request a form: what `fit` is asked for, and the structure that it must have.
SIZES = {
    "columns": ({"columns": 30, "rank": 4}, "columns s=30 k=4"),
    "channels": ({"channels": 3, "rank": 4}, "channels s=3 k=4"),
    "rotated": ({"basis_rows": 7, "channels": 2, "rank": 5}, "rotated r=7 s=2 k=5"),
}
SOLVERS = {"majorize": slr_gpu.Majorize(), "admm": slr_gpu.ADMM()}


def layer(activation: str, rows: int = 900) -> LayerIO:
    """12 channels of 3x3 taps to 20 outputs; disturbed targets, so that no fit is perfect."""
    rng = np.random.default_rng(7)
    mix = rng.normal(size=(12, 12)) * (0.8 ** np.arange(12))[:, None]
    smooth = np.exp(-0.3 * np.abs(np.subtract.outer(np.arange(9), np.arange(9))))
    field = rng.normal(size=(rows, 12, 9)) @ np.linalg.cholesky(smooth).T
    inputs = np.maximum(np.einsum("plt,lc->pct", field, mix), 0).reshape(rows, -1)
    weight, bias = rng.normal(size=(20, 12, 3, 3)) / 10, rng.normal(size=20) / 2
    response = inputs @ weight.reshape(20, -1).T + bias
    response = response + 0.05 * rng.normal(size=response.shape)
    return LayerIO(weight, bias, inputs, activation=activation, linear_targets=response)


@pytest.fixture(scope="module", params=["relu", "gelu"])
def layer_io(request):
    return layer(request.param)


@pytest.fixture(scope="module")
def cuda():
    reason = backends.why_not_cuda()
    if reason is not None:
        pytest.skip(f"no CUDA device: {reason}")
    return "cuda"


def objective(layer_io, fitted):
    """``(1/P) ||Y - r(X Mᵀ + b)||²`` on the rows that were fitted, from the dense weight."""
    rows, _ = layer_io.split(0.1)
    response = layer_io.inputs[rows] @ fitted.to_dense().T + fitted.bias
    value = layer_io.activation.value(NumpyOps(), response)
    return np.square(layer_io.targets[rows] - value).sum() / len(rows)


def compare(layer_io, device, **request):
    """Fit on the CPU and on the device; the same structure, support, rank and objective."""
    ours = slr_gpu.fit(layer_io, device="cpu", **request)
    theirs = slr_gpu.fit(layer_io, device=device, **request)
    assert theirs.structure == ours.structure
    assert theirs.rank == ours.rank
    np.testing.assert_array_equal(theirs.columns, ours.columns)
    assert theirs.status is ours.status
    assert len(theirs.history) == len(ours.history)
    for new, old in zip(theirs.history[-1:], ours.history[-1:], strict=True):
        assert new["objective"] == pytest.approx(old["objective"], rel=1e-5)
    assert objective(layer_io, theirs) == pytest.approx(objective(layer_io, ours), rel=1e-5)
    assert theirs.error == pytest.approx(ours.error, rel=1e-5)
    assert theirs.held_out_error == pytest.approx(ours.held_out_error, rel=1e-4)
    for name in ("A", "U", "V", "bias"):
        array = getattr(theirs, name)
        assert isinstance(array, np.ndarray), name
        assert array.dtype == np.float64, name
    return ours, theirs


@pytest.mark.gpu
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("form", SIZES)
def test_sizes_give_the_same_fit(layer_io, cuda, form, solver):
    request, structure = SIZES[form]
    fitted, _ = compare(layer_io, cuda, **request, solver=SOLVERS[solver], ridge=1e-3)
    # With hard budgets ADMM may stop at fewer groups than it was allowed.
    assert solver == "admm" or str(fitted.structure) == structure


@pytest.mark.gpu
@pytest.mark.parametrize("form", [*SIZES, "auto"])
def test_budget_gives_the_same_structure_and_fit(layer_io, cuda, form):
    compare(layer_io, cuda, keep=0.3, form=form)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["columns", "channels"])
def test_penalties_give_the_same_fit(layer_io, cuda, form):
    compare(layer_io, cuda, lambda1=0.05, lambda2=0.05, relative=True, form=form, ridge=1e-3)


@pytest.mark.gpu
def test_float32_rows_give_the_same_fit(cuda):
    wide = layer("relu")
    arrays = (wide.weight, wide.bias, wide.inputs, wide.targets)
    narrow = LayerIO(*(a.astype(np.float32) for a in arrays), kernel_size=(3, 3))
    request = {**SIZES["rotated"][0], "ridge": 1e-3}
    ours, theirs = (slr_gpu.fit(narrow, **request, device=on) for on in ("cpu", cuda))
    assert theirs.structure == ours.structure
    assert theirs.error == pytest.approx(ours.error, rel=1e-4)
    assert theirs.A.dtype == np.float32


@pytest.mark.gpu
def test_same_call_same_bits(cuda):
    layer_io = layer("relu")
    fits = [slr_gpu.fit(layer_io, keep=0.3, form="rotated", device=cuda) for _ in range(2)]
    np.testing.assert_array_equal(fits[0].to_dense(), fits[1].to_dense())


@pytest.mark.gpu
def test_index_of_the_device(cuda):
    layer_io = layer("relu")
    fits = [slr_gpu.fit(layer_io, columns=30, rank=4, device=on) for on in (cuda, "cuda:0", "auto")]
    for other in fits[1:]:
        assert other.error == pytest.approx(fits[0].error, rel=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["cupy", "torch"])
def test_rows_on_the_device_are_not_copied(cuda, kind):
    import cupy

    host = layer("relu")
    names = ("weight", "bias", "inputs", "targets", "linear_targets")
    arrays = {name: cupy.asarray(getattr(host, name)) for name in names}
    if kind == "torch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip(f"torch {torch.__version__} has no CUDA device")
        arrays = {name: torch.from_numpy(getattr(host, name)).cuda() for name in names}
    device = LayerIO(**arrays, kernel_size=(3, 3))
    assert isinstance(device.inputs, cupy.ndarray)
    there = arrays["inputs"]
    assert device.inputs.data.ptr == (there.data_ptr() if kind == "torch" else there.data.ptr)
    ours = slr_gpu.fit(host, **SIZES["rotated"][0], ridge=1e-3)
    theirs = slr_gpu.fit(device, **SIZES["rotated"][0], ridge=1e-3)  # where the arrays are
    assert theirs.error == pytest.approx(ours.error, rel=1e-5)
    back = slr_gpu.fit(device, **SIZES["rotated"][0], ridge=1e-3, device="cpu")
    np.testing.assert_array_equal(back.to_dense(), ours.to_dense())


@pytest.mark.gpu
@pytest.mark.parametrize("form", SIZES)
def test_rows_that_do_not_fit_stream_through(cuda, monkeypatch, form):
    from slr_gpu.ops.memory import DeviceMemory

    layer_io = layer("relu")
    monkeypatch.setattr(DeviceMemory, "fits", lambda self, wanted: False)
    monkeypatch.setattr(DeviceMemory, "block_rows", lambda self, usual, most, each: 100)
    compare(layer_io, cuda, **SIZES[form][0], ridge=1e-3)


@pytest.mark.gpu
def test_out_of_memory_halves_the_block(cuda, monkeypatch):
    import cupy

    from slr_gpu.ops.cupy_ops import CupyOps

    original = CupyOps.masked_gradient

    def limited(self, Z, *rest, **more):
        if Z.shape[1] > 300:
            raise cupy.cuda.memory.OutOfMemoryError(1, 1)
        return original(self, Z, *rest, **more)

    monkeypatch.setattr(CupyOps, "masked_gradient", limited)
    with pytest.warns(RuntimeWarning, match="blocks of"):
        compare(layer("relu"), cuda, **SIZES["rotated"][0], ridge=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_whole_model(cuda, where):
    """Wherever the user's model is, it is captured and fitted on the device and comes back."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} has no CUDA device")
    from test_compress import small_network

    model, data = small_network().eval(), torch.randn(150, 2, 8, 8)
    settings = {"keep": {"params": 0.6}, "samples": 1000, "ridge": 1e-3, "progress": False}
    ours = slr_gpu.compress(model, data, **settings)
    theirs = slr_gpu.compress(model.to(where), data, device="cuda", **settings)
    assert next(theirs.model.parameters()).device.type == where
    with torch.no_grad():
        truth, other = ours.model(data), theirs.model.cpu()(data)
    assert float((truth - other).norm() / truth.norm()) < 1e-2
    for mine, its in zip(ours.report.layers, theirs.report.layers, strict=True):
        assert its.structure == mine.structure


# Without a device ------------------------------------------------------------------------------


def test_fit_on_a_missing_device_names_the_extra(monkeypatch):
    monkeypatch.setattr(backends, "why_not_cuda", lambda index=None: "there is none, says a test.")
    for device in ("cuda", "cuda:3"):
        with pytest.raises(slr_gpu.BackendError, match="there is none") as caught:
            slr_gpu.fit(layer("relu", rows=60), keep=0.5, device=device)
        assert device in str(caught.value)
        assert "pip install 'slr_gpu[cuda13]'" in str(caught.value)


AUTO = """
import sys, warnings
sys.modules["cupy"] = None
import numpy as np
import slr_gpu

rng = np.random.default_rng(0)
layer_io = slr_gpu.LayerIO(rng.normal(size=(6, 8)), None, rng.normal(size=(50, 8)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fits = [slr_gpu.fit(layer_io, keep=0.6, device=on) for on in ("cpu", "auto", "auto", "auto")]
for fitted in fits[1:]:
    np.testing.assert_array_equal(fitted.to_dense(), fits[0].to_dense())
print([str(w.message) for w in caught if "device='auto'" in str(w.message)])
"""


def test_auto_without_cupy_fits_on_the_cpu_and_warns_once_a_process():
    done = subprocess.run([sys.executable, "-c", AUTO], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("device='auto' runs on the CPU") == 1
    assert "CuPy cannot be imported" in done.stdout
    assert "slr_gpu[cuda13]" in done.stdout
