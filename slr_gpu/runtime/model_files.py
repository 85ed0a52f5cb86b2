"""What a deployable model declares.

In: a path to an ``.onnx`` or ``.pt2`` file, or an nn.Module. Out: a `ModelSource` with the names,
shapes and dtypes of its inputs. Missing and broken files are found here, before anything is timed.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import BackendError, InputError, complain

Dimension = int | str | None
ONNX, TORCH = "onnx", "torch"


@dataclass(frozen=True)
class InputSpec:
    """One declared input.

    Attributes
    ----------
    name : str
    shape : tuple or None
        Sizes; a name or None where the size is free. None where nothing is declared.
    dtype : np.dtype or None
        None where nothing is declared.
    """

    name: str
    shape: tuple[Dimension, ...] | None
    dtype: np.dtype | None

    def __str__(self) -> str:
        if self.shape is None:
            return self.name
        return f"{self.name}={'x'.join('?' if d is None else str(d) for d in self.shape)}"


@dataclass(frozen=True)
class ModelSource:
    """One model in one format.

    Attributes
    ----------
    name : str
        For messages: the path, or the class of a module.
    format : {"onnx", "torch"}
    inputs : tuple of InputSpec
    path : Path or None
    module : nn.Module or None
        In eval mode; of an ``.onnx`` file None.
    """

    name: str
    format: str
    inputs: tuple[InputSpec, ...]
    path: Path | None = None
    module: nn.Module | None = None


def open_source(model: Any) -> ModelSource:
    """Read what a model declares.

    Parameters
    ----------
    model : path or nn.Module
        Modules are not changed; those in train mode are copied.

    Raises
    ------
    InputError
        When it is missing, broken or of another kind.
    BackendError
        When the package that reads it is not installed.
    """
    if isinstance(model, nn.Module):
        return _from_module(model)
    if not isinstance(model, (str, Path)):
        raise InputError(
            complain(
                f"a model of {type(model).__name__}",
                "an .onnx or .pt2 file or an nn.Module",
                "Export it first.",
            )
        )
    path = Path(model)
    readers = {".onnx": _from_onnx, ".pt2": _from_pt2}
    if path.suffix not in readers:
        raise InputError(complain(str(path), "an .onnx or .pt2 file", "Export it first."))
    if not path.is_file():
        raise InputError(complain(f"{path}: no such file", "a model file", "Check the path."))
    return readers[path.suffix](path)


def _broken(path: Path, error: object) -> InputError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return InputError(complain(f"{path}: {reason}", f"a whole {path.suffix} file", "Export again."))


def _from_onnx(path: Path) -> ModelSource:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise BackendError(
            complain(f"{path} without the package onnx", "onnx", "pip install 'slr_gpu[onnx]'")
        ) from error
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise _broken(path, error) from error
    if not model.graph.node or not model.graph.output:
        raise _broken(path, "no graph in it")
    stored = set()
    for tensor in model.graph.initializer:
        stored.add(tensor.name)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(path, {item.key: item.value for item in tensor.external_data})
    inputs = []
    for value in model.graph.input:
        if value.name in stored:
            continue
        if not value.type.HasField("tensor_type"):
            raise _broken(path, f"input {value.name} is not a tensor")
        tensor = value.type.tensor_type
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        shape = None
        if tensor.HasField("shape"):
            shape = tuple(
                # Some exporters write 0 or -1 for a free size.
                d.dim_value if d.dim_value > 0 else d.dim_param or None
                for d in tensor.shape.dim
            )
        inputs.append(InputSpec(value.name, shape, dtype))
    return ModelSource(str(path), ONNX, tuple(inputs), path)


def _check_external(path: Path, entry: dict[str, str]) -> None:
    data = path.parent / entry["location"]
    if not data.is_file():
        raise _broken(path, f"its weights {data} are missing")
    if data.stat().st_size < int(entry.get("offset", 0)) + int(entry.get("length", 0)):
        raise _broken(path, f"its weights {data} are cut short")


def _from_pt2(path: Path) -> ModelSource:
    try:
        program = torch.export.load(path)
    # Whatever a damaged archive or pickle raises.
    except Exception as error:
        raise _broken(path, error) from error
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs = []
    for name in program.graph_signature.user_inputs:
        value = values.get(name)
        if not isinstance(value, torch.Tensor):
            raise _broken(path, f"input {name} is not a tensor")
        try:
            dtype = torch.empty(0, dtype=value.dtype).numpy().dtype
        except TypeError as error:
            raise _broken(path, f"input {name} of {value.dtype}") from error
        shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
        inputs.append(InputSpec(name, shape, dtype))
    return ModelSource(str(path), TORCH, tuple(inputs), path, program.module())


def _from_module(module: nn.Module) -> ModelSource:
    name = type(module).__name__
    devices = {str(p.device) for p in module.parameters()} - {"cpu"}
    if devices:
        raise InputError(
            complain(f"{name} on {devices.pop()}", "a model on the CPU", "Call .cpu() first.")
        )
    if any(part.training for part in module.modules()):
        module = copy.deepcopy(module).eval()
    parameters = inspect.signature(module.forward).parameters.values()
    names = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    inputs = tuple(InputSpec(item, None, None) for item in names or ["input"])
    return ModelSource(name, TORCH, inputs, None, module)
