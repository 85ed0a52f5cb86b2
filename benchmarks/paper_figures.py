"""Figures 2, 3 and 4 of Ma et al. 2018 (arXiv 1807.10119) on our network.

In: the VGG-16 and the data. Out: accuracy on the test images against the number of layers
approximated, with symmetric and asymmetric inputs (figure 2); the accuracy drop against the
fraction of one layer's weights that is kept, for linear and after-activation reconstruction, with
A + B and with B alone (figure 3); pictures of A, U and V (figure 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import slr_gpu
from benchmarks.contenders import Contender
from benchmarks.store import Store, key, progress
from benchmarks.vgg_layers import VGG, prefix_branches, single_branch
from slr_gpu.adapters import adapter_for
from slr_gpu.errors import SLRError

# -- figure 2 ------------------------------------------------------------------------------------


def prefixes(
    vgg: VGG, store: Store, contender: Contender, keeps: Sequence[float]
) -> list[dict[str, Any]]:
    """Figures of merit with the first j layers compressed, one record a budget and mode.

    One compression a record: the network with its first j layers compressed is that of all
    layers, continued by the original after layer j.
    """
    original = vgg.chain(vgg.original)
    positions = [vgg.position(label) for label in vgg.layers]
    records = []
    with progress("figure 2", 2 * len(keeps)) as done:
        for keep in keeps:
            for asymmetric in (False, True):
                mode = "asymmetric" if asymmetric else "symmetric"
                budget = {"params": keep, "flops": keep}
                settings = (budget, contender, asymmetric)

                def measure(settings=settings, keep=keep, mode=mode) -> dict[str, Any]:
                    model, report = vgg.compressed(*settings)
                    trunk = vgg.chain(model)
                    found = vgg.compare_branches(trunk, prefix_branches(trunk, original, positions))
                    steps = [found[str(j)] for j in range(len(positions) + 1)]
                    return {
                        "contender": contender.label,
                        "keep": keep,
                        "mode": mode,
                        "achieved": report.achieved,
                        "seconds": report.seconds,
                        "test_images": len(vgg.test[1]),
                        "accuracy": [step.accuracy for step in steps],
                        "agreement": [step.agreement for step in steps],
                        "kl": [step.kl for step in steps],
                    }

                mark = vgg.fingerprint(
                    keep=budget,
                    solver=contender.solver(vgg.setting.quick),
                    form=contender.form,
                    asymmetric=asymmetric,
                    test_images=vgg.setting.test_images,
                )
                record = store.get_or_make(key(contender.label, keep, mode), mark, measure)
                records.append(record)
                done(f"{keep:g} {mode}: accuracy {record['accuracy'][-1]:.4f}")
    return records


def report_prefixes(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Accuracy by the number of layers, one column a record."""
    table = Table(title=f"{records[0]['contender']}: accuracy with the first j layers compressed")
    table.add_column("j", justify="right")
    for record in records:
        table.add_column(f"{record['keep']:.0%}, {record['mode']}", justify="right")
    for j in range(len(records[0]["accuracy"])):
        table.add_row(str(j), *(f"{record['accuracy'][j]:.4f}" for record in records))
    table.add_section()
    table.add_row("KL", *(f"{record['kl'][-1]:.5f}" for record in records))
    console.print(table)


def plot_prefixes(records: Sequence[dict[str, Any]], layers: Iterable[str], path: Path) -> None:
    """Accuracy against j."""
    figure, panel = _panel((9, 5))
    names = ["none", *layers]
    keeps = list(dict.fromkeys(record["keep"] for record in records))
    for record in records:
        asymmetric = record["mode"] == "asymmetric"
        panel.plot(
            names,
            [100 * value for value in record["accuracy"]],
            "o-" if asymmetric else "s--",
            color=f"C{keeps.index(record['keep'])}",
            label=f"{record['keep']:.0%} kept, {record['mode']}",
        )
    panel.set_xlabel("last layer approximated, all before it approximated too")
    panel.set_ylabel("test accuracy (%)")
    panel.tick_params(axis="x", rotation=60)
    _finish(figure, panel, path)


# -- figure 3 ------------------------------------------------------------------------------------

VARIANTS = tuple(
    (objective, parts) for objective in ("linear", "activation") for parts in ("A+B", "B")
)


def responses(
    vgg: VGG, store: Store, contender: Contender, labels: Sequence[str], keeps: Sequence[float]
) -> list[dict[str, Any]]:
    """Accuracy drops with one layer compressed, four variants a layer and budget."""
    solver = contender.solver(vgg.setting.quick)
    original = vgg.chain(vgg.original)
    records = []
    with progress("figure 3", len(labels) * len(keeps)) as done:
        for label in labels:
            position, layer_io = vgg.position(label), None
            for keep in keeps:
                name = key(contender.label, label, keep)
                mark = vgg.fingerprint(
                    solver=solver, form=contender.form, test_images=vgg.setting.test_images
                )
                record = store.get(name, mark)
                if record is None:
                    layer_io = layer_io or vgg.layer_io(label)
                    fits = {
                        key(*variant): _fit(contender, solver, layer_io, keep, *variant)
                        for variant in VARIANTS
                    }
                    adapter = adapter_for(original[position])
                    branches = {
                        variant: single_branch(
                            original, position, adapter.build(original[position], fitted)
                        )
                        for variant, fitted in fits.items()
                        if fitted is not None
                    }
                    found = vgg.compare_branches(original, branches) if branches else {}
                    record = store.put(
                        name,
                        mark,
                        {
                            "layer": label,
                            "keep": keep,
                            "contender": contender.label,
                            "test_images": len(vgg.test[1]),
                            "variants": {
                                variant: {
                                    "drop": vgg.drop(comparison),
                                    "kl": comparison.kl,
                                    "error": fits[variant].held_out_error,
                                    "structure": str(fits[variant].structure),
                                }
                                for variant, comparison in found.items()
                            },
                        },
                    )
                records.append(record)
                drops = [f"{v} {m['drop']:.2f}" for v, m in record["variants"].items()]
                done(f"{name}: drop {', '.join(drops)}")
    return records


