"""The three hot operations of the solvers, and the array module that everything else uses.

`NumpyOps` is complete and is the definition; `CupyOps` overrides the three operations with raw
kernels. Every operation has a leading batch axis b: the same layer at several penalties, or
several layers of one shape.
"""

from __future__ import annotations

from typing import Any

import numpy
import scipy.special

from ..activations import Activation
from ..errors import InputError, complain
from .memory import HostMemory

Array = Any

PIECE = 32_768  # elements whose intermediate results stay in a core's cache
TILE = 128  # rows of a triangular matrix that are solved for at once
WIDE = 512  # columns of its inverse


class NumpyOps:
    """Operations on the CPU.

    Attributes
    ----------
    xp : module
        The array module (numpy or cupy).
    scipy : module
        `scipy` or `cupyx.scipy`, with ``special`` loaded.
    device : str
        ``"cpu"`` or ``"cuda:<index>"``.
    memory : HostMemory
        What is free on the device, and the way there for rows that do not fit.
    ahead : int
        Iterations that a solver queues before it reads their results: 1 where reading is free.
    """

    xp = numpy
    scipy = scipy
    device = "cpu"
    memory = HostMemory()
    ahead = 1

    def asarray(self, array: Array, dtype: Any = None) -> Array:
        """Bring an array (NumPy, CuPy or torch) to this device, without a copy where possible."""
        if hasattr(array, "detach"):
            array = array.detach().cpu()
            # NumPy has no bfloat16.
            array = (array.float() if "bfloat16" in str(array.dtype) else array).numpy()
        elif hasattr(array, "__cuda_array_interface__"):
            array = array.get()
        return numpy.asarray(array, dtype=dtype)

    def to_numpy(self, array: Array) -> numpy.ndarray:
        """Bring an array of this device to host memory."""
        return numpy.asarray(array)

    def read(self, scalars: list[Array | float]) -> list[float]:
        """Bring scalars of this device to the host, all at once; waits for them."""
        xp = self.xp
        return self.to_numpy(xp.stack([xp.asarray(s, dtype="float64") for s in scalars])).tolist()

    def synchronize(self) -> None:
        """Wait until all queued work is done."""

    def cholesky(self, A: Array) -> Array:
        """Lower triangular L with ``L Lᵀ = A``, and zeros above the diagonal.

        By halves, whose work is products of matrices: the LAPACK that NumPy brings takes 1.4 times
        as long for 4608 rows.

        Parameters
        ----------
        A : array, (m, m)
            Symmetric and positive definite.

        Raises
        ------
        InputError
            Where A is not positive definite: as a rule a Gram matrix whose ridge rounding outweighs.
        """
        L = A.copy()
        try:
            _factorise(self.xp, L)
        except numpy.linalg.LinAlgError as error:
            raise InputError(
                complain(
                    f"{error} ({len(A)} rows)",
                    "a ridge that rounding does not outweigh",
                    "Raise ridge.",
                )
            ) from error
        return L

    def solve_triangular(self, L: Array, rhs: Array, *, transposed: bool = False) -> Array:
        """``L⁻¹ rhs``, or ``L⁻ᵀ rhs``.

        By products of the BLAS that NumPy brings. SciPy's wheels bring another one, whose threads
        stay awake after a call and take the cores from the next products: half of their speed.

        Parameters
        ----------
        L : array, (m, m)
            Lower triangular, with zeros above the diagonal.
        rhs : array, (m, w)
        """
        xp, size = self.xp, len(L)
        solution = xp.empty(rhs.shape, dtype=rhs.dtype)
        starts = range(0, size, TILE)
        for start in reversed(starts) if transposed else starts:
            end = min(start + TILE, size)
            tile = slice(start, end)
            inverse = xp.linalg.inv(L[tile, tile])
            if transposed:
                left = rhs[tile] - L[end:, tile].T @ solution[end:]
                solution[tile] = inverse.T @ left
            else:
                left = rhs[tile] - L[tile, :start] @ solution[:start]
                solution[tile] = inverse @ left
        return solution

    def triangular_inverse(self, L: Array) -> Array:
        """``L⁻¹`` (m, m) of a lower triangular matrix, in m³/3 operations.

        The solve with an identity would take m³: it does not know where the zeros are.
        """
        xp, size = self.xp, len(L)
        inverse = xp.zeros_like(L)
        for start in range(0, size, TILE):
            tile = slice(start, min(start + TILE, size))
            inverse[tile, tile] = corner = xp.linalg.inv(L[tile, tile])
            left = corner @ L[tile, :start]
            for first in range(0, start, WIDE):
                part = slice(first, min(first + WIDE, start))
                inverse[tile, part] = -(left[:, first:] @ inverse[first:start, part])
        return inverse

    def column_shrink(
        self,
        M: Array,
        tau: Array | float,
        group_size: int = 1,
        *,
        low_rank: Array | None = None,
        dual: Array | None = None,
        t: float = 1.0,
    ) -> tuple[Array, Array, Array]:
        """Group soft threshold of C = M - low_rank - dual / t (Ma et al. 2018, eq. 10).

        The prox of ``tau * sum_g ||C_g||_F``: each group of columns is scaled by
        ``max(0, 1 - tau / ||C_g||_F)``.

        Parameters
        ----------
        M : array, (b, n, m)
            float32 or float64.
        tau : float or array (b,)
            Threshold, >= 0; one a batch entry, or one for all.
        group_size : int
            Neighbouring columns that are kept or dropped together; divides m. 1 for the
            paper's single columns, kh * kw for whole input channels.
        low_rank, dual : array, (b, n, m), optional
            Subtracted from M on the fly.
        t : float
            Divides `dual`.

        Returns
        -------
        A : array, (b, n, m)
        norms : array, (b, m // group_size)
            Frobenius norms of the groups of C.
        kept : int array, (b,)
            Groups that are not zero in A. A group with a NaN counts as kept, so that it shows.
        """
        xp = self.xp
        C = M
        if low_rank is not None:
            C = C - low_rank
        if dual is not None:
            C = C - dual / M.dtype.type(t)
        b, n, m = C.shape
        grouped = C.reshape(b, n, m // group_size, group_size)
        # Summed in float64: squares of tiny float32 entries underflow.
        squares = xp.square(grouped, dtype=xp.float64).sum(axis=(1, 3))
        norms = xp.sqrt(squares).astype(C.dtype)
        tau = xp.broadcast_to(xp.asarray(tau, dtype=C.dtype).reshape(-1, 1), (b, 1))
        dropped = norms <= tau
        scale = xp.where(dropped, 0, 1 - tau / xp.where(dropped, 1, norms)).astype(C.dtype)
        A = (grouped * scale[:, None, :, None]).reshape(b, n, m)
        return A, norms, (~dropped).sum(axis=1)

    def svt(self, M: Array, tau: Array | float) -> tuple[Array, Array, Array]:
        """Singular value thresholding D_tau (Ma et al. 2018, eq. 12; Cai et al. 2010).

        The prox of ``tau * ||M||_*``: ``U diag(max(sigma - tau, 0)) V``.

        Parameters
        ----------
        M : array, (b, n, m)
        tau : float or array (b,)
            Threshold, >= 0.

        Returns
        -------
        X : array, (b, n, m)
        sigma : array, (b, min(n, m))
            Singular values of M, descending.
        rank : int array, (b,)
            Number of singular values above tau.

        A matrix with NaN or Inf gives NaN in X and sigma and rank 0; the others are not affected.
        """
        xp = self.xp
        bad = ~xp.isfinite(M).all(axis=(1, 2))
        M = xp.where(bad[:, None, None], 0, M).astype(M.dtype)
        U, sigma, Vt = xp.linalg.svd(M, full_matrices=False)
        tau = xp.asarray(tau, dtype=M.dtype).reshape(-1, 1)
        shrunk = xp.maximum(sigma - tau, 0)
        X = (U * shrunk[:, None, :]) @ Vt
        X[bad], sigma[bad] = xp.nan, xp.nan
        return X, sigma, (shrunk > 0).sum(axis=1)

    def masked_gradient(
        self,
        Z: Array,
        Y: Array,
        activation: Activation,
        *,
        bias: Array | None = None,
        convex: bool = False,
    ) -> tuple[Array, Array]:
        """Masked residual and loss in one pass.

        With z = Z + bias, ``R = s * (Y - v)`` and ``loss = sum (Y - v)**2`` where (v, s) are the
        value and slope of the activation, or of its convex surrogate (see
        `slr_gpu.activations`). For ReLU, R = 1[z > 0] (Y - z): the gradient of the loss in Z is
        -2 R.

        Parameters
        ----------
        Z, Y : array, (b, P, n)
            Responses before the activation (without bias) and target responses after it.
        activation : Activation
        bias : array, (b, n), optional
        convex : bool
            Use the convex surrogate l_c.

        Returns
        -------
        R : array, (b, P, n)
        loss : float64 array, (b,)
            Summed over samples and outputs.
        """
        xp = self.xp
        if convex and activation.linear_where is None:
            raise InputError(
                complain(
                    f"convex=True for {activation.name}",
                    "an activation with a convex surrogate (relu, clamp, leaky_relu, identity)",
                    "Pass convex=False.",
                )
            )
        R, loss = xp.empty_like(Z), xp.zeros(len(Z))
        step = max(1, PIECE // max(1, Z.shape[2]))
        for start in range(0, Z.shape[1], step):
            rows = slice(start, start + step)
            R[:, rows], part = self._masked(Z[:, rows], Y[:, rows], activation, bias, convex)
            loss += part
        return R, loss

    def _masked(
        self, Z: Array, Y: Array, activation: Activation, bias: Array | None, convex: bool
    ) -> tuple[Array, Array]:
        """`masked_gradient` of a few rows."""
        xp = self.xp
        z = Z if bias is None else Z + bias[:, None, :]
        value, slope = activation.value(self, z), activation.slope(self, z)
        if convex:
            linear = activation.linear_where(z, Y)
            value = _select(linear, z, value)
            # Where there is a surrogate, slopes are at most 1.
            xp.maximum(slope, linear.astype(slope.dtype), out=slope)
        error = Y - value
        loss = xp.square(error).sum(axis=(1, 2), dtype=xp.float64)
        slope *= error
        return slope, loss


def _select(mask: Array, first: Array, second: Array) -> Array:
    """``where(mask, first, second)`` on the bits: without branches, in half the time."""
    bits = f"i{first.itemsize}"
    one, other = first.view(bits), second.view(bits)
    chosen = one ^ other
    chosen &= -mask.astype(bits)
    chosen ^= other
    return chosen.view(first.dtype)


def _factorise(xp: Any, A: Array) -> None:
    """Put the Cholesky factor of A in its place."""
    half = _half(len(A))
    if not half:
        A[...] = xp.linalg.cholesky(A)
        return
    _factorise(xp, A[:half, :half])
    below = A[half:, :half]
    _divide(xp, below, A[:half, :half])
    A[half:, half:] -= below @ below.T
    _factorise(xp, A[half:, half:])
    A[:half, half:] = 0


def _divide(xp: Any, B: Array, L: Array) -> None:
    """Put ``B L^-T`` in the place of B (w, m)."""
    half = _half(len(L))
    if not half:
        inverse = xp.linalg.inv(L).T
        quotient = B @ inverse
        # Once more with what is left, or rounding grows with the condition of L.
        B[...] = quotient + (B - quotient @ L.T) @ inverse
        return
    _divide(xp, B[:, :half], L[:half, :half])
    B[:, half:] -= B[:, :half] @ L[half:, :half].T
    _divide(xp, B[:, half:], L[half:, half:])


def _half(size: int) -> int:
    """Where to cut a triangle in two, at a whole number of tiles; 0 for one tile."""
    return -(-size // (2 * TILE)) * TILE if size > TILE else 0
