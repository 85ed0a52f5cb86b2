"""Activations that wait on disk: to the bit what they were, and nothing is left behind."""

from __future__ import annotations

import errno
import importlib
import os
import platform
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from architectures import calibration, make
from torch import nn

import slr_gpu
import slr_gpu.spill
from slr_gpu.calibration import as_batches
from slr_gpu.frontier import Frontier
from slr_gpu.spill import Spill


class Residual(nn.Module):
    """Sums, in place; a parameter of the model itself; a tensor that waits for long."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.scale, self.head = nn.Parameter(torch.randn(4, 1, 1)), nn.Linear(4, 3)

    def forward(self, x):
        first = F.relu_(self.a(x))
        y = self.b(first) * self.scale
        first += 1  # seen by all that share it
        y = F.relu(self.c(y) + first)
        return self.head((y + x).mean((2, 3)))


class Concat(nn.Module):
    """Concatenation, and the parts of a split tensor, one of which waits."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(3, 5, 1)
        self.c, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        left, right = self.a(x).chunk(2, 1)
        y = self.c(torch.cat([self.b(left), right], 1))
        return self.head(F.relu(y, inplace=True).amax((2, 3)))


def networks():
    torch.manual_seed(0)
    x = torch.randn(22, 4, 6, 6)
    yield "residual", Residual().eval(), (x,), ["a", "b", "c", "head"]
    yield "concat", Concat().eval(), (x,), ["a", "b", "c", "head"]
    for name in ("VGG", "ResNet-18", "DenseNet", "BERT"):
        model = make(name)
        kinds = (nn.Conv2d, nn.Linear)
        yield (
            name,
            model,
            calibration(name, 6),
            [n for n, m in model.named_modules() if isinstance(m, kinds)],
        )


NETWORKS = {name: rest for name, *rest in networks()}


def in_order(model, data, names):
    """The layers by the order of their first calls, those that are called at all."""
    seen, handles = [], []
    for name in names:
        hook = model.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: seen.append(name)
        )
        handles.append(hook)
    with torch.no_grad():
        model(*(item[:2] for item in data))
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(seen))


@pytest.mark.parametrize("limit", [0, 20_000])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_with_and_without_files(name, limit, tmp_path):
    model, data, names = NETWORKS[name]
    names = in_order(model, data, names)
    batches = as_batches(list(zip(*(item.split(4) for item in data), strict=True)), model, 4)
    memory = Frontier(model, batches, names)
    with Spill(tmp_path, limit) as spill:
        disk = Frontier(model, batches, names, spill)
        assert disk.traced == memory.traced
        for layer in names:
            pairs = list(zip(memory.inputs(layer), disk.inputs(layer), strict=True))
            assert pairs
            for (i, x), (j, y) in pairs:
                assert i == j and torch.equal(x, y) and x.stride() == y.stride()
            if disk.traced:
                files = list(tmp_path.glob("*/*"))
                assert len(files) == (len(batches) if limit == 0 else len(files))
                assert spill.limit == limit
            module = model.get_submodule(layer)
            with torch.no_grad():
                outputs = zip(
                    memory.outputs(layer, module), disk.outputs(layer, module), batches, strict=True
                )
                for x, y, batch in outputs:
                    assert torch.equal(x, y)
                    torch.testing.assert_close(x, model(*batch), rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.iterdir())


def test_little_stays_in_memory(tmp_path):
    """What waits on disk keeps no tensor, and files go when their batch goes on."""
    model, data, names = NETWORKS["residual"]
    batches = as_batches(data[0], model, 5)
    with Spill(tmp_path, 0) as spill:
        frontier = Frontier(model, batches, names, spill)
        for name in names:
            for number, _ in frontier.inputs(name):
                assert all(s.waiting.values is None for s in frontier._states.values())
                assert not frontier._interpreter.env
                leaves = frontier._states[number].waiting.leaves
                assert not any(isinstance(leaf, torch.Tensor) for leaf in leaves)
            assert len(list(tmp_path.glob("*/*"))) == len(batches)


