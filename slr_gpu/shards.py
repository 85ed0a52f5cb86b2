"""A folder of files as calibration rows, read in blocks.

In: a folder of ``.npy`` or ``.safetensors`` files. Out: `Shards`, which can be iterated as often as
wanted and yields blocks ``(inputs, targets, linear_targets)``. Headers are read when it is opened:
shapes and dtypes that do not go together, or a file that is cut short, are found before any work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from .errors import InputError, complain

# What a block may hold, in the order in which a tuple holds it.
ROLES = ("inputs", "targets", "linear_targets")
# Bytes of a block that is cut from something larger.
BLOCK_BYTES = 64 * 2**20

_SAFETENSORS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


class _Member(NamedTuple):
    """One array in a file; `offset` is where its numbers begin, None in a safetensors file."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int | None = None

    def read(self, role: str, first: int, last: int) -> np.ndarray:
        """Rows from `first` up to `last`."""
        try:
            if self.offset is None:
                with safe_open(str(self.path), framework="numpy") as file:
                    return file.get_slice(role)[first:last]
            # Plain reads: pages of a memory map would count as memory of this process.
            width = self.shape[1]
            start = self.offset + first * width * self.dtype.itemsize
            count = (last - first) * width
            numbers = np.fromfile(self.path, self.dtype, count, offset=start)
            return numbers.reshape(last - first, width)
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(
                complain(f"{self.path}: {error}", "the file as it was opened", "Write it again.")
            ) from error


class Shards:
    """Rows in the files of a folder, in the order of their names.

    Attributes
    ----------
    rows : int
    """

    def __init__(self, folder: str | Path, *, block_bytes: int = BLOCK_BYTES) -> None:
        self._files = _members(Path(folder))
        first = self._files[0]
        for file in self._files:
            _check(file, first)
        bytes_a_row = sum(m.shape[1] * m.dtype.itemsize for m in first.values())
        size = max(1, block_bytes // max(bytes_a_row, 1))
        counts = [file["inputs"].shape[0] for file in self._files]
        self.rows = sum(counts)
        self._cuts = [
            (number, start, min(start + size, count))
            for number, count in enumerate(counts)
            for start in range(0, count, size)
        ]

    def __iter__(self) -> Iterator[tuple[np.ndarray | None, ...]]:
        for number, start, end in self._cuts:
            file = self._files[number]
            yield tuple(
                file[role].read(role, start, end) if role in file else None for role in ROLES
            )

    def where(self, block: int, role: str = "inputs") -> tuple[str, int]:
        """The file of a block, and the row of the file with which the block begins."""
        number, start, _ = self._cuts[block]
        return self._files[number][role].path.name, start

    def __repr__(self) -> str:
        return f"Shards({len(self._files)} file(s), {self.rows} rows)"


def open_shards(folder: str | Path) -> Shards:
    """Open a folder of files as calibration rows, for `LayerIO.from_blocks`.

    Parameters
    ----------
    folder : path
        Of ``.npy`` files, each of which holds rows of inputs; or of pairs (triples) of files named
        ``inputs*.npy``, ``targets*.npy`` (and ``linear_targets*.npy``) whose names end alike; or
        of ``.safetensors`` files, each with a tensor ``inputs`` and, if wanted, ``targets`` and
        ``linear_targets``. Taken in the order of their names; other files are ignored.

    Raises
    ------
    InputError
        For files that are missing, cut short or do not go together, by name.
    """
    return Shards(folder)


def _members(folder: Path) -> list[dict[str, _Member]]:
    """What is in every file (or pair of files), by headers alone."""
    tensors = sorted(folder.glob("*.safetensors"))
    arrays = sorted(folder.glob("*.npy"))
    if bool(tensors) == bool(arrays):
        got = "both .npy and .safetensors files" if tensors else "no .npy or .safetensors files"
        raise InputError(
            complain(f"{got} in {folder}", "files of one of these kinds", "Check the folder.")
        )
    if tensors:
        return [_safetensors(path) for path in tensors]
    named: dict[str, dict[str, _Member]] = {}
    roles = {path: next((r for r in ROLES if path.name.startswith(r)), None) for path in arrays}
    if not any(roles.values()):
        return [{"inputs": _npy(path)} for path in arrays]
    for path, role in roles.items():
        if role is None:
            raise InputError(
                complain(
                    f"{path} among files named by what they hold",
                    f"names that begin with {', '.join(ROLES)}",
                    "Rename it, or move it away.",
                )
            )
        named.setdefault(path.name.removeprefix(role), {})[role] = _npy(path)
    return [named[name] for name in sorted(named)]


def _npy(path: Path) -> _Member:
    """Header of an ``.npy`` file, and whether the file is as long as it says."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
                version, np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(file)
            offset = file.tell()
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            complain(f"{path}: {error}", "a whole .npy file", "Write it again.")
        ) from error
    wanted = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    found = path.stat().st_size
    if found < wanted:
        raise InputError(
            complain(
                f"{path} of {found} bytes, cut short",
                f"{wanted} bytes for its shape {shape} of {dtype}",
                "Write it again.",
            )
        )
    if fortran and min(shape, default=0) > 1:
        raise InputError(
            complain(f"{path} in Fortran order", "rows one after the other", "Save a C-order copy.")
        )
    return _Member(path, shape, dtype, offset)


def _safetensors(path: Path) -> dict[str, _Member]:
    """Header of a safetensors file."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys() if name in ROLES}
            headers = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(
            complain(f"{path}: {error}", "a whole safetensors file", "Write it again.")
        ) from error
    if not headers:
        raise InputError(
            complain(f"{path} without any of {', '.join(ROLES)}", "inputs", "Rename the tensors.")
        )
    for role, (_, kind) in headers.items():
        if kind not in _SAFETENSORS:
            raise InputError(
                complain(
                    f"{path}: {role} of dtype {kind}",
                    f"one of {', '.join(_SAFETENSORS)}",
                    "Convert it to float32.",
                )
            )
    return {
        role: _Member(path, shape, np.dtype(_SAFETENSORS[kind]))
        for role, (shape, kind) in headers.items()
    }


def _check(file: dict[str, _Member], first: dict[str, _Member]) -> None:
    """InputError for a file that does not go with the first one, or not with itself."""

    def refuse(member: Any, got: str, expected: str) -> None:
        raise InputError(
            complain(
                f"{member.path}: {got}", expected, "Write the shards with one shape and dtype."
            )
        )

    if "inputs" not in file or file.keys() != first.keys():
        refuse(
            next(iter(file.values())),
            f"{' and '.join(sorted(file))} alone",
            f"{', '.join(sorted(first.keys() | {'inputs'}))} for the same rows",
        )
    rows = file["inputs"].shape[:1]
    for role, member in file.items():
        like = first[role]
        if len(member.shape) != 2 or member.shape[1:] != like.shape[1:]:
            refuse(
                member,
                f"{role} of shape {member.shape}",
                f"(rows, {like.shape[1] if len(like.shape) == 2 else 'columns'})",
            )
        if member.dtype != like.dtype or member.dtype.kind not in "fiub":
            refuse(member, f"{role} of dtype {member.dtype}", f"real numbers, {like.dtype}")
        if member.shape[:1] != rows:
            refuse(member, f"{role} of {member.shape[0]} rows", f"{rows[0]}, like its inputs")
