"""Batches: the file of jobs, devices, what is done again and what is not, kills, the summary."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import slr_gpu
from slr_gpu import checkpoint
from slr_gpu.batch import Outcome, Summary, read_jobs, work
from slr_gpu.batch import jobs as job_files
from slr_gpu.batch import run as runs
from slr_gpu.batch.devices import Meter, choose_device, free_bytes, list_gpus, needed_bytes
from slr_gpu.batch.folders import Place
from slr_gpu.cli import app
from slr_gpu.errors import BackendError, InputError
from slr_gpu.prepare import Prepared
from slr_gpu.settings import Settings

NETS = """
import os, signal
import torch
from torch import nn

def seeded(seed, sizes):
    torch.manual_seed(seed)
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])

def one():
    return seeded(0, [10, 24, 24, 24, 5])

def two():
    return seeded(1, [10, 32, 32, 5])

def unseeded():
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 24), nn.Linear(24, 5))

def rows():
    return torch.randn(80, 10, generator=torch.Generator().manual_seed(1))

def killed(model):
    if any(type(layer) not in (nn.Linear, nn.ReLU) for layer in model):
        os.kill(os.getpid(), signal.SIGKILL)  # the compressed one
    return 0.5

def accuracy(model):
    return float(model(rows()).argmax(1).float().mean())

def seconds_of_the_day(model):
    raise OSError("no labels")

