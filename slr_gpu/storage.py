"""Arrays and JSON on disk: safetensors, written under a temporary name and then renamed.

A file under its final name is therefore always whole. Each file says what kind it is.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .errors import InputError, complain


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call ``write(temporary_path)`` in the folder of `path`, then rename to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes private files; give the result the mode that open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(folder: str | Path) -> None:
    """Make a folder, and InputError where files cannot be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            complain(f"{folder}: {error}", "a folder to write to", "Choose another one.")
        ) from error


def save_arrays(
    path: str | Path, arrays: dict[str, np.ndarray], *, kind: str, metadata: dict[str, str]
) -> None:
    """Write named arrays and string metadata to one safetensors file, atomically."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"kind": f"slr_gpu {kind}", **metadata}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata))


def load_arrays(path: str | Path, *, kind: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read what `save_arrays` wrote; InputError when it is missing, cut short or another kind."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(
            complain(f"{path}: {error}", f"a whole slr_gpu {kind} file", "Write it again.")
        ) from error
    if metadata.get("kind") != f"slr_gpu {kind}":
        raise InputError(
            complain(
                f"{path}: kind {metadata.get('kind')!r}",
                f"an slr_gpu {kind} file",
                "Check the path.",
            )
        )
    return arrays, metadata


def save_json(path: str | Path, value: Any) -> None:
    """Write JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def load_json(path: str | Path) -> Any:
    """Read JSON; InputError when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            complain(f"{path}: {error}", "a JSON file written by slr_gpu", "Check the path.")
        ) from error
