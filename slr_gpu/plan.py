"""What is to be done to each layer: a table, an editable JSON file, a picture.

In: what `Analysis.allocate` decided, or a file. Out: a `Plan`, which `apply` carries out. A layer
has a structure (form, r, s, k), or limits within which its solver chooses one, or stays dense:

    {"name": "features.3", "form": "rotated", "r": 16, "s": 11, "k": 17}
    {"name": "features.7", "form": "auto", "limits": {"flops": 18432.0}}
    {"name": "features.10", "form": "dense"}

The file's schema has a number and is checked on load; everything else a layer says is for readers.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .budget import RESOURCES, LayerCost
from .decomposition import FORMS, Structure
from .errors import BudgetError, InputError, complain
from .layer_budget import check_form
from .storage import load_json, save_json

PLAN_SCHEMA = 2
# Forms with a basis, and what counts as one kept group of the others.
_WITH_BASIS = ("rotated", "spatial")


@dataclass(frozen=True)
class LayerPlan:
    """What is to be done to one layer.

    Attributes
    ----------
    name : str
    form : str
        ``"dense"``, a form of `Structure`, or with `limits` also ``"auto"``.
    r, s, k : int or None
        The structure; see `Structure`.
    limits : dict of str to float, or None
        Instead of a structure: weights, by resource, that it may cost (`LayerCost.limit`).
    error, loss : float or None
        Predicted: the error of the layer's response, and what it does to the model's output.
    share : dict of str to float
        Predicted cost as a share of the dense layer's, by resource.
    """

    name: str
    form: str
    r: int | None = None
    s: int | None = None
    k: int | None = None
    limits: dict[str, float] | None = None
    error: float | None = None
    loss: float | None = None
    share: dict[str, float] = field(default_factory=dict)

    @property
    def structure(self) -> Structure | None:
        """None for a dense layer and for one with limits."""
        if self.form == "dense" or self.limits is not None:
            return None
        return Structure(self.form, self.s, self.k, self.r)

    def __str__(self) -> str:
        if self.limits is not None:
            limits = ", ".join(f"{name} <= {value:.0f}" for name, value in self.limits.items())
            return f"{self.form} within {limits}"
        return "dense" if self.form == "dense" else str(self.structure)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, without those that are not set."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value not in (None, {})}

    @classmethod
    def from_dict(cls, value: Any, where: str) -> LayerPlan:
        """Check and read one entry of a file; unknown keys are another version's or typing errors.

        Raises
        ------
        InputError
        """
        known = set(cls.__dataclass_fields__) | set(BUILT)
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise InputError(complain(f"{where}: a layer {value!r}", "an object with a name", ""))
        where = f"{where}: layer {value['name']!r}"
        if set(value) - known:
            raise InputError(
                complain(
                    f"{where} with {', '.join(sorted(set(value) - known))}",
                    f"only {', '.join(sorted(known))}",
                    "Check the spelling.",
                )
            )
        form, limits = value.get("form"), value.get("limits")
        if form not in (*FORMS, "dense", *(["auto"] if limits else [])):
            raise InputError(
                complain(
                    f"{where} with form={form!r}",
                    f"dense, {', '.join(FORMS)}, or auto with limits",
                    "Check the form.",
                )
            )
        if limits is not None:
            _check_limits(limits, where)
        elif form != "dense":
            wanted = ("r", "s", "k") if form in _WITH_BASIS else ("s", "k")
            for name in wanted:
                size = value.get(name)
                if not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 0:
                    raise InputError(
                        complain(f"{where} with {name}={size!r}", "an integer >= 0", f"Set {name}.")
                    )
            if value["s"] == value["k"] == 0:
                raise InputError(
                    complain(f"{where} with s=0 and k=0", "a part that is not empty", "Raise k.")
                )
        return cls(**{name: value[name] for name in cls.__dataclass_fields__ if name in value})

    def check(self, cost: LayerCost, forms: tuple[str, ...]) -> None:
        """InputError or BudgetError unless the layer can take this on.

        Parameters
        ----------
        cost : LayerCost
            The shape of the layer.
        forms : tuple of str
            Those of the solver.
        """
        if self.form == "dense":
            return
        check_form(self.form, cost.taps > 1, forms, cost.kernel_size)
        if self.limits is not None:
            if not cost.budget(self.limits).allows(self.form):
                raise BudgetError(
                    complain(
                        f"layer {self.name!r} with limits={self.limits}, form={self.form!r}",
                        "at least what the smallest structure costs",
                        "Raise them.",
                    )
                )
            return
        channels, taps = cost.budget({}).shape(self.form)
        r = channels if self.r is None else self.r
        most_s = {"columns": channels * taps, "entries": cost.weights // cost.groups}.get(
            self.form, r
        )
        group = {"columns": 1, "entries": 0}.get(self.form, taps)
        most = {"r": channels, "s": most_s, "k": min(cost.n, r * taps - self.s * group)}
        for name, limit in most.items():
            size = getattr(self, name)
            lowest = 1 if name == "r" else 0
            if size is not None and not lowest <= size <= limit:
                raise InputError(
                    complain(
                        f"layer {self.name!r} with {name}={size}",
                        f"an integer in [{lowest}, {limit}]",
                        "Edit the plan.",
                    )
                )
        if (self.form in _WITH_BASIS) != (self.r is not None):
            raise InputError(
                complain(
                    f"layer {self.name!r} with form={self.form!r}, r={self.r}",
                    "r with rotated and spatial only",
                    "Edit the plan.",
                )
            )


# What a finished compression adds to the layers of its plan: how to rebuild the modules.
BUILT = ("type", "arguments", "activation")


def _check_limits(limits: Any, where: str) -> None:
    good = (
        isinstance(limits, dict)
        and limits
        and all(
            name in RESOURCES and isinstance(value, numbers.Real) and value > 0
            for name, value in limits.items()
        )
    )
    if not good:
        raise InputError(
            complain(
                f"{where} with limits={limits!r}",
                f"positive numbers by resource ({', '.join(RESOURCES)})",
                "Check the limits.",
            )
        )


@dataclass
class Plan:
    """What is to be done to each layer of a model.

    Attributes
    ----------
    keep : dict of str to float
        What was asked.
    allocation : str
    settings : dict
        Of the analysis, JSON values; `apply` uses the same.
    layers : list of LayerPlan
        All that may be compressed, in the order of execution.
    achieved : dict of str to float
        Predicted fractions of the whole model.
    """

    keep: dict[str, float]
    allocation: str
    settings: dict[str, Any]
    layers: list[LayerPlan]
    achieved: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": PLAN_SCHEMA,
            "keep": self.keep,
            "allocation": self.allocation,
            "achieved": self.achieved,
            "layers": [layer.as_dict() for layer in self.layers],
            "settings": self.settings,
        }

    @classmethod
    def from_dict(cls, value: Any, where: str = "plan") -> Plan:
        """What `as_dict` gave, checked; also the ``plan.json`` of a compressed model.

        Raises
        ------
        InputError
        """
        check_schema(value, where)
        for name, kind in (("keep", dict), ("settings", dict), ("layers", list)):
            if not isinstance(value.get(name), kind):
                raise InputError(
                    complain(f"{where} with {name}={value.get(name)!r}", f"a {kind.__name__}", "")
                )
        layers = [LayerPlan.from_dict(layer, where) for layer in value["layers"]]
        names = [layer.name for layer in layers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                complain(f"{where} with {', '.join(twice)} twice", "every layer once", "Edit it.")
            )
        return cls(
            value["keep"],
            str(value.get("allocation", "")),
            value["settings"],
            layers,
            dict(value.get("achieved", {})),
        )

    def save(self, path: str | Path) -> None:
        """Write JSON, atomically."""
        save_json(path, self.as_dict())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read and check what `save` wrote, perhaps edited since.

        Raises
        ------
        InputError
            When it is missing, broken, of another schema or says what cannot be.
        """
        return cls.from_dict(load_json(path), str(path))

    def plot(self, path: str | Path) -> None:
        """Draw the shares and the predicted losses of the layers (extra ``plot``).

        Parameters
        ----------
        path : path
            ``.png``, ``.svg`` or ``.pdf``.
        """
        from .plan_plot import plot_plan

        plot_plan(self, path)

    def table(self) -> Group:
        """A rich renderable."""
        table = Table(header_style="bold", pad_edge=False, box=None)
        resources = [name for name in RESOURCES if any(name in x.share for x in self.layers)]
        table.add_column("layer")
        table.add_column("form")
        for title in (*resources, "error", "loss"):
            table.add_column(title, justify="right")
        for layer in self.layers:
            table.add_row(
                layer.name,
                str(layer),
                *(f"{layer.share[name]:.1%}" if name in layer.share else "" for name in resources),
                "" if layer.error is None else f"{layer.error:.4f}",
                "" if layer.loss is None else f"{layer.loss:.2g}",
            )
        asked = [f"{name} asked {fraction:.2%}" for name, fraction in self.keep.items()]
        kept = [f"{name} {fraction:.2%}" for name, fraction in self.achieved.items()]
        lines = [f"allocation: {self.allocation}; {', '.join(asked)}"]
        if kept:
            lines.append(f"predicted of the whole model: {', '.join(kept)}")
        return Group(table, Text("\n".join(["", *lines])))

    def print(self, console: Console | None = None) -> None:
        """Print the table."""
        (console or Console()).print(self.table())


def check_schema(value: Any, where: str) -> None:
    """InputError unless a plan's JSON is of this version's schema."""
    if not isinstance(value, dict) or value.get("schema") != PLAN_SCHEMA:
        raise InputError(
            complain(
                f"{where} with another schema",
                f"schema {PLAN_SCHEMA}",
                "Analyze or compress again with this version of slr_gpu.",
            )
        )
