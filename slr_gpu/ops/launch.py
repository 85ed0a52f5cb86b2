"""Where the CUDA kernels are and how they are laid over an array; plain Python, no CuPy.

In: the name of a kernel file, an activation, arrays or their shape. Out: the text to compile,
the names to compile in it, the check of the arrays, and the launch geometry that the kernels'
opening comments define. The geometry depends on the shape only, never on the device, so that
sums are cut alike everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy

from ..activations import Activation
from ..errors import BackendError, InputError, complain
from ..program import KERNEL_FOLDERS, kernel_files

THREADS = 256  # of a block of column_shrink.cu and masked_gradient.cu
BLOCKS = 4096  # aimed at: several waves on the largest devices
PACK_BYTES = 16  # of one vector load
C_NAMES = {numpy.dtype("float32"): "float", numpy.dtype("float64"): "double"}


def kernel_source(name: str, defines: str = "") -> str:
    """The text of a kernel file.

    Parameters
    ----------
    name : str
        ``"column_shrink"``, ``"svt"`` or ``"masked_gradient"``.
    defines : str
        Text to put in front, from `activation_defines`.

    Raises
    ------
    BackendError
        When the installation lacks the file.
    """
    for path in kernel_files():
        if path.stem == name:
            return defines + path.read_text(encoding="utf-8")
    raise BackendError(
        complain(
            f"no {name}.cu in {' or '.join(map(str, KERNEL_FOLDERS))}",
            "the kernels beside the package",
            "Install slr_gpu again.",
        )
    )


def activation_defines(activation: Activation) -> str:
    """The macros from which masked_gradient.cu makes an activation."""
    return (
        f"#define ACT_VALUE {activation.cuda_value}\n"
        f"#define ACT_SLOPE {activation.cuda_slope}\n"
        f"#define ACT_LINEAR {activation.cuda_linear_where}\n"
    )


def kernel_names(name: str, dtype: Any) -> list[str]:
    """Name expressions of all the kernels in a file for one dtype (float32 or float64)."""
    dtype = numpy.dtype(dtype)
    T, packs = C_NAMES[dtype], (1, PACK_BYTES // dtype.itemsize)
    if name == "column_shrink":
        tiled = [f"{f}<{T}, {v}>" for f in ("column_squares", "column_scale") for v in packs]
        return [*tiled, f"column_norms<{T}>"]
    if name == "svt":
        return [f"svt_jacobi<{T}>"]
    masked = [f"masked_gradient<{T}, {v}, {c}>" for v in packs for c in ("false", "true")]
    return [*masked, "loss_sum"]


def check_operands(arrays: dict[str, Any], kind: type, device: str) -> Any:
    """Check that arrays can be handed to a kernel together; None stands for one not given.

    Parameters
    ----------
    arrays : dict
        By the argument's name; the others have to agree with the first.
    kind : type
        Class of the arrays on this device.
    device : str
        Its name, for the message.

    Returns
    -------
    array
        The first.

    Raises
    ------
    InputError
        For another kind of array, a number of axes other than three, a dtype other than float32
        and float64, or a shape or dtype that differs.
    """
    lead, first = next(iter(arrays.items()))
    for name, array in arrays.items():
        if array is None:
            continue
        if not isinstance(array, kind):
            raise InputError(
                complain(
                    f"{name} of type {type(array).__name__}",
                    f"an array on {device}",
                    "Pass it through ops.asarray first.",
                )
            )
        if array.ndim != 3 or array.dtype not in C_NAMES:
            raise InputError(
                complain(
                    f"{name} {array.shape} {array.dtype}",
                    "three axes, the first of them the batch, of float32 or float64",
                    f"Add the axis with {name}[None]; convert with astype.",
                )
            )
        if array.shape != first.shape or array.dtype != first.dtype:
            raise InputError(
                complain(
                    f"{name} {array.shape} {array.dtype} with {lead} {first.shape} {first.dtype}",
                    "the same shape and dtype",
                    "Broadcast and convert before the call.",
                )
            )
    return first


def power_of_two(least: int, most: int) -> int:
    """The smallest power of two that is not under `least`, `most` at the highest."""
    return min(most, 1 << (least - 1).bit_length())


def pack(columns: int, itemsize: int, addresses: list[int]) -> int:
    """How many neighbours one load may take: all of `PACK_BYTES`, or one.

    All, where rows of `columns` elements and the arrays at `addresses` allow aligned loads.
    """
    vec = PACK_BYTES // itemsize
    return vec if columns % vec == 0 and all(a % PACK_BYTES == 0 for a in addresses) else 1


def slabs(rows: int, others: int, least: int) -> tuple[int, int]:
    """Cut rows so that there are about `BLOCKS` blocks, each with at least `least` rows.

    Parameters
    ----------
    rows : int
        At least 1.
    others : int
        Blocks that one slab needs.
    least : int
        Rows that are worth a block.

    Returns
    -------
    count, height : int
        Slabs, and rows of each (the last may have fewer, never none).
    """
    wanted = max(1, min(BLOCKS // others, rows // least))
    height = math.ceil(rows / wanted)
    return math.ceil(rows / height), height


def virtual_width(n: int, vec: int) -> int:
    """A common multiple of n and vec: the largest that one block spans, or else the smallest."""
    unit = math.lcm(n, vec)
    return unit * max(1, THREADS * vec // unit)


def jacobi_shared(n: int, m: int, itemsize: int) -> tuple[int, int]:
    """Warps and bytes of dynamic shared memory of svt.cu's block for an n-by-m matrix."""
    k, length = min(n, m), max(n, m)
    warps = min(32, (k + 1) // 2)
    return warps, (k * (length | 1) + 2 * k + warps * k) * itemsize
