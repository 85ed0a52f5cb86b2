"""The GPUs of this machine: which there are, what a job needs of one, what it used.

In: NVML through pynvml (extras ``cuda12`` and ``cuda13``). Out: their UUIDs, free bytes, an
estimate for a prepared model, energy and peak memory. What a device does not tell is None.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import BackendError, complain
from ..ops.memory import pynvml_error
from ..prepare import Prepared
from ..problem import MOST_ROWS, WIDEST

# What CUDA, its libraries and the kernels take before any array is made.
CONTEXT_BYTES = 2**29
# Seconds between two looks at the memory in use.
SAMPLED_S = 0.2


@contextmanager
def _nvml() -> Iterator[Any]:
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def list_gpus() -> list[str]:
    """UUIDs of the devices of NVML, of those in ``CUDA_VISIBLE_DEVICES`` where it is set.

    By its UUID one is made the only one that a worker sees, as NVML and CUDA count differently;
    numbers in that variable are taken as nvidia-smi counts.

    Raises
    ------
    BackendError
        Without NVML, or where it finds none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        with _nvml() as nvml:
            if visible is None:
                count = nvml.nvmlDeviceGetCount()
                handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
            else:
                handles = [
                    nvml.nvmlDeviceGetHandleByIndex(int(entry))
                    if entry.isdigit()
                    else nvml.nvmlDeviceGetHandleByUUID(entry)
                    for entry in map(str.strip, visible.split(","))
                    if entry and entry != "-1"
                ]
            found = [_text(nvml.nvmlDeviceGetUUID(h)) for h in handles]
    except (ImportError, pynvml_error()) as error:
        raise _no_gpus(f"{type(error).__name__}: {error}") from error
    if not found:
        raise _no_gpus("none is listed or visible")
    return found


def _no_gpus(reason: str) -> BackendError:
    return BackendError(
        complain(
            f"no GPU from NVML ({reason})",
            "NVIDIA devices and pynvml",
            "Install the extra cuda13 or cuda12, or use device='cpu'.",
        )
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def free_bytes(uuid: str) -> int | None:
    """Free memory of a device, where it tells."""
    try:
        with _nvml() as nvml:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            return int(nvml.nvmlDeviceGetMemoryInfo(handle).free)
    except (ImportError, pynvml_error()):
        return None


def needed_bytes(prepared: Prepared) -> int:
    """Estimate of the device memory that works best for a model.

    Two float32 copies of the model, the maps of one batch around its widest layer, and for the
    largest layer its sampled rows and three float64 matrices of the size of its Gram matrix. With
    less, rows pass through in blocks.
    """
    model = 8 * prepared.totals["params"]
    batch, rows = max(prepared.batches.sizes), prepared.settings.samples
    maps, layers = [0], [0]
    for cost in prepared.costs.values():
        width = cost.channels * cost.taps
        inputs = cost.groups * cost.channels * cost.input_positions
        outputs = cost.groups * cost.n * cost.output_positions
        maps.append(8 * batch * (inputs + outputs))
        gram = width if width <= WIDEST else MOST_ROWS
        layers.append(24 * gram**2 + 4 * rows * (width + 2 * cost.n))
    return int(CONTEXT_BYTES + model + max(maps) + max(layers))


def choose_device(
    needs: Sequence[int], free: Mapping[Any, float], busy: bool
) -> tuple[int, Any] | None:
    """Which job goes to which idle device now.

    The first job that fits anywhere, on the device that it fills most. Where none fits, jobs wait
    for devices that are busy; if none is, the first job tries the device with the most memory.

    Parameters
    ----------
    needs : sequence of int
        Bytes, in the order of the jobs.
    free : mapping of device to float
        Bytes free on idle ones; infinite where that is not known.
    busy : bool
        Whether others are at work.
    """
    if not needs or not free:
        return None
    for number, need in enumerate(needs):
        fitting = [device for device, size in free.items() if size >= need]
        if fitting:
            return number, min(fitting, key=lambda device: free[device])
    return None if busy else (0, max(free, key=lambda device: free[device]))


class Meter:
    """Energy and peak memory of a device, everything on it, while a ``with`` block runs.

    Parameters
    ----------
    uuid : str or None
        Of the device; None measures nothing.

    Attributes
    ----------
    joules : float or None
    peak_bytes : int or None
        The most of some looks a second.
    """

    def __init__(self, uuid: str | None) -> None:
        self._uuid = uuid
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._began: float | None = None
        self.joules: float | None = None
        self.peak_bytes: int | None = None

    def __enter__(self) -> Meter:
        if self._uuid is not None:
            self._began = self._millijoules()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            ended = self._millijoules()
            if self._began is not None and ended is not None:
                self.joules = (ended - self._began) / 1e3

    def _millijoules(self) -> float | None:
        try:
            with _nvml() as nvml:
                handle = nvml.nvmlDeviceGetHandleByUUID(self._uuid)
                return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        except (ImportError, pynvml_error()):
            return None

    def _watch(self) -> None:
        try:
            with _nvml() as nvml:
                handle = nvml.nvmlDeviceGetHandleByUUID(self._uuid)
                while True:
                    used = int(nvml.nvmlDeviceGetMemoryInfo(handle).used)
                    self.peak_bytes = max(used, self.peak_bytes or 0)
                    if self._done.wait(SAMPLED_S):
                        break
        except (ImportError, pynvml_error()):
            return
