"""Two ranks on two cores against one on one: the same fit of one layer, over gloo.

In: nothing; rows are drawn here, the same ones however many ranks share them. Out of `speed`: the
seconds of `slr_gpu.fit` on one rank and on two, in turn, one thread each, their ratio, the
objective and the held-out error of both, and the bytes that were all-reduced. Out of `paper`: what
follows for up to 64 ranks from the counts below and from stated rates, not measured. An iteration
is a sweep over all rows, 4 P n m operations shared by N ranks, an all-reduce of 8 (n m + n + 1)
bytes (and 8 for the held-out error), and what every rank does alike: two triangular solves with the
factor of the Gram matrix, 2 n m^2, and an eigendecomposition, about 9 n^3.

    python -m benchmarks.data_parallel speed --out data_parallel.json
    python -m benchmarks.data_parallel paper --out data_parallel_paper.json
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import slr_gpu
from slr_gpu.storage import load_json, save_json

app = typer.Typer(add_completion=False)

# Rows that are drawn from one seed, so that every rank draws its own and all are the same.
CHUNK = 500
RANKS = (1, 2, 4, 8, 16, 32, 64)


def rows(first: int, last: int, channels: int, taps: int = 9) -> np.ndarray:
    """Rows of a 3 x 3 convolution's inputs: rectified mixtures of smooth fields, and noise."""
    rng = np.random.default_rng(0)
    sources = max(8, channels // 4)
    mix = rng.standard_normal((sources, channels), dtype="f4")
    mix *= 0.97 ** np.arange(sources, dtype="f4")[:, None]
    place = np.stack(np.unravel_index(np.arange(taps), (3, 3)), 1)
    near = np.exp(-0.3 * ((place[:, None] - place[None]) ** 2).sum(2))
    smooth = np.linalg.cholesky(near).T.astype("f4")
    X = np.empty((last - first, channels * taps), "f4")
    for chunk in range(first // CHUNK, -(-last // CHUNK)):
        rng = np.random.default_rng([1, chunk])
        fields = rng.standard_normal((CHUNK, sources, taps), dtype="f4") @ smooth
        drawn = np.einsum("sc,pst->pct", mix, fields, optimize=True)
        drawn += 0.5 * rng.standard_normal(drawn.shape, dtype="f4")
        drawn = np.maximum(drawn, 0).reshape(CHUNK, -1)
        start = chunk * CHUNK
        low, high = max(first, start), min(last, start + CHUNK)
        X[low - first : high - first] = drawn[low - start : high - start]
    return X


def layer(group: slr_gpu.Group, n: int, channels: int, count: int) -> slr_gpu.LayerIO:
    """This rank's rows."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((n, channels, 3, 3), dtype="f4") / (9 * channels) ** 0.5
    bias = 0.1 * rng.standard_normal(n).astype("f4")
    share = group.share(count)
    return slr_gpu.LayerIO(weight, bias, rows(share.start, share.stop, channels), group=group)


@app.command()
def worker(n: int, channels: int, count: int, keep: float, form: str, out: Path) -> None:
    """What one rank does; torchrun calls it."""
    with slr_gpu.ranks(timeout_s=3600) as group:
        layer_io = layer(group, n, channels, count)
        group.objects(None)  # all have drawn their rows
        began = time.perf_counter()
        found = slr_gpu.fit(layer_io, keep=keep, form=form)
        seconds = time.perf_counter() - began
        if group.rank == 0:
            save_json(
                out,
                {
                    "seconds": seconds,
                    "structure": str(found.structure),
                    "objective": found.history[-1]["objective"],
                    "held_out_error": found.held_out_error,
                    "iterations": len(found.history),
                    "reduced_bytes": group.reduced,
                },
            )


def on_ranks(size: int, *arguments: Any) -> dict[str, Any]:
    """The record of one fit on so many ranks, of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "fit.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={size}", "-m", "benchmarks.data_parallel", "worker"]
        command += [*map(str, arguments), str(out)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return load_json(out)


@app.command()
def speed(
    n: Annotated[int, typer.Option(help="Outputs.")] = 256,
    channels: Annotated[int, typer.Option(help="Input channels, of 9 taps each.")] = 256,
    count: Annotated[int, typer.Option(help="Rows.")] = 200_000,
    keep: Annotated[float, typer.Option(help="Fraction of the weights.")] = 0.25,
    form: Annotated[str, typer.Option(help="See slr_gpu.fit.")] = "auto",
    ranks: Annotated[int, typer.Option(help="Compared with one.")] = 2,
    repeats: Annotated[int, typer.Option(help="Runs of each, in turn.")] = 3,
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("data_parallel.json"),
) -> None:
    """Time the fit on one rank and on several."""
    records: dict[int, list[dict[str, Any]]] = {1: [], ranks: []}
    for _ in range(repeats):
        for size, found in records.items():
            found.append(on_ranks(size, n, channels, count, keep, form))
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(*records.values(), strict=True)]
    save_json(
        out,
        {
            "n": n,
            "m": 9 * channels,
            "rows": count,
            "keep": keep,
            "form": form,
            "backend": "gloo",
            "threads_a_rank": 1,
            "cores": os.cpu_count(),
            "ratio": median(ratios),
            "ratios": ratios,
            "ranks": {str(size): found for size, found in records.items()},
        },
    )
    table = Table("ranks", "seconds", "objective", "held-out error", "structure", "all-reduced")
    for size, found in records.items():
        first = found[0]
        table.add_row(
            str(size),
            f"{median(record['seconds'] for record in found):.2f}",
            f"{first['objective']:.6g}",
            f"{first['held_out_error']:.6g}",
            f"{first['structure']}, {first['iterations']} iterations",
            f"{first['reduced_bytes'] / 1e6:.1f} MB",
        )
    Console().print(table, f"ratio {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


@dataclass(frozen=True)
class Machine:
    """What one rank has. Rates in operations and bytes a second."""

    name: str
    flops: float
    bandwidth: float
    latency_s: float


MACHINES = (
    Machine("CPU core, 60 GFLOP/s; 10 Gbit/s, 50 us", 6e10, 1.25e9, 5e-5),
    Machine("GPU, 30 TFLOP/s; 400 Gbit/s, 20 us", 3e13, 5e10, 2e-5),
)
LAYERS = ((64, 576, 200_000), (256, 2304, 200_000), (512, 4608, 200_000), (1024, 4096, 1_000_000))


def iteration_bytes(n: int, m: int) -> int:
    """All-reduced an iteration of `Majorize`: ``Rᵀ X``, the sum of R, the loss, held-out error."""
    return 8 * (n * m + n + 2)


def iteration(n: int, m: int, count: int, size: int, machine: Machine) -> dict[str, float]:
    """Seconds of one iteration on so many ranks, by parts; a ring all-reduce."""
    # Each byte leaves a rank 2 (N - 1) / N times; as many messages one after the other.
    sent = 2 * (size - 1) / size * iteration_bytes(n, m)
    steps = 2 * math.ceil(math.log2(size)) if size > 1 else 0
    parts = {
        "sweep_s": 4 * count * n * m / size / machine.flops,
        "alike_s": (2 * n * m**2 + 9 * n**3) / machine.flops,
        "reduce_s": sent / machine.bandwidth + steps * machine.latency_s,
    }
    return {**parts, "seconds": sum(parts.values()), "sent_bytes": sent}


def predictions() -> list[dict[str, Any]]:
    """A record for each machine, layer and number of ranks."""
    records = []
    for machine in MACHINES:
        for n, m, count in LAYERS:
            alone = iteration(n, m, count, 1, machine)["seconds"]
            for size in RANKS:
                parts = iteration(n, m, count, size, machine)
                records.append(
                    {
                        "machine": asdict(machine),
                        "n": n,
                        "m": m,
                        "rows": count,
                        "ranks": size,
                        "reduced_bytes": iteration_bytes(n, m) if size > 1 else 0,
                        "gram_bytes": 8 * (m * m + n * m) if size > 1 else 0,
                        **parts,
                        "speed_up": alone / parts["seconds"],
                    }
                )
    return records


@app.command()
def paper(
    out: Annotated[Path, typer.Option(help="JSON file.")] = Path("data_parallel_paper.json"),
) -> None:
    """Bytes all-reduced an iteration against compute, to 64 ranks, computed and not measured."""
    records = predictions()
    save_json(out, {"measured": False, "records": records})
    for machine in MACHINES:
        mine = [record for record in records if record["machine"] == asdict(machine)]
        columns = (
            "Gram, once",
            "an iteration",
            "on one rank",
            *(f"N={size}" for size in RANKS[1:]),
        )
        table = Table("n x m, rows", *columns)
        for n, m, count in LAYERS:
            found = [r for r in mine if (r["n"], r["m"], r["rows"]) == (n, m, count)]
            table.add_row(
                f"{n} x {m}, {count}",
                f"{found[-1]['gram_bytes'] / 1e6:.1f} MB",
                f"{found[-1]['reduced_bytes'] / 1e6:.2f} MB",
                f"{found[0]['seconds'] * 1e3:.3g} ms",
                *(f"{r['speed_up']:.1f}x" for r in found[1:]),
            )
        table.title = f"Computed, not measured. A rank: {machine.name}"
        Console(width=120).print(table)


if __name__ == "__main__":
    app()