number = 3
"""
HEAD = """
out = "results"
[defaults]
samples = 400
"""
MODEL = '[[models]]\nname = "{0}"\nmodel = "batch_nets:{0}"\ndata = "batch_nets:rows"\n'
BUDGET = '[[budgets]]\nname = "{}"\nkeep = {{{}}}\n'
SIX = HEAD + MODEL.format("one") + MODEL.format("two")
SIX += "".join(BUDGET.format(f"b{k}", f"flops = 0.{k}") for k in (5, 6, 7))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "batch_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("batch_nets", None)
    yield tmp_path
    sys.modules.pop("batch_nets", None)


def batch(text):
    with open("jobs.toml", "w") as file:
        file.write(text)
    return read_jobs("jobs.toml")


# -- the file -------------------------------------------------------------------------------------


def test_jobs_are_the_product_less_what_is_excluded(folder):
    save_file({"w": torch.zeros(1)}, "w.safetensors")
    np.save("calib.npy", np.zeros((4, 10)))
    text = HEAD.replace("[defaults]", "measure = false\n[defaults]\nseed = 3\n")
    text += MODEL.format("one").replace("batch_nets:rows", "calib.npy")
    text += 'weights = "w.safetensors"\n' + MODEL.format("two")
    text += BUDGET.format("half", "flops = 0.5") + BUDGET.format("all", "flops = 0.9, params = 1")
    text += '[[settings]]\nname = "s1"\nrefine = {epochs = 2}\nseed = 4\n'
    text += '[[settings]]\nname = "s2"\nsolver = {name = "admm", growth = [1.0, 1.1]}\n'
    text += 'export = ["m.pt2"]\nruntime = "none"\n'
    text += (
        '[[exclude]]\nmodel = "two"\nsettings = "s2"\n[[exclude]]\nbudget = "all"\nmodel="one"\n'
    )
    found = batch(text)
    assert [job.name for job in found.jobs] == [
        *("one-half-s1", "one-half-s2", "two-half-s1", "two-all-s1"),
    ]
    assert found.out == folder / "results"
    first, second = found.jobs[:2]
    assert first.model.weights == str(folder / "w.safetensors")
    assert first.model.data == str(folder / "calib.npy")
    assert first.settings.prepared == Settings(samples=400, seed=4)
    assert first.settings.refinement == slr_gpu.Refinement(epochs=2)
    assert first.settings.allocation == "output" and first.settings.runtime == "auto"
    assert second.settings.prepared.solver == slr_gpu.ADMM(growth=(1.0, 1.1))
    assert second.settings.prepared.seed == 3 and second.settings.runtime is None
    assert second.settings.export == ("m.pt2",)
    assert found.jobs[3].keep == {"flops": 0.9, "params": 1.0}
    # One analysis a model and setting.
    assert len({job.analysis for job in found.jobs}) == 3


WRONG = """
out = 3
colour = "red"
measure = {runtime = "abacus"}
[defaults]
samples = true
[[models]]
name = "a/b"
model = "batch_nets:nothing"
data = "missing.npy"
weights = "missing.safetensors"
[[models]]
name = "two"
model = "batch_nets:number"
data = "no_such_module:rows"
eval = "batch_nets"
epochs = 3
[[models]]
name = "two"
model = "batch_nets:two"
[[models]]
name = "uneven"
model = "batch_nets:two"
data = "uneven"
[[budgets]]
name = "half"
keep = {flops = 1.5}
[[budgets]]
name = "fast"
keep = {seconds = 0.5}
[[settings]]
name = "s"
solver = "magic"
refine = {epochs = 0}
export = ["model.exe"]
loss = "hinge"
threads = 0
[[settings]]
name = "t"
objective = "beauty"
[[settings]]
name = "u"
solver = "grebsmo"
allocation = "output"
[[settings]]
name = "v"
ignore = [1]
seed = -1
[[exclude]]
budget = "tiny"
"""


def test_all_errors_are_found_at_once_and_nothing_is_written(folder):
    (folder / "uneven").mkdir()
    for number in (1, 2):
        np.save(folder / "uneven" / f"{number}.npy", np.zeros((3, number)))
    with pytest.raises(InputError) as caught:
        batch(WRONG)
    text = str(caught.value)
    for expected in (
        "file: got out = 3; expected a string",
        "file: got the key 'colour'",
        "measure: got runtime 'abacus'",
        "defaults: got samples = True; expected a whole number",
        "models 1 ('a/b'): got name = 'a/b'",
        "batch_nets:nothing",
        "missing.npy",
        "missing.safetensors",
        "models 2 ('two'): got model 'batch_nets:number'; expected a function",
        "no_such_module",
        "eval 'batch_nets'; expected pkg.module:name",
        "models 2 ('two'): got the key 'epochs'",
        "models 3 ('two'): got name = 'two' twice",
        "models 3 ('two'): got no data",
        "2.npy of float64 with samples of shape (2,); expected float64 and (1,)",
        "budgets 1 ('half'): got keep={'flops': 1.5}",
        "budgets 2 ('fast'): got keep={'seconds': 0.5}",
        "settings 1 ('s'), solver: got --solver magic",
        "settings 1 ('s'), refine: got epochs=0",
        "settings 1 ('s'), export: got export to 'model.exe'",
        "settings 1 ('s'): got loss = 'hinge'",
        "settings 1 ('s'), threads: got threads=0",
        "settings 2 ('t'): got objective='beauty'",
        "settings 3 ('u'): got allocation='output' with the solver grebsmo",
        "settings 4 ('v'): got ignore = [1]; expected a list of strings",
        "settings 4 ('v'): got settings that fail (expected non-negative integer)",
        "exclude 1: got budget = 'tiny'; expected one of half, fast",
    ):
        assert expected in text, expected
    assert f"{len(text.splitlines()) - 1} errors" in text.splitlines()[0]
    done = CliRunner().invoke(app, ["batch", "jobs.toml"])
    assert done.exit_code == 1 and "settings 2 ('t')" in done.output
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        *("batch_nets.py", "jobs.toml", "uneven"),
    }


@pytest.mark.parametrize(
    "text,match",
    [
        ("out = ", "a TOML file"),
        ('out = "x"', "no models"),
        (HEAD + MODEL.format("one") + "[[budgets]]\nname = 'a'", "no keep"),
        (SIX + "[[exclude]]\n", "exclude 1: got no names"),
        (SIX + '[[exclude]]\nmodel = "one"\n[[exclude]]\nmodel = "two"', "not excluded"),
        (SIX.replace('name = "one"', 'name = "a-b"') + "[[settings]]\nname = 3", "name = 3"),
        (SIX.replace("b5", "b6-x").replace("b7", "b6") + "[[settings]]\nname = 'x'", "twice"),
        (
            SIX + BUDGET.format("t", "latency = 0.5") + "[[settings]]\nname = 'u'\n"
            "allocation = 'uniform'",
            "job 'one-t-u': got a latency budget with allocation='uniform'",
        ),
        (SIX.replace("batch_nets:one", "batch_nets:one' 'x"), "cannot|expected"),
        (SIX + '[[settings]]\nname = "s"\nlatency = {threads = 0}', "threads=0"),
        (SIX + '[[settings]]\nname = "s"\nlatency = {threads = "x"}', "a whole number"),
        (SIX + '[[settings]]\nname = "s"\nheld_out = 0.9', "held_out"),
        (SIX + '[[settings]]\nname = "s"\noverrides = {a = {keep = "x"}}', "keep='x'"),
        (SIX.replace("batch_nets:two", ":two") + "[[budgets]]\nname = 'x'", "2 errors"),
        (SIX.replace("batch_nets:two", "broken_nets:two"), r"ZeroDivisionError.*broken_nets.py:1"),
        (SIX.replace("batch_nets:rows", "empty.npz", 1), "empty.npz with 0 arrays"),
        (SIX.replace("batch_nets:rows", "broken.npz", 1), "broken.npz: .*expected a whole"),
    ],
)
def test_single_errors(folder, text, match):
    (folder / "broken_nets.py").write_text("1 / 0")
    (folder / "broken.npz").write_bytes(b"PK" + bytes(8))
    np.savez(folder / "empty.npz")
    with pytest.raises(InputError, match=match):
        batch(text)


def test_every_solver_passes_the_trial(folder):
    for name in slr_gpu.solvers.SOLVERS:
        found = batch(SIX + f'[[settings]]\nname = "s"\nsolver = "{name}"\n')
        assert found.jobs[0].settings.prepared.solver.name == name


def test_the_documented_file_is_one(folder):
    """The example in the help is read as it stands, but for its names."""
    text = job_files.__doc__.split("\n\n", 2)[2].rsplit("\n\n", 1)[0]
    text = text.replace("networks:vgg", "batch_nets:one").replace("networks:", "batch_nets:")
    np.save("calib.npy", np.zeros((4, 10)))
    save_file({"w": torch.zeros(1)}, "vgg.safetensors")
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    text = text.replace("[[exclude]]", '[[settings]]\nname = "plain"\n[[exclude]]')
    found = batch(text)
    assert [job.name for job in found.jobs] == ["vgg-quarter-plain"]
    assert found.measure.runtime == "onnxruntime"
    help_text = CliRunner().invoke(app, ["batch", "--help"]).output
    assert '[[budgets]]                  # one or more\n    name = "quarter"' in help_text


# -- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "needs,free,busy,expected",
    [
        ([5], {"a": 10, "b": 6}, False, (0, "b")),  # the one that it fills most
        ([20, 5], {"a": 10}, True, (1, "a")),  # the large one waits, a small one goes on
        ([20, 15], {"a": 10}, True, None),
        ([20, 15], {"a": 10, "b": 12}, False, (0, "b")),  # nothing to wait for: tried
        ([], {"a": 1}, False, None),
        ([1], {}, False, None),
    ],
)
def test_choice_of_a_device(needs, free, busy, expected):
    assert choose_device(needs, free, busy) == expected


class FakeNvml(SimpleNamespace):
    """Three devices; the second tells neither energy nor memory."""

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__(open=0, energy=[1000, 0, 5000], used=[10, 0, 30])

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return 3

    def nvmlDeviceGetHandleByIndex(self, index):
        if index > 2:
            raise self.NVMLError("no such device")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle):
        if handle == 1:
            raise self.NVMLError("not supported")
        self.used[handle] += 1
        return SimpleNamespace(free=100 + handle, used=self.used[handle])

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if handle == 1:
            raise self.NVMLError("not supported")
        self.energy[handle] += 2500
        return self.energy[handle]


@pytest.fixture
def nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield fake
    assert fake.open == 0


def test_gpus_that_nvml_tells_of(nvml, monkeypatch):
    assert list_gpus() == [f"GPU-{i}" for i in range(3)]
    assert [free_bytes(uuid) for uuid in list_gpus()] == [100, None, 102]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-0")
    assert list_gpus() == ["GPU-2", "GPU-0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(BackendError, match="no such device"):
        list_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(BackendError, match="none is listed"):
        list_gpus()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BackendError, match="extra cuda13"):
        list_gpus()
    assert free_bytes("GPU-0") is None


def test_energy_and_memory_are_measured_or_absent(nvml):
    with Meter("GPU-2") as meter:
        time.sleep(0.01)
    assert meter.joules == 2.5 and meter.peak_bytes == 31
    for uuid in ("GPU-1", None):
        with Meter(uuid) as meter:
            pass
        assert meter.joules is None and meter.peak_bytes is None


def test_workers_see_their_own_device_alone(nvml, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    before = signal.getsignal(signal.SIGINT)
    places, note = runs._places("auto", None)
    assert [(p.device, p.gpu, p.threads) for p in places] == [
        ("cuda", f"GPU-{i}", 4) for i in range(3)
    ]
    with runs.Worker.__init__.__globals__["_inherited"](places[2]):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-2"
        assert os.environ["OMP_NUM_THREADS"] == "4"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(InputError, match="workers on the CPU alone"):
        runs._places("auto", 2)
    places, note = runs._places("cpu", 5)
    assert [(p.device, p.gpu, p.threads) for p in places] == [("cpu", None, 2)] * 5
    monkeypatch.setitem(sys.modules, "pynvml", None)
    places, note = runs._places("auto", None)
    assert [(p.device, p.threads) for p in places] == [("cpu", 12)] and "on the CPU" in note
    with pytest.raises(BackendError, match="extra cuda13"):
        runs._places("cuda", None)
    for device, workers in (("tpu", None), ("cpu", 0)):
        with pytest.raises(InputError):
            runs._places(device, workers)


def test_memory_that_jobs_need(folder):
    import batch_nets

    wide = batch_nets.seeded(0, [10, 500, 300, 5])
    prepared = Prepared(wide, batch_nets.rows(), Settings(samples=1000), "cpu")
    # Two copies, a batch around the 500 x 300 layer, its rows with two responses, three matrices.
    weights = sum(p.numel() for p in wide.parameters())
    expected = 2**29 + 8 * weights + 8 * 80 * 800 + 4 * 1000 * (500 + 600) + 24 * 500**2
    assert needed_bytes(prepared) == expected


# -- steps of work --------------------------------------------------------------------------------


@pytest.fixture
def place(folder):
    return Place(folder / "results", folder)


def finish(place, jobs):
    """All steps of the jobs of one analysis, as `run_batch` orders them; what was opened."""
    opened = work.open_jobs(place, jobs)
    fits = [job for job in jobs if "fit" in opened.missing.get(job.name, ())]
    if fits and not opened.analysed:
        work.analyse(place, fits[0], opened.facts)
    for job in jobs:
        if job.name in opened.missing:
            work.fit(place, job, opened.facts)
    return opened


def test_jobs_share_an_analysis_and_equal_compress(place, monkeypatch):
    jobs = batch(SIX).jobs[:3]
    count = []
    measure = work.measure
    monkeypatch.setattr(work, "measure", lambda *a: count.append(1) or measure(*a))
    opened = finish(place, jobs)
    assert len(count) == 1 and opened.missing == {job.name: {"fit"} for job in jobs}
    import batch_nets

    for job in jobs:
        files = {path.name for path in place.job(job).iterdir()}
        assert files == {"model.safetensors", "plan.json", "report.json", "job.json"}
        result = slr_gpu.compress(
            batch_nets.one(), batch_nets.rows(), job.keep, samples=400, progress=False
        )
        wanted, got = result.model.state_dict(), load_file(place.job(job) / "model.safetensors")
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)
        marker = json.loads((place.job(job) / "job.json").read_text())
        with torch.no_grad():
            held = batch_nets.rows()[9::10]
            log_p, log_q = (
                m(held).double().log_softmax(1) for m in (batch_nets.one(), result.model)
            )
        kl = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
        assert marker["output"] == {"loss": "kl", "value": pytest.approx(kl, rel=1e-3)}
        assert marker["joules"] is None and marker["peak_bytes"] is None
    # A second time nothing is missing; with a file lost, that job is.
    assert finish(place, jobs).missing == {job.name: set() for job in jobs}
    (place.job(jobs[1]) / "model.safetensors").unlink()
    assert work.open_jobs(place, jobs).missing[jobs[1].name] == {"fit"}
    assert work.open_jobs(place, jobs).analysed


def test_results_of_other_facts_are_kept_unless_forced(place):
    job = batch(SIX).jobs[0]
    finish(place, [job])
    before = (place.job(job) / "model.safetensors").read_bytes()
    for old, new, what in (
        ("0.5", "0.55", "keep.flops was 0.5, now 0.55"),
        ("samples = 400", "samples = 300", "settings.samples was 400, now 300"),
        ("batch_nets:one", "batch_nets:two", "model differs"),
    ):
        changed = batch(SIX.replace(old, new)).jobs[0]
        assert changed.name == job.name
        opened = work.open_jobs(place, [changed])
        assert not opened.missing and what in opened.refused[job.name]
        assert "--force" in opened.refused[job.name]
    assert (place.job(job) / "model.safetensors").read_bytes() == before
    forced = Place(place.out, place.folder, force=True)
    assert finish(forced, [changed]).missing == {job.name: {"fit"}}
    assert (place.job(job) / "model.safetensors").read_bytes() != before
    # What is begun counts as well.
    shutil.rmtree(place.job(job))
    place.pieces(job, finish(place, [job]).facts)
    (place.job(job) / "job.json").unlink()
    assert "model differs" in work.open_jobs(place, [changed]).refused[job.name]


def test_other_versions_keep_results_but_no_pieces(place, monkeypatch):
    done, begun = batch(SIX).jobs[:2]
    place.pieces(begun, finish(place, [done]).facts)
    monkeypatch.setattr(checkpoint, "program_version", lambda: "0.0.1, sources 01234567")
    opened = work.open_jobs(place, [done, begun])
    assert opened.missing == {done.name: set()} and not opened.analysed
    assert "now '0.0.1, sources 01234567'" in opened.refused[begun.name]
    forced = Place(place.out, place.folder, force=True)
    assert finish(forced, [done, begun]).missing == {done.name: set(), begun.name: {"fit"}}


def test_budgets_out_of_reach_are_refused_before_the_analysis(place):
    jobs = batch(SIX.replace("0.6", "0.01")).jobs[:3]
    opened = work.open_jobs(place, jobs)
    assert "at least" in opened.refused["one-b6"] and set(opened.missing) == {"one-b5", "one-b7"}


def test_factories_that_differ_at_every_call(place):
    job = batch(SIX.replace("batch_nets:one", "batch_nets:unseeded")).jobs[0]
    opened = work.open_jobs(place, [job])
    with pytest.raises(InputError, match="batch_nets:unseeded.*model differs.*seed"):
        work.analyse(place, job, opened.facts)


def test_accuracy_is_measured_again_for_another_function(place):
    def judged(line):
        first, second = SIX.split("\n[[models]]", 2)[1:]
        return batch(HEAD + "[[models]]" + first + line + "\n[[models]]" + second).jobs[0]

    job = judged("")
    assert finish(place, [job]).accuracy is None
    before = (place.job(job) / "model.safetensors").stat().st_mtime_ns
    job = judged('\neval = "batch_nets:accuracy"')
    opened = finish(place, [job])
    import batch_nets

    assert opened.accuracy == pytest.approx(batch_nets.accuracy(batch_nets.one()))
    marker = work.fit(place, job, opened.facts)
    model = slr_gpu.load(place.job(job), batch_nets.one)
    assert marker["accuracy"]["value"] == pytest.approx(batch_nets.accuracy(model))
    assert (place.job(job) / "model.safetensors").stat().st_mtime_ns == before
    job = judged('\neval = "batch_nets:seconds_of_the_day"')
    with pytest.raises(OSError):
        work.open_jobs(place, [job])


def test_exports_and_latencies_are_made_once(place):
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    text = SIX.replace("[defaults]", "measure = {time_limit_s = 0.2}\n[defaults]\n")
    found = batch(text.replace("samples", 'runtime = "none"\nsamples'))
    job = found.jobs[0]
    opened = finish(place, [job])
    assert opened.missing == {job.name: {"fit", "export"}}
    marker = work.export(place, job, opened.facts)
    assert marker["exports"]["model.onnx"]["error"] < 1e-4
    assert work.open_jobs(place, [job]).missing == {job.name: set()}
    latency = work.measure_latency(place, [job], opened.facts, found.measure)
    assert set(latency) == {"dense", job.name}
    assert latency[job.name]["q1_s"] <= latency[job.name]["median_s"] <= latency[job.name]["q3_s"]
    again = work.measure_latency(place, [job], opened.facts, found.measure)
    assert again == json.loads(json.dumps(latency))
    onnx = place.job(job) / "model.onnx"
    onnx.write_bytes((place.out / "latency" / "one.onnx").read_bytes())
    assert work.measure_latency(place, [job], opened.facts, found.measure) != again
    onnx.unlink()
    assert work.open_jobs(place, [job]).missing == {job.name: {"export"}}
    work.export(place, job, opened.facts)
    assert onnx.exists() and work.open_jobs(place, [job]).missing == {job.name: set()}


# -- the loop -------------------------------------------------------------------------------------


class FakeWorker:
    """Answers when it is asked to, with what the test says."""

    all: list[FakeWorker] = []
    log: list[tuple] = []
    answers: dict[str, tuple] = {}

    def __init__(self, place):
        self.place, self.task, self.stopped = place, None, False
        self.connection, self._end = multiprocessing.Pipe()
        self._end.send(self.answers.get(f"start {place.device}", ("ready", None)))
        FakeWorker.all.append(self)

    def send(self, kind, arguments):
        jobs = arguments[0] if isinstance(arguments[0], list) else [arguments[0]]
        busy = [w for w in FakeWorker.all if w.task and not w.stopped]
        self.task = kind
        self.log.append((kind, [job.name for job in jobs], self.place.gpu, len(busy)))
        self._end.send((kind, [job.name for job in jobs]))

    def receive(self):
        kind, names = self.connection.recv()
        if kind in ("ready", "broken"):
            return kind, names
        self.task = None
        answer = self.answers.get(f"{kind} {names[0]}") or self.answers.get(kind)
        if answer == "interrupt":
            raise KeyboardInterrupt
        if isinstance(answer, tuple):
            return answer
        return "done", answer(names) if callable(answer) else answer

    def has_ended(self):
        return False

    def stop(self):
        self.stopped = True
        self.connection.close()
        self._end.close()


@pytest.fixture
def fake(monkeypatch, folder):
    monkeypatch.setattr(FakeWorker, "all", [])
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(FakeWorker, "answers", {})
    monkeypatch.setattr(runs, "Worker", FakeWorker)
    monkeypatch.setattr(Summary, "draw", lambda self, path: None)
    made = {"seconds": 1.0, "joules": None, "peak_bytes": None}
    marker = {
        "achieved": {"params": 0.5, "flops": 0.5},
        "flops": 10,
        "output": {"loss": "kl", "value": 0.1},
        "accuracy": {"eval": None, "value": None},
        "resumed": False,
        "device": "cpu",
        "threads": 1,
        **made,
    }
    FakeWorker.answers |= {"analyse": made, "plan": None, "fit": marker, "export": marker}

    def opened(names):
        missing = {name: {"fit", "export"} for name in names}
        needed = 50 if names[0].startswith("one") else 10
        return work.Opened({}, needed, False, None, {"flops": 5.0}, missing, {})

    FakeWorker.answers["open"] = opened
    return FakeWorker


def test_what_is_timed_runs_alone_and_last(fake, monkeypatch):
    text = SIX + BUDGET.format("fast", "latency = 0.5")
    text = text.replace("[defaults]", "measure = true\n[defaults]\n")
    pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    seconds = {"median_s": 1.0, "q1_s": 0.9, "q3_s": 1.1, "speedup": None}
    fake.answers["measure"] = lambda names: {name: seconds for name in ("dense", *names)}
    summary = runs.run_batch(batch(text), device="cpu", workers=3, progress=False)
    assert summary.ok and len(fake.all) == 3 and all(w.stopped for w in fake.all)
    kinds = [kind for kind, *_ in fake.log]
    assert kinds.count("analyse") == 2 and kinds.count("fit") == 8 and kinds.count("plan") == 2
    assert all(busy == 0 for kind, _, _, busy in fake.log if kind in ("plan", "export", "measure"))
    assert any(busy for kind, _, _, busy in fake.log if kind == "fit")
    assert max(i for i, kind in enumerate(kinds) if kind == "fit") < kinds.index("export")
    assert kinds[-2:] == ["measure", "measure"]
    assert all(job.latency == seconds for job in summary.jobs)
    assert summary.dense["two"] == {"accuracy": None, "flops": 10.0, "latency": seconds}


def test_jobs_go_where_there_is_memory(fake, nvml, monkeypatch):
    free = {"GPU-0": 20, "GPU-1": 0, "GPU-2": 60}
    monkeypatch.setattr(runs, "free_bytes", free.__getitem__)
    summary = runs.run_batch(batch(SIX), progress=False)
    assert summary.ok
    for kind, names, gpu, _ in fake.log:
        if kind in ("analyse", "fit"):
            assert gpu == "GPU-2" if names[0].startswith("one") else gpu != "GPU-1"
    assert not any(job.notes for job in summary.jobs)
    # Nowhere enough: tried where most is free, and said.
    free.update({"GPU-2": 30})
    fake.log.clear()
    summary = runs.run_batch(batch(SIX), progress=False)
    assert summary.ok and "had 0.0 GiB" in summary["one-b5"].notes[0]
    tried = {gpu for kind, names, gpu, _ in fake.log if kind == "fit" and names[0] == "one-b5"}
    assert tried == {"GPU-2"}


def test_failures_stay_with_their_jobs(fake):
    fake.answers["analyse one-b5"] = ("failed", "no such thing")
    fake.answers["fit two-b6"] = ("dead", "its worker was killed by signal 9")
    summary = runs.run_batch(batch(SIX), device="cpu", workers=2, progress=False)
    assert not summary.ok and len(fake.all) == 3  # one took the dead one's place
    status = {job.name: (job.status, job.reason) for job in summary.jobs}
    assert status == {
        **{f"one-b{k}": ("failed", "its analysis: no such thing") for k in (5, 6, 7)},
        "two-b5": ("done", ""),
        "two-b6": ("failed", "its worker was killed by signal 9"),
        "two-b7": ("done", ""),
    }
    with open("results/summary.json") as file:
        assert json.load(file)["jobs"][4]["reason"] == status["two-b6"][1]


def test_interrupted_runs_stop_their_workers(fake):
    fake.answers["fit one-b6"] = "interrupt"
    with pytest.raises(KeyboardInterrupt):
        runs.run_batch(batch(SIX), device="cpu", workers=2, progress=False)
    assert fake.all and all(worker.stopped for worker in fake.all)
    with open("results/summary.json") as file:
        states = [job["status"] for job in json.load(file)["jobs"]]
    assert "pending" in states and "failed" not in states


def test_gpus_that_do_not_work(fake, nvml, capsys):
    fake.answers["start cuda"] = ("broken", "no CuPy")
    summary = runs.run_batch(batch(SIX))
    assert summary.ok and {gpu for _, _, gpu, _ in fake.log} == {None}
    assert fake.all[-1].place.threads == len(os.sched_getaffinity(0))
    said = capsys.readouterr().err
    assert said.count("no CuPy") == 3 and "on the CPU instead" in said
    with pytest.raises(BackendError, match="no CuPy"):
        runs.run_batch(batch(SIX), device="cuda")
    assert all(worker.stopped for worker in fake.all)


def test_picture_and_table_show_what_was_measured(folder):
    figure = pytest.importorskip("matplotlib.figure", reason="needs the plot extra")
    summary = Summary([Outcome.of(job) for job in batch(SIX).jobs])
    for number, job in enumerate(summary.jobs[:4]):
        job.status, job.achieved = "done", {"params": 0.5, "flops": 0.6}
        job.flops, job.output = 1_000_000 * number, {"loss": "kl", "value": 0.1 * number}
    timed = {"median_s": 2e-3, "q1_s": 1e-3, "q3_s": 3e-3, "speedup": {"ratio": 4.0}}
    summary.dense = {
        "one": {"accuracy": 0.9, "flops": 9e6, "latency": {**timed, "speedup": None}},
        "two": {"accuracy": None, "flops": 9e6, "latency": None},
    }

    def drawn(model):
        axis = figure.Figure().subplots()
        summary._panel(model, axis)
        points = [tuple(map(float, p)) for line in axis.lines for p in line.get_xydata()]
        return axis.get_xlabel(), axis.get_ylabel(), points

    flops, loss = "FLOPs of one sample, millions", "output kl on held-out samples"
    assert drawn("one") == (flops, loss, [(0.0, 0.0), (1.0, 0.1), (2.0, 0.2)])
    assert drawn("two") == (flops, loss, [(3.0, pytest.approx(0.3))])
    for job in summary.jobs[:3]:
        job.accuracy, job.latency = 0.8, timed
    wanted = [(2.0, 0.8)] * 3 + [(2.0, 0.9)]
    assert drawn("one") == ("latency, ms", "accuracy", wanted)
    summary.jobs[1].latency = None  # one that is not known: none is used
    assert drawn("one")[0] == flops
    summary.jobs[5].status, summary.jobs[5].reason = "failed", "no memory"
    console = Console(width=120, file=io.StringIO())
    summary.print(console)
    text = console.file.getvalue()
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "60.0 %" in lines["one-b5"] and "2 (1-3)" in lines["one-b5"]
    assert "4.00x" in lines["one-b5"] and "4.00x" not in lines["one-b6"]
    assert "two-b7: failed, no memory" in text and "two-b6 (pending)" in text
    assert "not measured: seconds, energy, peak memory" in text


def test_one_run_a_folder(fake):
    found = batch(SIX)
    with runs._lock(found.out), pytest.raises(InputError, match="another batch"):
        runs.run_batch(found, device="cpu", progress=False)
    assert runs.run_batch(found, device="cpu", progress=False).ok


# -- processes ------------------------------------------------------------------------------------


def test_command(folder):
    """A job that is done, one that cannot be, and one whose process is killed when it is judged."""
    text = HEAD + MODEL.format("one") + MODEL.format("two") + 'eval = "batch_nets:killed"\n'
    text += BUDGET.format("half", "flops = 0.5") + BUDGET.format("tiny", "flops = 0.01")
    (folder / "jobs.toml").write_text(text)
    run = ["batch", "jobs.toml", "--device", "cpu", "--workers", "1"]
    command = [sys.executable, "-m", "slr_gpu", *run]
    paths = os.pathsep.join([str(folder), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 4  # one a job
    assert "one-half: done, kept" in done.stderr and "one-tiny: failed, got keep" in done.stderr
    assert "two-half: failed, its worker was killed by signal 9 (SIGKILL)" in done.stderr
    assert "one-tiny (failed)" in done.stdout and "not measured: latency" in done.stdout
    summary = json.loads((folder / "results" / "summary.json").read_text())
    assert {job["name"]: job["status"] for job in summary["jobs"]} == {
        "one-half": "done",
        "one-tiny": "failed",
        "two-half": "failed",
        "two-tiny": "failed",
    }
    # What was killed after the fit need only be judged.
    found = read_jobs("jobs.toml")
    place = Place(found.out, folder)
    opened = work.open_jobs(place, [found.jobs[2]])
    assert opened.missing == {"two-half": set()} and opened.accuracy == 0.5
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    assert (folder / "results" / "summary.png").read_bytes()[:4] == b"\x89PNG"


FORKING = """
import multiprocessing, os, pathlib, signal, time
import batch_nets

