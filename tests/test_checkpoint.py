"""Checkpoints: a killed run goes on to the same bits, another run is refused, files are whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import slr_gpu
from slr_gpu.checkpoint import Store, fingerprint
from slr_gpu.prepare import Prepared
from slr_gpu.program import program_version
from slr_gpu.settings import Settings

MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 12), nn.ReLU(), nn.Linear(12, 5))

def data():
    return torch.randn(80, 2, 6, 6, generator=torch.Generator().manual_seed(1))
"""
# Forks a run for every line it reads, so that torch is imported once.
SERVER = """
import os, sys, torch, slr_gpu, killed_model
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        result = slr_gpu.compress(
            killed_model.make(), killed_model.data(), {"flops": 0.5}, samples=800, progress=False,
            refine=slr_gpu.Refinement(epochs=3, batch_size=20), checkpoint="pieces", resume=True,
        )
        result.save("out")
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "killed_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("killed_model", None)
    return tmp_path


@pytest.fixture
def server(folder):
    """``begin()`` starts a run and gives its process id, ``end()`` waits for its exit code."""
    paths = os.pathsep.join([str(folder), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def begin():
        print("run", file=process.stdin, flush=True)
        return int(process.stdout.readline())

    yield begin, lambda: int(process.stdout.readline())
    process.stdin.close()
    process.stdout.close()
    process.wait()


def check_whole(folder):
    """Whatever has its final name can be read."""
    for path in (folder / "pieces").rglob("*"):
        if path.name.startswith("."):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), framework="numpy") as file:
                assert file.keys()


def test_killed_runs_end_in_the_same_bits(folder, server):
    begin, end = server
    begin()
    assert end() == 0
    wanted = (folder / "out" / "model.safetensors").read_bytes()

    def pieces():
        return {p.name for p in (folder / "pieces").rglob("*") if p.name[0] != "." and p.is_file()}

    all_pieces = pieces()
    shutil.rmtree(folder / "pieces")
    shutil.rmtree(folder / "out")
    rng, codes, sizes = np.random.default_rng(0), [], []
    for _ in range(10):
        # At a random moment soon after up to two more pieces are there, however fast it runs.
        enough, waited = len(pieces()) + rng.integers(3), time.perf_counter()
        child = begin()
        while len(pieces()) < enough and time.perf_counter() - waited < 20:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        with contextlib.suppress(ProcessLookupError):  # it may have finished
            os.kill(child, signal.SIGKILL)
        codes.append(end())
        check_whole(folder)
        sizes.append(len(pieces()))
    begin()
    assert end() == 0
    # Most were killed, at different points, and later ones began where earlier ones were.
    assert codes.count(-signal.SIGKILL) >= 5
    assert len(set(sizes)) >= 3 and sizes == sorted(sizes)
    assert (folder / "out" / "model.safetensors").read_bytes() == wanted
    assert pieces() == all_pieces


def small():
    torch.manual_seed(0)
    sizes = [(6, 12), (12, 12), (12, 12), (12, 3)]
    return nn.Sequential(*[m for a, b in sizes for m in (nn.Linear(a, b), nn.ReLU())][:-1]).eval()


@pytest.fixture
def data():
    return torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


def test_finished_layers_are_not_fitted_again(data, tmp_path, monkeypatch):
    module = sys.modules["slr_gpu.carry_out"]
    run = {"allocation": "uniform", "checkpoint": tmp_path / "pieces", "progress": False}
    first = slr_gpu.compress(small(), data, {"params": 0.7}, **run)

    def refuse(*args, **settings):
        raise AssertionError("fitted again")

    monkeypatch.setattr(module, "fit", refuse)
    again = slr_gpu.compress(small(), data, {"params": 0.7}, resume=True, **run)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    # Without resume the pieces are gone, and the work begins anew.
    with pytest.raises(AssertionError, match="fitted again"):
        slr_gpu.compress(small(), data, {"params": 0.7}, **run)


@pytest.mark.parametrize(
    "change,match",
    [
        ({"samples": 50}, "settings.samples was 15000, now 50"),
        ({"keep": {"params": 0.8}}, "keep.params was 0.7, now 0.8"),
        ({"allocation": "uniform"}, "allocation was 'output', now 'uniform'"),
        ({"solver": slr_gpu.Majorize(iterations=3)}, "settings.solver.iterations was 20, now 3"),
        ({"refine": True}, "refine was None"),
        ({"data": 1}, "calibration data differs"),
        ({"model": 1}, "model differs"),
    ],
)
def test_other_runs_are_refused_and_say_what_changed(data, tmp_path, change, match):
    run = {"checkpoint": tmp_path, "progress": False}
    slr_gpu.compress(small(), data, {"params": 0.7}, **run)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    model, change = small(), {"keep": {"params": 0.7}, **change}
    if change.pop("data", 0):
        data = data.clone()
        data[7, 2] += 1e-6
    if change.pop("model", 0):
        with torch.no_grad():
            model[2].weight[3, 1] += 1e-6
    with pytest.raises(slr_gpu.InputError, match="another run") as caught:
        slr_gpu.compress(model, data, resume=True, **run, **change)
    assert match in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_pieces_of_another_version_are_refused(data, tmp_path, monkeypatch):
    module, cache = sys.modules["slr_gpu.checkpoint"], tmp_path / "cache"
    run = {"checkpoint": tmp_path / "pieces", "progress": False}
    slr_gpu.compress(small(), data, {"params": 0.7}, **run)
    slr_gpu.analyze(small(), data, cache=cache, progress=False)
    slr_gpu.compress(small(), data, {"params": 0.7}, resume=True, **run)
    monkeypatch.setattr(module, "program_version", lambda: "0.0.1, sources 01234567")
    with pytest.raises(slr_gpu.InputError, match="slr_gpu was .*, now '0.0.1, sources 01234567'"):
        slr_gpu.compress(small(), data, {"params": 0.7}, resume=True, **run)
    slr_gpu.analyze(small(), data, cache=cache, progress=False)
    assert len(list(cache.iterdir())) == 2


def test_a_version_is_that_of_its_sources(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "solver.py").write_text("RATE = 1")
    first = program_version.__wrapped__(tmp_path)
    assert program_version.__wrapped__(tmp_path) == first and first != program_version()
    (tmp_path / "part" / "solver.py").write_text("RATE = 2")
    assert program_version.__wrapped__(tmp_path) != first


def test_resume_needs_a_folder(data):
    with pytest.raises(slr_gpu.InputError, match="resume without checkpoint"):
        slr_gpu.compress(small(), data, {"params": 0.7}, resume=True, progress=False)


def test_analyses_are_cached_by_what_they_depend_on(data, tmp_path, monkeypatch):
    module = sys.modules["slr_gpu.sensitivity"]
    measured = []
    plain = module._measure
    monkeypatch.setattr(module, "_measure", lambda *a: (measured.append(1), plain(*a)))
    run = {"cache": tmp_path, "progress": False}
    first = slr_gpu.analyze(small(), data, **run)
    assert len(measured) == 2
    again = slr_gpu.analyze(small(), data, **run)
    assert len(measured) == 2 and again.as_dict() == first.as_dict()
    slr_gpu.analyze(small(), data, samples=70, **run)
    assert len(measured) == 4


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_holds_other_things_is_refused(data, tmp_path, resume):
    (tmp_path / "precious.txt").write_text("mine")
    run = {"checkpoint": tmp_path, "resume": resume, "progress": False}
    with pytest.raises(slr_gpu.InputError, match="'precious.txt' and is no checkpoint"):
        slr_gpu.compress(small(), data, {"params": 0.7}, **run)
    Store(tmp_path).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_run_that_was_killed_at_once_can_begin_again(tmp_path):
    (tmp_path / ".fingerprint.json.x7f").write_text("{")
    Store.open(tmp_path, {"a": 1}, resume=True).save_json("piece", 1)
    assert Store.open(tmp_path, {"a": 1}, resume=True).load_json("piece") == 1


def test_stores_of_a_folder_are_cleared_and_nothing_else(tmp_path):
    Store.clear_named(tmp_path / "none")
    for number in range(2):
        Store.named(tmp_path / "all", {"a": number}).save_json("piece", number)
    (tmp_path / "all" / "mine").mkdir()
    Store.clear_named(tmp_path / "all")
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["mine"]
    (tmp_path / "all" / "mine").rmdir()
    Store.clear_named(tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_fingerprints_see_structure_and_modes_apart(data):
    def facts(model):
        return fingerprint(Prepared(model, data, Settings(), "cpu"))

    same, other = facts(small()), small()
    assert facts(small()) == same
    other[1] = nn.Tanh()
    assert facts(other)["model"] != same["model"]


class Reading(nn.Module):
    """Its forward reads what no state_dict holds."""

    def __init__(self):
        super().__init__()
        self.a = small()
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.slope, self.sizes, self.shift = 0.1, {"a": (1, 2)}, torch.zeros(3)

    def forward(self, x, more=0.0):
        return self.slope * self.a(x * self.scale) + self.shift + more


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.scale.fill_(2),
        lambda model: setattr(model, "slope", 0.2),
        lambda model: setattr(model, "sizes", {"a": (1, 3)}),
        lambda model: model.shift.add_(1),
        lambda model: setattr(model.a, "slope", 0.1),
    ],
)
def test_fingerprints_see_what_forward_reads(data, change):
    def facts(change):
        torch.manual_seed(0)
        model = Reading()
        change(model)
        return fingerprint(Prepared(model, data, Settings(), "cpu"))["model"]

    assert facts(lambda model: model.eval()) == facts(lambda model: None) != facts(change)


def test_fingerprints_see_arguments_that_are_no_tensors(data):
    def facts(**more):
        return fingerprint(Prepared(Reading(), [{"x": data, **more}], Settings(), "cpu"))

    found = [facts(), facts(more=0.0), facts(more=0.5), facts(more=torch.tensor(0.5))]
    assert len({one["calibration data"] for one in found}) == 4
    assert facts(more=0.5) == found[2] | {"model": found[2]["model"]}
