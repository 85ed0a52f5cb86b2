"""How layers are sampled, fitted and chosen: everything that a plan says beside the budget.

In: arguments, or the JSON values of a plan. Out: `Settings`, checked.
"""

from __future__ import annotations

import numbers
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import InputError, complain
from .fit import check_objective, check_solver
from .layer_budget import BLOCK, check_form
from .problem import check_shares
from .solvers import SOLVERS, Majorize, Solver

_OVERRIDES = ("keep", "form")


@dataclass(frozen=True)
class Settings:
    """How layers are sampled, fitted and chosen; see `slr_gpu.compress` for each of them.

    Raises
    ------
    InputError, BudgetError
        For values that cannot be worked with.
    """

    form: str = "auto"
    solver: Solver = field(default_factory=Majorize)
    objective: str = "activation"
    asymmetric: bool = True
    samples: int = 15_000
    held_out: float = 0.1
    ridge: float | str = "auto"
    ignore: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    keep_ends: bool = True
    multiple: int = BLOCK
    batch_size: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_solver(self.solver)
        check_form(self.form, spatial=True, known=self.solver.forms)
        for name in ("samples", "batch_size", "multiple"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(complain(f"{name}={value!r}", "an integer >= 1", "Raise it."))
        check_objective(self.objective)
        check_shares(1.0 if self.ridge == "auto" else self.ridge, self.held_out)
        if not isinstance(self.seed, int) or self.seed < 0:
            raise InputError(complain(f"seed={self.seed!r}", "an integer >= 0", "Use another."))
        names = (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore)
        object.__setattr__(self, "ignore", names)
        for pattern, option in self.overrides.items():
            if not isinstance(option, dict) or set(option) - set(_OVERRIDES):
                raise InputError(
                    complain(
                        f"overrides[{pattern!r}]={option!r}",
                        f"a dict with {' or '.join(_OVERRIDES)}",
                        "For example {'keep': 0.5}.",
                    )
                )
            fraction = option.get("keep", 1.0)
            if not isinstance(fraction, numbers.Real) or not 0 < fraction <= 1:
                raise InputError(
                    complain(
                        f"overrides[{pattern!r}] keep={fraction!r}", "a fraction in (0, 1]", ""
                    )
                )
            check_form(option.get("form", "auto"), spatial=True, known=self.solver.forms)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["ignore"] = list(self.ignore)
        values["solver"] = {"name": self.solver.name, **asdict(self.solver)}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """What `as_dict` gave.

        Raises
        ------
        InputError
            For names or values that are none of these settings.
        """
        try:
            values = dict(values)
            solver = dict(values.pop("solver"))
            return cls(solver=SOLVERS[solver.pop("name")](**solver), **values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                complain(
                    f"settings that do not work: {type(error).__name__}: {error}",
                    "those that analyze wrote",
                    "Undo the change, or analyze again.",
                )
            ) from error
