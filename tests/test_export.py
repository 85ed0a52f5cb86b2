"""Exported files against the PyTorch model, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_layers import random_decomposition
from torch import nn
from typer.testing import CliRunner

import slr_gpu
from slr_gpu import export as export_module
from slr_gpu.adapters import adapter_for
from slr_gpu.export import export_model, flush_denormals
from slr_gpu.fold import for_deployment

CONVS = {1: nn.Conv1d, 2: nn.Conv2d}
FORMS = [
    ("columns", 9, 2, None),
    ("columns", 6, 0, None),
    ("channels", 3, 2, None),
    ("rotated", 16, 3, 40),
    ("rotated", 3, 3, 8),
    ("rotated", 0, 3, 8),
    ("rotated", 3, 0, 5),
]


def need_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'slr_gpu[onnx]'")


def decomposed(layer, form, s, k, r=None, seed=0):
    """The layer replaced by random factors of a form."""
    n, c = layer.weight.shape[:2]
    kernel = tuple(layer.weight.shape[2:])
    rng = np.random.default_rng(seed)
    return adapter_for(layer).build(layer, random_decomposition(rng, n, c, kernel, form, s, k, r))


def network(dims, form, s, k, r, **settings):
    torch.manual_seed(0)
    Conv = CONVS[dims]
    layer = Conv(16, 20, 3, padding=1, **settings)
    return nn.Sequential(
        Conv(3, 16, 3, padding=1),
        nn.ReLU(),
        decomposed(layer, form, s, k, r),
        nn.ReLU(),
        nn.Flatten(2),
        nn.Linear(layer(torch.zeros(1, 16, *(8,) * dims)).flatten(2).shape[-1], 4),
    ).eval()


def optimised(path):
    """The nodes that ONNX Runtime executes."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize(
    "dims,form,s,k,r", [(2, *case) for case in FORMS] + [(1, *FORMS[0]), (1, *FORMS[4])]
)
def test_forms_of_convolutions(dims, form, s, k, r, tmp_path):
    need_onnx()
    model = network(dims, form, s, k, r)
    assert export_model(model, tmp_path / "m.onnx", torch.randn(4, 3, *(8,) * dims)) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("form,s,k,r", FORMS)
