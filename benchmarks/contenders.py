"""The systems that are compared on equal terms, in one table.

In: the arrays of one layer and the fraction of its weights to keep. Out: a `Decomposition` of each
contender, all through `slr_gpu.fit`: the same rows, the same held-out rows, the same budget. A
contender is added by adding a line to `CONTENDERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import slr_gpu
from slr_gpu.errors import InputError, complain

REFERENCE = "Majorize, auto"


@dataclass(frozen=True)
class Contender:
    """One system.

    Attributes
    ----------
    label : str
        Names it in tables, plots and stored results.
    make : callable
        Its solver, with the defaults a user gets.
    form : str
        See `slr_gpu.fit`.
    spatial : bool
        Whether it needs a kernel of more than one tap.
    low_rank_only : bool
        U V alone, with the largest rank that the budget allows.
    slow : bool
        Run after all others, so that a run cut short has these in full.
    against_greedy : bool
        It finds a support of its own, which is compared with the greedy one of the same size.
    objective : {"activation", "linear"}
    """

    label: str
    make: Callable[[], Any]
    form: str
    spatial: bool = False
    low_rank_only: bool = False
    slow: bool = False
    against_greedy: bool = False
    objective: str = "activation"

    def solver(self, quick: bool = False) -> Any:
        """The solver; with at most 5 iterations for a quick trial."""
        solver = self.make()
        iterations = getattr(solver, "iterations", None)
        if quick and isinstance(iterations, int):
            solver = dataclasses.replace(solver, iterations=min(5, iterations))
        return solver

    def applies(self, taps: int) -> bool:
        return taps > 1 or not self.spatial

    def fit(
        self, layer_io: slr_gpu.LayerIO, keep: float, quick: bool = False
    ) -> slr_gpu.Decomposition:
        """Decompose a layer within ``keep`` of its weights."""
        settings = {"solver": self.solver(quick), "objective": self.objective}
        if not self.low_rank_only:
            return slr_gpu.fit(layer_io, keep=keep, form=self.form, **settings)
        n, m = layer_io.weight.shape
        rank = min(int(keep * n * m / (n + m)), n)
        return slr_gpu.fit(layer_io, columns=0, rank=rank, **settings)


CONTENDERS: tuple[Contender, ...] = (
    Contender(REFERENCE, lambda: slr_gpu.Majorize(), "auto"),
    Contender("Majorize, columns", lambda: slr_gpu.Majorize(), "columns"),
    Contender("Majorize, channels", lambda: slr_gpu.Majorize(), "channels"),
    Contender("Majorize, U V alone", lambda: slr_gpu.Majorize(), "columns", low_rank_only=True),
    Contender("Zhang", lambda: slr_gpu.Zhang(), "columns"),
    Contender("Zhang, spatial", lambda: slr_gpu.Zhang(), "spatial", spatial=True),
    Contender("GreBsmo", lambda: slr_gpu.Grebsmo(), "entries"),
    Contender("GreBsmo, values alone", lambda: slr_gpu.Grebsmo(indices=False), "entries"),
    Contender("GreBsmo, pruning", lambda: slr_gpu.Grebsmo(rank=0), "entries"),
    Contender("Magnitude", lambda: slr_gpu.Magnitude(), "columns"),
    Contender("WeightSVD", lambda: slr_gpu.WeightSVD(), "columns"),
    Contender("WhitenedSVD", lambda: slr_gpu.WhitenedSVD(), "columns"),
    Contender("ChannelPruning", lambda: slr_gpu.ChannelPruning(), "channels"),
    Contender("ADMM, columns", lambda: slr_gpu.ADMM(), "columns", slow=True, against_greedy=True),
    Contender("ADMM, channels", lambda: slr_gpu.ADMM(), "channels", slow=True, against_greedy=True),
)

# Not at equal cost: the places of the entries are not counted.
UNCOUNTED = frozenset({"GreBsmo, values alone"})


def find(labels: Sequence[str] | None = None) -> list[Contender]:
    """Contenders by label, in the order of the table; all of them by default.

    Raises
    ------
    InputError
        For a label that is not in the table.
    """
    known = {contender.label: contender for contender in CONTENDERS}
    missing = [label for label in labels or () if label not in known]
    if missing:
        raise InputError(
            complain(
                f"contender {missing[0]!r}",
                f"one of {'; '.join(known)}",
                "Copy one of these, quotes around it.",
            )
        )
    return [contender for label, contender in known.items() if not labels or label in labels]
