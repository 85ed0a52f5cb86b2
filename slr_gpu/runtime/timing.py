"""Latencies that can be compared: interleaved blocks, medians, bootstrap intervals.

In: callables that each run one model once. Out: seconds per call, one number a callable and round.
Every round visits all callables in a new random order, so that a machine that slows down slows
all of them down. A block starts with untimed calls, a quarter of it, since the models before it
have taken the caches, and is long enough for what the model needs to be back in them: latencies are
of a model that runs again and again. A speed-up is the median over the rounds of baseline /
candidate. The rounds end when the intervals of these medians are narrow, or when the time is up.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError, complain

BLOCK_S = 20e-3
MIN_ROUNDS = 15
FEWEST_ROUNDS = 3
_WARM_UP_S = 0.05
_DRAWS = 1000


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Relative to the value."""
        return (self.high - self.low) / self.value


@dataclass
class Timings:
    """What `interleave` measured.

    Attributes
    ----------
    seconds : dict of key to array (rounds,)
        Mean seconds per call of each block.
    calls : dict of key to int
        Timed calls in a block.
    converged : bool
        Whether all intervals became as narrow as asked.
    wall_s : float
    """

    seconds: dict[Hashable, np.ndarray]
    calls: dict[Hashable, int]
    converged: bool
    wall_s: float


def quartiles(seconds: np.ndarray) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    low, middle, high = np.percentile(seconds, [25, 50, 75])
    return float(low), float(middle), float(high)


def bootstrap(values: np.ndarray, *, seed: int = 0) -> Interval:
    """Median of one value a round, and its interval.

    Parameters
    ----------
    values : array (rounds,)
        Seconds; or, for a speed-up, the ratios baseline / candidate of each round, in which what
        slowed down the whole round cancels.
    seed : int

    Returns
    -------
    Interval
        Percentiles 2.5 and 97.5 of the medians of 1000 draws of the rounds.
    """
    draws = np.random.default_rng(seed).integers(0, len(values), (_DRAWS, len(values)))
    low, high = np.percentile(np.median(values[draws], axis=1), [2.5, 97.5])
    return Interval(float(np.median(values)), float(low), float(high))


def interleave(
    calls: dict[Hashable, Callable[[], object]],
    ratios: list[tuple[Hashable, Hashable]],
    *,
    precision: float,
    time_limit_s: float,
    block_s: float = BLOCK_S,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    advance: Callable[..., None] | None = None,
) -> Timings:
    """Time all callables in turn until the ratios are known well enough.

    Parameters
    ----------
    calls : dict of key to callable
    ratios : list of (baseline key, candidate key)
        Those whose intervals must become narrow; without any, the medians' own must.
    precision : float
        Width of the 95 % interval relative to the median.
    time_limit_s : float
        Looked at after each round; three rounds are run in any case.
    block_s : float
        Timed seconds of a block, at least one call.
    seed : int
        Of the order within the rounds and of the bootstrap.
    clock : callable
        Seconds; monotonic.
    advance : callable, optional
        ``advance(seconds, description=...)`` after each round.

    Returns
    -------
    Timings
    """
    rng = np.random.default_rng(seed)
    order = list(calls)
    began = clock()
    blocks = {key: _block_size(call, block_s, clock) for key, call in calls.items()}
    seconds: dict[Hashable, list[float]] = {key: [] for key in calls}
    pairs = ratios or [(None, key) for key in calls]
    rounds, look_at, converged, said = 0, MIN_ROUNDS, False, clock()
    collecting = gc.isenabled()
    gc.disable()
    try:
        while not converged:
            for index in rng.permutation(len(order)):
                key = order[index]
                seconds[key].append(_time_block(calls[key], blocks[key], clock))
            rounds += 1
            now = clock()
            if rounds == look_at:
                look_at = math.ceil(1.2 * rounds)
                widest = max(_width(seconds, pair, seed) for pair in pairs)
                converged = widest <= precision
                if advance is not None:
                    advance(0, description=f"round {rounds}, interval {widest:.1%} wide")
            if advance is not None:
                advance(now - said)
            said = now
            if rounds >= FEWEST_ROUNDS and now - began >= time_limit_s:
                break
    finally:
        if collecting:
            gc.enable()
    arrays = {key: np.array(values) for key, values in seconds.items()}
    return Timings(arrays, blocks, converged, clock() - began)


def _width(seconds: dict[Hashable, list[float]], pair: tuple, seed: int) -> float:
    baseline, candidate = pair
    values = np.array(seconds[candidate])
    return bootstrap(values if baseline is None else seconds[baseline] / values, seed=seed).width


def _time_block(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    for _ in range(math.ceil(count / 4)):
        call()
    began = clock()
    for _ in range(count):
        call()
    return (clock() - began) / count


def _block_size(call: Callable[[], object], block_s: float, clock: Callable[[], float]) -> int:
    """Warm up; then how many calls take so long."""
    fastest, began = math.inf, clock()
    for count in range(100):
        before = clock()
        call()
        after = clock()
        fastest = min(fastest, after - before)
        if count >= 2 and after - began > _WARM_UP_S:
            break
    return max(1, math.ceil(block_s / max(fastest, 1e-7)))


# -- where it runs -----------------------------------------------------------------------------


def usable_cpus() -> list[int]:
    """CPUs that this process may use, the fastest first, one of each core before its siblings."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))

    def rank(cpu: int) -> tuple[int, float, int]:
        folder = Path(f"/sys/devices/system/cpu/cpu{cpu}")
        siblings = _read(folder / "topology/thread_siblings_list").replace("-", ",").split(",")
        first = not siblings[0] or siblings[0] == str(cpu)
        speed = _read(folder / "cpufreq/cpuinfo_max_freq")
        return 0 if first else 1, -float(speed or 0), cpu

    return sorted(os.sched_getaffinity(0), key=rank)


def check_threads(threads: int) -> None:
    """InputError for a number of threads that this process cannot have."""
    usable = len(usable_cpus())
    if not isinstance(threads, int) or not 1 <= threads <= usable:
        raise InputError(
            complain(
                f"threads={threads!r}",
                f"an integer of at least 1 and at most the {usable} CPUs this process may use",
                "Change it.",
            )
        )


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[list[int] | None]:
    """Keep all threads of this process on `threads` CPUs.

    Yields
    ------
    list of int or None
        The CPUs; None where the operating system has no affinity.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    cpus = usable_cpus()[:threads]
    masks = {task: _move(task, set(cpus)) for task in _tasks()}
    try:
        yield sorted(cpus)
    finally:
        for task in _tasks():
            _move(task, masks.get(task) or before)


def _tasks() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        return [0]


def _move(task: int, cpus: set[int]) -> set[int] | None:
    """Set the affinity of a thread; what it was, or None when the thread has ended."""
    try:
        before = os.sched_getaffinity(task)
        os.sched_setaffinity(task, cpus)
    except OSError:
        return None
    return before


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