def helper():
    pathlib.Path("helper").write_text(str(os.getpid()))
    time.sleep(120)

def make():
    multiprocessing.get_context("fork").Process(target=helper, daemon=True).start()
    return batch_nets.one()

def rows():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_is_missed_though_a_process_of_it_lives_on(folder):
    (folder / "forking_nets.py").write_text(FORKING)
    text = HEAD + MODEL.format("one").replace("batch_nets:", "forking_nets:").replace(
        "forking_nets:one", "forking_nets:make"
    )
    (folder / "jobs.toml").write_text(text + BUDGET.format("half", "flops = 0.5"))
    command = [sys.executable, "-m", "slr_gpu", "batch", "jobs.toml", "--device", "cpu"]
    paths = os.pathsep.join([str(folder), *sys.path])
    try:
        # What it prints goes to files: the helper would keep pipes open.
        with open(folder / "said", "w") as said:
            environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
            done = subprocess.run(command, env=environment, stderr=said, stdout=said, timeout=60)
    finally:
        if (folder / "helper").exists():
            os.kill(int((folder / "helper").read_text()), signal.SIGKILL)
    assert done.returncode == 1
    assert "one-half: failed, its worker was killed by signal 9" in (folder / "said").read_text()


# Forks a run for every line it reads, so that torch is imported once.
SERVER = """
import os, sys, torch, torch._dynamo
import matplotlib.figure
import batch_nets
import slr_gpu.batch.workers
slr_gpu.batch.workers.START = "fork"
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        slr_gpu.batch.run_batch(line.strip(), device="cpu", workers=2, progress=False)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_batches_end_in_the_same_bits(folder):
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    (folder / "jobs.toml").write_text(SIX)
    (folder / "whole.toml").write_text(SIX.replace("results", "whole"))
    paths = os.pathsep.join([str(folder), *sys.path])
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def begin(file):
        print(file, file=server.stdin, flush=True)
        return int(server.stdout.readline())

    def end():
        return int(server.stdout.readline())

    def pieces():
        found = (folder / "results").rglob("*")
        return {str(path) for path in found if path.name[0] != "." and path.is_file()}

    def results(name):
        return {
            str(path.relative_to(folder / name)): path.read_bytes()
            for kind in ("model.safetensors", "plan.json", "analysis.json")
            for path in (folder / name).rglob(kind)
        }

    with contextlib.closing(server.stdin), contextlib.closing(server.stdout):
        begin("whole.toml")
        assert end() == 0
        rng, codes = np.random.default_rng(0), []
        for number in range(4):
            # At a random moment soon after some more pieces are there, however fast it runs.
            enough, waited = len(pieces()) + rng.integers(1, 5), time.perf_counter()
            child = begin("jobs.toml")
            while len(pieces()) < enough and time.perf_counter() - waited < 20:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            with contextlib.suppress(ProcessLookupError):  # it may have finished
                # Once the parent alone: its workers must not outlive it.
                (os.kill if number == 1 else os.killpg)(child, signal.SIGKILL)
            codes.append(end())
            waited = time.perf_counter()
            with contextlib.suppress(ProcessLookupError):
                while True:
                    os.killpg(child, 0)
                    assert time.perf_counter() - waited < 20, "workers are left"
                    time.sleep(0.01)
        assert codes.count(-signal.SIGKILL) >= 3
        begin("jobs.toml")
        assert end() == 0
    server.wait()
    wanted = results("whole")
    assert len(wanted) == 14 and results("results") == wanted
    assert not list((folder / "results").rglob("checkpoint"))
    summaries = [
        json.loads((folder / n / "summary.json").read_text()) for n in ("results", "whole")
    ]
    for job, whole in zip(*(summary["jobs"] for summary in summaries), strict=True):
        for name in ("name", "status", "achieved", "output"):
            assert job[name] == whole[name]
