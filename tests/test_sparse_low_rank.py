"""Linear layers without an activation, against the usual alternating sparse + low-rank."""

from __future__ import annotations

import numpy as np
import pytest

import slr_gpu
from benchmarks.transformer_layers import alternating, compare


def projection(seed, n=48, m=64, rows=700):
    """Inputs like those behind a layer norm: correlated, a few features far larger; unseen rows."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(m, m)) * 0.93 ** np.arange(m)[:, None]
    inputs = rng.standard_t(5, size=(2 * rows, m)) @ mix + 0.3 * rng.normal(size=(2 * rows, m))
    inputs *= np.exp(0.8 * rng.normal(size=m)) / inputs.std(axis=0)
    weight = rng.normal(size=(n, m)) / m**0.5
    weight[:, rng.permutation(m)[:4]] *= 4
    arrays = weight.astype("f4"), rng.normal(size=n).astype("f4"), inputs[:rows].astype("f4")
    return slr_gpu.LayerIO(*arrays, activation="identity"), inputs[rows:].astype("f4")


@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_worse_than_the_alternation_at_equal_numbers(seed, keep):
    errors = compare(*projection(seed), keep)
    assert errors["grebsmo, values"] <= errors["alternating entries, values"]
    assert errors["fit"] <= errors["alternating columns"]
    # An entry that may stand anywhere is stored with its place.
    assert errors["fit"] <= errors["alternating entries, values and places"]


def test_the_alternation_finds_what_it_is_made_for():
    rng = np.random.default_rng(0)
    sparse = np.where(rng.random((20, 30)) < 0.05, 5 * rng.normal(size=(20, 30)), 0)
    low_rank = rng.normal(size=(20, 2)) @ rng.normal(size=(2, 30)) / 2
    found = alternating(sparse + low_rank, np.ones(30), int((sparse != 0).sum()), 2)
    assert np.linalg.norm(found - sparse - low_rank) < 0.1 * np.linalg.norm(sparse + low_rank)
