"""Room for tensors that wait for their turn: in memory up to a limit, beyond it in files.

In: values with tensors in them. Out: the same values later, to the bit, with their strides and with
what they share. Files are in a folder of their own whose name carries the host and the process; it
is removed at the end, by the next start where the process was killed.
"""

from __future__ import annotations

import copy
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import InputError, complain
from .ops.memory import host_free
from .storage import write_atomically

PREFIX = "slr_gpu-spill"
# Share of the available memory that may be taken, and what waiting tensors take at most: what goes
# to a file beyond it mostly stays in the system's file cache while there is room.
SHARE = 4
MOST = 2**30


def usual_limit() -> int:
    """Bytes of host memory that may be taken where nobody says how many."""
    free = host_free()
    return MOST if free is None else free // SHARE


@dataclass
class Waiting:
    """Values that wait.

    Attributes
    ----------
    values : any
        Where they are in memory.
    path : Path or None
        The file of their tensors, where they are not.
    leaves, spec, places
        Then, what else they consist of, and where the tensors go.
    nbytes : int
    """

    values: Any
    nbytes: int
    path: Path | None = None
    leaves: list[Any] | None = None
    spec: Any = None
    places: tuple[int, ...] = ()


class Spill:
    """A place for values that wait; a context that leaves nothing behind.

    Parameters
    ----------
    folder : path, optional
        Where files go; the system's folder for temporary files by default.
    limit : int, optional
        Bytes kept in memory. By default a quarter of what is available, at most 1 GiB; on a CUDA
        device a quarter of its free memory.
    device : str
        Where the tensors are.

    Attributes
    ----------
    written : int
        Bytes that went to files so far.

    Raises
    ------
    InputError
        For a folder that is none or cannot be written to, and for a limit that is no number.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        limit: float | None = None,
        device: str = "cpu",
    ) -> None:
        self.root = Path(tempfile.gettempdir() if folder is None else folder)
        if not self.root.is_dir() or not os.access(self.root, os.W_OK | os.X_OK):
            raise InputError(
                complain(
                    f"spill_dir={str(self.root)!r}",
                    "a folder that can be written to",
                    "Make it, or name another one.",
                )
            )
        self._free = self.limit = _usual(device) if limit is None else check_limit(limit)
        self._folder: Path | None = None
        self.written = self._files = 0
        remove_leftovers(self.root)

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the files; what waited in them is lost."""
        folder, self._folder = self._folder, None
        self._free = self.limit
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, values: Any, alike: int = 1) -> Waiting:
        """Keep values until they are taken.

        Parameters
        ----------
        alike : int
            How many values of about this size there are, for the message where the disk is full.

        Raises
        ------
        InputError
            Where the disk is full; all files of this place are removed first.
        """
        leaves, spec = pytree.tree_flatten(values)
        places = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        tensors = [leaves[i] for i in places]
        nbytes = _bytes(tensors)
        if nbytes <= self._free:
            self._free -= nbytes
            return Waiting(values, nbytes)
        for i in places:
            leaves[i] = None
        return Waiting(None, nbytes, self._write(tensors, nbytes, alike), leaves, spec, places)

    def take(self, waiting: Waiting) -> Any:
        """The values, which no longer wait here."""
        if waiting.path is None:
            self._free += waiting.nbytes
            return waiting.values
        values = self._read(waiting)
        waiting.path.unlink()
        return values

    def peek(self, waiting: Waiting) -> Any:
        """The values, to be looked at only; they go on waiting."""
        return waiting.values if waiting.path is None else self._read(waiting)

    def copied(self, waiting: Waiting) -> Any:
        """A copy of the values, which go on waiting."""
        return copy.deepcopy(waiting.values) if waiting.path is None else self._read(waiting)

    def _write(self, tensors: list[Tensor], nbytes: int, alike: int) -> Path:
        def save(path: Path) -> None:
            with open(path, "wb") as file:
                torch.save(tensors, file)

        try:
            if self._folder is None:
                prefix = f"{PREFIX}.{_host()}.{os.getpid()}."
                self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.root))
            self._files += 1
            path = self._folder / f"{self._files}.pt"
            write_atomically(path, save)
            self.written += nbytes
        except OSError as error:
            self.close()
            free = shutil.disk_usage(self.root).free
            raise InputError(
                complain(
                    f"{error.strerror or error} in {self.root} ({free / 1e9:.2f} GB free), writing"
                    f" {nbytes} bytes of activations of one of {alike} batches",
                    f"room for about {nbytes * alike / 1e9:.2f} GB",
                    "Pass a spill_dir (--spill-dir) on a larger disk, raise memory_limit"
                    " (--memory-limit), or use less calibration data.",
                )
            ) from error
        return path

    def _read(self, waiting: Waiting) -> Any:
        leaves = list(waiting.leaves)
        # Strides, and storages that tensors share, come back as they were.
        for i, tensor in zip(
            waiting.places, torch.load(waiting.path, weights_only=True), strict=True
        ):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, waiting.spec)


def _usual(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] // SHARE
    return min(usual_limit(), MOST)


def check_limit(limit: float) -> float:
    """The limit, if it is a number of bytes; else InputError."""
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 0:
        raise InputError(
            complain(f"memory_limit={limit!r}", "a number of bytes >= 0", "2**30 is one GiB.")
        )
    return limit


def remove_leftovers(root: Path) -> None:
    """Remove the folders of processes of this host that no longer run."""
    for path in root.glob(f"{PREFIX}.*"):
        host, _, process = path.name.removeprefix(f"{PREFIX}.").rpartition(".")[0].rpartition(".")
        if host == _host() and process.isdecimal() and not _runs(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _host() -> str:
    return quote(platform.node(), safe="") or "host"


def _runs(process: int) -> bool:
    if os.name != "posix":  # elsewhere there is no asking without ending it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the storages of tensors, those that they share once."""
    storages = {}
    for tensor in tensors:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        else:
            storages[id(tensor)] = tensor.element_size() * tensor.numel()
    return sum(storages.values())
