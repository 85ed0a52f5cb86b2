"""The sessions that a benchmark times: which runtimes, opened, run once and compared.

In: models in one or several formats. Out: a session for each model and runtime, how far its outputs
are from those of the other runtimes, and why the others could not be opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..equivalence import relative_error
from ..errors import BackendError, InputError, complain
from .model_files import InputSpec, ModelSource
from .result import Skipped
from .sessions import RUNTIMES, Arrays, Session, one_line

# Float32 sums in another order stay far below it, bfloat16 does not.
TOLERANCE = 1e-3

Key = tuple[str, str]  # label of the model, name of the runtime
Sources = dict[str, dict[str, ModelSource]]  # by label and format


def choose_runtimes(
    names: Sequence[str] | None, sources: Sources
) -> tuple[list[type[Session]], list[Skipped]]:
    """Those to use, and those that would take the models but cannot be used here.

    Raises
    ------
    InputError
        For unknown names, runtimes that do not take every model, models without a runtime in
        common.
    BackendError
        When a runtime asked for by name does not work, or none does.
    """
    for name in names or ():
        if name not in RUNTIMES:
            raise InputError(
                complain(f"runtime {name!r}", f"one of {', '.join(RUNTIMES)}", "Check the name.")
            )
    chosen, skipped = [], []
    for name in RUNTIMES if names is None else dict.fromkeys(names):
        runtime = RUNTIMES[name]
        takers = [label for label, formats in sources.items() if runtime.format in formats]
        others = [label for label in sources if label not in takers]
        if names is None and not takers:
            continue
        if names is not None and others:
            raise InputError(
                complain(
                    f"runtime {name!r} for {', '.join(others)}",
                    f"models in its format, {runtime.format}",
                    "Export them, or leave the runtime out.",
                )
            )
        reason = runtime.why_not()
        if reason is None:
            chosen.append(runtime)
        elif names is not None:
            raise BackendError(complain(f"runtime {name!r}, {reason}", "a working one", ""))
        else:
            skipped.append(Skipped("", name, reason))
    if not chosen:
        reasons = "; ".join(f"{item.runtime} {item.reason}" for item in skipped)
        raise BackendError(complain(f"no runtime: {reasons}", "at least one", "Install one."))
    common = set.intersection(*({*formats} for formats in sources.values()))
    if not common & {runtime.format for runtime in chosen}:
        raise InputError(
            complain(
                "models without a format in common",
                "one runtime that runs all of them",
                "Export all of them as .onnx.",
            )
        )
    return chosen, skipped


def open_sessions(
    sources: Sources,
    runtimes: Sequence[type[Session]],
    arrays: Arrays,
    threads: int,
    *,
    strict: bool,
    advance: Callable[..., None],
) -> tuple[dict[Key, Session], dict[Key, tuple[float | None, bool]], list[Skipped]]:
    """Open every model in every runtime that takes it, and run it once.

    Parameters
    ----------
    sources : dict of label to dict of format to ModelSource
    runtimes : sequence of Session classes
    arrays : tuple of array
        One batch, in the order of the models' inputs.
    threads : int
    strict : bool
        A session that cannot be opened is an error, not a line in the table.
    advance : callable
        ``advance(amount, description=...)``.

    Returns
    -------
    sessions : dict of Key to Session
    agreement : dict of Key to (float or None, bool)
        Relative error of the outputs within which at least half of the other runtimes lie (None
        without others), and whether that is rounding.
    skipped : list of Skipped

    Raises
    ------
    InputError
        When no runtime can run a model.
    """
    sessions: dict[Key, Session] = {}
    outputs: dict[str, dict[str, list[np.ndarray]]] = {label: {} for label in sources}
    skipped = []
    for label, formats in sources.items():
        for runtime in runtimes:
            if runtime.format not in formats:
                continue
            advance(0, description=f"opening {label} in {runtime.name}")
            try:
                session = runtime(formats[runtime.format], arrays, threads)
                outputs[label][runtime.name] = session.run(arrays)
                sessions[label, runtime.name] = session
            except Exception as error:  # noqa: BLE001  (each runtime has classes of its own)
                skipped.append(Skipped(label, runtime.name, one_line(error)))
            advance(1)
    for item in skipped:
        if strict or not outputs[item.model]:
            raise InputError(
                complain(
                    f"{item.model} in {item.runtime}: {item.reason}",
                    "a model that the runtime can open and run",
                    "Export again, or leave the runtime or the model out.",
                )
            )
    agreement = {
        (label, name): value
        for label, by_runtime in outputs.items()
        for name, value in compare_outputs(by_runtime).items()
    }
    return sessions, agreement, skipped


def compare_outputs(
    outputs: Mapping[str, list[np.ndarray]],
) -> dict[str, tuple[float | None, bool]]:
    """How far each runtime is from the nearer half of the others, and whether that is rounding."""
    found: dict[str, tuple[float | None, bool]] = {}
    for name, own in outputs.items():
        errors = sorted(relative_error(own, o) for other, o in outputs.items() if other != name)
        error = errors[(len(errors) - 1) // 2] if errors else None
        found[name] = (error, error is None or error <= TOLERANCE)
    return found


class Runner:
    """``run(inputs)`` for an evaluation: any number of samples through sessions of fixed shape.

    Parameters
    ----------
    session : Session
    arrays : tuple of array
        What the session was opened for; the first sizes are the batch.
    specs : tuple of InputSpec
    advance : callable, optional
        ``advance(0)`` after each batch: keeps a progress bar alive.
    """

    def __init__(
        self,
        session: Session,
        arrays: Arrays,
        specs: tuple[InputSpec, ...],
        *,
        advance: Callable[..., None] | None = None,
    ) -> None:
        self._session, self._arrays, self._specs = session, arrays, specs
        self._advance = advance

    def __call__(self, inputs: Any) -> Any:
        names = [spec.name for spec in self._specs]
        if isinstance(inputs, Mapping):
            inputs = tuple(inputs[name] for name in names)
        inputs = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
        arrays = [
            np.asarray(item, dtype=template.dtype)
            for item, template in zip(inputs, self._arrays, strict=True)
        ]
        count, size = len(arrays[0]), len(self._arrays[0])
        parts = []
        for begin in range(0, count, size):
            rows = np.minimum(np.arange(begin, begin + size), count - 1)
            outputs = self._session.run(tuple(np.ascontiguousarray(a[rows]) for a in arrays))
            parts.append([np.array(output) for output in outputs])
            if self._advance is not None:
                self._advance(0)
        joined = [np.concatenate(items)[:count] for items in zip(*parts, strict=True)]
        return joined[0] if len(joined) == 1 else joined
