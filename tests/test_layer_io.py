"""LayerIO: what it accepts, what it refuses and says, how it splits, save and load."""

import numpy as np
import pytest
import torch

from slr_gpu.errors import InputError
from slr_gpu.layer_io import LayerIO

RNG = np.random.default_rng(0)
W, B, X = RNG.normal(size=(3, 8)), RNG.normal(size=3), RNG.normal(size=(20, 8))


def test_defaults_are_the_layers_own_responses():
    layer_io = LayerIO(W, B, X)
    np.testing.assert_array_equal(layer_io.targets, np.maximum(X @ W.T + B, 0))
    assert (layer_io.channels, layer_io.taps, layer_io.kernel_size) == (8, 1, ())
    np.testing.assert_array_equal(LayerIO(W, None, X, activation="identity").targets, X @ W.T)


def test_linear_targets_define_the_targets():
    Z = RNG.normal(size=(20, 3))
    np.testing.assert_array_equal(LayerIO(W, B, X, linear_targets=Z).targets, np.maximum(Z, 0))


def test_convolution_weight_gives_the_kernel():
    layer_io = LayerIO(W.reshape(3, 2, 2, 2), B, X)
    assert (layer_io.channels, layer_io.taps, layer_io.kernel_size) == (2, 4, (2, 2))
    np.testing.assert_array_equal(layer_io.weight, W)
    assert LayerIO(W, B, X, kernel_size=(4,)).channels == 2
    assert "n=3, m=8, rows=20" in repr(layer_io)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ((W[0], B, X), "weight"),
        ((W, B[:2], X), "bias"),
        ((W, B, X[:, :7]), "inputs"),
        ((W, B, X[0]), "inputs"),
        ((W, B, X, RNG.normal(size=(20, 4))), "targets"),
        ((W, B, X, RNG.normal(size=(19, 3))), "targets"),
        ((W, B, X[:1]), r"1 calibration row"),
        ((W, B, X[:0]), r"0 calibration row"),
        ((W, B, X, None, "relu", (3,)), "kernel_size"),
        ((W[:, :0], B, X[:, :0]), "weight"),
        ((W.astype(str), B, X), "dtype"),
        ((W + 1j, B, X), "dtype"),
        ((W, B, X, None, "swishy"), "swishy"),
        ((W, B, X, None, "relu", "4"), "kernel_size"),
        ((W, B, X, None, "relu", (2.5,)), "kernel_size"),
        ((W, B, X, None, "relu", (-2, -2)), "kernel_size"),
        ((W, B, X, None, "relu", 0), "kernel_size"),
    ],
)
def test_bad_arrays_say_what_was_expected(arguments, word):
    with pytest.raises(InputError, match=rf"got .*{word}.*; expected "):
        LayerIO(*arguments)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name, index",
    [("weight", (1, 4)), ("bias", (2,)), ("inputs", (7, 3)), ("targets", (19, 0)),
     ("linear_targets", (0, 2))],
)  # fmt: skip
def test_nan_and_inf_are_named_with_their_index(name, index, value):
    arrays = {
        "weight": W.copy(), "bias": B.copy(), "inputs": X.copy(),
        "targets": np.ones((20, 3)), "linear_targets": np.ones((20, 3)),
    }  # fmt: skip
    arrays[name][index] = value
    with pytest.raises(InputError) as error:
        LayerIO(**arrays)
    assert f"NaN or Inf in {name}" in str(error.value)
    assert f"index {index}" in str(error.value)


def test_large_finite_numbers_are_not_taken_for_infinite():
    huge = np.full((20, 8), 1e308)
    assert LayerIO(W, B, huge, np.ones((20, 3))).inputs.max() == 1e308


def test_dtypes():
    half = LayerIO(W.astype(np.float16), B.astype(np.float16), X.astype(np.float16))
    for array in (half.weight, half.bias, half.inputs, half.targets):
        assert array.dtype == np.float32
    assert LayerIO(W, B, X).inputs.dtype == np.float64
    assert LayerIO(W, B, X.astype(np.float32), np.ones((20, 3))).targets.dtype == np.float32
    assert LayerIO(W, B, np.ones((20, 8), int)).inputs.dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_tensors_come_in(dtype):
    weight = torch.nn.Parameter(torch.from_numpy(W).to(dtype))
    layer_io = LayerIO(weight, torch.from_numpy(B).to(dtype), torch.from_numpy(X).to(dtype))
    assert layer_io.weight.dtype == np.float32
    np.testing.assert_array_equal(layer_io.weight, weight.detach().float().numpy())


@pytest.mark.parametrize("held_out", [0.05, 0.1, 0.25, 0.5])
def test_split_is_by_whole_samples(held_out):
    ids = np.repeat(np.arange(0, 80, 2), RNG.integers(1, 9, size=40))
    count = len(ids)
    layer_io = LayerIO(W, B, RNG.normal(size=(count, 8)), sample_ids=ids)
    fitted, held = layer_io.split(held_out)
    np.testing.assert_array_equal(np.sort(np.concatenate([fitted, held])), np.arange(count))
    assert not set(ids[fitted]) & set(ids[held])
    assert abs(len(set(ids[held])) / 40 - held_out) <= 0.03


