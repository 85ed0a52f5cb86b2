"""Calibration rows that pass by in blocks, again and again, checked every time.

In: a source of blocks that can be iterated more than once: a list, an object with ``__iter__``, a
function that makes an iterator, `Shards`, or whole arrays (memory-mapped ones are cut into blocks).
A block is X (p, m) or a tuple (X, Y), (X, Y, Z), or a mapping with the names of `ROLES`; Y and Z
are the responses wanted after and before the activation. Out: `Blocks`, one pass an iteration. The
first pass looks at every number; later ones at a checksum of every block.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .errors import InputError, complain
from .ops import NumpyOps
from .progress import progress_bar
from .shards import BLOCK_BYTES, ROLES, Shards

Array = Any
Arrays = tuple[Array, Array | None, Array | None]

# Rows of every block of which the order of the numbers counts in the checksum, too.
WITNESSES = 8
# Bytes of a block from which on a thread of its own makes the checksum.
LARGE = 2**20


class ArrayBlocks:
    """Whole arrays, cut into blocks.

    Parameters
    ----------
    arrays : mapping of str to array
        By the names of `ROLES`.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = {
            name: array if hasattr(array, "nbytes") else np.asarray(array)
            for name, array in arrays.items()
            if array is not None
        }
        if not self._arrays:
            raise InputError(complain("no arrays", "inputs", "Pass them by name."))
        lengths = {name: len(array) for name, array in self._arrays.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(
                complain(f"arrays of {lengths} rows", "as many of each", "One row is one sample.")
            )

    def __iter__(self) -> Iterator[dict[str, Array]]:
        count = len(next(iter(self._arrays.values())))
        bytes_a_row = sum(a[:1].nbytes for a in self._arrays.values())
        size = max(1, BLOCK_BYTES // max(bytes_a_row, 1))
        for start in range(0, count, size):
            yield {name: a[start : start + size] for name, a in self._arrays.items()}


class Blocks:
    """The rows of one layer, in passes.

    Making one is the first pass.

    Parameters
    ----------
    source : object
        See the module's text.
    width, outputs : int
        m and n of the layer.
    show_progress : bool
        Whether passes longer than two seconds show a bar on a terminal.

    Attributes
    ----------
    rows : int
    dtype : dtype
        float32 or float64, of the inputs.
    given : tuple of bool
        Which of the `ROLES` the blocks hold.
    means : tuple of (array or None)
        Their column means over all rows.
    passes : int
        Passes that were begun, the first one included.

    Raises
    ------
    InputError
        For a source that can be iterated only once, for blocks that do not fit the layer or each
        other, for NaN or Inf, with the block and the row; in later passes for blocks that are not
        what they were.
    """

    def __init__(
        self, source: Any, width: int, outputs: int, *, show_progress: bool = True
    ) -> None:
        self._open = _opener(source)
        self._shards = source if isinstance(source, Shards) else None
        self._widths = (width, outputs, outputs)
        self.show_progress = show_progress
        self.rows, self.passes = 0, 0
        self._kinds: tuple[np.dtype | None, ...] | None = None
        self._checksums: list[int] = []
        self._first_pass()

    def _first_pass(self) -> None:
        sums: list[Array] = []
        self.passes += 1
        total = self._shards.rows if self._shards else None
        with self._bar(total) as advance:
            for number, raw in enumerate(self._open()):
                arrays = self._taken(number, self.rows, raw)
                parts = [
                    None if a is None else self._sum(number, role, a)
                    for role, a in zip(ROLES, arrays, strict=True)
                ]
                if sums:
                    sums = [s if s is None else s + p for s, p in zip(sums, parts, strict=True)]
                else:
                    sums = parts
                self._checksums.append(checksum(arrays))
                self.rows += len(arrays[0])
                advance(len(arrays[0]))
        if self.rows < 2:
            raise InputError(
                complain(
                    f"{self.rows} calibration row(s) in {len(self._checksums)} block(s)",
                    "at least 2",
                    "Pass more calibration inputs.",
                )
            )
        self.given = tuple(kind is not None for kind in self._kinds)
        self.dtype = float_kind(self._kinds[0])
        self.means = tuple(None if s is None else s / self.rows for s in sums)

    def __iter__(self) -> Iterator[tuple[int, Arrays]]:
        """One pass: the number of a block's first row, and its arrays.

        That a block is what it was is known when the next one is asked for.
        """
        self.passes += 1
        start, number = 0, -1
        with self._bar(self.rows) as advance, ThreadPoolExecutor(1) as worker:
            for number, raw in enumerate(self._open()):
                if number == len(self._checksums):
                    self._differs(number, start, "a block more than in the first pass")
                arrays = self._taken(number, start, raw)
                found = None
                if arrays[0].nbytes > LARGE:  # on another core, while the rows are being copied
                    found = worker.submit(checksum, arrays)
                yield start, arrays
                if (found.result() if found else checksum(arrays)) != self._checksums[number]:
                    self._differs(number, start, "other rows than in the first pass")
                start += len(arrays[0])
                advance(len(arrays[0]))
        if number + 1 != len(self._checksums):
            self._differs(number + 1, start, f"the end, after {number + 1} block(s)")

    def _bar(self, total: int | None) -> Any:
        words = f"pass {self.passes} over the calibration rows"
        return progress_bar(words, total, show=self.show_progress)

    def _differs(self, number: int, start: int, what: str) -> None:
        once = f"{len(self._checksums)} blocks of {self.rows} rows"
        raise InputError(
            complain(
                f"{what} at {self._place(number, start)} in pass {self.passes}",
                f"the same {once} in every pass",
                "Do not shuffle or augment at random; a function must make a new iterator each"
                " time.",
            )
        )

    def _place(self, number: int, start: int, role: str = "inputs") -> str:
        """A block in words."""
        place = f"block {number} (from row {spaced(start)} on"
        if self._shards:
            place += f", file {self._shards.where(number, role)[0]}"
        return place + ")"

    def _taken(self, number: int, start: int, raw: Any) -> Arrays:
        """A block as contiguous float32 or float64 arrays on the host, of the right shapes."""
        arrays = tuple(None if a is None else NumpyOps().asarray(a) for a in _parts(raw))
        kinds = tuple(None if a is None else a.dtype for a in arrays)
        if self._kinds is None:
            self._kinds = kinds
        for role, a, kind, width in zip(ROLES, arrays, self._kinds, self._widths, strict=True):
            got = expected = None
            if (a is None) != (kind is None) or (a is None and role == "inputs"):
                got = f"{'no' if a is None else 'also'} {role}"
                known = [r for r, k in zip(ROLES, self._kinds, strict=True) if k is not None]
                expected = f"{', '.join(known or ROLES[:1])} as in the first block"
            elif a is None:
                continue
            elif a.ndim != 2 or a.shape[1] != width or len(a) != len(arrays[0]):
                rows = "rows" if role == "inputs" else len(arrays[0])
                got, expected = f"{role} of shape {a.shape}", f"({rows}, {width})"
            elif a.dtype != kind or kind.kind not in "fiub":
                got = f"{role} of dtype {a.dtype}"
                expected = f"{kind} as in the first block" if number else "real numbers"
            if got:
                raise InputError(
                    complain(
                        f"{got} in {self._place(number, start)}",
                        expected,
                        "All blocks must have one layout; one row is one sample.",
                    )
                )
        return tuple(
            None if a is None else np.ascontiguousarray(a, float_kind(a.dtype)) for a in arrays
        )

    def _sum(self, number: int, role: str, array: Array) -> Array:
        """Column sums; InputError for NaN or Inf."""
        # In float64: the means are then the same for blocks that are cut otherwise.
        with np.errstate(over="ignore", invalid="ignore"):
            total = array.sum(axis=0, dtype=np.float64)
        # A sum is finite only if no entry is NaN or Inf; the exact test runs only if it is not.
        if not np.isfinite(total).all():
            bad = np.argwhere(~np.isfinite(array))
            if len(bad):
                row, column = bad[0].tolist()
                place = f"row {spaced(self.rows + row)}, column {column} (block {number}"
                if self._shards:
                    name, first = self._shards.where(number, role)
                    place += f", file {name}, row {first + row} of the file"
                raise InputError(
                    complain(
                        f"{len(bad)} NaN or Inf in {role}, the first at {place})",
                        "finite numbers",
                        "Check the calibration data.",
                    )
                )
        return total

    def gather(self, *indices: Array) -> list[Arrays]:
        """Copies of rows, by ascending numbers, all in one pass."""
        kept = [Kept(index) for index in indices]
        for start, arrays in self:
            for rows in kept:
                rows.take(start, arrays)
        return [rows.arrays for rows in kept]


class Kept:
    """Rows that stay in memory as they pass by.

    Parameters
    ----------
    index : int array
        Their numbers, ascending.
    """

    def __init__(self, index: Array) -> None:
        self.index = index
        self.arrays: Arrays = (None, None, None)

    def take(self, start: int, arrays: Arrays) -> None:
        """Copy the wanted ones of a block that begins with row `start`."""
        low, high = np.searchsorted(self.index, [start, start + len(arrays[0])])
        if self.arrays[0] is None:
            self.arrays = tuple(
                None if a is None else np.empty((len(self.index), a.shape[1]), a.dtype)
                for a in arrays
            )
        rows = self.index[low:high] - start
        for kept, array in zip(self.arrays, arrays, strict=True):
            if array is not None:
                kept[low:high] = array[rows]


def spaced(number: int) -> str:
    """``10 234 567``."""
    return f"{number:,}".replace(",", " ")


def checksum(arrays: Iterable[Array | None]) -> int:
    """A number that changes with any entry of contiguous arrays.

    The sum of all bits in words of eight bytes, which costs one look at the memory, and a CRC of a
    few rows, so that the order of rows counts as well.
    """
    digest = 0
    for array in arrays:
        if array is None:
            continue
        raw = array.reshape(-1).view(np.uint8)
        words = len(raw) // 8 * 8
        total = int(raw[:words].view(np.uint64).sum(dtype=np.uint64)) if words else 0
        some = np.ascontiguousarray(array[:: max(1, len(array) // WITNESSES)])
        text = f"{array.shape} {total}".encode() + raw[words:].tobytes()
        digest = zlib.crc32(some, zlib.crc32(text, digest))
    return digest


def float_kind(dtype: np.dtype) -> np.dtype:
    """float64 for what has its precision, in whatever byte order; float32 for the rest."""
    return np.dtype(np.float64 if dtype.kind == "f" and dtype.itemsize >= 8 else np.float32)


def _parts(raw: Any) -> tuple[Any, ...]:
    """(X, Y, Z) of a block as it came."""
    if isinstance(raw, Mapping):
        unknown = sorted(map(str, raw.keys() - set(ROLES)))
        if unknown:
            raise InputError(
                complain(f"a block with {', '.join(unknown)}", ", ".join(ROLES), "Rename them.")
            )
        return tuple(raw.get(role) for role in ROLES)
    if not isinstance(raw, (tuple, list)):
        return (raw, None, None)
    if not 1 <= len(raw) <= len(ROLES):
        raise InputError(
            complain(
                f"a block of {len(raw)} arrays",
                "X, (X, Y) or (X, Y, Z)",
                "Yield inputs, and if wanted targets and linear targets.",
            )
        )
    return (*raw, None, None)[: len(ROLES)]


def _opener(source: Any) -> Callable[[], Iterator[Any]]:
    """What makes an iterator over the blocks, as often as it is called."""
    if isinstance(source, Mapping):
        return ArrayBlocks(source).__iter__
    if hasattr(source, "shape"):
        return ArrayBlocks({"inputs": source}).__iter__
    if isinstance(source, Iterator):
        raise InputError(
            complain(
                f"a {type(source).__name__}, which can be iterated once",
                "blocks that can be iterated again and again",
                "Pass the function that makes it, a list, or an object with __iter__.",
            )
        )
    if isinstance(source, Iterable) or hasattr(source, "__getitem__"):
        return lambda: iter(source)
    if callable(source):
        return lambda: iter(source())
    raise InputError(
        complain(
            f"blocks of type {type(source).__name__}",
            "a list, an object with __iter__, or a function that makes an iterator",
            "See LayerIO.from_blocks.",
        )
    )
