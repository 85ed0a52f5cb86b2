"""Latency measurement: statistics on fake clocks, sessions of the stock runtimes, the command."""

from __future__ import annotations

import io
import json
import os
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import slr_gpu
from slr_gpu.cli import app
from slr_gpu.equivalence import relative_error
from slr_gpu.errors import BackendError, InputError, ModelError
from slr_gpu.runtime.model_files import ONNX, TORCH, InputSpec, open_source
from slr_gpu.runtime.model_inputs import common_inputs, make_inputs
from slr_gpu.runtime.opening import Runner, compare_outputs
from slr_gpu.runtime.sessions import (
    RUNTIMES,
    PyTorchCompiled,
    PyTorchEager,
    Session,
)
from slr_gpu.runtime.timing import (
    BLOCK_S,
    MIN_ROUNDS,
    bootstrap,
    interleave,
    pinned,
    quartiles,
    usable_cpus,
)

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")
pytest.importorskip("openvino", reason="needs the onnx extra")

WIDTH = 32


def write_onnx(path, layers, *, width=WIDTH, name="x", shape=("batch",), external=False, seed=0):
    """A chain of square matrix products, each followed by a tanh."""
    helper = onnx.helper
    rng = np.random.default_rng(seed)
    nodes, weights, last = [], [], name
    for index in range(layers):
        weight = rng.normal(0, 1 / np.sqrt(width), (width, width)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(weight, f"w{index}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"z{index}"], f"mm{index}"))
        last = "y" if index == layers - 1 else f"y{index}"
        nodes.append(helper.make_node("Tanh", [f"z{index}"], [last], f"tanh{index}"))
    float32 = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info(name, float32, [*shape, width])],
        [helper.make_tensor_value_info("y", float32, [*shape, width])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")
    return path


class Chain(nn.Module):
    """What `write_onnx` writes."""

    def __init__(self, path):
        super().__init__()
        weights = onnx.load(path).graph.initializer
        self.weights = nn.ParameterList(
            nn.Parameter(torch.tensor(onnx.numpy_helper.to_array(weight))) for weight in weights
        )

    def forward(self, x):
        for weight in self.weights:
            x = torch.tanh(x @ weight)
        return x


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {
        "dense": write_onnx(tmp_path / "dense.onnx", 8),
        "compressed": write_onnx(tmp_path / "compressed.onnx", 1),
    }


# -- statistics and order ----------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def fakes(clock, durations, log=None):
    """Callables that take their time on the clock."""

    def make(key, duration):
        def call():
            if log is not None:
                log.append(key)
            clock.now += duration() if callable(duration) else duration

        return call

    return {key: make(key, duration) for key, duration in durations.items()}


def test_quartiles_and_bootstrap():
    assert quartiles(np.array([1.0, 2, 3, 4, 5])) == (2, 3, 4)
    exact = bootstrap(np.full(20, 3.0))
    assert (exact.value, exact.low, exact.high, exact.width) == (3, 3, 3, 0)
    rng = np.random.default_rng(0)
    few, many = bootstrap(rng.normal(3, 0.3, 15)), bootstrap(rng.normal(3, 0.3, 600))
    assert many.low < 3 < many.high and many.width < few.width / 3


def test_bootstrap_covers_the_ratio_under_drift():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        drift = rng.lognormal(0, 0.3, 25)
        dense, small = (rng.lognormal(0, 0.02, 25) * drift for _ in range(2))
        interval = bootstrap(3 * dense / small, seed=trial)
        hits += interval.low <= 3 <= interval.high
        assert interval.width < 0.1
    assert hits > 0.88 * 200


def test_every_round_visits_all_in_a_random_order():
    clock, log = Clock(), []
    calls = fakes(clock, {"a": 0.03, "b": 0.03, "c": 0.03}, log)
    done = interleave(calls, [("a", "b")], precision=0.01, time_limit_s=60, clock=clock)
    assert done.converged and done.calls == {"a": 1, "b": 1, "c": 1}
    assert all(np.allclose(seconds, 0.03) for seconds in done.seconds.values())
    assert all(len(seconds) == MIN_ROUNDS for seconds in done.seconds.values())
    timed = log[-6 * MIN_ROUNDS :: 2]  # a warm call and a timed one each
    assert log[-6 * MIN_ROUNDS + 1 :: 2] == timed
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds) and len(set(rounds)) > 2
    again: list[str] = []
    clock = Clock()
    interleave(
        fakes(clock, {"a": 0.03, "b": 0.03, "c": 0.03}, again),
        [("a", "b")],
        precision=0.01,
        time_limit_s=60,
        clock=clock,
    )
    assert again == log


def test_short_calls_are_timed_in_blocks():
    clock = Clock()
    done = interleave(fakes(clock, {"a": 1e-5}), [], precision=0.01, time_limit_s=60, clock=clock)
    expected = BLOCK_S / 1e-5
    assert 0.99 * expected <= done.calls["a"] <= 1.01 * expected
    assert np.allclose(done.seconds["a"], 1e-5)


def test_noise_runs_into_the_time_limit():
    rng, clock = np.random.default_rng(0), Clock()
    noisy = fakes(clock, {"a": lambda: rng.lognormal(0, 1), "b": lambda: rng.lognormal(0, 1)})
    said = []
    done = interleave(
        noisy,
        [("a", "b")],
        precision=0.01,
        time_limit_s=200,
        clock=clock,
        advance=lambda amount=1, description=None: said.append(amount),
    )
    assert not done.converged and 200 <= done.wall_s < 250
    assert 0 < sum(said) <= done.wall_s
    slow = fakes(clock, {"a": 100.0})
    assert len(interleave(slow, [], precision=0.1, time_limit_s=1, clock=clock).seconds["a"]) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_pinned_moves_and_restores():
    before = os.sched_getaffinity(0)
    assert set(usable_cpus()) == before
    with pinned(1) as cpus:
        assert os.sched_getaffinity(0) == set(cpus) and len(cpus) == 1
    assert os.sched_getaffinity(0) == before


# -- outputs -----------------------------------------------------------------------------------


def test_relative_error():
    a = np.array([1.0, 2.0, np.inf, np.nan])
    assert relative_error([a], [a.copy()]) == 0
    assert relative_error([np.array([1.0, 2.2])], [np.array([1.0, 2.0])]) == pytest.approx(0.1)
    assert relative_error([np.array([1.0, np.nan])], [np.array([1.0, 2.0])]) == np.inf
    assert relative_error([np.array([np.inf, 1.0])], [np.array([-np.inf, 1.0])]) == np.inf
    exact, near = torch.ones(3, requires_grad=True), torch.full((3,), 1.1, dtype=torch.bfloat16)
    assert relative_error([near], [exact]) == pytest.approx(0.1, rel=0.02)
    assert relative_error([a], [a, a]) == relative_error([a], [a[:2]]) == np.inf


def test_the_odd_one_out_disagrees():
    good, bad = [np.ones(3)], [np.full(3, 1.5)]
    found = compare_outputs({"a": good, "b": bad, "c": good})
    assert {name: agrees for name, (_, agrees) in found.items()} == {"a": 1, "b": 0, "c": 1}
    assert not any(agrees for _, agrees in compare_outputs({"a": good, "b": bad}).values())
    assert compare_outputs({"a": good}) == {"a": (None, True)}


class Doubled(PyTorchEager):
    """A runtime that computes something else, fast."""

    name = "doubled"

    def run(self, inputs):
        return [2 * output for output in super().run(inputs)]


def test_a_wrong_runtime_gets_no_speed_up(files, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "doubled", Doubled)
    models = {label: [path, Chain(path)] for label, path in files.items()}
    names = ["doubled", "pytorch", "onnxruntime"]
    done = slr_gpu.bench(models, runtimes=names, time_limit_s=0.2, precision=0.5)
    rows = {(row.model, row.runtime): row for row in done.latencies}
    assert not rows["compressed", "doubled"].agrees and not rows["compressed", "doubled"].speedup
    assert rows["compressed", "pytorch"].agrees and rows["compressed", "pytorch"].speedup
    assert {done.headlines[0].runtime, done.headlines[0].baseline_runtime} <= {*names[1:]}
    done = slr_gpu.bench(models, runtimes=names[:2], time_limit_s=0.2, precision=0.5)
    assert not done.headlines and "no runtime gives agreeing outputs" in text(done)


def text(result, **options):
    file = io.StringIO()
    result.print(Console(width=140, file=file), **options)
    return file.getvalue()


# -- runtimes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", list(RUNTIMES.values()), ids=list(RUNTIMES))
def test_sessions_compute_the_model(files, runtime):
    if runtime.why_not():
        pytest.skip(runtime.why_not())
    x = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
    module = Chain(files["compressed"])
    source = open_source(files["compressed"] if runtime.format == ONNX else module)
    expected = module(torch.from_numpy(x)).detach().numpy()
    assert relative_error(runtime(source, (x,), 1).run((x,)), [expected]) < 1e-5
    if runtime.profiles:
        layers = runtime(source, (x,), 1, profiling=True).profile((x,))
        assert layers and layers == sorted(layers, key=lambda layer: -layer.seconds)
        assert all(layer.name and layer.type for layer in layers)


def test_a_bigger_model_measures_slower(tmp_path):
    files = {
        "dense": write_onnx(tmp_path / "dense.onnx", 24, width=256),
        "compressed": write_onnx(tmp_path / "compressed.onnx", 2, width=256),
    }
    done = slr_gpu.bench(files, time_limit_s=3, out=tmp_path / "out", progress=False)
    assert done.runtimes == ["onnxruntime", "openvino"] and done.models == list(files)
    assert all(row.agrees and row.output_error < 1e-4 for row in done.latencies)
    assert all(row.speedup.value > 2 for row in done.latencies if row.model == "compressed")
    assert done.headlines[0].speedup.value > 2
    stored = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert stored == json.loads(json.dumps(done.as_dict()))
    assert stored["environment"]["threads"] == stored["environment"]["torch_threads"] == 1
    assert torch.backends.cpu.get_cpu_capability() in stored["environment"]["cpu"]
    assert stored["inputs"] == [{"name": "x", "shape": [1, 256], "dtype": "float32"}]
    assert all(row["layers"] and row["q1_s"] <= row["median_s"] for row in stored["latencies"])
    assert stored["headlines"][0]["speedup"]["low"] <= stored["headlines"][0]["speedup"]["ratio"]
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "bench.png"}
    assert "in the fastest runtime" in text(done) and "share" not in text(done)
    assert "share" in text(done, layers=True)