@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "dilation": 2}, {"padding_mode": "reflect"}]
)
def test_rewriting_for_deployment_changes_nothing(form, s, k, r, settings):
    model = network(2, form, s, k, r, **settings)
    x = torch.randn(2, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        torch.testing.assert_close(for_deployment(model)(x), model(x), rtol=1e-5, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
@pytest.mark.parametrize("form,solver", [("spatial", None), ("entries", slr_gpu.Grebsmo())])
def test_forms_that_compress_makes(kind, form, solver, tmp_path):
    if kind == "onnx":
        need_onnx()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    data = torch.randn(30, 2, 6, 6)
    keep = {"params": 0.6}
    result = slr_gpu.compress(
        model, data, keep, form=form, solver=solver, allocation="uniform", progress=False
    )
    assert any(row.structure.startswith(form) for row in result.report.layers)
    assert result.export(tmp_path / f"m.{kind}", runtime=None).error < 1e-5


@pytest.mark.parametrize("s,k", [(5, 2), (5, 0), (0, 3)])
def test_linear_layers_and_the_free_batch(s, k, tmp_path):
    need_onnx()
    import onnxruntime

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), decomposed(nn.Linear(12, 7), "columns", s, k), nn.ReLU()
    ).eval()
    for path in (tmp_path / "m.onnx", tmp_path / "m.pt2"):
        export_model(model, path, torch.randn(1, 6))
    x = torch.randn(17, 6)
    with torch.no_grad():
        wanted = model(x)
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(loaded(x), wanted)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert session.get_inputs()[0].shape == ["batch", 6]
    (got,) = session.run(["output"], {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=1e-4, atol=1e-5)


def test_the_graph_is_what_runtimes_fuse(tmp_path):
    """Standard operators, BatchNorms folded, and one node a convolution after optimisation."""
    need_onnx()
    import onnx

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        decomposed(nn.Conv2d(32, 64, 3, padding=1), "rotated", 16, 24, 32),
        nn.ReLU(),
        nn.Conv2d(64, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    ).eval()
    model[5].running_var.uniform_(0.5, 2.0)
    path = tmp_path / "m.onnx"
    export_model(model, path, torch.randn(2, 3, 12, 12))
    written = onnx.load(path)
    operators = [node.op_type for node in written.graph.node]
    assert sorted(operators) == ["Add"] + ["Conv"] * 7 + ["Relu"] * 3
    # U is the sum's first operand: its convolution is the last and takes A's output in.
    made_by = {node.output[0]: node for node in written.graph.node}
    (add,) = (node for node in written.graph.node if node.op_type == "Add")
    assert made_by[add.input[0]].input[1].endswith("U.weight")
    nodes = optimised(path)
    if any(node.domain.endswith("nchwc") for node in nodes):  # needs AVX
        kinds = [node.op_type for node in nodes]
        assert kinds.count("Conv") == 7 and set(kinds) == {"Conv", "ReorderOutput"}
        assert len(kinds) == 8
    else:
        assert "BatchNormalization" not in {node.op_type for node in nodes}


class TwoInputs(nn.Module):
    """Indices and values in, a dictionary out; a constant beside them."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(10, 6), nn.Linear(6, 6)

    def forward(self, tokens, scale, power):
        x = self.embed(tokens).mean(1) * scale**power
        return {"mixed": self.mix(x), "sum": x.sum(-1)}


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_several_inputs_and_outputs(kind, tmp_path):
    if kind == "onnx":
        need_onnx()
    inputs = (torch.randint(10, (5, 4)), np.random.default_rng(0).normal(size=(5, 1)), 2)
    assert export_model(TwoInputs(), tmp_path / f"m.{kind}", inputs) < 1e-5
    starred = tuple(torch.randn(4, 3) for _ in range(3))
    assert export_model(Starred(), tmp_path / f"starred.{kind}", starred) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_written_in_float32(dtype, tmp_path):
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)).to(dtype)
    data = torch.randn(40, 2, 8, dtype=dtype)
    result = slr_gpu.compress(model, data, {"params": 0.8}, keep_ends=False, progress=False)
    result.export(tmp_path / "m.pt2", runtime=None)
    loaded = torch.export.load(tmp_path / "m.pt2")
    assert {value.dtype for value in loaded.state_dict.values()} == {torch.float32}
    assert {p.dtype for p in result.model.parameters()} == {dtype}


def test_denormals_are_written_as_zeros(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    result = slr_gpu.compress(
        model, torch.randn(50, 4), {"params": 0.9}, allocation="uniform", progress=False
    )
    with torch.no_grad():
        result.model[0].weight[:2] = 1e-39
        result.model[0].weight[2] = -1.2e-38  # normal: stays
        result.model[4].bias[0] = -1e-44
    result.save(tmp_path)
    result.export(tmp_path / "m.pt2", runtime=None)
    exported = torch.export.load(tmp_path / "m.pt2").state_dict
    for state in (load_file(tmp_path / "model.safetensors"), exported):
        assert (state["0.weight"][:2] == 0).all() and (state["0.weight"][2] != 0).all()
        assert state["4.bias"][0] == 0 and state["4.bias"][1] != 0
    assert (result.model[0].weight[:2] != 0).all()


def test_denormals_of_folded_batch_norms(tmp_path):
    """The scale of a BatchNorm can push normal weights below the smallest normal number."""
    need_onnx()
    import onnx
    from onnx import numpy_helper

    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4)).eval()
    with torch.no_grad():
        model[0].weight[0] = 1e-37
        model[1].weight.fill_(0.01)
    export_model(model, tmp_path / "m.onnx", torch.randn(2, 2, 8))
    arrays = [
        numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer
    ]
    values = np.concatenate([a.ravel() for a in arrays if a.dtype == np.float32])
    assert ((values == 0) | (np.abs(values) >= np.finfo(np.float32).tiny)).all()
    assert (values == 0).any() and (values != 0).any()


def test_flush_denormals_keeps_shared_weights_shared():
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, nn.ReLU(), linear)
    with torch.no_grad():
        linear.weight[0] = 1e-40
    assert flush_denormals(model)[0] is model[2]
    assert (linear.weight[0] == 0).all()


# -- what is refused -----------------------------------------------------------------------------


def refused(model, path, inputs, error, match):
    before = sorted(path.parent.iterdir())
    with pytest.raises(error, match=match):
        export_model(model, path, inputs)
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize("name", ["m.tflite", "m", "onnx"])
def test_other_suffixes(name, tmp_path):
    refused(nn.Linear(2, 2), tmp_path / name, torch.ones(1, 2), slr_gpu.InputError, ".onnx or .pt2")


def test_inputs_that_are_none(tmp_path):
    for inputs in ((), "images", torch.ones(0, 2), torch.tensor(1.0)):
        refused(nn.Linear(2, 2), tmp_path / "m.pt2", inputs, slr_gpu.InputError, "inputs=")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(package, tmp_path, monkeypatch):
    if package != "onnx":
        need_onnx()
    monkeypatch.setitem(sys.modules, package, None)
    model, x = nn.Linear(2, 2), torch.ones(1, 2)
    refused(model, tmp_path / "m.onnx", x, slr_gpu.BackendError, r"slr_gpu\[onnx\]")
    export_model(model, tmp_path / "m.pt2", x)


class Branches(nn.Module):
    def forward(self, x):
        if x.sum().item() > 0:
            return x * 2
        return x


class Starred(nn.Module):
    def forward(self, x, *others):
        return x + sum(others)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


class Decomposing(nn.Module):
    def forward(self, x):
        return torch.linalg.qr(x).R


class Parity(nn.Module):
    """A value that torch.export takes for a constant, because it is computed in Python."""

    def forward(self, x):
        return x + float(np.random.default_rng().normal())


def test_models_that_do_not_trace_are_named(tmp_path):
    x = torch.randn(3, 4, 4)
    for kind in ("m.pt2", "m.onnx"):
        if kind == "m.onnx":
            need_onnx()
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Branches()))
        match = r"in 1\.0 \(Branches\).*if x\.sum\(\)\.item\(\) > 0"
        refused(model, tmp_path / kind, x, slr_gpu.ModelError, match)
    refused(FixedBatch(), tmp_path / "m.pt2", x, slr_gpu.ModelError, "free batch dimension")


def test_operators_without_a_translation_are_named(tmp_path):
    need_onnx()
    model = nn.Sequential(nn.Linear(4, 4), Decomposing())
    x = torch.randn(3, 4, 4)
    match = r"in 1, operator aten\.linalg_qr"
    refused(model, tmp_path / "m.onnx", x, slr_gpu.ModelError, match)


def test_outputs_that_are_no_tensors_are_named(tmp_path):
    need_onnx()

    class Counting(nn.Linear):
        def forward(self, x):
            return {"y": super().forward(x), "nothing": None, "steps": 3}

    x = torch.randn(3, 4)
    refused(Counting(4, 4), tmp_path / "m.onnx", x, slr_gpu.ModelError, "returns 3, a int")
    export_model(Counting(4, 4), tmp_path / "m.pt2", (x,))


def test_files_that_compute_something_else(tmp_path, monkeypatch):
    x = torch.randn(3, 4)
    path = tmp_path / "m.pt2"
    export_model(nn.Linear(4, 4), path, x)
    whole = path.read_bytes()
    refused(Parity(), path, x, slr_gpu.ModelError, "relative error of")
    assert path.read_bytes() == whole


def test_files_that_do_not_run(tmp_path, monkeypatch):
    need_onnx()
    monkeypatch.setattr(export_module, "_to_onnx", lambda *arguments: b"\x08\x0a")
    x = torch.randn(3, 4)
    refused(nn.Linear(4, 4), tmp_path / "m.onnx", x, slr_gpu.ModelError, "m.onnx")


def test_models_above_the_limit_of_a_file(tmp_path, monkeypatch):
    need_onnx()
    monkeypatch.setattr(export_module, "PROTOBUF_LIMIT", 100)
    x = torch.randn(3, 8)
    refused(nn.Linear(8, 8), tmp_path / "m.onnx", x, slr_gpu.InputError, "288 bytes.*at most 100")
    export_model(nn.Linear(8, 8), tmp_path / "m.pt2", x)


def test_shared_weights_count_once_for_the_limit(tmp_path, monkeypatch):
    need_onnx()
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    monkeypatch.setattr(export_module, "PROTOBUF_LIMIT", 28_000)
    export_model(model, tmp_path / "m.onnx", torch.randn(3, 64))
    assert 16_640 < (tmp_path / "m.onnx").stat().st_size < 28_000


# -- the command line ----------------------------------------------------------------------------

MODEL = """
from torch import nn

class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x

def make():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

def make_branch():
    return nn.Sequential(*make(), Branch())
"""


@pytest.fixture
def compress(tmp_path, monkeypatch):
    (tmp_path / "export_model_cli.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    np.save("calib.npy", np.random.default_rng(0).normal(size=(60, 4)))

    def run(factory, *exports):
        from slr_gpu.cli import app

        settings = ["--data", "calib.npy", "--keep", "params=0.8", "--out", "out"]
        options = [part for name in exports for part in ("--export", name)]
        model = f"export_model_cli:{factory}"
        done = CliRunner().invoke(app, ["compress", "--model", model, *settings, *options])
        out = tmp_path / "out"
        return done, {path.name for path in out.iterdir()} if out.exists() else set()

    return run


SAVED = {"model.safetensors", "plan.json", "report.json"}


def test_command_line(compress):
    need_onnx()
    done, files = compress("make", "model.onnx", "model.pt2")
    assert done.exit_code == 0, done.output
    assert files == SAVED | {"model.onnx", "model.pt2"}


def test_command_line_keeps_the_result_of_a_model_that_does_not_export(compress):
    done, files = compress("make_branch", "model.pt2")
    assert done.exit_code == 1 and "Branch" in done.output
    assert files == SAVED | {"checkpoint"}  # --resume goes on from the pieces


def test_command_line_refuses_bad_names_before_working(compress):
    done, files = compress("make", "model.tflite")
    assert done.exit_code == 1 and ".onnx or .pt2" in done.output.replace("\n", " ")
    assert not files
