"""Samples in `.npy` files, as if they were one array.

In: a folder of files, or one file. Out: batches of samples, cut across the borders of files; of a
file only what a batch needs is read. Headers and lengths of all files are checked at the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from .errors import InputError, complain


class SampleFiles:
    """Arrays (N_i, ...) of one dtype and one shape of a sample, in the order of their files' names.

    Parameters
    ----------
    path : path
        A folder, of which all ``.npy`` files are taken, or a single one.
    batch_size : int

    Raises
    ------
    InputError
        Where there is none, and for files that are cut short, no arrays of numbers, or unlike the
        first one.
    """

    def __init__(self, path: str | Path, batch_size: int = 1) -> None:
        path = Path(path)
        self.paths = sorted(path.glob("*.npy")) if path.is_dir() else [path]
        self.batch_size = batch_size
        if not self.paths:
            raise InputError(
                complain(f"{path} without .npy files", "a folder of them", "Check the path.")
            )
        arrays = [load_array(path) for path in self.paths]
        first = arrays[0]
        for path, array in zip(self.paths, arrays, strict=True):
            if array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
                raise InputError(
                    complain(
                        f"{path} of {array.dtype} with samples of shape {array.shape[1:]}",
                        f"{first.dtype} and {first.shape[1:]}, as in {self.paths[0]}",
                        "Write all files alike.",
                    )
                )
        self._starts = np.cumsum([0, *(len(array) for array in arrays)])
        self.dtype = np.float32 if first.dtype.kind == "f" else first.dtype.newbyteorder("=")

    def __len__(self) -> int:
        """Samples in all files."""
        return int(self._starts[-1])

    def read(self, numbers: Sequence[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(number, samples) of batches, all by default; floating-point numbers as float32."""
        numbers = range(-(-len(self) // self.batch_size)) if numbers is None else numbers
        for number in numbers:
            begin = number * self.batch_size
            yield number, self._rows(begin, min(begin + self.batch_size, len(self)))

    def place(self, sample: int) -> str:
        """Where a sample is, for a message."""
        file = self._file(sample)
        return f", row {sample - self._starts[file]} of {self.paths[file]}"

    def _file(self, sample: int) -> int:
        return int(np.searchsorted(self._starts, sample, side="right")) - 1

    def _rows(self, begin: int, end: int) -> np.ndarray:
        parts = []
        for file in range(self._file(begin), self._file(end - 1) + 1):
            start = self._starts[file]
            rows = load_array(self.paths[file])[max(begin - start, 0) : end - start]
            parts.append(rows.astype(self.dtype))  # a copy; the file is closed again
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def load_array(path: str | Path) -> np.ndarray:
    """The array of a ``.npy`` file, mapped into memory, or the only one of an ``.npz`` file.

    Raises
    ------
    InputError
        For files that are missing or cut short, or hold anything else.
    """
    path = Path(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix == ".npz":
            with array as archive:
                array = archive[archive.files[0]] if len(archive.files) == 1 else archive.files
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise InputError(
            complain(f"{path}: {error}", "a whole .npy or .npz file of numbers", "Write it again.")
        ) from error
    if isinstance(array, list):
        raise InputError(
            complain(f"{path} with {len(array)} arrays", "one array", "Write an .npy file of each.")
        )
    if array.ndim == 0 or array.dtype.kind not in "fiub":
        raise InputError(
            complain(
                f"{path} of {array.dtype} and shape {array.shape}",
                "an array of numbers (N, ...)",
                "Write one.",
            )
        )
    return array