def test_accuracy_of_any_number_of_samples(files, tmp_path):
    data = np.random.default_rng(0).normal(size=(7, WIDTH))
    seen = []

    def mean(run):
        seen.append(run(data))
        return float(seen[-1].mean())

    options = {"runtimes": ["onnxruntime"], "time_limit_s": 0.1, "precision": 0.5}
    done = slr_gpu.bench(files, data, batch=3, eval_fn=mean, out=tmp_path / "out", **options)
    expected = Chain(files["dense"])(torch.tensor(data, dtype=torch.float32)).detach().numpy()
    assert np.allclose(seen[0], expected, atol=1e-5)
    assert done.accuracy == {"dense": seen[0].mean(), "compressed": seen[1].mean()}
    assert done.inputs[0]["shape"] == [3, WIDTH] and "accuracy" in text(done)
    for bad in (lambda run: run(np.ones(4)), lambda run: float("nan"), lambda run: None):
        with pytest.raises(ModelError, match="eval_fn"):
            slr_gpu.bench(files, eval_fn=bad, **options)


def test_runner_of_several_inputs_and_outputs():
    class Both(Session):
        def __init__(self):
            pass

        def run(self, inputs):
            assert len(inputs[0]) == 2
            return [inputs[0] + inputs[1], inputs[0]]

    specs = (InputSpec("a", None, None), InputSpec("b", None, None))
    run = Runner(Both(), (np.zeros((2, 1)), np.zeros((2, 1))), specs)
    a, b = np.arange(5.0)[:, None], np.ones((5, 1))
    total, first = run({"b": b, "a": a})
    assert np.array_equal(total, a + b) and np.array_equal(first, a)


