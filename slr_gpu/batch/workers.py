"""Worker processes: one device each, one task at a time, and nothing left of them afterwards.

In: a `Place`. Out: a `Worker` to send tasks to, whose messages say what it is doing, what it found
or why it failed. A worker that is killed closes its end; one whose parent is killed ends itself.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..errors import SLRError, described
from ..ops import get_ops
from ..progress import reported_to
from .folders import Place
from .work import TASKS

# How processes are started: CUDA does not survive a fork.
START = "spawn"
# Seconds that a worker gets to end by itself.
PATIENCE_S = 5.0


class Worker:
    """The parent's side of a worker process.

    Parameters
    ----------
    place : Place

    Attributes
    ----------
    connection : Connection
        Gives ("ready", None) or ("broken", why) first; for a task any number of ("progress",
        (description, done, total)), then ("done", result) or ("failed", why).
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        context = multiprocessing.get_context(START)
        self.connection, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, place))
        with _inherited(place):
            self._process.start()
        end.close()

    def send(self, kind: str, arguments: tuple) -> None:
        """Begin a task; see `slr_gpu.batch.work`."""
        self.connection.send((kind, arguments))

    def receive(self) -> tuple[str, Any]:
        """The next message; ("dead", how) where the process has ended."""
        try:
            if self.has_ended() and not self.connection.poll():
                raise EOFError
            return self.connection.recv()
        except (EOFError, OSError):
            self._process.join(PATIENCE_S)
            return "dead", _how_it_ended(self._process.exitcode)

    def has_ended(self) -> bool:
        """Whether the process has; its end of the pipe stays open while one that it forked lives."""
        return not self._process.is_alive()

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.connection.close()
        self._process.terminate()
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its worker ended with exit status {code}"
    try:
        name = f" ({signal.Signals(-code).name})"
    except ValueError:
        name = ""
    often = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"its worker was killed by signal {-code}{name}{often}"


@contextmanager
def _inherited(place: Place) -> Iterator[None]:
    """What a process must find when it starts: its threads, its device, Ctrl-C left to others."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    values = dict.fromkeys(threads, str(place.threads))
    if place.gpu is not None:
        values["CUDA_VISIBLE_DEVICES"] = place.gpu
    before = {name: os.environ.get(name) for name in values}
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if main:
            signal.signal(signal.SIGINT, handler)


def _serve(connection: Connection, place: Place) -> None:
    """What the process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.path.insert(0, str(place.folder))
    torch.set_num_threads(place.threads)
    try:
        ops = get_ops(place.device)
    except SLRError as error:
        connection.send(("broken", str(error)))
        return
    connection.send(("ready", None))
    with reported_to(lambda *step: connection.send(("progress", step))):
        while True:
            try:
                kind, arguments = connection.recv()
            except EOFError:
                return
            try:
                answer = ("done", TASKS[kind](place, *arguments))
            # Whatever a model, a loader or a library raises is the reason of one job's failure.
            except Exception as error:  # noqa: BLE001
                answer = ("failed", _reason(error))
            gc.collect()
            ops.memory.release()
            connection.send(answer)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, SLRError) else described(error)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
