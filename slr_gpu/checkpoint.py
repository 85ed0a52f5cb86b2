"""Finished pieces of a long run, on disk, and what they belong to.

In: a folder and a fingerprint: facts about the program, the model, the data and the settings, the
large ones as SHA-256. Out: a `Store` of pieces by name. Every file is written under another name and renamed, so
a run that was killed leaves whole files only. A store is opened again by the same facts; others are
refused, and the message says which of them changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import nn

from .batches import Batch
from .decomposition import Decomposition
from .errors import InputError, complain
from .parallel import ALONE, Group
from .prepare import Prepared
from .program import program_version
from .storage import load_arrays, load_json, save_arrays, save_json

# What a store says that its pieces belong to.
FACTS = "fingerprint.json"
# The fact about the program.
PROGRAM = "slr_gpu"
_HASHED = ("model", "calibration data")


def fingerprint(prepared: Prepared) -> dict[str, Any]:
    """Facts that decide what a run computes, as JSON values.

    Bits also depend on the number of threads and the versions of libraries, which are not in it.
    """
    # By batches, so that each rank reads its own and the number of ranks does not matter.
    own = [_hash_of_batch(batch) for batch in prepared.batches]
    digests = [digest for digests in prepared.group.objects(own) for digest in digests]
    data = hashlib.sha256("".join(digests).encode()).hexdigest()
    return {PROGRAM: program_version(), "calibration data": data, **_work(prepared)}


def _work(prepared: Prepared) -> dict[str, Any]:
    """Facts about the model and the settings."""
    facts: dict[str, Any] = {
        "model": _hash_of_model(prepared.source),
        "device": prepared.ops.device.partition(":")[0],
    }
    for name, value in prepared.settings.as_dict().items():
        facts[f"settings.{name}"] = value
    return facts


def check_ranks(prepared: Prepared, facts: dict[str, Any]) -> None:
    """InputError for ranks with another model, other data or other settings."""
    prepared.group.check_same(
        lambda: {
            "calibration samples": prepared.sample_count,
            "first calibration samples": _hash_of_batch(prepared.batches.first),
            **_work(prepared),
            **facts,
        }
    )


def _hash_of_model(model: nn.Module) -> str:
    """Of the modules as they print, every weight and buffer, and what `forward` reads besides."""
    digest = hashlib.sha256(repr(model).encode())
    tensors = {**model.state_dict(), **dict(model.named_buffers())}
    _add(digest, {name: tensors[name] for name in sorted(tensors)})
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
        _add(digest, {name: {key: own[key] for key in sorted(own)}})
    return digest.hexdigest()


# Of a module in any mode, with any hooks.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _hash_of_batch(batch: Batch) -> str:
    digest = hashlib.sha256()
    _add(digest, [*batch, *getattr(batch, "names", ())])
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Tensors, numbers, texts, and lists, tuples and dicts of them; what else there is counts not."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
    elif value is None or isinstance(value, (bool, int, float, str)):
        digest.update(f"{type(value).__name__} {value!r};".encode())


class Store:
    """Pieces of a run in a folder.

    Parameters
    ----------
    folder : path
        Made when the first piece is written.
    group : Group
        Of the ranks, all of which ask for the same pieces; rank 0 alone reads and writes.
    """

    def __init__(self, folder: str | Path, group: Group = ALONE) -> None:
        self.folder, self.group = Path(folder), group

    @classmethod
    def open(
        cls, folder: str | Path, facts: dict[str, Any], *, resume: bool, group: Group = ALONE
    ) -> Store:
        """Begin in an empty folder, or go on in one of the same facts.

        Parameters
        ----------
        facts : dict
            See `fingerprint`.
        resume : bool
            False deletes what is there.

        Raises
        ------
        InputError
            When the folder belongs to other facts, and names what changed, or holds other things;
            nothing is deleted then.
        """
        store = cls(folder, group)
        group.first(lambda: store._begin(facts, resume))
        return store

    def _begin(self, facts: dict[str, Any], resume: bool) -> None:
        facts = as_stored(facts)
        if not resume:
            self.clear()
        path = self.folder / FACTS
        others = [] if path.exists() or not self.folder.is_dir() else self.folder.iterdir()
        # A run that was killed at once leaves the facts under another name.
        others = [other.name for other in others if not other.name.startswith(f".{FACTS}.")]
        if others:
            raise InputError(
                complain(
                    f"{self.folder}, which holds {others[0]!r} and is no checkpoint",
                    "a folder of its own, which is deleted in the end",
                    "Name another, or move what is in it.",
                )
            )
        if path.exists():
            changed = changes(load_json(path), facts)
            if changed:
                raise InputError(
                    complain(
                        f"a checkpoint in {self.folder} of another run: {'; '.join(changed)}",
                        "the same version, model, data and settings",
                        "Undo the changes, or start anew without resume.",
                    )
                )
        else:
            save_json(path, facts)

    @classmethod
    def named(cls, root: str | Path, facts: dict[str, Any], group: Group = ALONE) -> Store:
        """A folder under `root` for exactly these facts."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return cls.open(Path(root) / digest, facts, resume=True, group=group)

    def part(self, name: str) -> Store:
        """A store inside this one."""
        return Store(self.folder / name, self.group)

    @staticmethod
    def clear_named(root: str | Path) -> None:
        """Delete the stores under `root`, and `root` if nothing else is in it."""
        root = Path(root)
        for folder in [*root.iterdir()] if root.is_dir() else []:
            Store(folder).clear()
        if root.is_dir() and not any(root.iterdir()):
            root.rmdir()

    def clear(self) -> None:
        """Delete what is there, if it is a store."""
        if (self.folder / FACTS).exists():
            # The facts go last: a clearing that was cut short is one still.
            for path in self.folder.iterdir():
                if path.name != FACTS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            (self.folder / FACTS).unlink()
            self.folder.rmdir()

    def path(self, name: str, suffix: str) -> Path:
        """Where a piece is, or will be."""
        return self.folder / (quote(name, safe="") + suffix)

    def load_json(self, name: str) -> Any:
        """A piece, or None if it is not finished."""
        path = self.path(name, ".json")
        return self.group.first(lambda: load_json(path) if path.exists() else None)

    def save_json(self, name: str, value: Any) -> None:
        self.group.first(lambda: save_json(self.path(name, ".json"), value))

    def load_arrays(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
        """A piece made of arrays and its metadata, or None if it is not finished."""
        path = self.path(name, ".safetensors")
        return self.group.first(
            lambda: load_arrays(path, kind="checkpoint") if path.exists() else None
        )

    def save_arrays(
        self, name: str, arrays: dict[str, np.ndarray], metadata: dict[str, str]
    ) -> None:
        path = self.path(name, ".safetensors")
        self.group.first(lambda: save_arrays(path, arrays, kind="checkpoint", metadata=metadata))

    def decomposition(self, name: str, make: Callable[[], Decomposition]) -> Decomposition:
        """The piece of that name, made and written unless it is finished."""
        path = self.path(name, ".safetensors")
        found = self.group.first(lambda: Decomposition.load(path) if path.exists() else None)
        if found is None:
            found = make()
            self.group.first(lambda: found.save(path))
        return found


def as_stored(value: Any) -> Any:
    """A JSON value as it comes back from a file: tuples as lists."""
    return json.loads(json.dumps(value))


def changes(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs between facts, by name; only values that a reader can tell apart are shown."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now})
        prefix = f"{name}." if name else ""
        return [c for n in names for c in changes(before.get(n), now.get(n), prefix + n)]
    values = f"{name} was {before!r}, now {now!r}"
    return [values if len(values) <= 200 and name not in _HASHED else f"{name} differs"]
