"""Cases of singular value thresholding, certified by its optimality conditions; registers them.

In: an ops object. The matrices are random, rank-deficient, graded, zero, tall, wide, with
repeated singular values, with a threshold of zero, tiny, huge, and not finite.
"""

from __future__ import annotations

import numpy as np
from kernel_checks import NUMPY, TOLERANCE, add, close, fetch, give, same_bits


def certify(M, X, tau, tolerance):
    """Assert that X minimises ||X - M||^2 / 2 + tau ||X||_*, from its optimality conditions.

    M - X is tau times a subgradient of the nuclear norm at X: its singular values are at most
    tau, and its inner product with X is tau times the nuclear norm of X.
    """
    rest, scale = M - X, max(np.linalg.norm(M, 2), 1e-300)
    assert np.linalg.norm(rest, 2) <= tau + tolerance * scale, "M - X exceeds tau"
    nuclear = np.linalg.norm(X, "nuc")
    gap = abs((X * rest).sum() - tau * nuclear)
    assert gap <= tolerance * scale * max(nuclear, scale), "M - X is no subgradient"


def matrices(kind, shape, rng):
    """A batch of matrices of a kind, in float64."""
    b, n, m = shape
    k = min(n, m)
    if kind == "zero":
        return np.zeros(shape)
    if kind == "ones":
        return np.ones(shape)
    if kind == "random":
        return rng.standard_normal(shape)
    if kind == "diagonal":  # already orthogonal; a zero among the singular values
        return np.stack([np.eye(n, m) * np.arange(m)] * b)
    U = np.linalg.qr(rng.standard_normal((b, n, k)))[0]
    V = np.linalg.qr(rng.standard_normal((b, m, k)))[0]
    sigma = {
        "deficient": np.where(np.arange(k) < max(1, k // 3), 4.0, 0.0),
        "repeated": np.where(np.arange(k) < k // 2, 4.0, 1.0),
        "graded": 8 * 10.0 ** (-np.arange(k) / 2),
    }[kind]
    return (U * sigma) @ V.swapaxes(1, 2)


def threshold(ops, kind, shape, dtype, tau=1.7, scale=1.0, aligned=True):
    rng = np.random.default_rng(shape)
    M = (scale * matrices(kind, shape, rng)).astype(dtype)
    tau = np.asarray(tau, dtype) * np.dtype(dtype).type(scale)
    exact = M.astype(np.float64)
    U, sigma, Vt = np.linalg.svd(exact, full_matrices=False)
    level = np.broadcast_to(tau.astype(np.float64), shape[0])
    truth = (U * np.maximum(sigma - level[:, None], 0)[:, None, :]) @ Vt

    def call(on):
        return fetch(on, on.svt(give(on, M, aligned), on.asarray(tau)))

    got, tolerance = call(ops), 2 * TOLERANCE[dtype]
    for wanted in (call(NUMPY)[:2], (truth, sigma)):
        close(got[0] / scale, wanted[0] / scale, 4 * tolerance, "X")
        close(got[1] / scale, wanted[1] / scale, tolerance, "sigma")
    assert (np.diff(got[1], axis=1) <= 0).all(), "sigma is not in descending order"
    for i in range(shape[0]):
        size = max(sigma[i].max(initial=0), 1e-300)
        certify(exact[i] / size, got[0][i].astype(np.float64) / size, level[i] / size, tolerance)
        if (np.abs(sigma[i] - level[i]) > 1e-4 * size).all() or size < 1e-200:
            assert got[2][i] == (sigma[i] > level[i]).sum(), "rank"
        if level[i] == 0:
            np.testing.assert_array_equal(got[0][i], M[i], "X is not M at tau = 0")
    assert got[0].dtype == got[1].dtype == np.dtype(dtype)
    assert got[2].dtype == np.int64
    same_bits(got, call(ops))


def threshold_not_finite(ops, shape, dtype):
    M = np.random.default_rng(1).standard_normal((3, *shape)).astype(dtype)
    M[0, -1, 0] = np.nan
    M[2, 0, -1] = np.inf
    for tau in (0.5, 0.0):
        X, sigma, rank = fetch(ops, ops.svt(give(ops, M), tau))
        assert np.isnan(X[[0, 2]]).all()
        assert np.isnan(sigma[[0, 2]]).all()
        assert (rank[[0, 2]] == 0).all()
        wanted = NUMPY.svt(M[1:2], tau)
        close(X[1:2], wanted[0], 8 * TOLERANCE[dtype], "X of the finite one")
        close(sigma[1:2], wanted[1], 2 * TOLERANCE[dtype], "sigma of the finite one")


def threshold_empty(ops, shape, dtype):
    X, sigma, rank = fetch(ops, ops.svt(give(ops, np.zeros(shape, dtype)), 1.0))
    assert X.shape == shape
    assert sigma.shape == (shape[0], min(shape[1:]))
    np.testing.assert_array_equal(rank, np.zeros(shape[0]))


for shape in ((1, 1, 1), (1, 1, 31), (1, 31, 1), (3, 31, 33), (1, 33, 31), (1, 2, 1023)):
    add(threshold, "random", shape)
for kind in ("deficient", "repeated", "graded", "ones", "zero", "diagonal"):
    add(threshold, kind, (2, 12, 17))
add(threshold, "repeated", (1, 33, 33))
add(threshold, "deficient", (2, 17, 12), tau=(0.0, 1.0))
add(threshold, "random", (3, 9, 7), tau=(0.0, 2.0, 100.0))
add(threshold, "random", (1, 12, 9), scale=1e-30)
add(threshold, "random", (1, 12, 9), scale=1e30)
add(threshold, "random", (1, 12, 12), aligned=False)
for kind in ("random", "deficient", "repeated"):  # the library's part
    add(threshold, kind, (2, 132, 140))
    add(threshold, kind, (2, 140, 132), tau=(0.0, 1.0))
add(threshold_not_finite, (5, 7))
add(threshold_not_finite, (132, 130))
for shape in ((0, 5, 6), (2, 0, 6), (2, 5, 0)):
    add(threshold_empty, shape)
