"""Memory of a device: how much is free, and how rows that do not fit pass through it.

In: host arrays and the rows wanted of them. Out: blocks of rows on the device. On the CPU a block
is a view or a gather; on a CUDA device two buffers alternate, so that one is filled by a copy
stream while the other is being computed on.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy

Array = Any

# Share of the free memory that arrays which stay may take, and that the work on one block may.
RESIDENT_SHARE = 0.5
BLOCK_SHARE = 0.1
# Most bytes that the work on one block takes on the CPU.
BLOCK_BYTES = 768 * 2**20


class HostMemory:
    """The CPU's: everything is where it is used.

    Attributes
    ----------
    errors : tuple of type
        What running out of memory raises.
    limit : int or None
        Bytes to count as free instead of what the machine says.
    """

    errors: tuple[type[BaseException], ...] = (MemoryError,)
    limit: int | None = None

    def fits(self, bytes_wanted: int) -> bool:
        """Whether arrays of this size may stay on the device.

        On the CPU always: there they are made from arrays that are in memory already.
        """
        return True

    def holds(self, bytes_wanted: int) -> bool:
        """Whether arrays of this size may be read from the disk into the machine's memory."""
        free = host_free() if self.limit is None else self.limit
        return free is None or bytes_wanted <= RESIDENT_SHARE * free

    def block_rows(self, usual: int, most: int, bytes_a_row: int) -> int:
        """Rows a block: `usual` on the CPU, less for very long rows.

        On a device as many as a share of the free memory holds, between `usual` and `most`.
        """
        return max(min(usual, BLOCK_BYTES // bytes_a_row), 1)

    def release(self) -> None:
        """Give memory that is held but not used back to the device.

        On the CPU what the C library holds: where small arrays stay between large ones that come
        and go, its heap grows to a multiple of what is in use.
        """
        trim = _malloc_trim()
        if trim is not None:
            trim(0)

    def stream(
        self, arrays: tuple[Array, ...], index: Array, size: int
    ) -> Iterator[tuple[Array, ...]]:
        """The rows `index` of host arrays, `size` at a time, on the device.

        A block may be overwritten once the next one has been asked for.
        """
        for start in range(0, len(index), size):
            rows = index[start : start + size]
            yield tuple(array[rows] for array in arrays)

    def carry(self, blocks: Iterator[tuple[Array, ...]], size: int) -> Iterator[tuple[Array, ...]]:
        """Blocks of host arrays, of at most `size` rows each, on the device.

        A block may be overwritten, here and there, once the next one has been asked for.
        """
        return blocks


class DeviceMemory(HostMemory):
    """A CUDA device's.

    Parameters
    ----------
    cupy : module
    index : int
        The device.
    """

    def __init__(self, cupy: Any, index: int) -> None:
        self._cupy, self._index = cupy, index
        torch = sys.modules.get("torch")
        errors = [cupy.cuda.memory.OutOfMemoryError, MemoryError]
        if torch is not None:
            errors.append(torch.cuda.OutOfMemoryError)
        self.errors = tuple(errors)

    def free(self) -> int:
        """Bytes that can be had: free by NVML, plus what the pool holds and does not use."""
        return self._free_on_device() + self._unused_in_pool()

    def _free_on_device(self) -> int:
        """By NVML, and by the runtime: the former tells of a whole device, the latter of its part."""
        with self._cupy.cuda.Device(self._index):
            free = int(self._cupy.cuda.runtime.memGetInfo()[0])
        try:
            import pynvml

            pynvml.nvmlInit()
            try:
                bus = self._cupy.cuda.Device(self._index).pci_bus_id
                handle = pynvml.nvmlDeviceGetHandleByPciBusId(bus)
                return min(free, int(pynvml.nvmlDeviceGetMemoryInfo(handle).free))
            finally:
                pynvml.nvmlShutdown()
        except (ImportError, pynvml_error()):
            return free  # without the extra, or where NVML does not tell (WSL)

    def _unused_in_pool(self) -> int:
        torch = sys.modules.get("torch")
        unused = int(self._cupy.get_default_memory_pool().free_bytes())
        if torch is not None and torch.cuda.is_initialized():
            reserved = torch.cuda.memory_reserved(self._index)
            unused += int(reserved - torch.cuda.memory_allocated(self._index))
        return unused

    def fits(self, bytes_wanted: int) -> bool:
        return bytes_wanted <= RESIDENT_SHARE * self.free()

    def block_rows(self, usual: int, most: int, bytes_a_row: int) -> int:
        return int(min(max(BLOCK_SHARE * self.free() // bytes_a_row, usual), most))

    def release(self) -> None:
        self._cupy.get_default_memory_pool().free_all_blocks()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def stream(
        self, arrays: tuple[Array, ...], index: Array, size: int
    ) -> Iterator[tuple[Array, ...]]:
        size = min(size, len(index))
        starts = range(0, len(index), size)
        jobs = ((arrays, index[start : start + size]) for start in starts)
        return self._alternate(jobs, arrays, size)

    def carry(self, blocks: Iterator[tuple[Array, ...]], size: int) -> Iterator[tuple[Array, ...]]:
        first = next(blocks, None)
        if first is None:
            return iter(())
        jobs = ((block, numpy.arange(len(block[0]))) for block in chain([first], blocks))
        return self._alternate(jobs, first, size)

    def _alternate(
        self, jobs: Iterable[tuple[tuple[Array, ...], Array]], like: tuple[Array, ...], size: int
    ) -> Iterator[tuple[Array, ...]]:
        """Rows of host arrays, by two buffers of `size` rows for arrays like these."""
        cupy, jobs = self._cupy, iter(jobs)
        compute, copies = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
        slots = [_Slot(cupy, like, size) for _ in range(2)]
        # What the pool hands out may still be in use by work queued earlier.
        copies.wait_event(compute.record())

        def fill(number: int) -> _Slot | None:
            job = next(jobs, None)
            if job is None:
                return None
            slot = slots[number % 2]
            slot.fill(*job, copies)
            return slot

        try:
            number, ahead = 0, fill(0)
            while ahead is not None:
                slot, number = ahead, number + 1
                ahead = fill(number)
                compute.wait_event(slot.copied)
                yield slot.block()
                slot.used.record(compute)
        finally:
            # Buffers go back to the pool only after the last work on them.
            copies.synchronize()
            compute.synchronize()


class _Slot:
    """Pinned host buffers and device buffers for one block, and when each may be touched again."""

    def __init__(self, cupy: Any, arrays: tuple[Array, ...], size: int) -> None:
        self.rows = 0
        self.copied, self.used = cupy.cuda.Event(), cupy.cuda.Event()
        self.device = [cupy.empty((size, *a.shape[1:]), a.dtype) for a in arrays]
        self._pinned = [cupy.cuda.alloc_pinned_memory(d.nbytes) for d in self.device]
        self._host = [
            numpy.frombuffer(memory, d.dtype, d.size).reshape(d.shape)
            for memory, d in zip(self._pinned, self.device, strict=True)
        ]

    def fill(self, arrays: tuple[Array, ...], rows: Array, stream: Any) -> None:
        """Gather rows on the host and queue their copy to the device."""
        self.copied.synchronize()  # the last copy out of the pinned buffers
        stream.wait_event(self.used)  # the last work on the device buffers
        self.rows = len(rows)
        for array, host, device in zip(arrays, self._host, self.device, strict=True):
            numpy.take(array, rows, axis=0, out=host[: self.rows])
            device[: self.rows].set(host[: self.rows], stream=stream)
        self.copied.record(stream)

    def block(self) -> tuple[Array, ...]:
        return tuple(device[: self.rows] for device in self.device)


def pynvml_error() -> type[BaseException]:
    """The class of NVML's errors; one that is never raised where pynvml is not installed."""
    pynvml = sys.modules.get("pynvml")
    return pynvml.NVMLError if pynvml is not None else ImportError


@cache
def _malloc_trim() -> Any:
    """glibc's; None elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def host_free() -> int | None:
    """Bytes of the machine's memory that can be had, within a container's limit.

    None where the system does not tell.
    """
    found = []
    try:
        text = Path("/proc/meminfo").read_text()
        found.append(int(text.split("MemAvailable:")[1].split()[0]) * 1024)
    except (OSError, IndexError, ValueError):
        pass
    groups = Path("/sys/fs/cgroup")
    for most, used, facts, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            limit = int((groups / most).read_text())
            stat = dict(map(str.split, (groups / facts).read_text().splitlines()))
            in_use = int((groups / used).read_text()) - int(stat.get(cached, 0))
            found.append(max(limit - in_use, 0))
        except (OSError, ValueError):  # none, or "max"
            pass
    return min(found, default=None)
