"""Arrays to feed models that take the same inputs.

In: what the models declare, the user's data and sizes. Out: one array an input. Models that do not
fit together and sizes that stay open are found here, before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import InputError, complain
from .model_files import ONNX, InputSpec, ModelSource


def common_inputs(sources: list[ModelSource]) -> tuple[InputSpec, ...]:
    """The inputs that all models take; free sizes are filled in from models that fix them.

    Raises
    ------
    InputError
        When the models differ in the number, names (of ``.onnx`` files), shapes or dtypes.
    """
    first = sources[0]
    for source in sources:
        if source.format == ONNX != first.format:
            first = source
    merged = list(first.inputs)
    for source in sources:
        same = len(source.inputs) == len(merged)
        if same and source.format == first.format == ONNX:
            same = [spec.name for spec in source.inputs] == [spec.name for spec in merged]
        both = [_merge(*pair) for pair in zip(merged, source.inputs, strict=False)]
        if not same or None in both:
            raise InputError(
                complain(
                    f"{source.name} with inputs {', '.join(map(str, source.inputs))}",
                    f"those of {first.name}, {', '.join(map(str, merged))}",
                    "Export all models with the same inputs.",
                )
            )
        merged = both
    return tuple(merged)


def _merge(one: InputSpec, other: InputSpec) -> InputSpec | None:
    if one.dtype is not None and other.dtype is not None and one.dtype != other.dtype:
        return None
    dtype = one.dtype if one.dtype is not None else other.dtype
    if one.shape is None or other.shape is None:
        return InputSpec(one.name, one.shape if other.shape is None else other.shape, dtype)
    if len(one.shape) != len(other.shape):
        return None
    shape = []
    for a, b in zip(one.shape, other.shape, strict=True):
        if isinstance(a, int) and isinstance(b, int) and a != b:
            return None
        shape.append(b if isinstance(b, int) else a)
    return InputSpec(one.name, tuple(shape), dtype)


def make_inputs(
    specs: tuple[InputSpec, ...],
    data: Any = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    batch: int = 1,
    seed: int = 0,
) -> tuple[np.ndarray, ...]:
    """One array for each input.

    Parameters
    ----------
    specs : tuple of InputSpec
    data : array, tensor, sequence of them or dict by name, optional
        The first `batch` samples are taken, or as many as the models declare. Without data:
        standard normal numbers, and zeros and ones for integers and booleans.
    shapes : dict of name to tuple, optional
        Of inputs with free sizes other than the first, which is the batch.
    batch : int
    seed : int
        Of the random numbers.

    Returns
    -------
    tuple of array

    Raises
    ------
    InputError
        When sizes stay open or contradict what is declared.
    """
    names = [spec.name for spec in specs]
    shapes = dict(shapes or {})
    given = _as_dict(data, names)
    for name in [*shapes, *given]:
        if name not in names:
            raise InputError(
                complain(f"input {name!r}", f"one of {', '.join(names)}", "Check the name.")
            )
    rng = np.random.default_rng(seed)
    arrays = []
    for spec in specs:
        if spec.name in given:
            array = np.asarray(given[spec.name], dtype=spec.dtype)
            array = _first_samples(array, spec, batch)
            _check_shape(spec, array.shape)
        else:
            shape = shapes.get(spec.name) or _default_shape(spec, batch)
            _check_shape(spec, shape)
            array = _random(rng, shape, spec.dtype or np.dtype(np.float32))
        arrays.append(np.ascontiguousarray(array))
    if batch != 1 and not any(array.ndim and len(array) == batch for array in arrays):
        raise InputError(
            complain(
                f"batch={batch} for {', '.join(map(str, specs))}",
                "an input whose first size is the batch",
                "Export with a dynamic batch.",
            )
        )
    return tuple(arrays)


def _as_dict(data: Any, names: list[str]) -> dict[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        data = data if isinstance(data, (tuple, list)) else (data,)
        if len(data) != len(names):
            raise InputError(
                complain(
                    f"{len(data)} input arrays", f"one each for {', '.join(names)}", "Pass a dict."
                )
            )
        data = dict(zip(names, data, strict=True))
    missing = [name for name in names if name not in data]
    if missing:
        raise InputError(
            complain(f"no data for {', '.join(missing)}", "data for every input", "Add it.")
        )
    return {
        name: item.detach().cpu().numpy() if isinstance(item, torch.Tensor) else item
        for name, item in data.items()
    }


def _first_samples(array: np.ndarray, spec: InputSpec, batch: int) -> np.ndarray:
    if not array.ndim:
        return array
    declared = spec.shape[0] if spec.shape else None
    count = declared if isinstance(declared, int) else batch
    if len(array) < count:
        raise InputError(
            complain(f"{len(array)} samples of {spec}", f"at least {count}", "Pass more data.")
        )
    return array[:count]


def _default_shape(spec: InputSpec, batch: int) -> tuple[int, ...]:
    shape = None
    if spec.shape is not None:
        sizes = [batch if not i and not isinstance(d, int) else d for i, d in enumerate(spec.shape)]
        shape = tuple(sizes) if all(isinstance(size, int) for size in sizes) else None
    if shape is None:
        raise InputError(
            complain(
                f"input {spec} with free sizes",
                "the size of every dimension after the first",
                f"Pass --shape {spec.name}=1x3x224x224, in Python"
                f" shapes={{{spec.name!r}: (1, 3, 224, 224)}}, with the model's sizes.",
            )
        )
    return shape


def _check_shape(spec: InputSpec, shape: tuple[int, ...]) -> None:
    if spec.shape is None:
        return
    fits = len(shape) == len(spec.shape) and all(
        not isinstance(declared, int) or declared == size
        for declared, size in zip(spec.shape, shape, strict=True)
    )
    if not fits or math.prod(shape) == 0:
        got = "x".join(map(str, shape))
        raise InputError(
            complain(f"{spec.name} of {got}", f"the declared {spec}", "Match the model's shape.")
        )


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(dtype)
    raise InputError(complain(f"an input of {dtype}", "numbers", "Pass inputs= yourself."))
