"""Layers whose rows pass by in blocks: the same fits as from arrays, and what is refused."""

from __future__ import annotations

import json
import sys
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from device_double import DoubleOps, Streams
from safetensors.numpy import save_file
from typer.testing import CliRunner

import slr_gpu
from slr_gpu import LayerIO, streamed
from slr_gpu.blocks import checksum
from slr_gpu.errors import InputError
from slr_gpu.ops import NumpyOps, memory
from slr_gpu.ops.memory import DeviceMemory, host_free
from slr_gpu.problem import ResponseProblem
from slr_gpu.shards import Shards

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import streaming

ROWS, OUTPUTS, CHANNELS, TAPS = 600, 8, 6, 4
COLUMNS = CHANNELS * TAPS


def arrays(dtype="f8", rows=ROWS, seed=0):
    """Weight, bias, inputs of a distorted prefix, and the responses wanted before a ReLU."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(COLUMNS, COLUMNS)) * 0.9 ** np.arange(COLUMNS)[:, None]
    clean = rng.normal(size=(rows, COLUMNS)) @ mix + 3 * rng.normal(size=COLUMNS)
    weight = rng.normal(size=(OUTPUTS, CHANNELS, TAPS)) / COLUMNS**0.5
    bias = rng.normal(size=OUTPUTS)
    wanted = clean @ weight.reshape(OUTPUTS, -1).T + bias
    inputs = clean + 0.1 * rng.normal(size=clean.shape)
    return tuple(a.astype(dtype) for a in (weight, bias, inputs, wanted))


def cut(size, *whole):
    """A function that makes an iterator over blocks of so many rows."""

    def blocks():
        for start in range(0, len(whole[0]), size):
            block = tuple(None if a is None else a[start : start + size] for a in whole)
            yield block if len(block) > 1 else block[0]

    return blocks


def same(one, other, rel=1e-6):
    assert other.structure == one.structure and other.status is one.status
    assert len(other.history) == len(one.history)
    np.testing.assert_array_equal(other.columns, one.columns)
    assert other.error == pytest.approx(one.error, rel=rel)
    assert other.held_out_error == pytest.approx(one.held_out_error, rel=rel, nan_ok=True)
    scale = np.abs(one.to_dense()).max()
    np.testing.assert_allclose(other.to_dense(), one.to_dense(), atol=10 * rel * scale)
    np.testing.assert_allclose(other.bias, one.bias, atol=100 * rel * scale)


REQUESTS = {
    "majorize": {"keep": 0.4},
    "majorize, rotated": {"keep": 0.4, "form": "rotated"},
    "majorize, spatial, sizes": {"channels": 1, "basis_rows": 3, "rank": 2, "form": "rotated"},
    "admm": {"keep": 0.4, "solver": slr_gpu.ADMM(iterations=15)},
    "admm, penalties": {"lambda1": 0.05, "lambda2": 0.05, "relative": True,
                        "solver": slr_gpu.ADMM(iterations=15)},
    "zhang": {"keep": 0.4, "solver": slr_gpu.Zhang(iterations=(4, 4))},
    "whitened svd": {"keep": 0.4, "solver": slr_gpu.WhitenedSVD()},
    "diagonal svd": {"keep": 0.4, "solver": slr_gpu.WhitenedSVD(scaling="diagonal")},
    "channel pruning": {"keep": 0.4, "solver": slr_gpu.ChannelPruning()},
    "magnitude": {"keep": 0.4, "solver": slr_gpu.Magnitude(reconstruct=True)},
    "grebsmo": {"keep": 0.4, "form": "entries",
                "solver": slr_gpu.Grebsmo(smoothing=5, iterations=3, rounds=3)},
}  # fmt: skip


# -- the same as from arrays ---------------------------------------------------------------------


@pytest.mark.parametrize("given", ["targets", "linear_targets", "nothing"])
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_fits_are_those_of_arrays(request_, given):
    weight, bias, X, Z = arrays()
    Y, Z = (np.maximum(Z, 0) if given == "targets" else None), Z
    Z = Z if given == "linear_targets" else None
    whole = LayerIO(weight, bias, X, Y, linear_targets=Z)
    passing = LayerIO.from_blocks(weight, bias, cut(77, X, Y, Z))
    same(slr_gpu.fit(whole, **request_), slr_gpu.fit(passing, **request_))


@pytest.mark.parametrize("size", [1, 13, 599, 10_000])
def test_the_cut_of_the_blocks_does_not_matter(size):
    """Rows are cut anew for every sum: to the last bit the same, whatever blocks they come in."""
    weight, bias, X, Z = arrays("f4")
    request = {"channels": 1, "basis_rows": 3, "rank": 2}
    cuts = (cut(100, X, None, Z), cut(size, X, None, Z))
    one, other = (slr_gpu.fit(LayerIO.from_blocks(weight, bias, c), **request) for c in cuts)
    for name in ("columns", "A", "U", "V", "bias"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_float32_as_from_arrays():
    """To the rounding of float32, which responses that are computed again enlarge."""
    weight, bias, X, Z = arrays("f4")
    request = {"columns": 8, "rank": 2, "ridge": 1e-2}
    one = slr_gpu.fit(LayerIO(weight, bias, X, linear_targets=Z), **request)
    other = slr_gpu.fit(LayerIO.from_blocks(weight, bias, cut(50, X, None, Z)), **request)
    np.testing.assert_allclose(other.to_dense(), one.to_dense(), atol=1e-7)
    one = slr_gpu.fit(LayerIO(weight, bias, X), **request)
    other = slr_gpu.fit(LayerIO.from_blocks(weight, bias, cut(50, X)), **request)
    same(one, other, rel=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "identity"])
@pytest.mark.parametrize("objective", ["activation", "linear"])
def test_responses_that_the_blocks_do_not_bring(activation, objective):
    weight, bias, X, Z = arrays()
    request = {"columns": 8, "rank": 2, "ridge": 1e-3, "objective": objective}
    for Y, Z_given in ((None, None), (np.tanh(Z), None), (None, Z), (np.tanh(Z), Z)):
        whole = LayerIO(weight, bias, X, Y, activation, linear_targets=Z_given)
        passing = LayerIO.from_blocks(weight, bias, cut(123, X, Y, Z_given), activation)
        same(slr_gpu.fit(whole, **request), slr_gpu.fit(passing, **request))


def test_a_long_way_from_the_first_mean():
    """Centring afterwards loses nothing: inputs far from zero that hardly vary."""
    weight, bias, X, _ = arrays()
    X = (1000 + X).astype("f4")
    whole, passing = LayerIO(weight, bias, X), LayerIO.from_blocks(weight, bias, cut(50, X))
    settings = {"ops": NumpyOps(), "held_out": 0.1}
    one, other = ResponseProblem(whole, **settings), ResponseProblem(passing, **settings)
    np.testing.assert_allclose(other.x_mean, one.x_mean, rtol=1e-12)
    exact = X[whole.split(0.1)[0]].astype("f8")
    exact -= exact.mean(axis=0)
    for problem in (one, other):
        np.testing.assert_allclose(problem.scatter, exact.T @ exact, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(other.channel_gram, one.channel_gram, rtol=1e-5)
    assert other.rho == pytest.approx(one.rho, rel=1e-5)
    assert other.linear_energy == pytest.approx(one.linear_energy, rel=1e-3)


def test_few_rows_and_many_columns(monkeypatch):
    """Fewer rows than columns are kept; so are those of a problem that works by rows."""
    weight, bias, X, Z = arrays(rows=20)
    whole = LayerIO(weight, bias, X, linear_targets=Z)
    passing = LayerIO.from_blocks(weight, bias, cut(7, X, None, Z))
    same(slr_gpu.fit(whole, keep=0.4), slr_gpu.fit(passing, keep=0.4))
    monkeypatch.setattr("slr_gpu.problem.WIDEST", 20)
    monkeypatch.setattr("slr_gpu.problem.MOST_ROWS", 18)
    weight, bias, X, Z = arrays()
    whole = LayerIO(weight, bias, X, linear_targets=Z)
    passing = LayerIO.from_blocks(weight, bias, cut(70, X, None, Z))
    same(slr_gpu.fit(whole, keep=0.4), slr_gpu.fit(passing, keep=0.4))


def test_samples_and_thinned_rows(monkeypatch):
    """Samples stay together, and estimates on few rows take the same few rows."""
    monkeypatch.setattr(streamed, "ESTIMATE_ROWS", 100)
    weight, bias, X, Z = arrays()
    ids = np.repeat(np.arange(60), 10)
    whole = LayerIO(weight, bias, X, linear_targets=Z, sample_ids=ids)
    blocks = cut(70, X, None, Z)
    passing = LayerIO.from_blocks(weight, bias, blocks, sample_ids=ids)
    one, other = (ResponseProblem(io, ops=NumpyOps()) for io in (whole, passing))
    np.testing.assert_allclose(other.held.X, one.held.X, atol=1e-12)
    passes = passing.blocks.passes
    for rows in (100, 30):
        thin, thinned = one.thinned(rows), other.thinned(rows)
        np.testing.assert_allclose(thinned.samples.X, thin.samples.X, atol=1e-12)
        np.testing.assert_array_equal(thinned.samples.Z, thin.samples.Z)
        # The usual step costs no pass.
        assert passing.blocks.passes == passes + (rows == 30)
    np.testing.assert_allclose(other.samples.X, one.samples.X, atol=1e-12)
    np.testing.assert_array_equal(other.samples.Y, one.samples.Y)
    with pytest.raises(InputError, match="sample_ids"):
        LayerIO.from_blocks(weight, bias, blocks, sample_ids=ids[:-1])


def test_held_out_rows_above_the_limit_are_thinned(monkeypatch):
    weight, bias, X, Z = arrays()
    monkeypatch.setattr(streamed, "KEPT_BYTES", 20 * 8 * (OUTPUTS + COLUMNS))
    passing = LayerIO.from_blocks(weight, bias, cut(70, X, None, Z))
    problem = ResponseProblem(passing, ops=NumpyOps())
    held = passing.split(0.1)[1]
    some = held[:: -(-len(held) // 20)]
    assert len(some) <= 20 < len(held)
    np.testing.assert_allclose(problem.held.X, X[some] - problem.x_mean, atol=1e-12)
    found = slr_gpu.fit(passing, keep=0.4)
    assert f"judged on {len(some)} of {len(held)} held-out rows" in found.notes


def test_on_a_device_that_takes_blocks(monkeypatch):
    """Copied there block by block, and cut smaller when its memory runs out."""
    monkeypatch.setattr(memory.HostMemory, "block_rows", lambda self, usual, most, row: 512)
    weight, bias, X, Z = arrays()
    passing = LayerIO.from_blocks(weight, bias, cut(70, X))
    request = {"columns": 8, "rank": 2, "ridge": 1e-3}
    ours = slr_gpu.fit(passing, **request)
    ops = DoubleOps(rows=150)
    monkeypatch.setattr(sys.modules["slr_gpu.fit"], "get_ops", lambda device: ops)
    with pytest.warns(RuntimeWarning, match="blocks of"):
        theirs = slr_gpu.fit(passing, device="cuda", **request)
    same(ours, theirs)
    assert max(ops.memory.sizes) <= 150


def test_passes_of_the_default_fit():
    """Counted: a pass over a large set is dear."""
    weight, bias, X, Z = arrays()
    passing = LayerIO.from_blocks(weight, bias, cut(100, X, None, Z))
    assert passing.blocks.passes == 1
    found = slr_gpu.fit(passing, keep=0.4, form="rotated", ridge=1e-3)
    # Means and scales; scatter and correlation; the start and every iteration; the final error.
    tried = len(found.history)
    assert 1 + 2 + 1 + tried + 1 <= passing.blocks.passes <= 1 + 2 + 1 + 2 * tried + 1


# -- sources -------------------------------------------------------------------------------------


class Restartable:
    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()


def test_kinds_of_sources(tmp_path):
    weight, bias, X, Z = arrays("f4")
    Y = np.maximum(Z, 0)
    request = {"columns": 8, "rank": 2, "ridge": 1e-2}
    expected = slr_gpu.fit(LayerIO(weight, bias, X, Y), **request).to_dense()
    np.save(tmp_path / "X.npy", X)
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    named = [{"inputs": x, "targets": y} for x, y in cut(90, X, Y)()]
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    for source in (
        cut(90, X, Y),
        list(cut(90, X, Y)()),
        Restartable(cut(90, X, Y)),
        named,
        {"inputs": mapped, "targets": Y},
        torch.utils.data.DataLoader(dataset, batch_size=50),
    ):
        found = slr_gpu.fit(LayerIO.from_blocks(weight, bias, source), **request)
        np.testing.assert_allclose(found.to_dense(), expected, atol=1e-5)
    one = LayerIO.from_blocks(weight, bias, mapped)
    assert (one.rows, one.dtype, one.blocks.given) == (ROWS, np.float32, (True, False, False))
    assert "rows=600" in repr(one)
    halves = LayerIO.from_blocks(weight, bias, cut(90, X.astype("f2")))
    assert halves.dtype == np.float32


def test_large_memory_maps_pass_by(tmp_path, monkeypatch):
    weight, bias, X, Z = arrays("f4")
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    assert LayerIO(weight, bias, mapped).blocks is None
    monkeypatch.setattr(NumpyOps.memory, "limit", 10**5, raising=False)
    passing = LayerIO(weight, bias, mapped, linear_targets=Z)
    assert passing.blocks is not None
    expected = slr_gpu.fit(LayerIO(weight, bias, X, linear_targets=Z), columns=8, rank=2)
    np.testing.assert_allclose(
        slr_gpu.fit(passing, columns=8, rank=2).to_dense(), expected.to_dense(), atol=1e-6
    )
    with pytest.raises(InputError, match="rows.*as many"):
        LayerIO(weight, bias, mapped, linear_targets=Z[:-1])


def test_free_memory_of_the_machine():
    free = host_free()
    assert free is None or 2**20 < free < 2**50
    small = memory.HostMemory()
    small.limit = 100
    assert small.holds(50) and not small.holds(51)


def write(folder, kind, X, Y, names=("a", "b", "c")):
    """Three shards."""
    for name, x, y in zip(names, np.array_split(X, 3), np.array_split(Y, 3), strict=True):
        if kind == "safetensors":
            save_file({"inputs": x, "targets": y}, folder / f"{name}.safetensors")
        elif kind == "pairs":
            np.save(folder / f"inputs-{name}.npy", x)
            np.save(folder / f"targets-{name}.npy", y)
        else:
            np.save(folder / f"{name}.npy", x)


@pytest.mark.parametrize("kind", ["safetensors", "pairs", "inputs alone"])
def test_shards(tmp_path, kind):
    weight, bias, X, Z = arrays("f4")
    Y = np.maximum(Z, 0)
    write(tmp_path, kind, X, Y)
    (tmp_path / "notes.txt").write_text("no rows")
    shards = Shards(tmp_path, block_bytes=4096)
    assert shards.rows == ROWS and len(list(shards)) > 10
    for whole, place in ((X, 0), (Y, 1)):
        if kind == "inputs alone" and place:
            assert next(iter(shards))[1] is None
            continue
        np.testing.assert_array_equal(np.concatenate([b[place] for b in shards]), whole)
    passing = LayerIO.from_blocks(weight, bias, slr_gpu.open_shards(tmp_path))
    wanted = None if kind == "inputs alone" else Y
    request = {"columns": 8, "rank": 2, "ridge": 1e-2}
    same(
        slr_gpu.fit(LayerIO(weight, bias, X, wanted), **request),
        slr_gpu.fit(passing, **request),
        rel=1e-5,
    )


# -- bad input -----------------------------------------------------------------------------------


def refused(source, *words):
    weight, bias, *_ = arrays("f4")
    with pytest.raises(InputError) as error:
        slr_gpu.fit(LayerIO.from_blocks(weight, bias, source), columns=8, rank=2)
    for word in (*words, "expected"):
        assert word in str(error.value), str(error.value)


def test_arrays_by_name_may_be_lists():
    weight, bias, X, _ = arrays("f8")
    plain, listed = (LayerIO.from_blocks(weight, bias, {"inputs": x}) for x in (X, X.tolist()))
    one, other = (slr_gpu.fit(layer_io, columns=8, rank=2) for layer_io in (plain, listed))
    np.testing.assert_allclose(one.to_dense(), other.to_dense(), rtol=1e-3, atol=1e-5)


def test_sources_that_cannot_be_restarted():
    _, _, X, _ = arrays("f4")
    blocks = cut(100, X)
    refused(blocks(), "generator", "function that makes it")
    refused(iter([X]), "iterator")
    refused(map(np.asarray, [X]), "map")
    refused(3, "int")
    refused({}, "no arrays")
    once = blocks()
    refused(lambda: once, "pass 2", "after 0 block(s)", "a new iterator")


def test_sources_that_change():
    _, _, X, _ = arrays("f4")
    calls = []

    def shuffled():
        calls.append(1)
        yield from cut(100, X[np.random.default_rng(len(calls)).permutation(ROWS)])()

    def single_number():
        calls.append(1)
        other = X.copy()
        other[457, 3] += len(calls) * 1e-3
        yield from cut(100, other)()

    def shorter():
        calls.append(1)
        yield from cut(100, X[: ROWS - 100 * len(calls)])()

    def longer():
        calls.append(1)
        yield from cut(100, np.concatenate([X] * len(calls)))()

    def recut():
        calls.append(1)
        yield from cut(100 + len(calls), X)()

    for source, words in (
        (shuffled, ("block 0 (from row 0 on)", "other rows")),
        (single_number, ("block 4 (from row 400 on)", "pass 2")),
        (shorter, ("the end, after 4 block(s)",)),
        (longer, ("a block more", "block 6 (from row 600 on)")),
        (recut, ("block 0",)),
    ):
        calls.clear()
        refused(source, *words)


def test_checksums_see_the_order_of_rows_and_single_bits():
    X = np.arange(35, dtype="f4").reshape(7, 5)
    first = checksum((X, None, None))
    assert first == checksum((X.copy(), None, None))
    other = X.copy()
    other[6, 4] = np.nextafter(other[6, 4], 0)
    assert len({first, checksum((other,)), checksum((X[::-1].copy(),)), checksum((X, X))}) == 4


def test_blocks_that_do_not_fit():
    weight, bias, X, Z = arrays("f4")

    def changed(number, block):
        blocks = list(cut(100, X, Z)())
        blocks[number] = block
        return blocks

    refused(changed(3, (X[:100, :-1], Z[:100])), "block 3 (from row 300 on)", "(100, 23)")
    refused(changed(0, (X[:100, :-1], Z[:100])), "block 0", "(100, 23)")
    refused(changed(3, (X[:100], Z[:99])), "block 3", "targets", "(99, 8)")
    refused(changed(2, (X[:100].astype("f8"), Z[:100])), "block 2", "float64", "float32")
    refused(changed(2, (X[:100] + 1j, Z[:100])), "block 2", "complex")
    refused(changed(0, (X[:100].astype(str), Z[:100])), "block 0", "dtype")
    refused(changed(2, X[:100]), "block 2", "no targets")
    refused([X, (X, Z)], "block 1", "also targets")
    refused([{"inputs": X, "outputs": Z}], "outputs")
    refused([(X, Z, Z, Z)], "4 arrays")
    refused([{"targets": Z}], "no inputs")
    refused([X[0]], "(24,)")
    refused([], "0 calibration row(s)")
    refused([X[:1]], "1 calibration row(s)")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_named_with_block_and_row(value):
    _, _, X, Z = arrays("f4", rows=20_000)
    X[12_345, 7] = value
    refused(cut(1000, X, Z), "in inputs", "row 12 345, column 7", "block 12")
    X[12_345, 7], Z[19_999, 0] = 0, value
    refused(cut(1000, X, Z), "in targets", "row 19 999, column 0", "block 19")
    huge = np.full((20, COLUMNS), 3e38, "f4")
    assert LayerIO.from_blocks(np.ones((2, COLUMNS), "f4"), None, [huge]).rows == 20


def test_bad_shards(tmp_path):
    _, _, X, Z = arrays("f4")

    def folder(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    with pytest.raises(InputError, match="no .npy or .safetensors files"):
        slr_gpu.open_shards(folder("empty"))
    for kind in ("npy", "safetensors"):
        write(here := folder(f"cut {kind}"), kind, X, Z)
        path = here / f"b.{kind}"
        whole = path.read_bytes()
        for broken in (b"", whole[:40], whole[:-9], b"\xff" * 60 + whole[60:]):
            path.write_bytes(broken)
            with pytest.raises(InputError, match=rf"b\.{kind}.*expected"):
                slr_gpu.open_shards(here)
    for name, array, words in (
        ("width", X[:, :-1], r"b.npy.*\(200, 23\)|b.npy.*\(600, 23\)"),
        ("dtype", X.astype("f8"), "b.npy.*float64.*float32"),
        ("dimensions", X[0], r"b.npy.*\(24,\)"),
        ("order", np.asfortranarray(X), "b.npy.*Fortran"),
        ("kind", X.astype(object), "b.npy"),
    ):
        write(here := folder(name), "npy", X, Z)
        np.save(here / "b.npy", array)
        with pytest.raises(InputError, match=words):
            slr_gpu.open_shards(here)
    write(here := folder("half a pair"), "pairs", X, Z)
    (here / "targets-b.npy").unlink()
    with pytest.raises(InputError, match=r"inputs-b.npy.*inputs, targets"):
        slr_gpu.open_shards(here)
    np.save(here / "targets-b.npy", Z[:5])
    with pytest.raises(InputError, match="targets-b.npy.*5 rows.*200"):
        slr_gpu.open_shards(here)
    np.save(here / "other.npy", Z[:5])
    with pytest.raises(InputError, match="other.npy among files"):
        slr_gpu.open_shards(here)
    write(here := folder("both"), "npy", X, Z)
    write(here, "safetensors", X, Z)
    with pytest.raises(InputError, match="both"):
        slr_gpu.open_shards(here)
    save_file({"rows": X}, folder("unnamed") / "a.safetensors")
    with pytest.raises(InputError, match="a.safetensors.*inputs"):
        slr_gpu.open_shards(tmp_path / "unnamed")
    save_file({"inputs": X.astype("i4")}, folder("integers") / "a.safetensors")
    with pytest.raises(InputError, match="a.safetensors.*I32"):
        slr_gpu.open_shards(tmp_path / "integers")


def test_shards_that_break_later(tmp_path):
    """NaN with the row of the file; a file that is cut short between two passes."""
    weight, bias, X, Z = arrays("f4")
    bad = X.copy()
    bad[433, 5] = np.nan
    write(tmp_path, "pairs", bad, Z)
    refused(
        slr_gpu.open_shards(tmp_path), "row 433, column 5", "inputs-c.npy", "row 33 of the file"
    )
    write(tmp_path, "pairs", X, Z)
    passing = LayerIO.from_blocks(weight, bias, slr_gpu.open_shards(tmp_path))
    path = tmp_path / "inputs-b.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"inputs-b\.npy.*as it was opened"):
        slr_gpu.fit(passing, columns=8, rank=2)
    np.save(path, np.ones((200, COLUMNS), "f4"))
    with pytest.raises(InputError, match=r"other rows.*block 1 .*inputs-b\.npy"):
        slr_gpu.fit(passing, columns=8, rank=2)


def test_what_a_layer_without_arrays_cannot_do(tmp_path):
    weight, bias, X, _ = arrays("f4")
    passing = LayerIO.from_blocks(weight, bias, [X])
    for name in ("inputs", "targets", "linear_targets", "responses"):
        with pytest.raises(AttributeError, match=f"{name} of a layer whose rows pass by"):
            getattr(passing, name)
    with pytest.raises(AttributeError, match="no attribute 'input'"):
        passing.input  # noqa: B018
    with pytest.raises(InputError, match="arrays in memory"):
        passing.save(tmp_path / "layer.safetensors")
    assert not list(tmp_path.iterdir())


# -- memory --------------------------------------------------------------------------------------


def test_one_block_is_in_memory(monkeypatch):
    """20 MB of rows pass by; at no time are more than three of their blocks alive, nor 8 MB."""
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(1024, 64)).astype("f4")
    weight = rng.normal(size=(16, 64)).astype("f4")
    alive, most = {}, [0]

    class Block(np.ndarray):
        pass

    def blocks():
        for number in range(80):
            block = np.roll(stored, number, axis=0).view(Block)
            alive[number] = weakref.ref(block)
            for other, reference in list(alive.items()):
                if reference() is None:
                    del alive[other]
            most[0] = max(most[0], len(alive))
            yield block

    monkeypatch.setattr("slr_gpu.problem.GRAM_BLOCK", 2048)
    monkeypatch.setattr(streamed, "KEPT_BYTES", 2**20)
    monkeypatch.setattr(streamed.Samples.sum, "__kwdefaults__",
                        {"block": 2048, "largest": 2048, "wants": "XYZ"})  # fmt: skip
    tracemalloc.start()
    try:
        passing = LayerIO.from_blocks(weight, None, blocks)
        solver = slr_gpu.WhitenedSVD()
        found = slr_gpu.fit(passing, rank=4, solver=solver, ridge=1e-3)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert passing.rows == 80 * 1024 and found.held_out_error < 1
    assert most[0] <= 3
    # A few numbers of eight bytes a row, of samples and of the split, are among them.
    assert peak < 8e6, peak


def test_blocks_reach_a_device_in_order():
    for seed in range(5):
        cupy, seen = Streams(seed), []
        X = np.arange(46.0).reshape(23, 2)
        buffer = np.empty((4, 2))

        def blocks(buffer=buffer, X=X):
            for start in range(0, 23, 4):
                rows = X[start : start + 4]
                buffer[: len(rows)] = rows
                yield (buffer[: len(rows)],)
                buffer[...] = np.nan

        for (block,) in DeviceMemory(cupy, 0).carry(blocks(), 4):
            cupy.current.add(lambda block=block, seen=seen: seen.append(block.host.copy()))
        np.testing.assert_array_equal(np.concatenate(seen), X)
    assert list(DeviceMemory(Streams(0), 0).carry(iter(()), 4)) == []


@pytest.mark.parametrize("taps", [1, 9])
def test_the_benchmark_compares_the_same_rows(taps):
    source = streaming.Rows(500, 8, 12, taps, 90)
    X, Z = source.whole()
    assert X.shape == (500, 12 * taps) and Z.shape == (500, 8)
    np.testing.assert_array_equal(X, np.concatenate([block[0] for block in source]))
    settings = ["500", "--outputs=8", "--channels=12", f"--taps={taps}", "--block=90"]
    found = []
    for where in ("blocks", "memory"):
        done = CliRunner().invoke(streaming.app, ["one", where, *settings])
        assert done.exit_code == 0, done.output
        found.append(json.loads(done.stdout))
    assert found[0]["held_out_error"] == pytest.approx(found[1]["held_out_error"], rel=1e-3)
    assert found[0]["passes"] > 3 and found[1]["passes"] is None
