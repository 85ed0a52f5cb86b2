"""The loop that keeps all devices busy until every job is done or has failed.

In: a `Batch` and the devices. Out: a `Summary`, written after every job. The jobs of one model and
one setting wait for their analysis, then each goes to an idle worker, on GPUs to one with memory
for it. What is timed runs alone: plans of latency budgets when nothing else is left to do,
exported layers after all fits, and whole models last of all. A task that fails, or whose worker is
killed, fails the jobs that need it and no others; the next run tries them again.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..errors import BackendError, InputError, complain
from ..progress import JobBars
from .devices import choose_device, free_bytes, list_gpus
from .folders import Place
from .job import Batch, Job
from .jobs import read_jobs
from .summary import Outcome, Summary
from .work import Opened
from .workers import Worker

# What is begun first, of what can be begun.
_ORDER = ("open", "analyse", "plan", "fit", "export", "measure")
# Seconds between two pictures of the summary while jobs are at work.
DRAWN_S = 10.0
# After which it is seen whether a worker that says nothing has ended.
LOOK_S = 2.0
_DOING = {
    "open": "looking",
    "analyse": "analysing",
    "plan": "timing",
    "fit": "fitting",
    "export": "exporting",
    "measure": "timing",
}


@dataclass
class _Task:
    """One step of work.

    Attributes
    ----------
    kind : str
        Of `slr_gpu.batch.work.TASKS`.
    jobs : list of Job
        That wait for it.
    arguments : tuple
    needed : int
        Bytes of device memory.
    alone : bool
        Whether nothing else may run meanwhile.
    """

    kind: str
    jobs: list[Job]
    arguments: tuple
    needed: int = 0
    alone: bool = False

    @property
    def label(self) -> str:
        name = self.jobs[0].name if self.kind in ("plan", "fit", "export") else ""
        return name or self.jobs[0].model.name


def run_batch(
    jobs: str | Path | Batch,
    *,
    device: str = "auto",
    workers: int | None = None,
    force: bool = False,
    progress: bool = True,
) -> Summary:
    """Do what is missing of all jobs of a file.

    Parameters
    ----------
    jobs : path or Batch
        See `slr_gpu.batch.jobs`.
    device : {"auto", "cuda", "cpu"}
        One worker for every GPU that NVML tells of; ``auto`` is the CPU where there is none.
    workers : int, optional
        On the CPU, by default one; its threads are shared out evenly, and results repeat to the
        bit for the same number of workers on the same machine.
    force : bool
        Jobs whose folder holds the result of another model, data, settings or budget are made
        anew; otherwise they fail with what changed.
    progress : bool
        Show bars on a terminal, or a line a job elsewhere.

    Returns
    -------
    Summary

    Raises
    ------
    InputError
        When the file is wrong or another run is at work in the folder; before anything is done.
    BackendError
        When ``device="cuda"`` does not work.
    """
    places, note = _places(device, workers)
    batch = jobs if isinstance(jobs, Batch) else read_jobs(jobs)
    with _lock(batch.out), JobBars(len(batch.jobs), show=progress) as bars:
        if note:
            bars.say(note)
        spare = _places("cpu", None)[0] if device == "auto" else []
        chosen = [*places[: len(batch.jobs)], *spare]
        chosen = [replace(p, out=batch.out, folder=batch.folder, force=force) for p in chosen]
        spare = chosen.pop() if spare else None
        return _Run(batch, chosen, spare, bars).run()


def _places(device: str, workers: int | None) -> tuple[list[Place], str]:
    """Where workers go, and what should be said about it."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(complain(f"device={device!r}", "auto, cuda or cpu", "Check the name."))
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise InputError(complain(f"workers={workers!r}", "an integer >= 1", "1 is usual."))
    gpus, note = [], ""
    if device != "cpu":
        try:
            gpus = list_gpus()
        except BackendError as error:
            if device == "cuda":
                raise
            note = f"on the CPU: {error}"
    if gpus and workers is not None:
        raise InputError(
            complain(
                f"workers={workers} with {len(gpus)} GPU(s)",
                "workers on the CPU alone",
                "Set CUDA_VISIBLE_DEVICES to use fewer GPUs, or ask for device cpu.",
            )
        )
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    count = len(gpus) or workers or 1
    somewhere, threads = Path(), max(1, cpus // count)
    if gpus:
        return [Place(somewhere, somewhere, "cuda", uuid, threads) for uuid in gpus], note
    return [Place(somewhere, somewhere, threads=threads)] * count, note


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Refuse a folder in which another run is at work."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(
                    complain(
                        f"{folder}, in which another batch is at work", "a folder of its own", ""
                    )
                ) from error
        yield


