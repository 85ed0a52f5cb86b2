"""How results of the three operations are compared, and the list of cases.

A case takes an ops object: CupyOps on a device, HostOps on the CPU. It fetches results to NumPy
and compares them with those of `NumpyOps` and with a truth of its own in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slr_gpu.ops.numpy_ops import NumpyOps

DTYPES = ("float32", "float64")
TOLERANCE = {"float32": 2e-6, "float64": 1e-12}  # relative to the largest number of an array
NUMPY = NumpyOps()


@dataclass(frozen=True)
class Case:
    """A named check; `run` takes the ops and raises AssertionError."""

    name: str
    run: Callable


CASES: list[Case] = []


def add(function, *arguments, **keywords):
    """Register one case for each dtype."""
    for dtype in DTYPES:
        words = [function.__name__, *map(_word, arguments)]
        words += [f"{k}={_word(v)}" for k, v in keywords.items()]

        def run(ops, dtype=dtype):
            function(ops, *arguments, dtype=dtype, **keywords)

        CASES.append(Case(f"{'-'.join(words)}-{dtype}", run))


def _word(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def close(got, wanted, tolerance, what, scale=None):
    """Assert |got - wanted| <= tolerance * scale, and NaN in the same places.

    The scale is that of the numbers that were added up: max |wanted| unless something else is
    given.
    """
    got, wanted = np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    if scale is None:
        scale = np.abs(wanted, where=np.isfinite(wanted), out=np.zeros(wanted.shape))
    scale = np.max(scale, initial=0.0)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * scale, err_msg=what)


def same_bits(first, second):
    """Assert that two results agree to the last bit."""
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes(), "the same input gave other bits"


def give(ops, array, aligned=True):
    """The array on the ops' device; not aligned: one element after a 16-byte boundary."""
    if array is None or aligned:
        return None if array is None else ops.asarray(array)
    room = ops.xp.empty(array.size + 1, dtype=array.dtype)
    view = room[1:].reshape(array.shape)
    view[...] = ops.asarray(array)
    return view


def fetch(ops, outputs):
    return tuple(ops.to_numpy(x) for x in outputs)