@pytest.mark.parametrize("rows", [2, 3, 10, 63, 64, 65, 1000])
def test_split_of_single_rows_covers_all_and_keeps_some_to_fit(rows):
    fitted, held = LayerIO(W, B, RNG.normal(size=(rows, 8))).split(0.1)
    np.testing.assert_array_equal(np.sort(np.concatenate([fitted, held])), np.arange(rows))
    assert 1 <= len(held) <= max(1, 0.2 * rows)


def test_split_of_nothing_and_of_one_sample():
    layer_io = LayerIO(W, B, X)
    assert len(layer_io.split(0.0)[1]) == 0
    one = LayerIO(W, B, X, sample_ids=np.zeros(20, int))
    assert len(one.split(0.1)[0]) == 20


def test_split_by_numbers_among_all_samples():
    def held(ids, count, fold=0):
        layer_io = LayerIO(W, B, X[: len(ids)], sample_ids=ids, sample_count=count)
        fitted, held = layer_io.split(0.1, fold)
        assert len(fitted) > 0
        np.testing.assert_array_equal(np.sort(np.concatenate([fitted, held])), np.arange(len(ids)))
        return ids[held].tolist()

    assert held(np.arange(20) * 2 + 1, 40) == [9, 19, 29, 39]
    assert held(np.arange(20) * 2 + 1, 40, fold=2) == [7, 17, 27, 37]
    # None, or all of those that there are: counted anew.
    assert held(np.arange(10) * 2, 20) == [18]
    assert held(np.array([9, 19, 29]), 30) == [29]


@pytest.mark.parametrize("count", [None, 7])
def test_how_samples_count_is_saved(tmp_path, count):
    ids = np.repeat(np.arange(5), 4)
    LayerIO(W, B, X, sample_ids=ids, sample_count=count).save(tmp_path / "layer.safetensors")
    assert LayerIO.load(tmp_path / "layer.safetensors").sample_count == count


@pytest.mark.parametrize(
    "ids",
    [
        np.arange(19),
        np.arange(20)[::-1],
        np.arange(20, dtype="u8")[::-1],  # differences of unsigned integers are never below zero
        np.arange(20) / 2,
        np.full(20, np.nan),
    ],
)
def test_bad_sample_ids(ids):
    with pytest.raises(InputError, match="sample_ids"):
        LayerIO(W, B, X, sample_ids=ids)


@pytest.mark.parametrize("first", [-1, 1])
def test_sample_ids_beyond_their_count(first):
    with pytest.raises(InputError, match="sample_count=20"):
        LayerIO(W, B, X, sample_ids=np.arange(first, first + 20), sample_count=20)


def test_a_kernel_size_of_one_number():
    assert LayerIO(W, B, X, kernel_size=4).kernel_size == (4,)
    assert LayerIO(W, B, X, kernel_size=np.array([2, 2])).kernel_size == (2, 2)


@pytest.mark.parametrize("dtype", [">f8", np.longdouble])
def test_precision_of_uncommon_floats_is_kept(dtype):
    read = LayerIO(W.astype(dtype), B.astype(dtype), X.astype(dtype))
    for name, array in (("weight", W), ("bias", B), ("inputs", X)):
        assert getattr(read, name).dtype == np.float64
        np.testing.assert_array_equal(getattr(read, name), array)
    (_, (block, *_)), *_ = LayerIO.from_blocks(W, B, [X.astype(dtype)]).blocks
    np.testing.assert_array_equal(block, X)


def test_save_and_load_are_bit_for_bit(tmp_path):
    Z = RNG.normal(size=(20, 3))
    saved = LayerIO(
        W, B, X, activation="leaky_relu(0.3)", kernel_size=(2, 2), linear_targets=Z,
        sample_ids=np.repeat(np.arange(5), 4),
    )  # fmt: skip
    saved.save(tmp_path / "deep" / "layer.safetensors")
    loaded = LayerIO.load(tmp_path / "deep" / "layer.safetensors")
    for name in ("weight", "bias", "inputs", "targets", "linear_targets", "sample_ids"):
        one, other = getattr(saved, name), getattr(loaded, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert loaded.kernel_size == (2, 2) and loaded.activation.name == "leaky_relu(0.3)"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["layer.safetensors"]


def test_broken_files_are_input_errors(tmp_path):
    path = tmp_path / "layer.safetensors"
    with pytest.raises(InputError, match="expected"):
        LayerIO.load(path)
    LayerIO(W, B, X).save(path)
    whole = path.read_bytes()
    for broken in (b"", whole[:100], whole[:-20], b"\xff" * 64 + whole[64:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="expected"):
            LayerIO.load(path)
