"""The three hot operations as CUDA kernels, launched through CuPy.

In: CuPy arrays (batch axis first; what is not contiguous is copied first) or, through `asarray`,
NumPy arrays and torch tensors. Out: CuPy arrays, which ``torch.from_dlpack`` takes without a
copy. The definition, argument by argument, is `NumpyOps`; the kernels are in ``kernels/*.cu``,
compiled for the device at first use. Work is queued on CuPy's current stream of the device that
holds the arrays; only `svt` of large matrices waits, for the status of the library's solver.
This module can be imported without CuPy.
"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any

import numpy

from ..activations import Activation
from ..errors import InputError, complain
from .launch import (
    C_NAMES,
    THREADS,
    activation_defines,
    check_operands,
    jacobi_shared,
    kernel_names,
    kernel_source,
    pack,
    power_of_two,
    slabs,
    virtual_width,
)
from .memory import DeviceMemory
from .numpy_ops import NumpyOps
from .pool import share_memory_pool

Array = Any

JACOBI_MAX = 128  # small side of a matrix, up to which one block with shared memory takes it
AHEAD = 4  # iterations queued between two looks at their results
JACOBI_SWEEPS = 30  # a bound; random matrices need 6 to 10

i32, i64 = numpy.int32, numpy.int64  # kernel arguments have the kernel's width


class CupyOps(NumpyOps):
    """Operations on a CUDA device.

    Parameters
    ----------
    index : int, optional
        The device; it becomes the current one of this thread. The current one by default.

    Raises
    ------
    ImportError
        Without CuPy; `slr_gpu.ops.get_ops` turns it into advice.
    """

    def __init__(self, index: int | None = None):
        import cupy
        import cupyx.scipy
        import cupyx.scipy.linalg
        import cupyx.scipy.special

        self.xp = cupy
        self.scipy = cupyx.scipy
        if index is not None:
            cupy.cuda.Device(index).use()
        self._index = cupy.cuda.Device().id
        self.device = f"cuda:{self._index}"
        self.memory, self.ahead = DeviceMemory(cupy, self._index), AHEAD
        self._kernels: dict[tuple[str, str, str], Any] = {}
        share_memory_pool(cupy)

    def asarray(self, array: Array, dtype: Any = None) -> Array:
        """Bring an array (NumPy, CuPy or torch) to this device, without a copy where possible."""
        with self.xp.cuda.Device(self._index):
            if hasattr(array, "detach"):
                array = array.detach()
                if str(array.dtype) == "torch.bfloat16":  # which NumPy does not know
                    array = array.float()
                if array.is_cuda:
                    share_memory_pool(self.xp)
                    array = self.xp.from_dlpack(array.to(self.device))
                else:
                    array = array.numpy()
            return self.xp.asarray(array, dtype=dtype)

    def to_numpy(self, array: Array) -> numpy.ndarray:
        """Bring an array of this device to host memory; waits for it."""
        return self.xp.asnumpy(array)

    def synchronize(self) -> None:
        """Wait until all work queued on the current stream is done."""
        with self.xp.cuda.Device(self._index):
            self.xp.cuda.get_current_stream().synchronize()

    def cholesky(self, A: Array) -> Array:
        """See `NumpyOps.cholesky`; from cuSOLVER."""
        return self.xp.linalg.cholesky(A)

    def solve_triangular(self, L: Array, rhs: Array, *, transposed: bool = False) -> Array:
        """``L⁻¹ rhs``, or ``L⁻ᵀ rhs``, by the library."""
        solve = self.scipy.linalg.solve_triangular
        return solve(L, rhs, lower=True, trans=int(transposed), check_finite=False)

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
        """As `NumpyOps.column_shrink`, with the squares summed in float64."""
        M, low_rank, dual = self._operands(M=M, low_rank=low_rank, dual=dual)
        xp, (b, n, m), dtype = self.xp, M.shape, M.dtype
        if group_size < 1 or m % group_size:
            raise InputError(
                complain(
                    f"group_size={group_size} for {m} columns",
                    "a positive divisor of the number of columns",
                    "Use 1 for single columns, kh * kw for input channels.",
                )
            )
        if M.size == 0:
            return super().column_shrink(M, tau, group_size, low_rank=low_rank, dual=dual, t=t)
        with self._at(M):
            tau = self._thresholds(tau, b, dtype)
            vec = pack(m, dtype.itemsize, self._addresses(M, low_rank, dual))
            lanes = power_of_two(math.ceil(m / vec), 32)
            tiles = math.ceil(m / (lanes * vec))
            count, rows = slabs(n, tiles * b, least=8 * THREADS // lanes)
            partial = xp.empty((b, count, m), dtype=numpy.float64)
            norms = xp.empty((b, m // group_size), dtype=dtype)
            kept = xp.zeros(b, dtype=numpy.int64)
            A = xp.empty_like(M)
            launch, T = self._launcher("column_shrink"), C_NAMES[dtype]
            inputs, group_size = (M, low_rank, dual, dtype.type(t)), i32(group_size)
            cut = (i32(count), i64(rows), i32(tiles), i32(lanes))
            grid = b * count * tiles
            launch(
                f"column_squares<{T}, {vec}>", grid, THREADS,
                (*inputs, i64(n), i64(m), *cut, partial),
            )  # fmt: skip
            wide = power_of_two(int(group_size), 32)
            strips = math.ceil(norms.shape[1] / (THREADS // wide))
            launch(
                f"column_norms<{T}>", b * strips, THREADS,
                (partial, tau, i64(m), group_size, i32(count), i32(strips), i32(wide), norms, kept),
            )  # fmt: skip
            launch(
                f"column_scale<{T}, {vec}>", grid, THREADS,
                (*inputs, norms, tau, i64(n), i64(m), group_size, *cut, A),
            )  # fmt: skip
        return A, norms, kept

    def svt(self, M: Array, tau: Array | float) -> tuple[Array, Array, Array]:
        """As `NumpyOps.svt`; a matrix with a NaN or an infinity gives NaN and rank 0.

        Small matrices go to one-sided Jacobi in shared memory, the others to the library.
        """
        (M,) = self._operands(M=M)
        xp, (b, n, m), dtype = self.xp, M.shape, M.dtype
        k = min(n, m)
        with self._at(M):
            tau = self._thresholds(tau, b, dtype)
            if M.size == 0:
                return M.copy(), xp.zeros((b, k), dtype=dtype), xp.zeros(b, dtype=numpy.int64)
            warps, shared = jacobi_shared(n, m, dtype.itemsize)
            if k > JACOBI_MAX or shared > self._shared_limit():
                return self._svt_large(M, tau)
            X, sigma = xp.empty_like(M), xp.empty((b, k), dtype=dtype)
            rank = xp.empty(b, dtype=numpy.int64)
            self._launcher("svt")(
                f"svt_jacobi<{C_NAMES[dtype]}>", b, 32 * warps,
                (M, tau, i32(n), i32(m), i32(JACOBI_SWEEPS), X, sigma, rank), shared,
            )  # fmt: skip
        return X, sigma, rank

    def masked_gradient(
        self,
        Z: Array,
        Y: Array,
        activation: Activation,
        *,
        bias: Array | None = None,
        convex: bool = False,
    ) -> tuple[Array, Array]:
        """As `NumpyOps.masked_gradient`, with the errors squared and summed in float64."""
        Z, Y = self._operands(Z=Z, Y=Y)
        xp, (b, P, n), dtype = self.xp, Z.shape, Z.dtype
        if bias is not None and (bias.shape != (b, n) or bias.dtype != dtype):
            raise InputError(
                complain(
                    f"bias {bias.shape} {bias.dtype} with Z {Z.shape} {dtype}",
                    f"bias {(b, n)} {dtype}",
                    "Give one row a batch entry, in the dtype of Z.",
                )
            )
        if convex and not activation.has_convex_surrogate:
            raise InputError(
                complain(
                    f"convex=True with {activation.name}",
                    "an activation that has a convex surrogate",
                    "Use convex=False.",
                )
            )
        with self._at(Z):
            R, size = xp.empty_like(Z), P * n
            if Z.size == 0:
                return R, xp.zeros(b, dtype=numpy.float64)
            bias = None if bias is None else xp.ascontiguousarray(bias)
            vec = pack(size, dtype.itemsize, self._addresses(Z, Y))
            width = virtual_width(1 if bias is None else n, vec)
            tiles = math.ceil(width / (THREADS * vec))
            count, rows = slabs(math.ceil(size / width), tiles * b, least=4)
            partial = xp.empty((b, count * tiles), dtype=numpy.float64)
            loss = xp.empty(b, dtype=numpy.float64)
            launch = self._launcher("masked_gradient", activation_defines(activation))
            flag = "true" if convex else "false"
            launch(
                f"masked_gradient<{C_NAMES[dtype]}, {vec}, {flag}>", b * count * tiles, THREADS,
                (Z, Y, bias, i64(size), i64(n), i64(width), i32(count), i64(rows), i32(tiles), R,
                 partial),
            )  # fmt: skip
            launch("loss_sum", b, THREADS, (partial, i32(count * tiles), loss))
        return R, loss

    def _operands(self, **arrays: Array | None) -> list[Array | None]:
        """Check that arrays agree in shape and dtype, and make them contiguous."""
        first = check_operands(arrays, self.xp.ndarray, self.device)
        with self._at(first):
            contiguous = self.xp.ascontiguousarray
            return [None if array is None else contiguous(array) for array in arrays.values()]

    def _thresholds(self, tau: Array | float, b: int, dtype: numpy.dtype) -> Array:
        """One threshold a batch entry, on the device; a number costs no copy from the host."""
        if isinstance(tau, (int, float)):
            return self.xp.full(b, tau, dtype=dtype)
        tau = self.xp.asarray(tau, dtype=dtype).reshape(-1)
        if tau.size not in (1, b):
            raise InputError(
                complain(
                    f"{tau.size} thresholds for a batch of {b}",
                    f"1 or {b}",
                    "Give one for all or one a batch entry.",
                )
            )
        return self.xp.ascontiguousarray(self.xp.broadcast_to(tau, (b,)))

    def _svt_large(self, M: Array, tau: Array) -> tuple[Array, Array, Array]:
        """`svt` of matrices that do not fit in shared memory, by the library.

        In float32: the Gram matrix of the small side, formed and decomposed in float64. Its
        singular values have an absolute error of about 1e-8 of the largest, less than float32
        resolves. In float64 that route would lose half the digits: there, the SVD.
        """
        xp, dtype = self.xp, M.dtype
        finite = xp.isfinite(M).all(axis=(1, 2))
        safe = xp.where(finite[:, None, None], M, dtype.type(0))
        if dtype == numpy.float64:
            X, sigma, rank = super().svt(safe, tau)
        else:
            tall = M.shape[1] > M.shape[2]
            B = safe.swapaxes(1, 2) if tall else safe
            exact = B.astype(numpy.float64)
            squares, U = self._eigh(exact @ exact.swapaxes(1, 2))
            U = U[:, :, ::-1]
            sigma = xp.sqrt(xp.maximum(squares[:, ::-1], 0)).astype(dtype)
            kept = sigma > tau[:, None]
            gain = xp.where(kept, 1 - tau[:, None] / xp.where(kept, sigma, dtype.type(1)), 0)
            X = ((U * gain[:, None, :]) @ U.swapaxes(1, 2)).astype(dtype) @ B
            X, rank = X.swapaxes(1, 2) if tall else X, kept.sum(axis=1)
        X = xp.where((tau == 0)[:, None, None], safe, X)  # rather than nearly so
        nan = dtype.type(numpy.nan)
        X = xp.ascontiguousarray(xp.where(finite[:, None, None], X, nan))
        return X, xp.where(finite[:, None], sigma, nan), xp.where(finite, rank, 0)

    def _eigh(self, G: Array) -> tuple[Array, Array]:
        """Eigenvalues, ascending, and eigenvectors of a batch of symmetric matrices.

        CuPy's batched solver is cuSOLVER's syevjBatched, meant for sizes up to 32 and known for
        wrong eigenvalues (cupy issue 4847). Torch picks by size; where it has no CUDA, CuPy's
        solver for one matrix takes one after the other.
        """
        xp, torch = self.xp, sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            values, vectors = torch.linalg.eigh(torch.from_dlpack(G))
            return xp.from_dlpack(values), xp.from_dlpack(vectors)
        pairs = [xp.linalg.eigh(one) for one in G]
        return xp.stack([p[0] for p in pairs]), xp.stack([p[1] for p in pairs])

    def _at(self, array: Array) -> contextlib.AbstractContextManager:
        """A context in which the device that holds the array is the current one."""
        return array.device

    def _addresses(self, *arrays: Array | None) -> list[int]:
        return [array.data.ptr for array in arrays if array is not None]

    def _shared_limit(self) -> int:
        """Bytes of dynamic shared memory that one block may have, beside 1 KiB of static."""
        runtime = self.xp.cuda.runtime
        attribute = runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin
        return runtime.deviceGetAttribute(attribute, runtime.getDevice()) - 1024

    def _launcher(self, name: str, defines: str = "") -> Any:
        """``launch(expression, blocks, threads, arguments, shared)`` for the kernels of a file.

        The file is compiled, for the dtype in question, the first time.
        """

        def launch(expression, blocks, threads, arguments, shared=0):
            key = (name, defines, expression)
            if key not in self._kernels:
                names = kernel_names(name, "float64" if "double" in expression else "float32")
                module = self.xp.RawModule(
                    code=kernel_source(name, defines),
                    options=("--std=c++17",),
                    name_expressions=names,
                )
                for each in names:
                    self._kernels[name, defines, each] = module.get_function(each)
            kernel = self._kernels[key]
            if shared > 47 * 1024:  # more than the default, static memory included
                kernel.max_dynamic_shared_size_bytes = shared
            null = numpy.uint64(0)
            arguments = tuple(null if a is None else a for a in arguments)
            kernel((blocks,), (threads,), arguments, shared_mem=shared)

        return launch
