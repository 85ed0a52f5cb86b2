"""A model as one file that stock runtimes execute: ONNX or torch.export.

In: a model (compressed or not), a path whose suffix names the format, and a few inputs. Out: the
file, and the largest relative error by which what a runtime computes from it differs from the
PyTorch model. The model is copied, put into float32 on the CPU (half precision too: runtimes are
fastest there), rewritten for deployment (`slr_gpu.fold`), captured by `torch.export` with a free
batch dimension, written under a temporary name, run from there, and only then given its name.

    .onnx   opset 18, standard operators only, weights inside; checked in ONNX Runtime
    .pt2    `torch.export.save`; checked through `torch.export.load`

Opset 18 is the one that torch's exporter writes natively, so nothing passes a version converter,
and every ONNX Runtime from 1.14 and every OpenVINO from 2023 on reads it.
"""

from __future__ import annotations

import importlib
import io
import linecache
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .equivalence import (
    as_arguments,
    batched,
    compare,
    first_line,
    onnx_runner,
    pt2_runner,
    resize,
    runner_of,
)
from .errors import BackendError, InputError, ModelError, complain
from .fold import deployable, for_deployment
from .storage import write_atomically

SUFFIXES = (".onnx", ".pt2")
OPSET = 18
PROTOBUF_LIMIT = 2**31 - 1  # bytes of one protobuf message
SMALLEST_NORMAL = float(torch.finfo(torch.float32).tiny)


def check_target(path: str | Path) -> None:
    """Whether a file of that suffix can be written here; costs nothing, so ask before working.

    Raises
    ------
    InputError
        For another suffix.
    BackendError
        When the packages that write and check it are not installed.
    """
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise InputError(
            complain(f"export to {str(path)!r}", f"a name in {' or '.join(SUFFIXES)}", "Rename it.")
        )
    for package in ("onnx", "onnxscript", "onnxruntime") if suffix == ".onnx" else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise BackendError(
                complain(
                    f"export to {path} without {package} ({error})",
                    "onnx, onnxscript and onnxruntime",
                    "pip install 'slr_gpu[onnx]'",
                )
            ) from error


def export_model(
    model: nn.Module, path: str | Path, inputs: Any, graphs: Mapping[str, str] | None = None
) -> float:
    """Write a model as ``.onnx`` or ``.pt2``, checked against PyTorch.

    Parameters
    ----------
    model : nn.Module
        Copied, exported in eval mode and float32.
    path : path
        The suffix decides.
    inputs : tensor, array or tuple of arguments
        Inputs that the model understands, one sample or more; the leading dimension of the
        tensors is the batch. All other dimensions are fixed to theirs.
    graphs : dict of str to str, optional
        Which graph decomposed layers take; see `slr_gpu.fold.for_deployment`.

    Returns
    -------
    float
        Largest relative error found: of each output's largest difference over its largest
        magnitude, on these inputs and on random ones, with two batch sizes.

    Raises
    ------
    InputError
        For another suffix, inputs that are none, or a model above the 2 GB of one ONNX file.
    BackendError
        When the packages that write and check ONNX are not installed.
    ModelError
        When the model cannot be captured or written, or its file computes something else.
        Nothing is written then.
    """
    path = Path(path)
    check_target(path)
    arguments = as_arguments(inputs)
    reference = deployable(model)
    expected = runner_of(reference)
    with torch.no_grad(), _quiet():
        deployed = flush_denormals(for_deployment(reference, graphs))
        example = resize(arguments, 2)
        program = _capture(deployed, example)
        if path.suffix == ".onnx":
            stored = {t.data_ptr(): t.nbytes for t in deployed.state_dict().values()}  # tied: once
            _check_size(sum(stored.values()), path)
            content = _to_onnx(program, len(expected(example)))
            _check_size(len(content), path)
            load = onnx_runner
        else:
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            content, load = buffer.getvalue(), pt2_runner
        worst = 0.0

        def write(temporary: Path) -> None:
            nonlocal worst
            temporary.write_bytes(content)
            worst = compare(lambda: load(temporary), expected, arguments, path.name)

        write_atomically(path, write)
    return worst


def modules_to_onnx(cases: Sequence[tuple[nn.Module, Tensor]]) -> list[bytes]:
    """ONNX files of modules, each for the shape of its one input, at little more than one's cost.

    They pass the exporter side by side, as one model, and are cut apart.
    """
    from onnx.utils import Extractor

    with torch.no_grad(), _quiet():
        program = torch.export.export(
            _SideBySide([module for module, _ in cases]),
            (tuple(x for _, x in cases),),
            strict=False,
        )
        proto = _convert(program, [f"output_{i}" for i in range(len(cases))])
    extractor = Extractor(proto)
    pairs = zip(proto.graph.input, proto.graph.output, strict=True)
    return [extractor.extract_model([x.name], [y.name]).SerializeToString() for x, y in pairs]


class _SideBySide(nn.Module):
    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [part(x) for part, x in zip(self.parts, inputs, strict=True)]


