"""Options that several commands share, and the benchmarks with them.

In: nothing. Out: their types and help, for annotations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option(help="pkg.module:factory that makes the model.")]
Data = Annotated[
    str, typer.Option(help="calib.npy, calib.npz, a folder of .npy files or pkg.module:loader.")
]
Keep = Annotated[str, typer.Option(help="For example flops=0.25 or flops=0.25,params=0.5.")]
Out = Annotated[Path, typer.Option(help="Folder for the result.")]
Weights = Annotated[Path | None, typer.Option(help="safetensors file of its weights.")]
Form = Annotated[str, typer.Option(help="auto, or a form of the solver.")]
Solver = Annotated[str, typer.Option(help="majorize, or one of the rivals.")]
Objective = Annotated[str, typer.Option(help="activation or linear.")]
Allocation = Annotated[
    str | None, typer.Option(help="output, response, pca_energy or uniform.", show_default=False)
]
Loss = Annotated[str, typer.Option(help="How outputs are compared: auto, kl or mse.")]
Samples = Annotated[int, typer.Option(help="Input rows sampled a layer.")]
BatchSize = Annotated[int, typer.Option(help="Calibration inputs run at once.")]
Ignore = Annotated[list[str], typer.Option(help="Layers to leave dense.")]
KeepEnds = Annotated[bool, typer.Option(help="Leave the first and last layer dense.")]
Asymmetric = Annotated[bool, typer.Option(help="Fit on the compressed prefix's inputs.")]
Seed = Annotated[int, typer.Option(help="Of the choice of rows.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:<index> or auto.")]
SpillDir = Annotated[
    Path | None, typer.Option(help="Folder for activations that do not fit in memory.")
]
MemoryLimit = Annotated[
    str | None, typer.Option(help="Of data and waiting activations in memory, e.g. 2GiB.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a run was cut short.")]
Export = Annotated[
    list[str], typer.Option(help="Also write this .onnx or .pt2 file into the folder.")
]
Runtime = Annotated[
    str, typer.Option(help="Where exported layers are timed: auto, none or a runtime.")
]
Threads = Annotated[int, typer.Option(help="Of that runtime.")]
Picture = Annotated[Path | None, typer.Option(help="Draw the plan: .png, .svg or .pdf.")]
Refine = Annotated[bool, typer.Option("--refine", help="Then train all layers together.")]
RefineEpochs = Annotated[int | None, typer.Option(help="The same in so many passes over the data.")]
