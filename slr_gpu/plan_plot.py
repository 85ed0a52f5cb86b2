"""The picture of a plan: what each layer keeps, and what that is predicted to do.

In: a `Plan`. Out: a PNG, SVG or PDF.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import BackendError, InputError, complain
from .storage import write_atomically

if TYPE_CHECKING:
    from .plan import Plan

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: str | Path) -> None:
    """InputError for another kind of file, BackendError without matplotlib."""
    if Path(path).suffix not in FORMATS:
        raise InputError(complain(f"{path}", f"a name that ends in {', '.join(FORMATS)}", ""))
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise BackendError(
            complain("no matplotlib", "matplotlib for plots", "pip install 'slr_gpu[plot]'")
        ) from error


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Draw shares kept by layer and, where predicted, losses by layer.

    Raises
    ------
    InputError
        For another kind of file.
    BackendError
        Without matplotlib.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    path = Path(path)
    layers = plan.layers
    resources = list(dict.fromkeys(name for layer in layers for name in layer.share))
    predicted = any(layer.loss for layer in layers)
    panels = 2 if predicted else 1
    figure = Figure(figsize=(5 * panels, 1.2 + 0.28 * len(layers)), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    rows = np.arange(len(layers))
    height = 0.8 / max(len(resources), 1)
    for number, name in enumerate(resources):
        shares = [100 * layer.share.get(name, 0.0) for layer in layers]
        place = rows + (number - (len(resources) - 1) / 2) * height
        axes[0].barh(place, shares, 0.95 * height, label=name)
    for row, layer in zip(rows, layers, strict=True):
        most = max(layer.share.values(), default=0.0)
        axes[0].annotate(
            str(layer), (100 * most, row), (3, 0), textcoords="offset points", va="center", size=7
        )
    axes[0].set_yticks(rows, [layer.name for layer in layers])
    axes[0].invert_yaxis()
    axes[0].margins(x=0.4)
    axes[0].set_xlabel("kept of the dense layer, %")
    if resources:
        axes[0].legend(frameon=False)
    if predicted:
        axes[1].barh(rows, [layer.loss or 0.0 for layer in layers], 0.6, color="tab:red")
        axes[1].set_xlabel("predicted loss of the output, this layer alone")
    asked = ", ".join(f"{name} {fraction:.1%}" for name, fraction in plan.keep.items())
    figure.suptitle(f"{plan.allocation}: {asked}", size=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    kind = path.suffix[1:]
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=150))