def test_a_missing_runtime_is_listed_or_an_error(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    done = slr_gpu.bench(files, time_limit_s=0.1, precision=0.5)
    assert done.runtimes == ["onnxruntime"]
    assert "openvino: not installed: pip install 'slr_gpu[onnx]'" in text(done)
    with pytest.raises(BackendError, match=r"slr_gpu\[onnx\]"):
        slr_gpu.bench(files, runtimes=["openvino"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match="no runtime: onnxruntime not installed"):
        slr_gpu.bench(files)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"slr_gpu\[onnx\]"):
        slr_gpu.bench(files)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "no C++ compiler" in PyTorchCompiled.why_not()


def test_without_matplotlib_json_is_written_and_the_plot_named(files, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = slr_gpu.bench(files, time_limit_s=0.1, precision=0.5, out="out")
    assert done.written == ["bench.json"] and "slr_gpu[plot]" in text(done)
    with pytest.raises(BackendError, match=r"slr_gpu\[plot\]"):
        done.plot("latency.png")
    assert not os.path.exists("latency.png")


# -- files and inputs --------------------------------------------------------------------------


def test_modules_and_pt2(files, tmp_path):
    module = Chain(files["compressed"]).train()
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module.eval(), (torch.ones(2, WIDTH),), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "model.pt2")
    module.train()
    loaded, live = open_source(tmp_path / "model.pt2"), open_source(module)
    assert loaded.format == live.format == TORCH and module.training and not live.module.training
    assert loaded.inputs[0].name == "x" and loaded.inputs[0].shape[1] == WIDTH
    assert not isinstance(loaded.inputs[0].shape[0], int)
    specs = common_inputs([live, loaded, open_source(files["dense"])])
    assert make_inputs(specs, batch=4)[0].shape == (4, WIDTH)
    with pytest.raises(InputError, match="--shape x="):
        make_inputs(live.inputs)
    done = slr_gpu.bench(
        {"module": module, "file": tmp_path / "model.pt2"},
        torch.ones(5, WIDTH),
        runtimes=["pytorch"],
        time_limit_s=0.1,
    )
    assert done.inputs[0]["shape"] == [1, WIDTH] and done.latencies[0].layers == []


def test_inputs():
    free = InputSpec("ids", (None, "length"), np.dtype(np.int64))
    with pytest.raises(InputError, match="--shape ids="):
        make_inputs((free,))
    (ids,) = make_inputs((free,), shapes={"ids": (2, 5)})
    assert ids.shape == (2, 5) and ids.dtype == np.int64 and set(ids.ravel()) <= {0, 1}
    fixed = InputSpec("x", (2, 3), np.dtype(np.float32))
    assert make_inputs((fixed,))[0].shape == (2, 3)
    assert make_inputs((fixed,), np.ones((9, 3)))[0].dtype == np.float32
    for match, options in {
        "x=2x3": {"data": np.ones((2, 4))},
        "1 samples": {"data": np.ones((1, 3))},
        "batch=4": {"batch": 4},
        "x of 1x3": {"shapes": {"x": (1, 3)}},
        "one of x": {"shapes": {"y": (1, 3)}},
        "2 input arrays": {"data": [np.ones(3), np.ones(3)]},
        "no data for x": {"data": {}},
    }.items():
        with pytest.raises(InputError, match=match):
            make_inputs((fixed,), **options)


def test_sizes_are_filled_in_from_the_model_that_fixes_them(tmp_path):
    free = open_source(write_onnx(tmp_path / "free.onnx", 1))
    fixed = open_source(write_onnx(tmp_path / "fixed.onnx", 1, shape=(2,)))
    assert common_inputs([free, fixed])[0].shape == (2, WIDTH)
    for other in ({"name": "z"}, {"width": 16}, {"shape": (3,)}, {"shape": ("a", "b")}):
        wrong = open_source(write_onnx(tmp_path / "wrong.onnx", 1, **other))
        with pytest.raises(InputError, match="same inputs"):
            common_inputs([fixed, wrong])


def test_a_size_below_one_is_free(tmp_path):
    """As some exporters write it."""
    source = open_source(write_onnx(tmp_path / "free.onnx", 1, shape=(-1,)))
    assert source.inputs[0].shape == (None, WIDTH)
    done = slr_gpu.bench({"free": source.path}, batch=2, time_limit_s=0.1, progress=False)
    assert done.inputs[0]["shape"] == [2, WIDTH] and len(done.latencies) == 2


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_timed(files, monkeypatch):
    monkeypatch.setattr("slr_gpu.runtime.measure.open_sessions", None)
    for folder in (files["dense"], files["dense"] / "below"):
        with pytest.raises(InputError, match="expected a folder to write to"):
            slr_gpu.bench(files, out=folder, progress=False)


def test_what_is_measured_outlives_a_profiler_that_fails(files, monkeypatch):
    def profile(session, inputs, calls=10):
        raise RuntimeError("no space left")

    monkeypatch.setattr(RUNTIMES["onnxruntime"], "profile", profile)
    done = slr_gpu.bench(files, time_limit_s=0.1, precision=0.5, progress=False)
    assert "no times of dense's nodes in onnxruntime: RuntimeError: no space left" in text(done)
    assert {bool(row.layers) for row in done.latencies if row.runtime == "openvino"} == {True}
    assert done.headlines


def test_external_weights_must_be_there(tmp_path):
    path = write_onnx(tmp_path / "dense.onnx", 2, external=True)
    data = tmp_path / "dense.onnx.data"
    assert open_source(path).inputs[0].name == "x"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut short"):
        open_source(path)
    data.unlink()
    with pytest.raises(InputError, match="missing"):
        open_source(path)


def test_a_model_no_runtime_opens(files, tmp_path):
    model = onnx.load(files["dense"])
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, "odd.onnx")
    with pytest.raises(InputError, match="NoSuchOperator"):
        slr_gpu.bench({**files, "odd": "odd.onnx"}, time_limit_s=0.1)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"threads": 0}, "threads=0"),
        ({"threads": 10_000}, "at most the"),
        ({"batch": 0}, "batch=0"),
        ({"precision": 0}, "precision=0"),
        ({"time_limit_s": float("nan")}, "time_limit_s"),
        ({"runtimes": ["tflite"]}, "one of pytorch"),
        ({"runtimes": ["pytorch"]}, "format, torch"),
    ],
)
def test_bad_arguments(files, options, match):
    with pytest.raises(InputError, match=match):
        slr_gpu.bench(files, **options)


