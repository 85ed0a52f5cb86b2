"""A calibration set that does not fit in memory: peak memory and time beside the same in memory.

In: nothing; rows are views of one stored array at offsets that change from block to block, so that
making them costs nothing. Out: seconds of making the `LayerIO` (for blocks, the checking pass) and
of `slr_gpu.fit`, passes, the held-out error, and the peak resident memory of the process
(`resource.getrusage`), each run being a process of its own:

    python -m benchmarks.streaming run --gigabytes 50 --compare --out streaming.json

With ``--compare`` as many of the rows as fit are fitted from memory too, and from blocks once more
if these are fewer; the ratio of the two is of equal numbers of rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import slr_gpu
from slr_gpu.ops.memory import host_free
from slr_gpu.storage import save_json

from .store import machine, peak_gib

app = typer.Typer(add_completion=False)

# A fit from memory holds the rows, its own copy and that in an input basis.
COPIES = 3.2


class Rows:
    """Blocks of inputs and linear responses of a layer on correlated non-negative inputs.

    Parameters
    ----------
    rows : int
        In all.
    outputs, channels, taps : int
    block : int
        Rows a block.
    """

    def __init__(self, rows: int, outputs: int, channels: int, taps: int, block: int) -> None:
        rng = np.random.default_rng(0)
        self.rows, self.block = rows, min(block, rows)
        stored, sources = 2 * self.block, min(channels, 96 if taps > 1 else 512)
        mix = rng.standard_normal((sources, channels), dtype="f4")
        mix *= np.exp(-4 * np.arange(sources, dtype="f4") / sources)[:, None]
        kernel = np.exp(-0.4 * np.abs(np.subtract.outer(np.arange(taps), np.arange(taps))))
        smooth = np.linalg.cholesky(kernel).T.astype("f4")
        self.inputs = np.empty((stored, channels * taps), "f4")
        for start in range(0, stored, 256):
            part = self.inputs[start : start + 256]
            field = rng.standard_normal((len(part), sources, taps), dtype="f4") @ smooth
            window = mix.T @ field
            window += 0.3 * rng.standard_normal(window.shape, dtype="f4")
            np.maximum(window.reshape(len(part), -1), 0, out=part)
        side = (round(taps**0.5),) * 2 if taps > 1 else ()
        self.weight = rng.standard_normal((outputs, channels, *side), dtype="f4")
        self.weight /= (channels * taps) ** 0.5
        self.bias = rng.standard_normal(outputs, dtype="f4") / 4
        # Inputs of a compressed prefix: the responses are those of others near by.
        noise = 0.1 * rng.standard_normal((stored, outputs), dtype="f4")
        self.responses = self.inputs @ self.weight.reshape(outputs, -1).T + self.bias + noise

    def __iter__(self) -> Iterator[tuple[np.ndarray, None, np.ndarray]]:
        for number, start in enumerate(range(0, self.rows, self.block)):
            offset = 997 * number % self.block
            part = slice(offset, offset + min(self.block, self.rows - start))
            yield self.inputs[part], None, self.responses[part]

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """All inputs and responses."""
        inputs = np.empty((self.rows, self.inputs.shape[1]), "f4")
        responses = np.empty((self.rows, self.responses.shape[1]), "f4")
        start = 0
        for X, _, Z in self:
            inputs[start : start + len(X)], responses[start : start + len(X)] = X, Z
            start += len(X)
        return inputs, responses


@app.command()
def one(
    where: str,
    rows: int,
    outputs: int = 512,
    channels: int = 4608,
    taps: int = 1,
    block: int = 8192,
    keep: float = 0.25,
    form: str = "auto",
    own: bool = False,
) -> None:
    """Fit from ``blocks`` or from ``memory`` here, and print what it took as JSON."""
    source = Rows(rows, outputs, channels, taps, block)
    weight, bias = source.weight, source.bias
    if where == "memory":
        inputs, responses = source.whole()
        del source
        began = time.perf_counter()
        layer_io = slr_gpu.LayerIO(weight, bias, inputs, linear_targets=None if own else responses)
    else:
        began = time.perf_counter()
        blocks = (lambda: (X for X, _, _ in source)) if own else source
        layer_io = slr_gpu.LayerIO.from_blocks(weight, bias, blocks)
    made, cpu = time.perf_counter(), time.process_time()
    fitted = slr_gpu.fit(layer_io, keep=keep, form=form)
    done = time.perf_counter()
    entry = {
        "from": where,
        "rows": rows,
        "gigabytes": 4e-9 * rows * channels * taps,
        "n": outputs,
        "m": channels * taps,
        "block_rows": block,
        "responses": "own" if own else "given",
        "keep": keep,
        "form": form,
        "structure": str(fitted.structure),
        "iterations": len(fitted.history),
        "passes": layer_io.blocks.passes if layer_io.blocks else None,
        "layer_io_seconds": made - began,
        "fit_seconds": done - made,
        "fit_cpu_seconds": time.process_time() - cpu,
        "seconds": done - began,
        "peak_gib": peak_gib(),
        "held_out_error": fitted.held_out_error,
        "notes": list(fitted.notes),
        "cores": os.cpu_count(),
        **machine(),
    }
    print(json.dumps(entry))


@app.command()
def run(
    gigabytes: Annotated[float | None, typer.Option(help="Size of the inputs.")] = None,
    rows: Annotated[int | None, typer.Option(help="Instead of the size.")] = None,
    compare: Annotated[bool, typer.Option(help="Also from memory, as many rows as fit.")] = False,
    outputs: int = 512,
    channels: int = 4608,
    taps: Annotated[int, typer.Option(help="1 for a linear layer, 9 for a 3x3 kernel.")] = 1,
    block: Annotated[int, typer.Option(help="Rows a block.")] = 8192,
    keep: float = 0.25,
    form: str = "auto",
    own: Annotated[bool, typer.Option(help="Blocks bring no responses.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Fit a layer from blocks, and if wanted from memory."""
    bytes_a_row = 4 * channels * taps
    if rows is None:
        rows = int((1.0 if gigabytes is None else gigabytes) * 1e9 / bytes_a_row)
    settings = [f"--{name}={value}" for name, value in (
        ("outputs", outputs), ("channels", channels), ("taps", taps), ("block", block),
        ("keep", keep), ("form", form),
    )]  # fmt: skip
    settings += ["--own"] if own else []
    report: dict[str, object] = {"runs": []}

    def measure(where: str, count: int) -> dict[str, object]:
        command = [sys.executable, "-m", "benchmarks.streaming", "one", where, str(count)]
        done = subprocess.run([*command, *settings], stdout=subprocess.PIPE, text=True, check=True)
        entry = json.loads(done.stdout)
        report["runs"].append(entry)
        print(
            f"{entry['from']}: {entry['rows']} rows ({entry['gigabytes']:.2f} GB),"
            f" {entry['seconds']:.1f} s ({entry['layer_io_seconds']:.1f} + "
            f"{entry['fit_seconds']:.1f}), peak {entry['peak_gib']:.2f} GiB,"
            f" passes {entry['passes']}, iterations {entry['iterations']},"
            f" held-out error {entry['held_out_error']:.5f}, {entry['structure']}",
            flush=True,
        )
        if out is not None:
            save_json(out, report)
        return entry

    streamed = measure("blocks", rows)
    if compare:
        free = host_free()
        fitting = rows
        if free is not None:
            fitting = min(rows, int(free / COPIES / (bytes_a_row + 8 * outputs)))
        if fitting < rows:
            streamed = measure("blocks", fitting)
        resident = measure("memory", fitting)
        report["time_ratio"] = streamed["seconds"] / resident["seconds"]
        report["fit_time_ratio"] = streamed["fit_seconds"] / resident["fit_seconds"]
        print(
            f"time from blocks / from memory, {fitting} rows: {report['time_ratio']:.3f}"
            f" (fit alone {report['fit_time_ratio']:.3f})"
        )
    if out is not None:
        save_json(out, report)


if __name__ == "__main__":
    app()
