"""The command line, run as a user would."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from slr_gpu.cli import app
from slr_gpu.cli_inputs import clear_errors
from slr_gpu.errors import InputError

MODEL = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(432, 5),
    )

def failing():
    raise RuntimeError("no such size")

MODEL = 3

def batches():
    import torch
    return [torch.randn(20, 2, 6, 6) for _ in range(3)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "cli_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import cli_model

    torch.manual_seed(0)
    save_file(cli_model.make().state_dict(), "weights.safetensors")
    rows = np.random.default_rng(0).normal(size=(60, 2, 6, 6))
    np.save("calib.npy", rows)
    np.savez("calib.npz", rows=rows)
    np.savez("two.npz", rows=rows, labels=rows)
    (tmp_path / "broken.npz").write_bytes(b"PK" + bytes(8))
    (tmp_path / "cli_broken.py").write_text("def make(:")
    (tmp_path / "taken").write_text("mine")
    return tmp_path


def test_an_error_is_printed_as_it_is(capsys):
    """Brackets are markup to rich."""
    with pytest.raises(typer.Exit), clear_errors():
        raise InputError("got [/tmp/x.npy] and [red]; expected none")
    assert "error: got [/tmp/x.npy] and [red]; expected none" in capsys.readouterr().err


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("data", ["calib.npy", "calib.npz", "cli_model:batches"])
def test_compress(folder, data):
    done = run(
        "compress",
        "--model",
        "cli_model:make",
        "--weights",
        "weights.safetensors",
        "--data",
        data,
        "--keep",
        "flops=0.6,params=0.9",
        "--refine-epochs",
        "2",
        "--out",
        "out",
    )
    assert done.exit_code == 0, done.output
    assert "kept" in done.output
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["achieved"]["flops"] <= 0.6
    assert report["refinement"]["epochs"] == 2
    assert {path.name for path in (folder / "out").iterdir()} == {
        "model.safetensors",
        "plan.json",
        "report.json",
    }


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"--model": "cli_model"}, "pkg.module:name"),
        ({"--model": "cli_model:nothing"}, "cli_model:nothing"),
        ({"--weights": "missing.safetensors"}, "missing.safetensors"),
        ({"--data": "missing.npy"}, "missing.npy"),
        ({"--keep": "flops"}, "flops=0.25"),
        ({"--keep": "flops=2"}, "fraction"),
        ({"--device": "tpu"}, "tpu"),
        ({"--refine-epochs": "0"}, "epochs=0"),
        ({"--solver": "magic"}, "majorize, admm"),
        ({"--solver": "zhang", "--form": "rotated"}, "one of auto, columns, spatial"),
        ({"--model": ":make"}, "':make'"),
        ({"--model": "..cli_model:make"}, "'..cli_model:make'"),
        ({"--model": "cli_model:MODEL"}, "expected a function"),
        ({"--model": "cli_model:failing"}, "RuntimeError: no such size (cli_model.py:"),
        ({"--model": "cli_broken:make"}, "SyntaxError"),
        ({"--data": "broken.npz"}, "broken.npz"),
        ({"--data": "two.npz"}, "two.npz with 2 arrays; expected one"),
        ({"--out": "taken"}, "taken"),
        ({"--export": "model.onnx", "--threads": "0"}, "threads=0"),
        ({"--threads": "4096"}, "threads=4096"),
    ],
)
def test_errors_are_one_line_and_write_nothing(folder, changes, match):
    options = {
        "--model": "cli_model:make",
        "--weights": "weights.safetensors",
        "--data": "calib.npy",
        "--keep": "flops=0.6",
        "--out": "out",
        **changes,
    }
    done = run("compress", *[part for pair in options.items() for part in pair])
    assert done.exit_code == 1
    assert match in done.output.replace("\n", " ") and "Traceback" not in done.output
    assert not (folder / "out").exists()


COMMON = (
    *("--model", "cli_model:make", "--weights", "weights.safetensors"),
    *("--data", "calib.npy", "--samples", "300"),
)


def test_folders_of_the_users_are_left_alone(folder):
    (folder / "out" / "checkpoint").mkdir(parents=True)
    (folder / "out" / "checkpoint" / "epoch10.pt").write_text("mine")
    done = run("compress", *COMMON, "--keep", "flops=0.6", "--out", "out")
    assert done.exit_code == 1 and "'epoch10.pt' and is no checkpoint" in done.output
    # An analysis keeps its pieces elsewhere.
    assert run("analyze", *COMMON, "--out", "out").exit_code == 0
    found = {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*")}
    assert found == {"checkpoint", "checkpoint/epoch10.pt", "analysis.json"}


def test_an_export_that_fails_can_be_tried_again_without_fitting(folder, monkeypatch):
    command = ("compress", *COMMON, "--keep", "flops=0.6", "--out", "out", "--export", "model.pt2")

    def fail(*args, **settings):
        raise InputError("got a full disk")

    with monkeypatch.context() as patch:
        patch.setattr("slr_gpu.result.Result.export", fail)
        done = run(*command)
    assert done.exit_code == 1 and "full disk" in done.output
    with monkeypatch.context() as patch:
        patch.setattr("slr_gpu.carry_out.fit", fail)
        patch.setattr("slr_gpu.sensitivity._measure", fail)
        done = run(*command, "--resume", "--runtime", "none")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (folder / "out").iterdir()} == {
        *("model.safetensors", "plan.json", "report.json", "model.pt2"),
    }


@pytest.mark.parametrize(
    "options,match",
    [
        (("--keep", "flps=0.5"), "flps"),
        (("--keep", "flops=0.5", "--picture", "plan.doc"), "plan.doc"),
        (("--picture", "plan.png"), "--picture without --keep"),
        (("--keep", "flops=0.5"), "belongs to a compressed model"),
    ],
)
def test_what_an_analysis_cannot_write_is_refused_first(folder, monkeypatch, options, match):
    monkeypatch.setattr("slr_gpu.sensitivity.measure", None)
    (folder / "out").mkdir()
    (folder / "out" / "plan.json").write_text('{"folded": []}')
    done = run("analyze", *COMMON, *options, "--out", "out")
    assert done.exit_code == 1 and match in done.output.replace("\n", " "), done.output
    assert [path.name for path in (folder / "out").iterdir()] == ["plan.json"]
    if "--keep" in options:
        (folder / "analysis.json").write_text("{}")
        for out in ("out/plan.json", "out"):
            done = run("allocate", "analysis.json", "--keep", "flops=0.5", "--out", out)
            assert done.exit_code == 1 and "expected" in done.output


def test_doctor():
    done = run("doctor")
    assert done.exit_code == 0
    assert "backend cpu: works" in done.output and "backend cuda" in done.output


def test_demo():
    pytest.importorskip("sklearn", reason="needs the demo extra")
    done = run("demo")
    assert done.exit_code == 0, done.output
    assert "accuracy on 500 digits" in done.output
