"""One memory pool for CuPy and torch.

Of two pools on a device, each keeps what the other one lacks. So once torch uses CUDA, CuPy
allocates from torch's caching allocator; before that, CuPy keeps its own.
"""

from __future__ import annotations

import sys
from typing import Any

_shared = False


def share_memory_pool(cupy: Any) -> None:
    """Route CuPy's allocations through torch if torch holds a device; does it only once.

    Memory is taken for CuPy's current stream, as CuPy's own pool does, so no stream has to be
    shared. Arrays allocated earlier go back to the pool that they came from.

    Parameters
    ----------
    cupy : module
    """
    global _shared
    torch = sys.modules.get("torch")
    if _shared or torch is None or not torch.cuda.is_initialized():
        return

    def allocate(size: int, device: int) -> int:
        stream = cupy.cuda.get_current_stream().ptr
        return torch.cuda.caching_allocator_alloc(size, device, stream)

    def release(pointer: int, device: int) -> None:
        torch.cuda.caching_allocator_delete(pointer)

    cupy.cuda.set_allocator(cupy.cuda.PythonFunctionAllocator(allocate, release).malloc)
    _shared = True
