"""Calibration data in every form: the same batches in every pass, and what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typer.testing import CliRunner

import slr_gpu
from slr_gpu.batches import Named
from slr_gpu.calibration import as_batches
from slr_gpu.capture import Sampler, Use, record_references
from slr_gpu.graph import find_sites
from slr_gpu.mixtures import Mixtures
from slr_gpu.sensitivity import held_out_batches

DATA = torch.randn(50, 2, 6, 6, generator=torch.Generator().manual_seed(0))
BATCH = 8


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(432, 5),
    ).eval()


MODEL = network()


class Numbered(Dataset):
    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        return DATA[index].numpy(), index  # what follows the model's argument is dropped


def shards(folder, sizes=(20, 0, 1, 29)):
    for number, part in enumerate(DATA.split(list(sizes))):
        np.save(folder / f"{number}.npy", part.numpy())
    return folder


def memory_mapped(folder):
    np.save(folder / "calib.npy", DATA.numpy())
    return np.load(folder / "calib.npy", mmap_mode="r")


SOURCES = {
    "tensor": lambda folder: DATA,
    "array": lambda folder: DATA.numpy(),
    "memory-mapped": memory_mapped,
    "list": lambda folder: list(DATA.split(BATCH)),
    "list with labels": lambda folder: [(x, torch.zeros(len(x))) for x in DATA.split(BATCH)],
    "iterator": lambda folder: iter(DATA.split(BATCH)),
    "function": lambda folder: lambda: iter(DATA.split(BATCH)),
    "function of a tensor": lambda folder: lambda: DATA,
    "Dataset": lambda folder: Numbered(),
    "DataLoader": lambda folder: DataLoader(TensorDataset(DATA), BATCH),
    "folder": shards,
    "file": lambda folder: (memory_mapped(folder), folder / "calib.npy")[1],
}
# Those that are in memory are left there.
STREAMED = ("function", "Dataset", "DataLoader", "folder", "file")


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_batches_in_every_pass(kind, limit, tmp_path):
    if kind == "iterator" and limit == 0:
        return  # refused, below
    batches = as_batches(SOURCES[kind](tmp_path), MODEL, BATCH, limit)
    assert batches.held == (limit is None or kind not in STREAMED)
    expected = DATA.split(BATCH)
    assert batches.sizes == [len(x) for x in expected] and batches.nbytes == DATA.nbytes
    for _ in range(2):
        got = list(batches)
        assert len(got) == len(batches) == len(expected)
        assert all(torch.equal(x, y) for (x,), y in zip(got, expected, strict=True))
    # Numbers stay global in a subset.
    part = batches.subset([5, 2])
    assert [number for number, _ in part.numbered()] == [2, 5] and part.sizes == batches.sizes
    assert all(torch.equal(batch[0], expected[number]) for number, batch in part.numbered())
    assert torch.equal(batches.first[0], expected[0])
    assert batches.leading(9).numbers == [0, 1]


@pytest.mark.parametrize("limit", [None, 0])
def test_some_samples_of_each_batch(limit):
    batches = as_batches(lambda: iter(DATA.split(BATCH)), MODEL, BATCH, limit)
    fitted, held = held_out_batches(batches, 0.1)
    chosen = torch.arange(50) % 10 == 9
    assert torch.equal(torch.cat([x for (x,) in held]), DATA[chosen])
    assert torch.equal(torch.cat([x for (x,) in fitted]), DATA[~chosen])
    assert list(held.sizes) == [len(x) for (x,) in held] == [1] * 5
    assert sum(fitted.sizes) == 45 and fitted.held == batches.held


def test_batches_by_name_are_streamed_too():
    def loader():
        yield from ({"input": x} for x in DATA.split(25))

    batches = as_batches(loader, MODEL, BATCH, 0)
    assert not batches.held
    assert all(isinstance(b, Named) and b.names == ("input",) for b in batches)


def test_a_memory_mapped_array_is_not_copied(tmp_path):
    array = memory_mapped(tmp_path)
    begin = array.__array_interface__["data"][0]
    for (x,) in as_batches(array, MODEL, BATCH):
        assert begin <= x.data_ptr() < begin + array.nbytes


def test_compress_gives_the_same_bits_from_memory_and_from_files(tmp_path):
    settings = dict(samples=300, batch_size=BATCH, progress=False)
    whole = slr_gpu.compress(network(), DATA, {"flops": 0.5}, **settings)
    shards(tmp_path)
    settings |= {"memory_limit": 0, "checkpoint": tmp_path / "pieces"}
    streamed = slr_gpu.compress(network(), tmp_path, {"flops": 0.5}, **settings)
    wanted = whole.model.state_dict()
    for name, value in streamed.model.state_dict().items():
        assert torch.equal(value, wanted[name])
    # The fingerprint of the same data is the same, however it is read.
    settings |= {"resume": True, "memory_limit": None}
    slr_gpu.compress(network(), DATA, {"flops": 0.5}, **settings)


def test_refinement_of_streamed_data(tmp_path):
    """In parts: every sample once an epoch, the same whenever asked, with the original's answer."""
    batches = as_batches(shards(tmp_path), MODEL, BATCH, 0)
    settings = {"sets": 2, "batch_size": 5, "limit": 2 * batches.nbytes}
    feed = Mixtures(MODEL, batches, **settings)
    assert len(feed.parts) == 2 and len(feed) == 9
    plain = list(feed.of_epoch(0))
    seen = torch.cat([x for (x,), _ in plain])
    assert len(plain) == 9 and len(seen.unique(dim=0)) == 45  # the rest of each part is dropped
    assert all((DATA == x).flatten(1).all(1).any() for x in seen)
    again = list(Mixtures(MODEL, batches, **settings).of_epoch(0))
    for ((x,), wanted), ((y,), _) in zip(plain, again, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(wanted[0], MODEL(x))


def test_refinement_judges_streamed_data_as_held_data():
    run = dict(samples=300, held_out=0.0, batch_size=BATCH, progress=False, loss="mse")
    run |= {"allocation": "uniform", "refine": slr_gpu.Refinement(epochs=2, batch_size=10)}
    held = slr_gpu.compress(network(), DATA, {"flops": 0.5}, **run)
    streamed = slr_gpu.compress(
        network(), lambda: iter(DATA.split(BATCH)), {"flops": 0.5}, memory_limit=0, **run
    )
    refined = streamed.report.refinement
    assert refined["before"] == held.report.refinement["before"]
    assert refined["after"] < refined["before"]


# -- fewer rows than samples ---------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, BATCH])
def test_few_rows_of_many_samples(batch_size):
    with torch.no_grad():
        site = find_sites(MODEL, lambda: MODEL(DATA[:1]))["2"]
    batches = as_batches(list(DATA.split(batch_size)), MODEL, BATCH)
    references = record_references(MODEL, batches, [site], Sampler(20, batches.sizes, 0))
    assert len(references.linear_targets["2"]) == 20
    samples = []
    for use in references.uses["2"]:
        index, position, sample = Sampler(20, batches.sizes, 0).pick(site, use, 0)
        assert len(index) == len(position) == len(sample) and (np.diff(sample) > 0).all()
        samples += sample.tolist()
    assert len(set(samples)) == 20 and max(samples) < 50
    # The rows are those of these samples.
    with torch.no_grad():
        rows = MODEL[:3](DATA).flatten(2).transpose(1, 2)
    for sample, row in zip(samples, references.linear_targets["2"], strict=True):
        assert np.abs(rows[sample].numpy() - row).max(1).min() < 1e-5


def test_a_sample_has_a_row_where_there_are_enough():
    with torch.no_grad():
        site = find_sites(MODEL, lambda: MODEL(DATA[:1]))["2"]
    picked = Sampler(50, [25, 25], 0).pick(site, Use(1, 25, 36, (25, 2, 6, 6)), 0)[2]
    assert picked.tolist() == list(range(25, 50))


# -- what is refused -----------------------------------------------------------------------------


def poisoned(number):
    data = DATA.clone()
    data[number, 1, 2, 3] = float("nan")
    return data


def refused(data, match, limit=None, passes=1):
    with pytest.raises(slr_gpu.InputError, match=match):
        batches = as_batches(data, MODEL, BATCH, limit)
        for _ in range(passes):
            for _ in batches:
                pass


def test_nan_is_found_with_its_place(tmp_path):
    refused(poisoned(21), r"batch 2, in its sample 5 \(sample 21 of all\)")
    refused(lambda: iter(poisoned(21).split(BATCH)), "batch 2, in its sample 5", limit=0)
    for number, part in enumerate(poisoned(21).split(20)):
        np.save(tmp_path / f"{number}.npy", part)
    where = re.escape(f"sample 21 of all, row 1 of {tmp_path / '1.npy'}")
    refused(tmp_path, where, limit=0)


def test_shards_that_do_not_fit_together(tmp_path):
    shards(tmp_path)
    np.save(tmp_path / "4.npy", np.zeros((3, 2, 6, 7), "f4"))
    refused(tmp_path, r"4.npy of float32 with samples of shape \(2, 6, 7\)")
    np.save(tmp_path / "4.npy", np.zeros((3, 2, 6, 6), "f8"))
    refused(tmp_path, "4.npy of float64")
    np.save(tmp_path / "4.npy", np.array(["text"]))
    refused(tmp_path, "4.npy of <U4")
    whole = (tmp_path / "3.npy").read_bytes()
    (tmp_path / "4.npy").unlink()
    (tmp_path / "3.npy").write_bytes(whole[:-5])
    refused(tmp_path, "3.npy: .*a whole .npy or .npz file")
    (tmp_path / "3.npy").write_bytes(b"")
    refused(tmp_path, "3.npy: .*a whole .npy or .npz file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "without .npy files")


def test_a_file_cut_short_between_two_passes(tmp_path):
    batches = as_batches(shards(tmp_path), MODEL, BATCH, 0)
    whole = (tmp_path / "3.npy").read_bytes()
    (tmp_path / "3.npy").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(slr_gpu.InputError, match="3.npy"):
        list(batches)


def test_iterators_that_are_too_large(tmp_path):
    refused(iter(DATA.split(BATCH)), "cannot be started again.*Pass the function", limit=1000)
    assert as_batches(iter(DATA.split(BATCH)), MODEL, BATCH, DATA.nbytes).held


def test_sources_that_change(tmp_path):
    torch.manual_seed(0)
    shuffled = DataLoader(TensorDataset(DATA), BATCH, shuffle=True)
    refused(shuffled, "another batch 0.*shuffle=False", limit=0)
    assert as_batches(shuffled, MODEL, BATCH).held  # read once, it does not matter
    refused(lambda: iter((DATA + torch.rand(1)).split(BATCH)), "another batch 0", limit=0)
    counts = iter((7, 5, 7))
    refused(lambda: iter(DATA.split(BATCH)[: next(counts)]), "no batch 5", limit=0)
    once = iter(DATA.split(BATCH))
    refused(lambda: once, "no batch 0", limit=0)


def test_what_is_no_data():
    refused(lambda n: DATA, "missing a required argument: 'n'")
    refused(MODEL, "calibration_data of Sequential")
    refused(lambda: iter(()), "0 calibration sample")
    for limit in (-1, "much", True):
        refused(DATA, "memory_limit=", limit=limit)


# -- from a shell --------------------------------------------------------------------------------


def test_command_line(tmp_path, monkeypatch):
    from slr_gpu.cli import app

    (tmp_path / "streamed_model.py").write_text(
        "import torch\nfrom torch import nn\ndef make():\n    torch.manual_seed(0)\n    return"
        " nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1),"
        " nn.ReLU(), nn.Flatten(), nn.Linear(432, 5))\ndef batches():\n    g ="
        " torch.Generator().manual_seed(0)\n    for _ in range(4):\n        yield"
        " torch.randn(10, 2, 6, 6, generator=g)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "spill").mkdir()
    (tmp_path / "shards").mkdir()
    shards(tmp_path / "shards")
    options = ["--model", "streamed_model:make", "--keep", "flops=0.6", "--allocation", "uniform"]

    def run(*more):
        return CliRunner().invoke(app, ["compress", *options, *more])

    for data in ("shards", "streamed_model:batches"):
        limits = ["--spill-dir", "spill", "--memory-limit", "1kB"]
        done = run("--data", data, "--out", f"out-{data[:6]}", *limits)
        assert done.exit_code == 0, done.output
        assert not list((tmp_path / "spill").iterdir())
    for more, match in (
        (["--spill-dir", "missing"], "spill_dir='missing'"),
        (["--memory-limit", "much"], "--memory-limit 'much'"),
    ):
        done = run("--data", "shards", "--out", "other", *more)
        assert done.exit_code == 1 and match in done.output.replace("\n", " ")
        assert not (tmp_path / "other").exists()


def test_arrays_that_run_backwards():
    array = np.arange(12.0, dtype=np.float32).reshape(6, 2)[::-1]
    (batch,) = as_batches(array, nn.Linear(2, 2), 10)
    assert np.array_equal(batch[0].numpy(), array)
