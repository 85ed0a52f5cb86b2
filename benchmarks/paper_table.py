"""Table 1 of Ma et al. 2018 (arXiv 1807.10119) on our network: layer by layer, then the whole.

In: the VGG-16, the data and a system. Out: for every layer the fraction of its weights that A, B
and both take and the accuracy drop with only that layer compressed (fitted on the original's
inputs); for the whole network (asymmetric inputs) the compression, the speed-up in FLOPs and as
measured on one thread of the CPU, and the accuracy drop before and after fine-tuning on labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.contenders import Contender
from benchmarks.data import fashion_mnist, to_inputs
from benchmarks.fine_tuning import Tuning, fine_tune, speed_up
from benchmarks.store import Store, key, progress
from benchmarks.vgg_layers import VGG, single_branch


def parts(module: nn.Module, dense: int) -> dict[str, float]:
    """Fractions of a layer's weights that A, and B with its basis, take: CR of the paper.

    Parameters
    ----------
    module : nn.Module
        A decomposed layer.
    dense : int
        Weights of the dense layer, biases aside.
    """
    total = {"A": 0, "B": 0}
    for name, parameter in module.named_parameters():
        if not name.endswith("bias"):
            total["A" if name.startswith("A") else "B"] += parameter.numel()
    return {
        "A": total["A"] / dense,
        "B": total["B"] / dense,
        "A+B": (total["A"] + total["B"]) / dense,
    }


def run(
    vgg: VGG, store: Store, contender: Contender, keep: dict[str, float], tuning: Tuning
) -> dict[str, dict[str, Any]]:
    """All stages of one system, those that the store lacks computed now."""
    solver = contender.solver(vgg.setting.quick)

    def model(asymmetric: bool) -> tuple[nn.Module, Any]:
        return vgg.compressed(keep, contender, asymmetric)

    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "layers": lambda: _layers(vgg, model(False)[0]),
        "whole": lambda: _whole(vgg, *model(True)),
        "speed": lambda: _speed(vgg, model(True)[0]),
        "fine-tuning": lambda: _tuned(vgg, model(True)[0], tuning),
    }
    result = {}
    console = Console(stderr=True, highlight=False)
    for stage, make in stages.items():
        settings = {
            "solver": solver,
            "form": contender.form,
            "keep": keep,
            "test_images": vgg.setting.test_images,
        }
        if stage == "fine-tuning":
            settings["tuning"] = tuning
        name = key(contender.label, *(f"{what} {share:g}" for what, share in keep.items()), stage)
        result[stage] = store.get_or_make(name, vgg.fingerprint(**settings), make)
        console.print(f"table 1: {contender.label}: {stage}", markup=False)
    return result


def _layers(vgg: VGG, model: nn.Module) -> dict[str, Any]:
    original = vgg.chain(vgg.original)
    modules = {label: model.get_submodule(name) for label, name in vgg.layers.items()}
    branches = {
        label: single_branch(original, vgg.position(label), module)
        for label, module in modules.items()
    }
    found = vgg.compare_branches(original, branches)
    rows = {}
    for label, comparison in found.items():
        dense = vgg.original.get_submodule(vgg.layers[label]).weight.numel()
        rows[label] = parts(modules[label], dense) | {
            "drop": vgg.drop(comparison),
            "kl": comparison.kl,
        }
    return {"rows": rows, "test_images": len(vgg.test[1])}


def _whole(vgg: VGG, model: nn.Module, report: Any) -> dict[str, Any]:
    found = vgg.compare_branches([], {"": (0, vgg.chain(model))})[""]
    return {
        "asked": report.asked,
        "achieved": report.achieved,
        "seconds": report.seconds,
        "accuracy_before": vgg.accuracy,
        "accuracy": found.accuracy,
        "drop": vgg.drop(found),
        "agreement": found.agreement,
        "kl": found.kl,
    }


def _speed(vgg: VGG, model: nn.Module) -> dict[str, Any]:
    # The dense rival has its BatchNorms folded too.
    limits = {"seconds": 1.0, "least": 3} if vgg.setting.quick else {}
    return {
        str(batch): speed_up(vgg.original, model, vgg.calibration[:batch], **limits)
        for batch in (1, 100)
    }


def _tuned(vgg: VGG, model: nn.Module, tuning: Tuning) -> dict[str, Any]:
    images, labels, _, _ = fashion_mnist(vgg.setting.data)
    inputs = to_inputs(images[: tuning.images])
    targets = torch.tensor(labels[: tuning.images], dtype=torch.long)
    tuned = copy.deepcopy(model)
    steps = tuning.epochs * (len(inputs) // min(tuning.batch_size, len(inputs)))
    facts: dict[str, Any] = {"steps": 0, "epochs": 0.0, "seconds": 0.0}
    if steps:
        report_every = max(1, steps // 50)
        with progress("fine-tuning", -(-steps // report_every)) as done:

            def on_step(step: int, steps: int, loss: float) -> None:
                if step % report_every == 0 or step == steps:
                    done(f"step {step} of {steps}, loss {loss:.4f}")

            facts = fine_tune(tuned, inputs, targets, tuning, on_step)
    found = vgg.compare_branches([], {"": (0, vgg.chain(tuned))})[""]
    return facts | {"accuracy": found.accuracy, "drop": vgg.drop(found), "kl": found.kl}


def report(label: str, result: dict[str, dict[str, Any]], console: Console) -> None:
    """The table, and the whole network's figures below it."""
    table = Table(title=f"{label}: fractions of each layer's weights kept; points of accuracy lost")
    for title in ("layer", "CR(A)", "CR(B)", "CR(A+B)", "drop"):
        table.add_column(title, justify="left" if title == "layer" else "right")
    for layer, row in result["layers"]["rows"].items():
        shares = (f"{100 * row[part]:.1f} %" for part in ("A", "B", "A+B"))
        table.add_row(layer, *shares, f"{row['drop']:.2f}")
    console.print(table)
    whole, tuned = result["whole"], result["fine-tuning"]
    kept = whole["achieved"]
    asked = whole["asked"].get("params", 1.0)
    params = f"parameters kept: {kept['params']:.2%} (asked {asked:.2%}), "
    params += f"{1 / kept['params']:.2f} times fewer"
    lines = [params, f"FLOPs kept: {kept['flops']:.2%}, {1 / kept['flops']:.2f} times fewer"]
    for batch in ("1", "100"):
        speed = result["speed"][batch]
        ratio, dense = speed["speed_up"], speed["dense_ms"]
        lines.append(
            f"PyTorch eager, 1 thread, batch {batch}: {ratio['median']:.2f} times as fast as dense "
            f"(quartiles {ratio['low']:.2f} to {ratio['high']:.2f}, {speed['rounds']} rounds; "
            f"dense {dense['median']:.1f} ms)"
        )
    lost = f"accuracy {whole['accuracy_before']:.4f} -> {whole['accuracy']:.4f}: "
    lost += f"{whole['drop']:.2f} points lost, KL {whole['kl']:.5f}"
    again = f"after fine-tuning ({tuned['epochs']:.2f} epochs, {tuned['steps']} steps, "
    again += f"{tuned['seconds'] / 60:.1f} min): {tuned['drop']:.2f} points lost"
    lines += [lost, again, f"compressed in {whole['seconds']:.0f} s"]
    console.print("\n".join(lines), highlight=False)


def plot(label: str, result: dict[str, dict[str, Any]], path: Path) -> None:
    """What A and B take in every layer, stacked, and below it the drop of that layer alone."""
    from matplotlib.figure import Figure

    rows = result["layers"]["rows"]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    A = [100 * row["A"] for row in rows.values()]
    upper.bar(list(rows), A, label="A")
    upper.bar(list(rows), [100 * row["B"] for row in rows.values()], bottom=A, label="B = U V")
    upper.set_ylabel("weights of the layer kept (%)")
    upper.set_title(label)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    lower.plot(list(rows), [row["drop"] for row in rows.values()], "ko-")
    lower.set_ylabel("accuracy lost (points),\nthis layer alone")
    lower.tick_params(axis="x", rotation=60)
    lower.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
