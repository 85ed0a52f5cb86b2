"""What the three operations must compute, as cases that any backend can run.

In: an ops object whose methods launch kernels: on a device (test_kernels_gpu.py), or on the CPU
(test_kernels_host.py, with and without sanitizers). The truths, in float64: the norm of one
group at a time, and an activation's formula with its slope by central differences. `CASES`
holds these and the cases of svt_cases.py.
"""

from __future__ import annotations

import numpy as np
import scipy.special
import svt_cases  # noqa: F401  registers its cases
from kernel_checks import CASES, NUMPY, TOLERANCE, add, close, fetch, give, same_bits

from slr_gpu import activations

__all__ = ["CASES"]

# Column shrink ---------------------------------------------------------------------------------


def shrink(ops, shape, group, dtype, fused=0, aligned=True, tau="middle"):
    rng = np.random.default_rng([*shape, group])
    M, B, dual = rng.standard_normal((3, *shape)).astype(dtype)
    B, dual = B if fused > 0 else None, dual if fused > 1 else None
    b, _, m = shape
    C = M.astype(np.float64)
    C = C - B if fused > 0 else C
    C = C - dual.astype(np.float64) / 2.5 if fused > 1 else C
    norms = np.array(
        [
            [np.sqrt((C[i, :, j : j + group] ** 2).sum()) for j in range(0, m, group)]
            for i in range(b)
        ]
    ).reshape(b, m // group)
    if tau == "middle":  # one a batch entry, half-way between two norms
        s = np.sort(norms, axis=1)
        middle = max(1, s.shape[1] // 2)
        tau = (s[:, middle - 1] + s[:, middle] if s.shape[1] > 1 else s[:, 0]) / 2
        tau = tau.astype(dtype)
    A = np.zeros(shape)
    for i, j in np.ndindex(norms.shape):
        t = float(np.broadcast_to(tau, (b,))[i])
        columns = slice(j * group, (j + 1) * group)
        A[i, :, columns] = max(0.0, 1 - t / norms[i, j]) * C[i, :, columns]
    kept = (norms > np.broadcast_to(tau, (b,))[:, None]).sum(axis=1)

    def call(on):
        M_, B_, dual_ = (give(on, x, aligned) for x in (M, B, dual))
        level = on.asarray(tau) if isinstance(tau, np.ndarray) else tau
        return fetch(on, on.column_shrink(M_, level, group, low_rank=B_, dual=dual_, t=2.5))

    got = call(ops)
    for wanted in (call(NUMPY), (A, norms, kept)):
        close(got[0], wanted[0], TOLERANCE[dtype], "A", scale=np.abs(C))
        close(got[1], wanted[1], 10 * TOLERANCE[dtype], "norms")
        np.testing.assert_array_equal(got[2], wanted[2], "kept")
    close(got[1], norms, 0.5 * TOLERANCE[dtype], "norms, against float64")
    assert got[0].dtype == got[1].dtype == np.dtype(dtype)
    assert got[2].dtype == np.int64
    same_bits(got, call(ops))


def shrink_special(ops, dtype):
    """NaN, infinity, zero columns and large offsets, as NumpyOps treats them."""
    M = np.random.default_rng(5).standard_normal((2, 33, 12)).astype(dtype)
    M[0, 3, 4] = np.nan
    M[1, 32, 11] = np.inf
    M[:, :, 6:9] = 0
    for group, tau in ((1, 5.0), (3, 8.0), (1, 0.0), (3, np.inf)):
        with np.errstate(invalid="ignore"):
            wanted = NUMPY.column_shrink(M, tau, group)
        got = fetch(ops, ops.column_shrink(give(ops, M), tau, group))
        for g, w in zip(got, wanted, strict=True):
            close(g, w, 4 * TOLERANCE[dtype], f"group {group}, tau {tau}")


def shrink_empty(ops, shape, dtype):
    M = np.zeros(shape, dtype)
    got = fetch(ops, ops.column_shrink(give(ops, M), 1.0, 3))
    for g, w in zip(got, NUMPY.column_shrink(M, 1.0, 3), strict=True):
        assert g.shape == w.shape
        np.testing.assert_array_equal(g, w)


for shape, group in (
    ((1, 1, 1), 1),
    ((3, 31, 33), 1),
    ((3, 33, 31), 31),
    ((1, 1023, 9), 9),
    ((1, 9, 1023), 33),
    ((2, 5, 1023), 1),
    ((3, 33, 36), 9),
    ((1, 70, 260), 1),
    ((1, 300, 8), 4),
):
    add(shrink, shape, group)
add(shrink, (3, 33, 36), 9, fused=1)
add(shrink, (3, 33, 36), 9, fused=2)
add(shrink, (3, 33, 35), 5, fused=2)
add(shrink, (3, 33, 36), 9, fused=2, aligned=False)
add(shrink, (2, 33, 36), 1, tau=5.5)
add(shrink, (2, 33, 36), 1, tau=0.0)
add(shrink, (2, 33, 36), 1, tau=1e6)
add(shrink_special)
for shape in ((0, 5, 6), (2, 0, 6), (2, 5, 0)):
    add(shrink_empty, shape)


# Masked gradient -------------------------------------------------------------------------------

FORMULA = {
    "identity": lambda z: z,
    "relu": lambda z: (np.abs(z) + z) / 2,
    "relu6": lambda z: np.minimum(np.maximum(z, 0), 6),
    "clamp": lambda z: np.minimum(np.maximum(z, -1), 1),
    "clamp(0.5,2)": lambda z: np.minimum(np.maximum(z, 0.5), 2),
    "leaky_relu": lambda z: np.maximum(z, 0) + 0.01 * np.minimum(z, 0),
    "leaky_relu(0.2)": lambda z: np.maximum(z, 0) + 0.2 * np.minimum(z, 0),
    "sigmoid": lambda z: (1 + np.tanh(z / 2)) / 2,
    "tanh": np.tanh,
    "silu": lambda z: z * (1 + np.tanh(z / 2)) / 2,
    "gelu": lambda z: z * scipy.special.ndtr(z),
    "gelu_tanh": lambda z: z / (1 + np.exp(-np.sqrt(8 / np.pi) * (z + 0.044715 * z**3))),
    "hardswish": lambda z: z * np.minimum(np.maximum(z + 3, 0), 6) / 6,
}
LIMITS = {"relu6": (0, 6), "clamp": (-1, 1), "clamp(0.5,2)": (0.5, 2)}


def linear_where(name, z, y):
    """Where the convex surrogate is linear, from its definition in DESIGN 3.1."""
    if name == "identity":
        return np.ones(z.shape, bool)
    low, high = LIMITS.get(name, (0, np.inf))
    return ~((z <= low) & (y <= low)) & ~((z >= high) & (y >= high))


def gradient(ops, name, shape, dtype, convex=False, bias=True, aligned=True):
    activation, formula = activations.get(name), FORMULA[name]
    rng = np.random.default_rng(shape)
    Z = (2 * rng.standard_normal(shape)).astype(dtype)
    Y = formula(2 * rng.standard_normal(shape)).astype(dtype)
    shift = rng.standard_normal((shape[0], shape[2])).astype(dtype) if bias else None
    z = (Z if shift is None else Z + shift[:, None, :]).astype(np.float64)
    value, slope = formula(z), (formula(z + 1e-5) - formula(z - 1e-5)) / 2e-5
    if convex:
        linear = linear_where(name, z, Y)
        value, slope = np.where(linear, z, value), np.where(linear, 1, slope)
    truth = slope * (Y - value), ((Y - value) ** 2).sum(axis=(1, 2))

    def call(on):
        Z_, Y_ = give(on, Z, aligned), give(on, Y, aligned)
        return fetch(
            on, on.masked_gradient(Z_, Y_, activation, bias=give(on, shift), convex=convex)
        )

    got = call(ops)
    for wanted, tolerance in ((call(NUMPY), TOLERANCE[dtype]), (truth, 1e-9)):
        close(got[0], wanted[0], max(tolerance, TOLERANCE[dtype]), "R")
        close(got[1], wanted[1], max(tolerance, TOLERANCE[dtype]), "loss")
    assert got[0].dtype == np.dtype(dtype)
    assert got[1].dtype == np.float64
    same_bits(got, call(ops))


def gradient_special(ops, name, dtype, convex=False):
    """NaN, the corners of the activation, and arguments where exp overflows."""
    activation = activations.get(name)
    z = np.array([np.nan, 0, -0.0, 6, -3, 3, 1, -1, 0.5, 2, 1e3, -1e3, 1e-30, 88.8], dtype)
    Z, Y = (x.reshape(1, 14, 14).copy() for x in np.meshgrid(z, z))
    for at in (np.s_[:], np.s_[:, 1:, 1:]):  # with NaN and without
        with np.errstate(all="ignore"):
            wanted = NUMPY.masked_gradient(Z[at], Y[at], activation, convex=convex)
        got = fetch(
            ops, ops.masked_gradient(give(ops, Z[at]), give(ops, Y[at]), activation, convex=convex)
        )
        close(got[0], wanted[0], TOLERANCE[dtype], "R")
        close(got[1], wanted[1], TOLERANCE[dtype], "loss")


def gradient_empty(ops, shape, dtype):
    Z = np.zeros(shape, dtype)
    R, loss = fetch(ops, ops.masked_gradient(give(ops, Z), give(ops, Z), activations.get("relu")))
    assert R.shape == shape
    np.testing.assert_array_equal(loss, np.zeros(shape[0]))


for name in FORMULA:
    for convex in (False, True)[: 1 + activations.get(name).has_convex_surrogate]:
        add(gradient, name, (3, 33, 31), convex=convex)
        add(gradient_special, name, convex=convex)
for shape in ((1, 1, 1), (1, 31, 1023), (1, 1023, 33), (3, 31, 32), (1, 3, 2100)):
    add(gradient, "relu", shape)
add(gradient, "relu", (3, 33, 31), bias=False)
add(gradient, "relu", (3, 31, 32), bias=False)
add(gradient, "relu", (3, 31, 32), aligned=False)
for shape in ((0, 5, 6), (2, 0, 6), (2, 5, 0)):
    add(gradient_empty, shape)
