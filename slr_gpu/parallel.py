"""Several processes on one job: each holds some of the rows, sums go over all of them.

In: the environment that torchrun sets. Out: a `Group`, which a `LayerIO` or `compress` is given.
Every rank runs the same program on its share of the calibration data. What is formed over rows
(Gram matrices, right-hand sides, losses) is added up over the ranks in float64, and every rank gets
the same bits; so all take the same decisions and compute the same factors, and what they agreed on
(structures, finished layers) comes from rank 0, which alone writes files. `torch.distributed`
carries it: gloo between CPUs, NCCL between GPUs. One process is a group too, `ALONE`, in which all
of this does nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import numpy

from .errors import BackendError, InputError, SLRError, complain
from .program import program_version

Array = Any

_RESUME = (
    "The rank that ended first says why. Finished layers are kept: start all ranks again with"
    " --resume (resume=True)."
)

_SAME = "Start all ranks by one command, from the same files."


class Group:
    """The ranks of a job; this one is a process alone.

    Attributes
    ----------
    rank, size : int
    reduced : int
        Bytes handed to `sum` so far.
    """

    rank, size = 0, 1
    reduced = 0

    # -- what a group of several processes does otherwise ----------------------------------------

    def objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order."""
        return [value]

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0."""
        return self.objects(value if self.rank == 0 else None)[0]

    def add(self, flat: Array) -> Array:
        """The sum over ranks of a float64 vector, the same bits on all of them."""
        return flat

    def place(self, device: Any) -> Any:
        """The device of this rank where all were asked for the same one."""
        return device

    # -- made of these ---------------------------------------------------------------------------

    def sum(self, arrays: tuple[Array, ...], xp: Any = numpy) -> tuple[Array, ...]:
        """Sums over ranks of arrays, in float64, in one call whatever their number.

        Parameters
        ----------
        xp : module
            NumPy or CuPy: whose arrays they are.
        """
        if self.size == 1 or not arrays:
            return tuple(arrays)
        arrays = [xp.asarray(array, dtype="float64") for array in arrays]
        flat = xp.concatenate([array.reshape(-1) for array in arrays])
        self.reduced += flat.nbytes
        flat, start, sums = self.add(flat), 0, []
        for array in arrays:
            sums.append(flat[start : start + array.size].reshape(array.shape))
            start += array.size
        return tuple(sums)

    def gather(self, rows: numpy.ndarray) -> numpy.ndarray:
        """Host arrays of all ranks, one below the other."""
        return rows if self.size == 1 else numpy.concatenate(self.objects(rows))

    def span(self, count: int) -> tuple[int, int]:
        """How many are on the ranks before this one, and on all, where this one has `count`."""
        counts = self.objects(count)
        return sum(counts[: self.rank]), sum(counts)

    def share(self, count: int) -> range:
        """Which of so many pieces are this rank's: neighbouring ones, nearly equally many."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def first(self, function: Callable[[], Any]) -> Any:
        """What a function returns on rank 0, which alone calls it; its error is that of all."""
        if self.size == 1:
            return function()
        found: tuple[Any, SLRError | None] = None, None
        if self.rank == 0:
            try:
                found = function(), None
            except SLRError as error:
                found = None, error
        value, error = self.broadcast(found)
        if error is not None:
            raise error
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work on this rank's own share, in which an error of one rank is one of all.

        Raises
        ------
        SLRError
            The first of them, with the number of its rank.
        """
        error = None
        try:
            yield
        except SLRError as raised:
            if self.size == 1:
                raise
            error = raised
        for rank, other in enumerate(self.objects(error)):
            if other is not None:
                raise type(other)(f"rank {rank}: {other}") from error

    def check_same(self, facts: Callable[[], dict[str, Any]], remedy: str = _SAME) -> None:
        """Refuse ranks that would do different work.

        Parameters
        ----------
        facts : callable
            Returns what must be the same, as JSON values; called only where there are others. The
            code of this package and the versions of what computes are added.

        Raises
        ------
        InputError
            Names the ranks and what differs.
        """
        if self.size == 1:
            return
        found = self.objects(_flat({"versions": versions(), **facts()}))
        differing = []
        for rank, theirs in enumerate(found):
            names = [n for n in {**found[0], **theirs} if found[0].get(n) != theirs.get(n)]
            if names:
                values = [_difference(n, theirs.get(n), found[0].get(n)) for n in names]
                differing.append(f"rank {rank} with {', '.join(values)}")
        if differing:
            raise InputError(
                complain(
                    "; ".join(differing),
                    "the same on every rank",
                    remedy,
                )
            )


ALONE = Group()


class Ranks(Group):
    """The ranks of a `torch.distributed` process group.

    Parameters
    ----------
    process_group : ProcessGroup, optional
        One that the program has made for this; by default the one that `ranks` initialised.
    """

    def __init__(self, process_group: Any = None) -> None:
        import torch.distributed

        self._dist, self._group = torch.distributed, process_group
        self._first = 0 if process_group is None else self._dist.get_global_rank(process_group, 0)
        self.rank = self._dist.get_rank(process_group)
        self.size = self._dist.get_world_size(process_group)

    def objects(self, value: Any) -> list[Any]:
        found = [None] * self.size
        with self._reaching():
            self._dist.all_gather_object(found, value, group=self._group)
        return found

    def broadcast(self, value: Any) -> Any:
        found = [value if self.rank == 0 else None]
        with self._reaching():
            self._dist.broadcast_object_list(found, src=self._first, group=self._group)
        return found[0]

    def add(self, flat: Array) -> Array:
        import torch

        host = isinstance(flat, numpy.ndarray)
        tensor = torch.from_numpy(flat) if host else torch.from_dlpack(flat)
        with self._reaching():
            if not host:
                torch.cuda.synchronize(tensor.device)  # CuPy's streams are not torch's
            self._dist.all_reduce(tensor, group=self._group)
            if not host:
                torch.cuda.synchronize(tensor.device)
        return flat  # the tensor's memory

    def place(self, device: Any) -> Any:
        return f"cuda:{_local_rank()}" if str(device) in ("cuda", "auto") and _cuda() else device

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn what torch.distributed raises when another rank is gone into a clear error."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, SLRError):
                raise
            raise BackendError(
                complain(
                    f"no answer from another rank, on rank {self.rank}: {_first_words(error)}",
                    f"all {self.size} ranks at work until the end",
                    _RESUME,
                )
            ) from error


@contextmanager
def ranks(device: str = "cpu", *, timeout_s: float = 600.0) -> Iterator[Group]:
    """The group of the processes that torchrun started; `ALONE` outside of torchrun.

    Parameters
    ----------
    device : str
        Where arrays will be: sums of arrays on GPUs go through NCCL, one GPU a rank.
    timeout_s : float
        How long a rank may wait for another one that lives. A rank that dies is noticed at once.

    Raises
    ------
    InputError
        When the program has initialised `torch.distributed` for other ends.
    BackendError
        When not all ranks are reached; also raised by what the group is used for, when one of them
        has ended.
    """
    if alone():
        yield ALONE
        return
    import torch
    import torch.distributed

    if torch.distributed.is_initialized():
        raise InputError(
            complain(
                "a default process group that the program has initialised",
                "none, or group=slr_gpu.parallel.Ranks(process_group)",
                "Say which process group may be used.",
            )
        )
    on_gpu = str(device) != "cpu" and _cuda()
    if on_gpu:
        torch.cuda.set_device(_local_rank())
    try:
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s)
        )
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise BackendError(
            complain(
                f"no group of {os.environ['WORLD_SIZE']} ranks at {where}: {_first_words(error)}",
                "ranks that reach each other",
                "Start them with torchrun.",
            )
        ) from error
    try:
        yield Ranks()
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def told_to_stop() -> Iterator[None]:
    """Under torchrun, a `BackendError` for SIGTERM, which it sends to the others when a rank has ended.

    For a program that ends with it: after an error SIGTERM is ignored, so that the message gets out.
    """
    if alone() or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise BackendError(
            complain(
                f"a request to stop, on rank {os.environ.get('RANK')}",
                "all ranks at work until the end (torchrun stops them when one has ended)",
                _RESUME,
            )
        )

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except SLRError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    signal.signal(signal.SIGTERM, before)


def alone() -> bool:
    """Whether torchrun has started no other process beside this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@cache
def versions() -> dict[str, str]:
    """What decides the bits of a result: this package's own files, libraries, threads."""
    found = {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "torch")}
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    return {"slr_gpu": program_version(), **found, "OMP_NUM_THREADS": threads}


def _flat(facts: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts by one name each."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            found.update(_flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if max(len(repr(theirs)), len(repr(ours))) > 60:  # a hash
        return f"another {name} than rank 0"
    return f"{name} = {theirs!r} (rank 0: {ours!r})"


def _first_words(error: BaseException) -> str:
    """What it says first, without the place in gloo's source that it may begin with."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[\S+:\d+\]\s*", "", line).split(". ")[0]


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