def test_bad_models(files):
    for models in ({}, [files["dense"]], {"a": 3}, {"a": [files["dense"], files["compressed"]]}):
        with pytest.raises(InputError):
            slr_gpu.bench(models)
    with pytest.raises(InputError, match="format in common"):
        slr_gpu.bench({"a": files["dense"], "b": Chain(files["dense"])}, np.ones((1, WIDTH)))


# -- the command -------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "140"})


def test_command(files, tmp_path, monkeypatch):
    (tmp_path / "bench_eval.py").write_text(
        "import numpy as np\n\ndef accuracy(run):\n"
        f"    return float((run(np.ones((5, {WIDTH}))) > 0).mean())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    np.save("calib.npy", np.ones((6, WIDTH)))
    common = ["--time-limit", "0.2", "--precision", "0.5", "--runtime", "onnxruntime"]
    extra = ["--data", "calib.npy", "--eval", "bench_eval:accuracy", "--layers", "--batch", "2"]
    done = run("dense.onnx", "compressed.onnx", "--out", "out", *common, *extra)
    assert done.exit_code == 0, done.output
    for part in ("compressed", "speed-up", "accuracy", "MatMul", "written to out", "load average"):
        assert part in done.output
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["settings"]["data"] == "given"
    os.mkdir("small")
    os.rename("compressed.onnx", "small/dense.onnx")
    done = run("dense.onnx", "small/dense.onnx", "--shape", f"x=2x{WIDTH}", *common)
    assert done.exit_code == 0 and "small/dense:" in done.output and f"2x{WIDTH}" in done.output


@pytest.mark.parametrize(
    "arguments,match",
    [
        (["missing.onnx"], "missing.onnx"),
        (["empty.onnx"], "empty.onnx"),
        (["cut.onnx"], "cut.onnx"),
        (["text.onnx"], "text.onnx"),
        (["text.pt2"], "text.pt2"),
        (["model.bin"], ".onnx or .pt2"),
        (["other.onnx"], "same inputs"),
        (["compressed.onnx", "--shape", "x:1"], "input=1x3x224x224"),
        (["compressed.onnx", "--shape", "x=1x0"], "input=1x3x224x224"),
        (["compressed.onnx", "--runtime", "tflite"], "tflite"),
        (["compressed.onnx", "--data", "missing.npy"], "missing.npy"),
        (["compressed.onnx", "--eval", "nothing"], "pkg.module:name"),
    ],
)
def test_errors_are_one_line_before_any_timing(files, tmp_path, monkeypatch, arguments, match):
    whole = files["dense"].read_bytes()
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    for name in ("text.onnx", "text.pt2", "model.bin"):
        (tmp_path / name).write_text("not a model")
    write_onnx(tmp_path / "other.onnx", 1, name="z")
    monkeypatch.setattr(sys.modules["slr_gpu.runtime.measure"], "interleave", None)
    done = run("dense.onnx", *arguments, "--out", "out")
    assert done.exit_code == 1
    assert match in done.output and "Traceback" not in done.output
    assert done.output.strip().count("\n") == 0 and not (tmp_path / "out").exists()
