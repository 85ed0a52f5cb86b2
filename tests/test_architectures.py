"""`slr-gpu compress` on a small version of every architecture; README's table is what it gave.

``SLR_GPU_WRITE_README=1 python -m pytest tests/test_architectures.py`` writes the table anew.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, calibration, make
from torch import nn
from typer.testing import CliRunner

import slr_gpu
from slr_gpu.cli import app
from slr_gpu.flops import count_flops
from slr_gpu.report import Report

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- compatibility -->", "<!-- end of compatibility -->"
HEADER = [
    "| network | layers compressed | fitted through | FLOPs that stay dense | beside both ends |",
    "|---|---|---|---|---|",
]
USER = """
from architectures import calibration, make

def model():
    return make({name!r})

def data():
    return [calibration({name!r})]
"""


@dataclass
class Outcome:
    """What the command left."""

    output: str
    report: Report
    model: nn.Module
    onnx: Path


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A function that compresses a network through the command line, once."""
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    folder = tmp_path_factory.mktemp("architectures")

    @cache
    def run(name: str) -> Outcome:
        module = "user_" + re.sub(r"\W", "_", name.lower())
        (folder / f"{module}.py").write_text(USER.format(name=name))
        out = folder / module
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(folder)
            arguments = {
                "--model": f"{module}:model",
                "--data": f"{module}:data",
                "--keep": f"flops={ARCHITECTURES[name].keep}",
                "--samples": "1500",
                "--allocation": "uniform",
                "--out": str(out),
                "--export": "model.onnx",
                "--runtime": "none",
            }
            parts = [part for pair in arguments.items() for part in pair]
            done = CliRunner().invoke(app, ["compress", *parts])
        assert done.exit_code == 0, done.output
        report = Report.from_dict(json.loads((out / "report.json").read_text()))
        model = slr_gpu.load(out, lambda: make(name))
        return Outcome(done.output, report, model, out / "model.onnx")

    return run


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, outcome):
    found = outcome(name)
    report, model, original = found.report, found.model, make(name)
    inputs = calibration(name, 64, seed=1)
    # Within the budget, and as the modules have it.
    assert report.achieved["flops"] <= ARCHITECTURES[name].keep
    check_counts(report, model, tuple(x[:1] for x in inputs))
    assert "FLOPs in what stays dense" in found.output
    # It computes about what the original does, on inputs never seen.
    with torch.no_grad():
        expected, got = original(*inputs), model(*inputs)
    error = (got - expected).square().sum()
    assert error < 0.15 * expected.square().sum()
    assert error < 0.9 * (expected - expected.mean(0)).square().sum()
    held = [row.error for row in report.layers if row.compressed]
    assert held and max(held) < 0.35
    # What the file computes.
    import onnxruntime

    session = onnxruntime.InferenceSession(found.onnx, providers=["CPUExecutionProvider"])
    feeds = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
    (exported,) = session.run(None, feeds)
    scale = float(got.abs().max())
    torch.testing.assert_close(torch.from_numpy(exported), got, rtol=1e-3, atol=1e-4 * scale)


def check_counts(report, model, sample):
    """A report against the modules of the model that it is about."""
    flops, by_module = count_flops(model, sample)
    assert report.flops_kept == flops
    assert report.params_kept == sum(p.numel() for p in model.parameters())
    for row in report.layers:
        module = model if row.name == "(model)" else model.get_submodule(row.name)
        if row.compressed:
            assert row.params_kept == sum(p.numel() for p in module.parameters())
            assert row.flops_kept == by_module.get(row.name, 0)
            reported = with_one_name(row.structure, module)
            assert reported == with_one_name(structure(module), module)
        else:
            assert type(module).__name__ == row.type and row.reason
            assert (row.params_kept, row.flops_kept) == (row.params, row.flops)
    assert report.skipped_flops == report.flops - sum(
        r.flops for r in report.layers if r.compressed
    )


def structure(module: nn.Module) -> str:
    """What a decomposed module says of itself, in the report's words."""
    if hasattr(module, "parts"):
        counts = Counter(structure(part) for part in module.parts)
        return ", ".join(f"{count} x {text}" for text, count in counts.items())
    form = getattr(module, "form", "entries" if module.entries else "columns")
    basis = f" r={module.basis_rows}" if getattr(module, "basis_rows", None) else ""
    return f"{form}{basis} s={module.entries or len(module.kept)} k={module.rank}"


def with_one_name(text: str, module: nn.Module) -> str:
    """Of a layer with a single tap, whose channels are its columns."""
    sizes = {size for part in module.modules() for size in getattr(part, "kernel_size", ())}
    return text if sizes - {1} else text.replace("channels", "columns")


def row_of(name: str, report: Report) -> str:
    compressed = [row for row in report.layers if row.compressed]
    through = sorted({row.activation for row in compressed})
    reasons = Counter(re.sub(r" \(.*\)", "", r.reason) for r in report.layers if not r.compressed)
    listed = {text: n for text, n in reasons.items() if text not in ("first layer", "last layer")}
    why = "; ".join(f"{n} x {text}" if n > 1 else text for text, n in listed.items()) or "nothing"
    share = report.skipped_flops / report.flops
    return f"| {name} | {len(compressed)} | {', '.join(through)} | {share:.1%} | {why} |"


def test_readme_has_this_table(outcome):
    rows = [row_of(name, outcome(name).report) for name in ARCHITECTURES]
    table = "\n".join([*HEADER, *rows])
    text = README.read_text()
    before, after = text.index(BEGIN) + len(BEGIN), text.index(END)
    if os.environ.get("SLR_GPU_WRITE_README"):
        README.write_text(f"{text[:before]}\n{table}\n{text[after:]}")
    else:
        assert text[before:after].strip() == table, f"write it anew: {__doc__}"
