"""Grouped convolutions: one fit a group, one module, one row of the report.

In: a convolution with ``groups = g`` and rows of all its input channels. Out: g `LayerIO`, because
group i computes ``Y_i = r(X_i W_iᵀ + b_i)`` from its own n/g outputs and c/g inputs; then a module
that runs the g decomposed parts side by side on slices of the channels and concatenates them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .decomposition import Decomposition
from .layer_io import LayerIO
from .layers import Decomposed, SLRConv1d, SLRConv2d, SLRConv3d

_PARTS = {1: SLRConv1d, 2: SLRConv2d, 3: SLRConv3d}


class SLRGroupedConv(Decomposed):
    """A grouped convolution whose groups are column-sparse plus low-rank each on its own.

    Parameters
    ----------
    dims : int
        Spatial dimensions.
    parts : list of dict
        The arguments of every group's `SLRConv1d`, `SLRConv2d` or `SLRConv3d`, all of which read
        equally many channels.
    """

    def __init__(self, dims: int, parts: list[dict[str, Any]]) -> None:
        super().__init__()
        self.dims = dims
        self.parts = nn.ModuleList(_PARTS[dims](**arguments) for arguments in parts)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        n, *rest = self.parts[0].dense_shape
        return (n * len(self.parts), *rest)

    def dense(self) -> Tensor:
        return torch.cat([part.dense() for part in self.parts])

    @property
    def bias(self) -> Tensor:
        return torch.cat([part.bias for part in self.parts])

    def forward(self, input: Tensor) -> Tensor:
        width = self.parts[0].in_channels
        outputs = [
            part(input.narrow(-self.dims - 1, i * width, width))
            for i, part in enumerate(self.parts)
        ]
        return torch.cat(outputs, -self.dims - 1)

    def plan(self) -> dict[str, Any]:
        """The arguments that rebuild this module (JSON)."""
        return {"dims": self.dims, "parts": [part.plan() for part in self.parts]}

    def assign(self, *decompositions: Decomposition) -> None:
        """Copy the factors in, one decomposition a group."""
        for part, decomposition in zip(self.parts, decompositions, strict=True):
            part.assign(decomposition)


def split(
    groups: int, weight: Any, bias: Any, inputs: Any, linear_targets: Any, **facts: Any
) -> list[LayerIO]:
    """One `LayerIO` a group.

    Parameters
    ----------
    groups : int
        1 for a layer that has none.
    weight : tensor, (n, c / groups, *kernel) or (n, m)
    bias : tensor, (n,), or None
    inputs, linear_targets : array, (P, m * groups) and (P, n)
        Rows of all channels.
    **facts
        What `LayerIO` takes besides.
    """
    n, m = len(weight) // groups, inputs.shape[1] // groups
    parts = []
    for group in range(groups):
        rows, columns = slice(group * n, (group + 1) * n), slice(group * m, (group + 1) * m)
        parts.append(
            LayerIO(
                weight[rows],
                None if bias is None else bias[rows],
                inputs[:, columns],
                linear_targets=linear_targets[:, rows],
                **facts,
            )
        )
    return parts


def summarise(decompositions: list[Decomposition], energies: list[float]) -> dict[str, Any]:
    """What the report says of a layer: ``status``, ``structure``, ``activation``, error and notes.

    The held-out error of several groups is their mean by the energy of their responses.
    """
    structures = Counter(str(d.structure) for d in decompositions)
    grouped = len(decompositions) > 1
    counted = [f"{count} x {name}" if grouped else name for name, count in structures.items()]
    error = decompositions[0].held_out_error
    if grouped:
        error = float(np.average([d.held_out_error for d in decompositions], weights=energies))
    return {
        "status": ", ".join(dict.fromkeys(d.status.value for d in decompositions)),
        "structure": ", ".join(counted),
        "activation": decompositions[0].activation,
        "error": error,
        "notes": list(dict.fromkeys(note for d in decompositions for note in d.notes)),
    }
