"""The backends: one class with three hot operations each, and the function that picks one.

In: a device's name. Out: `NumpyOps`, the definition, or `CupyOps`, which overrides it with CUDA
kernels. CuPy is imported only when a CUDA device is asked for.
"""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

from ..errors import BackendError, InputError, complain
from .numpy_ops import NumpyOps

__all__ = ["NumpyOps", "get_ops", "why_not_cuda"]

_made: dict[int, NumpyOps] = {}  # by device

_INSTALL = (
    "Install the extra for your driver, pip install 'slr_gpu[cuda13]' (driver 580 or newer) or"
    " pip install 'slr_gpu[cuda12]' (525 or newer), or use device='cpu'."
)


def get_ops(device: Any = "auto") -> NumpyOps:
    """The operations on a device.

    Parameters
    ----------
    device : str or torch.device
        ``"cpu"``; ``"cuda"``, the current CUDA device; ``"cuda:1"``, that device, which becomes
        the current one of this thread; ``"auto"``, the current CUDA device where a kernel runs
        on it, and otherwise the CPU, with one warning per process.

    Returns
    -------
    NumpyOps
        A `CupyOps` for a CUDA device.

    Raises
    ------
    InputError
        For a name that is none of these.
    BackendError
        For a CUDA device on which no kernel runs; the message says why and what to install.
    """
    match = re.fullmatch(r"(cpu|auto)|cuda(?::(\d+))?", str(device))
    if match is None:
        raise InputError(
            complain(
                f"device={device!r}",
                "'cpu', 'cuda', 'cuda:<index>' or 'auto'",
                "Use 'auto' for the GPU where there is one.",
            )
        )
    if match[1] == "cpu":
        return NumpyOps()
    index = None if match[2] is None else int(match[2])
    reason = why_not_cuda(index)
    if reason is None:
        return _on_device(index)
    if match[1] == "auto":
        _say_once(f"device='auto' runs on the CPU: {reason} {_INSTALL}")
        return NumpyOps()
    raise BackendError(
        complain(f"device={device!r}, but {reason}", "a device that runs CUDA kernels", _INSTALL)
    )


def _on_device(index: int | None) -> NumpyOps:
    """The operations on a device, made once with all their compiled kernels."""
    import cupy

    if index is None:
        index = cupy.cuda.Device().id
    cupy.cuda.Device(index).use()
    if index not in _made:
        from .cupy_ops import CupyOps

        _made[index] = CupyOps(index)
    return _made[index]


@functools.cache
def why_not_cuda(index: int | None = None) -> str | None:
    """Say why no kernel runs on a CUDA device; None where one does.

    A kernel is compiled and launched, matrices are multiplied by the library, and the result is
    waited for: a device that is only listed, that the driver is too old for, or for which
    libraries are missing does not count.

    Parameters
    ----------
    index : int, optional
        The device; the current one by default.
    """
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error})."
    try:
        import cupyx.scipy.linalg  # missing libraries show here
        import cupyx.scipy.special  # noqa: F401

        with cupy.cuda.Device(index):
            answer = _probe(cupy)
    # CuPy, its compiler and its libraries each raise their own classes here, down to
    # AttributeError for a missing library: whatever it is, the device does not work.
    except Exception as error:  # noqa: BLE001
        first_line = (str(error).splitlines() or [""])[0]
        return f"no kernel runs on it ({type(error).__name__}: {first_line})."
    return None if answer == 144 else f"kernels on it computed {answer} instead of 144."


def _probe(xp: Any) -> int:
    """144, by kernels compiled for the purpose and a matrix product; copied back to the host."""
    odd = xp.arange(4, dtype="float32").reshape(2, 2) * 2 + 1
    return int((odd @ odd).sum())


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
