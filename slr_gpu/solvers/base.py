"""What `fit` asks of a solver, and how a solver is added.

In: a `ResponseProblem`, a budget or a structure. Out: a `Candidate` to start from, then a
`Decomposition`. A solver is one file with one frozen dataclass of settings that extends `Solver`.
"""

from __future__ import annotations

import numbers
from typing import Any, ClassVar

from ..curves import Candidate, best_candidate, candidates
from ..decomposition import Decomposition, Structure
from ..errors import InputError, complain
from ..layer_budget import LayerBudget, check_form
from ..problem import ResponseProblem

Array = Any


def check_counts(settings: Any, **lowest: int) -> None:
    """InputError for settings that are no integers, or below what is the lowest for each."""
    for name, least in lowest.items():
        value = getattr(settings, name)
        if not isinstance(value, numbers.Integral) or value < least:
            raise InputError(
                complain(f"{name}={value!r}", f"an integer >= {least}", "The default is usual.")
            )


def check_tolerance(settings: Any) -> None:
    """InputError for a tolerance that is no number >= 0."""
    if not isinstance(settings.tolerance, numbers.Real) or not settings.tolerance >= 0:
        raise InputError(
            complain(f"tolerance={settings.tolerance!r}", "a number >= 0", "The default is usual.")
        )


class Solver:
    """A way to fit the two parts of a layer.

    Attributes
    ----------
    name : str
        In reports and on the command line.
    forms : tuple of str
        The forms that it can fit; the first is its ``"auto"`` unless `candidates` says otherwise.
    chooses_support : bool
        Whether it finds its own columns and needs none given.
    takes_structures : bool
        Whether it fits any structure (r, s, k) of its forms that it is given; False for solvers
        that have their own way to spend a budget.
    tunes_ridge : bool
        Whether ``ridge="auto"`` is decided on held-out rows, by the closed form.
    yields : bool
        Whether the truncated SVD of the weight may take its place where rows are few.
    """

    name: ClassVar[str]
    forms: ClassVar[tuple[str, ...]] = ("columns", "channels", "rotated")
    chooses_support: ClassVar[bool] = False
    takes_structures: ClassVar[bool] = True
    tunes_ridge: ClassVar[bool] = True
    yields: ClassVar[bool] = False

    def candidates(
        self, problem: ResponseProblem, budget: LayerBudget, form: str
    ) -> list[Candidate]:
        """Structures within a budget, best first; by default of the closed-form curves.

        Raises
        ------
        BudgetError
            When nothing fits.
        """
        return candidates(problem, budget, form=form)

    def choose(self, problem: ResponseProblem, budget: LayerBudget, form: str) -> Candidate:
        """The structure to solve for: of the candidates, the one that held-out rows prefer."""
        check_form(form, problem.taps > 1, self.forms, problem.layer_io.kernel_size)
        return best_candidate(self.candidates(problem, budget, form))

    def solve(
        self,
        problem: ResponseProblem,
        structure: Structure,
        support: Array | None = None,
    ) -> Decomposition:
        """Fit a structure.

        Parameters
        ----------
        problem : ResponseProblem
            In the coordinates of the basis for a form that has one.
        structure : Structure
        support : int array, optional
            Kept columns; not given to a solver that chooses them itself.
        """
        raise NotImplementedError
