"""What was done to each layer and what it gained: rows, totals, a table, JSON.

In: facts gathered while compressing. Out: a `Report`. "Keep 0.25" means that 25 % is left;
what was asked and what was achieved stand side by side.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


@dataclass
class LayerReport:
    """One layer.

    Attributes
    ----------
    name, type, shape : str
    status : str
        How the solver ended, or ``"dense"``.
    reason : str
        Why the layer was left dense; empty for compressed ones.
    structure : str
        Form with r, s and k.
    activation : str
        What the fit looked through.
    params, params_kept : int
        Stored numbers before and after, biases included; of single entries their values, without
        the indices.
    flops, flops_kept : int
        Of one sample, counted on the modules themselves; one multiply-add is two.
    error : float or None
        ``||Y - r(Z)||^2 / ||Y||^2`` after the activation on calibration rows never fitted.
    seconds : float
    notes : list of str
    deployed : str
        How an exported file computes it, where that was measured.
    """

    name: str
    type: str
    shape: str
    status: str
    reason: str = ""
    structure: str = ""
    activation: str = ""
    params: int = 0
    params_kept: int = 0
    flops: int = 0
    flops_kept: int = 0
    error: float | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    deployed: str = ""

    @property
    def compressed(self) -> bool:
        return not self.reason


@dataclass
class Report:
    """All layers and the totals of the model.

    Attributes
    ----------
    asked : dict of str to float
        Fractions to keep, ``params`` and ``flops``.
    params, params_kept, flops, flops_kept : int
        Of the whole model.
    seconds : float
        Wall time of the compression.
    layers : list of LayerReport
        In the order of execution.
    settings : dict
    latency : dict
        Seconds of the original and of the compressed model, their ratio and the predicted one,
        where a latency was asked.
    refinement : dict
        Losses on held-out samples before and after it, and whether it was kept; empty without one.
    """

    asked: dict[str, float]
    params: int
    params_kept: int
    flops: int
    flops_kept: int
    seconds: float
    layers: list[LayerReport]
    settings: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    refinement: dict[str, Any] = field(default_factory=dict)

    @property
    def skipped_flops(self) -> int:
        """FLOPs of all that is not compressed: layers left dense, and products of activations."""
        return self.flops - sum(layer.flops for layer in self.layers if layer.compressed)

    @property
    def achieved(self) -> dict[str, float]:
        return {
            "params": self.params_kept / max(self.params, 1),
            "flops": self.flops_kept / max(self.flops, 1),
        }

    def note_deployment(self, name: str, how: str) -> None:
        """Say how an exported file computes a layer."""
        for layer in self.layers:
            if layer.name == name:
                layer.deployed = how

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        value = asdict(self)
        value["achieved"] = self.achieved
        for layer in value["layers"]:
            if layer["error"] is not None and not math.isfinite(layer["error"]):
                layer["error"] = None
        return value

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Report:
        value = {name: item for name, item in value.items() if name != "achieved"}
        layers = [LayerReport(**layer) for layer in value.pop("layers")]
        return cls(layers=layers, **value)

    def table(self) -> Group:
        """A rich renderable: one line a layer, then the totals asked and achieved."""
        table = Table(header_style="bold", pad_edge=False, box=None)
        for title, justify in (
            ("layer", "left"),
            ("shape", "left"),
            ("form", "left"),
            ("params", "right"),
            ("FLOPs", "right"),
            ("error", "right"),
            ("status", "left"),
        ):
            table.add_column(title, justify=justify)
        for layer in self.layers:
            if layer.compressed:
                table.add_row(
                    layer.name,
                    layer.shape,
                    layer.structure,
                    _share(layer.params_kept, layer.params),
                    _share(layer.flops_kept, layer.flops),
                    "" if layer.error is None else f"{layer.error:.4f}",
                    "; ".join(filter(None, [layer.status, *layer.notes, layer.deployed])),
                )
            else:
                table.add_row(
                    layer.name,
                    layer.shape,
                    "dense",
                    "100.0 %",
                    "100.0 %",
                    "",
                    "; ".join([layer.reason, *layer.notes]),
                    style="dim",
                )
        lines = []
        for resource, unit in (("params", "parameters"), ("flops", "FLOPs")):
            before, after = getattr(self, resource), getattr(self, f"{resource}_kept")
            asked = self.asked.get(resource)
            asked_text = "not asked" if asked is None else f"asked {asked:.2%}"
            lines.append(
                f"{unit}: {_si(before)} -> {_si(after)}, kept {self.achieved[resource]:.2%}"
                f" ({asked_text})"
            )
        skipped = self.skipped_flops
        lines.append(
            f"FLOPs in what stays dense: {_si(skipped)}, {skipped / max(self.flops, 1):.2%}"
        )
        if self.latency:
            asked = self.asked.get("latency")
            lines.append(
                f"latency: {1e3 * self.latency['dense_s']:.3g} ms ->"
                f" {1e3 * self.latency['compressed_s']:.3g} ms, kept {self.latency['ratio']:.2%}"
                + ("" if asked is None else f" (asked {asked:.2%})")
            )
        if self.refinement:
            r = self.refinement
            at = f" at temperature {r['temperature']:g}" if r["loss"] == "kl" else ""
            lines.append(
                f"refined together: held-out {r['loss']}{at} {r['before']:.3g} -> {r['after']:.3g}"
                + ("" if r["kept"] else " (not better, dropped)")
            )
        lines.append(f"wall time: {self.seconds:.1f} s")
        return Group(table, Text("\n".join(["", *lines])))

    def print(self, console: Console | None = None) -> None:
        """Print the table."""
        (console or Console()).print(self.table())

    def __str__(self) -> str:
        console = Console(width=120, record=True, file=_Nowhere())
        console.print(self.table())
        return console.export_text()


class _Nowhere:
    """A stream that swallows what is written to it."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _share(after: int, before: int) -> str:
    return f"{after / before:.1%}".replace("%", " %") if before else ""


def _si(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f} {unit}"
    return f"{number:.0f}"