def test_shared_storages_strides_and_other_values(tmp_path):
    x = torch.arange(24.0).reshape(2, 3, 4)
    values = [x.transpose(0, 2), (x[:, 1], 7, "text"), {"a": [x, None]}, torch.Size((1, 2))]
    with Spill(tmp_path, 0) as spill:
        kept = spill.put(values)
        assert kept.nbytes == x.nbytes  # counted once
        copied, taken = spill.copied(kept), spill.take(kept)
        assert not list(tmp_path.glob("*/*"))
    for found in (copied, taken):
        assert found[0].stride() == values[0].stride() and torch.equal(found[0], values[0])
        assert found[1][1:] == (7, "text") and found[3] == (1, 2) and found[2]["a"][1] is None
        found[2]["a"][0].add_(1)
        assert torch.equal(found[0], values[0] + 1) and torch.equal(found[1][0], values[1][0] + 1)
    copied = Spill(limit=10**6)
    kept = copied.put(values)
    copied.copied(kept)[0].add_(1)
    assert torch.equal(copied.peek(kept)[0], values[0])


def compress(data, folder, **settings):
    model, *_ = NETWORKS["residual"]
    return slr_gpu.compress(
        model, data, {"flops": 0.7}, samples=300, batch_size=6, keep_ends=False, multiple=1,
        progress=False, spill_dir=folder, **settings,
    )  # fmt: skip


def test_compress_with_and_without_files(tmp_path, monkeypatch):
    data = NETWORKS["residual"][1][0]
    written = []
    write = Spill._write
    monkeypatch.setattr(Spill, "_write", lambda *a: written.append(a[2]) or write(*a))
    whole = compress(data, tmp_path)
    assert not written
    spilled = compress(data, tmp_path, memory_limit=0)
    assert len(written) > 8 and not list(tmp_path.iterdir())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, spilled.model.state_dict()[name])


def test_errors_leave_nothing(tmp_path, monkeypatch):
    data = NETWORKS["residual"][1][0]

    def fails(*_, **__):
        assert list(tmp_path.glob("*/*"))
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("slr_gpu.carry_out"), "fit", fails)
    with pytest.raises(KeyboardInterrupt):
        compress(data, tmp_path, memory_limit=0, allocation="uniform")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("batches", [0, 3])
def test_full_disk(batches, tmp_path, monkeypatch):
    """A real ENOSPC, from a device that is always full, after some batches were written."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    save, done = torch.save, []

    def full(tensors, file):
        done.append(1)
        if len(done) <= batches:
            return save(tensors, file)
        with open("/dev/full", "wb", buffering=0) as device:
            save(tensors, device)

    monkeypatch.setattr(slr_gpu.spill.torch, "save", full)
    data = NETWORKS["residual"][1][0]
    with pytest.raises(slr_gpu.InputError) as error:
        compress(data, tmp_path, memory_limit=0, checkpoint=tmp_path / "pieces")
    text = str(error.value)
    assert os.strerror(errno.ENOSPC) in text and str(tmp_path) in text and "--spill-dir" in text
    size = (22 - 3 * 6) if batches else 6  # of the batch whose input was being written
    assert f"writing {size * 4 * 36 * 4} bytes" in text
    assert {path.name for path in tmp_path.iterdir()} <= {"pieces"}


def test_folders_that_do_not_work(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(slr_gpu.InputError, match="spill_dir="):
            compress(NETWORKS["residual"][1][0], folder)


KILLED = """
import sys, time, torch
from slr_gpu.spill import Spill
spill = Spill(sys.argv[1], 0)
kept = [spill.put([torch.zeros(1000)]) for _ in range(3)]
print("written", flush=True)
time.sleep(60)
"""


def test_a_killed_run_is_tidied_up_by_the_next(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "written\n"
        [folder] = tmp_path.iterdir()
        assert len(list(folder.iterdir())) == 3
        Spill(tmp_path).close()
        assert folder.exists()  # it still runs
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    other = tmp_path / folder.name.replace(f".{platform.node()}.", ".another.host.")
    other.mkdir()
    unlike = tmp_path / "slr_gpu-spill.mine"
    unlike.mkdir()
    began = time.monotonic()
    Spill(tmp_path).close()
    assert time.monotonic() - began < 5
    assert {path.name for path in tmp_path.iterdir()} == {other.name, unlike.name}
