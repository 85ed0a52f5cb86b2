"""Stand-ins for a device, for tests on machines without one.

`DoubleOps` computes with NumPy on arrays that refuse to mix with NumPy's, as CuPy's do, and counts
every time that a result is waited for. `Streams` runs queued work late and in any order that
CUDA's streams and events allow.
"""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace

import numpy
import scipy.special
from numpy.lib.mixins import NDArrayOperatorsMixin

from slr_gpu.ops import NumpyOps
from slr_gpu.ops.memory import HostMemory

WAITS = {"__float__", "__int__", "__bool__", "__index__", "nonzero", "asnumpy"}
counts = {"waits": 0}


def _unwrap(value):
    if isinstance(value, DeviceArray):
        return value.host
    if isinstance(value, numpy.ndarray) and value.ndim:
        raise TypeError("a host array in an operation on the device")
    if isinstance(value, (tuple, list)):
        return type(value)(_unwrap(v) for v in value)
    return value


def _wrap(value):
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return DeviceArray(numpy.asarray(value))
    if isinstance(value, tuple):
        return tuple(_wrap(v) for v in value)
    if isinstance(value, list):
        return [_wrap(v) for v in value]
    return value


def _mapped(function):
    def call(*args, **kwargs):
        args = [_unwrap(a) for a in args]
        return _wrap(function(*args, **{k: _unwrap(v) for k, v in kwargs.items()}))

    return call


class DeviceArray(NDArrayOperatorsMixin):
    """An array that only the backend's own functions take."""

    __cuda_array_interface__ = {"version": 3}  # noqa: RUF012
    device = SimpleNamespace(id=0)

    def __init__(self, host):
        self.host = host

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion of a device array to a host array")

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} of a device array: use ops.xp")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if out is not None:
            kwargs["out"] = tuple(_unwrap(o) for o in out)
        result = getattr(ufunc, method)(*(_unwrap(i) for i in inputs), **kwargs)
        return out[0] if out is not None else _wrap(result)

    def __getitem__(self, key):
        key = _unwrap(key)
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(k, numpy.ndarray) and k.dtype == bool for k in keys):
            counts["waits"] += 1  # the size of the result is not known before
        return _wrap(self.host[key])

    def __setitem__(self, key, value):
        self.host[_unwrap(key)] = _unwrap(value)

    def __len__(self):
        return len(self.host)

    def __iter__(self):
        return (_wrap(row) for row in self.host)

    def __float__(self):
        counts["waits"] += 1
        return float(self.host)

    def __int__(self):
        counts["waits"] += 1
        return int(self.host)

    def __bool__(self):
        counts["waits"] += 1
        return bool(self.host)

    def __index__(self):
        counts["waits"] += 1
        return int(self.host)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.host, name)
        return _mapped(value) if callable(value) else _wrap(value)


class _Module:
    """numpy, or a part of it, on device arrays."""

    ndarray = DeviceArray

    def __init__(self, module):
        self._module = module

    def asarray(self, array, dtype=None):
        """From the host or from the device."""
        host = array.host if isinstance(array, DeviceArray) else array
        return DeviceArray(numpy.asarray(host, dtype=dtype))

    def __getattr__(self, name):
        value = getattr(self._module, name)
        if isinstance(value, type) or not callable(value):
            return _Module(value) if hasattr(value, "__spec__") else value
        if name == "flatnonzero":
            counts["waits"] += 1
        return _mapped(value)


class DoubleMemory(HostMemory):
    """Too small for anything to stay, and for blocks of more than so many rows."""

    class Full(Exception):
        pass

    errors = (Full,)

    def __init__(self, rows=None):
        self.rows, self.released, self.sizes = rows, 0, []

    def fits(self, bytes_wanted):
        return self.rows is None

    def release(self):
        self.released += 1

    def stream(self, arrays, index, size):
        for start in range(0, len(index), size):
            rows = index[start : start + size]
            if len(rows) > self.rows:
                raise self.Full
            self.sizes.append(len(rows))
            block = tuple(DeviceArray(array[rows]) for array in arrays)
            yield block
            for array in block:
                array.host[...] = numpy.nan  # the buffer is being filled again

    def carry(self, blocks, size):
        for block in blocks:
            yield from self.stream(block, numpy.arange(len(block[0])), size)


class DoubleOps(NumpyOps):
    """NumpyOps on `DeviceArray`.

    Parameters
    ----------
    rows : int, optional
        Most rows that fit on the device; all by default.
    """

    device = "cuda:0"
    ahead = 4

    def __init__(self, rows=None):
        self.xp = _Module(numpy)
        self.scipy = SimpleNamespace(special=_Module(scipy.special))
        self.memory = DoubleMemory(rows)

    def asarray(self, array, dtype=None):
        if isinstance(array, DeviceArray):
            array = array.host
        return DeviceArray(super().asarray(array, dtype).copy())

    def to_numpy(self, array):
        counts["waits"] += 1
        return array.host


class Streams:
    """As much of CuPy as `slr_gpu.ops.memory` uses, with work that is done late.

    Parameters
    ----------
    seed : int
        Of the order in which streams get on.
    """

    def __init__(self, seed):
        self._random = random.Random(seed)
        self._streams = []
        self.current = self.stream()
        memory = SimpleNamespace(OutOfMemoryError=type("OutOfMemoryError", (Exception,), {}))
        self.cuda = SimpleNamespace(
            memory=memory,
            Stream=lambda non_blocking: self.stream(),
            Event=lambda: _Event(self),
            get_current_stream=lambda: self.current,
            alloc_pinned_memory=lambda size: bytearray(size),
        )

    def stream(self):
        self._streams.append(_Stream(self))
        return self._streams[-1]

    def empty(self, shape, dtype):
        return _Buffer(numpy.full(shape, numpy.nan, dtype))

    def run_until(self, done):
        """Do queued work in some permitted order until the condition holds."""
        while not done():
            ready = [s for s in self._streams if s.queue and s.queue[0][0]()]
            assert ready, "the streams wait for each other"
            self._random.choice(ready).queue.popleft()[1]()


class _Stream:
    def __init__(self, streams):
        self.streams, self.queue = streams, deque()

    def add(self, work, ready=lambda: True):
        self.queue.append((ready, work))

    def wait_event(self, event):
        version = event.recorded
        self.add(lambda: None, lambda: event.done >= version)

    def record(self):
        event = _Event(self.streams)
        event.record(self)
        return event

    def synchronize(self):
        self.streams.run_until(lambda: not self.queue)


class _Event:
    def __init__(self, streams):
        self.streams, self.recorded, self.done = streams, 0, 0

    def record(self, stream):
        self.recorded += 1
        version = self.recorded

        def mark():
            self.done = version

        stream.add(mark)

    def synchronize(self):
        version = self.recorded
        self.streams.run_until(lambda: self.done >= version)


class _Buffer:
    """A device array that is written by queued copies."""

    def __init__(self, host):
        self.host = host

    def __getitem__(self, key):
        return _Buffer(self.host[key])

    def __getattr__(self, name):
        return getattr(self.host, name)

    def set(self, source, stream):
        stream.add(lambda: self.host.__setitem__(..., source))