@torch.no_grad()
def flush_denormals(model: nn.Module) -> nn.Module:
    """Zero weights and buffers below float32's smallest normal number, in place.

    They change no result, but a CPU takes many times longer over each product with one.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor[tensor.abs() < SMALLEST_NORMAL] = 0
    return model


def has_denormals(model: nn.Module) -> bool:
    """Whether `flush_denormals` would change the model."""
    return any(
        bool(((t != 0) & (t.abs() < SMALLEST_NORMAL)).any())
        for t in [*model.parameters(), *model.buffers()]
        if t.is_floating_point()
    )


# -- capture and conversion ----------------------------------------------------------------------


def _capture(model: nn.Module, example: tuple[Any, ...]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    shapes = [
        {0: batch} if samples else ({} if isinstance(item, Tensor) else None)
        for item, samples in zip(example, batched(example), strict=True)
    ]
    try:
        return torch.export.export(
            model, example, dynamic_shapes=_by_parameter(model, shapes), strict=False
        )
    except Exception as error:
        raise ModelError(
            complain(
                f"{type(error).__name__} {_place(model, error)}: {first_line(error)}",
                "a model that torch.export captures with a free batch dimension",
                "Rewrite that step without Python control flow on values or shapes;"
                " Result.save does not need it.",
            )
        ) from error


def _by_parameter(model: nn.Module, shapes: list[Any]) -> Any:
    """Specifications as torch.export pairs them: starred arguments are one tuple."""
    code = getattr(model.forward, "__code__", None)
    positional = code.co_argcount - 1 if code is not None else len(shapes)
    if code is not None and code.co_flags & 0x04 and len(shapes) > positional:
        return (*shapes[:positional], tuple(shapes[positional:]))
    return tuple(shapes)


def _place(model: nn.Module, error: BaseException) -> str:
    """The innermost module of the model that was running, and its line, from the traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            file, name = frame.f_code.co_filename, names[id(owner)] or "the model"
            text = linecache.getline(file, line).strip()
            place = f"in {name} ({type(owner).__name__}), {os.path.basename(file)}:{line}: {text}"
    return place or "while capturing the model"


def _to_onnx(program: torch.export.ExportedProgram, outputs: int) -> bytes:
    for spec in program.graph_signature.output_specs:
        value = getattr(spec.arg, "value", None)  # of a constant
        if value is not None:
            raise ModelError(
                complain(
                    f"a model that returns {value!r}, a {type(value).__name__}",
                    "tensors or None, which is all that an ONNX model can return",
                    "Leave it out of what the model returns, or export .pt2 instead.",
                )
            )
    names = ["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)]
    proto = _convert(program, names)
    foreign = [node for node in proto.graph.node if node.domain not in ("", "ai.onnx")]
    if foreign or len(proto.functions):
        what = ", ".join(sorted({f"{node.domain}::{node.op_type}" for node in foreign}))
        raise ModelError(
            complain(
                f"operators outside the ONNX standard: {what or 'model functions'}",
                f"standard operators of opset {OPSET}",
                "Export .pt2 instead.",
            )
        )
    _flush_initializers(proto)
    _name_batch(proto)
    return proto.SerializeToString()


def _convert(program: torch.export.ExportedProgram, names: list[str]) -> Any:
    """The ONNX message of a captured program."""
    try:
        converted = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, output_names=names, verbose=False
        )
    except Exception as error:
        raise ModelError(
            complain(
                f"{type(error).__name__} {_operator(program, error)}",
                "operators that torch's ONNX exporter knows",
                "Export .pt2 instead, or write the step with other operators.",
            )
        ) from error
    return converted.model_proto


def _operator(program: torch.export.ExportedProgram, error: BaseException) -> str:
    """The operator that a conversion error is about and the module it comes from."""
    texts, link = [], error
    while link is not None:
        texts.append(str(link))
        link = link.__cause__
    text = "\n".join(texts)
    found = re.search(r"node %(\w+) .*?\[target=(?:torch\.ops\.)?([\w.]+)\]", text)
    if found is None:
        return f"while converting: {first_line(error)}"
    stacks = {node.name: node.meta.get("nn_module_stack") or {} for node in program.graph.nodes}
    owners = [name for name, _ in stacks.get(found[1], {}).values()]
    return f"in {(owners and owners[-1]) or 'the model'}, operator {found[2]}"


def _flush_initializers(proto: Any) -> None:
    """Constants that the exporter computed itself (folded BatchNorms) may be denormal again."""
    import numpy as np
    from onnx import numpy_helper

    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            small = (array != 0) & (np.abs(array) < np.float32(SMALLEST_NORMAL))
            if small.any():
                flushed = np.where(small, np.float32(0), array)
                tensor.CopyFrom(numpy_helper.from_array(flushed, tensor.name))


def _name_batch(proto: Any) -> None:
    """Call the free dimension ``batch``; torch names it by a number of its own."""
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    dims = [dim for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param]
    if dims:
        symbol = re.compile(rf"\b{re.escape(dims[0].dim_param)}\b")
        for dim in dims:
            dim.dim_param = symbol.sub("batch", dim.dim_param)


def _check_size(size: int, path: Path) -> None:
    if size > PROTOBUF_LIMIT:
        raise InputError(
            complain(
                f"a model of {size} bytes for {path}",
                f"at most {PROTOBUF_LIMIT}, what one ONNX file can hold",
                "Export .pt2, or keep less.",
            )
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's progress and deprecation messages of exporting to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
