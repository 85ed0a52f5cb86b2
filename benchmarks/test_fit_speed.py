"""Time of `slr_gpu.fit` on one layer the size of VGG's conv3-2, with its error beside it.

Run with ``pytest benchmarks/ --benchmark-only``.
"""

from __future__ import annotations

import numpy as np
import pytest

import slr_gpu


@pytest.fixture(scope="module")
def conv_layer() -> slr_gpu.LayerIO:
    """n = 256, m = 2304, P = 18 000, with correlated, non-negative inputs."""
    rng = np.random.default_rng(0)
    channels, taps, rows = 256, 9, 18_000
    mix = rng.normal(size=(96, channels)).astype("f4") * (0.95 ** np.arange(96))[:, None]
    smooth = np.exp(-0.4 * np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))))
    field = rng.normal(size=(rows, 96, taps)).astype("f4") @ np.linalg.cholesky(smooth).T
    inputs = np.maximum(np.einsum("plt,lc->pct", field, mix, optimize=True), 0)
    weight = rng.normal(size=(256, channels, 3, 3)) / 48
    return slr_gpu.LayerIO(weight.astype("f4"), None, inputs.reshape(rows, -1).astype("f4"))


@pytest.mark.parametrize("form", ["auto", "columns", "channels", "rotated"])
def test_fit(benchmark, conv_layer, form):
    fitted = benchmark.pedantic(
        slr_gpu.fit, (conv_layer,), {"keep": 0.25, "form": form}, rounds=3, warmup_rounds=1
    )
    benchmark.extra_info["held_out_error"] = fitted.held_out_error
    benchmark.extra_info["structure"] = str(fitted.structure)
    assert fitted.parameters - 256 <= 0.25 * conv_layer.weight.size
