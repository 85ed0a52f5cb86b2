"""The shared currency of the package: what a solver returns and a layer is rebuilt from.

A `Decomposition` stands for the weight ``M = (A + U V) E`` of one layer (DESIGN 2): A is a dense
block on the kept columns S, ``U (n, k)`` and ``V (k, m' - |S|)`` a low-rank part on the
complement of S, and E the input basis: the identity, or ``P ⊗ I_taps`` with ``P (r, c)``. A
`Structure` is its shape alone, from which costs follow.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .errors import InputError, complain

FORMS = ("columns", "channels", "rotated", "entries", "spatial")


def grouping(form: str, channels: int, kernel_size: tuple[int, ...]) -> tuple[int, int]:
    """Input channels, and the neighbouring columns that each owns, as a form counts them.

    ``spatial`` counts every pair of a channel and an index along the kernel's first axis as a
    channel that owns the other axes, kw columns of a (kh, kw) kernel. A basis of such channels is
    made of kh x 1 filters, and what follows it of 1 x kw ones.
    """
    if form == "spatial":
        channels, kernel_size = channels * kernel_size[0], kernel_size[1:]
    return channels, int(np.prod(kernel_size, dtype=int))


def is_separable(kernel_size: tuple[int, ...]) -> bool:
    """Whether a kernel has several taps along its first axis and along the others."""
    return len(kernel_size) > 1 and kernel_size[0] > 1 and max(kernel_size[1:]) > 1


class Status(enum.Enum):
    """How a solver ended. A value, never an exception."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    HELD_OUT_STOP = "held-out error stopped falling"
    CLOSED_FORM = "closed form"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Structure:
    """The shape of a decomposition.

    Attributes
    ----------
    form : {"columns", "channels", "rotated", "entries", "spatial"}
        What A keeps: single im2col columns, whole input channels, the first channels of a
        rotated input basis, or single entries anywhere (Yu et al. 2017). ``spatial`` is
        ``rotated`` by a basis that takes the kernel's first axis in (Zhang et al. 2015, 3-d).
    s : int
        Kept groups: columns, channels, rotated channels or entries.
    k : int
        Rank of U V.
    r : int or None
        Rows of the basis; None for the forms without one.
    """

    form: str
    s: int
    k: int
    r: int | None = None

    def cost(
        self,
        n: int,
        channels: int,
        taps: int,
        basis_weight: float = 1.0,
        full_kernel: bool = False,
    ) -> float:
        """Weights of the layer (biases aside), or multiply-adds per output position.

        `basis_weight` is 1 for parameters; for multiply-adds it is input positions over output
        positions, since the basis is applied before the kernel strides. `full_kernel` is for
        multiply-adds: a convolution computes V over whole kernels, zeros on S included.

        For ``spatial``, `channels` and `taps` are those of `grouping`.

        Single entries are counted as their papers do, ``s + k (n + m)``, without the indices that
        a file needs beside them. In multiply-adds they cost a whole dense layer, because stock
        runtimes skip no zeros.
        """
        if self.form == "entries":
            width = channels * taps
            sparse = n * width if full_kernel and self.s else self.s
            return sparse + self.k * (n + width)
        width, kept = channels * taps, self.s * (1 if self.form == "columns" else taps)
        basis = 0.0
        if self.r is not None:
            width, basis = self.r * taps, basis_weight * self.r * channels
        skipped = 0 if full_kernel and self.form == "columns" and taps > 1 else kept
        return basis + kept * n + self.k * (n + width - skipped)

    def __str__(self) -> str:
        if self.r is not None:
            return f"{self.form} r={self.r} s={self.s} k={self.k}"
        return f"{self.form} s={self.s} k={self.k}"


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A layer as column-sparse plus low-rank.

    Attributes
    ----------
    form : str
        See `Structure`.
    columns : int64 array, (|S|,)
        Kept columns, ascending, counted in the basis (m' = r * taps columns when there is one).
        For single entries: the columns that have any.
    A : array, (n, |S|)
        Dense block on the kept columns; for single entries it holds zeros between them.
    U, V : array, (n, k) and (k, m' - |S|)
        Low-rank part on the other columns; beside single entries (k, m), on all columns, because
        they cannot absorb what it does there.
    bias : array, (n,)
    channels, kernel_size : int, tuple of int
        Input channels c and spatial kernel; m = c * prod(kernel_size). ``()`` for linear layers.
    basis : array, (r, c), or None
        P, with orthonormal rows; (r, c * kh) for ``spatial``, see `grouping`.
    activation : str
        The activation that the fit looked through.
    error, held_out_error : float
        ``||Y - r(Z)||^2 / ||Y||^2`` on the fitted and on the held-out rows (NaN without those). The
        latter is always after the activation, the former where the objective is: before it for
        ``objective="linear"``.
    status : Status
    history : list of dict
        One entry an iteration: objective, residuals, rank, groups, seconds.
    notes : tuple of str
        What a reader of the report should know.
    """

    form: str
    columns: np.ndarray
    A: np.ndarray
    U: np.ndarray
    V: np.ndarray
    bias: np.ndarray
    channels: int
    kernel_size: tuple[int, ...] = ()
    basis: np.ndarray | None = None
    activation: str = "identity"
    error: float = float("nan")
    held_out_error: float = float("nan")
    status: Status = Status.CLOSED_FORM
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        width, kept = self.width, len(self.columns)
        rest = width if self.form == "entries" else width - kept
        n, k = self.U.shape
        for name, got, expected in (
            ("A", self.A.shape, (n, kept)),
            ("V", self.V.shape, (k, rest)),
            ("bias", self.bias.shape, (n,)),
        ):
            if got != expected:
                raise InputError(
                    complain(f"{name} of shape {got}", f"{expected}", "Check the factors.")
                )
        if kept and (
            np.any(np.diff(self.columns) <= 0) or self.columns[0] < 0 or self.columns[-1] >= width
        ):
            raise InputError(
                complain(
                    "columns out of order or range", f"ascending in [0, {width})", "Sort them."
                )
            )

    @property
    def taps(self) -> int:
        """Columns that a channel owns, as the form counts channels."""
        return grouping(self.form, self.channels, self.kernel_size)[1]

    @property
    def width(self) -> int:
        """Columns m' that A and V share between them."""
        return (self.channels if self.basis is None else len(self.basis)) * self.taps

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def complement(self) -> np.ndarray:
        """The columns that V reads, ascending."""
        mask = np.ones(self.width, dtype=bool)
        if self.form != "entries":
            mask[self.columns] = False
        return np.flatnonzero(mask)

    @property
    def structure(self) -> Structure:
        if self.form == "entries":
            return Structure(self.form, int(np.count_nonzero(self.A)), self.rank)
        group = 1 if self.form == "columns" else self.taps
        r = None if self.basis is None else len(self.basis)
        return Structure(self.form, len(self.columns) // group, self.rank, r)

    @property
    def parameters(self) -> int:
        """Stored numbers, the bias included (kept indices are not counted)."""
        basis = 0 if self.basis is None else self.basis.size
        kept = np.count_nonzero(self.A) if self.form == "entries" else self.A.size
        return int(kept) + self.U.size + self.V.size + self.bias.size + basis

    def to_dense(self) -> np.ndarray:
        """The weight (n, m) that this stands for, in the layer's own coordinates."""
        n = len(self.bias)
        M = np.zeros((n, self.width), dtype=self.A.dtype)
        M[:, self.complement] = self.U @ self.V
        M[:, self.columns] += self.A
        if self.basis is None:
            return M
        in_basis = M.reshape(n, len(self.basis), self.taps)
        return np.einsum("nrt,rc->nct", in_basis, self.basis, optimize=True).reshape(n, -1)

    def replace(self, **changes: Any) -> Decomposition:
        return replace(self, **changes)

    # -- on disk ---------------------------------------------------------------------------

    _ARRAYS = ("columns", "A", "U", "V", "bias", "basis")

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, atomically."""
        from .storage import save_arrays

        arrays = {name: getattr(self, name) for name in self._ARRAYS}
        facts = {
            "form": self.form,
            "channels": self.channels,
            "kernel_size": list(self.kernel_size),
            "activation": self.activation,
            "error": self.error,
            "held_out_error": self.held_out_error,
            "status": self.status.name,
            "history": self.history,
            "notes": list(self.notes),
        }
        save_arrays(
            path,
            {name: array for name, array in arrays.items() if array is not None},
            kind="decomposition",
            metadata={"facts": json.dumps(facts)},
        )

    @classmethod
    def load(cls, path: str | Path) -> Decomposition:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            When the file is missing, cut short or of another kind.
        """
        from .storage import load_arrays

        arrays, metadata = load_arrays(path, kind="decomposition")
        facts = json.loads(metadata["facts"])
        return cls(
            **{"basis": None, **arrays},
            form=facts["form"],
            channels=facts["channels"],
            kernel_size=tuple(facts["kernel_size"]),
            activation=facts["activation"],
            error=facts["error"],
            held_out_error=facts["held_out_error"],
            status=Status[facts["status"]],
            history=facts["history"],
            notes=tuple(facts["notes"]),
        )