class _Run:
    def __init__(self, batch: Batch, places: list[Place], spare: Place | None, bars: JobBars):
        self.batch, self.bars = batch, bars
        self.spare = spare if places[0].gpu is not None else None
        self.summary = Summary([Outcome.of(job) for job in batch.jobs])
        nothing = {"accuracy": None, "flops": None, "latency": None}
        self.summary.dense = {job.model.name: dict(nothing) for job in batch.jobs}
        self.drawn = time.perf_counter()
        self.groups: dict[str, list[Job]] = {}
        for job in batch.jobs:
            self.groups.setdefault(job.analysis, []).append(job)
        self.opened: dict[str, Opened] = {}
        self.pending = [_Task("open", jobs, (jobs,)) for jobs in self.groups.values()]
        self.running: dict[Worker, _Task] = {}
        self.idle: list[Worker] = []
        self.starting: set[Worker] = set()
        self.places = places

    def run(self) -> Summary:
        try:
            for place in self.places:
                self.starting.add(Worker(place))
            self._loop()
            if self.batch.measure is not None:
                self._measure()
                self._loop()
        finally:
            for worker in (*self.starting, *self.idle, *self.running):
                worker.stop()
            self._save(final=True)
        return self.summary

    def _save(self, final: bool = False) -> None:
        now = time.perf_counter()
        draw = final or now - self.drawn >= DRAWN_S
        if draw:
            self.drawn = now
            self.summary.draw(self.batch.out / "summary.png")
        self.summary.save(self.batch.out / "summary.json")

    def _loop(self) -> None:
        while self.pending or self.running:
            self._begin()
            workers = {w.connection: w for w in (*self.running, *self.starting, *self.idle)}
            ready = wait(list(workers), timeout=LOOK_S)
            for connection, worker in workers.items():
                if connection in ready or worker.has_ended():
                    self._hear(worker, *worker.receive())

    def _begin(self) -> None:
        """Give idle workers what can be begun now."""
        if self.pending and not (self.idle or self.running or self.starting):
            self.starting.add(Worker(self.places[0]))
        while self.idle and self.pending:
            if any(task.alone for task in self.running.values()):
                return
            tasks = sorted(self.pending, key=lambda t: (t.alone, _ORDER.index(t.kind), -t.needed))
            together = [task for task in tasks if not task.alone]
            if not together and self.running:
                return
            if not together and self.starting:
                return  # they take a core while they start
            if together:
                free = {worker: self._free(worker) for worker in self.idle}
                busy = bool(self.running or self.starting)
                chosen = choose_device([task.needed for task in together], free, busy)
                if chosen is None:
                    return
                task, worker = together[chosen[0]], chosen[1]
                if free[worker] < task.needed:
                    self._note(task, free[worker])
            else:
                task, worker = tasks[0], self.idle[0]
            self.idle.remove(worker)
            try:
                worker.send(task.kind, task.arguments)
            except OSError:  # it died idle
                self._leave(worker)
                self.starting.add(Worker(worker.place))
                continue
            self.pending.remove(task)
            self.running[worker] = task
            self.bars.update(worker, f"{task.label}: {_DOING[task.kind]}")

    def _free(self, worker: Worker) -> float:
        known = None if worker.place.gpu is None else free_bytes(worker.place.gpu)
        return math.inf if known is None else known

    def _note(self, task: _Task, free: float) -> None:
        note = f"needs about {task.needed / 2**30:.1f} GiB, had {free / 2**30:.1f} GiB"
        for job in task.jobs:
            self.summary[job.name].notes.append(f"{_DOING[task.kind]} {note}")

    def _hear(self, worker: Worker, kind: str, content: Any) -> None:
        task = self.running.get(worker)
        if kind == "progress":
            description, done, total = content
            if task is not None:
                self.bars.update(worker, f"{task.label}: {description}", done, total)
        elif kind == "ready":
            self.starting.remove(worker)
            self.idle.append(worker)
        elif kind == "broken":
            self._leave(worker)
            self._without(worker, content)
        elif kind == "dead":
            began = worker in self.starting
            self._leave(worker)
            if began:
                self._without(worker, content)
            else:
                if task is not None:
                    self._fail(task, content)
                if self.pending:
                    self.starting.add(Worker(worker.place))
        else:
            del self.running[worker]
            self.idle.append(worker)
            self.bars.remove(worker)
            if kind == "failed":
                self._fail(task, content)
            else:
                self._take(task, content)

    def _leave(self, worker: Worker) -> None:
        self.starting.discard(worker)
        self.running.pop(worker, None)
        if worker in self.idle:
            self.idle.remove(worker)
        self.bars.remove(worker)
        worker.stop()

    def _without(self, worker: Worker, reason: str) -> None:
        """Go on without a worker that could not begin."""
        where = "the CPU" if worker.place.gpu is None else f"GPU {worker.place.gpu}"
        self.bars.say(f"no worker on {where}: {reason}")
        if self.starting or self.idle or self.running:
            return
        if self.spare is None or worker.place.gpu is None:
            raise BackendError(
                complain(f"no worker on {where}: {reason}", "a device that works", "See doctor.")
            )
        self.bars.say("on the CPU instead")
        self.places = [self.spare]
        self.starting.add(Worker(self.spare))

    def _fail(self, task: _Task, reason: str) -> None:
        if task.kind == "measure":
            self.summary.failures.append(f"latencies of {task.label}: {reason}")
            return
        for job in task.jobs:
            what = {"analyse": "its analysis: ", "export": "export: "}.get(task.kind, "")
            self._end(job, "failed", what + reason)

    def _end(self, job: Job, status: str, reason: str = "") -> None:
        outcome = self.summary[job.name]
        outcome.status, outcome.reason = status, reason
        self.bars.finish(outcome.line)
        self._save()

    def _take(self, task: _Task, found: Any) -> None:
        """Add what can be done now that a task is."""
        job = task.jobs[0]
        if task.kind == "open":
            self._take_opened(task.jobs, found)
            return
        if task.kind == "measure":
            for label, latency in found.items():
                if label == "dense":
                    self.summary.dense[job.model.name]["latency"] = latency
                else:
                    self.summary[label].latency = latency
            return
        opened = self.opened[job.analysis]
        if task.kind == "analyse":
            names = [waiting.name for waiting in task.jobs]
            self.summary.analyses.append({"model": job.model.name, "jobs": names, **found})
            for waiting in task.jobs:
                self._add_fit(waiting, opened)
        elif task.kind == "plan":
            self._add("fit", job, opened)
        else:
            self.summary[job.name].learn(found)
            if task.kind == "fit" and "export" in opened.missing[job.name]:
                self._add("export", job, opened)
            else:
                self._end(job, "done")

    def _take_opened(self, jobs: list[Job], opened: Opened) -> None:
        model, first = jobs[0].model.name, jobs[0]
        self.opened[first.analysis] = opened
        dense = {"accuracy": opened.accuracy, "flops": 2 * opened.totals["flops"]}
        self.summary.dense[model].update(dense)
        for name, reason in opened.refused.items():
            self._end(next(job for job in jobs if job.name == name), "failed", reason)
        to_fit = [job for job in jobs if "fit" in opened.missing.get(job.name, ())]
        others = [job for job in jobs if job.name in opened.missing and job not in to_fit]
        if to_fit and not opened.analysed:
            arguments = (first, opened.facts)
            self.pending.append(_Task("analyse", to_fit, arguments, opened.needed))
        else:
            for job in to_fit:
                self._add_fit(job, opened)
        for job in others:
            # Its marker is read as if it had just been fitted.
            self.pending.append(_Task("fit", [job], (job, opened.facts)))

    def _add_fit(self, job: Job, opened: Opened) -> None:
        self._add("plan" if "latency" in job.keep else "fit", job, opened)

    def _add(self, kind: str, job: Job, opened: Opened) -> None:
        alone = kind == "plan" or (kind == "export" and job.settings.runtime is not None)
        needed = opened.needed if kind == "fit" else 0
        self.pending.append(_Task(kind, [job], (job, opened.facts), needed, alone))

    def _measure(self) -> None:
        """Time whole models, those of which anything was made."""
        done: dict[str, list[Job]] = {}
        for job in self.batch.jobs:
            if self.summary[job.name].status == "done":
                done.setdefault(job.model.name, []).append(job)
        for jobs in done.values():
            facts = self.opened[jobs[0].analysis].facts
            arguments = (jobs, facts, self.batch.measure)
            self.pending.append(_Task("measure", jobs, arguments, alone=True))
