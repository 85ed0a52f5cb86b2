"""What the command line reads: models, data and budgets from its arguments.

In: text. Out: objects; an `InputError` that names the option where that does not work.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from .errors import InputError, SLRError, complain, described
from .parallel import told_to_stop
from .sample_files import load_array


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn this package's errors, and those of files, into one line and exit status 1."""
    try:
        with told_to_stop():
            yield
    except (SLRError, OSError) as error:  # a disk that is full, a file where a folder should be
        text = f"[bold red]error:[/] {escape(str(error))}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def import_object(reference: str, option: str) -> Any:
    """The object that ``pkg.module:name`` names."""
    module_name, _, name = reference.partition(":")
    if not name:
        raise InputError(
            complain(f"{option} {reference!r}", "pkg.module:name", "For example models.vgg:make.")
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside the user, as with python -m
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever is at the top of the user's module
        raise InputError(
            complain(
                f"{option} {reference!r}: {described(error)}",
                "a name that can be imported",
                "Run from the folder of the module, or install it.",
            )
        ) from error


def import_function(reference: str, option: str) -> Callable[..., Any]:
    """The function, or class, that ``pkg.module:name`` names."""
    found = import_object(reference, option)
    if not callable(found):
        raise InputError(complain(f"{option} {reference!r}", "a function", "Name another."))
    return found


def parse_keep(text: str) -> dict[str, float]:
    """``flops=0.25,params=0.5`` as a dict."""
    keep = {}
    for part in text.split(","):
        resource, _, fraction = part.partition("=")
        try:
            keep[resource.strip()] = float(fraction)
        except ValueError as error:
            raise InputError(
                complain(f"--keep {text!r}", "flops=0.25 or params=0.25", "Join several by commas.")
            ) from error
    return keep


def make_solver(name: str) -> Any:
    from .solvers import SOLVERS

    if name not in SOLVERS:
        raise InputError(
            complain(f"--solver {name}", f"one of {', '.join(SOLVERS)}", "Check the name.")
        )
    return SOLVERS[name]()


def make_refinement(refine: bool, epochs: int | None) -> Any:
    """What ``refine=`` is given: so many epochs ask for a refinement too."""
    from .refine import Refinement

    return refine if epochs is None else Refinement(epochs=epochs)


_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str | None) -> int | None:
    """``2GiB`` or ``500 MB`` as a number of bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if found is None or found[2].upper() not in _UNITS:
        raise InputError(
            complain(f"--memory-limit {text!r}", "a size such as 2GiB or 500MB", "Check it.")
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def calibration_data(reference: str) -> Any:
    """What `slr_gpu.compress` reads for itself, as often as it needs to: a path, or an object."""
    if Path(reference).is_dir() or reference.endswith((".npy", ".npz")):
        return Path(reference)
    return import_object(reference, "--data")


def load_data(reference: str) -> Any:
    """Data from a .npy or .npz file or from ``pkg.module:loader``."""
    if not reference.endswith((".npy", ".npz")):
        loader = import_object(reference, "--data")
        return loader() if callable(loader) else loader
    data = load_array(reference)
    return data if data.dtype.kind in "iub" else data.astype("float32")


def load_model(reference: str, weights: Path | None) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    make = import_function(reference, "--model")
    try:
        model = make()
    except Exception as error:  # of the user's own
        raise InputError(
            complain(
                f"--model {reference!r}: {described(error)}",
                "a function without arguments that makes the model",
                "Call it yourself to see it.",
            )
        ) from error
    if weights is not None:
        try:
            model.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise InputError(
                complain(
                    f"--weights {weights}: {error}",
                    "a safetensors file of this model's state_dict",
                    "Check the path and the model.",
                )
            ) from error
    return model


def parse_shapes(texts: list[str]) -> dict[str, tuple[int, ...]]:
    """``input=1x3x224x224``, several times, as a dict."""
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        parts = sizes.split("x")
        if not name or not all(part.isdigit() and int(part) for part in parts):
            raise InputError(
                complain(f"--shape {text!r}", "input=1x3x224x224", "Repeat it for several inputs.")
            )
        shapes[name] = tuple(map(int, parts))
    return shapes


def label_models(paths: list[Path]) -> dict[str, list[Path]]:
    """Labels of model files; files that differ only in their ending are one model."""
    stems = list(dict.fromkeys(path.with_suffix("") for path in paths))
    names = [stem.name for stem in stems]
    return {
        stem.name if names.count(stem.name) == 1 else stem.as_posix(): [
            path for path in paths if path.with_suffix("") == stem
        ]
        for stem in stems
    }