def _fit(
    contender: Contender,
    solver: Any,
    layer_io: slr_gpu.LayerIO,
    keep: float,
    objective: str,
    parts: str,
) -> slr_gpu.Decomposition | None:
    """One variant; None where nothing fits the budget."""
    variant = dataclasses.replace(
        contender, make=lambda: solver, low_rank_only=parts == "B", objective=objective
    )
    try:
        return variant.fit(layer_io, keep)
    except SLRError:
        return None


def report_responses(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Drops and held-out errors."""
    table = Table(title="points of accuracy lost, one layer compressed (held-out error)")
    table.add_column("layer, kept")
    names = [key(*variant) for variant in VARIANTS]
    for name in names:
        table.add_column(name, justify="right")
    for record in records:
        row = []
        for name in names:
            found = record["variants"].get(name)
            row.append(f"{found['drop']:.2f} ({found['error']:.4f})" if found else "-")
        table.add_row(f"{record['layer']}, {record['keep']:.0%}", *row)
    console.print(table)


def plot_responses(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Drop, and held-out error, against the fraction kept; one column a layer."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(record["layer"] for record in records))
    figure = Figure(figsize=(5.5 * len(labels), 8), layout="constrained")
    panels = figure.subplots(2, len(labels), squeeze=False)
    for column, label in enumerate(labels):
        for panel, quantity in zip(panels[:, column], ("drop", "error"), strict=True):
            for objective, parts in VARIANTS:
                name = key(objective, parts)
                points = [
                    (100 * r["keep"], r["variants"][name][quantity])
                    for r in records
                    if r["layer"] == label and name in r["variants"]
                ]
                panel.plot(
                    *zip(*points, strict=True) if points else ([], []),
                    "o-" if objective == "activation" else "s--",
                    color="C0" if parts == "A+B" else "C1",
                    label=f"{parts}, {'after the activation' if objective != 'linear' else objective}",
                )
            panel.set_xlabel("weights of the layer kept (%)")
            panel.invert_xaxis()
            panel.grid(alpha=0.3)
        panels[0, column].set_title(f"only {label} compressed")
        panels[0, column].set_ylabel("accuracy lost (points)")
        panels[1, column].set_ylabel("held-out error")
        panels[1, column].set_yscale("log")
        panels[0, column].legend(fontsize="small")
    _save(figure, path)


# -- figure 4 ------------------------------------------------------------------------------------


def factors(
    vgg: VGG, store: Store, contender: Contender, label: str, keep: float, path: Path
) -> dict[str, Any]:
    """Draw the magnitudes of A (zero columns included), U and V of a layer, in columns form."""
    mark = vgg.fingerprint(solver=contender.solver(vgg.setting.quick), form=contender.form)
    name = key(contender.label, label, keep)
    record = store.get(name, mark)
    if record is not None and path.exists():
        return record
    fitted = contender.fit(vgg.layer_io(label), keep, vgg.setting.quick)
    n = len(fitted.bias)
    A, V = np.zeros((n, fitted.width)), np.zeros((fitted.rank, fitted.width))
    A[:, fitted.columns] = fitted.A
    V[:, fitted.complement] = fitted.V
    _draw({"A": A, "U": fitted.U, "V": V}, f"{label}: {fitted.structure}", path)
    return store.put(
        name,
        mark,
        {
            "contender": contender.label,
            "layer": label,
            "keep": keep,
            "structure": str(fitted.structure),
            "error": fitted.held_out_error,
            "columns_kept": len(fitted.columns) / fitted.width,
        },
    )


def _draw(pictures: dict[str, np.ndarray], title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7.5), layout="constrained")
    panels = figure.subplot_mosaic([["A", "A", "A", "A", "U"], ["V", "V", "V", "V", "."]])
    for name, matrix in pictures.items():
        size = np.abs(matrix)
        # A few large entries would leave the rest in the dark.
        top = np.quantile(size[size > 0], 0.99) if (size > 0).any() else 1.0
        image = panels[name].imshow(
            size, aspect="auto", cmap="magma", vmin=0, vmax=top, interpolation="nearest"
        )
        figure.colorbar(image, ax=panels[name], shrink=0.8)
        panels[name].set_title(f"|{name}|, {matrix.shape[0]} x {matrix.shape[1]}")
    figure.suptitle(title)
    _save(figure, path)


def _panel(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Any, panel: Any, path: Path) -> None:
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
