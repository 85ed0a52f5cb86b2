"""Every contender of the grid on one synthetic layer: time, with the held-out error beside it.

Run with ``pytest benchmarks/ --benchmark-only``; no checkpoint is needed. `benchmarks.papers grid`
is the same on the layers of a trained network.
"""

from __future__ import annotations

import numpy as np
import pytest
from contenders import CONTENDERS

import slr_gpu

KEEP = 0.25


@pytest.fixture(scope="module")
def conv_layer() -> slr_gpu.LayerIO:
    """n = 64, m = 576, P = 6000, with correlated, non-negative inputs."""
    rng = np.random.default_rng(0)
    channels, taps, rows, latent = 64, 9, 6000, 24
    mix = rng.normal(size=(latent, channels)) * (0.9 ** np.arange(latent))[:, None]
    smooth = np.exp(-0.4 * np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))))
    field = rng.normal(size=(rows, latent, taps)) @ np.linalg.cholesky(smooth).T
    inputs = np.maximum(np.einsum("plt,lc->pct", field, mix, optimize=True), 0)
    weight = rng.normal(size=(64, channels, 3, 3)) / 24
    return slr_gpu.LayerIO(weight.astype("f4"), None, inputs.reshape(rows, -1).astype("f4"))


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.label)
def test_contender(benchmark, conv_layer, contender):
    # Slow ones need no warming up.
    rounds, warmup = (1, 0) if contender.slow else (3, 1)
    fitted = benchmark.pedantic(
        contender.fit, (conv_layer, KEEP), rounds=rounds, warmup_rounds=warmup
    )
    benchmark.extra_info["held_out_error"] = fitted.held_out_error
    benchmark.extra_info["structure"] = str(fitted.structure)
    benchmark.extra_info["iterations"] = len(fitted.history)
    n, m = conv_layer.weight.shape
    assert fitted.parameters - n <= KEEP * n * m
    assert np.isfinite(fitted.held_out_error)
